"""Heterogeneous batching: every token of a pass may use another adapter, of another kind and rank, or none (section 4.1).

The engine is itself a guest of the host. Its branch at an attention core stores keys and values in the pool and attends over
it; its branch at a linear, or any module that a served adapter meets, adds the adapters' products for the tokens that have one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from anyadapter.core.adapter import Adapter, AdapterConfig, Placement
from anyadapter.core.attention import key_heads
from anyadapter.core.errors import TargetError
from anyadapter.core.host import Host
from anyadapter.parts.bottleneck import first, plus
from anyadapter.serving.batch import Sequences
from anyadapter.serving.fused import fused
from anyadapter.serving.kernels import Kernels
from anyadapter.serving.packing import Packing
from anyadapter.serving.pool import KEYS, VALUES, Pool
from anyadapter.serving.tables import Factors, Products, Uses, Work, joined, tabulate

REMEMBERED = 8  # passes whose tables are kept: decoding repeats the same rows step after step
# What a model may tell its attention core: what we heed, and what says nothing that matters here.
HEEDED = {"scaling", "sliding_window", "softcap"}
HARMLESS = {"is_causal", "dropout", "position_ids", "use_cache", "cache_position", "output_attentions"}
KNOWN = HEEDED | HARMLESS


@dataclass(frozen=True)
class Pass:
    """What the sites need to know of the running forward pass."""

    sequences: Sequences
    slots: Tensor  # (T,) int64: the cells of the new tokens
    work: dict[str, Work]


@dataclass(frozen=True, kw_only=True)
class MixedConfig(AdapterConfig):
    """The engine's own adapter has no settings."""

    method: ClassVar[str] = "mixed"


