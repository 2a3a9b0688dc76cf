"""Quantised adapters of any method: trained, packed, saved, loaded, merged, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Case, case
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from subjects import IDS, METHODS, SUBJECTS, Subject, attached, logits, model
from torch import nn

import anyadapter as aa
from anyadapter.core.catalogue import method, methods
from anyadapter.formats import files
from anyadapter.formats.native import restore
from anyadapter.formats.packed import STATISTICS
from anyadapter.formats.quantize import quantize_folder
from anyadapter.parts.quantised import BITS, Packed
from anyadapter.quantize import fill, packed, places, quantised

every_method = pytest.mark.parametrize("subject", [pytest.param(s, id=n) for n, s in SUBJECTS.items()])


def test_every_method_of_ours_is_among_them() -> None:
    ours = {name for name in methods() if method(name).__module__.startswith("anyadapter.")}
    assert {subject.config.method for subject in SUBJECTS.values()} == ours


def step(m: nn.Module, adapter: aa.Adapter, count: int = 3, rate: float = 0.05) -> list[float]:
    """Losses of a few steps of training."""
    optimizer, losses = torch.optim.AdamW(adapter.parameters(), lr=rate), []
    for _ in range(count):
        loss = m(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ------------------------------------------------------------------ every method


@every_method
@pytest.mark.parametrize("bits", [1, 4])
def test_quantised_saved_and_loaded_it_is_the_same_bit_for_bit(subject: Subject, bits: int, tmp_path: Path) -> None:
    first, second = subject.model(), subject.model()
    adapter = attached(first, subject.config)
    exact = subject.outputs(first)
    dense = {name: tensor.detach().clone() for name, tensor in adapter.tensors().items()}
    assert aa.quantize(adapter, bits) is adapter
    assert set(quantised(adapter)) == {name for name, tensor in dense.items() if tensor.dim() >= 2}
    answers = subject.outputs(first)
    assert not torch.allclose(answers, exact, atol=1e-4)
    folder = aa.save_pretrained(first, tmp_path / "a")
    loaded = aa.load(second, folder)
    assert torch.equal(subject.outputs(second), answers)
    for name, matrix in packed(adapter).items():
        found = loaded.packed[name]
        assert torch.equal(found.data, matrix.data)
        assert (found.mean, found.std, found.shape, found.bits) == (matrix.mean, matrix.std, matrix.shape, bits)
        assert torch.equal(loaded.tensors()[name], matrix.dequantise())
        assert loaded.tensors()[name].unique().numel() <= 2**bits
    assert not any(p.requires_grad for p in loaded.parameters())
    again = aa.save_pretrained(second, tmp_path / "b")
    assert (again / files.TENSORS).read_bytes() == (folder / files.TENSORS).read_bytes()
    facts = aa.inspect(folder)
    assert facts["parameters"] == sum(tensor.numel() for tensor in dense.values())
    assert facts["bits"] == bits


@every_method
def test_training_goes_on_beneath_the_rounding(subject: Subject) -> None:
    m = subject.model()
    adapter = aa.quantize(attached(m, subject.config), bits=2)
    before = {name: tensor.detach().clone() for name, tensor in adapter.tensors().items()}
    optimizer, losses = torch.optim.AdamW(adapter.parameters(), lr=0.01), []
    for _ in range(8):
        loss = subject.run(m, adapter).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, bits in quantised(adapter).items():
        trained = isinstance(adapter.tensors()[name], nn.Parameter)
        assert trained != torch.equal(adapter.tensors()[name], before[name]), name
        assert bits == 2
    assert torch.equal(subject.outputs(copy.deepcopy(m)), subject.outputs(m))
    assert all(p.grad is None for p in m.parameters() if id(p) not in {id(q) for q in adapter.parameters()})


@every_method
def test_packing_changes_no_output_and_leaves_ordinary_modules(subject: Subject) -> None:
    m = subject.model()
    adapter = aa.quantize(attached(m, subject.config))
    answers, kinds = subject.outputs(m), [type(part) for part in adapter.modules()]
    assert torch.equal(subject.outputs(copy.deepcopy(m)), answers)
    matrices = aa.pack(adapter)
    assert matrices is adapter.packed
    assert torch.equal(subject.outputs(m), answers)
    plain = [type(part) for part in attached(subject.model(), subject.config).modules()]
    assert [type(part) for part in adapter.modules()] == plain != kinds
    assert torch.equal(subject.outputs(pickle.loads(pickle.dumps(m))), answers)
    assert torch.equal(subject.outputs(copy.deepcopy(m)), answers)


def test_packing_a_copy_leaves_the_original_in_training() -> None:
    m = model()
    adapter = aa.quantize(attached(m, METHODS["bottleneck"], std=None))
    answers = logits(m)
    twin = copy.deepcopy(m)
    aa.pack(aa.adapters(twin)["default"])
    assert torch.equal(logits(twin), answers)
    assert torch.equal(logits(m), answers)
    assert quantised(adapter)
    assert not adapter.packed
    step(m, adapter)
    assert not torch.equal(logits(m), answers)
    assert torch.equal(logits(twin), answers)


def test_of_two_matrices_in_one_module_each_has_its_own_bits() -> None:
    m = model()
    adapter = attached(m, METHODS["bottleneck"])
    where = adapter.placements[0].branch.adapter_down  # type: ignore[attr-defined]
    name = next(name for name, (module, key) in places(adapter).items() if module is where and key == "weight")
    aa.quantize(adapter, 2, name)
    aa.quantize(adapter, 4, name.replace("weight", "bias"))
    answers, matrices = logits(m), packed(adapter)
    fill(adapter, {name: matrices[name]})
    assert torch.equal(logits(m), answers)
    assert quantised(adapter) == {name: 2, name.replace("weight", "bias"): 4}
    aa.pack(adapter)
    assert torch.equal(logits(m), answers)


# ------------------------------------------------------------------ codes are state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_do_not_change_the_codes(dtype: torch.dtype, tmp_path: Path) -> None:
    m = model()
    aa.pack(aa.quantize(attached(m, METHODS["lora"])))
    first = aa.save_pretrained(m, tmp_path / "first")
    adapter = aa.adapters(m)["default"]
    adapter.to(dtype)
    aa.save_pretrained(m, tmp_path / "cast", dtype=torch.float16)
    adapter.to(torch.float32)
    aa.save_pretrained(m, tmp_path / "back")
    loaded = aa.load(model(), tmp_path / "first", dtype=dtype)
    assert {t.dtype for t in loaded.tensors().values()} == {dtype}
    for folder in ("cast", "back"):
        mine, theirs = (load_file(f / files.TENSORS) for f in (tmp_path / folder, first))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_codes_that_no_longer_say_what_a_matrix_is_are_not_saved(tmp_path: Path) -> None:
    m = model()
    adapter = attached(m, METHODS["lora"])
    name = next(iter(aa.pack(aa.quantize(adapter))))
    with torch.no_grad():
        adapter.tensors()[name].mul_(1.1)
    with pytest.raises(aa.ArtefactError, match="was changed after it had been packed"):
        aa.save_pretrained(m, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_cast_latent_is_rounded_in_fp32() -> None:
    m = model()
    adapter = aa.quantize(attached(m, METHODS["lora"])).to(torch.bfloat16)
    dense = {name: matrix.dequantise().bfloat16() for name, matrix in packed(adapter).items()}
    for name, (module, key) in places(adapter).items():
        assert torch.equal(getattr(module, key), dense[name])


# ------------------------------------------------------------------ from where a matrix starts


def test_a_constant_matrix_starts_as_truncated_noise_of_the_generator() -> None:
    adapters = [
        aa.quantize(attached(model(), METHODS["lora"], std=None), generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    names = [name for name in adapters[0].tensors() if "lora_B" in name]
    start = torch.cat([adapters[0].tensors()[name].detach().flatten() for name in names])
    assert start.std().item() == pytest.approx(0.88e-3, rel=0.1)  # 1e-3 before the cut
    assert start.abs().max() <= 2e-3
    for name in names:
        first, same, other = (a.tensors()[name] for a in adapters)
        assert torch.equal(first, same)
        assert not torch.equal(first, other)
    torch.manual_seed(3)
    untouched = aa.attach(model(), METHODS["lora"])
    for name, tensor in untouched.tensors().items():
        assert ("lora_B" in name) != torch.equal(tensor, adapters[0].tensors()[name])


def test_a_fresh_quantised_adapter_is_near_the_base_and_not_it() -> None:
    m = model()
    before = logits(m)
    for name in ("lora", "ia3", "bottleneck"):
        aa.quantize(attached(m, METHODS[name], std=None))
        assert 0 < (logits(m) - before).abs().max() < 0.05, name
        aa.detach(m)


# ------------------------------------------------------------------ which matrices, and how many bits


def test_patterns_choose_matrices_and_widths(tmp_path: Path) -> None:
    m, other = model(), model()
    adapter = attached(m, METHODS["bottleneck"])
    aa.quantize(adapter, 4, "*adapter_down.weight")
    aa.quantize(adapter, 1, ("*layers.0.*adapter_up.weight", "*.down_proj.adapter_up.bias"))
    bits = quantised(adapter)
    assert {bits[name] for name in bits if "adapter_down.weight" in name} == {4}
    assert {bits[name] for name in bits if "layers.0" in name and name.endswith("adapter_up.weight")} == {1}
    assert not any("layers.1" in name and name.endswith("adapter_up.weight") for name in bits)
    answers = logits(m)
    folder = aa.save_pretrained(m, tmp_path / "a")
    loaded = aa.load(other, folder)
    assert torch.equal(logits(other), answers)
    assert quantised(loaded) == bits
    assert aa.inspect(folder)["bits"] == {width: list(bits.values()).count(width) for width in (4, 1)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: aa.quantize(a, 3), "1, 2, 4 or 8 bits"),
        (lambda a: aa.quantize(a, 1, "*lora_C*"), r"'\*lora_C\*' matches nothing that can be quantised"),
        (lambda a: aa.quantize(aa.quantize(a), 1), "is quantised to 1 bits already"),
        (lambda a: (aa.pack(aa.quantize(a, 2)), aa.quantize(a, 1)), "rounding them anew would shrink"),
        (lambda a: aa.pack(a), "has no quantised matrices"),
        (lambda a: (aa.pack(aa.quantize(a)), a.train_only()), "is packed"),
        (lambda a: (next(a.parameters()).data.fill_(float("nan")), aa.quantize(a)), "NaN or infinity"),
    ],
)
def test_what_cannot_be_meant_is_refused(call: Any, message: str) -> None:
    with pytest.raises(aa.ConfigError, match=message):
        call(attached(model(), METHODS["lora"]))


def test_a_method_without_matrices_says_so() -> None:
    m = model()
    adapter = aa.attach(m, aa.LoRAConfig(rank=1, targets="q_proj", layers=(0,)))
    for name, (module, key) in places(adapter).items():
        module._parameters[key] = nn.Parameter(torch.ones(4))
        assert name
    with pytest.raises(aa.ConfigError, match="There is no matrix among"):
        aa.quantize(adapter)


def test_a_merged_adapter_is_not_quantised_underneath() -> None:
    m = model()
    adapter = attached(m, METHODS["lora"])
    aa.merge(m)
    with pytest.raises(aa.AttachError, match="unmerge"):
        aa.quantize(adapter)


@pytest.mark.parametrize("form", ["training", "packed"])
def test_merging_uses_what_the_adapter_computes_with(form: str) -> None:
    m = model()
    adapter = aa.quantize(attached(m, METHODS["lora"]))
    if form == "packed":
        aa.pack(adapter)
    answers, dense = logits(m), m.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    aa.merge(m)
    torch.testing.assert_close(logits(m), answers, atol=1e-5, rtol=1e-4)
    a, b = (packed(adapter)[f"model.layers.0.mlp.up_proj.lora_{side}.weight"].dequantise() for side in "AB")
    merged = m.state_dict()["model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(merged, dense + b @ a * (16 / 3))


# ------------------------------------------------------------------ latents and files


def test_latents_are_saved_on_demand_and_training_goes_on_from_them(tmp_path: Path) -> None:
    m, other = model(), model()
    adapter = aa.quantize(attached(m, METHODS["lora"]))
    step(m, adapter)
    folder = aa.save_pretrained(m, tmp_path / "latents", latents=True)
    assert STATISTICS not in load_file(folder / files.TENSORS)
    loaded = aa.load(other, folder, trainable=True)
    assert quantised(loaded) == quantised(adapter)
    assert not loaded.packed
    assert torch.equal(logits(other), logits(m))
    assert step(m, adapter) == step(other, loaded)
    frozen = aa.load(other, folder, "frozen")
    assert not any(p.requires_grad for p in frozen.parameters())
    third = model()
    resumed = aa.quantize(attached(third, METHODS["lora"], std=0.1))
    restore(resumed, folder)
    fourth = model()
    aa.load(fourth, folder)
    assert torch.equal(logits(third), logits(fourth))


def test_a_packed_folder_cannot_be_trained_on(tmp_path: Path) -> None:
    m, other = model(), model()
    adapter = aa.quantize(attached(m, METHODS["lora"]))
    folder = aa.save_pretrained(m, tmp_path / "a")
    before = logits(other)
    with pytest.raises(aa.ArtefactError, match="is packed: what its codes were rounded from"):
        aa.load(other, folder, trainable=True)
    assert not aa.adapters(other)
    assert torch.equal(logits(other), before)
    with pytest.raises(aa.ArtefactError, match="is packed"):
        restore(adapter, folder)
    aa.pack(adapter)
    with pytest.raises(aa.ArtefactError, match="it is packed and has none"):
        aa.save_pretrained(m, tmp_path / "b", latents=True)


@pytest.mark.parametrize("kind", ["codes", "latents"])
def test_restoring_into_an_adapter_that_is_quantised_otherwise_is_refused(kind: str, tmp_path: Path) -> None:
    m = model()
    aa.quantize(attached(m, METHODS["lora"]), bits=2)
    folder = aa.save_pretrained(m, tmp_path / "a", latents=True)
    plain = attached(model(), METHODS["lora"])
    with pytest.raises(aa.ArtefactError, match="quantised"):
        restore(plain if kind == "latents" else aa.quantize(plain, bits=1), folder)


def damage(folder: Path, change: Any) -> None:
    """Change a file's tensors or configuration, and drop the hash that would tell."""
    tensors = load_file(folder / files.TENSORS)
    config = json.loads((folder / files.CONFIG).read_text())
    config["anyadapter"].pop("tensors_sha256", None)
    change(tensors, config["anyadapter"])
    save_file(tensors, folder / files.TENSORS)
    (folder / files.CONFIG).write_text(json.dumps(config))


