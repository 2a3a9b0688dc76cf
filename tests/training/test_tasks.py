"""Training with a task column: names become rows, routing has a rate of its own, and a run goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import rows
from transformers import TrainingArguments

import anyadapter as aa
from anyadapter.methods.language.mhr import MHR
from anyadapter.training import report
from anyadapter.training.run import train
from anyadapter.training.trainer import AdapterTrainer

TASKS = ["cats", "others"]


@pytest.fixture
def tasks(config: dict, tmp_path: Path) -> dict:
    """A small run of MHR on rows that name their task."""
    path = tmp_path / "tasks.jsonl"
    named = [{**row, "task": TASKS["cat" not in row["instruction"]]} for row in rows()]
    path.write_text("".join(json.dumps(row) + "\n" for row in named))
    return {
        **config,
        "adapter": {"method": "mhr", "tasks": TASKS, "rank": 2, "skills": 3, "splits": 4, "weights": "relaxed"},
        "data": {**config["data"], "train": str(path), "fields": {"task_ids": "task"}},
        "training": {**config["training"], "learning_rates": {"routing": 0.1}, "weight_decays": {"routing": 0.0}},
    }


def test_a_run_with_tasks_is_saved_and_goes_on_where_it_stopped(
    tasks: dict, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train({**tasks, "output": str(tmp_path / "whole")}, progress=False)
    adapter = aa.load(model, whole.adapter)
    assert isinstance(adapter, MHR)
    assert adapter.config.tasks == ("cats", "others")
    moved = [t.abs().max() for n, t in adapter.tensors().items() if n.endswith("module_logits")]
    assert min(moved) > 0.05  # with the adapters' rate of 1e-2 it would be below: twelve steps with a linear decline

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(report.LogFile, "on_step_end", stop)
    broken = {**tasks, "output": str(tmp_path / "broken")}
    with pytest.raises(KeyboardInterrupt):
        train(broken, progress=False)
    result = train(broken, progress=False)
    assert result.resumed_from == 4
    one, other = (load_file(r.adapter / "adapter_model.safetensors") for r in (whole, result))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_groups_have_rates_and_decays_of_their_own(model: Any, tmp_path: Path) -> None:
    adapter = aa.attach(model, aa.MHRConfig(tasks=("a", "b"), splits=4))
    arguments = TrainingArguments(str(tmp_path), learning_rate=1e-3, weight_decay=0.01, use_cpu=True, report_to=[])
    trainer = AdapterTrainer(model, arguments, learning_rates={"routing": 0.1}, weight_decays={"routing": 0.0})
    rates = {
        id(p): (group["lr"], group["weight_decay"])
        for group in trainer.create_optimizer().param_groups
        for p in group["params"]
    }
    assert len(rates) == len(list(adapter.parameters()))
    assert {rates[id(p)] for p in adapter.group("routing")} == {(0.1, 0.0)}
    assert {rates[id(p)] for p in adapter.group("inventory")} == {(1e-3, 0.01)}
    with pytest.raises(aa.ConfigError, match=r"no group 'routin'\. Did you mean 'routing'"):
        AdapterTrainer(model, arguments, learning_rates={"routin": 0.1}).create_optimizer()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"adapter": {"tasks": ["cat", "others"]}},
            r"tasks\.jsonl:1: MHR 'default' has no task 'cats'\. Did you mean 'cat'",
        ),
        ({"data": {"fields": {"task_ids": "tsk"}}}, r"no column 'tsk', which fields maps to 'task_ids'.* 'task'"),
        ({"data": {"fields": {}}}, "no 'task_ids', which the adapter reads as a signal"),
    ],
)
def test_a_row_without_a_known_task_is_named(tasks: dict, change: dict[str, Any], message: str) -> None:
    changed = {key: {**tasks[key], **values} for key, values in change.items()}
    with pytest.raises(aa.DataError, match=message):
        train({**tasks, **changed}, progress=False)
