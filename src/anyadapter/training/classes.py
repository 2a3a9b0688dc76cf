"""What tasks with a user's own classes share: which there are, the head that knows them, and how right the model is.

A head for the classes is trained as a part of the adapter, unless the base knows just these classes. Their names, in the order
of the scores, are saved beside the adapter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyadapter.core.adapter import Adapter
from anyadapter.core.attach import signals
from anyadapter.core.errors import ConfigError, DataError, near
from anyadapter.core.host import Host, device_of
from anyadapter.training.rows import SHOWN, Row
from anyadapter.training.tasks import Task

CLASSES = "classes.json"  # beside the adapter


class Classified(Task):
    """A task whose rows have a ``"label"``, one of a few classes; the loss is the cross-entropy.

    Attributes:
        classes: their names, in the order of the scores; known once the training data is read. They are in the order of the
            names, or in the base's where it knows just these.
        heads: how an adapter is told to train a new head, in words.
    """

    heads = "adapter.whole: [{head}]"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.classes: tuple[str, ...] = ()
        self.new_head: str | None = None  # where the base has one that is not for these classes

    def learn_classes(self, rows: list[Row], path: str | Path) -> None:
        """Take the classes from the training data.

        Raises:
            DataError: there is one only, or a row of other data is of a class that was not in the training data.
        """
        if str(path) == self.config.data.train:
            self.classes = class_names(rows)
            if len(self.classes) < 2:
                raise DataError(
                    f"{path} holds the class {self.classes[0]!r} only; expected at least two to tell apart."
                )
        unknown = [row for row in rows if row.values["label"] not in self.classes]
        if unknown:
            more = f"\n… and {len(unknown) - SHOWN} more rows of {path}" if len(unknown) > SHOWN else ""
            lines = [
                f"{row.where}: the class {row.values['label']!r} is not among those of {self.config.data.train}. "
                f"{near(row.values['label'], self.classes)}"
                for row in unknown[:SHOWN]
            ]
            raise DataError("\n".join(lines) + more)

    def needs_head(self, known: tuple[str, ...]) -> bool:
        """Whether a base that knows these classes needs a new head; if not, its order is taken."""
        if set(known) != set(self.classes):
            return True
        self.classes = known
        return False

    def note_head(self, model: nn.Module) -> None:
        """Remember the new head of a base, which an adapter must train."""
        host = Host.of(model)
        self.new_head = host.find("head")[-1].path if host.has("head") else "classifier"

    def check_head(self, adapter: Adapter) -> None:
        """Raise a :class:`ConfigError` unless the adapter trains the new head, if there is one."""
        replaced = [p.path for p in adapter.placements if getattr(p.branch, "replaces", False)]
        if self.new_head is not None and self.new_head not in replaced:
            raise ConfigError(
                f"The base's head does not know the {len(self.classes)} classes of {self.config.data.train}, and the adapter "
                f"trains no new one. Set {self.heads.format(head=self.new_head)}."
            )

    # ------------------------------------------------------------------ loss and measures

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The cross-entropy, its mean over the batch."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return F.cross_entropy(self.scores(model, inputs).float(), batch["labels"])

    def call(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """Run the model on a batch."""
        return model(**inputs)

    def scores(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """(batch, classes). Raises :class:`ConfigError` when the model gives another number of scores."""
        out = self.call(model, inputs)
        scores: Tensor = out if isinstance(out, Tensor) else out.logits
        if scores.shape[-1] != len(self.classes):
            raise ConfigError(
                f"The model gives {scores.shape[-1]} scores, and the training data has {len(self.classes)} classes; its head "
                "is not one for them."
            )
        return scores

    def measure(self, model: nn.Module, rows: list[dict[str, Any]], processor: Any) -> dict[str, float]:
        """``accuracy`` on the evaluation rows, and ``macro_f1``, the mean of the classes' F1."""
        collate, size = self.collator(processor), self.config.training.batch_size
        read = {name for adapter in Host.of(model).adapters.values() for name in adapter.reads}
        best: list[int] = []
        with torch.inference_mode():
            for start in range(0, len(rows), size):
                batch = {k: v.to(device_of(model)) for k, v in collate(rows[start : start + size]).items()}
                values = {name: batch.pop(name) for name in read & batch.keys()}
                batch.pop("labels")
                with signals(model, **values):
                    best += self.scores(model, batch).argmax(-1).tolist()
        right = [row["labels"] for row in rows]
        share = sum(map(int.__eq__, best, right)) / len(rows)
        return {"accuracy": share, "macro_f1": macro_f1(best, right, len(self.classes))}

    def finish(self, folder: Path) -> None:
        """Write the names of the classes."""
        (folder / CLASSES).write_text(json.dumps(self.classes, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def label_of(where: str, label: Any) -> str:
    """A row's class. Raises :class:`DataError` unless it is a name or a number."""
    if type(label) not in (str, int) or label == "":
        raise DataError(f"{where}: 'label' is {label!r}; expected the name or the number of a class.")
    return str(label)


def class_names(rows: list[Row]) -> tuple[str, ...]:
    """The classes in order: of their names, or of their numbers where all are."""
    names = {row.values["label"] for row in rows}
    return tuple(sorted(names, key=int if all(name.isdecimal() for name in names) else None))


def macro_f1(given: list[int], right: list[int], classes: int) -> float:
    """The mean over classes of F1 = 2 · hits / (times given + times right); of a class that never occurs it is 0."""
    scores = []
    for each in range(classes):
        hits = sum(a == b == each for a, b in zip(given, right))
        scores.append(2 * hits / max(1, given.count(each) + right.count(each)))
    return sum(scores) / classes
