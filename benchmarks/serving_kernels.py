"""How near the serving kernels come to the memory's bandwidth when they decode: rows of scattered cells, one token a segment.

    python benchmarks/serving_kernels.py [--rounds 20] [--segments 32] [--device cpu] [--threads 2] [--out kernels.md]

The bound is a plain read of a big tensor in the same run. ``ANYADAPTER_KERNELS`` chooses the kernels.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from anyadapter.serving.batch import Rows, Sequences
from anyadapter.serving.kernels import kernels_for

CELL = 192  # SmolLM2-135M: 3 key heads of 64 numbers
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
WIDTHS = (576, 1536)
RANKS: dict[str, tuple[int, ...]] = {"8": (8,), "16": (16,), "32": (32,), "64": (64,), "8 to 64": (8, 16, 32, 64)}
POOL_BYTES, TURN_BYTES = 1 << 30, 1 << 28  # calls on other cells take turns over so much, so that caches do not help


def bounds(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def scattered(count: int, pool: Tensor) -> Tensor:
    return torch.randperm(len(pool))[:count].int()


def rows_of(ranks: list[int], width: int, pool: Tensor) -> Rows:
    """One token for each rank."""
    total, chunks = sum(ranks), -(-width // CELL)
    one, counts = bounds([1] * len(ranks)), bounds(ranks)
    cells = scattered(total * chunks, pool).view(total, chunks)
    tensors = (one, counts, counts, cells, torch.full((total,), 0.5))
    return Rows(*(t.to(pool.device) for t in tensors), total=total)


def seconds(calls: list[Callable[[], object]], rounds: int, device: torch.device) -> float:
    """The median of a round's time for one call."""
    times = []
    for turn in range(rounds + 1):
        start = time.perf_counter()
        for call in calls:
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if turn:
            times.append(time.perf_counter() - start)
    return statistics.median(times) / len(calls)


class Bench:
    """The pool and one dtype's measurements."""

    def __init__(self, device: torch.device, dtype: torch.dtype, segments: int, rounds: int) -> None:
        self.device, self.dtype, self.segments, self.rounds = device, dtype, segments, rounds
        self.kernels = kernels_for(device, dtype)
        cells = POOL_BYTES // (CELL * dtype.itemsize)
        self.pool = torch.randn(1 << 16, CELL, dtype=dtype, device=device).repeat(cells >> 16, 1)

    def turns(self, numbers: int) -> int:
        return -(-TURN_BYTES // (numbers * self.dtype.itemsize))

    def read(self) -> float:
        """GB/s of a plain read."""
        words = self.pool.flatten().view(torch.float32)
        return words.nbytes / seconds([words.sum], 5, self.device) / 1e9

    def products(self, ranks: tuple[int, ...], width: int) -> tuple[float, float]:
        """GB/s of shrink and of expand."""
        each = [ranks[i % len(ranks)] for i in range(self.segments)]
        sites = [rows_of(each, width, self.pool) for _ in range(self.turns(sum(each) * width))]
        x = torch.randn(self.segments, width, device=self.device).to(self.dtype)
        y, hidden = x.clone(), torch.randn(sum(each), device=self.device)
        size = sum(each) * width * self.dtype.itemsize / 1e9
        shrinks = [lambda rows=rows: self.kernels.shrink(x, self.pool, rows) for rows in sites]
        expands = [lambda rows=rows: self.kernels.expand(hidden, y, self.pool, rows) for rows in sites]
        return tuple(size / seconds(calls, self.rounds, self.device) for calls in (shrinks, expands))

    def attention(self, length: int) -> float:
        """GB/s of one new token for each segment after ``length`` others."""
        lengths = [length + 13 * i for i in range(self.segments)]
        one, starts = bounds([1] * self.segments).to(self.device), bounds(lengths).to(self.device)
        keys, values = self.pool.view(2, -1, KV_HEADS, HEAD_DIM)
        q = torch.randn(self.segments, HEADS, HEAD_DIM, device=self.device).to(self.dtype)
        calls = []
        for _ in range(self.turns(2 * sum(lengths) * CELL)):
            cells = scattered(sum(lengths), keys).to(self.device)
            batch = Sequences(one, starts, cells, longest=(max(lengths), 1))
            calls.append(lambda batch=batch: self.kernels.attend(q, keys, values, batch, scale=HEAD_DIM**-0.5))
        size = 2 * sum(lengths) * CELL * self.dtype.itemsize / 1e9
        return size / seconds(calls, self.rounds, self.device)


def share(rate: float, bound: float) -> str:
    return f"{rate:.1f} ({100 * rate / bound:.0f} %)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--segments", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    cuda = arguments.device.type == "cuda"
    where = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {arguments.threads} threads"

    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        bench = Bench(arguments.device, dtype, arguments.segments, arguments.rounds)
        name, kind = str(dtype).removeprefix("torch."), type(bench.kernels).__name__
        for width in WIDTHS:
            for label, ranks in RANKS.items():
                bound = bench.read()
                shrink, expand = bench.products(ranks, width)
                both = 2 / (1 / shrink + 1 / expand)
                cells = (
                    name,
                    kind,
                    width,
                    label,
                    f"{bound:.1f}",
                    *(share(rate, bound) for rate in (shrink, expand, both)),
                )
                lines.append(f"| {' | '.join(map(str, cells))} |")
                print(lines[-1], flush=True)
        bound = bench.read()
        attend = share(bench.attention(256), bound)
        lines.append(
            f"| {name} | {kind} | attend | 256 to {256 + 13 * (arguments.segments - 1)} cells | {bound:.1f} | {attend} | | |"
        )
        print(lines[-1], flush=True)
        del bench

    head = [
        f"Measured {date.today()} on {where}, torch {torch.__version__}; {arguments.segments} segments of one token, cells of "
        f"{CELL} numbers scattered over 1 GiB; GB/s (share of a plain read), median of {arguments.rounds} rounds.",
        "",
        "| dtype | kernels | width | rank | read | shrink | expand | both |",
        "|---|---|---|---|---|---|---|---|",
    ]
    table = "\n".join([*head, *lines])
    print("\n" + table)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(table + "\n")


if __name__ == "__main__":
    main()
