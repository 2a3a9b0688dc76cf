"""Mixture-of-Domain-Adapters: memories of domains beside the feed-forward of a few layers, mixed by a gate.

Diao et al. 2023, arXiv 2306.05406. With u the inner activation of a feed-forward, F = W2 u + b2 its output and K_k a
bottleneck on u for domain k, the sub-layer gives Σ w_k K_k + w_F F, before the residual is added. Stage 1 trains a domain's
K on unlabelled text (:meth:`MixDA.sampling_loss` beside the masked language model); stage 2 trains the gate, a small task
adapter on the mixed output and a head on labelled text, over frozen domains that may come from several stage-1 runs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from anyadapter.core.adapter import Adapter, AdapterConfig, Targets, check_tensors
from anyadapter.core.attach import attach
from anyadapter.core.errors import ConfigError, TargetError, near
from anyadapter.core.host import Host
from anyadapter.core.site import Site
from anyadapter.parts.bottleneck import After, InBlock, widths
from anyadapter.parts.mixture import Gate, Mixture, Shared, TokenGate, dropout_of, mean_of_tokens, recorded
from anyadapter.parts.whole import place_whole

FFN = "ffn"  # the name of the feed-forward among the domains
LAYERS = (7, 11)  # of RoBERTa-large's 24, in the paper
REDUCTION = 16  # of the widths that domain and task adapters read, unless a width is given
POOLS = ("last_token", "last", "mean")
TASK_READS: dict[str, Literal["norm", "output"]] = {"pfeiffer": "norm", "houlsby": "output"}


@dataclass(frozen=True, kw_only=True)
class MixDAConfig(AdapterConfig):
    """Settings of MixDA.

    Attributes:
        domains: names, one adapter each; by default one called "domain", or those of ``sources``. With none, there is
            only the task adapter.
        layers: indices of the layers that remember; by default 7 and 11 or those of ``sources``, negative from the last.
        width: of the domain adapters; by default a 16th of the feed-forward's inner width.
        gate: ``"code"``, the authors' code: softmax of an MLP on one position of u, the same for all tokens of a row;
            ``"paper"``: sigmoid of an MLP on the feed-forward's input, for each token; None: the one domain adapter
            replaces the feed-forward (the ablation "-MoA").
        pool: the position that the gate of the code reads: ``"last_token"``, the last that is no padding; ``"mean"``, over
            those; ``"last"``, padding or not, as the authors' code does, so that padding changes the result.
        gate_width, gate_layers, gate_dropout: of the gate's MLP; the paper's has one hidden layer and no dropout.
        ffn_logit: how much the feed-forward is ahead of the domains at the start; 5 makes it weigh 0.99 beside one domain.
        task_adapter: ``"pfeiffer"`` or ``"houlsby"``, in every layer, on the mixed output. Adapters of other methods may be
            attached on top.
        task_width: its width; by default a 16th of the model's.
        whole: modules trained as a whole, such as a new head.
        sources: folders of adapters saved in stage 1, or names of attached ones, whose domains this one starts with, side
            by side; of a single one the gate too, where it has the same shape. They are read once: what is saved holds
            them.
        knowledge_weight: λ in the loss of stage 1, λ · L_K + L_S.
        sampling: how L_S sums squares: ``"mean"`` over tokens and features, or ``"sum"`` over those of a row.
    """

    method: ClassVar[str] = "mixda"
    domains: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    width: int | None = None
    gate: str | None = "code"
    pool: str = "last_token"
    gate_width: int = 768
    gate_layers: int = 3
    gate_dropout: float = 0.2
    ffn_logit: float = 0.0
    task_adapter: str | None = None
    task_width: int | None = None
    whole: Targets = ()
    sources: tuple[str, ...] = ()
    knowledge_weight: float = 0.5
    sampling: str = "mean"

    def __post_init__(self) -> None:
        for name in ("domains", "sources"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        names = self.domains or ()
        sound = all(isinstance(n, str) and re.fullmatch(r"[\w-]+", n) and n != FFN for n in names)
        self.require("domains", sound and len(set(names)) == len(names), f"different names, none of them {FFN!r}")
        self.require("gate", self.gate in ("code", "paper", None), "'code', 'paper' or None")
        self.require("gate", self.gate is not None or len(names) < 2, "given where there are several domains to mix")
        self.require("pool", self.pool in POOLS, f"one of {', '.join(POOLS)}")
        for name in ("width", "task_width", "gate_width", "gate_layers"):
            size = getattr(self, name)
            optional = name in ("width", "task_width")
            self.require(name, (size is None and optional) or (isinstance(size, int) and size >= 1), "at least 1")
        self.require("gate_dropout", 0 <= self.gate_dropout < 1, "at least 0 and below 1")
        self.require("task_adapter", self.task_adapter in (None, *TASK_READS), "'pfeiffer', 'houlsby' or None")
        self.require("knowledge_weight", self.knowledge_weight >= 0, "at least 0")
        self.require("sampling", self.sampling in ("mean", "sum"), "'mean' or 'sum'")

    @property
    def branches(self) -> tuple[str, ...]:
        """What the weights of a gate are for, in their order: the domains, then the feed-forward."""
        return (*(("domain",) if self.domains is None else self.domains), FFN)


class MixDA(Adapter):
    """Domain adapters and a gate in some layers, a task adapter in all, a head. What a training stage trains are its groups:
    ``domains`` (and, in the authors' code, ``gate``) in stage 1; ``gate``, ``task`` and ``head`` in stage 2.
    """

    Config = MixDAConfig
    task = "masked_lm"
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "domains": ("*.kas.*",),
        "gate": ("*.gating.*",),
        "task": ("*.task.*",),
        "head": ("*.whole.*",),
    }
    config: MixDAConfig

    def setup(self, host: Host) -> None:
        found = [domains_of(host, source) for source in self.config.sources]
        if found:
            self.config = side_by_side(self.config, [config for config, _ in found])
        config = self.config
        self.shared = Shared()
        self.mixtures: dict[str, Mixture] = {}  # by path; the modules themselves are among the branches
        place_whole(self, host, config.whole)
        if config.branches != (FFN,):
            self.place_mixtures(host)
        if config.task_adapter is not None:
            self.place_task(host, config.task_adapter)
        if found:
            self.take_over(found)

    def place_mixtures(self, host: Host) -> None:
        """Beside the second linear of the feed-forward of each layer, and where the gate reads what it needs."""
        config = replace(self.config, domains=self.config.branches[:-1], layers=self.config.layers or LAYERS)
        if config.gate == "code" and getattr(host.model, "can_generate", bool)():
            raise ConfigError(
                f"The gate of the authors' code weighs all tokens of a row by its last, which {host.describe()} has not seen "
                "when it generates the first; choose gate='paper'."
            )
        block = host.has("feed_forward.output_block")
        sites = find(host, "feed_forward.output_block" if block else "feed_forward.down", config.layers)
        readers = find(host, "feed_forward.up", config.layers) if config.gate == "paper" else [None] * len(sites)
        if len(sites) != len(readers):
            raise TargetError(f"{host.describe()} has no single first linear for each feed-forward to read q at.")
        for site, reader in zip(sites, readers):
            sizes = widths(site.module)
            gate = gate_of(config, sizes[0], None if reader is None else widths(reader.module)[0])
            width = config.width or max(1, sizes[0] // REDUCTION)
            mixture = Mixture(sizes, width, len(config.branches) - 1, gate, config.pool, self.shared)
            self.mixtures[site.path] = mixture
            self.at(site, mixture)
            if block:
                self.at(dropout_of(site), mixture.adapt)
            if reader:
                self.at(reader, mixture.ask)
        if config.gate == "code" and config.pool != "last":
            self.hear(host)
        self.config = replace(config, width=width)

    def hear(self, host: Host) -> None:
        """Listen to the attention mask at the nearest module round the embeddings that takes one."""
        path = host.paths("text_embedding")[0] if host.has("text_embedding") else ""
        while path:
            path = path.rpartition(".")[0]
            module = host.modules[path] if path else host.model
            arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
            if "attention_mask" in arguments:
                self.shared.hears, self.shared.arguments = True, arguments
                self.at(Site(path, module), self.shared.listen)
                return

    def place_task(self, host: Host, kind: str) -> None:
        """After every feed-forward (``"houlsby"``: every attention too), on the mixed output, before the residual is added."""
        for part, last in (("self_attention", "output"), ("feed_forward", "down")):
            if part == "self_attention" and kind == "pfeiffer":
                continue
            block = host.has(f"{part}.output_block")
            for site in host.find(f"{part}.output_block" if block else f"{part}.{last}"):
                wide = widths(site.module)[1]
                width = self.config.task_width or max(1, wide // REDUCTION)
                if block:
                    inner = InBlock(site.module, TASK_READS[kind], width, activation="swish", bias=True)
                    self.at(site, inner, "task")
                    self.at(dropout_of(site), inner.adapt)
                else:
                    self.at(site, After(wide, wide, width, activation="swish", bias=True), "task")

    def take_over(self, sources: Sequence[tuple[MixDAConfig, Mapping[str, Tensor]]]) -> None:
        """Copy the domain adapters of the sources in, and of a single one its gate."""
        mine, given, place = self.tensors(), {}, 0
        for config, tensors in sources:
            for name, tensor in tensors.items():
                path, kas, rest = name.partition(".kas.")
                number, _, leaf = rest.partition(".")
                given[f"{path}.kas.{int(number) + place}.{leaf}" if kas else name] = tensor
            place += len(config.branches) - 1
        gate = [name for name in mine if ".gating." in name]
        same = len(sources) == 1 and all(name in given and given[name].shape == mine[name].shape for name in gate)
        parts = (".kas.", ".gating.") if gate and same else (".kas.",)
        mine, given = ({n: t for n, t in each.items() if any(part in n for part in parts)} for each in (mine, given))
        check_tensors(mine, given)
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(given[name])

    # ------------------------------------------------------------------ what one can ask and say

    @contextmanager
    def weighted(self, weights: Mapping[str, float]) -> Iterator[None]:
        """Inside the block these weights stand in place of every gate's; what is not named weighs 0, ``{"ffn": 1}`` is the base.

        Raises:
            ConfigError: there is no such domain.
        """
        names = self.config.branches
        for name in weights:
            if name not in names:
                raise ConfigError(f"MixDA {self.name!r} has no domain {name!r}. {near(name, names)}")
        before, self.shared.forced = self.shared.forced, tuple(float(weights.get(name, 0.0)) for name in names)
        try:
            yield
        finally:
            self.shared.forced = before

    @contextmanager
    def recording(self) -> Iterator[dict[str, Mixture]]:
        """Inside the block each mixture keeps ``mixed``: (K_0 …, F) and weights of the last call. Yields them by path."""
        self.shared.recording = True
        try:
            yield self.mixtures
        finally:
            self.shared.recording = False
            for mixture in self.mixtures.values():
                mixture.mixed = None

    @torch.no_grad()
    def report(self, model: nn.Module, **inputs: Any) -> list[dict[str, dict[str, float]]]:
        """How each example of a batch is mixed: for each, by path, the weight of every domain and of ``"ffn"``.

        Args:
            model: what the adapter is attached to.
            inputs: of its call. Of the paper's gate, which weighs each token, it is the mean over tokens.
        """
        layers: list[list[dict[str, float]]] = []
        with self.recording() as mixtures:
            model(**inputs)
            for mixture in mixtures.values():
                weights = recorded(mixture)[1]
                if weights.shape[1] > 1:
                    weights = mean_of_tokens(weights, inputs.get("attention_mask"))
                layers.append([dict(zip(self.config.branches, row)) for row in weights[:, 0].tolist()])
        return [dict(zip(self.mixtures, each)) for each in zip(*layers)]

    def sampling_loss(self, model: nn.Module, **inputs: Any) -> Tensor:
        """L_S: how far each K_k is from F on general text, ‖F − K‖², averaged over layers (and domains).

        F is what K is to imitate: no gradient reaches the layers below through it. Padding does not count.

        Args:
            model: what the adapter is attached to.
            inputs: of its call, a batch of general text.
        """
        losses = []
        with self.recording() as mixtures:
            model(**inputs)
            for mixture in mixtures.values():
                *domains, ffn = recorded(mixture)[0]
                mask = inputs.get("attention_mask")
                real = (torch.ones(ffn.shape[:-1], device=ffn.device) if mask is None else mask.to(ffn))[..., None]
                total = ffn.shape[-1] * real.sum() if self.config.sampling == "mean" else len(ffn)
                losses += [((k - ffn.detach()).float().square() * real).sum() / total for k in domains]
        if not losses:
            raise ConfigError(f"MixDA {self.name!r} has no domain adapter that could learn from general text.")
        return torch.stack(losses).mean()


def combine(model: nn.Module, sources: Sequence[str | Path], name: str = "mixed", **settings: Any) -> MixDA:
    """Attach an adapter with the domains of several that were trained in stage 1, side by side under a new gate.

    Args:
        sources: folders, or names of attached adapters, which stay attached and are switched off.
        name: of the result.
        settings: of :class:`MixDAConfig`, such as ``task_adapter`` and ``whole``.

    Raises:
        ArtefactError: a folder holds no domain adapters, or its tensors do not fit.
        BaseMismatchError: they were trained on another base.
        ConfigError: layers or widths differ, or two domains have one name and ``domains`` gives no others.
    """
    config = MixDAConfig(sources=tuple(map(str, sources)), **settings)
    adapter = attach(model, config, name)
    assert isinstance(adapter, MixDA)
    for source in config.sources:
        if source in (attached := Host.of(model).adapters):
            attached[source].enabled = False
    return adapter


# ---------------------------------------------------------------------- sources


def domains_of(host: Host, source: str) -> tuple[MixDAConfig, dict[str, Tensor]]:
    """Settings, and tensors of domain adapters and gate, of an attached adapter or a folder."""
    attached = host.adapters.get(source)
    if attached is None:
        from anyadapter.formats.mixda import read_domains  # formats know methods, not the other way round

        return read_domains(source, host)
    if not isinstance(attached, MixDA) or not attached.mixtures:
        raise ConfigError(f"{source!r} is a {type(attached).__name__} without domain adapters.")
    kept = {n: t.detach() for n, t in attached.tensors().items() if ".kas." in n or ".gating." in n}
    return attached.config, kept


def side_by_side(config: MixDAConfig, found: Sequence[MixDAConfig]) -> MixDAConfig:
    """The settings of an adapter with the domains of all these. Raises :class:`ConfigError` where they do not fit."""
    names = config.domains or tuple(name for each in found for name in each.branches[:-1])
    if len(names) != sum(len(each.branches) - 1 for each in found) or len(set(names)) != len(names):
        raise ConfigError(
            f"The sources hold the domains {', '.join(n for each in found for n in each.branches[:-1])}; give a name of its own "
            "to each with domains=(…)."
        )
    common = {}
    for key in ("layers", "width"):
        values = {getattr(each, key) for each in (*found, config)} - {None}
        if len(values) != 1:
            raise ConfigError(f"The domains differ in {key}: {', '.join(map(str, values))}; they cannot be mixed.")
        common[key] = values.pop()
    return replace(config, domains=names, sources=(), **common)


# ---------------------------------------------------------------------- small parts


def find(host: Host, role: str, layers: tuple[int, ...] | None) -> list[Site]:
    """The sites of a role in these layers. Raises :class:`TargetError` when a layer does not exist."""
    every = host.find(role)
    count = 1 + max((site.layer for site in every if site.layer is not None), default=-1)
    for layer in layers or ():
        if not -count <= layer < count:
            raise TargetError(
                f"{host.describe()} has {count} layers and no layer {layer}; say which of them remember, with layers=(…)."
            )
    return host.find(role, layers=layers)


def gate_of(config: MixDAConfig, inner: int, read: int | None) -> Gate | TokenGate | None:
    """The gate of one mixture; ``read`` is the width of what the paper's gate reads."""
    count = len(config.branches)
    if config.gate == "code":
        return Gate(inner, count, config.gate_width, config.gate_layers, config.gate_dropout, config.ffn_logit)
    return None if read is None else TokenGate(read, count, config.gate_width, config.ffn_logit)


class Retriever(nn.Module):
    """Which general texts to sample for a domain text: the top k of ⟨W q + b, d⟩ over fixed document vectors d (REALM).

    The numbers of documents carry no gradient, so that W is not trained by what is made of them.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.embed_head = nn.Linear(width, size)

    def forward(self, q: Tensor, documents: Tensor, k: int) -> Tensor:
        """q: (batch, width), of each text's first token; documents: (count, size) → (batch, k), best first."""
        return (self.embed_head(q) @ documents.T).topk(k).indices
