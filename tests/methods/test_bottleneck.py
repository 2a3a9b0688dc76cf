"""Bottleneck adapters: the invariants of LLM-Adapters' card, and each placement against its formula."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import Case, case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import anyadapter as aa
from anyadapter.methods.language.bottleneck import PLACEMENTS, Bottleneck
from anyadapter.parts.bottleneck import After, Before, InBlock, Parallel

PRESETS = ("series", "adapterp", "parallel", "pfeiffer", "houlsby", "parallel_block")
HOSTS = [
    "bert",
    "roberta",
    "distilbert",
    "gpt2",
    "gptj",
    "gpt_neo",
    "opt",
    "bloom",
    "llama",
    "gemma2",
    "t5",
    "bart",
    "vit",
]
NO_FEED_FORWARD = ("opt", "bart")  # in these the feed-forward is no module of its own
IDS = torch.tensor([[5, 9, 3, 33, 21, 60, 7], [8, 4, 44, 12, 6, 30, 19]])

hosts = pytest.mark.parametrize("family", [pytest.param(case(name), id=name) for name in HOSTS])
sizes = st.integers(1, 9)


def build(family: Case | str) -> nn.Module:
    return (case(family) if isinstance(family, str) else family).build().requires_grad_(False)


def attached(model: nn.Module, name: str = "default", std: float | None = None, **config: Any) -> Bottleneck:
    """An adapter of width 5; with ``std``, all its tensors are drawn anew."""
    adapter = aa.attach(model, aa.BottleneckConfig(**{"width": 5, **config}), name)
    assert isinstance(adapter, Bottleneck)
    for parameter in adapter.parameters() if std else ():
        nn.init.normal_(parameter, std=std)
    return adapter


@torch.no_grad()
def outputs(family: Case, model: nn.Module) -> Tensor:
    return family.output(model(**family.inputs(model, 2)))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    return model(input_ids=ids, **kwargs).logits


def z(adapter: aa.Adapter, path: str, x: Tensor, act: Callable[[Tensor], Tensor] = torch.tanh) -> Tensor:
    """U act(D x), by hand, from the tensors at ``path``."""
    tensors = adapter.tensors()
    down, up = (tensors[f"{path}.adapter_{side}.weight"] for side in ("down", "up"))
    biases = [tensors.get(f"{path}.adapter_{side}.bias", torch.zeros(())) for side in ("down", "up")]
    return act(x @ down.T + biases[0]) @ up.T + biases[1]


# ------------------------------------------------------------------ the identity, exactly and not quite


@hosts
def test_absent_at_zero_init_at_zero_scaling_and_when_disabled(family: Case) -> None:
    model = build(family)
    before = outputs(family, model)
    for placement in PRESETS:
        if placement == "parallel_block" and family.name in NO_FEED_FORWARD:
            continue
        attached(model, placement=placement)
        assert torch.equal(outputs(family, model), before), placement
        aa.detach(model)
        attached(model, placement=placement, scaling=0, std=0.5)
        assert torch.equal(outputs(family, model), before), placement
        aa.detach(model)
        adapter = attached(model, placement=placement, std=0.5)
        assert not torch.allclose(outputs(family, model), before, atol=1e-4), placement
        with aa.disabled(model):
            assert torch.equal(outputs(family, model), before), placement
        adapter.scale = 0
        assert torch.equal(outputs(family, model), before), placement
        aa.detach(model)
        assert torch.equal(outputs(family, model), before), placement


def test_the_published_init_is_near_the_identity_and_not_it() -> None:
    model = build("llama")
    before = logits(model)
    adapter = attached(model, width=256, init="bert", bias=True)
    assert 0 < (logits(model) - before).abs().max() < 0.1
    for name, tensor in adapter.tensors().items():
        assert tensor.std().item() == pytest.approx(0 if "bias" in name else 0.02, rel=0.1), name


@pytest.mark.parametrize("family", NO_FEED_FORWARD)
def test_a_host_without_a_feed_forward_module_says_so(family: str) -> None:
    model = build(family)
    with pytest.raises(aa.TargetError, match="no 'feed_forward'"):
        attached(model, placement="parallel_block")
    adapter = attached(model, placement="parallel_block", targets="self_attention")
    assert {type(p.branch) for p in adapter.placements} == {Parallel}


# ------------------------------------------------------------------ formulas


@settings(max_examples=30, deadline=None)
@given(width=sizes, inner=sizes, tokens=sizes, seed=st.integers(0, 1000), scaling=st.floats(-4, 4), bias=st.booleans())
def test_round_an_identity_before_and_after_are_the_series_residual(
    width: int, inner: int, tokens: int, seed: int, scaling: float, bias: bool
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, tokens, width)
    before, after = (
        branch(width, width, inner, activation="gelu", scaling=scaling, init="bert", bias=bias)
        for branch in (Before, After)
    )
    after.load_state_dict(before.state_dict())
    hidden = F.gelu(F.linear(x, before.adapter_down.weight, before.adapter_down.bias))
    expected = x + scaling * F.linear(hidden, before.adapter_up.weight, before.adapter_up.bias)
    torch.testing.assert_close(before(nn.Identity(), x), expected)
    torch.testing.assert_close(after(nn.Identity(), x), expected)


@settings(max_examples=30, deadline=None)
@given(wide=st.tuples(sizes, sizes), rank=sizes, seed=st.integers(0, 1000), alpha=st.floats(-4, 4))
def test_a_linear_parallel_adapter_is_lora(wide: tuple[int, int], rank: int, seed: int, alpha: float) -> None:
    torch.manual_seed(seed)
    rank = min(rank, max(wide))
    model, x = nn.Sequential(nn.Linear(*wide)), torch.randn(3, wide[0])
    lora = aa.attach(model, aa.LoRAConfig(rank=rank, alpha=alpha, targets="0"))
    for parameter in lora.parameters():
        nn.init.normal_(parameter)
    expected = model(x)
    aa.detach(model)
    scaling = alpha / rank
    ours = attached(model, placement="parallel", targets="0", width=rank, activation="linear", scaling=scaling)
    names = {"0.adapter_down.weight": "0.lora_A.weight", "0.adapter_up.weight": "0.lora_B.weight"}
    ours.load_tensors({mine: lora.tensors()[theirs] for mine, theirs in names.items()})
    torch.testing.assert_close(model(x), expected)


def test_series_on_a_gated_feed_forward() -> None:
    model, x = build("llama"), torch.randn(2, 4, 16)
    adapter = attached(model, std=0.3)
    mlp, path = model.get_submodule("model.layers.1.mlp"), "model.layers.1.mlp"
    with aa.disabled(model):
        gate, up = (getattr(mlp, part)(x + z(adapter, f"{path}.{part}", x)) for part in ("gate_proj", "up_proj"))
        h = mlp.down_proj(F.silu(gate) * up)
    torch.testing.assert_close(mlp(x), h + z(adapter, f"{path}.down_proj", h))


@pytest.mark.parametrize(
    ("family", "roles"), [("llama", ("q_proj", "k_proj", "v_proj")), ("bloom", ("query_key_value",))]
)
def test_parallel_is_beside_each_linear(family: str, roles: tuple[str, ...]) -> None:
    model, x = build(family), torch.randn(2, 4, 16)
    adapter = attached(model, placement="parallel", scaling="learned", std=0.3)
    assert {p.path.split(".")[-1] for p in adapter.placements} == set(roles)
    for placement in adapter.placements:
        linear = model.get_submodule(placement.path)
        s = adapter.tensors()[f"{placement.path}.adapter_scaling"]
        assert s.shape == (1,)
        expected = F.linear(x, linear.weight, linear.bias) + s * z(adapter, placement.path, x)
        torch.testing.assert_close(linear(x), expected)


def test_parallel_block_is_beside_the_whole_sub_layer() -> None:
    model, x = build("llama"), torch.randn(2, 4, 16)
    adapter = attached(model, placement="parallel_block", std=0.3)
    mlp, path = model.get_submodule("model.layers.0.mlp"), "model.layers.0.mlp"
    with aa.disabled(model):
        alone = mlp(x)
    torch.testing.assert_close(mlp(x), alone + z(adapter, path, x))
    seen: list[tuple[Tensor, Tensor]] = []
    attention = model.get_submodule("model.layers.0.self_attn")
    handle = attention.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((kwargs["hidden_states"], out[0])), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=IDS)
        with aa.disabled(model):
            model(input_ids=IDS)
    handle.remove()
    (given, beside), (_, alone) = seen
    torch.testing.assert_close(beside, alone + z(adapter, "model.layers.0.self_attn", given))


# ------------------------------------------------------------------ inside BERT's output blocks


def block_of(model: nn.Module) -> tuple[Any, str, Tensor, Tensor]:
    """The feed-forward's output block of layer 0, its path, and random inputs for it."""
    path = next(p for p, m in model.named_modules() if p.endswith("layer.0.output"))
    return model.get_submodule(path), path, torch.randn(2, 4, 24), torch.randn(2, 4, 16)


