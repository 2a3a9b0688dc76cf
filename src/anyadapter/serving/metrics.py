"""What Prometheus sees: per adapter requests, tokens and the time to the first token; and the engine's own numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

LABELS = 100  # adapters with series of their own; all further ones share "(other)"
OTHER, SEVERAL = "(other)", "(several)"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

GAUGES = {
    "waiting": "Requests in the queue.",
    "running": "Requests that are computed.",
    "cells": "Cells of the pool.",
    "cells_free": "Free cells.",
    "cells_adapters": "Cells that adapters hold.",
    "cells_sequences": "Cells that requests' keys and values hold.",
    "adapters": "Adapters registered.",
    "adapters_resident": "Adapters in the pool.",
}
COUNTERS = {
    "adapter_hits": "Requests whose adapter was in the pool when they were admitted.",
    "adapter_misses": "Requests whose adapter had to be brought in.",
    "adapter_evictions": "Adapters that made room for others.",
    "steps": "Forward passes.",
}


class Metrics:
    """The numbers of one server.

    Args:
        stats: gives the engine's numbers.
    """

    def __init__(self, stats: Callable[[], dict[str, float]]) -> None:
        self.stats = stats
        self.labels: set[str] = set()
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "anyadapter_requests", "Sequences that ended, by reason.", ["adapter", "reason"], registry=registry
        )
        self.prompt = Counter("anyadapter_prompt_tokens", "Tokens of prompts.", ["adapter"], registry=registry)
        self.output = Counter("anyadapter_output_tokens", "Tokens generated.", ["adapter"], registry=registry)
        self.first = Histogram(
            "anyadapter_first_token_seconds",
            "Time from a request's arrival to its first token.",
            ["adapter"],
            buckets=SECONDS,
            registry=registry,
        )
        self.responses = Counter(
            "anyadapter_http_responses", "Responses, by route and status.", ["route", "status"], registry=registry
        )
        registry.register(self)  # type: ignore[arg-type]

    def label(self, base: str, adapters: list[str]) -> str:
        """The label of what a request uses. Only names that were found registered may come here, and few get their own."""
        name = base if not adapters else adapters[0] if len(adapters) == 1 else SEVERAL
        if name in self.labels:
            return name
        if len(self.labels) >= LABELS:
            return OTHER
        self.labels.add(name)
        return name

    def collect(self) -> Iterator[Any]:
        """The engine's numbers, in the client library's terms."""
        stats = self.stats()
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"anyadapter_{name}", text, value=stats.get(name, 0.0))
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"anyadapter_{name}", text, value=stats.get(name, 0.0))
        asked = stats.get("adapter_hits", 0.0) + stats.get("adapter_misses", 0.0)
        rate = stats.get("adapter_hits", 0.0) / asked if asked else 1.0
        yield GaugeMetricFamily("anyadapter_adapter_hit_rate", "Share of hits since the start.", value=rate)

    def text(self) -> bytes:
        return generate_latest(self.registry)
