"""S-LoRA: the batched products of a prefill (MBGMM)."""

from __future__ import annotations

import torch
from golden_cases import Golden
from torch import Tensor

from anyadapter.serving.batch import Rows
from anyadapter.serving.kernels import kernels_for


def bounds(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def mbgmm_prefill_kernels(case: Golden) -> None:
    given = case.part("in")
    for key in sorted(case.part("out")):
        kind, _, projection = key.partition(".")
        rows, b = prepare(given, int(projection))
        x, y, a = given["x"], given["y0"].clone(), given["key_pool"].flatten(1)
        kernels = kernels_for(x.device, x.dtype)
        hidden = kernels.shrink(x, a, rows)
        if kind == "shrink":
            case.close(padded(hidden, rows, case.tensors[f"out/{key}"].shape[1]).to(x.dtype), f"out/{key}")
        else:
            kernels.expand(hidden, y, b, rows)
            case.close(y, f"out/{key}")


def prepare(given: dict[str, Tensor], projection: int) -> tuple[Rows, Tensor]:
    """The rows of one projection, one segment a request, and the pool of B laid out as ours.

    The official B is flattened row by row into as many cells as its rank; ours holds column j in the cell of row j.
    """
    ranks, lengths, which = given["a_len"] // 4, given["b_seq_len"].tolist(), given["req_bins"].tolist()
    b, cells, scale = given["value_pool"].flatten(1).clone(), [], []
    found = [given["a_loc"][s + projection * r : s + (projection + 1) * r] for s, r in zip(given["a_start"], ranks)]
    for cell in found:
        b[cell] = b[cell].view(-1, len(cell)).T.contiguous()
    for index in which:
        cells.append(found[index])
        scale.append(given["a_scaling"][index].float().expand(len(found[index])))
    counts = [len(c) for c in cells]
    rows = Rows(
        tokens=bounds(lengths),
        rows=bounds(counts),
        hidden=bounds([n * r for n, r in zip(lengths, counts)]),
        cells=torch.cat(cells)[:, None].int(),
        scale=torch.cat(scale),
        total=sum(n * r for n, r in zip(lengths, counts)),
    )
    return rows, b


def padded(hidden: Tensor, rows: Rows, rank: int) -> Tensor:
    """(T, rank), with zeros beyond the rank of a token's adapter."""
    parts = zip(hidden.split(rows.hidden.diff().tolist()), rows.tokens.diff().tolist())
    return torch.cat([torch.nn.functional.pad(h.view(n, -1), (0, rank - len(h) // n)) for h, n in parts])
