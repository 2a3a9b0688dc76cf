"""Requests: what is asked of the engine, how far it has come, and what it has given. Plain dataclasses, no tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from anyadapter.core.adapter import Settings

MAX_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class Sampling(Settings):
    """How tokens are chosen and when to stop.

    Attributes:
        max_tokens: most tokens to generate.
        temperature: 0 takes the likeliest token; higher is more varied.
        top_p: keep the likeliest tokens whose probabilities sum to this.
        top_k: keep this many of the likeliest; 0 keeps all.
        presence_penalty: taken from the logit of every token generated before.
        frequency_penalty: taken from it once for each time.
        repetition_penalty: divides positive logits of tokens in prompt or output, multiplies negative ones.
        seed: of this request's own generator; without it, one is drawn and kept in the request.
        stop: texts that end the output; they are not part of it.
        stop_token_ids: tokens that end it, besides the model's own end of text.
        ignore_eos: go on after the model's end of text, to ``max_tokens``.
        logprobs: how many of the likeliest tokens to report at each position; None reports nothing.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "seed", "logprobs"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            self.require(name, whole or (value is None and name in ("seed", "logprobs")), "an integer")
        for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            self.require(name, number, "a finite number")
        self.require("max_tokens", self.max_tokens >= 1, "at least 1")
        self.require("temperature", 0 <= self.temperature <= 100, "from 0 to 100")
        self.require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self.require("top_k", self.top_k >= 0, "0 (all) or more")
        self.require("presence_penalty", -2 <= self.presence_penalty <= 2, "from -2 to 2")
        self.require("frequency_penalty", -2 <= self.frequency_penalty <= 2, "from -2 to 2")
        self.require("repetition_penalty", 0 < self.repetition_penalty <= 10, "above 0 and at most 10")
        self.require("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "an integer of 64 bits")
        self.require("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}")
        self.require("stop", all(isinstance(s, str) and s for s in self.stop), "texts of at least one character")


@dataclass(eq=False)
class Request:
    """One sequence to continue.

    Attributes:
        id: unique among the requests in the engine.
        prompt: token ids.
        adapters: names and weights of the adapters it uses; empty for the base model.
        sampling: how to choose and when to stop.
        arrival: seconds, on the engine's clock.
        deadline: seconds on that clock by which the first token is wanted; a request that cannot meet it is aborted.
        held: identities of the adapters it uses, given by the engine: a name loaded anew has another one.
        output: token ids generated so far.
        computed: how many tokens (of prompt, then output) have their keys and values in the pool.
        finish: why it ended: ``"stop"``, ``"length"``, ``"cancel"``, ``"abort"`` or ``"error"``; None while it lives.
    """

    id: str
    prompt: tuple[int, ...]
    adapters: Mapping[str, float] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)
    arrival: float = 0.0
    deadline: float | None = None
    held: tuple[str, ...] = ()
    output: list[int] = field(default_factory=list)
    computed: int = 0
    finish: str | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def remaining(self) -> int:
        """Tokens it may still generate."""
        return self.sampling.max_tokens - len(self.output)


@dataclass(frozen=True)
class Output:
    """What one step gave one request.

    Attributes:
        id: of the request.
        tokens: the new token ids.
        text: the new text; text that may be the beginning of a stop text is kept back.
        logprobs: for each new token, its own log-probability and those of the likeliest, as (token id, value) pairs with
            the chosen one first; None when not asked for.
        finish: why the request has ended, or None.
        message: what went wrong, with ``finish == "error"``.
    """

    id: str
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    finish: str | None = None
    message: str = ""
