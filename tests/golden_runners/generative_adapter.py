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
    """Segments of all sequences as rows: ids and mask, (sequences · segments, tokens)."""
    ids, mask = case.tensors[f"in/{name}_ids"], case.tensors[f"in/{'attention' if name == 'input' else name}_mask"]
    return ids.flatten(0, 1), mask.flatten(0, 1)


def each(sees: Tensor, sequences: int) -> Tensor:
    """The same for every sequence, which sees nothing of the others: (segments, segments) → all rows, on the diagonal."""
    return torch.block_diag(*[sees] * sequences)


def segmented(case: Golden, model: nn.Module, adapter: Generative) -> None:
    """Each segment knows those of its sequence before it."""
    ids, mask = folded(case, "input")
    shape = case.tensors["in/input_ids"].shape
    sees = each(torch.ones(shape[1], shape[1]).tril(-1), shape[0])
    with aa.signals(model, sees=sees, context_mask=mask):
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    case.close(out.logits.unflatten(0, shape[:2]), "out/logits")
    for layer in range(len(out.hidden_states) - 1):  # the last is normed or not, as the version of transformers has it
        case.close(out.hidden_states[layer].unflatten(0, shape[:2]), f"out/hidden_states.{layer}")
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
    """The context of each sequence read at once or window by window, used as a state, and as the LoRA it stands for."""
    contexts = list(zip(case.tensors["in/context_ids"], case.tensors["in/context_mask"]))
    ids, mask = case.tensors["in/input_ids"], case.tensors["in/input_mask"]
    for at_once, prefix, logits in ((len(contexts[0][0]), "", "weights_mode"), (1, "stream.", "stream")):
        states = [adapter.read_windows(model, context, seen, at_once=at_once) for context, seen in contexts]
        for path, layer in adapter.layer_of.items():
            theirs = f"out/{prefix}{layer}.base_layer{path.removeprefix(layer)}"
            case.close(torch.stack([state.outer[path] for state in states]), f"{theirs}.outer_product")
            generator = adapter.generator(path)
            cores = torch.cat([adapter.known(path, state) for state in states])
            case.close(cores.mT @ generator.A1.weight, f"{theirs}.lora_a")
            if not prefix:
                case.close(generator.B.weight.expand(len(states), -1, -1), f"{theirs}.lora_b")
        with aa.signals(model, state=states):
            case.close(model(input_ids=ids, attention_mask=mask).logits, f"out/logits_{logits}")
    states_mode(case, model, adapter)
    found = []
    for i, state in enumerate(states):
        config, tensors = adapter.export(state)
        with aa.disabled(model):
            aa.attach(model, config, "lora").load_tensors(tensors)
            found.append(model(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1]).logits)
            aa.detach(model, "lora")
    case.close(torch.cat(found), "out/logits_weights_mode")


def states_mode(case: Golden, model: nn.Module, adapter: Generative) -> None:
    """Computed again from the hidden states of the segments."""
    context, seen = folded(case, "context")
    sequences, segments, _ = case.tensors["in/context_ids"].shape
    sees = each(torch.ones(segments, segments).tril(-1), sequences)
    with aa.signals(model, sees=sees, context_mask=seen):
        hidden = adapter.record(model, context, seen)
    states = []
    for i in range(sequences):
        part = slice(i * segments, (i + 1) * segments)
        states.append(adapter.recall({layer: rows[part] for layer, rows in hidden.items()}, seen[part]))
    with aa.signals(model, state=states):
        out = model(input_ids=case.tensors["in/input_ids"], attention_mask=case.tensors["in/input_mask"])
    case.close(out.logits, "out/logits_states_mode")


def training(case: Golden, model: nn.Module, adapter: Generative) -> None:
    """Completion and reconstruction in one call, and the loss of both or of one."""
    ids, mask = folded(case, "input")
    shape = case.tensors["in/input_ids"].shape
    windows = shape[1] // 2
    model.train()
    tasks = case.about["peft_config"]["fastlora_training_attention_mask"].split("-")[1:] or [
        "completion",
        "reconstruction",
    ]
    labels = torch.cat([pretraining_labels(one, tuple(tasks)) for one in case.tensors["in/labels"]])
    context = mask * (torch.arange(shape[1]) < windows).repeat(shape[0])[:, None]
    with aa.signals(model, sees=each(pretraining_sees(windows), shape[0]), context_mask=context):
        out = model(input_ids=ids, attention_mask=mask, labels=labels)
    case.close(out.logits.unflatten(0, shape[:2]), "out/logits")
    case.close(out.loss.reshape(1), "out/loss")
    gradients(case, adapter, out.loss)


RUNNERS = {"default_": segmented, "lora_weights_": lora_weights, "train_": training}
