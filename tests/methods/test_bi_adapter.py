"""Bi-AdaptFormer and Bi-LoRA: the invariants of their card, and each form against its formula."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import case
from golden_runners.binary_adapters import VisionTransformer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

import anyadapter as aa
from anyadapter.methods.vision.bi_adapter import BiAdapter
from anyadapter.quantize import packed, quantised

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
IMAGE = {"image_size": 16, "patch_size": 8, "layer_norm_eps": 1e-6}
PIXELS = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
both_forms = pytest.mark.parametrize("form", ["adaptformer", "lora"])


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return lively(ViTForImageClassification(ViTConfig(**SIZES, **IMAGE, num_labels=5)))


def timm_like() -> nn.Module:
    torch.manual_seed(0)
    return lively(VisionTransformer(embed_dim=16, depth=2, heads=4, num_classes=5, img=16, patch=8, mlp_ratio=1.5))


def lively(model: nn.Module) -> nn.Module:
    """With values of all sizes in every tensor."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


HOSTS = {"hf": classifier, "timm": timm_like}
every_host = pytest.mark.parametrize("build", HOSTS.values(), ids=HOSTS)


def attached(model: nn.Module, std: float | None = None, **config: Any) -> BiAdapter:
    torch.manual_seed(1)
    adapter = aa.attach(model, aa.BiAdapterConfig(**{"hidden": 4, **config}))
    assert isinstance(adapter, BiAdapter)
    for parameter in adapter.parameters() if std else ():
        nn.init.normal_(parameter, std=std)
    return adapter


@torch.no_grad()
def logits(model: nn.Module, pixels: Tensor = PIXELS) -> Tensor:
    out = model(pixels)
    return out if isinstance(out, Tensor) else out.logits


# ------------------------------------------------------------------ when it is absent, and when nearly


@every_host
@both_forms
def test_absent_at_scale_zero_and_when_off(build: Any, form: str) -> None:
    model = build()
    before = logits(model)
    attached(model, form=form, scale=0.0, std=0.5)
    assert torch.equal(logits(model), before)
    aa.detach(model)
    adapter = attached(model, form=form, std=0.5)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    with aa.disabled(model):
        assert torch.equal(logits(model), before)
    adapter.scale = 0
    assert torch.equal(logits(model), before)
    aa.detach(model)
    assert torch.equal(logits(model), before)


@every_host
@both_forms
def test_fresh_it_is_the_base_at_32_bits_and_near_it_below(build: Any, form: str) -> None:
    model = build()
    before = logits(model)
    attached(model, form=form, bits=32)
    assert torch.equal(logits(model), before)
    for bits in (1, 2, 4, 8):
        aa.detach(model)
        adapter = attached(model, form=form, bits=bits)
        assert 0 < (logits(model) - before).abs().max() < 0.1
        ups = [tensor for name, tensor in adapter.tensors().items() if "adapter_up" in name]
        assert max(up.abs().max() for up in ups) <= 2e-3
        assert all(v.unique().numel() <= 2**bits for v in adapter.values().values())


# ------------------------------------------------------------------ formulas


def test_adaptformer_reads_what_is_not_normalised_and_adds_beside_the_feed_forward() -> None:
    model = classifier()
    adapter = attached(model, scale=10.0, std=0.3)
    layer, w = model.get_submodule("vit.layers.1"), adapter.values()
    down, up = (w[f"vit.layers.1.adapter_{side}.weight"] for side in ("down", "up"))
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        residual = x + layer.attention(layer.layernorm_before(x), None)[0]
        expected = residual + layer.mlp(layer.layernorm_after(residual)) + 10.0 * F.relu(residual @ down.T) @ up.T
        torch.testing.assert_close(layer(x, None), expected)


def test_adaptformer_acts_where_the_layer_drops_its_feed_forward() -> None:
    model = timm_like()
    adapter = attached(model, std=0.3)
    block: Any = model.get_submodule("blocks.0")
    down, up = (adapter.values()[f"blocks.0.adapter_{side}.weight"] for side in ("down", "up"))
    handle = block.mlp.register_forward_hook(lambda module, given, out: out * 0)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        residual = x + block.attn(block.norm1(x))
        torch.testing.assert_close(block(x), residual + F.relu(residual @ down.T) @ up.T)
    handle.remove()


@every_host
def test_lora_adds_to_queries_and_values_and_not_to_keys(build: Any) -> None:
    model = build()
    adapter = attached(model, form="lora", scale=0.5, std=0.3)
    x, values = torch.randn(2, 5, 16), list(adapter.values().values())
    deltas = [0.5 * x @ down.T @ up.T for down, up in zip(values[4::2], values[5::2])]  # of the second layer: q, v
    with torch.no_grad():
        if build is classifier:
            attention = model.get_submodule("vit.layers.1.attention")
            parts = [attention.q_proj, attention.k_proj, attention.v_proj]
            found = [part(x) for part in parts]
            with aa.disabled(model):
                before = [part(x) for part in parts]
        else:
            qkv = model.get_submodule("blocks.1.attn.qkv")
            found = list(qkv(x).chunk(3, dim=-1))
            with aa.disabled(model):
                before = list(qkv(x).chunk(3, dim=-1))
    assert torch.equal(found[1], before[1])
    torch.testing.assert_close(found[0], before[0] + deltas[0])
    torch.testing.assert_close(found[2], before[2] + deltas[1])


