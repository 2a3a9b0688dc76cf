"""MHR: the authors' routed adapters, and PEFT's, on a whole tiny T5."""

from __future__ import annotations

import json
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from golden_cases import Golden
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import anyadapter as aa
from anyadapter.formats.layouts import by_name
from anyadapter.formats.mhr import read_official, write_official
from anyadapter.methods.language.mhr import MHR
from anyadapter.training.objectives import label_smoothed_loss

PARTS = (".lora_a", ".lora_b", ".selector.module_logits", ".selector.module_probs")
ROOT, NAMED = "base_model.model.", ".default"  # of PEFT's keys; the second stands in a model's, not in a file's


def run(case: Golden) -> None:
    """Logits, loss, weights and gradients, after the round trip of the file."""
    model = base(case)
    adapter = from_peft(model, case) if "peft_config" in case.about else from_official(model, case)
    model.train(bool(case.about.get("train_mode")))
    if (seed := case.about.get("rng_seed_before_forward")) is not None:
        torch.manual_seed(seed)
    inputs = case.part("in")
    ids, labels = inputs.pop("task_ids"), inputs.pop("labels", None)
    with aa.signals(model, task_ids=ids) if adapter.reads else nullcontext():
        logits = model(**inputs).logits
    case.close(logits, "out/logits")
    if labels is not None:
        case.close(label_smoothed_loss(logits, labels).reshape(1), "out/label_smoothed_loss")
    check_weights(adapter, ids, case)
    logits.pow(2).mean().backward()
    check_gradients(model, adapter, case)


def base(case: Golden) -> nn.Module:
    """The frozen T5: what of ``state/`` is not the adapter's, without the names the wrappers gave."""
    dims: dict[str, Any] = case.about["base_model"]["dims"]
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=dims["v"],
            d_model=dims["d"],
            d_kv=dims["kv"],
            d_ff=dims["ff"],
            num_layers=dims["layers"],
            num_heads=dims["heads"],
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            dropout_rate=0.0,
        )
    ).eval()
    state = {
        name.removeprefix(ROOT).replace(".base_layer.", ".").replace(".layer.weight", ".weight"): tensor
        for name, tensor in case.part("state").items()
        if not (name.endswith(PARTS) or ".poly_" in name)
    }
    # Newer transformers tie the head of every T5; the authors' release left it free.
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.load_state_dict(state)
    return model


def from_official(model: nn.Module, case: Golden) -> MHR:
    """The adapter from the authors' keys, with what the case trains made trainable."""
    official = {name: tensor for name, tensor in case.part("state").items() if name.endswith(PARTS)}
    theirs = case.about["mttl_config"]
    settings = {"official": True} if theirs["router_selector"] == "private" else {}  # its rows are mixed up there
    config, tensors = read_official(official, aa.Host.of(model), hyper_parameters=theirs, **settings)
    adapter = aa.attach(model, config)
    assert isinstance(adapter, MHR)
    for ours, name in (("rank", "lora_rank"), ("skills", "n_skills"), ("splits", "n_splits"), ("alpha", "lora_alpha")):
        assert getattr(config, ours) == theirs[name]
    adapter.load_tensors(tensors)
    same_bytes(write_official(adapter), official)
    trained = {name.rpartition(".")[2] for name in case.about["trainable"]}
    adapter.train_only(*(["routing"] if trained == {"module_logits"} else []))
    # As the authors save what is trained: a shared selector once.
    named = write_official(adapter, prefix="model.", trained_only=True)
    again = read_official(named, aa.Host.of(model), hyper_parameters=theirs, **settings)
    assert again[0] == config or config.selector == "average"
    same_bytes({k: v for k, v in again[1].items() if k in tensors}, tensors)
    return adapter


def from_peft(model: nn.Module, case: Golden) -> MHR:
    """The adapter from a folder as PEFT writes it."""
    official = {n.replace(NAMED, ""): t for n, t in case.part("state").items() if ".poly_" in n}
    assert sorted(official) == sorted(case.about["adapter_file_keys"])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "adapter_config.json").write_text(json.dumps(case.about["peft_config"]))
        save_file(official, Path(folder) / "adapter_model.safetensors")
        adapter = aa.load(model, folder, trainable=True)
    assert isinstance(adapter, MHR)
    config, tensors = by_name("peft-poly").write(adapter)
    same_bytes(tensors, official)
    theirs = case.about["peft_config"]
    config["target_modules"] = sorted(config["target_modules"])
    free = ("peft_version", "inference_mode")
    assert {**config, **{k: theirs[k] for k in free}} == {k: v for k, v in theirs.items() if v is not None or k in free}
    return adapter


def same_bytes(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(mine) == set(theirs)
    assert all(
        mine[k].dtype == t.dtype and mine[k].detach().numpy().tobytes() == t.numpy().tobytes()
        for k, t in theirs.items()
    )


def check_weights(adapter: MHR, ids: Tensor, case: Golden) -> None:
    """The mixing weights of the linears that the case recorded. A private selector is recorded as the ids."""
    for key in case.part("out"):
        if key.startswith("mixing_weights."):
            branch = adapter.routed_branches()[key.removeprefix("mixing_weights.")]
            alpha = branch.selector(ids)
            if adapter.config.selector == "private":
                alpha = alpha[:, 0].argmax(dim=-1).float()
            case.close(alpha.view(case.tensors[f"out/{key}"].shape), f"out/{key}")


def check_gradients(model: nn.Module, adapter: MHR, case: Golden) -> None:
    """Of exactly the tensors the case trains; nothing reaches the base."""
    grads = {name: tensor.grad for name, tensor in adapter.tensors().items() if tensor.grad is not None}
    if "peft_config" in case.about:
        tails = {".lora_a": ".poly_lora_A.default", ".lora_b": ".poly_lora_B.default"}
        tails[".selector.module_logits"] = ".poly_router.default.module_logits"
        for tail, theirs in tails.items():
            grads = {ROOT + n.removesuffix(tail) + theirs if n.endswith(tail) else n: g for n, g in grads.items()}
    assert set(grads) == set(case.part("grad"))
    for name, grad in grads.items():
        case.close(grad, f"grad/{name}")
    mine = {id(parameter) for parameter in adapter.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in mine)
