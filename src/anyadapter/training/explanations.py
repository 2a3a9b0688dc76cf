"""How good an explanation is: do its words agree with people's, and do they carry the model's decision?

Metrics of ERASER (DeYoung et al. 2020, arXiv 1911.03429), as RAFT is measured with them. An explanation gives each word of a
text a score; its k best words are its hard rationale. Special tokens are no words: they are never scored, taken out or kept.

LIME and SHAP, what RAFT is compared with, run through their own libraries (``pip install anyadapter[explain]``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from anyadapter.core.errors import ConfigError, DataError

TOP_K = 5  # words of a hard rationale, of the authors
Span = tuple[int, int]  # first word, and the one after the last
Masks = Sequence[Sequence[int]]
Probabilities = Callable[[list[str]], Any]  # texts -> (texts, classes)


# ---------------------------------------------------------------------- plausibility


def plausibility(
    gold: Masks, scores: Sequence[Sequence[float]], k: int = TOP_K, *, official: bool = False
) -> dict[str, float]:
    """Agreement with people's marks, over texts.

    Args:
        gold: of each text, 1 for the words people marked; :func:`union` of several annotators.
        scores: of each text, a number for each word.
        k: words of a hard rationale.
        official: leave predicted words that stand side by side apart, as the authors do. A gold span of three words or more
            is then never hit, whatever is predicted.

    Returns:
        ``iou_precision``, ``iou_recall`` and ``iou_f1``, of spans that overlap by half or more; ``token_precision``,
        ``token_recall`` and ``token_f1``; ``auprc``. The means over texts; ``iou_f1`` is of the mean precision and recall.

    Raises:
        DataError: there are no texts, the numbers of words differ, or a text has no marked word.
    """
    check(gold, scores)
    chosen = [top(each, k) for each in scores]
    apart = [[(i, i + 1) for i in words] for words in chosen]
    predicted = (
        apart if official else [spans([int(i in words) for i in range(len(g))]) for g, words in zip(gold, chosen)]
    )
    iou = np.array([overlaps(spans(g), p) for g, p in zip(gold, predicted)])
    token = np.array([agreement(marked(g), set(words)) for g, words in zip(gold, chosen)])
    precision, recall = iou.mean(axis=0).tolist()
    return {
        "iou_precision": precision,
        "iou_recall": recall,
        "iou_f1": f1(precision, recall),
        **dict(zip(("token_precision", "token_recall", "token_f1"), token.mean(axis=0).tolist())),
        "auprc": float(np.mean([auprc(g, s) for g, s in zip(gold, scores)])),
    }


def check(gold: Masks, scores: Sequence[Sequence[float]]) -> None:
    """Raise a :class:`DataError` unless every text has one score a word and a marked word."""
    if not gold or len(gold) != len(scores):
        raise DataError(
            f"{len(gold)} texts have marks and {len(scores)} have scores; expected as many, and one at least."
        )
    for number, (mask, each) in enumerate(zip(gold, scores)):
        if len(mask) != len(each) or not any(mask):
            raise DataError(
                f"Text {number} has {len(mask)} words, {sum(map(bool, mask))} of them marked, and {len(each)} scores; expected a "
                "score for each word and at least one mark."
            )


def union(masks: Masks) -> list[int]:
    """1 for each word that any annotator marked."""
    return [int(any(column)) for column in zip(*masks, strict=True)]


def marked(mask: Sequence[int]) -> set[int]:
    """The positions of a mask's ones."""
    return {i for i, value in enumerate(mask) if value}


def spans(mask: Sequence[int]) -> list[Span]:
    """The runs of ones in a mask."""
    edges = np.diff([0, *(int(bool(value)) for value in mask), 0])
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist()))


def top(scores: Sequence[float], k: int = TOP_K) -> list[int]:
    """The positions of the k highest scores, in the order of the text; of equal ones the first."""
    return sorted(np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")[:k].tolist())


def scaled(scores: Sequence[float]) -> list[float]:
    """Scores from 0 to 1, the lowest to the highest; zeros where all are equal."""
    values = np.asarray(scores, dtype=np.float64)
    if not values.size:
        return []
    low, high = values.min(), values.max()
    return ((values - low) / (high - low)).tolist() if high > low else [0.0] * len(values)


def overlaps(gold: Sequence[Span], predicted: Sequence[Span], threshold: float = 0.5) -> tuple[float, float]:
    """(precision, recall) of spans whose intersection with a gold span is ``threshold`` of the union or more."""

    def iou(one: Span, other: Span) -> float:
        shared = max(0, min(one[1], other[1]) - max(one[0], other[0]))
        return shared / (one[1] - one[0] + other[1] - other[0] - shared)

    hits = sum(any(iou(p, g) >= threshold for g in gold) for p in predicted)
    return hits / max(len(predicted), 1), hits / max(len(gold), 1)


def agreement(gold: set[int], predicted: set[int]) -> tuple[float, float, float]:
    """(precision, recall, F1) of words."""
    hits = len(gold & predicted)
    precision, recall = hits / max(len(predicted), 1), hits / max(len(gold), 1)
    return precision, recall, f1(precision, recall)


def f1(precision: float, recall: float) -> float:
    """Their harmonic mean; 0 where both are."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def auprc(gold: Sequence[int], scores: Sequence[float]) -> float:
    """The area under precision over recall, by trapezoids, as scikit-learn's curve has them: one point a distinct score."""
    truth, values = np.asarray(gold, dtype=bool), np.asarray(scores, dtype=np.float64)
    order = np.argsort(-values, kind="stable")
    last = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)  # of each run of equal scores
    hits = truth[order].cumsum()[last]
    recall, precision = np.append(0.0, hits / truth.sum()), np.append(1.0, hits / (last + 1))
    return float(np.trapezoid(precision, recall))


