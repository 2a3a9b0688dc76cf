"""Bi-Adapters: the authors' quantised linear, their adapters in a whole vision transformer, and their files."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden_cases import Golden
from torch import Tensor, nn

import anyadapter as aa
from anyadapter.formats.bi_adapter import read_official, write_official
from anyadapter.parts.quantised import Packed, codebook, fake_quantise, pack_bits
from anyadapter.quantize import fill

STATISTICS_ULP = 1  # by how much the fp32 statistics in a file that we quantised may differ, says the case


def run(case: Golden) -> None:
    kinds = {"codebooks": codebooks, "qlinear": quantised_linear, "vit": whole_model, "published": published}
    kind = kinds.get(case.name.split("_")[0])
    if kind is None:
        pytest.fail(f"{case.name}: no runner knows this case")
    kind(case)


def codebooks(case: Golden) -> None:
    for bits in case.about["config"]["bits"]:
        codes, boundaries = codebook(bits)
        case.close(codes, f"out/code_bit{bits}")
        case.close(boundaries, f"out/boundary_bit{bits}")


def quantised_linear(case: Golden) -> None:
    """Forward and backward in training, the packed bytes, and the layer that is read from them."""
    about = case.about["config"]
    layer = nn.Linear(about["in"], about["out"], bias=False)
    layer.load_state_dict(case.part("state"))
    latent = layer.weight
    fake_quantise(layer, "weight", about["bits"])
    case.close(codebook(about["bits"])[0], "out/code")
    x = case.tensors["in/x"].requires_grad_()
    y = layer(x)
    case.close(y, "out/y")
    y.pow(2).mean().backward()
    case.close(latent.grad, "grad/weight")
    case.close(x.grad, "grad/in.x")
    packed = Packed.of(latent, about["bits"])
    assert torch.equal(packed.data, case.tensors["out/dump_bytes"])
    assert torch.equal(pack_bits(packed.codes(), about["bits"]), packed.data)
    case.close(torch.tensor([packed.mean]), "out/mean")
    case.close(torch.tensor([packed.std]), "out/std")
    case.close(packed.dequantise(), "out/dequantised_weight")
    case.close(F.linear(x, packed.dequantise()), "out/y_loaded")


# ------------------------------------------------------------------ whole models


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, bias: bool, eps: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=eps), Attention(width, heads, bias)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=eps), FeedForward(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """A vision transformer with the names and shapes of timm's."""

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        heads: int = 12,
        num_classes: int,
        img: int = 224,
        patch: int = 16,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layernorm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(embed_dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (img // patch) ** 2 + 1, embed_dim))
        inner = int(embed_dim * mlp_ratio)
        self.blocks = nn.Sequential(*(Block(embed_dim, heads, inner, qkv_bias, layernorm_eps) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim, eps=layernorm_eps)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def whole_model(case: Golden) -> None:
    """Logits and gradients in training, the file, and the logits of what is read from it."""
    about, x = case.about["config"], case.tensors["in/x"]
    model = base(case)
    form, bits = about["method"], about["bits"]
    config = aa.BiAdapterConfig(
        form=form,
        hidden=about["hidden"],
        bits=bits,
        scale=about["scale"],
        head_classes=about["num_classes"],
        head_bits=1 if about["bihead"] else 32,
    )
    adapter = aa.attach(model, config)
    names = official_names(adapter)
    state = case.part("state")
    adapter.load_tensors({mine: state[theirs] for mine, theirs in names.items()})
    model.eval()
    logits = model(x)
    case.close(logits, "out/logits")
    logits.pow(2).mean().backward()
    gradients = {names[name]: tensor.grad for name, tensor in adapter.tensors().items()}
    assert set(gradients) == set(case.part("grad"))
    for name, gradient in gradients.items():
        case.close(gradient, f"grad/{name}")
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("anyadapter"))
    if "out/bin_file" not in case.tensors:
        return
    official = bytes(case.tensors["out/bin_file"].tolist())
    almost_equal(write_official(adapter), official, adapter)
    aa.detach(model)
    adapter = loaded(model, official, form=form, bits=bits, scale=about["scale"], case=case)
    case.close(model(x), "out/logits_loaded")
    for name, tensor in adapter.tensors().items():
        case.close(tensor, f"out/loaded/{names[name]}")


def base(case: Golden) -> nn.Module:
    """The frozen model; the head in it is none that the case has."""
    about = case.about["config"]
    settings = {
        k: v
        for k, v in about.items()
        if k not in ("method", "bihead", "bits", "hidden", "scale", "seed", "act", "pool")
    }
    model = VisionTransformer(**settings)
    trained = ("adapter_", "lora_", "head.")
    state = {k: v for k, v in case.part("state").items() if not any(part in k for part in trained)}
    own = {k: v for k, v in model.state_dict().items() if k.startswith("head.")}
    model.load_state_dict(state | own)
    return model.eval()


def loaded(model: nn.Module, official: bytes, *, form: str, bits: int, scale: float, case: Golden) -> aa.Adapter:
    """The adapter of an official file, attached, after writing it again to the same bytes."""
    about = case.about["config"]
    config, values = read_official(
        official,
        aa.Host.of(model),
        form=form,
        hidden=about["hidden"],
        bits=bits,
        classes=about["num_classes"],
        scale=scale,
        bihead=about.get("bihead", about["method"].endswith("-bihead")),
    )
    adapter = aa.attach(model, config)
    fill(adapter, values)
    model.eval()
    assert write_official(adapter) == official
    return adapter


def official_names(adapter: aa.Adapter) -> dict[str, str]:
    """The authors' name of each tensor."""
    return {
        name: name.replace("attn.qkv.lora", "attn.lora").replace("head.head.", "head.")
        if "qkv" in name or "head" in name
        else name.replace(".adapter_", ".adapter_mlp.adapter_")
        for name in adapter.tensors()
    }


def almost_equal(mine: bytes, official: bytes, adapter: aa.Adapter) -> None:
    """The same bytes, but that the statistics may be the neighbouring fp32 numbers."""
    assert len(mine) == len(official)
    config, at = adapter.config, 0
    for name, tensor in adapter.tensors().items():
        bits = config.head_bits if ".head." in name else config.bits
        end = at + tensor.numel() * bits // 8
        assert mine[at:end] == official[at:end], name
        at = end
        if bits != 32:
            pair = [torch.frombuffer(bytearray(b[at : at + 8]), dtype=torch.int32) for b in (mine, official)]
            assert (pair[0] - pair[1]).abs().max() <= STATISTICS_ULP, name
            at += 8
    assert at == len(mine)


# ------------------------------------------------------------------ a file that they published


def published(case: Golden) -> None:
    """Read into a base of its size, and written again."""
    about = case.about["config"]
    with torch.device("meta"):
        model = VisionTransformer(embed_dim=about["embed_dim"], depth=about["depth"], num_classes=about["num_classes"])
    model.to_empty(device="cpu")
    official = bytes(case.tensors["in/bin_file"].tolist())
    form = about["method"].removesuffix("-bihead")
    adapter = loaded(model, official, form=form, bits=about["bits"], scale=about["scale_from_yaml"], case=case)
    names = official_names(adapter)
    expected = case.part("out")
    for name, tensor in adapter.tensors().items():
        statistics = torch.stack([tensor.mean(), tensor.std(), tensor.min(), tensor.max()])
        case.close(statistics, f"out/stat/{names[name]}")
        if names[name] in expected:
            case.close(tensor, f"out/{names[name]}")
    assert {f"stat/{name}" for name in names.values()} == {name for name in expected if name.startswith("stat/")}
