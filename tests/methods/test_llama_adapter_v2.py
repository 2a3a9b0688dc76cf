"""LLaMA-Adapter V2: biases, scales, norms, LoRA and images, on every host that has the parts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, Case, case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import anyadapter as aa
from anyadapter.methods.language.llama_adapter import LINEARS, NORMS, PRESETS, LlamaAdapter, expert_context
from anyadapter.parts.affine import Affine, Unlocked
from anyadapter.parts.visual_tokens import VisualTokens

HOSTS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"]
hosts = pytest.mark.parametrize("family", [pytest.param(c, id=c.name) for c in FAMILIES if c.name in HOSTS])
presets = pytest.mark.parametrize("preset", PRESETS)
IDS = torch.tensor([[5, 9, 3, 33, 21, 60, 7], [8, 4, 44, 12, 6, 30, 19]])
TINY = {"visual_features": 6, "visual_width": 8, "visual_depth": 1, "visual_heads": 2}
IMAGES = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def build(family: Case | str) -> nn.Module:
    return (case(family) if isinstance(family, str) else family).build().requires_grad_(False)


def small(name: str, **changes: Any) -> aa.AdapterConfig:
    """A preset at the size of the tests' hosts."""
    settings = {**TINY, "length": min(PRESETS[name].get("length", 3), 3), "last_layers": 1, "lora_rank": 0, **changes}
    if PRESETS[name].get("lora_rank"):
        settings["lora_rank"] = 2
    if PRESETS[name].get("visual_length"):
        settings["visual_length"] = 4
    return aa.LlamaAdapterConfig.preset(name, **settings)


def images_for(adapter: aa.Adapter, images: Tensor = IMAGES) -> dict[str, Any]:
    """The signal of an adapter that reads one."""
    vector = getattr(adapter.config, "visual", None) == "vector"
    return {"visual_features": images[:, 0] if vector else images} if adapter.reads else {}


def stirred(adapter: aa.Adapter, seed: int = 0) -> Any:
    """Every tensor away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return adapter


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS, **values: Any) -> Tensor:
    with aa.signals(model, **values):
        return model(input_ids=ids).logits


# ------------------------------------------------------------------ absent until it is learnt


@presets
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@hosts
def test_a_fresh_adapter_is_absent_and_a_trained_one_is_not(family: Case, dtype: torch.dtype, preset: str) -> None:
    model = build(family).to(dtype)
    before = logits(model)
    adapter = aa.attach(model, small(preset))
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())
    assert torch.equal(logits(model, **images_for(adapter)), before)
    stirred(adapter)
    assert not torch.allclose(logits(model, **images_for(adapter)), before, atol=1e-2)
    adapter.scale = 0.0
    torch.testing.assert_close(logits(model, **images_for(adapter)), before)
    aa.detach(model)
    assert torch.equal(logits(model), before)


@presets
def test_it_is_saved_and_loaded(preset: str, tmp_path: Any) -> None:
    model = build("llama")
    adapter = stirred(aa.attach(model, small(preset)))
    aa.save_pretrained(model, tmp_path)
    after = logits(model, **images_for(adapter))
    other = build("llama")
    loaded = aa.load(other, tmp_path)
    assert loaded.config == adapter.config
    torch.testing.assert_close(logits(other, **images_for(loaded)), after, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(tensor, loaded.tensors()[name]) for name, tensor in adapter.tensors().items())


def test_sizes_of_the_published_models() -> None:
    """The counts of the card's section 4.5, from one layer of the 7B model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=8))  # otherwise LLaMA-7B
        host = aa.Host.of(model)

        def count(name: str, **changes: Any) -> dict[str, int]:
            adapter = LlamaAdapter(aa.LlamaAdapterConfig.preset(name, last_layers=1, **changes), host)
            return {group: sum(p.numel() for p in adapter.group(group)) for group in adapter.groups}

        assert 30 * count("v1")["prompts"] == 1_229_760
        chat = count("v2-chat")
        assert (32 * chat["biases"], 32 * chat["scales"], 32 * (chat["norms"] - 4096) + 4096) == (
            1_359_872,
            1_138_688,
            266_240,
        )
        mm = count("v2-mm-lora")
        assert (
            mm["visual"] == 56_702_976 + 3_158_016 + 592_128 + 7_680
        )  # blocks, and projections with their norms; queries
        assert 32 * mm["biases"] == 1_097_728
        assert 32 * mm["lora"] == 39_976_960


