"""Choosing each request's next token from the logits of one step.

The order is vLLM's: repetition penalty, frequency and presence penalty, temperature, top-k, top-p, then one draw. Presence
and frequency count generated tokens, repetition those of the prompt too. Reported log-probabilities are of the model's own
distribution, before all of this.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from anyadapter.serving.request import Request, Sampling

COLDEST = 1e-5  # below this temperature the likeliest token is taken
CANDIDATES = 256  # likeliest tokens looked at first; the whole vocabulary is sorted only where these are too few

Logprobs = tuple[tuple[tuple[int, float], ...], ...]


class Choice(NamedTuple):
    """One request's next token.

    Attributes:
        token: its id; None when the row's logits are not finite, and the request has to end with an error.
        logprobs: as in :class:`~anyadapter.serving.request.Output`: one position, whose first pair is the chosen token and
            the others the likeliest in order (the chosen one among them, if it is); None when not asked for.
    """

    token: int | None
    logprobs: Logprobs | None = None


class Sampler:
    """What one request's choices depend on besides its logits: a generator of its own, and the tokens seen so far.

    A request without a seed is given one, which stays in its ``sampling``. A token takes one draw, so that the same seed
    gives the same tokens whatever else is in the batch.
    """

    def __init__(self, request: Request) -> None:
        if request.sampling.seed is None:
            request.sampling = replace(request.sampling, seed=secrets.randbits(63))
        self.generator = torch.Generator().manual_seed(request.sampling.seed or 0)
        self.counts: Tensor | None = None  # (vocab,) how often each token was generated
        self.seen: Tensor | None = None  # (vocab,) whether it is in prompt or output
        self.counted = 0
        for _ in request.output:  # one that goes on elsewhere goes on where it was
            self.draw()

    def draw(self) -> float:
        """A number from 0 to below 1."""
        return torch.rand((), generator=self.generator, dtype=torch.float64).item()

    def penalize(self, logits: Tensor, request: Request) -> Tensor:
        """Logits (vocab,) after the penalties; the argument is left alone."""
        sampling = request.sampling
        if self.counts is None or self.seen is None:
            self.counts = torch.zeros_like(logits)
            self.seen = torch.zeros_like(logits, dtype=torch.bool)
            self.seen[torch.tensor(request.prompt, dtype=torch.long, device=logits.device)] = True
        for token in request.output[self.counted :]:
            self.counts[token] += 1
            self.seen[token] = True
        self.counted = len(request.output)
        repeated = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(self.seen, repeated, logits)
        return logits - sampling.frequency_penalty * self.counts - sampling.presence_penalty * (self.counts > 0)


def choose(logits: Tensor, requests: Sequence[Request], state: dict[str, Sampler]) -> list[Choice]:
    """The next token of every request.

    Args:
        logits: (rows, vocab) in fp32; not changed.
        requests: one a row.
        state: samplers by request id. They are added here; the caller drops those of requests that have ended.
    """
    tokens = likeliest(logits)
    random, changed = [], {}
    for row, request in enumerate(requests):
        if tokens[row] < 0 or plain(request.sampling):
            continue
        if request.id not in state:
            state[request.id] = Sampler(request)
        if penalized(request.sampling):
            changed[row] = state[request.id].penalize(logits[row], request)
        if not greedy(request.sampling):
            random.append(row)
        elif row in changed:
            tokens[row] = int(changed[row].argmax())
    if random:
        scores = torch.stack([changed.get(row, logits[row]) for row in random])
        samplings, draws = (
            [requests[row].sampling for row in random],
            [state[requests[row].id].draw() for row in random],
        )
        for row, token in zip(random, draw(scores, samplings, draws)):
            tokens[row] = token
    reported = report(logits, requests, tokens)
    return [Choice(token, reported.get(row)) if token >= 0 else Choice(None) for row, token in enumerate(tokens)]


def likeliest(logits: Tensor) -> list[int]:
    """Each row's greatest logit, the first among equals; −1 where the row holds NaN, +∞ or nothing finite."""
    if logits.device.type == "cpu":  # NumPy's is ten times quicker
        best = torch.from_numpy(logits.detach().numpy().argmax(axis=1))
    else:
        best = logits.argmax(dim=-1)
    fine = logits.gather(1, best[:, None])[:, 0].isfinite()  # NaN counts as the greatest, so this one number tells
    return torch.where(fine, best, -1).tolist()


