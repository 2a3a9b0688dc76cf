"""The settings of a run, as a YAML file gives them: ``base``, ``adapter``, ``data``, ``training``, ``output``, ``quantize``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import SchedulerType

from anyadapter.core.adapter import AdapterConfig, Settings, Targets
from anyadapter.core.catalogue import config_from_dict, method_of
from anyadapter.core.errors import ConfigError, near
from anyadapter.parts.quantised import check_bits
from anyadapter.training.base import SMOLLM2, dtype_of
from anyadapter.training.tasks import DataSettings, task


@dataclass(frozen=True, kw_only=True)
class BaseSettings(Settings):
    """The frozen model.

    Attributes:
        name: a folder, a repository on the Hugging Face Hub, or ``"smollm2"``.
        gguf_file: a GGUF file in it.
        dtype: of its weights; by default as in its files.
        attn: an attention implementation of transformers.
        revision: of a Hub repository.
    """

    name: str = SMOLLM2
    gguf_file: str | None = None
    dtype: str | None = None
    attn: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        self.require("name", isinstance(self.name, str) and bool(self.name), "a folder or a repository")
        dtype_of(self.dtype)


@dataclass(frozen=True, kw_only=True)
class Stage(Settings):
    """A part of the training with trainable tensors, length and rate of its own; what is None is as for the whole run.

    Attributes:
        groups: the adapter's groups to train; all when empty.
        epochs, steps, learning_rate: as in :class:`TrainingSettings`.
    """

    groups: tuple[str, ...] = ()
    epochs: float | None = None
    steps: int | None = None
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.groups, str):
            object.__setattr__(self, "groups", (self.groups,))


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Settings):
    """How to train. The optimizer is AdamW.

    Attributes:
        epochs: passes over the data.
        steps: optimizer steps, instead of epochs.
        batch_size: rows per process and forward pass.
        accumulation: forward passes per optimizer step.
        learning_rate: at its highest.
        schedule: a schedule of transformers: ``linear``, ``cosine``, ``constant_with_warmup``, ….
        warmup: steps of linear warm-up, or below 1 their share of all steps.
        weight_decay: of AdamW.
        learning_rates, weight_decays: of groups of the adapter's tensors, where they differ, such as ``{routing: 0.1}``.
        max_grad_norm: gradients are clipped to it.
        eval_every, save_every: steps between evaluations and between checkpoints; by default once an epoch.
        log_every: steps between log lines.
        keep_best: end with the adapter of the lowest evaluation loss rather than the last.
        early_stopping_patience: stop after so many evaluations without a better loss.
        seed: of initialisation, data order and dropout.
        precision: of the computation: ``fp32``, ``bf16`` or ``fp16``.
        gradient_checkpointing: less memory for a third more time.
        device: ``auto``, or ``cpu`` although there is an accelerator.
        fsdp: configuration of FSDP, as in transformers' ``fsdp_config``, to shard the base over all processes.
        stages: train in these stages, one after the other, each with a new optimizer.
    """

    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 3e-4
    schedule: str = "linear"
    warmup: float = 0.03
    weight_decay: float = 0.0
    learning_rates: dict[str, float] = field(default_factory=dict)
    weight_decays: dict[str, float] = field(default_factory=dict)
    max_grad_norm: float = 1.0
    eval_every: int | None = None
    save_every: int | None = None
    log_every: int = 10
    keep_best: bool = True
    early_stopping_patience: int | None = None
    seed: int = 0
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    device: str = "auto"
    fsdp: dict[str, Any] | None = None
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulation", "learning_rate", "log_every"):
            self.require(name, getattr(self, name) > 0, "above 0")
        self.require("learning_rates", all(rate > 0 for rate in self.learning_rates.values()), "above 0 for each group")
        for name in ("steps", "eval_every", "save_every", "early_stopping_patience"):
            self.require(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1, or left out")
        self.require("warmup", self.warmup >= 0, "at least 0")
        schedules = [schedule.value for schedule in SchedulerType]
        self.require("schedule", self.schedule in schedules, f"one of {', '.join(schedules)}")
        self.require("precision", self.precision in ("fp32", "bf16", "fp16"), "'fp32', 'bf16' or 'fp16'")
        self.require("device", self.device in ("auto", "cpu"), "'auto' or 'cpu'")
        self.require("stages", not (self.stages and self.fsdp), "left out under fsdp, which shards a model once")
        if self.save_every and self.keep_best:
            self.require(
                "save_every", self.save_every % (self.eval_every or self.save_every) == 0, "a multiple of eval_every"
            )

    def stage(self, index: int) -> TrainingSettings:
        """The settings of one stage, with seeds of its own."""
        stage = self.stages[index] if self.stages else Stage()
        chosen = {k: v for k in ("epochs", "steps", "learning_rate") if (v := getattr(stage, k)) is not None}
        if stage.epochs is not None and stage.steps is None:
            chosen["steps"] = None
        return replace(self, **chosen, seed=self.seed + index, stages=())


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings(Settings):
    """Train an adapter whose matrices are rounded; see :func:`anyadapter.quantize`.

    Attributes:
        bits: of a number: 1, 2, 4 or 8.
        matrices: patterns of tensor names; by default all matrices.
    """

    bits: int = 1
    matrices: Targets | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run.

    Attributes:
        adapter: the method and its settings.
        data: what to learn from.
        output: the folder of the run.
        base: the frozen model.
        training: how to train.
        quantize: when given, the adapter is trained as a quantised one and saved packed.
    """

    adapter: AdapterConfig
    data: DataSettings
    output: str
    base: BaseSettings = field(default_factory=BaseSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    quantize: QuantizeSettings | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which :func:`read_config` reads back."""
        adapter = {"method": self.adapter.method, **self.adapter.to_dict()}
        sections = {"base": self.base, "adapter": self.adapter, "data": self.data, "training": self.training}
        values: dict[str, Any] = {name: section.to_dict() for name, section in sections.items()}
        values["training"]["stages"] = [stage.to_dict() for stage in self.training.stages]
        rounding = {"quantize": self.quantize.to_dict()} if self.quantize else {}
        return {**values, "adapter": adapter, **rounding, "output": self.output}


def read_config(config: RunConfig | Mapping[str, Any] | str | Path) -> RunConfig:
    """A run's settings from a YAML file or plain values. ``base`` may be its name alone.

    Raises:
        ConfigError: a key is not known, one that is needed is missing, or a value is refused.
    """
    if isinstance(config, RunConfig):
        return config
    values = dict(config if isinstance(config, Mapping) else read_yaml(Path(config)))
    known = [f.name for f in fields(RunConfig)]
    for key in values:
        if key not in known:
            raise ConfigError(f"A run has no section {key!r}. {near(key, known)}")
    for key in ("adapter", "data", "output"):
        if key not in values:
            raise ConfigError(
                f"The run's settings need a section {key!r}; they have {', '.join(map(repr, values)) or 'none'}."
            )
    base = values.get("base") or {}
    training = section(values, "training")
    stages = training.pop("stages", None) or ()
    adapter, data = config_from_dict(section(values, "adapter")), section(values, "data")
    data["task"] = data.get("task") or method_of(adapter).task
    return RunConfig(
        base=BaseSettings.from_dict({"name": base} if isinstance(base, str) else section(values, "base")),
        adapter=adapter,
        data=task(data["task"]).Settings.from_dict(data),
        training=TrainingSettings.from_dict({**training, "stages": [Stage.from_dict(stage) for stage in stages]}),
        quantize=QuantizeSettings.from_dict(section(values, "quantize")) if "quantize" in values else None,
        output=str(values["output"]),
    )


def section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One section as a dictionary. Raises :class:`ConfigError` when it is something else."""
    found = values.get(name) or {}
    if is_dataclass(found):
        found = found.to_dict()  # type: ignore[attr-defined, union-attr]
    if not isinstance(found, Mapping):
        raise ConfigError(f"The section {name!r} is {found!r}; expected settings, one `key: value` a line.")
    return dict(found)


class Loader(yaml.SafeLoader):
    """YAML in which 3e-4 is a number, as in YAML 1.2, and not the text "3e-4"."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file. Raises :class:`ConfigError` when it is none."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no settings; expected sections such as `adapter:` and `data:`.")
    return values
