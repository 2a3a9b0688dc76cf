"""P-Adapters: the authors' whole model on transformers' own BERT."""

from __future__ import annotations

import pytest
import torch
from golden_cases import Golden
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

import anyadapter as aa
from anyadapter.formats.p_adapter import read_official, write_official
from anyadapter.methods.language.p_adapter import PAdapter

KEPT = {
    "rewrite-lstm": (),
    "rewrite-lstm-mo": ("mask",),
    "rewrite-lstm-so": ("subject",),
    "rewrite-lstm-somo": ("subject", "mask"),
    "rewrite-lstm-ensemble": (),
}


def run(case: Golden) -> None:
    """Rewritten embeddings, logits at the mask, loss, gradients."""
    about = case.about["config"]
    if about.get("adapter") not in KEPT:
        pytest.fail(f"{case.name}: no runner for {about['type']} {about.get('adapter')}")
    model, adapter = attached(case)
    ids, labels, attended = case.tensors["in/query_ids"], case.tensors["in/labels"], case.tensors["in/attention_mask"]
    seen: list[Tensor] = []
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda module, given, out: seen.append(out))
    values = {"subject_mask": case.tensors["in/subject_mask"]} if adapter.reads else {}
    with aa.signals(model, **values):
        out = model(input_ids=ids, attention_mask=attended, labels=labels)
    handle.remove()
    real = attended.bool()
    expected = case.tensors["out/inputs_embeds"]
    tolerance = case.about["tolerance"]
    torch.testing.assert_close(seen[0][real], expected[real], atol=tolerance["atol"], rtol=tolerance["rtol"])
    case.close(out.logits[ids == about["mask_id"]], "out/mask_logits")
    case.close(out.loss, "out/loss")
    out.loss.backward()
    grads = {f"prompt_encoder.{name}": p.grad for name, p in adapter.named_parameters()}
    assert set(grads) == set(case.part("grad"))
    for name, grad in grads.items():
        case.close(grad, f"grad/{name}")
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("anyadapter"))


def attached(case: Golden) -> tuple[nn.Module, PAdapter]:
    """The base with the case's adapter in place, after the round trip of its file."""
    about = case.about["config"]
    model = BertForMaskedLM(
        BertConfig(
            **about["bert"], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=about["pad_id"]
        )
    ).eval()
    model.load_state_dict(module(case, "model"))
    official = module(case, "prompt_encoder")
    kept = KEPT[about["adapter"]]
    config, tensors = read_official(
        official,
        aa.Host.of(model),
        keep=kept,
        alpha=about.get("alpha", 0.0),
        mask_token_id=about["mask_id"] if "mask" in kept else None,
    )
    adapter = aa.attach(model, config)
    assert isinstance(adapter, PAdapter)
    adapter.load_tensors(tensors)
    again = write_official(adapter)
    assert set(again) == set(official)
    assert all(
        again[k].dtype == v.dtype and again[k].numpy().tobytes() == v.numpy().tobytes() for k, v in official.items()
    )
    return model, adapter


def module(case: Golden, name: str) -> dict[str, Tensor]:
    """The state of one module of the authors' model."""
    return {k.removeprefix(f"{name}."): v for k, v in case.part("state").items() if k.startswith(f"{name}.")}