def f_of(block: Any, hidden: Tensor) -> Tensor:
    return F.linear(hidden, block.dense.weight, block.dense.bias)


def norm(block: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], block.LayerNorm.weight, block.LayerNorm.bias, block.LayerNorm.eps)


@pytest.mark.parametrize(
    ("placement", "reads"),
    [
        ("pfeiffer", lambda block, f, a: norm(block, f + a)),
        ("houlsby", lambda block, f, a: f),
        ("parallel_block", lambda block, f, a: a),
    ],
)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_inside_an_output_block(family: str, placement: str, reads: Callable[..., Tensor]) -> None:
    model = build(family)
    adapter = attached(model, placement=placement, activation="relu", bias=True, std=0.3)
    block, path, hidden, a = block_of(model)
    f = f_of(block, hidden)
    expected = norm(block, z(adapter, path, reads(block, f, a), torch.relu) + f + a)
    torch.testing.assert_close(block(hidden, a), expected)
    attention = "attention.output" in {".".join(p.path.split(".")[-2:]) for p in adapter.placements}
    assert attention is (placement != "pfeiffer")


def test_two_pfeiffer_adapters_stack_in_the_order_of_attachment() -> None:
    model = build("bert")
    first = attached(model, "first", placement="pfeiffer", std=0.3)
    second = attached(model, "second", placement="pfeiffer", width=7, activation="relu", std=0.3)
    block, path, hidden, a = block_of(model)

    def by_hand(*on: tuple[Bottleneck, Callable[[Tensor], Tensor]]) -> Tensor:
        f = f_of(block, hidden)
        for adapter, act in on:
            f = f + z(adapter, path, norm(block, f + a), act)
        return norm(block, f + a)

    one, two = (first, torch.tanh), (second, torch.relu)
    torch.testing.assert_close(block(hidden, a), by_hand(one, two))
    assert not torch.allclose(by_hand(one, two), by_hand(two, one), atol=1e-3)
    with aa.disabled(model, "second"):
        torch.testing.assert_close(block(hidden, a), by_hand(one))
    with aa.disabled(model, "first"):
        torch.testing.assert_close(block(hidden, a), by_hand(two))
    with aa.disabled(model):
        torch.testing.assert_close(block(hidden, a), by_hand())


