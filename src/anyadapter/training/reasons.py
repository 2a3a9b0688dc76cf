"""RAFT at work: the label of a text, what it is aimed at, and the tokens that are the reason; and a page that shows them."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from anyadapter.core.adapter import Adapter
from anyadapter.core.attach import adapters, signals
from anyadapter.core.errors import ConfigError
from anyadapter.methods.language.raft import SIGNAL, rationale_weights
from anyadapter.training.explanations import TOP_K, scaled, top

BATCH = 32


class Token(NamedTuple):
    """A token that is no special one.

    Attributes:
        start, end: where it stands in the text.
        weight: w, its share of the attention that RAFT pays.
        score: the same between 0 and 1, from the lowest token of the text to the highest.
    """

    start: int
    end: int
    weight: float
    score: float


@dataclass(frozen=True)
class Explanation:
    """What RAFT makes of a text.

    Attributes:
        text: as given.
        label: the likeliest one.
        probabilities: of every label.
        targets: probability of each group it may be aimed at.
        tokens: as far as the text was read.
    """

    text: str
    label: str
    probabilities: dict[str, float]
    targets: dict[str, float]
    tokens: tuple[Token, ...]

    def reasons(self, k: int = TOP_K) -> list[str]:
        """The k tokens of the highest weight, in the order of the text."""
        chosen = (self.tokens[i] for i in top([token.weight for token in self.tokens], k))
        return [self.text[token.start : token.end] for token in chosen]

    def word_scores(self, words: Sequence[str]) -> list[float]:
        """The highest weight among the tokens of each word, of a text that is these words with a space between."""
        found, start = [], 0
        for word in words:
            end = start + len(word)
            found.append(max((t.weight for t in self.tokens if t.start < end and start < t.end), default=0.0))
            start = end + 1
        return found


@torch.no_grad()
def predict(
    texts: Sequence[str],
    predictor: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    classifier: nn.Module | None = None,
    *,
    max_length: int = 128,
) -> list[Explanation]:
    """Label, targets and reasons of texts.

    Args:
        texts: as they are; the authors replace links, names and hashtags first.
        predictor: an encoder with a rationale predictor attached.
        tokenizer: of both models.
        classifier: a model with RAFT attached, which decides on the label; by default the predictor does.
        max_length: tokens of a text, at most; of RAFT-SA not more than its ``length``.

    Raises:
        ConfigError: a model has no such adapter attached, or the tokenizer is not a fast one.
    """
    if not tokenizer.is_fast:
        raise ConfigError(f"A {type(tokenizer).__name__} does not say where its tokens stand; use a fast tokenizer.")
    judge = attached(predictor, "rationale_predictor")
    raft = None if classifier is None else attached(classifier, "raft")
    labels = (judge if raft is None else raft).config.labels  # type: ignore[attr-defined]
    if raft is not None and raft.config.attention == "self":  # type: ignore[attr-defined]
        max_length = min(max_length, raft.config.length)  # type: ignore[attr-defined]
    found: list[Explanation] = []
    for start in range(0, len(texts), BATCH):
        some = list(texts[start : start + BATCH])
        batch = tokenizer(
            some,
            padding=True,
            truncation=True,
            max_length=max_length,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
        given = {key: batch[key] for key in ("input_ids", "attention_mask")}
        out = run(predictor, given)
        logits = out.label_logits
        if classifier is not None and raft is not None:
            values = {SIGNAL: out.rationale_logits} if SIGNAL in raft.reads else {}
            with signals(classifier, **values):
                logits = run(classifier, given).logits
        weights = rationale_weights(out.rationale_logits, given["attention_mask"])
        real = (given["attention_mask"] == 1) & (batch["special_tokens_mask"] == 0)
        probs = [{}] * len(some) if out.target_probs is None else named(out.target_probs, judge.config.targets)  # type: ignore
        answers = zip(some, named(logits.softmax(-1), labels), probs)
        for row, (text, probabilities, targets) in enumerate(answers):
            tokens = tokens_of(batch["offset_mapping"][row][real[row]], weights[row][real[row]])
            label = max(probabilities, key=probabilities.__getitem__)
            found.append(Explanation(text, label, probabilities, targets, tokens))
    return found


def attached(model: nn.Module, method: str) -> Adapter:
    """The adapter of a method on a model. Raises :class:`ConfigError` when there is none, or several."""
    found = [adapter for adapter in adapters(model).values() if adapter.config.method == method and adapter.active]
    if len(found) != 1:
        raise ConfigError(
            f"{len(found)} adapters of the method {method!r} act on this {type(model).__name__}; expected one."
        )
    return found[0]


def run(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """A call in evaluation mode, with what it gives on the CPU."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        return model(**{key: value.to(device) for key, value in batch.items()})
    finally:
        model.train(training)


def named(values: Tensor, names: Sequence[str]) -> list[dict[str, float]]:
    """Rows of numbers by name."""
    return [dict(zip(names, row)) for row in values.float().tolist()]


def tokens_of(offsets: Tensor, weights: Tensor) -> tuple[Token, ...]:
    """Tokens by their places and weights."""
    shares = weights.float().tolist()
    places = ((start, end) for start, end in offsets.tolist())
    return tuple(Token(*place, *pair) for place, pair in zip(places, zip(shares, scaled(shares))))


# ---------------------------------------------------------------------- a page

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 16px/1.7 sans-serif; max-width: 46em; margin: 2em auto; padding: 0 1em; }}
article {{ border-top: 1px solid #ccc; padding: 0.6em 0; }}
h2 {{ font-size: 0.9em; font-weight: normal; margin: 0; color: #444; }}
p {{ margin: 0.3em 0; white-space: pre-wrap; overflow-wrap: anywhere; }}
mark {{ border-radius: 3px; color: inherit; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def to_html(explanations: Sequence[Explanation], title: str = "Reasons") -> str:
    """A page of its own, without scripts and links, that shades each token by its score. Texts are escaped."""
    return PAGE.format(title=html.escape(title), body="\n".join(map(article, explanations)))


def article(explanation: Explanation) -> str:
    """One text with its label, its likely targets and its shaded tokens."""
    e = explanation
    head = f"{e.label} ({e.probabilities[e.label]:.0%})"
    aimed = [name for name, probability in e.targets.items() if probability >= 0.5]
    head += f" · {', '.join(aimed)}" if aimed else ""
    parts, at = [], 0
    for token in sorted(e.tokens):
        start = max(token.start, at)  # tokens may share a character; no part of the text is shown twice
        parts.append(html.escape(e.text[at:start]))
        if token.end > start:
            shade = f'style="background: rgba(230, 90, 30, {token.score * 0.8:.2f})" title="{token.weight:.3f}"'
            parts.append(f"<mark {shade}>{html.escape(e.text[start : token.end])}</mark>")
        at = max(at, token.end)
    parts.append(html.escape(e.text[at:]))
    return f"<article>\n<h2>{html.escape(head)}</h2>\n<p>{''.join(parts)}</p>\n</article>"
