"""The main job, in small: a few steps on a tiny model, from the user's own rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import anyadapter as aa
from anyadapter import quickstart

ROWS = [
    {"prompt": f"Say {word}:", "completion": f" {word}"}
    for word in ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def base(smollm_folder: Path, tmp_path: Path) -> str:
    """A tiny model of the same family with the real tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(smollm_folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def test_the_job_leaves_a_report_and_goes_on_where_it_was(base: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quickstart.run(base=base, data=data, out=out, steps=2)
    report = (out / "report.md").read_text()
    for name, recipe in quickstart.RECIPES.items():
        assert recipe.title in report
        assert aa.inspect(out / name / "adapter")["parameters"] > 0
    assert (out / "accuracy.png").stat().st_size > 1000
    assert "anyadapter eval" in report

    trained = (out / "lora" / "adapter" / "adapter_model.safetensors").read_bytes()
    (out / "prefix" / "metrics.json").unlink()  # as if it had been killed in its last adapter
    quickstart.run(base=base, data=data, out=out, steps=2)
    assert (out / "lora" / "adapter" / "adapter_model.safetensors").read_bytes() == trained


def test_another_job_in_the_same_folder_is_refused_before_anything_changed(
    base: str, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    files = quickstart.write_rows(out, ROWS[:5], ROWS[5:])
    before = {path: path.read_bytes() for path in files.values()}
    with pytest.raises(aa.ConfigError, match="another folder with --out"):
        quickstart.run(base=base, data=data, out=out, steps=2)
    assert {path: path.read_bytes() for path in files.values()} == before


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "no rows"), ('{"prompt": "a", "completion": "b"}', "needs at least 10"), ('{"x": 1}', "expected|columns")],
)
def test_data_that_cannot_be_used(base: str, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(aa.DataError, match=message):
        quickstart.run(base=base, data=path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_default_task_is_balanced_and_keeps_its_sets_apart() -> None:
    train_rows, test_rows = quickstart.spam_rows(0)
    assert (len(train_rows), len(test_rows)) == (quickstart.TRAIN, quickstart.TEST)
    for rows in (train_rows, test_rows):
        assert sum(row["completion"] == " spam\n" for row in rows) * 2 == len(rows)
    prompts: Any = [{row["prompt"] for row in rows} for rows in (train_rows, test_rows)]
    assert not prompts[0] & prompts[1]
    assert quickstart.spam_rows(0) == (train_rows, test_rows)
    assert quickstart.spam_rows(1)[1] != test_rows
