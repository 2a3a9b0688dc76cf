"""RAFT: a classifier that looks where people said the reasons are, and names them.

Saha et al., arXiv 2211.17046; published at ECAI 2023 as RGFS. Two adapters of two frozen encoders:

1. the *rationale predictor* P, heads for label, targets and the reason in every token, taught by people's marks;
2. *RAFT* itself, a classifier C whose attention weighs each token by what P makes of it. What P says is data to it, the
   signal ``rationale_logits``: P runs once over a set of texts and learns nothing more.

:func:`anyadapter.training.reasons.predict` runs them on texts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyadapter.core.adapter import Adapter, AdapterConfig, Branch, Targets, escape
from anyadapter.core.errors import SignalError, TargetError
from anyadapter.core.host import Host
from anyadapter.core.site import Site
from anyadapter.parts.low_rank import LowRank
from anyadapter.parts.whole import place_whole, within

SIGNAL = "rationale_logits"
IGNORED = -100  # the label of a token or text that is not learnt


@dataclass(frozen=True, kw_only=True)
class EncoderSettings(AdapterConfig):
    """What becomes of the encoder under the heads; left as it is by default.

    Attributes:
        whole: modules of it trained as whole copies. The authors train all of it, as ``("embeddings", "encoder")`` and
            RAFT's ``"pooler"`` do; the adapter is then as large as the model.
        rank: of low-rank updates of every linear in its layers, trained with the heads; 0 for none.
        alpha: numerator of their scaling, alpha / rank.
        dropout: in front of each head, and in RAFT on the attention.
    """

    whole: Targets = ()
    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.2

    def __post_init__(self) -> None:
        self.require("rank", isinstance(self.rank, int) and self.rank >= 0, "0 or a positive integer")
        self.require("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")


def check_labels(config: Any) -> None:
    """Raise a :class:`ConfigError` unless its labels are names, two or more."""
    named = all(isinstance(label, str) for label in config.labels)
    config.require(
        "labels", named and len(config.labels) == len(set(config.labels)) >= 2, "two or more different names"
    )


def place_updates(adapter: Adapter, host: Host) -> None:
    """Put what is trained of the encoder in its place: whole modules, and low-rank updates of the others' linears."""
    config: Any = adapter.config
    whole = place_whole(adapter, host, config.whole)
    if config.rank:
        layers = tuple(site.path for site in host.find("layer"))
        for site in host.find("all-linear"):
            if within(site.path, layers) and not within(site.path, whole):
                adapter.at(site, LowRank(site.module, config.rank, config.alpha / config.rank))


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the places where ``mask`` is not 0, zeros elsewhere; a row without any is all zeros.

    The authors subtract the largest of the scores times the mask, zeros of padding included: the same numbers, but for
    rows far below zero, which come out as all zeros there.

    Args:
        scores: (batch, tokens).
        mask: likewise.
    """
    real = mask.bool()
    top = scores.masked_fill(~real, torch.finfo(scores.dtype).min).amax(-1, keepdim=True).detach()
    e = (scores - top).masked_fill(~real, 0).exp() * real
    total = e.sum(-1, keepdim=True)
    return e / total.where(total > 0, 1)


def rationale_weights(logits: Tensor, mask: Tensor, keep_special: bool = False) -> Tensor:
    """w of each token, from P's logits of "reason" alone (card raft, section 4.2).

    Args:
        logits: (batch, tokens, 2); only ``[..., 1]`` counts.
        mask: (batch, tokens), the attention mask.
        keep_special: set the first and the last token, [CLS] and [SEP], to 1; the rest is not scaled again.
    """
    weights = masked_softmax(logits[..., 1], mask)
    if not keep_special:
        return weights
    real = mask.bool()
    first = real & (real.cumsum(-1) == 1)
    last = real & (real.flip(-1).cumsum(-1).flip(-1) == 1)
    return weights.masked_fill(first | last, 1.0)


def random_rationales(mask: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The authors' control: logits drawn from [−5, 5] in place of P's, (batch, tokens, 2)."""
    return torch.rand(*mask.shape, 2, generator=generator).to(mask.device) * 10 - 5


# ---------------------------------------------------------------------- P, the rationale predictor


