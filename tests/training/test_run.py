"""Whole runs: what they leave, how they go on, what they refuse."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import anyadapter as aa
from anyadapter.training import report
from anyadapter.training.config import read_config
from anyadapter.training.run import train

KILL = """
import os, signal, sys
import torch
from anyadapter.training import report, run

torch.set_num_threads(1)

def die(self, args, state, control, **kwargs):
    if state.global_step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

report.LogFile.on_step_end = die
run.train(sys.argv[1], progress=False)
"""


def changed(config: dict, **sections) -> dict:
    return {
        k: {**v, **sections[k]} if isinstance(sections.get(k), dict) else sections.get(k, v) for k, v in config.items()
    }


def left(folder: Path) -> tuple:
    """Everything of a finished run that must not depend on how it got there."""
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    return json.loads((folder / "metrics.json").read_text()), (folder / "log.jsonl").read_text(), tensors


def same(one: Path, other: Path) -> None:
    metrics, log, tensors = left(one)
    assert left(other)[0] == metrics
    assert left(other)[1] == log
    for name, tensor in left(other)[2].items():
        assert torch.equal(tensor, tensors[name]), name


@pytest.fixture
def interrupt(monkeypatch):
    """Interrupt the next run at a step, as Ctrl-C does."""

    def at(step: int, stage: int = 1) -> None:
        def stop(self, args, state, control, **kwargs):
            if (self.stage, state.global_step) == (stage, step):
                monkeypatch.undo()
                raise KeyboardInterrupt

        monkeypatch.setattr(report.LogFile, "on_step_end", stop)

    return at


def test_a_run_leaves_an_adapter_that_loads_and_nothing_of_the_base(config, model):
    result = train(config, progress=False)
    assert {p.name for p in result.folder.iterdir()} == {
        "adapter", "checkpoints", "config.yaml", "log.jsonl", "loss.png", "metrics.json", "versions.json",
    }  # fmt: skip
    assert (result.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    biggest = max(p.stat().st_size for p in result.folder.rglob("*.safetensors"))
    assert biggest < 4 * result.metrics["base_parameters"]
    assert result.metrics["base_parameters"] == sum(p.numel() for p in model.parameters())
    adapter = aa.load(model, result.adapter)
    assert adapter.parameter_count() == result.metrics["adapter_parameters"]
    assert any(t.abs().sum() > 0 for name, t in adapter.tensors().items() if "lora_B" in name)
    losses = [json.loads(line) for line in (result.folder / "log.jsonl").read_text().splitlines()]
    evaluations = [line["eval_loss"] for line in losses if "eval_loss" in line]
    assert evaluations[-1] < evaluations[0]
    assert result.metrics["eval_loss"] == min(evaluations)


def test_a_given_model_is_given_back_as_it_was_but_for_the_adapter(config, model, tokenizer):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    use_cache, pad = model.config.use_cache, model.config.pad_token_id
    config = changed(
        config, training={"precision": "bf16", "gradient_checkpointing": True, "steps": 2, "eval_every": 1}
    )
    result = train(config, model=model, tokenizer=tokenizer, progress=False)
    assert (model.config.use_cache, model.config.pad_token_id) == (use_cache, pad)
    assert "forward" not in model.__dict__
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    saved = load_file(result.adapter / "adapter_model.safetensors")
    trained = list(aa.adapters(model)["default"].tensors().values())
    assert sorted(t.sum().item() for t in saved.values()) == sorted(t.sum().item() for t in trained)
    aa.detach(model)


def test_killed_and_started_again_it_ends_as_if_undisturbed(config, tmp_path):
    script = tmp_path / "kill.py"
    script.write_text(KILL)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    killed = subprocess.run([sys.executable, str(script), str(path), "7"], capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    folder = Path(config["output"])
    assert not (folder / "metrics.json").exists()
    assert '"step": 6' in (folder / "log.jsonl").read_text()  # written after the checkpoint it goes on from
    half = folder / "checkpoints" / "stage-1" / "checkpoint-6"  # and a checkpoint that was being written
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_step": 6, "best')
    resumed = train(path, progress=False)
    assert resumed.resumed_from == 4
    undisturbed = train({**config, "output": str(tmp_path / "undisturbed")}, progress=False)
    assert undisturbed.resumed_from is None
    same(resumed.folder, undisturbed.folder)


def test_cut_off_after_its_last_step_it_only_finishes(config, tmp_path):
    first = train(config, progress=False)
    metrics, log, tensors = left(first.folder)
    (first.folder / "metrics.json").unlink()
    (first.folder / "adapter" / "adapter_model.safetensors").unlink()
    again = train(config, progress=False)
    assert again.resumed_from == 12
    assert again.metrics == metrics
    assert left(again.folder)[1] == log
    assert all(torch.equal(t, tensors[name]) for name, t in left(again.folder)[2].items())


def test_a_finished_run_says_so_and_is_overwritten_only_on_demand(config, capsys):
    first = train(config, progress=False)
    stamp = (first.folder / "metrics.json").stat().st_mtime_ns
    again = train(config, progress=False)
    assert again.was_finished
    assert again.metrics == first.metrics
    assert "finished" in capsys.readouterr().err
    assert (first.folder / "metrics.json").stat().st_mtime_ns == stamp
    (first.folder / "notes.txt").write_text("mine")
    assert not train(config, overwrite=True, progress=False).was_finished
    assert (first.folder / "notes.txt").read_text() == "mine"
    assert (first.folder / "metrics.json").stat().st_mtime_ns != stamp


def test_a_folder_with_another_run_is_refused(config, data, tmp_path):
    train(config, progress=False)
    other = changed(config, training={**config["training"], "learning_rate": 1e-3})
    with pytest.raises(aa.ConfigError, match=r"training\.learning_rate is 0\.01 there and 0\.001 here"):
        train(other, progress=False)
    data.write_text(data.read_text().replace("green", "grey"))
    with pytest.raises(aa.ConfigError, match="other data"):
        train(config, progress=False)
    for overwrite in (False, True):
        with pytest.raises(aa.ConfigError, match="holds no run"):
            train({**config, "output": str(tmp_path)}, overwrite=overwrite, progress=False)
    assert data.exists()


def test_equal_seeds_give_equal_runs_and_other_seeds_others(config, tmp_path):
    runs = [
        train(changed(config, training={"seed": seed}, output=str(tmp_path / name)), progress=False)
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    same(runs[0].folder, runs[1].folder)
    assert runs[2].metrics["train_loss"] != runs[0].metrics["train_loss"]


# ---------------------------------------------------------------------- the best, and stopping early


def test_it_ends_with_the_adapter_of_the_lowest_evaluation_loss(config, model):
    # A rate so high that the loss soon rises again.
    result = train(
        changed(config, training={"learning_rate": 3.0, "steps": 10, "eval_every": 1, "save_every": 1}), progress=False
    )
    log = [json.loads(line) for line in (result.folder / "log.jsonl").read_text().splitlines()]
    evaluations = {line["step"]: line["eval_loss"] for line in log if "eval_loss" in line}
    best = min(evaluations, key=lambda step: evaluations[step])
    assert best != max(evaluations)
    assert (result.metrics["best_step"], result.metrics["eval_loss"]) == (best, evaluations[best])
    kept = result.folder / "checkpoints" / "stage-1" / f"checkpoint-{best}" / "adapter_model.safetensors"
    assert kept.read_bytes() == (result.adapter / "adapter_model.safetensors").read_bytes()


def test_it_stops_when_the_evaluation_loss_no_longer_falls_and_goes_on_so_too(config, interrupt, tmp_path):
    early = {"learning_rate": 3.0, "steps": 30, "eval_every": 1, "save_every": 1, "early_stopping_patience": 3}
    config = changed(config, training=early)
    undisturbed = train({**config, "output": str(tmp_path / "undisturbed")}, progress=False)
    assert undisturbed.metrics["steps"] == undisturbed.metrics["best_step"] + 3 < 30
    interrupt(undisturbed.metrics["steps"] - 1)
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=False)
    same(train(config, progress=False).folder, undisturbed.folder)


def test_a_run_that_was_moved_goes_on_and_finds_its_best(config, interrupt, tmp_path):
    config = changed(config, training={"learning_rate": 3.0, "steps": 10, "eval_every": 1, "save_every": 1})
    undisturbed = train({**config, "output": str(tmp_path / "undisturbed")}, progress=False)
    assert undisturbed.metrics["best_step"] < 8
    interrupt(9)
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=False)
    Path(config["output"]).rename(tmp_path / "moved")
    same(train({**config, "output": str(tmp_path / "moved")}, progress=False).folder, undisturbed.folder)


# ---------------------------------------------------------------------- stages


class TestStages:
    @pytest.fixture
    def staged(self, config):
        stages = [{"groups": ["shift"], "steps": 4}, {"groups": ["factor"], "steps": 6, "learning_rate": 0.1}]
        adapter = {"method": "test_affine"}
        training = {"stages": stages, "eval_every": 2, "save_every": 2}
        rows = [json.loads(line) for line in Path(config["data"]["train"]).read_text().splitlines()]
        tasks = "".join(json.dumps({**row, "task": i % 2}) + "\n" for i, row in enumerate(rows))
        Path(config["data"]["train"]).write_text(tasks)
        return {**changed(config, training=training), "adapter": adapter}

    def test_each_trains_its_groups_only(self, staged):
        folder = train(staged, progress=False).folder
        after_first = load_file(folder / "checkpoints" / "stage-1" / "adapter" / "adapter_model.safetensors")
        at_the_end = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert after_first["shift"].abs().sum() > 0
        assert torch.equal(after_first["factor"], torch.zeros_like(after_first["factor"]))
        assert torch.equal(at_the_end["shift"], after_first["shift"])
        assert at_the_end["factor"].abs().sum() > 0
        rates = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert max(line.get("learning_rate", 0) for line in rates if line["stage"] == 1) == pytest.approx(0.01)
        assert max(line.get("learning_rate", 0) for line in rates if line["stage"] == 2) == pytest.approx(0.1)
        assert json.loads((folder / "metrics.json").read_text())["steps"] == 10

    @pytest.mark.parametrize(("stage", "step"), [(1, 3), (2, 1), (2, 5)])
    def test_interrupted_anywhere_they_end_the_same(self, staged, interrupt, tmp_path, stage, step):
        undisturbed = train({**staged, "output": str(tmp_path / "undisturbed")}, progress=False)
        interrupt(step, stage)
        with pytest.raises(KeyboardInterrupt):
            train(staged, progress=False)
        same(train(staged, progress=False).folder, undisturbed.folder)

    def test_a_group_the_adapter_has_not_is_refused(self, staged):
        staged["training"]["stages"] = [{"groups": ["sift"]}]
        with pytest.raises(aa.ConfigError, match="shift"):
            train(staged, progress=False)


# ---------------------------------------------------------------------- quantised


class TestQuantised:
    @pytest.fixture
    def rounded(self, config):
        return {**changed(config, training={"learning_rate": 0.05}), "quantize": {"bits": 1}}

    def test_it_learns_and_ends_packed(self, rounded, model):
        result = train(rounded, progress=False)
        log = [json.loads(line) for line in (result.folder / "log.jsonl").read_text().splitlines()]
        evaluations = [line["eval_loss"] for line in log if "eval_loss" in line]
        assert evaluations[-1] < evaluations[0]
        adapter = aa.load(model, result.adapter)
        assert {matrix.bits for matrix in adapter.packed.values()} == {1}
        assert set(adapter.packed) == set(adapter.tensors())
        with pytest.raises(aa.ArtefactError, match="is packed"):
            aa.load(model, result.adapter, "again", trainable=True)

    def test_its_checkpoints_hold_latents_that_training_goes_on_from(self, rounded, model):
        folder = train(rounded, progress=False).folder / "checkpoints" / "stage-1"
        last = max(folder.iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
        adapter = aa.load(model, last, trainable=True)
        assert not adapter.packed
        for name, tensor in adapter.tensors().items():
            assert tensor.unique().numel() > 2, name
            assert adapter.values()[name].unique().numel() == 2, name

    @pytest.mark.parametrize("stages", [[], [{"steps": 6}, {"steps": 6, "learning_rate": 0.01}]])
    def test_interrupted_it_ends_the_same(self, rounded, interrupt, tmp_path, stages):
        rounded = changed(rounded, training={**rounded["training"], "stages": stages, "eval_every": 2, "save_every": 2})
        undisturbed = train({**rounded, "output": str(tmp_path / "undisturbed")}, progress=False)
        interrupt(3, stage=max(len(stages), 1))
        with pytest.raises(KeyboardInterrupt):
            train(rounded, progress=False)
        resumed = train(rounded, progress=False)
        assert resumed.resumed_from == 2
        same(resumed.folder, undisturbed.folder)

    def test_given_its_settings_again_they_are_the_same(self, rounded):
        read = read_config(rounded)
        assert read_config(read.to_dict()) == read
        assert (read.quantize.bits, read.quantize.matrices) == (1, None)
        assert "quantize" not in read_config({k: v for k, v in rounded.items() if k != "quantize"}).to_dict()
        some = read_config({**rounded, "quantize": {"bits": 2, "matrices": ["*lora_A*"]}})
        assert some.quantize.matrices == ("*lora_A*",)


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainin": {}}, "no section 'trainin'.*'training'"),
        ({"training": {"learning_rat": 1}}, "no setting 'learning_rat'.*'learning_rate'"),
        ({"data": {"train": "x.jsonl", "templat": "alpaca"}}, "no setting 'templat'.*'template'"),
        ({"adapter": {"method": "lora", "rnk": 4}}, "no setting 'rnk'.*'rank'"),
        ({"adapter": {"method": "lorra"}}, "no method 'lorra'.*'lora'"),
        ({"base": {"name": "x", "trust_remote_code": True}}, "no setting 'trust_remote_code'"),
        ({"data": {"train": "x.jsonl", "template": "alpacca"}}, "no prompt template 'alpacca'.*'alpaca'"),
        ({"training": {"precision": "fp8"}}, "precision is 'fp8'"),
        ({"training": {"schedule": "linea"}}, "schedule is 'linea'"),
        ({"training": {"batch_size": 0}}, "batch_size is 0"),
        ({"training": {"batch_size": "many"}}, "not supported between"),
        ({"training": {"eval_every": 4, "save_every": 6}}, "a multiple of eval_every"),
        ({"training": {"early_stopping_patience": 2}, "data": {"train": "DATA"}}, "needs evaluation rows"),
        ({"base": {"dtype": "int8"}}, "no dtype for weights"),
        ({"quantize": {"bits": 3}}, "1, 2, 4 or 8 bits"),
        ({"quantize": {"bit": 1}}, "no setting 'bit'.*'bits'"),
        ({"data": None}, "need a section 'data'|is None|missing"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(config, data, change, message):
    change = json.loads(json.dumps(change).replace("DATA", str(data)))
    with pytest.raises(aa.ConfigError, match=message):
        train({**config, **change}, progress=False)
    assert not Path(config["output"]).exists()


def test_a_file_is_read_as_its_contents_are(config, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"base: smollm2\nadapter: {{method: lora, rank: 4}}\ndata: {{train: a.jsonl}}\noutput: {tmp_path / 'out'}\n"
        "training: {learning_rate: 3e-4, warmup: 1E2, stages: [{groups: a, steps: 3}]}\n"
    )
    read = read_config(path)
    assert (read.base.name, read.training.learning_rate, read.training.warmup) == ("smollm2", 3e-4, 100)
    assert read_config(read.to_dict()) == read
    assert read.training.stage(0).steps == 3
    path.write_text("a: [1")
    with pytest.raises(aa.ConfigError, match="not YAML"):
        read_config(path)
    with pytest.raises(aa.ConfigError, match="cannot be read"):
        read_config(tmp_path / "none.yaml")


def test_bad_data_is_refused_before_anything_is_made(config, data):
    data.write_text(data.read_text() + '{"instruction": "no answer?"}\n')
    line = len(data.read_text().splitlines())
    with pytest.raises(aa.DataError, match=rf"train\.jsonl:{line}: "):
        train(config, progress=False)
    assert not Path(config["output"]).exists()
