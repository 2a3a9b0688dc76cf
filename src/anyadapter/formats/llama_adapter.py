"""The files of LLaMA-Adapter's authors, for transformers' LLaMA.

=============  ======================================================================================================
``v1``         a flat pickle: ``adapter_query.weight`` (L · K, d) and ``layers.{i}.attention.gate`` for every layer, (1,
               heads, 1, 1) or, in their first release, (1,). It says neither K nor the gate's activation.
``chat``       ``{"model": …}``: biases, scales on the inputs, norms, and prompts if there are any.
``multimodal`` ``{"model": …, "config": …}`` of the released V2 models: prompts and gates, the visual path, biases, norms,
               and LoRA in the LORA-BIAS ones. Older files spell ``llma.`` for ``llama.``; both are read.
``accessory``  ``{"model": …}`` of LLaMA2-Accessory: the prompts and gates of all layers in one tensor each.
=============  ======================================================================================================

Meta's models rotate queries and keys in pairs of features (0, 1), (2, 3), …, transformers' in halves (0, n/2), …: biases and
LoRA's B of these two projections are put in the other order. Tensors come back byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from anyadapter.core.adapter import Adapter, AdapterConfig, check_tensors
from anyadapter.core.attach import build
from anyadapter.core.attention import key_heads
from anyadapter.core.catalogue import config_from_dict
from anyadapter.core.errors import ArtefactError, near
from anyadapter.core.host import Host
from anyadapter.formats.files import read_file
from anyadapter.formats.layouts import check_unscaled

METHOD = "llama_adapter"
QUERY, GATE = "adapter_query.weight", "layers.{}.attention.gate"

# Roles in a layer, transformers' names and Meta's.
LINEARS = {
    "self_attention.query": ("self_attn.q_proj", "attention.wq"),
    "self_attention.key": ("self_attn.k_proj", "attention.wk"),
    "self_attention.value": ("self_attn.v_proj", "attention.wv"),
    "self_attention.output": ("self_attn.o_proj", "attention.wo"),
    "feed_forward.gate": ("mlp.gate_proj", "feed_forward.w1"),
    "feed_forward.down": ("mlp.down_proj", "feed_forward.w2"),
    "feed_forward.up": ("mlp.up_proj", "feed_forward.w3"),
}
NORMS = {
    "attention_norm": ("input_layernorm", "attention_norm"),
    "feed_forward_norm": ("post_attention_layernorm", "ffn_norm"),
    "final_norm": ("norm", "norm"),
}
META = {**dict((*LINEARS.values(), *NORMS.values())), "self_attn": "attention"}


GATES = {"gate": "{block}.gate", "new_gate": "{block}.new_gate"}
BIAS, NORM = {"affine.bias": "{block}.{w}.bias"}, {"norm.weight": "{block}.weight"}


@dataclass(frozen=True)
class Layout:
    """How a file names things.

    Attributes:
        leaves: our tensor of a module -> theirs, given the block and the module in it, such as ``attention`` and ``wq``.
        start: of the language model's names.
        visual: of the visual path's; None where there is none.
        idle: whether there are gates of layers without prompts.
        packed: whether the prompts of all layers are one tensor, and their gates.
        fixed: where its adapters have this setting, they have that one with this value.
    """

    leaves: Mapping[str, str]
    start: str = ""
    visual: str | None = None
    idle: bool = False
    packed: bool = False
    fixed: tuple[str, str, Any] | None = None

    def name(self, path: str) -> str:
        """Their name of one of our tensors. Raises :class:`ArtefactError` when they have no place for it."""
        if path == QUERY:
            return path
        if self.visual is not None and path.startswith("visual."):
            return self.visual + path.removeprefix("visual.")
        layer, part = re.fullmatch(r"(?:model\.)?(layers\.\d+\.)?(.+)", path).groups()  # type: ignore[union-attr]
        for leaf, theirs in self.leaves.items():
            module = part.removesuffix(f".{leaf}")
            if module != part and module in META:
                block, _, w = META[module].rpartition(".")
                return self.start + (layer or "") + theirs.format(block=block or w, w=w)
        raise ArtefactError(f"The authors' files of this kind have no place for {path}.")


LAYOUTS = {
    "v1": Layout({"gate": "{block}.gate"}, idle=True),
    "chat": Layout(
        {**GATES, "affine.bias": "{block}.{w}_bias", "affine.factor": "{block}.{w}_scale", **NORM},
        fixed=("scales", "scale_position", "input"),
    ),
    "multimodal": Layout(
        {
            **GATES,
            **BIAS,
            "lora_A.weight": "{block}.lora_{w}_l1.weight",
            "lora_B.weight": "{block}.lora_{w}_l2.weight",
            **NORM,
        },
        start="llama.",
        visual="",
        idle=True,
        fixed=("lora_rank", "prompt_lora", False),
    ),
    "accessory": Layout(
        {
            **GATES,
            **BIAS,
            "lora_A.weight": "{block}.{w}.lora_a.weight",
            "lora_B.weight": "{block}.{w}.lora_b.weight",
            **NORM,
        },
        start="llma.",
        visual="llma.",
        packed=True,
        fixed=("lora_rank", "prompt_lora", True),
    ),
}
Kind = Literal["v1", "chat", "multimodal", "accessory"]


# ---------------------------------------------------------------------- reading


def read_official(
    source: str | Path | Mapping[str, Any],
    host: Host,
    layout: Kind = "v1",
    *,
    length: int = 10,
    activation: Literal["tanh", "identity"] | None = None,
    visual_heads: int = 16,
    allow_pickle: bool = False,
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Settings and tensors of an official file, for ``attach(model, config).load_tensors(tensors)``.

    Args:
        source: a ``.pth`` file, or what is in it.
        host: the base, whose layers the file's are: a LLaMA of transformers.
        layout: which of the authors' files it is.
        length: number K of prompts in a layer; only ``"v1"`` does not say.
        activation: of the gate; by default tanh where there is one gate per head, as their training code has it, and
            none where there is one per layer, as their first release had it.
        visual_heads: of the visual path's attention, which the file does not say.
        allow_pickle: read the ``.pth`` (plain tensors and numbers only; nothing in it is executed).

    Raises:
        ArtefactError: a tensor is missing, not known or of the wrong shape, or the host is no LLaMA.
        ConfigError, TargetError: the file has more layers than the host, or the host cannot be adapted so.
    """
    names = layout_of(layout, host)
    if isinstance(source, Mapping):
        tensors = dict(source.get("model", source))
    else:
        tensors = read_file(Path(source), allow_pickle, None if layout == "v1" else "model")
    if layout == "multimodal":
        tensors = {re.sub(r"^llma\.", "llama.", name): tensor for name, tensor in tensors.items()}
    if scalars := [name for name, tensor in tensors.items() if tensor.dim() == 0]:
        raise ArtefactError(f"No tensor of LLaMA-Adapter is a single number; these are: {', '.join(scalars)}.")
    settings = settings_of(tensors, names, length, activation)
    if names.fixed and settings.get(names.fixed[0]):
        settings[names.fixed[1]] = names.fixed[2]
    if settings.get("visual"):
        settings["visual_heads"] = visual_heads
    config = config_from_dict({"method": METHOD, **settings})
    trial = build(host, config, "trial")
    check_tensors(theirs(trial, host, names), tensors)
    return config, ours(tensors, trial, host, names)