class Rationales(NamedTuple):
    """What P says, in the authors' order.

    Attributes:
        label_logits: (batch, labels).
        target_probs: (batch, targets), each by itself; None where it knows no targets.
        rationale_logits: (batch, tokens, 2); class 1 is "part of the reason".
        loss: None without labels of any kind.
    """

    label_logits: Tensor
    target_probs: Tensor | None
    rationale_logits: Tensor
    loss: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class RationalePredictorConfig(EncoderSettings):
    """Settings of P.

    Attributes:
        labels: names of the classes of a text.
        targets: names of the groups it may be aimed at, several at once; by default no such head.
        rationale_impact, target_impact: weights of two of the losses; the label's is 1. The authors search 1 to 100.
    """

    method: ClassVar[str] = "rationale_predictor"
    labels: tuple[str, ...] = ("normal", "abusive")
    targets: tuple[str, ...] = ()
    rationale_impact: float = 1.0
    target_impact: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_labels(self)
        self.require("targets", len(self.targets) == len(set(self.targets)), "different names")
        for name in ("rationale_impact", "target_impact"):
            self.require(name, getattr(self, name) >= 0, "at least 0")


class Pooler(nn.Module):
    """tanh(W h₁ + b): a text's vector, from its first token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (batch, tokens, d) → (batch, d)."""
        return self.dense(hidden[:, 0]).tanh()