# ---------------------------------------------------------------------- faithfulness


def faithfulness(full: Any, only: Any, without: Any, chosen: Sequence[int]) -> dict[str, float]:
    """What a decision loses without its reasons, and with nothing else.

    Args:
        full, only, without: (texts, classes), probabilities of the whole texts, of their rationales alone, of the rest.
        chosen: of each text the class that is explained.

    Returns:
        ``comprehensiveness``, the mean of full − without, higher is better; ``sufficiency``, that of full − only, lower is.
    """
    rows = np.arange(len(chosen))
    whole, alone, rest = (np.asarray(each, dtype=np.float64)[rows, list(chosen)] for each in (full, only, without))
    return {"comprehensiveness": float((whole - rest).mean()), "sufficiency": float((whole - alone).mean())}


def measure_faithfulness(
    texts: Sequence[Sequence[str]],
    scores: Sequence[Sequence[float]],
    probabilities: Probabilities,
    k: int = TOP_K,
    *,
    normal: int | None = None,
) -> dict[str, float]:
    """:func:`faithfulness` of a classifier's decisions.

    Args:
        texts: the words of each.
        scores: a number for each of them.
        probabilities: the classifier, as a function of texts; a tokenizer adds its special tokens to each by itself.
        k: words of a rationale.
        normal: a class that is not explained: where it is the decision, the best of the others is.
    """
    chosen = [set(top(each, k)) for each in scores]
    full = np.asarray(probabilities([" ".join(words) for words in texts]))
    only, without = (
        probabilities([" ".join(w for i, w in enumerate(words) if (i in c) is kept) for words, c in zip(texts, chosen)])
        for kept in (True, False)
    )
    return faithfulness(full, only, without, explained(full, normal))


def explained(probabilities: Any, normal: int | None = None) -> list[int]:
    """The class of each text that is explained: the likeliest that is not ``normal``."""
    values = np.array(probabilities, dtype=np.float64)
    if normal is not None:
        values[:, normal] = -1
    return values.argmax(axis=1).tolist()


# ---------------------------------------------------------------------- LIME and SHAP


def lime_scores(
    words: Sequence[str], probabilities: Probabilities, chosen: int, samples: int = 500, seed: int = 0
) -> list[float]:
    """A score for each word by LIME (Ribeiro et al. 2016), through the package ``lime``.

    Args:
        words: of the text, without white space in them.
        probabilities: the classifier.
        chosen: the class to explain.
        samples: texts it asks the classifier about.

    Raises:
        ConfigError: the package is not installed.
    """
    text = library("lime", "lime.lime_text")
    explainer = text.LimeTextExplainer(split_expression=r"\s+", bow=False, mask_string="", random_state=seed)
    explanation = explainer.explain_instance(
        " ".join(words),
        lambda texts: np.asarray(probabilities(list(texts))),
        labels=(chosen,),
        num_features=len(words),
        num_samples=samples,
    )
    found = dict(explanation.as_map()[chosen])
    return [float(found.get(i, 0.0)) for i in range(len(words))]


def shap_scores(
    words: Sequence[str], probabilities: Probabilities, chosen: int, samples: int = 500, seed: int = 0
) -> list[float]:
    """A score for each word by SHAP (Lundberg and Lee 2017), over permutations, through the package ``shap``.

    Arguments and errors as of :func:`lime_scores`; it asks about each word at least twice.
    """
    shap = library("shap", "shap")

    def kept(masks: Any) -> Any:
        texts = [" ".join(w for w, keep in zip(words, mask) if keep > 0.5) for mask in masks]
        return np.asarray(probabilities(texts))[:, chosen]

    explainer = shap.explainers.Permutation(kept, np.zeros((1, len(words))), seed=seed)
    found = explainer(np.ones((1, len(words))), max_evals=max(samples, 2 * len(words) + 1), silent=True)
    return np.asarray(found.values)[0].tolist()


def library(package: str, module: str) -> Any:
    """A module of an optional package. Raises :class:`ConfigError` when it is not installed."""
    from importlib import import_module

    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{package} is not installed ({error}); run `pip install anyadapter[explain]` to compare with it."
        ) from None
