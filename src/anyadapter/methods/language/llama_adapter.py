"""LLaMA-Adapter, V1 and V2: what a frozen language model needs to follow instructions and to see, absent until it is learnt.

V1 (Zhang et al. 2023, arXiv 2303.16199): at each of the last L layers the queries of the text attend to K learnt prompts by
a softmax of their own; the result, times a gate per head that starts at zero, is added to the heads. The prompts have no
positions and stay out of the cache.

V2 (Gao et al. 2023, arXiv 2304.15010): beside it a bias and a scale at every linear, the weights of the normalisations, if
wanted LoRA, and what an image shows: as keys and values of the first layer with a gate of their own (``"early"``, the
paper's) or added to the prompts (``"late"``, the released model's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from anyadapter.core.adapter import Adapter, AdapterConfig, Branch, Targets
from anyadapter.core.attention import attend, key_heads
from anyadapter.core.errors import ConfigError, SignalError, TargetError, near
from anyadapter.core.host import Host, as_tuple, features
from anyadapter.core.site import Site
from anyadapter.parts.affine import Affine, Unlocked
from anyadapter.parts.low_rank import LowRank
from anyadapter.parts.visual_tokens import Seen, VisualTokens, VisualVector, see

ATTENTION = tuple(f"self_attention.{name}" for name in ("query", "key", "value", "output"))
FEED_FORWARD = tuple(f"feed_forward.{name}" for name in ("gate", "down", "up"))
LINEARS = ATTENTION + FEED_FORWARD
NORMS = ("attention_norm", "feed_forward_norm", "final_norm")
BIASED = (ATTENTION[0], ATTENTION[3], *FEED_FORWARD)  # in the released multimodal models
FEATURES = "visual_features"

# What the authors published, and what the second paper describes (card, section 4.6).
PRESETS: dict[str, dict[str, Any]] = {
    "v1": {},
    "v1-mm": {"visual": "vector"},
    "v2-chat": {"length": 0, "biases": LINEARS, "scales": LINEARS, "scale_position": "input", "norms": NORMS},
    "v2-mm": {"last_layers": -1, "biases": BIASED, "norms": NORMS, "visual": "late"},
    "v2-paper": {
        "last_layers": -1,
        "biases": LINEARS,
        "scales": LINEARS,
        "norms": NORMS,
        "visual": "early",
        "visual_length": 20,
    },
    "imagebind-llm": {
        "length": 1,
        "last_layers": "all",
        "biases": BIASED,
        "norms": NORMS,
        "lora_rank": 16,
        "visual": "vector",
        "visual_features": 1024,
    },
}
PRESETS["v2-mm-lora"] = {**PRESETS["v2-mm"], "lora_rank": 16, "prompt_lora": False, "new_gate": True}


@dataclass(frozen=True, kw_only=True)
class LlamaAdapterConfig(AdapterConfig):
    """Settings of LLaMA-Adapter; the default is V1. :meth:`preset` has the published ones.

    Attributes:
        length: number K of prompts in a layer; 0 for none.
        last_layers: number L of layers that get them, counted from the last; negative: all but so many of the first;
            ``"all"``; by default all but the first two, the paper's 30 of 32.
        activation: what the gate passes through. The authors trained with ``"tanh"``; their inference code and the paper's
            equation 7 have none (``"identity"``). Use an adapter with the one it was trained with.
        gate: one gate per ``"head"``, or one per ``"layer"`` as in the authors' first release.
        new_gate: a second factor per layer, 1 at first, as in the authors' models with LoRA.
        biases, scales: linears with a learnt bias, and with a learnt scale for each feature.
        scale_position: of the scale: ``"output"``, y = s ⊙ (W x + b), as in the paper, or ``"input"``, y = W (s ⊙ x) + b, as
            in the published chat model.
        norms: normalisations whose weights are trained.
        lora_rank: of low-rank updates beside ``lora_targets``; 0 for none.
        lora_targets: linears to update so.
        prompt_lora: whether the prompts pass the updates of W_k and W_v as the text does; in the released multimodal models
            they do not.
        visual: how images enter: ``"early"``, ``"late"`` or ``"vector"``, one global vector added to all prompts; by
            default there are none. The features come as the signal ``visual_features``.
        visual_features: width of the signal's last axis.
        visual_length: number of visual tokens; by default as many as prompts, which ``"late"`` needs.
        visual_width, visual_depth, visual_heads, visual_ratio: of the transformer that makes them; ``"vector"`` has the
            width only.
    """

    method: ClassVar[str] = "llama_adapter"
    length: int = 10
    last_layers: int | Literal["all"] | None = None
    activation: Literal["tanh", "identity"] = "tanh"
    gate: Literal["head", "layer"] = "head"
    new_gate: bool = False
    biases: Targets = ()
    scales: Targets = ()
    scale_position: Literal["output", "input"] = "output"
    norms: Targets = ()
    lora_rank: int = 0
    lora_targets: Targets = LINEARS
    prompt_lora: bool = True
    visual: Literal["early", "late", "vector"] | None = None
    visual_features: int = 768
    visual_length: int | None = None
    visual_width: int = 768
    visual_depth: int = 8
    visual_heads: int = 16
    visual_ratio: float = 4.0

    def __post_init__(self) -> None:
        self.require("length", isinstance(self.length, int) and self.length >= 0, "a number of prompts, or 0")
        layers = self.last_layers
        ok = layers in (None, "all") or (isinstance(layers, int) and layers != 0)
        self.require("last_layers", ok, "a number of layers, a negative number of layers to leave out, 'all' or None")
        self.require("activation", self.activation in ("tanh", "identity"), "'tanh' or 'identity'")
        self.require("gate", self.gate in ("head", "layer"), "'head' or 'layer'")
        self.require("scale_position", self.scale_position in ("output", "input"), "'output' or 'input'")
        self.require("lora_rank", isinstance(self.lora_rank, int) and self.lora_rank >= 0, "a rank, or 0")
        anything = self.length or self.biases or self.scales or self.norms or self.lora_rank or self.visual
        self.require(
            "length", bool(anything), "positive where there are no biases, scales, norms, LoRA or visual tokens"
        )
        self.check_visual()

    def check_visual(self) -> None:
        """Raise a :class:`ConfigError` unless the visual settings fit together."""
        self.require("visual", self.visual in (None, "early", "late", "vector"), "'early', 'late', 'vector' or None")
        for name in ("visual_features", "visual_width", "visual_heads"):
            self.require(name, getattr(self, name) >= 1, "positive")
        self.require("visual_depth", self.visual_depth >= 0, "a number of layers")
        if self.visual in ("late", "vector"):
            self.require("length", self.length >= 1, "positive, as images are added to the prompts")
        if self.visual == "late":
            self.require(
                "visual_length", self.visual_length in (None, self.length), f"{self.length}, that of the prompts"
            )
        if self.visual == "early":
            self.require("visual_length", (self.visual_length or self.length) >= 1, "positive")
        if self.visual in ("early", "late"):
            self.require("visual_width", self.visual_width % self.visual_heads == 0, "a multiple of visual_heads")

    def layers_of(self, every: int) -> int:
        """How many of a model's layers get prompts."""
        if self.last_layers == "all":
            return every
        layers = -2 if self.last_layers is None else self.last_layers
        return layers if layers > 0 else max(1, every + layers)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LlamaAdapterConfig:
        """One of :data:`PRESETS`, with changes. Raises :class:`ConfigError` when there is no such preset."""
        if name not in PRESETS:
            raise ConfigError(f"LLaMA-Adapter has no preset {name!r}. {near(name, PRESETS)}")
        return cls(**{**PRESETS[name], **changes})


