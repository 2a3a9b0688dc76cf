"""How good an explanation is: each metric against its definition, and LIME and SHAP on a model whose reasons are known."""

from __future__ import annotations

import importlib.util
import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import anyadapter as aa
from anyadapter.training import explanations as ex

masks = st.lists(st.integers(0, 1), min_size=1, max_size=12).filter(any)


@settings(max_examples=60, deadline=None)
@given(mask=masks)
def test_spans_are_the_runs_of_a_mask(mask: list[int]) -> None:
    found = ex.spans(mask)
    assert [int(any(a <= i < b for a, b in found)) for i in range(len(mask))] == mask
    assert all(b < c for (_, b), (c, _) in itertools.pairwise(found))


@settings(max_examples=60, deadline=None)
@given(mask=masks, data=st.data())
def test_a_perfect_explanation_and_one_that_sees_nothing(mask: list[int], data: st.DataObject) -> None:
    k = sum(mask)
    best = ex.plausibility([mask], [[float(m) for m in mask]], k)
    assert best == pytest.approx(dict.fromkeys(best, 1.0))
    flat = ex.plausibility([mask], [[0.0] * len(mask)], k)
    # One point for all words: a trapezoid from (0, 1) to (1, share of marked words).
    assert flat["auprc"] == pytest.approx((1 + sum(mask) / len(mask)) / 2)
    scores = data.draw(st.lists(st.floats(-9, 9), min_size=len(mask), max_size=len(mask)))
    found = ex.plausibility([mask], [scores], k)
    assert found["token_precision"] == pytest.approx(found["token_recall"])
    assert all(0 <= value <= 1 for value in found.values())


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")
@settings(max_examples=40, deadline=None)
@given(mask=masks, data=st.data())
def test_the_area_is_scikit_learns(mask: list[int], data: st.DataObject) -> None:
    from sklearn.metrics import auc, precision_recall_curve

    scores = data.draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.7]), min_size=len(mask), max_size=len(mask)))
    precision, recall, _ = precision_recall_curve(mask, scores)
    assert ex.auprc(mask, scores) == pytest.approx(auc(recall, precision))


def test_words_side_by_side_are_one_reason_unless_counted_as_the_authors_do() -> None:
    gold, scores = [[0, 1, 1, 1, 0]], [[0.1, 0.9, 0.8, 0.7, 0.2]]
    assert ex.plausibility(gold, scores, 3)["iou_f1"] == 1
    assert ex.plausibility(gold, scores, 3, official=True)["iou_f1"] == 0
    assert ex.plausibility(gold, scores, 3, official=True)["token_f1"] == 1


def test_texts_weigh_the_same_whatever_their_length() -> None:
    gold = [[1, 0], [1, 0, 0, 0]]
    found = ex.plausibility(gold, [[1.0, 0.0], [0.0, 0.0, 1.0, 1.0]], 1)
    assert (found["token_f1"], found["iou_precision"]) == (0.5, 0.5)


@pytest.mark.parametrize(("gold", "scores"), [([], []), ([[1, 0]], [[0.1]]), ([[0, 0]], [[0.1, 0.2]]), ([[1]], [])])
def test_texts_that_cannot_be_scored_are_named(gold: list[list[int]], scores: list[list[float]]) -> None:
    with pytest.raises(aa.DataError, match="expected"):
        ex.plausibility(gold, scores)


# ------------------------------------------------------------------ a model whose reasons are known

VALUE = {"awful": 3.0, "bad": 1.0}


def probabilities(texts: list[str]) -> np.ndarray:
    """Of (normal, abusive): logistic in the sum of the words' values."""
    abusive = 1 / (1 + np.exp(1 - np.array([sum(VALUE.get(w, 0.0) for w in text.split()) for text in texts])))
    return np.stack([1 - abusive, abusive], axis=1)


def test_the_words_that_decide_are_faithful_and_others_are_not() -> None:
    texts = [["an", "awful", "thing"], ["a", "bad", "awful", "day"]]
    right = ex.measure_faithfulness(texts, [[0, 1, 0], [0, 1, 2, 0]], probabilities, 1)
    wrong = ex.measure_faithfulness(texts, [[1, 0, 0], [1, 0, 0, 0]], probabilities, 1)
    full, low, none = (float(probabilities([text])[0, 1]) for text in ("awful", "bad", ""))
    more = float(probabilities(["bad awful"])[0, 1])
    assert right["comprehensiveness"] == pytest.approx(((full - none) + (more - low)) / 2)
    assert right["sufficiency"] == pytest.approx((0 + more - full) / 2)
    assert wrong["comprehensiveness"] == pytest.approx(0)
    assert wrong["sufficiency"] > right["sufficiency"]


def test_the_likeliest_class_that_is_not_normal_is_explained() -> None:
    table = [[0.6, 0.1, 0.3], [0.2, 0.5, 0.3]]
    assert ex.explained(table) == [0, 1]
    assert ex.explained(table, normal=0) == [2, 1]


@pytest.mark.parametrize("method", ["lime", "shap"])
def test_lime_and_shap_find_them(method: str) -> None:
    pytest.importorskip(method)
    words = ["an", "awful", "bad", "awful", "thing", "."]
    found = getattr(ex, f"{method}_scores")(words, probabilities, 1, samples=200)
    assert len(found) == len(words)
    assert {1, 3} == set(ex.top(found, 2))
    assert max(map(abs, (found[0], found[4], found[5]))) < min(found[1], found[3]) / 3
    assert found == getattr(ex, f"{method}_scores")(words, probabilities, 1, samples=200)


@pytest.mark.parametrize("method", ["lime", "shap"])
def test_without_the_package_the_message_says_what_to_install(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (method, f"{method}.{method}_text"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(aa.ConfigError, match=rf"{method} is not installed .*pip install anyadapter\[explain\]"):
        getattr(ex, f"{method}_scores")(["a"], probabilities, 1)
