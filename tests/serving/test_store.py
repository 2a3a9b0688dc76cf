"""The store and folders from elsewhere: whatever they hold, they are refused or served, and nothing of the refused stays."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from served import lora, save_adapter
from torch import nn

import anyadapter as aa
from anyadapter.core.errors import AnyAdapterError, ArtefactError
from anyadapter.core.host import Host
from anyadapter.serving.store import AdapterStore

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KINDS: dict[str, Any] = {
    "lora": lora(2),
    "ia3": aa.IA3Config(),
    "bottleneck": aa.BottleneckConfig(placement="parallel_block", width=3, bias=True),
    "prefix": aa.PrefixConfig(tokens=2),
    "gated": aa.LlamaAdapterConfig(length=2, last_layers=1),
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return case("llama").build().requires_grad_(False)


@pytest.fixture(scope="module")
def saved(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One adapter of each kind; the LoRA and the prefix are also there without our own settings, as PEFT writes them."""
    root = tmp_path_factory.mktemp("saved")
    for seed, (name, config) in enumerate(KINDS.items()):
        save_adapter(model, root, name, config, seed)
    save_adapter(model, root, "quantised", lora(2), 9, bits=1)
    for name in ("lora", "prefix", "ia3"):
        shutil.copytree(root / name, root / f"{name}-peft")
        config = json.loads((root / name / CONFIG).read_text())
        del config["anyadapter"]
        (root / f"{name}-peft" / CONFIG).write_text(json.dumps(config))
    return root


def store_of(model: nn.Module, root: Path, **how: Any) -> AdapterStore:
    host = Host.of(model)
    config: Any = model.config
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return AdapterStore(host, config.num_hidden_layers, width, torch.float32, root=root, **how)