def settings_of(tensors: Mapping[str, Tensor], names: Layout, length: int, activation: str | None) -> dict[str, Any]:
    """What the names and shapes in a file say."""
    settings = gate_settings(tensors, names, length, activation)
    first = f"{names.start}layers.0."

    def found(leaf: str) -> dict[str, Tensor]:
        """The tensors of the first layer that stand for one of ours, by role."""
        pattern, known = names.leaves.get(leaf), {}
        for role, (_, path) in LINEARS.items() if pattern else ():
            block, _, w = path.rpartition(".")
            if (key := first + pattern.format(block=block, w=w)) in tensors:
                known[role] = tensors[key]
        return known

    for setting, leaf in (("biases", "affine.bias"), ("scales", "affine.factor")):
        settings |= {setting: tuple(found(leaf))} if found(leaf) else {}
    if low := found("lora_A.weight"):
        settings |= {"lora_rank": next(iter(low.values())).shape[0], "lora_targets": tuple(low)}
    norms = [
        role
        for role, (_, path) in NORMS.items()
        if {f"{first}{path}.weight", f"{names.start}{path}.weight"} & {*tensors}
    ]
    settings |= {"norms": tuple(norms)} if norms else {}
    if names.visual is not None and (key := f"{names.visual}clip_proj.weight") in tensors:
        width, wide = tensors[key].shape[0], tensors[key].shape[-1]
        inner = tensors.get(f"{names.visual}visual_blocks.0.mlp.fc1.weight")
        depth = sum(name.endswith("attn.qkv.weight") for name in tensors)
        settings |= {"visual": "late", "visual_features": wide, "visual_width": width, "visual_depth": depth}
        settings |= {} if inner is None else {"visual_ratio": inner.shape[0] / width}
    if settings == {"length": 0}:
        raise ArtefactError(f"This is no such file of LLaMA-Adapter; it holds: {', '.join(list(tensors)[:10])}.")
    return settings


