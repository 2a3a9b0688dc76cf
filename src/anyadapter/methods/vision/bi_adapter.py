"""Bi-AdaptFormer and Bi-LoRA: adapters of a vision transformer whose weights have 1 bit each (or 2, 4, 8).

Jie, Wang and Deng 2023, arXiv 2307.16867 (card binary-adapters). At equal bytes a wide 1-bit adapter beats a narrow fp32 one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from anyadapter.core.adapter import Adapter, AdapterConfig, Branch
from anyadapter.core.errors import AttachError, TargetError
from anyadapter.core.host import Host, features, is_linear
from anyadapter.parts.bottleneck import plus
from anyadapter.parts.quantised import BITS, fake_quantise

FULL = 32  # bits of a number that is not quantised
FORMS = ("adaptformer", "lora")
UP_STD = 1e-3  # of the up-projection at the start, cut at twice that; from zero there would be nothing to round


@dataclass(frozen=True, kw_only=True)
class BiAdapterConfig(AdapterConfig):
    """Settings of a Bi-Adapter.

    Attributes:
        form: ``"adaptformer"``, U ReLU(D x) beside every feed-forward, or ``"lora"``, U D x beside every query and value.
        hidden: width h between D and U.
        bits: of a weight in D and U: 1, 2, 4, 8, or 32 for adapters that are not quantised.
        scale: s, what A(x) is multiplied by. The paper searches {0.01, 0.1, 1, 10, 100} for every task.
        dropout: probability, between D and U.
        head_classes: a new head for so many classes is trained along in the place of the base's; without it the base's stays.
        head_bits: of a weight in the new head, which then has no bias; 32 for an ordinary one with bias.
        pixel_mean, pixel_std: what images with values in [0, 1] are normalised by, channel by channel, before they reach
            the base; see :meth:`BiAdapter.normalise`. The paper's adapters take them as they are.
    """

    method: ClassVar[str] = "bi_adapter"
    form: str = "adaptformer"
    hidden: int = 32
    bits: int = 1
    scale: float = 1.0
    dropout: float = 0.1
    head_classes: int | None = None
    head_bits: int = 1
    pixel_mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    pixel_std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        self.require("form", self.form in FORMS, "'adaptformer' or 'lora'")
        self.require("hidden", type(self.hidden) is int and self.hidden >= 1, "a positive integer")
        for name in ("bits", "head_bits"):
            self.require(
                name, type(getattr(self, name)) is int and getattr(self, name) in (*BITS, FULL), "1, 2, 4, 8 or 32"
            )
        self.require("scale", math.isfinite(self.scale), "finite")
        self.require("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        classes = self.head_classes
        self.require("head_classes", classes is None or (type(classes) is int and classes >= 1), "positive or None")
        self.require("pixel_mean", all(map(math.isfinite, self.pixel_mean)), "finite numbers")
        same = len(self.pixel_std) == len(self.pixel_mean)
        self.require("pixel_std", same and all(0 < s < math.inf for s in self.pixel_std), "positive, one for each mean")


class BiAdapter(Adapter):
    """x' + MLP(LN x') + s · U ReLU(D x') in every layer, or q + s · U D u and v + s · U D u in every attention."""

    Config = BiAdapterConfig
    task: ClassVar[str] = "image_classification"
    capabilities = frozenset({"scale", "merge", "route"})
    groups = {"adapters": ("*adapter_down.weight", "*adapter_up.weight"), "head": ("*.head.weight", "*.head.bias")}
    config: BiAdapterConfig

    def setup(self, host: Host) -> None:
        config = self.config
        if not host.has("patch_embedding"):
            raise TargetError(
                f"A Bi-Adapter is for vision transformers, and {host.describe()} is no registered one. On other hosts attach "
                "a LoRAConfig or a BottleneckConfig and call anyadapter.quantize(adapter, bits=1)."
            )
        if config.form == "lora":
            width = self.beside_attention(host)
        else:
            width = self.beside_feed_forward(host)
            self.capabilities = self.capabilities - {"merge"}  # type: ignore[misc]  # for the ReLU
        if config.head_classes is not None:
            site = host.find("head")[-1]
            width = features(site.module)[0] if is_linear(site.module) else width
            self.at(site, Head(width, config.head_classes, config.head_bits))
            self.capabilities = self.capabilities - {"route"}  # type: ignore[misc]  # a new head answers for all rows

    def beside_feed_forward(self, host: Host) -> int:
        """Adapters that read what enters the second LayerNorm and add to what leaves the layer. Returns their width."""
        layers, norms = host.find("layer"), host.find("feed_forward_norm", types=(nn.LayerNorm,))
        if [layer.path for layer in layers] != [norm.path.rpartition(".")[0] for norm in norms]:
            raise TargetError(f"{host.describe()} has no LayerNorm before the feed-forward in each of its layers.")
        for layer, norm in zip(layers, norms):
            (width,) = norm.module.normalized_shape  # type: ignore[union-attr, misc]
            branch = BesideFeedForward(width, width, self.config)
            self.at(layer, branch)
            self.at(norm, branch.read)
        return width

    def beside_attention(self, host: Host) -> int:
        """Adapters at queries and values, also where one linear makes both along with the keys. Returns their width."""
        fused = host.has("self_attention.qkv")
        targets = "self_attention.qkv" if fused else ("self_attention.query", "self_attention.value")
        for site in host.find(targets, types=(nn.Linear,)):
            self.at(site, (BesideQueryAndValue if fused else BesideLinear)(*features(site.module), self.config))
        return features(site.module)[0]

    def normalise(self, images: Tensor) -> Tensor:
        """Images with values in [0, 1], (batch, channels, height, width), as this adapter's base is to be given them."""
        mean, std = (images.new_tensor(v)[:, None, None] for v in (self.config.pixel_mean, self.config.pixel_std))
        return (images - mean) / std


class DownUp(Branch):
    """A(x) = U dropout(act(D x)), without biases: D is (h, in), U is (out, h), act a ReLU or, in LoRA's form, nothing."""

    def __init__(self, width_in: int, width_out: int, config: BiAdapterConfig) -> None:
        super().__init__()
        self.adapter_down = nn.Linear(width_in, config.hidden, bias=False)
        self.adapter_up = nn.Linear(config.hidden, width_out, bias=False)
        self.activation = nn.ReLU() if config.form == "adaptformer" else nn.Identity()
        self.dropout, self.scaling = nn.Dropout(config.dropout), config.scale
        if config.bits == FULL:
            nn.init.zeros_(self.adapter_up.weight)
            return
        nn.init.trunc_normal_(self.adapter_up.weight, std=UP_STD, a=-2 * UP_STD, b=2 * UP_STD)
        for linear in (self.adapter_down, self.adapter_up):
            fake_quantise(linear, "weight", config.bits)

    def a(self, x: Tensor) -> Tensor:
        """x: (…, in) → A(x), (…, out), in the dtype of the weights."""
        x = x.to(next(self.parameters()).dtype)
        return self.adapter_up(self.dropout(self.activation(self.adapter_down(x))))

    def product(self) -> Tensor:
        """s · U D, (out, in), in fp32."""
        return self.adapter_up.weight.float() @ self.adapter_down.weight.float() * (self.scaling * self.scale)


class BesideLinear(DownUp):
    """y = call(x) + s · A(x)."""

    def forward(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """x: (…, in) → (…, out)."""
        out = call(x)
        return (out + self.a(x) * (self.scaling * self.strength(out))).to(out.dtype)

    def weight_delta(self, module: nn.Module) -> Tensor:
        """s · U D, (out, in), in fp32."""
        return self.product()


class BesideQueryAndValue(Branch):
    """(q, k, v) = call(x) + (s · A_q(x), 0, s · A_v(x)), in the thirds of the output."""

    def __init__(self, width_in: int, width_out: int, config: BiAdapterConfig) -> None:
        super().__init__()
        self.lora_q = BesideLinear(width_in, width_out // 3, config)
        self.lora_v = BesideLinear(width_in, width_out // 3, config)

    def forward(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """x: (…, in) → (…, 3 · out)."""
        out = call(x)
        query, value = self.lora_q.a(x), self.lora_v.a(x)
        delta = torch.cat([query, torch.zeros_like(query), value], dim=-1)
        return (out + delta * (self.lora_q.scaling * self.strength(out))).to(out.dtype)

    def weight_delta(self, module: nn.Module) -> Tensor:
        """s · (U D of the queries, 0, U D of the values), (3 · out, in), in fp32."""
        query, value = self.lora_q.product(), self.lora_v.product()
        return torch.cat([query, torch.zeros_like(query), value]) * self.scale


class BesideFeedForward(DownUp):
    """At a layer: out = call(x) + s · A(x'), with x' what its second LayerNorm is given.

    The branch goes to the layer, and its :meth:`read` to that norm. So A reads what is not normalised, and its output is
    added outside whatever the layer does to its feed-forward's, such as dropping it for some rows in training.
    """

    residual: Tensor | None = None

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the layer takes and gives; x' and the first output are (batch, tokens, width)."""
        out = call(*args, **kwargs)
        x, self.residual = self.residual, None
        if x is None:
            raise TargetError(
                "The layer has not called the LayerNorm before its feed-forward, whose input the adapter reads."
            )
        return plus(out, self.a(x) * (self.scaling * self.strength(x)))

    def read(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Remember what the norm is given."""
        self.residual = x
        return call(x)


class Head(Branch):
    """A new classifier that runs in the place of the base's."""

    replaces = True

    def __init__(self, width: int, classes: int, bits: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, classes, bias=bits == FULL)
        if bits != FULL:
            fake_quantise(self.head, "weight", bits)

    def forward(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """x: (…, width) → (…, classes)."""
        return self.head(x.to(next(self.parameters()).dtype)).to(x.dtype)

    def weight_delta(self, module: nn.Module) -> Tensor:
        """The difference of the two weights. Raises :class:`AttachError` when they are of different shapes."""
        return difference(self.head.weight, module.weight, module)

    def bias_delta(self, module: nn.Module) -> Tensor | None:
        """The difference of the two biases; the base's goes where the new head has none."""
        if getattr(module, "bias", None) is None:
            if self.head.bias is None:
                return None
            raise AttachError(f"The new head has a bias and the base's {module} has none to merge it into.")
        return difference(
            self.head.bias if self.head.bias is not None else torch.zeros_like(module.bias), module.bias, module
        )  # type: ignore[arg-type]


def difference(mine: Tensor, theirs: Any, module: nn.Module) -> Tensor:
    if mine.shape != theirs.shape:
        raise AttachError(f"The new head {tuple(mine.shape)} cannot be merged into the base's {module}.")
    return mine.float() - theirs.float()
