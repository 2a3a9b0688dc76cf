"""The files of LLaMA-Adapter's authors.

V1: a flat pickle of tensors, ``adapter_query.weight`` (L · K, d) and ``layers.{i}.attention.gate`` for every layer of the
base, (1, heads, 1, 1) or, in their first release, (1,). It says neither K nor the gate's activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from anyadapter.core.adapter import Adapter, AdapterConfig, check_tensors
from anyadapter.core.attach import build
from anyadapter.core.catalogue import config_from_dict
from anyadapter.core.errors import ArtefactError
from anyadapter.core.host import Host
from anyadapter.formats.files import read_file

METHOD = "llama_adapter"
QUERY, GATE = "adapter_query.weight", "layers.{}.attention.gate"


def read_official(
    source: str | Path | Mapping[str, Tensor],
    host: Host,
    *,
    length: int = 10,
    activation: Literal["tanh", "identity"] | None = None,
    allow_pickle: bool = False,
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Settings and tensors of an official file, for ``attach(model, config).load_tensors(tensors)``.

    Args:
        source: a ``.pth`` file, or what is in it.
        host: the base, whose layers the file's are.
        length: number K of prompts in a layer.
        activation: of the gate; by default tanh where there is one gate per head, as their training code has it, and
            none where there is one per layer, as their first release had it.
        allow_pickle: read the ``.pth`` (plain tensors only).

    Raises:
        ArtefactError: a tensor is missing, not known or of the wrong shape.
        ConfigError, TargetError: the file has more layers than the host, or the host cannot be adapted so.
    """
    tensors = dict(source) if isinstance(source, Mapping) else read_file(Path(source), allow_pickle)
    gates = [tensor for name, tensor in tensors.items() if name.endswith(".attention.gate")]
    if QUERY not in tensors or not gates:
        raise ArtefactError(
            f"A LLaMA-Adapter file holds {QUERY} and {GATE.format('<i>')}; this one has: {', '.join(tensors)}."
        )
    rows = tensors[QUERY].shape[0]
    if rows % length:
        raise ArtefactError(f"{QUERY} has {rows} rows, not a multiple of {length}; pass the right length=.")
    per_head = gates[0].dim() > 1
    settings = {
        "length": length,
        "last_layers": rows // length,
        "activation": activation or ("tanh" if per_head else "identity"),
        "gate": "head" if per_head else "layer",
    }
    config = config_from_dict({"method": METHOD, **settings})
    trial = build(host, config, "trial")
    check_tensors(write_official(trial), tensors)
    ordered = [tensors[GATE.format(i)] for i in range(len(gates_of(trial)))]
    idle = len(ordered) - rows // length
    mine = {QUERY: tensors[QUERY]} | ({"idle_gates": torch.stack(ordered[:idle])} if idle else {})
    mine |= {f"{placement.path}.gate": gate for placement, gate in zip(trial.placements, ordered[idle:])}
    return config, mine


def write_official(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors as the authors name them; ``torch.save`` them. Raises :class:`ArtefactError` for another method's."""
    if adapter.config.method != METHOD:
        raise ArtefactError(f"A {type(adapter).__name__} does not fit the file of a LLaMA-Adapter.")
    named = {QUERY: adapter.tensors()[QUERY]}
    named |= {GATE.format(i): gate for i, gate in enumerate(gates_of(adapter))}
    return {name: tensor.detach().cpu().clone() for name, tensor in named.items()}


def gates_of(adapter: Adapter) -> list[Tensor]:
    """The gate of every layer of the base; those below the adapted ones, which act on nothing, come first."""
    tensors = adapter.tensors()
    return [*tensors.get("idle_gates", ()), *(tensors[f"{placement.path}.gate"] for placement in adapter.placements)]