class LlamaAdapter(Adapter):
    """heads = softmax(q kᵀ + mask) v + act(g) · softmax(q p_kᵀ) p_v, with p_k = W_k P, p_v = W_v P, in the last L layers.

    At every chosen linear y = s ⊙ (W x + B A x + b), or y = W (s ⊙ x) + B A (s ⊙ x) + b; in the chosen normalisations a weight
    of their own. The prompts pass W_k and W_v as the text does, with what is learnt there.

    Its groups are what the papers train apart: ``visual`` on captions, the others on instructions. The released multimodal
    models train ``visual`` and ``prompts`` first, then ``norms`` and ``biases``.
    """

    Config = LlamaAdapterConfig
    reads: ClassVar[tuple[str, ...]] = (FEATURES,)
    capabilities = frozenset({"scale", "average", "route"})
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "prompts": ("adapter_query.*", "*.gate", "*.new_gate"),
        "norms": ("*.norm.*",),
        "biases": ("*.affine.bias",),
        "scales": ("*.affine.factor",),
        "lora": ("*.lora_?.weight",),
        "visual": ("visual.*", "early_gate"),
    }
    config: LlamaAdapterConfig
    idle_gates: Tensor | None

    def setup(self, host: Host) -> None:
        config = self.config
        self.place_linears(host)
        for site in host.find(config.norms) if config.norms else ():
            self.at(site, Unlocked(site.module))
        if config.length:
            self.place_prompts(host)
        if config.visual:
            self.place_visual(host)
        else:
            self.reads = ()  # type: ignore[misc]

    def place_linears(self, host: Host) -> None:
        """LoRA innermost, then scale and bias, so that these act on the updated linear."""
        config = self.config
        for site in host.find(config.lora_targets) if config.lora_rank else ():
            widest = max(features(site.module))
            config.require("lora_rank", config.lora_rank <= widest, f"at most {widest}, the width of {site.path}")
            self.at(site, LowRank(site.module, config.lora_rank, scaling=1.0))
        biased, scaled = (
            {site.path for site in host.find(targets)} if targets else set()
            for targets in (config.biases, config.scales)
        )
        for site in host.find((*as_tuple(config.biases), *as_tuple(config.scales))) if biased | scaled else ():
            scale = config.scale_position if site.path in scaled else None
            self.at(site, Affine(site.module, site.path in biased, scale), "affine")

    def place_prompts(self, host: Host) -> None:
        config = self.config
        every = host.find("self_attention", kind="attention")
        count = config.layers_of(len(every))
        config.require("last_layers", count <= len(every), f"at most {len(every)}, the layers of {host.describe()}")
        if config.visual == "early":
            config.require(
                "last_layers", count < len(every), "fewer than all: images enter the first layer by themselves"
            )
        sites = every[-count:]
        borrowed = [projections(host, site) for site in sites]
        width = features(borrowed[0][0])[0]
        for site, (key, _, _) in zip(sites, borrowed):
            if features(key)[0] != width:
                raise TargetError(
                    f"{site.path} reads {features(key)[0]} features, {sites[0].path} {width}; expected one width."
                )
        self.adapter_query = nn.Embedding(count * config.length, width)  # layer after layer, as in the authors' files
        for i, site in enumerate(sites):
            shape = gate_shape(host, site, config)
            prompts = partial(self.prompts, i)
            aside = () if config.prompt_lora else self.updates_of(borrowed[i], host)
            self.at(site, GatedPrefix(prompts, *borrowed[i], shape, config.activation, config.new_gate, aside))
        # The authors' files hold a gate for every layer. Those below the last L act on nothing; we keep them for the way back.
        idle = torch.zeros(len(every) - count, *shape) if len(every) > count else None
        self.register_buffer("idle_gates", idle)
        if config.new_gate:
            self.register_buffer("idle_new_gates", None if idle is None else torch.ones(len(idle), *NEW_GATE))

    def updates_of(self, borrowed: Borrowed, host: Host) -> tuple[LowRank, ...]:
        """Its own low-rank updates of a layer's keys and values."""
        placed = ((host.modules[p.path], p.branch) for p in self.placements if isinstance(p.branch, LowRank))
        return tuple(branch for module, branch in placed if any(module is each for each in borrowed))

    def place_visual(self, host: Host) -> None:
        config = self.config
        first = host.find("self_attention", kind="attention")[0]
        self.borrowed = projections(host, first)  # in a tuple, so that they do not become tensors of the adapter
        width = features(self.borrowed[0])[0]
        if config.visual == "vector":
            self.visual: Any = VisualVector(config.visual_features, width, config.visual_width)
        else:
            sizes = (config.visual_width, config.visual_depth, config.visual_heads, config.visual_ratio)
            self.visual = VisualTokens(config.visual_features, width, config.visual_length or config.length, *sizes)
        if config.visual == "early":
            self.early_gate = nn.Parameter(torch.zeros(gate_shape(host, first, config)))
            self.at(first, self.fuse)
        self.at(Site("", host.model), self.look)

    # ------------------------------------------------------------------ prompts

    def prompts(self, index: int) -> Tensor:
        """P of the ``index``-th of the last L layers: (1, K, d), or (batch, K, d) where images are added."""
        length = self.config.length
        own = self.adapter_query.weight[None, index * length : (index + 1) * length]
        seen = self.seen if self.config.visual in ("late", "vector") else None
        return own if seen is None else own + seen[0]

    # ------------------------------------------------------------------ images

    def look(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Round the whole model: make the call's images tokens before a layer runs, once for all that read them.

        Without gradients they are kept for the calls that follow in the same block of signals, as when text is generated.
        """
        given, known = self.signal(FEATURES), self.signals.values.get(self.place_of_seen)
        if torch.is_grad_enabled() or known is None or not known.of(self.visual, given):
            self.signals.values[self.place_of_seen] = see(self.visual, given)
        return call(*args, **kwargs)

    @property
    def place_of_seen(self) -> str:
        """Among the signals, which end with the block that set them."""
        return f"{self.name}.{FEATURES}"

    @property
    def seen(self) -> tuple[Tensor, Tensor | None] | None:
        """The tokens of the call's images and which rows have one, or None where none has."""
        found: Seen | None = self.signals.values.get(self.place_of_seen)
        found = found or see(self.visual, self.signal(FEATURES))  # a part of the model is called by itself
        return None if found.tokens is None else (found.tokens, found.present)

    def fuse(
        self, call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any
    ) -> Tensor:
        """In the first layer: the queries attend to the image by a softmax and a gate of their own (``"early"``)."""
        heads = call(q, k, v, mask, **options)
        if (seen := self.seen) is None:
            return heads
        tokens, present = seen
        gate = self.strength(heads) * opened(self.early_gate, self.config.activation)
        if present is not None:
            gate = gate * present.view(-1, 1, 1, 1)
        shown = look_up(tokens, self.borrowed, q, options.get("scaling"), self.rows)
        return heads + gate.to(heads) * shown.to(heads)


class GatedPrefix(Branch):
    """call(q, k, v) + scale · act(g) · softmax(q p_kᵀ · scaling) p_v (equations 5 to 8 of the first paper).

    p_k = W_k P and p_v = W_v P by the layer's own frozen projections, which other adapters may wrap. P passes neither the
    layer's input norm nor the rotation, and every query sees all of it. g starts at zero: a fresh branch changes nothing.

    Args:
        prompts: gives P, (1 or batch, K, d).
        key, value: the layer's projections; they stay the host's.
        key_norm: the layer's norm of each head's keys, if it has one; it is applied to p_k.
        shape: of the gate, (1, heads, 1, 1) or (1,).
        new_gate: multiply act(g) by a second learnt factor, which starts at 1.
        aside: updates of the projections that P does not pass.
    """

    def __init__(
        self,
        prompts: Callable[[], Tensor],
        key: nn.Module,
        value: nn.Module,
        key_norm: nn.Module | None,
        shape: tuple[int, ...],
        activation: str,
        new_gate: bool = False,
        aside: tuple[LowRank, ...] = (),
    ) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(shape))
        self.new_gate = nn.Parameter(torch.ones(NEW_GATE)) if new_gate else None
        self.activation = activation
        self.prompts = prompts
        self.borrowed = (key, value, key_norm)  # in a tuple, so that they do not become tensors of the adapter
        self.aside = aside

    def forward(
        self, call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any
    ) -> Tensor:
        """q: (batch, heads, queries, head_dim) → the same shape."""
        heads = call(q, k, v, mask, **options)
        gate = self.strength(heads) * self.opening()
        with without(self.aside):
            found = look_up(self.prompts(), self.borrowed, q, options.get("scaling"), self.rows)
        return heads + gate.to(heads) * found.to(heads)

    def opening(self) -> Tensor:
        """act(g), times the second factor if there is one: (1, heads, 1, 1) or (1,)."""
        gate = opened(self.gate, self.activation)
        return gate if self.new_gate is None else gate * self.new_gate

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


