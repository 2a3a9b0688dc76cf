"""The ports into diffusers: attention cores under any processor, in real pipelines, compiled, checkpointed, copied."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
import pytest
import torch
import transformers
from diffusers.models.attention_processor import AttnProcessor2_0
from families import Case, case
from torch import Tensor, nn

import anyadapter as aa
from anyadapter.core.attention import attend
from anyadapter.core.site import Site

CORES = {
    "sd15": ("self_attention", "cross_attention"),
    "sd21": ("self_attention", "cross_attention"),
    "sdxl": ("self_attention", "cross_attention"),
    "unet_motion": ("self_attention", "cross_attention", "motion_attention"),
    "sd3": ("self_attention", "joint_attention"),
    "flux": ("self_attention", "joint_attention"),
}
PLACES = [pytest.param(case(name), role, id=f"{name}-{role}") for name, roles in CORES.items() for role in roles]
every_core = pytest.mark.parametrize(("family", "role"), PLACES)


@dataclass(frozen=True, kw_only=True)
class WatchConfig(aa.AdapterConfig):
    method: ClassVar[str] = "test-watch"
    targets: tuple[str, ...] = ("cross_attention",)
    how: str = "pass"


@aa.register
class Watch(aa.Adapter):
    """Counts its calls, and passes them on, writes attention out by hand, or lengthens the keys or changes the values."""

    Config = WatchConfig

    def setup(self, host: aa.Host) -> None:
        self.gain = nn.Parameter(torch.full((), 1.5))
        self.calls = 0
        self.sites: list[str] = []
        for site in host.find(self.config.targets, kind="attention"):
            self.sites.append(site.path)
            self.at(site, self.core)

    def core(self, call: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
        self.calls += 1
        if self.config.how == "by hand":
            assert q.shape[:2] == k.shape[:2] == v.shape[:2]
            assert q.shape[3] == k.shape[3]
            return attend(q, k, v, mask, options.get("scaling"))
        if self.config.how == "longer":
            k, v = torch.cat([k, self.gain * k[:, :, :1]], dim=2), torch.cat([v, v[:, :, -1:]], dim=2)
        if self.config.how == "values":
            v = self.gain * v
        return call(q, k, v, mask, **options)


def build(family: Case) -> nn.Module:
    return family.build().requires_grad_(False)


@torch.no_grad()
def run(family: Case, model: nn.Module) -> Tensor:
    return family.output(model(**family.inputs(model, 2)))


def belongings(model: nn.Module) -> dict[str, Any]:
    """All that hangs on each module: attribute names, children, hooks, and the class's own forward."""
    return {
        path: (
            sorted(vars(module)),
            list(module._modules),
            type(module.forward).__name__,
            [len(hooks) for name, hooks in vars(module).items() if name.endswith("_hooks")],
        )
        for path, module in model.named_modules()
    }


@every_core
def test_the_chain_is_in_the_path_and_leaves_nothing_behind(family: Case, role: str) -> None:
    model = build(family)
    before, own = run(family, model), belongings(model)

    adapter = aa.attach(model, WatchConfig(targets=(role,)))
    assert torch.equal(run(family, model), before)
    assert adapter.calls == len(adapter.sites) > 0
    aa.detach(model)

    for how in ("longer", "values"):
        adapter = aa.attach(model, WatchConfig(targets=(role,), how=how))
        assert not torch.allclose(run(family, model), before), how
        with aa.disabled(model):
            assert torch.equal(run(family, model), before)
        family.output(model(**family.inputs(model, 2))).sum().backward()
        assert adapter.gain.grad.abs() > 0
        aa.detach(model)

    assert belongings(model) == own
    assert torch.equal(run(family, model), before)


@every_core
def test_a_core_is_softmax_attention_of_what_it_is_given(family: Case, role: str) -> None:
    """Queries and keys arrive normalised and rotated: the formula applied to them is the model."""
    model = build(family)
    before = run(family, model)
    aa.attach(model, WatchConfig(targets=(role,), how="by hand"))
    torch.testing.assert_close(run(family, model), before)


def test_the_processor_may_change_while_an_adapter_is_attached() -> None:
    family = case("sd15")
    model = build(family)
    own = belongings(model)
    adapter = aa.attach(model, WatchConfig(how="values"))
    changed = run(family, model)
    for change in (
        lambda: model.set_attn_processor(AttnProcessor2_0()),
        lambda: model.set_attention_slice(None),
        lambda: model.set_attn_processor(dict.fromkeys(model.attn_processors, AttnProcessor2_0())),
    ):
        change()
        adapter.calls = 0
        assert torch.equal(run(family, model), changed)
        assert adapter.calls == len(adapter.sites)
    aa.detach(model)
    assert belongings(model) == own


