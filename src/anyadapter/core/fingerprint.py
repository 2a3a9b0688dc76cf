"""The fingerprint of a base model: enough to tell that an adapter meets the base it was trained on."""

from __future__ import annotations

from typing import Any

import torch

from anyadapter.core.errors import ArtefactError, BaseMismatchError
from anyadapter.core.host import Host

TENSORS, VALUES = 16, 8  # how many tensors are sampled, and how many values of each
TOLERANCE = 0.1  # relative; the same base in another dtype stays far below, another base far above


def fingerprint(host: Host) -> dict[str, Any]:
    """Class, and shape and a few values of some tensors spread over the base. Readable, and a few kilobytes of JSON.

    Modules in whose place an attached adapter runs are left out: the head of a new task may have another random start.

    Returns:
        ``{"class": name, "tensors": {name: {"shape": [...], "values": [...]}}}``; values are absent where the tensor is
        quantised.
    """
    placements = [p for adapter in host.adapters.values() for p in adapter.placements]
    replaced = tuple(f"{p.path}." for p in placements if getattr(p.branch, "replaces", False))
    named = {
        name: tensor
        for name, tensor in host.model.state_dict().items()
        if isinstance(tensor, torch.Tensor) and tensor.dim() >= 1 and not name.startswith(replaced)
    }
    matrices = sorted(name for name, tensor in named.items() if tensor.dim() >= 2) or sorted(named)
    step = max(1, len(matrices) // TENSORS)
    return {
        "class": type(host.model).__name__,
        "tensors": {name: _sample(named[name]) for name in matrices[::step][:TENSORS]},
    }


def check_fingerprint(host: Host, expected: dict[str, Any], own: dict[str, Any] | None = None) -> None:
    """Compare a base with the fingerprint in an adapter's file.

    Args:
        own: the base's own fingerprint, where its values are not at hand because it is split over several devices.

    Raises:
        ArtefactError: it has not the form of a fingerprint.
        BaseMismatchError: a tensor is missing, has another shape or other values.
    """
    if not is_fingerprint(expected):
        raise ArtefactError("What the adapter's file says of the base it was trained on is malformed.")
    named = host.model.state_dict()
    trained_on = f"The adapter was trained on a {expected.get('class', 'different model')}"
    advice = "Load it on that base, or pass check_base=False if you know that the two are the same."
    known = own["tensors"] if own else {}
    for name, sample in expected.get("tensors", {}).items():
        if name not in named:
            raise BaseMismatchError(f"{trained_on}, whose {name} does not exist in {host.describe()}. {advice}")
        mine = known.get(name) or _sample(named[name])
        if mine["shape"] != sample["shape"]:
            raise BaseMismatchError(
                f"{trained_on} whose {name} is {sample['shape']}; here it is {mine['shape']}. {advice}"
            )
        if "values" not in mine or "values" not in sample:
            continue
        here, there = (torch.tensor(values, dtype=torch.float32) for values in (mine["values"], sample["values"]))
        if (here - there).norm() > TOLERANCE * there.norm().clamp(min=1e-6):
            raise BaseMismatchError(f"{trained_on} whose {name} has other values than this one's. {advice}")


def is_fingerprint(value: Any) -> bool:
    """Whether a value read from a file has the form of :func:`fingerprint`'s result."""
    tensors = value.get("tensors", {}) if isinstance(value, dict) else None
    return isinstance(tensors, dict) and all(isinstance(s, dict) and _is_sample(s) for s in tensors.values())


def _is_sample(sample: dict[str, Any]) -> bool:
    values = sample.get("values", [0.0] * VALUES)
    if not isinstance(sample.get("shape"), list) or not isinstance(values, list) or len(values) != VALUES:
        return False
    return all(isinstance(v, float) or (type(v) is int and abs(v) < 1 << 63) for v in values)


def _sample(tensor: torch.Tensor) -> dict[str, Any]:
    sample: dict[str, Any] = {"shape": list(tensor.shape)}
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # of the same shape, from all devices
    if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
        flat = tensor.detach().reshape(-1)
        index = torch.linspace(0, flat.numel() - 1, VALUES, dtype=torch.float64, device="cpu").long()
        sample["values"] = [round(v, 8) for v in flat[index.to(flat.device)].float().tolist()]
    return sample
