"""PEFT's layout of LoRA, (IA)³ and prefix tuning.

A key is ``base_model.model.<module path>.<tensor>``, and the adapter's name is not in it; a prefix is one tensor,
``prompt_embeddings``. Which modules are adapted is read off the keys: ``target_modules`` may be a regular expression, which
from a file of unknown origin is not to be run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from anyadapter.core.adapter import Adapter, AdapterConfig
from anyadapter.core.catalogue import config_from_dict
from anyadapter.core.errors import ArtefactError, near
from anyadapter.core.host import Host, ends_with
from anyadapter.core.roles import ROLES
from anyadapter.parts.whole import Whole

PROMPT = "prompt_embeddings"
KINDS = {"lora": "LORA", "ia3": "IA3", "prefix": "PREFIX_TUNING"}  # PEFT's name of each method
TAILS = {"lora": (".lora_A.weight", ".lora_B.weight"), "ia3": (".ia3_l",), "prefix": ()}
ROOTS = {"lora": "base_model.model.", "ia3": "base_model.model.", "prefix": "base_model."}

# Settings we honour, and those that say nothing of how a trained adapter acts. Any other must be off.
COMMON = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"}
COMMON |= {"peft_version", "modules_to_save"}
TARGETS = {"target_modules", "exclude_modules", "fan_in_fan_out"}  # what the keys and the modules say themselves
LORA = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"}
LORA |= {"layers_to_transform", "layers_pattern"}
LORA_IDLE = {
    "megatron_core",
    "qalora_group_size",
    "eva_config",
    "runtime_config",
}  # have values where they are not used
PREFIX = {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
PREFIX |= {"encoder_hidden_size", "prefix_projection", "init_weights"}
SETTINGS = {
    "lora": COMMON | TARGETS | LORA | LORA_IDLE,
    "ia3": COMMON | TARGETS | {"feedforward_modules", "init_ia3_weights"},
    "prefix": COMMON | PREFIX,
}
TYPES: dict[str, tuple[type, ...]] = {"r": (int,), "lora_alpha": (int, float), "num_virtual_tokens": (int,)}
TYPES |= {"rank_pattern": (dict,), "alpha_pattern": (dict,), "modules_to_save": (list,)}
PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")  # of LoRA; the others change the base as well

# The end of a model's class, and PEFT's name of what it is for. All but the first have a head, which PEFT always trains.
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
HEADS = {"classifier", "score", "qa_outputs"}


class Peft:
    """Folders that PEFT writes and reads."""

    name = "peft"

    # ------------------------------------------------------------------ reading

    def reads(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
        return config.get("peft_type") in KINDS.values() and "enable_lora" not in config  # that of older forks

    def read_config(self, config: dict[str, Any], tensors: dict[str, Tensor], host: Host) -> AdapterConfig:
        method = next(method for method, kind in KINDS.items() if kind == config["peft_type"])
        refuse_unknown(config, method)
        adapted, whole = modules_of(config, tensors, method, host)
        settings = {"lora": lora_settings, "ia3": ia3_settings, "prefix": prefix_settings}[method]
        values = settings(config, tensors, adapted, host)
        return config_from_dict({"method": method, "whole": targets(whole, host), **values})

    def read(self, config: dict[str, Any], tensors: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
        ours = {theirs: ours for ours, theirs in names(adapter).items()}
        return {ours.get(name, name): tensor for name, tensor in tensors.items()}

    # ------------------------------------------------------------------ writing

    def writes(self, adapter: Adapter) -> bool:
        return misfit(adapter) is None

    def write(self, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if (why := misfit(adapter)) is not None:
            raise ArtefactError(f"PEFT's layout cannot hold this {type(adapter).__name__}: {why}.")
        method = adapter.config.method
        config = {"lora": lora_config, "ia3": ia3_config, "prefix": prefix_config}[method](adapter)
        common = {
            "peft_type": KINDS[method],
            "task_type": task_of(adapter),
            "modules_to_save": shortest(whole_of(adapter), adapter.base_paths) or None,
        }
        theirs = names(adapter)
        return common | config, {theirs[name]: tensor for name, tensor in adapter.values().items()}


def names(adapter: Adapter) -> dict[str, str]:
    """PEFT's name for each of an adapter's tensors."""
    root, whole, found = ROOTS[adapter.config.method], whole_of(adapter), {}
    for name in adapter.tensors():
        outer = next((path for path in whole if name.startswith(f"{path}.whole.")), None)
        if outer is not None:
            found[name] = root + outer + name.removeprefix(f"{outer}.whole")
        else:
            found[name] = PROMPT if adapter.config.method == "prefix" else root + name
    return found


def whole_of(adapter: Adapter) -> list[str]:
    """The paths of the modules that are trained as a whole."""
    return [placement.path for placement in adapter.placements if isinstance(placement.branch, Whole)]


def adapted_by(adapter: Adapter) -> list[str]:
    """The paths of the other modules it acts at."""
    return [placement.path for placement in adapter.placements if not isinstance(placement.branch, Whole)]


def shortest(paths: Iterable[str], all_paths: Iterable[str]) -> list[str]:
    """The last components of the paths where they select just these modules, as servers expect, else the paths."""
    paths = list(paths)
    ends = list(dict.fromkeys(path.split(".")[-1] for path in paths))
    return ends if sum(path.split(".")[-1] in ends for path in all_paths) == len(paths) else paths


# -------------------------------------------------------------------------- what a file says


def refuse_unknown(config: Mapping[str, Any], method: str) -> None:
    """Raise an :class:`ArtefactError` for a setting that is switched on and that we do not know, or of a wrong type."""
    for key, value in config.items():
        if value is not None and not isinstance(value, TYPES.get(key, object)):
            raise ArtefactError(
                f"{key} is {value!r}; it must be of type {' or '.join(t.__name__ for t in TYPES[key])}."
            )
        if value and key not in SETTINGS[method]:
            raise ArtefactError(
                f"{key} = {value!r} is a setting of PEFT's {KINDS[method]} that this version cannot honour. A newer "
                "anyadapter may: `pip install -U anyadapter`. Otherwise load the adapter with PEFT, call "
                "merge_and_unload() and save the model."
            )


def modules_of(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], method: str, host: Host
) -> tuple[list[str], list[str]]:
    """The modules that the tensors adapt, and those they replace as a whole.

    Raises:
        ArtefactError: a tensor is of no kind we read, or of a module this host does not have.
    """
    adapted: dict[str, None] = {}
    whole: dict[str, None] = {}
    replaced = config.get("modules_to_save") or ()
    for key in tensors:
        name = key.removeprefix(ROOTS[method])
        tail = next((tail for tail in TAILS[method] if name.endswith(tail)), None)
        if key == PROMPT and method == "prefix":
            continue
        if key == name:
            raise ArtefactError(f"{key[:200]!r} is no key of PEFT's {KINDS[method]}, which begin with {ROOTS[method]}.")
        if tail is None:
            parts = name.split(".")
            outer = [".".join(parts[:i]) for i in range(1, len(parts))]
            path = next((p for p in outer if any(ends_with(p, end) for end in replaced)), None)
            if path is None:
                raise ArtefactError(f"{key[:200]!r} is neither {', '.join(TAILS[method])} nor in modules_to_save.")
            whole[path] = None
        else:
            path = name.removesuffix(tail)
            adapted[path] = None
        if path not in host.modules:
            raise ArtefactError(f"{path[:200]!r} is no module of {host.describe()}. {near(path, host.modules)}")
    return list(adapted), list(whole)


def targets(paths: Iterable[str], host: Host) -> list[str]:
    """Our targets for these modules. A name that is also a role's is put as a pattern that matches only itself."""
    return [f"[{name[0]}]{name[1:]}" if name in ROLES else name for name in shortest(paths, host.modules)]


