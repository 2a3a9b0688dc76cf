"""Who comes next: policies that offer waiting requests, best first, and hear what becomes of them.

A policy decides the order, never what fits. ``fcfs`` serves in order of arrival, ``cluster`` prefers adapters that are in use,
``vtc`` is fair among adapters, ``abort`` gives up requests that come too late for their first token. ``peft`` and ``pets`` are
the paper's baselines. Sheng et al. 2023, S-LoRA, arXiv 2311.03285; where its code does something that a server should not do,
an argument brings that back.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

from anyadapter.core.errors import ConfigError, near
from anyadapter.serving.admission import MiniBatch
from anyadapter.serving.request import Request

PASSED = 16  # requests that do not fit, looked at in one attempt: each costs a test of admission


class Policy(Protocol):
    """What a scheduler asks and tells. ``waiting`` is always in order of arrival. Only ``admit`` must be written."""

    @abstractmethod
    def admit(self, waiting: Collection[Request], batch: MiniBatch) -> None:
        """Offer requests to ``batch.admit``, best first. Changes nothing: it is also asked who would be next."""

    def expired(self, waiting: Collection[Request], now: float) -> Sequence[Request]:
        """An attempt to admit begins: the requests to give up, besides those whose deadline has passed."""
        return ()

    def arrived(self, request: Request) -> None:
        """It is about to wait."""

    def admitted(self, requests: Sequence[Request], waiting: Collection[Request]) -> None:
        """An attempt has admitted these, at least one; ``waiting`` still holds them."""

    def left(self, request: Request) -> None:
        """It waits no longer: admitted, cancelled or given up."""

    def decoded(self, requests: Sequence[Request]) -> None:
        """Each of these gets one more token."""


class Line:
    """How often each waiting request was overtaken by later ones, to bound it.

    The first in line has been overtaken at least as often as any other, so it is the only one to look at.

    Args:
        overtakes: how often a request may be overtaken before it is the next to be admitted; None: without end.
    """

    def __init__(self, overtakes: int | None) -> None:
        check(overtakes is None or overtakes >= 0, "overtakes", overtakes, "0 or more, or None")
        self.overtakes = math.inf if overtakes is None else overtakes
        self.counts: dict[str, int] = {}

    def left(self, waiting: Collection[Request]) -> float:
        """How many may still overtake the first in line."""
        first = next(iter(waiting), None)
        return self.overtakes - (self.counts.get(first.id, 0) if first is not None else 0)

    def note(self, requests: Sequence[Request], waiting: Collection[Request]) -> None:
        """These are admitted out of those waiting."""
        later, ids = len(requests), {request.id for request in requests}
        for request in waiting:
            if not later:
                break
            if request.id in ids:
                later -= 1
            else:
                self.counts[request.id] = self.counts.get(request.id, 0) + later

    def forget(self, request: Request) -> None:
        self.counts.pop(request.id, None)


class FCFS(Policy):
    """In order of arrival. Requests that fit may overtake those that do not fit yet, a bounded number of times.

    Args:
        overtakes: how often; then no other is admitted before the first in line, for which running requests make room as they
            end. 0, as in the paper, keeps strictly to the order: a long request then stops all others until it fits.
    """

    def __init__(self, overtakes: int = 32) -> None:
        self.line = Line(overtakes)

    def admit(self, waiting: Collection[Request], batch: MiniBatch) -> None:
        left, passed = self.line.left(waiting), 0
        for request in waiting:
            if batch.admit(request):
                left -= passed > 0
            else:
                passed += 1
            if batch.full or (passed and left <= 0) or passed > PASSED:
                return

    def admitted(self, requests: Sequence[Request], waiting: Collection[Request]) -> None:
        self.line.note(requests, waiting)

    def left(self, request: Request) -> None:
        self.line.forget(request)


class Cluster(Policy):
    """Few adapters at a time: while enough are in use, requests for these come first, then the others, both in order of arrival.

    Args:
        adapters: how many are enough, the paper's d.
        overtakes: after so many later requests, the first in line is next; looked at before each attempt. The paper's code
            lets a busy adapter keep the others waiting without end, None.
        counts_new: adapters of requests being admitted count; in the paper's code only those of running requests do, so a
            first batch may have any number.
    """

    def __init__(self, adapters: int = 8, overtakes: int | None = 128, counts_new: bool = True) -> None:
        check(adapters >= 1, "adapters", adapters, "at least 1")
        self.adapters, self.counts_new = adapters, counts_new
        self.line = Line(overtakes)

    def admit(self, waiting: Collection[Request], batch: MiniBatch) -> None:
        used = {id for request in batch.running for id in request.held}
        rest = list(waiting)
        while rest and len(used) < self.adapters:
            if not batch.admit(rest[0]):
                return
            request = rest.pop(0)
            if self.counts_new:
                used.update(request.held)
        if self.line.left(waiting) > 0:
            for request in [r for r in rest if used.issuperset(r.held)]:
                if not batch.admit(request):
                    break
                rest.remove(request)
        for request in rest:
            if not batch.admit(request):
                return

    def admitted(self, requests: Sequence[Request], waiting: Collection[Request]) -> None:
        self.line.note(requests, waiting)

    def left(self, request: Request) -> None:
        self.line.forget(request)


class VTC(Policy):
    """Fair among adapters: the one that has been given least, for its weight, is next (Sheng et al. 2024, arXiv 2401.00588).

    Prompt tokens count when a request is admitted, output tokens as they come. An adapter that begins to wait is lifted to the
    least of those that wait, so that it cannot save up for later. A combination of adapters counts as one of its own.

    Args:
        weights: shares, by adapter name, names joined by ``+`` in alphabetical order, or ``""`` for the base model; 1 by
            default.
        prompt_price: of a prompt token.
        output_price: of an output token.
        lift_idle: when nobody waits, lift it to the one that waited last. Without, as in the code of S-LoRA, an adapter that
            comes in such a moment goes before all others until it has been given as much as they ever were.
    """

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        prompt_price: float = 1.0,
        output_price: float = 2.0,
        lift_idle: bool = True,
    ) -> None:
        self.weights = dict(weights or {})
        for name, weight in self.weights.items():
            check(math.isfinite(weight) and weight > 0, f"weights[{name!r}]", weight, "a finite number above 0")
        for name, price in (("prompt_price", prompt_price), ("output_price", output_price)):
            check(math.isfinite(price) and price >= 0, name, price, "a finite number, 0 or more")
        self.prompt_price, self.output_price, self.lift_idle = prompt_price, output_price, lift_idle
        self.given: dict[str, float] = {}
        self.queues: dict[str, dict[str, Request]] = {}  # of those that wait
        self.last = ""
        self.pruned = 1024

    def admit(self, waiting: Collection[Request], batch: MiniBatch) -> None:
        given = {who: cost for who, cost in self.given.items() if who in self.queues}
        queues = {who: iter(queue.values()) for who, queue in self.queues.items()}
        while given:
            who = min(given, key=given.__getitem__)
            request = next(queues[who], None)
            if request is None:
                del given[who]
            elif batch.admit(request):
                given[who] += self.cost(request, len(request.prompt) * self.prompt_price)
            else:
                return

    def arrived(self, request: Request) -> None:
        who = customer(request)
        if who not in self.queues:
            floor = self.floor()
            self.queues[who] = {}
            self.given[who] = max(self.given.get(who, 0.0), floor)
            if len(self.given) > 2 * self.pruned:
                self.prune(floor)
        self.queues[who][request.id] = request

    def admitted(self, requests: Sequence[Request], waiting: Collection[Request]) -> None:
        for request in requests:
            self.given[customer(request)] += self.cost(request, len(request.prompt) * self.prompt_price)

    def left(self, request: Request) -> None:
        who = customer(request)
        del self.queues[who][request.id]
        if not self.queues[who]:
            del self.queues[who]
            self.last = who

    def decoded(self, requests: Sequence[Request]) -> None:
        for request in requests:
            who = customer(request)
            self.given[who] = self.given.get(who, 0.0) + self.cost(request, self.output_price)

    def cost(self, request: Request, price: float) -> float:
        return price / self.weights.get(customer(request), 1.0)

    def floor(self) -> float:
        """What one that begins to wait is lifted to."""
        idle = self.given.get(self.last, 0.0) if self.lift_idle else 0.0
        return min((self.given[who] for who in self.queues), default=idle)

    def prune(self, floor: float) -> None:
        """Forget those that do not wait and would be lifted anyway, so that memory does not grow with all who ever came."""
        self.given = {
            who: cost for who, cost in self.given.items() if cost > floor or who in self.queues or who == self.last
        }
        self.pruned = max(len(self.given), 1024)


class EarlyAbort(Policy):
    """A first token in time for as many as possible: requests that are too late are given up, and the newest go first while
    more arrive than are admitted, the oldest otherwise.

    Args:
        slo: seconds from arrival to the first token, for requests without a deadline of their own.
        margin: seconds that the first token takes: a request with less than this left is too late.
    """

    def __init__(self, slo: float = 6.0, margin: float = 0.5) -> None:
        check(math.isfinite(slo) and slo > 0, "slo", slo, "a finite number above 0")
        check(0 <= margin < slo, "margin", margin, "0 or more, and below slo")
        self.slo, self.margin = slo, margin
        self.arriving = 1  # smoothed: requests that came since the last admission
        self.admitting = 1  # smoothed: requests admitted at a time
        self.remained = 0

    def expired(self, waiting: Collection[Request], now: float) -> Sequence[Request]:
        self.arriving = int(0.7 * (len(waiting) - self.remained) + 0.3 * self.arriving)
        return [request for request in reversed([*waiting]) if self.late(request, now)]

    def late(self, request: Request, now: float) -> bool:
        slo = self.slo if request.deadline is None else request.deadline - request.arrival
        return now - request.arrival + self.margin >= slo

    def admit(self, waiting: Collection[Request], batch: MiniBatch) -> None:
        for request in reversed([*waiting]) if self.arriving >= self.admitting else waiting:
            if not batch.admit(request):
                return

    def admitted(self, requests: Sequence[Request], waiting: Collection[Request]) -> None:
        self.remained = len(waiting) - len(requests)
        self.admitting = max(int(0.7 * len(requests) + 0.3 * self.admitting), 1)


class OneAdapter(Policy):
    """Baseline: all requests of a batch have the same adapter, which could be merged into the base model.

    Args:
        patience: with more than this many requests for others before the first for the same adapter, the batch gets no more.
    """

    def __init__(self, patience: int = 30) -> None:
        check(patience >= 0, "patience", patience, "0 or more")
        self.patience = patience

    def admit(self, waiting: Collection[Request], batch: MiniBatch) -> None:
        first = next(iter(batch.running or waiting), None)
        if first is None:
            return
        places = [i for i, request in enumerate(waiting) if request.held == first.held]
        if not places or places[0] > self.patience:
            return
        for request in [r for r in waiting if r.held == first.held]:
            if not batch.admit(request):
                return


class Pets(Policy):
    """Baseline: group requests of similar length so that padded batches would cost least (Zhou et al. 2022, PetS).

    Each adapter's requests, by length, are cut into groups of least cost, then all groups, by length, into batches of least
    cost; the shortest batch is next. It does not protect long requests from waiting for ever.

    Args:
        base: cost of a batch in the base model, from the number of requests and the longest prompt.
        extra: cost of a group in its adapters, from their identities, the number of requests and the longest prompt.
        least: with no more waiting than this, they come in order of arrival.
    """

    def __init__(
        self, base: Callable[[int, int], float], extra: Callable[[tuple[str, ...], int, int], float], least: int = 10
    ) -> None:
        self.base, self.extra, self.least = base, extra, least

    def admit(self, waiting: Collection[Request], batch: MiniBatch) -> None:
        for request in self.shortest(waiting) if len(waiting) > self.least else waiting:
            if not batch.admit(request):
                return

    def shortest(self, waiting: Collection[Request]) -> Iterator[Request]:
        """The requests of the batch with the shortest prompts."""
        queues: dict[tuple[str, ...], list[Request]] = {}
        for request in waiting:
            queues.setdefault(request.held, []).append(request)
        groups: list[list[Request]] = []
        for held, queue in queues.items():
            queue.sort(key=length)
            cuts = cut(len(queue), lambda i, j: self.extra(held, j - i, length(queue[j - 1])))  # noqa: B023
            groups += [queue[i:j] for i, j in reversed(cuts)]
        groups.sort(key=lambda group: length(group[-1]))
        sizes = [0]
        for group in groups:
            sizes.append(sizes[-1] + len(group))
        cuts = cut(len(groups), lambda i, j: self.base(sizes[j] - sizes[i], length(groups[j - 1][-1])))
        return (request for group in groups[: cuts[0][1]] for request in group)


def cut(count: int, cost: Callable[[int, int], float]) -> list[tuple[int, int]]:
    """Bounds of the pieces (i, j) of 0 … count, in order, of least total cost."""
    best, start = [0.0], [0]
    for j in range(1, count + 1):
        value, i = min((best[i] + cost(i, j), i) for i in range(j))
        best.append(value)
        start.append(i)
    pieces = []
    while count:
        pieces.append((start[count], count))
        count = start[count]
    return pieces[::-1]


def length(request: Request) -> int:
    return len(request.prompt)


def customer(request: Request) -> str:
    """Whom its cost is charged to: the names of its adapters, whatever version of them it holds."""
    return "+".join(sorted(request.adapters))


def check(ok: bool, name: str, value: Any, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {value!r}; it must be {expected}.")


POLICIES: dict[str, Callable[..., Policy]] = {
    "fcfs": FCFS,
    "cluster": Cluster,
    "vtc": VTC,
    "abort": EarlyAbort,
    "peft": OneAdapter,
    "pets": Pets,
}


def policy_named(name: str, **options: Any) -> Policy:
    """A new policy.

    Raises:
        ConfigError: there is none of that name, or it has no such option.
    """
    if name not in POLICIES:
        raise ConfigError(f"There is no policy {name!r}. {near(name, POLICIES)}")
    try:
        return POLICIES[name](**options)
    except TypeError as error:
        raise ConfigError(f"policy {name!r}: {error}") from None
