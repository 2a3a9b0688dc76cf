"""What the verbs refuse, and that a refusal changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from families import case
from torch import Tensor, nn

import anyadapter as aa


@dataclass(frozen=True, kw_only=True)
class ShiftConfig(aa.AdapterConfig):
    method: ClassVar[str] = "test-shift"


@aa.register
class Shift(aa.Adapter):
    """Adds the signal ``offset``, one number per row, to the hidden states after the embedding."""

    Config = ShiftConfig
    reads = ("offset",)
    groups = {"gain": ("gain",), "bias": ("bias",)}

    def setup(self, host: aa.Host) -> None:
        self.gain, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
        for site in host.find("text_embedding"):
            self.at(site, self.shift)

    def shift(self, call: Any, *args: Any, **kwargs: Any) -> Tensor:
        return call(*args, **kwargs) + self.signal("offset")[:, None, None] * self.gain + self.bias


@pytest.fixture
def llama() -> nn.Module:
    return case("llama").build().requires_grad_(False)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=torch.arange(14).reshape(2, 7)).logits


REFUSED = {
    "role of another architecture": (
        lambda m: aa.attach(m, aa.LoRAConfig(targets="cross_attention.query")),
        "It has: layer",
    ),
    "pattern that matches nothing": (lambda m: aa.attach(m, aa.LoRAConfig(targets="q_prj")), "Did you mean 'q_proj'"),
    "role with a typing error": (
        lambda m: aa.attach(m, aa.LoRAConfig(targets="feed_forward.dwn")),
        "feed_forward.down",
    ),
    "part of the model that is not there": (
        lambda m: aa.attach(m, aa.LoRAConfig(targets="decoder:q_proj")),
        "matches no",
    ),
    "layer that is not there": (lambda m: aa.attach(m, aa.LoRAConfig(layers=(99,))), "selects nothing"),
    "module without features": (lambda m: aa.attach(m, aa.LoRAConfig(targets="mlp")), "no number of features"),
    "rank 0": (lambda m: aa.attach(m, aa.LoRAConfig(rank=0)), "rank is 0; it must be a positive integer"),
    "rank beyond the width": (lambda m: aa.attach(m, aa.LoRAConfig(rank=4096)), "rank is 4096; it must be at most"),
    "dropout 1": (lambda m: aa.attach(m, aa.LoRAConfig(dropout=1.0)), "dropout is 1.0"),
    "unknown setting": (lambda m: aa.LoRAConfig.from_dict({"rnk": 8}), "no setting 'rnk'. Did you mean 'rank'"),
    "no configuration": (lambda m: aa.attach(m, {"rank": 8}), "not dict"),
    "malformed name": (lambda m: aa.attach(m, aa.LoRAConfig(), "../up"), "letters, digits"),
    "not attached": (lambda m: aa.detach(m, "nobody"), "No adapter named 'nobody'"),
    "unmerge before merge": (lambda m: aa.unmerge(m), "No adapter named 'default'"),
    "signal nobody reads": (lambda m: aa.signals(m, task=1).__enter__(), "'task'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_change_nothing(llama: nn.Module, what: str) -> None:
    before, names = logits(llama), [n for n, _ in llama.named_modules()]
    act, message = REFUSED[what]
    with pytest.raises(aa.AnyAdapterError, match=message.replace("(", r"\(")):
        act(llama)
    assert torch.equal(logits(llama), before)
    assert [n for n, _ in llama.named_modules()] == names


def test_a_pipeline_is_not_a_host() -> None:
    class Pipeline:
        unet = None

    with pytest.raises(aa.TargetError, match="pass pipeline.unet"):
        aa.attach(Pipeline(), aa.LoRAConfig())


def test_attaching_twice_under_one_name(llama: nn.Module) -> None:
    aa.attach(llama, aa.LoRAConfig(rank=2), "a")
    with pytest.raises(aa.AttachError, match="'a' is attached already"):
        aa.attach(llama, aa.LoRAConfig(rank=4), "a")
    assert list(aa.adapters(llama)) == ["a"]
    assert aa.adapters(llama)["a"].config.rank == 2


@pytest.mark.parametrize("name", ["keys", "forward", "lora", "weight", "a.b", "default"])
def test_any_name_is_only_a_name(llama: nn.Module, name: str) -> None:
    aa.attach(llama, aa.LoRAConfig(rank=2), name)
    assert list(aa.adapters(llama)) == [name]
    aa.detach(llama, name)


def test_detaching_out_of_order(llama: nn.Module) -> None:
    before = logits(llama)
    inner = aa.attach(llama, aa.LoRAConfig(rank=2, targets="q_proj"), "inner")
    aa.attach(llama, aa.LoRAConfig(rank=2, targets="v_proj"), "elsewhere")
    outer = aa.attach(llama, aa.LoRAConfig(rank=2, targets="q_proj"), "outer")
    for adapter in (inner, outer):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
    both = logits(llama)
    with pytest.raises(aa.AttachError, match="'outer' was attached after 'inner'"):
        aa.detach(llama, "inner")
    assert torch.equal(logits(llama), both)
    aa.detach(llama, "elsewhere")  # shares no site with 'outer'
    aa.detach(llama, "inner", out_of_order=True)
    aa.detach(llama, "outer")
    assert torch.equal(logits(llama), before)


def test_merged_adapters_come_out_in_order(llama: nn.Module) -> None:
    before = logits(llama)
    for name in ("a", "b"):
        for parameter in aa.attach(llama, aa.LoRAConfig(rank=2), name).parameters():
            nn.init.normal_(parameter)
        aa.merge(llama, name)
    with pytest.raises(aa.AttachError, match="merged already"):
        aa.merge(llama, "a")
    with pytest.raises(aa.AttachError, match="'b' was merged after 'a'"):
        aa.unmerge(llama, "a")
    with pytest.raises(aa.AttachError, match="is merged into the weights"):
        aa.detach(llama, "b")
    aa.unmerge(llama, "b")
    aa.unmerge(llama, "a")
    with aa.disabled(llama):
        assert torch.equal(logits(llama), before)


def test_merging_a_shared_weight_is_refused() -> None:
    model = case("gpt2").build()
    assert model.lm_head.weight is model.transformer.wte.weight
    aa.attach(model, aa.LoRAConfig(rank=2, targets="lm_head"))
    with pytest.raises(aa.AttachError, match="shared with another module"):
        aa.merge(model)


def test_merging_into_a_quantised_weight_is_refused() -> None:
    class Int8Linear(nn.Linear):
        """A linear whose weight is stored in eight bits."""

        def __init__(self, width: int) -> None:
            super().__init__(width, width)
            self.weight = nn.Parameter(torch.randint(-127, 127, (width, width), dtype=torch.int8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.float() / 127, self.bias)

    model = nn.Sequential(Int8Linear(8))
    before = model(torch.ones(1, 8))
    adapter = aa.attach(model, aa.LoRAConfig(rank=2))
    nn.init.normal_(next(iter(adapter.branches.values())).lora_B.weight)
    assert not torch.equal(model(torch.ones(1, 8)), before)  # beside it, an adapter works
    with pytest.raises(aa.AttachError, match="quantised weight"):
        aa.merge(model)


def test_merge_for_good(llama: nn.Module) -> None:
    for parameter in aa.attach(llama, aa.LoRAConfig(rank=2)).parameters():
        nn.init.normal_(parameter, std=0.1)
    beside = logits(llama)
    aa.merge(llama, unload=True)
    assert not aa.adapters(llama)
    torch.testing.assert_close(logits(llama), beside, atol=1e-4, rtol=1e-3)


def test_signals_travel_with_the_call(llama: nn.Module) -> None:
    before = logits(llama)
    aa.attach(llama, ShiftConfig())
    with pytest.raises(aa.SignalError, match="needs the signal 'offset'"):
        logits(llama)
    with aa.signals(llama, offset=torch.tensor([0.0, 1.0])):
        rows = logits(llama)
        with aa.signals(llama, offset=torch.zeros(2)):
            assert torch.equal(logits(llama), before)
        assert torch.equal(logits(llama), rows)
    assert torch.equal(rows[0], before[0])
    assert not torch.allclose(rows[1], before[1])
    with pytest.raises(aa.SignalError):
        logits(llama)


def test_trainable_groups(llama: nn.Module) -> None:
    adapter = aa.attach(llama, ShiftConfig())
    adapter.train_only("gain")
    assert [n for n, p in adapter.named_parameters() if p.requires_grad] == ["gain"]
    adapter.train_only()
    assert all(p.requires_grad for p in adapter.parameters())
    with pytest.raises(aa.ConfigError, match="no group 'gian'. Did you mean 'gain'"):
        adapter.train_only("gian")


def test_a_module_wrapped_by_others_since(llama: nn.Module) -> None:
    aa.attach(llama, aa.LoRAConfig(rank=2, targets="q_proj"))
    module = llama.get_submodule("model.layers.0.self_attn.q_proj")
    ours = module.forward
    module.forward = lambda x: ours(x)
    with pytest.raises(aa.AttachError, match=r"q_proj\.forward was replaced"):
        aa.detach(llama)
    module.forward = ours
    aa.detach(llama)


def test_a_forward_that_was_there_before_stays(llama: nn.Module) -> None:
    module = llama.get_submodule("model.layers.0.self_attn.q_proj")
    module.forward = lambda x: type(module).forward(module, x) * 2
    before = logits(llama)
    aa.attach(llama, aa.LoRAConfig(rank=2))
    assert torch.equal(logits(llama), before)
    aa.detach(llama)
    assert torch.equal(logits(llama), before)


def test_an_unregistered_architecture_is_addressed_by_pattern() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4)))
    x = torch.randn(3, 4)
    before = model(x)
    aa.attach(model, aa.LoRAConfig(rank=1, targets=("2.*",)))
    assert torch.equal(model(x), before)
    assert [p.path for p in aa.adapters(model)["default"].placements] == ["2.0"]
    with pytest.raises(aa.TargetError, match="is of no registered family"):
        aa.attach(model, aa.LoRAConfig(targets="self_attention.query"), "b")


def test_a_family_in_a_few_lines() -> None:
    class Homemade(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}) for _ in "ab"])

    aa.register_family(aa.Family(("Homemade",), {"feed_forward.down": "blocks.*.down"}))
    adapter = aa.attach(Homemade(), aa.LoRAConfig(rank=1, targets="feed_forward.down"))
    assert [p.path for p in adapter.placements] == ["blocks.0.down", "blocks.1.down"]


def test_data_parallel_and_compiled_models_are_unwrapped(llama: nn.Module) -> None:
    adapter = aa.attach(torch.compile(llama, backend="eager"), aa.LoRAConfig(rank=2))
    assert aa.adapters(llama) == {"default": adapter}
    assert aa.adapters(nn.DataParallel(llama)) == {"default": adapter}


def test_a_method_name_is_taken_once() -> None:
    class Other(aa.Adapter):
        Config = ShiftConfig

    with pytest.raises(aa.ConfigError, match="'test-shift' is taken"):
        aa.register(Other)
