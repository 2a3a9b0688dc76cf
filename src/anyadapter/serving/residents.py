"""The adapters that are in the pool now, and who makes room for whom (S-LoRA, section 5.1 and 5.2)."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

import numpy as np
from torch import Tensor

from anyadapter.serving.packing import Packing
from anyadapter.serving.pool import Pool, PoolFullError


class Resident:
    """An adapter in the pool: its packing and the cells it has, in the packing's order."""

    def __init__(self, id: str, packing: Packing, cells: np.ndarray, scale: float) -> None:
        self.id, self.packing, self.cells, self.scale = id, packing, cells, scale


class Residents:
    """Which adapters are in the pool. Those in use stay; of the others, the least recently used makes room.

    Args:
        pool: that they share with the sequences.
        together: give an adapter neighbouring cells where so many are free, which are faster to read; otherwise it gets the
            lowest free ones, as in the authors' code.

    Attributes:
        users: how many running requests use each adapter.
        hits, misses, evictions: counted since the start.
    """

    def __init__(self, pool: Pool, *, together: bool = True) -> None:
        self.pool, self.together = pool, together
        self.by_id: OrderedDict[str, Resident] = OrderedDict()  # least recently used first
        self.users: Counter[str] = Counter()
        self.hits = self.misses = self.evictions = 0

    @property
    def cells(self) -> int:
        """Cells that adapters hold."""
        return sum(len(resident.cells) for resident in self.by_id.values())

    def load(self, id: str, packing: Packing, scale: float, pack: Callable[[], Tensor]) -> Resident:
        """The adapter, brought into the pool if it is not there.

        Args:
            pack: gives its cells, (layers, 2, n, W); called only when they are needed.

        Raises:
            PoolFullError: all other adapters are in use and too few cells are free.
            ArtefactError: what ``pack`` raises. Nothing was taken, whatever is raised.
        """
        found = self.by_id.get(id)
        if found is not None:
            self.by_id.move_to_end(id)
            self.hits += 1
            return found
        values = pack()
        self.misses += 1
        cells = self.alloc(packing.cells, together=self.together)
        try:
            self.pool.write(cells, values)
        except BaseException:
            self.pool.release(cells)
            raise
        self.by_id[id] = Resident(id, packing, cells, scale)
        return self.by_id[id]

    def alloc(self, count: int, *, together: bool = False) -> np.ndarray:
        """Free cells, after idle adapters made room where that is needed. Raises :class:`PoolFullError`.

        Args:
            together: neighbours, where there are so many.
        """
        if count > self.pool.left:
            idle = [id for id in self.by_id if not self.users[id]]
            if count > self.pool.left + sum(len(self.by_id[id].cells) for id in idle):
                raise PoolFullError(
                    f"{count} cells are needed; {self.pool.left} are free and all adapters but {len(idle)} are in use."
                )
            for id in idle:
                if count <= self.pool.left:
                    break
                self.evict(id)
        neighbours = self.pool.alloc_contiguous(count) if together else None
        return self.pool.alloc(count) if neighbours is None else neighbours

    def use(self, ids: Iterable[str]) -> None:
        """A request that uses these adapters runs from now on."""
        self.users.update(ids)

    def leave(self, ids: Iterable[str]) -> None:
        """It has ended."""
        self.users.subtract(ids)
        self.users += Counter()  # drops the zeros

    def evict(self, id: str) -> None:
        """Give an idle adapter's cells back."""
        assert not self.users[id], f"{id} is in use"
        self.pool.release(self.by_id.pop(id).cells)
        self.evictions += 1

    def keep(self, ids: Iterable[str]) -> None:
        """Evict all but these and those in use."""
        wanted = set(ids)
        for id in [id for id in self.by_id if id not in wanted and not self.users[id]]:
            self.evict(id)
