"""IP-Adapter: the invariants of the paper, agreement with diffusers' own, its files, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import case
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import anyadapter as aa
from anyadapter.core.host import Host
from anyadapter.formats.ip_adapter import read_official, write_official

WIDTH = 12  # of the image embedding; that of the tiny models' text is 16
UNET = case("sd15")


def build(name: str = "sd15") -> nn.Module:
    return case(name).build().requires_grad_(False)


def attached(name: str = "sd15", tokens: int = 4, **settings: Any) -> tuple[nn.Module, aa.Adapter]:
    """A model and an adapter whose every weight is alive."""
    torch.manual_seed(0)
    model = build(name)
    adapter = aa.attach(model, aa.IPAdapterConfig(image_width=WIDTH, tokens=tokens), **settings)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, adapter


def embeds(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, batch: int = 2, **signals: Any) -> Tensor:
    with torch.no_grad(), aa.signals(model, **signals):
        return UNET.output(model(**UNET.inputs(model, batch)))


def layer(model: nn.Module, tokens: Tensor | None, **inputs: Any) -> Tensor:
    """One cross-attention by itself."""
    attention = model.mid_block.attentions[0].transformer_blocks[0].attn2
    pixels = torch.randn(2, 9, attention.query_dim, generator=torch.Generator().manual_seed(3))
    text = inputs.pop("text", None)
    with torch.no_grad(), aa.signals(model, **({} if tokens is None else {"image_tokens": tokens})):
        return attention(pixels, encoder_hidden_states=text_tokens() if text is None else text, **inputs)


def text_tokens() -> Tensor:
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(4))


# -- the formula


def test_scale_zero_is_the_base_bit_for_bit_and_needs_no_image() -> None:
    before = run(build())
    model, adapter = attached()
    tokens = adapter.tokens(embeds())
    assert not torch.allclose(run(model, image_tokens=tokens), before)
    adapter.scale = 0.0
    assert torch.equal(run(model), before)
    assert torch.equal(run(model, image_tokens=tokens), before)


@settings(max_examples=10, deadline=None)
@given(low=st.floats(-2, 2), high=st.floats(-2, 2))
def test_one_layer_is_affine_in_the_scale(low: float, high: float) -> None:
    model, adapter = attached()
    tokens = adapter.tokens(embeds())
    outputs = []
    for scale in (0.0, 1.0, low, high, (low + high) / 2):
        adapter.scale = scale
        outputs.append(layer(model, tokens))
    base, one, at_low, at_high, middle = outputs
    torch.testing.assert_close(at_low, base + low * (one - base), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(middle, (at_low + at_high) / 2, atol=1e-4, rtol=1e-4)


def test_the_whole_unet_is_not_affine_in_the_scale() -> None:
    model, adapter = attached()
    tokens = adapter.tokens(embeds())
    outputs = []
    for scale in (0.0, 1.0, 2.0):
        adapter.scale = scale
        outputs.append(run(model, image_tokens=tokens))
    assert not torch.allclose(outputs[2] - outputs[1], outputs[1] - outputs[0], atol=1e-4)


def test_fresh_weights_attend_to_tokens_as_the_layer_attends_to_its_text() -> None:
    model = build()
    attention = model.mid_block.attentions[0].transformer_blocks[0].attn2
    before = layer(model, None)
    aa.attach(model, aa.IPAdapterConfig(image_width=WIDTH))
    after = layer(model, text_tokens())
    torch.testing.assert_close(after - before, before - attention.to_out[0].bias)


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(6)))
def test_the_order_of_the_image_tokens_does_not_matter(order: list[int]) -> None:
    model, adapter = attached(tokens=6)
    tokens = adapter.tokens(embeds())
    torch.testing.assert_close(layer(model, tokens[:, order]), layer(model, tokens), atol=1e-5, rtol=1e-4)


def test_rows_are_independent() -> None:
    model, adapter = attached()
    tokens = adapter.tokens(embeds())
    together = run(model, image_tokens=tokens)
    torch.testing.assert_close(run(model, 1, image_tokens=tokens[:1]), together[:1], atol=1e-4, rtol=1e-4)
    other = torch.stack([tokens[0], tokens[1] + 1])
    changed = run(model, image_tokens=other)
    assert torch.equal(changed[0], together[0])
    assert not torch.allclose(changed[1], together[1])


def test_a_mask_over_the_text_leaves_the_image_alone() -> None:
    model, adapter = attached()
    tokens = adapter.tokens(embeds())
    mask = torch.tensor([0.0, 0.0, 0.0, -1e4, -1e4])[None, None].expand(2, 1, -1)
    masked = layer(model, tokens, attention_mask=mask)
    torch.testing.assert_close(masked, layer(model, tokens, text=text_tokens()[:, :3]))


def test_no_image_is_the_projection_of_zeros() -> None:
    _, adapter = attached()
    images = embeds()
    tokens = adapter.tokens(images, guidance=True)
    assert tokens.shape == (4, adapter.config.tokens, 16)
    torch.testing.assert_close(tokens[2:], adapter.tokens(images))
    torch.testing.assert_close(tokens[:2], adapter.tokens(torch.zeros_like(images)))
    assert tokens[:2].abs().min() > 0


# -- training


def test_training_changes_the_projection_and_the_image_keys_and_values_only() -> None:
    model, adapter = attached()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = run(build())
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(5):
        with aa.signals(model, image_tokens=adapter.tokens(embeds())):
            loss = UNET.output(model(**UNET.inputs(model, 2))).pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {id(p) for group in optimiser.param_groups for p in group["params"]} == {id(p) for p in adapter.parameters()}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    aa.detach(model)
    assert torch.equal(run(model), before)


def test_parameter_count_of_stable_diffusion() -> None:
    """The 22 M of the paper, from the sizes of Stable Diffusion 1.5 and CLIP ViT-H."""
    import diffusers

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        adapter = aa.attach(unet, aa.IPAdapterConfig())
    assert adapter.parameter_count() == 22_319_616


# -- hosts


@pytest.mark.parametrize("name", ["sd21", "sdxl", "unet_motion", "t5", "bart"])
def test_other_hosts_with_cross_attention(name: str) -> None:
    family = case(name)
    model = build(name)
    with torch.no_grad():
        before = family.output(model(**family.inputs(model, 2)))
    model, adapter = attached(name)
    tokens = adapter.tokens(embeds())
    if name == "unet_motion":
        tokens = tokens.repeat_interleave(3, dim=0)  # frames
    with torch.no_grad(), aa.signals(model, image_tokens=tokens):
        assert not torch.allclose(family.output(model(**family.inputs(model, 2))), before)
        adapter.scale = 0.0
        assert torch.equal(family.output(model(**family.inputs(model, 2))), before)


def test_a_sixteen_bit_base() -> None:
    model = build().to(torch.bfloat16)
    adapter = aa.attach(model, aa.IPAdapterConfig(image_width=WIDTH))
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    inputs = UNET.inputs(model, 2)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    with aa.signals(model, image_tokens=adapter.tokens(embeds().bfloat16())):
        assert UNET.output(model(**inputs)).dtype == torch.bfloat16


def test_copies_and_pickles_are_independent() -> None:
    model, adapter = attached()
    tokens = adapter.tokens(embeds())
    changed = run(model, image_tokens=tokens)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin, image_tokens=tokens), changed)
        with torch.no_grad():
            for name, tensor in aa.adapters(twin)["default"].tensors().items():
                tensor.mul_(0.0 if name.endswith("to_v_ip.weight") else 1.0)
        torch.testing.assert_close(run(twin, image_tokens=tokens), run(build()))
        assert torch.equal(run(model, image_tokens=tokens), changed)


def test_a_layer_compiles_whole_and_follows_scale_and_image() -> None:
    model, adapter = attached()
    attention = model.mid_block.attentions[0].transformer_blocks[0].attn2
    torch._dynamo.reset()
    expected = {}
    for compiled in (False, True):
        if compiled:
            attention.compile(backend="eager", fullgraph=True)
        for scale in (1.0, 0.5, 0.0):
            for seed in (0, 1):
                adapter.scale = scale
                out = layer(model, adapter.tokens(embeds(seed=seed)))
                torch.testing.assert_close(out, expected.setdefault((scale, seed), out))


def test_two_adapters_each_with_its_image() -> None:
    model, style = attached(name="sd15")
    face = aa.attach(model, aa.IPAdapterConfig(image_width=5, tokens=2), "face")
    mine, other = style.tokens(embeds()), face.tokens(torch.ones(2, 5))
    both = run(model, image_tokens={"default": mine, "face": other})
    with aa.disabled(model, "face"):
        one = run(model, image_tokens=mine)
        assert torch.equal(run(model, image_tokens={"default": mine}), one)
    assert not torch.allclose(both, one)
    with pytest.raises(aa.SignalError, match=r"for \['default'\], none for IPAdapter 'face'"):
        run(model, image_tokens={"default": mine})


# -- files


def nested(official: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """As in a published ``.bin``."""
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in official.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    return parts


def test_saved_and_loaded_is_identical(tmp_path: Path) -> None:
    model, adapter = attached()
    adapter.scale = 0.6
    out = run(model, image_tokens=adapter.tokens(embeds()))
    aa.save_pretrained(model, tmp_path)
    again = build()
    loaded = aa.load(again, tmp_path)
    assert loaded.scale == 0.6
    assert torch.equal(run(again, image_tokens=loaded.tokens(embeds())), out)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_published_files_round_trip(tmp_path: Path, suffix: str) -> None:
    model, adapter = attached(tokens=3)
    official = write_official(adapter)
    path = tmp_path / f"ip-adapter.{suffix}"
    if suffix == "safetensors":
        save_file(official, path)
    else:
        torch.save(nested(official), path)
        with pytest.raises(aa.ArtefactError, match="allow_pickle=True"):
            read_official(path, Host.of(build()))

    again = build()
    config, tensors = read_official(path, Host.of(again), allow_pickle=True)
    assert config == adapter.config
    loaded = aa.attach(again, config)
    loaded.load_tensors(tensors)
    image = {"image_tokens": adapter.tokens(embeds())}
    assert torch.equal(run(again, **image), run(model, **image))
    save_file(write_official(loaded), tmp_path / "again.safetensors")
    save_file(official, tmp_path / "first.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "first.safetensors").read_bytes()
    assert load_file(tmp_path / "again.safetensors").keys() == official.keys()


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_numbers_are_places_among_diffusers_attention_processors(name: str) -> None:
    model, adapter = attached(name)
    processors = [path.removesuffix(".processor") for path in model.attn_processors]
    official, mine = write_official(adapter), adapter.tensors()
    numbers = {int(key.split(".")[1]) for key in official if key.startswith("ip_adapter.")}
    assert numbers == set(range(1, len(processors), 2))
    for number in numbers:
        key = f"{processors[number]}.to_k_ip.weight"
        assert official[f"ip_adapter.{number}.to_k_ip.weight"].data_ptr() == mine[key].data_ptr()
    assert "mid_block" in processors[max(numbers)]


def test_agrees_with_the_ip_adapter_of_diffusers() -> None:
    model, adapter = attached()
    ours = run(model, image_tokens=adapter.tokens(embeds()))
    theirs = build()
    theirs._load_ip_adapter_weights([nested(write_official(adapter))])
    with torch.no_grad():
        out = theirs(**UNET.inputs(theirs, 2), added_cond_kwargs={"image_embeds": [embeds()[:, None]]}).sample
    torch.testing.assert_close(ours, out, atol=1e-5, rtol=1e-4)


def damage(official: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    first = "ip_adapter.1.to_k_ip.weight"
    changes: dict[str, dict[str, Tensor | None]] = {
        "plus": {"image_proj.latents": torch.zeros(1, 16, 8), "image_proj.proj.weight": None},
        "face": {"image_proj.proj.0.weight": torch.zeros(4, 4), "image_proj.proj.weight": None},
        "lora": {"unet.to_q.lora": torch.zeros(2)} | dict.fromkeys(official),
        "layer missing": {first: None, first.replace("_k_", "_v_"): None},
        "key missing": {"image_proj.norm.bias": None},
        "key unknown": {"image_proj.extra": torch.zeros(1)},
        "shape": {first: official[first][:-1]},
        "rows": {"image_proj.proj.weight": official["image_proj.proj.weight"][:-1]},
    }
    return {name: tensor for name, tensor in {**official, **changes[how]}.items() if tensor is not None}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("plus", "IP-Adapter of the Plus variant"),
        ("face", "IP-Adapter of the FaceID variant"),
        ("lora", "no IP-Adapter"),
        ("layer missing", "made for another base"),
        ("key missing", "missing image_proj.norm.bias"),
        ("key unknown", "not known image_proj.extra"),
        ("shape", r"ip_adapter.1.to_k_ip.weight is \(15, 16\), expected \(16, 16\)"),
        ("rows", "not a multiple of the tokens' width 16"),
    ],
)
def test_files_that_do_not_fit_are_refused_with_the_reason(how: str, message: str) -> None:
    _, adapter = attached()
    with pytest.raises(aa.ArtefactError, match=message):
        read_official(damage(write_official(adapter), how), Host.of(build()))


def test_a_file_of_another_base_names_both() -> None:
    _, adapter = attached("sdxl")
    message = "it has 8 cross-attentions of text width 16, this UNet2DConditionModel has 4 cross-attentions"
    with pytest.raises(aa.BaseMismatchError, match=message):
        read_official(write_official(adapter), Host.of(build()))


# -- misuse


@pytest.mark.parametrize("shape", [(2, 1280), (2, 5, WIDTH), (WIDTH,)])
def test_an_embedding_of_another_encoder(shape: tuple[int, ...]) -> None:
    _, adapter = attached()
    with pytest.raises(aa.SignalError, match=r"takes \(batch, 12\). Use the image encoder it was trained with"):
        adapter.tokens(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 4, 16), (4, 4, 16), (2, 4, 8), (2, 16)])
def test_tokens_that_do_not_fit_the_call(shape: tuple[int, ...]) -> None:
    model, _ = attached()
    with pytest.raises(aa.SignalError, match=r"needs \(2, tokens, 16\)"):
        run(model, image_tokens=torch.zeros(shape))


def test_a_missing_signal_and_an_impossible_host_or_setting() -> None:
    model, _ = attached()
    with pytest.raises(aa.SignalError, match="'image_tokens', which is not set"):
        run(model)
    with pytest.raises(aa.TargetError, match="no 'cross_attention'"):
        aa.attach(build("llama"), aa.IPAdapterConfig())
    with pytest.raises(aa.ConfigError, match="tokens is 0; it must be a positive integer"):
        aa.IPAdapterConfig(tokens=0)
