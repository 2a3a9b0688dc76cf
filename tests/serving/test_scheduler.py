"""The scheduler against a pool that only counts: random arrivals, ends and cancels under every policy."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduled import CELLS, LIMITS, POLICIES, Job, Pool, end, job_lists, request, scheduler

from anyadapter.core.errors import BusyError, RequestError
from anyadapter.serving.admission import MiniBatch, Room
from anyadapter.serving.policies import VTC


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
    end(s, [first])
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
    s.remove(next(iter(s.waiting)).id)
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
        end(s, s.plan(3.0 * turn).admitted)
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
        assert s.remove(row.id) is row
        assert s.remove(row.id) is None
    assert s.remove("never seen") is None
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


def test_a_look_ahead_is_bounded_by_tokens_alone() -> None:
    ahead = MiniBatch([], rows=10, tokens=10)
    assert [ahead.admit(request(n, 1000)) for n in (4, 6, 1)] == [True, True, False]
    assert ahead.full
    assert [len(r.prompt) for r in ahead.requests] == [4, 6]
