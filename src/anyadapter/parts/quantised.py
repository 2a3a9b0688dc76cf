"""Matrices of 1, 2, 4 or 8 bits a number: the codebooks, the rounding in training, the packed bytes.

Jie, Wang and Deng 2023, arXiv 2307.16867 (card binary-adapters, sections 4 and 8). A matrix W is standardised as a whole,
z = (W − mean) / (std + 1e-5), each z is replaced by the nearest entry of a fixed codebook for N(0, 1), and the result is
code · std + mean. The codebook says nothing of the matrix, so that a packed matrix is its codes and two numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from anyadapter.core.errors import ArtefactError, ConfigError, DivergedError

BITS = (1, 2, 4, 8)
EPSILON = 1e-5  # added to the deviation that a matrix is divided by, not to the one it is multiplied by
STEPS = 500  # of the codebook's iteration, which at 8 bits is far from its end by then; files depend on it


def codebook(bits: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """The codes, (2^bits,) ascending, and the boundaries between them, (2^bits − 1,), in fp32.

    A code is the median of N(0, 1) between its two boundaries, found by 500 steps from zero as in the authors' code. With
    1, 2 and 4 bits a boundary is the midpoint of its codes; with 8 it is that of the step before.

    Raises:
        ConfigError: ``bits`` is none of 1, 2, 4 and 8.
    """
    check_bits(bits)
    codes, boundaries = _solved(bits)
    return tuple(torch.tensor(v, dtype=torch.float32, device=device) for v in (codes, boundaries))  # type: ignore[return-value]


@lru_cache
def _solved(bits: int) -> tuple[list[float], list[float]]:
    codes = torch.zeros(2**bits, dtype=torch.float64, device="cpu")
    for _ in range(STEPS):
        boundaries = (codes[1:] + codes[:-1]) / 2
        below = torch.cat([codes.new_zeros(1), torch.special.ndtr(boundaries), codes.new_ones(1)])
        codes = torch.special.ndtri((below[1:] + below[:-1]) / 2)
    return [((v - v.flip(0)) / 2).tolist() for v in (codes, boundaries)]  # type: ignore[return-value]  # symmetric


def check_bits(bits: Any) -> None:
    """Raise a :class:`ConfigError` unless a number can have so many bits."""
    if type(bits) is not int or bits not in BITS:
        raise ConfigError(f"bits is {bits!r}; a quantised matrix has 1, 2, 4 or 8 bits a number.")


def is_constant(matrix: Tensor) -> bool:
    """Whether all its numbers are the same, or NaN, so that there is no deviation to divide by."""
    return not bool(matrix.max() > matrix.min())


def standardise(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(z, mean, std) in fp32: z has the matrix's shape, the unbiased std and the mean are over all of it."""
    matrix = matrix.float()
    mean, std = matrix.mean(), matrix.std()
    return (matrix - mean) / (std + EPSILON), mean, std


