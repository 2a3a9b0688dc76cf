"""Several streams of data, each of which trains groups of the adapter's tensors of its own (LLaMA-Adapter V2, section 4.2).

There images with captions train what sees, and instructions train what answers, in one run; as the groups are disjoint, the
one does not undo the other. A row names its ``stream`` and is otherwise one of :mod:`anyadapter.training.causal_lm`. Signals
that the adapter reads are optional in a row (instructions come without an image): numbers, or the name of a ``.npy`` file in the
data file's folder or below. A batch is drawn from all streams alike.

::

    data: {task: streams, train: rows.jsonl, streams: {captions: [visual], instructions: [prompts, norms, biases, scales]}}
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from anyadapter.core.adapter import Adapter
from anyadapter.core.attach import signals
from anyadapter.core.catalogue import method_of
from anyadapter.core.errors import ConfigError, DataError, SignalError, near
from anyadapter.core.host import Host
from anyadapter.training.causal_lm import CausalLM, CausalLMSettings, Collator, tokenise
from anyadapter.training.rows import Row
from anyadapter.training.tasks import DataSettings

STREAM = "stream"


@dataclass(frozen=True, kw_only=True)
class StreamSettings(CausalLMSettings):
    """What to learn from, as text that goes on.

    Attributes:
        streams: of each stream by name, the groups of the adapter's tensors that it trains.
    """

    streams: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        named = all(isinstance(groups, (list, tuple)) and groups for groups in self.streams.values())
        self.require("streams", bool(self.streams) and named, "names of streams, each with a list of groups")


class Streams(CausalLM):
    """The next token of texts and answers, which in each stream is learnt by groups of its own."""

    Settings: ClassVar[type[DataSettings]] = StreamSettings

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.adapter: Adapter | None = None  # known once rows are encoded
        if config.training.stages:
            raise ConfigError("The streams say which groups train; leave training.stages out.")
        if config.training.gradient_checkpointing:
            raise ConfigError("Streams cannot train under gradient_checkpointing, which computes them again as one.")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ConfigError("Streams train in one process: DDP expects every tensor in every step.")

    @property
    def streams(self) -> dict[str, list[str]]:
        data: Any = self.config.data
        return data.streams

    def read(self, path: str | Path) -> list[Row]:
        rows = super().read(path)
        for row in rows:
            name = row.values.get(STREAM)
            if name not in self.streams:
                raise DataError(f"{row.where}: {STREAM!r} is {name!r}. {near(str(name), self.streams)}")
        return rows

    def digest(self, path: str | Path) -> str:
        """Of the file and of every file it names."""
        found = hashlib.sha256(Path(path).read_bytes())
        for row in self.read(path):
            for name in method_of(self.config.adapter).reads:
                if (file := file_of(row, name)) is not None:
                    found.update(file.read_bytes())
        return found.hexdigest()

    def encode(self, rows: list[Row], processor: Any, adapter: Adapter) -> list[dict[str, Any]]:
        self.adapter = adapter
        for groups in self.streams.values():
            for group in groups:
                adapter.group(group)
        data: Any = self.config.data
        settings = {"template": data.template, "max_length": data.max_length, "train_on_inputs": data.train_on_inputs}
        encoded = tokenise(rows, processor, **settings)
        order = list(self.streams)
        for row, one in zip(rows, encoded):
            one[STREAM] = order.index(row.values[STREAM])
            one |= {name: signal_of(row, name, adapter) for name in adapter.reads}
        return encoded

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        data: Any = self.config.data
        return StreamCollator(Collator(int(processor.pad_token_id or 0), data.padding))

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """:func:`joint_loss`."""
        assert self.adapter is not None
        return joint_loss(model, self.adapter, batch, list(self.streams.values()))

    @torch.no_grad()
    def measure(self, model: nn.Module, rows: list[dict[str, Any]], processor: Any) -> dict[str, float]:
        """The evaluation loss of each stream by itself."""
        collate, size, device = (
            self.collator(processor),
            self.config.training.batch_size,
            next(model.parameters()).device,
        )
        found: dict[str, float] = {}
        for index, name in enumerate(self.streams):
            mine, total = [row for row in rows if row[STREAM] == index], 0.0
            for start in range(0, len(mine), size):
                batch = {key: moved(value, device) for key, value in collate(mine[start : start + size]).items()}
                total += stream_loss(model, batch).item() * len(batch["input_ids"])
            found |= {f"eval_loss_{name}": total / len(mine)} if mine else {}
        return found


def joint_loss(
    model: nn.Module, adapter: Adapter, batch: Mapping[str, Any], streams: Sequence[Sequence[str]]
) -> Tensor:
    """The mean over a batch of its rows' streams' losses, each with a gradient for that stream's groups alone.

    Args:
        batch: of a causal language model, and ``stream``, (batch,), the index of each row's stream. Signals that an attached
            adapter reads may be in it, one for each row, or be set already.
        streams: the groups that each trains.
    """
    size, total = len(batch["input_ids"]), torch.zeros((), device=batch["input_ids"].device)
    trainable = {id(p) for p in adapter.parameters() if p.requires_grad}
    try:
        for index, groups in enumerate(streams):
            rows = (batch[STREAM] == index).nonzero()[:, 0].tolist()
            if rows:
                # A tensor that needs no gradient while a loss is computed gets none from it, whatever is set afterwards.
                adapter.train_only(*groups)
                total = total + stream_loss(model, batch, rows) * (len(rows) / size)
    finally:
        for parameter in adapter.parameters():
            parameter.requires_grad_(id(parameter) in trainable)
    return total


def stream_loss(model: nn.Module, batch: Mapping[str, Any], rows: list[int] | None = None) -> Tensor:
    """The model's loss on some rows of a batch, with their signals."""
    host, size = Host.of(model), len(batch["input_ids"])
    rows = list(range(size)) if rows is None else rows
    read = {name for adapter in host.adapters.values() for name in adapter.reads}
    given = {**host.signals.values, **batch}
    values = {name: of_rows(given[name], rows, size) for name in read if name in given}
    inputs = {key: value[rows] for key, value in batch.items() if key not in read and key != STREAM}
    with signals(host.model, **values):
        return model(**inputs).loss