def gate_settings(tensors: Mapping[str, Tensor], names: Layout, length: int, activation: str | None) -> dict[str, Any]:
    """What a file says of prompts and their gates."""
    if names.packed:
        prefix, gate = tensors.get("llma.prefix"), tensors.get("llma.prefix_gate")
        if prefix is None or gate is None or prefix.dim() != 4:
            return {"length": 0}
        settings = {"length": prefix.shape[2], "last_layers": len(prefix), "activation": activation or "tanh"}
        return settings | {"new_gate": "llma.prefix_new_gate" in tensors}
    gates = [tensor for name, tensor in tensors.items() if name.endswith("attention.gate")]
    if QUERY not in tensors or not gates:
        if names is LAYOUTS["v1"]:
            raise ArtefactError(
                f"A LLaMA-Adapter file holds {QUERY} and {GATE.format('<i>')}; this one has: {', '.join(tensors)}."
            )
        return {"length": 0}
    rows = tensors[QUERY].shape[0]
    if not names.idle:
        length = rows // len(gates)
    elif (query := tensors.get("visual_query.weight")) is not None:
        length = query.shape[0]
    if length < 1 or rows % length:
        raise ArtefactError(f"{QUERY} has {rows} rows, not a multiple of {length}; pass the right length=.")
    per_head = gates[0].dim() > 1
    return {
        "length": length,
        "last_layers": rows // length,
        "activation": activation or ("tanh" if per_head else "identity"),
        "gate": "head" if per_head else "layer",
        **({"new_gate": True} if any(name.endswith(".new_gate") for name in tensors) else {}),
    }


# ---------------------------------------------------------------------- names


def write_official(adapter: Adapter, host: Host, layout: Kind = "v1") -> dict[str, Any]:
    """What the authors' file of this kind holds; ``torch.save`` it.

    Raises:
        ArtefactError: it is another method's adapter, has a scale or tensors that such a file has no place for, or the host is no
            LLaMA.
    """
    names = layout_of(layout, host)
    if adapter.config.method != METHOD:
        raise ArtefactError(f"A {type(adapter).__name__} does not fit the file of a LLaMA-Adapter.")
    check_unscaled(adapter)
    config: Any = adapter.config
    if names.fixed and getattr(config, names.fixed[0]) and getattr(config, names.fixed[1]) != names.fixed[2]:
        raise ArtefactError(
            f"In the authors' files of this kind {names.fixed[1]} is {names.fixed[2]!r}; here it is not."
        )
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in theirs(adapter, host, names).items()}
    if layout == "v1":
        return tensors
    if layout == "multimodal":
        rank = config.lora_rank
        return {
            "model": tensors,
            "config": {"w_bias": bool(config.biases), "w_lora": rank > 0, "lora_rank": rank or 16},
        }
    return {"model": tensors}


def layout_of(layout: str, host: Host) -> Layout:
    """Raise an :class:`ArtefactError` unless there is such a layout and the host is a LLaMA, whose files these are."""
    if layout not in LAYOUTS:
        raise ArtefactError(f"The authors of LLaMA-Adapter have no layout {layout!r}. {near(layout, LAYOUTS)}")
    if host.family is None or "llama" not in host.family.names:
        raise ArtefactError(
            f"The files of LLaMA-Adapter's authors are of transformers' LLaMA, not of {host.describe()}."
        )
    return LAYOUTS[layout]


def theirs(adapter: Adapter, host: Host, names: Layout) -> dict[str, Tensor]:
    """An adapter's tensors, as they name and order them."""
    found = {names.name(path): tensor for path, tensor in in_layers(adapter, names.idle).items()}
    for name, tensor in found.items():
        if is_turned(name, names):
            found[name] = pairs(tensor, head_dim(host))
    return packed(found, adapter) if names.packed else found


