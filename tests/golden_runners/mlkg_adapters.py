"""Multilingual knowledge adapters: the set on whole tiny encoders, the wide baseline, the losses, files and rankings."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_cases import Golden
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertModel, XLMRobertaConfig, XLMRobertaModel

import anyadapter as aa
from anyadapter.formats.mlkg import keys, read_official, write_official
from anyadapter.methods.language.mlkg import MLKG, WIDE, info_nce, pool
from anyadapter.training.ranking import ranking, ranks

MARKS = (".adapters.", ".adapter_fusion_layer.")


def run(case: Golden) -> None:
    parts = {name.partition("/")[2].partition("/")[0] for name in case.tensors if name.startswith("grad/")}
    if "ep_stage" in parts:
        adapter_set(case)
    elif "adapter" in case.about:
        simple_adapter(case)
    elif "files" in case.about:
        files(case)
    elif "out/loss" in case.tensors:
        losses(case)
    elif "out/ranks0" in case.tensors:
        rankings(case)
    else:
        pytest.fail(f"{case.name}: no runner knows this case")


def adapter_set(case: Golden) -> None:
    """Outputs with none, each and all, and the gradients of both stages, which reach nothing else."""
    model, roles = base(case), tuple(case.about["adapters"])
    state = {key: tensor for key, tensor in case.part("state").items() if any(mark in key for mark in MARKS)}
    about = next(iter(case.about["adapters"].values()))
    assert all(each == about for each in case.about["adapters"].values())
    config = aa.MLKGConfig(
        roles=dict.fromkeys(roles, ""), reduction=about["reduction_factor"], activation=about["non_linearity"]
    )
    adapter = aa.attach(model, config)
    assert isinstance(adapter, MLKG)
    key_of = keys(adapter)
    adapter.load_tensors({name: state.pop(key) for name, key in key_of.items()})
    assert not state

    outputs = {"base": (), **{role: (role,) for role in roles}, "fuse": roles}
    assert {f"out/{name}" for name in outputs} == {key for key in case.tensors if key.startswith("out/")}
    for name, used in outputs.items():
        adapter.use(*used)
        case.close(model(**case.part("in")).last_hidden_state, f"out/{name}")
    adapter.use(*reversed(roles))
    case.close(model(**case.part("in")).last_hidden_state, "out/fuse")

    first = roles[0]
    for stage, group, used in ((f"{first}_stage", first, (first,)), ("fusion_stage", "fusion", roles)):
        adapter.use(*used)
        adapter.train_only(group)
        adapter.zero_grad()
        model(**case.part("in")).last_hidden_state.pow(2).mean().backward()
        gradients = {key_of[name]: t.grad for name, t in adapter.tensors().items() if t.grad is not None}
        assert set(gradients) == set(case.part(f"grad/{stage}")) == set(case.about[f"trainable_{stage}"])
        for key, gradient in gradients.items():
            case.close(gradient, f"grad/{stage}/{key}")
        assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("anyadapter."))


def simple_adapter(case: Golden) -> None:
    """One wide adapter after attention and feed-forward: the hidden states and the gradients."""
    about = case.about["adapter"]
    model = base(case)
    assert all(about[key] for key in ("mh_adapter", "output_adapter"))
    assert not any(about[key] for key in ("original_ln_before", "residual_before_ln"))  # it reads the sub-layer alone
    settings = {
        "reduction": about["reduction_factor"],
        "activation": about["non_linearity"],
        "scaling": about["scaling"],
    }
    config = replace(WIDE, **settings)
    assert config.init == about["init_weights"]
    adapter = aa.attach(model, config, "baseline")
    adapter.load_tensors({plain(k): tensor for k, tensor in case.part("state").items() if MARKS[0] in k})
    out = model(**case.part("in")).last_hidden_state
    case.close(out, "out/baseline")
    out.pow(2).mean().backward()
    gradients = {name: tensor.grad for name, tensor in adapter.tensors().items()}
    assert set(gradients) == {plain(key) for key in case.part("grad")}
    for key in case.part("grad"):
        case.close(gradients[plain(key)], f"grad/{key}")
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("anyadapter."))


def files(case: Golden) -> None:
    """A set in the authors' files: loaded as a whole, with safe files, and written again with the same bytes."""
    model, inputs = base(case), case.part("in")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "theirs"
        put(case, folder)
        with pytest.raises(aa.ArtefactError, match="pickle"):
            read_official(folder, aa.Host.of(model))
        config, tensors = read_official(folder, aa.Host.of(model), allow_pickle=True)
        adapter = aa.attach(model, config)
        adapter.load_tensors(tensors)
        case.close(model(**inputs).last_hidden_state, "out/fuse")

        write_official(adapter, Path(name) / "ours", model)
        written = {path.relative_to(Path(name) / "ours").as_posix() for path in (Path(name) / "ours").rglob("*.*")}
        assert written == set(case.about["files"])
        for file, about in case.about["files"].items():
            if file.endswith(".json"):
                assert json.loads((Path(name) / "ours" / file).read_text()) == about, file
                continue
            mine = torch.load(Path(name) / "ours" / file, weights_only=True)
            official = case.part(f"ckpt/{file}")
            assert [(key, list(tensor.shape)) for key, tensor in mine.items()] == list(about.items())
            assert all(mine[key].numpy().tobytes() == tensor.numpy().tobytes() for key, tensor in official.items())

        for file in case.about["files"]:
            if file.endswith(".bin"):
                safe = {"pytorch_adapter.bin": "adapter", "pytorch_model_adapter_fusion.bin": "model_adapter_fusion"}
                path = folder / file
                save_file(case.part(f"ckpt/{file}"), path.with_name(f"{safe[path.name]}.safetensors"))
                path.unlink()
        _, again = read_official(folder, aa.Host.of(base(case)))
        assert all(torch.equal(tensor, again[key]) for key, tensor in tensors.items())


