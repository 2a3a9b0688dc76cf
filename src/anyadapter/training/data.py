"""A user's own data, from a file to batches. Everything that could be wrong with it is said before training starts.

A file is ``.jsonl`` (one JSON object a line) or ``.json`` (a list of objects). A row is one of

- ``{"instruction": ..., "input": ..., "output": ...}``, ``input`` optional: the model learns to answer;
- ``{"prompt": ..., "completion": ...}``: the same, joined as they are unless a template is chosen;
- ``{"text": ...}``: the model learns the whole text.

Other names are mapped by ``fields``; other entries of a row are ignored, but for those an adapter reads as signals.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from anyadapter.core.errors import ConfigError, DataError, SignalError, near
from anyadapter.training.llm_adapters_protocol import train_prompt

KINDS = (("instruction", "output"), ("prompt", "completion"), ("text",))
ROLES = ("instruction", "input", "output", "prompt", "completion", "text", "answer", "context")
SHOWN = 5  # bad rows named in one message
IGNORED = -100  # the label of a token that is not learnt
EXPECTED = (
    'a row is {"instruction", "output"} with an optional "input", {"prompt", "completion"}, or {"text"}; name other columns by '
    'fields, as in fields: {instruction: question, output: answer}'
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One row: where it stands in its file, and its fields under our names."""

    where: str
    values: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """``"instruction"``, ``"prompt"`` or ``"text"``."""
        return next(kind[0] for kind in KINDS if all(name in self.values for name in kind))


# ---------------------------------------------------------------------- reading


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
    rows, problems = [], []
    for where, value in read_objects(Path(path)):
        try:
            rows.append(check(where, value, fields or {}))
        except DataError as error:
            problems.append(str(error))
    if problems:
        more = f"\n… and {len(problems) - SHOWN} more rows of {path}" if len(problems) > SHOWN else ""
        raise DataError("\n".join(problems[:SHOWN]) + more)
    if not rows:
        raise DataError(f"{path} holds no rows; expected at least one: {EXPECTED}.")
    return rows


def read_objects(path: Path) -> Iterator[tuple[str, Any]]:
    """(``file:line``, value) of every JSON value in a file."""
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"{path}: expected a .jsonl file (one JSON object a line) or a .json file (a list of objects).")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8.") from None
    yield from _lines(path, text) if path.suffix == ".jsonl" else _items(path, text)


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON ({error}); expected one JSON object a line.") from None


def _items(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The items of a list, one by one, so that each is known by its line."""
    decoder, space = json.JSONDecoder(), " \t\r\n"
    position, line, counted = len(text) - len(text.lstrip()), 1, 0
    if text[position : position + 1] != "[":
        raise DataError(f"{path}:1: expected a JSON list of objects; for one object a line, name the file .jsonl.")
    closing = True  # an empty list may close at once
    while True:
        position += 1
        while text[position : position + 1] in space and position < len(text):
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        if closing and text[position : position + 1] == "]":
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except ValueError as error:
            at = getattr(error, "lineno", line)
            raise DataError(f"{path}:{at}: not JSON ({error}); the item starts at line {line}.") from None
        yield f"{path}:{line}", value
        while text[position : position + 1] in space and position < len(text):
            position += 1
        if text[position : position + 1] == "]":
            return
        if text[position : position + 1] != ",":
            raise DataError(f"{path}:{line}: this item is not followed by ',' or ']'; the file may be cut short.")
        closing = False


def check(where: str, value: Any, fields: Mapping[str, str]) -> Row:
    """A row under our names. Raises :class:`DataError` when it is none or has nothing to learn."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON {type(value).__name__}, not an object; {EXPECTED}.")
    for name, column in fields.items():
        if column not in value and name not in ("input", "answer"):
            raise DataError(
                f"{where}: no column {column!r}, which fields maps to {name!r}. {near(column, map(str, value))}"
            )
    named = {**value, **{name: value[column] for name, column in fields.items() if column in value}}
    kind = next((kind for kind in KINDS if all(name in named for name in kind)), None)
    if kind is None:
        raise DataError(f"{where}: has the columns {', '.join(map(repr, value)) or 'none'}; {EXPECTED}.")
    for name in (*kind, "input"):
        if name in named and not isinstance(named[name], str) and not (name == "input" and named[name] is None):
            raise DataError(f"{where}: {name!r} is a {type(named[name]).__name__}; expected text.")
    if not named[kind[-1]].strip():
        raise DataError(f"{where}: {kind[-1]!r} is empty, so there is nothing to learn; remove the row or fill it.")
    return Row(where, named)


def split(rows: Sequence[Row], held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(training rows, ``held_out`` evaluation rows), drawn at random, both in the order of the file."""
    if not 0 < held_out < len(rows):
        raise DataError(f"{held_out} of {len(rows)} rows cannot be held out; expected 1 to {len(rows) - 1}.")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(order[:held_out])
    return [r for i, r in enumerate(rows) if i not in chosen], [r for i, r in enumerate(rows) if i in chosen]


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
        {**_encode(row, tokenizer, template, max_length, train_on_inputs), **_carried(row, carry, signal)} for row in rows
    ]  # fmt: skip


def _encode(
    row: Row, tokenizer: PreTrainedTokenizerBase, template: str, max_length: int, train_on_inputs: bool
) -> dict[str, list[int]]:
    prompt = prompt_of(row.values, template, tokenizer)
    answer = row.values[next(kind[-1] for kind in KINDS if kind[0] == row.kind)]
    special = template != "chat" or row.kind == "text"  # a chat template writes its own special tokens
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


def _carried(row: Row, carry: tuple[str, ...], signal: Callable[[str, Any], Any]) -> dict[str, Any]:
    carried = {}
    for name in carry:
        if name not in row.values:
            raise DataError(f"{row.where}: no {name!r}, which the adapter reads as a signal. {near(name, row.values)}")
        try:
            carried[name] = torch.as_tensor(signal(name, row.values[name]))
        except SignalError as error:
            raise DataError(f"{row.where}: {error}") from None
        except (TypeError, ValueError, RuntimeError):
            raise DataError(
                f"{row.where}: {name!r} is {row.values[name]!r}; a signal is a number or numbers."
            ) from None
    return carried


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
