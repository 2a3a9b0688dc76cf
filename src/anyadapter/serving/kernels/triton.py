"""The kernels in Triton, for CUDA: segments in blocks of tokens, rows and keys gathered from their cells, sums in fp32.

A program finds its segment on the device, so that nothing waits for the host to read lengths: T tokens in S segments make
at most ⌊T / block⌋ + S blocks. Products of 16-bit numbers are exact in tf32, which has as many digits; fp32 stays fp32.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyadapter.serving.batch import Rows, Sequences

TILE = 16  # tokens, rows: the least that tl.dot takes
SPLITS = 4  # a shrink's columns go to so many programs, whose sums are then added in one order
ROW_PROGRAMS = 4  # and its rows to so many


@triton.jit
def locate(bounds, segments, block, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """The segment of a block, the first of its tokens in it, and one past the last; segment = segments: there is none."""
    s = tl.arange(0, SEGMENTS)
    first = tl.load(bounds + s, mask=s < segments, other=0)
    last = tl.load(bounds + s + 1, mask=s < segments, other=0)
    blocks = (last - first + BLOCK - 1) // BLOCK
    ends = tl.cumsum(blocks, 0)
    segment = tl.sum(((ends <= block) & (s < segments)).to(tl.int32), 0)
    here = s == segment
    within = block - tl.sum(tl.where(here, ends - blocks, 0), 0)
    start = tl.sum(tl.where(here, first, 0), 0) + within * BLOCK
    return segment, start, tl.sum(tl.where(here, last, 0), 0)


@triton.jit
def load_rows(pool, numbers, stride, cell, row, offsets, levels, columns, mask, BITS: tl.constexpr):
    """These columns of these rows' cells, fp32: numbers, or the levels that bits choose, which are among ``numbers``."""
    if not BITS:
        return tl.load(pool + cell[:, None] * stride + columns[None, :], mask=mask, other=0).to(tl.float32)
    used = tl.max(mask.to(tl.int32), 1) > 0
    offset = tl.load(offsets + row, mask=used, other=0).to(tl.int64)
    level = tl.load(levels + row, mask=used, other=0) // 4
    low, high = tl.load(numbers + level, mask=used, other=0), tl.load(numbers + level + 1, mask=used, other=0)
    place = (cell * stride + offset)[:, None] + (columns // 8)[None, :]
    bit = (tl.load(pool + place, mask=mask, other=0).to(tl.int32) >> (columns % 8)[None, :]) & 1
    return tl.where(mask, tl.where(bit == 1, high[:, None], low[:, None]), 0)


@triton.jit
def shrink_kernel(
    x, x_stride, pool, stride, bounds, rows, hidden_bounds, cells, offsets, levels, numbers, hidden, segments, chunks, width,
    total, CELL: tl.constexpr, SPAN: tl.constexpr, SEGMENTS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PROGRAMS: tl.constexpr, SPLITS: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    segment, start, stop = locate(bounds, segments, tl.program_id(0), SEGMENTS, TOKENS)
    if segment >= segments:
        return
    begin, rank = tl.load(rows + segment), tl.load(rows + segment + 1) - tl.load(rows + segment)
    at = start + tl.arange(0, TOKENS)
    k, split = tl.arange(0, COLUMNS), tl.program_id(2)
    # Token t's activations begin at the segment's, plus as many ranks as there are tokens before it.
    out = hidden + split * total + tl.load(hidden_bounds + segment) + (at - tl.load(bounds + segment)) * rank
    for block in range(tl.program_id(1) * ROWS, rank, PROGRAMS * ROWS):
        j = block + tl.arange(0, ROWS)
        sums = tl.zeros((TOKENS, ROWS), tl.float32)
        for c in range(chunks * split // SPLITS, chunks * (split + 1) // SPLITS):
            cell = tl.load(cells + (begin + j) * chunks + c, mask=j < rank, other=0).to(tl.int64)
            for column in range(0, SPAN, COLUMNS):
                there = (column + k < CELL) & (c * CELL + column + k < width)
                place = at.to(tl.int64)[:, None] * x_stride + (c * CELL + column + k)[None, :]
                part = tl.load(x + place, mask=(at < stop)[:, None] & there[None, :], other=0).to(tl.float32)
                mask = (j < rank)[:, None] & there[None, :]
                a = load_rows(pool, numbers, stride, cell, begin + j, offsets, levels, column + k, mask, BITS)
                sums = tl.dot(part, tl.trans(a), sums, input_precision=PRECISION)
        tl.store(out[:, None] + j[None, :], sums, mask=(at < stop)[:, None] & (j < rank)[None, :])


@triton.jit
def expand_kernel(
    hidden, y, y_stride, pool, stride, bounds, rows, hidden_bounds, cells, offsets, levels, numbers, scale, segments, chunks,
    width, CELL: tl.constexpr, SPAN: tl.constexpr, SEGMENTS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    segment, start, stop = locate(bounds, segments, tl.program_id(0), SEGMENTS, TOKENS)
    if segment >= segments:
        return
    begin, rank = tl.load(rows + segment), tl.load(rows + segment + 1) - tl.load(rows + segment)
    if rank == 0:
        return
    at, pieces = start + tl.arange(0, TOKENS), (SPAN + COLUMNS - 1) // COLUMNS
    c, column = tl.program_id(1) // pieces, tl.program_id(1) % pieces * COLUMNS + tl.arange(0, COLUMNS)
    there = (column < CELL) & (c * CELL + column < width)
    activations = hidden + tl.load(hidden_bounds + segment) + (at - tl.load(bounds + segment)) * rank
    sums = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for block in range(0, rank, ROWS):
        j = block + tl.arange(0, ROWS)
        strength = tl.load(scale + begin + j, mask=j < rank, other=0)
        used = strength != 0  # a row of scale 0 is not read
        cell = tl.load(cells + (begin + j) * chunks + c, mask=used, other=0).to(tl.int64)
        h = tl.load(activations[:, None] + j[None, :], mask=(at < stop)[:, None] & used[None, :], other=0)
        mask = used[:, None] & there[None, :]
        b = load_rows(pool, numbers, stride, cell, begin + j, offsets, levels, column, mask, BITS)
        sums = tl.dot(h * strength[None, :], b, sums, input_precision=PRECISION)
    place = y + at.to(tl.int64)[:, None] * y_stride + (c * CELL + column)[None, :]
    mask = (at < stop)[:, None] & there[None, :]
    before = tl.load(place, mask=mask, other=0).to(tl.float32)
    tl.store(place, (before + sums).to(y.dtype.element_ty), mask=mask)


@triton.jit
def attend_kernel(
    q, q_stride, out, keys, values, stride, bounds, starts, cells, segments, scale, window, softcap,
    KV_HEADS: tl.constexpr, SHARING: tl.constexpr, DIM: tl.constexpr, SEGMENTS: tl.constexpr, TOKENS: tl.constexpr,
    QUERIES: tl.constexpr, COLUMNS: tl.constexpr, CELLS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens and one key head; a query is one of their heads that share it."""
    segment, start, stop = locate(bounds, segments, tl.program_id(0), SEGMENTS, TOKENS)
    if segment >= segments:
        return
    head, query, k = tl.program_id(1), tl.arange(0, QUERIES), tl.arange(0, COLUMNS)
    at = start + query // SHARING
    real = (query < TOKENS * SHARING) & (at < stop)
    begin = tl.load(starts + segment)
    count = tl.load(starts + segment + 1) - begin
    own = count - tl.load(bounds + segment + 1) + at  # where a query's own token is among the cells
    number = head * SHARING + query % SHARING
    mask = real[:, None] & (k < DIM)[None, :]
    place = at.to(tl.int64)[:, None] * q_stride + number[:, None] * DIM + k[None, :]
    queries = tl.load(q + place, mask=mask, other=0).to(tl.float32)
    top = tl.full((QUERIES,), -1e30, tl.float32)
    mass, sums = tl.zeros((QUERIES,), tl.float32), tl.zeros((QUERIES, COLUMNS), tl.float32)
    first = tl.maximum(count - tl.load(bounds + segment + 1) + start - window + 1, 0)
    last = tl.minimum(count - tl.load(bounds + segment + 1) + start + TOKENS, count)
    for block in range(first, last, CELLS):
        i = block + tl.arange(0, CELLS)
        cell = tl.load(cells + begin + i, mask=i < last, other=0).to(tl.int64)
        place = cell[:, None] * stride + head * DIM + k[None, :]
        there = (i < last)[:, None] & (k < DIM)[None, :]
        key = tl.load(keys + place, mask=there, other=0).to(tl.float32)
        value = tl.load(values + place, mask=there, other=0).to(tl.float32)
        scores = tl.dot(queries, tl.trans(key), input_precision=PRECISION) * scale
        if SOFTCAP:
            scores = softcap * (1 - 2 / (1 + tl.exp(2 * scores / softcap)))
        seen = (i[None, :] <= own[:, None]) & (i[None, :] > own[:, None] - window) & (i < last)[None, :]
        scores = tl.where(seen, scores, -1e30)
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.where(seen, tl.exp(scores - higher[:, None]), 0)
        old = tl.exp(top - higher)
        sums = tl.dot(weights, value, sums * old[:, None], input_precision=PRECISION)
        mass, top = mass * old + tl.sum(weights, 1), higher
    mass = tl.where(mass == 0, 1, mass)  # of queries that only fill up the block
    place = (at.to(tl.int64)[:, None] * KV_HEADS * SHARING + number[:, None]) * DIM + k[None, :]
    tl.store(out + place, (sums / mass[:, None]).to(out.dtype.element_ty), mask=mask)


class Triton:
    """The three kernels; pool, keys and values may have any width that is a multiple of 16."""

    def shrink(self, x: Tensor, pool: Tensor, rows: Rows) -> Tensor:
        segments, chunks = len(rows.tokens) - 1, rows.cells.shape[1]
        splits = min(SPLITS, chunks)
        hidden = torch.empty(splits, rows.total, device=x.device)
        if rows.total:
            pool, where = rows_in(pool, rows, x.shape[1])
            shrink_kernel[len(x) // TILE + segments, ROW_PROGRAMS, splits](
                x, x.stride(0), pool, pool.stride(0), rows.tokens, rows.rows, rows.hidden, *where.pop("tables"), hidden,
                segments, chunks, x.shape[1], rows.total, SEGMENTS=triton.next_power_of_2(segments), TOKENS=TILE, ROWS=TILE,
                PROGRAMS=ROW_PROGRAMS, SPLITS=splits, PRECISION=precision(x.dtype, rows), **where,
            )  # fmt: skip
        return hidden.sum(0)

    def expand(self, hidden: Tensor, y: Tensor, pool: Tensor, rows: Rows) -> None:
        segments, chunks = len(rows.tokens) - 1, rows.cells.shape[1]
        if rows.total:
            pool, where = rows_in(pool, rows, y.shape[1])
            expand_kernel[len(y) // TILE + segments, chunks * triton.cdiv(where["SPAN"], where["COLUMNS"])](
                hidden, y, y.stride(0), pool, pool.stride(0), rows.tokens, rows.rows, rows.hidden, *where.pop("tables"),
                rows.scale, segments, chunks, y.shape[1], SEGMENTS=triton.next_power_of_2(segments), TOKENS=TILE, ROWS=TILE,
                PRECISION=precision(y.dtype, rows), **where,
            )  # fmt: skip

    def add(self, x: Tensor, y: Tensor, keys: Tensor, values: Tensor, down: Rows, up: Rows) -> None:
        self.expand(self.shrink(x.view(-1, x.shape[-1]), keys, down), y.view(-1, y.shape[-1]), values, up)

    def attend(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        sequences: Sequences,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        (heads, dim), (kv_heads, segments) = q.shape[1:], (keys.shape[1], len(sequences.tokens) - 1)
        q = q if q.stride()[1:] == (dim, 1) else q.contiguous()
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        tokens = 1 if sequences.longest[1] == 1 else TILE
        attend_kernel[len(q) // tokens + segments, kv_heads](
            q, q.stride(0), out, keys, values, keys.stride(0), sequences.tokens, sequences.starts, sequences.cells,
            segments, scale, window or sequences.longest[0], softcap or 1.0,
            KV_HEADS=kv_heads, SHARING=heads // kv_heads, DIM=dim, SEGMENTS=triton.next_power_of_2(segments),
            TOKENS=tokens, QUERIES=max(TILE, triton.next_power_of_2(tokens * heads // kv_heads)),
            COLUMNS=max(TILE, triton.next_power_of_2(dim)), CELLS=32, SOFTCAP=softcap is not None,
            PRECISION=precision(q.dtype),
        )  # fmt: skip
        return out


def rows_in(pool: Tensor, rows: Rows, width: int) -> tuple[Tensor, dict[str, Any]]:
    """The pool, by bytes where the rows are of bits, and what a kernel must know of how they lie in it."""
    bits, cell = rows.bits, pool.shape[1]
    tables: tuple[Tensor | None, ...] = rows.cells, None, None, None
    if bits is not None:
        tables = rows.cells, bits.offsets, bits.levels, pool.view(torch.float32)
        pool = pool.view(torch.uint8)
        cell = pool.shape[1] * 8
    span = min(cell, triton.next_power_of_2(width))  # of a cell, what is used
    return pool, {"tables": tables, "CELL": cell, "SPAN": span, "COLUMNS": columns(span), "BITS": bits is not None}


def columns(width: int) -> int:
    """Columns in a tile."""
    return max(TILE, min(128, triton.next_power_of_2(width)))


def precision(dtype: torch.dtype, rows: Rows | None = None) -> str:
    """Of a product's numbers: TF32 holds all of a 16-bit number, but not the levels of bits, which are fp32."""
    return "ieee" if dtype is torch.float32 or (rows is not None and rows.bits is not None) else "tf32"
