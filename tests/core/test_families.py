"""The promises of the core, on every family: the base is untouched, absent is absent, order is order."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from families import FAMILIES, OTHER_CONFIGURATION, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import anyadapter as aa
from anyadapter.core.attention import prepend

every_family = pytest.mark.parametrize("family", [pytest.param(c, id=c.name) for c in FAMILIES])
generating = pytest.mark.parametrize("family", [pytest.param(c, id=c.name) for c in FAMILIES if c.generates])

# The image encoder of SAM computes its attention inline: only its calls can be wrapped.
CORES = {"sam": ("transformer:self_attention", "transformer:cross_attention")}
ATTENTION_ROLES = ("self_attention", "cross_attention", "joint_attention", "motion_attention")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(aa.AdapterConfig):
    method: ClassVar[str] = "test-probe"
    targets: tuple[str, ...] = ("all-linear",)
    kind: str = "call"
    gain: float = 1.0
    shift: float = 0.0
    keys: int = 0


@aa.register
class Probe(aa.Adapter):
    """out · gain + shift, or, at an attention core, some constant keys in front."""

    Config = ProbeConfig

    def setup(self, host: aa.Host) -> None:
        self.weight = nn.Parameter(torch.ones(1))
        for site in host.find(self.config.targets, kind=self.config.kind):
            self.at(site, self.core if self.config.kind == "attention" else self.call)

    def call(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        return affine(call(*args, **kwargs), self.config.gain, self.config.shift)

    def core(self, call: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
        if self.config.keys:
            extra = self.weight.expand(1, k.shape[1], self.config.keys, k.shape[3])
            k, v, mask, options = prepend(extra, extra, q, k, v, mask, options)
        return call(q, k, v, mask, **options)


def affine(out: Any, gain: float, shift: float) -> Any:
    if isinstance(out, tuple):
        return (affine(out[0], gain, shift), *out[1:])
    return out * gain + shift if isinstance(out, Tensor) and out.is_floating_point() else out


def forward(family: Case, model: nn.Module, batch: int = 2) -> Tensor:
    return family.output(model(**family.inputs(model, batch)))


@torch.no_grad()  # torch picks its attention kernel by what requires a gradient
def run(family: Case, model: nn.Module, batch: int = 2) -> Tensor:
    return forward(family, model, batch)


def build(family: Case) -> nn.Module:
    """The model with its base frozen: torch picks some CPU kernels by whether a weight requires a gradient."""
    return family.build().requires_grad_(False)


def core_targets(family: Case, model: nn.Module) -> tuple[str, ...]:
    host = aa.Host.of(model)
    return CORES.get(family.name, tuple(r for r in ATTENTION_ROLES if host.has(r) and r not in missing(family)))


def missing(family: Case) -> tuple[str, ...]:
    return OTHER_CONFIGURATION.get(family.name, ())


def randomise(adapter: aa.Adapter, std: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def traces(model: nn.Module) -> list[str]:
    """What a model's modules carry of their own: instance attributes that could be somebody's patch, and hooks."""
    found = []
    for path, module in model.named_modules():
        found += [f"{path}.{name}" for name in ("forward", "_attn", "_anyadapter_core") if name in module.__dict__]
        found += [f"{path}.hooks"] * bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
        found += [f"{path}.config"] * ("CoreConfig" in type(getattr(module, "config", None)).__name__)
    return found


@every_family
def test_fresh_adapter_changes_nothing_and_base_state_is_untouched(family: Case) -> None:
    model = build(family)
    before, state = run(family, model), {k: v.clone() for k, v in model.state_dict().items()}
    next(model.parameters()).requires_grad_(True)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modules = [path for path, _ in model.named_modules()]

    adapter = aa.attach(model, aa.LoRAConfig(rank=2))
    assert torch.equal(run(family, model), before)
    assert list(model.state_dict()) == list(state)

    randomise(adapter)
    changed = run(family, model)
    assert not torch.equal(changed, before)
    with aa.disabled(model):
        assert torch.equal(run(family, model), before)
    model.load_state_dict(state)  # strict: a base checkpoint is a whole one
    assert torch.equal(run(family, model), changed)

    aa.detach(model)
    assert torch.equal(run(family, model), before)
    assert traces(model) == []
    assert [path for path, _ in model.named_modules()] == modules
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


@every_family
def test_training_reaches_the_adapter_only(family: Case) -> None:
    model = build(family)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = aa.attach(model, aa.LoRAConfig(rank=2))
    randomise(adapter)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in adapter.parameters()}
    optimiser = torch.optim.SGD(trainable, lr=0.1)
    forward(family, model).pow(2).mean().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("anyadapter."))
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
    optimiser.step()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


@every_family
def test_two_adapters_are_the_composition_written_by_hand(family: Case) -> None:
    model, by_hand = build(family), build(family)
    aa.attach(model, ProbeConfig(gain=1.5), "inner")
    aa.attach(model, ProbeConfig(shift=0.25), "outer")
    for path in {p.path for p in aa.adapters(model)["inner"].placements}:
        by_hand.get_submodule(path).register_forward_hook(lambda module, args, out: out * 1.5 + 0.25)
    torch.testing.assert_close(run(family, model), run(family, by_hand))

    swapped = build(family)
    aa.attach(swapped, ProbeConfig(shift=0.25), "inner")
    aa.attach(swapped, ProbeConfig(gain=1.5), "outer")
    assert not torch.allclose(run(family, model), run(family, swapped))


@every_family
def test_every_role_can_be_wrapped(family: Case) -> None:
    model = build(family)
    before = run(family, model)
    for role in aa.Host.of(model).family.roles:
        if role in missing(family):
            continue
        aa.attach(model, ProbeConfig(targets=(role,)))
        assert torch.equal(run(family, model), before), role
        aa.detach(model)
    assert traces(model) == []


@every_family
def test_every_attention_core_can_be_wrapped(family: Case) -> None:
    model = build(family)
    before, targets = run(family, model), core_targets(family, model)
    assert targets
    for target in targets:
        adapter = aa.attach(model, ProbeConfig(targets=(target,), kind="attention"))
        assert torch.equal(run(family, model), before), target
        aa.detach(model)
        adapter = aa.attach(model, ProbeConfig(targets=(target,), kind="attention", keys=2))
        assert not torch.allclose(run(family, model), before), target
        forward(family, model).sum().backward()
        assert adapter.weight.grad.abs() > 0
        aa.detach(model)
    assert traces(model) == []
    assert torch.equal(run(family, model), before)


@generating
def test_generation_with_a_cache_equals_the_full_forward(family: Case) -> None:
    model = build(family)
    randomise(aa.attach(model, aa.LoRAConfig(rank=2), "lora"), 0.3)
    aa.attach(model, ProbeConfig(targets=("self_attention",), kind="attention", keys=2), "keys")
    inputs = {k: v for k, v in family.inputs(model, 2).items() if not k.startswith("decoder_")}
    fixed: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(**inputs, use_cache=True, **fixed)
    without = model.generate(**inputs, use_cache=False, **fixed)
    assert torch.equal(with_cache, without)


@every_family
def test_copies_and_pickles_are_independent(family: Case) -> None:
    model = build(family)
    before = run(family, model)
    adapter = aa.attach(model, aa.LoRAConfig(rank=2), "lora")
    aa.attach(model, ProbeConfig(targets=core_targets(family, model), kind="attention", keys=1), "core")
    randomise(adapter)
    changed = run(family, model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(family, twin), changed)
        randomise(aa.adapters(twin)["lora"], 0.5)
        assert torch.equal(run(family, model), changed)
        aa.detach(twin, "core")
        aa.detach(twin, "lora")
        assert torch.equal(run(family, twin), before)
        assert traces(twin) == []


@every_family
def test_adapters_follow_the_model_to_another_dtype(family: Case) -> None:
    model = build(family)
    adapter = aa.attach(model, aa.LoRAConfig(rank=2))
    model.to(torch.bfloat16)
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
    aa.detach(model)
    fresh = aa.attach(model, aa.LoRAConfig(rank=2))
    assert {p.dtype for p in fresh.parameters()} == {torch.float32}  # trained in full precision beside a 16-bit base
    inputs = {
        k: v.to(torch.bfloat16) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in family.inputs(model, 1).items()
    }
    assert family.output(model(**inputs)).dtype == torch.bfloat16


@every_family
def test_gradient_checkpointing_gives_the_same_gradients(family: Case) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build(family)
        if checkpointing:
            if not getattr(
                model, "supports_gradient_checkpointing", getattr(model, "_supports_gradient_checkpointing", False)
            ):
                pytest.skip("this model has no gradient checkpointing")
            enable = getattr(model, "gradient_checkpointing_enable", None) or model.enable_gradient_checkpointing
            enable()
        adapter = aa.attach(model, aa.LoRAConfig(rank=2))
        randomise(adapter)
        model.train()
        forward(family, model).pow(2).mean().backward()
        gradients.append({n: p.grad for n, p in adapter.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "sd15", "flux"])
def test_a_model_compiled_with_an_adapter_gives_the_same_result(name: str) -> None:
    family = next(c for c in FAMILIES if c.name == name)
    model = build(family)
    randomise(aa.attach(model, aa.LoRAConfig(rank=2), "lora"))
    aa.attach(model, ProbeConfig(targets=core_targets(family, model), kind="attention", keys=1), "core")
    expected = run(family, model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(run(family, compiled), expected)
    with aa.disabled(compiled, "lora"):
        torch.testing.assert_close(run(family, compiled), family.output(model(**family.inputs(model, 2))))
    assert not torch.allclose(run(family, compiled), expected * 0)


def test_extra_keys_are_refused_where_they_would_be_hidden() -> None:
    keys = torch.zeros(1, 1, 2, 4)
    with pytest.raises(aa.TargetError, match="set_attn_implementation"):
        prepend(keys, keys, keys, keys, keys, torch.ones(1, 2, dtype=torch.long), {})


@settings(max_examples=25, deadline=None)
@given(data=st.data(), rank=st.integers(1, 4), family=st.sampled_from(FAMILIES))
def test_merge_is_the_same_function_and_unmerge_the_same_bytes(data: st.DataObject, rank: int, family: Case) -> None:
    model = build(family)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    paths = aa.Host.of(model).paths("all-linear")
    targets = tuple(data.draw(st.sets(st.sampled_from(paths), min_size=1, max_size=3)))
    uses = [id(m.weight) for m in aa.Host.of(model).modules.values() if hasattr(m, "weight")]
    adapter = aa.attach(model, aa.LoRAConfig(rank=rank, targets=targets))
    randomise(adapter)
    adapter.scale = data.draw(st.sampled_from([1.0, 0.5, -2.0]))
    if any(uses.count(id(model.get_submodule(path).weight)) > 1 for path in targets):
        return
    beside = run(family, model)
    aa.merge(model)
    torch.testing.assert_close(run(family, model), beside, atol=1e-4, rtol=1e-3)
    aa.unmerge(model)
    assert torch.equal(run(family, model), beside)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
