"""The tables of a pass: which rows of which adapters each token meets at each site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyadapter.serving.batch import Bits, Rows, Sequences
from anyadapter.serving.packing import Block, Packing, Part
from anyadapter.serving.residents import Resident

Uses = tuple[tuple[Resident, float], ...]  # the adapters of one request, and their weights


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


def joined(runs: Sequence[tuple[Uses, int]]) -> list[tuple[Uses, int]]:
    """The same, neighbours with the same adapters being one."""
    merged: list[tuple[Uses, int]] = []
    for uses, count in runs:
        if merged and merged[-1][0] == uses:
            merged[-1] = uses, merged[-1][1] + count
        else:
            merged.append((uses, count))
    return merged


def alike_sites(packings: Sequence[Packing]) -> list[list[str]]:
    """The sites of these adapters; those whose parts lie alike in each of them, as those of all layers do, together."""
    found: dict[Any, list[str]] = {}
    for path in dict.fromkeys(path for packing in packings for path in packing.parts):
        found.setdefault(tuple(packing.parts.get(path) for packing in packings), []).append(path)
    return list(found.values())


@dataclass(frozen=True)
class Group:
    """The parts of one kind at one site, run by run."""

    counts: list[int]  # tokens
    parts: list[list[tuple[Resident, float, Part]]]

    @cached_property
    def members(self) -> list[tuple[Resident, float, Part]]:
        return [member for parts in self.parts for member in parts]

    @cached_property
    def ranks(self) -> list[int]:
        return [sum(part.first.rows for _, _, part in parts) for parts in self.parts]

    def bounds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each run's tokens, rows and inner activations: (runs + 1,) each."""
        return bounds(self.counts), bounds(self.ranks), bounds([n * r for n, r in zip(self.counts, self.ranks)])

    def scale(self) -> np.ndarray:
        """(R,) fp32: each row's factor."""
        factors = np.array([part.scaling * r.scale * weight for r, weight, part in self.members], dtype=np.float32)
        return np.repeat(factors, [part.first.rows for _, _, part in self.members])

    def cells(self, block_of: Callable[[Part], Block]) -> np.ndarray:
        """(R, chunks): where each row lies."""
        return np.concatenate([cells_of(resident, block_of(part)) for resident, _, part in self.members])


def tabulate(runs: Sequence[tuple[Uses, int]], device: torch.device, width: int) -> dict[str, Work]:
    """What each site computes. Sites that are alike share one set of tables."""
    work: dict[str, Work] = {}
    for paths in alike_sites(list(dict.fromkeys(resident.packing for uses, _ in runs for resident, _ in uses))):
        work |= dict.fromkeys(paths, site_work(paths[0], runs, device, width))
    return work


def site_work(path: str, runs: Sequence[tuple[Uses, int]], device: torch.device, width: int) -> Work:
    here = [
        ([(r, weight, r.packing.parts[path]) for r, weight in uses if path in r.packing.parts], count)
        for uses, count in runs
    ]
    work = Work([], [])
    for alike in dict.fromkeys(part.alike for parts, _ in here for _, _, part in parts):
        kind, activation, _ = alike
        group = Group([n for _, n in here], [[p for p in parts if p[2].alike == alike] for parts, _ in here])
        if kind in ("scale_input", "scale_output"):
            work.factors.append(factors(kind, group, device))
        elif kind == "gated":
            work.gated.append(gated(group, device))
        else:
            work.products.append(products(kind, activation, group, device, width))
    return work


def products(kind: str, activation: str, group: Group, device: torch.device, width: int) -> Products:
    (tokens, rows, hidden), scale, members = group.bounds(), group.scale(), group.members

    def table(block_of: Callable[[Part], Block]) -> Rows:
        arrays = tokens, rows, hidden, group.cells(block_of), scale
        on_device = [torch.from_numpy(a).to(device, non_blocking=True) for a in arrays]
        bits = None
        if block_of(members[0][2]).room:
            blocks = [(resident, block_of(part)) for resident, _, part in members]
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
            shape = group.counts[segment], group.ranks[segment]
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
