"""Decoding by CUDA graphs: a pass in which every request has one new token is recorded once and then played again.

Launching a few thousand small kernels takes longer than they take. A recorded pass is launched as one; it must then be the same
in every step but for the numbers in memory that it reads. So all that changes, tokens, places in the pool and the adapters'
tables, lies in one buffer of a fixed layout, which a step fills by one copy. A pass has one of a few sizes: it is filled up with
its last request once more, which computes the same and writes it to the same cell.

Sites whose parts lie alike in all adapters met so far share their tables; an adapter that tells two of them apart, or needs more
rows than there are, makes a new layout, and passes are recorded anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyadapter.serving.batch import Rows, Sequences
from anyadapter.serving.mixed import Mixed, Pass
from anyadapter.serving.packing import Packing
from anyadapter.serving.tables import Group, Products, Uses, Work, alike_sites, bounds, joined

log = logging.getLogger(__name__)

STEP = 8  # sizes are powers of two up to this, then its multiples
ROWS = 1024  # rows and inner activations at a site for which there is room at first
ENDLESS = 1 << 30  # cells of a sequence: as many as it has


class Decoder:
    """Decoding passes of fixed sizes.

    Elsewhere than on CUDA nothing is recorded and each pass is computed anew, from the same buffer: so it can be tested.

    Args:
        mixed: the engine's guest, connected to its pool.
        call: runs the model: (tokens, positions, last), (n,) each → logits (n, vocabulary).
        most: requests in a pass.
    """

    def __init__(self, mixed: Mixed, call: Callable[[Tensor, Tensor, Tensor], Tensor], most: int) -> None:
        self.mixed, self.call, self.most = mixed, call, size_for(most)
        self.device = mixed.pool.data.device
        self.packings: list[Packing] = []
        self.sites: list[list[str]] = []
        self.rows, self.works = ROWS, True
        self.memory = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None  # of all recorded passes
        self.each = torch.arange(self.most + 1, dtype=torch.int32, device=self.device)  # a recorded pass reads it too
        self.last = self.each.long()
        self.lay_out()

    def lay_out(self) -> None:
        """The buffer, with a copy in the host's memory; what was recorded for another one is gone."""
        self.recorded: dict[int, Callable[[], Tensor]] = {}
        self.now: object = None  # the adapters of whose rows the tables are
        sizes = {"runs": self.most + 1}
        for group, (path, *_) in enumerate(self.sites):
            part = next(packing.parts[path] for packing in self.packings if path in packing.parts)
            sizes |= {f"rows {group}": self.most + 1, f"hidden {group}": self.most + 1, f"scale {group}": self.rows}
            sizes |= {f"down {group}": self.rows * part.first.chunks, f"up {group}": self.rows * part.second.chunks}  # type: ignore[union-attr]
        self.tables = sum(sizes.values())  # what of it changes with the adapters only
        sizes |= {"tokens": self.most, "positions": self.most, "slots": self.most, "starts": self.most + 1}
        sizes["cells"] = 2 * self.mixed.pool.cells  # a prefix's are seen by several sequences
        ends = list(accumulate(sizes.values()))
        self.places = {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends)}
        self.host = torch.zeros(ends[-1], dtype=torch.int32, pin_memory=self.device.type == "cuda")
        self.buffer = torch.zeros(ends[-1], dtype=torch.int32, device=self.device)

    def run(
        self,
        requests: Sequence[Uses],
        tokens: Sequence[int],
        positions: np.ndarray,
        slots: np.ndarray,
        seen: Sequence[np.ndarray],
    ) -> Tensor | None:
        """The logits after one new token of each request, (n, vocabulary), good until the next call.

        Args:
            requests: each one's adapters; neighbours with the same share their reading of them.
            tokens, positions, slots: (n,) the new tokens, where they stand, and their cells.
            seen: the cells of each sequence, the new token's among them.

        Returns:
            None where the pass cannot be recorded: an adapter is not a LoRA of numbers or a prefix, or there are too many cells.
        """
        count = len(tokens)
        size = size_for(count)
        more = size - count
        packings = dict.fromkeys(resident.packing for uses in requests for resident, _ in uses)
        cells = np.concatenate([*seen, *[seen[-1]] * more])
        fits = len(cells) <= 2 * self.mixed.pool.cells
        if not (self.works and fits and all(can_record(packing) for packing in packings)):
            return None
        self.know([packing for packing in packings if packing not in self.packings])
        self.fill_tables(joined([(uses, 1) for uses in requests] + [(requests[-1], more)] * bool(more)))
        for name, values in (("tokens", tokens), ("positions", positions), ("slots", slots)):
            self.put(name, np.pad(values, (0, more), mode="edge"))
        self.put("starts", bounds([len(own) for own in seen] + [len(seen[-1])] * more))
        self.put("cells", cells)
        changed = slice(self.tables, self.places["cells"].start + len(cells))
        self.buffer[changed].copy_(self.host[changed], non_blocking=True)
        if size not in self.recorded:
            try:
                self.recorded[size] = self.record(size)
            except RuntimeError as error:
                self.works = False
                log.warning("decoding goes on without CUDA graphs, which could not be recorded: %s", error)
                return None
        return self.recorded[size]()[:count]

    def know(self, packings: Sequence[Packing]) -> None:
        """Make room for adapters of a kind not met before."""
        if packings:
            self.packings += packings
            sites = alike_sites(self.packings)
            if sites != self.sites:
                self.sites = sites
                self.lay_out()

    def fill_tables(self, runs: list[tuple[Uses, int]]) -> None:
        """The adapters' rows, unless they are those of the last pass."""
        key = tuple(runs)
        if key == self.now:
            return
        counts = [count for _, count in runs]
        groups = [
            Group(
                counts,
                [[(r, w, r.packing.parts[path]) for r, w in uses if path in r.packing.parts] for uses, _ in runs],
            )
            for path, *_ in self.sites
        ]
        needed = max((int(group.bounds()[2][-1]) for group in groups), default=0)
        if needed > self.rows:
            self.rows = 1 << (needed - 1).bit_length()
            self.lay_out()
        self.put("runs", bounds(counts))
        for number, group in enumerate(groups):
            _, rows, hidden = group.bounds()
            self.put(f"rows {number}", rows)
            self.put(f"hidden {number}", hidden)
            if group.members:
                self.put(f"scale {number}", group.scale().view(np.int32))
                self.put(f"down {number}", group.cells(lambda part: part.first).ravel())
                self.put(f"up {number}", group.cells(lambda part: part.second).ravel())  # type: ignore[arg-type, return-value]
        self.buffer[: self.tables].copy_(self.host[: self.tables], non_blocking=True)
        self.now = key

    def put(self, name: str, values: np.ndarray) -> None:
        """Write to the host's copy; bounds are filled up with the last, so that further segments are empty."""
        place = self.host[self.places[name]].numpy()
        place[: len(values)] = values
        if name.startswith(("runs", "rows", "hidden")):
            place[len(values) :] = values[-1]

    def view(self, name: str) -> Tensor:
        return self.buffer[self.places[name]]

    def record(self, size: int) -> Callable[[], Tensor]:
        """What computes a pass of ``size`` requests from the buffer."""

        def rows(group: int, side: str) -> Rows:
            tokens, rows, hidden = (self.view(n)[: size + 1] for n in ("runs", f"rows {group}", f"hidden {group}"))
            cells, scale = self.view(f"{side} {group}"), self.view(f"scale {group}").view(torch.float32)
            return Rows(tokens, rows, hidden, cells.view(self.rows, -1), scale, self.rows)

        work: dict[str, Work] = {}
        for group, paths in enumerate(self.sites):
            work |= dict.fromkeys(paths, Work([Products("low_rank", rows(group, "down"), rows(group, "up"))], []))
        each, last = self.each[: size + 1], self.last[:size]
        tokens, positions, slots = (self.view(name)[:size] for name in ("tokens", "positions", "slots"))
        starts, cells = self.view("starts")[: size + 1], self.view("cells")

        def compute() -> Tensor:
            self.mixed.now = Pass(Sequences(each, starts, cells, (ENDLESS, 1)), slots.long(), work)
            try:
                return self.call(tokens.long(), positions.long(), last)
            finally:
                self.mixed.now = None

        return compute if self.memory is None else recorded(compute, self.memory)


def recorded(compute: Callable[[], Tensor], memory: Any) -> Callable[[], Tensor]:
    """``compute`` as a CUDA graph, after two calls in which kernels are compiled. What it reads must stay where it is."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    # Other threads may use the device meanwhile.
    with torch.cuda.graph(graph, memory, capture_error_mode="thread_local"):
        out = compute()

    def play() -> Tensor:
        graph.replay()
        return out

    return play


def can_record(packing: Packing) -> bool:
    """Whether its parts are low-rank products whose numbers lie in the pool as they are; a prefix's cells are a sequence's."""
    return all(part.kind == "low_rank" and not part.first.room for part in packing.parts.values())


def size_for(count: int) -> int:
    """The least size of a pass that takes so many requests."""
    return 1 << (count - 1).bit_length() if count <= STEP else -(-count // STEP) * STEP