class Mixed(Adapter):
    """The guest through which the engine runs a model; :meth:`begin` says what the next call of the model computes."""

    Config = MixedConfig

    def setup(self, host: Host) -> None:
        self.host = host
        self.now: Pass | None = None
        self.covered: set[str] = set()
        self.tables: OrderedDict[Any, dict[str, Work]] = OrderedDict()
        sites = host.find("self_attention", kind="attention")
        heads = {key_heads(site.module) for site in sites}
        if len(heads) > 1:
            raise TargetError(
                f"The attentions of {host.describe()} differ in their keys, {heads}; one pool holds one width."
            )
        self.heads, self.dim = heads.pop()
        self.layers = len(sites)
        for layer, site in enumerate(sites):
            self.at(site, partial(self.attention, site.path, layer))

    def connect(self, pool: Pool, kernels: Kernels) -> None:
        """Give it the pool and the products."""
        self.pool, self.kernels = pool, kernels
        shape = (pool.cells, self.heads, self.dim)
        self.caches = [(keys.view(shape), values.view(shape)) for keys, values in pool.halves]

    def fuse(self) -> None:
        """Compute the base's own modules in fewer operations, in the engine's own passes."""
        self.placements += fused(self.host, self.kernels, lambda: self.now is not None)

    def cover(self, packing: Packing) -> None:
        """Wrap the sites of an adapter that no adapter before had; the rest of the model is not touched."""
        for path, part in packing.parts.items():
            if path not in self.covered and part.kind != "gated":
                placement = Placement(path, "call", partial(self.site, path, packing.layer_of[path]))
                self.placements.append(placement)
                self.host.place(self, placement)
                self.covered.add(path)

    def begin(self, runs: Sequence[tuple[Uses, int]], sequences: Sequences, slots: Tensor) -> None:
        """Prepare the next call: ``runs`` are neighbouring tokens of the same adapters, and how many."""
        merged = joined(runs)
        key = tuple(merged)
        if key not in self.tables:
            self.tables[key] = self.tabulate(merged)
            if len(self.tables) > REMEMBERED:
                self.tables.popitem(last=False)
        self.tables.move_to_end(key)
        self.now = Pass(sequences, slots, self.tables[key])

    def tabulate(self, runs: Sequence[tuple[Uses, int]]) -> dict[str, Work]:
        """What each site computes for these runs of tokens."""
        return tabulate(runs, self.pool.data.device, self.pool.width)

    # ------------------------------------------------------------------ at the sites

    def attention(
        self,
        path: str,
        layer: int,
        call: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        **options: Any,
    ) -> Tensor:
        """Store this pass's keys and values, and attend over the sequence's cells: heads (1, heads, T, head_dim)."""
        if self.now is None:  # somebody else calls the model
            return call(q, k, v, mask, **options)
        unknown = [name for name, value in options.items() if name not in KNOWN and value is not None]
        if unknown:
            raise TargetError(f"This model's attention has {', '.join(unknown)}, which the engine does not know.")
        keys, values = self.caches[layer]
        keys.index_copy_(0, self.now.slots, k[0].transpose(0, 1).to(keys.dtype))
        values.index_copy_(0, self.now.slots, v[0].transpose(0, 1).to(values.dtype))
        scale = self.dim**-0.5 if options.get("scaling") is None else options["scaling"]
        queries = q[0].transpose(0, 1)
        heads = self.kernels.attend(
            queries,
            keys,
            values,
            self.now.sequences,
            scale=scale,
            window=options.get("sliding_window"),
            softcap=options.get("softcap"),
        )
        work = self.now.work.get(path)
        for item in work.gated if work is not None else ():
            gates = self.pool.half(layer, KEYS)[item.gates].flatten(1)[:, : heads.shape[1]] * item.strength
            seen = self.kernels.attend(queries[item.tokens], keys, values, item.sequences, scale=scale)
            heads.index_add_(0, item.tokens, (gates[..., None].to(seen) * seen).to(heads))
        return heads.transpose(0, 1)[None]

    def site(self, path: str, layer: int, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a module with what the tokens' adapters do there."""
        work = self.now.work.get(path) if self.now is not None else None
        if work is None:
            return call(*args, **kwargs)
        x = first(args, kwargs)
        if work.plain is not None:
            out = call(x)
            self.add(path, work.plain, x, out, layer)
            return out
        for vectors in work.factors:
            if vectors.kind == "scale_input":
                x = self.scaled(vectors, x, layer)
        for item in work.products:
            if item.kind == "before":
                x = x + self.z(item, x, layer, x.shape[-1])
        out = call(x, *args[1:], **kwargs) if args else call(**{**kwargs, next(iter(kwargs)): x})
        for item in work.products:
            if item.kind == "low_rank":
                self.add(path, item, x, out, layer)
            elif item.kind in ("after", "parallel"):
                y = out[0] if isinstance(out, tuple) else out
                out = plus(out, self.z(item, y if item.kind == "after" else x, layer, y.shape[-1]))
        for vectors in work.factors:
            if vectors.kind == "scale_output":
                out = self.scaled(vectors, out, layer)
        return out

    def add(self, path: str, item: Products, x: Tensor, y: Tensor, layer: int) -> None:
        """y += s B A x, x: (1, T, in), y: (1, T, out)."""
        keys, values = self.pool.halves[layer]
        self.kernels.add(x, y, keys, values, item.down, item.up)

    def z(self, item: Products, x: Tensor, layer: int, width: int) -> Tensor:
        """s · U act(D x + b) + s · b', zero for tokens without: (…, width)."""
        keys = self.pool.half(layer, KEYS)
        hidden = self.kernels.shrink(flat(x), keys, item.down)
        if item.bias is not None and item.biased is not None:
            hidden = hidden + keys.view(-1)[item.bias].float() * item.biased
        hidden = ACT2FN[item.activation](hidden)
        if item.ones is not None:
            hidden = hidden.masked_fill(item.ones, 1.0)
        out = x.new_zeros(*x.shape[:-1], width)
        self.kernels.expand(hidden, flat(out), self.pool.half(layer, VALUES), item.up)
        return out

    def scaled(self, item: Factors, x: Tensor, layer: int) -> Tensor:
        rows = self.pool.half(layer, KEYS)[item.cells].flatten(1)[:, : item.width]
        factor = torch.where(item.strength == 1, rows, 1 + item.strength * (rows - 1)).to(x.dtype)
        x = x.clone()
        flat(x).index_copy_(0, item.tokens, flat(x)[item.tokens] * factor[item.rows])
        return x


def flat(x: Tensor) -> Tensor:
    """(tokens, width), the same memory."""
    return x.view(-1, x.shape[-1])