# ---------------------------------------------------------------------- what the parts share

NEW_GATE = (1, 1, 1, 1)  # its shape
Borrowed = tuple[nn.Module, nn.Module, nn.Module | None]


@contextmanager
def without(branches: tuple[Branch, ...]) -> Iterator[None]:
    """Inside the block these branches do nothing."""
    before = [branch.scale for branch in branches]
    try:
        for branch in branches:
            branch.scale = 0.0
        yield
    finally:
        for branch, scale in zip(branches, before):
            branch.scale = scale


def opened(gate: Tensor, activation: str) -> Tensor:
    """act(g)."""
    return gate.tanh() if activation == "tanh" else gate


def look_up(prompts: Tensor, borrowed: Borrowed, q: Tensor, scaling: float | None, rows: Tensor | None) -> Tensor:
    """softmax(q p_kᵀ · scaling) p_v for each row of q: (batch, heads, queries, head_dim) → the same.

    One prompt alone has all the weight; so there are no keys to compute.

    Raises:
        SignalError: the prompts are of images of another number of rows.
    """
    if len(prompts) not in (1, len(q)):
        raise SignalError(
            f"{FEATURES!r} has {len(prompts)} rows, this call's batch {len(q)}; expected one image for all, or one for each "
            "row (repeat them for beams and choices)."
        )
    key, value, key_norm = borrowed
    prompts = prompts.to(q)
    if rows is not None:  # adapters at these projections act on each row in its own way
        prompts = prompts.expand(len(q), -1, -1)
    p_v = split(value(prompts), q)
    if prompts.shape[1] == 1:
        return p_v.repeat_interleave(q.shape[1] // p_v.shape[1], dim=1).expand_as(q)
    p_k = split(key(prompts), q)
    if key_norm is not None:
        p_k = key_norm(p_k)
    return attend(q, p_k, p_v, scaling=scaling)


def split(x: Tensor, q: Tensor) -> Tensor:
    """Heads as wide as those of ``q``, for each row of it: (1 or batch, K, d) → (batch, heads, K, head_dim)."""
    x = x.unflatten(-1, (-1, q.shape[-1])).transpose(1, 2)
    return x.expand(q.shape[0], -1, -1, -1)


def gate_shape(host: Host, site: Site, config: LlamaAdapterConfig) -> tuple[int, ...]:
    """Of a gate per head of the queries, or per layer."""
    heads = features(inside(host, site, "self_attention.query"))[1] // key_heads(site.module)[1]
    return (1, heads, 1, 1) if config.gate == "head" else (1,)


def projections(host: Host, site: Site) -> Borrowed:
    """To keys and to values, and the norm of each head's keys where there is one (Qwen3, Gemma 3), which its queries expect."""
    key, value = (inside(host, site, f"self_attention.{name}") for name in ("key", "value"))
    return key, value, getattr(site.module, "k_norm", None)


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


# ---------------------------------------------------------------------- expert models, which need no training


def expert_context(image: Any, experts: Mapping[str, Callable[[Any], str]]) -> str:
    """What expert models say of an image, as the input of an instruction (second paper, section 4.4): a line for each.

    The paper's experts are a captioner, an OCR and a search engine; any callable will do. An expert that says nothing is
    left out::

        context = expert_context(image, {"Caption": captioner, "Text in the image": ocr})
        prompt = alpaca("What is this shop called?", context)  # of anyadapter.training.causal_lm
    """
    said = ((name, " ".join(expert(image).split())) for name, expert in experts.items())
    return "\n".join(f"{name}: {text}" for name, text in said if text)
