"""The kernels in plain torch, for any device and dtype: what the faster ones are compared with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anyadapter.serving.batch import Rows, Sequences


class Grouped:
    """Segments of as many tokens and rows as one another share one batched product."""

    def shrink(self, x: Tensor, pool: Tensor, rows: Rows) -> Tensor:
        hidden = torch.empty(rows.total, dtype=torch.float32, device=x.device)
        for token, row, at in groups(rows):
            a = matrices(pool, rows, row, x.shape[-1])
            hidden[at] = (x[token].float() @ a.mT).flatten(1)
        return hidden

    def expand(self, hidden: Tensor, y: Tensor, pool: Tensor, rows: Rows) -> None:
        for token, row, at in groups(rows):
            b = matrices(pool, rows, row, y.shape[-1])
            h = hidden[at].unflatten(1, (-1, row.shape[1])) * rows.scale[row][:, None]
            y[token] = (y[token] + h @ b).to(y.dtype)

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
        out = q.new_empty(q.shape)
        self.attend_into(out, q, keys, values, sequences, scale=scale, window=window, softcap=softcap)
        return out

    def attend_into(
        self,
        out: Tensor,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        sequences: Sequences,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        least: int = 1,
    ) -> None:
        """Fill in the tokens of the sequences with ``least`` new ones and more."""
        new, have = sequences.tokens.diff().tolist(), sequences.starts.diff().tolist()
        single = [s for s, n in enumerate(new) if n == 1 and n >= least]
        if single:
            cells = torch.tensor([have[s] for s in single], device=q.device)[:, None]
            # Counted from the first cell that the new token sees; no cell before it is read.
            first = (cells - window).clamp(min=0) if window else torch.zeros_like(cells)
            seen = cells - first
            span = torch.arange(int(seen.max()), device=q.device)
            # A sequence shorter than the longest is filled up with a cell of its own, which the mask hides.
            at = sequences.cells[sequences.starts[single][:, None] + first + span.minimum(seen - 1)]
            token = spans(sequences.tokens, single, 1)
            mask = (span < seen)[:, None]
            out[token] = attention(q[token], keys[at], values[at], mask, scale, softcap)
        for s, (tokens, place) in enumerate(sequences.places):
            if new[s] > 1 and new[s] >= least:
                n, count = new[s], have[s]
                skip = max(count - n + 1 - window, 0) if window else 0
                k, v = keys[place][skip:], values[place][skip:]
                whole = count == n and (window or n) >= n  # each token sees all before it
                seen_by = None if whole else visible(n, count, skip, window, q.device)
                out[tokens] = attention(q[tokens][None], k[None], v[None], seen_by, scale, softcap)[0]


def visible(new: int, cells: int, skip: int, window: int | None, device: torch.device) -> Tensor:
    """Which of a sequence's cells, but for the first ``skip``, its new tokens see: (1, new, cells − skip)."""
    own = torch.arange(cells - new, cells, device=device)[:, None]
    at = torch.arange(skip, cells, device=device)
    return ((at <= own) & (at > own - (window or cells)))[None]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """q: (batch, n, heads, d), k and v: (batch, cells, kv heads, d), mask: (batch, n, cells) → (batch, n, heads, d).

    Without a mask each token sees those up to itself. With one, the query heads that share a key head are treated as so many
    more queries.
    """
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if mask is None and softcap is None:
        heads = q.transpose(1, 2)
        return F.scaled_dot_product_attention(heads, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)
    if mask is None:
        mask = visible(q.shape[1], q.shape[1], 0, None, q.device)
    folded = q.unflatten(2, (k.shape[1], -1)).permute(0, 2, 3, 1, 4)
    sharing, n = folded.shape[2:4]
    folded, mask = folded.flatten(2, 3), mask.repeat(1, sharing, 1)[:, None]
    if softcap is None:
        out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale)
    else:
        scores = softcap * torch.tanh((folded.float() @ k.float().mT) * (scale / softcap))
        out = (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v.float()).to(q.dtype)
    return out.unflatten(2, (sharing, n)).permute(0, 3, 1, 2, 4).reshape(q.shape)


def groups(rows: Rows) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Indices of the tokens (batch, n), rows (batch, r) and activations (batch, n · r) of segments of one size."""
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for s, size in enumerate(zip(rows.tokens.diff().tolist(), rows.rows.diff().tolist())):
        if all(size):
            alike[size].append(s)
    for (n, r), members in alike.items():
        yield spans(rows.tokens, members, n), spans(rows.rows, members, r), spans(rows.hidden, members, n * r)


def spans(bounds: Tensor, members: Sequence[int], count: int) -> Tensor:
    """(len(members), count): the first ``count`` indices of each member's part."""
    return bounds[list(members)].long()[:, None] + torch.arange(count, device=bounds.device)


def matrices(pool: Tensor, rows: Rows, row: Tensor, width: int) -> Tensor:
    """The rows with these indices (batch, r): (batch, r, width), fp32."""
    cells = rows.cells[row].long()
    if rows.bits is None:
        return pool[cells].flatten(2)[..., :width].float()
    found = pool.view(torch.uint8)[cells].flatten(2)
    at = rows.bits.offsets[row].long()[..., None] + torch.arange(-(-width // 8), device=pool.device)
    bits = found.gather(2, at)[..., None] >> torch.arange(8, dtype=torch.uint8, device=pool.device) & 1
    level, numbers = rows.bits.levels[row][..., None] // 4, pool.view(torch.float32).flatten()
    return torch.where(bits.flatten(2)[..., :width].bool(), numbers[level + 1], numbers[level])