class RationalePredictor(Adapter):
    """Three heads on one encoder; the loss is the sum of theirs, of those whose labels are given.

    The model's call takes ``labels`` (batch,), ``targets`` (batch, targets) of 0 and 1, and ``rationale_labels`` (batch,
    tokens) of 0 and 1 beside its own arguments, any subset of them, and returns :class:`Rationales`. −100, NaN among the
    targets, stands for what is not known. Names and shapes of the tensors are the authors'.
    """

    Config = RationalePredictorConfig
    task: ClassVar[str] = "rationales"
    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "heads": ("pooler.*", "token_classifier.*", "classifier.*", "target_classifier.*"),
        "encoder": ("*.whole.*", "*.lora_*"),
    }
    config: RationalePredictorConfig

    def setup(self, host: Host) -> None:
        if getattr(host.model, "base_model", host.model) is not host.model:
            raise TargetError(
                f"A rationale predictor stands on an encoder alone, and {type(host.model).__name__} has a head; load it with "
                "AutoModel."
            )
        width, config = width_of(host), self.config
        place_updates(self, host)
        self.arguments = arguments_of(host.model)
        self.pooler = Pooler(width)
        self.token_classifier = head(width, 2)
        self.classifier = head(width, len(config.labels))
        if config.targets:
            self.target_classifier = head(width, len(config.targets))
        self.dropout = nn.Dropout(config.dropout)
        self.at(Site("", host.model), self.judge)

    def judge(
        self,
        call: Callable[..., Any],
        *args: Any,
        labels: Tensor | None = None,
        targets: Tensor | None = None,
        rationale_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Rationales:
        """Run the encoder and judge its last hidden states."""
        if targets is not None and not self.config.targets:
            raise SignalError(f"{type(self).__name__} {self.name!r} knows no targets; name them in its settings.")
        mask = mask_of(self.arguments, args, kwargs)
        hidden = call(*args, **kwargs)[0].to(self.classifier.weight.dtype)
        pooled = self.pooler(hidden)
        label_logits, rationale_logits = (
            self.classifier(self.dropout(pooled)),
            self.token_classifier(self.dropout(hidden)),
        )
        target_logits = self.target_classifier(self.dropout(pooled)) if self.config.targets else None
        losses = []
        if rationale_labels is not None:
            marks = rationale_labels.masked_fill(mask == 0, IGNORED)
            losses.append(self.config.rationale_impact * label_loss(rationale_logits.flatten(0, 1), marks.flatten()))
        if targets is not None and target_logits is not None:
            losses.append(self.config.target_impact * target_loss(target_logits, targets.float()))
        if labels is not None:
            losses.append(label_loss(label_logits, labels))
        probs = None if target_logits is None else target_logits.sigmoid()
        return Rationales(label_logits, probs, rationale_logits, torch.stack(losses).sum() if losses else None)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over the rows of (n, classes) whose label is not −100; 0 where none has one."""
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def target_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy over the entries of (batch, targets) that are not NaN; 0 where all are."""
    known = ~targets.isnan()
    total = F.binary_cross_entropy_with_logits(logits, targets.nan_to_num(), known.to(logits.dtype), reduction="sum")
    return total / known.sum().clamp(min=1)


# ---------------------------------------------------------------------- C, the classifier


@dataclass(frozen=True, kw_only=True)
class RAFTConfig(EncoderSettings):
    """Settings of RAFT.

    Attributes:
        labels: names of the classes of a text, in the order of the host's.
        attention: ``"cross"``, the pooled text attends to the weighted tokens (RAFT-CA); or ``"self"``, the weighted tokens
            attend to each other and a linear reads them all (RAFT-SA).
        heads: of the attention.
        length: tokens of a text, of self-attention only: its classifier has a weight for each. Shorter texts are filled up.
        rationales: weigh the tokens; False is the authors' ablation, which needs no signal.
        keep_special: give [CLS] and [SEP] the weight 1.
        mask_padding: do not attend to padding. The authors' ablation does, so that its answer hangs on how a text is padded;
            False gives their numbers, where the texts are padded as theirs.
    """

    method: ClassVar[str] = "raft"
    labels: tuple[str, ...] = ("normal", "abusive")
    attention: str = "cross"
    heads: int = 12
    length: int = 128
    rationales: bool = True
    keep_special: bool = False
    mask_padding: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_labels(self)
        self.require("attention", self.attention in ("cross", "self"), "'cross' or 'self'")
        for name in ("heads", "length"):
            self.require(name, isinstance(getattr(self, name), int) and getattr(self, name) >= 1, "a positive integer")
        self.require("keep_special", self.rationales or not self.keep_special, "False without rationales")
        self.require("mask_padding", self.mask_padding or not self.rationales, "True with rationales")


class States(NamedTuple):
    """Of the call under way: hidden (batch, tokens, d), pooled (batch, d) or None, mask and weights (batch, tokens)."""

    hidden: Tensor
    pooled: Tensor | None
    mask: Tensor
    weights: Tensor | None


class RationaleAttention(Branch):
    """The classifier in the place of the host's own.

    CA: logits = W dropout(attend(query = pooled, keys = values = w H)) + b. SA: W dropout(flatten(attend(w H))) + b.

    Args:
        width: d of the encoder.
        pools: bring a pooler, for an encoder that has none.
    """

    replaces = True

    def __init__(self, config: RAFTConfig, width: int, pools: bool) -> None:
        super().__init__()
        self.config = config
        self.attend = nn.MultiheadAttention(width, config.heads, config.dropout, batch_first=True)
        self.classifier = head(width * (config.length if config.attention == "self" else 1), len(config.labels))
        self.pooler = Pooler(width) if pools else None
        self.dropout = nn.Dropout(config.dropout)
        self.states: States | None = None  # what the encoder gave, in the call under way

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """(batch, classes); what the host's classifier is given does not count."""
        if self.states is None:
            raise SignalError("RAFT's classifier was called without the encoder before it; call the whole model.")
        states, self.states = self.states, None
        return self.logits(*states).to(states.hidden.dtype)

    def logits(self, hidden: Tensor, pooled: Tensor | None, mask: Tensor, weights: Tensor | None) -> Tensor:
        """(batch, classes), of :class:`States`."""
        weighted = hidden.to(self.classifier.weight.dtype)
        if self.pooler is not None:
            pooled = self.pooler(weighted)
        if weights is not None:
            weighted = weights[..., None].to(weighted.dtype) * weighted
        padding = mask == 0
        if self.config.attention == "self":
            missing = self.config.length - mask.shape[1]
            weighted, padding = F.pad(weighted, (0, 0, 0, missing)), F.pad(padding, (0, missing), value=True)
        query = weighted if self.config.attention == "self" else pooled[:, None].to(weighted.dtype)  # type: ignore[index]
        hidden_by = padding if self.config.mask_padding else None
        attended, _ = self.attend(query, weighted, weighted, key_padding_mask=hidden_by, need_weights=False)
        return self.classifier(self.dropout(attended.flatten(1)))


class RAFT(Adapter):
    """A rationale-weighted attention and a classifier on a host that classifies texts.

    The signal ``rationale_logits``, (batch, tokens, 2), is what P gave for the same token ids. There is no state in which it
    changes nothing: it starts at random, as the authors' does.
    """

    Config = RAFTConfig
    task: ClassVar[str] = "rationale_classification"
    reads: ClassVar[tuple[str, ...]] = (SIGNAL,)
    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "head": ("*.attend.*", "*.classifier.*", "*.pooler.dense.*"),
        "encoder": ("*.whole.*", "*.lora_*"),
    }
    config: RAFTConfig

    def setup(self, host: Host) -> None:
        encoder, classifier = encoder_of(host), classifier_of(host)
        width, config = width_of(host), self.config
        config.require("heads", width % config.heads == 0, f"a divisor of the encoder's width, {width}")
        classes = host.model.config.num_labels  # type: ignore[union-attr]
        config.require(
            "labels", len(config.labels) == classes, f"{classes} names, for {host.describe()} has as many classes"
        )
        if not config.rationales:
            self.reads = ()  # type: ignore[misc]
        place_updates(self, host)
        self.arguments = arguments_of(encoder.module)
        pools = config.attention == "cross" and getattr(encoder.module, "pooler", None) is None
        self.at(encoder, self.listen)
        self.at(classifier, RationaleAttention(config, width, pools))
        self.path = classifier.path

    @property
    def classifier(self) -> RationaleAttention:
        """The module in the place of the host's classifier."""
        return self.branches[escape(self.path)]  # type: ignore[return-value]

    def listen(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the encoder, and keep what the classifier reads."""
        mask = mask_of(self.arguments, args, kwargs)
        if self.config.attention == "self" and mask.shape[1] > self.config.length:
            raise SignalError(
                f"RAFT {self.name!r} reads texts of at most {self.config.length} tokens, and these have {mask.shape[1]}; pass "
                "truncation=True and max_length to the tokenizer."
            )
        weights = self.weights(mask) if self.config.rationales else None
        out = call(*args, **kwargs)
        self.classifier.states = States(out[0], getattr(out, "pooler_output", None), mask, weights)
        return out

    def weights(self, mask: Tensor) -> Tensor:
        """w of the call under way. Raises :class:`SignalError` when the signal is of another shape."""
        logits = torch.as_tensor(self.signal(SIGNAL)).to(mask.device)
        if logits.shape != (*mask.shape, 2):
            raise SignalError(
                f"RAFT {self.name!r}: {SIGNAL} is {tuple(logits.shape)}; expected {(*mask.shape, 2)}, what the predictor says "
                "of the same token ids."
            )
        return rationale_weights(logits.float(), mask, self.config.keep_special)


# ---------------------------------------------------------------------- what both need of a host


def head(width: int, classes: int) -> nn.Linear:
    """A linear as transformers starts it: N(0, 0.02²), no bias."""
    linear = nn.Linear(width, classes)
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


def width_of(host: Host) -> int:
    """d of a text encoder. Raises :class:`TargetError` when the host does not say."""
    width = getattr(getattr(host.model, "config", None), "hidden_size", None)
    if width is None:
        raise TargetError(f"{host.describe()} has no config.hidden_size; RAFT stands on text encoders of transformers.")
    return int(width)


def encoder_of(host: Host) -> Site:
    """The encoder inside a model that classifies texts. Raises :class:`TargetError` when there is none."""
    path = getattr(host.model, "base_model_prefix", "")
    if path not in host.modules:
        raise TargetError(
            f"RAFT stands in a model that classifies texts, and {type(host.model).__name__} has no encoder inside; load it with "
            "AutoModelForSequenceClassification and num_labels."
        )
    return Site(path, host.modules[path])


def classifier_of(host: Host) -> Site:
    """The one head of a model that classifies texts. Raises :class:`TargetError` when there are none or several."""
    sites = host.find("head")
    if len(sites) != 1 or getattr(host.model.config, "num_labels", None) is None:
        raise TargetError(
            f"{type(host.model).__name__} has the heads {', '.join(site.path for site in sites)}; expected one classifier, as "
            "AutoModelForSequenceClassification makes it."
        )
    return sites[0]


def arguments_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of its forward."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def mask_of(arguments: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The attention mask of a call of an encoder, (batch, tokens); all ones where none is given."""
    given = dict(zip(arguments, args)) | kwargs
    if given.get("attention_mask") is not None:
        return given["attention_mask"]
    tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
    return torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
