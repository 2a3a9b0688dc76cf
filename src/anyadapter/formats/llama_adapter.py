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

from anyadapter.core.adapter import check_tensors
from anyadapter.core.attach import build
from anyadapter.core.errors import ArtefactError
from anyadapter.core.host import Host
from anyadapter.formats.files import read_pickle
from anyadapter.methods.language.llama_adapter import LlamaAdapter, LlamaAdapterConfig

QUERY, GATE = "adapter_query.weight", "layers.{}.attention.gate"


def read_official(
    source: str | Path | Mapping[str, Tensor],
    host: Host,
    *,
    length: int = 10,
    activation: Literal["tanh", "identity"] | None = None,
) -> tuple[LlamaAdapterConfig, dict[str, Tensor]]:
    """Settings and tensors of an official file, for ``attach(model, config).load_tensors(tensors)``.

    Args:
        source: a ``.pth`` file, or what is in it.
        host: the base, whose layers the file's are.
        length: number K of prompts in a layer.
        activation: of the gate; by default tanh where there is one gate per head, as their training code has it, and
            none where there is one per layer, as their first release had it.

    Raises:
        ArtefactError: a tensor is missing, not known or of the wrong shape.
        ConfigError, TargetError: the file has more layers than the host, or the host cannot be adapted so.
    """
    tensors = dict(source) if isinstance(source, Mapping) else read_pickle(Path(source))
    gates = [tensor for name, tensor in tensors.items() if name.endswith(".attention.gate")]
    if QUERY not in tensors or not gates:
        raise ArtefactError(
            f"A LLaMA-Adapter file holds {QUERY} and {GATE.format('<i>')}; this one has: {', '.join(tensors)}."
        )
    rows = tensors[QUERY].shape[0]
    if rows % length:
        raise ArtefactError(f"{QUERY} has {rows} rows, not a multiple of {length}; pass the right length=.")
    per_head = gates[0].dim() > 1
    config = LlamaAdapterConfig(
        length=length,
        last_layers=rows // length,
        activation=activation or ("tanh" if per_head else "identity"),
        gate="head" if per_head else "layer",
    )
    trial = build(host, config, "trial")
    assert isinstance(trial, LlamaAdapter)
    check_tensors(write_official(trial), tensors)
    ordered = [tensors[GATE.format(i)] for i in range(len(trial.gates()))]
    idle = len(ordered) - rows // length
    mine = {QUERY: tensors[QUERY]} | ({"idle_gates": torch.stack(ordered[:idle])} if idle else {})
    mine |= {f"{placement.path}.gate": gate for placement, gate in zip(trial.placements, ordered[idle:])}
    return config, mine


def write_official(adapter: LlamaAdapter) -> dict[str, Tensor]:
    """The tensors as the authors name them; ``torch.save`` them."""
    gates = {GATE.format(i): gate for i, gate in enumerate(adapter.gates())}
    named = {QUERY: adapter.adapter_query.weight, **gates}
    return {name: tensor.detach().cpu().clone() for name, tensor in named.items()}
