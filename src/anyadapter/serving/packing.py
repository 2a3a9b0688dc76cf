"""How an adapter lies in cells: which piece of which tensor goes where, and what each site reads back.

Adapters of one configuration share one :class:`Packing`. Every kind we serve is made of matrices whose rows are read by a
dot product (in the first half of the cells) or added up (in the second), so that one pair of products serves them all:

    low rank        y = W x + s B (A x)                     rows of A, columns of B (Hu et al. 2021)
    bottleneck      z(x) = s U act(D x), before, after or beside a module        rows of D, columns of U
    (IA)³           y = l ⊙ W x, or W (l ⊙ x)               one row l
    prefix          keys and values in front of a sequence  cells as a token's
    gated prefix    heads += g · softmax(q p_kᵀ) p_v        likewise, and one row g (Zhang et al. 2023)

Low-rank matrices and bottlenecks without biases that are quantised to one bit a number stay so: several rows share a cell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from anyadapter.core.adapter import Adapter
from anyadapter.core.attention import key_heads
from anyadapter.core.errors import ArtefactError, TargetError
from anyadapter.core.host import Host, features
from anyadapter.core.site import Site
from anyadapter.methods.language.ia3 import ScaledInput, ScaledOutput
from anyadapter.methods.language.llama_adapter import GatedPrefix
from anyadapter.methods.language.prefix import Prefix
from anyadapter.parts.bottleneck import After, Before, DownUp, Parallel
from anyadapter.parts.low_rank import LowRank
from anyadapter.parts.quantised import Packed
from anyadapter.serving.pool import KEYS, VALUES

LEVELS = 8  # bytes of the two levels of a matrix of bits
GATED = (".keys", ".values", ".opening")  # what is made of a gated prefix
Kind = Literal["low_rank", "before", "after", "parallel", "scale_input", "scale_output", "gated"]


@dataclass(frozen=True)
class Block:
    """``rows`` rows of ``width`` numbers: row j lies in ``chunks`` cells from ``start + j · chunks`` on.

    A row of bits is in whole words of 32. It begins where the one before ended if all of it has room in that cell, and in
    the next cell otherwise; where it is longer than a cell, it has several of its own.

    Attributes:
        start: among the adapter's own cells.
        half: 0 for what is read by a dot product, 1 for what is added up.
        room: bytes in a cell, of rows of bits; 0: of numbers.
        offset: the byte in its cell where the first row begins.
        levels: the cell, and the byte in it, where the two fp32 values are that the bits choose between.
    """

    start: int
    rows: int
    width: int
    chunks: int
    half: int
    room: int = 0
    offset: int = 0
    levels: tuple[int, int] = (0, 0)

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Each row's cells, (rows, chunks), among the adapter's own, and the byte in them where it begins, (rows,)."""
        if not self.room or self.chunks > 1:
            cells = self.start + np.arange(self.rows * self.chunks).reshape(self.rows, self.chunks)
            return cells, np.zeros(self.rows, dtype=np.int32)
        size = row_bytes(self.width)
        here, a_cell = (self.room - self.offset) // size, self.room // size
        later = np.arange(self.rows) - here  # how many rows come before, in the cells after the first
        first = later < 0
        cells = self.start + np.where(first, 0, 1 + later // a_cell)
        offsets = np.where(first, self.offset + (later + here) * size, later % a_cell * size)
        return cells[:, None], offsets.astype(np.int32)


@dataclass(frozen=True)
class Part:
    """What an adapter does at one site.

    Attributes:
        kind: see the module's table.
        first: A, D, l, or p_k.
        second: B or U by columns, or p_v.
        scaling: factor of the result, as trained.
        activation: name of the bottleneck's non-linearity.
        bias: of D, one row. U's is one more column of ``second``, and ``first`` has a row of zeros for it.
        gate: g, one number for each head.
    """

    kind: Kind
    first: Block
    second: Block | None = None
    scaling: float = 1.0
    activation: str = ""
    bias: Block | None = None
    gate: Block | None = None

    @property
    def alike(self) -> tuple[Kind, str, bool]:
        """What parts that are computed together have in common; at last, whether they are of bits."""
        return self.kind, self.activation, self.first.room > 0


@dataclass(frozen=True)
class Fill:
    """Where one tensor goes: its rows into a block, from row ``offset`` on.

    Attributes:
        turned: the tensor's columns are the rows.
        times: name of a number to multiply it by, or ``""``.
    """

    name: str
    layer: int
    block: Block
    offset: int = 0
    turned: bool = False
    times: str = ""


@dataclass(eq=False)
class Packing:
    """The plan for all adapters of one configuration on one host.

    Attributes:
        cells: how many an adapter takes.
        prefix: how many of them, the first ones, are tokens of a prefix.
        shift: whether the sequence's positions start after the prefix.
        rank: the largest inner width.
        parts: what happens at each site, by module path.
        layer_of: the layer of the pool in which each site's cells are read.
        sums: whether the adapter is a sum of products beside linears, so that several can be added with weights.
        made: gives tensors that lie in the pool instead of some of the adapter's own, of which they are made.
    """

    layers: int
    width: int
    dtype: torch.dtype
    cells: int = 0
    prefix: int = 0
    shift: bool = False
    rank: int = 0
    parts: dict[str, Part] = field(default_factory=dict)
    layer_of: dict[str, int] = field(default_factory=dict)
    fills: list[Fill] = field(default_factory=list)
    prompt: str = ""
    made: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None

    @cached_property
    def runs(self) -> list[list[Fill]]:
        """The fills of numbers that differ in their layer only, in runs of layers, so that a run is filled at once."""
        found: dict[Any, list[list[Fill]]] = {}
        for fill in sorted(self.fills, key=lambda fill: fill.layer):
            if fill.block.room:
                continue
            same = found.setdefault((fill.block, fill.offset, fill.turned, bool(fill.times)), [])
            if same and same[-1][-1].layer + 1 == fill.layer:
                same[-1].append(fill)
            else:
                same.append([fill])
        return [run for same in found.values() for run in same]

    @property
    def sums(self) -> bool:
        return not self.prefix and all(part.kind == "low_rank" for part in self.parts.values())

    def pack(self, tensors: Mapping[str, Tensor | Packed]) -> Tensor:
        """An adapter's cells: (layers, 2, cells, W) on the CPU.

        Args:
            tensors: by the adapter's own names.

        Raises:
            ArtefactError: a number is not finite, or not in the pool's dtype.
        """
        if self.made is not None:
            tensors = {**tensors, **self.made({name: dense(value) for name, value in tensors.items()})}
        packed = torch.zeros(self.layers, 2, self.cells, self.width, dtype=self.dtype)
        for fills in self.runs:
            block, offset, turned = fills[0].block, fills[0].offset, fills[0].turned
            value = torch.stack([dense(tensors[fill.name]) for fill in fills])  # (layers, …)
            value = value.flatten(2).mT if turned else value.reshape(len(fills), -1, block.width)
            if fills[0].times:
                times = torch.stack([dense(tensors[fill.times]).float() for fill in fills])
                value = value.float() * times.view(-1, 1, 1)
            stop = block.start + block.rows * block.chunks
            rows = packed[:, block.half, block.start : stop].view(self.layers, block.rows, -1)
            first, last = fills[0].layer, fills[-1].layer
            rows[first : last + 1, offset : offset + value.shape[1], : block.width] = value
        if self.prefix:  # (n, layers · 2 · W): keys, then values, layer by layer
            prompt = dense(tensors[self.prompt]).reshape(self.prefix, self.layers, 2, self.width)
            packed[:, :, : self.prefix] = prompt.permute(1, 2, 0, 3)
        least, most = torch.aminmax(packed)  # both are NaN if anything is; a sum would make a copy in fp32
        if not (torch.isfinite(least) and torch.isfinite(most)):
            raise ArtefactError(
                f"The adapter holds NaN, infinity or numbers beyond {self.dtype}: the training diverged, or the base "
                "should be served in another dtype."
            )
        for fill in self.fills:  # after the check, for bits are no numbers
            matrix = tensors[fill.name]
            if fill.block.room and isinstance(matrix, Packed):
                write_bits(packed[fill.layer, fill.block.half].view(torch.uint8).numpy(), fill, matrix)
        return packed


def dense(value: Tensor | Packed) -> Tensor:
    return value.dequantise() if isinstance(value, Packed) else value


def row_bytes(width: int) -> int:
    """Of a row of bits: whole words of 32."""
    return -(-width // 32) * 4


def write_bits(cells: np.ndarray, fill: Fill, matrix: Packed) -> None:
    """A matrix's levels and bits into cells, (n, bytes), as the block has them."""
    cell, byte = fill.block.levels
    cells[cell, byte : byte + LEVELS] = matrix.levels().numpy().view(np.uint8)
    bits = matrix.codes().flatten(1).numpy()
    rows = np.packbits(bits.T if fill.turned else bits, axis=1, bitorder="little")
    where, offsets = fill.block.places()
    if fill.block.chunks > 1:
        cells[where] = np.pad(rows, ((0, 0), (0, where.shape[1] * cells.shape[1] - rows.shape[1]))).reshape(
            *where.shape, -1
        )
    else:
        cells[where, offsets[:, None] + np.arange(rows.shape[1])] = rows


def plan(
    adapter: Adapter, host: Host, layers: int, width: int, dtype: torch.dtype, bits: Mapping[str, int] | None = None
) -> Packing:
    """The packing of an adapter (on any device, also meta) for a pool.

    Args:
        bits: of its quantised matrices, by name. Those of one bit are packed where their site allows it, all others dense.

    Raises:
        TargetError: part of it is of a kind that cannot share a batch.
    """
    if adapter.reads:
        raise TargetError(
            f"A {type(adapter).__name__} that reads {', '.join(adapter.reads)} cannot be served: requests carry no signals."
        )
    packing = Packing(layers, width, dtype)
    names = {id(tensor): name for name, tensor in adapter.tensors().items()}
    single = {name for name, number in (bits or {}).items() if number == 1}
    taken: Counter[tuple[int, int]] = Counter()  # cells used in (layer, half)
    left: Counter[tuple[int, int]] = Counter()  # bytes of the last of them, where it is of bits
    room = width * dtype.itemsize

    def block(layer: int, half: int, rows: int, wide: int, *matrices: Tensor) -> Block:
        at, size = (layer, half), row_bytes(wide)
        if not matrices or not all(names[id(matrix)] in single for matrix in matrices):
            found = Block(taken[at], rows, wide, -(-wide // width), half)
            taken[at], left[at] = taken[at] + rows * found.chunks, 0
            return found
        if left[at] < LEVELS:
            taken[at], left[at] = taken[at] + 1, room
        levels = taken[at] - 1, room - left[at]
        left[at] -= LEVELS
        if size > room:
            found = Block(taken[at], rows, wide, -(-size // room), half, room, 0, levels)
            taken[at], left[at] = taken[at] + rows * found.chunks, 0
        else:
            found = Block(taken[at] - 1, rows, wide, 1, half, room, room - left[at], levels)
            cells, offsets = found.places()
            taken[at], left[at] = int(cells[-1, 0]) + 1, room - int(offsets[-1]) - size
        return found

    if isinstance(adapter, Prefix):
        plan_prefix(adapter, packing, names)
        for layer in range(layers):
            taken[layer, KEYS] = taken[layer, VALUES] = packing.prefix
    else:
        for placement in adapter.placements:
            module = host.modules.get(placement.path, host.model)
            branch, site = placement.branch, Site(placement.path, module)
            how = next((how for cls, how in KINDS if type(branch) is cls), None)
            if how is None:
                raise TargetError(
                    f"The {type(adapter).__name__} at {placement.path} cannot share a batch with other adapters. Served are "
                    "LoRA, (IA)³, prefixes, gated prefixes, and bottlenecks before, after or beside a module; other linear "
                    "adapters can be merged into a base of their own, a new head cannot be served."
                )
            layer = site.layer or 0
            fill = partial(add_fill, packing.fills, names, layer)
            packing.parts[site.path] = how(branch, site.module, partial(block, layer), fill)
            packing.layer_of[site.path] = layer
        packing.rank = max(part.first.rows for part in packing.parts.values())
        kinds = {part.kind for part in packing.parts.values()}
        if "gated" in kinds:
            if len(kinds) > 1:
                raise TargetError(
                    "A gated prefix is served alone: the LoRA beside it would change the keys that are made of it."
                )
            packing.made = partial(gated_tensors, adapter, host)
    packing.cells = max(taken.values())
    return packing


def add_fill(
    fills: list[Fill],
    names: dict[int, str],
    layer: int,
    tensor: Tensor,
    block: Block,
    times: Any = None,
    suffix: str = "",
    **how: Any,
) -> None:
    fills.append(Fill(names[id(tensor)] + suffix, layer, block, times=names.get(id(times), ""), **how))


NewBlock = Callable[..., Block]  # of (half, rows, width, *matrices): of bits if all these matrices are


def plan_low_rank(branch: LowRank, module: nn.Module, block: NewBlock, fill: Callable[..., None]) -> Part:
    if isinstance(module, (nn.Conv2d, nn.Embedding)):
        raise TargetError(f"A LoRA on a {type(module).__name__} cannot be served; its linears can.")
    width_in, width_out = features(module)
    a, b = branch.lora_A.weight, branch.lora_B.weight
    first, second = block(KEYS, a.shape[0], width_in, a, b), block(VALUES, a.shape[0], width_out, a, b)
    fill(a, first)
    fill(b, second, turned=True)
    return Part("low_rank", first, second, branch.scaling)


def plan_bottleneck(kind: Kind, branch: DownUp, module: nn.Module, block: NewBlock, fill: Callable[..., None]) -> Part:
    down, up, s = branch.adapter_down, branch.adapter_up, branch.adapter_scaling
    width, biased = down.out_features, down.bias is not None
    times = s if isinstance(s, Tensor) else None
    matrices = () if biased or times is not None else (down.weight, up.weight)  # a row of biases has no two levels
    first = block(KEYS, width + biased, down.in_features, *matrices)
    second = block(VALUES, width + biased, up.out_features, *matrices)
    fill(down.weight, first)
    fill(up.weight, second, times, turned=True)
    bias = None
    if biased:
        bias = block(KEYS, 1, width)
        fill(down.bias, bias)
        fill(up.bias, second, times, offset=width)
    return Part(kind, first, second, 1.0 if times is not None else float(s), branch.activation_name, bias)


def plan_scale(
    kind: Kind, branch: ScaledInput | ScaledOutput, module: nn.Module, block: NewBlock, fill: Callable[..., None]
) -> Part:
    first = block(KEYS, 1, branch.ia3_l.numel())
    fill(branch.ia3_l, first)
    return Part(kind, first)


def plan_gated(branch: GatedPrefix, module: nn.Module, block: NewBlock, fill: Callable[..., None]) -> Part:
    (heads, dim), (_, length, _) = key_heads(module), branch.prompts().shape
    first, second = block(KEYS, length, heads * dim), block(VALUES, length, heads * dim)
    gate = block(KEYS, 1, query_heads(module))
    for suffix, where in zip(GATED, (first, second, gate)):
        fill(branch.gate, where, suffix=suffix)
    return Part("gated", first, second, gate=gate)


def query_heads(attention: nn.Module) -> int:
    return key_heads(attention)[0] * getattr(attention, "num_key_value_groups", 1)


def gated_tensors(adapter: Adapter, host: Host, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """p_k, p_v and g of every gated prefix, by the name of its gate and :data:`GATED`: constant as long as the base is.

    Args:
        adapter: one like it, on any device.
        tensors: its own.
    """
    mine = type(adapter)(adapter.config, host)
    mine.load_tensors(tensors)
    names, made = {id(tensor): name for name, tensor in mine.tensors().items()}, {}
    with torch.no_grad():
        for placement in mine.placements:
            if isinstance(branch := placement.branch, GatedPrefix):
                keys, values, gate = branch.constants()
                heads = query_heads(host.modules[placement.path])
                for suffix, value in zip(GATED, (keys, values, gate.expand(heads))):
                    made[names[id(branch.gate)] + suffix] = value.cpu()
    return made


def plan_prefix(adapter: Prefix, packing: Packing, names: dict[int, str]) -> None:
    if adapter.config.projection is not None:
        raise TargetError("The prefix is still made by a network; call its fold() and save it again.")
    prompt: Any = adapter.prompt.weight
    if prompt.shape[1] != packing.layers * 2 * packing.width:
        raise TargetError("A served prefix is in front of every self-attention of the model, and of nothing else.")
    if adapter.config.whole:
        raise TargetError("The prefix comes with whole modules, which cannot share a batch.")
    packing.prefix, packing.prompt = adapter.config.tokens, names[id(prompt)]
    packing.shift = any(placement.kind == "call" for placement in adapter.placements)


KINDS: list[tuple[type, Callable[..., Part]]] = [
    (LowRank, plan_low_rank),
    (Before, partial(plan_bottleneck, "before")),
    (After, partial(plan_bottleneck, "after")),
    (Parallel, partial(plan_bottleneck, "parallel")),
    (ScaledInput, partial(plan_scale, "scale_input")),
    (ScaledOutput, partial(plan_scale, "scale_output")),
    (GatedPrefix, plan_gated),
]
