"""LLaMA-Adapter: the card's invariants, on every host with separate projections."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Case, case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import anyadapter as aa
from anyadapter.formats.llama_adapter import gates_of, read_official, write_official
from anyadapter.methods.language.llama_adapter import GatedPrefix, LlamaAdapter

HOSTS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "opt", "gptj", "gpt_neo"]
OTHERS = ["bert", "roberta", "distilbert", "t5", "bart", "whisper", "vit", "clip"]
hosts = pytest.mark.parametrize("family", [pytest.param(c, id=c.name) for c in FAMILIES if c.name in HOSTS])
all_hosts = pytest.mark.parametrize(
    "family", [pytest.param(c, id=c.name) for c in FAMILIES if c.name in HOSTS + OTHERS]
)
IDS = torch.tensor([[5, 9, 3, 33, 21, 60, 7], [8, 4, 44, 12, 6, 30, 19]])


def build(family: Case | str) -> nn.Module:
    return (case(family) if isinstance(family, str) else family).build().requires_grad_(False)


def opened(model: nn.Module, fill: float | None = None, **config: Any) -> LlamaAdapter:
    """An adapter whose gates are open."""
    adapter = aa.attach(model, aa.LlamaAdapterConfig(**config))
    assert isinstance(adapter, LlamaAdapter)
    with torch.no_grad():
        for g in gates_of(adapter):
            g.normal_() if fill is None else g.fill_(fill)
    return adapter


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    return model(input_ids=ids, **kwargs).logits


# ------------------------------------------------------------------ absent until the gates open


@all_hosts
def test_a_fresh_adapter_is_absent_and_an_open_one_is_not(family: Case) -> None:
    model = build(family)
    inputs = family.inputs(model, 2)
    with torch.no_grad():
        before = family.output(model(**inputs))
        adapter = aa.attach(model, aa.LlamaAdapterConfig(length=3, last_layers=1))
        assert torch.equal(family.output(model(**inputs)), before)
        for gate in gates_of(adapter):
            gate.fill_(1.0)
        assert not torch.allclose(family.output(model(**inputs)), before, atol=1e-4)
        aa.detach(model)
        assert torch.equal(family.output(model(**inputs)), before)


def test_the_gate_moves_before_the_prompts() -> None:
    model = build("llama")
    adapter = aa.attach(model, aa.LlamaAdapterConfig(length=4, last_layers=2))
    for gates, moved in ((0.0, False), (0.3, True)):
        with torch.no_grad():
            for gate in gates_of(adapter):
                gate.fill_(gates)
        adapter.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all((gate.grad != 0).all() for gate in gates_of(adapter))
        assert bool((adapter.adapter_query.weight.grad != 0).any()) is moved
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("anyadapter"))


def test_layers_below_are_untouched() -> None:
    model = build("llama")
    before = model(input_ids=IDS, output_hidden_states=True).hidden_states
    adapter = opened(model, length=4, last_layers=1)
    out = model(input_ids=IDS, output_hidden_states=True)
    assert torch.equal(out.hidden_states[1], before[1])
    assert not torch.allclose(out.hidden_states[2], before[2], atol=1e-3)
    out.logits.sum().backward()
    assert not out.hidden_states[1].requires_grad
    assert [gate.grad is None for gate in gates_of(adapter)] == [True, False]
    assert "idle_gates" not in dict(adapter.named_parameters())


# ------------------------------------------------------------------ the formula


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, int]:
    groups = draw(st.integers(1, 3))
    sizes = {name: draw(st.integers(1, 5)) for name in ("batch", "kv_heads", "length", "queries", "width")}
    return sizes | {
        "heads": sizes["kv_heads"] * groups,
        "dim": 2 * draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 99)),
    }


def branch_of(s: dict[str, int], activation: str = "tanh") -> tuple[GatedPrefix, Tensor, nn.Linear, nn.Linear, Tensor]:
    torch.manual_seed(s["seed"])
    prompts = torch.randn(1, s["length"], s["width"])
    key, value = (nn.Linear(s["width"], s["kv_heads"] * s["dim"], bias=True) for _ in range(2))
    branch = GatedPrefix(prompts.clone, key, value, None, (1, s["heads"], 1, 1), activation)
    branch.gate.data.normal_()
    return branch, prompts, key, value, torch.randn(s["batch"], s["heads"], s["queries"], s["dim"])


def ones(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """A core that has nothing to add."""
    return torch.zeros_like(q)


@given(s=shapes(), activation=st.sampled_from(["tanh", "identity"]), scaling=st.sampled_from([None, 1.0, 0.3]))
@settings(max_examples=25, deadline=None)
def test_the_added_term_is_the_papers(s: dict[str, int], activation: str, scaling: float | None) -> None:
    branch, prompts, key, value, q = branch_of(s, activation)
    mine = branch(ones, q, q, q, None, scaling=scaling)
    p_k, p_v = (f(prompts)[0].view(s["length"], s["kv_heads"], s["dim"]) for f in (key, value))
    for head in range(s["heads"]):
        group = head // (s["heads"] // s["kv_heads"])
        scores = q[:, head] @ p_k[:, group].T * (s["dim"] ** -0.5 if scaling is None else scaling)
        gate = branch.gate[0, head, 0, 0]
        gate = gate.tanh() if activation == "tanh" else gate
        torch.testing.assert_close(mine[:, head], gate * scores.softmax(-1) @ p_v[:, group], atol=1e-5, rtol=1e-4)


@given(s=shapes())
@settings(max_examples=25, deadline=None)
def test_the_added_term_is_bounded_and_prompts_have_no_order(s: dict[str, int]) -> None:
    branch, prompts, _, value, q = branch_of(s)
    mine = branch(ones, q, q, q, None)
    norms = value(prompts)[0].view(s["length"], s["kv_heads"], s["dim"]).norm(dim=-1).amax(dim=0)
    bound = branch.gate.flatten().tanh().abs() * norms.repeat_interleave(s["heads"] // s["kv_heads"])
    assert (mine.norm(dim=-1) <= bound[None, :, None] + 1e-5).all()
    branch.prompts = prompts[:, torch.randperm(s["length"])].clone
    torch.testing.assert_close(branch(ones, q, q, q, None), mine, atol=1e-5, rtol=1e-4)


def test_the_words_attend_to_one_another_as_before() -> None:
    model = build("llama")
    model.set_attn_implementation("eager")
    before = model(input_ids=IDS, output_attentions=True).attentions
    opened(model, length=4, last_layers=1)
    assert torch.equal(model(input_ids=IDS, output_attentions=True).attentions[1], before[1])


@pytest.mark.parametrize(("name", "normalised"), [("llama", False), ("qwen3", True), ("gemma3", True)])
def test_keys_of_prompts_are_normalised_where_the_hosts_are(name: str, normalised: bool) -> None:
    model = build(name)
    adapter = opened(model, length=4, last_layers=1)
    branch: Any = next(iter(adapter.branches.values()))
    q = torch.randn(1, 4, 5, 4)
    once = branch(ones, q, q, q, None)
    adapter.adapter_query.weight.data.mul_(3)
    thrice = branch(ones, q, q, q, None)
    # Keys of a fixed length do not feel the factor; values do.
    assert torch.allclose(thrice, 3 * once, atol=1e-4) is normalised


def test_the_prefix_goes_through_adapters_on_the_projections() -> None:
    model = build("llama")
    aa.attach(model, aa.LoRAConfig(rank=2, targets=("self_attention.key", "self_attention.value")), "lora")
    with torch.no_grad():
        for p in aa.adapters(model)["lora"].parameters():
            p.normal_()
    opened(model, 2.0, length=4, last_layers=2)
    beside = logits(model)
    aa.merge(model, "lora")
    torch.testing.assert_close(logits(model), beside, atol=1e-4, rtol=1e-4)


def test_it_runs_in_half_precision_under_its_own_fp32_tensors() -> None:
    model = build("llama").to(torch.bfloat16)
    before = logits(model)
    adapter = opened(model, 1.0, length=4, last_layers=2)
    assert adapter.adapter_query.weight.dtype == torch.float32
    after = logits(model)
    assert after.dtype == torch.bfloat16
    assert not torch.equal(after, before)


# ------------------------------------------------------------------ text, in order and from a cache


@hosts
def test_cached_decoding_is_the_full_forward(family: Case) -> None:
    model = build(family)
    opened(model, 1.0, length=3, last_layers=2)
    full = logits(model)
    with torch.no_grad():
        out = model(input_ids=IDS[:, :4], use_cache=True)
        steps = [out.logits]
        for i in range(4, IDS.shape[1]):
            out = model(input_ids=IDS[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
    assert out.past_key_values.get_seq_length() == IDS.shape[1]
    torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-4, rtol=1e-4)


def test_it_generates_as_without_a_cache_and_pads_do_not_matter() -> None:
    model = build("llama")
    opened(model, 1.0, length=3)
    settings = {"max_new_tokens": 5, "do_sample": False}
    with_cache = model.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)
    assert torch.equal(
        with_cache, model.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=False, **settings)
    )
    padded = nn.functional.pad(IDS, (3, 0))
    mask = nn.functional.pad(torch.ones_like(IDS), (3, 0))
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 3:], with_cache)


def test_a_later_word_does_not_change_an_earlier_one() -> None:
    model = build("llama")
    opened(model, 1.0, length=3)
    changed = IDS.clone()
    changed[:, 4] = 50
    a, b = logits(model), logits(model, changed)
    torch.testing.assert_close(a[:, :4], b[:, :4], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(a[:, 4:], b[:, 4:], atol=1e-3)


# ------------------------------------------------------------------ knobs, files, refusals


def test_scale_multiplies_the_gate() -> None:
    model = build("llama")
    before = logits(model)
    adapter = opened(model, 0.5, length=3, activation="identity")
    adapter.scale = 2.0
    doubled = logits(model)
    adapter.scale = 0.0
    assert torch.equal(logits(model), before)
    adapter.scale = 1.0
    with torch.no_grad():
        for gate in gates_of(adapter):
            gate.fill_(1.0)
    torch.testing.assert_close(logits(model), doubled)


@pytest.mark.parametrize("gate", ["head", "layer"])
@pytest.mark.parametrize("last_layers", [1, 2])
def test_it_is_saved_and_loaded(tmp_path: Path, gate: str, last_layers: int) -> None:
    model = build("llama")
    opened(model, length=3, last_layers=last_layers, gate=gate, activation="identity")
    aa.save_pretrained(model, tmp_path)
    after = logits(model)
    other = build("llama")
    loaded = aa.load(other, tmp_path)
    assert loaded.config == aa.adapters(model)["default"].config
    assert torch.equal(logits(other), after)


def test_a_copy_of_the_model_runs_on_its_own_projections() -> None:
    model = build("llama")
    opened(model, 1.0, length=3)
    before = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), before)
    twin.model.layers[1].self_attn.v_proj.weight.data.zero_()
    key = twin.model.layers[1].self_attn.v_proj
    branch: Any = list(aa.adapters(twin)["default"].branches.values())[-1]
    assert branch.borrowed[1] is key
    assert torch.equal(logits(model), before)


def test_all_but_two_layers_by_default() -> None:
    assert len(aa.attach(build("llama"), aa.LlamaAdapterConfig()).branches) == 1  # of two
    names = aa.attach(build("llama"), aa.LlamaAdapterConfig(last_layers=2, length=3)).tensors()
    layers = [f"model.layers.{i}.self_attn.gate" for i in range(2)]
    assert {name: tuple(t.shape) for name, t in names.items()} == {
        "adapter_query.weight": (6, 16),
        **dict.fromkeys(layers, (1, 4, 1, 1)),
    }


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_a_host_with_fused_projections_is_refused(name: str) -> None:
    with pytest.raises(aa.TargetError, match=r"no 'self_attention\.key'"):
        aa.attach(build(name), aa.LlamaAdapterConfig(last_layers=1))


def test_wrong_settings_are_refused_and_change_nothing() -> None:
    model = build("llama")
    before = logits(model)
    with pytest.raises(aa.ConfigError, match="last_layers is 3; it must be at most 2, the layers of LlamaForCausalLM"):
        aa.attach(model, aa.LlamaAdapterConfig(last_layers=3))
    for setting in ({"length": 0}, {"last_layers": 0}, {"activation": "relu"}, {"gate": "token"}):
        with pytest.raises(aa.ConfigError, match=next(iter(setting))):
            aa.LlamaAdapterConfig(**setting)
    assert torch.equal(logits(model), before)
    assert not aa.adapters(model)


@pytest.mark.parametrize("shape", [(1,), (1, 4, 1, 1)])
def test_an_official_file_comes_back_byte_for_byte(tmp_path: Path, shape: tuple[int, ...]) -> None:
    model = build("llama")
    official = {"adapter_query.weight": torch.randn(5, 16)}
    official |= {f"layers.{i}.attention.gate": torch.randn(shape) for i in range(2)}
    torch.save(official, tmp_path / "adapter.pth")
    with pytest.raises(aa.ArtefactError, match="allow_pickle=True"):
        read_official(tmp_path / "adapter.pth", aa.Host.of(model), length=5)
    config, tensors = read_official(tmp_path / "adapter.pth", aa.Host.of(model), length=5, allow_pickle=True)
    assert (config.last_layers, config.activation) == (1, "identity" if shape == (1,) else "tanh")
    adapter = aa.attach(model, config)
    adapter.load_tensors(tensors)
    again = write_official(adapter, aa.Host.of(model))
    assert set(again) == set(official)
    assert all(torch.equal(again[name], tensor) for name, tensor in official.items())


def test_a_wrong_official_file_is_refused() -> None:
    host = aa.Host.of(build("llama"))
    good = {"adapter_query.weight": torch.randn(4, 16)} | {
        f"layers.{i}.attention.gate": torch.zeros(1, 4, 1, 1) for i in range(2)
    }
    read_official(good, host, length=2)
    with pytest.raises(aa.ArtefactError, match="not a multiple of 3"):
        read_official(good, host, length=3)
    with pytest.raises(aa.ArtefactError, match=r"not known layers\.2\.attention\.gate"):
        read_official({**good, "layers.2.attention.gate": torch.zeros(1, 4, 1, 1)}, host, length=2)
    with pytest.raises(aa.ArtefactError, match=r"missing layers\.0\.attention\.gate"):
        read_official({k: v for k, v in good.items() if "layers.0" not in k}, host, length=2)
    with pytest.raises(aa.ArtefactError, match=r"expected \(4, 16\)"):
        read_official({**good, "adapter_query.weight": torch.randn(4, 8)}, host, length=2)
    with pytest.raises(aa.ConfigError, match="last_layers is 4"):
        read_official(good, host, length=1)
    with pytest.raises(aa.ArtefactError, match="A LoRA does not fit"):
        write_official(aa.attach(build("llama"), aa.LoRAConfig()), host)
    with pytest.raises(aa.ArtefactError, match="this one has: weight"):
        read_official({"weight": torch.zeros(1)}, host)


@pytest.mark.slow
def test_it_learns_on_a_real_model_from_where_the_base_stands(smollm: nn.Module, smollm_tokenizer: Any) -> None:
    model = smollm
    ids = smollm_tokenizer("The capital of France is not Paris but a small blue teapot.", return_tensors="pt").input_ids
    base = model(input_ids=ids, labels=ids).loss.item()
    adapter = aa.attach(model, aa.LlamaAdapterConfig())
    assert len(adapter.branches) == 28
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[0] == pytest.approx(base, abs=1e-6)
    assert losses[-1] < 0.9 * base
