"""P-Adapters: the authors' whole model on transformers' own BERT, given the query in natural language."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import Golden
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

import anyadapter as aa
from anyadapter.formats.p_adapter import read_official, write_official
from anyadapter.methods.language.p_adapter import PAdapter

BOTH = ("mask", "subject")
SETTINGS: dict[str, dict[str, Any]] = {
    "rewrite-lstm": {},
    "rewrite-lstm-mo": {"keep": ("mask",)},
    "rewrite-lstm-so": {"keep": ("subject",)},
    "rewrite-lstm-somo": {"keep": BOTH},
    "rewrite-lstm-ensemble": {},
    "rewrite-trans": {"features": "model"},
    "prefix-lstm": {"official": True},
    "rewrite-ptuning": {"keep": BOTH},
    "rewrite-ptuning-mo": {"keep": ("mask",)},
    "p-tuning": {"keep": BOTH},
    "ensemble": {"keep": BOTH},
    "oracle": {"keep": BOTH},
}


def run(case: Golden) -> None:
    """What the model is given in place of the embeddings, logits at the mask, loss, gradients."""
    about = case.about["config"]
    kind = about.get("adapter") or about.get("type")
    if kind not in SETTINGS:
        pytest.fail(f"{case.name}: no runner for {about['type']} {about.get('adapter')}")
    model, adapter = attached(case, SETTINGS[kind])
    ids = case.tensors["in/nl_ids"]
    asked = ids == about["mask_id"]
    labels = torch.full_like(ids, -100)
    labels[asked] = case.tensors["in/labels"][case.tensors["in/labels"] >= 0]
    seen: list[Tensor] = []
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda module, given, out: seen.append(out))
    with aa.signals(model, **values(case, adapter)):
        out = model(input_ids=ids, attention_mask=(ids != about["pad_id"]).long(), labels=labels)
    handle.remove()
    real, expected = case.tensors["in/attention_mask"].bool(), case.tensors["out/inputs_embeds"]
    tolerance = case.about["tolerance"]
    torch.testing.assert_close(seen[-1][real], expected[real], atol=tolerance["atol"], rtol=tolerance["rtol"])
    case.close(out.logits[asked], "out/mask_logits")
    case.close(out.loss, "out/loss")
    out.loss.backward()
    grads = {theirs(adapter, name): p.grad for name, p in adapter.named_parameters()}
    assert set(grads) == set(case.part("grad"))
    for name, grad in grads.items():
        case.close(grad, f"grad/{name}")
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("anyadapter"))


def attached(case: Golden, settings: dict[str, Any]) -> tuple[nn.Module, PAdapter]:
    """The base with the case's adapter in place, after the round trip of its files."""
    about = case.about["config"]
    model = BertForMaskedLM(
        BertConfig(
            **about["bert"], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=about["pad_id"]
        )
    ).eval()
    model.load_state_dict(module(case, "model"))
    names = dict.fromkeys(about["relations"]) if about["type"] == "oracle" else ("any",)
    files = {name: module(case, "prompt_encoder" if name == "any" else f"prompt_encoder.{name}") for name in names}
    source: Any = files["any"] if about["type"] == "adapter" else files
    given = {"alpha": about.get("alpha", 0.0), "template": tuple(about["template"])}
    if "mask" in settings.get("keep", ()):
        given["mask_token_id"] = about["mask_id"]
    config, tensors = read_official(source, aa.Host.of(model), **settings, **given)
    adapter = aa.attach(model, config)
    assert isinstance(adapter, PAdapter)
    adapter.load_tensors(tensors)
    for relation, official in files.items():
        again = write_official(adapter, relation if adapter.config.relations else None)
        kept = {k: v for k, v in official.items() if not k.startswith(("mlm_embeddings.", "transformer."))}
        assert set(again) == set(kept)
        for name, tensor in kept.items():
            assert again[name].dtype == tensor.dtype
            assert again[name].numpy().tobytes() == tensor.numpy().tobytes()
    return model, adapter


def values(case: Golden, adapter: PAdapter) -> dict[str, Any]:
    """The signals the adapter reads."""
    relations = case.about["config"]["relations"]
    asked = ["any"] * len(relations) if adapter.config.relations == ("any",) else relations
    given = {"subject_mask": case.tensors["in/subject_mask"], "relation": asked}
    return {name: given[name] for name in adapter.reads}


def theirs(adapter: PAdapter, name: str) -> str:
    """The authors' name of one of the adapter's parameters."""
    parts = name.split(".")
    if parts[0] != "experts":
        return f"prompt_encoder.{name}"
    relation = adapter.config.relations[int(parts[1])]
    return ".".join(["prompt_encoder", *([] if relation == "any" else [relation]), *parts[2:]])


def module(case: Golden, name: str) -> dict[str, Tensor]:
    """The state of one module of the authors' model."""
    return {k.removeprefix(f"{name}."): v for k, v in case.part("state").items() if k.startswith(f"{name}.")}
