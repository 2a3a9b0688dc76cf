"""Choosing tokens: against the formulas, against frequencies, and independent of who else is in the batch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anyadapter.serving import sampling as module
from anyadapter.serving.request import Request, Sampling
from anyadapter.serving.sampling import Sampler, choose, draw, likeliest

VOCAB = 1000
numbers = itertools.count()


def request(prompt: tuple[int, ...] = (1, 2), output: list[int] | None = None, **how: Any) -> Request:
    return Request(id=f"r{next(numbers)}", prompt=prompt, output=output or [], sampling=Sampling(**how))


def logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def run(requests: list[Request], steps: int, seed: int = 0) -> list[list[int]]:
    """Tokens of several steps; a request's logits depend on itself and its position alone."""
    state: dict[str, Sampler] = {}
    for step in range(steps):
        scores = torch.cat([logits(1, seed=1000 * seed + len(r.prompt) * 100 + step) for r in requests])
        for r, choice in zip(requests, choose(scores, requests, state)):
            assert choice.token is not None
            r.output.append(choice.token)
    return [r.output for r in requests]


HOWS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.7, "frequency_penalty": 0.5},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 40},
    {"temperature": 5.0, "top_p": 0.99},
    {"temperature": 2.0, "top_k": 500, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 0.5, "presence_penalty": 1.0},
]


def test_greedy_is_one_argmax(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = logits(32)
    for name in ("draw", "report"):
        used = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, used=used: pytest.fail("more than an argmax") if a[1] == [] else {}
        )
    state: dict[str, Sampler] = {}
    requests = [request(temperature=0.0) for _ in range(31)] + [request(top_k=1)]
    assert [c.token for c in choose(scores, requests, state)] == scores.argmax(-1).tolist()
    assert state == {}, "a plain greedy request needs no sampler"


