"""Routing among skills: which linears share it, and whether it is alive."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from anyadapter.core.host import Host, as_tuple, ends_with

GRANULARITIES = ("linear", "sublayer", "layer", "stack", "model")


def groups_of(host: Host, paths: Iterable[str], granularity: str) -> dict[str, str]:
    """The group of each module, as a key that those of one group share: told by the host's structure, not by names in paths.

    Args:
        granularity: ``"linear"``, every module by itself; ``"sublayer"``, those of the attention or feed-forward of one
            layer; ``"layer"``; ``"stack"``, those of one list of layers, such as the encoder's; or ``"model"``, all.
            Modules outside of all layers are by themselves, but for ``"model"``.

    Raises:
        TargetError: layers are asked for, and the host's family is not registered, or has none.
    """
    if granularity in ("linear", "model"):
        return {path: path if granularity == "linear" else "" for path in paths}
    layers = set(host.paths("layer"))
    groups = {}
    for path in paths:
        parts = path.split(".")
        layer = next((outer for i in range(len(parts)) if (outer := ".".join(parts[:i])) in layers), None)
        if layer is None:
            groups[path] = path
        elif granularity == "sublayer":
            groups[path] = f"{layer}:{sublayer(host, path)}"
        else:
            groups[path] = layer if granularity == "layer" else layer.rpartition(".")[0]
    return groups


def sublayer(host: Host, path: str) -> str:
    """The part of its layer a linear serves: the first word of its role, or the module round it where it has none."""
    roles = host.family.roles if host.family else {}
    for role, patterns in roles.items():
        if "." in role and any(ends_with(path, pattern) for pattern in as_tuple(patterns)):
            return role.partition(".")[0]
    return path.rpartition(".")[0]


def discreteness(logits: Tensor) -> float:
    """Mean entropy of σ(Z) in bits: 1 is undecided, as at the start, and 0 all or nothing."""
    return float(torch.distributions.Bernoulli(logits=logits).entropy().mean() / math.log(2))


def sparsity(logits: Tensor) -> float:
    """The share of σ(Z) that is at least one half."""
    return float((logits >= 0).float().mean())


def efficiency(logits: Tensor) -> float:
    """Entropy of how much all tasks together use each skill, over its highest value: 1 is evenly, as at the start."""
    used = logits.sigmoid().mean(dim=0)
    return float(torch.distributions.Categorical(probs=used).entropy() / math.log(len(used))) if len(used) > 1 else 1.0
