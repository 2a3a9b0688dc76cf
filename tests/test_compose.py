"""Sums, averages and slices of adapters: each equals what its definition says, and a refusal changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import case
from hypothesis import given
from hypothesis import strategies as st
from mixing import PROMPTS, PROPERTY, LanguagesConfig, answers, deltas, llama, logits, randomise
from torch import Tensor, nn
from typer.testing import CliRunner

import anyadapter as aa
from anyadapter.cli import app
from anyadapter.core.catalogue import method, methods
from anyadapter.quantize import pack, quantised, quantize

weights_of = st.lists(st.floats(-2, 2, allow_nan=False).map(lambda w: round(w, 3)), min_size=1, max_size=4)


# -------------------------------------------------------------------------- sums of effects


@PROPERTY
@given(
    weights=weights_of,
    ranks=st.lists(st.integers(1, 8), min_size=4, max_size=4),
    alphas=st.lists(st.floats(0.5, 32), min_size=4, max_size=4),
    scales=st.lists(st.floats(-1, 2), min_size=4, max_size=4),
    stabilised=st.booleans(),
)
def test_a_sum_of_loras_adds_exactly_the_sum_of_their_updates(
    weights: list[float], ranks: list[int], alphas: list[float], scales: list[float], stabilised: bool
) -> None:
    """At any modules, ranks, alphas, scales and weights; also beyond the rank of a module, which is 8 for k_proj."""
    model = llama()
    targets = ["all-linear", ("q_proj", "k_proj"), "feed_forward.up", ("o_proj", "k_proj")]
    expected: dict[str, Tensor] = {}
    for i, weight in enumerate(weights):
        config = aa.LoRAConfig(rank=ranks[i], alpha=alphas[i], targets=targets[i], rank_stabilised=stabilised)
        adapter = randomise(aa.attach(model, config, str(i)), i)
        adapter.scale = scales[i]
        for path, delta in deltas(adapter, model).items():
            expected[path] = expected.get(path, 0) + weight * delta
    total = aa.weighted_sum(model, {str(i): weight for i, weight in enumerate(weights)})
    found = deltas(total, model)
    assert found.keys() == expected.keys()
    for path, delta in expected.items():
        torch.testing.assert_close(found[path], delta, atol=2e-5, rtol=1e-4)
        assert total.config.rank_of(path) <= min(model.get_submodule(path).weight.shape)
    assert all(error < 1e-6 for error in total.lost.values())


def test_after_a_sum_it_acts_in_place_of_its_sources_and_is_saved_as_peft_does(tmp_path: Path) -> None:
    model = llama()
    randomise(aa.attach(model, aa.LoRAConfig(rank=2, targets="self_attention.query"), "a"), 1)
    randomise(aa.attach(model, aa.LoRAConfig(rank=3, targets=("q_proj", "v_proj")), "b"), 2)
    both = logits(model)
    total = aa.weighted_sum(model, {"a": 1.0, "b": 1.0}, "both")
    assert list(aa.adapters(model)) == ["a", "b", "both"]
    assert [a.enabled for a in aa.adapters(model).values()] == [False, False, True]
    assert not any(p.requires_grad for p in total.parameters())
    torch.testing.assert_close(logits(model), both, atol=1e-4, rtol=1e-4)

    aa.save_pretrained(model, tmp_path / "both", "both")
    assert aa.inspect(tmp_path / "both")["layout"] == "peft"
    other = llama()
    aa.load(other, tmp_path / "both")
    torch.testing.assert_close(logits(other), logits(model), atol=0, rtol=0)

    model = llama()  # from folders, with nothing attached and nothing left but the result
    aa.weighted_sum(model, {tmp_path / "both": 0.5, str(tmp_path / "both"): 0.5}, "mean")
    assert list(aa.adapters(model)) == ["mean"]
    torch.testing.assert_close(logits(model), both, atol=1e-4, rtol=1e-4)


@PROPERTY
@given(rank=st.integers(1, 6), keep=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_truncated_update_is_the_nearest_and_its_error_is_reported(rank: int, keep: int, seed: int) -> None:
    model = llama()
    adapter = randomise(aa.attach(model, aa.LoRAConfig(rank=rank, targets=("q_proj", "down_proj")), "a"), seed)
    small = aa.weighted_sum(model, {"a": 1.0}, "small", rank=keep)
    found, exact = deltas(small, model), deltas(adapter, model)
    assert small.config.rank == min(rank, keep)
    assert bool(small.lost) == (keep < rank)
    for path, delta in exact.items():
        singular = torch.linalg.svdvals(delta)
        error = (found[path] - delta).norm() / delta.norm()
        best = singular[keep:].norm() / singular.norm()
        torch.testing.assert_close(error, best, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(torch.tensor(small.lost.get(path, 0.0)), best, atol=1e-5, rtol=1e-3)


def test_convolutions_and_fused_projections_have_a_sum() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)).requires_grad_(False)
    for name, rank in (("a", 2), ("b", 3)):
        randomise(aa.attach(model, aa.LoRAConfig(rank=rank, targets=("0", "2")), name), rank)
    x = torch.randn(2, 3, 5, 5)
    before = model(x)
    total = aa.weighted_sum(model, {"a": 1, "b": 1})
    torch.testing.assert_close(model(x), before, atol=1e-4, rtol=1e-4)
    assert total.tensors()["2.lora_A.weight"].shape == (4, 6, 1, 1)  # 2 + 3 ranks, of which the module has 4

    model = case("bloom").build().requires_grad_(False)
    config = aa.LoRAConfig(rank=2, targets="self_attention.qkv", fused=True)
    fused = randomise(aa.attach(model, config, "fused"), 1)
    total = aa.weighted_sum(model, {"fused": -1.0})
    assert not total.config.fused
    for path, delta in deltas(fused, model).items():
        torch.testing.assert_close(deltas(total, model)[path], -delta)


@PROPERTY
@given(weights=weights_of, scale=st.floats(-1, 2))
def test_a_sum_of_ia3_changes_the_weights_by_the_sum_of_the_changes(weights: list[float], scale: float) -> None:
    model = llama()
    expected: dict[str, Tensor] = {}
    for i, weight in enumerate(weights):
        adapter = randomise(aa.attach(model, aa.IA3Config(), str(i)), i)
        adapter.scale = scale
        for path, delta in deltas(adapter, model).items():
            expected[path] = expected.get(path, 0) + weight * delta
    found = deltas(aa.weighted_sum(model, {str(i): w for i, w in enumerate(weights)}), model)
    for path, delta in expected.items():
        torch.testing.assert_close(found[path], delta, atol=1e-5, rtol=1e-4)


def test_heads_trained_as_a_whole_are_averaged_and_not_added(tmp_path: Path) -> None:
    heads = []
    for i, name in enumerate("ab"):
        model = llama()
        adapter = randomise(aa.attach(model, aa.LoRAConfig(rank=2, targets="q_proj", whole="lm_head")), i)
        heads.append(adapter.tensors()["lm_head.whole.weight"].detach())
        aa.save_pretrained(model, tmp_path / name)
    model = llama()
    with pytest.raises(aa.ConfigError, match="lm_head is trained as a whole.*these sum to 2"):
        aa.weighted_sum(model, {tmp_path / "a": 1, tmp_path / "b": 1})
    mean = aa.average(model, {tmp_path / "a": 0.25, tmp_path / "b": 0.75})
    torch.testing.assert_close(mean.tensors()["lm_head.whole.weight"], 0.25 * heads[0] + 0.75 * heads[1])
    with pytest.raises(aa.ConfigError, match="it trains modules as a whole"), aa.routed(model, ["average", None]):
        pass


# -------------------------------------------------------------------------- averages

AVERAGED: dict[str, tuple[str, aa.AdapterConfig]] = {
    "bottleneck": ("llama", aa.BottleneckConfig(width=5, scaling="learned", bias=True)),
    "prefix": ("llama", aa.PrefixConfig(tokens=3)),
    "llama_adapter": ("llama", aa.LlamaAdapterConfig(length=3, last_layers=1)),
    "ia3": ("llama", aa.IA3Config()),
    "p_adapter": ("bert", aa.PAdapterConfig()),
    "mlkg": ("bert", aa.MLKGConfig(reduction=4)),
    "mhr": ("bert", aa.MHRConfig(tasks=("a", "b"), splits=4, granularity="layer")),
    "ip_adapter": ("sd15", aa.IPAdapterConfig(image_width=8, tokens=2)),
}


AVERAGING = [name for name in methods() if "average" in method(name).capabilities and name != "lora"]


@pytest.mark.parametrize("name", AVERAGING)  # that of LoRA is one of effects, below
def test_the_average_of_parameters(name: str) -> None:
    host, config = AVERAGED[name]
    model = case(host).build().requires_grad_(False)
    sources = [randomise(aa.attach(model, config, str(i)), i).tensors() for i in range(3)]
    weights = {"0": 0.5, "1": 0.75, "2": -0.25}
    mean = aa.average(model, weights)
    for key, tensor in mean.tensors().items():
        expected = sum(w * each[key] for w, each in zip(weights.values(), sources))
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5)
    assert mean.config == config


def test_averaging_a_and_b_apart_is_another_model_and_has_to_be_asked_for() -> None:
    model = llama()
    for i, name in enumerate("ab"):
        randomise(aa.attach(model, aa.LoRAConfig(rank=2, targets="q_proj"), name), i)
    halves = {"a": 0.5, "b": 0.5}
    expected = [0.5 * x + 0.5 * y for x, y in zip(*(deltas(aa.adapters(model)[n], model).values() for n in "ab"))]
    exact, apart = aa.average(model, halves, "exact"), aa.average(model, halves, "apart", apart=True)
    assert (exact.config.rank, apart.config.rank) == (4, 2)
    for e, x, y in zip(expected, deltas(exact, model).values(), deltas(apart, model).values()):
        torch.testing.assert_close(x, e, atol=1e-6, rtol=1e-5)
        assert (y - e).norm() > 0.3 * e.norm()
    a = [aa.adapters(model)[n].tensors() for n in ("a", "b", "apart")]
    for key in a[2]:
        torch.testing.assert_close(a[2][key], (a[0][key] + a[1][key]) / 2)


# -------------------------------------------------------------------------- slices


def test_a_slice_merge_acts_on_each_language_as_the_run_it_came_from(tmp_path: Path) -> None:
    model = llama()
    for i, name in enumerate("ab"):
        adapter = randomise(aa.attach(model, LanguagesConfig(), name), i)
        with torch.no_grad():
            for key, tensor in adapter.tensors().items():
                if key.endswith("shift"):
                    tensor.copy_(torch.ones_like(tensor))
    aa.save_pretrained(model, tmp_path / "a", "a")

    def outputs(name: str) -> list[Tensor]:
        with aa.disabled(model, *(other for other in aa.adapters(model) if other != name)):
            rows = []
            for language in range(3):
                with aa.signals(model, language=torch.tensor([language] * 2)):
                    rows.append(logits(model))
            return rows

    a, b = outputs("a"), outputs("b")
    aa.slice_merge(model, {1: "b", 0: tmp_path / "a", 2: "a"}, "merged")
    merged = outputs("merged")
    assert all(torch.equal(found, expected) for found, expected in zip(merged, (a[0], b[1], a[2])))
    assert not torch.allclose(a[1], b[1], atol=1e-2)

    with pytest.raises(aa.ConfigError, match=r"slices 0 to 2, each of which needs a source; given: \[0, 3\]"):
        aa.slice_merge(model, {0: "a", 3: "b"}, "x")
    with torch.no_grad():
        aa.adapters(model)["b"].tensors()["model.layers.1.mlp.shift"][0] = 2
    with pytest.raises(aa.ConfigError, match="mlp.shift is shared by all slices and differs between 'a' and 'b'"):
        aa.slice_merge(model, {0: "a", 1: "b", 2: "b"}, "x")
    assert list(aa.adapters(model)) == ["a", "b", "merged"]


# -------------------------------------------------------------------------- quantised adapters


@pytest.mark.parametrize("packed", [False, True])
def test_quantised_adapters_are_composed_as_what_they_compute_with(packed: bool, tmp_path: Path) -> None:
    model = llama()
    configs = {"lora": aa.LoRAConfig(rank=2), "other": aa.LoRAConfig(rank=2, alpha=3)}
    configs |= {"wide": aa.BottleneckConfig(width=4), "too": aa.BottleneckConfig(width=4)}
    for name, config in configs.items():
        quantize(randomise(aa.attach(model, config, name), len(name)), 2)
        if packed:
            pack(aa.adapters(model)[name])
    expected: dict[str, Tensor] = {}
    for name, weight in (("lora", 0.5), ("other", -2.0)):
        for path, delta in deltas(aa.adapters(model)[name], model).items():
            expected[path] = expected.get(path, 0) + weight * delta
    total = aa.weighted_sum(model, {"lora": 0.5, "other": -2.0}, "total")
    for path, delta in deltas(total, model).items():
        torch.testing.assert_close(delta, expected[path], atol=1e-5, rtol=1e-4)
    mean = aa.average(model, {"wide": 0.25, "too": 0.75}, "mean")
    for key, tensor in mean.tensors().items():
        wide, too = (aa.adapters(model)[name].values()[key] for name in ("wide", "too"))
        assert wide.unique().numel() <= 4
        torch.testing.assert_close(tensor, 0.25 * wide + 0.75 * too)
    assert not quantised(total)
    assert not quantised(mean)
    with aa.routed(model, [{"lora": 1.0}, None]):
        logits(model)


# -------------------------------------------------------------------------- refusals and claims

REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "no adapter of that name": (lambda m: aa.weighted_sum(m, {"lra": 1.0}), "No adapter named 'lra'.*'lora'"),
    "no such folder": (lambda m: aa.average(m, {"./nowhere": 1.0}), "There is no folder"),
    "no adapter at all": (lambda m: aa.weighted_sum(m, {}), "at least one adapter"),
    "a weight that is not finite": (lambda m: aa.weighted_sum(m, {"lora": float("nan")}), "finite weight"),
    "rank 0": (lambda m: aa.weighted_sum(m, {"lora": 1.0}, rank=0), "rank is 0"),
    "a rank of vectors": (lambda m: aa.weighted_sum(m, {"ia3": 1.0}, rank=2), "has no rank"),
    "weights that do not sum to 1": (lambda m: aa.average(m, {"lora": 0.5}), "sum to 1, these to 0.5"),
    "two methods": (lambda m: aa.average(m, {"lora": 0.5, "ia3": 0.5}), "'lora' is a LoRA and 'ia3' a IA3"),
    "a sum of non-linear adapters": (lambda m: aa.weighted_sum(m, {"wide": 1.0}), "Bottleneck cannot weighted_sum"),
    "other settings": (lambda m: aa.average(m, {"wide": 0.5, "narrow": 0.5}), r"differ in width \(4 and 3\)"),
    "other ranks, apart": (
        lambda m: aa.average(m, {"lora": 0.5, "big": 0.5}, apart=True),
        r"differ in rank \(2 and 3\)",
    ),
    "a name that is taken": (lambda m: aa.average(m, {"lora": 1.0}, "wide"), "'wide' is attached already"),
    "slices of what has none": (lambda m: aa.slice_merge(m, {0: "lora"}), "LoRA cannot slice_merge"),
    "no slices": (lambda m: aa.slice_merge(m, {}), "a source for every slice"),
    "a route to nobody": (lambda m: aa.routed(m, ["lora", "nobody"]).__enter__(), "No adapter named 'nobody'"),
    "half a prefix": (lambda m: aa.routed(m, [{"prefix": 0.5}]).__enter__(), "in each row its weight is 1 or 0"),
    "weights of another width": (lambda m: aa.routed(m, torch.ones(2, 3), ["lora"]).__enter__(), r"\(2, 3\)"),
    "weights that are not finite": (lambda m: aa.routed(m, [{"lora": float("inf")}]).__enter__(), "not finite"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_change_nothing(what: str) -> None:
    model = llama()
    configs = {"lora": aa.LoRAConfig(rank=2), "big": aa.LoRAConfig(rank=3), "ia3": aa.IA3Config()}
    configs |= {"wide": aa.BottleneckConfig(width=4), "narrow": aa.BottleneckConfig(width=3)}
    for name, config in (configs | {"prefix": aa.PrefixConfig(tokens=2)}).items():
        randomise(aa.attach(model, config, name), 1, 0.1)
    before, names = logits(model), list(aa.adapters(model))
    act, message = REFUSED[what]
    with pytest.raises(aa.AnyAdapterError, match=message):
        act(model)
    assert list(aa.adapters(model)) == names
    assert torch.equal(logits(model), before)


def test_what_is_merged_is_neither_summed_nor_routed() -> None:
    model = llama()
    for name in "ab":
        aa.attach(model, aa.LoRAConfig(rank=2), name)
    aa.merge(model, "a")
    with pytest.raises(aa.AttachError, match="'a' is merged into the weights; unmerge it first"):
        aa.weighted_sum(model, {"a": 1.0})
    with (
        pytest.raises(aa.AttachError, match="'a' is merged into the weights and acts on every row"),
        aa.routed(model, ["b"]),
    ):
        pass


def test_claims_are_kept_and_only_verbs_are_claimed() -> None:
    for name in methods():
        cls = method(name)
        assert cls.capabilities <= {"scale", "merge", "weighted_sum", "average", "slice_merge", "route"}, name
        assert ("slice_merge" in cls.capabilities) == bool(cls.slices)
        assert ("weighted_sum" in cls.capabilities) == (
            cls.weighted_sum.__func__ is not aa.Adapter.weighted_sum.__func__
        )


# -------------------------------------------------------------------------- a real model


@pytest.fixture
def two_loras(smollm: nn.Module) -> nn.Module:
    for i, (name, rank) in enumerate((("a", 4), ("b", 8))):
        adapter = aa.attach(smollm, aa.LoRAConfig(rank=rank, targets=("q_proj", "v_proj", "down_proj")), name)
        randomise(adapter, i, 0.02)
    return smollm


def test_sums_on_a_real_model(two_loras: nn.Module, smollm_tokenizer: Any) -> None:
    model = two_loras
    aa.adapters(model)["b"].scale = -0.5
    both = answers(model, smollm_tokenizer, PROMPTS)
    total = aa.weighted_sum(model, {"a": 1.0, "b": 1.0})
    assert total.config.rank == 12
    torch.testing.assert_close(answers(model, smollm_tokenizer, PROMPTS), both, atol=1e-3, rtol=1e-4)
    aa.merge(model, "sum")
    torch.testing.assert_close(answers(model, smollm_tokenizer, PROMPTS), both, atol=1e-3, rtol=1e-4)
    aa.unmerge(model, "sum")
    small = aa.weighted_sum(model, {"a": 1.0, "b": 1.0}, "small", rank=6)
    assert all(0 < error < 1 for error in small.lost.values())
    half = aa.average(model, {"a": 0.5, "b": 0.5}, "half")
    assert half.config.rank == 12


def test_the_command_line(two_loras: nn.Module, tmp_path: Path) -> None:
    def command(*words: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, ["compose", *words])
        return result.exit_code, result.stdout, " ".join(result.stderr.split())

    a, b = (str(aa.save_pretrained(two_loras, tmp_path / name, name)) for name in "ab")
    code, out, _ = command(str(tmp_path / "mix"), f"{a}=1", f"{b}=-0.5", "--rank", "6", "--json")
    facts = json.loads(out)
    assert (code, facts["method"]) == (0, "lora")
    assert 0 < facts["largest_error_of_an_update"] < 1
    assert aa.inspect(tmp_path / "mix")["settings"]["rank"] == 6
    expected = aa.weighted_sum(two_loras, {"a": 1, "b": -0.5}, rank=6).tensors()
    found = aa.load(two_loras, tmp_path / "mix", "mix").tensors()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())

    assert command(str(tmp_path / "mean"), f"{a}=0.5", f"{b}=0.5")[0] == 0
    assert aa.inspect(tmp_path / "mean")["settings"]["rank"] == 12
    code, _, err = command(str(tmp_path / "x"), f"{a}=0.5", f"{b}=0.5", "--apart")
    assert code == 1
    assert "differ in rank (4 and 8)" in err
    assert "is not FOLDER=WEIGHT" in command(str(tmp_path / "x"), a)[2]
    assert "named twice" in command(str(tmp_path / "x"), f"{a}=1", f"{a}=2")[2]
    assert "Example" in CliRunner().invoke(app, ["compose", "--help"]).stdout
