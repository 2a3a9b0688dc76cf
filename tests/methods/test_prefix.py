"""Prefix tuning: it is what a cache would hold, on every family; PEFT agrees where it runs."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from families import case
from torch import Tensor, nn

import anyadapter as aa

CAUSAL = [
    "gpt2",
    "gptj",
    "gpt_neo",
    "opt",
    "bloom",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
]
WINDOWED = {"gpt_neo", "mistral", "gemma2", "gemma3"}  # by four tokens, in some layers
CAPACITY = {"clip", "vit"}  # whose positions are all in use
OTHERS = ["bert", "roberta", "distilbert", "t5", "bart", "clip", "vit", "whisper"]


def randomise(adapter: aa.Adapter) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def attach(name: str, **settings) -> tuple[nn.Module, aa.Adapter, dict[str, Tensor]]:
    model = case(name).build()
    if name in CAPACITY:
        settings["shift"] = False
    adapter = aa.attach(model, aa.PrefixConfig(**{"tokens": 3, **settings}))
    randomise(adapter)
    return model, adapter, case(name).inputs(model, 2)


@torch.no_grad()
def run(name: str, model: nn.Module, inputs: dict) -> Tensor:
    return case(name).output(model(**inputs))


@pytest.mark.parametrize("name", CAUSAL)
def test_peft_computes_the_same(name: str) -> None:
    model, adapter, inputs = attach(name, tokens=1)
    inputs = {k: v[:, :3] for k, v in inputs.items()}  # within the windows
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1)
    theirs = peft.get_peft_model(case(name).build(), config).eval()
    theirs.prompt_encoder["default"].embedding.weight.data.copy_(adapter.prompt.weight)
    torch.testing.assert_close(run(name, model, inputs), theirs(**inputs).logits.detach(), atol=1e-5, rtol=1e-5)

    model(**inputs).logits.pow(2).mean().backward()
    theirs(**inputs).logits.pow(2).mean().backward()
    grad = theirs.prompt_encoder["default"].embedding.weight.grad
    assert grad.abs().max() > 0
    torch.testing.assert_close(adapter.prompt.weight.grad, grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_prefix_that_imitates_tokens_is_these_tokens(name: str) -> None:
    model, adapter, inputs = attach(name, tokens=2)
    ids = inputs["input_ids"][:1, : 4 if name in WINDOWED else 7]
    adapter.imitate(model, ids[0, :2])
    with aa.disabled(model), torch.no_grad():
        whole = model(input_ids=ids).logits[:, 2:]
    torch.testing.assert_close(run(name, model, {"input_ids": ids[:, 2:]}), whole, atol=1e-5, rtol=1e-5)


def test_a_prefix_imitates_a_real_instruction(smollm: nn.Module, smollm_tokenizer) -> None:
    instruction = smollm_tokenizer("The capital of Italy is Rome. The", return_tensors="pt").input_ids
    rest = smollm_tokenizer(" capital of Italy is", return_tensors="pt").input_ids
    adapter = aa.attach(smollm, aa.PrefixConfig(tokens=instruction.shape[1]))
    adapter.imitate(smollm, instruction[0])
    with torch.no_grad():
        with aa.disabled(smollm):
            whole = smollm(torch.cat([instruction, rest], dim=1)).logits[:, -rest.shape[1] :]
        mine = smollm(rest).logits
    torch.testing.assert_close(mine, whole, atol=2e-3, rtol=1e-3)
    assert smollm_tokenizer.decode(mine[0, -1].argmax()).strip() == "Rome"


@pytest.mark.parametrize("name", CAUSAL)
def test_generation_with_a_cache_is_the_full_forward(name: str) -> None:
    model, _, inputs = attach(name)
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    full = run(name, model, {"input_ids": out.sequences})[:, inputs["input_ids"].shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize(
    "targets", ["self_attention", "decoder:self_attention", "encoder:self_attention", "cross_attention"]
)
def test_encoder_decoders_generate_as_they_compute(name: str, targets: str) -> None:
    model, adapter, inputs = attach(name, targets=targets)
    encoded = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    out = model.generate(**encoded, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)
    full = run(name, model, {**encoded, "decoder_input_ids": out.sequences})[:, :-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), full, atol=1e-5, rtol=1e-5)
    model(**inputs).logits.sum().backward()
    assert (adapter.prompt.weight.grad.abs().sum(0) > 0).all() or targets == "encoder:self_attention"


@pytest.mark.parametrize("name", CAUSAL)
def test_left_padding_changes_nothing(name: str) -> None:
    model, _, inputs = attach(name)
    ids = inputs["input_ids"]
    row = ids[1:, :4]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), row], dim=1)
    options = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    alone = model.generate(input_ids=row, attention_mask=torch.ones_like(row), **options)
    mask = torch.stack([torch.ones(7), torch.tensor([0, 0, 0, 1, 1, 1, 1.0])]).long()
    together = model.generate(input_ids=torch.cat([ids[:1], padded]), attention_mask=mask, **options)
    torch.testing.assert_close(torch.stack(together.logits)[:, 1:], torch.stack(alone.logits), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CAUSAL + OTHERS)
def test_disabled_is_the_base_and_rows_do_not_mix(name: str) -> None:
    family = case(name)
    before = run(name, family.build().requires_grad_(False), family.inputs(family.build(), 2))
    model, _, inputs = attach(name)
    with_prefix = run(name, model, inputs)
    assert (with_prefix - before).abs().max() > 1e-2
    with aa.disabled(model):
        assert torch.equal(run(name, model, inputs), before)
    alone = run(name, model, family.inputs(model, 1))
    torch.testing.assert_close(alone, with_prefix[:1], atol=1e-5, rtol=1e-5)

    family.output(model(**inputs)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        "anyadapter.adapters./default.prompt.weight"
    ]
    aa.detach(model)
    assert torch.equal(run(name, model, inputs), before)


@pytest.mark.parametrize("name", ["gpt_neo", "mistral"])
def test_a_prefix_stays_in_view_of_a_sliding_window(name: str) -> None:
    model, adapter, inputs = attach(name, layers=(-1,))  # whose window is of four tokens
    model(**inputs).logits[:, -1].sum().backward()  # the last of seven tokens
    grad = adapter.prompt.weight.grad
    assert grad.shape[0] == 3
    assert (grad.abs().amax(dim=1) > 0).all()


def test_a_projected_prefix_trains_its_network_and_folds_into_a_plain_one(tmp_path) -> None:
    model, adapter, inputs = attach("llama", projection=5)
    assert {n: tuple(t.shape) for n, t in adapter.tensors().items()} == {
        "prompt.embedding": (3, 8),
        "prompt.inner.weight": (5, 8),
        "prompt.inner.bias": (5,),
        "prompt.outer.weight": (32, 5),
        "prompt.outer.bias": (32,),
    }
    model(**inputs).logits.pow(2).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in adapter.parameters())
    before = run("llama", model, inputs)
    aa.save_pretrained(model, tmp_path)
    adapter.fold()
    assert list(adapter.tensors()) == ["prompt.weight"]
    torch.testing.assert_close(run("llama", model, inputs), before, atol=1e-6, rtol=1e-6)

    other = case("llama").build()
    aa.load(other, tmp_path)
    assert torch.equal(run("llama", other, inputs), before)


def test_copies_pickles_and_compiled_models_carry_it() -> None:
    model, _, inputs = attach("llama")
    before = run("llama", model, inputs)
    twin = copy.deepcopy(model)
    aa.adapters(twin)["default"].prompt.weight.data.zero_()
    assert not torch.equal(run("llama", twin, inputs), before)
    assert torch.equal(run("llama", model, inputs), before)
    assert torch.equal(run("llama", pickle.loads(pickle.dumps(model)), inputs), before)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(run("llama", compiled, inputs), before)


def test_two_prefixes_stand_one_in_front_of_the_other() -> None:
    model, first, inputs = attach("llama", tokens=2)
    second = aa.attach(model, aa.PrefixConfig(tokens=3), "second")
    ids = inputs["input_ids"][:1]
    with aa.disabled(model, "second"):
        first.imitate(model, ids[0, :2])
    second.imitate(model, ids[0, 2:5])  # behind the first
    with aa.disabled(model), torch.no_grad():
        whole = model(input_ids=ids).logits[:, 5:]
    torch.testing.assert_close(run("llama", model, {"input_ids": ids[:, 5:]}), whole, atol=1e-5, rtol=1e-5)


def test_half_precision_bases_take_a_prefix_in_fp32() -> None:
    model = case("llama").build().to(torch.bfloat16)
    adapter = aa.attach(model, aa.PrefixConfig(tokens=3))
    assert adapter.prompt.weight.dtype == torch.float32
    logits = model(**case("llama").inputs(model, 2)).logits
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert adapter.prompt.weight.grad.dtype == torch.float32


def test_misuse_is_refused() -> None:
    with pytest.raises(aa.ConfigError, match="tokens is 0"):
        aa.PrefixConfig(tokens=0)
    with pytest.raises(aa.ConfigError, match="init is -1"):
        aa.PrefixConfig(init=-1)
    model, adapter, inputs = attach("llama", tokens=2)
    with pytest.raises(aa.ConfigError, match="tokens is 2; it must be 3, as"):
        adapter.imitate(model, inputs["input_ids"][0, :3])
    with pytest.raises(aa.ConfigError, match="no scale"):
        adapter.scale = 0.5
    with pytest.raises(aa.AttachError, match="not linear"):
        aa.merge(model)
    _, projected, _ = attach("llama", tokens=2, projection=4)
    with pytest.raises(aa.ConfigError, match="fold it first"):
        projected.imitate(model, inputs["input_ids"][0, :2])
    with pytest.raises(aa.TargetError, match="no attention core"):
        aa.attach(case("llama").build(), aa.PrefixConfig(targets="mlp"))
