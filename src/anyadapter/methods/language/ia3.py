"""(IA)³: learnt vectors that scale keys, values and the inner activations of the feed-forward.

Liu et al. 2022, arXiv 2205.05638, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from anyadapter.core.adapter import Adapter, AdapterConfig, Branch, Targets
from anyadapter.core.errors import ConfigError
from anyadapter.core.host import Host, features
from anyadapter.parts.whole import average_whole, place_whole

KEYS_AND_VALUES = ("self_attention.key", "self_attention.value", "cross_attention.key", "cross_attention.value")
FUSED = ("self_attention.qkv", "cross_attention.kv")


@dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterConfig):
    """Settings of (IA)³.

    Attributes:
        outputs: linears whose output is scaled. By default the projections to keys and values of every attention; where
            one projection makes queries, keys and values together, all three are scaled.
        inputs: linears whose input is scaled: the last of the feed-forward.
        layers: indices of the layers to adapt; all by default, negative from the last.
        whole: modules trained as whole copies beside the vectors, such as a new head; PEFT's ``modules_to_save``.
    """

    method: ClassVar[str] = "ia3"
    outputs: Targets | None = None
    inputs: Targets = "feed_forward.down"
    layers: tuple[int, ...] | None = None
    whole: Targets = ()


class IA3(Adapter):
    """k ← l_k ⊙ k, v ← l_v ⊙ v, and (l_ff ⊙ γ(W₁ x)) W₂: one vector for each linear, all ones at first."""

    Config = IA3Config
    capabilities = frozenset({"scale", "merge", "weighted_sum", "average", "route"})
    config: IA3Config

    def setup(self, host: Host) -> None:
        config = self.config
        place_whole(self, host, config.whole)
        outputs = config.outputs
        if outputs is None:
            outputs = tuple(role for role in KEYS_AND_VALUES + FUSED if host.has(role)) or KEYS_AND_VALUES[:2]
        for site in host.find(outputs, exclude=config.inputs, layers=config.layers) if outputs else ():
            self.at(site, ScaledOutput(site.module))
        for site in host.find(config.inputs, layers=config.layers) if config.inputs else ():
            self.at(site, ScaledInput(site.module))

    @classmethod
    def weighted_sum(
        cls, adapters: Sequence[IA3], weights: Sequence[float], rank: int | None = None
    ) -> tuple[AdapterConfig, dict[str, Tensor], dict[str, float]]:
        """l = 1 + Σ w (l_i − 1): the weight is changed by the weighted sum of the changes. There is no rank to cut."""
        if rank is not None:
            raise ConfigError("(IA)³ has no rank; leave it out.")
        configs = [adapter.config for adapter in adapters]
        if any(config != configs[0] for config in configs):
            raise ConfigError("(IA)³ adapters can be added where they have the same settings; these differ.")
        tensors = average_whole(adapters, weights)
        values = [adapter.values() for adapter in adapters]
        for name in values[0]:
            if name not in tensors:
                changes = [w * a.scale * (v[name].detach().float() - 1) for w, a, v in zip(weights, adapters, values)]
                tensors[name] = 1 + torch.stack(changes).sum(0)
        return configs[0], tensors, {}


def factor(branch: ScaledOutput | ScaledInput, like: Tensor | None = None) -> Tensor:
    """The vector at a branch's strength s, 1 + s (l − 1): (features,), or (batch, 1, …, features) for routed rows."""
    vector = branch.ia3_l.flatten()
    s = branch.scale if like is None else branch.strength(like)
    return vector if isinstance(s, float) and s == 1 else 1 + s * (vector - 1)


class ScaledOutput(Branch):
    """y = l ⊙ call(x), with l of (out, 1)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.ia3_l = nn.Parameter(torch.ones(features(module)[1], 1))

    def forward(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """x: (…, in) → (…, out)."""
        out = call(x)
        return (out * factor(self, out)).to(out.dtype)

    def weight_delta(self, module: nn.Module) -> Tensor:
        """(l − 1) ⊙ W, row by row."""
        rows = factor(self).float() - 1
        return module.weight.float() * (rows[:, None] if isinstance(module, nn.Linear) else rows)  # type: ignore[operator]

    def bias_delta(self, module: nn.Module) -> Tensor | None:
        """(l − 1) ⊙ b."""
        return None if module.bias is None else module.bias.float() * (factor(self).float() - 1)  # type: ignore[operator]


class ScaledInput(Branch):
    """y = call(l ⊙ x), with l of (1, in)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.ia3_l = nn.Parameter(torch.ones(1, features(module)[0]))

    def forward(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """x: (…, in) → (…, out)."""
        return call((x * factor(self, x)).to(x.dtype))

    def weight_delta(self, module: nn.Module) -> Tensor:
        """(l − 1) ⊙ W, column by column."""
        columns = factor(self).float() - 1
        return module.weight.float() * (columns if isinstance(module, nn.Linear) else columns[:, None])  # type: ignore[operator]
