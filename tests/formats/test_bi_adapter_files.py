"""The raw files of Bi-Adapters' authors: their size, their order, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from families import case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import anyadapter as aa
from anyadapter.formats.bi_adapter import read_official, write_official
from anyadapter.parts.quantised import Packed
from anyadapter.quantize import fill, packed

PIXELS = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def vit(width: int = 16, depth: int = 2, eps: float = 1e-6) -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        intermediate_size=8,
        image_size=16,
        patch_size=8,
        layer_norm_eps=eps,
        num_labels=5,
    )
    return ViTForImageClassification(config).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(PIXELS).logits


@settings(max_examples=20, deadline=None)
@given(
    form=st.sampled_from(["adaptformer", "lora"]),
    bits=st.sampled_from([1, 2, 4, 8]),
    bihead=st.booleans(),
    hidden=st.integers(1, 5),
    classes=st.integers(1, 6),
    depth=st.integers(1, 3),
)
def test_there_and_back(form: str, bits: int, bihead: bool, hidden: int, classes: int, depth: int) -> None:
    model, other = vit(depth=depth), vit(depth=depth)
    about: dict[str, Any] = {"form": form, "hidden": hidden, "bits": bits, "scale": 0.1}
    config = aa.BiAdapterConfig(**about, head_classes=classes, head_bits=1 if bihead else 32)
    data = write_official(aa.attach(model, config))
    matrices = depth * (2 if form == "adaptformer" else 4)
    head = 16 * classes // 8 + 8 if bihead else 4 * 17 * classes
    assert len(data) == matrices * (16 * hidden * bits // 8 + 8) + head  # the card's formula
    read, values = read_official(data, aa.Host.of(other), **about, classes=classes, bihead=bihead)
    assert read == config
    adapter = aa.attach(other, read)
    fill(adapter, values)
    assert write_official(adapter) == data
    assert torch.equal(logits(other), logits(model))


def test_the_order_is_layer_by_layer_down_before_up_then_the_head(tmp_path: Path) -> None:
    model = vit()
    adapter = aa.attach(model, aa.BiAdapterConfig(form="lora", hidden=2, head_classes=3, head_bits=32))
    data, codes, at = write_official(adapter), packed(adapter), 0
    for layer in range(2):
        for part in ("q_proj", "v_proj"):
            for side in ("down", "up"):
                matrix = codes[f"vit.layers.{layer}.attention.{part}.adapter_{side}.weight"]
                assert data[at : at + 4] == bytes(matrix.data.tolist())
                assert struct.unpack("<ff", data[at + 4 : at + 12]) == (matrix.mean, matrix.std)
                at += 12
    weight, bias = (adapter.tensors()[f"classifier.head.{name}"] for name in ("weight", "bias"))
    assert data[at:] == weight.detach().numpy().tobytes() + bias.detach().numpy().tobytes()
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    about: dict[str, Any] = {"form": "lora", "hidden": 2, "classes": 3, "scale": 1.0, "bihead": False}
    _, values = read_official(path, aa.Host.of(vit()), **about)
    assert sum(isinstance(value, Packed) for value in values.values()) == 8


def test_other_settings_than_the_file_s_are_noticed() -> None:
    data = write_official(aa.attach(vit(), aa.BiAdapterConfig(hidden=2, head_classes=3)))
    right: dict[str, Any] = {"form": "adaptformer", "hidden": 2, "classes": 3, "scale": 1.0}
    host = aa.Host.of(vit())
    read_official(data, host, **right)
    for wrong in ({"hidden": 1}, {"classes": 4}, {"form": "lora"}, {"bits": 2}, {"bihead": False}):
        with pytest.raises(aa.ArtefactError, match=rf"has {len(data)} bytes; .* takes \d+"):
            read_official(data, host, **right | wrong)
    with pytest.raises(aa.ArtefactError, match=rf"has {len(data) - 1} bytes"):
        read_official(data[:-1], host, **right)
    with pytest.raises(aa.ConfigError, match="bits is 3"):
        read_official(data, host, **right | {"bits": 3})


@pytest.mark.parametrize(("mean", "std"), [(float("nan"), 1.0), (0.0, 0.0), (0.0, -1.0), (0.0, float("inf"))])
def test_unsound_statistics_are_refused_by_name(mean: float, std: float) -> None:
    data = bytearray(write_official(aa.attach(vit(), aa.BiAdapterConfig(hidden=2, head_classes=3))))
    data[4:12] = struct.pack("<ff", mean, std)
    with pytest.raises(aa.ArtefactError, match=r"vit\.layers\.0\.adapter_down\.weight: its mean"):
        read_official(bytes(data), aa.Host.of(vit()), form="adaptformer", hidden=2, classes=3, scale=1.0)


def test_a_base_with_another_epsilon_is_refused() -> None:
    data = write_official(aa.attach(vit(), aa.BiAdapterConfig(hidden=2, head_classes=3)))
    with pytest.raises(aa.TargetError, match=r"epsilon 1e-12; .* layer_norm_eps=1e-06"):
        read_official(data, aa.Host.of(vit(eps=1e-12)), form="adaptformer", hidden=2, classes=3, scale=1.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (aa.BiAdapterConfig(hidden=2, bits=32, head_classes=3), "bits=32"),
        (aa.BiAdapterConfig(hidden=2), "head_classes=None"),
        (aa.BiAdapterConfig(hidden=2, head_classes=3, head_bits=4), "head_bits=4"),
        (aa.LoRAConfig(rank=2), "A LoRA does not fit"),
    ],
)
def test_what_their_file_cannot_hold_is_refused(config: aa.AdapterConfig, message: str) -> None:
    with pytest.raises(aa.ArtefactError, match=message):
        write_official(aa.attach(vit(), config))


def test_a_last_byte_that_is_not_full_is_kept_in_our_file_and_refused_for_theirs(tmp_path: Path) -> None:
    model, other = vit(width=12), vit(width=12)
    aa.attach(model, aa.BiAdapterConfig(hidden=1, head_classes=3))
    with pytest.raises(aa.ArtefactError, match=r"adapter_down.weight \(1, 12\) does not fill its last byte at 1 bits"):
        write_official(aa.adapters(model)["default"])
    aa.load(other, aa.save_pretrained(model, tmp_path / "a"))
    assert torch.equal(logits(other), logits(model))


def test_the_file_s_values_are_not_rounded_anew() -> None:
    model, other = vit(), vit()
    adapter = aa.attach(model, aa.BiAdapterConfig(hidden=2, head_classes=3))
    data = write_official(adapter)
    config, values = read_official(data, aa.Host.of(other), form="adaptformer", hidden=2, classes=3, scale=1.0)
    read = aa.attach(other, config)
    fill(read, values)
    for name, matrix in packed(adapter).items():
        assert (read.packed[name].mean, read.packed[name].std) == (matrix.mean, matrix.std)
    with pytest.raises(aa.ConfigError, match="already"):
        aa.quantize(read)


def test_other_hosts_are_refused() -> None:
    with pytest.raises(aa.TargetError):
        read_official(b"", aa.Host.of(case("llama").build()), form="adaptformer", hidden=2, classes=3, scale=1.0)
