"""Masked language modelling: a domain's text, which needs no labels, or facts whose object is masked whole.

A row is one of

- ``{"text": ...}``: some of its tokens are hidden, others each time; a long text is cut into pieces;
- ``{"text": "{} treats pain.", "target": "Aspirin"}``: all tokens of the target are hidden, in the place of the braces.

``"general"``, beside either, is text of no domain, for an adapter that has a ``sampling_loss``: it is to forget nothing of what
the base does there, and λ · (the loss of the masked tokens) + that loss is learnt. Other entries are ignored, but for those an
adapter reads as signals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerBase

from anyadapter.core.adapter import Adapter
from anyadapter.core.catalogue import method_of
from anyadapter.core.errors import ConfigError, DataError, near
from anyadapter.training.base import load_base
from anyadapter.training.causal_lm import IGNORED, carried
from anyadapter.training.rows import Row, read_checked, renamed
from anyadapter.training.tasks import DataSettings, Task

SLOT = "{}"  # where a target belongs
FIELDS = ("text", "target", "general")
EXPECTED = 'a row is {"text"}, or {"text", "target"} with {} in the text where the target belongs; name other columns by fields'
MULTIPLE = 8  # batches are padded to one of its multiples


@dataclass(frozen=True, kw_only=True)
class MaskedLMSettings(DataSettings):
    """What to learn from, as text with gaps.

    Attributes:
        chosen: share of a text's tokens that are to be told from the others.
        masked: share of these that stand as the mask token. BERT's 0.8; MixDA's 0.85.
        random: share that stand as a random token, 0.1 or MixDA's 0.05; the rest stay as they are.
    """

    task: str = "masked_lm"
    max_length: int = 128
    chosen: float = 0.15
    masked: float = 0.8
    random: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("chosen", 0 < self.chosen <= 1, "above 0 and at most 1")
        for name in ("masked", "random"):
            self.require(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        self.require(
            "random", self.masked + self.random <= 1, f"at most {1 - self.masked:g}, for masked is {self.masked:g}"
        )


class MaskedLM(Task):
    """Hidden tokens of texts. In training others are drawn each time; for the evaluation loss they stay the same."""

    Settings: ClassVar[type[DataSettings]] = MaskedLMSettings

    def read(self, path: str | Path) -> list[Row]:
        method, fields = method_of(self.config.adapter), self.config.data.fields
        for name in fields:
            if name not in (*FIELDS, *method.reads):
                raise ConfigError(f"data.fields has no {name!r}. {near(name, (*FIELDS, *method.reads))}")
        rows = read_checked(path, partial(check, fields=fields), EXPECTED)
        if hasattr(method, "sampling_loss"):
            check_general(rows, path)
        return rows

    def load(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        base = self.config.base
        given = {"dtype": base.dtype, "attn": base.attn, "revision": base.revision}
        return load_base(base.name, gguf_file=base.gguf_file, auto=AutoModelForMaskedLM, **given)

    def encode(self, rows: list[Row], processor: Any, adapter: Adapter) -> list[dict[str, Any]]:
        check_tokenizer(processor)
        self.adapter, self.mask_token, self.vocabulary = adapter, int(processor.mask_token_id), len(processor)
        samples, length = hasattr(adapter, "sampling_loss"), self.config.data.max_length
        encoded = []
        for row in rows:
            signals = carried(row, tuple(adapter.reads), adapter.row_signal)
            found = (
                target(row, processor, length)
                if "target" in row.values
                else pieces(row.values["text"], processor, length)
            )
            general = pieces(row.values["general"], processor, length) if samples and "general" in row.values else []
            for i, one in enumerate(found):
                of_general = {"general": general[i % len(general)]["input_ids"]} if general else {}
                encoded.append({**one, **signals, **of_general})
        return encoded

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        return partial(collate, pad_token_id=int(processor.pad_token_id or 0), side=processor.padding_side)

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The loss of the masked tokens; with general text in the batch, λ times this and the adapter's sampling loss."""
        adapter: Any = self.adapter
        general = {key.removeprefix("general_"): value for key, value in batch.items() if key.startswith("general_")}
        loss = masked_loss(*self.answers(model, batch, fixed=not model.training))
        if not general:
            return loss
        return adapter.config.knowledge_weight * loss + adapter.sampling_loss(model, **general)

    def answers(self, model: nn.Module, batch: dict[str, Tensor], fixed: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, labels, which rows are of a target), the tokens hidden anew or, when ``fixed``, always the same."""
        data: Any = self.config.data
        draw = torch.Generator(batch["input_ids"].device).manual_seed(self.config.training.seed) if fixed else None
        shares = (data.chosen, data.masked, data.random)
        ids, labels = hide(batch, shares, self.mask_token, self.vocabulary, draw)
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
        return logits, labels, (batch["labels"] != IGNORED).any(1)

    def measure(self, model: nn.Module, rows: list[dict[str, Any]], processor: Any) -> dict[str, float]:
        """``masked_accuracy``, the share of the hidden tokens of the evaluation rows that score highest."""
        device, right, count = next(model.parameters()).device, 0, 0
        collator, size = self.collator(processor), self.config.training.batch_size
        with torch.inference_mode():
            for start in range(0, len(rows), size):
                batch = {key: value.to(device) for key, value in collator(rows[start : start + size]).items()}
                logits, labels, _ = self.answers(model, batch, fixed=True)
                asked = labels != IGNORED
                right += int((logits.argmax(-1) == labels)[asked].sum())
                count += int(asked.sum())
        return {"masked_accuracy": right / max(1, count)}


# ---------------------------------------------------------------------- rows


def check(where: str, value: Any, fields: dict[str, str]) -> Row:
    """A row under our names. Raises :class:`DataError` when it is none."""
    named = renamed(where, value, fields, EXPECTED, optional=("target", "general"))
    if "text" not in named:
        raise DataError(f"{where}: has the columns {', '.join(map(repr, value)) or 'none'}; {EXPECTED}.")
    for name in FIELDS:
        if name in named and (not isinstance(named[name], str) or not named[name].strip()):
            raise DataError(f"{where}: {name!r} is {named[name]!r}; expected text.")
    if "target" in named and named["text"].count(SLOT) != 1:
        raise DataError(
            f"{where}: the text of a target has {SLOT} once, where the target belongs: {named['text'][:80]!r}."
        )
    return Row(where, named)


def check_general(rows: Sequence[Row], path: str | Path) -> None:
    """Raise a :class:`DataError` where some rows of a file have general text and others have none."""
    without = [row.where for row in rows if "general" not in row.values]
    if without and len(without) < len(rows):
        raise DataError(
            f"{without[0]}: no 'general' text, which other rows of {path} have; give it to all rows or to none."
        )


def check_tokenizer(tokenizer: Any) -> None:
    """Raise a :class:`ConfigError` unless it has a mask token and tells where in a text its tokens lie."""
    if getattr(tokenizer, "mask_token_id", None) is None:
        raise ConfigError("The base's tokenizer has no mask token; expected that of a masked language model.")
    if not tokenizer.is_fast:
        raise ConfigError(
            "The base's tokenizer does not tell where its tokens lie; expected a fast one (tokenizer.json)."
        )


# ---------------------------------------------------------------------- tokens


def pieces(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, Any]]:
    """A text in pieces of at most ``max_length`` tokens: ``input_ids``, ``special`` (1 at special tokens), ``labels`` (none)."""
    cut = tokenizer(
        text, truncation=True, max_length=max_length, return_overflowing_tokens=True, return_special_tokens_mask=True
    )
    return [
        {"input_ids": ids, "special": special, "labels": [IGNORED] * len(ids)}
        for ids, special in zip(cut["input_ids"], cut["special_tokens_mask"])
    ]


def target(row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, Any]]:
    """The one piece of a row with a target, whose tokens are masked and labelled, and no others.

    Raises:
        DataError: the target is cut off at ``max_length``.
    """
    before, after = row.values["text"].split(SLOT)
    first, last = len(before), len(before) + len(row.values["target"])
    whole = tokenizer(
        before + row.values["target"] + after, truncation=True, max_length=max_length, return_offsets_mapping=True
    )
    ids = whole["input_ids"]
    # A token that ends where the target begins, or begins where it ends, is not of it.
    inside = [start < last and end > first for start, end in whole["offset_mapping"]]
    reached = max((end for _, end in whole["offset_mapping"]), default=0)
    if not any(inside) or reached < last:
        raise DataError(
            f"{row.where}: the target {row.values['target']!r} is cut off at {max_length} tokens; raise max_length."
        )
    mask = tokenizer.mask_token_id
    return [
        {
            "input_ids": [mask if hidden else token for token, hidden in zip(ids, inside)],
            "special": [1] * len(ids),
            "labels": [token if hidden else IGNORED for token, hidden in zip(ids, inside)],
        }
    ]


def collate(rows: list[dict[str, Any]], pad_token_id: int, side: str = "right") -> dict[str, Tensor]:
    """Rows to a batch: ``input_ids``, ``attention_mask``, ``labels``, ``special``, (batch, length) each, signals stacked.

    General text lies in a batch of its own: ``general_input_ids`` and ``general_attention_mask``.
    """

    def pad(lists: Sequence[Sequence[int]], value: int) -> Tensor:
        length = math.ceil(max(map(len, lists)) / MULTIPLE) * MULTIPLE
        filled = [([value] * (length - len(each)), list(each)) for each in lists]
        return torch.tensor([p + x if side == "left" else x + p for p, x in filled])

    batch = {"attention_mask": pad([[1] * len(row["input_ids"]) for row in rows], 0)}
    for name, value in (("input_ids", pad_token_id), ("labels", IGNORED), ("special", 1)):
        batch[name] = pad([row[name] for row in rows], value)
    if all("general" in row for row in rows):
        batch["general_input_ids"] = pad([row["general"] for row in rows], pad_token_id)
        batch["general_attention_mask"] = pad([[1] * len(row["general"]) for row in rows], 0)
    own = ("input_ids", "labels", "special", "general")
    return batch | {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name not in own}


def hide(
    batch: dict[str, Tensor],
    shares: tuple[float, float, float],
    mask_token: int,
    vocabulary: int,
    draw: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """(ids with tokens hidden, labels), (batch, length) each; rows that have labels already stay as they are.

    Args:
        shares: of the tokens chosen; and of these, those masked and those made random ones.
        draw: where the randomness comes from; by default torch's own, which a run that goes on takes up.
    """
    chosen, masked, random = shares
    ids, device = batch["input_ids"], batch["input_ids"].device
    chance = torch.rand(ids.shape, generator=draw, device=device)
    fate = torch.rand(ids.shape, generator=draw, device=device)
    others = torch.randint(vocabulary, ids.shape, generator=draw, device=device)
    picked = (chance < chosen) & (batch["special"] == 0)
    labels = torch.where(picked, ids, batch["labels"])
    hidden = torch.where(picked & (fate < masked), mask_token, ids)
    return torch.where(picked & (fate >= 1 - random), others, hidden), labels


def masked_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of hidden tokens: over all of the texts; of rows with a target the mean of each, then over rows.

    Args:
        logits: (batch, length, vocabulary).
        labels: (batch, length); −100 where nothing is asked.
        targets: (batch,), which rows have a target. Both kinds count by their numbers of rows.
    """
    each = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    real = (labels != IGNORED).float()
    rows = each.sum(1) / real.sum(1).clamp(min=1)
    texts = (each * ~targets[:, None]).sum() / (real * ~targets[:, None]).sum().clamp(min=1)
    share = targets.float().mean()
    return (rows * targets).sum() / len(rows) + (1 - share) * texts