def of_rows(value: Any, rows: list[int], size: int) -> Any:
    """A signal for some rows; what is not one for each row is for all."""
    if not isinstance(value, (Tensor, list, tuple)) or len(value) != size:
        return value
    return value[rows] if isinstance(value, Tensor) else [value[i] for i in rows]


def signal_of(row: Row, name: str, adapter: Adapter) -> Tensor | None:
    """A row's signal, or None where it has none. Raises :class:`DataError` when it is no number or numbers."""
    value = row.values.get(name)
    if value is None:
        return None
    try:
        if (file := file_of(row, name)) is not None:
            return torch.from_numpy(np.load(file, allow_pickle=False)).float()
        return torch.as_tensor(adapter.row_signal(name, value))
    except (SignalError, OSError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{row.where}: {name!r} is {str(value)[:80]!r}, no number or numbers: {error}") from None


def file_of(row: Row, name: str) -> Path | None:
    """The ``.npy`` file a row names, or None where it names none.

    Raises:
        DataError: it is not there, or it is not in the data file's folder or below, also where links lead.
    """
    value, folder = row.values.get(name), Path(row.where.rpartition(":")[0]).parent
    if not isinstance(value, str) or not value.endswith(".npy"):
        return None
    file = folder / value
    if not file.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{row.where}: {value} leads out of {folder}; the files of signals must lie inside it.")
    if not file.is_file():
        raise DataError(f"{row.where}: {file} does not exist.")
    return file


def moved(value: Any, device: torch.device) -> Any:
    """Tensors of a batch, and those in its lists, on a device."""
    if isinstance(value, list):
        return [moved(each, device) for each in value]
    return value.to(device) if isinstance(value, Tensor) else value


class StreamCollator:
    """As :class:`~anyadapter.training.causal_lm.Collator`, with signals that not every row has: a list, None where not."""

    def __init__(self, text: Collator) -> None:
        self.text = text

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.text([{key: row[key] for key in ("input_ids", "labels")} for row in rows])
        for key in rows[0]:
            if key not in batch:
                values = [row[key] for row in rows]
                batch[key] = torch.tensor(values) if key == STREAM else values
        return batch
