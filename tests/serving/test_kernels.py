"""Every kernel backend against dense products in fp64; all cells that no index names hold NaN."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from anyadapter.core.errors import ConfigError
from anyadapter.core.host import Host
from anyadapter.serving.batch import Bits, Rows, Sequences
from anyadapter.serving.fused import gated_unit, joinable, rms_norm
from anyadapter.serving.kernels import Kernels, kernels_for, native
from anyadapter.serving.kernels.grouped import Grouped

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
DTYPES = (torch.float32, torch.bfloat16)
CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if CUDA else "cpu")
BACKENDS = ("torch", "triton") if CUDA else ("triton",) if INTERPRETED else ("torch", "native")
few = settings(max_examples=6 if INTERPRETED else 25, deadline=None)


def test_triton_in_its_interpreter() -> None:
    """The tests of this file again, in a process of their own: Triton is interpreted only if told so before its import."""
    pytest.importorskip("triton")
    if CUDA or INTERPRETED:
        pytest.skip("the others have Triton's kernels already")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "threads", lambda numbers: 3)  # so that small cases are split too
        patch.setenv("ANYADAPTER_KERNELS", request.param)
        try:
            kernels_for(DEVICE, torch.float32)
        except ConfigError as error:
            pytest.skip(str(error))
        yield request.param


def kernels(backend: str, dtype: torch.dtype) -> Kernels:
    assert os.environ["ANYADAPTER_KERNELS"] == backend
    return kernels_for(DEVICE, dtype)


def bounds(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


@dataclass
class Case:
    """Adapters' rows scattered over a pool, dense and paged."""

    rows: Rows
    pool: Tensor
    dense: list[Tensor]  # (r, width) of each segment, fp64

    @property
    def tokens(self) -> int:
        return int(self.rows.tokens[-1])


def scattered(count: int, per: int, generator: torch.Generator) -> Tensor:
    """(count, per) cells of a pool of some more, in no order, no cell twice."""
    return torch.randperm(count * per + 7, generator=generator)[: count * per].view(count, per).int()