# diffusers' "default" is its oldest processor, which multiplies the matrices itself.
@pytest.mark.parametrize(("change", "arguments"), [("set_attention_slice", [1]), ("set_default_attn_processor", [])])
def test_a_processor_without_sdpa_is_an_error_not_a_lost_adapter(change: str, arguments: list) -> None:
    family = case("sd15")
    model = build(family)
    aa.attach(model, WatchConfig(how="values"))
    changed = run(family, model)
    getattr(model, change)(*arguments)
    with pytest.raises(aa.TargetError, match=r"does not use F\.scaled_dot_product.*AttnProcessor2_0"):
        run(family, model)
    with aa.disabled(model):
        run(family, model)  # the base itself runs under any processor
    model.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(run(family, model), changed)


@pytest.mark.parametrize(("name", "how"), [("sd15", "compile"), ("flux", "compile_repeated_blocks")])
def test_a_core_adapter_compiles_without_a_graph_break(name: str, how: str) -> None:
    family = case(name)
    model = build(family)
    before = run(family, model)
    aa.attach(model, WatchConfig(targets=CORES[name], how="longer"))
    expected = run(family, model)
    torch._dynamo.reset()
    getattr(model, how)(backend="eager", fullgraph=True)
    torch.testing.assert_close(run(family, model), expected)
    with aa.disabled(model):
        torch.testing.assert_close(run(family, model), before)


def test_copies_and_pickles_run_on_their_own() -> None:
    family = case("sd15")
    model = build(family)
    before = run(family, model)
    aa.attach(model, WatchConfig(how="values"))
    changed = run(family, model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(family, twin), changed)
        with torch.no_grad():
            aa.adapters(twin)["default"].gain.fill_(1.0)
        torch.testing.assert_close(run(family, twin), before)
        assert torch.equal(run(family, model), changed)
        aa.detach(twin)
        assert torch.equal(run(family, twin), before)


@pytest.mark.parametrize("name", CORES)
def test_gradient_checkpointing_gives_the_same_gradient(name: str) -> None:
    family = case(name)
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = build(family).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        adapter = aa.attach(model, WatchConfig(targets=CORES[name], how="values"))
        family.output(model(**family.inputs(model, 2))).pow(2).mean().backward()
        gradients.append(adapter.gain.grad)
        calls.append(adapter.calls)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert calls[1] > calls[0]  # it did run again in the backward pass


@dataclass(frozen=True, kw_only=True)
class DoubleConfig(aa.AdapterConfig):
    method: ClassVar[str] = "test-double"
    targets: tuple[str, ...] = ()


@aa.register
class Double(aa.Adapter):
    """Twice the output, at module calls."""

    Config = DoubleConfig

    def setup(self, host: aa.Host) -> None:
        for site in host.find(self.config.targets):
            self.at(site, self.call)

    def call(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        return 2 * call(*args, **kwargs)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "unet_motion"])
def test_a_call_and_a_core_of_the_same_module_compose(name: str) -> None:
    """The module's own call is outside its core, whichever was attached first."""
    family = case(name)
    model = build(family)
    own = belongings(model)
    results = []
    for order in ("call core", "core call"):
        for which in order.split():
            config = DoubleConfig(targets=("cross_attention",)) if which == "call" else WatchConfig(how="values")
            aa.attach(model, config, which)
        results.append(run(family, model))
        for which in reversed(order.split()):
            aa.detach(model, which)
        assert belongings(model) == own
    assert torch.equal(*results)


# -- LoRA and IP-Adapter on one U-Net


def prompts(family: Case, adapter: aa.Adapter, seed: int = 0) -> Tensor:
    width = adapter.config.image_width
    return adapter.tokens(torch.randn(2, width, generator=torch.Generator().manual_seed(seed)))


