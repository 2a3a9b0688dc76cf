"""LLaMA-Adapter: a gated prefix in the upper layers of a language model, absent until its gates open.

Zhang et al. 2023, arXiv 2303.16199; the part that V2 (Gao et al. 2023, arXiv 2304.15010) builds on.

At each of the last L layers the queries of the text attend to K learnt prompts by a softmax of their own; the result,
times a gate per head that starts at zero, is added to the heads. The prompts have no positions and stay out of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from anyadapter.core.adapter import Adapter, AdapterConfig, Branch
from anyadapter.core.attention import attend, key_heads
from anyadapter.core.errors import TargetError
from anyadapter.core.host import Host, features
from anyadapter.core.site import Site


@dataclass(frozen=True, kw_only=True)
class LlamaAdapterConfig(AdapterConfig):
    """Settings of LLaMA-Adapter.

    Attributes:
        length: number K of prompts in a layer.
        last_layers: number L of layers that get them, counted from the last; by default all but the first two, the
            paper's 30 of 32.
        activation: what the gate passes through. The authors trained with ``"tanh"``; their inference code and the paper's
            equation 7 have none (``"identity"``). Use an adapter with the one it was trained with.
        gate: one gate per ``"head"``, or one per ``"layer"`` as in the authors' first release.
    """

    method: ClassVar[str] = "llama_adapter"
    length: int = 10
    last_layers: int | None = None
    activation: Literal["tanh", "identity"] = "tanh"
    gate: Literal["head", "layer"] = "head"

    def __post_init__(self) -> None:
        self.require("length", isinstance(self.length, int) and self.length >= 1, "a positive integer")
        self.require("last_layers", self.last_layers is None or self.last_layers >= 1, "a positive integer or None")
        self.require("activation", self.activation in ("tanh", "identity"), "'tanh' or 'identity'")
        self.require("gate", self.gate in ("head", "layer"), "'head' or 'layer'")


class LlamaAdapter(Adapter):
    """heads = softmax(q kᵀ + mask) v + act(g) · softmax(q p_kᵀ) p_v, with p_k = W_k P, p_v = W_v P, in the last L layers."""

    Config = LlamaAdapterConfig
    capabilities = frozenset({"scale", "average", "route"})
    config: LlamaAdapterConfig
    idle_gates: Tensor | None

    def setup(self, host: Host) -> None:
        config = self.config
        every = host.find("self_attention", kind="attention")
        count = max(1, len(every) - 2) if config.last_layers is None else config.last_layers
        config.require("last_layers", count <= len(every), f"at most {len(every)}, the layers of {host.describe()}")
        sites = every[-count:]
        keys = [inside(host, site, "self_attention.key") for site in sites]
        width = features(keys[0])[0]
        for site, key in zip(sites, keys):
            if features(key)[0] != width:
                raise TargetError(
                    f"{site.path} reads {features(key)[0]} features, {sites[0].path} {width}; expected one width."
                )
        self.adapter_query = nn.Embedding(count * config.length, width)  # layer after layer, as in the authors' files
        for i, (site, key) in enumerate(zip(sites, keys)):
            heads = features(inside(host, site, "self_attention.query"))[1] // key_heads(site.module)[1]
            value = inside(host, site, "self_attention.value")
            shape = (1, heads, 1, 1) if config.gate == "head" else (1,)
            # Where the host normalises its keys per head (Qwen3, Gemma 3), its queries expect keys of that length.
            key_norm = getattr(site.module, "k_norm", None)
            prompts = partial(self.prompts, i)
            self.at(site, GatedPrefix(prompts, key, value, key_norm, shape, config.activation))
        # The authors' files hold a gate for every layer. Those below the last L act on nothing; we keep them for the way back.
        idle = torch.zeros(len(every) - count, *shape) if len(every) > count else None
        self.register_buffer("idle_gates", idle)

    def prompts(self, index: int) -> Tensor:
        """P of the ``index``-th of the last L layers: (1, K, d)."""
        length = self.config.length
        return self.adapter_query.weight[None, index * length : (index + 1) * length]


class GatedPrefix(Branch):
    """call(q, k, v) + scale · act(g) · softmax(q p_kᵀ · scaling) p_v (equations 5 to 8 of the first paper).

    p_k = W_k P and p_v = W_v P by the layer's own frozen projections, which other adapters may wrap. P passes neither the
    layer's input norm nor the rotation, and every query sees all of it. g starts at zero: a fresh branch changes nothing.

    Args:
        prompts: gives P, (1 or batch, K, d).
        key, value: the layer's projections; they stay the host's.
        key_norm: the layer's norm of each head's keys, if it has one; it is applied to p_k.
        shape: of the gate, (1, heads, 1, 1) or (1,).
    """

    def __init__(
        self,
        prompts: Callable[[], Tensor],
        key: nn.Module,
        value: nn.Module,
        key_norm: nn.Module | None,
        shape: tuple[int, ...],
        activation: str,
    ) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(shape))
        self.activation = activation
        self.prompts = prompts
        self.borrowed = (key, value, key_norm)  # in a tuple, so that they do not become tensors of the adapter

    def forward(
        self, call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any
    ) -> Tensor:
        """q: (batch, heads, queries, head_dim) → the same shape."""
        heads = call(q, k, v, mask, **options)
        key, value, key_norm = self.borrowed
        prompts = self.prompts().to(q)
        if self.rows is not None:  # adapters at these projections act on each row in its own way
            prompts = prompts.expand(len(q), -1, -1)
        p_k, p_v = split(key(prompts), q), split(value(prompts), q)
        if key_norm is not None:
            p_k = key_norm(p_k)
        gate = self.strength(heads) * self.opening()
        return heads + gate.to(heads) * attend(q, p_k, p_v, scaling=options.get("scaling")).to(heads)

    def opening(self) -> Tensor:
        """act(g): (1, heads, 1, 1) or (1,)."""
        return self.gate.tanh() if self.activation == "tanh" else self.gate

    def constants(self) -> tuple[Tensor, Tensor, Tensor]:
        """p_k and p_v, (K, key heads · head_dim), and act(g), (heads,) or (1,): what does not depend on the text.

        They are those of the base alone, whatever else is attached to its projections.
        """
        key, value, key_norm = self.borrowed

        def plain(module: nn.Module, x: Tensor) -> Tensor:
            return type(module).forward(module, x)

        weight = next(key.parameters())
        prompts = self.prompts()[0].to(weight)
        p_k, p_v = plain(key, prompts), plain(value, prompts)
        if key_norm is not None:
            (wide,) = next(key_norm.parameters()).shape
            p_k = plain(key_norm, p_k.unflatten(-1, (-1, wide))).flatten(1)
        return p_k, p_v, self.opening().flatten()


def split(x: Tensor, q: Tensor) -> Tensor:
    """Heads as wide as those of ``q``, for each row of it: (1 or batch, K, d) → (batch, heads, K, head_dim)."""
    x = x.unflatten(-1, (-1, q.shape[-1])).transpose(1, 2)
    return x.expand(q.shape[0], -1, -1, -1)


def inside(host: Host, site: Site, role: str) -> nn.Module:
    """The part of a site that has this role.

    Raises:
        TargetError: the architecture has no such role (its projections are fused), or this site has no such part.
    """
    for part in host.find(role):
        if part.path.startswith(f"{site.path}."):
            return part.module
    raise TargetError(
        f"{site.path} of {host.describe()} has no {role!r}; LLaMA-Adapter needs a projection of its own for each."
    )
