"""The base's own modules in the engine's passes, computed in fewer operations: the same results, but for rounding.

Linears have a second copy of their weights in the layout that oneDNN computes fastest with; those of one input, as query, key
and value, are one product. RMSNorms and gated feed-forwards are recognised by what they compute. Whoever else calls the model
gets what it always gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyadapter.core.adapter import Placement
from anyadapter.core.host import Host
from anyadapter.serving.kernels import Kernels
from anyadapter.serving.kernels.native import Native

PACKED_FOR = 32  # rows in a pass for which oneDNN chooses the layout
GRAIN = 16  # more rows than that are filled up to a multiple of this
TOGETHER = (
    ("self_attention.query", "self_attention.key", "self_attention.value"),
    ("feed_forward.gate", "feed_forward.up"),
)


def can_fuse(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed linears are to be had here."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype is torch.float32 or (dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fused(host: Host, kernels: Kernels, running: Callable[[], bool]) -> Iterator[Placement]:
    """What to place at the base's modules.

    Args:
        running: whether the call that comes is of the engine's own pass.
    """
    done: set[str] = set()
    for paths in joinable(host):
        product = Product([host.modules[path] for path in paths])
        for index, path in enumerate(paths):
            yield Placement(path, "call", partial(product.part, running, index))
        done.update(paths)
    for path, module in host.modules.items():
        if path not in done and is_plain_linear(module):
            yield Placement(path, "call", partial(linear, running, Product([module])))
        elif isinstance(kernels, Native) and (eps := rms_norm(module, kernels)) is not None:
            yield Placement(path, "call", partial(norm, running, kernels, module, eps))
    if isinstance(kernels, Native):
        for path in role_paths(host, "feed_forward"):
            if (unit := gated_unit(host, path, kernels)) is not None:
                yield Placement(path, "call", partial(gated, running, kernels, *unit))


# -------------------------------------------------------------------------- linears


class Product:
    """Linears of one input, by one product with their weights side by side.

    oneDNN compiles a kernel for each number of rows it meets and keeps it, half a megabyte each: so it meets few.
    """

    def __init__(self, linears: list[Any]) -> None:
        weights = [module.weight.detach() for module in linears]
        self.weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights), PACKED_FOR)
        self.bias = torch.cat([module.bias.detach() for module in linears]) if linears[0].bias is not None else None
        self.widths = [len(weight) for weight in weights]
        self.x: Tensor | None = None  # the last input, while not all linears had their part of its result
        self.parts: list[Tensor | None] = []

    def __call__(self, x: Tensor) -> Tensor:
        """x: (…, T, in) → (…, T, out)."""
        rows = x.shape[-2]
        more = -rows % GRAIN if rows > PACKED_FOR else 0
        x = F.pad(x, (0, 0, 0, more)) if more else x
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")[..., :rows, :]

    def part(self, running: Callable[[], bool], index: int, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """One linear's result; all are computed when the first is asked for, and each is given once, for it is added to."""
        if not running():
            return call(x)
        if self.x is not x or self.parts[index] is None:
            self.x, self.parts = x, list(self(x).split(self.widths, -1))
        part, self.parts[index] = self.parts[index], None
        if not any(p is not None for p in self.parts):
            self.x = None
        assert part is not None
        return part


def linear(running: Callable[[], bool], product: Product, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return product(x) if running() else call(x)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether its weight is a tensor of this device, not one that lies on several."""
    return type(module) is nn.Linear and type(module.weight.data) is Tensor


def joinable(host: Host) -> Iterator[list[str]]:
    """Paths of plain linears that one module calls with the same input."""
    for roles in TOGETHER:
        found: dict[str, list[str]] = {}
        for role in roles:
            for path in role_paths(host, role):
                found.setdefault(path.rpartition(".")[0], []).append(path)
        for paths in found.values():
            modules: list[Any] = [host.modules[path] for path in paths]
            if len(paths) < len(roles) or not all(is_plain_linear(module) for module in modules):
                continue
            if len({(module.in_features, module.bias is None) for module in modules}) == 1:
                yield paths


def role_paths(host: Host, role: str) -> list[str]:
    """The module paths of a role; none where the architecture has no such part."""
    return host.paths(role) if host.family is not None and role in host.family.roles else []


# -------------------------------------------------------------------------- norms and gated units


def norm(
    running: Callable[[], bool], kernels: Native, module: Any, eps: float, call: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    """An RMSNorm in one operation instead of eight."""
    return kernels.norm(x, module.weight, eps) if running() and x.dtype is kernels.dtype else call(x)


def rms_norm(module: nn.Module, kernels: Native) -> float | None:
    """The ε of a module that is an RMSNorm by its name and by what it computes, else None.

    By what it computes, because the name says too little: Gemma multiplies by 1 + weight, others round elsewhere.
    """
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float):
        return None
    if not isinstance(weight, nn.Parameter) or type(weight.data) is not Tensor:  # none that lies on several devices
        return None
    if weight.ndim != 1 or weight.dtype is not kernels.dtype:
        return None
    x = some_rows(len(weight), weight.dtype)
    return eps if alike(kernels.norm(x, weight, eps), module(x)) else None


def gated(
    running: Callable[[], bool],
    kernels: Native,
    gate: nn.Module,
    up: nn.Module,
    down: nn.Module,
    call: Callable[[Tensor], Tensor],
    x: Tensor,
) -> Tensor:
    """down(silu(gate x) · up x), the middle in one operation; adapters at the three linears act as always."""
    return down(kernels.gate(gate(x), up(x))) if running() and x.dtype is kernels.dtype else call(x)


def gated_unit(host: Host, path: str, kernels: Native) -> tuple[nn.Module, nn.Module, nn.Module] | None:
    """The three linears of a module that computes down(silu(gate x) · up x), else None."""
    parts = [
        [part for part in role_paths(host, f"feed_forward.{name}") if part.startswith(f"{path}.")]
        for name in ("gate", "up", "down")
    ]
    modules: list[Any] = [host.modules[found[0]] for found in parts if len(found) == 1]
    if len(modules) != 3 or not all(is_plain_linear(m) and m.weight.dtype is kernels.dtype for m in modules):
        return None
    gate, up, down = modules
    x = some_rows(gate.in_features, kernels.dtype)
    return (gate, up, down) if alike(down(kernels.gate(gate(x), up(x))), host.modules[path](x)) else None


def some_rows(width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def alike(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results differ by rounding only."""
    step = torch.finfo(ours.dtype).eps
    size = float(theirs.detach().abs().max())
    return torch.allclose(ours, theirs, rtol=8 * step, atol=step * max(1.0, size))
