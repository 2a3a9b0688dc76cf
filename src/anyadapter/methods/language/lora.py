"""LoRA: low-rank updates of frozen weights.

Hu et al. 2021, arXiv 2106.09685; one of the four families of LLM-Adapters (Hu et al. 2023, arXiv 2304.01933).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from anyadapter.core.adapter import Adapter, AdapterConfig, Branch, Targets, unescape
from anyadapter.core.errors import TargetError
from anyadapter.core.host import Host, ends_with, features
from anyadapter.core.roles import ROLES
from anyadapter.parts.low_rank import LowRank, truncated
from anyadapter.parts.whole import average_whole, place_whole, within


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(AdapterConfig):
    """Settings of LoRA.

    Attributes:
        rank: width r of the update.
        alpha: numerator of its scaling, alpha / r; with ``rank_stabilised``, alpha / √r (Kalajdzievski 2023).
        dropout: probability, on the branch's input.
        targets: linears and convolutions to update.
        exclude: targets to leave out.
        layers: indices of the layers to update; all by default, negative from the last.
        rank_pattern: ranks of single modules, by the end of their paths; the first pattern that matches counts.
        alpha_pattern: the same for alpha.
        whole: modules trained as whole copies beside the updates, such as a new head; PEFT's ``modules_to_save``.
        fused: treat each target as a fused query, key and value projection and update these two thirds of it with a
            grouped B, as the LLM-Adapters code does when only one target is given. Off unless a file needs it.
    """

    method: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: Targets = "all-linear"
    exclude: Targets = ()
    layers: tuple[int, ...] | None = None
    rank_stabilised: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    whole: Targets = ()
    fused: bool = False

    def __post_init__(self) -> None:
        for name, ranks in (("rank", [self.rank]), ("rank_pattern", self.rank_pattern.values())):
            self.require(name, all(isinstance(rank, int) and rank >= 1 for rank in ranks), "a positive integer")
        self.require("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        for name, alphas in (("alpha", [self.alpha]), ("alpha_pattern", self.alpha_pattern.values())):
            self.require(name, all(math.isfinite(alpha) for alpha in alphas), "finite")

    def rank_of(self, path: str) -> int:
        """r of the module at ``path``."""
        return next((r for pattern, r in self.rank_pattern.items() if ends_with(path, pattern)), self.rank)

    def alpha_of(self, path: str) -> float:
        """alpha of the module at ``path``."""
        return next((a for pattern, a in self.alpha_pattern.items() if ends_with(path, pattern)), self.alpha)

    def scaling_of(self, path: str) -> float:
        """alpha / r, or alpha / √r, of the module at ``path``."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.rank_stabilised else rank)


class LoRA(Adapter):
    """y = W x + (alpha / r) · B A x at every target."""

    Config = LoRAConfig
    capabilities = frozenset({"scale", "merge", "weighted_sum", "average", "route"})
    config: LoRAConfig

    def setup(self, host: Host) -> None:
        config = self.config
        branch = FusedLowRank if config.fused else LowRank
        whole = place_whole(self, host, config.whole)
        for site in host.find(config.targets, exclude=config.exclude, layers=config.layers):
            if within(site.path, whole):
                continue
            rank, widest = config.rank_of(site.path), max(features(site.module))
            config.require("rank", rank <= widest, f"at most {widest}, the width of {site.path}")
            self.at(site, branch(site.module, rank, config.scaling_of(site.path), config.dropout))

    @classmethod
    def weighted_sum(
        cls, adapters: Sequence[LoRA], weights: Sequence[float], rank: int | None = None
    ) -> tuple[AdapterConfig, dict[str, Tensor], dict[str, float]]:
        """B A = Σ w s B_i A_i, exactly, by A's rows and B's columns side by side; modules, ranks and alphas may differ.

        Where the ranks together exceed the module's own, or ``rank``, the nearest update of that rank.
        """
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for adapter, weight in zip(adapters, weights):
            for key, branch in adapter.branches.items():
                if isinstance(branch, (LowRank, FusedLowRank)):
                    a, b = branch.factors()
                    parts.setdefault(unescape(key), []).append((a, b * (weight * adapter.scale)))
        tensors, ranks, lost = average_whole(adapters, weights), {}, {}
        for path, found in parts.items():
            a, b = torch.cat([a for a, _ in found]), torch.cat([b for _, b in found], dim=1)
            ranks[path] = min(len(a), a[0].numel(), len(b), rank or len(a))
            if ranks[path] < len(a):
                a, b, lost[path] = truncated(a, b, ranks[path])
            tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        return plain([adapter.config for adapter in adapters], ranks), tensors, lost


