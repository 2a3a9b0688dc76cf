"""A matrix with its largest singular values set to 1 and the others to 0, exactly or by a randomised SVD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-5  # singular values below this share of the largest are rounding, not directions
GAP = 1e-4  # the least distance to the first value left out that a gradient is divided by, as a share of the largest
CLOSE = 1e-7  # neighbouring singular values this close make the gradient of a plain SVD useless


def leading(matrix: Tensor, rank: int) -> Tensor:
    """U_q V_qᵀ of the ``rank`` largest singular values, fewer where the matrix has fewer: (…, m, n) → the same.

    Its gradient is that of the function, not of the singular vectors: it is finite where values are equal, and zero through
    directions the matrix does not have. At a gap after the last value kept that closes, it is bounded.
    """
    return Leading.apply(matrix, rank)


class Leading(torch.autograd.Function):
    """F(S) = Σ f(σ_i) u_i v_iᵀ with f = 1 for the values kept and 0 for the others.

    With E = Uᵀ dS V, its derivative is Uᵀ dF V = (f_i − f_j)/(σ_i − σ_j) sym(E) + (f_i + f_j)/(σ_i + σ_j) anti(E), which is
    its own adjoint. f being 1 or 0, the first term is left only between a value kept and one not kept.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, rank: int) -> Tensor:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        kept = (s > TOLERANCE * s[..., :1]) & (torch.arange(s.shape[-1], device=s.device) < rank)
        ctx.save_for_backward(u, s, vt, kept)
        return (u * kept[..., None, :]) @ vt

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        u, s, vt, kept = ctx.saved_tensors
        f, floor = kept.to(s.dtype), GAP * s[..., :1, None]
        e = u.mT @ gradient @ vt.mT
        apart = f[..., :, None] - f[..., None, :]  # ±1 between kept and not kept
        gap = (s[..., :, None] - s[..., None, :]).abs().maximum(floor)
        both, total = f[..., :, None] + f[..., None, :], (s[..., :, None] + s[..., None, :])
        sym, anti = (e + e.mT) / 2, (e - e.mT) / 2
        inner = sym * ratio(apart.abs(), gap) + anti * ratio(both, total)
        result = u @ inner @ vt
        # Where the matrix is not square, the longer side has directions without a value: as if theirs were 0.
        weight = ratio(f, s)[..., None]
        result = result + (gradient - u @ (u.mT @ gradient)) @ (vt.mT * weight.mT) @ vt
        return result + (u * weight.mT) @ u.mT @ (gradient - (gradient @ vt.mT) @ vt), None


def ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, and 0 where ``above`` is 0."""
    return torch.where(above > 0, above / below.where(above > 0, 1.0), 0.0)


def randomised(matrix: Tensor, rank: int, guard: bool) -> Tensor:
    """U_q V_qᵀ by a randomised SVD with one iteration and a fixed seed, (…, m, n) → the same.

    It is rough where the spectrum decays slowly, and has arbitrary directions where the matrix has fewer than ``rank``.

    Args:
        guard: give 0 for matrices two of whose values are too close for the gradient of the singular vectors.
    """
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, q=rank, niter=1)
    gaps = s[..., :-1] - s[..., 1:]
    close = ((gaps < CLOSE) | (gaps < CLOSE * s[..., :1])).any(-1)[..., None, None]
    return torch.where(close & guard, 0.0, u @ v.mT)
