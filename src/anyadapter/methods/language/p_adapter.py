"""P-Adapters: rewrite the embeddings of a query, so that however it is worded the frozen model gives the same answer.

Newman et al. 2022, arXiv 2110.07280, and the experts of P-tuning (Liu et al. 2021, arXiv 2103.10385) that they compare with.

The adapter stands between the word embeddings and the model, before positions are added. It hears the call of the model
itself, so that one calls the model, or a pipeline, as ever: where it puts prompt vectors beside or in place of the tokens, the
model reads the longer query with the attention mask, positions and types that belong to it, and what comes out is handed back
at the tokens' own places. Logits at the mask token are found, and labels are given, where the mask token is in ``input_ids``.

The adapter reads the query in both directions: in front of a causal model, do not train it on queries that contain their
answer. There, tokens generated after the query from a cache keep their own embeddings (without a cache, they are rewritten
with it).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from anyadapter.core.adapter import Adapter, AdapterConfig, Targets
from anyadapter.core.attach import disabled
from anyadapter.core.errors import SignalError, TargetError, near
from anyadapter.core.host import Host
from anyadapter.core.site import Site
from anyadapter.parts.layout import Layout

VARIANTS = ("rewrite", "prefix", "ptuning", "experts")
LAYS_OUT = ("ptuning", "experts")  # [CLS] prompts [MASK] prompts subject prompts [SEP], instead of the user's words


@dataclass(frozen=True, kw_only=True)
class PAdapterConfig(AdapterConfig):
    """Settings of P-Adapters.

    Attributes:
        variant: ``"rewrite"``, every embedding anew; ``"prefix"``, vectors before an unchanged query; ``"ptuning"``, vectors
            round the mask token and the subject instead of the user's words; ``"experts"``, the same with vectors that
            depend on the relation asked for and on nothing else.
        keep: tokens that keep their own embeddings, any of ``"mask"`` (the mask token) and ``"subject"`` (the tokens at
            which the signal ``subject_mask``, (batch, tokens), is true). Of a rewrite any, the subject matters most: keeping
            it raised the authors' hit@1 on BERT-base from 25.8 to 40.0. ``"ptuning"`` and ``"experts"`` keep the mask token
            and nothing of the query but the subject, if named.
        alpha: of a rewrite, the share of the tokens' own embeddings; 0.5 in the authors' ensemble.
        features: what a rewrite is made of: the word ``"embeddings"``, or what the frozen ``"model"`` makes of them, for
            which it runs twice.
        prompts: vectors of a prefix.
        template: vectors before the mask token, between it and the subject, and after that.
        relations: one expert for each of these names, in this order; the signal ``relation`` says which a row is answered by.
        ensemble: of an expert, how many sets of vectors are mixed (100 in the authors' ensembles); 0 is one set.
        official: of a prefix, let padding take part, as in the authors' code; a row then depends on the others of its batch.
        mask_token_id: the tokenizer's; needed to keep the mask token.
        targets: the embedding of the query. In an encoder-decoder, ``"encoder:text_embedding"``.
    """

    method: ClassVar[str] = "p_adapter"
    variant: str = "rewrite"
    keep: tuple[str, ...] = ()
    alpha: float = 0.0
    features: str = "embeddings"
    prompts: int = 3
    template: tuple[int, int, int] = (3, 3, 3)
    relations: tuple[str, ...] = ()
    ensemble: int = 0
    official: bool = False
    mask_token_id: int | None = None
    targets: Targets = "text_embedding"

    def __post_init__(self) -> None:
        rewrites, experts = self.variant == "rewrite", self.variant == "experts"
        self.require("variant", self.variant in VARIANTS, f"one of {', '.join(VARIANTS)}")
        self.require("keep", set(self.keep) <= {"mask", "subject"}, "a tuple of 'mask', 'subject', both or none")
        if self.variant in LAYS_OUT:
            self.require("keep", "mask" in self.keep, f"('mask', 'subject') or ('mask',) for {self.variant!r}")
        self.require("keep", self.variant != "prefix" or not self.keep, "left out for 'prefix', which keeps all tokens")
        self.require("alpha", 0 <= self.alpha <= 1 and (rewrites or not self.alpha), "between 0 and 1, of a 'rewrite'")
        self.require("features", self.features in ("embeddings", "model"), "'embeddings' or 'model'")
        self.require("features", rewrites or self.features == "embeddings", f"'embeddings' for {self.variant!r}")
        self.require("prompts", self.prompts >= 1, "at least 1")
        sound = len(self.template) == 3 and min(self.template) >= 0 and self.template[-1] >= 1
        self.require("template", sound, "three numbers, at least (0, 0, 1): what follows the subject is never nothing")
        sound = len(set(self.relations)) == len(self.relations) and bool(self.relations) == experts
        self.require("relations", sound, "different names for 'experts', and left out otherwise")
        self.require("ensemble", self.ensemble >= 0 and (experts or not self.ensemble), "at least 0, of 'experts'")
        self.require("official", self.variant == "prefix" or not self.official, "left out but for 'prefix'")
        known = self.mask_token_id is not None or "mask" not in self.keep
        self.require("mask_token_id", known, "tokenizer.mask_token_id, for the mask token is to be kept")


# ------------------------------------------------------------------ what the vectors are made by


def bilstm(width: int) -> nn.LSTM:
    """Two layers with d / 2 units in each direction: (…, tokens, d) → the same."""
    return nn.LSTM(width, width // 2, num_layers=2, bidirectional=True, batch_first=True)


def mlp(width: int, out: int) -> nn.Sequential:
    """Two layers, d → d → out."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out))


class Expert(nn.Module):
    """The vectors of one relation, whatever the query: MLP(BiLSTM(v)), (n, d), of learnt v.

    In an ensemble v is a weighted sum of several sets, with weights softmax(w).
    """

    def __init__(self, width: int, count: int, ensemble: int) -> None:
        super().__init__()
        if ensemble:
            self.embeddings = nn.Parameter(torch.randn(ensemble, count, width))
            self.mixture_weights = nn.Parameter(0.1 * torch.randn(ensemble))
        else:
            self.embedding = nn.Embedding(count, width)
        self.lstm_head = bilstm(width)
        self.mlp_head = mlp(width, width)

    def forward(self) -> Tensor:
        """(n, d)."""
        if hasattr(self, "embedding"):
            learnt = self.embedding.weight
        else:
            learnt = torch.einsum("e,end->nd", self.mixture_weights.softmax(0), self.embeddings)
        return self.mlp_head(self.lstm_head(learnt[None])[0][0])


# ------------------------------------------------------------------ the adapter


@dataclass(frozen=True, eq=False)
class Query:
    """The query of the call under way.

    Attributes:
        ids: (batch, tokens).
        attended: (batch, tokens), whether a token is one or padding.
        features: (batch, tokens, d), what the frozen model makes of it, where that is asked for.
        layout: of what the model reads, or None where that is the tokens in their places.
    """

    ids: Tensor
    attended: Tensor
    features: Tensor | None
    layout: Layout | None


class PAdapter(Adapter):
    """Rewrite: E' = α E + (1 − α) (W BiLSTM(E) + b), at all tokens that are not kept. Prefix and P-tuning: the vectors are
    MLP(max over tokens of BiLSTM(E)). Experts: see :class:`Expert`.

    Names and shapes of the tensors are the authors'. It starts at random: a fresh adapter does change the model. The authors
    trained with the model's dropout on; to train without, call ``model.eval()`` and then ``adapter.train()``, for an LSTM on
    a GPU learns in that mode only.
    """

    Config = PAdapterConfig
    task: ClassVar[str] = "facts"
    reads: ClassVar[tuple[str, ...]] = ("subject_mask", "relation")
    capabilities = frozenset({"scale", "average", "route"})
    config: PAdapterConfig

    def setup(self, host: Host) -> None:
        config = self.config
        site = embedding_of(host, config.targets)
        width = int(site.module.embedding_dim)  # type: ignore[arg-type]
        if width % 2:
            raise TargetError(f"{site.path} is {width} wide; the two directions of the LSTM need an even width.")
        self.count = config.prompts if config.variant == "prefix" else sum(config.template)
        if config.variant == "experts":
            self.experts = nn.ModuleList(Expert(width, self.count, config.ensemble) for _ in config.relations)
        else:
            self.lstm_head = bilstm(width)
            self.mlp_head = nn.Linear(width, width) if config.variant == "rewrite" else mlp(width, self.count * width)
        if config.variant == "ptuning":  # in the authors' files, though nothing reads it
            self.embedding = nn.Embedding(self.count, width)
            weight = self.embedding._parameters.pop("weight")
            self.embedding.register_buffer("weight", weight.detach())  # type: ignore[union-attr]
        if config.variant != "rewrite":  # vectors cannot be there by half
            self.capabilities = self.capabilities - {"scale", "route"}  # type: ignore[misc]
        needed = {"subject_mask": "subject" in config.keep, "relation": config.variant == "experts"}
        self.reads = tuple(name for name in self.reads if needed[name])  # type: ignore[misc]
        self.query: Query | None = None
        reader, self.arguments = reader_of(host, site)
        self.at(reader, self.listen)
        self.at(site, self.embed)

    def listen(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the model that reads the embeddings, with its query at hand and laid out."""
        given = dict(zip(self.arguments, args)) | kwargs
        ids: Tensor | None = given.get("input_ids")
        if ids is None:
            raise SignalError(f"P-Adapter {self.name!r} rewrites what token ids are embedded as; pass input_ids.")
        cache, before = given.get("past_key_values"), self.query
        self.query = None
        try:
            if cache is not None and cache.get_seq_length() > 0:
                return call(**self.go_on(given))
            mask = given.get("attention_mask")
            attended = self.like(ids, torch.ones_like(ids) if mask is None else mask, "attention_mask")
            features = features_of(call, given) if self.config.features == "model" else None
            self.query = Query(ids, attended, features, layout := self.lay_out(ids, attended))
            if layout is None:
                return call(*args, **kwargs)
            return layout.restore(call(**layout.arrange(given, f"P-Adapter {self.name!r}")))
        finally:
            self.query = before

    def go_on(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments for what follows a query that was read into the cache, with its prefix."""
        if self.config.variant != "prefix":
            return given
        moved, mask, positions = dict(given), given.get("attention_mask"), given.get("position_ids")
        if mask is not None and mask.dim() == 2:
            moved["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.count), mask], 1)
        if positions is not None:
            moved["position_ids"] = positions + self.count
        return moved

    def lay_out(self, ids: Tensor, attended: Tensor) -> Layout | None:
        """Where tokens and vectors stand; None for a rewrite.

        Raises:
            SignalError: a row has not one mask token, or no subject where there should be one.
        """
        if self.config.variant == "rewrite":
            return None
        if self.config.variant == "prefix":
            return Layout.prefix(attended, self.count)
        mask = (ids == self.config.mask_token_id) & attended
        subject = self.subject(ids) & attended if "subject" in self.config.keep else torch.zeros_like(attended)
        for wrong, found in (
            (mask.sum(1) != 1, f"not one mask token ({self.config.mask_token_id})"),
            (~subject.any(1) & ("subject" in self.config.keep), "no token at which subject_mask is true"),
        ):
            if wrong.any():
                raise SignalError(f"P-Adapter {self.name!r}: row {int(wrong.nonzero()[0])} of the batch has {found}.")
        return Layout.ptuning(attended, mask, subject, self.config.template)

    def embed(self, call: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
        """ids: (batch, places) → (batch, places, d). Tokens that are not attended to keep their embeddings, too."""
        raw = call(ids)
        if self.query is None:
            return raw
        if self.query.layout is None:
            return self.rewrite(raw, self.query)
        source = self.query.layout.source[..., None]
        vectors = (self.route(ids) if self.config.variant == "experts" else self.pool(call, self.query)).to(raw.dtype)
        number = (-1 - source).clamp(min=0).expand(*source.shape[:2], raw.shape[-1])
        return torch.where(source < 0, vectors.gather(1, number), raw)

    def rewrite(self, raw: Tensor, query: Query) -> Tensor:
        """(batch, tokens, d) → the same, all tokens in their places."""
        kept = ~query.attended
        if "mask" in self.config.keep:
            kept = kept | (query.ids == self.config.mask_token_id)
        if "subject" in self.config.keep:
            kept = kept | self.subject(query.ids)
        given = raw if query.features is None else query.features
        rewritten = self.encode(given.to(next(self.lstm_head.parameters()).dtype), query.attended).to(raw.dtype)
        share = (1 - self.config.alpha) * self.strength(raw)
        return torch.where(kept[..., None], raw, ((1 - share) * raw + share * rewritten).to(raw.dtype))

    def pool(self, call: Callable[[Tensor], Tensor], query: Query) -> Tensor:
        """The vectors of each query, (batch, n, d)."""
        raw = call(query.ids).to(next(self.lstm_head.parameters()).dtype)
        read = torch.ones_like(query.attended) if self.config.official else query.attended
        hidden = self.read(raw, read).masked_fill(~read[..., None], float("-inf"))
        pooled = hidden.amax(1).masked_fill(
            ~read.any(1, keepdim=True), 0.0
        )  # a row of padding alone has nothing to say
        return self.mlp_head(pooled).unflatten(-1, (self.count, -1))

    def route(self, ids: Tensor) -> Tensor:
        """The vectors of the relation of each row, (batch, n, d). Only experts that a row asks for run."""
        asked, rows = self.relation(ids).unique(return_inverse=True)
        return torch.stack([self.experts[i]() for i in asked.tolist()])[rows]

    def encode(self, e: Tensor, attended: Tensor) -> Tensor:
        """W BiLSTM(E) + b over the attended tokens of each row: (batch, tokens, d) → the same."""
        return self.mlp_head(self.read(e, attended))

    def read(self, e: Tensor, attended: Tensor) -> Tensor:
        """BiLSTM(E) over the attended tokens of each row, wherever its padding is: (batch, tokens, d) → the same."""
        order = attended.long().argsort(dim=1, descending=True, stable=True)[..., None]
        lengths = attended.sum(dim=1).clamp(min=1).cpu()  # packing takes neither empty rows nor lengths on a GPU
        packed = pack_padded_sequence(e.take_along_dim(order, 1), lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.lstm_head(packed)[0], batch_first=True, total_length=e.shape[1])
        return hidden.take_along_dim(order.argsort(dim=1), 1)

    def subject(self, ids: Tensor) -> Tensor:
        """(batch, tokens), the signal."""
        return self.like(ids, self.signal("subject_mask"), "subject_mask")

    def relation(self, ids: Tensor) -> Tensor:
        """(batch,), the number of the expert of each row. Raises :class:`SignalError` when there is none."""
        given = self.signal("relation")
        if not isinstance(given, Tensor):
            given = torch.tensor([self.row_signal("relation", each) for each in given])
        if given.shape != ids.shape[:1] or not ((given >= 0) & (given < len(self.experts))).all():
            raise SignalError(
                f"P-Adapter {self.name!r}: the signal relation is {tuple(given.shape)}; expected for each of {len(ids)} rows "
                f"the name or number of one of {len(self.experts)} relations."
            )
        return given.to(ids.device)

    def row_signal(self, name: str, value: Any) -> Any:
        """The number of a relation, from its name or number."""
        if name == "relation" and isinstance(value, str):
            if value not in self.config.relations:
                known = self.config.relations
                raise SignalError(
                    f"P-Adapter {self.name!r} has no expert of the relation {value!r}. {near(value, known)}"
                )
            return self.config.relations.index(value)
        return value

    def like(self, ids: Tensor, mask: Tensor, name: str) -> Tensor:
        """A mask over the tokens, as booleans. Raises :class:`SignalError` when it is of another shape."""
        if mask.shape != ids.shape:
            shapes = f"{tuple(mask.shape)}, the token ids {tuple(ids.shape)}"
            raise SignalError(f"P-Adapter {self.name!r}: {name} is {shapes}; expected one value per token.")
        return mask.to(ids.device).bool()


# ------------------------------------------------------------------ the host


def embedding_of(host: Host, targets: Targets) -> Site:
    """The one embedding that targets select. Raises :class:`TargetError` when it is none or several."""
    sites = host.find(targets, types=(nn.Embedding,))
    if len(sites) > 1:
        paths = ", ".join(site.path for site in sites)
        raise TargetError(f"{targets!r} selects {paths}; expected one embedding, such as 'encoder:text_embedding'.")
    return sites[0]


def reader_of(host: Host, embedding: Site) -> tuple[Site, tuple[str, ...]]:
    """The module that embeds and knows the attention mask, and its arguments: the nearest one round the embedding.

    Raises:
        TargetError: there is none.
    """
    path = embedding.path
    while path:
        path = path.rpartition(".")[0]
        module = host.modules[path] if path else host.model
        arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
        if "attention_mask" in arguments:
            return Site(path, module), arguments
    raise TargetError(
        f"No module of {host.describe()} round {embedding.path} takes an attention_mask, without which P-Adapter cannot "
        "tell the query from its padding."
    )


@torch.no_grad()
def features_of(call: Callable[..., Any], given: Mapping[str, Any]) -> Tensor:
    """The last hidden states of a model that reads a query as it is, (batch, tokens, d); nothing is put into a cache."""
    alone = {**given, "past_key_values": None, "use_cache": False} if "past_key_values" in given else dict(given)
    return call(**alone)[0]


# ------------------------------------------------------------------ telling the relation from the query


@torch.no_grad()
def query_features(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """What tells a query's relation: the mean of the frozen model's last hidden states, without adapters, (batch, d)."""
    with disabled(model):
        hidden = getattr(model, "base_model", model)(input_ids=input_ids, attention_mask=attention_mask)[0]
    mask = attention_mask[..., None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def fit_relations(features: Tensor, relations: Tensor, count: int, *, decay: float = 1e-4) -> nn.Linear:
    """Logistic regression from queries to relations: ``classifier(query_features(…)).argmax(-1)`` is the signal ``relation``.

    The authors fine-tune a second BERT for it; any classifier of texts will do.

    Args:
        features: (queries, d), of :func:`query_features`.
        relations: (queries,), their numbers.
        count: of relations.
        decay: weight of the squared weights in the loss.
    """
    classifier = nn.Linear(features.shape[1], count, device=features.device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimiser = torch.optim.LBFGS(classifier.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        total = nn.functional.cross_entropy(classifier(features.float()), relations)
        total = total + decay * classifier.weight.square().sum()
        total.backward()
        return total

    optimiser.step(loss)  # type: ignore[arg-type]
    return classifier.requires_grad_(False)
