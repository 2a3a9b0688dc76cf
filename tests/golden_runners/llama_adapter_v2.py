"""LLaMA-Adapter V2 and V1: the authors' models, rebuilt on transformers' own LLaMA."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden_cases import Golden
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import anyadapter as aa
from anyadapter.formats.llama_adapter import gates_of, read_official, write_official
from anyadapter.methods.language.llama_adapter import LlamaAdapter

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


def run(case: Golden) -> None:
    """Dispatch on the class that ran."""
    runs = {
        "alpaca_finetuning_v1/llama/model.py": train,
        "llama/model.py": infer,
    }
    file = case.about["official"]["file"]
    if file not in runs:
        pytest.fail(f"{case.name}: no runner for {file}")
    runs[file](case)


def train(case: Golden) -> None:
    """Logits, loss, gradients; tanh on the gate."""
    model, adapter = attached(case, "tanh")
    tokens, labels = case.tensors["in/tokens"], case.tensors["in/labels"]
    logits = model(input_ids=tokens).logits
    case.close(logits, "out/logits")
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=0)
    case.close(loss, "out/loss")
    loss.backward()
    grads = {f"layers.{i}.attention.gate": gate.grad for i, gate in enumerate(gates_of(adapter))}
    grads["adapter_query.weight"] = adapter.adapter_query.weight.grad
    mine = {name: grad for name, grad in grads.items() if grad is not None}
    assert set(mine) == set(case.part("grad"))
    assert len(mine) == case.about["config"]["adapter_layer"] + 1
    for name, grad in mine.items():
        case.close(grad, f"grad/{name}")
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("anyadapter"))


@torch.no_grad()
def infer(case: Golden) -> None:
    """A prompt and then one token at a time from a cache; the raw gate."""
    model, _ = attached(case, "identity")
    tokens = case.tensors["in/tokens"]
    steps = sum(key.startswith("out/step") for key in case.tensors)
    out = model(input_ids=tokens[:, :-steps], use_cache=True)
    case.close(out.logits[:, -1], "out/prefill_logits")
    for step in range(steps):
        at = tokens.shape[1] - steps + step
        out = model(input_ids=tokens[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        case.close(out.logits[:, -1], f"out/step{step}_logits")
    case.close(model(input_ids=tokens).logits[:, -1], f"out/step{steps - 1}_logits")


def attached(case: Golden, activation: str) -> tuple[LlamaForCausalLM, LlamaAdapter]:
    """The base with the case's adapter in place, after the round trip of its file."""
    state = case.part("state")
    model = base(case)
    official = {k: v for k, v in state.items() if k == "adapter_query.weight" or k.endswith(".attention.gate")}
    length = case.about["config"]["adapter_len"]
    config, tensors = read_official(official, aa.Host.of(model), length=length, activation=activation)
    assert config.last_layers == case.about["config"]["adapter_layer"]
    adapter = aa.attach(model, config)
    assert isinstance(adapter, LlamaAdapter)
    adapter.load_tensors(tensors)
    again = write_official(adapter)
    assert list(again) == [
        "adapter_query.weight",
        *(f"layers.{i}.attention.gate" for i in range(len(gates_of(adapter)))),
    ]
    assert set(again) == set(official)
    assert all(
        again[k].dtype == v.dtype and again[k].numpy().tobytes() == v.numpy().tobytes() for k, v in official.items()
    )
    return model, adapter


def base(case: Golden) -> LlamaForCausalLM:
    """transformers' LLaMA with the weights of the case, all of them."""
    state, about = case.part("state"), case.about["config"]
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


def halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection, from pairs to halves: Meta rotates (0, 1), (2, 3) …, transformers (0, n/2) …."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