@both_forms
def test_the_same_adapter_on_split_and_fused_projections(form: str) -> None:
    """transformers' model and timm's, with the same weights, and the same adapter on both."""
    ours, theirs = classifier(), timm_like()
    state = {}
    for name, tensor in theirs.state_dict().items():
        name = name.replace("blocks.", "vit.layers.").replace("norm1", "layernorm_before")
        name = name.replace("norm2", "layernorm_after").replace("attn.proj", "attention.o_proj")
        name = name.replace("patch_embed.proj", "vit.embeddings.patch_embeddings.projection")
        name = name.replace("cls_token", "vit.embeddings.cls_token").replace("head.", "classifier.")
        name = name.replace("pos_embed", "vit.embeddings.position_embeddings")
        name = f"vit.layer{name}" if name.startswith("norm.") else name
        if "attn.qkv" in name:
            parts = zip("qkv", tensor.chunk(3))
            state |= {name.replace("attn.qkv", f"attention.{p}_proj"): part for p, part in parts}
        else:
            state[name] = tensor
    ours.load_state_dict(state)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=1e-4)
    first = attached(ours, form=form, std=0.3, head_classes=7)
    second = attached(theirs, form=form, head_classes=7)
    assert [t.shape for t in first.tensors().values()] == [t.shape for t in second.tensors().values()]
    second.load_tensors(dict(zip(second.tensors(), first.tensors().values())))
    assert logits(ours).shape == (3, 7)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=1e-4)


def test_dropout_is_between_down_and_up_and_in_training_only() -> None:
    model = classifier()
    adapter = attached(model, dropout=0.5, std=0.3)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    branch: Any = adapter.placements[0].branch
    ones = torch.ones(1, 4)
    torch.manual_seed(0)
    kept = branch.dropout(ones)
    assert set(kept.unique().tolist()) <= {0.0, 2.0}
    torch.manual_seed(0)
    x = torch.randn(1, 16, generator=torch.Generator().manual_seed(2))
    hidden = F.relu(F.linear(x, branch.adapter_down.weight)) * kept
    torch.testing.assert_close(branch.a(x), F.linear(hidden, branch.adapter_up.weight))


# ------------------------------------------------------------------ the head


@every_host
@pytest.mark.parametrize("bits", [1, 2, 32])
def test_a_new_head_runs_in_the_place_of_the_base_s(build: Any, bits: int) -> None:
    model = build()
    before = logits(model)
    adapter = attached(model, head_classes=9, head_bits=bits)
    name = "classifier" if build is classifier else "head"
    head = adapter.values()[f"{name}.head.weight"]
    assert head.unique().numel() == (2**bits if bits < 32 else 9 * 16)
    assert (f"{name}.head.bias" in adapter.tensors()) == (bits == 32)
    assert logits(model).shape == (3, 9)
    x = torch.randn(4, 16)
    bias = adapter.tensors().get(f"{name}.head.bias")
    torch.testing.assert_close(model.get_submodule(name)(x), F.linear(x, head, bias))
    aa.detach(model)
    assert torch.equal(logits(model), before)


def test_hosts_without_a_head() -> None:
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**SIZES, **IMAGE)).eval()
    before = model(PIXELS).last_hidden_state
    attached(model, std=0.3)
    assert not torch.allclose(model(PIXELS).last_hidden_state, before, atol=1e-3)
    with pytest.raises(aa.TargetError, match="'head' matches no module of ViTModel"):
        aa.attach(model, aa.BiAdapterConfig(head_classes=3), "headed")
    empty = ViTForImageClassification(ViTConfig(**SIZES, **IMAGE, num_labels=0)).eval()
    attached(empty, head_classes=3)
    assert logits(empty).shape == (3, 3)


def test_the_groups_train_apart() -> None:
    model = classifier()
    adapter = attached(model, head_classes=3)
    adapter.train_only("head")
    assert [name for name, p in adapter.named_parameters() if p.requires_grad] == [
        name for name, _ in adapter.named_parameters() if "head" in name
    ]
    adapter.train_only("adapters")
    assert sum(p.requires_grad for p in adapter.parameters()) == 4


# ------------------------------------------------------------------ training, files


