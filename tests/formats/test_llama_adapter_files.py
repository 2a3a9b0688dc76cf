"""The files of LLaMA-Adapter's authors: read strictly, written back byte for byte, in Meta's order of features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import case
from torch import Tensor, nn

import anyadapter as aa
from anyadapter.formats.llama_adapter import LAYOUTS, halves, pairs, read_official, write_official

HEADS, DIM, WIDTH, INNER, KEYS = 4, 4, 16, 24, 8
LINEARS = {"attention.wq": (WIDTH, WIDTH), "attention.wk": (WIDTH, KEYS), "attention.wv": (WIDTH, KEYS),
           "attention.wo": (WIDTH, WIDTH), "feed_forward.w1": (WIDTH, INNER), "feed_forward.w2": (INNER, WIDTH),
           "feed_forward.w3": (WIDTH, INNER)}  # fmt: skip
IDS = torch.tensor([[5, 9, 3, 33, 21, 60, 7]])


def base() -> nn.Module:
    return case("llama").build().requires_grad_(False)


def visual(width: int = 8, features: int = 6, length: int = 3) -> dict[str, Tensor]:
    """The visual path as their files name it."""
    shapes: dict[str, tuple[int, ...]] = {
        "clip_proj.weight": (width, features), "visual_proj.weight": (WIDTH, width), "visual_query.weight": (length, width),
        "visual_blocks.0.attn.qkv.weight": (3 * width, width), "visual_blocks.0.attn.proj.weight": (width, width),
        "visual_blocks.0.mlp.fc1.weight": (4 * width, width), "visual_blocks.0.mlp.fc2.weight": (width, 4 * width),
    }  # fmt: skip
    shapes |= {k.replace("weight", "bias"): v[:1] for k, v in shapes.items() if "query" not in k}
    norms = {
        "clip_proj_norm": width,
        "visual_proj_norm": WIDTH,
        "visual_blocks.0.norm1": width,
        "visual_blocks.0.norm2": width,
    }
    shapes |= {f"{name}.{kind}": (size,) for name, size in norms.items() for kind in ("weight", "bias")}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def norms(start: str) -> dict[str, Tensor]:
    names = [f"layers.{i}.{name}" for i in range(2) for name in ("attention_norm", "ffn_norm")]
    return {f"{start}{name}.weight": torch.randn(WIDTH) for name in (*names, "norm")}


def of_linears(
    start: str, bias: str = "", scale: str = "", low: tuple[str, str] = ("", ""), skip: str = ""
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for i in range(2):
        for path, (wide, out) in LINEARS.items():
            block, w = path.split(".")
            for leaf, shape in ((bias, (out,)), (scale, (wide,)), (low[0], (2, wide)), (low[1], (out, 2))):
                if leaf and not (leaf == bias and w in skip.split()):
                    found[f"{start}layers.{i}.{leaf.format(block=block, w=w)}"] = torch.randn(shape)
    return found


def official(kind: str) -> dict[str, Any]:
    """A file as the authors' class would save it; two layers, prompts in the last."""
    torch.manual_seed(0)
    gate = {f"layers.{i}.attention.gate": torch.randn(1, HEADS, 1, 1) for i in range(2)}
    query = {"adapter_query.weight": torch.randn(3, WIDTH)}
    if kind == "v1":
        return {**query, **gate}
    if kind == "chat":
        parts = of_linears("", "{block}.{w}_bias", "{block}.{w}_scale")
        return {"model": {**query, "layers.1.attention.gate": gate["layers.1.attention.gate"], **parts, **norms("")}}
    if kind == "multimodal":
        low = ("{block}.lora_{w}_l1.weight", "{block}.lora_{w}_l2.weight")
        gates = {f"llama.{name}": tensor for name, tensor in gate.items()}
        gates |= {name.replace("gate", "new_gate"): torch.randn(1, 1, 1, 1) for name in gates}
        parts = of_linears("llama.", "{block}.{w}.bias", low=low, skip="wk wv")
        model = {**query, **gates, **visual(), **parts, **norms("llama.")}
        return {"model": model, "config": {"w_bias": True, "w_lora": True, "lora_rank": 2}}
    low = ("{block}.{w}.lora_a.weight", "{block}.{w}.lora_b.weight")
    packed = {"llma.prefix": torch.randn(1, 1, 3, WIDTH), "llma.prefix_gate": torch.randn(1, HEADS)}
    packed["llma.prefix_new_gate"] = torch.randn(1)
    seen = {f"llma.{name}": tensor for name, tensor in visual().items()}
    seen["llma.visual_query"] = seen.pop("llma.visual_query.weight")
    return {"model": {**packed, **seen, **of_linears("llma.", "{block}.{w}.bias", low=low), **norms("llma.")}}


