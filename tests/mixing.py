"""What the tests of mixtures share: other values for an adapter, a tiny base, and a method with a slice per language."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from families import case
from hypothesis import settings
from torch import Tensor, nn

import anyadapter as aa

PROPERTY = settings(max_examples=25, deadline=None)


def randomise(adapter: aa.Adapter, seed: int, std: float = 0.3) -> aa.Adapter:
    """Other values for every tensor, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)
    return adapter


def llama() -> nn.Module:
    return case("llama").build().requires_grad_(False)


@torch.no_grad()
def logits(model: nn.Module, batch: int = 2) -> Tensor:
    return model(**case("llama").inputs(model, batch)).logits


def deltas(adapter: aa.Adapter, model: nn.Module) -> dict[str, Tensor]:
    """What an adapter adds to each weight."""
    return {p.path: p.branch.weight_delta(model.get_submodule(p.path)).detach() for p in adapter.placements}


@dataclass(frozen=True, kw_only=True)
class LanguagesConfig(aa.AdapterConfig):
    """For the tests: a bottleneck per language after each feed-forward, stored in one tensor (card lda-asr, section 4)."""

    method: ClassVar[str] = "test_languages"
    count: int = 3
    width: int = 4


class Languages(aa.Adapter):
    Config = LanguagesConfig
    reads = ("language",)
    capabilities = frozenset({"slice_merge"})
    slices = {"*.down": 0, "*.up": 1}

    def setup(self, host: aa.Host) -> None:
        for site in host.find("feed_forward"):
            self.at(site, LanguagesBranch(self, self.config.count, self.config.width, 16))


class LanguagesBranch(aa.Branch):
    """h + U_l relu(D_l h) + c: D is (L, b, d), U is (b, L, d), c is (d,) and shared by all languages."""

    def __init__(self, adapter: aa.Adapter, count: int, width: int, wide: int) -> None:
        super().__init__()
        self.signal = adapter.signal
        self.down, self.up = (
            nn.Parameter(torch.randn(count, width, wide)),
            nn.Parameter(torch.randn(width, count, wide)),
        )
        self.shift = nn.Parameter(torch.zeros(wide))

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        h, language = call(*args, **kwargs), self.signal("language")
        hidden = torch.einsum("btd,bwd->btw", h, self.down[language]).relu()
        return h + torch.einsum("btw,wbd->btd", hidden, self.up[:, language]) + self.shift


aa.register(Languages)


PROMPTS = ["The capital of France is", "Water boils at a", "Seven times six makes"]


@torch.no_grad()
def answers(model: nn.Module, tokenizer: Any, prompts: list[str]) -> Tensor:
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    return model(**batch).logits[:, -1]
