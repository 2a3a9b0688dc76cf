"""transformers' Trainer for adapters: checkpoints hold the adapter and not the base, signals travel with each batch.

Everything else is the Trainer's: schedules, mixed precision, accumulation, gradient checkpointing, evaluation, early stopping,
and several processes by ``torchrun`` or ``accelerate launch`` (DDP, or FSDP for bases that fit no single device).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput

from anyadapter.core.adapter import Adapter
from anyadapter.core.attach import get, signals
from anyadapter.core.errors import AttachError, ConfigError
from anyadapter.core.fingerprint import fingerprint
from anyadapter.core.host import Host
from anyadapter.formats.native import restore, write

if TYPE_CHECKING:
    from collections.abc import Iterator

STATE = "trainer_state.json"  # the Trainer writes it last into a checkpoint
Objective = Callable[[nn.Module, dict[str, Any]], Tensor]


class AdapterTrainer(Trainer):
    """Trains one attached adapter.

    Entries of a batch that an attached adapter reads are not given to the model: they are set as signals, round the forward
    and the backward pass, which runs the forward again under gradient checkpointing.

    Args:
        model: the frozen model with the adapter attached.
        args: as for Trainer; set ``remove_unused_columns=False`` where batches carry signals.
        adapter: the name it is attached under.
        groups: train only these groups of its tensors.
        learning_rates, weight_decays: of single groups of its tensors, where they differ from those in ``args``.
        objective: ``objective(model, batch) -> loss``, the mean over the batch; by default the model's own loss.
        sampler: ``sampler(adapter) -> Sampler``, the order of the training rows; by default another random one each epoch.
        measure: ``measure() -> {name: value}``, of each evaluation besides the loss, as ``eval_<name>``.
        kwargs: as for Trainer: ``train_dataset``, ``eval_dataset``, ``data_collator``, ``callbacks``, …

    Raises:
        AttachError: no such adapter, or something else would be trained that no checkpoint would hold.
        ConfigError: no such group, or a base that is quantised in a way one cannot train through.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        adapter: str = "default",
        groups: tuple[str, ...] = (),
        learning_rates: Mapping[str, float] | None = None,
        weight_decays: Mapping[str, float] | None = None,
        objective: Objective | None = None,
        sampler: Callable[[Adapter], Sampler[int] | None] | None = None,
        measure: Callable[[], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        host = Host.of(model)
        self.adapter = get(host, adapter)
        self.adapter.train_only(*groups)
        check_trainable(host, self.adapter)
        self.rates = {"lr": dict(learning_rates or {}), "weight_decay": dict(weight_decays or {})}
        self.host: Host = host
        self.objective: Objective | None = objective
        self.sampler = sampler(self.adapter) if sampler is not None else None
        self.measure = measure
        self.base, self.base_name = fingerprint(host), getattr(getattr(model, "config", None), "_name_or_path", None)
        self.use_cache_before = getattr(getattr(host.model, "config", None), "use_cache", None)
        self.forward_before = host.model.__dict__.get("forward")
        if args.n_gpu > 1:
            # Replicas of torch's DataParallel would call the wrapped modules of the first device; torchrun uses them all.
            args._n_gpu = 1
        with trainable_when_quantised(model):
            super().__init__(model, args, **kwargs)
        self.add_callback(LogWhenSaving())
        if objective is not None:
            self.model_accepts_loss_kwargs = False  # its loss is a mean: divide it by the number of accumulation steps
        # Sharding cuts an adapter's tensors up; what is saved is gathered into this copy.
        self.whole = self.adapter
        if self.is_fsdp_enabled:
            check_sharding(self.accelerator.state.fsdp_plugin)
            self.whole = deepcopy(self.adapter).cpu()

    # ------------------------------------------------------------------ batches

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.sampler if self.sampler is not None else super()._get_train_sampler(train_dataset)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one batch, inside its signals."""
        inputs, values = self.separate(inputs)
        with signals(self.host.model, **values):
            return super().training_step(model, inputs, num_items_in_batch)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Loss (and predictions) of one evaluation batch, inside its signals."""
        inputs, values = self.separate(inputs)
        with signals(self.host.model, **values):
            if self.objective is None:
                return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            with torch.no_grad():
                return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with the measures beside the loss."""
        output = super().evaluation_loop(*args, **kwargs)
        if self.measure is not None:
            output.metrics.update({f"eval_{name}": value for name, value in self.measure().items()})
        return output

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss, or the model's."""
        if self.objective is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = self.objective(model, inputs)
        return (loss, {}) if return_outputs else loss

    def separate(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(what the model is given, the signals), of one batch."""
        read = {name for adapter in self.host.adapters.values() for name in adapter.reads}
        values = {key: self._prepare_input(value) for key, value in batch.items() if key in read}
        return {key: value for key, value in batch.items() if key not in read}, values

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's, in which groups of the adapter's tensors have rates and decays of their own."""
        made = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        for name in () if made else dict.fromkeys(name for rates in self.rates.values() for name in rates):
            mine = [parameter for parameter in self.adapter.group(name) if parameter.requires_grad]
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if all(p is not other for other in mine)]
            own = {key: rates[name] for key, rates in self.rates.items() if name in rates}
            if mine:
                optimizer.add_param_group({"params": mine, "weight_decay": self.args.weight_decay, **own})
        return optimizer

    # ------------------------------------------------------------------ checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, or go on from a checkpoint to exactly where an uninterrupted run would have come."""
        if resume_from_checkpoint is True:
            found = last_checkpoint(str(self.args.output_dir))
            resume_from_checkpoint = str(found) if found else None
        self.model.train()
        try:
            if isinstance(resume_from_checkpoint, str) and had_stopped(resume_from_checkpoint):
                return self._take_up(resume_from_checkpoint)
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._give_back()

    def _give_back(self) -> None:
        """Undo what Trainer and accelerate change in the user's model: the cache setting, a forward under autocast."""
        if self.use_cache_before is not None:
            self.host.model.config.use_cache = self.use_cache_before  # type: ignore[union-attr]
        for name in ("forward", "_original_forward"):
            self.host.model.__dict__.pop(name, None)
        if self.forward_before is not None:
            self.host.model.forward = self.forward_before

    def _take_up(self, checkpoint: str) -> TrainOutput:
        """The end of a run that was cut off between its last step and its end."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / STATE))
        self._find_best()
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(self.state.global_step, float("nan"), {})

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        started = super()._init_training_state(*args, **kwargs)
        self._find_best()
        return started

    def _find_best(self) -> None:
        """The best checkpoint lies beside the others, also where the folder was moved since."""
        found = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"
        if found.is_dir():
            self.state.best_model_checkpoint = str(found)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, as :func:`anyadapter.save_pretrained` does; the base is never written.

        Trainer's own checkpoints (``_internal_call``) hold the latents of a quantised adapter, which training goes on from.
        """
        if self.whole is not self.adapter:
            gather(self.adapter, self.whole)
        if self.args.should_save:
            folder = output_dir or str(self.args.output_dir)
            write(self.whole, folder, self.base, self.base_name or None, latents=_internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore(self.whole, resume_from_checkpoint)
        if self.whole is not self.adapter:
            scatter(self.whole, self.adapter)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from accelerate.utils import save_fsdp_optimizer

        # Trainer would save the whole base along with the optimizer.
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The state that marks a checkpoint as whole is written next, by the first process alone.
        self.accelerator.wait_for_everyone()


class LogWhenSaving(TrainerCallback):
    """Log at every checkpoint: the mean loss since the last log is not kept in one, so a resumed run would log another."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_log = control.should_log or control.should_save
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self.on_step_end(args, state, control)


def gather(adapter: Adapter, whole: Adapter) -> None:
    """Copy an adapter's sharded tensors into a whole one; called by all processes together."""
    tensors = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in adapter.tensors().items()}
    whole.load_tensors({name: tensor.detach().cpu() for name, tensor in tensors.items()})
    whole.follow(adapter.config, adapter.scale)


def scatter(whole: Adapter, adapter: Adapter) -> None:
    """The inverse of :func:`gather`."""
    tensors = whole.tensors()
    with torch.no_grad():
        for name, mine in adapter.tensors().items():
            value = tensors[name].to(mine.device)
            mine.copy_(
                distribute_tensor(value, mine.device_mesh, mine.placements) if isinstance(mine, DTensor) else value
            )
    adapter.follow(whole.config, whole.scale)


def check_sharding(plugin: Any) -> None:
    """Raise a :class:`ConfigError` unless FSDP is set up in a way that adapters survive."""
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise ConfigError("Adapters train under FSDP 2 only; set fsdp_config: {version: 2}.")
    if getattr(plugin, "cpu_ram_efficient_loading", False):
        raise ConfigError(
            "fsdp_config.cpu_ram_efficient_loading reloads the model from the base's own tensors, among which the adapter's "
            "are not; set it to false."
        )


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint in a folder: one whose writing was cut off is passed over."""

    def step(path: Path) -> int:
        return int(path.parent.name.rpartition("-")[2])

    states = sorted(Path(folder).glob(f"checkpoint-[0-9]*/{STATE}"), key=step, reverse=True)
    return next((path.parent for path in states if read_state(path.parent) is not None), None)


def read_state(checkpoint: str | Path) -> dict[str, Any] | None:
    """The Trainer's state in a checkpoint; ``None`` when it was not written to its end."""
    try:
        return json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def had_stopped(checkpoint: str | Path) -> bool:
    """Whether training had come to its end, or stopped early, when a checkpoint was written."""
    state = read_state(checkpoint) or {}
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("attributes", {})
    return bool(control.get("should_training_stop") or state.get("global_step", 0) >= state.get("max_steps", 1))


def check_trainable(host: Host, adapter: Adapter) -> None:
    """Raise an :class:`AttachError` if something would be trained that no checkpoint would hold."""
    mine = {id(p) for p in adapter.parameters()}
    other = [name for name, p in host.model.named_parameters() if p.requires_grad and id(p) not in mine]
    if other:
        raise AttachError(
            f"{len(other)} tensors outside the adapter {adapter.name!r} are trainable too ({', '.join(other[:3])}, …) and would "
            "be lost: only the adapter is saved. Freeze them with requires_grad_(False)."
        )
    if not any(p.requires_grad for p in adapter.parameters()):
        raise AttachError(
            f"The adapter {adapter.name!r} has nothing to train: {type(adapter).__name__} has no tensors."
        )


@contextmanager
def trainable_when_quantised(model: nn.Module) -> Iterator[None]:
    """Let Trainer take a quantised base, which it refuses unless PEFT's adapters are on it.

    Raises:
        ConfigError: no gradient passes through this kind of quantised weights.
    """
    if not getattr(model, "is_quantized", False):
        yield
        return
    if not getattr(getattr(model, "hf_quantizer", None), "is_trainable", False):
        method = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
        raise ConfigError(
            f"No gradient passes through this base's quantised weights ({getattr(method, 'quant_method', 'unknown kind')}); "
            "load it in bitsandbytes 4 or 8 bit, or unquantised."
        )
    flagged: Any = model
    before = getattr(model, "_hf_peft_config_loaded", False)
    flagged._hf_peft_config_loaded = True
    try:
        yield
    finally:
        flagged._hf_peft_config_loaded = before
