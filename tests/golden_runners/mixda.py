"""MixDA: the authors' stage 1, stage 2 and ablation on a whole tiny RoBERTa, their stage-1 file, and the modules alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import Golden
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification

import anyadapter as aa
from anyadapter.formats.mixda import read_model, read_official, write_model, write_official
from anyadapter.methods.language.mixda import MixDA, Retriever
from anyadapter.parts.bottleneck import DownUp
from anyadapter.parts.mixture import Gate

OWN = (".kas.", ".gating.", ".adapters.")  # in the names of the authors' in-model tensors
HEAD = "classifier."


def run(case: Golden) -> None:
    if case.name == "modules":
        modules(case)
    elif case.name == "stage1_checkpoint_layout":
        checkpoint(case)
    elif "config" in case.about:
        whole_model(case)
    else:
        pytest.fail(f"{case.name}: no runner knows this case")


# ---------------------------------------------------------------------- whole models


def whole_model(case: Golden) -> None:
    """The branches, the gate, every layer's and the model's output, the loss, the gradients, and the names back."""
    model = base(case)
    task = case.about.get("task_adapter_name")
    settings: dict[str, Any] = {"task": task} if task else {}
    if case.about["config"]["disable_moe"]:
        settings["gate"] = None
    if any(name.startswith(HEAD) for name in case.part("grad")):
        settings["whole"] = "classifier"
    state = case.part("state")
    config, tensors = read_model(state, aa.Host.of(model), **settings)
    adapter = aa.attach(model, config)
    assert isinstance(adapter, MixDA)
    adapter.load_tensors(tensors)
    check_config(adapter, case)
    same_bytes(write_model(adapter, task or ""), {name: tensor for name, tensor in state.items() if own(name, adapter)})

    inputs = case.part("in")
    labels = inputs.pop("labels", None)
    logits = forward(model, adapter, inputs, case)
    case.close(logits, "out/logits")
    if labels is None:
        return
    loss = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
    case.close(loss.reshape(1), "out/mlm_loss" if "out/mlm_loss" in case.tensors else "out/loss")
    adapter.train_only(*(("gate", "task", "head") if task else ("domains", "gate")))
    loss = nn.functional.cross_entropy(model(**inputs).logits.flatten(0, -2), labels.flatten())
    loss.backward()
    check_gradients(model, adapter, task or "", case)


def base(case: Golden) -> nn.Module:
    """The frozen RoBERTa: what of ``state/`` is not the adapter's. A LayerNorm that the authors' layers never use is left out."""
    config = RobertaConfig(**case.about["config"])
    masked = any(name.startswith("lm_head.") for name in case.part("state"))
    model = (RobertaForMaskedLM if masked else RobertaForSequenceClassification)(config).eval()
    unused = [f"roberta.encoder.layer.{i}.LayerNorm." for i in range(config.num_hidden_layers)]
    state = {
        name: tensor
        for name, tensor in case.part("state").items()
        if not any(part in name for part in OWN) and not name.startswith(tuple(unused))
    }
    if masked:  # the authors' release left it free; newer transformers tie it to the embeddings
        model.lm_head.decoder.weight = nn.Parameter(torch.empty_like(state["lm_head.decoder.weight"]))
        model.lm_head.decoder.bias = nn.Parameter(torch.empty_like(state["lm_head.decoder.bias"]))
    model.load_state_dict(state)
    return model


def own(name: str, adapter: MixDA) -> bool:
    return any(part in name for part in OWN) or (bool(adapter.config.whole) and name.startswith(HEAD))


def check_config(adapter: MixDA, case: Golden) -> None:
    theirs = case.about["config"]
    assert adapter.config.layers == tuple(theirs["layers"])
    assert adapter.config.width == theirs["intermediate_size"] // theirs["adapter_down_scale"]
    assert len(adapter.config.branches) == theirs["num_of_kas"] + 1
    if adapter.config.gate is not None:
        assert adapter.config.gate_width == case.about["gate_hidden"]
    if (task := case.about.get("task_adapter")) is not None:
        assert adapter.config.task_width == theirs["hidden_size"] // task["reduction_factor"]
        assert adapter.config.task_adapter == ("houlsby" if task["mh_adapter"] else "pfeiffer")


def forward(model: nn.Module, adapter: MixDA, inputs: dict[str, Tensor], case: Golden) -> Tensor:
    """The logits, after comparing what each layer mixed and gave."""
    blocks: dict[int, Tensor] = {}
    hooks = [
        layer.register_forward_hook(
            lambda _, __, out, i=i: blocks.update({i: out[0] if isinstance(out, tuple) else out})
        )
        for i, layer in enumerate(model.get_submodule("roberta.encoder.layer").children())
    ]
    with adapter.recording() as mixtures:
        logits = model(**inputs).logits
        for layer, mixture in zip(adapter.config.layers or (), mixtures.values()):
            assert mixture.mixed is not None
            (*domains, ffn), weights = mixture.mixed
            case.close(ffn, f"out/layer{layer}/ffn")
            for k, domain in enumerate(domains):
                case.close(domain, f"out/layer{layer}/domain_adapter_{k}")
            if f"out/layer{layer}/gate" in case.tensors:
                case.close(weights, f"out/layer{layer}/gate")
            case.close(blocks[layer], f"out/layer{layer}/block")
    for hook in hooks:
        hook.remove()
    compared = {key for key in case.part("out") if key.startswith("layer")}
    assert {int(key.split("/")[0].removeprefix("layer")) for key in compared} == set(adapter.config.layers or ())
    return logits


def check_gradients(model: nn.Module, adapter: MixDA, task: str, case: Golden) -> None:
    """Of exactly the tensors the case trains; nothing reaches the base or, in stage 2, the domains."""
    names = dict(zip(adapter.tensors(), write_model(adapter, task)))
    grads = {names[name]: tensor.grad for name, tensor in adapter.tensors().items() if tensor.grad is not None}
    assert set(grads) == set(case.part("grad")) == set(case.about.get("trainable", grads))
    for name, grad in grads.items():
        case.close(grad, f"grad/{name}")
    mine = {id(parameter) for parameter in adapter.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in mine)


# ---------------------------------------------------------------------- the file of stage 1


def checkpoint(case: Golden) -> None:
    """The dictionary there and back, in both spellings, from a pickle as the authors write it."""
    flat = {key.replace("/", ".", 1): tensor for key, tensor in case.part("ckpt").items()}
    nested = {key: {leaf: flat[f"{key}.{leaf}"] for leaf in leaves} for key, leaves in case.about["dict_keys"].items()}
    model = host_of(nested)
    for numbered in (True, False):
        spelt = nested if numbered else {key.replace("-0-adapter", "-adapter"): value for key, value in nested.items()}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.pt-0"
            torch.save(spelt, file)
            config, tensors = read_official(file, aa.Host.of(model), allow_pickle=True)
        adapter = aa.attach(model, config)
        adapter.load_tensors(tensors)
        back = write_official(adapter, numbered=numbered)
        assert {key: list(value) for key, value in back.items()} == {key: list(value) for key, value in spelt.items()}
        for key, value in spelt.items():
            same_bytes(back[key], value)
        aa.detach(model)


def host_of(nested: dict[str, dict[str, Tensor]]) -> nn.Module:
    """A base that the file fits: the file itself says how wide it is."""
    down = next(value["adapter_down.0.weight"] for key, value in nested.items() if key.endswith("-adapter"))
    up = next(value["adapter_up.weight"] for key, value in nested.items() if key.endswith("-adapter"))
    layers = 1 + max(int(key.split("-")[0]) for key in nested)
    sizes: dict[str, Any] = {"vocab_size": 11, "hidden_size": up.shape[0], "intermediate_size": down.shape[1]}
    return RobertaForMaskedLM(RobertaConfig(**sizes, num_hidden_layers=layers, num_attention_heads=1)).eval()


def same_bytes(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(mine) == set(theirs)
    assert all(
        mine[k].dtype == t.dtype and mine[k].detach().numpy().tobytes() == t.numpy().tobytes()
        for k, t in theirs.items()
    )


# ---------------------------------------------------------------------- modules alone


def modules(case: Golden) -> None:
    """The gate on the last position, the domain adapter and the retriever, with gradients."""
    dims, state = case.about["dims"], case.part("state")
    sizes = dims["gate"]
    gate = Gate(sizes["emb"], sizes["branches"], sizes["hidden"], sizes["num_layers"]).eval()
    gate.load_state_dict({k.removeprefix("gate."): v for k, v in state.items() if k.startswith("gate.")})
    x = case.tensors["in/gate_x"].clone().requires_grad_()
    weights = gate(x[:, -1:])
    case.close(weights, "out/gate")
    (weights * torch.arange(1.0, 1 + weights.shape[-1])).sum().backward()
    gradients(case, gate, "gate", x)

    sizes = dims["adapter"]
    adapter = DownUp(sizes["inp"], sizes["out"], sizes["mid"], activation="gelu", bias=True)
    theirs = {k.removeprefix("adapter."): v for k, v in state.items() if k.startswith("adapter.")}
    adapter.load_state_dict({k.replace("adapter_down.0", "adapter_down"): v for k, v in theirs.items()})
    x = case.tensors["in/adapter_x"].clone().requires_grad_()
    out = adapter.z(x)
    case.close(out, "out/adapter")
    out.pow(2).mean().backward()
    gradients(case, adapter, "adapter", x)

    head = {k.removeprefix("realm."): v for k, v in state.items() if k.startswith("realm.")}
    retriever = Retriever(*reversed(head["embed_head.weight"].shape))
    retriever.load_state_dict(head)
    top = case.tensors["out/realm_top2"]
    assert torch.equal(retriever(case.tensors["in/realm_query"], case.tensors["in/realm_docs"], top.shape[1]), top)


def gradients(case: Golden, module: nn.Module, name: str, x: Tensor) -> None:
    assert x.grad is not None
    case.close(x.grad, f"grad/{name}_x")
    for key, parameter in module.named_parameters():
        assert parameter.grad is not None
        case.close(parameter.grad, f"grad/{name}.{key.replace('adapter_down', 'adapter_down.0')}")