def settle(adapter: aa.Adapter) -> None:
    """Weights that do not depend on the order of attachment."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def both() -> tuple[Case, nn.Module]:
    family = case("sd15")
    model = build(family)
    settle(aa.attach(model, aa.LoRAConfig(rank=2), "lora"))
    settle(aa.attach(model, aa.IPAdapterConfig(image_width=12, tokens=3), "image"))
    return family, model


def run_with_image(family: Case, model: nn.Module) -> Tensor:
    with torch.no_grad(), aa.signals(model, image_tokens=prompts(family, aa.adapters(model)["image"])):
        return run(family, model)


def test_lora_and_ip_adapter_do_not_disturb_each_other(both: tuple[Case, nn.Module]) -> None:
    family, model = both
    together = run_with_image(family, model)
    with aa.disabled(model, "lora"):
        image = run_with_image(family, model)
    with aa.disabled(model, "image"):
        lora = run(family, model)
    assert not torch.allclose(together, image)
    assert not torch.allclose(together, lora)

    other = build(family)  # attached the other way round
    settle(aa.attach(other, aa.IPAdapterConfig(image_width=12, tokens=3), "image"))
    assert torch.equal(run_with_image(family, other), image)
    settle(aa.attach(other, aa.LoRAConfig(rank=2), "lora"))
    assert torch.equal(run_with_image(family, other), together)
    aa.detach(other, "image", out_of_order=True)
    assert torch.equal(run(family, other), lora)


def test_the_image_is_attended_with_the_query_that_lora_made(both: tuple[Case, nn.Module]) -> None:
    family, model = both
    together = run_with_image(family, model)
    aa.merge(model, "lora")
    torch.testing.assert_close(run_with_image(family, model), together, atol=1e-4, rtol=1e-3)


# -- a pipeline


@pytest.fixture(scope="module")
def pipeline() -> diffusers.StableDiffusionPipeline:
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text).eval(),
        tokenizer=None,
        unet=build(case("sd15")),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: diffusers.StableDiffusionPipeline, **settings: Any) -> Tensor:
    ids = torch.arange(7)[None]
    with torch.no_grad():
        text, negative = (pipe.text_encoder(ids + shift).last_hidden_state for shift in (0, 20))
    noise = torch.Generator().manual_seed(0)
    images = pipe(
        prompt_embeds=text,
        negative_prompt_embeds=negative,
        num_inference_steps=2,
        output_type="pt",
        height=16,
        width=16,
        generator=noise,
        **settings,
    ).images
    return images


def test_one_pipeline_before_with_and_after(pipeline: diffusers.StableDiffusionPipeline) -> None:
    unet, own = pipeline.unet, belongings(pipeline.unet)
    before = generate(pipeline)
    adapter = aa.attach(unet, aa.IPAdapterConfig(image_width=12))
    assert pipeline.unet is unet

    with pytest.raises(aa.SignalError, match="image_tokens"):
        generate(pipeline)
    embeds = torch.randn(1, 12, generator=torch.Generator().manual_seed(2))
    with aa.signals(unet, image_tokens=adapter.tokens(embeds)), pytest.raises(aa.SignalError, match="guidance=True"):
        generate(pipeline)

    with aa.signals(unet, image_tokens=adapter.tokens(embeds, guidance=True)):
        image = generate(pipeline)
        adapter.scale = 0.0
        assert torch.equal(generate(pipeline), before)
    adapter.scale = 1.0
    assert not torch.allclose(image, before)
    with aa.signals(unet, image_tokens=adapter.tokens(embeds.repeat(3, 1), guidance=True)):
        assert generate(pipeline, num_images_per_prompt=3).shape[0] == 3

    aa.detach(unet)
    assert torch.equal(generate(pipeline), before)
    assert belongings(unet) == own


def test_adapters_on_unet_and_text_encoder_of_one_pipeline(pipeline: diffusers.StableDiffusionPipeline) -> None:
    before = generate(pipeline)
    settle(aa.attach(pipeline.text_encoder, aa.LoRAConfig(rank=2)))
    text_only = generate(pipeline)
    settle(aa.attach(pipeline.unet, aa.LoRAConfig(rank=2)))
    assert not torch.allclose(text_only, before)
    assert not torch.allclose(generate(pipeline), text_only)
    aa.detach(pipeline.unet)
    assert torch.equal(generate(pipeline), text_only)
    aa.detach(pipeline.text_encoder)
    assert torch.equal(generate(pipeline), before)


def test_a_pipeline_is_not_a_host(pipeline: diffusers.StableDiffusionPipeline) -> None:
    with pytest.raises(aa.TargetError, match=r"pass pipeline\.unet"):
        aa.attach(pipeline, aa.LoRAConfig())


def test_every_attention_layer_of_a_unet_is_reached() -> None:
    """Roles cover what diffusers itself counts as attention, each site once."""
    for name, roles in CORES.items():
        if name == "unet_motion":
            continue  # diffusers' list is the same; its motion modules hold two self-attentions each
        model = build(case(name))
        found: list[Site] = [s for role in roles for s in aa.Host.of(model).find(role, kind="attention")]
        assert Counter(site.path for site in found) == Counter(
            path.removesuffix(".processor") for path in model.attn_processors
        )
