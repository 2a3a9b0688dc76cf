"""MLKG adapters: knowledge in several bottlenecks beside a frozen multilingual encoder, one of them active or several fused.

Hou et al. 2022, *Adapters for Enhanced Modeling of Multilingual Knowledge and Text*, arXiv 2210.13617; each bottleneck as in
Pfeiffer et al. 2020, arXiv 2005.00052, and AdapterFusion as in Pfeiffer et al. 2021, arXiv 2005.00247.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from anyadapter.core.adapter import Adapter, AdapterConfig, Targets
from anyadapter.core.attach import NAME
from anyadapter.core.errors import ConfigError, near
from anyadapter.core.host import Host, as_tuple, device_of
from anyadapter.core.site import Site
from anyadapter.methods.language.bottleneck import BottleneckConfig
from anyadapter.parts.bottleneck import DownUp, Inside, widths

if TYPE_CHECKING:
    from typing_extensions import Self

# The paper's four adapters, and what each has learnt.
ROLES = {
    "ep": "entities, from their names: one entity's names in two languages are near. For entity alignment.",
    "tp": "triples, from names: subject and predicate are near the object. For knowledge graph completion.",
    "es": "entities, from sentences: a description is near the name. For tasks on text.",
    "ts": "triples, from sentences: a sentence without the object is near the object. For tasks on text.",
}
FUSION = "fusion"  # the group of the tensors that fuse
# The paper's baseline of one wide adapter after attention and feed-forward.
WIDE = BottleneckConfig(placement="houlsby", reduction=1, activation="relu", init="bert", bias=True)


@dataclass(frozen=True, kw_only=True)
class MLKGConfig(AdapterConfig):
    """Settings of a set of knowledge adapters.

    Attributes:
        roles: the adapters by name, and what each knows, for those who read the file; the paper's four by default.
        use: which of them act: one by itself, several fused, or none; by default all. ``adapter.use("ep")`` changes it.
        reduction: each bottleneck has the encoder's width divided by this.
        activation: any name in transformers' ``ACT2FN``.
        fusion_dropout: probability, on the scores from which the fusion weights are made.
        layers: indices of the layers to adapt; all by default, negative from the last.
    """

    method: ClassVar[str] = "mlkg"
    roles: dict[str, str] = field(default_factory=lambda: dict(ROLES))
    use: Targets | None = None
    reduction: float = 16
    activation: str = "relu"
    fusion_dropout: float = 0.1
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "use", tuple(self.roles) if self.use is None else as_tuple(self.use))
        fit = all(NAME.fullmatch(r) and "." not in r and not hasattr(nn.ModuleDict(), r) for r in self.roles)
        self.require(
            "roles", bool(self.roles) and fit, "names of letters, digits, '_' and '-', none of them torch's own"
        )
        self.require("roles", FUSION not in self.roles, f"without {FUSION!r}, which is the name of what fuses them")
        known = len(set(self.use)) == len(self.use) and set(self.use) <= set(self.roles)  # type: ignore[arg-type]
        self.require("use", known, f"of {', '.join(self.roles)}, each at most once")
        self.require("reduction", self.reduction > 0, "positive")
        self.require("activation", self.activation in ACT2FN, f"one of {', '.join(ACT2FN)}")
        self.require("fusion_dropout", 0 <= self.fusion_dropout < 1, "at least 0 and below 1")


class Fusion(nn.Module):
    """AdapterFusion: a mean of what the adapters say, weighted by how their keys answer the query of the frozen layer.

    α = softmax_t((Wq x + bq) · (Wk z_t + bk)), without 1/√d; out = Σ_t α_t Wv z_t. Wv starts at the identity with 1e-6 beside
    its diagonal, so that a fresh fusion is about the adapters' mean.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            self.value.weight.fill_(1e-6).fill_diagonal_(1.0)

    def weights(self, x: Tensor, z: Tensor) -> Tensor:
        """α, (…, adapters), which sums to 1. x: (…, d), z: (…, adapters, d)."""
        scores = (self.key(z) @ self.query(x).unsqueeze(-1)).squeeze(-1)
        return self.dropout(scores).softmax(-1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x: (…, d), z: (…, adapters, d) → (…, d), in the dtype of x."""
        own = self.value.weight.dtype
        out = self.weights(x.to(own), z.to(own)).unsqueeze(-2) @ self.value(z.to(own))
        return out.squeeze(-2).to(x.dtype)


class Knowledge(Inside):
    """All adapters of one layer. z(x) is that of the one in use, or what the fusion makes of several."""

    def __init__(self, block: Any, config: MLKGConfig) -> None:
        super().__init__()
        wide = widths(block)[1]
        width = max(1, int(wide // config.reduction))
        settings: dict[str, Any] = {"activation": config.activation, "init": "bert", "bias": True}
        self.adapters = nn.ModuleDict({role: DownUp(wide, wide, width, **settings) for role in config.roles})
        self.fusion = Fusion(wide, config.fusion_dropout) if len(config.roles) > 1 else None
        self.used = as_tuple(config.use or ())
        self.enter(block, "norm")

    def adapt(self, call: Any, dense: Tensor) -> Tensor:
        """As of :class:`Inside`; with none in use, exactly the base."""
        return super().adapt(call, dense) if self.used else call(dense)

    def z(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x: (…, d) → (…, d)."""
        each = [self.adapters[role].z(x) for role in self.used]  # type: ignore[operator]
        out = each[0] if self.fusion is None or len(each) == 1 else self.fusion(x, torch.stack(each, dim=-2))
        return (out * self.strength(out)).to(out.dtype)


class MLKG(Adapter):
    """Knowledge adapters after the feed-forward of every layer, in BERT-style output blocks: LN(z(LN(f + a)) + f + a)."""

    Config = MLKGConfig
    task = "pairs"
    capabilities = frozenset({"scale", "average", "route"})
    config: MLKGConfig

    def setup(self, host: Host) -> None:
        # Each adapter is a group, and so is the fusion: the paper trains them in stages.
        groups = {role: (f"*.adapters.{role}.*",) for role in self.config.roles}
        self.groups = groups | ({FUSION: ("*.fusion.*",)} if len(groups) > 1 else {})  # type: ignore[misc]
        for site in host.find("feed_forward.output_block", layers=self.config.layers):
            branch = Knowledge(site.module, self.config)
            self.at(site, branch)
            self.at(Site(f"{site.path}.dropout", site.module.dropout), branch.adapt)  # type: ignore[arg-type]

    def use(self, *roles: str) -> None:
        """Let one adapter act, several fused, or none; it is saved so.

        Raises:
            ConfigError: there is no such adapter.
        """
        for role in roles:
            if role not in self.config.roles:
                raise ConfigError(f"{self.name!r} has no adapter {role!r}. {near(role, self.config.roles)}")
        self.config = replace(self.config, use=roles)
        self.act(*roles)

    def act(self, *roles: str) -> None:
        """As :meth:`use`, for a step of training: until the model is next put into evaluation mode, and not saved."""
        for branch in self.branches.values():
            branch.used = roles  # type: ignore[assignment]

    def train(self, mode: bool = True) -> Self:
        """As of every module. Those in use are again those of the settings."""
        self.act(*as_tuple(self.config.use or ()))
        return super().train(mode)


# ---------------------------------------------------------------------- the embedding of a text, and the loss


def pool(hidden: Tensor, mask: Tensor, *, official: bool = False) -> Tensor:
    """The mean of a text's hidden states, special tokens included.

    Args:
        hidden: (batch, tokens, d).
        mask: (batch, tokens), 1 where there is text.
        official: take the mean over padding too, as the authors do; it then depends on the other texts of the batch.

    Returns:
        (batch, d).
    """
    if official:
        return hidden.mean(1)
    mask = mask[..., None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


@torch.inference_mode()
def embed(
    model: Any, tokenizer: Any, texts: Sequence[str], *, batch: int = 64, max_length: int = 128, official: bool = False
) -> Tensor:
    """The embedding of each text, (texts, d), with the adapters that are attached; texts are cut at ``max_length`` tokens.

    Args:
        model: an encoder without a head, as ``AutoModel`` loads it.
        batch: how many texts are encoded at once.
        official: pool over padding, in the order and batches given.
    """
    was_training = model.training
    model.eval()
    lengths = [len(ids) for ids in tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]]
    # Texts of like length share a batch, unless the batch is to matter.
    order = list(range(len(texts))) if official else sorted(range(len(texts)), key=lambda i: lengths[i])
    rows: list[Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        tokens = tokenizer(
            [texts[i] for i in chosen], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        ).to(device_of(model))
        pooled = pool(model(**tokens).last_hidden_state, tokens["attention_mask"], official=official)
        for i, row in zip(chosen, pooled):
            rows[i] = row
    model.train(was_training)
    return torch.stack(rows)


def info_nce(query: Tensor, positive: Tensor, negatives: Tensor | None = None, *, temperature: float = 0.1) -> Tensor:
    """−log of the share of each query's positive among all it is compared with, by cosine; the mean, from query to positive only.

    Args:
        query, positive: (n, d).
        negatives: (m, d), the same for all queries; by default the positives of the other rows.
        temperature: divides the cosines.
    """
    query, positive = F.normalize(query, dim=-1), F.normalize(positive, dim=-1)
    if negatives is None:
        scores, right = query @ positive.T, torch.arange(len(query), device=query.device)
    else:
        scores = torch.cat([(query * positive).sum(-1, keepdim=True), query @ F.normalize(negatives, dim=-1).T], dim=1)
        right = torch.zeros(len(query), dtype=torch.long, device=query.device)
    return F.cross_entropy(scores / temperature, right)
