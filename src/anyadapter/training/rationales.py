"""What RAFT learns from: texts with the words that people gave as reasons, and few labelled texts of another place.

Task ``rationales``, for the predictor. A row is ``{"words": [...]}`` with any of

- ``"rationales"``: 0 or 1 for each word; a list of such lists where several people marked it, of whom more than half decide;
- ``"label"``: a name; a list of them where several people chose, of which the most frequent counts;
- ``"targets"``: names; a list of such lists where several people chose, of which two must name a target.

Task ``rationale_classification``, for the classifier. A row is ``{"text", "label"}``, as of the task ``classification``. The
predictor runs over all texts once, before training; what it says of each goes with the row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, PreTrainedTokenizerBase

from anyadapter.core.adapter import Adapter
from anyadapter.core.errors import ConfigError, DataError, near
from anyadapter.formats.files import CONFIG, read_json
from anyadapter.formats.native import load, locate
from anyadapter.methods.language.raft import IGNORED, SIGNAL, random_rationales
from anyadapter.training import classification
from anyadapter.training.base import load_base
from anyadapter.training.classes import macro_f1
from anyadapter.training.classification import Classification
from anyadapter.training.rows import Row, read_checked, renamed, split
from anyadapter.training.tasks import DataSettings, Task

OTHER = "Other"  # the target that stands for all that are not kept
BATCH = 32  # texts read at once outside of training
PADS = {"attention_mask": 0, "rationale_labels": IGNORED}
MARKED = 'a row is {"words": [...]} with "rationales", "label", "targets", or several; name other columns by fields'


# ---------------------------------------------------------------------- several annotators


def majority(masks: Sequence[Sequence[int]], annotators: int | None = None) -> list[int]:
    """1 for each word that more than half marked.

    Args:
        masks: one for each annotator, at least one.
        annotators: how many there were; those without a mask marked nothing. The authors count three.
    """
    count = max(annotators or 0, len(masks))
    return [int(2 * sum(column) > count) for column in zip(*masks, strict=True)]


def target_names(chosen: Iterable[Sequence[str]], least: int = 21) -> tuple[str, ...]:
    """The targets that annotators named ``least`` times or more, and ``"Other"`` for the rest (HateXplain: 21)."""
    counts = Counter(name for names in chosen for name in names)
    kept = sorted(name for name, count in counts.items() if count >= least and name != OTHER)
    return (*kept, *((OTHER,) if OTHER in counts or len(kept) < len(counts) else ()))


def multi_hot(chosen: Sequence[str] | Sequence[Sequence[str]], names: Sequence[str]) -> list[float]:
    """1 for each target that was chosen: by two annotators, where several are given.

    Raises:
        DataError: a target is not among ``names``, and neither is ``"Other"``.
    """
    several: list[Any] = [each for each in chosen if not isinstance(each, str)] or [chosen]
    votes = Counter(name for each in several for name in {known(name, names) for name in each})
    needed = min(2, len(several))
    return [float(votes[name] >= needed) for name in names]


def known(name: str, names: Sequence[str]) -> str:
    """The name, or "Other" where it is not kept."""
    if name in names:
        return name
    if OTHER not in names:
        raise DataError(f"there is no target {name!r}. {near(str(name), names)} Add {OTHER!r} to stand for all others.")
    return OTHER


# ---------------------------------------------------------------------- words and pieces


def align(
    words: Sequence[str], mask: Sequence[int] | None, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[int], list[int]]:
    """(token ids, rationale labels) of words: a piece inherits the mark of the word it is of, by where it stands in the text.

    Special tokens have the label 0; without a mask all are −100.

    Raises:
        ConfigError: the tokenizer does not say where a token stands; it is none of the fast ones.
    """
    if not tokenizer.is_fast:
        raise ConfigError(f"A {type(tokenizer).__name__} does not say where its tokens stand; use a fast tokenizer.")
    encoded = tokenizer(
        " ".join(words), truncation=True, max_length=max_length, return_offsets_mapping=True, verbose=False
    )
    ids: list[int] = encoded["input_ids"]
    if mask is None:
        return ids, [IGNORED] * len(ids)
    marks = [mark for word, mark in zip(words, mask, strict=True) for mark in [mark] * len(word) + [0]]
    return ids, [int(any(marks[start:end])) for start, end in encoded["offset_mapping"]]


def official_alignment(
    words: Sequence[str],
    masks: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    length: int = 128,
    annotators: int = 3,
) -> tuple[list[int], list[list[int]], list[int]]:
    """The authors' (token ids, a mask for each annotator, the majority's), to compare with their data.

    Runs of words of equal mark are cut into pieces together, which is not always how the text as a whole is cut; [CLS] and
    [SEP] are 101 and 102 whatever the vocabulary; at most length − 3 pieces are kept, one fewer than their own tokenizer
    keeps between the two.
    """
    filled = [list(mask) for mask in masks] + [[0] * len(words) for _ in range(annotators - len(masks))]
    ids: list[int] = []
    done = []
    for mask in filled:
        pieces: list[int] = []
        marks: list[int] = []
        for mark, run in runs(words, mask):
            found = tokenizer.encode(" ".join(run), add_special_tokens=False)
            pieces, marks = pieces + found, marks + [mark] * len(found)
        ids = [101, *pieces[: length - 3], 102]
        done.append([0, *marks[: length - 3], 0])
    return ids, done, majority(done, annotators)


def runs(words: Sequence[str], mask: Sequence[int]) -> list[tuple[int, list[str]]]:
    """Words in runs of equal mark."""
    found: list[tuple[int, list[str]]] = []
    for word, mark in zip(words, mask, strict=True):
        if found and found[-1][0] == mark:
            found[-1][1].append(word)
        else:
            found.append((mark, [word]))
    return found


# ---------------------------------------------------------------------- rows


def check_marked(where: str, value: Any, fields: dict[str, str]) -> Row:
    """A row of the task ``rationales``. Raises :class:`DataError` when it is none."""
    named = renamed(where, value, fields, MARKED, optional=("rationales", "label", "targets"))
    words = named.get("words")
    if not isinstance(words, list) or not words or not all(isinstance(w, str) and w and w == w.strip() for w in words):
        raise DataError(
            f"{where}: 'words' is {str(words)[:80]}; expected a list of words, without white space around them."
        )
    taught = {key: named[key] for key in ("rationales", "label", "targets") if named.get(key) is not None}
    if not taught:
        raise DataError(f"{where}: there is nothing to learn; {MARKED}.")
    if "rationales" in taught:
        masks = taught["rationales"]
        masks = masks if isinstance(masks, list) and masks and isinstance(masks[0], list) else [masks]
        if not all(isinstance(m, list) and len(m) == len(words) and set(m) <= {0, 1} for m in masks):
            raise DataError(f"{where}: 'rationales' does not hold 0 or 1 for each of the {len(words)} words.")
        taught["rationales"] = majority(masks)
    return Row(where, {"words": words, **taught})


def label_of(row: Row, labels: Sequence[str]) -> int:
    """The number of a row's label, −100 without one. Raises :class:`DataError` when it is not among ``labels``."""
    label = row.values.get("label")
    if label is None:
        return IGNORED
    if isinstance(label, list) and label:
        label = Counter(label).most_common(1)[0][0]
    label = str(label)
    if label not in labels:
        raise DataError(f"{row.where}: there is no label {label!r} among the adapter's. {near(label, labels)}")
    return list(labels).index(label)