FIRST = "model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t.__setitem__(FIRST, t[FIRST][:-1].clone()), r"lora_A.weight: \(\d+,\) of uint8 were given"),
        (lambda t, c: t.__setitem__(FIRST, t[FIRST].float()), "of float32 were given"),
        (lambda t, c: t[STATISTICS][0].fill_(float("nan")), "NaN or infinity"),
        (lambda t, c: t[STATISTICS][0, 1].fill_(0), "lora_A.weight: .* a positive deviation"),
        (lambda t, c: t[STATISTICS][0, 1].fill_(-1), "a positive deviation"),
        (lambda t, c: t.__setitem__(STATISTICS, t[STATISTICS][:-1].clone()), "expected a mean and a deviation"),
        (lambda t, c: t.__setitem__(STATISTICS, t[STATISTICS].double()), "expected a mean and a deviation"),
        (lambda t, c: t.pop(STATISTICS), r"lora_A.weight is \(\d+,\), expected"),
        (lambda t, c: t.pop(FIRST), "missing " + FIRST),
        (lambda t, c: c.__setitem__("bits", 3), "is said to have 3 bits"),
        (lambda t, c: c.__setitem__("bits", "1"), "is said to have '1' bits"),
        (lambda t, c: c.__setitem__("bits", True), "is said to have True bits"),
        (lambda t, c: c.__setitem__("bits", {FIRST: 16}), "is said to have 16 bits"),
        (lambda t, c: c.__setitem__("bits", {FIRST: 1, "nothing": 1}), "expected a mean and a deviation"),
        (lambda t, c: c.__setitem__("bits", 2), r"of uint8 were given; a matrix of .* at 2 bits"),
        (lambda t, c: c.pop("bits"), "not known|expected"),
    ],
)
def test_damaged_files_are_refused_before_anything_is_attached(change: Any, message: str, tmp_path: Path) -> None:
    m, other = model(), model()
    aa.quantize(attached(m, METHODS["lora"]))
    folder = aa.save_pretrained(m, tmp_path / "a")
    damage(folder, change)
    before = logits(other)
    with pytest.raises(aa.ArtefactError, match=message):
        aa.load(other, folder)
    assert not aa.adapters(other)
    assert torch.equal(logits(other), before)


