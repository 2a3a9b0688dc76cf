"""Ranking by cosine: each number is what its definition says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel

import anyadapter as aa
from anyadapter.training.base import load_base
from anyadapter.training.ranking import align, complete, ranking, ranks


@settings(max_examples=50, deadline=None)
@given(queries=st.integers(1, 8), candidates=st.integers(1, 9), k=st.integers(1, 9), seed=st.integers(0, 999))
def test_ranks_and_hits_against_sorting(queries: int, candidates: int, k: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    q, c = torch.randn(queries, 4, generator=draw), torch.randn(candidates, 4, generator=draw)
    right = torch.randint(candidates, (queries,), generator=draw)
    found = ranks(q * 3, c / 2, right)
    near = torch.nn.functional.cosine_similarity(q[:, None], c[None], dim=-1)
    order = near.argsort(1, descending=True)
    assert found.tolist() == [order[i].tolist().index(right[i]) for i in range(queries)]
    standard, official = ranking(found, (k, k + 1)), ranking(found, (k,), official=True)
    assert standard[f"hit@{k}"] == pytest.approx(sum(r < k for r in found.tolist()) / queries)
    assert official[f"hit@{k}"] == standard[f"hit@{k + 1}"]  # the authors' hit@k is hit@(k + 1)
    assert official["mrr"] == standard["mrr"] == pytest.approx(sum(1 / (r + 1) for r in found.tolist()) / queries)


def test_an_encoder_that_finds_all_texts_alike_is_no_better_than_chance() -> None:
    found = ranks(torch.ones(5, 3), torch.ones(9, 3), torch.arange(5))
    assert found.tolist() == [4.0] * 5
    assert ranking(found, (1, 10)) == {"hit@1": 0.0, "hit@10": 1.0, "mrr": pytest.approx(0.2)}


@pytest.fixture(scope="module")
def encoder(letters_bert: Path) -> tuple[Any, Any]:
    """A tiny encoder that knows nothing."""
    return load_base(letters_bert, auto=AutoModel)


def test_alignment_finds_a_text_itself_and_the_authors_count_finds_more(encoder: tuple[Any, Any]) -> None:
    words = ["dog", "cat", "house", "red heart", "snow", "closed book", "bicycle", "evening sun"]
    assert align(*encoder, [(word, word) for word in words]) == {"hit@1": 1.0, "hit@10": 1.0, "mrr": 1.0}
    names = list(zip(words, ["pes", "kočka", "dům", "červené srdce", "sníh", "zavřená kniha", "jízdní kolo", "slunce"]))
    ours, theirs = (align(*encoder, names, hits=(1, 2, 3), official=official) for official in (False, True))
    assert ours["hit@1"] <= ours["hit@2"] <= ours["hit@3"]
    assert ours["mrr"] >= ours["hit@1"]
    assert theirs["hit@1"] <= theirs["hit@2"]
    with pytest.raises(aa.DataError, match="nothing to rank"):
        align(*encoder, [])


def test_completion_asks_for_each_object_among_all_objects_once(encoder: tuple[Any, Any]) -> None:
    facts = [("paris", "capital of", "france"), ("nice", "city in", "france"), ("rome", "capital of", "italy")]
    found = complete(*encoder, facts, hits=(2,))
    assert found["hit@2"] == 1.0  # two candidates: France counts once
    assert complete(*encoder, [("a red", "heart", "a red heart"), ("snow", "man", "snow man")])["hit@1"] == 1.0
