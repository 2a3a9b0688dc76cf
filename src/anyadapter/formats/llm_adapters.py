"""The layout of LLM-Adapters' own fork of an early PEFT (AGI-Edgerunners/LLM-Adapters, commit 8166572).

Keys are ``base_model.model.<module path>.<tensor>``. The configuration is a dump of the fork's dataclass. Its targets are
matched as the end of a module's path, "v_proj" in "kv_proj" too; the tensors in the file say which modules were adapted,
and a host where the targets mean others is refused. Prefixes are as in PEFT to this day, whose layout reads them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from anyadapter.core.adapter import Adapter, AdapterConfig
from anyadapter.core.catalogue import config_from_dict
from anyadapter.core.errors import ArtefactError, near
from anyadapter.core.host import Host
from anyadapter.core.roles import ROLES
from anyadapter.formats.peft import Peft

ROOT = "base_model.model."
# The tensors at one module.
TAILS = {
    "BOTTLENECK": (".adapter_down.weight", ".adapter_up.weight", ".adapter_scaling"),
    "LORA": (".lora_A.weight", ".lora_B.weight"),
}
# The settings of the fork's dataclasses; a file has them all.
COMMON = {"peft_type", "base_model_name_or_path", "task_type", "inference_mode"}
LINEAR = COMMON | {"target_modules", "bias", "modules_to_save"}
BOTTLENECK = {"bottleneck_size", "non_linearity", "adapter_dropout", "scaling", "init_weights"}
LORA = {"r", "lora_alpha", "lora_dropout", "merge_weights", "fan_in_fan_out", "enable_lora"}
PREFIX = {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
SETTINGS = {
    "BOTTLENECK": LINEAR | BOTTLENECK | {"use_parallel_adapter", "use_adapterp"},
    "LORA": LINEAR | LORA,
    "PREFIX_TUNING": COMMON | PREFIX | {"encoder_hidden_size", "prefix_projection"},
}
INIT = {"bert": "bert", "mam_adapter": "zero"}
FUSED = [True, False, True]  # of query, key and value in one linear, the first and the last


class LLMAdapters:
    """Folders of the fork: bottleneck adapters, LoRA and prefix tuning."""

    name = "llm-adapters"

    # ------------------------------------------------------------------ reading

    def reads(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
        kind = config.get("peft_type")
        return kind == "BOTTLENECK" or (kind == "LORA" and "enable_lora" in config)  # a setting that is gone since

    def read_config(self, config: dict[str, Any], tensors: dict[str, Tensor], host: Host) -> AdapterConfig:
        kind = config["peft_type"]
        for key in config:
            if key not in SETTINGS[kind]:
                raise ArtefactError(f"The setting {key!r} is not known for {kind}. {near(key, SETTINGS[kind])}")
        for key in sorted(SETTINGS[kind] - set(config)):
            raise ArtefactError(f"{kind} needs the setting {key!r}, which the file does not have.")
        only(config, "bias", "none")
        only(config, "modules_to_save", None)
        modules = [module_of(key, kind) for key in tensors]
        targets = targets_of(config["target_modules"], list(dict.fromkeys(modules)), host)
        settings = bottleneck_settings if kind == "BOTTLENECK" else lora_settings
        values = settings(config) | {"targets": targets}
        if kind == "BOTTLENECK" and config["use_adapterp"] and not config["use_parallel_adapter"]:
            # For the fork it is a choice of default targets alone: with other targets, the file's are in series.
            after = host.paths("feed_forward.down") if host.has("feed_forward.down") else []
            values["placement"] = "adapterp" if set(modules) <= set(after) else "series"
        return config_from_dict(values)

    def read(self, config: dict[str, Any], tensors: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
        if adapter.config.method == "prefix":
            return Peft().read(config, tensors, adapter)
        return {name.removeprefix(ROOT): tensor for name, tensor in tensors.items()}

    # ------------------------------------------------------------------ writing

    def writes(self, adapter: Adapter) -> bool:
        return misfit(adapter) is None

    def write(self, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if (why := misfit(adapter)) is not None:
            raise ArtefactError(f"LLM-Adapters' layout cannot hold this {type(adapter).__name__}: {why}.")
        common = {"base_model_name_or_path": "", "task_type": "CAUSAL_LM", "inference_mode": True}
        if adapter.config.method == "prefix":
            config, tensors = Peft().write(adapter)
            return common | {k: v for k, v in config.items() if k in SETTINGS["PREFIX_TUNING"]}, tensors
        config = lora_config(adapter) if adapter.config.method == "lora" else bottleneck_config(adapter)
        linear = {"target_modules": names(adapter), "bias": "none", "modules_to_save": None}
        return common | config | linear, {ROOT + name: tensor for name, tensor in adapter.values().items()}


def only(config: dict[str, Any], key: str, *allowed: Any) -> Any:
    """A setting of which we can honour these values alone."""
    if config[key] not in allowed:
        raise ArtefactError(f"{key} is {config[key]!r}; only {' or '.join(map(repr, allowed))} can be honoured.")
    return config[key]


def module_of(key: str, kind: str) -> str:
    """The path of the module that a tensor belongs to. Raises :class:`ArtefactError` when the key is none of the layout's."""
    tail = next((tail for tail in TAILS[kind] if key.endswith(tail)), None)
    if tail is None or not key.startswith(ROOT):
        tensors = ", ".join(f"{ROOT}<module>{tail}" for tail in TAILS[kind])
        raise ArtefactError(f"{key[:200]!r} is no tensor of {kind}; expected {tensors}.")
    return key.removeprefix(ROOT).removesuffix(tail)