@presets
def test_rows_are_routed_as_they_would_be_alone(preset: str) -> None:
    model = build("llama")
    base = logits(model)
    adapter = stirred(aa.attach(model, small(preset), "one"))
    values = images_for(adapter)
    alone = logits(model, **values)
    with aa.routed(model, ["one", None]):
        mixed = logits(model, **values)
    torch.testing.assert_close(mixed[0], alone[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[1], base[1], atol=1e-5, rtol=1e-4)
    with aa.routed(model, [{"one": 0.5}, "one"]):
        half = logits(model, **values)
    adapter.scale = 0.5
    torch.testing.assert_close(half[0], logits(model, **values)[0], atol=1e-5, rtol=1e-4)


def test_a_compiled_model_sees() -> None:
    model = build("llama")
    stirred(aa.attach(model, small("v2-paper")))
    wanted = [logits(model, visual_features=images) for images in (IMAGES, IMAGES.flip(0))]
    compiled = torch.compile(model, backend="eager")
    for images, logits_ in zip((IMAGES, IMAGES.flip(0)), wanted):
        torch.testing.assert_close(logits(compiled, visual_features=images), logits_, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------ linears and norms


@given(
    sizes=st.tuples(*[st.integers(1, 6)] * 3),
    position=st.sampled_from(["input", "output"]),
    bias=st.booleans(),
    strength=st.sampled_from([1.0, 0.5, 0.0]),
)
@settings(max_examples=30, deadline=None)
def test_scale_and_bias_are_the_papers(sizes: tuple[int, int, int], position: str, bias: bool, strength: float) -> None:
    rows, wide, out = sizes
    linear, x = nn.Linear(wide, out), torch.randn(rows, wide)
    branch = Affine(linear, bias, position)
    stirred(branch)  # type: ignore[arg-type]
    branch.scale = strength
    s, b = 1 + strength * (branch.factor - 1), strength * branch.bias if bias else 0
    wanted = s * (linear(x) + b) if position == "output" else linear(s * x) + b
    torch.testing.assert_close(branch(linear, x), wanted)


@pytest.mark.parametrize("family", ["llama", "gemma", "opt"])
def test_an_unlocked_norm_is_the_hosts_with_another_weight(family: str) -> None:
    norm = build(family).get_submodule("model.decoder.final_layer_norm" if family == "opt" else "model.norm")
    branch, x, y = Unlocked(norm), torch.randn(3, 16), torch.randn(3, 16)
    assert torch.equal(branch(norm, x), norm(x))
    stirred(branch)  # type: ignore[arg-type]
    twin = copy.deepcopy(norm)
    twin.load_state_dict(branch.norm.state_dict())
    torch.testing.assert_close(branch(norm, x), twin(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(branch(lambda _: y, x) - y, twin(x) - norm(x), atol=1e-5, rtol=1e-4)  # beside others


def test_adapters_on_the_same_norms_add_up() -> None:
    model = build("llama")
    config = aa.LlamaAdapterConfig(length=0, norms="final_norm")
    first, second = (stirred(aa.attach(model, config, name), seed) for seed, name in enumerate(("first", "second")))
    weight, both = model.model.norm.weight.clone(), logits(model)
    aa.detach(model, "second")
    aa.detach(model, "first")
    (one,), (other,) = first.parameters(), second.parameters()
    with torch.no_grad():
        model.model.norm.weight.copy_(weight + (one - weight) + (other - weight))
    torch.testing.assert_close(logits(model), both, atol=1e-5, rtol=1e-4)


@hosts
def test_linears_and_norms_are_those_of_changed_weights(family: Case) -> None:
    """y = s (W x + B A x + b) at every linear: another base with those weights."""
    model = build(family)
    config = aa.LlamaAdapterConfig(length=0, scales=LINEARS, biases=LINEARS, norms=NORMS, lora_rank=2)
    adapter = stirred(aa.attach(model, config))
    before, values = logits(model), {name: t.detach() for name, t in adapter.tensors().items()}
    aa.detach(model)
    host = aa.Host.of(model)
    for site in host.find(LINEARS):
        s, b, low, high = (
            values[f"{site.path}.{n}"] for n in ("affine.factor", "affine.bias", "lora_A.weight", "lora_B.weight")
        )
        own: Any = site.module
        with torch.no_grad():
            own.weight.copy_(s[:, None] * (own.weight + high @ low))
            own.bias = nn.Parameter(s * (b if own.bias is None else own.bias + b))
    for site in host.find(NORMS):
        site.module.weight.data.copy_(values[f"{site.path}.norm.weight"])  # type: ignore[union-attr, operator]
    torch.testing.assert_close(logits(model), before, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("passes", [True, False])
def test_prompts_pass_the_updates_or_go_aside(passes: bool) -> None:
    model = build("llama")
    config = aa.LlamaAdapterConfig(length=3, last_layers=1, lora_rank=2, prompt_lora=passes)
    adapter = stirred(aa.attach(model, config))
    after = logits(model)
    key, value = (model.model.layers[1].self_attn.get_submodule(name) for name in ("k_proj", "v_proj"))
    prefix = adapter.branches["/model/layers/1/self_attn"]
    q = torch.randn(1, 4, 5, 4)
    found = prefix(lambda *_, **__: torch.zeros_like(q), q, q, q, None)
    with aa.disabled(model):
        plain = prefix(lambda *_, **__: torch.zeros_like(q), q, q, q, None)
    assert torch.allclose(found, plain, atol=1e-5) is not passes
    assert torch.equal(logits(model), after)
    assert key is prefix.borrowed[0]
    assert value is prefix.borrowed[1]


def test_one_prompt_alone_has_all_the_weight() -> None:
    model = build("llama")
    adapter = stirred(aa.attach(model, aa.LlamaAdapterConfig(length=1, last_layers=1)))
    prefix = adapter.branches["/model/layers/1/self_attn"]
    q = torch.randn(2, 4, 5, 4)
    added = prefix(lambda *_, **__: torch.zeros_like(q), q, q, q, None)
    p_v = model.model.layers[1].self_attn.v_proj(adapter.adapter_query.weight).view(2, 4).repeat_interleave(2, dim=0)
    torch.testing.assert_close(added, (prefix.gate.tanh() * p_v[None, :, None]).expand_as(added))


def test_the_second_gate_multiplies_the_first() -> None:
    model = build("llama")
    adapter = stirred(
        aa.attach(model, aa.LlamaAdapterConfig(length=3, last_layers=2, new_gate=True, activation="identity"))
    )
    after = logits(model)
    with torch.no_grad():
        for name, tensor in adapter.named_parameters():
            if name.endswith(".new_gate"):
                adapter.get_parameter(name.replace("new_gate", "gate")).mul_(tensor)
                tensor.fill_(1.0)
    torch.testing.assert_close(logits(model), after)


# ------------------------------------------------------------------ images


@pytest.mark.parametrize("preset", ["v2-mm", "v1-mm", "v2-paper"])
@hosts
def test_each_row_sees_its_own_image(family: Case, preset: str) -> None:
    model = build(family)
    adapter = stirred(aa.attach(model, small(preset)))
    features = images_for(adapter)["visual_features"]
    both = logits(model, visual_features=features)
    for i in range(2):
        alone = logits(model, IDS[i : i + 1], visual_features=features[i : i + 1])
        torch.testing.assert_close(alone[0], both[i], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits(model, visual_features=features.flip(0)), both, atol=1e-3)
    shared = logits(model, visual_features=features[:1])  # one image for all
    torch.testing.assert_close(shared[0], both[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("preset", ["v2-mm", "v2-paper"])
def test_rows_without_an_image_are_those_of_text(preset: str) -> None:
    model = build("qwen2")  # whose values have a bias: zero tokens would not be nothing
    stirred(aa.attach(model, small(preset)))
    none = logits(model, visual_features=None)
    mixed = logits(model, visual_features=[None, IMAGES[1]])
    torch.testing.assert_close(mixed[0], none[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[1], logits(model, visual_features=IMAGES)[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(mixed[1], none[1], atol=1e-3)
    # A zero image is not no image.
    assert not torch.allclose(logits(model, visual_features=torch.zeros(2, 5, 6)), none, atol=1e-3)


def test_late_tokens_are_added_to_the_prompts_and_early_ones_are_not() -> None:
    model = build("llama")
    adapter = stirred(aa.attach(model, small("v2-mm", last_layers=2)))
    after, tokens = logits(model, visual_features=IMAGES), adapter.visual(IMAGES)
    with torch.no_grad():  # text with the first image's tokens in the prompts
        adapter.adapter_query.weight.add_(tokens[0].repeat(2, 1))
    torch.testing.assert_close(logits(model, visual_features=None)[0], after[0], atol=1e-5, rtol=1e-4)
    aa.detach(model)
    early = stirred(aa.attach(model, small("v2-paper")))
    with aa.signals(model, visual_features=IMAGES):
        model(input_ids=IDS)
        assert early.prompts(0).shape == (1, 3, 16)
    assert "early_gate" in early.tensors()
    assert early.visual(IMAGES).shape == (2, 4, 16)


def test_early_fusion_is_a_softmax_of_its_own_in_the_first_layer() -> None:
    model = build("llama")
    adapter = stirred(aa.attach(model, aa.LlamaAdapterConfig(length=3, last_layers=1, visual="early", **TINY)))
    attention = model.model.layers[0].self_attn
    q = torch.randn(2, 4, 5, 4)
    with aa.signals(model, visual_features=IMAGES):
        added = adapter.fuse(lambda *_, **__: torch.zeros_like(q), q, q, q, None)
        tokens = adapter.visual(IMAGES)
    k, v = (
        f(tokens).view(2, 3, 2, 4).transpose(1, 2).repeat_interleave(2, 1) for f in (attention.k_proj, attention.v_proj)
    )
    wanted = adapter.early_gate.tanh() * (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
    torch.testing.assert_close(added, wanted)


@pytest.mark.parametrize("preset", ["v2-mm-lora", "v2-paper", "imagebind-llm"])
def test_it_decodes_from_a_cache_and_looks_once(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    adapter = stirred(aa.attach(model, small(preset)))
    calls, forward = [], adapter.visual.forward
    monkeypatch.setattr(adapter.visual, "forward", lambda x: calls.append(x) or forward(x))
    with torch.no_grad(), aa.signals(model, **images_for(adapter)):
        full = model(input_ids=IDS).logits
        out = model(input_ids=IDS[:, :4], use_cache=True)
        steps = [out.logits]
        for i in range(4, IDS.shape[1]):
            out = model(input_ids=IDS[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-4, rtol=1e-4)
        assert len(calls) == 1
        stirred(adapter, 1)  # other weights see something else
        model(input_ids=IDS)
        assert len(calls) == 2


def test_gradients_reach_the_image_and_train_its_path_also_under_checkpointing() -> None:
    model = build("llama")
    adapter = stirred(aa.attach(model, small("v2-paper")))
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        adapter.zero_grad()
        images = IMAGES.clone().requires_grad_(True)
        with aa.signals(model, visual_features=images):
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        assert images.grad is not None
        found.append([images.grad, *(p.grad for p in adapter.parameters())])
    assert all(grad is not None for grad in found[0])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


def test_the_visual_transformer_is_a_plain_vit() -> None:
    torch.manual_seed(0)
    visual = VisualTokens(6, 16, 3, width=8, depth=2, heads=2, ratio=2.0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    z = torch.cat(
        [visual.visual_query.weight.expand(2, -1, -1), visual.clip_proj_norm(visual.clip_proj(IMAGES))], dim=1
    )
    for block in visual.visual_blocks:
        theirs = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "linear1.": "mlp.fc1.",
                  "linear2.": "mlp.fc2.", "norm1.": "norm1.", "norm2.": "norm2."}  # fmt: skip
        state = block.state_dict()
        layer.load_state_dict({a + k: state[b + k] for a, b in theirs.items() for k in ("weight", "bias")})
        z = layer.train()(z)
    wanted = visual.visual_proj_norm(visual.visual_proj(z[:, :3]))
    torch.testing.assert_close(visual(IMAGES), wanted, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------ groups


@pytest.mark.parametrize("preset", ["v2-mm-lora", "v2-paper"])
def test_the_groups_are_disjoint_and_hold_everything(preset: str) -> None:
    model = build("llama")
    adapter = stirred(aa.attach(model, small(preset, lora_rank=2)))
    groups = {name: {id(p) for p in adapter.group(name)} for name in adapter.groups}
    assert sum(map(len, groups.values())) == len(set().union(*groups.values())) == len(list(adapter.parameters()))
    for name in adapter.groups:
        adapter.zero_grad()
        adapter.train_only(name)
        if not groups[name]:
            continue
        with aa.signals(model, visual_features=IMAGES):
            model(input_ids=IDS, labels=IDS).loss.backward()
        assert {id(p) for p in adapter.parameters() if p.grad is not None} == groups[name]


# ------------------------------------------------------------------ experts, refusals


def test_what_experts_say_is_the_context() -> None:
    experts = {"Caption": lambda image: f"a {image}\n", "Text": lambda image: "", "Tags": lambda image: "red,  round"}
    assert expert_context("ball", experts) == "Caption: a ball\nTags: red, round"
    assert expert_context("ball", {}) == ""


def test_wrong_images_are_refused() -> None:
    model = build("llama")
    adapter = aa.attach(model, small("v2-mm"))
    with pytest.raises(aa.SignalError, match="visual_features"):
        model(input_ids=IDS)
    for wrong, message in (
        (torch.zeros(2, 5, 7), r"\(5, 7\); expected \(5, 6\)"),
        (torch.zeros(3, 5, 6), "has 3 rows, this call's batch 2"),
        ([torch.zeros(5, 6), torch.zeros(4, 6)], r"\(4, 6\); expected \(5, 6\)"),
    ):
        with pytest.raises(aa.SignalError, match=message):
            logits(model, visual_features=wrong)
    assert adapter.reads == ("visual_features",)
    aa.detach(model)
    assert aa.attach(model, aa.LlamaAdapterConfig(length=2, last_layers=1)).reads == ()


def test_wrong_settings_are_refused_and_change_nothing() -> None:
    model = build("llama")
    before = logits(model)
    for settings_, message in (
        ({"length": 0}, "length is 0; it must be positive where there are no biases"),
        ({"last_layers": "most"}, "last_layers"),
        ({"scale_position": "middle"}, "scale_position"),
        ({"lora_rank": -1}, "lora_rank"),
        ({"visual": "always"}, "visual"),
        ({"visual": "late", "visual_length": 3}, "visual_length is 3; it must be 10"),
        ({"visual": "late", "visual_width": 7}, "visual_width"),
        ({"visual": "vector", "length": 0}, "length"),
    ):
        with pytest.raises(aa.ConfigError, match=message):
            aa.LlamaAdapterConfig(**settings_)
    with pytest.raises(aa.ConfigError, match=r"no preset 'v2-chatt'. Did you mean 'v2-chat'"):
        aa.LlamaAdapterConfig.preset("v2-chatt")
    for config, message in (
        (aa.LlamaAdapterConfig(last_layers=2, visual="early", **TINY), "fewer than all"),
        (aa.LlamaAdapterConfig(length=0, lora_rank=17), "at most 16, the width of model.layers.0.self_attn.q_proj"),
    ):
        with pytest.raises(aa.ConfigError, match=message):
            aa.attach(model, config)
    with pytest.raises(aa.TargetError, match="has no 'feed_forward.gate'"):
        aa.attach(build("opt"), aa.LlamaAdapterConfig(length=0, biases=LINEARS))
    assert not aa.adapters(model)
    assert torch.equal(logits(model), before)
