"""The paper's synthetic workload, and how well its requests were served.

Sheng et al. 2023, S-LoRA, arXiv 2311.03285, section 7 and appendix B. As in the authors' code, which the paper's text does not
quite describe: requests for all adapters together arrive as one Gamma process, and the adapters are drawn by numpy's ``power``,
with which ``alpha`` = 1 is uniform.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from anyadapter.core.adapter import Settings

SLO = 6.0  # seconds to the first token, in the paper


@dataclass(frozen=True)
class Call:
    """A request to make.

    Attributes:
        arrival: seconds after the start.
        adapter: which of the adapters, from 0; None for the base model.
        prompt: tokens of the prompt.
        output: tokens to generate, whatever they are.
    """

    arrival: float
    adapter: int | None
    prompt: int
    output: int


@dataclass(frozen=True, kw_only=True)
class Workload(Settings):
    """Requests for many adapters over some time.

    Attributes:
        adapters: how many there are; with 0, all requests are for the base model.
        rate: requests a second, on average.
        duration: seconds; there are ⌊rate · duration⌋ requests.
        alpha: adapter ⌊adapters · x⌋ with x of density alpha · x^(alpha − 1) on [0, 1): 1 is uniform, less prefers the first.
        cv: coefficient of variation of the time between requests, which is Gamma distributed with shape 1/cv² and scale
            cv²/rate: 1 is a Poisson process, more comes in bursts.
        prompt: shortest length of a prompt, and one more than the longest.
        output: the same for the output.
        seed: of numpy's RandomState.
    """

    adapters: int = 200
    rate: float = 2.0
    duration: float = 300.0
    alpha: float = 1.0
    cv: float = 1.0
    prompt: tuple[int, int] = (8, 512)
    output: tuple[int, int] = (8, 512)
    seed: int = 42

    def __post_init__(self) -> None:
        self.require("adapters", self.adapters >= 0, "0 or more")
        for name in ("rate", "duration", "alpha", "cv"):
            value = getattr(self, name)
            self.require(name, math.isfinite(value) and value > 0, "a finite number above 0")
        for name in ("prompt", "output"):
            least, most = getattr(self, name)
            self.require(name, 1 <= least < most, "two integers, the first at least 1 and less than the second")

    def calls(self) -> list[Call]:
        """The requests, in order of arrival; the same for the same settings."""
        count = int(self.rate * self.duration)
        random = np.random.RandomState(self.seed)  # its order of draws makes the paper's very requests
        places = random.power(self.alpha, count)
        prompts = random.randint(*self.prompt, size=count)
        outputs = random.randint(*self.output, size=count)
        arrivals = np.cumsum(random.gamma(1 / self.cv**2, self.cv**2 / self.rate, count))
        adapters: list[int] | list[None] = [None] * count
        if self.adapters:
            adapters = np.minimum((places * self.adapters).astype(int), self.adapters - 1).tolist()
        return [Call(*row) for row in zip(arrivals.tolist(), adapters, prompts.tolist(), outputs.tolist())]


def attained(latency: float | None, slo: float = SLO) -> bool:
    """Whether the first token came in time: after less than ``slo`` seconds. None: it never came."""
    return latency is not None and latency < slo


def satisfaction(latency: float | None, slo: float = SLO) -> float:
    """How content its user is: 1 − (latency / slo)², and 0 when the first token did not come in time."""
    return 1 - (latency / slo) ** 2 if latency is not None and latency < slo else 0.0
