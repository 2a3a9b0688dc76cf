"""The workload generator's distributions, and the measures of service."""

from __future__ import annotations

import statistics

import pytest

from anyadapter.core.errors import ConfigError
from anyadapter.serving.workload import Workload, attained, satisfaction


def test_the_same_settings_give_the_same_calls() -> None:
    workload = Workload(duration=30)
    assert workload.calls() == workload.calls()
    assert workload.calls() != Workload(duration=30, seed=43).calls()
    assert len(workload.calls()) == 60


def test_arrivals_have_the_rate_and_the_variation_asked_for() -> None:
    for cv in (0.5, 1.0, 4.0):
        times = [call.arrival for call in Workload(rate=5, duration=4000, cv=cv).calls()]
        gaps = [b - a for a, b in zip([0.0, *times], times)]
        assert statistics.mean(gaps) == pytest.approx(1 / 5, rel=0.1)
        assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.1)
        assert times == sorted(times)


def test_alpha_1_is_uniform_and_less_prefers_the_first() -> None:
    def share(alpha: float) -> float:
        calls = Workload(adapters=10, rate=10, duration=1000, alpha=alpha).calls()
        assert {call.adapter for call in calls} == set(range(10))
        return sum(call.adapter == 0 for call in calls) / len(calls)

    assert share(1.0) == pytest.approx(0.1, abs=0.02)
    assert share(0.3) == pytest.approx(0.1**0.3, abs=0.02)  # P(x < 1/10) of the density α x^(α − 1)


def test_lengths_stay_in_their_ranges() -> None:
    calls = Workload(rate=10, duration=500, prompt=(3, 6), output=(7, 8)).calls()
    assert {call.prompt for call in calls} == {3, 4, 5}
    assert {call.output for call in calls} == {7}


def test_without_adapters_all_calls_are_for_the_base() -> None:
    assert {call.adapter for call in Workload(adapters=0, duration=10).calls()} == {None}


def test_settings_survive_json() -> None:
    workload = Workload(prompt=(3, 6), cv=2.0)
    assert Workload.from_dict(workload.to_dict()) == workload


@pytest.mark.parametrize(
    "wrong",
    [{"adapters": -1}, {"rate": 0.0}, {"cv": float("nan")}, {"alpha": -1.0}, {"prompt": (8, 8)}, {"output": (0, 4)}],
)
def test_impossible_workloads_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Workload(**wrong)


def test_satisfaction_falls_to_nothing_at_the_slo() -> None:
    assert [satisfaction(t) for t in (0.0, 3.0, 6.0, 60.0, None)] == [1.0, 0.75, 0.0, 0.0, 0.0]
    assert [attained(t) for t in (0.0, 5.99, 6.0, None)] == [True, True, False, False]
    assert satisfaction(1.0, slo=2.0) == 0.75
    assert not attained(2.0, slo=2.0)
