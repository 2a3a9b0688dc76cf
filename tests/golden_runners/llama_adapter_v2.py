"""LLaMA-Adapter V2 and V1: the authors' models, rebuilt on transformers' own LLaMA."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_cases import Golden
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, LlamaConfig, LlamaForCausalLM

import anyadapter as aa
from anyadapter.core.attach import build
from anyadapter.formats.llama_adapter import LAYOUTS, Kind, halves, read_official, theirs, write_official
from anyadapter.methods.language.llama_adapter import LlamaAdapter
from anyadapter.parts.visual_tokens import clip_features

# Meta's names in a layer, and transformers'.
LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}

CLIP = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def run(case: Golden) -> None:
    """Dispatch on the class that ran."""
    runs = {
        "alpaca_finetuning_v1/llama/model.py": train,
        "llama/model.py": infer,
        "llama_adapter_v2_chat65b/llama/model.py": chat,
        "llama_adapter_v2_multimodal7b/llama/llama_adapter.py + llama.py": multimodal,
        "accessory/model/LLM/llama_adapter.py": accessory,
    }
    file = case.about["official"]["file"]
    if file not in runs:
        pytest.fail(f"{case.name}: no runner for {file}")
    runs[file](case)


def train(case: Golden) -> None:
    """Logits, loss, gradients; tanh on the gate."""
    model, adapter = attached(case, "v1", activation="tanh")
    learn(case, model, adapter, "v1")
    assert len(case.part("grad")) == case.about["config"]["adapter_layer"] + 1
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("anyadapter"))


def infer(case: Golden) -> None:
    """A prompt and then one token at a time from a cache; the raw gate."""
    model, _ = attached(case, "v1", activation="identity")
    tokens = case.tensors["in/tokens"]
    last = decode(case, model, tokens, "prefill_logits", "step{}_logits")
    case.close(model(input_ids=tokens).logits[:, -1], f"out/{last}")


def chat(case: Golden) -> None:
    """Scales on inputs, biases and norms, with a prefix or without."""
    model, adapter = attached(case, "chat")
    learn(case, model, adapter, "chat")
    decode(case, model, case.tensors["in/tokens"])


def accessory(case: Golden) -> None:
    """The refactored layout; the loss is the mean square of the logits."""
    model, adapter = attached(case, "accessory")
    logits = model(input_ids=case.tensors["in/tokens"]).logits
    case.close(logits, "out/logits")
    logits.pow(2).mean().backward()
    compare_gradients(case, model, adapter, "accessory")
    assert adapter.parameter_count() == case.tensors["out/n_trainable"].item()
    decode(case, model, case.tensors["in/tokens"])


def multimodal(case: Golden) -> None:
    """Images as CLIP's features, by transformers' CLIP with the case's weights; both phases of training."""
    features = clip_features(clip(case), case.tensors["in/imgs"])
    case.close(features, "out/clip_feats")
    model, adapter = attached(case, "multimodal", visual_heads=case.about["config"]["visual"]["v_num_heads"])
    with aa.signals(model, visual_features=features):
        for phase, groups in {"pretrain": ("visual", "prompts"), "finetune": ("norms", "biases")}.items():
            adapter.zero_grad()
            adapter.train_only(*groups)
            learn(case, model, adapter, "multimodal", f"{phase}:")
            trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
            trained += sum(gate.numel() for gate in adapter.buffers()) if phase == "pretrain" else 0  # of idle layers
            assert trained == case.tensors[f"out/n_trainable_{phase}"].item()
        case.close(adapter.visual(features), "out/visual_query")
        decode(case, model, case.tensors["in/tokens"])


def learn(case: Golden, model: nn.Module, adapter: LlamaAdapter, layout: Kind, phase: str = "") -> None:
    """Logits, their cross-entropy where the label is not 0, and its gradients."""
    labels = case.tensors["in/labels"]
    logits = model(input_ids=case.tensors["in/tokens"]).logits
    case.close(logits, "out/logits")
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=0)
    case.close(loss, "out/loss")
    loss.backward()
    compare_gradients(case, model, adapter, layout, phase)


def compare_gradients(case: Golden, model: nn.Module, adapter: LlamaAdapter, layout: Kind, phase: str = "") -> None:
    """Just the official ones exist, under their names and in their order of features."""
    named = {name: parameter.grad for name, parameter in adapter.named_parameters()}
    twin = build(aa.Host.of(model), adapter.config, "twin")
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.fill_(float("nan")) if named[name] is None else parameter.copy_(named[name])
        for buffer in twin.buffers():
            buffer.fill_(float("nan"))
    official = theirs(twin, aa.Host.of(model), LAYOUTS[layout])
    mine = {name: tensor for name, tensor in official.items() if not tensor.isnan().all()}
    assert set(mine) == {name.removeprefix(phase) for name in case.part("grad") if name.startswith(phase)}
    for name, grad in mine.items():
        case.close(grad, f"grad/{phase}{name}")


