"""The files of MHR's authors and PEFT's of Poly: read strictly, written as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import case
from safetensors.torch import save_file
from torch import Tensor, nn

import anyadapter as aa
from anyadapter.formats.mhr import describe, official_settings, read_official, write_official
from anyadapter.methods.language.mhr import MHR, MHRConfig

FIRST = "encoder.block.0.layer.0.SelfAttention"


def build() -> nn.Module:
    return case("t5").build().requires_grad_(False)


def attached(model: nn.Module, **config: Any) -> MHR:
    settings = {"tasks": ("a", "b"), "rank": 2, "skills": 3, "splits": 4, "targets": ("q", "v", "wi_1"), **config}
    adapter = aa.attach(model, MHRConfig(**settings))
    assert isinstance(adapter, MHR)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    return adapter


@torch.no_grad()
def outputs(model: nn.Module, **signals: Any) -> Tensor:
    inputs = case("t5").inputs(model, 2)
    if not signals:
        return model(**inputs).logits
    with aa.signals(model, **signals):
        return model(**inputs).logits


def test_a_lightning_checkpoint_there_and_back(tmp_path: Path) -> None:
    model = build()
    adapter = attached(model, granularity="layer", weights="straight-through")
    before = outputs(model, task_ids=["a", "b"])
    official = write_official(adapter, prefix="model.", trained_only=True)
    theirs = {"router_granularity": "blockwise", "module_logits_straight_through": True, "lora_alpha": 1.0, "seed": 42}
    torch.save({"state_dict": official, "hyper_parameters": theirs}, tmp_path / "best.ckpt")
    aa.detach(model)
    with pytest.raises(aa.ArtefactError, match="allow_pickle=True"):
        read_official(tmp_path / "best.ckpt", aa.Host.of(model))
    config, tensors = read_official(tmp_path / "best.ckpt", aa.Host.of(model), tasks=("a", "b"), allow_pickle=True)
    assert config == adapter.config
    again = aa.attach(model, config)
    again.load_tensors(tensors)
    assert torch.equal(outputs(model, task_ids=["a", "b"]), before)
    written = write_official(again, prefix="model.", trained_only=True)
    assert all(torch.equal(written[name], tensor) for name, tensor in official.items())
    assert written.keys() == official.keys()


def test_a_pickle_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": Path("x")}, tmp_path / "bad.ckpt")
    with pytest.raises(aa.ArtefactError, match="more than tensors"):
        read_official(tmp_path / "bad.ckpt", aa.Host.of(build()), allow_pickle=True)


@pytest.mark.parametrize("granularity", ["linear", "sublayer", "layer", "stack", "model"])
def test_what_shares_a_selector_is_told_from_where_it_stands(granularity: str) -> None:
    model = build()
    adapter = attached(model, granularity=granularity)
    official = write_official(adapter, trained_only=True)
    config, _ = read_official(official, aa.Host.of(model))
    assert isinstance(config, MHRConfig)
    assert config.granularity == granularity
    assert config.tasks == ("0", "1")
    every = write_official(adapter)
    assert len([name for name in every if name.endswith("module_logits")]) == len(adapter.routed_branches())
    config, tensors = read_official(every, aa.Host.of(model), granularity=granularity)
    assert sorted(tensors) == sorted(adapter.tensors())


def test_a_summary_is_read_off_the_shapes(tmp_path: Path) -> None:
    model = build()
    official = write_official(attached(model, granularity="stack"))
    found = describe(official)
    shapes = {k: found[k] for k in ("selector", "rank", "splits", "skills", "tasks")}
    assert shapes == {"selector": "learned", "rank": 2, "splits": 4, "skills": 3, "tasks": 2}
    assert found["linears"] == found["selectors"] == 16
    assert found["parameters"] == sum(t.numel() for t in official.values())
    save_file({k: v for k, v in official.items() if not k.endswith("logits")}, tmp_path / "private.safetensors")
    config, _ = read_official(tmp_path / "private.safetensors", aa.Host.of(model))
    assert isinstance(config, MHRConfig)
    assert config.selector == "private"
    assert config.tasks == ("0", "1", "2")


def test_their_plain_lora_is_turned_round() -> None:
    model = build()
    torch.manual_seed(0)
    widths = {path: aa.Host.of(model).modules[path] for path in (f"{FIRST}.q", f"{FIRST}.v")}
    official = {}
    for path, module in widths.items():
        official[f"{path}.lora_a"] = torch.randn(module.in_features, 1)
        official[f"{path}.lora_b"] = torch.randn(1, module.out_features)
    config, tensors = read_official(official, aa.Host.of(model))
    assert config.method == "lora"
    assert config.rank == 1
    assert config.scaling_of(f"{FIRST}.q") == 1
    aa.attach(model, config).load_tensors(tensors)
    x, linear = torch.randn(3, 16), model.get_submodule(f"{FIRST}.q")
    expected = x @ linear.weight.T + x @ official[f"{FIRST}.q.lora_a"] @ official[f"{FIRST}.q.lora_b"]
    torch.testing.assert_close(linear(x), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{FIRST}.v.selector.module_logits"), "of no granularity|missing"),
        (lambda t: t.update({f"{FIRST}.v.selector.module_logits": torch.ones(2, 12)}), "one selector .* differ"),
        (lambda t: t.pop(f"{FIRST}.v.lora_b"), r"v\.lora_a and no .*v\.lora_b"),
        (lambda t: t.update(extra=torch.ones(2)), "'extra' is none of"),
        (lambda t: t.update({"nowhere.q.lora_a": torch.ones(4, 3, 4, 2)}), "no module"),
        (lambda t: t.update({f"{FIRST}.v.lora_a": torch.ones(4, 3, 4, 5)}), "expected .heads, skills"),
        (lambda t: t.update({f"{FIRST}.v.lora_a": torch.ones(4, 3, 5, 2)}), "expected"),
    ],
)
def test_a_file_that_is_not_whole_says_what_is_wrong(change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    model = build()
    official = write_official(attached(model, granularity="model"))
    if "granularity" in message:  # of the copies of a shared selector one may be missing, of others none
        aa.detach(model)
        official = write_official(attached(model))
    aa.detach(model)
    change(official)
    with pytest.raises(aa.ArtefactError, match=message):
        read_official(official, aa.Host.of(model), **({} if "granularity" in message else {"granularity": "model"}))


def test_the_later_order_of_axes_is_named() -> None:
    a, b = torch.ones(3, 4, 4, 2), torch.ones(3, 2, 4, 4)
    with pytest.raises(aa.ArtefactError, match="later releases"):
        read_official({f"{FIRST}.q.lora_a": a, f"{FIRST}.q.lora_b": b}, aa.Host.of(build()))


def test_an_average_is_one_over_k() -> None:
    model = build()
    new = attached(model).to_average()
    aa.detach(model)
    average = aa.attach(model, new[0])
    average.load_tensors(new[1])
    official = write_official(average)
    config, tensors = read_official(official, aa.Host.of(model))
    assert config == new[0]
    assert sorted(tensors) == sorted(new[1])
    official[f"{FIRST}.q.selector.module_probs"] = torch.full((4, 3), 0.5)
    with pytest.raises(aa.ArtefactError, match="1 / K"):
        read_official(official, aa.Host.of(model))


def test_what_no_file_of_theirs_has_a_place_for_is_refused(tmp_path: Path) -> None:
    model = build()
    adapter = attached(model, weights="relaxed")
    adapter.scale = 0.5
    with pytest.raises(aa.ArtefactError, match="its scale is 0.5; set it to 1 and multiply alpha"):
        write_official(adapter)
    adapter.scale, adapter.uniformity = 1, 0.5
    with pytest.raises(aa.ArtefactError, match=r"its uniformity is 0.5; set it to 0, or write what to_average\(\)"):
        write_official(adapter)
    with pytest.raises(aa.ArtefactError, match="its uniformity is 0.5"):
        aa.save_pretrained(model, tmp_path / "poly", layout="peft-poly")
    assert not (tmp_path / "poly").exists()


def test_settings_of_the_authors() -> None:
    theirs = {"router_granularity": "coderwise", "lora_alpha": 16, "module_logits_relaxed_bernoulli": True}
    assert official_settings(theirs) == {"granularity": "stack", "alpha": 16.0, "weights": "relaxed"}
    with pytest.raises(aa.ArtefactError, match="router_granularity"):
        official_settings({"router_granularity": "headwise"})
    with pytest.raises(aa.ArtefactError, match="adapter_type"):
        official_settings({"adapter_type": "ia3"})


# ------------------------------------------------------------------ PEFT


def test_a_poly_folder_there_and_back(tmp_path: Path) -> None:
    model = build()
    adapter = attached(model, weights="relaxed")
    before = outputs(model, task_ids=[0, 1])
    aa.save_pretrained(model, tmp_path / "poly", layout="peft-poly")
    aa.detach(model)
    found = (tmp_path / "poly" / "adapter_config.json").read_text()
    (tmp_path / "poly" / "adapter_config.json").write_text(without_ours(found))
    loaded = aa.load(model, tmp_path / "poly")
    assert torch.equal(outputs(model, task_ids=[0, 1]), before)
    assert isinstance(loaded, MHR)
    assert loaded.config.tasks == ("0", "1")
    assert loaded.config.weights == "relaxed"
    assert adapter.tensors().keys() == loaded.tensors().keys()


def without_ours(config: str) -> str:
    """A folder's settings as PEFT writes them."""
    return json.dumps({k: v for k, v in json.loads(config).items() if k != "anyadapter"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"granularity": "layer"}, "selector of its own"),
        ({"alpha": 2.0}, "1 / r"),
        ({"shared_skill": True}, "sigmoid"),
        ({"weights": "l2"}, "sigmoid"),
    ],
)
def test_what_poly_folders_cannot_hold_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = build()
    attached(model, **config)
    with pytest.raises(aa.ArtefactError, match=message):
        aa.save_pretrained(model, tmp_path / "poly", layout="peft-poly")


@pytest.mark.parametrize(("change", "message"), [({"poly_type": "x"}, "poly_type"), ({"use_dora": True}, "use_dora")])
def test_settings_of_poly_we_do_not_know_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = build()
    attached(model)
    aa.save_pretrained(model, tmp_path / "poly", layout="peft-poly")
    path = tmp_path / "poly" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(without_ours(path.read_text())), **change}))
    with pytest.raises(aa.ArtefactError, match=message):
        aa.load(model, tmp_path / "poly", "other")


def test_peft_runs_what_we_write(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = build()
    attached(model, weights="relaxed")
    expected = outputs(model, task_ids=[1, 0])
    aa.save_pretrained(model, tmp_path / "poly", layout="peft-poly")
    aa.detach(model)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "poly").eval()
    with torch.no_grad():
        found = theirs(**case("t5").inputs(model, 2), task_ids=torch.tensor([1, 0])).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
