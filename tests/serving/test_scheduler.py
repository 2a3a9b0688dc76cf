"""The scheduler against a pool that only counts: random arrivals, ends and cancels under every policy."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyadapter.core.errors import BusyError, ConfigError, RequestError
from anyadapter.serving.admission import MiniBatch, Room
from anyadapter.serving.policies import (
    FCFS,
    PASSED,
    VTC,
    Cluster,
    EarlyAbort,
    OneAdapter,
    Pets,
    Policy,
    cut,
    policy_named,
)
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
                if job.cancel == self.now and self.scheduler.cancel(job.request.id) is not None:
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
        self.scheduler.finished(ended)

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


@pytest.mark.parametrize("name", POLICIES)
@given(jobs=job_lists(), limits=LIMITS)
@settings(max_examples=40, deadline=None)
def test_the_pool_never_overflows_and_all_requests_end(name: str, jobs: list[Job], limits: dict[str, int]) -> None:
    for job in jobs:
        job.request.output.clear()
        job.request.computed = 0
    pool = Pool(scheduler(POLICIES[name](), **limits), jobs).run()
    assert len({r.id for r in pool.admitted}) == len(pool.admitted)
    never = {job.request.id for job in jobs} - {r.id for r in pool.admitted}
    given_up = {r.id for plan in pool.plans for r in plan.aborted}
    assert never == given_up | (never & {job.request.id for job in jobs if job.cancel is not None})


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
    s.finished(small[:3])
    assert s.plan(2.0).admitted == []  # room for the others, but the big one is due
    s.finished([long])
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


# ------------------------------------------------------------------------------------------------ what fits


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 29)), min_size=1, max_size=8))
def test_need_is_the_peak_of_requests_that_decode(rows: list[tuple[int, int, int]]) -> None:
    room, requests = Room(10**6, CELLS.__getitem__, 64), []
    for prompt, output, done in rows:
        one = request(prompt, output + 1)
        one.output = [0] * min(done, output)
        one.computed = prompt + len(one.output) - 1
        room.take(one)
        requests.append(one)
    peak = 0
    while requests:
        for one in requests:
            one.computed += 1
        peak = max(peak, sum(one.computed for one in requests))
        for one in requests:
            one.output.append(0)
        requests = [one for one in requests if one.remaining]
    assert room.need() == peak


def test_a_prompt_in_pieces_is_counted_longer_than_one_in_a_single_pass() -> None:
    def room(step: int | None) -> Room:
        room = Room(200, CELLS.__getitem__, step)
        running = request(10, 30)
        running.output, running.computed = [0], 10
        room.take(running)
        return room

    whole, pieces = request(40, 10), request(40, 10)
    assert room(None).need([room(None).row(whole)]) == (41 + 9) + (11 + 9)
    assert room(9).need([room(9).row(pieces)]) == 50 + (11 + 13)  # 8 tokens a pass: the fifth gives the first token


def test_adapters_count_once_and_only_while_they_are_used() -> None:
    s = scheduler(cells=77)
    s.submit(first := request(10, 5, "a"))
    s.submit(second := request(10, 5, "a"))
    s.submit(third := request(10, 5, "b"))
    assert s.plan(0.0).admitted == [first, second]  # 12 + 2 · 15 cells; with b 20 + 15 more, all 77
    assert s.needed == ("a",)
    s.finished([first])
    assert s.plan(1.0).admitted == [third]


@pytest.mark.parametrize(
    ("prompt", "output", "adapters", "param"),
    [(189, 11, (), "max_tokens"), (200, 1, (), "prompt"), (150, 50, ("a",), "max_tokens"), (0, 5, (), "prompt")],
)
def test_a_request_that_can_never_fit_is_refused(
    prompt: int, output: int, adapters: tuple[str, ...], param: str
) -> None:
    s = scheduler()
    with pytest.raises(RequestError) as error:
        s.submit(request(prompt, output, *adapters))
    assert error.value.param == param
    if prompt:
        assert str(prompt) in str(error.value)
        assert "200 cells" in str(error.value)
    assert not s.waiting


@given(prompt=st.integers(1, 200), output=st.integers(1, 200), adapters=st.sets(st.sampled_from(sorted(CELLS))))
def test_what_is_not_refused_runs_alone(prompt: int, output: int, adapters: set[str]) -> None:
    s = scheduler(max_running=4, step_tokens=8, batch_tokens=16)
    s.submit(request(1, 1))
    try:
        s.submit(one := request(prompt, output, *adapters))
    except RequestError:
        assert prompt + output + sum(CELLS[id] for id in adapters) >= 200
        return
    s.cancel(next(iter(s.waiting)).id)
    assert s.plan(0.0).admitted == [one]


def test_whole_prompts_are_bounded_by_the_mini_batch() -> None:
    with pytest.raises(RequestError, match=re.escape("33 tokens; at most 32 (batch_tokens)")):
        scheduler(chunked=False, batch_tokens=32).submit(request(33, 1))


def test_an_id_in_hand_is_refused() -> None:
    s = scheduler()
    s.submit(one := request(3, 3))
    with pytest.raises(RequestError, match="in hand"):
        s.submit(one)
    s.plan(0.0)
    with pytest.raises(RequestError, match="in hand"):
        s.submit(one)


def test_a_full_queue_says_when_to_come_back() -> None:
    s = scheduler(max_waiting=4, max_running=1)
    for turn in range(5):
        s.submit(request(3, 3))
        s.finished(s.plan(3.0 * turn).admitted)
    for _ in range(4):
        s.submit(request(3, 3))
    with pytest.raises(BusyError, match="4 requests wait") as error:
        s.submit(request(3, 3))
    assert error.value.retry_after == pytest.approx(4 * 3.0)  # four wait, one was admitted every 3 s
    assert len(s.waiting) == 4


# ------------------------------------------------------------------------------------------------ passes


def test_decoding_requests_come_first_and_prompts_share_the_rest() -> None:
    s = scheduler(step_tokens=8, max_running=4, batch_tokens=100)
    s.submit(first := request(5, 9))
    s.submit(second := request(12, 9))
    plan = s.plan(0.0)
    assert plan.prefill == [(first, 5), (second, 3)]
    first.computed, second.computed = 5, 3
    s.submit(third := request(4, 9))
    plan = s.plan(1.0)
    assert (plan.decode, plan.prefill) == ([first], [(second, 7)])
    assert plan.admitted == [third]
    first.computed, second.computed = 6, 10
    assert s.plan(2.0).prefill == [(second, 2), (third, 4)]


def test_a_long_prompt_waits_for_those_being_computed_and_none_passes_it() -> None:
    s = scheduler(batch_tokens=10, step_tokens=8, max_running=4)
    s.submit(first := request(9, 9))
    s.submit(second := request(30, 9))
    s.submit(third := request(1, 9))
    assert s.plan(0.0).admitted == [first]
    first.computed = 8
    assert s.plan(1.0).admitted == []
    first.computed = 9
    assert s.plan(2.0).admitted == [second]
    assert list(s.waiting) == [third]


def test_cancel_in_every_state() -> None:
    s = scheduler(VTC(), step_tokens=4, max_running=3)
    rows = [request(10, 5, "a"), request(3, 5, "b"), request(6, 5, "c"), request(6, 5, "d")]
    for row in rows:
        s.submit(row)
    s.plan(0.0)
    rows[0].computed = 4  # in the middle of its prompt
    rows[1].computed, rows[1].output = 3, [0]
    assert list(s.waiting) == [rows[3]]
    for row in rows:
        assert s.cancel(row.id) is row
        assert s.cancel(row.id) is None
    assert s.cancel("never seen") is None
    assert (s.needed, len(s.waiting), len(s.running)) == ((), 0, 0)
    assert s.policy.queues == {}
    s.submit(last := request(150, 37, "a"))
    assert s.plan(1.0).admitted == [last]


@pytest.mark.parametrize("name", POLICIES)
def test_a_deadline_that_passed_ends_the_wait(name: str) -> None:
    s = scheduler(POLICIES[name](), max_running=1)
    s.submit(running := request(3, 30))
    assert s.plan(0.0).admitted == [running]
    s.submit(late := request(3, 3, deadline=5.0))
    s.submit(patient := request(3, 3, deadline=50.0))
    assert s.plan(1.0).aborted == []
    assert s.plan(5.0).aborted == [late]
    assert list(s.waiting) == [patient]


@pytest.mark.parametrize("name", POLICIES)
def test_adapters_that_come_next_are_named_ahead_and_nothing_changes(name: str) -> None:
    s = scheduler(POLICIES[name](), cells=60)
    s.submit(request(20, 20, "a"))
    s.plan(0.0)
    s.submit(request(20, 5, "a"))
    s.submit(request(20, 5, "c"))
    plans = [s.plan(1.0), s.plan(2.0)]
    assert plans[0].admitted == []
    assert set(plans[0].prefetch) == ({"a"} if name == "peft" else {"a", "c"})
    assert plans[0].prefetch == plans[1].prefetch
    assert len(s.waiting) == 2


# ------------------------------------------------------------------------------------------------ policies


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
        s.finished(plan.admitted)
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
        s.finished([one for one in s.running if not one.remaining])
        for x, y in itertools.permutations(names, 2):
            assert policy.given[x] - policy.given[y] <= bound[x]


def test_an_adapter_that_comes_late_does_not_go_before_all_others() -> None:
    def order(policy: VTC) -> str:
        s = scheduler(policy, max_running=1)
        for _ in range(50):
            s.submit(one := request(20, 2, "a"))
            s.plan(0.0)
            s.finished([one])
        for name in "bbba":  # the queue is empty when b comes
            s.submit(request(20, 2, name))
        served = ""
        for _ in range(4):
            plan = s.plan(0.0)
            served += plan.admitted[0].held[0]
            s.finished(plan.admitted)
        return served

    assert order(VTC()).index("a") <= 1
    assert order(VTC(lift_idle=False)) == "bbba"  # as in the authors' code


def test_vtc_forgets_those_who_are_gone() -> None:
    policy = VTC()
    s = Scheduler(Limits(cells=200), lambda id: 1, policy)
    for i in range(10_000):
        s.submit(one := request(3, 3, f"adapter-{i}"))
        s.plan(0.0)
        s.finished([one])
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


def test_a_look_ahead_is_bounded_by_tokens_alone() -> None:
    ahead = MiniBatch([], rows=10, tokens=10)
    assert [ahead.admit(request(n, 1000)) for n in (4, 6, 1)] == [True, True, False]
    assert ahead.full
    assert Counter(len(r.prompt) for r in ahead.requests) == {4: 1, 6: 1}