@settings(max_examples=25, deadline=None)
@given(wide=st.tuples(st.integers(2, 13), st.integers(2, 13)), bits=st.sampled_from(BITS), seed=st.integers(0, 99))
def test_matrices_of_any_shape_survive(wide: tuple[int, int], bits: int, seed: int, tmp_path_factory: Any) -> None:
    torch.manual_seed(seed)
    rank = min(2, max(wide))
    first, x = nn.Sequential(nn.Linear(*wide)), torch.randn(3, wide[0])
    second = copy.deepcopy(first)
    adapter = attached(first, aa.LoRAConfig(rank=rank, targets="0"))
    aa.quantize(adapter, bits)
    folder = tmp_path_factory.mktemp("shapes")
    aa.load(second, aa.save_pretrained(first, folder / "a"))
    assert torch.equal(first(x), second(x))


def test_a_collapsed_matrix_is_named_when_it_is_to_be_saved(tmp_path: Path) -> None:
    m = model()
    adapter = aa.quantize(attached(m, METHODS["lora"]))
    with torch.no_grad():
        adapter.tensors()[FIRST].fill_(0.1)
    for latents in (False, True):
        with pytest.raises(aa.ArtefactError, match=f"{FIRST} .* cannot be packed"):
            aa.save_pretrained(m, tmp_path / "a", latents=latents)
    with pytest.raises(aa.ArtefactError, match="cannot be packed"):
        aa.pack(adapter)
    assert not adapter.packed