def test_two_parallel_blocks_both_read_the_sub_layers_input() -> None:
    model = build("bert")
    adapters = [attached(model, name, placement="parallel_block", std=0.3) for name in ("first", "second")]
    block, path, hidden, a = block_of(model)
    expected = norm(block, f_of(block, hidden) + a + sum(z(adapter, path, a) for adapter in adapters))
    torch.testing.assert_close(block(hidden, a), expected)


def test_two_pfeiffer_adapters_are_trained_saved_and_taken_off_apart(tmp_path: Path) -> None:
    family, model = case("bert"), build("bert")
    bare = outputs(family, model)
    first = attached(model, "first", placement="pfeiffer", std=0.3)
    alone = outputs(family, model)
    second = attached(model, "second", placement="pfeiffer", std=0.3)
    both = outputs(family, model)
    first.requires_grad_(False)
    family.output(model(**family.inputs(model, 2))).pow(2).mean().backward()
    assert all(p.grad is None for p in first.parameters())
    assert all(p.grad is not None for p in second.parameters())
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("anyadapter."))
    for name in ("first", "second"):
        aa.save_pretrained(model, tmp_path / name, name)
    aa.detach(model, "second")
    assert torch.equal(outputs(family, model), alone)
    aa.detach(model, "first")
    assert torch.equal(outputs(family, model), bare)
    for name in ("first", "second"):
        aa.load(model, tmp_path / name, name)
    assert torch.equal(outputs(family, model), both)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_twin_of_the_model_uses_its_own_norm(twin_of: Callable[[nn.Module], nn.Module]) -> None:
    family, model = case("bert"), build("bert")
    attached(model, placement="pfeiffer", std=0.3)
    before = outputs(family, model)
    twin = twin_of(model)
    assert torch.equal(outputs(family, twin), before)
    with torch.no_grad():
        block_of(model)[0].LayerNorm.weight.zero_()
    assert not torch.equal(outputs(family, model), before)
    assert torch.equal(outputs(family, twin), before)
    assert not [name for name in twin.state_dict() if "adapter" in name]


