"""IP-Adapter: an image prompt beside the text prompt of a frozen diffusion model.

Ye et al. 2023, "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models", arXiv 2308.06721.
The base variant: the global embedding of a CLIP image encoder becomes a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from anyadapter.core.adapter import Adapter, AdapterConfig, escape
from anyadapter.core.attention import attend
from anyadapter.core.errors import SignalError, TargetError
from anyadapter.core.host import Host, features


@dataclass(frozen=True, kw_only=True)
class IPAdapterConfig(AdapterConfig):
    """Settings of IP-Adapter.

    Attributes:
        image_width: width of the image encoder's embedding: 1024 of OpenCLIP ViT-H/14, 1280 of ViT-bigG/14.
        tokens: how many tokens an image becomes.
    """

    method: ClassVar[str] = "ip_adapter"
    image_width: int = 1024
    tokens: int = 4

    def __post_init__(self) -> None:
        for name in ("image_width", "tokens"):
            value = getattr(self, name)
            self.require(name, isinstance(value, int) and value >= 1, "a positive integer")


class ImageProjection(nn.Module):
    """An image embedding to N tokens: LayerNorm(reshape(W e + b)) (section 3.2.1).

    e: (batch, image_width) → (batch, N, width), where width is that of the text tokens.
    """

    def __init__(self, image_width: int, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(image_width, tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, embeds: Tensor) -> Tensor:
        return self.norm(self.proj(embeds).unflatten(-1, (self.tokens, -1)))


class ImageAttention(nn.Module):
    """W'k and W'v of one layer: the keys and values of the image tokens (eq. 4). They start as the layer's Wk and Wv."""

    def __init__(self, key: nn.Module, value: nn.Module) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(*features(key), bias=False)
        self.to_v_ip = nn.Linear(*features(value), bias=False)
        with torch.no_grad():
            self.to_k_ip.weight.copy_(key.weight)  # type: ignore[arg-type]
            self.to_v_ip.weight.copy_(value.weight)  # type: ignore[arg-type]

    def forward(self, q: Tensor, tokens: Tensor, scaling: float | None) -> Tensor:
        """softmax(q K'ᵀ · scaling) V'. q: (batch, heads, queries, d), tokens: (batch, N, width) → like q."""
        tokens = tokens.to(self.to_k_ip.weight.dtype)
        k, v = (
            project(tokens).unflatten(-1, (q.shape[1], -1)).transpose(1, 2).to(q.dtype)
            for project in (self.to_k_ip, self.to_v_ip)
        )
        return attend(q, k, v, scaling=scaling)


class IPAdapter(Adapter):
    """Z = softmax(Q Kᵀ / √d) V + λ · softmax(Q K'ᵀ / √d) V' in every cross-attention (eq. 5, 8); λ is ``scale``.

    Reads the signal ``image_tokens``, which :meth:`tokens` makes: one row for each row of the call, or, where several
    such adapters are attached, a dictionary of these by adapter name.
    """

    Config = IPAdapterConfig
    reads = ("image_tokens",)
    capabilities = frozenset({"scale", "average", "route"})
    config: IPAdapterConfig

    def setup(self, host: Host) -> None:
        cores = host.find("cross_attention", kind="attention")
        keys, values = host.find("cross_attention.key"), host.find("cross_attention.value")
        widths = {features(site.module)[0] for site in keys}
        if len(widths) > 1:
            raise TargetError(
                f"The text tokens of {host.describe()} have different widths in different layers: {sorted(widths)}."
            )
        self.width = widths.pop()
        self.image_proj = ImageProjection(self.config.image_width, self.config.tokens, self.width)
        for core, key, value in zip(cores, keys, values, strict=True):
            layer = ImageAttention(key.module, value.module)
            self.branches[escape(core.path)] = layer
            self.at(core, partial(self.attend_image, layer))

    def tokens(self, image_embeds: Tensor, *, guidance: bool = False) -> Tensor:
        """The tokens of images, for the signal ``image_tokens``.

        Args:
            image_embeds: (batch, image_width), the projected embedding of the image encoder (``image_embeds`` of
                ``CLIPVisionModelWithProjection``). A row of zeros stands for "no image", as dropped in training.
            guidance: put the tokens of "no image" in front, for a call whose first half is unconditional, as
                pipelines make with classifier-free guidance. They are not zeros.

        Returns:
            (batch, tokens, width), or (2 · batch, tokens, width) with guidance.

        Raises:
            SignalError: the embedding has another shape, so comes from another encoder.
        """
        width = self.config.image_width
        if image_embeds.dim() != 2 or image_embeds.shape[1] != width:
            raise SignalError(
                f"image_embeds is {tuple(image_embeds.shape)}; {self.describe()} takes (batch, {width}). Use the image "
                "encoder it was trained with, and its projected embedding, not its hidden states."
            )
        if guidance:
            image_embeds = torch.cat([torch.zeros_like(image_embeds), image_embeds])
        weight = self.image_proj.proj.weight
        return self.image_proj(image_embeds.to(weight.device, weight.dtype))

    def attend_image(
        self,
        layer: ImageAttention,
        call: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        **options: Any,
    ) -> Tensor:
        """The text's heads and, weighted, the image's: (batch, heads, queries, d)."""
        heads = call(q, k, v, mask, **options)
        if self.scale == 0:
            return heads
        image = layer(q, self.image_tokens(q.shape[0]), options.get("scaling"))
        return heads + (self.strength(heads) * image).to(heads.dtype)

    def image_tokens(self, batch: int) -> Tensor:
        """This adapter's tokens for a call of ``batch`` rows. Raises :class:`SignalError` when they do not fit."""
        tokens = self.signal("image_tokens")
        if isinstance(tokens, Mapping):
            if self.name not in tokens:
                raise SignalError(f"image_tokens holds tokens for {sorted(tokens)}, none for {self.describe()}.")
            tokens = tokens[self.name]
        if tokens.dim() != 3 or tokens.shape[-1] != self.width or tokens.shape[0] != batch:
            raise SignalError(
                f"image_tokens is {tuple(tokens.shape)}; {self.describe()} needs ({batch}, tokens, {self.width}) in this "
                "call. With classifier-free guidance use adapter.tokens(embeds, guidance=True); repeat the rows of embeds "
                "where one image serves several samples, and those of the tokens where it serves several frames."
            )
        return tokens

    def describe(self) -> str:
        """Class and name, for messages."""
        return f"{type(self).__name__} {self.name!r}"