@every_host
@both_forms
@pytest.mark.parametrize("head_bits", [1, 32])
def test_it_trains_and_its_file_answers_alike(build: Any, form: str, head_bits: int, tmp_path: Path) -> None:
    model, labels = build(), torch.tensor([0, 1, 2])
    adapter = attached(model, form=form, head_classes=3, head_bits=head_bits)
    model.train()
    optimizer, losses = torch.optim.AdamW(adapter.parameters(), lr=1e-2), []
    for _ in range(60):
        out = model(PIXELS)
        loss = F.cross_entropy(out if isinstance(out, Tensor) else out.logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    mine = {id(p) for p in adapter.parameters()}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert all(p.grad is None for p in model.parameters() if id(p) not in mine)
    model.eval()
    answers, other = logits(model), build()
    loaded = aa.load(other, aa.save_pretrained(model, tmp_path / "a"))
    assert torch.equal(logits(other), answers)
    assert loaded.config == adapter.config
    assert quantised(loaded) == quantised(adapter)
    assert {m.data.numpy().tobytes() for m in packed(loaded).values()} == {
        m.data.numpy().tobytes() for m in packed(adapter).values()
    }


def test_a_copy_and_gradient_checkpointing() -> None:
    model = classifier()
    adapter = attached(model, std=0.3, dropout=0.0)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        model.train()
        adapter.zero_grad()
        model(PIXELS).logits.pow(2).mean().backward()
        gradients.append([p.grad.clone() for p in adapter.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(adapter.parameters()))
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed)


@settings(max_examples=20, deadline=None)
@given(
    width=st.integers(1, 4),
    hidden=st.integers(1, 9),
    bits=st.sampled_from([1, 2, 4, 8]),
    form=st.sampled_from(["adaptformer", "lora"]),
    seed=st.integers(0, 99),
)
def test_of_any_size_packed_is_what_was_trained(width: int, hidden: int, bits: int, form: str, seed: int) -> None:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 4 * width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 5}
    model = ViTForImageClassification(ViTConfig(**sizes, **IMAGE, num_labels=2)).eval()
    adapter = aa.attach(model, aa.BiAdapterConfig(form=form, hidden=hidden, bits=bits, head_classes=3))
    expected = logits(model)
    aa.pack(adapter)
    assert torch.equal(logits(model), expected)


# ------------------------------------------------------------------ merging


@every_host
@pytest.mark.parametrize("bits", [1, 32])
def test_lora_merges_and_the_base_comes_back(build: Any, bits: int) -> None:
    model = build()
    before, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    adapter = attached(model, form="lora", bits=bits, scale=2.0, std=0.2, head_classes=5, head_bits=1)
    adapter.scale = 0.5
    answers = logits(model)
    aa.merge(model)
    torch.testing.assert_close(logits(model), answers, atol=1e-4, rtol=1e-4)
    aa.unmerge(model)
    aa.detach(model)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_what_cannot_be_merged_says_why() -> None:
    model = classifier()
    attached(model, std=0.2)
    with pytest.raises(aa.AttachError, match="not linear"):
        aa.merge(model)
    aa.detach(model)
    attached(model, form="lora", head_classes=9)
    with pytest.raises(aa.AttachError, match=r"head \(9, 16\) cannot be merged"):
        aa.merge(model)


# ------------------------------------------------------------------ settings and hosts


@pytest.mark.parametrize(
    "wrong",
    [
        {"form": "series"},
        {"hidden": 0},
        {"bits": 3},
        {"head_bits": 16},
        {"bits": True},
        {"scale": float("inf")},
        {"dropout": 1.0},
        {"head_classes": 0},
        {"pixel_std": (1.0, 0.0, 1.0)},
        {"pixel_std": (1.0,)},
        {"pixel_mean": (float("nan"), 0.0, 0.0)},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(aa.ConfigError, match=f"{next(iter(wrong))} is"):
        aa.BiAdapterConfig(**wrong)


def test_normalisation_is_a_stored_setting(tmp_path: Path) -> None:
    model, other = classifier(), classifier()
    adapter = attached(model)
    assert torch.equal(adapter.normalise(PIXELS), PIXELS)  # as the paper's adapters take them
    aa.detach(model)
    adapter = attached(model, pixel_mean=(0.5, 0.4, 0.3), pixel_std=(0.5, 0.25, 1.0))
    expected = torch.stack([(PIXELS[:, 0] - 0.5) / 0.5, (PIXELS[:, 1] - 0.4) / 0.25, PIXELS[:, 2] - 0.3], dim=1)
    torch.testing.assert_close(adapter.normalise(PIXELS), expected)
    loaded: Any = aa.load(other, aa.save_pretrained(model, tmp_path / "a"))
    torch.testing.assert_close(loaded.normalise(PIXELS), expected)


@both_forms
@pytest.mark.parametrize("name", ["bert", "llama", "bloom", "gpt2", "sd15"])
def test_other_hosts_are_refused_with_what_to_do(name: str, form: str) -> None:
    model = case(name).build()
    with pytest.raises(aa.TargetError, match=r"is for vision transformers.* anyadapter\.quantize"):
        aa.attach(model, aa.BiAdapterConfig(form=form))
    assert not aa.adapters(model)


@both_forms
def test_other_vision_transformers_are_taken(form: str) -> None:
    family = case("clip")
    model = family.build()
    with torch.no_grad():
        before = family.output(model(**family.inputs(model, 2)))
        attached(model, form=form, std=0.3)
        assert not torch.allclose(family.output(model(**family.inputs(model, 2))), before, atol=1e-4)
        aa.detach(model)
        assert torch.equal(family.output(model(**family.inputs(model, 2))), before)