# ---------------------------------------------------------------------- configurations

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.sampled_from([2**70, math.nan, math.inf, -math.inf, 0.5, -1.0])
    | st.sampled_from(["", "x", "lora", "native", "peft", "q_proj", "all-linear", "*", "[", "\ud800", "\0"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["", "x", "tensors"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something can be put in a configuration: every key at every depth."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_configuration_is_served_or_refused(model: nn.Module, saved: Path, data: st.DataObject) -> None:
    """Through the scan at the start, and through registration; what is registered unread can be read or is refused."""
    name = data.draw(st.sampled_from(sorted(path.name for path in saved.iterdir())))
    config = json.loads((saved / name / CONFIG).read_text())
    if "anyadapter" in config:  # its values would be most of the places
        tensors = config["anyadapter"]["base"]["tensors"]
        config["anyadapter"]["base"]["tensors"] = dict(list(tensors.items())[:1])
    for _ in range(data.draw(st.integers(1, 2))):
        *outer, last = data.draw(st.sampled_from(list(places(config))))
        inner: Any = config
        for key in outer:
            inner = inner[key]
        inner[last] = data.draw(json_values)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(saved / name, Path(folder) / "new")
        (Path(folder) / "new" / CONFIG).write_text(json.dumps(config))
        store = store_of(model, Path(folder), max_rank=64, max_cells=500)
        refused = store.scan()
        assert sorted([*refused, *store.names()]) == ["new"]
        try:
            store.register("new")
        except AnyAdapterError:
            return
        assert not refused
        assert torch.isfinite(store.pack(store.get("new"))).all() or name == "quantised"


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("layout", []),
        ("method", {}),
        ("config", {"rank": [2]}),
        ("config", {"targets": 5}),
        ("bits", "x"),
        ("base", "x"),
        ("base", {"tensors": 1}),
        ("scale", math.nan),
        ("scale", -math.inf),
        ("scale", 10**400),
        ("scale", "1"),
        ("scale", True),
        ("tensors_sha256", 5),
    ],
    ids=str,
)
def test_bad_settings(model: nn.Module, saved: Path, tmp_path: Path, where: str, value: Any) -> None:
    shutil.copytree(saved / "lora", tmp_path / "good")
    shutil.copytree(saved / "lora", tmp_path / "new")
    config = json.loads((tmp_path / "new" / CONFIG).read_text())
    config["anyadapter"][where] = value
    (tmp_path / "new" / CONFIG).write_text(json.dumps(config))
    store = store_of(model, tmp_path)
    refused = store.scan()
    assert refused.keys() == (set() if where == "tensors_sha256" else {"new"}), (
        "a hash is compared when the file is read"
    )
    assert "good" in store.names()
    with pytest.raises(AnyAdapterError):
        store.register("new")


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without the rights to read everything, which tests in a container have."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_must_not_be_read_is_named_and_the_others_are_served(model: nn.Module, saved: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        for name in ("folder", "config", "tensors", "good"):
            shutil.copytree(saved / "lora", root / name)
        closed = [root / "folder", root / "config" / CONFIG, root / "tensors" / TENSORS]
        for path in closed:
            path.chmod(0)
        try:
            with as_nobody():
                store = store_of(model, root)
                refused = store.scan()
                for name in ("folder", "config", "tensors"):
                    with pytest.raises(ArtefactError, match="Permission denied"):
                        store.register(name)
        finally:
            for path in closed:
                path.chmod(0o755)
    assert refused.keys() == {"folder", "config", "tensors"}
    assert all("Permission denied" in reason for reason in refused.values())
    assert store.names() == ["good"]


# ---------------------------------------------------------------------- what stays


def test_refused_settings_leave_nothing_and_known_ones_are_shared(model: nn.Module, saved: Path) -> None:
    store = store_of(model, saved, max_rank=1)
    for _ in range(3):
        with pytest.raises(ArtefactError, match="has rank 2; this server takes 1"):
            store.register("lora")
    gc.collect()
    assert len(store.templates) == 0
    store = store_of(model, saved)
    first, again = store.register("lora"), store.register("other", "lora")
    assert first.template is again.template
    for name in ("lora", "other"):
        store.unload(name)
    del first, again
    gc.collect()
    assert len(store.templates) == 0


def test_kept_copies_last_as_long_as_somebody_has_the_adapter(model: nn.Module, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "lora", tmp_path / "lora")
    store = store_of(model, tmp_path, keep=True)
    old = store.register("lora")
    first = store.pack(old)
    (tmp_path / "lora" / TENSORS).unlink()
    assert store.pack(old) is first, "it was read again"
    shutil.copytree(saved / "lora", tmp_path / "lora", dirs_exist_ok=True)
    new = store.register("lora", check=False)
    assert store.pack(old) is first, "a request in hand still needs it"
    copies = [weakref.ref(old), weakref.ref(first), weakref.ref(new)]
    store.pack(new)
    del old, first, new
    gc.collect()
    assert [copy() is None for copy in copies] == [True, True, False]
    store.unload("lora")
    gc.collect()
    assert copies[2]() is None


def test_what_is_packed_after_it_was_forgotten_is_not_kept(model: nn.Module, saved: Path) -> None:
    store = store_of(model, saved, keep=True)
    old = store.register("lora", check=False)
    store.unload("lora")
    packed = weakref.ref(store.pack(old))
    del old
    gc.collect()
    assert packed() is None


def test_a_file_that_is_replaced_while_it_is_read(
    model: nn.Module, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The values it was checked with are in memory already, but they may be half of each."""
    shutil.copytree(saved / "lora", tmp_path / "lora")
    store = store_of(model, tmp_path)
    found = store.register("lora")
    file = tmp_path / "lora" / TENSORS
    other = {name: tensor + 1 for name, tensor in load_file(file).items()}
    read_bytes = Path.read_bytes

    def swapped(path: Path) -> bytes:
        if path == file:
            save_file(other, file)
        return read_bytes(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", swapped)
        with pytest.raises(ArtefactError, match="have changed since it was loaded; load it again"):
            store.pack(found)


def test_a_file_that_is_replaced_while_its_header_is_read(
    model: nn.Module, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(saved / "lora-peft", tmp_path / "lora")  # which has no hash of its values
    store = store_of(model, tmp_path)
    file = tmp_path / "lora" / TENSORS
    open_file = Path.open

    def swapped(path: Path, *how: Any, **more: Any) -> Any:
        opened = open_file(path, *how, **more)
        if path == file:
            other = {name: tensor + 1 for name, tensor in load_file(file).items()}
            save_file(other, tmp_path / "other")
            os.replace(tmp_path / "other", file)
        return opened

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", swapped)
        found = store.register("lora", check=False)
    with pytest.raises(ArtefactError, match="have changed since it was loaded; load it again"):
        store.pack(found)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError("full"), RuntimeError("full")], ids=repr)
def test_memory_that_is_short_costs_one_adapter(
    model: nn.Module, saved: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(model, saved)

    def full(_: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", full)
        with pytest.raises(ArtefactError, match="'lora' cannot be read .*full"):
            store.register("lora")
    assert store.names() == []
    assert store.register("lora").checked
