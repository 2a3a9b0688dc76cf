"""Stacks, mixtures per row, and merging: what acts together acts as each would by itself, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, case
from hypothesis import given, settings
from hypothesis import strategies as st
from mixing import PROMPTS, PROPERTY, LanguagesConfig, answers, deltas, llama, logits, randomise
from torch import Tensor, nn

import anyadapter as aa

# -------------------------------------------------------------------------- stacks


def test_linear_adapters_stack_in_any_order_and_others_in_the_order_of_attachment() -> None:
    def stacked(order: str, configs: dict[str, aa.AdapterConfig]) -> Tensor:
        model = llama()
        for name in order:
            torch.manual_seed(ord(name))
            randomise(aa.attach(model, configs[name], name), ord(name)).scale = 0.5
        return logits(model)

    linear = {"a": aa.LoRAConfig(rank=2), "b": aa.LoRAConfig(rank=3)}
    torch.testing.assert_close(stacked("ab", linear), stacked("ba", linear), atol=1e-4, rtol=1e-4)
    series = {"a": aa.BottleneckConfig(width=4), "b": aa.BottleneckConfig(width=4)}
    assert (stacked("ab", series) - stacked("ba", series)).abs().max() > 1e-2
    mixed = {"a": aa.LoRAConfig(rank=2), "b": aa.BottleneckConfig(width=4)}
    assert (stacked("ab", mixed) - stacked("ba", mixed)).abs().max() > 1e-2


# -------------------------------------------------------------------------- rows

ROUTED: dict[str, tuple[str, tuple[aa.AdapterConfig, ...]]] = {
    "lora": ("llama", (aa.LoRAConfig(rank=2), aa.LoRAConfig(rank=3, alpha=5, targets="q_proj"))),
    "fused lora": ("bloom", (aa.LoRAConfig(rank=2, targets="self_attention.qkv", fused=True), aa.LoRAConfig(rank=1))),
    "ia3": ("t5", (aa.IA3Config(), aa.IA3Config(inputs=()))),
    "series": ("llama", (aa.BottleneckConfig(width=5), aa.BottleneckConfig(placement="adapterp", width=3, bias=True))),
    "parallel": ("gptj", (aa.BottleneckConfig(placement="parallel", width=3, scaling="learned"),) * 2),
    "houlsby": ("bert", (aa.BottleneckConfig(placement="houlsby", width=3), aa.BottleneckConfig(placement="pfeiffer"))),
    "gated prefix": ("qwen3", (aa.LlamaAdapterConfig(length=2), aa.LoRAConfig(rank=2))),
    "rewritten query": ("roberta", (aa.PAdapterConfig(alpha=0.5), aa.LoRAConfig(rank=2))),
    "beside a ViT": ("vit", (aa.BiAdapterConfig(hidden=3), aa.BiAdapterConfig(form="lora", hidden=2, bits=32))),
    "an inventory": ("llama", (aa.MHRConfig(skills=3, selector="average", splits=2), aa.LoRAConfig(rank=1))),
    "mixed kinds": ("llama", (aa.LoRAConfig(rank=2), aa.BottleneckConfig(width=3), aa.IA3Config())),
    "convolutions": ("sd15", (aa.LoRAConfig(rank=2, targets=("conv1", "to_q")),) * 2),
}


SCALE = 0.75  # of every adapter; a weight multiplies it


def attach_all(kind: str) -> nn.Module:
    host, configs = ROUTED[kind]
    model = case(host).build().requires_grad_(False)
    for i, config in enumerate(configs):
        randomise(aa.attach(model, config, str(i)), i).scale = SCALE
    return model


@torch.no_grad()
def run(kind: str, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return case(ROUTED[kind][0]).output(model(**inputs))


def row_alone(kind: str, model: nn.Module, inputs: dict[str, Any], row: int, route: dict[str, float]) -> Tensor:
    """The row in a batch of its own, with its adapters at these scales and the others off."""
    batch = max(len(v) for v in inputs.values() if isinstance(v, Tensor) and v.dim())
    own = {
        k: v[row : row + 1] if isinstance(v, Tensor) and v.dim() and len(v) == batch else v for k, v in inputs.items()
    }
    for name, adapter in aa.adapters(model).items():
        adapter.scale, adapter.enabled = SCALE * route.get(name, 0), name in route
    out = run(kind, model, own)
    for adapter in aa.adapters(model).values():
        adapter.scale, adapter.enabled = SCALE, True
    return out


@pytest.mark.parametrize("kind", ROUTED)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_a_routed_row_is_what_it_would_be_alone(kind: str, data: st.DataObject) -> None:
    model = attach_all(kind)
    names = list(aa.adapters(model))
    weight = st.sampled_from([0.0, 1.0, 0.3, -0.7])
    route = st.dictionaries(st.sampled_from(names), weight)
    routes = data.draw(st.lists(route, min_size=1, max_size=4).filter(any))
    inputs = case(ROUTED[kind][0]).inputs(model, len(routes))
    stacked = run(kind, model, inputs)
    with aa.routed(model, routes):
        mixed = run(kind, model, inputs)
    for i, each in enumerate(routes):
        torch.testing.assert_close(mixed[i : i + 1], row_alone(kind, model, inputs, i, each), atol=2e-4, rtol=1e-4)
    assert torch.equal(run(kind, model, inputs), stacked)  # nothing is left of the routes


@PROPERTY
@given(data=st.data(), n=st.integers(1, 4), batch=st.integers(1, 4))
def test_weights_as_a_tensor_and_gradients_to_them(data: st.DataObject, n: int, batch: int) -> None:
    model = llama()
    for i in range(n):
        randomise(aa.attach(model, aa.LoRAConfig(rank=2, targets="q_proj"), str(i)), i)
    names = [str(i) for i in range(n)]
    values = data.draw(st.lists(st.lists(st.floats(-1, 1), min_size=n, max_size=n), min_size=batch, max_size=batch))
    weights = torch.tensor(values, requires_grad=True)
    with aa.routed(model, [dict(zip(names, row)) for row in values]):
        expected = logits(model, batch)
    with aa.routed(model, weights, names):
        out = model(**case("llama").inputs(model, batch)).logits
        out[0].square().sum().backward()
    torch.testing.assert_close(out.detach(), expected)
    assert weights.grad is not None
    assert weights.grad[0].abs().sum() > 0
    assert torch.equal(weights.grad[1:], torch.zeros(batch - 1, n))  # a row's weights act on that row only


def test_adapters_that_no_row_names_are_off_and_named_ones_are_on() -> None:
    model = llama()
    before = logits(model)
    for i, name in enumerate("abc"):
        randomise(aa.attach(model, aa.LoRAConfig(rank=2), name), i)
    aa.adapters(model)["a"].enabled = False
    with aa.routed(model, [None, "a"]):
        rows = logits(model)
    torch.testing.assert_close(rows[0], before[0], atol=1e-6, rtol=0)
    assert not torch.allclose(rows[1], before[1], atol=1e-2)
    assert [a.enabled for a in aa.adapters(model).values()] == [False, True, True]


def test_what_cannot_tell_rows_apart_acts_on_all_or_none() -> None:
    model = llama()
    randomise(aa.attach(model, LanguagesConfig(), "languages"), 3)
    randomise(aa.attach(model, aa.LoRAConfig(rank=2), "lora"), 4)
    with aa.signals(model, language=torch.tensor([0, 1])):
        with aa.routed(model, ["languages", {"languages": 1.0, "lora": 0.0}]):
            every = logits(model)
        with aa.disabled(model, "lora"):
            torch.testing.assert_close(logits(model), every)
    refused = aa.routed(model, ["languages", "lora"])
    with pytest.raises(aa.ConfigError, match="its method cannot tell rows apart"), refused:
        pass


PREFIXED = [c.name for c in FAMILIES if c.generates]


@pytest.mark.parametrize("host", PREFIXED)
@torch.no_grad()
def test_rows_with_a_prefix_beside_rows_without(host: str) -> None:
    """In every family of language models, also while generating from a cache."""
    model = case(host).build().requires_grad_(False)
    for i, (name, n) in enumerate((("short", 1), ("long", 3))):
        randomise(aa.attach(model, aa.PrefixConfig(tokens=n), name), i)
    randomise(aa.attach(model, aa.LoRAConfig(rank=2), "lora"), 3)
    routes: list[Any] = ["short", None, {"long": 1, "lora": 0.5}, {"short": 1, "long": 1}]
    if host == "opt":  # its feed-forward folds rows together
        aa.detach(model, "lora")
        routes[2] = "long"
    inputs = case(host).inputs(model, 4)
    ids = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    with aa.routed(model, routes):
        mixed = case(host).output(model(**inputs))
        written = model.generate(**ids, max_new_tokens=4, do_sample=False)
    for i, route in enumerate(routes):
        names = {} if route is None else {route: 1} if isinstance(route, str) else route
        for name, adapter in aa.adapters(model).items():
            adapter.enabled = name in names
        if "lora" in names:
            aa.adapters(model)["lora"].scale = names["lora"]
        own = {key: value[i : i + 1] for key, value in inputs.items()}
        torch.testing.assert_close(mixed[i : i + 1], case(host).output(model(**own)), atol=2e-4, rtol=1e-4)
        own = {key: value[i : i + 1] for key, value in ids.items()}
        assert torch.equal(written[i : i + 1], model.generate(**own, max_new_tokens=4, do_sample=False))


def test_a_row_without_an_image() -> None:
    model = case("sd15").build().requires_grad_(False)
    for i in range(2):
        randomise(aa.attach(model, aa.IPAdapterConfig(image_width=8, tokens=2), str(i)), i)
    inputs = case("sd15").inputs(model, 3)
    tokens = {name: a.tokens(torch.randn(3, 8)).detach() for name, a in aa.adapters(model).items()}
    routes = [{"0": 0.5, "1": 0.25}, {}, {"1": 1.0}]
    with aa.signals(model, image_tokens=tokens), aa.routed(model, routes), torch.no_grad():
        mixed = case("sd15").output(model(**inputs))
    for i, route in enumerate(routes):
        own = {k: v[i : i + 1] if isinstance(v, Tensor) and v.dim() and len(v) == 3 else v for k, v in inputs.items()}
        for name, adapter in aa.adapters(model).items():
            adapter.scale = route.get(name, 0.0)
        row = {name: value[i : i + 1] for name, value in tokens.items()}
        with aa.signals(model, image_tokens=row), torch.no_grad():
            torch.testing.assert_close(mixed[i : i + 1], case("sd15").output(model(**own)), atol=1e-4, rtol=1e-4)


def test_half_precision_keeps_its_dtype_in_a_routed_call() -> None:
    model = attach_all("mixed kinds").to(torch.bfloat16)
    with aa.routed(model, [{"0": 0.3, "1": 0.4, "2": 0.5}, None]):
        assert logits(model).dtype is torch.bfloat16


def test_a_batch_of_another_size_is_refused_in_the_call() -> None:
    model = llama()
    aa.attach(model, aa.LoRAConfig(rank=2))
    with aa.routed(model, ["default"] * 3), pytest.raises(aa.SignalError, match="routed as 3 rows.*works on 2"):
        logits(model, 2)
    model = case("opt").build()  # its feed-forward folds batch and sequence together
    aa.attach(model, aa.LoRAConfig(rank=2))
    with aa.routed(model, ["default"] * 2), pytest.raises(aa.SignalError, match="folds the tokens"):
        model(**case("opt").inputs(model, 2))


# -------------------------------------------------------------------------- merging, many times


@PROPERTY
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    steps=st.lists(st.sampled_from(["push", "pop"]), max_size=30),
    std=st.sampled_from([1e-4, 0.3, 100.0]),
)
def test_merging_and_unmerging_leaves_no_trace(dtype: torch.dtype, steps: list[str], std: float) -> None:
    """Drift is not bounded but absent: what was underneath is kept, and comes back bit for bit."""
    model = llama().to(dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    names = ["lora", "ia3", "more"]
    for name, config in zip(names, (aa.LoRAConfig(rank=2), aa.IA3Config(), aa.LoRAConfig(rank=3, targets="q_proj"))):
        randomise(aa.attach(model, config, name), len(name), std)
    merged: list[str] = []
    for step in steps:
        if step == "push" and len(merged) < 3:
            merged.append(names[len(merged)])
            aa.merge(model, merged[-1])
        elif step == "pop" and merged:
            aa.unmerge(model, merged.pop())
    for name in reversed(merged):
        aa.unmerge(model, name)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@PROPERTY
@given(seed=st.integers(0, 99), rank=st.integers(1, 8), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_merged_weight_is_the_sum_rounded_once(seed: int, rank: int, dtype: torch.dtype) -> None:
    """|W' − (W + Δ)| ≤ ε/2 · |W + Δ| in each number: 6e-8 relative in fp32, 4e-3 in bf16."""
    model = llama().to(dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapter = randomise(aa.attach(model, aa.LoRAConfig(rank=rank)), seed)
    changes = deltas(adapter, model)
    aa.merge(model)
    for path, delta in changes.items():
        exact = before[f"{path}.weight"].double() + delta.double()
        error = (model.get_submodule(path).weight.double() - exact).abs()
        # The sum is made in fp32, which is itself a rounding.
        allowed = (torch.finfo(dtype).eps / 2 + torch.finfo(torch.float32).eps / 2) * exact.abs() * 1.01 + 1e-30
        assert bool((error <= allowed).all())


def test_bf16_swallows_an_update_below_half_a_step_of_the_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32, bias=False)).to(torch.bfloat16).requires_grad_(False)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    adapter = aa.attach(model, aa.LoRAConfig(rank=1, alpha=1))
    for tensor in adapter.tensors().values():
        tensor.data.fill_(0.03)  # an update of 9e-4 beside weights of 1, whose bf16 neighbours are 4e-3 and 8e-3 away
    x = torch.ones(1, 32, dtype=torch.bfloat16)
    beside, base = model(x), 32.0
    aa.merge(model)
    assert float(beside.detach().mean()) > base - 1e-6
    assert torch.equal(model[0].weight, torch.ones_like(model[0].weight))  # all of it lost


# -------------------------------------------------------------------------- a real model


def test_routes_on_a_real_model_and_in_generation(smollm: nn.Module, smollm_tokenizer: Any) -> None:
    model = smollm
    for i, (name, rank) in enumerate((("a", 4), ("b", 8))):
        randomise(aa.attach(model, aa.LoRAConfig(rank=rank, targets=("q_proj", "v_proj", "down_proj")), name), i, 0.02)
    randomise(aa.attach(model, aa.BottleneckConfig(placement="adapterp", width=16), "series"), 5, 0.02)
    routes = ["a", {"b": 0.7, "series": 0.5}, None]
    with aa.routed(model, routes):
        mixed = answers(model, smollm_tokenizer, PROMPTS)
        batch = smollm_tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
        texts = model.generate(**batch, max_new_tokens=5, do_sample=False)[:, -5:]
    for i, route in enumerate(routes):
        with aa.routed(model, [route]):
            own = smollm_tokenizer(PROMPTS[i], return_tensors="pt")
            torch.testing.assert_close(model(**own).logits[0, -1], mixed[i], atol=2e-3, rtol=1e-3)
            assert torch.equal(model.generate(**own, max_new_tokens=5, do_sample=False)[0, -5:], texts[i])