def test_fill_refuses_what_does_not_fit_and_changes_nothing() -> None:
    adapter = attached(model(), METHODS["lora"])
    before = {name: tensor.detach().clone() for name, tensor in adapter.tensors().items()}
    wrong = Packed.of(torch.randn(3, 5), 1)
    for values in ({FIRST: wrong}, {"nothing": wrong}):
        with pytest.raises(aa.ArtefactError, match="do not fit"):
            fill(adapter, values)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.tensors().items())


# ------------------------------------------------------------------ a real model


@pytest.mark.parametrize("targets", ["all-linear", ("self_attention.query", "self_attention.value")])
def test_a_1_bit_file_is_a_twelfth_of_the_fp16_one(smollm: nn.Module, targets: Any, tmp_path: Path) -> None:
    adapter = attached(smollm, aa.LoRAConfig(rank=8, targets=targets), std=0.02)
    half = aa.save_pretrained(smollm, tmp_path / "half", dtype=torch.float16)
    aa.quantize(adapter, bits=1)
    small = aa.save_pretrained(smollm, tmp_path / "small")
    sizes = [(folder / files.TENSORS).stat().st_size for folder in (small, half)]
    assert sizes[0] * 12 <= sizes[1], sizes
    assert aa.inspect(small)["parameters"] == aa.inspect(half)["parameters"]
    # bytes = codes, two statistics a matrix, and a header
    codes = sum(-(-tensor.numel() // 8) for tensor in adapter.tensors().values())
    matrices = len(adapter.tensors())
    assert codes + 8 * matrices < sizes[0] < codes + 8 * matrices + 130 * matrices


# ------------------------------------------------------------------ from the folder alone


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (METHODS["lora"], "peft"),
        (METHODS["lora"], "native"),
        (aa.LoRAConfig(rank=2, targets="q_proj", whole="lm_head"), "peft"),
        (METHODS["ia3"], "peft"),
        (METHODS["prefix"], "peft"),
        (METHODS["projected"], "native"),
        (METHODS["bottleneck"], "native"),
    ],
)
@pytest.mark.parametrize("bits", [1, 4])
def test_quantising_a_folder_is_quantising_the_adapter(
    config: aa.AdapterConfig, layout: str, bits: int, tmp_path: Path
) -> None:
    m, other = model(), model()
    adapter = attached(m, config)
    if "scale" in adapter.capabilities and layout == "native":
        adapter.scale = 0.5
    aa.save_pretrained(m, tmp_path / "dense", layout=layout)
    facts = quantize_folder(tmp_path / "dense", tmp_path / "small", bits)
    aa.quantize(adapter, bits)
    straight = aa.save_pretrained(m, tmp_path / "straight")
    mine, theirs = (load_file(folder / files.TENSORS) for folder in (tmp_path / "small", straight))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    about = [json.loads((f / files.CONFIG).read_text()) for f in (tmp_path / "small", straight)]
    assert about[0] == about[1]
    assert facts["matrices"] == len(quantised(adapter))
    assert facts["bytes"] == (tmp_path / "small" / files.TENSORS).stat().st_size < facts["bytes_before"]
    aa.load(other, tmp_path / "small")
    assert torch.equal(logits(other), logits(m))


