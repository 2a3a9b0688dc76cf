"""The layout of LLM-Adapters' own fork of an early PEFT (AGI-Edgerunners/LLM-Adapters, commit 8166572).

Keys are ``base_model.model.<module path>.<tensor>``; a prefix is one tensor, ``prompt_embeddings``. The configuration is a
dump of the fork's dataclass. Its targets are matched as the end of a module's path, "v_proj" in "kv_proj" too; the tensors
in the file say which modules were adapted, and a host where the targets mean others is refused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from anyadapter.core.adapter import Adapter, AdapterConfig
from anyadapter.core.catalogue import config_from_dict
from anyadapter.core.errors import ArtefactError, near
from anyadapter.core.host import Host
from anyadapter.core.roles import ROLES

ROOT = "base_model.model."
PROMPT = "prompt_embeddings"
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
PREFIX = {"token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "encoder_hidden_size"}
SETTINGS = {
    "BOTTLENECK": LINEAR | BOTTLENECK | {"use_parallel_adapter", "use_adapterp"},
    "LORA": LINEAR | LORA,
    "PREFIX_TUNING": COMMON | PREFIX | {"num_virtual_tokens", "prefix_projection"},
}
INIT = {"bert": "bert", "mam_adapter": "zero"}
FUSED = [True, False, True]  # of query, key and value in one linear, the first and the last


class LLMAdapters:
    """Folders of the fork: bottleneck adapters, LoRA and prefix tuning."""

    name = "llm-adapters"

    # ------------------------------------------------------------------ reading

    def reads(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
        kind = config.get("peft_type")
        if kind == "LORA":
            return "enable_lora" in config  # gone since
        return kind == "BOTTLENECK" or (kind == "PREFIX_TUNING" and set(config) <= SETTINGS[kind])

    def read_config(self, config: dict[str, Any], tensors: dict[str, Tensor], host: Host) -> AdapterConfig:
        kind = config["peft_type"]
        for key in config:
            if key not in SETTINGS[kind]:
                raise ArtefactError(f"The setting {key!r} is not known for {kind}. {near(key, SETTINGS[kind])}")
        for key in sorted(SETTINGS[kind] - set(config)):
            raise ArtefactError(f"{kind} needs the setting {key!r}, which the file does not have.")
        if kind == "PREFIX_TUNING":
            return config_from_dict(prefix_settings(config, tensors))
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
            return {"prompt.weight" if name == PROMPT else name: tensor for name, tensor in tensors.items()}
        return {name.removeprefix(ROOT): tensor for name, tensor in tensors.items()}

    # ------------------------------------------------------------------ writing

    def writes(self, adapter: Adapter) -> bool:
        return misfit(adapter) is None

    def write(self, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if (why := misfit(adapter)) is not None:
            raise ArtefactError(f"LLM-Adapters' layout cannot hold this {type(adapter).__name__}: {why}.")
        common = {"base_model_name_or_path": "", "task_type": "CAUSAL_LM", "inference_mode": True}
        tensors = adapter.tensors()
        if adapter.config.method == "prefix":
            return common | prefix_config(adapter), {PROMPT: tensors["prompt.weight"]}
        config = lora_config(adapter) if adapter.config.method == "lora" else bottleneck_config(adapter)
        linear = {"target_modules": names(adapter), "bias": "none", "modules_to_save": None}
        return common | config | linear, {ROOT + name: tensor for name, tensor in tensors.items()}


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


def prefix_settings(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    only(config, "num_transformer_submodules", 1)
    if set(tensors) != {PROMPT}:
        raise ArtefactError(f"A prefix is one tensor, {PROMPT!r}; the file has {', '.join(sorted(tensors)[:5])}.")
    return {"method": "prefix", "tokens": config["num_virtual_tokens"]}


def misfit(adapter: Adapter) -> str | None:
    """Why the layout cannot hold an adapter, or ``None``."""
    config: Any = adapter.config
    tensors = adapter.tensors()
    if config.method == "prefix":
        parts = "a projection, which fold() removes, or layers, targets or positions of its own"
        whole = config.targets == "self_attention" and config.layers is None and config.shift
        return None if whole and set(tensors) == {"prompt.weight"} else parts
    if config.method not in ("bottleneck", "lora"):
        return f"it knows LoRA, bottleneck adapters and prefixes, not {config.method!r}"
    tails = TAILS[config.method.upper()]
    if other := [name for name in tensors if not name.endswith(tails)]:
        return f"there is no place for {other[0]}"
    if config.method == "lora":
        linear = all(tensor.dim() <= 3 for tensor in tensors.values())
        return (
            None if linear and not config.rank_stabilised else "it has no convolutions and no rank-stabilised scaling"
        )
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
    """The targets as given where they are plain names, else every module by its whole path, which is sure to mean it."""
    config: Any = adapter.config
    paths = list(dict.fromkeys(placement.path for placement in adapter.placements))
    given = [config.targets] if isinstance(config.targets, str) else list(config.targets or ())
    plain = set(given) == {path.split(".")[-1] for path in paths} and config.layers is None and not config.exclude
    return given if plain else paths


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


def prefix_config(adapter: Adapter) -> dict[str, Any]:
    config: Any = adapter.config
    attention = [placement.branch.args for placement in adapter.placements if placement.kind == "attention"]  # type: ignore[attr-defined]
    _, heads, dim = attention[0]
    return {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": config.tokens,
        "token_dim": heads * dim,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": len(attention),
        "encoder_hidden_size": heads * dim,
        "prefix_projection": False,
    }