def targets_of(given: Any, modules: list[str], host: Host) -> list[str]:
    """The file's targets where they are plain names that mean the same to us, else the modules that have tensors.

    Raises:
        ArtefactError: in this host the targets are other modules than those with tensors.
    """
    if isinstance(given, str):
        return modules  # a regular expression, which is not run: it could take for ever
    if not isinstance(given, list) or not given or not all(isinstance(name, str) for name in given):
        raise ArtefactError(f"target_modules is {given!r}; it must be a list of names.")
    ours = {path for path in host.modules if path.endswith(tuple(given))}
    for path in modules:
        if path not in ours:
            why = "is no module" if path not in host.modules else f"is none of the targets {given}"
            raise ArtefactError(f"The file has tensors for {path!r}, which {why} of {host.describe()}.")
    if missing := sorted(ours.difference(modules)):
        raise ArtefactError(f"The file has no tensors for {missing[0]} of {host.describe()}, a target by {given}.")
    plain = ours == {path for path in host.modules if path.split(".")[-1] in given} and not set(given) & set(ROLES)
    return given if plain else modules


def bottleneck_settings(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "method": "bottleneck",
        "placement": "parallel" if config["use_parallel_adapter"] else "series",
        "width": config["bottleneck_size"],
        "activation": config["non_linearity"],
        "dropout": config["adapter_dropout"],
        "scaling": config["scaling"],
        "init": INIT[only(config, "init_weights", *INIT)],
    }


def lora_settings(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "method": "lora",
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "dropout": config["lora_dropout"],
        "fused": only(config, "enable_lora", None, FUSED) is not None,
    }


def misfit(adapter: Adapter) -> str | None:
    """Why the layout cannot hold an adapter, or ``None``."""
    config: Any = adapter.config
    tensors = adapter.tensors()
    if config.method == "prefix":
        return None if Peft().writes(adapter) else "PEFT's layout, which is the same for a prefix, cannot"
    if config.method not in ("bottleneck", "lora"):
        return f"it knows LoRA, bottleneck adapters and prefixes, not {config.method!r}"
    tails = TAILS[config.method.upper()]
    if other := [name for name in tensors if not name.endswith(tails)]:
        return f"there is no place for {other[0]}"
    if config.method == "lora":
        if config.rank_stabilised or config.rank_pattern or config.alpha_pattern:
            return "it has one rank and one alpha for all modules, and the scaling alpha / r"
        return "it has no convolutions" if any(tensor.dim() > 3 for tensor in tensors.values()) else None
    if config.placement not in ("series", "adapterp", "parallel"):
        return f"the placement {config.placement!r} is not one of series, adapterp, parallel"
    if config.scaling == "learned" and adapter.scale != 1:
        return f"a learned scaling leaves no place for the scale {adapter.scale}"
    if len(sizes(adapter)) > 1:
        return f"all bottlenecks are of one size there, not {sorted(sizes(adapter))}"
    return None


def sizes(adapter: Adapter) -> set[int]:
    return {tensor.shape[0] for name, tensor in adapter.tensors().items() if name.endswith(".adapter_down.weight")}


def names(adapter: Adapter) -> list[str]:
    """The last components of the adapted modules' paths where the fork takes them to mean just these, else the paths."""
    paths = list(dict.fromkeys(placement.path for placement in adapter.placements))
    ends = list(dict.fromkeys(path.split(".")[-1] for path in paths))
    return ends if sum(path.endswith(tuple(ends)) for path in adapter.base_paths) == len(paths) else paths


def bottleneck_config(adapter: Adapter) -> dict[str, Any]:
    config: Any = adapter.config
    return {
        "peft_type": "BOTTLENECK",
        "bottleneck_size": sizes(adapter).pop(),
        "non_linearity": config.activation,
        "adapter_dropout": config.dropout,
        "use_parallel_adapter": config.placement == "parallel",
        "use_adapterp": config.placement == "adapterp",
        "scaling": "learned" if config.scaling == "learned" else config.scaling * adapter.scale,
        "init_weights": next(theirs for theirs, ours in INIT.items() if ours == config.init),
    }


def lora_config(adapter: Adapter) -> dict[str, Any]:
    config: Any = adapter.config
    return {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha * adapter.scale,
        "lora_dropout": config.dropout,
        "merge_weights": False,
        "fan_in_fan_out": False,
        "enable_lora": FUSED if config.fused else None,
    }
