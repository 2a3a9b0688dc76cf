"""A server with small limits over the real model, with good adapters and ones damaged in each way we know."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from live import ADMIN, KEY, Live, stop_keeping
from safetensors.torch import load_file, save_file
from served import lora, save_adapter
from torch import nn

import anyadapter as aa
from anyadapter.serving.engine import Engine, EngineSettings

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
LIMITS: dict[str, Any] = {"max_n": 4, "max_tokens": 200, "max_prompts": 3, "max_prompt_tokens": 100, "max_body": 5000}
LIMITS |= {"max_stop": 2, "max_stop_chars": 10, "max_logprobs": 5, "max_adapters": 2, "body_seconds": 0.5}


@pytest.fixture(scope="module")
def root(smollm_and_tokenizer: tuple[nn.Module, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good adapters, and one damaged in each way we know."""
    model, root = smollm_and_tokenizer[0], tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(["good", "other"]):
        save_adapter(model, root, name, lora(4, "self_attention.query"), seed, strength=6)
    save_adapter(model, root, "rank", lora(16, "self_attention.query"), 0)
    for name in ("nan", "extra", "missing", "shape", "header", "overflow", "dtype", "not-json", "pickle"):
        shutil.copytree(root / "good", root / name)
    tensors = load_file(root / "good" / TENSORS)
    first = sorted(tensors)[0]
    save_file(tensors | {first: torch.full_like(tensors[first], torch.nan)}, root / "nan" / TENSORS)
    save_file(tensors | {"more": torch.ones(2)}, root / "extra" / TENSORS)
    save_file({k: v for k, v in tensors.items() if k != first}, root / "missing" / TENSORS)
    save_file(tensors | {first: tensors[first][:, :-1].contiguous()}, root / "shape" / TENSORS)
    save_file(tensors | {first: tensors[first].to(torch.complex64)}, root / "dtype" / TENSORS)
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    write_header(root / "header" / TENSORS, {f"t{n}": entry for n in range(100_000)})
    write_header(root / "overflow" / TENSORS, {first: {**entry, "shape": [2**62, 4]}})
    (root / "not-json" / CONFIG).write_text("{")
    (root / "pickle" / TENSORS).unlink()
    (root / "pickle" / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(str(root.parent / "marker"))))
    outside = tmp_path_factory.mktemp("outside")
    shutil.copytree(root / "good", outside / "good")
    (root / "linked").symlink_to(outside / "good")
    shutil.copytree(root / "good", root / "linked-file")
    (root / "linked-file" / TENSORS).unlink()
    (root / "linked-file" / TENSORS).symlink_to(outside / "good" / TENSORS)
    save_adapter(model, root, "large", aa.PrefixConfig(tokens=1600), 0, dtype=torch.bfloat16)
    for name, change in CONFIGS.items():
        shutil.copytree(root / "good", root / name)
        config = json.loads((root / name / CONFIG).read_text())
        change(config["anyadapter"])
        (root / name / CONFIG).write_text(json.dumps(config))
    for name in ("overlap", "late"):
        shutil.copytree(root / "good", root / name)
        damage(root / name / TENSORS, overlap=name == "overlap")
    return root


CONFIGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "layout": lambda ours: ours.update(layout=[]),
    "method": lambda ours: ours.update(method={}),
    "base-text": lambda ours: ours.update(base="x"),
    "base-other": lambda ours: [t["values"].reverse() for t in ours["base"]["tensors"].values()],
    "scale": lambda ours: ours.update(scale=float("nan")),
}


def write_header(path: Path, header: dict[str, Any], data: bytes = bytes(4)) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def damage(path: Path, overlap: bool) -> None:
    """Two tensors in one place; or a header that is refused only when the values are read: its metadata is no Unicode."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if overlap:
        first, second, *_ = (name for name, entry in header.items() if name != "__metadata__" and "lora_A" in name)
        header[second]["data_offsets"] = header[first]["data_offsets"]
    else:
        header["__metadata__"] = {"format": "\ud800"}
    write_header(path, header, data)


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


@pytest.fixture(scope="module")
def engine(smollm_and_tokenizer: tuple[nn.Module, Any], root: Path) -> Iterator[Engine]:
    settings = EngineSettings(
        cells=1500,
        max_running=2,
        max_waiting=4,
        step_tokens=32,
        policy="vtc",
        adapters=str(root),
        max_context=600,
        max_rank=8,
    )
    engine = Engine(*smollm_and_tokenizer, settings=settings)
    for name in ("good", "other"):
        engine.store.register(name)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def shared(engine: Engine) -> Iterator[Live]:
    live = Live(engine, key=KEY, admin_key=ADMIN, allow_adapter_updates=True, **LIMITS)
    yield live
    live.engine = engine
    stop_keeping(live)


@pytest.fixture
def live(shared: Live) -> Iterator[Live]:
    yield shared
    shared.idle()  # no test leaves a cell, a request or a stream behind


@pytest.fixture
def admin(live: Live) -> Iterator[httpx.Client]:
    with live.client(ADMIN) as client:
        yield client
