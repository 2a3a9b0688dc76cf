"""The folders of LLM-Adapters' fork: what is read, what is refused, what can be written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import case
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import anyadapter as aa
from anyadapter.formats.layouts import by_name, detect

LAYOUT = by_name("llm-adapters")
BOTTLENECK = aa.BottleneckConfig(width=3, targets=("up_proj", "down_proj"), init="bert")
ROOT = "base_model.model.model.layers"


@pytest.fixture
def llama() -> nn.Module:
    return case("llama").build().requires_grad_(False)


def drawn(model: nn.Module, config: aa.AdapterConfig) -> aa.Adapter:
    adapter = aa.attach(model, config)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    return adapter


def theirs(model: nn.Module, config: aa.AdapterConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the fork would have written for an adapter with random tensors, which is left off the model."""
    settings, tensors = LAYOUT.write(drawn(model, config))
    aa.detach(model)
    return settings, {name: tensor.detach().clone() for name, tensor in tensors.items()}


def folder_of(tmp_path: Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=torch.arange(14).reshape(2, 7)).logits


CONFIGS = {
    "series": aa.BottleneckConfig(width=3, bias=False),
    "adapterp": aa.BottleneckConfig(placement="adapterp", width=3, activation="relu"),
    "parallel": aa.BottleneckConfig(placement="parallel", width=3, scaling="learned", dropout=0.1),
    "one layer": aa.BottleneckConfig(width=3, layers=(1,)),
    "lora": aa.LoRAConfig(rank=2, targets=("q_proj", "v_proj")),
    "lora with one target": aa.LoRAConfig(rank=2, targets="v_proj"),
    "prefix": aa.PrefixConfig(tokens=3),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("marked", [True, False])
def test_saved_and_loaded(llama: nn.Module, tmp_path: Path, config: aa.AdapterConfig, marked: bool) -> None:
    adapter = drawn(llama, config)
    if "scale" in adapter.capabilities and getattr(config, "scaling", None) != "learned":
        adapter.scale = 0.5
    before = logits(llama)
    aa.save_pretrained(llama, tmp_path, layout="llm-adapters")
    aa.detach(llama)
    if not marked:  # as another library leaves it: without what we add to their settings
        settings = json.loads((tmp_path / "adapter_config.json").read_text())
        del settings["anyadapter"]
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    aa.load(llama, tmp_path)
    torch.testing.assert_close(logits(llama), before, atol=1e-6, rtol=1e-5)


def test_the_fork_would_adapt_the_same_modules(llama: nn.Module) -> None:
    """By the ends of paths, which is all that its loader looks at."""
    for config in (aa.BottleneckConfig(width=3), aa.BottleneckConfig(width=3, layers=(1,), exclude="gate_proj")):
        adapter = aa.attach(llama, config)
        named = LAYOUT.write(adapter)[0]["target_modules"]
        chosen = {path for path in adapter.base_paths if path.endswith(tuple(named))}
        assert chosen == {placement.path for placement in adapter.placements}
        aa.detach(llama)


def test_targets_match_the_end_of_a_path_and_the_tensors_decide(llama: nn.Module, tmp_path: Path) -> None:
    settings, tensors = theirs(llama, aa.BottleneckConfig(placement="parallel", width=3, targets=("q_proj", "up_proj")))
    settings["target_modules"] = ["p_proj", "_attn.q_proj"]
    adapter = aa.load(llama, folder_of(tmp_path, settings, tensors))
    assert {p.path.split(".")[-1] for p in adapter.placements} == {"q_proj", "up_proj"}


def test_a_regular_expression_is_not_run(llama: nn.Module, tmp_path: Path) -> None:
    settings, tensors = theirs(llama, BOTTLENECK)
    settings["target_modules"] = r"(.*)*(up|down)_proj"
    adapter = aa.load(llama, folder_of(tmp_path, settings, tensors))
    assert {p.path.split(".")[-1] for p in adapter.placements} == {"up_proj", "down_proj"}


def test_adapterp_with_targets_of_its_own_is_in_series(llama: nn.Module, tmp_path: Path) -> None:
    settings, tensors = theirs(llama, BOTTLENECK)
    settings["use_adapterp"] = True
    adapter = aa.load(llama, folder_of(tmp_path, settings, tensors))
    assert adapter.config.placement == "series"
    assert {type(p.branch).__name__ for p in adapter.placements} == {"Before", "After"}


CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "a setting of a later version": ({"gating": True}, "'gating' is not known for BOTTLENECK"),
    "biases of the base": ({"bias": "all"}, "bias is 'all'; only 'none'"),
    "modules of the base": ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
    "unknown init": ({"init_weights": "houlsby"}, "init_weights is 'houlsby'; only 'bert' or 'mam_adapter'"),
    "unknown activation": ({"non_linearity": "tahn"}, "activation is 'tahn'"),
    "a word for a size": ({"bottleneck_size": "3"}, "width is '3'"),
    "another size": ({"bottleneck_size": 4}, "expected (4, 16)"),
    "a scale that no tensor has": ({"scaling": "learned"}, "missing model.layers.0.mlp.down_proj.adapter_scaling"),
    "a target without tensors": ({"target_modules": ["up_proj", "down_proj", "gate_proj"]}, "no tensors for"),
    "tensors without a target": ({"target_modules": ["up_proj"]}, "which is none of the targets ['up_proj']"),
    "targets that are no names": ({"target_modules": [1]}, "must be a list of names"),
}


