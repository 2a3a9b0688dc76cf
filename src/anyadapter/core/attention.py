"""Attention sites: the call ``core(q, k, v, mask, **options) -> heads`` before the output projection.

``q`` is (batch, heads, queries, head_dim); ``k`` and ``v`` are (batch, kv_heads, keys, head_dim); ``mask`` is ``None``,
boolean (true = may attend) or additive, broadcastable to (batch, heads, queries, keys); heads are
(batch, heads, queries, head_dim). ``options`` are passed through: ``scaling`` (default head_dim ** -0.5), ``is_causal``
(always given; with no mask, a query may see the keys up to its own), ``position_bias`` (additive, per head, one row per
query), ``alibi`` (additive, linear in the key's position, one row), ``dropout``.

Each library opens its core in its own way, a *port*; a branch sees none of it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyadapter.core.errors import TargetError
from anyadapter.core.site import Chain, Patch


class Port(Protocol):
    """A way into one library's attention core."""

    def opens(self, module: nn.Module) -> bool:
        """Whether this port fits the module."""

    def install(self, patch: Patch, chain: Chain) -> None:
        """Run the core of ``patch.module`` through ``chain``; may replace ``patch.base``."""

    def remove(self, patch: Patch) -> None:
        """Undo ``install``."""


def ports() -> list[Port]:
    """All ports, in the order they are tried; a library that is not installed has none."""
    from anyadapter.core.attention_transformers import BloomPort, InterfacePort, MethodPort

    found: list[Port] = [InterfacePort(), MethodPort(), BloomPort()]
    try:
        from anyadapter.core.attention_diffusers import ProcessorPort

        found.append(ProcessorPort())
    except ImportError:
        pass
    return found


def port_of(path: str, module: nn.Module) -> Port:
    """The port that opens this module.

    Raises:
        TargetError: the module has no attention core that can be reached.
    """
    for port in ports():
        if port.opens(module):
            return port
    raise TargetError(
        f"{path} ({type(module).__name__}) has no attention core that can be wrapped: it neither uses transformers' "
        "AttentionInterface nor a diffusers attention processor. Wrap the module's call instead, or choose a method that "
        "needs no attention site."
    )


def key_heads(module: nn.Module) -> tuple[int, int]:
    """How many heads of keys and values an attention module of transformers has, and their width.

    Raises:
        TargetError: it does not say.
    """

    def fact(owner: Any, *names: str) -> int | None:
        return next((getattr(owner, name) for name in names if getattr(owner, name, None)), None)

    dim = fact(module, "head_dim", "attention_head_size", "key_value_proj_dim")
    heads = fact(module, "num_heads", "num_attention_heads", "n_heads")
    heads = heads or fact(getattr(module, "config", None), "num_attention_heads")
    if dim is None or heads is None:
        raise TargetError(f"A {type(module).__name__} does not say how many heads it has and how wide they are.")
    return heads // getattr(module, "num_key_value_groups", 1), dim


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scaling: float | None = None) -> Tensor:
    """softmax(q kᵀ · scaling + mask) v, with the key heads repeated where there are fewer than query heads."""
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)


def prepend(
    prefix_k: Tensor, prefix_v: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
    """Put n keys and values, seen by every query, in front of the sequence.

    Args:
        prefix_k, prefix_v: (batch or 1, kv_heads, n, head_dim).
        q, k, v, mask, options: as given to the core.

    Returns:
        The new ``k``, ``v``, ``mask`` and ``options``. A causal core without a mask gets one, and a position bias is
        continued to the left: zero where it is learnt, the same slope where it is linear (ALiBi).

    Raises:
        TargetError: the mask is of an attention implementation that cannot take extra keys.
    """
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 4):
        raise TargetError(
            "Extra keys in front need a mask of four dimensions, which flash and flex attention do not use; call "
            "model.set_attn_implementation('sdpa')."
        )
    n, queries, keys = prefix_k.shape[2], q.shape[2], k.shape[2]
    options = dict(options)
    if mask is None and options.get("is_causal") and queries > 1:
        # The last query is the last key's: earlier keys came from a cache.
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)[None, None]
    if mask is not None:
        seen = torch.ones if mask.dtype == torch.bool else torch.zeros
        mask = mask[..., :keys]
        mask = torch.cat([seen(*mask.shape[:-1], n, dtype=mask.dtype, device=mask.device), mask], dim=-1)
        options["is_causal"] = False
    if (bias := options.get("position_bias")) is not None:
        options["position_bias"] = torch.cat([bias.new_zeros(*bias.shape[:-1], n), bias], dim=-1)
    if (alibi := options.get("alibi")) is not None:
        slope = options["alibi_slopes"].to(alibi)[:, None, None]
        left = alibi[..., :1] + slope * torch.arange(-n, 0, device=alibi.device, dtype=alibi.dtype)
        options["alibi"] = torch.cat([left, alibi], dim=-1)
    batch = k.shape[0]
    k = torch.cat([prefix_k.to(k.dtype).expand(batch, -1, -1, -1), k], dim=2)
    v = torch.cat([prefix_v.to(v.dtype).expand(batch, -1, -1, -1), v], dim=2)
    return k, v, mask, options