def put(case: Golden, folder: Path) -> None:
    """The files of the case, as the authors' code left them."""
    for file, about in case.about["files"].items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        if file.endswith(".json"):
            (folder / file).write_text(json.dumps(about))
        else:
            torch.save({key: case.tensors[f"ckpt/{file}/{key}"] for key in about}, folder / file)


def losses(case: Golden) -> None:
    """InfoNCE in batches and with explicit negatives, and the gradients through the pooling."""
    given = {key: tensor.clone().requires_grad_() for key, tensor in case.part("in").items()}
    query, positive = (
        pool(given[name], torch.ones(given[name].shape[:2]), official=True)
        for name in ("query_tokens", "positive_tokens")
    )
    paired = info_nce(query, positive)
    unpaired = info_nce(given["ea_query"], given["ea_positive"], given["ea_negative"])
    case.close(paired.reshape(1), "out/loss")
    case.close(unpaired.reshape(1), "out/ea_loss")
    (paired + unpaired).backward()
    for key in case.part("grad"):
        case.close(given[key].grad, f"grad/{key}")


def rankings(case: Golden) -> None:
    """Ranks, and hit@k and MRR by both ways of counting; which k, the name of the official numbers says."""
    given, names = case.part("in"), [key.removeprefix("out/") for key in case.tensors if "official" in key]
    assert len(names) == 2
    for name in names:
        prefix = name.partition("official")[0]
        found = ranks(given[f"{prefix}query"], given[f"{prefix}candidates"], given[f"{prefix}gold_index"])
        assert found.tolist() == case.tensors[f"out/{prefix}ranks0"].tolist()
        hits = [int(part.removeprefix("hit")) for part in name.split("_") if part.startswith("hit")]
        case.close(torch.tensor(list(ranking(found, hits, official=True).values())), f"out/{name}")
        case.close(torch.tensor(list(ranking(found, hits).values())), f"out/{prefix}standard_hit1_hitk_mrr")


def base(case: Golden) -> nn.Module:
    """The encoder; the name of a case says whether it is XLM-R's."""
    config, model = (XLMRobertaConfig, XLMRobertaModel) if "xlmr" in case.name else (BertConfig, BertModel)
    encoder = model(config(**case.about["config"])).eval()
    state = case.part("state").items()
    encoder.load_state_dict({key: tensor for key, tensor in state if not any(mark in key for mark in MARKS)})
    return encoder


def plain(key: str) -> str:
    """``<block>.adapters.<name>.adapter_down.0.weight`` is ``<block>.adapter_down.weight`` of a lone bottleneck."""
    block, rest = key.split(MARKS[0])
    return f"{block}.{rest.split('.', 1)[1].replace('adapter_down.0', 'adapter_down')}"