@pytest.mark.parametrize(("change", "message"), CHANGED.values(), ids=CHANGED.keys())
def test_settings_that_are_refused(llama: nn.Module, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    settings, tensors = theirs(llama, BOTTLENECK)
    with pytest.raises(aa.AnyAdapterError) as error:
        aa.load(llama, folder_of(tmp_path, settings | change, tensors))
    assert message in str(error.value)
    assert not aa.adapters(llama)


def test_a_missing_setting_is_refused(llama: nn.Module, tmp_path: Path) -> None:
    settings, tensors = theirs(llama, BOTTLENECK)
    del settings["scaling"]
    with pytest.raises(aa.ArtefactError, match="needs the setting 'scaling'"):
        aa.load(llama, folder_of(tmp_path, settings, tensors))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (f"{ROOT}.7.mlp.up_proj.adapter_down.weight", "is no module of LlamaForCausalLM"),
        (f"{ROOT}.0.mlp.up_proj.adapter_down.bias", "is no tensor of BOTTLENECK"),
        ("model.layers.0.mlp.up_proj.adapter_down.weight", "is no tensor of BOTTLENECK"),
    ],
)
def test_a_tensor_too_many_is_refused(llama: nn.Module, tmp_path: Path, key: str, message: str) -> None:
    settings, tensors = theirs(llama, BOTTLENECK)
    with pytest.raises(aa.ArtefactError, match=message):
        aa.load(llama, folder_of(tmp_path, settings, tensors | {key: torch.zeros(3, 16)}))


def test_a_layer_too_few_is_refused(llama: nn.Module, tmp_path: Path) -> None:
    settings, tensors = theirs(llama, BOTTLENECK)
    half = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
    with pytest.raises(aa.ArtefactError, match=r"no tensors for model\.layers\.1\.mlp\.down_proj"):
        aa.load(llama, folder_of(tmp_path, settings, half))


def test_only_the_forks_fused_lora_is_read(llama: nn.Module, tmp_path: Path) -> None:
    settings, tensors = theirs(llama, aa.LoRAConfig(rank=2, targets="v_proj"))
    settings["enable_lora"] = [True, True, True]
    with pytest.raises(aa.ArtefactError, match="enable_lora is"):
        aa.load(llama, folder_of(tmp_path, settings, tensors))


def test_the_folders_of_todays_peft_are_not_taken_for_the_forks(tmp_path: Path) -> None:
    today = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    assert not LAYOUT.reads(today, {})
    assert detect(tmp_path, today, {}).name == "peft"
    assert detect(tmp_path, today | {"enable_lora": None, "merge_weights": False}, {}).name == "llm-adapters"


UNHOLDABLE = {
    "biases": (aa.BottleneckConfig(width=3, bias=True), "no place for"),
    "an activation with tensors": (aa.BottleneckConfig(width=3, activation="prelu"), "no place for"),
    "after any module": (aa.BottleneckConfig(width=3, placement="after", targets="o_proj"), "the placement 'after'"),
    "sub-layers": (aa.BottleneckConfig(width=3, placement="parallel_block"), "the placement 'parallel_block'"),
    "two sizes": (
        aa.BottleneckConfig(placement="parallel", reduction=4, targets=("up_proj", "down_proj")),
        "all bottlenecks are of one size",
    ),
    "rank-stabilised": (aa.LoRAConfig(rank=2, rank_stabilised=True), "one rank and one alpha"),
    "another method": (aa.IA3Config(), "not 'ia3'"),
    "a prefix in one layer": (aa.PrefixConfig(tokens=3, layers=(0,)), "cannot hold this Prefix"),
}


@pytest.mark.parametrize(("config", "message"), UNHOLDABLE.values(), ids=UNHOLDABLE.keys())
def test_what_it_cannot_hold(llama: nn.Module, config: aa.AdapterConfig, message: str) -> None:
    adapter = aa.attach(llama, config)
    assert not LAYOUT.writes(adapter)
    with pytest.raises(aa.ArtefactError) as error:
        LAYOUT.write(adapter)
    assert message in str(error.value)


def test_a_learned_scaling_leaves_no_place_for_a_scale(llama: nn.Module) -> None:
    adapter = aa.attach(llama, aa.BottleneckConfig(width=3, scaling="learned"))
    assert LAYOUT.writes(adapter)
    adapter.scale = 0.5
    with pytest.raises(aa.ArtefactError, match="no place for the scale"):
        LAYOUT.write(adapter)


def test_the_file_holds_their_keys(llama: nn.Module, tmp_path: Path) -> None:
    drawn(llama, BOTTLENECK)
    aa.save_pretrained(llama, tmp_path, layout="llm-adapters")
    keys = {
        f"{ROOT}.{layer}.mlp.{linear}.adapter_{side}.weight"
        for layer in (0, 1)
        for linear in ("up_proj", "down_proj")
        for side in ("down", "up")
    }
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == keys
