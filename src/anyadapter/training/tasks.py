"""Tasks: what a run teaches. A task loads the base, reads rows, makes batches of them, and says what is lost by a wrong answer.

``data.task`` names it in a run's settings; without, it is the one the method is trained for (:attr:`Adapter.task`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn
from torch.utils.data import Sampler

from anyadapter.core.adapter import Adapter, Settings
from anyadapter.core.errors import ConfigError, near
from anyadapter.training.rows import Row

if TYPE_CHECKING:
    from anyadapter.training.config import RunConfig

TASKS = {
    "causal_lm": "anyadapter.training.causal_lm:CausalLM",
    "streams": "anyadapter.training.streams:Streams",
    "contexts": "anyadapter.training.generative:Contexts",
    "facts": "anyadapter.training.facts:Facts",
    "masked_lm": "anyadapter.training.masked_lm:MaskedLM",
    "classification": "anyadapter.training.classification:Classification",
    "pairs": "anyadapter.training.pairs:Pairs",
    "rationales": "anyadapter.training.rationales:RationaleTask",
    "rationale_classification": "anyadapter.training.rationales:RationaleClassification",
    "image_classification": "anyadapter.training.images:Images",
}


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """What to learn from. Tasks add settings of their own.

    Attributes:
        train: a .jsonl or .json file, or what else the task reads.
        eval: another, for the evaluation loss.
        eval_rows: without one, how many rows of ``train`` are held out at random.
        task: what is taught, one of :data:`TASKS`.
        fields: our name -> the column's, such as ``{instruction: question}``.
        max_length: tokens of a row, at most.
    """

    train: str
    eval: str | None = None
    eval_rows: int = 0
    task: str = "causal_lm"
    fields: dict[str, str] = field(default_factory=dict)
    max_length: int = 512

    def __post_init__(self) -> None:
        self.require("eval_rows", self.eval_rows >= 0, "0 or a number of rows")
        self.require("eval_rows", not (self.eval and self.eval_rows), "0 where an eval file is given")
        self.require("max_length", self.max_length >= 2, "at least 2")


class Task:
    """One kind of thing to teach; the run calls its methods in this order.

    Attributes:
        Settings: of the ``data`` section.
        objective: a method ``(model, batch) -> loss``, the mean over the batch, or None for the model's own loss.
        best: which of its measures tells the best checkpoint, the highest being best; by default the lowest loss does.
    """

    Settings: ClassVar[type[DataSettings]] = DataSettings
    objective: Any = None
    best: ClassVar[str | None] = None

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def read(self, path: str | Path) -> list[Row]:
        """All rows of a file, checked. Raises :class:`DataError` that names the file and the line."""
        raise NotImplementedError

    def digest(self, path: str | Path) -> str:
        """A hash of all that a file gives, which a run that goes on must find unchanged."""
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()

    def load(self) -> tuple[nn.Module, Any]:
        """The base of the run, and its tokenizer or image processor. Raises :class:`ConfigError` when there is none."""
        raise NotImplementedError

    def encode(self, rows: list[Row], processor: Any, adapter: Adapter) -> list[dict[str, Any]]:
        """What the model is given for each row, with the signals the adapter reads."""
        raise NotImplementedError

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """What makes a batch of encoded rows."""
        raise NotImplementedError

    def sampler(self, rows: list[dict[str, Any]], batch_size: int, seed: int, adapter: Adapter) -> Sampler[int] | None:
        """The order of encoded rows in a stage, of which the adapter's trainable tensors tell; by default a random one."""
        return None

    def measure(self, model: nn.Module, rows: list[dict[str, Any]], processor: Any) -> dict[str, float]:
        """Measures of the trained adapter on the evaluation rows besides the loss, for ``metrics.json``; by default none."""
        return {}

    def finish(self, folder: Path) -> None:
        """Write into the trained adapter's folder what else is needed to use it; by default nothing."""


def task(name: str) -> type[Task]:
    """The class of a task, imported now. Raises :class:`ConfigError` with near names when there is none."""
    if name not in TASKS:
        raise ConfigError(f"There is no task {name!r}. {near(name, TASKS)}")
    module, _, cls = TASKS[name].partition(":")
    found: type[Task] = getattr(import_module(module), cls)
    return found
