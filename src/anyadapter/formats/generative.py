"""GenerativeAdapter's files: the authors' folders, saved states, and states as LoRA folders that PEFT and the server read.

An authors' folder is PEFT-like, with ``peft_type`` FASTLORA. Its keys have a ``base_layer`` behind the layer, which their code
wraps: ``base_model.model.model.layers.{i}.base_layer.self_attn.o_proj.fastlora_A1.weight``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from anyadapter.core.adapter import Adapter, AdapterConfig
from anyadapter.core.attach import build, get
from anyadapter.core.catalogue import config_from_dict
from anyadapter.core.errors import ArtefactError, BaseMismatchError
from anyadapter.core.fingerprint import check_fingerprint, fingerprint
from anyadapter.core.host import Host
from anyadapter.formats.files import read_tensors, umask
from anyadapter.formats.native import write
from anyadapter.methods.language.generative import Generative
from anyadapter.parts.context import State

KIND, ROOT = "FASTLORA", "base_model.model."
NAMES = {"A1": "fastlora_A1", "A2": "fastlora_A2", "A3": "fastlora_A3", "B": "fastlora_B"}
NAMES |= {"norm": "fastlora_hidden_state_norm"}
SETTINGS = {  # ours, and the authors' name of it
    "inner": "fastlora_inter_size",
    "rank": "fastlora_r",
    "alpha": "fastlora_alpha",
    "max_rank": "fastlora_max_rank",
    "window": "fastlora_window",
    "norm": "fastlora_norm",
}
MERGES = {"pre-norm-sum": "sum", "pre-norm-mean": "mean"}
# Settings their code never reads, with the values it writes.
IDLE = {"fastlora_attn_len": 8192, "fastlora_gist_len": 0, "fastlora_arch": "aassbb", "fastlora_init": "random"}
IDLE |= {"fastlora_training_attention_mask": None}
ABSENT: dict[str, Any] = {
    "fastlora_dropout": 0.0,
    "lora_r": 0,
    "lora_alpha": 0,
    "lora_dropout": 0.0,
    "lora_param": None,
}
ABSENT |= {"layer_replication": None, "megatron_config": None, "bias": "none"}
COMMON = {"peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"}
COMMON |= {"fastlora_param", "target_modules", "fastlora_merge", *SETTINGS.values()}
METADATA = "anyadapter_state"  # the key of a state's recipe in its file


class FastLora:
    """Folders that the authors' code writes and reads."""

    name = "generative-adapter"

    def writes(self, adapter: Adapter) -> bool:
        return misfit(adapter) is None

    def write(self, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if (why := misfit(adapter)) is not None:
            raise ArtefactError(f"The authors' layout cannot hold this {type(adapter).__name__}: {why}.")
        config: Any = adapter.config
        targets = sorted({path.rpartition(".")[2] for path in layers_of(adapter)})
        settings = {theirs: getattr(config, ours) for ours, theirs in SETTINGS.items()}
        settings["fastlora_alpha"] = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
        merge = next(theirs for theirs, ours in MERGES.items() if ours == config.merge)
        common = {"peft_type": KIND, "task_type": "CAUSAL_LM", "auto_mapping": None, "revision": None}
        named = {"fastlora_param": targets, "target_modules": targets, "fastlora_merge": merge}
        theirs = names(adapter)
        tensors = {theirs[name]: tensor for name, tensor in adapter.values().items()}
        return common | settings | named | IDLE | ABSENT, tensors

    def reads(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
        return config.get("peft_type") == KIND

    def read_config(self, config: dict[str, Any], tensors: dict[str, Tensor], host: Host) -> AdapterConfig:
        """Theirs in our words; with ``norm="svd"``, the SVD is theirs too (``official=True``), as it was in training."""
        for key, value in config.items():
            if key not in COMMON | IDLE.keys() and (key not in ABSENT or value not in (ABSENT[key], None, [])):
                raise ArtefactError(f"A GenerativeAdapter file with {key}={value!r} is not one we can honour.")
        merge = config.get("fastlora_merge", "pre-norm-sum")
        if merge not in MERGES:
            raise ArtefactError(f"fastlora_merge is {merge!r}; we read {', '.join(MERGES)}.")
        missing = [theirs for theirs in (*SETTINGS.values(), "fastlora_param") if theirs not in config]
        if missing:
            raise ArtefactError(f"The settings of a GenerativeAdapter need {', '.join(missing)}.")
        values = {ours: config[theirs] for ours, theirs in SETTINGS.items()}
        values |= {"targets": config["fastlora_param"], "merge": MERGES[merge], "official": values["norm"] == "svd"}
        return config_from_dict({"method": "generative", **values})

    def read(self, config: dict[str, Any], tensors: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
        ours = {theirs: ours for ours, theirs in names(adapter).items()}
        return {ours.get(name, name): tensor for name, tensor in tensors.items()}


def misfit(adapter: Adapter) -> str | None:
    """Why the authors' layout cannot hold an adapter, or ``None``."""
    config: Any = adapter.config
    if config.method != "generative":
        return f"it knows 'generative', not {config.method!r}"
    if config.layers is not None or config.exclude:
        return "it adapts the targets of all layers"
    return None if adapter.scale == 1 else f"there is no place for the scale {adapter.scale}"


def layers_of(adapter: Adapter) -> dict[str, str]:
    """The layer of each adapted linear."""
    return adapter.layer_of  # type: ignore[return-value]


def names(adapter: Adapter) -> dict[str, str]:
    """The authors' name of each tensor."""
    found = {}
    for path, layer in layers_of(adapter).items():
        inside = path.removeprefix(f"{layer}.")
        for ours, theirs in NAMES.items():
            found[f"{path}.{ours}.weight"] = f"{ROOT}{layer}.base_layer.{inside}.{theirs}.weight"
    return found


# ---------------------------------------------------------------------- states


def save_state(state: State, path: str | Path) -> Path:
    """Write a state to a ``.safetensors`` file: S of every linear, and what it was read with.

    Raises:
        ArtefactError: it has no recipe: it was made in training, or of windows cut already.
    """
    if not state.recipe:
        raise ArtefactError(
            "A state made in training, or of windows cut already, is not saved; read the context with adapter.read(...)."
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.outer.items()}
    metadata = {METADATA: json.dumps({"windows": state.windows, "recipe": state.recipe})}
    save_file(tensors, path, metadata=metadata)
    os.chmod(path, 0o666 & ~umask())  # safetensors would keep it to the owner
    return Path(path)


def load_state(path: str | Path, model: nn.Module, name: str = "default", *, check_base: bool = True) -> State:
    """A saved state, for the adapter attached under ``name``.

    One saved before it was noted what was known when each context was read is used, extended and added as others are;
    nothing can be forgotten of it.

    Raises:
        ArtefactError: the file is damaged, no state, or does not fit the adapter.
        BaseMismatchError: it was read by another generator, or on another base.
    """
    host, path = Host.of(model), Path(path)
    adapter = get(host, name)
    tensors = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(METADATA, "null")
    try:
        found = json.loads(text)
        windows, recipe = found["windows"], found["recipe"]
        sound = type(windows) is int and windows >= 0 and isinstance(recipe["reads"], list)
        sound = sound and all(is_entry(read, i) for i, read in enumerate(recipe["reads"]))
        config, base, generator = (recipe[part] for part in ("config", "base", "generator"))
    except (ValueError, TypeError, KeyError):
        sound = False
    if not sound:
        raise ArtefactError(f"{path} is not the state of a GenerativeAdapter, or its description is damaged.")
    if not isinstance(adapter, Generative):
        raise ArtefactError(f"{path} is the state of a GenerativeAdapter; {name!r} is a {type(adapter).__name__}.")
    mine = adapter.nothing(host)
    if {"config": config, "generator": generator} != adapter.signature():
        raise BaseMismatchError(f"{path} was read by another generator than {name!r}; read the context again.")
    if check_base:
        check_fingerprint(host, base)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if shapes != {key: tuple(tensor.shape) for key, tensor in mine.outer.items()}:
        raise ArtefactError(f"{path} does not hold one matrix for each of the {len(mine.outer)} linears of {name!r}.")
    outer = {key: tensors[key].to(tensor) for key, tensor in mine.outer.items()}
    return State(outer, windows, recipe, set(mine.readers))


def is_entry(read: Any, before: int) -> bool:
    """Whether a state's file has a context where one must be, behind ``before`` others."""
    if not isinstance(read, dict) or type(read.get("tokens")) is not int or not isinstance(read.get("context"), str):
        return False
    after = read.get("after", 0)
    return type(after) is int and 0 <= after <= before


def save_lora(
    model: nn.Module,
    state: State,
    folder: str | Path,
    name: str = "default",
    *,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the adapter a state stands for as a LoRA folder, which PEFT, our server and others load.

    Args:
        name: of the attached adapter that read it.
        rank: of the LoRA, as in :meth:`Generative.export`.
        dtype: of the saved tensors; by default the adapter's.

    Raises:
        ArtefactError: the adapter under ``name`` is none that reads contexts, or the folder cannot be written.
        BaseMismatchError: another generator has read the state.
    """
    host = Host.of(model)
    adapter = get(host, name)
    if not isinstance(adapter, Generative):
        raise ArtefactError(f"{name!r} is a {type(adapter).__name__}; states are read by a GenerativeAdapter.")
    config, tensors = adapter.export(state, rank)
    lora = build(host, config, "generated")
    lora.load_tensors(tensors)
    base_name = getattr(getattr(host.model, "config", None), "_name_or_path", "") or None
    return write(lora, folder, fingerprint(host), base_name, dtype=dtype)
