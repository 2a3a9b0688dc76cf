"""Bottleneck adapters: down-projection, non-linearity, up-projection, in series with frozen modules or beside them.

Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2020, arXiv 2005.00052; He et al. 2022, arXiv 2110.04366; per linear
as in LLM-Adapters, Hu et al. 2023, arXiv 2304.01933. The defaults are those of the LLM-Adapters code, but for the init.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn
from transformers.activations import ACT2FN

from anyadapter.core.adapter import Adapter, AdapterConfig, Targets
from anyadapter.core.errors import TargetError
from anyadapter.core.host import Host
from anyadapter.core.site import Site
from anyadapter.parts.bottleneck import After, Before, DownUp, InBlock, Parallel, widths

# How a linear of each role is adapted: LLM-Adapters' three arrangements, with their default targets.
LINEARS: dict[str, dict[str, str]] = {
    "series": {"feed_forward.gate": "before", "feed_forward.up": "before", "feed_forward.down": "after"},
    "adapterp": {"feed_forward.down": "after"},
    "parallel": {f"self_attention.{part}": "parallel" for part in ("query", "key", "value", "qkv")},
}
# What is read inside a BERT-style output block, by the arrangements that adapt whole sub-layers.
SUB_LAYERS: dict[str, Literal["norm", "output", "residual"]] = {
    "pfeiffer": "norm",
    "houlsby": "output",
    "parallel_block": "residual",
}
# The branch at a module, and which of its (in, out) widths is read and which is added to.
PLACES: dict[str, tuple[type[DownUp], int, int]] = {
    "before": (Before, 0, 0),
    "after": (After, 1, 1),
    "parallel": (Parallel, 0, 1),
}
PLACEMENTS = tuple(dict.fromkeys((*LINEARS, *SUB_LAYERS, *PLACES)))


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(AdapterConfig):
    """Settings of a bottleneck adapter.

    AdapterHub's are ``BottleneckConfig(placement="pfeiffer", reduction=16, activation="relu", bias=True)`` and
    ``BottleneckConfig(placement="houlsby", reduction=16, activation="swish", bias=True)``.

    Attributes:
        placement: where the bottleneck z goes. Per linear W, as LLM-Adapters has it: ``"series"``, W(x + z(x)) at the
            feed-forward's gate and up, h + z(h) after its down; ``"adapterp"``, after its down only; ``"parallel"``,
            W x + z(x), at query, key and value unless targets are given. Per sub-layer: ``"pfeiffer"``, after the
            feed-forward; ``"houlsby"``, after attention and feed-forward; both before the residual is added, in BERT-style
            blocks inside LayerNorm(residual); ``"parallel_block"``, beside both. At ``targets`` of any kind: ``"before"``,
            ``"after"``, ``"parallel"``.
        targets: modules to adapt; by default those of the placement.
        exclude: targets to leave out.
        layers: indices of the layers to adapt; all by default, negative from the last.
        width: size of the bottleneck.
        reduction: when given, the size is what a site reads, divided by this, and ``width`` is not used.
        activation: any name in transformers' ``ACT2FN``.
        dropout: probability, on the adapter's input.
        scaling: factor of z, or ``"learned"``: one parameter per site, from 1.
        init: ``"zero"`` starts with the up-projection at zero, so that a fresh adapter changes nothing. ``"bert"``, the
            default of LLM-Adapters and AdapterHub, draws both projections from N(0, 0.02²); on a real model of 30 layers
            that moves some logits by 10 before any training.
        bias: whether the projections have biases.
    """

    method: ClassVar[str] = "bottleneck"
    placement: str = "series"
    targets: Targets | None = None
    exclude: Targets = ()
    layers: tuple[int, ...] | None = None
    width: int = 256
    reduction: float | None = None
    activation: str = "tanh"
    dropout: float = 0.0
    scaling: float | str = 1.0
    init: str = "zero"
    bias: bool = False

    def __post_init__(self) -> None:
        s = self.scaling
        number = isinstance(s, (int, float)) and not isinstance(s, bool) and math.isfinite(s)
        self.require("placement", self.placement in PLACEMENTS, f"one of {', '.join(PLACEMENTS)}")
        needs = self.placement in PLACES and self.placement not in LINEARS
        self.require("targets", self.targets is not None or not needs, f"given with placement={self.placement!r}")
        self.require("width", isinstance(self.width, int) and self.width >= 1, "a positive integer")
        self.require("reduction", self.reduction is None or self.reduction > 0, "positive")
        self.require("activation", self.activation in ACT2FN, f"one of {', '.join(ACT2FN)}")
        self.require("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        self.require("scaling", s == "learned" or number, "a finite number or 'learned'")
        self.require("init", self.init in ("zero", "bert"), "'zero' or 'bert'")
        if number:
            object.__setattr__(self, "scaling", float(s))

    def size(self, wide: int) -> int:
        """The bottleneck's size at a site that reads ``wide`` features."""
        return self.width if self.reduction is None else max(1, int(wide // self.reduction))


class Bottleneck(Adapter):
    """z(x) = s · U act(D x) before, after or beside each target."""

    Config = BottleneckConfig
    capabilities = frozenset({"scale", "average", "route"})
    config: BottleneckConfig

    def setup(self, host: Host) -> None:
        config = self.config
        settings = {key: getattr(config, key) for key in ("activation", "dropout", "scaling", "init", "bias")}
        for site, place in self.places(host):
            if place in SUB_LAYERS:
                self.in_block(site, settings)
            else:
                branch, reads, adds = PLACES[place]
                wide = widths(site.module)
                self.at(site, branch(wide[reads], wide[adds], config.size(wide[reads]), **settings))

    def in_block(self, site: Site, settings: dict[str, Any]) -> None:
        """Between the dropout and the LayerNorm(residual) of a BERT-style output block."""
        block = site.module
        if not all(isinstance(getattr(block, part, None), nn.Module) for part in ("dense", "dropout", "LayerNorm")):
            raise TargetError(
                f"{site.path} ({type(block).__name__}) is no BERT-style output block of dense, dropout and LayerNorm; "
                f"place the adapter at its parts with placement='after' instead of {self.config.placement!r}."
            )
        size = self.config.size(widths(block)[1])
        branch = InBlock(block, SUB_LAYERS[self.config.placement], size, **settings)
        self.at(site, branch)
        self.at(Site(f"{site.path}.dropout", block.dropout), branch.adapt)  # type: ignore[arg-type]

    def places(self, host: Host) -> list[tuple[Site, str]]:
        """Each site and how it is adapted: a key of ``PLACES`` or ``SUB_LAYERS``."""
        config = self.config
        roles = self.roles(host)
        sites = host.find(config.targets or tuple(roles), exclude=config.exclude, layers=config.layers)
        if config.targets is not None and config.placement in PLACES:
            return [(site, config.placement) for site in sites]
        known = {path: place for role, place in roles.items() if host.has(role) for path in host.paths(role)}
        for site in sites:
            if site.path not in known:
                raise TargetError(
                    f"The placement {config.placement!r} is for {', '.join(roles)}, and {site.path} is none of these in "
                    f"{host.describe()}. Say placement='before', 'after' or 'parallel' for other modules."
                )
        return [(site, known[site.path]) for site in sites]

    def roles(self, host: Host) -> dict[str, str]:
        """The roles a placement adapts in this host, and how."""
        placement = self.config.placement
        if placement not in SUB_LAYERS:
            rows = LINEARS.get(placement, {})
            return {role: place for role, place in rows.items() if host.has(role)} or rows
        found = {}
        for part, last in (("self_attention", "output"), ("feed_forward", "down")):
            if placement == "pfeiffer" and part == "self_attention":
                continue
            if host.has(f"{part}.output_block"):
                found[f"{part}.output_block"] = placement
            elif placement == "parallel_block":
                found[part] = "parallel"
            else:
                found[f"{part}.{last}"] = "after"
        return found