def test_a_block_of_another_shape_is_refused() -> None:
    model = build("bert")
    block = block_of(model)[0]
    block.norm = block.LayerNorm
    del block.LayerNorm
    with pytest.raises(aa.TargetError, match=r"layer\.0\.output .* dense, dropout and LayerNorm"):
        attached(model, placement="pfeiffer")


# ------------------------------------------------------------------ training, dtypes, merging


@pytest.mark.parametrize("scaling", [2.0, "learned"])
def test_gradients_reach_the_adapter_alone(scaling: float | str) -> None:
    model = build("llama")
    adapter = attached(model, scaling=scaling, init="bert")
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert all(".adapter_" in name for name in adapter.tensors())
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("anyadapter."))


@pytest.mark.parametrize("scaling", [0.7, "learned"])
def test_a_half_precision_base_meets_fp32_projections(scaling: float | str) -> None:
    model = build("llama").to(torch.bfloat16)
    adapter = attached(model, scaling=scaling, std=0.3)
    assert {t.dtype for t in adapter.tensors().values()} == {torch.float32}
    path, x = "model.layers.0.mlp.down_proj", torch.randn(2, 24, dtype=torch.bfloat16)
    out = model.get_submodule(path)(x)
    with aa.disabled(model):
        h = model.get_submodule(path)(x)
    s = adapter.tensors()[f"{path}.adapter_scaling"].bfloat16() if scaling == "learned" else scaling
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, h + z(adapter, path, h.float()).bfloat16() * s)
    assert logits(model).isfinite().all()


def test_dropout_is_on_the_adapters_input_while_training() -> None:
    torch.manual_seed(0)
    branch = Parallel(8, 8, 4, dropout=0.5, activation="linear", init="bert")
    x = torch.randn(1000, 8)
    kept = torch.stack([branch(torch.zeros_like, x) for _ in range(200)])
    assert not torch.equal(kept[0], kept[1])
    expected = branch.eval()(torch.zeros_like, x)
    torch.testing.assert_close(kept.mean(0), expected, atol=3e-3, rtol=0.5)


def test_a_compiled_or_checkpointed_output_block_gives_the_same() -> None:
    family, model = case("bert"), build("bert")
    adapter = attached(model, placement="pfeiffer", std=0.3)
    inputs = family.inputs(model, 2)

    def gradients(call: Any) -> list[Tensor]:
        adapter.zero_grad()
        out = family.output(call(**inputs))
        out.pow(2).mean().backward()
        return [out.detach(), *(p.grad.clone() for p in adapter.parameters())]

    expected = gradients(model)
    torch.testing.assert_close(gradients(torch.compile(model, backend="eager")), expected)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(model), expected)


def test_it_cannot_be_merged() -> None:
    model = build("llama")
    attached(model)
    with pytest.raises(aa.AttachError, match="Bottleneck is not linear"):
        aa.merge(model)


def test_padding_on_the_left_changes_nothing() -> None:
    model = build("llama")
    attached(model, std=0.3)
    alone = logits(model, IDS[:1, 3:])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1, 3:]], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = logits(model, torch.cat([padded, IDS[1:]]), attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(batch[:1, 3:], alone)


# ------------------------------------------------------------------ sizes and settings


def test_sizes_published_for_a_seven_billion_base() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # its defaults are LLaMA-7B
        published = {
            134: {"targets": ("up_proj", "gate_proj")},
            67: {"placement": "adapterp"},
            201: {},
            247: {"placement": "parallel", "targets": ("up_proj", "down_proj")},
        }
        for millions, config in published.items():
            adapter = aa.attach(model, aa.BottleneckConfig(**config))
            assert round(adapter.parameter_count() / 1e6) == millions
            aa.detach(model)


@pytest.mark.parametrize(("reduction", "size"), [(16, 1), (5, 3), (1, 16), (0.5, 32), (1000, 1)])
def test_reduction_divides_what_is_read(reduction: float, size: int) -> None:
    adapter = attached(build("llama"), placement="pfeiffer", reduction=reduction)
    assert {t.shape for name, t in adapter.tensors().items() if "down.weight" in name} == {(size, 16)}


def test_layers_and_exclusions_narrow_every_placement() -> None:
    for placement in PRESETS:
        model = build("bert")
        adapter = attached(model, placement=placement, layers=(-1,))
        assert all(".1." in f"{p.path}." for p in adapter.placements), placement
    adapter = attached(build("llama"), exclude="gate_proj", layers=(0,))
    assert [p.path for p in adapter.placements] == ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]


