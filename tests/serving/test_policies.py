"""The policies: in what order they serve, whom they protect, and what of the authors' code they bring back."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduled import LIMITS, Job, Pool, end, job_lists, request, scheduler

from anyadapter.core.errors import ConfigError
from anyadapter.serving.policies import FCFS, PASSED, VTC, Cluster, EarlyAbort, cut, policy_named
from anyadapter.serving.request import Request
from anyadapter.serving.scheduler import Limits, Scheduler


@given(jobs=job_lists(), limits=LIMITS)
@settings(max_examples=40, deadline=None)
def test_official_fcfs_never_reorders(jobs: list[Job], limits: dict[str, int]) -> None:
    pool = Pool(scheduler(FCFS(0), **limits), jobs).run()
    order = [job.request.id for job in jobs]
    assert [order.index(r.id) for r in pool.admitted] == sorted(order.index(r.id) for r in pool.admitted)


@pytest.mark.parametrize("policy", ["fcfs", "cluster"])
@given(jobs=job_lists(), limits=LIMITS, overtakes=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_request_is_overtaken_a_bounded_number_of_times(
    policy: str, jobs: list[Job], limits: dict[str, int], overtakes: int
) -> None:
    pool = Pool(scheduler(policy_named(policy, overtakes=overtakes), **limits), jobs).run()
    order = [job.request.id for job in jobs]
    places = [order.index(r.id) for r in pool.admitted]
    late = 0 if policy == "fcfs" else limits["max_running"]  # cluster looks before each attempt
    for turn, place in enumerate(places):
        assert sum(earlier > place for earlier in places[:turn]) <= overtakes + late


def test_small_requests_pass_a_big_one_until_it_is_due() -> None:
    s = scheduler(FCFS(overtakes=3), cells=100)
    s.submit(long := request(10, 30))
    s.plan(0.0)
    s.submit(big := request(60, 30))  # fits only alone
    small = [request(3, 3) for _ in range(6)]
    for one in small:
        s.submit(one)
    assert s.plan(1.0).admitted == small[:3]
    end(s, small[:3])
    assert s.plan(2.0).admitted == []  # room for the others, but the big one is due
    end(s, [long])
    assert s.plan(3.0).admitted == [big, *small[3:]]


def test_official_fcfs_waits_behind_a_big_request() -> None:
    s = scheduler(FCFS(overtakes=0), cells=100)
    s.submit(request(10, 30))
    s.plan(0.0)
    s.submit(request(60, 30))
    s.submit(request(3, 3))
    assert s.plan(1.0).admitted == []


def test_one_attempt_looks_at_a_bounded_number_of_requests_that_do_not_fit() -> None:
    s = scheduler(FCFS(overtakes=1000), cells=100, max_waiting=1000)
    s.submit(request(10, 60))
    s.plan(0.0)
    for _ in range(PASSED + 1):
        s.submit(request(60, 30))
    s.submit(request(1, 1))
    assert s.plan(1.0).admitted == []


def test_cluster_counts_the_adapters_of_a_first_batch() -> None:
    rows = [request(3, 3, name) for name in "abcabc"]

    def admitted(**options: object) -> list[Request]:
        s = scheduler(Cluster(2, **options), max_running=4)
        for row in rows:
            s.submit(row)
        return list(s.plan(0.0).admitted)

    assert admitted() == [rows[0], rows[1], rows[3], rows[4]]  # two of a, two of b
    assert admitted(counts_new=False) == rows[:4]  # as in the authors' code


@pytest.mark.parametrize(("overtakes", "served"), [(4, "aaaabaaa"), (None, "aaaaaaaa")])
def test_a_busy_adapter_does_not_keep_others_waiting_for_ever(overtakes: int | None, served: str) -> None:
    s = scheduler(Cluster(1, overtakes=overtakes), max_running=2)
    s.submit(request(3, 3, "a"))  # runs all the time
    s.plan(0.0)
    s.submit(request(3, 3, "b"))
    got = ""
    for turn in range(8):
        s.submit(request(3, 3, "a"))
        plan = s.plan(float(turn))
        got += "".join(one.held[0] for one in plan.admitted)
        end(s, plan.admitted)
    assert got == served


WEIGHTS = {"a": 1.0, "b": 3.0, "c": 0.5}


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 30), st.integers(1, 20)), min_size=60, max_size=60),
    st.integers(1, 6),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_vtc_gives_backlogged_adapters_their_shares(
    rows: list[tuple[str, int, int]], max_running: int, chunked: bool
) -> None:
    policy = VTC(WEIGHTS)
    s = scheduler(policy, max_running=max_running, chunked=chunked, wait_steps=1)
    for name, prompt, output in rows:
        s.submit(request(prompt, output, name))
    names = {name for name, _, _ in rows}
    # A request or two too many, and what running requests still get after the counter was the least.
    bound = {name: (30 + 2 * 20 * max_running) / WEIGHTS[name] for name in names}
    while all(name in policy.queues for name in names):
        for one, _ in (plan := s.plan(0.0)).prefill:
            one.computed = len(one.prompt)
            one.output.append(0)
        for one in plan.decode:
            one.computed += 1
            one.output.append(0)
        end(s, [one for one in s.running if not one.remaining])
        for x, y in itertools.permutations(names, 2):
            assert policy.given[x] - policy.given[y] <= bound[x]


def test_an_adapter_that_comes_late_does_not_go_before_all_others() -> None:
    def order(policy: VTC) -> str:
        s = scheduler(policy, max_running=1)
        for _ in range(50):
            s.submit(one := request(20, 2, "a"))
            s.plan(0.0)
            end(s, [one])
        for name in "bbba":  # the queue is empty when b comes
            s.submit(request(20, 2, name))
        served = ""
        for _ in range(4):
            plan = s.plan(0.0)
            served += plan.admitted[0].held[0]
            end(s, plan.admitted)
        return served

    assert order(VTC()).index("a") <= 1
    assert order(VTC(lift_idle=False)) == "bbba"  # as in the authors' code


def test_vtc_forgets_those_who_are_gone() -> None:
    policy = VTC()
    s = Scheduler(Limits(cells=200), lambda id: 1, policy)
    for i in range(10_000):
        s.submit(one := request(3, 3, f"adapter-{i}"))
        s.plan(0.0)
        end(s, [one])
    assert len(policy.given) < 3000


@given(jobs=job_lists(), limits=LIMITS, deadlines=st.lists(st.none() | st.integers(1, 60), min_size=25, max_size=25))
@settings(max_examples=40, deadline=None)
def test_abort_never_serves_a_request_that_is_too_late(
    jobs: list[Job], limits: dict[str, int], deadlines: list[int | None]
) -> None:
    for job, seconds in zip(jobs, deadlines):
        job.request.deadline = job.at + seconds if seconds is not None else None
    pool = Pool(scheduler(EarlyAbort(slo=10.0, margin=2.0), **limits), jobs)
    for now in range(2000):
        before = len(pool.admitted)
        pool.now = now
        for job in jobs:
            if job.at == now:
                job.request.arrival = float(now)
                pool.scheduler.submit(job.request)
        pool.step({job.request.id: job.tokens for job in jobs})
        for one in pool.admitted[before:]:
            slo = 10.0 if one.deadline is None else one.deadline - one.arrival
            assert now - one.arrival < slo - 2.0
    assert not pool.scheduler.waiting
    assert not pool.scheduler.running


def test_abort_serves_the_newest_first_under_overload() -> None:
    s = scheduler(EarlyAbort(), max_running=1)
    rows = [request(3, 3) for _ in range(8)]
    for row in rows:
        s.submit(row)
    assert s.plan(0.0).admitted == [rows[-1]]


@given(st.integers(1, 6), st.data())
def test_pets_cuts_at_least_cost(count: int, data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(0, 9), min_size=count * count, max_size=count * count))

    def cost(i: int, j: int) -> float:
        return costs[i * count + j - 1]

    def total(bounds: list[tuple[int, int]]) -> float:
        return sum(cost(i, j) for i, j in bounds)

    ways = []
    for inner in itertools.product([False, True], repeat=count - 1):
        at = [0, *[i + 1 for i, here in enumerate(inner) if here], count]
        ways.append(list(itertools.pairwise(at)))
    best = cut(count, cost)
    assert total(best) == min(map(total, ways))
    assert best in ways


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: policy_named("fcsf"), "Did you mean 'fcfs'"),
        (lambda: policy_named("cluster", depth=3), "depth"),
        (lambda: FCFS(-1), "overtakes is -1"),
        (lambda: Cluster(0), "adapters is 0"),
        (lambda: VTC({"a": 0.0}), re.escape("weights['a'] is 0.0")),
        (lambda: VTC({"a": float("nan")}), "nan"),
        (lambda: EarlyAbort(slo=0.4), "margin is 0.5"),
        (lambda: Limits(cells=0), "cells is 0"),
        (lambda: Limits(cells=10, max_running=True), "max_running is True"),
        (lambda: Limits(cells=10, max_running=600), "step_tokens is 512; it must be at least max_running"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
