"""A scheduler's surroundings without an engine: a pool that only counts, and random requests."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from hypothesis import strategies as st

from anyadapter.serving.policies import FCFS, VTC, Cluster, EarlyAbort, OneAdapter, Pets, Policy
from anyadapter.serving.request import Request, Sampling
from anyadapter.serving.scheduler import Limits, Plan, Scheduler

CELLS = {"a": 12, "b": 20, "c": 4, "d": 8}  # of adapters
POLICIES: dict[str, Callable[[], Policy]] = {
    "fcfs": FCFS,
    "fcfs official": lambda: FCFS(0),
    "cluster": lambda: Cluster(2, overtakes=4),
    "cluster official": lambda: Cluster(1, overtakes=None, counts_new=False),
    "vtc": lambda: VTC({"a": 3.0}),
    "abort": lambda: EarlyAbort(slo=40.0, margin=3.0),
    "peft": OneAdapter,
    "pets": lambda: Pets(lambda n, length: 1 + 0.1 * n * length, lambda held, n, length: 0.5 + 0.01 * n * length),
}
ids = itertools.count()


def end(scheduler: Scheduler, requests: Iterable[Request]) -> None:
    """These have all their tokens."""
    for request in requests:
        scheduler.remove(request.id)


def request(prompt: int, output: int, *adapters: str, arrival: float = 0.0, deadline: float | None = None) -> Request:
    return Request(
        f"r{next(ids)}",
        (0,) * prompt,
        dict.fromkeys(adapters, 1.0),
        Sampling(max_tokens=output),
        arrival=arrival,
        deadline=deadline,
        held=adapters,
    )


def scheduler(policy: Policy | None = None, **limits: int | bool) -> Scheduler:
    return Scheduler(Limits(**{"cells": 200, **limits}), CELLS.__getitem__, policy or FCFS())


@dataclass
class Job:
    """A request, and what is to happen to it."""

    at: int
    request: Request
    tokens: int  # after which it ends by itself
    cancel: int | None


@dataclass
class Pool:
    """Runs a scheduler pass by pass, as the engine would, and counts cells. A pass takes one second."""

    scheduler: Scheduler
    jobs: list[Job]
    now: int = 0
    plans: list[Plan] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    resident: set[str] = field(default_factory=set)

    def run(self) -> Pool:
        ends = {job.request.id: job.tokens for job in self.jobs}
        for self.now in range(5000):
            for job in self.jobs:
                if job.at == self.now:
                    job.request.arrival = float(self.now)
                    self.scheduler.submit(job.request)
                if job.cancel == self.now and self.scheduler.remove(job.request.id) is not None:
                    assert job.request not in [*self.scheduler.waiting, *self.scheduler.running]
            self.step(ends)
            if (
                all(job.at <= self.now for job in self.jobs)
                and not self.scheduler.waiting
                and not self.scheduler.running
            ):
                return self
        raise AssertionError("it does not come to an end")

    def step(self, ends: dict[str, int]) -> None:
        plan = self.scheduler.plan(float(self.now))
        self.plans.append(plan)
        self.admitted += plan.admitted
        self.resident = (self.resident & set(self.scheduler.needed)) | set(plan.load)
        assert self.resident == set(self.scheduler.needed)
        for row, count in [*plan.prefill, *((row, 1) for row in plan.decode)]:
            row.computed += count
        self.check(plan)
        for row in self.scheduler.running:
            if row.computed == len(row.prompt) + len(row.output):
                row.output.append(0)
        ended = [row for row in self.scheduler.running if len(row.output) >= ends[row.id]]
        end(self.scheduler, ended)

    def check(self, plan: Plan) -> None:
        limits, running = self.scheduler.limits, list(self.scheduler.running)
        assert sum(row.computed for row in running) + sum(CELLS[id] for id in self.resident) <= limits.cells
        assert len(running) <= limits.max_running
        tokens = sum(count for _, count in plan.prefill) + len(plan.decode)
        assert tokens or not running  # no pass is empty while there is work
        if limits.chunked:
            assert tokens <= limits.step_tokens
            assert set(plan.decode) == {row for row in running if row.output}


@st.composite
def job_lists(draw: st.DrawFn, cells: int = 120) -> list[Job]:
    jobs, now = [], 0
    for _ in range(draw(st.integers(1, 25))):
        now += draw(st.integers(0, 4))
        adapters = draw(st.lists(st.sampled_from(sorted(CELLS)), max_size=2, unique=True))
        most = cells - sum(CELLS[id] for id in adapters) - 1
        prompt = draw(st.integers(1, min(most - 1, 60)))
        output = draw(st.integers(1, min(most - prompt, 40)))
        ends = draw(st.integers(1, output)) if draw(st.booleans()) else output
        cancel = now + draw(st.integers(0, 40)) if draw(st.integers(0, 4)) == 0 else None
        jobs.append(Job(now, request(prompt, output, *adapters), ends, cancel))
    return jobs


LIMITS = st.builds(
    lambda rows, budget, batch, chunked, wait: {
        "cells": 120,
        "max_running": rows,
        "step_tokens": rows + budget,
        "batch_tokens": batch if chunked else max(batch, 60),
        "chunked": chunked,
        "wait_steps": wait,
    },
    st.integers(1, 9),
    st.integers(0, 30),
    st.integers(1, 80),
    st.booleans(),
    st.integers(1, 10),
)