def greedy(sampling: Sampling) -> bool:
    return sampling.temperature < COLDEST or sampling.top_k == 1


def penalized(sampling: Sampling) -> bool:
    return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0


def plain(sampling: Sampling) -> bool:
    """Whether the likeliest token is the answer."""
    return greedy(sampling) and not penalized(sampling)


def draw(logits: Tensor, samplings: Sequence[Sampling], draws: Sequence[float]) -> list[int]:
    """One token a row, by the inverse of the cumulative distribution. A row's result depends on that row alone.

    Args:
        logits: (rows, vocab), penalised.
        draws: one number from 0 to below 1 for each row.
    """
    vocab, device = logits.shape[1], logits.device
    cold = logits.new_tensor([s.temperature for s in samplings])[:, None]
    k = torch.tensor([min(s.top_k or vocab, vocab) for s in samplings], device=device)[:, None]
    p, u = logits.new_tensor([s.top_p for s in samplings])[:, None], logits.new_tensor(draws)[:, None]
    # Less the greatest, so that the coldest cannot overflow.
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / cold).softmax(-1)
    chosen = torch.empty(len(samplings), dtype=torch.long, device=device)

    whole = ((k == vocab) & (p == 1))[:, 0]
    if whole.any():
        chosen[whole] = invert(probabilities[whole], u[whole])
    if not whole.all():
        best, ids = probabilities.topk(min(CANDIDATES, vocab), dim=-1)
        few = (~whole[:, None] & ((k <= best.shape[1]) | (k == vocab) & (best.sum(-1, keepdim=True) >= p)))[:, 0]
        chosen[few] = draw_sorted(best[few], ids[few], k[few], p[few], u[few])
        many = ~whole & ~few
        if many.any():
            best, ids = probabilities[many].sort(-1, descending=True)
            chosen[many] = draw_sorted(best, ids, k[many], p[many], u[many])
    return chosen.tolist()


def draw_sorted(best: Tensor, ids: Tensor, k: Tensor, p: Tensor, u: Tensor) -> Tensor:
    """A draw among the first k whose sum before them is below p of the sum of those k.

    It is made in the order of the tokens' ids: which of two near-ties comes first can hang on the other rows of the batch.

    Args:
        best: (rows, n) probabilities from the greatest down.
        ids: (rows, n) their tokens.
        k, p, u: (rows, 1). A k beyond n stands for the whole vocabulary, whose sum is 1.
    """
    inside = torch.arange(best.shape[1], device=best.device) < k
    best = best * inside
    total = torch.where(k > best.shape[1], 1.0, best.sum(-1, keepdim=True))
    before = best.cumsum(-1) - best
    ids, order = ids.sort(-1)
    kept = (best * (before < p * total)).gather(1, order)
    return ids.gather(1, invert(kept, u)[:, None])[:, 0]


def invert(weights: Tensor, u: Tensor) -> Tensor:
    """The first index at which the running sum of ``weights`` (rows, n) passes u (rows, 1) of the whole; never a zero."""
    running = weights.cumsum(-1)
    total = running[:, -1:]
    at = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(running, at, right=True)[:, 0]


def report(logits: Tensor, requests: Sequence[Request], tokens: Sequence[int]) -> dict[int, Logprobs]:
    """The log-probabilities of the rows that ask for them, of the distribution as the model gave it."""
    rows = [row for row, r in enumerate(requests) if r.sampling.logprobs is not None and tokens[row] >= 0]
    if not rows:
        return {}
    values = logits[rows].log_softmax(-1)
    own = values.gather(1, torch.tensor([tokens[row] for row in rows], device=logits.device)[:, None])[:, 0].tolist()
    most = min(max(requests[row].sampling.logprobs or 0 for row in rows), logits.shape[1])
    top, ids = (part.tolist() for part in values.topk(most, dim=-1))
    reported: dict[int, Logprobs] = {}
    for row, value, best, names in zip(rows, own, top, ids):
        n = requests[row].sampling.logprobs or 0
        reported[row] = (((tokens[row], value), *zip(names[:n], best[:n])),)
    return reported