def test_folders_that_cannot_be_quantised_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    m, out = model(), tmp_path / "out"
    adapter = attached(m, METHODS["lora"])
    dense = aa.save_pretrained(m, tmp_path / "dense")
    foreign = Path(shutil.copytree(dense, tmp_path / "foreign"))
    config = json.loads((foreign / files.CONFIG).read_text())
    (foreign / files.CONFIG).write_text(json.dumps({k: v for k, v in config.items() if k != "anyadapter"}))
    constant = Path(shutil.copytree(dense, tmp_path / "constant"))
    damage(constant, lambda t, c: [tensor.zero_() for tensor in t.values()])
    hand = Path(shutil.copytree(dense, tmp_path / "hand"))
    tensors = load_file(hand / files.TENSORS)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, hand / files.TENSORS)
    aa.quantize(adapter)
    small = aa.save_pretrained(m, tmp_path / "small")
    for folder, message in (
        (foreign, "anyadapter convert"),
        (hand, "is not the file that"),
        (small, "is quantised already, to 1 bits"),
        (tmp_path / "none", "There is no folder"),
    ):
        with pytest.raises(aa.ArtefactError, match=message):
            quantize_folder(folder, out)
    with pytest.raises(aa.ArtefactError, match="choose another folder"):
        quantize_folder(dense, dense)
    with pytest.raises(aa.ConfigError, match=r"'\*lora_C' matches no tensor"):
        quantize_folder(dense, out, 1, "*lora_C")
    with pytest.raises(aa.ConfigError, match="1, 2, 4 or 8"):
        quantize_folder(dense, out, 3)
    with pytest.raises(aa.ConfigError, match="nothing to quantise: 28 matrices"):
        quantize_folder(constant, out)
    assert not out.exists()


