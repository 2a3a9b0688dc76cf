"""The bottleneck with a non-linearity, and where it meets a module: before, after, beside, or inside its residual sum."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from anyadapter.core.adapter import Branch
from anyadapter.core.errors import TargetError
from anyadapter.core.host import features, is_linear


class DownUp(Branch):
    """z(x) = scale · s · U act(D dropout(x)) (Houlsby et al. 2019, section 2.1); a subclass says where x is read and z added.

    Shapes: D is (width, width_in), U is (width_out, width), biases optional; s is a number or a parameter of shape (1,).
    D and U are computed in their own dtype, the rest in the host's.

    Args:
        width_in, width_out: of what is read and of what is added to.
        width: of the bottleneck.
        activation: a name in transformers' ``ACT2FN``.
        dropout: probability, on the input.
        scaling: s, or ``"learned"``, which starts at 1.
        init: ``"zero"`` starts with U = 0, so that z = 0; ``"bert"`` draws D and U from N(0, 0.02²).
        bias: whether D and U have biases, which start at zero.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        width: int,
        *,
        activation: str = "tanh",
        dropout: float = 0.0,
        scaling: float | str = 1.0,
        init: str = "zero",
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.adapter_down = nn.Linear(width_in, width, bias=bias)
        self.adapter_up = nn.Linear(width, width_out, bias=bias)
        self.activation_name, self.activation = activation, ACT2FN[activation]
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        if init == "zero":
            nn.init.kaiming_uniform_(self.adapter_down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.adapter_up.weight)
        else:
            nn.init.normal_(self.adapter_down.weight, std=0.02)
            nn.init.normal_(self.adapter_up.weight, std=0.02)
        if bias:
            nn.init.zeros_(self.adapter_down.bias)
            nn.init.zeros_(self.adapter_up.bias)
        self.adapter_scaling = nn.Parameter(torch.ones(1)) if scaling == "learned" else float(scaling)

    def z(self, x: Tensor) -> Tensor:
        """x: (…, width_in) → (…, width_out), in the dtype of x."""
        hidden = self.adapter_down(self.dropout(x.to(self.adapter_down.weight.dtype)))
        out = self.adapter_up(self.activation(hidden)).to(x.dtype)
        s = self.adapter_scaling
        return (out * ((s.to(x.dtype) if isinstance(s, Tensor) else s) * self.strength(out))).to(x.dtype)


class Before(DownUp):
    """y = call(x + z(x))."""

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """x: (…, in), the first argument; the others are passed on."""
        x = first(args, kwargs)
        changed = x + self.z(x)
        return call(changed, *args[1:], **kwargs) if args else call(**{**kwargs, next(iter(kwargs)): changed})


class After(DownUp):
    """y = h + z(h), where h = call(x)."""

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """h: (…, out), alone or the first of a tuple."""
        out = call(*args, **kwargs)
        return plus(out, self.z(out[0] if isinstance(out, tuple) else out))


class Parallel(DownUp):
    """y = call(x) + z(x) (He et al. 2022, table 1)."""

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """x: (…, in), the first argument; what call returns is (…, out), alone or the first of a tuple."""
        return plus(call(*args, **kwargs), self.z(first(args, kwargs)))


class Inside(Branch):
    """Inside a BERT-style output block LN(f + a), where f = dropout(dense(h)) and a is the residual: LN(f + z(x) + a).

    x is LN(f + a) (``"norm"``, Pfeiffer et al. 2020), f (``"output"``, Houlsby et al. 2019) or a (``"residual"``, He et al.
    2022); a subclass says what z is. The branch goes to the block, where it learns a, and its :meth:`adapt` to the block's
    dropout, where it meets f; so the next adapter of this kind finds f + z(x) as its f.
    """

    z: Callable[[Tensor], Tensor]

    def enter(self, block: Any, reads: Literal["norm", "output", "residual"]) -> None:
        """Belong to ``block``."""
        self.reads = reads
        self.norm = partial(block.LayerNorm)  # not a child of ours: it stays the host's
        self.residual: Any = None

    def forward(self, call: Callable[..., Any], hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """hidden_states: (…, inner width) is h; input_tensor: (…, out) is a."""
        self.residual = input_tensor
        out = call(hidden_states, input_tensor)
        self.residual = None
        return out

    def adapt(self, call: Callable[[Tensor], Tensor], dense: Tensor) -> Tensor:
        """dense: (…, out), the input of the block's dropout → f + z(x)."""
        f = call(dense)
        if self.reads == "output":
            return f + self.z(f)
        return f + self.z(self.residual if self.reads == "residual" else self.norm(f + self.residual))


class InBlock(DownUp, Inside):
    """A bottleneck inside a BERT-style output block; see :class:`Inside`."""

    def __init__(self, block: Any, reads: Literal["norm", "output", "residual"], width: int, **settings: Any) -> None:
        wide = widths(block)[1]
        super().__init__(wide, wide, width, **settings)
        self.enter(block, reads)


def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first argument of a call; transformers passes it by name to some attention modules."""
    return args[0] if args else next(iter(kwargs.values()))


def plus(out: Any, delta: Tensor) -> Any:
    """``out + delta``; of a tuple, its first tensor plus delta."""
    return (plus(out[0], delta), *out[1:]) if isinstance(out, tuple) else out + delta.to(out.dtype)


def widths(module: nn.Module) -> tuple[int, int]:
    """(in, out) features of a linear, or of a block: those of the first linear inside and of the last.

    Raises:
        TargetError: there is no linear in it.
    """
    linears = [part for part in module.modules() if is_linear(part)]
    if not linears:
        raise TargetError(f"A {type(module).__name__} is no linear layer, nor a block that holds any.")
    return features(linears[0])[0], features(linears[-1])[1]
