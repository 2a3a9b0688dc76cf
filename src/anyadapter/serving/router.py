"""Which replica serves a request: the one that has its adapter already, unless that one has too much in hand. Pure Python."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from anyadapter.core.adapter import Settings


@dataclass(frozen=True, kw_only=True)
class RouterSettings(Settings):
    """How requests are spread.

    Attributes:
        slack: a replica is overloaded when it has this many times the average number of requests in hand.
        unloaded: a replica with fewer requests in hand than this never is.
        remember: how many adapters a replica is believed to hold; only the reported hit rate depends on it.
        probe: seconds between two looks whether a replica that failed is back.
        tries: replicas that may fail under one request. More, and a request that kills its server would kill them all.
    """

    slack: float = 1.25
    unloaded: int = 8
    remember: int = 64
    probe: float = 1.0
    tries: int = 2

    def __post_init__(self) -> None:
        self.require("slack", math.isfinite(self.slack) and self.slack >= 1, "a finite number of at least 1")
        self.require("probe", math.isfinite(self.probe) and self.probe > 0, "a finite number above 0")
        for name in ("unloaded", "remember", "tries"):
            self.require(name, getattr(self, name) >= 1, "at least 1")


@dataclass(eq=False)
class Standing:
    """What the router knows of a replica.

    Attributes:
        load: requests in hand.
        adapters: those it served last, least recent first.
        down: it is not asked until it is back.
    """

    load: int = 0
    adapters: OrderedDict[str, None] = field(default_factory=OrderedDict)
    down: bool = False


class Router:
    """Chooses a replica for each request; not thread-safe.

    An adapter's replicas are in an order of their own, by rendezvous hashing (Thaler and Ravishankar 1998): a replica that
    comes or goes moves only the adapters it is first for. The first one that is not overloaded serves (bounded loads,
    Mirrokni et al. 2016), so that a hot adapter comes to be on as many replicas as it needs, always the same ones. A request
    for the base goes to the least loaded.

    Args:
        names: of the replicas; they keep them when they start again.
    """

    def __init__(self, names: Iterable[str], settings: RouterSettings | None = None) -> None:
        self.settings = settings or RouterSettings()
        self.replicas = {name: Standing() for name in names}
        self.hits = self.misses = self.failures = 0
        self.order = lru_cache(maxsize=1 << 16)(self._order)

    def add(self, name: str) -> None:
        """One more replica."""
        self.replicas.setdefault(name, Standing())
        self.order.cache_clear()

    def remove(self, name: str) -> None:
        """One less; what it has in hand may end."""
        self.replicas.pop(name, None)
        self.order.cache_clear()

    def choose(self, adapter: str | None, without: Iterable[str] = ()) -> str | None:
        """The replica for a request; None when all are down or in ``without``."""
        excluded = set(without)
        loads = {
            name: replica.load for name, replica in self.replicas.items() if not replica.down and name not in excluded
        }
        if not loads:
            return None
        bound = self.bound(loads.values())
        if adapter is not None:
            for name in self.order(adapter):
                if name in loads and loads[name] < bound:
                    return name
        return min(loads, key=loads.__getitem__)

    def bound(self, loads: Collection[int]) -> int:
        """Requests in hand at which a replica is overloaded."""
        return max(self.settings.unloaded, math.ceil(self.settings.slack * (sum(loads) + 1) / len(loads)))

    def begin(self, name: str) -> None:
        """A request goes to this replica."""
        self.replicas[name].load += 1

    def served(self, name: str, adapter: str | None) -> None:
        """It has taken the request."""
        if adapter is None or name not in self.replicas:
            return
        adapters = self.replicas[name].adapters
        if adapter in adapters:
            self.hits += 1
        else:
            self.misses += 1
        adapters[adapter] = None
        adapters.move_to_end(adapter)
        if len(adapters) > self.settings.remember:
            adapters.popitem(last=False)

    def end(self, name: str) -> None:
        """It has answered, or will not."""
        if name in self.replicas:
            self.replicas[name].load -= 1

    def fail(self, name: str) -> None:
        """It died under a request. When it is back, it holds no adapters."""
        if name in self.replicas:
            self.failures += 1
            self.replicas[name].down = True
            self.replicas[name].adapters.clear()

    def rest(self, name: str) -> None:
        """It takes no requests now."""
        if name in self.replicas:
            self.replicas[name].down = True

    def back(self, name: str) -> None:
        """It takes requests again."""
        if name in self.replicas:
            self.replicas[name].down = False

    def stats(self) -> dict[str, Any]:
        """Numbers for whoever watches."""
        routed = self.hits + self.misses
        return {
            "hits": self.hits,
            "misses": self.misses,
            "hit_rate": self.hits / routed if routed else None,
            "failures": self.failures,
            "down": [name for name, replica in self.replicas.items() if replica.down],
            "load": {name: replica.load for name, replica in self.replicas.items()},
        }

    def _order(self, adapter: str) -> tuple[str, ...]:
        """All replicas, the adapter's own first."""
        return tuple(sorted(self.replicas, key=lambda name: (weight(adapter, name), name), reverse=True))


def weight(adapter: str, replica: str) -> bytes:
    """A number that is as good as random, and the same in every process."""
    return blake2b(adapter.encode(), digest_size=8, salt=blake2b(replica.encode(), digest_size=16).digest()).digest()
