"""What one forward pass computes: the tokens of many requests, flat, and which cells of the pool each of them reads.

A *segment* is a run of neighbouring tokens that read the same cells. All index tensors are int32 on the pool's device.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Bits:
    """Rows of one bit a number: the first in the least significant bit, in whole words of 32, the rest of the last anything.

    A row lies within one cell, beside others, or where it is longer than a cell in several from their start on.

    Attributes:
        offsets: (R,) int32, the byte in its cell where a row begins, a multiple of 4.
        levels: (R, 2) fp32, what a 0 and a 1 mean.
    """

    offsets: Tensor
    levels: Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of adapter matrices that tokens read at one site.

    A row as wide as the site lies in ``chunks`` cells of W numbers, the last one filled up with zeros; or see ``bits``.

    Attributes:
        tokens: (S + 1,) bounds of the S segments among the T tokens of the pass, ascending from 0 to T.
        rows: (S + 1,) bounds of their rows among all R rows; a segment without rows has no adapter here.
        hidden: (S + 1,) bounds of their inner activations among all N = Σ tokens · rows, token by token.
        cells: (R, chunks) the cells of each row.
        scale: (R,) fp32 factor of each row's activation.
        total: N, known without asking the device.
        bits: where the rows are packed.
    """

    tokens: Tensor
    rows: Tensor
    hidden: Tensor
    cells: Tensor
    scale: Tensor
    total: int
    bits: Bits | None = None


@dataclass(frozen=True, eq=False)
class Sequences:
    """The keys and values that tokens see: one segment a request.

    Attributes:
        tokens: (S + 1,) bounds of the S sequences among the T tokens of the pass.
        starts: (S + 1,) bounds of their cells.
        cells: (C,) the cells of each sequence in order, those of this pass's own tokens included. With n new tokens
            and c cells, new token i sees the first c − n + i + 1.
        longest: most cells of any sequence, and most new tokens of any, known without asking the device.
    """

    tokens: Tensor
    starts: Tensor
    cells: Tensor
    longest: tuple[int, int]