kinds = pytest.mark.parametrize("kind", LAYOUTS)


def loaded(kind: Any, file: Any, model: nn.Module, **settings: Any) -> aa.Adapter:
    config, tensors = read_official(file, aa.Host.of(model), kind, length=3, visual_heads=2, **settings)
    adapter = aa.attach(model, config)
    adapter.load_tensors(tensors)
    return adapter


@kinds
def test_a_file_comes_back_byte_for_byte(kind: Any, tmp_path: Path) -> None:
    file, model = official(kind), base()
    torch.save(file, tmp_path / "adapter.pth")
    with pytest.raises(aa.ArtefactError, match="allow_pickle=True"):
        read_official(tmp_path / "adapter.pth", aa.Host.of(model), kind)
    adapter = loaded(kind, tmp_path / "adapter.pth", model, allow_pickle=True)
    again = write_official(adapter, aa.Host.of(model), kind)
    assert again.keys() == file.keys()
    assert again.get("config") == file.get("config")
    mine, theirs = again.get("model", again), file.get("model", file)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())


def test_what_the_files_say_is_what_the_presets_are() -> None:
    host = aa.Host.of(base())
    for kind, preset, given in (
        ("chat", "v2-chat", {"length": 3}),
        ("multimodal", "v2-mm-lora", {"visual_length": None}),
    ):
        config, _ = read_official(official(kind), host, kind, visual_heads=2)
        wanted = aa.LlamaAdapterConfig.preset(preset, **{"last_layers": 1, "length": 3, **given})
        sizes = {"lora_rank", "visual_features", "visual_width", "visual_depth", "visual_heads", "visual_ratio"}
        differ = {key for key, value in config.to_dict().items() if value != wanted.to_dict()[key]}
        assert differ <= sizes, differ


def test_older_files_spell_the_language_model_otherwise() -> None:
    file = official("multimodal")
    older = {"model": {k.replace("llama.", "llma."): v for k, v in file["model"].items()}, "config": file["config"]}
    again = write_official(loaded("multimodal", older, model := base()), aa.Host.of(model), "multimodal")
    assert again["model"].keys() == file["model"].keys()


def test_a_file_of_text_alone_and_one_without_biases() -> None:
    for part in ("lora", ".bias", "norm.weight"):
        model, file = base(), official("multimodal")["model"]
        less = {name: tensor for name, tensor in file.items() if not (name.startswith("llama.") and part in name)}
        adapter = loaded("multimodal", {"model": less}, model)
        assert write_official(adapter, aa.Host.of(model), "multimodal")["model"].keys() == less.keys()
    model = base()
    text = {k: v for k, v in official("accessory")["model"].items() if "visual" not in k and "clip" not in k}
    adapter = loaded("accessory", {"model": text}, model)
    assert adapter.reads == ()
    assert write_official(adapter, aa.Host.of(model), "accessory")["model"].keys() == text.keys()