def paged(segments: list[tuple[int, int]], width: int, cell: int, dtype: torch.dtype, seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    total, chunks = sum(r for _, r in segments), -(-width // cell)
    cells = scattered(total, chunks, generator)
    pool = torch.full((total * chunks + 7, cell), torch.nan, dtype=dtype)
    values = torch.randn(total, width, generator=generator).to(dtype)
    filled = torch.nn.functional.pad(values, (0, chunks * cell - width)).view(total, chunks, cell)
    pool[cells.long()] = filled
    rows = Rows(
        tokens=bounds([n for n, _ in segments]),
        rows=bounds([r for _, r in segments]),
        hidden=bounds([n * r for n, r in segments]),
        cells=cells,
        scale=torch.randn(total, generator=generator),
        total=sum(n * r for n, r in segments),
    )
    return Case(rows, pool, list(values.double().split([r for _, r in segments])))


def packed(segments: list[tuple[int, int]], width: int, cell: int, dtype: torch.dtype, seed: int) -> Case:
    """The same of one bit a number, several rows in a cell where they fit; what lies between them is of ones."""
    generator = torch.Generator().manual_seed(seed)
    total, row, room = sum(r for _, r in segments), -(-width // 32) * 4, cell * dtype.itemsize
    chunks, per = -(-row // room), max(1, room // row)
    holders = scattered(-(-total // per), chunks, generator)
    own = -(-total * 8 // room)  # cells of the levels, at the end
    pool = torch.full((holders.numel() + 7 + own, room), 255, dtype=torch.uint8)
    bits = torch.randint(0, 2, (total, width), generator=generator)
    data = np.packbits(bits.numpy(), axis=1, bitorder="little")
    at = torch.arange(total)
    offsets = at % per * row
    for i in range(total):
        for c, piece in enumerate(np.split(data[i], range(room, data.shape[1], room))):
            start = int(offsets[i])
            pool[int(holders[i // per, c]), start : start + len(piece)] = torch.from_numpy(piece)
    levels = torch.randn(total, 2, generator=generator)
    addresses = (len(pool) - own) * room + torch.arange(total) * 8
    pool.flatten()[addresses[:, None] + torch.arange(8)] = levels.view(torch.uint8)
    rows = Rows(
        tokens=bounds([n for n, _ in segments]),
        rows=bounds([r for _, r in segments]),
        hidden=bounds([n * r for n, r in segments]),
        cells=holders[at // per].contiguous(),
        scale=torch.randn(total, generator=generator),
        total=sum(n * r for n, r in segments),
        bits=Bits(offsets.int(), addresses),
    )
    values = torch.where(bits.bool(), levels[:, 1:], levels[:, :1])
    return Case(rows, pool.view(dtype), list(values.double().split([r for _, r in segments])))


segments = st.lists(
    st.tuples(st.sampled_from([1, 1, 1, 2, 3, 5, 40, 70]), st.sampled_from([0, 1, 3, 8, 12, 64])),
    min_size=1,
    max_size=6,
)
shapes = (
    segments,
    st.sampled_from([16, 48, 50, 144, 576, 577]),
    st.sampled_from([16, 48, 192]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
cases = st.one_of(st.builds(paged, *shapes), st.builds(packed, *shapes))


def numbers(*shape: int, like: Tensor) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(like.dtype)


def width_of(case: Case) -> int:
    return case.dense[0].shape[1]


@few
@given(case=cases)
def test_shrink_is_the_dense_product(backend: str, case: Case) -> None:
    x = numbers(case.tokens, width_of(case), like=case.pool)
    hidden = kernels(backend, x.dtype).shrink(x, case.pool, case.rows)
    parts = x.double().split(case.rows.tokens.diff().tolist())
    wanted = torch.cat([(part @ dense.T).flatten() for part, dense in zip(parts, case.dense)])
    assert hidden.dtype is torch.float32
    torch.testing.assert_close(hidden.double(), wanted, atol=1e-4, rtol=1e-5)


@few
@given(
    rank=st.sampled_from([1, 3, 8, 12, 64]),
    width=st.sampled_from([16, 50, 144, 577]),
    cell=st.sampled_from([16, 48, 192]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_bits_are_unpacked_exactly(
    backend: str, rank: int, width: int, cell: int, dtype: torch.dtype, seed: int
) -> None:
    """A product with columns of the identity gives the matrix itself, on every backend the same to the bit."""
    at = torch.randint(0, width, (40,), generator=torch.Generator().manual_seed(seed))
    case = packed([(len(at), rank)], width, cell, dtype, seed)
    hidden = kernels(backend, dtype).shrink(F.one_hot(at, width).to(dtype), case.pool, case.rows)
    assert torch.equal(hidden.view(len(at), rank), case.dense[0].T[at].float())


@few
@given(case=cases, strided=st.booleans())
def test_expand_adds_the_dense_product(backend: str, case: Case, strided: bool) -> None:
    hidden = torch.randn(case.rows.total, generator=torch.Generator().manual_seed(1))
    wide = numbers(case.tokens, width_of(case) + 16, like=case.pool)
    y = wide[:, : width_of(case)] if strided else wide[:, : width_of(case)].contiguous()
    before, beside = y.clone(), wide[:, width_of(case) :].clone()
    kernels(backend, y.dtype).expand(hidden, y, case.pool, case.rows)
    counts, scales = case.rows.tokens.diff().tolist(), case.rows.scale.split(case.rows.rows.diff().tolist())
    parts = hidden.split(case.rows.hidden.diff().tolist())
    added = [
        (h.view(n, len(b)).double() * scale) @ b if len(b) else torch.zeros(n, width_of(case), dtype=torch.double)
        for h, n, scale, b in zip(parts, counts, scales, case.dense)
    ]
    tolerance = 1e-4 if y.dtype is torch.float32 else 2**-7 if INTERPRETED else 2**-8  # the interpreter truncates
    torch.testing.assert_close(y.double(), before.double() + torch.cat(added), atol=1e-4, rtol=tolerance)
    assert torch.equal(wide[:, width_of(case) :], beside)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_scale_0_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    case = paged([(1, 8), (3, 12), (2, 0)], 50, 48, dtype, 0)
    case.rows.scale.zero_()
    y = numbers(6, 50, like=case.pool)
    before = y.clone()
    kernels(backend, dtype).expand(torch.ones(case.rows.total), y, case.pool, case.rows)
    assert torch.equal(y.view(torch.int16), before.view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_its_neighbours(backend: str, dtype: torch.dtype) -> None:
    """The numbers of one request are the same, to the bit, whatever the other rows of the batch are."""
    alone, together = paged([(1, 12)], 576, 192, dtype, 5), paged([(1, 12), (1, 64), (2, 3)], 576, 192, dtype, 5)
    cells = together.rows.cells[:12].long()
    together.pool[cells] = alone.pool[alone.rows.cells.long()]
    x = numbers(4, 576, like=alone.pool)
    run = kernels(backend, dtype)
    first = run.shrink(x[:1].clone(), alone.pool, alone.rows)
    second = run.shrink(x, together.pool, together.rows)[:12]
    tolerance = 0 if backend != "torch" else 1e-4
    torch.testing.assert_close(first, second, atol=tolerance, rtol=0)


@few
@given(case=st.builds(paged, *shapes), more=st.integers(1, 5))
def test_tables_with_room_to_spare(backend: str, case: Case, more: int) -> None:
    """Empty segments at the end and rows that belong to none, which lie outside the pool, change no number."""
    rows, run = case.rows, kernels(backend, case.pool.dtype)
    last = [torch.cat([b, b[-1:].repeat(more)]) for b in (rows.tokens, rows.rows, rows.hidden)]
    cells = torch.cat([rows.cells, torch.full((9 * more, rows.cells.shape[1]), 1 << 30, dtype=torch.int32)])
    scale = torch.cat([rows.scale, torch.full((9 * more,), torch.nan)])
    roomy = Rows(*last, cells, scale, rows.total + 9 * more)
    x = numbers(case.tokens, width_of(case), like=case.pool)
    hidden, wanted = run.shrink(x, case.pool, roomy), run.shrink(x, case.pool, rows)
    assert torch.equal(hidden[: rows.total], wanted)
    y, z = x.clone(), x.clone()
    run.expand(hidden, y, case.pool, roomy)
    run.expand(wanted, z, case.pool, rows)
    assert torch.equal(y, z)


def test_nothing_to_do(backend: str) -> None:
    case = paged([(2, 0)], 32, 16, torch.float32, 0)
    y = torch.randn(2, 32)
    before, run = y.clone(), kernels(backend, torch.float32)
    hidden = run.shrink(torch.randn(2, 32), case.pool, case.rows)
    run.expand(hidden, y, case.pool, case.rows)
    assert len(hidden) == 0
    assert torch.equal(y, before)


@dataclass
class Chat:
    """Sequences over a scattered cache."""

    sequences: Sequences
    q: Tensor
    keys: Tensor
    values: Tensor
    lengths: list[tuple[int, int]]  # new tokens, cells
    options: dict


def chat(
    lengths: list[tuple[int, int]],
    kv_heads: int,
    sharing: int,
    dim: int,
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
    seed: int,
    neighbours: bool = False,
) -> Chat:
    generator = torch.Generator().manual_seed(seed)
    lengths = [(new, new + before) for new, before in lengths]
    total = sum(cells for _, cells in lengths)
    cells = torch.arange(3, total + 3).int() if neighbours else scattered(total, 1, generator)[:, 0]
    keys, values = torch.full((2, total + 7, kv_heads, dim), torch.nan, dtype=dtype)
    for half in (keys, values):
        half[cells.long()] = torch.randn(total, kv_heads, dim, generator=generator).to(dtype)
    sequences = Sequences(
        tokens=bounds([n for n, _ in lengths]),
        starts=bounds([c for _, c in lengths]),
        cells=cells,
        longest=(max(c for _, c in lengths), max(n for n, _ in lengths)),
    )
    q = torch.randn(sum(n for n, _ in lengths), kv_heads * sharing, dim, generator=generator).to(dtype)
    options = {"scale": dim**-0.5, "window": window, "softcap": softcap}
    return Chat(sequences, q, keys, values, lengths, options)


def dense_attention(case: Chat) -> Tensor:
    out, sharing = [], case.q.shape[1] // case.keys.shape[1]
    window, softcap = case.options["window"], case.options["softcap"]
    tokens = case.q.double().split([n for n, _ in case.lengths])
    for q, (n, count), cells in zip(tokens, case.lengths, case.sequences.cells.split([c for _, c in case.lengths])):
        k, v = (half[cells].double().repeat_interleave(sharing, 1) for half in (case.keys, case.values))
        scores = torch.einsum("nhd,chd->hnc", q, k) * case.options["scale"]
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        own, at = torch.arange(count - n, count)[:, None], torch.arange(count)
        seen = (at <= own) & (at > own - (window or count))
        out.append(torch.einsum("hnc,chd->nhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(out)


chats = st.builds(
    chat,
    st.lists(st.tuples(st.sampled_from([1, 1, 1, 2, 7, 33]), st.integers(0, 70) | st.just(0)), min_size=1, max_size=5),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 3, 5]),
    st.sampled_from([16, 64]),
    st.sampled_from([None, 1, 9, 50]),
    st.sampled_from([None, 2.0]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
    st.booleans(),
)


@few
@given(case=chats)
def test_attention_is_the_dense_one(backend: str, case: Chat) -> None:
    run = kernels(backend, case.q.dtype)
    out = run.attend(case.q, case.keys, case.values, case.sequences, **case.options)
    assert out.dtype is case.q.dtype
    tolerance = TOLERANCE[case.q.dtype]
    torch.testing.assert_close(out.double(), dense_attention(case), atol=tolerance, rtol=tolerance)


def test_attention_to_large_scores(backend: str) -> None:
    case = chat([(1, 40), (3, 5)], 2, 2, 16, None, None, torch.float32, 0)
    case.q *= 300
    out = kernels(backend, torch.float32).attend(case.q, case.keys, case.values, case.sequences, **case.options)
    torch.testing.assert_close(out.double(), dense_attention(case), atol=1e-4, rtol=1e-4)


def test_queries_may_be_a_view_of_a_wider_tensor(backend: str) -> None:
    case = chat([(1, 20), (2, 3)], 2, 3, 16, None, None, torch.float32, 0)
    wide = torch.randn(3, 10, 16)
    wide[:, 2:8] = case.q
    out = kernels(backend, torch.float32).attend(wide[:, 2:8], case.keys, case.values, case.sequences, **case.options)
    torch.testing.assert_close(out.double(), dense_attention(case), atol=1e-5, rtol=1e-5)


def test_the_variable_names_kernels_that_exist_and_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, dtype, wanted in (
        ("fast", torch.float32, "torch, native or triton"),
        ("native", torch.float16, "fp32 or bf16"),
    ):
        monkeypatch.setenv("ANYADAPTER_KERNELS", value)
        with pytest.raises(ConfigError, match=wanted):
            kernels_for("cpu", dtype)


@pytest.mark.skipif(BACKENDS != ("torch", "native"), reason="of the C kernels")
class TestCompiled:
    @pytest.fixture(autouse=True)
    def _fresh(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
        monkeypatch.delenv("ANYADAPTER_KERNELS", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        native.library.cache_clear()
        yield
        native.library.cache_clear()

    def test_without_a_compiler_torch_does_it_and_says_so(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("CC", "no-such-compiler")
        assert isinstance(kernels_for("cpu", torch.float32), Grouped)
        assert "no C compiler" in caplog.text
        monkeypatch.setenv("ANYADAPTER_KERNELS", "native")
        with pytest.raises(ConfigError, match="no C compiler"):
            kernels_for("cpu", torch.float32)

    @pytest.mark.skipif(native.find_compiler() is None, reason="needs a C compiler")
    def test_it_is_built_once_and_not_where_others_may_write(self, tmp_path: Path) -> None:
        folder = tmp_path / "anyadapter" / "kernels"
        native.library()
        (file,) = folder.iterdir()
        made = file.stat().st_mtime_ns
        native.library.cache_clear()
        native.library()
        assert file.stat().st_mtime_ns == made
        native.library.cache_clear()
        folder.chmod(0o777)
        with pytest.raises(native.CompilerError, match="written by others"):
            native.library()

    @pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
    @pytest.mark.skipif(native.find_compiler() is None, reason="needs a C compiler")
    def test_it_uses_torch_s_threads(self) -> None:
        native.library()
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
        assert len([name for name in mapped if "gomp" in name or "iomp" in name or "libomp" in name]) == 1


@pytest.mark.skipif(BACKENDS != ("torch", "native"), reason="of the C kernels")
@few
@given(st.sampled_from(DTYPES), st.integers(1, 70), st.integers(1, 5), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_a_norm_in_c_is_the_models_own(dtype: torch.dtype, width: int, rows: int, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    module = LlamaRMSNorm(width, eps=1e-5).to(dtype).requires_grad_(False)
    module.weight.copy_(torch.randn(width, generator=generator))
    x = (torch.randn(2, rows, width, generator=generator) * size).to(dtype)
    c = native.Native(dtype)
    assert rms_norm(module, c) == 1e-5
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(c.norm(x, module.weight, 1e-5), module(x), rtol=4 * step, atol=step)


@pytest.mark.skipif(BACKENDS != ("torch", "native"), reason="of the C kernels")
def test_a_norm_of_another_formula_is_left_alone() -> None:
    c = native.Native(torch.float32)
    assert rms_norm(GemmaRMSNorm(8), c) is None  # 1 + weight
    assert rms_norm(LlamaRMSNorm(8).bfloat16(), c) is None
    assert rms_norm(torch.nn.LayerNorm(8), c) is None


@pytest.mark.skipif(BACKENDS != ("torch", "native"), reason="of the C kernels")
@few
@given(st.sampled_from(DTYPES), st.integers(1, 70), st.integers(1, 40), st.floats(1e-2, 30), st.integers(0, 99))
def test_a_gate_in_c_is_silu_times_up(dtype: torch.dtype, width: int, rows: int, size: float, seed: int) -> None:
    both = torch.randn(1, rows, 2 * width, generator=torch.Generator().manual_seed(seed)) * size
    g, u = both.to(dtype).split(width, -1)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(native.Native(dtype).gate(g, u), F.silu(g) * u, rtol=4 * step, atol=step * size)


@pytest.mark.skipif(BACKENDS != ("torch", "native"), reason="of the C kernels")
def test_units_are_recognised_by_what_they_compute() -> None:
    c = native.Native(torch.float32)
    llama, gemma = (Host.of(case(name).build()) for name in ("llama", "gemma"))
    layer = "model.layers.0"
    assert gated_unit(llama, f"{layer}.mlp", c) is not None
    assert gated_unit(gemma, f"{layer}.mlp", c) is None  # GELU
    linears = [[f"{layer}.self_attn.{x}_proj" for x in "qkv"], [f"{layer}.mlp.{x}_proj" for x in ("gate", "up")]]
    assert [paths for paths in joinable(llama) if paths[0].startswith(layer)] == linears
