"""What fits: the cells that requests can come to hold at worst, and the requests that are admitted together.

Sheng et al. 2023, S-LoRA, arXiv 2311.03285. A request is admitted only if the pool suffices even when it and all that run
generate every token they may. So nothing is ever taken back from a running request. Its adapters count once each, whoever
else uses them; adapters that no running request uses can be evicted at any time and do not count.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Sequence

from anyadapter.serving.request import Request


def pending(request: Request) -> int:
    """Prompt tokens still to compute."""
    return max(len(request.prompt) - request.computed, 0)


class Room:
    """The most cells that the requests taken so far can come to hold, and whether one more fits beside them.

    A request that decodes has ``held`` tokens and gets one each pass, for ``left`` more passes; then its cells are free. With
    the requests sorted by ``left``, longest first, the k-th ends while the first k are there:

        need = max_k (Σ_{j ≤ k} held_j + k · left_k),        and it must be  need + cells of the adapters < cells of the pool

    A request whose prompt takes several passes begins to grow at a time that depends on the others: they may end early and
    leave it more of each pass. It counts at its full length, to the last pass in which it can still run, and not in the
    factor k. The requests before it in order of admission are the only ones that take tokens of a pass from it.

    Args:
        cells: size of the pool.
        adapter_cells: cells of an adapter, by identity.
        step: token budget of a pass when prompts are computed in pieces beside rows that decode; None when a prompt is
            computed in one pass.
    """

    def __init__(self, cells: int, adapter_cells: Callable[[str], int], step: int | None = None) -> None:
        self.cells, self.adapter_cells, self.step = cells, adapter_cells, step
        self.rows: list[tuple[int, int, int]] = []  # (−left, held, 1 if it grows), so that the longest comes first
        self.adapters: dict[str, int] = {}
        self.tokens = 0  # of prompts, still to compute

    def fits(self, request: Request) -> bool:
        """Whether there is room for it beside those taken."""
        return self.need([self.row(request)], request.held) < self.cells

    def take(self, request: Request) -> None:
        """Count it from now on."""
        insort(self.rows, self.row(request))
        self.adapters |= {id: self.adapter_cells(id) for id in request.held}
        self.tokens += pending(request)

    def need(self, more: Sequence[tuple[int, int, int]] = (), held: Iterable[str] = ()) -> int:
        """Cells at the worst moment, with further rows and adapters."""
        most = tokens = growing = 0
        for left, cells, grows in sorted([*self.rows, *more]):
            tokens += cells
            growing += grows
            most = max(most, tokens - left * growing)
        new = {id for id in held if id not in self.adapters}
        return most + sum(self.adapters.values()) + sum(map(self.adapter_cells, new))

    def row(self, request: Request) -> tuple[int, int, int]:
        """What it can come to hold, behind those taken so far."""
        done, passes = len(request.output), 1
        if self.step is not None and pending(request):
            passes = -(-(self.tokens + pending(request)) // (self.step - len(self.rows)))
        left = request.remaining - 1 + passes - 1
        if passes > 1:
            return -left, len(request.prompt) + request.sampling.max_tokens, 0
        return -left, len(request.prompt) + max(done, 1), 1


class MiniBatch:
    """Requests admitted together: a policy offers candidates one by one, best first.

    Args:
        running: the requests that run already.
        rows: how many may be added.
        tokens: most prompt tokens to compute, those of running requests included. A longer prompt is taken when it is alone.
        room: what the pool can hold; without it, the batch is a look ahead at who would come next.

    Attributes:
        requests: those admitted.
        full: whether a candidate was refused for want of rows or tokens: however small, hardly another would be taken.
    """

    def __init__(self, running: Sequence[Request], rows: int, tokens: int, room: Room | None = None) -> None:
        self.running, self.rows, self.room = running, rows, room
        self.requests: list[Request] = []
        self.full = False
        self.tokens = tokens
        self.used = room.tokens if room is not None else 0

    def admit(self, request: Request) -> bool:
        """Take it if it fits."""
        tokens = self.used + len(request.prompt)
        if len(self.requests) >= self.rows or (self.used and tokens > self.tokens):
            self.full = True
            return False
        if self.room is not None:
            if not self.room.fits(request):
                return False
            self.room.take(request)
        self.requests.append(request)
        self.used = tokens
        return True