@pytest.mark.parametrize(("w", "heads"), [("wq", HEADS), ("wk", 2)])
def test_queries_and_keys_are_turned_to_the_hosts_order(w: str, heads: int) -> None:
    """Of a bias, by what it does: rotated in pairs and in halves, the two orders give the same scores."""
    file, model = official("chat"), base()
    adapter = loaded("chat", file, model)
    bias = file["model"][f"layers.0.attention.{w}_bias"]
    mine = adapter.tensors()[f"model.layers.0.self_attn.{w[1]}_proj.affine.bias"].detach()
    assert not torch.equal(mine, bias)
    for theirs, ours in zip(bias.view(heads, DIM), mine.view(heads, DIM)):
        assert torch.equal(theirs.view(-1, 2).T.flatten(), ours)
    assert torch.equal(pairs(halves(bias, DIM), DIM), bias)
    values = file["model"]["layers.0.attention.wv_bias"]  # values are not rotated
    assert torch.equal(adapter.tensors()["model.layers.0.self_attn.v_proj.affine.bias"], values)


@kinds
def test_a_wrong_file_is_refused(kind: Any) -> None:
    host = aa.Host.of(base())
    file = official(kind)
    good = file.get("model", file)

    def refused(changed: dict[str, Tensor]) -> bool:
        try:
            read_official({"model": changed}, host, kind, length=3, visual_heads=2)
        except (aa.ArtefactError, aa.ConfigError):
            return True
        return False

    unmissed = [name for name in good if not refused({k: v for k, v in good.items() if k != name})]
    # Without it the final norm is the base's, and the second gates are 1: other adapters, whose files these are.
    assert set(unmissed) <= {"norm.weight", "llama.norm.weight", "llma.norm.weight", "llma.prefix_new_gate"}
    for name, tensor in good.items():
        assert refused({**good, name: tensor.new_zeros(5, *tensor.shape)}), name
    with pytest.raises(aa.ArtefactError, match="not known tok_embeddings.weight"):
        read_official(
            {"model": {**good, "tok_embeddings.weight": torch.zeros(3)}}, host, kind, length=3, visual_heads=2
        )


def test_what_has_no_place_in_a_file_is_refused() -> None:
    model = base()
    host = aa.Host.of(model)
    for settings, kind, message in (
        ({"norms": "final_norm"}, "v1", "no place for model.norm.norm.weight"),
        ({"scales": "q_proj"}, "chat", "scale_position is 'input'; here it is not"),
        (
            {"scales": "q_proj", "scale_position": "input"},
            "multimodal",
            "no place for model.layers.0.self_attn.q_proj.affine",
        ),
        ({"lora_rank": 2}, "multimodal", "prompt_lora is False; here it is not"),
        ({"biases": "lm_head"}, "chat", "no place for lm_head.affine.bias"),
        ({"visual": "early", "visual_width": 16}, "multimodal", "no place for early_gate"),
    ):
        adapter = aa.attach(model, aa.LlamaAdapterConfig(length=2, last_layers=1, **settings))
        with pytest.raises(aa.ArtefactError, match=message):
            write_official(adapter, host, kind)
        aa.detach(model)
    with pytest.raises(aa.ArtefactError, match="A LoRA does not fit"):
        write_official(aa.attach(model, aa.LoRAConfig()), host)
    with pytest.raises(aa.ArtefactError, match=r"no layout 'chatt'. Did you mean 'chat'"):
        read_official(official("chat"), host, "chatt")  # type: ignore[arg-type]
    with pytest.raises(aa.ArtefactError, match="transformers' LLaMA, not of OPTForCausalLM"):
        read_official(official("v1"), aa.Host.of(case("opt").build()))
    with pytest.raises(aa.ArtefactError, match="a single number; these are: adapter_query.weight"):
        read_official({**official("v1"), "adapter_query.weight": torch.tensor(1.0)}, host)
    with pytest.raises(aa.ArtefactError, match="not a multiple of 0"):
        read_official(official("v1"), host, length=0)
    with pytest.raises(aa.ArtefactError, match=r"holds: weight"):
        read_official({"model": {"weight": torch.zeros(1)}}, host, "chat")