def test_before_and_after_go_to_any_module_with_linears() -> None:
    model = build("llama")
    before = logits(model)
    for placement, branch in (("before", Before), ("after", After), ("parallel", Parallel)):
        for targets in ("q_proj", "mlp", "self_attn", "layers.*"):
            adapter = attached(model, placement=placement, targets=targets, std=0.3)
            assert {type(p.branch) for p in adapter.placements} == {branch}
            assert not torch.allclose(logits(model), before, atol=1e-3), (placement, targets)
            aa.detach(model)


def test_a_whole_number_is_a_scaling_too() -> None:
    config = aa.BottleneckConfig(scaling=4)
    assert isinstance(config.scaling, float)
    assert config == aa.BottleneckConfig.from_dict(config.to_dict())


@settings(max_examples=50)
@given(
    placement=st.sampled_from(PLACEMENTS),
    scaling=st.one_of(st.just("learned"), st.integers(-9, 9), st.floats(-9, 9)),
    reduction=st.one_of(st.none(), st.floats(0.1, 64)),
    layers=st.one_of(st.none(), st.lists(st.integers(-4, 4), min_size=1).map(tuple)),
)
def test_settings_survive_their_dictionary(placement: str, scaling: Any, reduction: Any, layers: Any) -> None:
    config = aa.BottleneckConfig(
        placement=placement, targets=("q_proj",), scaling=scaling, reduction=reduction, layers=layers
    )
    assert aa.BottleneckConfig.from_dict(config.to_dict()) == config


REFUSED = {
    "init": ({"init": "xavier"}, "init is 'xavier'; it must be 'zero' or 'bert'"),
    "activation": ({"activation": "tahn"}, "activation is 'tahn'; it must be one of gelu"),
    "placement": ({"placement": "serial"}, "placement is 'serial'; it must be one of series"),
    "no targets": ({"placement": "before"}, "targets is None; it must be given with placement='before'"),
    "word for a scaling": ({"scaling": "learnt"}, "a finite number or 'learned'"),
    "truth for a scaling": ({"scaling": True}, "a finite number or 'learned'"),
    "endless scaling": ({"scaling": float("inf")}, "a finite number or 'learned'"),
    "width": ({"width": 0}, "width is 0; it must be a positive integer"),
    "reduction": ({"reduction": 0}, "reduction is 0; it must be positive"),
    "dropout": ({"dropout": 1.0}, "dropout is 1.0"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_settings_that_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(aa.ConfigError) as error:
        aa.BottleneckConfig(**config)
    assert message in str(error.value)


def test_targets_that_are_refused() -> None:
    model = build("llama")
    keys = set(model.state_dict())
    for config, message in {
        ("series", "q_proj"): "placement='before', 'after' or 'parallel'",
        ("adapterp", "gate_proj"): "is for feed_forward.down",
        ("after", "norm"): "LlamaRMSNorm is no linear layer",
        ("parallel", "nothing"): "matches no module",
    }.items():
        with pytest.raises(aa.TargetError) as error:
            attached(model, placement=config[0], targets=config[1])
        assert message in str(error.value)
    with pytest.raises(aa.TargetError, match="no registered family"):
        attached(nn.Sequential(nn.Linear(2, 2)))
    assert set(model.state_dict()) == keys
    assert not aa.adapters(model)


def test_in_block_is_only_for_the_placements_of_sub_layers() -> None:
    kinds = {p: {type(x.branch) for x in attached(build("bert"), placement=p).placements} for p in PRESETS}
    assert {p for p, found in kinds.items() if InBlock in found} == {"pfeiffer", "houlsby", "parallel_block"}


def test_a_real_model(smollm: nn.Module, smollm_tokenizer: Any) -> None:
    tokens = smollm_tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        before = smollm(**tokens).logits[0, -1]
        adapter = attached(smollm, placement="pfeiffer", reduction=16, activation="relu", bias=True)
        assert torch.equal(smollm(**tokens).logits[0, -1], before)
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.02)
        after = smollm(**tokens).logits[0, -1]
    assert not torch.equal(after, before)
    assert smollm_tokenizer.decode(after.argmax()) == smollm_tokenizer.decode(before.argmax()) == " Paris"
