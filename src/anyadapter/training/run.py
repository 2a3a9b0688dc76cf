"""One training run, from a configuration to a folder: ``anyadapter train CONFIG.yaml``.

The folder holds ``config.yaml`` (every setting, resolved), ``versions.json``, ``log.jsonl``, ``metrics.json``, ``loss.png``,
``adapter/`` (the result) and ``checkpoints/``; never the base. The same call again goes on where a killed run stopped, and
ends with the same numbers as a run that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from anyadapter.core.adapter import Adapter
from anyadapter.core.attach import attach, detach
from anyadapter.core.errors import ConfigError
from anyadapter.formats.files import CONFIG as ADAPTER_CONFIG
from anyadapter.formats.native import restore
from anyadapter.quantize import quantize
from anyadapter.training.config import RunConfig, TrainingSettings, read_config
from anyadapter.training.report import LogFile, ProgressBar, plot, read_log, write_text
from anyadapter.training.rows import Row, split
from anyadapter.training.tasks import Task, task
from anyadapter.training.trainer import AdapterTrainer, last_checkpoint

CONFIG, VERSIONS, LOG, METRICS, PLOT = "config.yaml", "versions.json", "log.jsonl", "metrics.json", "loss.png"
ADAPTER, CHECKPOINTS = "adapter", "checkpoints"
OWN = (CONFIG, VERSIONS, LOG, METRICS, PLOT, ADAPTER, CHECKPOINTS)
NAME = "default"  # under which the adapter is attached
KEPT_CHECKPOINTS = 2  # the newest, and the best or the one before

say = Console(stderr=True, highlight=False).print


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Attributes:
        folder: of the run; the adapter is in ``folder / "adapter"``.
        metrics: steps, losses and sizes, as in ``metrics.json``.
        resumed_from: the step an interrupted run went on from.
        was_finished: the run had been finished before, and nothing was done.
    """

    folder: Path
    metrics: dict[str, Any]
    resumed_from: int | None = None
    was_finished: bool = False

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter."""
        return self.folder / ADAPTER


def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    overwrite: bool = False,
    model: torch.nn.Module | None = None,
    tokenizer: Any = None,
    prepare: Callable[[Adapter], None] | None = None,
    progress: bool = True,
) -> RunResult:
    """Train an adapter as a configuration says, or go on with a run that was interrupted.

    Under ``torchrun`` or ``accelerate launch`` all processes call it.

    Args:
        config: a YAML file, or its contents; see :class:`anyadapter.training.config.RunConfig`.
        overwrite: throw away what an earlier run left in the output folder.
        model, tokenizer: a base that is loaded already (with its image processor, where it reads images), instead of
            ``config.base``; the trained adapter stays attached to it as ``"default"``.
        prepare: called with the fresh adapter, attached, before training: another start than its random one.
        progress: show a progress bar.

    Raises:
        ConfigError: a setting is refused, or the output folder holds another run.
        DataError: a row cannot be used; nothing was written.
    """
    config = read_config(config)
    if (model is None) != (tokenizer is None):
        raise ConfigError("Pass model and tokenizer both, or neither.")
    teaching = task(config.data.task)(config)
    rows = read_data(teaching)
    folder = Path(config.output)
    arguments = training_arguments(config.training, folder / CHECKPOINTS, evaluates=bool(rows[1]))
    with arguments.main_process_first(local=False):
        finished = open_folder(folder, teaching, overwrite, writes=arguments.process_index == 0)
    if finished is not None:
        return finished
    if model is None or tokenizer is None:
        model, tokenizer = teaching.load()
    set_seed(config.training.seed)
    adapter = attach(model, config.adapter, NAME)
    try:
        if prepare is not None:
            prepare(adapter)
        if config.quantize is not None:
            quantize(adapter, config.quantize.bits, config.quantize.matrices)
        sets = teaching.encode(rows[0], tokenizer, adapter), teaching.encode(rows[1], tokenizer, adapter)
        resumed = run_stages(model, adapter, teaching, sets, tokenizer, progress)
    except BaseException:
        detach(model, NAME)
        raise
    return RunResult(folder, json.loads((folder / METRICS).read_text()), resumed_from=resumed)


# ---------------------------------------------------------------------- the folder


def open_folder(folder: Path, teaching: Task, overwrite: bool, writes: bool) -> RunResult | None:
    """Make the run's folder, or check that what is there may be gone on with; a finished run is returned.

    Raises:
        ConfigError: the folder holds another run, or something that is none.
    """
    is_run = (folder / VERSIONS).is_file()
    if overwrite and is_run and writes:
        for name in OWN:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    wanted, data = teaching.config.to_dict(), digests(teaching)
    if (folder / CONFIG).is_file():
        found = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        if {**found, "output": None} != {**wanted, "output": None}:  # the folder may have been moved
            raise ConfigError(
                f"{folder} holds a run with other settings: {differences(found, wanted)}. Choose another output folder, or "
                "overwrite it."
            )
        if json.loads((folder / VERSIONS).read_text(encoding="utf-8"))["data"] != data:
            raise ConfigError(
                f"{folder} holds a run on other data: the files have changed since. Choose another output folder."
            )
        if (folder / METRICS).is_file():
            if writes:
                say(
                    f"{folder} holds this run, finished; nothing was done. To train anew, overwrite it or name another folder."
                )
            metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
            return RunResult(folder, metrics, was_finished=True)
    elif not is_run and folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no run; choose another output folder.")
    elif writes:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / VERSIONS, json.dumps({**versions(), "data": data}, indent=2) + "\n")
        write_text(folder / CONFIG, yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True))
    return None


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> str:
    """The settings two runs do not share, in words."""
    parts = []
    for key in sorted({*found, *wanted}):
        there, here = found.get(key), wanted.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            parts.append(differences(there, here, f"{prefix}{key}."))
        elif there != here:
            parts.append(f"{prefix}{key} is {there!r} there and {here!r} here")
    return ", ".join(part for part in parts if part)


def digests(teaching: Task) -> dict[str, str]:
    """A hash of every data file, which a run that goes on must find unchanged."""
    data = teaching.config.data
    return {str(file): teaching.digest(file) for file in (data.train, data.eval) if file}


def versions() -> dict[str, Any]:
    """What the run runs on."""
    packages = {name: version(name) for name in ("anyadapter", "torch", "transformers", "accelerate")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    processes = int(os.environ.get("WORLD_SIZE", 1))
    return {
        "python": platform.python_version(),
        **packages,
        "platform": platform.platform(),
        "device": device,
        "processes": processes,
    }


# ---------------------------------------------------------------------- data


def read_data(teaching: Task) -> tuple[list[Row], list[Row]]:
    """(training rows, evaluation rows), read and checked."""
    data = teaching.config.data
    rows = teaching.read(data.train)
    if data.eval_rows:
        return split(rows, data.eval_rows, teaching.config.training.seed)
    return rows, teaching.read(data.eval) if data.eval else []


# ---------------------------------------------------------------------- training


def training_arguments(
    settings: TrainingSettings, folder: Path, evaluates: bool, measure: str | None = None
) -> TrainingArguments:
    """The settings in transformers' words; ``measure`` tells the best checkpoint, and the loss does without one."""
    s = settings
    best = s.keep_best and evaluates
    save_every = s.save_every or s.eval_every
    if s.early_stopping_patience is not None and not evaluates:
        raise ConfigError("early_stopping_patience needs evaluation rows: give data.eval or data.eval_rows.")
    if best and s.save_every and not s.eval_every:
        raise ConfigError("With save_every, set eval_every too (save_every a multiple of it), or keep_best: false.")
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=s.epochs,
        max_steps=s.steps or -1,
        per_device_train_batch_size=s.batch_size,
        per_device_eval_batch_size=s.batch_size,
        gradient_accumulation_steps=s.accumulation,
        learning_rate=s.learning_rate,
        lr_scheduler_type=s.schedule,
        warmup_steps=s.warmup,
        weight_decay=s.weight_decay,
        max_grad_norm=s.max_grad_norm,
        eval_strategy="no" if not evaluates else "steps" if s.eval_every else "epoch",
        eval_steps=s.eval_every,
        save_strategy="steps" if save_every else "epoch",
        save_steps=save_every or 500,
        save_total_limit=KEPT_CHECKPOINTS,
        logging_steps=s.log_every,
        load_best_model_at_end=best,
        metric_for_best_model=f"eval_{measure or 'loss'}" if evaluates else None,
        greater_is_better=measure is not None if evaluates else None,
        restore_callback_states_from_checkpoint=True,
        prediction_loss_only=True,
        seed=s.seed,
        bf16=s.precision == "bf16",
        fp16=s.precision == "fp16",
        use_cpu=s.device == "cpu",
        dataloader_pin_memory=torch.cuda.is_available() and s.device != "cpu",
        fsdp=True if s.fsdp else None,  # type: ignore[arg-type]  # declared as text, documented as a bool
        fsdp_config={"version": 2, **s.fsdp} if s.fsdp else None,
        remove_unused_columns=False,
        report_to=[],
        **(gradient_checkpointing() if s.gradient_checkpointing else {}),
    )