def ours(tensors: Mapping[str, Tensor], trial: Adapter, host: Host, names: Layout) -> dict[str, Tensor]:
    """The inverse of :func:`theirs`, for an adapter like ``trial``."""
    paths = in_layers(trial, names.idle)
    if names.packed:
        tensors = unpacked(tensors, [name for path in paths if GATE_END.search(name := names.name(path))])
    found = {path: tensors[names.name(path)] for path in paths}
    for path, tensor in found.items():
        if is_turned(names.name(path), names):
            found[path] = halves(tensor, head_dim(host))
    return gathered(found, trial)


def in_layers(adapter: Adapter, idle: bool) -> dict[str, Tensor]:
    """An adapter's values, the gates of layers without prompts (which come first) each by itself, or left out."""
    tensors = adapter.values()
    for kind in GATES:
        for i, gate in enumerate(tensors.pop(f"idle_{kind}s", ())):
            tensors |= {f"layers.{i}.self_attn.{kind}": gate} if idle else {}
    return tensors


def gathered(tensors: dict[str, Tensor], trial: Adapter) -> dict[str, Tensor]:
    """The inverse of :func:`in_layers`; what a file does not hold is as in a fresh adapter."""
    mine = trial.tensors()
    for kind in GATES:
        if (gates := mine.get(f"idle_{kind}s")) is not None:
            given = [tensors.pop(f"layers.{i}.self_attn.{kind}", gate) for i, gate in enumerate(gates)]
            tensors[f"idle_{kind}s"] = torch.stack(given)
    return tensors


GATE_END = re.compile(r"attention\.(new_)?gate$")


def packed(tensors: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """Prompts and gates of all layers in one tensor each: (L, 1, K, d), (L, heads), (L,)."""
    rest = {name: tensor for name, tensor in tensors.items() if name != QUERY and not GATE_END.search(name)}
    if QUERY in tensors:
        length: Any = adapter.config.length  # type: ignore[attr-defined]
        query = tensors[QUERY]
        rest["llma.prefix"] = query.view(-1, 1, length, query.shape[-1])
    for end, name in (("attention.gate", "llma.prefix_gate"), ("attention.new_gate", "llma.prefix_new_gate")):
        if gates := [tensor.flatten() for each, tensor in tensors.items() if each.endswith(end)]:
            rest[name] = torch.stack(gates) if end == "attention.gate" else torch.cat(gates)
    if "llma.visual_query.weight" in rest:
        rest["llma.visual_query"] = rest.pop("llma.visual_query.weight")
    return rest


def unpacked(tensors: Mapping[str, Tensor], gates: list[str]) -> dict[str, Tensor]:
    """The inverse of :func:`packed`; ``gates`` are the names of its gates, layer after layer."""
    found = dict(tensors)
    if (prefix := found.pop("llma.prefix", None)) is not None:
        found[QUERY] = prefix.flatten(0, 2)
    for end, name in (("attention.gate", "llma.prefix_gate"), ("attention.new_gate", "llma.prefix_new_gate")):
        if (values := found.pop(name, None)) is not None:
            found |= {
                gate: value.view(1, -1, 1, 1) for gate, value in zip((g for g in gates if g.endswith(end)), values)
            }
    if (query := found.pop("llma.visual_query", None)) is not None:
        found["llma.visual_query.weight"] = query
    return found


# ---------------------------------------------------------------------- the order of rotated features


def is_turned(name: str, names: Layout) -> bool:
    """Whether the rows of a tensor of theirs are features of queries or keys."""
    leaves = (names.leaves[leaf] for leaf in ("affine.bias", "lora_B.weight") if leaf in names.leaves)
    return any(name.endswith(leaf.format(block="attention", w=w)) for leaf in leaves for w in ("wq", "wk"))


def head_dim(host: Host) -> int:
    return key_heads(host.find("self_attention")[0].module)[1]


def halves(rows: Tensor, dim: int) -> Tensor:
    """Rows of heads of ``dim`` features, from pairs to halves."""
    return rows.unflatten(0, (-1, dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def pairs(rows: Tensor, dim: int) -> Tensor:
    """The inverse of :func:`halves`."""
    return rows.unflatten(0, (-1, 2, dim // 2)).transpose(1, 2).flatten(0, 2)


def gates_of(adapter: Adapter) -> list[Tensor]:
    """The gate of every layer of the base; those below the adapted ones, which act on nothing, come first."""
    tensors = adapter.tensors()
    return [*tensors.get("idle_gates", ()), *(tensor for name, tensor in tensors.items() if name.endswith(".gate"))]
