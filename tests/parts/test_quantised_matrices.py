"""Quantised matrices: the invariants of the card, and that what is packed is what was computed with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import anyadapter as aa
from anyadapter.parts.quantised import (
    BITS,
    FakeQuantise,
    Packed,
    bits_of,
    codebook,
    fake_quantise,
    pack_bits,
    standardise,
    unpack_bits,
)

every_bits = pytest.mark.parametrize("bits", BITS)
matrices = {"rows": st.integers(1, 9), "columns": st.integers(2, 9), "seed": st.integers(0, 10_000)}


def matrix(rows: int, columns: int, seed: int, std: float = 0.3, mean: float = 0.05) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * std + mean


# ------------------------------------------------------------------ the codebook


@every_bits
def test_a_code_is_the_median_of_its_bin(bits: int) -> None:
    codes, boundaries = (v.double() for v in codebook(bits))
    assert codes.shape == (2**bits,)
    assert boundaries.shape == (2**bits - 1,)
    assert torch.equal(codes, -codes.flip(0))
    assert torch.equal(boundaries, -boundaries.flip(0))
    assert (codes.diff() > 0).all()
    below = F.pad(torch.special.ndtr(boundaries), (1, 1))
    below[-1] = 1
    torch.testing.assert_close(torch.special.ndtr(codes), (below[1:] + below[:-1]) / 2, atol=1e-7, rtol=0)
    # 500 steps reach the fixed point, where boundaries are midpoints, at 1, 2 and 4 bits, and not at 8.
    gap = (boundaries - (codes[1:] + codes[:-1]) / 2).abs().max()
    assert gap > 5e-4 if bits == 8 else gap < 2e-7


def test_the_codebook_is_made_on_the_cpu_whatever_device_is_the_default() -> None:
    with torch.device("meta"):
        part = FakeQuantise(2)
    assert part.codes.is_meta
    assert codebook(2)[0].tolist() == pytest.approx([-1.26572, -0.37775, 0.37775, 1.26572], abs=1e-5)


def test_other_widths_are_refused() -> None:
    for bits in (0, 3, 16, 32, True, "1", 1.0):
        with pytest.raises(aa.ConfigError, match="1, 2, 4 or 8 bits"):
            codebook(bits)  # type: ignore[arg-type]


# ------------------------------------------------------------------ rounding in training


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(BITS), **matrices)
def test_at_most_two_to_the_bits_values_and_odd(bits: int, rows: int, columns: int, seed: int) -> None:
    w, quantise = matrix(rows, columns, seed), FakeQuantise(bits)
    out = quantise(w)
    assert out.unique().numel() <= 2**bits
    torch.testing.assert_close(quantise(-w), -out)


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from((1, 2, 4)), factor=st.floats(0.01, 100), offset=st.floats(-10, 10), **matrices)
def test_scaling_and_shifting_pass_through(
    bits: int, factor: float, offset: float, rows: int, columns: int, seed: int
) -> None:
    # In fp32 a z beside a boundary may fall to either side: those far from one must agree.
    w = matrix(rows, columns, seed, std=1.0)
    moved = factor * w + offset
    z, boundaries = standardise(w)[0], codebook(bits)[1]
    clear = ((z[..., None] - boundaries).abs() > 1e-2).all(-1)
    quantise, size = FakeQuantise(bits), factor + abs(offset)
    torch.testing.assert_close(
        quantise(moved)[clear], (factor * quantise(w) + offset)[clear], atol=3e-3 * size, rtol=1e-4
    )


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(BITS), **matrices)
def test_the_gradient_is_the_closed_form(bits: int, rows: int, columns: int, seed: int) -> None:
    w = matrix(rows, columns, seed).requires_grad_()
    g = matrix(rows, columns, seed + 1)
    FakeQuantise(bits)(w).backward(g)
    z, _, std = standardise(w.detach())
    nearest = codebook(bits)[0][torch.bucketize(z, codebook(bits)[1])]
    # exactly, z is divided by std + 1e-5, so that the slope through it is std / (std + 1e-5)
    share = std / (std + 1e-5)
    through_std = z * (std + 1e-5) / std / (w.numel() - 1) * (g * (nearest - share * z)).sum()
    expected = share * g + (1 - share) * g.mean() + through_std
    torch.testing.assert_close(w.grad, expected, atol=1e-4, rtol=1e-4)
    card = g + z / (w.numel() - 1) * (g * (nearest - z)).sum()
    torch.testing.assert_close(w.grad, card, atol=2e-3 * (1 + 1 / std.item()), rtol=2e-3)


@every_bits
def test_it_is_neither_plain_straight_through_nor_detached_statistics(bits: int) -> None:
    w, g = matrix(6, 8, 0).requires_grad_(), matrix(6, 8, 1)
    FakeQuantise(bits)(w).backward(g)
    assert (w.grad - g).abs().max() > 1e-4


def test_a_parametrised_layer_trains_its_latents() -> None:
    layer = nn.Linear(6, 5, bias=False)
    latent = layer.weight
    fake_quantise(layer, "weight", 1)
    assert layer.parametrizations.weight.original is latent  # type: ignore[union-attr]
    assert bits_of(layer, "weight") == 1
    optimizer, x = torch.optim.SGD(layer.parameters(), lr=0.5), torch.randn(4, 6)
    before, first = latent.detach().clone(), layer(x).pow(2).mean()
    for _ in range(20):
        optimizer.zero_grad()
        layer(x).pow(2).mean().backward()
        optimizer.step()
    assert layer(x).pow(2).mean() < first
    assert not torch.equal(latent, before)
    assert layer.weight.unique().numel() == 2
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_the_codebook_stays_in_fp32_when_the_adapter_is_cast() -> None:
    layer = nn.Linear(6, 5, bias=False)
    fake_quantise(layer, "weight", 4)
    layer.to(torch.bfloat16)
    part: Any = layer.parametrizations.weight[0]  # type: ignore[index, union-attr]
    assert torch.equal(part.codes, codebook(4)[0])
    assert layer.weight.dtype == torch.bfloat16
    assert list(layer.state_dict()) == ["parametrizations.weight.original"]


# ------------------------------------------------------------------ packed


@settings(max_examples=100, deadline=None)
@given(bits=st.sampled_from(BITS), count=st.integers(1, 70), seed=st.integers(0, 1000))
def test_bits_are_packed_and_unpacked(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    data = pack_bits(codes, bits)
    assert data.shape == (-(-count * bits // 8),)
    assert torch.equal(unpack_bits(data, bits, count), codes.to(torch.uint8))
    number = sum(code << (bits * i) for i, code in enumerate(codes.tolist()))  # the first in the lowest bits
    assert bytes(data.tolist()) == number.to_bytes(len(data), "little")


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(BITS), **matrices)
def test_what_is_packed_is_what_was_computed_with(bits: int, rows: int, columns: int, seed: int) -> None:
    w = matrix(rows, columns, seed)
    packed = Packed.of(w, bits)
    out = packed.dequantise()
    assert torch.equal(out, FakeQuantise(bits)(w))
    assert torch.equal(out, packed.levels()[packed.codes().int()])
    assert (out.dtype, out.shape) == (torch.float32, w.shape)
    with torch.inference_mode():
        assert torch.equal(packed.dequantise(), out)


def test_a_matrix_packed_again_from_its_values_would_shrink() -> None:
    w = matrix(64, 64, 0)
    once = Packed.of(w, 1)
    assert Packed.of(once.dequantise(), 1).std == pytest.approx(0.67449 * once.std, rel=1e-2)


def test_a_matrix_without_deviation_is_refused_by_name() -> None:
    for bad in (torch.zeros(3, 4), torch.full((3, 4), 0.1), torch.ones(1, 1), torch.full((2, 2), float("nan"))):
        with pytest.raises(aa.ArtefactError, match=r"layers\.0\.lora_B .* cannot be packed"):
            Packed.of(bad, 1, "layers.0.lora_B")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": torch.zeros(2, dtype=torch.uint8)}, r"\(2,\) of uint8 were given; .* is \(3,\)"),
        ({"data": torch.zeros(3)}, "of float32 were given"),
        ({"mean": float("nan")}, "expected a finite mean"),
        ({"std": 0.0}, "a positive deviation"),
        ({"std": float("inf")}, "a positive deviation"),
        ({"shape": (5, 5)}, r"is \(4,\) of uint8"),
    ],
)
def test_unsound_packed_matrices_are_refused(change: dict[str, Any], message: str) -> None:
    sound = {"data": torch.zeros(3, dtype=torch.uint8), "mean": 0.0, "std": 1.0, "shape": (3, 7), "bits": 1}
    Packed(**sound)
    with pytest.raises(aa.ArtefactError, match=message):
        Packed(**sound | change)
