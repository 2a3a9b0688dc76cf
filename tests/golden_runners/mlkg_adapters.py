"""Multilingual knowledge adapters: AdapterHub's bottlenecks inside BERT's output blocks."""

from __future__ import annotations

import pytest
from golden_cases import Golden
from torch import nn
from transformers import BertConfig, BertModel

import anyadapter as aa

MARK = ".adapters."


def run(case: Golden) -> None:
    if case.name != "bert_simple_adapter_baseline":
        pytest.fail(f"{case.name}: no runner knows this case yet")
    simple_adapter(case)


def simple_adapter(case: Golden) -> None:
    """One wide adapter after attention and feed-forward: the hidden states and the gradients."""
    about = case.about["adapter"]
    model = base(case)
    places = ("mh_adapter", "output_adapter")
    assert all(about[key] for key in places)
    assert not any(about[key] for key in ("original_ln_before", "residual_before_ln"))  # it reads the sub-layer alone
    config = aa.BottleneckConfig(
        placement="houlsby",
        reduction=about["reduction_factor"],
        activation=about["non_linearity"],
        scaling=about["scaling"],
        init=about["init_weights"],
        bias=True,
    )
    adapter = aa.attach(model, config, "baseline")
    adapter.load_tensors({ours(key): tensor for key, tensor in case.part("state").items() if MARK in key})
    out = model(**case.part("in")).last_hidden_state
    case.close(out, "out/baseline")
    out.pow(2).mean().backward()
    gradients = {name: tensor.grad for name, tensor in adapter.tensors().items()}
    assert set(gradients) == {ours(key) for key in case.part("grad")}
    for key in case.part("grad"):
        case.close(gradients[ours(key)], f"grad/{key}")
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("anyadapter."))


def base(case: Golden) -> nn.Module:
    model = BertModel(BertConfig(**case.about["config"])).eval()
    model.load_state_dict({key: tensor for key, tensor in case.part("state").items() if MARK not in key})
    return model


def ours(key: str) -> str:
    """``<block>.adapters.<name>.adapter_down.0.weight`` is our ``<block>.adapter_down.weight``."""
    block, rest = key.split(MARK)
    return f"{block}.{rest.split('.', 1)[1].replace('adapter_down.0', 'adapter_down')}"
