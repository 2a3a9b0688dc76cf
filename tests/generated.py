"""What tests of GenerativeAdapter share: tiny hosts with a generator whose output is not zero, and contexts."""

from __future__ import annotations

from typing import Any

import torch
from families import Case, case
from torch import Tensor, nn

import anyadapter as aa
from anyadapter.methods.language.generative import Generative, GenerativeConfig
from anyadapter.parts.context import State

IDS = torch.tensor([[5, 9, 3, 33, 21, 60, 7], [8, 4, 44, 12, 6, 30, 19]])
SMALL = {"inner": 6, "rank": 5, "max_rank": 3, "alpha": 10.0, "window": 4}


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, (count,), generator=torch.Generator().manual_seed(seed))


def attached(model: nn.Module, std: float = 0.5, **config: Any) -> Generative:
    """A generator whose output is not zero."""
    adapter = aa.attach(model, GenerativeConfig(**(SMALL | config)))
    assert isinstance(adapter, Generative)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for path in adapter.layer_of:
            nn.init.normal_(adapter.generator(path).B.weight, std=std)
    return adapter


def ready(family: Case | str = "llama", **config: Any) -> tuple[nn.Module, Generative]:
    model = (case(family) if isinstance(family, str) else family).build().requires_grad_(False)
    return model, attached(model, **config)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS, state: Any = None, **kwargs: Any) -> Tensor:
    with aa.signals(model, state=state):
        return model(input_ids=ids, **kwargs).logits


def same(a: State, b: State, **tolerance: float) -> None:
    assert a.windows == b.windows
    for path in a.outer:
        torch.testing.assert_close(a.outer[path], b.outer[path], **tolerance)
