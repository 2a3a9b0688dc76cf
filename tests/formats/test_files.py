"""Files from elsewhere are untrusted: every hostile or damaged one is refused, and nothing is lost when writing fails."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from families import case
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import anyadapter as aa
from anyadapter.formats import files


def model(seed: int = 0) -> nn.Module:
    built = case("llama").build().requires_grad_(False)
    if seed:
        torch.manual_seed(seed)
        for parameter in built.parameters():
            nn.init.normal_(parameter, std=0.1)
    return built


@torch.no_grad()
def logits(m: nn.Module) -> Tensor:
    return m(input_ids=torch.arange(14).reshape(2, 7)).logits


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    m = model()
    for parameter in aa.attach(m, aa.LoRAConfig(rank=2, targets="q_proj")).parameters():
        nn.init.normal_(parameter)
    return aa.save_pretrained(m, tmp_path / "adapter")


def refused(folder: Path, error: type[Exception], message: str, **options: Any) -> None:
    """Loading fails so, and leaves the model as it was."""
    m = model()
    before = logits(m)
    with pytest.raises(error, match=message):
        aa.load(m, folder, **options)
    assert not aa.adapters(m)
    assert torch.equal(logits(m), before)


def edit_config(folder: Path, change: Any) -> None:
    path = folder / files.CONFIG
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Any, keep_hash: bool = False) -> None:
    tensors = load_file(folder / files.TENSORS)
    change(tensors)
    save_file(tensors, folder / files.TENSORS)
    if not keep_hash:
        edit_config(folder, lambda c: c["anyadapter"].pop("tensors_sha256"))


def test_saved_and_loaded_adapters_answer_alike(saved: Path) -> None:
    first, second = model(), model()
    loaded = aa.load(first, saved)
    assert not torch.equal(logits(first), logits(second))
    assert not any(p.requires_grad for p in loaded.parameters())
    aa.load(second, saved, "again", trainable=True)
    assert torch.equal(logits(first), logits(second))
    assert {p.name for p in saved.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def test_scale_travels_with_the_file(tmp_path: Path) -> None:
    first, second = model(), model()
    adapter = aa.attach(first, aa.LoRAConfig(rank=2))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    adapter.scale = 0.25
    aa.load(second, aa.save_pretrained(first, tmp_path / "a"))
    assert torch.equal(logits(first), logits(second))


def test_names_of_modules_and_adapters_never_touch_the_keys(tmp_path: Path) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"weight_lora_A": nn.Linear(4, 4), "lora": nn.ModuleDict({"default": nn.Linear(4, 4)})})

    first, second = network(), network()
    mine = aa.attach(first, aa.LoRAConfig(rank=2), "lora").tensors()
    for tensor in mine.values():
        nn.init.normal_(tensor)
    aa.save_pretrained(first, tmp_path / "a", "lora")
    theirs = aa.load(second, tmp_path / "a", "weight").tensors()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert len(load_file(tmp_path / "a" / files.TENSORS)) == 4


def test_the_base_is_recognised_in_another_precision_and_refused_when_it_is_another(saved: Path) -> None:
    aa.load(model().to(torch.bfloat16), saved)
    m = model(seed=1)
    with pytest.raises(aa.BaseMismatchError, match="has other values than this one's"):
        aa.load(m, saved)
    assert not aa.adapters(m)
    aa.load(m, saved, check_base=False)
    with pytest.raises(aa.BaseMismatchError, match="does not exist"):
        aa.load(case("bert").build(), saved)


@pytest.mark.parametrize(
    "base",
    [
        "x",
        None,
        [],
        {"tensors": []},
        {"tensors": {"lm_head.weight": 1}},
        {"tensors": {"lm_head.weight": {"values": [0.5] * 8}}},
        {"tensors": {"lm_head.weight": {"shape": [32, 16], "values": [0.5] * 7}}},
        {"tensors": {"lm_head.weight": {"shape": [32, 16], "values": ["0.5"] * 8}}},
        {"tensors": {"lm_head.weight": {"shape": [32, 16], "values": [10**400] * 8}}},
    ],
    ids=lambda base: str(base)[:70],
)
def test_a_fingerprint_that_is_none(saved: Path, base: Any) -> None:
    edit_config(saved, lambda c: c["anyadapter"].update(base=base))
    refused(saved, aa.ArtefactError, "is malformed")


def test_missing_extra_and_misshaped_tensors(saved: Path) -> None:
    key = next(k for k in load_file(saved / files.TENSORS) if "lora_A" in k)
    edit_tensors(saved, lambda t: t.__setitem__(key, torch.zeros(3, 5)))
    refused(saved, aa.ArtefactError, r"is \(3, 5\), expected \(2,")
    edit_tensors(saved, lambda t: t.__setitem__("surplus", t.pop(key)), keep_hash=True)
    refused(saved, aa.ArtefactError, "missing")


def test_tensors_of_another_save_are_noticed(saved: Path) -> None:
    edit_tensors(saved, lambda t: [v.add_(1) for v in t.values()], keep_hash=True)
    refused(saved, aa.ArtefactError, "is not the file that adapter_config.json was saved with")


def test_not_a_number(saved: Path) -> None:
    edit_tensors(saved, lambda t: next(iter(t.values())).fill_(float("nan")))
    refused(saved, aa.ArtefactError, "NaN or infinity")


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_truncated(saved: Path, keep: int) -> None:
    path = saved / files.TENSORS
    path.write_bytes(path.read_bytes()[:keep])
    refused(saved, aa.ArtefactError, "truncated|damaged")


def header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


HOSTILE = {
    "100,000 entries": (
        header({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}),
        "declares 100000 tensors",
    ),
    "shape that overflows": (
        header({"t": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"0000"),
        "declares shape",
    ),
    "negative size": (header({"t": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}), "malformed"),
    "unknown dtype": (header({"t": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}}, b"0000"), "has dtype 'F7'"),
    "header longer than the file": (struct.pack("<Q", 2**40) + b"{}", "not a whole safetensors file"),
    "header that is not JSON": (struct.pack("<Q", 4) + b"}}}}", "damaged header"),
    "header nested deeply": (struct.pack("<Q", 200_000) + b"[" * 200_000, "damaged header"),
    "more bytes than declared": (
        header({"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"0" * 9),
        "truncated or",
    ),
    "overlapping tensors": (
        header({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, b"0000"),
        "'b' overlaps the one before",
    ),
    "a gap between tensors": (
        header({n: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for n, i in (("b", 2), ("a", 0))}, b"000"),
        "'b' leaves a gap before it",
    ),
    "a gap before the first tensor": (
        header({"t": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, b"00"),
        "'t' leaves a gap before it",
    ),
    "metadata that is no dictionary": (header({"__metadata__": ["format"]}), "__metadata__ is malformed"),
    "metadata that is no text": (header({"__metadata__": {"format": 1}}), "__metadata__ is malformed"),
    "metadata that only the reader refuses": (header({"__metadata__": {"format": "\ud800"}}), "cannot be read"),
    "a dtype that is a list": (header({"t": {"dtype": [], "shape": [0], "data_offsets": [0, 0]}}), "'t' is malformed"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_safetensors(saved: Path, what: str) -> None:
    content, message = HOSTILE[what]
    (saved / files.TENSORS).write_bytes(content)
    refused(saved, aa.ArtefactError, message)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6), order=st.randoms(use_true_random=False))
def test_the_order_of_a_header_is_free_and_empty_tensors_may_be_anywhere(
    sizes: list[int], order: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    entries = [
        (f"t{i}", {"dtype": "U8", "shape": [n], "data_offsets": [end - n, end]})
        for i, (n, end) in enumerate(zip(sizes, ends))
    ]
    order.shuffle(entries)
    path = tmp_path_factory.mktemp("order") / "x.safetensors"
    path.write_bytes(header({"__metadata__": {"format": "pt"}, **dict(entries)}, bytes(range(ends[-1]))))
    found = files.read_tensors(path)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        f"t{i}": [*range(end - n, end)] for i, (n, end) in enumerate(zip(sizes, ends))
    }


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=300))
def test_any_bytes_are_refused_or_read(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    path.write_bytes(content)
    with contextlib.suppress(aa.ArtefactError):
        files.read_tensors(path)


class Exploit:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.marker),))


def test_a_pickle_is_refused_and_never_executed(saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (saved / files.TENSORS).unlink()
    torch.save({"x": Exploit(marker)}, saved / files.PICKLE)
    refused(saved, aa.ArtefactError, "allow_pickle=True")
    refused(saved, aa.ArtefactError, "holds more than tensors", allow_pickle=True)
    assert not marker.exists()


def test_a_pickle_of_tensors_is_read_only_when_asked(saved: Path) -> None:
    tensors = load_file(saved / files.TENSORS)
    (saved / files.TENSORS).unlink()
    torch.save(tensors, saved / files.PICKLE)
    refused(saved, aa.ArtefactError, "allow_pickle=True")
    assert aa.load(model(), saved, allow_pickle=True)


@pytest.mark.parametrize(
    "name", ["..", "../adapter", "/etc", "a/../b", "a%2f..", "a\0b", "．．", "", ".hidden", "link", "a\\b", "x" * 129]
)
def test_names_stay_inside_their_root(tmp_path: Path, saved: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(saved)
    refused(name, aa.ArtefactError, "is not a name|leads out of", root=root)  # type: ignore[arg-type]


def test_a_name_inside_its_root(saved: Path) -> None:
    assert aa.load(model(), "adapter", root=saved.parent)
    refused("adapterr", aa.ArtefactError, "There is no adapter 'adapterr'", root=saved.parent)  # type: ignore[arg-type]


CONFIGS = {
    "not JSON": ("{", "is not JSON"),
    "a list": ("[]", "not an object"),
    "nothing known": ("{}", "of no layout we read"),
    "another version of the format": ('{"anyadapter": {"format_version": 99, "config": {}}}', "format version 99"),
    "an unknown method": ('{"anyadapter": {"format_version": 1, "method": "lra", "config": {}}}', "no method 'lra'"),
    "code to import": (
        '{"anyadapter": {"format_version": 1, "method": "os:system", "config": {}}, "auto_map": {"AutoModel": "x.Y"}}',
        "no method 'os:system'",
    ),
    "a setting of the future": (
        '{"anyadapter": {"format_version": 1, "method": "lora", "config": {"novel": 1}}}',
        "no setting 'novel'.*pip install -U",
    ),
    "a setting of the wrong kind": (
        '{"anyadapter": {"format_version": 1, "method": "lora", "config": {"rank": "8"}}}',
        "rank is '8'",
    ),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_bad_configurations(saved: Path, what: str) -> None:
    content, message = CONFIGS[what]
    (saved / files.CONFIG).write_text(content)
    refused(saved, aa.AnyAdapterError, message)


def test_a_missing_folder_and_a_missing_file(saved: Path) -> None:
    refused(saved.parent / "nowhere", aa.ArtefactError, "There is no folder")
    (saved / files.TENSORS).unlink()
    refused(saved, aa.ArtefactError, "holds no adapter_model.safetensors")


def test_a_full_disk_loses_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    m = model()
    aa.attach(m, aa.LoRAConfig(rank=4))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(aa.ArtefactError, match="No space left on device.*unchanged"):
        aa.save_pretrained(m, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_an_empty_tensor_is_not_written(tmp_path: Path) -> None:
    m = model()
    adapter = aa.attach(m, aa.LoRAConfig(rank=2, targets="q_proj"))
    next(iter(adapter.branches.values())).lora_A.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(aa.ArtefactError, match="is empty"):
        aa.save_pretrained(m, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_users_own_model_card_is_kept(saved: Path) -> None:
    (saved / "README.md").write_text("mine")
    m = model()
    aa.load(m, saved)
    aa.save_pretrained(m, saved)
    assert (saved / "README.md").read_text() == "mine"


def test_inspect_needs_no_model(saved: Path) -> None:
    facts = aa.inspect(saved)
    assert facts["method"] == "lora"
    assert facts["parameters"] == sum(t.numel() for t in load_file(saved / files.TENSORS).values())
    assert facts["bytes"] == (saved / files.TENSORS).stat().st_size
    assert facts["settings"]["rank"] == 2


def test_a_repository_is_read_from_the_hubs_cache(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, as a second load of a Hub repository is: the cache holds links into its blobs."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--somebody--tickets" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for name in (files.CONFIG, files.TENSORS):
        (snapshot / name).symlink_to(saved / name)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    mine, theirs = model(), model()
    aa.load(mine, saved)
    aa.load(theirs, "somebody/tickets")
    assert torch.equal(logits(mine), logits(theirs))
    refused("somebody/others", aa.ArtefactError, "is no local folder, and the Hub did not give it")  # type: ignore[arg-type]


def test_pushing_uploads_the_whole_artefact(monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, Any] = {}

    class Hub:
        def __init__(self, token: str | None) -> None:
            uploaded["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id, "__str__": lambda self: f"hub/{repo_id}"})()

        def upload_folder(self, repo_id: str, folder_path: str) -> None:
            uploaded[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    m = model()
    aa.attach(m, aa.LoRAConfig(rank=2))
    assert aa.push_to_hub(m, "me/mine", token="secret") == "hub/me/mine"
    assert uploaded == {"token": "secret", "me/mine": ["README.md", "adapter_config.json", "adapter_model.safetensors"]}
