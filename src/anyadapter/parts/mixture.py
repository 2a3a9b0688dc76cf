"""Memories beside a feed-forward, mixed with it by a gate that reads a whole text or each token (Diao et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from anyadapter.core.adapter import Branch
from anyadapter.core.errors import SignalError, TargetError
from anyadapter.core.site import Site
from anyadapter.parts.bottleneck import DownUp

STD = 0.02  # of a gate's weights at the start


class Gate(nn.Module):
    """The gate of the authors' code: w = softmax(MLP(u at one position)), one for all tokens of a row.

    Args:
        wide: of u.
        count: of weights.
        width, layers, dropout: of the MLP; so many layers after the first.
        ffn_logit: the start of the last weight's bias.
    """

    def __init__(
        self, wide: int, count: int, width: int, layers: int, dropout: float = 0.0, ffn_logit: float = 0.0
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Dropout(dropout), nn.Linear(wide, width)]
        for layer in range(layers):
            out = count if layer == layers - 1 else width
            parts += [nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, out)]
        self.linear = nn.Sequential(*parts)
        start(self.linear, ffn_logit)

    def forward(self, pooled: Tensor) -> Tensor:
        """pooled: (batch, 1, wide) → (batch, 1, count)."""
        return self.linear(pooled.to(next(self.parameters()).dtype)).softmax(-1)


class TokenGate(nn.Module):
    """The gate of the paper: w = σ(W_u relu(W_d q)), for each token. W_u has a bias, to start from."""

    def __init__(self, wide: int, count: int, width: int, ffn_logit: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(wide, width, bias=False), nn.ReLU(), nn.Linear(width, count))
        start(self.linear, ffn_logit)

    def forward(self, q: Tensor) -> Tensor:
        """q: (batch, tokens, wide) → (batch, tokens, count)."""
        return self.linear(q.to(next(self.parameters()).dtype)).sigmoid()


def start(mlp: nn.Sequential, ffn_logit: float) -> None:
    """Weights near zero, so that all branches weigh much the same but for the feed-forward's lead."""
    for module in mlp:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    with torch.no_grad():
        mlp[-1].bias[-1] = ffn_logit  # type: ignore[index, operator]


