"""The authors' files of knowledge adapters: sets, single adapters under other names, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import case
from mixing import randomise
from torch import Tensor, nn

import anyadapter as aa
from anyadapter.formats.mlkg import config_id, read_official, write_official
from anyadapter.methods.language.mlkg import MLKG, ROLES

FILES = ("adapter_config.json", "pytorch_adapter.bin")


def build(name: str = "bert") -> nn.Module:
    return case(name).build().requires_grad_(False)


@torch.no_grad()
def run(model: nn.Module, name: str = "bert") -> Tensor:
    return case(name).output(model(**case(name).inputs(model, 2)))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MLKG, nn.Module]:
    """A set in the authors' files, the adapter and its encoder."""
    model = build()
    adapter = randomise(aa.attach(model, aa.MLKGConfig(reduction=2)), 1)
    folder = tmp_path_factory.mktemp("set")
    write_official(adapter, folder, model)
    return folder, adapter, model  # type: ignore[return-value]


@pytest.fixture
def copied(written: tuple[Path, MLKG, nn.Module], tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    for file in written[0].rglob("*.*"):
        target = tmp_path / "copy" / file.relative_to(written[0])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return tmp_path / "copy"


def read(folder: Any, model: nn.Module) -> Any:
    return read_official(folder, aa.Host.of(model), allow_pickle=True)


def test_a_set_is_read_again_in_an_encoder_with_a_head_too(written: tuple[Path, MLKG, nn.Module]) -> None:
    folder, adapter, model = written
    keys = list(torch.load(folder / "ep" / FILES[1], weights_only=True))
    assert all(key.startswith("encoder.layer.") for key in keys)  # though the model is BertForMaskedLM
    other = build()
    config, tensors = read(folder, other)
    aa.attach(other, config).load_tensors(tensors)
    assert config == adapter.config
    assert torch.equal(run(other), run(model))


def test_published_adapters_are_read_by_role_whatever_their_name_and_fusion_starts_afresh(
    written: tuple[Path, MLKG, nn.Module], tmp_path: Path
) -> None:
    _, adapter, model = written
    single = build()
    published = randomise(aa.attach(single, aa.MLKGConfig(roles={"mlki": ""}, reduction=2)), 5)
    write_official(published, tmp_path / "zip", single)
    assert not (tmp_path / "zip" / "adapter_fusion_config.json").exists()
    other = build()
    config, tensors = read({"tp": tmp_path / "zip" / "mlki", "ep": written[0] / "ep"}, other)
    loaded = aa.attach(other, config)
    loaded.load_tensors(tensors)
    assert config.roles == {"tp": ROLES["tp"], "ep": ROLES["ep"]}
    loaded.use("tp")
    assert torch.equal(run(other), run(single))
    adapter.use("ep")
    loaded.use("ep")
    assert torch.equal(run(other), run(model))
    adapter.use(*ROLES)
    value = next(t for name, t in loaded.tensors().items() if name.endswith("fusion.value.weight"))
    torch.testing.assert_close(value, torch.eye(len(value)), atol=2e-6, rtol=0)


def test_a_pickle_is_read_only_when_asked_for_and_never_run(copied: Path) -> None:
    model = build()
    with pytest.raises(aa.ArtefactError, match="allow_pickle"):
        read_official(copied, aa.Host.of(model))
    torch.save({"encoder.layer.0": Path("x")}, copied / "ts" / FILES[1])
    with pytest.raises(aa.ArtefactError, match="more than tensors"):
        read(copied, model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mh_adapter", True),
        ("residual_before_ln", False),
        ("phm_layer", True),
        ("scaling", 2.0),
        ("is_parallel", True),
        ("leave_out", [0]),
        ("new_setting", 1),
    ],
)
def test_a_setting_that_is_not_ours_is_refused_by_name(copied: Path, key: str, value: Any) -> None:
    file = copied / "es" / FILES[0]
    about = json.loads(file.read_text())
    about["config"][key] = value
    file.write_text(json.dumps(about))
    with pytest.raises(aa.ArtefactError, match=key):
        read(copied, build())


def test_adapters_of_other_settings_or_fusions_of_other_kinds_are_refused(copied: Path) -> None:
    for file, key, value in (
        ("ts/" + FILES[0], "reduction_factor", 8),
        ("adapter_fusion_config.json", "temperature", True),
    ):
        before = (copied / file).read_text()
        about = json.loads(before)
        about["config"][key] = value
        (copied / file).write_text(json.dumps(about))
        with pytest.raises(aa.ArtefactError, match=key):
            read(copied, build())
        (copied / file).write_text(before)


def test_missing_and_wrong_tensors_and_folders_are_told(copied: Path) -> None:
    file = copied / "es" / FILES[1]
    tensors = torch.load(file, weights_only=True)
    name = next(iter(tensors))
    torch.save({**tensors, name: tensors[name][:, :-1]}, file)
    with pytest.raises(aa.ArtefactError, match="expected"):
        read(copied, build())
    torch.save({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(aa.ArtefactError, match="missing"):
        read(copied, build())
    torch.save({**tensors, "encoder.layer.0.output.adapters.more": tensors[name]}, file)
    with pytest.raises(aa.ArtefactError, match="not known"):
        read(copied, build())
    (copied / "es" / FILES[0]).unlink()
    with pytest.raises(aa.ArtefactError, match=r"has the adapters ep, tp, ts|has the adapters"):
        read(copied, build())
    with pytest.raises(aa.ArtefactError, match="no adapters"):
        read(copied / "ep", build())


def test_what_their_files_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = build()
    few = aa.attach(model, aa.MLKGConfig(reduction=2, layers=(0,)), "few")
    other = aa.attach(model, aa.LoRAConfig(rank=2), "other")
    for adapter in (few, other):
        with pytest.raises(aa.ArtefactError, match="does not fit"):
            write_official(adapter, tmp_path / "none", model)
    assert not (tmp_path / "none").exists()


def test_the_name_of_the_settings_depends_on_what_they_say(written: tuple[Path, MLKG, nn.Module]) -> None:
    about = json.loads((written[0] / "ep" / FILES[0]).read_text())
    assert (
        config_id({**about["config"], "reduction_factor": 16}) == "9076f36a74755ac4"
    )  # AdapterHub's name of Pfeiffer's
    assert config_id(about["config"]) == about["config_id"] != "9076f36a74755ac4"