def test_matrices_that_were_never_trained_are_left_and_said_to_be(tmp_path: Path) -> None:
    m, other = model(), model()
    adapter = attached(m, METHODS["lora"], std=None)
    facts = quantize_folder(aa.save_pretrained(m, tmp_path / "dense"), tmp_path / "small")
    assert facts["left"] == sorted(name for name in adapter.tensors() if "lora_B" in name)
    loaded = aa.load(other, tmp_path / "small")
    assert set(quantised(loaded)) == {name for name in adapter.tensors() if "lora_A" in name}
    assert torch.equal(logits(other), logits(m))


def test_a_quantised_prefix_imitates_by_its_latents() -> None:
    first, second = model(), model()
    tokens = torch.tensor([5, 9, 3])
    plain = aa.attach(first, aa.PrefixConfig(tokens=3))
    plain.imitate(first, tokens)  # type: ignore[operator]
    rounded = aa.quantize(aa.attach(second, aa.PrefixConfig(tokens=3)), bits=8)
    rounded.imitate(second, tokens)  # type: ignore[operator]
    assert torch.equal(rounded.tensors()["prompt.weight"], plain.tensors()["prompt.weight"])
    torch.testing.assert_close(logits(second), logits(first), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("form", ["training", "packed"])
def test_compiled_it_gives_the_same(form: str) -> None:
    m, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
    adapter = aa.quantize(attached(m, aa.LoRAConfig(rank=2, targets="0")))
    if form == "packed":
        aa.pack(adapter)
    torch.testing.assert_close(torch.compile(m, backend="aot_eager")(x), m(x))


def test_every_family_trains_a_quantised_lora() -> None:
    for name in ("bert", "gpt2", "t5", "vit", "clip"):
        family: Case = case(name)
        m = family.build().requires_grad_(False)
        adapter = aa.quantize(attached(m, aa.LoRAConfig(rank=2), std=0.1))
        out = family.output(m(**family.inputs(m, 2)))
        out.float().pow(2).mean().backward()
        assert sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in adapter.parameters()) > 0, name
        with torch.no_grad():
            before = family.output(m(**family.inputs(m, 2)))
            aa.pack(adapter)
            assert torch.equal(family.output(m(**family.inputs(m, 2))), before), name