@torch.no_grad()
def decode(
    case: Golden, model: nn.Module, tokens: Tensor, first: str = "infer_prefill", later: str = "infer_step{}"
) -> str:
    """A prompt, and then one token at a time from a cache; returns the name of the last output."""
    steps = sum(re.fullmatch("out/" + later.format(r"\d+"), key) is not None for key in case.tensors)
    out = model(input_ids=tokens[:, :-steps], use_cache=True)
    case.close(out.logits[:, -1], f"out/{first}")
    for step in range(steps):
        at = tokens.shape[1] - steps + step
        out = model(input_ids=tokens[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        case.close(out.logits[:, -1], f"out/{later.format(step)}")
    return later.format(steps - 1)


def attached(case: Golden, layout: Kind, **settings: Any) -> tuple[LlamaForCausalLM, LlamaAdapter]:
    """The base with the case's adapter in place, after the round trip of its file."""
    state, config = case.part("state"), case.about["config"]
    model = base(case)
    host = aa.Host.of(model)
    official = {name: tensor for name, tensor in state.items() if not is_base(name, config)}
    length = config.get("adapter_len", 1)
    found, tensors = read_official({"model": official}, host, layout, length=length, **settings)
    adapter = aa.attach(model, found)
    assert isinstance(adapter, LlamaAdapter)
    adapter.load_tensors(tensors)
    again = write_official(adapter, host, layout)
    again = again.get("model", again)
    assert set(again) == set(official)
    assert all(
        again[k].dtype == v.dtype and again[k].numpy().tobytes() == v.numpy().tobytes() for k, v in official.items()
    )
    return model, adapter


def is_base(name: str, config: dict[str, Any]) -> bool:
    """Whether a tensor of the official model is not the adapter's; norms are its own where they are trained."""
    if name.endswith("norm.weight"):
        return not config.get("train_norm", config.get("norm_tuning", "llama" in config))
    linears = (f".{w}.weight" for w in ("wq", "wk", "wv", "wo", "w1", "w2", "w3"))
    return name.startswith("clip.") or name.endswith(("tok_embeddings.weight", "output.weight", *linears))


def clip(case: Golden) -> CLIPVisionModelWithProjection:
    """transformers' CLIP with the weights of the case."""
    about = case.about["config"]["clip"]
    state = {
        name.removeprefix("clip.visual."): t
        for name, t in case.part("state").items()
        if name.startswith("clip.visual.")
    }
    width = about["vision_width"]
    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            num_hidden_layers=about["vision_layers"],
            num_attention_heads=width // 64,
            image_size=about["image_resolution"],
            patch_size=about["vision_patch_size"],
            projection_dim=about["embed_dim"],
        )
    ).eval()
    weights = {
        "vision_model.embeddings.class_embedding": state["class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "visual_projection.weight": state["proj"].T.contiguous(),
    }
    for kind in ("weight", "bias"):
        weights[f"vision_model.pre_layrnorm.{kind}"] = state[f"ln_pre.{kind}"]
        weights[f"vision_model.post_layernorm.{kind}"] = state[f"ln_post.{kind}"]
        for i in range(about["vision_layers"]):
            theirs, ours = f"transformer.resblocks.{i}", f"vision_model.encoder.layers.{i}"
            for part, rows in zip("qkv", state[f"{theirs}.attn.in_proj_{kind}"].chunk(3)):
                weights[f"{ours}.self_attn.{part}_proj.{kind}"] = rows
            for a, b in CLIP.items():
                weights[f"{ours}.{b}.{kind}"] = state[f"{theirs}.{a}.{kind}"]
    model.load_state_dict(weights)
    return model


def base(case: Golden) -> LlamaForCausalLM:
    """transformers' LLaMA with the weights of the case, all of them."""
    state = {re.sub(r"^(llama|llma)\.", "", name): tensor for name, tensor in case.part("state").items()}
    about = case.about["config"].get("llama", case.about["config"])
    heads, dim = about["n_heads"], about["dim"]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=state["tok_embeddings.weight"].shape[0],
            hidden_size=dim,
            intermediate_size=state["layers.0.feed_forward.w1.weight"].shape[0],
            num_hidden_layers=about["n_layers"],
            num_attention_heads=heads,
            num_key_value_heads=state["layers.0.attention.wk.weight"].shape[0] * heads // dim,
            rms_norm_eps=about["norm_eps"],
            tie_word_embeddings=False,
        )
    ).eval()
    weights = {
        "model.embed_tokens.weight": state["tok_embeddings.weight"],
        "model.norm.weight": state["norm.weight"],
        "lm_head.weight": state["output.weight"],
    }
    for i in range(about["n_layers"]):
        for meta, ours in LAYER.items():
            weight = state[f"layers.{i}.{meta}.weight"]
            if meta in ("attention.wq", "attention.wk"):
                weight = halves(weight, dim // heads)
            weights[f"model.layers.{i}.{ours}.weight"] = weight
    model.load_state_dict(weights)
    return model