@settings(max_examples=25, deadline=None)
@given(
    how=st.sampled_from(HOWS),
    others=st.lists(st.sampled_from(HOWS), max_size=6),
    place=st.integers(0, 6),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_the_same_seed_gives_the_same_tokens_in_any_company(
    how: dict[str, Any], others: list[dict[str, Any]], place: int, seed: int
) -> None:
    alone = run([request(seed=seed, **how)], 5)[0]
    company = [request((1, 2, 3), seed=7, **other) for other in others]
    place = min(place, len(company))
    company.insert(place, request(seed=seed, **how))
    assert run(company, 5)[place] == alone


def test_a_request_without_a_seed_is_given_one_and_can_be_repeated() -> None:
    first, second = request(temperature=3.0), request(temperature=3.0)
    tokens = run([first, second], 8)
    assert first.sampling.seed is not None
    assert tokens[0] != tokens[1]
    assert run([request(temperature=3.0, seed=first.sampling.seed)], 8)[0] == tokens[0]


def test_a_request_goes_on_elsewhere_where_it_was() -> None:
    how: dict[str, Any] = {"temperature": 2.0, "seed": 5, "presence_penalty": 1.0}
    uninterrupted = run([request(**how)], 6)[0]
    moved = request(output=uninterrupted[:3], **how)
    state: dict[str, Sampler] = {}
    for step in range(3, 6):
        scores = logits(1, seed=len(moved.prompt) * 100 + step)
        moved.output.append(choose(scores, [moved], state)[0].token or 0)
    assert moved.output == uninterrupted


@pytest.mark.parametrize("how", HOWS[2:7], ids=str)
def test_tokens_come_as_often_as_they_should(how: dict[str, Any]) -> None:
    """Against the distribution written down from the definitions, in a vocabulary that top-p may have to sort as a whole."""
    rows, scores = 4000, logits(1, 600, seed=3) / 3
    expected = torch.softmax(scores[0].double() / how["temperature"], -1)
    order = expected.argsort(descending=True)
    kept = expected[order]
    if k := how.get("top_k", 0):
        kept[k:] = 0
        kept /= kept.sum()
    kept[(kept.cumsum(-1) - kept) >= how.get("top_p", 1.0)] = 0
    expected = torch.zeros_like(expected).scatter(0, order, kept / kept.sum())
    draws = [(n + 0.5) / rows for n in range(rows)]  # evenly spread, so that counts are within one of what is expected
    tokens = torch.tensor(draw(scores.expand(rows, -1), [Sampling(**how)] * rows, draws))
    counts = torch.bincount(tokens, minlength=600)
    assert (counts - expected * rows).abs().max() <= 1.5
    assert not counts[expected == 0].any()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("how", [{}, {"top_p": 1e-9}, {"top_k": 3}, {"temperature": 1e-4}, {"temperature": 100.0}])
def test_the_ends_of_the_distribution_are_never_impossible_tokens(how: dict[str, Any], u: float) -> None:
    scores = torch.full((1, 2000), -torch.inf)
    scores[0, 500:510] = torch.arange(10.0)
    token = draw(scores, [Sampling(**how)], [u])[0]
    assert 500 <= token < 510
    if "top_p" in how or how.get("temperature") == 1e-4:
        assert token == 509


def test_penalties_by_their_formulas() -> None:
    scores = torch.tensor([[2.0, -2.0, 1.0, 3.0, 0.5]])
    asked = request((0, 1), [3, 3, 2], repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.5)
    got = Sampler(asked).penalize(scores[0], asked)
    expected = [2 / 2, -2 * 2, 1 / 2 - 0.25 - 0.5, 3 / 2 - 2 * 0.25 - 0.5, 0.5]
    assert torch.equal(got, torch.tensor(expected))
    assert scores.tolist() == [[2.0, -2.0, 1.0, 3.0, 0.5]], "the logits were changed"


def test_penalties_follow_the_output() -> None:
    asked = request((0,), temperature=0.0, presence_penalty=2.0)
    scores, state = torch.tensor([[5.0, 4.0, 3.5, 0.0]]), {}
    for expected in (0, 1, 2, 0):
        token = choose(scores, [asked], state)[0].token
        assert token == expected
        asked.output.append(expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("how", HOWS[:4], ids=str)
def test_a_row_that_is_not_finite_ends_alone(bad: float, how: dict[str, Any]) -> None:
    scores = logits(3)
    scores[1, 77] = bad
    requests = [request(seed=1, logprobs=2, **how) for _ in range(3)]
    choices = choose(scores, requests, {})
    assert choices[1] == (None, None)
    clean = choose(logits(3), [request(seed=1, logprobs=2, **how) for _ in range(3)], {})
    assert [choices[0], choices[2]] == [clean[0], clean[2]]


def test_nothing_finite_is_not_finite_and_minus_infinity_alone_is_a_mask() -> None:
    scores = torch.full((2, 4), -torch.inf)
    scores[1, 2] = -1e30
    assert likeliest(scores) == [-1, 2]


def test_log_probabilities_are_the_models_own() -> None:
    scores = logits(3)
    hows = [{"logprobs": 3, "temperature": 0.5, "top_k": 2}, {}, {"logprobs": 0, "presence_penalty": 2.0}]
    choices = choose(scores, [request(seed=3, **how) for how in hows], {})
    values = scores.log_softmax(-1)
    assert choices[1].logprobs is None
    for row, n in ((0, 3), (2, 0)):
        (position,) = choices[row].logprobs
        own, *top = position
        assert own == (choices[row].token, pytest.approx(values[row, choices[row].token].item()))
        assert [token for token, _ in top] == values[row].topk(n).indices.tolist()
        assert [value for _, value in top] == pytest.approx(values[row].topk(n).values.tolist())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 100), scale=st.floats(0.01, 30))
def test_looking_at_the_likeliest_first_changes_nothing(seed: int, scale: float) -> None:
    """Rows that are sorted as a whole and rows that are not draw the same."""
    scores = logits(6, seed=seed) * scale
    samplings = [
        Sampling(temperature=1.0, top_p=p, top_k=k)
        for p, k in ((0.1, 0), (0.9, 0), (0.9, 300), (1, 5), (1, 900), (0.5, 9))
    ]
    draws = torch.rand(6, generator=torch.Generator().manual_seed(seed)).tolist()
    quick = draw(scores, samplings, draws)
    before, module.CANDIDATES = module.CANDIDATES, VOCAB
    try:
        assert draw(scores, samplings, draws) == quick
    finally:
        module.CANDIDATES = before
