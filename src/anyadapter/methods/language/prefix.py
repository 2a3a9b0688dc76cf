"""Prefix tuning: learnt keys and values in front of every attention.

Li and Liang 2021, arXiv 2101.00190; one of the four families of LLM-Adapters (Hu et al. 2023, arXiv 2304.01933).

The prefix is what the key-value cache would hold after n tokens had been read, so the sequence itself starts at position
n. It is put in front anew at each call and never enters the cache; in a layer whose attention is a sliding window it stays
in view, where PEFT's, being in the cache, slides out.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyadapter.core.adapter import Adapter, AdapterConfig, Targets
from anyadapter.core.attention import key_heads, prepend
from anyadapter.core.errors import ConfigError, TargetError
from anyadapter.core.host import Host, device_of
from anyadapter.parts.whole import place_whole

# How a module that reads positions calls them; the last is a plain embedding's only argument.
POSITIONS = ("position_ids", "past_key_values_length", "input")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixConfig(AdapterConfig):
    """Settings of prefix tuning.

    Attributes:
        tokens: length n of the prefix.
        projection: inner width of the two-layer network that makes the prefix while it is trained (section 4.3 of the
            paper); without it, the prefix itself is trained. :meth:`Prefix.fold` drops the network afterwards.
        init: standard deviation of the random start (with ``projection``, of the network's input). By default 0.02, and 1
            with ``projection``; the official code has 1 in both, which harms a pretrained model more at the start.
            :meth:`Prefix.imitate` starts from real tokens instead.
        targets: attention modules to put it in front of. In an encoder-decoder, ``"decoder:self_attention"``,
            ``"encoder:self_attention"`` and ``"cross_attention"`` select one of its three kinds.
        layers: indices of the layers that get one; all by default, negative from the last.
        whole: modules trained as whole copies beside the prefix, such as a new head; PEFT's ``modules_to_save``.
        shift: whether the sequence (the decoder's, where there are two) starts at position n, as after n tokens. Off, the
            prefix takes no positions; that is needed where the model's positions are all in use.
    """

    method: ClassVar[str] = "prefix"
    tokens: int = 10
    projection: int | None = None
    init: float | None = None
    targets: Targets = "self_attention"
    layers: tuple[int, ...] | None = None
    whole: Targets = ()
    shift: bool = True

    def __post_init__(self) -> None:
        self.require("tokens", isinstance(self.tokens, int) and self.tokens >= 1, "a positive integer")
        self.require("projection", self.projection is None or self.projection >= 1, "a positive integer or None")
        self.require("init", self.init is None or 0 <= self.init < math.inf, "at least 0, or None")


class Prefix(Adapter):
    """heads = softmax(q [P_k; k]ᵀ + mask) [P_v; v], with P_k and P_v of n rows for each attention."""

    Config = PrefixConfig
    capabilities = frozenset({"average", "route"})
    config: PrefixConfig

    def setup(self, host: Host) -> None:
        config = self.config
        place_whole(self, host, config.whole)
        width = 0
        for site in host.find(config.targets, kind="attention", layers=config.layers):
            heads, dim = key_heads(site.module)
            self.at(site, partial(self.core, width, heads, dim))
            width += 2 * heads * dim
        if config.projection is None:
            std = 0.02 if config.init is None else config.init
            self.prompt: Prompt | ProjectedPrompt = Prompt(config.tokens, width, std)
        else:
            std = 1.0 if config.init is None else config.init
            self.prompt = ProjectedPrompt(config.tokens, heads * dim, config.projection, width, std)
        self.recorded: dict[int, Tensor] | None = None
        if config.shift and host.has("position"):
            two_stacks = getattr(getattr(host.model, "config", None), "is_encoder_decoder", False)
            for site in host.find("decoder:position" if two_stacks else "position"):
                names = tuple(inspect.signature(type(site.module).forward).parameters)[1:]
                if not set(names) & set(POSITIONS):
                    raise TargetError(
                        f"{site.path} has the role 'position' and takes none of {', '.join(POSITIONS)}, so its positions "
                        "cannot be shifted; set shift=False, or correct the family's table."
                    )
                self.at(site, partial(self.later, names))

    def core(
        self,
        start: int,
        heads: int,
        dim: int,
        call: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        **options: Any,
    ) -> Tensor:
        """Attend with the columns of the prompt from ``start`` on in front: keys, then values, head by head."""
        if self.recorded is not None:
            self.recorded[start] = torch.stack([k[0], v[0]]).permute(2, 0, 1, 3).flatten(1)
            return call(q, k, v, mask, **options)
        part = self.prompt.columns(start, start + 2 * heads * dim).to(k.device)
        prefix = part.view(-1, 2, heads, dim).permute(1, 2, 0, 3)[:, None]  # (2, 1, heads, n, dim)
        k, v, mask, options = prepend(prefix[0], prefix[1], q, k, v, mask, options)
        if self.rows is not None:
            mask, options = self.hide(q, k, mask, options)
        return call(q, k, v, mask, **options)

    def hide(self, q: Tensor, k: Tensor, mask: Tensor | None, options: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The mask and options of a core with the prefix in front, where some rows are routed past it."""
        n, places = self.config.tokens, torch.arange(k.shape[2], device=q.device)
        hidden = (torch.as_tensor(self.strength(q)) == 0) & (places < n)  # (batch, 1, 1, keys)
        if mask is None:
            mask = q.new_zeros(hidden.shape)
        mask = mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
        options = options | {"is_causal": False}
        if (
            alibi := options.get("alibi")
        ) is not None:  # so that a prefix further in front is as near as without this one
            options["alibi"] = torch.where(hidden, alibi[..., n : n + 1], alibi)
        return mask, options

    def later(self, names: tuple[str, ...], call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a module that reads positions with positions n later, in the rows that have the prefix.

        ``names`` are those of its arguments.
        """
        if self.recorded is not None:
            return call(*args, **kwargs)
        given = dict(zip(names, args)) | kwargs
        name = next(name for name in POSITIONS if given.get(name) is not None)
        positions, n = given[name], self.config.tokens
        if self.rows is None:
            return call(**given | {name: positions + n})
        has = self.rows.to(device_of(self)) != 0
        if isinstance(positions, Tensor) and positions.dim() == 2:  # one row, or one for each of the batch
            return call(**given | {name: positions + n * has[:, None]})
        # The positions of all rows at once. Such a module embeds and does nothing else: it may run twice.
        return choose(has, call(**given | {name: positions + n}), call(**given))

    @torch.no_grad()
    def imitate(self, model: nn.Module, tokens: Tensor) -> None:
        """Start as these tokens would act in front of the text, which learns faster from few examples (section 7.4).

        Args:
            model: what the adapter is attached to, a model that takes ``input_ids``.
            tokens: (n,) token ids, as many as the prefix is long.

        Raises:
            ConfigError: another number of tokens, or the prefix is made by a network.
        """
        if not isinstance(self.prompt, Prompt):
            raise ConfigError(
                "A projected prefix cannot imitate tokens; train it without projection, or fold it first."
            )
        self.config.require("tokens", tokens.shape == (self.config.tokens,), f"{tokens.numel()}, as many as are given")
        training, self.recorded = model.training, {}
        try:
            model.eval()(input_ids=tokens[None].to(device_of(model)))
            self.tensors()["prompt.weight"].copy_(
                torch.cat([self.recorded[start] for start in sorted(self.recorded)], dim=1)
            )
        finally:
            self.recorded = None
            model.train(training)

    def fold(self) -> None:
        """Keep the prefix that the network makes and drop the network: the same outputs, a smaller file."""
        whole = self.prompt.columns(0, None).detach()
        self.prompt = Prompt(whole.shape[0], whole.shape[1], 0.0).to(whole)
        self.prompt.weight.data.copy_(whole)
        self.config = dataclasses.replace(self.config, projection=None)


def choose(rows: Tensor, yes: Any, no: Any) -> Any:
    """For each row of a batch, (batch,) booleans, its row of one result or the other: tensors, or tuples of some."""
    if isinstance(yes, tuple):
        return tuple(choose(rows, *pair) for pair in zip(yes, no))
    return torch.where(rows.to(yes.device).view(-1, *[1] * (yes.dim() - 1)), yes, no)


class Prompt(nn.Module):
    """The prefix itself: (n, width), the attentions one after the other, each keys then values, head by head."""

    def __init__(self, tokens: int, width: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(tokens, width) * std)

    def columns(self, start: int, stop: int | None) -> Tensor:
        """(n, stop − start)."""
        return self.weight[:, start:stop]


class ProjectedPrompt(nn.Module):
    """P = W₂ tanh(W₁ E + b₁) + b₂ (section 4.3): E is (n, d), W₁ is (inner, d), W₂ is (width, inner)."""

    def __init__(self, tokens: int, d: int, inner: int, width: int, std: float) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(tokens, d) * std)
        self.inner = nn.Linear(d, inner)
        self.outer = nn.Linear(inner, width)

    def columns(self, start: int, stop: int | None) -> Tensor:
        """(n, stop − start); an attention computes its own columns only."""
        hidden = torch.tanh(self.inner(self.embedding))
        return F.linear(hidden, self.outer.weight[start:stop], self.outer.bias[start:stop])
