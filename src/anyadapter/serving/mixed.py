"""Heterogeneous batching: every token of a pass may use another adapter, of another kind and rank, or none (section 4.1).

The engine is itself a guest of the host. Its branch at an attention core stores keys and values in the pool and attends over
it; its branch at a linear, or any module that a served adapter meets, adds the adapters' products for the tokens that have one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from anyadapter.core.adapter import Adapter, AdapterConfig, Placement
from anyadapter.core.attention import key_heads
from anyadapter.core.errors import TargetError
from anyadapter.core.host import Host
from anyadapter.parts.bottleneck import first, plus
from anyadapter.serving.batch import Bits, Rows, Sequences
from anyadapter.serving.fused import fused
from anyadapter.serving.kernels import Kernels
from anyadapter.serving.packing import Block, Packing, Part
from anyadapter.serving.pool import KEYS, VALUES, Pool
from anyadapter.serving.residents import Resident

Uses = tuple[tuple[Resident, float], ...]  # the adapters of one request, and their weights
REMEMBERED = 8  # passes whose tables are kept: decoding repeats the same rows step after step
# What a model may tell its attention core: what we heed, and what says nothing that matters here.
HEEDED = {"scaling", "sliding_window", "softcap"}
HARMLESS = {"is_causal", "dropout", "position_ids", "use_cache", "cache_position", "output_attentions"}
KNOWN = HEEDED | HARMLESS


@dataclass(frozen=True)
class Products:
    """One kind of part at one site: read rows by ``down``, perhaps a non-linearity, add columns by ``up``."""

    kind: str
    down: Rows
    up: Rows
    activation: str = ""
    bias: Tensor | None = None  # (N,) int64: where in the first half each activation's bias is
    biased: Tensor | None = None  # (N,) fp32: 1 where there is one
    ones: Tensor | None = None  # (N,) bool: the activation of the bias's own column


@dataclass(frozen=True)
class Factors:
    """(IA)³ at one site: token ``tokens[i]`` is multiplied by 1 + strength (l − 1), l lying in row ``rows[i]`` of cells."""

    kind: str
    tokens: Tensor  # (n,) int64
    rows: Tensor  # (n,) int64, into cells
    cells: Tensor  # (m, chunks) int64
    strength: Tensor  # (m, 1)
    width: int


@dataclass(frozen=True)
class Gated:
    """Gated prefixes at one attention: token ``tokens[i]`` sees the prompts of ``sequences[i]`` through ``gates[i]``."""

    tokens: Tensor  # (n,) int64
    sequences: Sequences  # one for each of these tokens
    gates: Tensor  # (n, chunks) int64, cells
    strength: Tensor  # (n, 1)


@dataclass
class Work:
    """All that a site computes besides the module itself."""

    products: list[Products]
    factors: list[Factors]
    gated: list[Gated] = field(default_factory=list)

    @cached_property
    def plain(self) -> Products | None:
        """The one low-rank product, where there is nothing else: the common case, worth a short way."""
        only = self.products[0] if len(self.products) == 1 and not self.factors else None
        return only if only is not None and only.kind == "low_rank" else None


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
        merged: list[tuple[Uses, int]] = []
        for uses, count in runs:
            if merged and merged[-1][0] == uses:
                merged[-1] = uses, merged[-1][1] + count
            else:
                merged.append((uses, count))
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


# -------------------------------------------------------------------------- the tables of a pass


@dataclass
class Group:
    """The parts of one kind at one site, run by run."""

    counts: list[int] = field(default_factory=list)  # tokens
    parts: list[list[tuple[Resident, float, Part]]] = field(default_factory=list)


def tabulate(runs: Sequence[tuple[Uses, int]], device: torch.device, width: int) -> dict[str, Work]:
    """What each site computes. Sites whose parts lie alike, as those of all layers do, share one set of tables."""
    packings = list(dict.fromkeys(resident.packing for uses, _ in runs for resident, _ in uses))
    work: dict[str, Work] = {}
    alike: dict[Any, Work] = {}
    for path in dict.fromkeys(path for packing in packings for path in packing.parts):
        key = tuple(packing.parts.get(path) for packing in packings)
        if key not in alike:
            alike[key] = site_work(path, runs, device, width)
        work[path] = alike[key]
    return work


def site_work(path: str, runs: Sequence[tuple[Uses, int]], device: torch.device, width: int) -> Work:
    here = [
        ([(r, weight, r.packing.parts[path]) for r, weight in uses if path in r.packing.parts], count)
        for uses, count in runs
    ]
    work = Work([], [])
    for alike in dict.fromkeys(part.alike for parts, _ in here for _, _, part in parts):
        kind, activation, _ = alike
        group = Group()
        for parts, count in here:
            group.counts.append(count)
            group.parts.append([p for p in parts if p[2].alike == alike])
        if kind in ("scale_input", "scale_output"):
            work.factors.append(factors(kind, group, device))
        elif kind == "gated":
            work.gated.append(gated(group, device))
        else:
            work.products.append(products(kind, activation, group, device, width))
    return work


def products(kind: str, activation: str, group: Group, device: torch.device, width: int) -> Products:
    ranks = [sum(part.first.rows for _, _, part in parts) for parts in group.parts]
    tokens, rows = bounds(group.counts), bounds(ranks)
    hidden = bounds([n * r for n, r in zip(group.counts, ranks)])
    members = [member for parts in group.parts for member in parts]
    scale = np.repeat(
        np.array([part.scaling * resident.scale * weight for resident, weight, part in members], dtype=np.float32),
        [part.first.rows for _, _, part in members],
    )

    def table(block_of: Callable[[Part], Block]) -> Rows:
        blocks = [(resident, block_of(part)) for resident, _, part in members]
        cells = np.concatenate([cells_of(resident, block) for resident, block in blocks])
        on_device = [torch.from_numpy(a).to(device, non_blocking=True) for a in (tokens, rows, hidden, cells, scale)]
        bits = None
        if blocks[0][1].room:
            offsets = np.concatenate([block.places()[1] for _, block in blocks])
            at = np.array([int(r.cells[b.levels[0]]) * b.room + b.levels[1] for r, b in blocks], dtype=np.int64)
            levels = np.repeat(at, [b.rows for _, b in blocks])
            bits = Bits(*(torch.from_numpy(a).to(device, non_blocking=True) for a in (offsets, levels)))
        return Rows(*on_device, total=int(hidden[-1]), bits=bits)  # type: ignore[misc, arg-type]

    biases: dict[str, Tensor] = {}
    if any(part.bias for _, _, part in members):
        where, biased, ones = (np.zeros(int(hidden[-1]), dtype=t) for t in (np.int64, np.float32, bool))
        for segment, parts in enumerate(group.parts):
            if not parts or parts[0][2].bias is None:
                continue
            resident, _, part = parts[0]  # a request with several adapters has LoRAs only
            bias: Any = part.bias
            shape = group.counts[segment], ranks[segment]
            here = slice(hidden[segment], hidden[segment + 1])
            inner = bias.width
            spots = (cells_of(resident, bias).ravel()[:, None].astype(np.int64) * width + np.arange(width)).ravel()
            where[here].reshape(shape)[:, :inner] = spots[:inner]
            biased[here].reshape(shape)[:, :inner] = 1
            ones[here].reshape(shape)[:, inner] = True
        found = {"bias": where, "biased": biased, "ones": ones}
        biases = {name: torch.from_numpy(array).to(device) for name, array in found.items()}
    return Products(kind, table(lambda p: p.first), table(lambda p: p.second), activation, **biases)  # type: ignore[arg-type, return-value]


def factors(kind: str, group: Group, device: torch.device) -> Factors:
    tokens: list[int] = []
    rows: list[int] = []
    cells: list[np.ndarray] = []
    strength: list[list[float]] = []
    start, width = 0, 0
    for parts, count in zip(group.parts, group.counts):
        for resident, weight, part in parts:
            tokens += range(start, start + count)
            rows += [len(cells)] * count
            cells.append(cells_of(resident, part.first)[0])
            strength.append([resident.scale * weight])
            width = part.first.width
        start += count
    return Factors(
        kind,
        torch.tensor(tokens, device=device),
        torch.tensor(rows, device=device),
        torch.from_numpy(np.stack(cells).astype(np.int64)).to(device),
        torch.tensor(strength, device=device),
        width,
    )


def gated(group: Group, device: torch.device) -> Gated:
    tokens: list[int] = []
    cells: list[np.ndarray] = []
    gates: list[np.ndarray] = []
    strength: list[list[float]] = []
    start = 0
    for parts, count in zip(group.parts, group.counts):
        for resident, weight, part in parts:
            tokens += range(start, start + count)
            cells += [cells_of(resident, part.first)[:, 0]] * count
            gate: Any = part.gate
            gates += [cells_of(resident, gate)[0]] * count
            strength += [[resident.scale * weight]] * count
        start += count
    lengths = [len(own) for own in cells]
    one_each, starts, flat_cells = (
        torch.from_numpy(np.asarray(a, dtype=np.int32)).to(device)
        for a in (np.arange(len(tokens) + 1), bounds(lengths), np.concatenate(cells))
    )
    return Gated(
        torch.tensor(tokens, device=device),
        Sequences(one_each, starts, flat_cells, (max(lengths), 1)),
        torch.from_numpy(np.stack(gates).astype(np.int64)).to(device),
        torch.tensor(strength, device=device),
    )


def cells_of(resident: Resident, block: Block) -> np.ndarray:
    """(rows, chunks) cells of a block."""
    return resident.cells[block.places()[0]]


def bounds(counts: Sequence[int]) -> np.ndarray:
    """Running sums from 0."""
    return np.r_[0, np.cumsum(counts)].astype(np.int32)
