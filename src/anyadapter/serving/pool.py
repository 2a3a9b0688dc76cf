"""One pool of fixed-size cells for keys, values and adapters (S-LoRA, section 5.1: Unified Paging).

A cell has two halves of W numbers in every layer, W being the width of a token's keys. It holds a token's key and value, or
a piece of a row of A and a piece of a column of B. The same cell is used in all layers.
"""

from __future__ import annotations

import math
import mmap

import numpy as np
import torch
from torch import Tensor

from anyadapter.core.errors import AnyAdapterError

KEYS, VALUES = 0, 1  # the halves of a cell


class PoolFullError(AnyAdapterError, MemoryError):
    """Fewer cells are free than were asked for; nothing was taken."""


class Pool:
    """Cells and who is free: ``data`` is (layers, 2, cells, W), ``free`` a mask over the cells.

    Raises:
        PoolFullError: by the ``alloc`` methods, which then take nothing.
    """

    def __init__(
        self, layers: int, cells: int, width: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.data = zeros((layers, 2, cells, width), dtype, torch.device(device))
        self.halves = [tuple(layer) for layer in self.data]  # views, made once: a pass asks hundreds of times
        self.free = np.ones(cells, dtype=bool)
        self.left = cells

    @property
    def cells(self) -> int:
        """How many cells there are."""
        return len(self.free)

    @property
    def width(self) -> int:
        """W, the numbers in half a cell."""
        return self.data.shape[-1]

    def half(self, layer: int, half: int) -> Tensor:
        """(cells, W) of one layer."""
        return self.halves[layer][half]

    def alloc(self, count: int) -> np.ndarray:
        """The lowest ``count`` free cells, wherever they are: (count,) int32."""
        self._need(count)
        return self._take(np.flatnonzero(self.free)[:count])

    def alloc_contiguous(self, count: int) -> np.ndarray | None:
        """The lowest free run of ``count`` neighbouring cells, or None where there is none."""
        self._need(count)
        starts = self._starts(count)
        return self._take(starts[0] + np.arange(count)) if len(starts) else None

    def alloc_blocks(self, count: int, size: int, *, aligned: bool) -> np.ndarray:
        """``count`` runs of ``size`` neighbouring cells, one after the other.

        Args:
            aligned: each run starts at a multiple of ``size``; otherwise runs follow each other from the start of a free
                stretch.
        """
        starts = self._starts(size)
        if aligned:
            starts = starts[starts % size == 0]
        elif len(starts):
            stretch = np.r_[True, np.diff(starts) > 1]  # where a free stretch begins
            begin = starts[stretch][np.cumsum(stretch) - 1]
            starts = starts[(starts - begin) % size == 0]
        if len(starts) < count:
            raise PoolFullError(f"The pool has {len(starts)} free blocks of {size} cells; {count} are needed.")
        return self._take((starts[:count, None] + np.arange(size)).ravel())

    def release(self, cells: np.ndarray) -> None:
        """Give cells back. Raises :class:`AssertionError` when one was free already: somebody counted wrong."""
        assert not self.free[cells].any(), "a cell was given back twice"
        self.free[cells] = True
        self.left += len(cells)

    def write(self, cells: np.ndarray, values: Tensor) -> None:
        """Put (layers, 2, n, W) into n cells."""
        index = torch.from_numpy(cells.astype(np.int64)).to(self.data.device)
        values = values.to(self.data.device, self.data.dtype, non_blocking=True)
        if len(cells) and cells[-1] - cells[0] == len(cells) - 1:  # neighbours: one copy
            self.data[:, :, int(cells[0]) : int(cells[-1]) + 1] = values
        else:
            self.data.index_copy_(2, index, values)

    def _need(self, count: int) -> None:
        if count > self.left:
            raise PoolFullError(f"The pool has {self.left} free cells; {count} are needed.")

    def _starts(self, size: int) -> np.ndarray:
        """Where ``size`` free cells begin, in order."""
        if size > self.cells:
            return np.empty(0, dtype=np.int64)
        total = np.r_[0, np.cumsum(self.free)]
        return np.flatnonzero(total[size:] - total[:-size] == size)

    def _take(self, cells: np.ndarray) -> np.ndarray:
        self.free[cells] = False
        self.left -= len(cells)
        return cells.astype(np.int32)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros, on the CPU in huge pages where the system has them: scattered cells are found quicker there."""
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
