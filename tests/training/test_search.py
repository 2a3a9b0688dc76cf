"""Searches for settings: every combination is an ordinary run, and the best is told by the evaluation rows."""

import errno
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

import anyadapter as aa
from anyadapter.cli import app
from anyadapter.formats import files
from anyadapter.training import search as searching
from anyadapter.training.run import train
from anyadapter.training.search import search

SPREAD = {"training.learning_rate": [1e-6, 1e-2], "adapter.rank": [2, 4]}


def tensors(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_each_combination_is_the_run_it_would_be_alone_and_the_lowest_loss_is_best(config, model, tmp_path):
    result, found = search({**config, "search": SPREAD}, progress=False)
    names = [f"training.learning_rate={rate},adapter.rank={rank}" for rate in (1e-6, 1e-2) for rank in (2, 4)]
    assert list(found["runs"]) == names
    assert json.loads((tmp_path / "run" / "search.json").read_text()) == found
    assert found["measure"] == "eval_loss"
    assert found["runs"][found["best"]] == min(found["runs"].values()) == result.metrics["eval_loss"]
    assert found["best"].startswith("training.learning_rate=0.01,")
    assert result.folder == tmp_path / "run" / found["best"]
    assert aa.load(model, result.adapter).config.rank == int(found["best"][-1])

    alone = {**config, "adapter": {**config["adapter"], "rank": 2}, "output": str(tmp_path / "alone")}
    other, mine = tensors(train(alone, progress=False).folder), tensors(tmp_path / "run" / names[2])
    assert all(torch.equal(tensor, mine[name]) for name, tensor in other.items())


def test_the_command_prints_the_best_run_and_what_the_others_reached(config, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**config, "search": {"training.learning_rate": [1e-6, 1e-2]}}))
    result = CliRunner().invoke(app, ["train", str(file), "--json"])
    shown = json.loads(result.stdout)
    assert shown["search"] == json.loads((tmp_path / "run" / "search.json").read_text())
    assert shown["folder"] == str(tmp_path / "run" / "training.learning_rate=0.01")
    assert "training.learning_rate=0.01: eval_loss" in result.stderr


def test_an_interrupted_search_goes_on_and_a_finished_one_does_nothing(config, tmp_path, monkeypatch):
    asked = {**config, "search": {"adapter.rank": [2, 3]}}
    calls = []

    def interrupted(run, **options):
        calls.append(run.adapter.rank)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(run, **options)

    monkeypatch.setattr(searching, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(asked, progress=False)
    assert not (tmp_path / "run" / "search.json").exists()
    before = (tmp_path / "run" / "adapter.rank=2" / "metrics.json").stat().st_mtime_ns
    _, found = search(asked, progress=False)
    assert calls == [2, 3, 2, 3]
    assert (tmp_path / "run" / "adapter.rank=2" / "metrics.json").stat().st_mtime_ns == before
    result, again = search(asked, progress=False)
    assert result.was_finished
    assert again == found


def test_a_run_that_diverges_does_not_end_the_search(config, tmp_path):
    config["training"] |= {"keep_best": False, "max_grad_norm": 1e9}
    spread = {"training.learning_rate": [1e30, 1e-2]}
    result, found = search({**config, "quantize": {"bits": 1}, "search": spread}, progress=False)
    assert found["runs"] == {"training.learning_rate=1e+30": None, found["best"]: result.metrics["eval_loss"]}
    with pytest.raises(aa.ArtefactError, match="None of the 1 runs .* ended with a finite eval_loss"):
        search({**config, "quantize": {"bits": 1}, "search": {"training.learning_rate": [1e30]}}, progress=False)


def test_a_full_disk_ends_a_search_and_is_not_taken_for_a_bad_setting(config, tmp_path, monkeypatch):
    asked = {**config, "search": {"adapter.rank": [2, 3]}}

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full)
        with pytest.raises(aa.ArtefactError, match="No space left on device"):
            search(asked, progress=False)
    assert not (tmp_path / "run" / "adapter.rank=3").exists()
    assert not (tmp_path / "run" / "search.json").exists()
    _, found = search(asked, progress=False)
    assert None not in found["runs"].values()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search": {}}, "search is empty"),
        ({"search": {"adapter.rank": 4}}, r"adapter\.rank: 4; expected lists"),
        ({"search": {"adapter.rank": []}}, "expected lists"),
        ({"search": {"rank": [4]}}, "expected lists such as `adapter.scale"),
        ({"search": {"adaptor.rank": [4]}}, "no section 'adaptor'. Did you mean 'adapter'"),
        ({"search": {"adapter.rankk": [4]}}, "no setting 'rankk'"),
        ({"search": {"adapter.rank": [4, 0]}}, r"rank is 0; it must be"),
        ({"search": {"adapter.rank": [4]}, "data": None}, "need a section 'data'"),
        ({"search": {"adapter.targets": [["self_attention.query"] * 20]}}, "too long to call a folder by"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_the_first_run(change, message, config, tmp_path):
    config |= change
    if config["data"] is None:
        del config["data"]
    with pytest.raises(aa.ConfigError, match=message):
        search(config, progress=False)
    assert not (tmp_path / "run").exists()


def test_a_search_needs_rows_to_choose_by_and_a_folder_of_its_own(config, tmp_path):
    asked = {**config, "search": {"adapter.rank": [2]}}
    with pytest.raises(aa.ConfigError, match="needs evaluation rows"):
        search({**asked, "data": {**config["data"], "eval_rows": 0}}, progress=False)
    train(config, progress=False)
    with pytest.raises(aa.ConfigError, match="holds a run; choose another output folder"):
        search(asked, progress=False)
