"""IP-Adapter against the authors' code, on a small U-Net with random weights."""

from __future__ import annotations

import diffusers
import pytest
import torch
from golden_cases import Golden
from torch import Tensor

import anyadapter as aa
from anyadapter.core.host import Host
from anyadapter.formats.ip_adapter import PROJECTION, official_names, read_official, write_official


def run(case: Golden) -> None:
    projection = {name for name in case.part("state") if name.startswith("image_proj.")}
    if projection != set(PROJECTION):
        pytest.fail(f"ip-adapter {case.name}: the runner knows the base variant only")
    if "scheduler" in case.about:
        check_generation(case)
    elif "in/sample" in case.tensors:
        check_unet(case)
    else:
        pytest.fail(f"ip-adapter {case.name}: the runner knows U-Nets and generation only")


def attached(case: Golden) -> tuple[diffusers.UNet2DConditionModel, aa.Adapter]:
    unet = diffusers.UNet2DConditionModel(**case.about["unet_config"]).eval()
    unet.load_state_dict(case.part("base"))
    config, tensors = read_official(case.part("state"), Host.of(unet))
    assert config.tokens == case.about["dims"]["num_tokens"]
    assert config.image_width == case.about["dims"]["clip_dim"]
    adapter = aa.attach(unet, config)
    adapter.load_tensors(tensors)
    back = write_official(adapter)
    assert back.keys() == case.part("state").keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in case.part("state").items())
    return unet, adapter


def outputs(case: Golden, prefix: str) -> dict[float, str]:
    """The outputs at each scale."""
    keys = [key for key in case.tensors if key.startswith(f"out/{prefix}")]
    assert keys
    return {float(key.removeprefix(f"out/{prefix}")): key for key in keys}


def check_unet(case: Golden) -> None:
    unet, adapter = attached(case)
    given = case.part("in")
    tokens = adapter.tokens(given["image_embeds"])
    case.close(tokens, "out/tokens")

    def call() -> Tensor:
        return unet(given["sample"], given["timestep"], given["text_states"]).sample

    with aa.disabled(unet):
        without = call()
    case.close(without, "out/no_adapter")
    for scale, key in outputs(case, "scale_").items():
        adapter.scale = scale
        with aa.signals(unet, image_tokens=tokens):
            out = call()
        case.close(out, key)
        assert scale != 0 or torch.equal(out, without)

    adapter.scale = 1.0
    with aa.signals(unet, image_tokens=adapter.tokens(given["image_embeds"])):
        call().pow(2).mean().backward()
    theirs = official_names([placement.path for placement in adapter.placements])
    gradients = {theirs[name]: tensor.grad for name, tensor in adapter.tensors().items()}
    assert gradients.keys() == case.part("grad").keys()
    for name, gradient in gradients.items():
        case.close(gradient, f"grad/{name}")


@torch.no_grad()
def check_generation(case: Golden) -> None:
    unet, adapter = attached(case)
    given, dims = case.part("in"), case.about["dims"]
    samples = dims["num_samples"]
    tokens = adapter.tokens(given["image_embeds"].repeat_interleave(samples, dim=0), guidance=True)
    case.close(tokens[:1], "out/uncond_image_tokens")
    case.close(tokens[samples : samples + 1], "out/image_tokens")
    text = torch.cat([given["negative_prompt_embeds"], given["prompt_embeds"]]).repeat_interleave(samples, dim=0)
    settings = {k: v for k, v in case.about["scheduler"].items() if k != "cls"}
    for scale, key in outputs(case, "latents_scale_").items():
        adapter.scale = scale
        scheduler = getattr(diffusers, case.about["scheduler"]["cls"])(**settings)
        scheduler.set_timesteps(dims["steps"])
        latents = given["latents"]
        for step in scheduler.timesteps:
            with aa.signals(unet, image_tokens=tokens):
                unconditional, conditional = unet(torch.cat([latents] * 2), step, text).sample.chunk(2)
            noise = unconditional + dims["guidance_scale"] * (conditional - unconditional)
            latents = scheduler.step(noise, step, latents, eta=0.0).prev_sample
        case.close(latents, key)