def lora_settings(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], adapted: list[str], host: Host
) -> dict[str, Any]:
    if config.get("bias", "none") != "none":
        raise ArtefactError(
            f"bias is {config['bias']!r}: the file holds biases of the base. Load it with PEFT and merge_and_unload()."
        )
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        raise ArtefactError(
            f"init_lora_weights is {config['init_lora_weights']!r}, which changed the base too. Save it again with PEFT's "
            "save_pretrained(folder, path_initial_model_for_weight_conversion=...), which makes a plain LoRA of it."
        )
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    known = [rank, *(config.get("rank_pattern") or {}).values()]
    alphas = {literal(pattern): value for pattern, value in (config.get("alpha_pattern") or {}).items()}
    ranks: dict[str, int] = {}
    for path in adapted:
        first = tensors.get(f"{ROOTS['lora']}{path}.lora_A.weight")
        if first is None:
            raise ArtefactError(f"The file has {path}.lora_B.weight and no {path}.lora_A.weight.")
        ranks[path] = first.shape[0] if first.dim() else 0
        if ranks[path] not in known:
            raise ArtefactError(f"{path}.lora_A.weight is of rank {ranks[path]}; the configuration says {known}.")
    own = {path: next((a for end, a in alphas.items() if ends_with(path, end)), alpha) for path in adapted}
    return {
        "rank": rank,
        "alpha": alpha,
        "dropout": config.get("lora_dropout", 0.0),
        "rank_stabilised": bool(config.get("use_rslora")),
        "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {path: a for path, a in own.items() if a != alpha},
        "targets": targets(adapted, host),
    }


def literal(pattern: str) -> str:
    """The name in a pattern of ``alpha_pattern``. Raises :class:`ArtefactError` when it is more than a name."""
    name = pattern.removeprefix("^").replace("\\.", ".")
    if not re.fullmatch(r"[\w.]+", name):
        raise ArtefactError(
            f"alpha_pattern has the regular expression {pattern!r}, which is not run. Replace it in the file by the names "
            "of the modules it stands for."
        )
    return name


