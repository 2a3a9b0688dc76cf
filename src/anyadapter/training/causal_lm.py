"""Causal language modelling on a user's own rows: prompts, tokens, batches.

A row is one of

- ``{"instruction": ..., "input": ..., "output": ...}``, ``input`` optional: the model learns to answer;
- ``{"prompt": ..., "completion": ...}``: the same, joined as they are unless a template is chosen;
- ``{"text": ...}``: the model learns the whole text.

Other names are mapped by ``fields``; other entries of a row are ignored, but for those an adapter reads as signals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from anyadapter.core.adapter import Adapter
from anyadapter.core.catalogue import method_of
from anyadapter.core.errors import ConfigError, DataError, SignalError, near
from anyadapter.training.base import load_base
from anyadapter.training.llm_adapters_protocol import train_prompt
from anyadapter.training.rows import Row, read_checked, renamed
from anyadapter.training.tasks import DataSettings, Task

KINDS = (("instruction", "output"), ("prompt", "completion"), ("text",))
ROLES = ("instruction", "input", "output", "prompt", "completion", "text", "answer", "context")
IGNORED = -100  # the label of a token that is not learnt
EXPECTED = (
    'a row is {"instruction", "output"} with an optional "input", {"prompt", "completion"}, or {"text"}; name other columns by '
    'fields, as in fields: {instruction: question, output: answer}'
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CausalLMSettings(DataSettings):
    """What to learn from, as text that goes on.

    Attributes:
        template: how a prompt is written: ``auto``, ``alpaca``, ``llm-adapters``, ``chat`` or ``plain``.
        train_on_inputs: learn the prompt's tokens as well.
        padding: the side, ``right`` or ``left``.
    """

    template: str = "auto"
    train_on_inputs: bool = False
    padding: str = "right"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self.template)
        self.require("padding", self.padding in ("left", "right"), "'left' or 'right'")


class CausalLM(Task):
    """The next token of texts and answers; the loss is the model's own."""

    Settings: ClassVar[type[DataSettings]] = CausalLMSettings

    def read(self, path: str | Path) -> list[Row]:
        return read_rows(path, self.config.data.fields, method_of(self.config.adapter).reads)

    def load(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        base = self.config.base
        return load_base(base.name, gguf_file=base.gguf_file, dtype=base.dtype, attn=base.attn, revision=base.revision)

    def encode(self, rows: list[Row], processor: Any, adapter: Adapter) -> list[dict[str, Any]]:
        data: Any = self.config.data
        return tokenise(
            rows,
            processor,
            template=data.template,
            max_length=data.max_length,
            train_on_inputs=data.train_on_inputs,
            carry=adapter.reads,
            signal=adapter.row_signal,
        )

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        data: Any = self.config.data
        return Collator(int(processor.pad_token_id or 0), data.padding)


def kind_of(row: Row) -> str:
    """``"instruction"``, ``"prompt"`` or ``"text"``."""
    return next(each[0] for each in KINDS if all(name in row.values for name in each))


def read_rows(path: str | Path, fields: Mapping[str, str] | None = None, signals: Iterable[str] = ()) -> list[Row]:
    """All rows of a file, checked.

    Args:
        path: a ``.jsonl`` or ``.json`` file.
        fields: our name -> the column's name, where they differ.
        signals: names besides ours that ``fields`` may map: those an adapter reads.

    Raises:
        DataError: the file or a row cannot be used; the message names the file, the line and what was expected.
        ConfigError: ``fields`` maps a name that is none of ours.
    """
    known = (*ROLES, *signals)
    for name in fields or {}:
        if name not in known:
            raise ConfigError(f"data.fields has no {name!r}. {near(name, known)}")
    return read_checked(path, partial(check, fields=fields or {}), EXPECTED)


def check(where: str, value: Any, fields: Mapping[str, str]) -> Row:
    """A row under our names. Raises :class:`DataError` when it is none or has nothing to learn."""
    named = renamed(where, value, fields, EXPECTED, optional=("input", "answer"))
    kind = next((kind for kind in KINDS if all(name in named for name in kind)), None)
    if kind is None:
        raise DataError(f"{where}: has the columns {', '.join(map(repr, value)) or 'none'}; {EXPECTED}.")
    for name in (*kind, "input"):
        if name in named and not isinstance(named[name], str) and not (name == "input" and named[name] is None):
            raise DataError(f"{where}: {name!r} is a {type(named[name]).__name__}; expected text.")
    if not named[kind[-1]].strip():
        raise DataError(f"{where}: {kind[-1]!r} is empty, so there is nothing to learn; remove the row or fill it.")
    return Row(where, named)


# ---------------------------------------------------------------------- prompts


def alpaca(instruction: str, context: str | None) -> str:
    """The prompt of Stanford Alpaca (Taori et al. 2023), in its plain layout."""
    start = "Below is an instruction that describes a task"
    middle = ", paired with an input that provides further context" if context else ""
    given = f"### Input:\n{context}\n\n" if context else ""
    return (
        f"{start}{middle}. Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
        f"{given}### Response:\n"
    )


def plain(instruction: str, context: str | None) -> str:
    """The instruction and the input, each on lines of its own."""
    return f"{instruction}\n{context}\n" if context else f"{instruction}\n"


PROMPTS: dict[str, Callable[[str, str | None], str]] = {
    "alpaca": alpaca,
    "llm-adapters": train_prompt,
    "plain": plain,
}
TEMPLATES = ("auto", "chat", *PROMPTS)


def check_template(template: str, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Raise a :class:`ConfigError` unless it is one of :data:`TEMPLATES` that this tokenizer can write."""
    if template not in TEMPLATES:
        raise ConfigError(f"There is no prompt template {template!r}. {near(template, TEMPLATES)}")
    if template == "chat" and tokenizer is not None and not tokenizer.chat_template:
        raise ConfigError("The base's tokenizer has no chat template; choose the template 'alpaca' or 'plain'.")


def prompt_of(values: Mapping[str, Any], template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What comes before the answer in a row; nothing before a text.

    ``"auto"`` leaves a ``prompt`` as it is and puts an ``instruction`` into Alpaca's; so does ``"plain"`` a ``prompt``.
    """
    if "instruction" in values:
        instruction, context = values["instruction"], values.get("input")
    elif "prompt" in values:
        if template in ("auto", "plain"):
            return str(values["prompt"])
        instruction, context = values["prompt"], None
    else:
        return ""
    if template == "chat":
        message = {"role": "user", "content": f"{instruction}\n\n{context}" if context else instruction}
        return str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
    return PROMPTS["alpaca" if template == "auto" else template](instruction, context)


# ---------------------------------------------------------------------- tokens


def tokenise(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "auto",
    max_length: int = 512,
    train_on_inputs: bool = False,
    carry: Iterable[str] = (),
    signal: Callable[[str, Any], Any] = lambda name, value: value,
) -> list[dict[str, Any]]:
    """``{"input_ids", "labels"}`` of every row, and the signals it carries.

    The text is cut at ``max_length`` tokens, and ends with the end-of-sequence token where there is room for it.

    Args:
        train_on_inputs: learn the prompt's tokens as well as the answer's.
        carry: entries of a row to take along.
        signal: makes a number or numbers of such an entry, given its name; by default it is one.

    Raises:
        DataError: nothing of the answer is left within ``max_length``, or a carried entry is missing.
    """
    check_template(template, tokenizer)
    carry = tuple(carry)
    return [
        {**_encode(row, tokenizer, template, max_length, train_on_inputs), **carried(row, carry, signal)} for row in rows
    ]  # fmt: skip


def _encode(
    row: Row, tokenizer: PreTrainedTokenizerBase, template: str, max_length: int, train_on_inputs: bool
) -> dict[str, list[int]]:
    prompt = prompt_of(row.values, template, tokenizer)
    answer = row.values[next(each[-1] for each in KINDS if each[0] == kind_of(row))]
    special = template != "chat" or kind_of(row) == "text"  # a chat template writes its own special tokens
    whole = tokenizer(prompt + answer, add_special_tokens=special)["input_ids"]
    ids = whole[:max_length]
    if len(ids) < max_length and tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    given = 0
    if prompt and not train_on_inputs:
        # Tokens may join prompt and answer; only those that the prompt alone has too are not learnt.
        alone = tokenizer(prompt, add_special_tokens=special)["input_ids"]
        given = next((i for i, (a, b) in enumerate(zip(alone, ids)) if a != b), min(len(alone), len(ids)))
    # The first token of a sequence is never predicted.
    if given >= len(ids) or len(ids) < 2:
        raise DataError(
            f"{row.where}: {len(whole)} tokens, of which the first {max_length} hold nothing of the answer to learn; raise "
            "max_length, shorten the row or set train_on_inputs."
        )
    return {"input_ids": ids, "labels": [IGNORED] * given + ids[given:]}


def carried(row: Row, carry: tuple[str, ...], signal: Callable[[str, Any], Any]) -> dict[str, Any]:
    """The entries of a row that an adapter reads as signals, as tensors. Raises :class:`DataError` when one is missing."""
    found = {}
    for name in carry:
        if name not in row.values:
            raise DataError(f"{row.where}: no {name!r}, which the adapter reads as a signal. {near(name, row.values)}")
        try:
            found[name] = torch.as_tensor(signal(name, row.values[name]))
        except SignalError as error:
            raise DataError(f"{row.where}: {error}") from None
        except (TypeError, ValueError, RuntimeError):
            raise DataError(
                f"{row.where}: {name!r} is {row.values[name]!r}; a signal is a number or numbers."
            ) from None
    return found


class Collator:
    """Rows to a batch: padded to its longest row, in a multiple of 8.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each (batch, length), and each signal stacked, (batch, …).
    """

    def __init__(self, pad_token_id: int, side: str = "right", multiple: int = 8) -> None:
        if side not in ("left", "right"):
            raise ConfigError(f"Padding goes on the 'left' or the 'right', not {side!r}.")
        self.pad_token_id, self.side, self.multiple = pad_token_id, side, multiple

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        length = math.ceil(longest / self.multiple) * self.multiple

        def pad(lists: Iterable[list[int]], value: int) -> Tensor:
            padding = [([value] * (length - len(each)), each) for each in lists]
            return torch.tensor([p + x if self.side == "left" else x + p for p, x in padding])

        return {
            "input_ids": pad((row["input_ids"] for row in rows), self.pad_token_id),
            "attention_mask": pad(([1] * len(row["input_ids"]) for row in rows), 0),
            "labels": pad((row["labels"] for row in rows), IGNORED),
            **{key: torch.stack([row[key] for row in rows]) for key in rows[0] if key not in ("input_ids", "labels")},
        }