class Collator:
    """Rows to a batch, padded on the right to its longest row, in a multiple of 8.

    Returns:
        ``input_ids`` and ``attention_mask`` (batch, tokens), and what else the rows hold: ``labels`` (batch,), ``targets``
        (batch, targets), ``rationale_labels`` (batch, tokens).
    """

    def __init__(self, pad_token_id: int, multiple: int = 8) -> None:
        self.pads, self.multiple = {**PADS, "input_ids": pad_token_id}, multiple

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        length = math.ceil(max(len(row["input_ids"]) for row in rows) / self.multiple) * self.multiple
        rows = [{**row, "attention_mask": torch.ones(len(row["input_ids"]), dtype=torch.long)} for row in rows]
        return {key: self.stacked(key, [torch.as_tensor(row[key]) for row in rows], length) for key in rows[0]}

    def stacked(self, key: str, values: list[Tensor], length: int) -> Tensor:
        if key in ("labels", "targets"):
            return torch.stack(values)
        padded = pad_sequence(values, batch_first=True, padding_value=self.pads[key])
        missing = padded.new_full((len(values), length - padded.shape[1], *padded.shape[2:]), self.pads[key])
        return torch.cat([padded, missing], dim=1)


# ---------------------------------------------------------------------- the predictor


class RationaleTask(Task):
    """Reasons, labels and targets of texts; the loss is the predictor's own. The best epoch is that of the best reasons."""

    best = "rationale_macro_f1"

    def read(self, path: str | Path) -> list[Row]:
        return read_checked(path, partial(check_marked, fields=self.config.data.fields), MARKED)

    def load(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        base = self.config.base
        return load_base(base.name, dtype=base.dtype, attn=base.attn, revision=base.revision, auto=AutoModel)

    def encode(self, rows: list[Row], processor: Any, adapter: Adapter) -> list[dict[str, Any]]:
        config: Any = adapter.config
        encoded = []
        for row in rows:
            ids, marks = align(
                row.values["words"], row.values.get("rationales"), processor, self.config.data.max_length
            )
            one = {"input_ids": ids, "rationale_labels": marks, "labels": label_of(row, config.labels)}
            if config.targets:
                one["targets"] = self.targets(row, config.targets)
            encoded.append(one)
        return encoded

    def targets(self, row: Row, names: Sequence[str]) -> list[float]:
        """The multi-hot targets of a row, NaN where it does not say. Raises :class:`DataError` naming the row."""
        if row.values.get("targets") is None:
            return [math.nan] * len(names)
        try:
            return multi_hot(row.values["targets"], names)
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from None

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        return Collator(int(processor.pad_token_id or 0))

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:  # type: ignore[override]
        return model(**batch).loss

    def measure(self, model: nn.Module, rows: list[dict[str, Any]], processor: Any) -> dict[str, float]:
        """Macro-F1 of reasons over the tokens of texts, and over padding too, as the authors count it; that of labels."""
        marks, labels = [], []
        for out, batch in judged(model, rows, self.collator(processor)):
            said, meant = out.rationale_logits.argmax(-1), batch["rationale_labels"]
            marks.append(torch.stack([meant[meant >= 0], said[meant >= 0]]))
            labels.append(torch.stack([batch["labels"], out.label_logits.argmax(-1)]))
        truth, guess = torch.cat(marks, dim=1).tolist()
        classes, answers = torch.cat(labels, dim=1)
        zeros = [0] * sum(max(self.config.data.max_length - len(row["input_ids"]), 0) for row in rows)
        found = {
            "rationale_macro_f1": macro_f1(guess, truth, 2),
            "rationale_macro_f1_padded": macro_f1(guess + zeros, truth + zeros, 2),
        }
        has = classes >= 0
        if has.any():
            count = len(self.config.adapter.labels)  # type: ignore[attr-defined]
            found["label_macro_f1"] = macro_f1(answers[has].tolist(), classes[has].tolist(), count)
        return found


@torch.no_grad()
def judged(model: nn.Module, rows: list[dict[str, Any]], collate: Callable[..., dict[str, Tensor]]) -> Iterable[Any]:
    """(what a model in evaluation mode says, the batch) of encoded rows, in their order."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    for start in range(0, len(rows), BATCH):
        batch = {key: value.to(device) for key, value in collate(rows[start : start + BATCH]).items()}
        yield model(**{key: batch[key] for key in ("input_ids", "attention_mask")}), batch
    model.train(training)


# ---------------------------------------------------------------------- the classifier


@dataclass(frozen=True, kw_only=True)
class RationaleClassificationSettings(DataSettings):
    """What to learn from, as labelled texts and a predictor of reasons.

    Attributes:
        predictor: the folder of a trained predictor, or its repository on the Hub.
        predictor_base: its base; by default the one its folder names.
        random: draw the reasons at random instead, the authors' control.
        shots: learn from so many rows of ``train``, drawn by the run's seed; 0 for all. The authors draw 50 to 200.
    """

    task: str = "rationale_classification"
    predictor: str | None = None
    predictor_base: str | None = None
    random: bool = False
    shots: int = 0
    max_length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("shots", self.shots >= 0, "0 or a number of rows")
        self.require("predictor", not (self.predictor and self.random), "left out where random is set")


class RationaleClassification(Classification):
    """Labels of texts, from the reasons a predictor sees in them. The best epoch is that of the best macro-F1.

    An adapter that reads no reasons, such as a LoRA with ``whole: [classifier]``, is taught by the labels alone.
    """

    Settings: ClassVar[type[DataSettings]] = RationaleClassificationSettings
    best = "macro_f1"

    def read(self, path: str | Path) -> list[Row]:
        rows = super().read(path)
        data: Any = self.config.data
        if str(path) != data.train:
            return rows
        labels = getattr(self.config.adapter, "labels", self.classes)
        unknown = next((row for row in rows if row.values["label"] not in labels), None)
        if unknown is not None:
            label_of(unknown, labels)
        self.classes = labels
        return few(rows, data.shots, self.config.training.seed) if data.shots else rows

    def load(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        loaded = super().load()
        labels = getattr(self.config.adapter, "labels", self.classes)
        if self.classes != labels:
            raise ConfigError(f"The base knows the labels {self.classes}, in this order; adapter.labels has {labels}.")
        return loaded

    def encode(self, rows: list[Row], processor: Any, adapter: Adapter) -> list[dict[str, Any]]:
        if SIGNAL in adapter.reads and rows:
            options = {"truncation": True, "max_length": self.config.data.max_length}
            ids = [{"input_ids": processor(row.values["text"], **options)["input_ids"]} for row in rows]
            said = self.rationales(ids, processor)
            rows = [Row(row.where, {**row.values, SIGNAL: logits}) for row, logits in zip(rows, said, strict=True)]
        return super().encode(rows, processor, adapter)

    def rationales(self, rows: list[dict[str, Any]], processor: Any) -> list[Tensor]:
        """What the predictor says of each row, (tokens, 2)."""
        data: Any = self.config.data
        if data.random:
            draw = torch.Generator().manual_seed(self.config.training.seed)
            return [random_rationales(torch.ones(len(row["input_ids"])), draw) for row in rows]
        if data.predictor is None:
            raise ConfigError("data.predictor is not set: RAFT weighs words by what a trained predictor says of them.")
        predictor, other = load_predictor(data.predictor, data.predictor_base)
        if other.get_vocab() != processor.get_vocab():
            raise ConfigError(f"The predictor's base has another vocabulary than {self.config.base.name!r}.")
        said = [out.rationale_logits for out, _ in judged(predictor, rows, Collator(int(processor.pad_token_id or 0)))]
        return [logits[: len(row["input_ids"])] for logits, row in zip((x for batch in said for x in batch), rows)]

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return partial(collate, processor)


def collate(tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of :mod:`anyadapter.training.classification`, with the reasons of each row padded as its tokens are."""
    longest = max(len(row["given"]["input_ids"]) for row in rows)
    length = math.ceil(longest / 8) * 8
    padded = [
        {**row, SIGNAL: F.pad(row[SIGNAL], (0, 0, 0, length - len(row[SIGNAL])))} if SIGNAL in row else row
        for row in rows
    ]
    return classification.collate(tokenizer, padded)


def few(rows: Sequence[Row], shots: int, seed: int) -> list[Row]:
    """So many rows, drawn at random, in the order of the file. The authors draw with the seeds 2021 to 2025."""
    if shots > len(rows):
        raise DataError(f"{shots} rows cannot be drawn of {len(rows)}.")
    return list(rows) if shots == len(rows) else split(rows, shots, seed)[1]


def load_predictor(folder: str | Path, base: str | None = None) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A trained predictor on its base, and the tokenizer.

    Raises:
        ConfigError: the folder does not say which base it belongs to, or holds an adapter of another method.
    """
    path = locate(folder)
    base = base or read_json(path / CONFIG).get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{path} does not say which base it was trained on; set data.predictor_base.")
    model, tokenizer = load_base(base, auto=AutoModel)
    adapter = load(model, path)
    if adapter.config.method != "rationale_predictor":
        raise ConfigError(f"{path} holds a {type(adapter).__name__}, not a rationale predictor.")
    return model, tokenizer
