"""What one forward pass computes: the tokens of many requests, flat, and which cells of the pool each of them reads.

A *segment* is a run of neighbouring tokens that read the same cells. All index tensors are int32 on the pool's device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Bits:
    """Rows of one bit a number: the first in the least significant bit, in whole words of 32, the rest of the last anything.

    A row lies within one cell, beside others, or where it is longer than a cell in several from their start on. What a 0 and
    a 1 mean are two fp32 numbers in the pool; both are finite.

    Attributes:
        offsets: (R,) int32, the byte in its cell where a row begins, a multiple of 4.
        levels: (R,) int64, the byte of this half of the pool where a row's two levels are, a multiple of 4.
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

    @cached_property
    def places(self) -> list[tuple[slice, slice | Tensor]]:
        """Of each sequence, its new tokens, and where its cells are: a slice of the pool where they are neighbours."""
        tokens, starts = self.tokens.tolist(), self.starts.tolist()
        breaks = (self.cells.diff() != 1).cumsum(0).tolist()
        found: list[tuple[slice, slice | Tensor]] = []
        for s, (begin, end) in enumerate(pairwise(starts)):
            cells = self.cells[begin:end]
            together = end > begin and (end - begin == 1 or breaks[end - 2] == (breaks[begin - 1] if begin else 0))
            place = slice(int(cells[0]), int(cells[-1]) + 1) if together else cells.long()
            found.append((slice(tokens[s], tokens[s + 1]), place))
        return found