def gradient_checkpointing() -> dict[str, Any]:
    """The arguments that turn it on; newer releases of transformers have renamed them."""
    new = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def run_stages(
    model: torch.nn.Module,
    adapter: Adapter,
    teaching: Task,
    sets: tuple[list[dict[str, Any]], list[dict[str, Any]]],
    processor: Any,
    progress: bool,
) -> int | None:
    """Train every stage that is not done, and write the results. Returns the step that training went on from."""
    config = teaching.config
    folder, training = Path(config.output), config.training
    count, resumed = len(training.stages) or 1, None
    done: dict[str, Any] = {}
    bar = ProgressBar() if progress else None
    for index in range(count):
        place = folder / CHECKPOINTS / f"stage-{index + 1}"
        if index + 1 < count and (place / ADAPTER / ADAPTER_CONFIG).is_file():
            restore(adapter, place / ADAPTER)
            continue
        trainer = make_trainer(model, teaching, index, sets, processor, bar)
        checkpoint = last_checkpoint(place)
        if checkpoint is not None:
            resumed = int(checkpoint.name.rpartition("-")[2])
            if trainer.is_world_process_zero():
                say(f"Going on from step {resumed} of stage {index + 1}.")
        try:
            trainer.train(str(checkpoint) if checkpoint else None)
        finally:
            if bar:
                bar.stop()  # also when interrupted: it hides the cursor
        last = index + 1 == count
        trainer.save_model(str(folder / ADAPTER if last else place / ADAPTER), _internal_call=not last)
        trainer.accelerator.wait_for_everyone()
        done = best_of(trainer.state)
    adapter.train_only()
    model.eval()
    if trainer.is_world_process_zero():
        log = read_log(folder / LOG)
        plot(log, folder / PLOT, title=f"{config.adapter.method} on {config.base.name}")
        metrics = summary(log, model, adapter, done if trainer.args.load_best_model_at_end else {})
        metrics |= teaching.measure(model, sets[1], processor) if sets[1] else {}
        teaching.finish(folder / ADAPTER)
        write_text(folder / METRICS, json.dumps(metrics, indent=2) + "\n")  # last: it marks the run as finished
    trainer.accelerator.wait_for_everyone()
    return resumed


