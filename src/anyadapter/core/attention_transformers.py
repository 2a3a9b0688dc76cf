"""Ports into the attention cores of transformers.

Most models call a function from the ``AttentionInterface`` table by the name in ``self.config._attn_implementation``.
An opened module sees its own config through ``CoreConfig``, which answers with our name for the same implementation; the
model's config, and the masks made from it, stay as they are, and a later ``set_attn_implementation`` keeps working.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from anyadapter.core.site import Chain, Patch

PREFIX = "anyadapter_"
CHAIN = "_anyadapter_core"  # attribute of an opened module: the chain its core runs through


class CoreConfig:
    """A module's config in all but the name of the attention implementation."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def _attn_implementation(self) -> str:
        return register(self.config._attn_implementation or "eager")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "config":  # asked while being unpickled or copied
            raise AttributeError(name)
        return getattr(self.config, name)


def register(implementation: str) -> str:
    """Make sure our twin of an implementation is in transformers' table; return its name."""
    name = PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS._global_mapping:
        ALL_ATTENTION_FUNCTIONS.register(name, partial(through_chain, implementation))
    return name


def through_chain(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function in transformers' form (heads as (batch, queries, heads, head_dim)) that runs the chain."""
    source = sys.modules[type(module).__module__]
    core = source.ALL_ATTENTION_FUNCTIONS.get_interface(
        implementation, getattr(source, "eager_attention_forward", None)
    )
    weights = None

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
        nonlocal weights
        heads, weights = core(module, q, k, v, mask, **options)
        return heads.transpose(1, 2)

    if options.get("is_causal") is None:
        options["is_causal"] = getattr(module, "is_causal", True)
    heads = getattr(module, CHAIN)(call, query, key, value, attention_mask, **options)
    return heads.transpose(1, 2).contiguous(), weights


for _implementation in ("eager", *tuple(ALL_ATTENTION_FUNCTIONS._global_mapping)):
    register(_implementation)


class InterfacePort:
    """Modules that look their attention function up by name."""

    def opens(self, module: nn.Module) -> bool:
        source = sys.modules[type(module).__module__]
        return hasattr(source, "ALL_ATTENTION_FUNCTIONS") and hasattr(module, "config") and hasattr(module, "is_causal")

    def install(self, patch: Patch, chain: Chain) -> None:
        module = patch.module
        module.config = CoreConfig(module.config)  # type: ignore[assignment]
        setattr(module, CHAIN, chain)

    def remove(self, patch: Patch) -> None:
        module = patch.module
        module.config = module.config.config  # type: ignore[union-attr, assignment]
        delattr(module, CHAIN)


class MethodCore:
    """Stands as the instance attribute ``_attn`` of an opened GPT-J or GPT-Neo attention.

    GPT-Neo masks inside its ``_attn``, by a table that knows no keys but the sequence's own; here that becomes part of the
    mask, and the attention is written out.
    """

    def __init__(self, module: nn.Module, chain: Chain) -> None:
        self.module, self.chain = module, chain
        scale: Any = getattr(module, "scale_attn", 1.0)
        self.scale = float(scale)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        weights = None

        def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
            nonlocal weights
            scores = q.float() @ k.float().transpose(-1, -2) / self.scale
            if mask is not None:
                scores = scores + mask
            weights = self.module.attn_dropout(F.softmax(scores, dim=-1).to(v.dtype))  # type: ignore[operator]
            return weights @ v

        table: Any = getattr(self.module, "bias", None)
        if table is not None:
            seen = table[:, :, k.shape[2] - q.shape[2] : k.shape[2], : k.shape[2]]
            lowest = torch.finfo(torch.float32).min
            window = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, lowest)
            mask = window if mask is None else mask + window
        return self.chain(call, q, k, v, mask, scaling=1.0 / self.scale, is_causal=True), weights


class MethodPort:
    """Modules whose core is their own method ``_attn(q, k, v, mask)``: GPT-J and GPT-Neo."""

    def opens(self, module: nn.Module) -> bool:
        return type(module).__name__ in ("GPTJAttention", "GPTNeoSelfAttention")

    def install(self, patch: Patch, chain: Chain) -> None:
        patch.module._attn = MethodCore(patch.module, chain)  # type: ignore[assignment]

    def remove(self, patch: Patch) -> None:
        del patch.module._attn


class BloomCore:
    """BLOOM's attention, written out: its core is not a function of its own, so the module's call is taken over."""

    def __init__(self, module: nn.Module, base: Callable[..., Any], chain: Chain) -> None:
        self.module, self.base, self.chain = module, base, chain

    def __call__(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not any(link.adapter.active for link in self.chain.links):
            return self.base(hidden_states, residual, alibi, attention_mask, layer_past=layer_past, **kwargs)
        m: Any = self.module
        q, k, v = m._reshape(m.query_key_value(hidden_states))
        if layer_past is not None:
            k, v = layer_past.update(k, v, m.layer_idx)
        heads = self.chain(
            self.core,
            q,
            k,
            v,
            attention_mask,
            scaling=m.inv_norm_factor,
            is_causal=True,
            alibi=alibi.view(q.shape[0], m.num_heads, 1, -1),
            alibi_slopes=alibi_slopes(m.num_heads),
        )
        out = m.dense(heads.transpose(1, 2).reshape(hidden_states.shape))
        return residual + F.dropout(out, p=m.hidden_dropout, training=m.training), None

    def core(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, alibi: Tensor, **options: Any) -> Tensor:
        m: Any = self.module
        flat = partial(torch.flatten, start_dim=0, end_dim=1)
        scores = flat(alibi).baddbmm(flat(q), flat(k).transpose(1, 2), beta=m.beta, alpha=m.inv_norm_factor)
        scores = scores.view(*q.shape[:3], -1)
        if mask is not None:
            scores = scores + mask
        weights = m.attention_dropout(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype))
        return torch.bmm(flat(weights), flat(v)).view(q.shape)


def alibi_slopes(heads: int) -> Tensor:
    """The slope of each head's linear position bias (Press et al. 2022, section 3)."""
    power = 2 ** (heads.bit_length() - 1)  # the largest power of two not above `heads`
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(slopes)


class BloomPort:
    """BLOOM's attention module."""

    def opens(self, module: nn.Module) -> bool:
        return type(module).__name__ == "BloomAttention"

    def install(self, patch: Patch, chain: Chain) -> None:
        patch.base = BloomCore(patch.module, patch.base, chain)

    def remove(self, patch: Patch) -> None:
        patch.base = patch.base.base  # type: ignore[attr-defined]
