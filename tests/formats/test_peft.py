"""PEFT's layout in both directions, against PEFT itself and a real model."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from families import VOCABULARY, case
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import anyadapter as aa
from anyadapter.formats.layouts import by_name

PROMPTS = ["The capital of Italy is", "2 + 2 ="]


def randomise(parameters, std: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)


@torch.no_grad()
def run(name: str, model: nn.Module) -> Tensor:
    return case(name).output(model.eval()(**case(name).inputs(model, 2)))


def settings_in(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def saved_by_peft(name: str, config: peft.PeftConfig, folder: Path, adapter_name: str = "default") -> Tensor:
    """A folder that PEFT wrote, and what the model with that adapter gives."""
    model = peft.get_peft_model(case(name).build(), copy.deepcopy(config), adapter_name=adapter_name)
    randomise(model.parameters(), 0.3)
    model.save_pretrained(folder)
    return run(name, model)


def change(folder: Path, **settings) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(settings_in(folder) | settings))


# ------------------------------------------------------------------ a real model


@pytest.mark.parametrize(
    "config",
    [
        aa.LoRAConfig(rank=4, targets=("self_attention.query", "self_attention.value")),
        aa.LoRAConfig(rank=4, alpha=5.5, rank_stabilised=True, layers=(0, -1), rank_pattern={"q_proj": 2}),
        aa.IA3Config(),
        aa.PrefixConfig(tokens=4),
    ],
    ids=["lora", "lora-uneven", "ia3", "prefix"],
)
def test_peft_reads_what_we_write_for_a_real_model(config, smollm: nn.Module, smollm_tokenizer, tmp_path) -> None:
    inputs = smollm_tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    adapter = aa.attach(smollm, config)
    randomise(adapter.parameters(), 0.02)
    with torch.no_grad():
        mine = smollm(**inputs).logits
        generated = smollm.generate(**inputs, max_new_tokens=4, do_sample=False)
    aa.save_pretrained(smollm, tmp_path)
    aa.detach(smollm)

    theirs = peft.PeftModel.from_pretrained(smollm, tmp_path)
    try:
        with torch.no_grad():
            torch.testing.assert_close(theirs(**inputs).logits, mine, atol=1e-5, rtol=0)
            assert torch.equal(theirs.generate(**inputs, max_new_tokens=4, do_sample=False), generated)
        theirs.save_pretrained(tmp_path / "theirs")
    finally:
        if not isinstance(config, aa.PrefixConfig):
            theirs.unload()

    aa.load(smollm, tmp_path / "theirs")
    with torch.no_grad():
        assert torch.equal(smollm(**inputs).logits, mine)


# ------------------------------------------------------------------ what PEFT writes


def check_there_and_back(name: str, expected: Tensor, folder: Path, rtol: float) -> None:
    """We read what PEFT saved, and PEFT what we save of it, in ``folder / "ours"``: each gives the expected output."""
    model = case(name).build()
    aa.load(model, folder)
    torch.testing.assert_close(run(name, model), expected, atol=1e-5, rtol=rtol)
    aa.save_pretrained(model, folder / "ours")
    again = peft.PeftModel.from_pretrained(case(name).build(), folder / "ours")
    torch.testing.assert_close(run(name, again), expected, atol=1e-5, rtol=rtol)


TARGETS = {
    "names": {"target_modules": ["q_proj", "down_proj"]},
    "paths": {"target_modules": ["model.layers.1.self_attn.v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*\.1\.self_attn\.(q|k)_proj"},
    "excluded": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*0.*q_proj"},
    "layers": {"target_modules": ["o_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "stabilised": {"target_modules": ["q_proj"], "use_rslora": True, "lora_dropout": 0.1},
    "ranks": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 5, r".*\.1\.self_attn\.q_proj": 2}},
    "alphas": {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 3}},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("settings", TARGETS.values(), ids=TARGETS)
def test_every_way_to_say_which_modules_lora_updates(settings: dict, tmp_path) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **settings)
    expected = saved_by_peft("llama", config, tmp_path)
    check_there_and_back("llama", expected, tmp_path, rtol=1e-5)
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "gpt_neo", "opt", "bloom", "qwen3", "gemma3", "bert", "t5", "bart"])
@pytest.mark.parametrize(
    "config", [peft.LoraConfig(target_modules="all-linear"), peft.IA3Config()], ids=["lora", "ia3"]
)
def test_every_family_goes_there_and_back(name: str, config: peft.PeftConfig, tmp_path) -> None:
    expected = saved_by_peft(name, config, tmp_path)
    check_there_and_back(name, expected, tmp_path, rtol=1e-4)


@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_goes_there_and_back(projection: bool, tmp_path) -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=projection)
    expected = saved_by_peft("llama", config, tmp_path)
    check_there_and_back("llama", expected, tmp_path, rtol=1e-5)


def test_convolutions(tmp_path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["conv1", "conv2", "conv_in"])
    expected = saved_by_peft("sd15", config, tmp_path)
    model = case("sd15").build()
    aa.load(model, tmp_path)
    torch.testing.assert_close(run("sd15", model), expected, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------ heads


def classifier(family: str) -> nn.Module:
    torch.manual_seed(0)
    widths = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, num_labels=3, pad_token_id=0, **widths)
    return getattr(transformers, f"{family}ForSequenceClassification")(config).eval()


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Llama"])
@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(task_type="SEQ_CLS"),
        peft.IA3Config(task_type="SEQ_CLS"),
        peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    ],
    ids=["lora", "ia3", "prefix"],
)
def test_a_classifier_travels_with_its_head(family: str, config: peft.PeftConfig, tmp_path) -> None:
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    theirs = peft.get_peft_model(classifier(family), copy.deepcopy(config))
    randomise(theirs.parameters(), 0.3)
    expected = theirs.eval()(**inputs).logits
    theirs.save_pretrained(tmp_path)

    model = classifier(family)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    adapter = aa.load(model, tmp_path)
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert adapter.config.whole == ("score" if family == "Llama" else "classifier",)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    aa.save_pretrained(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(classifier(family), tmp_path / "ours").eval()
    torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_whole_head_trains_merges_and_runs_in_half_precision(tmp_path) -> None:
    model = classifier("Bert").to(torch.bfloat16)
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    before = model(input_ids=ids).logits
    adapter = aa.attach(model, aa.LoRAConfig(rank=2, whole="classifier"))
    assert not any("classifier.lora" in name for name in adapter.tensors())  # a head is not updated twice
    torch.testing.assert_close(model(input_ids=ids).logits, before, atol=1e-2, rtol=1e-2)
    model(input_ids=ids).logits.float().sum().backward()
    assert adapter.tensors()["classifier.whole.weight"].grad.abs().max() > 0
    assert model.classifier.weight.grad is None

    randomise(adapter.parameters())
    with_head = model(input_ids=ids).logits
    aa.merge(model)
    torch.testing.assert_close(model(input_ids=ids).logits, with_head, atol=3e-2, rtol=3e-2)
    aa.unmerge(model)
    aa.detach(model)
    assert torch.equal(model(input_ids=ids).logits, before)

    aa.attach(model, aa.LoRAConfig(), "linear")
    with pytest.raises(aa.AttachError, match=r"an earlier adapter wraps classifier"):
        aa.attach(model, aa.LoRAConfig(whole="classifier"), "head")


# ------------------------------------------------------------------ names


class Odd(nn.Module):
    """Modules whose names are parts of PEFT's keys, and roles of ours."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lora = nn.Linear(4, 4)
        self.weight_lora_A = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.weight_lora_A(self.lora(x)))


