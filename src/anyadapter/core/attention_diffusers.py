"""The port into the attention cores of diffusers.

Every attention processor ends in one call of ``F.scaled_dot_product_attention``. We leave the processor alone and, while
the attention module runs, take over its first such call: any processor works, and changing it later does not lose the
adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anyadapter.core.errors import TargetError
from anyadapter.core.site import Chain, Patch


class Intercept(TorchFunctionMode):
    """Sends the first scaled-dot-product attention inside the block through ``chain``.

    Written for dynamo to trace whole: it is entered without ``as``, and Python-level methods of tensors are called as
    methods.
    """

    NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.chain, self.seen = chain, False

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and not self.seen:
            self.seen = True
            return self.attention(**dict(zip(self.NAMES, args)), **kwargs)
        name = getattr(function, "__name__", "")
        if function is getattr(Tensor, name, None):
            return getattr(args[0], name)(*args[1:], **kwargs)
        return function(*args, **kwargs)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """One call of scaled-dot-product attention, through the chain."""

        def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout_p,
                is_causal=options.get("is_causal", False),
                scale=options.get("scaling"),
                enable_gqa=enable_gqa,
            )

        return self.chain(call, query, key, value, attn_mask, scaling=scale, is_causal=is_causal)


class ProcessorCore:
    """Runs an attention module with its core sent through ``chain``."""

    def __init__(self, module: nn.Module, base: Callable[..., Any], chain: Chain) -> None:
        self.module, self.base, self.chain = module, base, chain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not any(link.adapter.active for link in self.chain.links):
            return self.base(*args, **kwargs)
        intercept = Intercept(self.chain)
        with intercept:
            out = self.base(*args, **kwargs)
        if not intercept.seen:
            processor = type(self.module.processor).__name__
            raise TargetError(
                f"The attention processor {processor} does not use F.scaled_dot_product_attention, so the adapter cannot "
                "reach its core. Disable xformers and attention slicing, call model.set_attention_backend('native'), or "
                "model.set_attn_processor(AttnProcessor2_0()) of diffusers.models.attention_processor."
            )
        return out


class ProcessorPort:
    """diffusers' ``Attention`` and the newer modules with a ``processor``."""

    def opens(self, module: nn.Module) -> bool:
        return isinstance(module, Attention) or (
            type(module).__module__.startswith("diffusers.") and hasattr(module, "processor")
        )

    def install(self, patch: Patch, chain: Chain) -> None:
        patch.base = ProcessorCore(patch.module, patch.base, chain)

    def remove(self, patch: Patch) -> None:
        patch.base = patch.base.base  # type: ignore[attr-defined]