def ia3_settings(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], adapted: list[str], host: Host
) -> dict[str, Any]:
    inputs = [path for path in adapted if tensors[f"{ROOTS['ia3']}{path}.ia3_l"].shape[:1] == (1,)]
    outputs = [path for path in adapted if path not in inputs]
    return {"outputs": targets(outputs, host), "inputs": targets(inputs, host)}


def prefix_settings(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], adapted: list[str], host: Host
) -> dict[str, Any]:
    if (config.get("num_transformer_submodules") or 1) != 1 or config.get("task_type") == "SEQ_2_SEQ_LM":
        raise ArtefactError(
            "This is a prefix for an encoder-decoder, which we do not read from PEFT's files: its positions differ."
        )
    if PROMPT not in tensors:
        raise ArtefactError(f"A prefix is the tensor {PROMPT!r}, which the file does not have.")
    return {"tokens": config.get("num_virtual_tokens")}


# -------------------------------------------------------------------------- what we say in a file


def misfit(adapter: Adapter) -> str | None:
    """Why the layout cannot hold an adapter, or ``None``."""
    config: Any = adapter.config
    if config.method not in KINDS:
        return f"it knows {', '.join(KINDS)}, not {config.method!r}"
    if config.method == "lora" and config.fused:
        return "it has no fused updates"
    if config.method == "ia3" and adapter.scale != 1:
        return f"there is no place for the scale {adapter.scale}"
    if config.method == "prefix":
        # PEFT puts a prefix in front of every layer of the one stack the model has.
        paths = [placement.path for placement in adapter.placements if placement.kind == "attention"]
        shapes = {star(path) for path in paths}
        if config.projection is not None:
            return "the network that makes the prefix is not saved there; fold() first"
        if len(shapes) > 1 or len(paths) != sum(star(path) in shapes for path in adapter.base_paths):
            return "a prefix there is in front of all layers of one stack"
        if not config.shift or len(set(shapes_of(adapter))) > 1:
            return "a prefix there takes positions, and its attentions are all of one shape"
        if task_of(adapter) is None:
            return f"for a {adapter.base_class} it needs a head trained as a whole, whole=('classifier',) for one"
    return None


def star(path: str) -> str:
    """A path with ``*`` for the numbers of layers."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def shapes_of(adapter: Adapter) -> list[tuple[int, int]]:
    """(key heads, their width) of each attention with a prefix."""
    branches: list[Any] = [placement.branch for placement in adapter.placements if placement.kind == "attention"]
    return [branch.args[1:3] for branch in branches]


def task_of(adapter: Adapter) -> str | None:
    """PEFT's name of what the base is for; but where PEFT would look for a trained head, only if there is one."""
    task = next((task for end, task in TASKS.items() if adapter.base_class.endswith(end)), None)
    headed = any(path.split(".")[-1] in HEADS for path in whole_of(adapter))
    return task if task == "CAUSAL_LM" or headed else None


def lora_config(adapter: Adapter) -> dict[str, Any]:
    config: Any = adapter.config
    paths, scale = adapted_by(adapter), adapter.scale
    return {
        "r": config.rank,
        "lora_alpha": number(config.alpha * scale),
        "lora_dropout": config.dropout,
        "use_rslora": config.rank_stabilised,
        "target_modules": shortest(paths, adapter.base_paths),
        "rank_pattern": {path: config.rank_of(path) for path in paths if config.rank_of(path) != config.rank},
        "alpha_pattern": {
            path: number(config.alpha_of(path) * scale) for path in paths if config.alpha_of(path) != config.alpha
        },
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "init_lora_weights": True,
    }


def number(value: float) -> float:
    """As an integer where it is one, which some readers expect of alpha."""
    return int(value) if value == int(value) else value


def ia3_config(adapter: Adapter) -> dict[str, Any]:
    paths = adapted_by(adapter)
    inputs = [path for path in paths if adapter.tensors()[f"{path}.ia3_l"].shape[0] == 1]
    chosen = shortest(inputs, adapter.base_paths)
    if sum(path.endswith(tuple(chosen)) for path in paths) != len(inputs):
        chosen = inputs  # PEFT compares the ends of paths, not of their parts
    return {
        "target_modules": shortest(paths, adapter.base_paths),
        "feedforward_modules": chosen,
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
    }


def prefix_config(adapter: Adapter) -> dict[str, Any]:
    config: Any = adapter.config
    shapes = shapes_of(adapter)
    heads, dim = shapes[0]
    return {
        "num_virtual_tokens": config.tokens,
        "num_layers": len(shapes),
        "num_attention_heads": heads,
        "token_dim": heads * dim,
        "encoder_hidden_size": heads * dim,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
    }
