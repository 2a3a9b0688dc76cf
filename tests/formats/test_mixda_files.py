"""The files of MixDA's authors: both spellings, several files, whole models, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForMaskedLM

import anyadapter as aa
from anyadapter.formats.mixda import read_model, read_official, write_model, write_official
from anyadapter.methods.language.mixda import MixDA

SIZES: dict[str, Any] = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2}
Nested = dict[str, dict[str, Tensor]]


def roberta() -> nn.Module:
    torch.manual_seed(0)
    return RobertaForMaskedLM(RobertaConfig(**SIZES, intermediate_size=32)).eval()


def attached(model: nn.Module, **config: Any) -> MixDA:
    adapter = aa.attach(model, aa.MixDAConfig(**{"layers": (1, 3), "gate_width": 6, "pool": "last", **config}))
    assert isinstance(adapter, MixDA)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return adapter


def flat(nested: Nested) -> dict[str, Tensor]:
    return {f"{key}.{leaf}": tensor for key, leaves in nested.items() for leaf, tensor in leaves.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("numbered", [True, False])
def test_a_file_of_stage_one_there_and_back_from_a_pickle(numbered: bool, tmp_path: Path) -> None:
    model = roberta()
    adapter = attached(model, gate_layers=2)
    written = write_official(adapter, numbered=numbered)
    assert set(written) == {f"{i}-{'0-' if numbered else ''}adapter" for i in (1, 3)} | {"1-gating", "3-gating"}
    assert list(written["1-gating"]) == [f"linear.{i}.{part}" for i in (1, 4, 7) for part in ("weight", "bias")]
    torch.save(written, tmp_path / "model.pt-3")
    with pytest.raises(aa.ArtefactError, match="is a pickle, which can run code"):
        read_official(tmp_path / "model.pt-3", aa.Host.of(model))
    config, tensors = read_official(tmp_path / "model.pt-3", aa.Host.of(model), allow_pickle=True)
    assert config.to_dict() == {**adapter.config.to_dict(), "domains": ["domain"]}
    assert same(tensors, {name: tensor.detach() for name, tensor in adapter.tensors().items()})


def test_several_files_side_by_side_have_a_new_gate() -> None:
    model, files = roberta(), []
    for _ in range(2):
        files.append(flat(write_official(attached(model))))
        aa.detach(model)
    config, tensors = read_official(files, aa.Host.of(model), domains=("law", "news"), gate_width=5, pool="mean")
    adapter = aa.attach(model, config)
    adapter.load_tensors(tensors)
    assert isinstance(adapter, MixDA)
    assert (adapter.config.branches, adapter.config.pool) == (("law", "news", "ffn"), "mean")
    for k, file in enumerate(files):
        for name, tensor in file.items():
            if name.startswith("3-0-adapter"):
                ours = name.replace("3-0-adapter", f"roberta.encoder.layer.3.output.kas.{k}").replace("down.0", "down")
                assert torch.equal(tensors[ours], tensor)
    assert tensors["roberta.encoder.layer.1.output.gating.linear.10.weight"].shape == (3, 5)
    assert set(write_official(adapter)) == {f"{i}-{k}-adapter" for i in (1, 3) for k in (0, 1)} | {
        "1-gating",
        "3-gating",
    }
    with pytest.raises(aa.ArtefactError, match="one domain a file; this adapter has several"):
        write_official(adapter, numbered=False)


@pytest.mark.parametrize("kind", ["pfeiffer", "houlsby"])
def test_a_whole_model_there_and_back(kind: str) -> None:
    model = roberta()
    adapter = attached(model, domains=("a", "b"), task_adapter=kind, task_width=3, whole="lm_head.dense")
    written = write_model(adapter)
    assert "roberta.encoder.layer.3.output.kas.1.adapter_down.0.weight" in written
    assert "roberta.encoder.layer.0.output.adapters.domain.adapter_down.0.bias" in written
    assert ("roberta.encoder.layer.0.attention.output.adapters.domain.adapter_up.bias" in written) == (
        kind == "houlsby"
    )
    state = {**{n: t for n, t in model.state_dict().items() if n not in written}, **written}
    aa.detach(model)
    config, tensors = read_model(state, aa.Host.of(model), task="domain", whole="lm_head.dense")
    again: Any = aa.attach(model, config)
    again.load_tensors(tensors)
    assert (again.config.task_adapter, again.config.task_width) == (kind, 3)
    assert same(write_model(again), written)
    with pytest.raises(aa.ArtefactError, match=r"task adapters \['domain'\]; expected domain adapters and 'other'"):
        read_model(state, aa.Host.of(model), task="other")


def test_what_is_not_such_a_file_is_refused_and_nothing_is_passed_over() -> None:
    model = roberta()
    adapter = attached(model)
    good = flat(write_official(adapter))
    host = aa.Host.of(model)
    gate = {name: tensor for name, tensor in good.items() if "gating" in name}
    for tensors, message in (
        ({**good, "1-adaptor.x": torch.ones(1)}, "'1-adaptor.x' is none of <layer>-<k>-adapter"),
        (gate, "holds no domain adapter"),
        ({}, "holds no domain adapter"),
        ({**good, "1-adapter.adapter_up.bias": torch.ones(8)}, "in both spellings"),
        (
            {name: t for name, t in good.items() if name != "3-0-adapter.adapter_up.bias"},
            r"missing roberta.*layer\.3.*up\.bias",
        ),
        ({**good, "3-0-adapter.adapter_up.bias": torch.ones(9)}, r"is \(9,\), expected \(8,\)"),
        ({**good, "2-gating.linear.1.bias": torch.ones(6)}, "a gate of layer 2 and no domain adapter there"),
        ({name: t for name, t in good.items() if "down.0.weight" not in name}, "no adapter_down.0.weight"),
    ):
        with pytest.raises(aa.ArtefactError, match=message):
            read_official(tensors, host)
    with pytest.raises(aa.TargetError, match="no layer 9"):
        read_official({name.replace("3-", "9-", 1): tensor for name, tensor in good.items()}, host)
    with pytest.raises(aa.ArtefactError, match="holds 0 tensors of domain adapters"):
        read_model(model.state_dict(), host)


def test_what_the_authors_files_cannot_hold_is_not_written() -> None:
    model = roberta()
    with pytest.raises(aa.ArtefactError, match="the gate of the paper"):
        write_official(attached(model, gate="paper"))
    aa.detach(model)
    with pytest.raises(aa.ArtefactError, match="no domain adapters"):
        write_model(attached(model, domains=(), task_adapter="pfeiffer"))
    aa.detach(model)
    with pytest.raises(aa.ArtefactError, match="A LoRA does not fit"):
        write_official(aa.attach(model, aa.LoRAConfig(targets="query")))
