"""From the features of an image to a few tokens of a language model (LLaMA-Adapter V2: Gao et al. 2023, arXiv 2304.15010)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyadapter.core.errors import SignalError


class VisualTokens(nn.Module):
    """LayerNorm(W Z), with Z the first K tokens of a small transformer over [queries; LayerNorm(W' features)].

    The queries are learnt; the K tokens are what they have gathered. Names and sizes are those of the authors' files.

    Args:
        features: width of a token of the image encoder.
        out: width d of the language model.
        length: number K of tokens.
        width, depth, heads, ratio: of the transformer.
    """

    def __init__(
        self,
        features: int,
        out: int,
        length: int,
        width: int = 768,
        depth: int = 8,
        heads: int = 16,
        ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.features, self.length = features, length
        self.clip_proj, self.clip_proj_norm = nn.Linear(features, width), nn.LayerNorm(width)
        self.visual_query = nn.Embedding(length, width)
        self.visual_blocks = nn.ModuleList(Block(width, heads, int(width * ratio)) for _ in range(depth))
        self.visual_proj, self.visual_proj_norm = nn.Linear(width, out), nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, tokens, features) → (batch, K, d)."""
        seen = self.clip_proj_norm(self.clip_proj(x))
        z = torch.cat([self.visual_query.weight.expand(len(x), -1, -1), seen], dim=1)
        for block in self.visual_blocks:
            z = block(z)
        return self.visual_proj_norm(self.visual_proj(z[:, : self.length]))


class Block(nn.Module):
    """A pre-norm transformer layer of a ViT, with timm's names."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, tokens, width) → the same."""
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v)
        x = x + self.attn["proj"](heads.transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class VisualVector(nn.Module):
    """W₂ silu(W₁ features): one vector of global features as one vector of the language model (1st paper, equation 9).

    The authors released no code of it: two layers and their activation are a reconstruction.
    """

    def __init__(self, features: int, out: int, width: int = 768) -> None:
        super().__init__()
        self.features = features
        self.inner, self.outer = nn.Linear(features, width), nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, 1, features) → (batch, 1, d)."""
        return self.outer(F.silu(self.inner(x)))


@dataclass(frozen=True, eq=False)
class Seen:
    """The images of a call, as tokens.

    Attributes:
        given: the features they were made of.
        versions: of the tensors that made them.
        tokens: (batch or 1, K, d), zero in rows without an image; None where no row has one.
        present: (batch,), which rows have one; None for all.
    """

    given: Any
    versions: list[int]
    tokens: Tensor | None
    present: Tensor | None

    def of(self, visual: nn.Module, given: Any) -> bool:
        """Whether it is what ``visual``, as it is now, makes of ``given``."""
        return self.given is given and self.versions == [p._version for p in visual.parameters()]


def see(visual: VisualTokens | VisualVector, given: Any) -> Seen:
    """Tokens of the images of a call.

    Args:
        given: (batch or 1, tokens, features), or for one vector an image (batch or 1, features); a list of images for each
            row, None in rows without one; or None.

    Raises:
        SignalError: an image has another shape.
    """
    rows = [None if row is None else torch.as_tensor(row) for row in ([None] if given is None else given)]
    images = [row[None] if row.dim() == 1 else row for row in rows if row is not None]
    wanted = (1 if isinstance(visual, VisualVector) else len(images[0]) if images else 0, visual.features)
    for image in images:
        if image.shape != wanted:
            raise SignalError(
                f"An image's features are {tuple(image.shape)}; expected {wanted}, for every image of a batch."
            )
    weight = next(visual.parameters())
    tokens, present = visual(torch.stack(images).to(weight)) if images else None, None
    if tokens is not None and len(images) < len(rows):
        present = torch.tensor([row is not None for row in rows], device=weight.device)
        tokens = tokens.new_zeros(len(rows), *tokens.shape[1:]).index_put((present.nonzero()[:, 0],), tokens)
    return Seen(given, [p._version for p in visual.parameters()], tokens, present)


@torch.no_grad()
def clip_features(vision: Any, pixel_values: Tensor) -> Tensor:
    """What the authors take from CLIP: all tokens, normalised and projected, (batch, 1 + patches, features).

    The released weights were trained on images with their channels in the order blue, green, red, under CLIP's
    normalisation for red, green, blue: ``pixel_values.flip(1)`` before normalising is what they expect.

    Args:
        vision: a ``CLIPVisionModelWithProjection`` of transformers; theirs is ``openai/clip-vit-large-patch14``.
        pixel_values: (batch, 3, height, width), normalised.
    """
    tokens = vision.vision_model(pixel_values=pixel_values).last_hidden_state
    return vision.visual_projection(vision.vision_model.post_layernorm(tokens))
