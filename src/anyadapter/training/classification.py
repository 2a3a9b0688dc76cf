"""Classification of texts: which of a user's own classes a text, or a pair of texts, belongs to.

A row is ``{"text": ..., "label": ...}``, with ``"second"`` where a row is a pair of texts; the label is a name or a number.

A head for the classes is trained as a part of the adapter (``whole: [classifier]``), unless the base knows just these classes.
The names of the classes, in the order of the scores, are saved beside the adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase, set_seed

from anyadapter.core.adapter import Adapter
from anyadapter.core.catalogue import method_of
from anyadapter.core.errors import ConfigError, DataError, near
from anyadapter.training.base import load_base
from anyadapter.training.causal_lm import carried
from anyadapter.training.classes import Classified, label_of
from anyadapter.training.rows import Row, read_checked, renamed

FIELDS = ("text", "second", "label")
EXPECTED = 'a row is {"text", "label"}, with "second" for a pair of texts; name other columns by fields'


class Classification(Classified):
    """Texts and their classes."""

    def read(self, path: str | Path) -> list[Row]:
        known = (*FIELDS, *method_of(self.config.adapter).reads)
        for name in self.config.data.fields:
            if name not in known:
                raise ConfigError(f"data.fields has no {name!r}. {near(name, known)}")
        rows = read_checked(path, partial(check, fields=self.config.data.fields), EXPECTED)
        self.learn_classes(rows, path)
        return rows

    def load(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        base = self.config.base
        new = self.needs_head(known_classes(base.name, base.revision))
        more: dict[str, Any] = {"num_labels": len(self.classes), "ignore_mismatched_sizes": True} if new else {}
        set_seed(self.config.training.seed)  # of a new head, which a copy in the adapter starts from
        model, tokenizer = load_base(
            base.name,
            gguf_file=base.gguf_file,
            dtype=base.dtype,
            attn=base.attn,
            revision=base.revision,
            auto=AutoModelForSequenceClassification,
            **more,
        )
        if model.config.pad_token_id is None:  # by which models that read from the left find a row's last token
            model.config.pad_token_id = tokenizer.pad_token_id
        if new:
            self.note_head(model)
        return model, tokenizer

    def encode(self, rows: list[Row], processor: Any, adapter: Adapter) -> list[dict[str, Any]]:
        self.check_head(adapter)
        encoded = []
        for row in rows:
            pair = [row.values["text"], *([row.values["second"]] if "second" in row.values else [])]
            given = dict(processor(*pair, truncation=True, max_length=self.config.data.max_length))
            label = {"labels": self.classes.index(row.values["label"])}
            encoded.append({"given": given, **label, **carried(row, tuple(adapter.reads), adapter.row_signal)})
        return encoded

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return partial(collate, processor)


def check(where: str, value: Any, fields: dict[str, str]) -> Row:
    """A row under our names. Raises :class:`DataError` when it is none."""
    named = renamed(where, value, fields, EXPECTED, optional=("second",))
    if "text" not in named or "label" not in named:
        raise DataError(f"{where}: has the columns {', '.join(map(repr, value)) or 'none'}; {EXPECTED}.")
    for name in ("text", "second"):
        if name in named and (not isinstance(named[name], str) or not named[name].strip()):
            raise DataError(f"{where}: {name!r} is {named[name]!r}; expected text.")
    return Row(where, {**named, "label": label_of(where, named["label"])})


def known_classes(base: str, revision: str | None) -> tuple[str, ...]:
    """The classes of a base's own head. Raises :class:`ConfigError` when there is no such base."""
    try:
        config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The base {base!r} has no configuration of a text model: {error}") from error
    return tuple(str(config.id2label[i]) for i in range(config.num_labels))


def collate(tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the tokenizer gives, padded, with ``labels`` (batch,) and each signal stacked."""
    padded = tokenizer.pad([row["given"] for row in rows], return_tensors="pt", pad_to_multiple_of=8)
    signals = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name not in ("given", "labels")}
    return {**padded, "labels": torch.tensor([row["labels"] for row in rows]), **signals}
