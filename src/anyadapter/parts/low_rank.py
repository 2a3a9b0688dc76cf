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
        hidden, strength = self.lora_A(x), self.scaling * self.scale
        if isinstance(self.lora_B, nn.Conv2d) or hidden.dtype != out.dtype or not is_power_of_two(strength):
            return (out + self.lora_B(hidden) * strength).to(out.dtype)
        # The same numbers by a product that adds into a copy of `out`, which saves two passes over it.
        rows, columns = out.reshape(-1, out.shape[-1]), self.lora_B.weight.to(out.dtype).T
        return torch.addmm(rows, hidden.reshape(-1, hidden.shape[-1]), columns, alpha=strength).view_as(out)

    def weight_delta(self, module: nn.Module) -> Tensor:
        """scale · scaling · B A, in fp32 and in the layout of ``module.weight``."""
        a, b = self.lora_A.weight.float(), self.lora_B.weight.float()
        if isinstance(module, nn.Conv2d):
            delta = F.conv2d(a.transpose(0, 1), b).transpose(0, 1)
        else:
            delta = b @ a
            delta = delta if isinstance(module, nn.Linear) else delta.T
        return delta * (self.scaling * self.scale)


def is_power_of_two(value: float) -> bool:
    """Whether multiplying by it is exact, so that it can be done before or after rounding."""
    return math.frexp(abs(value))[0] == 0.5
