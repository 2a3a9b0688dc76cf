"""A tiny base in a folder, and the settings of a small run."""

import json
from pathlib import Path

import pytest
import torch
from tiny import rows, save_base
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    save_base(folder)
    return folder


@pytest.fixture
def model(base: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.fixture(scope="session")
def tokenizer(base: Path):
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The task as a .jsonl file."""
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


@pytest.fixture
def config(base: Path, data: Path, tmp_path: Path) -> dict:
    """The settings of a small run, to be changed by a test."""
    return {
        "base": {"name": str(base)},
        "adapter": {"method": "lora", "rank": 4, "dropout": 0.1},
        "data": {"train": str(data), "eval_rows": 6, "template": "plain"},
        "training": {
            "steps": 12, "batch_size": 4, "accumulation": 2, "learning_rate": 1e-2, "log_every": 3, "eval_every": 4,
            "save_every": 4, "warmup": 2, "device": "cpu",
        },
        "output": str(tmp_path / "run"),
    }  # fmt: skip
