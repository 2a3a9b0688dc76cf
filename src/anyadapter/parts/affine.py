"""What LLaMA-Adapter V2 unlocks of a frozen model: a bias and a scale at its linears, the weights of its normalisations.

Gao et al. 2023, arXiv 2304.15010, section 4.1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from anyadapter.core.adapter import Branch
from anyadapter.core.host import features


class Affine(Branch):
    """y = s ⊙ (call(x) + b), or y = call(s ⊙ x) + b (equations 1 and 2 of the second paper; card, section 4.3).

    b starts at zero and s at one: a fresh branch changes nothing.

    Args:
        bias: whether there is b.
        scale: where s is, at the ``"output"`` or the ``"input"``; None for no s.
    """

    def __init__(self, module: nn.Module, bias: bool, scale: str | None) -> None:
        super().__init__()
        width_in, width_out = features(module)
        self.position = scale
        self.bias = nn.Parameter(torch.zeros(width_out)) if bias else None
        self.factor = nn.Parameter(torch.ones(width_in if scale == "input" else width_out)) if scale else None

    def forward(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """x: (…, in) → (…, out)."""
        out = call(self.scaled(x) if self.position == "input" else x)
        if self.bias is not None:
            out = (out + self.strength(out) * self.bias).to(out.dtype)
        return self.scaled(out) if self.position == "output" else out

    def scaled(self, x: Tensor) -> Tensor:
        """s ⊙ x, or at another strength t, (1 + t (s − 1)) ⊙ x."""
        factor: Any = self.factor
        return (x * (1 + self.strength(x) * (factor - 1))).to(x.dtype)


class Unlocked(Branch):
    """y = call(x) + scale · (norm(x; w) − norm(x; w₀)): a normalisation with weights w of its own, at first the base's w₀.

    As a difference, a fresh branch changes nothing, exactly, although w has 32 bits where the base may have 16.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = copy.copy(norm)
        self.norm.__dict__.pop("forward", None)  # the base's, without the adapters that wrap it
        self.norm._parameters = {name: nn.Parameter(p.detach().clone()) for name, p in norm.named_parameters()}  # type: ignore
        self.borrowed = (norm,)

    def forward(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """x: (…, d) → the same shape."""
        out = call(x)
        wide = x.to(next(self.norm.parameters()).dtype)
        before = {name: p.to(wide.dtype) for name, p in self.borrowed[0].named_parameters()}
        change = self.norm(wide) - functional_call(self.norm, before, (wide,))
        return (out + self.strength(out) * change).to(out.dtype)
