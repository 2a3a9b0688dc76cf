"""One-bit adapters stay bits in the pool: what they say, and how little room they take."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from served import disagreement, greedy, lora, run, save_adapter, tokens_of
from torch import nn

import anyadapter as aa
from anyadapter.core.errors import ArtefactError
from anyadapter.core.host import Host
from anyadapter.formats.files import TENSORS
from anyadapter.parts.quantised import Packed
from anyadapter.serving.engine import Engine, EngineSettings
from anyadapter.serving.packing import plan
from anyadapter.serving.store import AdapterStore

TIE = 1e-3  # two logits closer than this are the same to fp32 sums of another order


def save_both(model: nn.Module, folder: Path, name: str, config: Any, seed: int, bits: int = 1, **how: Any) -> None:
    """A quantised adapter that changes what the model says, and the one it was made of."""
    save_adapter(model, folder, f"dense-{name}", config, seed, strength=4.0)
    save_adapter(model, folder, name, config, seed, strength=4.0, bits=bits, **how)


CONFIGS: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "narrow": (lora(3), 1, {}),
    "wide": (lora(40), 1, {}),
    "some": (lora(8, ("self_attention.query", "feed_forward.down")), 1, {}),
    "two-bits": (lora(8), 2, {}),
    "latents": (lora(8), 1, {"latents": True}),
    "bottleneck": (aa.BottleneckConfig(placement="parallel", width=16, bias=False), 1, {}),
    "with-biases": (aa.BottleneckConfig(placement="parallel", width=16), 1, {}),
}


def test_each_says_in_a_batch_what_it_says_alone(smollm: nn.Module, smollm_tokenizer: Any, tmp_path: Path) -> None:
    for seed, (name, (config, bits, how)) in enumerate(CONFIGS.items()):
        save_both(smollm, tmp_path, name, config, seed, bits, **how)
    engine = Engine(smollm, settings=EngineSettings(cells=12000, adapters=str(tmp_path)))
    assert engine.store.scan() == {}
    prompt = tuple(smollm_tokenizer("Once upon a time, in a small village by the sea,")["input_ids"])
    for name in CONFIGS:
        engine.submit(greedy(name, prompt, 6, **{name: 1.0}))
        engine.submit(greedy(f"dense-{name}", prompt, 6, **{f"dense-{name}": 1.0}))
    engine.submit(greedy("mixed", prompt, 6, **{"wide": 0.5, "dense-narrow": 1.0}))
    engine.submit(greedy("base", prompt, 6))
    said = {id: tokens_of(outputs) for id, outputs in run(engine).items()}
    engine.close()
    assert disagreement(smollm, prompt, said["base"]) < TIE
    for name in CONFIGS:
        assert disagreement(smollm, prompt, said[name]) > TIE, f"{name} changed nothing"
        aa.load(smollm, tmp_path / name, "oracle")
        assert disagreement(smollm, prompt, said[name]) < TIE, name
        aa.detach(smollm, "oracle")
    aa.load(smollm, tmp_path / "wide", "wide").scale = 0.5
    aa.load(smollm, tmp_path / "dense-narrow", "narrow")
    assert disagreement(smollm, prompt, said["mixed"]) < TIE


def test_a_pool_holds_twelve_times_as_many(smollm: nn.Module, tmp_path: Path) -> None:
    """Of rank 8 and more, on all seven linears, in the pool's 16 bits or in one."""
    for rank in (8, 16, 64):
        save_both(smollm, tmp_path, f"r{rank}", lora(rank), rank)
        store = AdapterStore(Host.of(smollm), 30, 192, torch.bfloat16, root=tmp_path)
        dense, bits = store.register(f"dense-r{rank}").cells, store.register(f"r{rank}").cells
        assert dense >= 12 * bits, f"rank {rank}: {dense} cells and {bits}"


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 40),
    width=st.sampled_from([16, 32, 48, 192]),
    sizes=st.tuples(st.integers(2, 130), st.integers(2, 1100)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_bits_in_cells_are_the_matrix(
    rank: int, width: int, sizes: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    """Every row of A and column of B, read from its cells by hand, is the dequantised one to the bit; none share a byte."""
    torch.manual_seed(seed)
    rank = min(rank, *sizes)
    model = nn.Sequential(nn.Linear(*sizes), nn.Linear(sizes[1], sizes[0]))
    adapter = aa.attach(model, aa.LoRAConfig(rank=rank, targets=("0", "1")))
    for tensor in adapter.tensors().values():
        nn.init.normal_(tensor)
    packed = {name: Packed.of(tensor.detach(), 1) for name, tensor in adapter.tensors().items()}
    packing = plan(adapter, Host.of(model), 2, width, dtype, dict.fromkeys(packed, 1))
    whole = packing.pack(packed).view(torch.uint8).numpy()
    counts = np.zeros(whole.shape, dtype=int)
    for path, part in packing.parts.items():
        cells, taken = whole[packing.layer_of[path]], counts[packing.layer_of[path]]
        for block, name in ((part.first, "lora_A"), (part.second, "lora_B")):
            assert block is not None
            where, offsets = block.places()
            cell, byte = block.levels
            taken[block.half, cell, byte : byte + 8] += 1
            levels = struct.unpack("2f", cells[block.half, cell, byte : byte + 8].tobytes())
            wanted = packed[f"{path}.{name}.weight"].dequantise()
            for row, held, offset in zip(wanted if name == "lora_A" else wanted.T, where, offsets):
                size = -(-len(row) // 32) * 4
                for i, piece in enumerate(held):
                    end = min(offset + size - i * block.room, block.room)
                    taken[block.half, piece, offset:end] += 1
                data = cells[block.half, held].reshape(-1)[offset : offset + size]
                bits = np.unpackbits(data, bitorder="little")[: len(row)]
                assert np.array_equal(np.float32(levels)[bits], row.numpy())
    assert counts.max() == 1
    assert packing.cells == np.flatnonzero(counts.any(axis=(0, 1, 3))).max() + 1


def test_a_damaged_file_is_refused_at_the_door(smollm: nn.Module, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_both(smollm, tmp_path, "good", lora(8), 0)
    store = AdapterStore(Host.of(smollm), 30, 192, torch.float32, root=tmp_path)
    file = tmp_path / "good" / TENSORS
    whole = load_file(file)
    first = next(name for name in sorted(whole) if "lora_A" in name)
    for change, message in (
        ({first: whole[first][:-1].clone()}, "bytes"),
        ({"mean/std": whole["mean/std"][:-1].clone()}, "expected"),
        ({first: whole[first] ^ 255}, "is not the file"),
    ):
        save_file({**whole, **change}, file)
        with pytest.raises(ArtefactError, match=message):
            store.register("good")
    save_file(whole, file)
    assert store.register("good").packing.parts