class Shared:
    """What the mixtures of one adapter have in common while a call runs.

    Attributes:
        mask: (batch, tokens), which tokens are attended to; None where all are.
        hears: whether a module of the host takes an attention mask.
        calling: whether that module runs now.
        forced: weights in place of the gates', or None.
        recording: whether mixtures keep what they mixed.
    """

    mask: Tensor | None = None
    hears: bool = False
    calling: bool = False
    forced: tuple[float, ...] | None = None
    recording: bool = False
    arguments: tuple[str, ...] = ()  # of the module that takes the mask

    def listen(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the module that reads the tokens, with its attention mask at hand."""
        given = dict(zip(self.arguments, args)) | kwargs
        before = self.mask, self.calling
        self.mask, self.calling = given.get("attention_mask"), True
        try:
            return call(*args, **kwargs)
        finally:
            self.mask, self.calling = before

    def attended(self, u: Tensor) -> Tensor:
        """(batch, tokens), 1 where there is a token. Raises :class:`SignalError` when that cannot be told."""
        if self.hears and not self.calling:
            raise SignalError(
                "MixDA's gate needs the attention mask, and the module that takes it was passed by, as gradient checkpointing "
                "does too. Call the whole model, or choose pool='last' or gate='paper'."
            )
        if self.mask is None:
            return torch.ones(u.shape[:2], device=u.device)
        if self.mask.shape != u.shape[:2]:
            raise SignalError(
                f"MixDA's gate needs an attention mask of one value per token, {tuple(u.shape[:2])}, not "
                f"{tuple(self.mask.shape)}."
            )
        return self.mask.to(u.device)


class Mixture(Branch):
    """Σ w_k K_k(u) + w_F F at one feed-forward. K_k starts at zero; F does not, so that the gate's weights act from the start.

    Args:
        sizes: (inner, out) features of the feed-forward's second linear.
        width: of each domain adapter.
        domains: how many there are.
        gate: a :class:`Gate` or :class:`TokenGate` with one weight more, the feed-forward's; None weighs the first domain 1.
        pool: the position that a :class:`Gate` reads.
        shared: what it has in common with the adapter's other mixtures.
    """

    def __init__(
        self,
        sizes: tuple[int, int],
        width: int,
        domains: int,
        gate: Gate | TokenGate | None,
        pool: str,
        shared: Shared,
    ) -> None:
        super().__init__()
        # The names are the authors'.
        self.kas = nn.ModuleList(DownUp(*sizes, width, activation="gelu", bias=True) for _ in range(domains))
        self.gating = gate
        self.pool, self.shared = pool, shared
        self.u: Tensor | None = None
        self.q: Tensor | None = None
        self.mixed: tuple[list[Tensor], Tensor] | None = None  # K_0 …, F, and the weights, of a call that was recorded

    def forward(self, call: Callable[..., Tensor], u: Tensor, *residual: Tensor) -> Tensor:
        """u: (batch, tokens, inner) → (batch, tokens, out), of the down-projection itself; a BERT-style block is given the
        residual too, LN(dropout(dense(u)) + residual), and F is met by :meth:`adapt`.
        """
        if not residual:
            return self.mix(u, call(u))
        self.u = u
        return call(u, *residual)

    def adapt(self, call: Callable[[Tensor], Tensor], dense: Tensor) -> Tensor:
        """Round the dropout of such a block, whose output is F."""
        u, self.u = self.u, None
        if u is None:
            raise SignalError("MixDA's feed-forward was run in parts; call the whole layer.")
        return self.mix(u, call(dense))

    def ask(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Round the up-projection: learn its input q for the gate of the paper."""
        self.q = args[0]
        return call(*args, **kwargs)

    def mix(self, u: Tensor, ffn: Tensor) -> Tensor:
        """u: (batch, tokens, inner), ffn: (batch, tokens, out) → (batch, tokens, out)."""
        parts = [ka.z(u) for ka in self.kas] + [ffn]  # type: ignore[operator]
        forced = self.shared.forced or (None if self.gating is not None else (1.0, 0.0))
        weights = self.weigh(u) if forced is None else ffn.new_tensor(forced).expand(len(ffn), 1, len(forced))
        self.q = None
        if self.shared.recording:
            self.mixed = parts, weights
        # What weighs nothing is left out, so that the feed-forward alone is the base bit for bit.
        used = [i for i in range(len(parts)) if forced is None or forced[i]]
        terms = [weights[..., i : i + 1].to(ffn.dtype) * parts[i] for i in used]
        return sum(terms[1:], terms[0]) if terms else torch.zeros_like(ffn)

    def weigh(self, u: Tensor) -> Tensor:
        """The gate's weights, (batch, 1 or tokens, branches)."""
        if isinstance(self.gating, TokenGate):
            if self.q is None:
                raise SignalError("MixDA's feed-forward was run in parts; call the whole layer.")
            return self.gating(self.q)
        assert self.gating is not None
        if u.dim() != 3:
            raise SignalError(
                f"MixDA's gate weighs the rows of a batch, and this host gives its feed-forward {tuple(u.shape)}, not (batch, "
                "tokens, width); choose gate='paper'."
            )
        return self.gating(self.pooled(u))

    def pooled(self, u: Tensor) -> Tensor:
        """What of u the gate of the code reads, (batch, 1, inner)."""
        if self.pool == "last":
            return u[:, -1:]
        attended = self.shared.attended(u)
        if self.pool == "mean":
            share = attended.to(u.dtype)[..., None]
            return (u * share).sum(1, keepdim=True) / share.sum(1, keepdim=True).clamp(min=1)
        places = torch.arange(u.shape[1], device=u.device) * (attended > 0)
        return u.take_along_dim(places.amax(1)[:, None, None], dim=1)


def dropout_of(site: Site) -> Site:
    """The dropout inside a BERT-style output block. Raises :class:`TargetError` when it is none."""
    block = site.module
    if not all(isinstance(getattr(block, part, None), nn.Module) for part in ("dense", "dropout", "LayerNorm")):
        raise TargetError(
            f"{site.path} ({type(block).__name__}) is no BERT-style output block of dense, dropout and LayerNorm."
        )
    return Site(f"{site.path}.dropout", block.dropout)  # type: ignore[arg-type]


def recorded(mixture: Mixture) -> tuple[list[Tensor], Tensor]:
    """What a mixture kept. Raises :class:`SignalError` when it was not run, or the adapter was off."""
    if mixture.mixed is None:
        raise SignalError("MixDA did not act in this call; is the adapter enabled, and does the call reach its layers?")
    return mixture.mixed


def mean_of_tokens(weights: Tensor, mask: Tensor | None) -> Tensor:
    """(batch, tokens, branches) → (batch, 1, branches), over the tokens attended to."""
    if mask is None:
        return weights.mean(1, keepdim=True)
    share = mask.to(weights)[..., None]
    return (weights * share).sum(1, keepdim=True) / share.sum(1, keepdim=True).clamp(min=1)
