"""The products that read the pool: adapters' rows on both sides of their bottleneck, and attention over scattered cells."""

from __future__ import annotations

import functools
import logging
import os
from typing import Protocol

import torch
from torch import Tensor

from anyadapter.core.errors import ConfigError
from anyadapter.serving.batch import Rows, Sequences
from anyadapter.serving.kernels.grouped import Grouped
from anyadapter.serving.kernels.native import DTYPES, CompilerError, Native

__all__ = ["Kernels", "kernels_for"]

VARIABLE = "ANYADAPTER_KERNELS"
log = logging.getLogger(__name__)


class Kernels(Protocol):
    """What an engine calls at each linear and each attention of a forward pass of T tokens.

    ``pool``, ``keys`` and ``values`` are one half of the pool in one layer. Only the cells that are named are read.
    """

    def shrink(self, x: Tensor, pool: Tensor, rows: Rows) -> Tensor:
        """x: (T, in), pool: (cells, W) → (N,) fp32, token by token: x_t · row_j.

        The numbers c·W to (c+1)·W of a row are in its cell c; what the last one holds beyond ``in`` is not used.
        """
        ...

    def expand(self, hidden: Tensor, y: Tensor, pool: Tensor, rows: Rows) -> None:
        """y_t += Σ_j scale_j · hidden_tj · row_j for y: (T, out), in place; summed in fp32, rounded once."""
        ...

    def add(self, x: Tensor, y: Tensor, keys: Tensor, values: Tensor, down: Rows, up: Rows) -> None:
        """Both, as a LoRA needs them, ``expand(shrink(x, keys, down), y, values, up)``; x and y may be (1, T, width)."""
        ...

    def attend(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        sequences: Sequences,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """q: (T, heads, d), keys and values: (cells, kv heads, d) → (T, heads, d), causal within each sequence.

        Head h reads key head h // (heads / kv heads). ``window``: a token sees so many last keys, its own among them.
        ``softcap``: a score s becomes softcap · tanh(s / softcap).
        """
        ...


def kernels_for(device: torch.device | str, dtype: torch.dtype) -> Kernels:
    """The fastest kernels for ``device`` and ``dtype``; ``ANYADAPTER_KERNELS`` = torch, native or triton chooses others.

    Raises:
        ConfigError: the variable names no kernels, or kernels that cannot run here.
    """
    device, chosen = torch.device(device), os.environ.get(VARIABLE)
    if not chosen:
        return _best(device, dtype)
    if chosen == "torch":
        return Grouped()
    if chosen == "native":
        if device.type != "cpu" or dtype not in DTYPES:
            raise ConfigError(f"{VARIABLE}=native: they are for the CPU in fp32 or bf16, not for {device} in {dtype}")
        try:
            return Native(dtype)
        except CompilerError as error:
            raise ConfigError(f"{VARIABLE}=native: {error}") from error
    if chosen == "triton":
        try:
            return _triton()
        except ImportError as error:
            raise ConfigError(f"{VARIABLE}=triton: triton cannot be imported ({error})") from error
    raise ConfigError(f"{VARIABLE}={chosen!r}: expected torch, native or triton")


def _best(device: torch.device, dtype: torch.dtype) -> Kernels:
    try:
        if device.type == "cuda":
            return _triton()
        if device.type == "cpu" and dtype in DTYPES:
            return Native(dtype)
    except (CompilerError, ImportError) as error:
        _warn_once(str(error))
    return Grouped()


def _triton() -> Kernels:
    from anyadapter.serving.kernels.triton import Triton

    return Triton()


@functools.cache
def _warn_once(why: str) -> None:
    log.warning("the serving kernels run in plain torch, which is slower: %s", why)