def plain(configs: Sequence[LoRAConfig], ranks: dict[str, int]) -> LoRAConfig:
    """The settings of a LoRA with these ranks and scaling 1, at the targets of ``configs`` where those agree."""
    first = configs[0]
    if any((c.targets, c.exclude, c.layers) != (first.targets, first.exclude, first.layers) for c in configs):
        targets = tuple(f"[{path[0]}]{path[1:]}" if path in ROLES else path for path in ranks)
        first = replace(first, targets=targets, exclude=(), layers=None)
    common = Counter(ranks.values()).most_common(1)[0][0]
    # All modules where they differ, and a path before one that it ends with, for the first pattern that matches counts.
    differ = len(set(ranks.values())) > 1
    pattern = {path: ranks[path] for path in sorted(ranks, key=len, reverse=True)} if differ else {}
    return replace(
        first,
        rank=common,
        alpha=float(common),
        dropout=0.0,
        rank_stabilised=False,
        rank_pattern=pattern,
        alpha_pattern={path: float(r) for path, r in pattern.items()},
        fused=False,
    )


class FusedLowRank(Branch):
    """Low-rank updates of the first and last third of a linear's output, none of the middle.

    A is (2r, in): r rows for each third; B is (2 · out / 3, r, 1), a convolution in two groups. The layout of LoRA's
    first release, which LLM-Adapters' code falls into when it is given one target (card llm-adapters, trap 1).
    """

    def __init__(self, module: nn.Module, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        width_in, width_out = features(module)
        if not isinstance(module, nn.Linear) or width_out % 3:
            raise TargetError(f"A fused projection is a Linear with three equal parts, not a {module}.")
        self.lora_A = nn.Linear(width_in, 2 * rank, bias=False)
        self.lora_B = nn.Conv1d(2 * rank, 2 * width_out // 3, 1, groups=2, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)

    def forward(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """x: (batch, seq, in) → (batch, seq, out)."""
        out = call(x)
        hidden = self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype)))
        first, last = self.lora_B(hidden.transpose(-2, -1)).transpose(-2, -1).chunk(2, dim=-1)
        delta = torch.cat([first, torch.zeros_like(first), last], dim=-1)
        strength = self.scaling * self.strength(out)
        if isinstance(strength, Tensor):
            return (out + delta * strength).to(out.dtype)
        return torch.add(out, delta.to(out.dtype), alpha=strength)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A, (2r, in), and scaling · B, (out, 2r), of the same update written as a plain one, in fp32."""
        first, last = (self.lora_B.weight.detach().float().squeeze(-1) * self.scaling).chunk(2)
        none = torch.zeros_like(first)
        b = torch.cat([torch.cat([first, none, none]), torch.cat([none, none, last])], dim=1)
        return self.lora_A.weight.detach().float(), b

    def weight_delta(self, module: nn.Module) -> Tensor:
        """scale · scaling · B A by thirds, (out, in), in fp32."""
        a, b = self.lora_A.weight.float().chunk(2), self.lora_B.weight.float().squeeze(-1).chunk(2)
        delta = torch.cat([b[0] @ a[0], torch.zeros_like(b[0] @ a[0]), b[1] @ a[1]])
        return delta * (self.scaling * self.scale)
