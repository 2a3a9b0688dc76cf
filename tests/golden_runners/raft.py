"""RAFT: the authors' predictor and classifiers on transformers' own BERT, their alignment of marks, and ERASER's metrics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import Golden
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizer

import anyadapter as aa
from anyadapter.formats.raft import read_classifier, read_predictor, write_official
from anyadapter.methods.language.raft import masked_softmax
from anyadapter.training.explanations import faithfulness, plausibility, scaled, spans, top, union
from anyadapter.training.rationales import official_alignment


def run(case: Golden) -> None:
    if case.name == "masked_softmax":
        softmax(case)
    elif "num_targets" in case.about:
        predictor(case)
    elif "attn_heads" in case.about:
        classifier(case)
    elif "rows" in case.about:
        alignment(case)
    elif "top_k" in case.about:
        explanations(case)
    else:
        pytest.fail(f"{case.name}: no runner knows this case")


def softmax(case: Golden) -> None:
    """With scores round zero, and with scores below the zeros that stand for padding."""
    for scores, weights in (("scores", "weights"), ("scores_all_negative", "weights_all_negative")):
        case.close(masked_softmax(case.tensors[f"in/{scores}"], case.tensors["in/mask"]), f"out/{weights}")


def predictor(case: Golden) -> None:
    """Every head, each part of the loss by itself, and gradients, with the whole encoder trained on another start."""
    about, given = case.about, case.part("in")
    model = BertModel(settings(case), add_pooling_layer=False).eval()
    official = case.part("state")
    impacts = {name: float(about[name]) for name in ("rationale_impact", "target_impact")}
    config, tensors = read_predictor(official, aa.Host.of(model), **impacts)
    assert (len(config.labels), len(config.targets)) == (about["num_classes"], about["num_targets"])
    adapter = aa.attach(model, config)
    adapter.load_tensors(tensors)
    same_bytes(write_official(model), official)
    inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
    marks, targets = ({name: given[name]} for name in ("rationale_labels", "targets"))
    for labels, key in ((marks, "rationale"), (marks | targets, "rationale_plus_target")):
        case.close(model(**inputs, **labels).loss.reshape(1), f"out/loss_{key}_weighted")
    case.close(model(**inputs, labels=given["labels"]).loss.reshape(1), "out/loss_label")
    out = model(**given)
    for name in ("label_logits", "target_probs", "rationale_logits"):
        case.close(getattr(out, name), f"out/{name}")
    case.close(out.loss.reshape(1), "out/loss_total")
    out.loss.backward()
    check_gradients(case, model)


def classifier(case: Golden) -> None:
    """Logits, loss and gradients, those of the rationale logits included."""
    about, given = case.about, case.part("in")
    model = BertForSequenceClassification(settings(case, num_labels=about["num_classes"])).eval()
    official = case.part("state")
    rationales = "NoRationale" not in about["official"]
    options = {
        "heads": about["attn_heads"],
        "rationales": rationales,
        "mask_padding": rationales,
        "keep_special": "clssep" in about["official"],
    }
    config, tensors = read_classifier(official, aa.Host.of(model), **options)
    adapter = aa.attach(model, config)
    adapter.load_tensors(tensors)
    assert config.attention != "self" or config.length == about["seq_len"]
    same_bytes(write_official(model), official)
    logits = given.pop("rationale_logits").requires_grad_(rationales)
    with aa.signals(model, **({"rationale_logits": logits} if rationales else {})):
        out = model(**given)
    case.close(out.logits, "out/logits")
    case.close(out.loss.reshape(1), "out/loss")
    out.loss.backward()
    extra = {"rationale_logits": logits.grad} if logits.grad is not None else {}
    check_gradients(case, model, extra)


def settings(case: Golden, **more: Any) -> BertConfig:
    return BertConfig(**case.about["config"], **more)


def same_bytes(mine: dict[str, Tensor], official: dict[str, Tensor]) -> None:
    """The file again: the same keys, dtypes and bytes."""
    assert set(mine) == set(official)
    for key, tensor in official.items():
        assert mine[key].dtype == tensor.dtype, key
        assert mine[key].numpy().tobytes() == tensor.numpy().tobytes(), key


def check_gradients(case: Golden, model: nn.Module, extra: dict[str, Tensor] | None = None) -> None:
    """Of every tensor of the authors' model, all of them trained; the base has none."""
    (adapter,) = aa.adapters(model).values()
    gradients = dict(extra or {})
    own = {id(p): p for p in adapter.parameters()}
    with torch.no_grad():
        for parameter in own.values():  # a gradient goes through the writer as a value would
            none = torch.full_like(parameter, torch.nan)
            parameter.copy_(none if parameter.grad is None else parameter.grad)
    for key, value in write_official(model).items():
        if not value.isnan().all():
            gradients[key] = value
    assert set(gradients) == set(case.part("grad"))
    for key, gradient in gradients.items():
        case.close(gradient, f"grad/{key}")
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)


def alignment(case: Golden) -> None:
    """Pieces, the marks of each annotator on them, their majority, and the lengths."""
    tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate(case.about["vocab"])}, do_lower_case=True)
    lengths = []
    for row, expected in zip(case.about["rows"], case.about["expected"], strict=True):
        ids, masks, majority = official_alignment(row["post_tokens"], row["rationales"], tokenizer)
        assert ids == expected["token_ids"]
        assert masks == expected["annotator_token_masks"]
        assert majority == expected["majority_mask"]
        lengths.append(len(ids))
    assert lengths == case.tensors["out/row_lengths"].tolist()


def explanations(case: Golden) -> None:
    """ERASER's numbers, and the spans they are made of."""
    examples, k = case.about["examples"], case.about["top_k"]
    gold = [union(e["annotator_masks"]) for e in examples]
    weights = [scaled(e["token_weights"]) for e in examples]
    for example, mask, each in zip(examples, gold, weights, strict=True):
        assert [list(span) for span in spans(mask)] == case.about["gold_spans"][example["id"]]
        assert top(each, k) == sorted(case.about["predicted_tokens"][example["id"]])
    classes = list(examples[0]["full"])
    chosen = [classes.index(e["predicted"]) for e in examples]
    tables = (
        [[e[part][name] for name in classes] for e in examples]
        for part in ("full", "only_rationale", "without_rationale")
    )
    found = plausibility(gold, weights, k, official=True) | faithfulness(*tables, chosen)
    found["accuracy"] = sum(e["predicted"] == e["label"] for e in examples) / len(examples)
    assert set(found) == set(case.part("out"))
    for name, value in found.items():
        case.close(torch.tensor([value], dtype=torch.float64), f"out/{name}")