def make_trainer(
    model: torch.nn.Module,
    teaching: Task,
    index: int,
    sets: tuple[list[dict[str, Any]], list[dict[str, Any]]],
    processor: Any,
    bar: ProgressBar | None,
) -> AdapterTrainer:
    """The trainer of one stage."""
    training = teaching.config.training
    settings = training.stage(index)
    folder = Path(teaching.config.output)
    evaluates = bool(sets[1])
    args = training_arguments(settings, folder / CHECKPOINTS / f"stage-{index + 1}", evaluates, teaching.best)
    callbacks: list[Any] = [LogFile(folder / LOG, index + 1)]
    if bar:
        callbacks.append(bar)
    if settings.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(settings.early_stopping_patience))
    trainer = AdapterTrainer(
        model,
        args,
        adapter=NAME,
        groups=training.stages[index].groups if training.stages else (),
        learning_rates=training.learning_rates,
        weight_decays=training.weight_decays,
        train_dataset=sets[0],
        eval_dataset=sets[1] or None,
        data_collator=teaching.collator(processor),
        objective=teaching.objective,
        sampler=partial(teaching.sampler, sets[0], settings.batch_size, settings.seed),
        measure=partial(teaching.measure, model, sets[1], processor) if evaluates and teaching.best else None,
        callbacks=callbacks,
    )
    for printing in (PrinterCallback, ProgressCallback):  # standard output is for results
        trainer.remove_callback(printing)
    return trainer


def best_of(state: Any) -> dict[str, Any]:
    """The step of the best checkpoint, and its loss on the evaluation rows."""
    lines = [line for line in state.log_history if "eval_loss" in line and line["step"] == state.best_global_step]
    return {"best_step": state.best_global_step, **({"eval_loss": lines[-1]["eval_loss"]} if lines else {})}


def summary(
    log: list[dict[str, Any]], model: torch.nn.Module, adapter: Adapter, best: Mapping[str, Any]
) -> dict[str, Any]:
    """The numbers of a run. Nothing of the clock is among them, so that equal runs have equal ones."""
    losses = [line["loss"] for line in log if "loss" in line]
    evaluations = [line["eval_loss"] for line in log if "eval_loss" in line]
    stages = {line["stage"]: line["step"] for line in log}
    return {
        "steps": sum(stages.values()),
        "train_loss": losses[-1] if losses else None,
        "eval_loss": best.get("eval_loss", evaluations[-1] if evaluations else None),
        **({"best_step": best["best_step"]} if best else {}),
        "adapter_parameters": adapter.parameter_count(),
        "base_parameters": sum(p.numel() for p in model.parameters()) - adapter.parameter_count(),
    }