class FakeQuantise(nn.Module):
    """The parametrisation of a matrix in training: what is learnt is W, what is computed with is code(z) · std + mean.

    The gradient passes the rounding as if it were not there, and the mean and the deviation as they are, so that

        dL/dW_j = g_j + z_j / (n − 1) · Σ_i g_i (code(z_i) − z_i),   g = dL/d(code · std + mean).

    All of it is fp32, bit for bit what :meth:`Packed.dequantise` gives, and is then cast to the dtype of W.
    """

    codes: Tensor
    boundaries: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        for name, table in zip(("codes", "boundaries"), codebook(bits)):
            self.register_buffer(name, table, persistent=False)

    def forward(self, matrix: Tensor) -> Tensor:
        """Any shape of at least 2 numbers → the same shape, of at most 2^bits values."""
        z, mean, std = standardise(matrix)
        nearest = self.codes[torch.bucketize(z.detach(), self.boundaries)]
        return ((nearest + (z - z.detach())) * std + mean).to(matrix.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantise:
        super()._apply(fn, recurse)
        self.codes, self.boundaries = codebook(self.bits, self.codes.device)  # fp32, whatever the adapter is cast to
        return self


def fake_quantise(module: nn.Module, name: str, bits: int) -> None:
    """From now on ``module.<name>`` is computed from its latent values, which stay the parameter that is trained.

    Raises:
        ConfigError: tensors of the module are computed from others already.
    """
    if any(bits_of(module, key) is None for key in getattr(module, "parametrizations", ())):
        raise ConfigError(f"{type(module).__name__} has parametrizations of its own and cannot be quantised.")
    parameter: Tensor = getattr(module, name)
    parametrize.register_parametrization(module, name, FakeQuantise(bits).to(parameter.device))
    if isinstance(module, nn.RNNBase):
        # It computes with a list of its weights, which it keeps; of tensors with a history no copy could be made.
        type(module)._flat_weights = property(weights_of, lambda module, weights: None)  # type: ignore[assignment]


def undo_fake_quantise(module: nn.Module, name: str) -> None:
    """``module.<name>`` is its latent values again.

    torch's own ``remove_parametrizations`` would take the attribute off a class that deep copies of the module share.
    """
    bits = {key: bits_of(module, key) for key in module.parametrizations}  # type: ignore[operator, union-attr]
    latents = {key: module.parametrizations[key].original for key in bits}  # type: ignore[index, union-attr]
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    for key, latent in latents.items():
        if isinstance(latent, nn.Parameter):
            module.register_parameter(key, latent)
        else:
            module.register_buffer(key, latent)  # type: ignore[arg-type]
    for key, width in bits.items():
        if key != name and width is not None:
            fake_quantise(module, key, width)


def weights_of(module: nn.RNNBase) -> list[Tensor]:
    """The weights of a recurrent module as they are now, in its order."""
    return [getattr(module, name) for name in module._flat_weights_names]


def bits_of(module: nn.Module, name: str) -> int | None:
    """The bits ``module.<name>`` is rounded to in training, or ``None`` where it is not."""
    if not parametrize.is_parametrized(module, name):
        return None
    return next((part.bits for part in module.parametrizations[name] if isinstance(part, FakeQuantise)), None)  # type: ignore[index, union-attr]


# -------------------------------------------------------------------------- packed


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Indices of any shape as bytes: 8 / bits a byte, row by row, the first in the lowest bits; the last byte may be partial.

    Returns:
        uint8, (⌈n · bits / 8⌉,).
    """
    codes, a_byte = codes.flatten().to(torch.uint8), 8 // bits
    codes = torch.cat([codes, codes.new_zeros(-codes.numel() % a_byte)]).view(-1, a_byte)
    return (codes << _shifts(bits, codes.device)).sum(1, dtype=torch.uint8)


def unpack_bits(data: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack_bits`: the first ``count`` indices, uint8."""
    return ((data[:, None] >> _shifts(bits, data.device)) & (2**bits - 1)).flatten()[:count]


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix as it is stored. It is exact: nothing derives it anew from the numbers it stands for.

    Attributes:
        data: the codes' indices as :func:`pack_bits` lays them, uint8, (⌈n · bits / 8⌉,).
        mean, std: fp32 values.
        shape: of the matrix.
        bits: 1, 2, 4 or 8.

    Raises:
        ArtefactError: the bytes are not as many as shape and bits ask for, or the statistics are none.
    """

    data: Tensor
    mean: float
    std: float
    shape: tuple[int, ...]
    bits: int

    def __post_init__(self) -> None:
        check_bits(self.bits)
        expected = -(-self.count * self.bits // 8)
        if self.data.dtype != torch.uint8 or self.data.shape != (expected,):
            raise ArtefactError(
                f"{tuple(self.data.shape)} of {str(self.data.dtype).removeprefix('torch.')} were given; a matrix of "
                f"{tuple(self.shape)} at {self.bits} bits is ({expected},) of uint8."
            )
        if not math.isfinite(self.mean) or not (math.isfinite(self.std) and self.std > 0):
            raise ArtefactError(
                f"its mean is {self.mean} and its deviation {self.std}; expected a finite mean and a positive deviation."
            )

    @classmethod
    @torch.no_grad()
    def of(cls, matrix: Tensor, bits: int, name: str = "the matrix") -> Packed:
        """A matrix packed, on the CPU.

        Raises:
            DivergedError: all its numbers are the same, or one is not finite: there is no deviation to go by.
        """
        check_bits(bits)
        if is_constant(matrix) or not torch.isfinite(matrix).all():
            raise DivergedError(
                f"{name} {tuple(matrix.shape)} cannot be packed: a quantised matrix needs numbers that are finite and differ, "
                f"and its are from {matrix.min().item():g} to {matrix.max().item():g}. If it became so in training, lower "
                "the learning rate or the weight decay and go on from an earlier checkpoint."
            )
        z, mean, std = standardise(matrix.detach())
        data = pack_bits(torch.bucketize(z, codebook(bits, z.device)[1]), bits).cpu()
        return cls(data, mean.item(), std.item(), tuple(matrix.shape), bits)

    @property
    def count(self) -> int:
        """How many numbers it stands for."""
        return math.prod(self.shape)

    def codes(self) -> Tensor:
        """The indices into the codebook, uint8, in the matrix's shape."""
        return unpack_bits(self.data, self.bits, self.count).view(self.shape)

    def levels(self) -> Tensor:
        """The values its numbers take, fp32, (2^bits,): code · std rounded to fp32, then + mean, rounded again."""
        statistics = torch.tensor([self.mean, self.std], dtype=torch.float32, device=self.data.device)
        return codebook(self.bits, self.data.device)[0] * statistics[1] + statistics[0]

    def dequantise(self) -> Tensor:
        """The matrix, fp32: ``levels()[codes()]``, on every device the same bits."""
        return self.levels()[self.codes().int()]
