"""Who runs next: the queue, the running requests, and what each forward pass does. Pure Python, no tensors.

Sheng et al. 2023, S-LoRA, arXiv 2311.03285. ``plan`` decides one pass: it aborts what is too late, admits what fits
(:mod:`~anyadapter.serving.admission`) in the order that the policy likes (:mod:`~anyadapter.serving.policies`), and shares
the pass among prompts and decoding requests. Requests are read here, never changed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence, ValuesView
from dataclasses import dataclass

from anyadapter.core.adapter import Settings
from anyadapter.core.errors import BusyError, RequestError
from anyadapter.serving.admission import MiniBatch, Room, pending
from anyadapter.serving.policies import Policy
from anyadapter.serving.request import Request

PACE = 64  # admissions over which the pace of the queue is measured
LONGEST_RETRY = 60.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Limits(Settings):
    """How much may be done at once.

    The paper's own scheduler is ``wait_steps=10, chunked=False``.

    Attributes:
        cells: size of the pool.
        max_running: most requests that run.
        batch_tokens: most prompt tokens that are admitted and not yet computed. In pieces, a longer prompt is admitted when
            no other waits to be computed; whole, it is refused.
        step_tokens: most tokens of one pass when prompts are computed in pieces: first those of all decoding requests, one
            each, then pieces of prompts in order of admission.
        max_waiting: most requests in the queue.
        wait_steps: passes between admitting and the next attempt to admit.
        chunked: prompts are computed in pieces in the same passes as decoding requests; otherwise those admitted are
            computed whole, in a pass of their own.
    """

    cells: int
    max_running: int = 64
    batch_tokens: int = 2048
    step_tokens: int = 512
    max_waiting: int = 1024
    wait_steps: int = 1
    chunked: bool = True

    def __post_init__(self) -> None:
        for name in ("cells", "max_running", "batch_tokens", "step_tokens", "max_waiting", "wait_steps"):
            value = getattr(self, name)
            self.require(
                name, isinstance(value, int) and not isinstance(value, bool) and value >= 1, "an integer of at least 1"
            )
        self.require("chunked", isinstance(self.chunked, bool), "True or False")
        enough = not self.chunked or self.step_tokens >= self.max_running
        self.require("step_tokens", enough, f"at least max_running ({self.max_running}), a token for each request")


@dataclass(frozen=True)
class Plan:
    """What one pass does.

    Attributes:
        aborted: waiting requests given up because they are too late; they have left the queue.
        admitted: requests that run from now on.
        load: adapters that they need, by identity. They must be resident before the pass and stay so while a running
            request uses them; those of the others are resident already.
        prefetch: adapters of the requests that come next, worth loading where cells are free; empty between the times at
            which the paper prefetches.
        prefill: prompts to compute, and how many of their next tokens.
        decode: requests to give one more token.
    """

    aborted: Sequence[Request] = ()
    admitted: Sequence[Request] = ()
    load: tuple[str, ...] = ()
    prefetch: tuple[str, ...] = ()
    prefill: Sequence[tuple[Request, int]] = ()
    decode: Sequence[Request] = ()


class Scheduler:
    """The queue and the running requests. No request is ever interrupted for want of cells, and the pool never overflows.

    Args:
        limits: how much may be done at once.
        adapter_cells: cells of an adapter, by identity; asked only about adapters of requests in hand.
        policy: who is admitted next; it belongs to this scheduler alone.
    """

    def __init__(self, limits: Limits, adapter_cells: Callable[[str], int], policy: Policy) -> None:
        self.limits, self.adapter_cells, self.policy = limits, adapter_cells, policy
        self.queue: dict[str, Request] = {}
        self.rows: dict[str, Request] = {}
        self.since = 0  # passes since the last admission
        self.admissions: deque[float] = deque(maxlen=PACE)

    @property
    def waiting(self) -> ValuesView[Request]:
        """Requests not yet admitted, in order of arrival."""
        return self.queue.values()

    @property
    def running(self) -> ValuesView[Request]:
        """Requests admitted and not finished, in order of admission."""
        return self.rows.values()

    @property
    def needed(self) -> tuple[str, ...]:
        """Identities of the adapters that running requests use; all others may be evicted."""
        return adapters_of(self.running)

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it could not run even alone, has no prompt, or its id is in use.
            BusyError: as many wait as may wait.
        """
        self.check(request)
        if len(self.queue) >= self.limits.max_waiting:
            raise BusyError(
                f"{len(self.queue)} requests wait, as many as may; try again in {self.retry_after:.0f} s.",
                self.retry_after,
            )
        self.policy.arrived(request)
        self.queue[request.id] = request

    def check(self, request: Request) -> None:
        """Raise a RequestError if it could not be admitted to an empty scheduler."""
        if request.id in self.queue or request.id in self.rows:
            raise RequestError(f"A request {request.id!r} is in hand already.", "id")
        prompt, output = len(request.prompt), request.sampling.max_tokens
        if not prompt:
            raise RequestError("The prompt is empty; give at least one token.", "prompt")
        if not self.limits.chunked and prompt > self.limits.batch_tokens:
            raise RequestError(
                f"The prompt has {prompt} tokens; at most {self.limits.batch_tokens} (batch_tokens) are possible.",
                "prompt",
            )
        adapters = sum(map(self.adapter_cells, set(request.held)))
        most = self.limits.cells - adapters - 1
        if prompt + output > most:
            raise RequestError(
                f"The prompt has {prompt} tokens and max_tokens is {output}; together they may be {max(most, 0)}, what "
                f"the pool of {self.limits.cells} cells leaves beside {adapters} for the request's adapters.",
                "max_tokens" if prompt < most else "prompt",
            )

    def remove(self, id: str) -> Request | None:
        """Take a request out that has ended or is given up, waiting or running; None if there is none of that id."""
        if id in self.queue:
            return self._leave(self.queue[id])
        return self.rows.pop(id, None)

    def plan(self, now: float) -> Plan:
        """What the next pass does. The pass is expected to be made: tokens it computes are on the requests at the next call."""
        aborted = [r for r in self.waiting if r.deadline is not None and now >= r.deadline]
        for request in aborted:
            self._leave(request)
        admitted: list[Request] = []
        if self._admits():
            aborted += [self._leave(request) for request in self.policy.expired(self.waiting, now)]
            admitted = self._admit(now)
        prefetch = self._next_adapters() if self._prefetches(admitted) else ()
        prefill, decode = self._share(admitted)
        self.policy.decoded(decode)
        self.since = int(self.limits.chunked) if admitted else self.since + 1
        return Plan(aborted, admitted, adapters_of(admitted), prefetch, prefill, decode)

    @property
    def retry_after(self) -> float:
        """Seconds in which the queue would be worked off, at the pace of the last admissions."""
        times = self.admissions
        pace = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
        return min(max(pace * len(self.queue), 1.0), LONGEST_RETRY)

    def _admits(self) -> bool:
        """Whether this pass tries to admit."""
        if not self.rows:
            return True
        # The paper's loop does not look at its queue while all rows are taken, not even for requests that are too late.
        looks = self.limits.chunked or len(self.rows) < self.limits.max_running
        return looks and self.since >= self.limits.wait_steps

    def _admit(self, now: float) -> list[Request]:
        rows = self.limits.max_running - len(self.rows)
        if not rows or not self.queue:
            return []
        room = Room(self.limits.cells, self.adapter_cells, self.limits.step_tokens if self.limits.chunked else None)
        for request in self.running:
            room.take(request)
        batch = MiniBatch(list(self.running), rows, self.limits.batch_tokens, room)
        self.policy.admit(self.waiting, batch)
        if batch.requests:
            self.policy.admitted(batch.requests, self.waiting)
        for request in batch.requests:
            self.rows[request.id] = self._leave(request)
            self.admissions.append(now)
        return batch.requests

    def _share(self, admitted: Sequence[Request]) -> tuple[list[tuple[Request, int]], list[Request]]:
        """The prompts and the decoding requests of this pass."""
        if not self.limits.chunked:
            return [(r, pending(r)) for r in admitted], [] if admitted else list(self.running)
        decode = [r for r in self.running if not pending(r)]
        left = self.limits.step_tokens - len(decode)
        prefill = []
        for request in self.running:
            count = min(pending(request), left)
            if count:
                prefill.append((request, count))
                left -= count
        return prefill, decode

    def _prefetches(self, admitted: Sequence[Request]) -> bool:
        """Whether this pass prefetches: each one, or two of those between attempts to admit, as in the paper."""
        wait = self.limits.wait_steps
        between = self.rows and not admitted and self.since in (wait // 2, wait - 3)
        return bool(self.queue and (self.limits.chunked or between))

    def _next_adapters(self) -> tuple[str, ...]:
        ahead = MiniBatch(list(self.running), len(self.queue), self.limits.batch_tokens)
        self.policy.admit(self.waiting, ahead)
        return adapters_of(ahead.requests)

    def _leave(self, request: Request) -> Request:
        """Take a request out of the queue."""
        del self.queue[request.id]
        self.policy.left(request)
        return request


def adapters_of(requests: Iterable[Request]) -> tuple[str, ...]:
    """Identities of the adapters they use, each once, in order of first use."""
    return tuple(dict.fromkeys(id for request in requests for id in request.held))
