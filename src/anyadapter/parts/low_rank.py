"""The low-rank update beside a linear layer or a convolution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyadapter.core.adapter import Branch
from anyadapter.core.host import features


class LowRank(Branch):
    """y = call(x) + scale · scaling · B A dropout(x) (Hu et al. 2021, eq. 3).

    Shapes for a linear: A is (r, in), B is (out, r); for a convolution A has the host's kernel, stride and padding and B
    is 1×1. A starts Kaiming-uniform with a = √5, B at zero, so that a fresh branch changes nothing.
    """

    def __init__(self, module: nn.Module, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        width_in, width_out = features(module)
        if isinstance(module, nn.Conv2d):
            like: Any = module
            self.lora_A: Any = nn.Conv2d(
                width_in, rank, like.kernel_size, like.stride, like.padding, like.dilation, bias=False
            )
            self.lora_B: Any = nn.Conv2d(rank, width_out, 1, bias=False)
        else:
            self.lora_A = nn.Linear(width_in, rank, bias=False)
            self.lora_B = nn.Linear(rank, width_out, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout) if dropout else None

    def forward(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """x: (…, in) → (…, out), or (batch, in, height, width) for a convolution."""
        out = call(x)
        x = x.to(self.lora_A.weight.dtype)
        if self.dropout is not None:
            x = self.dropout(x)
        hidden, strength = self.lora_A(x), self.scaling * self.strength(out)
        by_hand = isinstance(self.lora_B, nn.Conv2d) or hidden.dtype != out.dtype
        if by_hand or isinstance(strength, Tensor) or not is_power_of_two(strength):
            return (out + self.lora_B(hidden) * strength).to(out.dtype)
        # The same numbers by a product that adds into a copy of `out`, which saves two passes over it.
        rows, columns = out.reshape(-1, out.shape[-1]), self.lora_B.weight.to(out.dtype).T
        return torch.addmm(rows, hidden.reshape(-1, hidden.shape[-1]), columns, alpha=strength).view_as(out)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A, (r, in), and scaling · B, (out, r), in fp32, so that their product is the update at scale 1.

        Of a convolution, (r, in, height, width) and (out, r, 1, 1).
        """
        return self.lora_A.weight.detach().float(), self.lora_B.weight.detach().float() * self.scaling

    def weight_delta(self, module: nn.Module) -> Tensor:
        """scale · scaling · B A, in fp32 and in the layout of ``module.weight``."""
        a, b = self.lora_A.weight.float(), self.lora_B.weight.float()
        if isinstance(module, nn.Conv2d):
            delta = F.conv2d(a.transpose(0, 1), b).transpose(0, 1)
        else:
            delta = b @ a
            delta = delta if isinstance(module, nn.Linear) else delta.T
        return delta * (self.scaling * self.scale)


def truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The nearest product B A of a lower rank (Eckart and Young 1936), by the singular values of R_B R_Aᵀ.

    Args:
        a, b: as :meth:`LowRank.factors` gives them.
        rank: of the result, at most that of ``a`` and ``b``.

    Returns:
        A and B of that rank, each with the roots of the singular values, and the relative error, ‖BA − B'A'‖ / ‖BA‖ in the
        Frobenius norm.
    """
    q_a, r_a = torch.linalg.qr(a.flatten(1).double().T)
    q_b, r_b = torch.linalg.qr(b.flatten(1).double())
    u, s, v = torch.linalg.svd(r_b @ r_a.T)
    half = s[:rank].sqrt()
    new_a, new_b = (v[:rank] * half[:, None]) @ q_a.T, q_b @ (u[:, :rank] * half)
    total = float(s.norm())
    error = float(s[rank:].norm()) / total if total else 0.0
    return new_a.float().view(rank, *a.shape[1:]), new_b.float().view(len(b), rank, *b.shape[2:]), error


def is_power_of_two(value: float) -> bool:
    """Whether multiplying by it is exact, so that it can be done before or after rounding."""
    return math.frexp(abs(value))[0] == 0.5