@pytest.mark.parametrize("name", ["lora", "weight", "default", "lora_A"])
def test_no_name_corrupts_a_key(name: str, tmp_path) -> None:
    x = torch.randn(2, 4)
    model = Odd()
    adapter = aa.attach(model, aa.LoRAConfig(rank=2), name)
    randomise(adapter.parameters(), 0.3)
    aa.save_pretrained(model, tmp_path, name)
    keys = [f"base_model.model.{m}.lora_{x}.weight" for m in ("head", "lora", "weight_lora_A") for x in "AB"]
    assert sorted(load_file(tmp_path / "adapter_model.safetensors")) == sorted(keys)
    assert settings_in(tmp_path)["target_modules"] == ["lora", "weight_lora_A", "head"]
    theirs = peft.PeftModel.from_pretrained(Odd(), tmp_path)
    torch.testing.assert_close(theirs(x), model(x))

    theirs = peft.PeftModel.from_pretrained(Odd(), tmp_path, adapter_name=name if name == "default" else f"{name}_")
    theirs.save_pretrained(tmp_path)
    other = Odd()
    aa.load(other, tmp_path if name == "default" else tmp_path / f"{name}_", name)
    torch.testing.assert_close(other(x), model(x))


def test_targets_are_short_names_where_these_are_enough(tmp_path) -> None:
    model = case("llama").build()
    aa.attach(model, aa.LoRAConfig(targets=("self_attention.query", "feed_forward.down")), "short")
    aa.attach(model, aa.LoRAConfig(targets="self_attention.query", layers=(1,)), "long")
    aa.save_pretrained(model, tmp_path / "short", "short")
    aa.save_pretrained(model, tmp_path / "long", "long")
    assert settings_in(tmp_path / "short")["target_modules"] == ["q_proj", "down_proj"]
    assert settings_in(tmp_path / "long")["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    assert settings_in(tmp_path / "short")["task_type"] == "CAUSAL_LM"


def test_strength_is_in_alpha_and_not_counted_twice(tmp_path) -> None:
    model = case("llama").build()
    adapter = aa.attach(model, aa.LoRAConfig(alpha=6, alpha_pattern={"v_proj": 3}))
    randomise(adapter.parameters(), 0.3)
    adapter.scale = 0.5
    expected = run("llama", model)
    aa.save_pretrained(model, tmp_path)
    assert settings_in(tmp_path)["lora_alpha"] == 3
    assert isinstance(settings_in(tmp_path)["lora_alpha"], int)
    torch.testing.assert_close(run("llama", peft.PeftModel.from_pretrained(case("llama").build(), tmp_path)), expected)
    ours = case("llama").build()
    assert aa.load(ours, tmp_path).scale == 0.5
    assert torch.equal(run("llama", ours), expected)


def test_a_half_precision_base_takes_an_adapter_in_fp32(tmp_path) -> None:
    saved_by_peft("llama", peft.LoraConfig(target_modules=["q_proj"]), tmp_path)
    model = case("llama").build().to(torch.bfloat16)
    adapter = aa.load(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(case("llama").build().to(torch.bfloat16), tmp_path)
    assert {tensor.dtype for tensor in adapter.tensors().values()} == {torch.float32}
    torch.testing.assert_close(run("llama", model), run("llama", theirs), atol=3e-2, rtol=3e-2)


# ------------------------------------------------------------------ what is refused, and what is not


@pytest.fixture
def folder(tmp_path) -> Path:
    saved_by_peft("llama", peft.LoraConfig(target_modules=["q_proj"], r=4), tmp_path)
    return tmp_path


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_a_new_setting_of_a_newer_peft_that_is_off_is_no_obstacle(value, folder: Path) -> None:
    change(folder, use_tomorrows_lora=value)
    aa.load(case("llama").build(), folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_tomorrows_lora": True}, r"use_tomorrows_lora = True .*pip install -U anyadapter"),
        ({"use_dora": True}, "use_dora = True .* merge_and_unload"),
        ({"target_parameters": ["experts.weight"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"r": 8}, r"q_proj.lora_A.weight is of rank 4; the configuration says \[8\]"),
        ({"r": "4"}, "r is '4'"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is .* dict"),
        ({"modules_to_save": "score"}, "modules_to_save is 'score'"),
        ({"alpha_pattern": {"(a+)+$": 3}}, r"regular expression '\(a\+\)\+\$', which is not run"),
        ({"peft_type": "LOHA"}, "of no layout we read .*LOHA"),
    ],
)
def test_what_we_cannot_honour_is_refused_by_name(settings: dict, message: str, folder: Path) -> None:
    change(folder, **settings)
    model = case("llama").build()
    with pytest.raises(aa.ArtefactError, match=message):
        aa.load(model, folder)
    assert not aa.adapters(model)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("q_proj.lora_A.weight", "q_prj.lora_A.weight", r"q_prj' is no module of .* Did you mean"),
        ("q_proj.lora_A.weight", "q_proj.lora_magnitude_vector", "lora_magnitude_vector' is neither"),
        ("base_model.model.model.layers.0", "layers.0", "which begin with base_model.model"),
        ("layers.1.self_attn.q_proj.lora_B.weight", None, "missing model.layers.1.self_attn.q_proj.lora_B.weight"),
        ("layers.1.self_attn.q_proj.lora_A.weight", None, "and no model.layers.1.self_attn.q_proj.lora_A.weight"),
    ],
)
def test_a_tensor_that_is_not_ours_is_refused_by_name(old: str, new: str | None, message: str, folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {key.replace(old, new or ""): t for key, t in tensors.items() if new is not None or old not in key}
    save_file(kept, folder / "adapter_model.safetensors")
    with pytest.raises(aa.ArtefactError, match=message):
        aa.load(case("llama").build(), folder)


def test_what_the_layout_cannot_hold_is_saved_in_our_own(tmp_path) -> None:
    for name, config in {
        "projection": aa.PrefixConfig(projection=4),
        "layers": aa.PrefixConfig(layers=(0,)),
        "unshifted": aa.PrefixConfig(shift=False),
    }.items():
        model = case("llama").build()
        adapter = aa.attach(model, config)
        randomise(adapter.parameters())
        expected = run("llama", model)
        aa.save_pretrained(model, tmp_path / name)
        assert settings_in(tmp_path / name)["anyadapter"]["layout"] == "native"
        with pytest.raises(aa.ArtefactError, match="PEFT's layout cannot hold this Prefix"):
            by_name("peft").write(adapter)
        other = case("llama").build()
        aa.load(other, tmp_path / name)
        assert torch.equal(run("llama", other), expected)
    for name in ("t5", "bart"):
        assert not by_name("peft").writes(aa.attach(case(name).build(), aa.PrefixConfig()))


def test_a_prefix_of_an_encoder_decoder_is_not_read(tmp_path) -> None:
    saved_by_peft("llama", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), tmp_path)
    change(tmp_path, task_type="SEQ_2_SEQ_LM", num_transformer_submodules=2)
    with pytest.raises(aa.ArtefactError, match="encoder-decoder"):
        aa.load(case("llama").build(), tmp_path)
