"""GenerativeAdapter: segments of one call, states and the LoRA they stand for, and the two tasks of its pre-training."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import Golden
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import anyadapter as aa
from anyadapter.formats.generative import FastLora
from anyadapter.formats.layouts import by_name
from anyadapter.methods.language.generative import Generative
from anyadapter.training.generative import pretraining_labels, pretraining_sees

CLASSES: dict[str, Any] = {
    "mistral": (MistralConfig, MistralForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def run(case: Golden) -> None:
    runner = next((run for start, run in RUNNERS.items() if case.name.startswith(start)), None)
    if runner is None:
        pytest.fail(f"{case.name}: no runner knows this case")
    model, adapter = loaded(case)
    runner(case, model, adapter)
    if adapter.config.norm == "svd":  # where nothing is left out, the exact SVD gives what theirs gives
        aa.detach(model)
        exact = aa.attach(model, replace(adapter.config, official=False))
        exact.load_tensors(adapter.tensors())
        runner(case, model, exact)


def loaded(case: Golden) -> tuple[nn.Module, Generative]:
    """The frozen base and the adapter, through a folder as the authors write it."""
    dims, official = case.about["base_model"]["dims"], case.part("state")
    config_class, model_class = CLASSES[dims["kind"]]
    config = config_class(
        hidden_size=dims["h"],
        intermediate_size=dims["i"],
        num_attention_heads=dims["heads"],
        num_key_value_heads=dims["kv"],
        num_hidden_layers=dims["layers"],
        vocab_size=dims["v"],
        attn_implementation="eager",
    )
    model = model_class(config).eval()
    theirs = {name: tensor for name, tensor in official.items() if ".fastlora_" in name}
    base = {name: tensor for name, tensor in official.items() if name not in theirs}
    model.load_state_dict({k.removeprefix("base_model.model.").replace(".base_layer", ""): v for k, v in base.items()})
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "adapter_config.json").write_text(json.dumps(case.about["peft_config"]))
        save_file(theirs, Path(folder) / "adapter_model.safetensors")
        adapter = aa.load(model, folder, trainable=True)
    assert isinstance(adapter, Generative)
    config, tensors = by_name("generative-adapter").write(adapter)
    expected = {**case.about["peft_config"], "fastlora_training_attention_mask": None}
    assert {"base_model_name_or_path": None, "inference_mode": False, **config} == expected
    assert sorted(tensors) == sorted(case.about.get("adapter_file_keys", theirs))
    assert all(tensors[name].detach().numpy().tobytes() == theirs[name].numpy().tobytes() for name in theirs)
    return model, adapter


def folded(case: Golden, name: str) -> tuple[Tensor, Tensor]:
    """Segments as rows: ids and mask, (segments, tokens). The fixtures have one sequence."""
    ids, mask = case.tensors[f"in/{name}_ids"], case.tensors[f"in/{'attention' if name == 'input' else name}_mask"]
    assert len(ids) == 1
    return ids[0], mask[0]


def segmented(case: Golden, model: nn.Module, adapter: Generative) -> None:
    """Each segment knows those before it."""
    ids, mask = folded(case, "input")
    sees = torch.ones(len(ids), len(ids)).tril(-1)
    with aa.signals(model, sees=sees, context_mask=mask):
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    case.close(out.logits[None], "out/logits")
    for layer in range(len(out.hidden_states) - 1):  # the last is normed or not, as the version of transformers has it
        case.close(out.hidden_states[layer][None], f"out/hidden_states.{layer}")
    case.close(model.loss_function(out.logits, ids, model.config.vocab_size).reshape(1), "out/lm_loss")
    gradients(case, adapter, out.logits.pow(2).mean())


def gradients(case: Golden, adapter: Generative, loss: Tensor) -> None:
    adapter.zero_grad()
    loss.backward()
    found = {name: tensor.grad for name, tensor in FastLora().write(adapter)[1].items()}
    assert set(found) == set(case.part("grad"))
    for name, gradient in found.items():
        case.close(gradient, f"grad/{name}")


def lora_weights(case: Golden, model: nn.Module, adapter: Generative) -> None:
    """A context read at once or window by window, used as a state, and as the LoRA it stands for."""
    context, seen = folded(case, "context")
    ids, mask = case.tensors["in/input_ids"], case.tensors["in/input_mask"]
    for at_once, prefix, logits in ((len(context), "", "weights_mode"), (1, "stream.", "stream")):
        state = adapter.read_windows(model, context, seen, at_once=at_once)
        for path, layer in adapter.layer_of.items():
            theirs = f"out/{prefix}{layer}.base_layer{path.removeprefix(layer)}"
            case.close(state.outer[path][None], f"{theirs}.outer_product")
            generator = adapter.generator(path)
            lora_a = adapter.known(path, state).mT @ generator.A1.weight
            case.close(lora_a, f"{theirs}.lora_a")
            if not prefix:
                case.close(generator.B.weight[None], f"{theirs}.lora_b")
        with aa.signals(model, state=state):
            case.close(model(input_ids=ids, attention_mask=mask).logits, f"out/logits_{logits}")
    states_mode(case, model, adapter, context, seen)
    config, tensors = adapter.export(state)
    with aa.disabled(model):
        aa.attach(model, config, "lora").load_tensors(tensors)
        case.close(model(input_ids=ids, attention_mask=mask).logits, "out/logits_weights_mode")
        aa.detach(model, "lora")


def states_mode(case: Golden, model: nn.Module, adapter: Generative, context: Tensor, seen: Tensor) -> None:
    """Computed again from the hidden states of the segments."""
    sees = torch.ones(len(context), len(context)).tril(-1)
    with aa.signals(model, sees=sees, context_mask=seen):
        hidden = adapter.record(model, context, seen)
    with aa.signals(model, state=adapter.recall(hidden, seen)):
        out = model(input_ids=case.tensors["in/input_ids"], attention_mask=case.tensors["in/input_mask"])
    case.close(out.logits, "out/logits_states_mode")


def training(case: Golden, model: nn.Module, adapter: Generative) -> None:
    """Completion and reconstruction in one call, and the loss of both or of one."""
    ids, mask = folded(case, "input")
    windows = len(ids) // 2
    model.train()
    tasks = case.about["peft_config"]["fastlora_training_attention_mask"].split("-")[1:] or [
        "completion",
        "reconstruction",
    ]
    labels = pretraining_labels(case.tensors["in/labels"][0], tuple(tasks))
    context = mask * (torch.arange(len(ids)) < windows)[:, None]
    with aa.signals(model, sees=pretraining_sees(windows), context_mask=context):
        out = model(input_ids=ids, attention_mask=mask, labels=labels)
    case.close(out.logits[None], "out/logits")
    case.close(out.loss.reshape(1), "out/loss")
    gradients(case, adapter, out.loss)


RUNNERS = {"default_": segmented, "lora_weights_": lora_weights, "train_": training}
