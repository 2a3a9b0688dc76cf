"""Ranking by cosine: where the right answer stands among all, as hit@k and mean reciprocal rank.

Two tasks of knowledge graphs are asked so: alignment (which of these names is the same entity's?) and completion (which of
these is the object of this subject and predicate?).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyadapter.core.errors import DataError
from anyadapter.methods.language.mlkg import embed


def ranks(query: Tensor, candidates: Tensor, right: Tensor) -> Tensor:
    """How many candidates are nearer to each query than its right one, by cosine; of those as near, half.

    Args:
        query: (queries, d).
        candidates: (candidates, d).
        right: (queries,), the number of the right candidate.

    Returns:
        (queries,), 0 for the best.
    """
    scores = F.normalize(query, dim=-1) @ F.normalize(candidates, dim=-1).T
    own = scores.gather(1, right[:, None])
    return (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2


def ranking(found: Tensor, hits: Sequence[int] = (1, 10), *, official: bool = False) -> dict[str, float]:
    """``{"hit@1": …, "hit@10": …, "mrr": …}`` of ranks that begin at 0.

    Args:
        found: (queries,), of :func:`ranks`.
        hits: for which k.
        official: count as MLKG's authors do, rank k as a hit at k too, so that their hit@1 is hit@2.
    """
    more = 1 if official else 0
    shares = {f"hit@{k}": float((found <= k - 1 + more).float().mean()) for k in hits}
    return {**shares, "mrr": float((1 / (found + 1)).mean())}


def align(
    model: Any,
    tokenizer: Any,
    names: Sequence[tuple[str, str]],
    *,
    hits: Sequence[int] = (1, 10),
    official: bool = False,
    **settings: Any,
) -> dict[str, float]:
    """Entity alignment: each name of one language among all names of another.

    Args:
        model: an encoder with its adapters, such as ``"ep"`` in use.
        names: (name in the one language, name in the other) of each entity.
        official: count hits as the authors do, and pool over padding.
        settings: of :func:`anyadapter.methods.language.mlkg.embed`.

    Raises:
        DataError: there are no names.
    """
    return find(model, tokenizer, names, hits, official, settings)


def complete(
    model: Any,
    tokenizer: Any,
    facts: Sequence[tuple[str, str, str]],
    *,
    hits: Sequence[int] = (1, 10),
    official: bool = False,
    **settings: Any,
) -> dict[str, float]:
    """Completion of a knowledge graph: the object of subject and predicate among the objects of all these facts.

    Args:
        model: an encoder with its adapters, such as ``"tp"`` in use.
        facts: (subject, predicate, object), each by a name.
        official: count hits as the authors do, and pool over padding.
        settings: of :func:`anyadapter.methods.language.mlkg.embed`.

    Raises:
        DataError: there are no facts.
    """
    pairs = [(f"{subject} {predicate}", obj) for subject, predicate, obj in facts]
    return find(model, tokenizer, pairs, hits, official, settings)


def find(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    hits: Sequence[int],
    official: bool,
    settings: dict[str, Any],
) -> dict[str, float]:
    """The ranking of each pair's second text among all second texts, each once."""
    if not pairs:
        raise DataError("There is nothing to rank; expected at least one pair of texts.")
    candidates = list(dict.fromkeys(answer for _, answer in pairs))
    number = {text: index for index, text in enumerate(candidates)}
    right = torch.tensor([number[answer] for _, answer in pairs])
    query = embed(model, tokenizer, [text for text, _ in pairs], official=official, **settings).cpu()
    pool = embed(model, tokenizer, candidates, official=official, **settings).cpu()
    return ranking(ranks(query, pool, right), hits, official=official)
