"""P-Adapters: rewrite the embeddings of a query, so that however it is worded the frozen model gives the same answer.

Newman et al. 2022, arXiv 2110.07280. Here: the rewrite family.

The adapter stands between the word embeddings and the model, before positions are added. It takes the attention mask from
the call of the model itself, so that one calls the model, or a pipeline, as ever. The rewrite reads the query in both
directions: in front of a causal model, do not train it on queries that contain their answer. There, tokens generated after
the query from a cache keep their own embeddings (without a cache, they are rewritten with it).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from anyadapter.core.adapter import Adapter, AdapterConfig, Targets
from anyadapter.core.errors import SignalError, TargetError
from anyadapter.core.host import Host
from anyadapter.core.site import Site


@dataclass(frozen=True, kw_only=True)
class PAdapterConfig(AdapterConfig):
    """Settings of P-Adapters.

    Attributes:
        keep: tokens that keep their own embeddings, any of ``"mask"`` (the mask token) and ``"subject"`` (the tokens at
            which the signal ``subject_mask``, (batch, tokens), is true). The subject matters most: keeping it raised the
            authors' hit@1 on BERT-base from 25.8 to 40.0.
        alpha: share of the tokens' own embeddings in the rewritten ones; 0.5 in the authors' ensemble.
        mask_token_id: the tokenizer's; needed to keep the mask token.
        targets: the embedding of the query. In an encoder-decoder, ``"encoder:text_embedding"``.
    """

    method: ClassVar[str] = "p_adapter"
    keep: tuple[str, ...] = ()
    alpha: float = 0.0
    mask_token_id: int | None = None
    targets: Targets = "text_embedding"

    def __post_init__(self) -> None:
        self.require("keep", set(self.keep) <= {"mask", "subject"}, "a tuple of 'mask', 'subject', both or none")
        self.require("alpha", 0 <= self.alpha <= 1, "between 0 and 1")
        known = self.mask_token_id is not None or "mask" not in self.keep
        self.require("mask_token_id", known, "tokenizer.mask_token_id, for the mask token is to be kept")


class PAdapter(Adapter):
    """E' = α E + (1 − α) (W BiLSTM(E) + b), at all tokens that are not kept.

    The LSTM has two layers and d / 2 units in each direction; names and shapes of the tensors are the authors'. It starts at
    random: a fresh adapter does change the model. The authors trained with the model's dropout on; to train without, call
    ``model.eval()`` and then ``adapter.train()``, for an LSTM on a GPU learns in that mode only.
    """

    Config = PAdapterConfig
    reads: ClassVar[tuple[str, ...]] = ("subject_mask",)
    capabilities = frozenset({"scale", "average", "route"})
    config: PAdapterConfig

    def setup(self, host: Host) -> None:
        sites = host.find(self.config.targets, types=(nn.Embedding,))
        if len(sites) > 1:
            paths = ", ".join(site.path for site in sites)
            raise TargetError(
                f"{self.config.targets!r} selects {paths}; expected one embedding, such as 'encoder:text_embedding'."
            )
        width = sites[0].module.embedding_dim
        if width % 2:  # type: ignore[operator]
            raise TargetError(f"{sites[0].path} is {width} wide; the two directions of the LSTM need an even width.")
        self.lstm_head = nn.LSTM(width, width // 2, num_layers=2, bidirectional=True, batch_first=True)  # type: ignore
        self.mlp_head = nn.Linear(width, width)  # type: ignore[arg-type]
        if "subject" not in self.config.keep:
            self.reads = ()  # type: ignore[misc]
        self.attention_mask: Tensor | None = None  # of the call under way; None outside of one
        reader, self.arguments = reader_of(host, sites[0])
        self.at(reader, self.listen)
        self.at(sites[0], self.rewrite)

    def listen(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the model that reads the embeddings, with its attention mask at hand."""
        given = dict(zip(self.arguments, args)) | kwargs
        if given.get("input_ids") is None:
            raise SignalError(f"P-Adapter {self.name!r} rewrites what token ids are embedded as; pass input_ids.")
        cache = given.get("past_key_values")
        mask: Tensor | None = given.get("attention_mask")
        if cache is not None and cache.get_seq_length() > 0:
            mask = None  # the query was rewritten when it was read into the cache; this is what follows it
        elif mask is None:
            mask = torch.ones_like(given["input_ids"])
        before, self.attention_mask = self.attention_mask, mask
        try:
            return call(*args, **kwargs)
        finally:
            self.attention_mask = before

    def rewrite(self, call: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
        """ids: (batch, tokens) → (batch, tokens, d). Tokens that are not attended to keep their embeddings, too."""
        raw = call(ids)
        if self.attention_mask is None:
            return raw
        attended = self.like(ids, self.attention_mask, "attention_mask")
        kept = ~attended
        if "mask" in self.config.keep:
            kept = kept | (ids == self.config.mask_token_id)
        if "subject" in self.config.keep:
            kept = kept | self.like(ids, self.signal("subject_mask"), "subject_mask")
        rewritten = self.encode(raw.to(self.mlp_head.weight.dtype), attended).to(raw.dtype)
        share = (1 - self.config.alpha) * self.strength(raw)
        return torch.where(kept[..., None], raw, ((1 - share) * raw + share * rewritten).to(raw.dtype))

    def encode(self, e: Tensor, attended: Tensor) -> Tensor:
        """W BiLSTM(E) + b over the attended tokens of each row, wherever its padding is: (batch, tokens, d) → the same."""
        order = attended.long().argsort(dim=1, descending=True, stable=True)[..., None]
        lengths = attended.sum(dim=1).clamp(min=1).cpu()  # packing takes neither empty rows nor lengths on a GPU
        packed = pack_padded_sequence(e.take_along_dim(order, 1), lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.lstm_head(packed)[0], batch_first=True, total_length=e.shape[1])
        return self.mlp_head(hidden).take_along_dim(order.argsort(dim=1), 1)

    def like(self, ids: Tensor, mask: Tensor, name: str) -> Tensor:
        """A mask over the tokens, as booleans. Raises :class:`SignalError` when it is of another shape."""
        if mask.shape != ids.shape:
            shapes = f"{tuple(mask.shape)}, the token ids {tuple(ids.shape)}"
            raise SignalError(f"P-Adapter {self.name!r}: {name} is {shapes}; expected one value per token.")
        return mask.to(ids.device).bool()


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
