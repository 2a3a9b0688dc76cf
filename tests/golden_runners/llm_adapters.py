"""LLM-Adapters: the fork's adapters on whole tiny models, through its own folders."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import transformers
from golden_cases import Golden
from safetensors.torch import save_file
from torch import Tensor, nn

import anyadapter as aa
from anyadapter.core.host import Host
from anyadapter.formats.layouts import by_name
from golden_runners import llm_adapters_protocol

PREFIX_GRADIENT = "prompt_encoder.embedding.weight"  # the prefix has another name while the fork trains it


def run(case: Golden) -> None:
    if case.name == "eval_protocol":
        llm_adapters_protocol.run(case)
    elif case.about.get("peft_config", {}).get("peft_type") in ("BOTTLENECK", "LORA", "PREFIX_TUNING"):
        whole_model(case)
    else:
        pytest.fail(f"{case.name}: no runner knows this case")


def whole_model(case: Golden) -> None:
    """Logits with the adapter on and off, gradients, and the file there and back."""
    model, official = base(case), file_tensors(case)
    if case.about["base_model"]["kind"] in FILLS:
        aa.attach(model, OldMaskConfig(kind=case.about["base_model"]["kind"]), "old-mask")
    adapter = loaded(model, official, case)
    written = saved_again(adapter, official, case)
    inputs = case.part("in")
    logits = model(**inputs).logits
    case.close(logits, "out/logits")
    with aa.disabled(model, adapter.name):
        case.close(model(**inputs).logits, "out/logits_adapter_disabled")
    loss = logits.pow(2).mean()
    case.close(loss.reshape(1), "out/loss")
    loss.backward()
    gradients = {PREFIX_GRADIENT if name == "prompt_embeddings" else name: t.grad for name, t in written.items()}
    assert set(gradients) == set(case.part("grad")) == set(case.about["trainable"])
    for name, gradient in gradients.items():
        case.close(gradient, f"grad/{name}")
    mine = {id(parameter) for parameter in adapter.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in mine)
    check_placement(adapter, case)


def bloom(scores: Tensor, seen: Tensor, low: float, scaling: float) -> Tensor:
    return scores.where(seen, low)


def gptj(scores: Tensor, seen: Tensor, low: float, scaling: float) -> Tensor:
    # Later keys were filled out before the scaling, padding after it.
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.where(causal, low * scaling) + torch.zeros_like(scores).masked_fill(~seen[:, :, -1:], low)


def opt(scores: Tensor, seen: Tensor, low: float, scaling: float) -> Tensor:
    return torch.maximum(scores + torch.zeros_like(scores).masked_fill(~seen, low), torch.tensor(low))


FILLS = {"bloom": bloom, "gptj": gptj, "opt": opt}


@dataclass(frozen=True, kw_only=True)
class OldMaskConfig(aa.AdapterConfig):
    method: ClassVar[str] = "test_old_mask"
    kind: str


@aa.register
class OldMask(aa.Adapter):
    """The mask as transformers 4.42, which made the fixtures, applied it in these models.

    It differs for rows of padding alone, which may see nothing: what they get, and the gradient through it, changed later
    (and is another thing again in each attention implementation), and the fixtures' logits and loss count these rows too.
    """

    Config = OldMaskConfig
    config: OldMaskConfig

    def setup(self, host: Host) -> None:
        for site in host.find("self_attention", kind="attention"):
            self.at(site, self.core)

    def core(self, call: object, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Tensor) -> Tensor:
        scaling = options["scaling"]
        scores = q @ k.transpose(-2, -1) * scaling + options.get("alibi", 0)
        return FILLS[self.config.kind](scores, mask == 0, torch.finfo(q.dtype).min, scaling).softmax(-1) @ v


def base(case: Golden) -> nn.Module:
    """The frozen model: all of ``state/`` but the adapter's tensors, whose keys the fork prefixes."""
    about = case.about["base_model"]
    settings = {
        k: v for k, v in about["transformers_config_diff"].items() if k not in ("model_type", "transformers_version")
    }
    cls = getattr(transformers, about["transformers_class"])
    model = cls(cls.config_class(**settings, attn_implementation="eager")).eval()
    root = "base_model." if case.about["peft_config"]["peft_type"] == "PREFIX_TUNING" else "base_model.model."
    trained = {*case.about["trainable"], "word_embeddings.weight"}  # the fork's second name for the base's own table
    state = {k.removeprefix(root): v for k, v in case.part("state").items() if k not in trained}
    model.load_state_dict(state)
    return model


def file_tensors(case: Golden) -> dict[str, Tensor]:
    """What the fork's ``adapter_model.bin`` holds."""
    parts = case.part("state") | case.part("adapter_file")
    return {name: parts[name] for name in case.about["adapter_file_keys"]}


def loaded(model: nn.Module, official: dict[str, Tensor], case: Golden) -> aa.Adapter:
    """The adapter, from a folder as the fork writes it: with a pickle, or our choice of a safe file."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "adapter_config.json").write_text(json.dumps(case.about["peft_config"]))
        save_file(official, Path(folder) / "adapter_model.safetensors")
        adapter = aa.load(model, folder, trainable=True)
        (Path(folder) / "adapter_model.safetensors").unlink()
        torch.save(official, Path(folder) / "adapter_model.bin")
        twin = aa.load(model, folder, "twin", allow_pickle=True)
        assert all(torch.equal(t, twin.tensors()[name]) for name, t in adapter.tensors().items())
        aa.detach(model, "twin")
    return adapter


def saved_again(adapter: aa.Adapter, official: dict[str, Tensor], case: Golden) -> dict[str, Tensor]:
    """The adapter's own tensors under the fork's keys, after checking that keys, bytes and settings are the fork's."""
    config, tensors = by_name("llm-adapters").write(adapter)
    assert sorted(tensors) == sorted(case.about["adapter_file_keys"])
    assert all(
        tensors[k].dtype == v.dtype and tensors[k].detach().numpy().tobytes() == v.numpy().tobytes()
        for k, v in official.items()
    )
    for each in (config, expected := dict(case.about["peft_config"])):
        each["target_modules"] = sorted(each.get("target_modules", ()))
    assert config == expected | {"inference_mode": True}
    return tensors


def check_placement(adapter: aa.Adapter, case: Golden) -> None:
    """Each site is adapted in the arrangement the fork chose for it."""
    arrangement = {"Before": "mh_adapter", "After": "output_adapter", "Parallel": "parallel_adapter"}
    mine = {
        f"base_model.model.{p.path}": arrangement.get(type(p.branch).__name__)
        for p in adapter.placements
        if adapter.config.method == "bottleneck"
    }
    assert mine == case.about["adapter_types"]
