"""(IA)³: vectors of ones change nothing, others scale what the paper scales, and all of it merges."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import anyadapter as aa

HOSTS = [c.name for c in FAMILIES if c.name not in ("sam", "sd3", "flux")]  # joint attention has roles of its own


def randomise(adapter: aa.Adapter) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def run(name: str, model: nn.Module, batch: int = 2) -> Tensor:
    return case(name).output(model(**case(name).inputs(model, batch)))


@pytest.mark.parametrize("name", HOSTS)
def test_ones_change_nothing_and_any_vectors_merge(name: str) -> None:
    model = case(name).build().requires_grad_(False)
    before, state = run(name, model), {k: v.clone() for k, v in model.state_dict().items()}
    adapter = aa.attach(model, aa.IA3Config())
    assert torch.equal(run(name, model), before)
    case(name).output(model(**case(name).inputs(model, 2))).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())

    randomise(adapter)
    scaled = run(name, model)
    assert (scaled - before).abs().max() > 1e-3
    aa.merge(model)
    torch.testing.assert_close(run(name, model), scaled, atol=1e-4, rtol=1e-4)
    aa.unmerge(model)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    adapter.scale = 0
    assert torch.equal(run(name, model), before)
    aa.detach(model)
    assert torch.equal(run(name, model), before)


def test_it_scales_keys_values_and_the_input_of_the_last_linear() -> None:
    model = case("llama").build()
    adapter = aa.attach(model, aa.IA3Config())
    layer = "model.layers.0."
    ends = ["self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"]
    assert [n.removeprefix(layer) for n in adapter.tensors() if n.startswith(layer)] == [f"{end}.ia3_l" for end in ends]
    shapes = {n.split(".")[-2]: tuple(t.shape) for n, t in adapter.tensors().items()}
    assert shapes == {"k_proj": (8, 1), "v_proj": (8, 1), "down_proj": (1, 24)}  # two key heads of four
    assert adapter.parameter_count() == 2 * (8 + 8 + 24)


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("t5", {"k", "v", "wo"}),  # in self- and cross-attention
        ("bloom", {"query_key_value", "dense_4h_to_h"}),
        ("gpt2", {"c_attn", "c_proj"}),
        ("bert", {"key", "value", "dense"}),
    ],
)
def test_what_is_scaled_by_default(name: str, roles: set[str]) -> None:
    adapter = aa.attach(case(name).build(), aa.IA3Config())
    paths = [placement.path for placement in adapter.placements]
    assert {path.split(".")[-1] for path in paths} == roles
    assert any("EncDecAttention" in path for path in paths) == (name == "t5")


@settings(max_examples=20, deadline=None)
@given(
    width=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    strength=st.floats(-2, 2),
    outward=st.booleans(),
    bias=st.booleans(),
)
def test_the_formula(width: tuple[int, int], strength: float, outward: bool, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*width, bias=bias))
    config = aa.IA3Config(outputs=("0",), inputs=()) if outward else aa.IA3Config(outputs=(), inputs=("0",))
    adapter = aa.attach(model, config)
    vector = torch.randn(width[1] if outward else width[0])
    adapter.load_tensors({"0.ia3_l": vector[:, None] if outward else vector[None]})
    adapter.scale = strength
    x, factor = torch.randn(3, width[0]), 1 + strength * (vector - 1)
    linear = model[0]
    expected = (
        F.linear(x, linear.weight, linear.bias) * factor
        if outward
        else F.linear(x * factor, linear.weight, linear.bias)
    )
    torch.testing.assert_close(model(x), expected)
    aa.merge(model)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_a_linear_is_scaled_once() -> None:
    model = case("llama").build()
    adapter = aa.attach(model, aa.IA3Config(outputs="all-linear"))
    paths = [placement.path for placement in adapter.placements]
    assert len(paths) == len(set(paths)) == 14
    assert adapter.tensors()["model.layers.0.mlp.down_proj.ia3_l"].shape == (1, 24)


def test_half_precision_and_saving(tmp_path) -> None:
    model = case("opt").build().to(torch.bfloat16)
    before = run("opt", model)
    adapter = aa.attach(model, aa.IA3Config())
    assert torch.equal(run("opt", model), before)
    randomise(adapter)
    adapter.scale = 0.5
    scaled = run("opt", model)
    aa.save_pretrained(model, tmp_path)
    other = case("opt").build().to(torch.bfloat16)
    loaded = aa.load(other, tmp_path)
    assert loaded.scale == 0.5
    assert torch.equal(run("opt", other), scaled)
