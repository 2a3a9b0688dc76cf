"""Our artefact: a folder with ``adapter_config.json``, ``adapter_model.safetensors`` and a model card.

The names are PEFT's. What PEFT knows (LoRA, prefix tuning, (IA)³) is written in PEFT's own layout, so that everything that
reads PEFT reads it; the rest has our tensor names, ``<module path>.<tensor>``. Either way the object under
``"anyadapter"`` in the configuration holds all that is needed to build the adapter again.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anyadapter.core.adapter import Adapter, check_tensors
from anyadapter.core.attach import build, check_name, get, place
from anyadapter.core.catalogue import config_from_dict, method
from anyadapter.core.errors import ArtefactError
from anyadapter.core.fingerprint import check_fingerprint, fingerprint
from anyadapter.core.host import Host
from anyadapter.formats import layouts
from anyadapter.formats.files import CONFIG, PICKLE, TENSORS, inside, read_json, read_pickle, read_tensors, write_folder
from anyadapter.formats.layouts import KEY
from anyadapter.formats.packed import STATISTICS, read_bits, write_bits
from anyadapter.parts.quantised import Packed
from anyadapter.quantize import fill, quantised, round_in_training

FORMAT_VERSION = 1


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    *,
    dtype: torch.dtype | None = None,
    layout: str | None = None,
    card: str | None = None,
    latents: bool = False,
) -> Path:
    """Save one attached adapter, and nothing of the base.

    Args:
        folder: made if missing; an artefact in it is replaced, never left half written.
        dtype: of the saved tensors; by default as they are.
        layout: ``"native"``, ``"peft"`` or ``"llm-adapters"``; by default PEFT's where that holds the adapter whole. The
            matrices of a quantised adapter are packed in ours, and dense in the others.
        card: text of the model card; by default one with the facts known here. A README.md that exists is kept.
        latents: save what a quantised adapter trains instead of its codes, to go on from with ``load(trainable=True)``.

    Returns:
        The folder.

    Raises:
        AttachError: no such adapter.
        ArtefactError: a tensor is empty, the disk is full, the layout cannot hold this adapter, or a quantised matrix
            cannot be packed.
    """
    host = Host.of(model)
    base_name = getattr(getattr(host.model, "config", None), "_name_or_path", "") or None
    adapter, base = get(host, name), fingerprint(host)
    return write(adapter, folder, base, base_name, dtype=dtype, layout=layout, card=card, latents=latents)


def write(
    adapter: Adapter,
    folder: str | Path,
    base: dict[str, Any],
    base_name: str | None,
    *,
    dtype: torch.dtype | None = None,
    layout: str | None = None,
    card: str | None = None,
    latents: bool = False,
) -> Path:
    """:func:`save_pretrained` of an adapter that need not be attached, given the fingerprint and name of its base."""
    chosen = layouts.by_name(layout) if layout else layouts.of(adapter)
    bits = quantised(adapter)
    if bits and latents and (adapter.packed or chosen.name != "native"):
        why = "it is packed and has none" if adapter.packed else f"the layout {chosen.name!r} has no place for them"
        raise ArtefactError(f"The latents of {adapter.name!r} cannot be saved: {why}.")
    config, tensors = chosen.write(adapter)
    if chosen.name != "native":  # the others hold what a quantised matrix stands for
        bits = {}
    elif bits and latents:
        tensors = adapter.tensors()
    if dtype is not None:
        tensors = {k: t.to(dtype) if t.is_floating_point() and k != STATISTICS else t for k, t in tensors.items()}
    config = {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        **config,
        KEY: {
            "format_version": FORMAT_VERSION,
            "library_version": version("anyadapter"),
            "method": adapter.config.method,
            "layout": chosen.name,
            "config": adapter.config.to_dict(),
            "scale": adapter.scale,
            **quantisation(adapter, bits),
            "tensors_sha256": digest(tensors),
            "base": base,
        },
    }
    folder = Path(folder)
    write_folder(folder, config, tensors, card or model_card(adapter, base_name))
    return folder


def quantisation(adapter: Adapter, bits: dict[str, int]) -> dict[str, Any]:
    """What a file says of quantised matrices, and how many numbers the adapter holds, which its bytes do not tell."""
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.tensors().items()}
    count = sum(tensor.numel() for tensor in adapter.tensors().values())
    return {"bits": write_bits(bits, shapes), "parameters": count} if bits else {}


def load(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    *,
    root: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    trainable: bool = False,
    check_base: bool = True,
    allow_pickle: bool = False,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """Attach a saved adapter: ours, PEFT's, or the LLM-Adapters authors'.

    Args:
        folder: a local folder, or a repository on the Hugging Face Hub (``"user/name"``).
        name: to attach it under.
        root: when given, ``folder`` is a name that must stay inside this folder.
        revision, token: of a Hub repository.
        trainable: go on training it; otherwise its tensors are frozen. A quantised adapter goes on from its latents.
        check_base: refuse an adapter trained on another base.
        allow_pickle: read a legacy ``adapter_model.bin`` (plain tensors only) where there is no safetensors file.

    Raises:
        ArtefactError: a file is missing, damaged, hostile or does not fit, or is packed and was to be trained; nothing was
            attached.
        BaseMismatchError: it was trained on another base.
        AttachError: the name is taken.
        TargetError, ConfigError: this host has no such parts, or the settings are not known.
    """
    host = Host.of(model)
    check_name(host, name)
    path = locate(folder, root=root, revision=revision, token=token)
    adapter = read(host, path, name, trainable=trainable, check_base=check_base, allow_pickle=allow_pickle, dtype=dtype)
    return place(host, adapter)


def read(
    host: Host,
    path: Path,
    name: str = "default",
    *,
    trainable: bool = False,
    check_base: bool = True,
    allow_pickle: bool = False,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """The adapter of a local folder, built for a host and not attached. Arguments and errors as of :func:`load`."""
    config = read_json(path / CONFIG)
    tensors = _tensors(path, allow_pickle)
    ours = config.get(KEY)
    if ours is not None:
        layout, adapter_config = _read_ours(path, ours, tensors)
        if check_base and "base" in ours:
            check_fingerprint(host, ours["base"])
    else:
        layout = layouts.detect(path, config, tensors)
        adapter_config = layout.read_config(config, tensors, host)
    adapter = build(host, adapter_config, name, dtype)
    mine = layout.read(config, tensors, adapter)
    check_tensors(adapter.tensors(), mine)
    bits = check_quantised(path, config, adapter, mine, trainable)
    fill(adapter, mine)
    round_in_training(adapter, {name: bits[name] for name in bits.keys() - quantised(adapter).keys()})
    if ours is not None and ours.get("scale", 1.0) != 1.0:
        adapter.scale = ours["scale"]
    if not trainable:
        adapter.requires_grad_(False)
    return adapter


def check_quantised(
    path: Path, config: dict[str, Any], trial: Adapter, values: Mapping[str, Tensor | Packed], trainable: bool
) -> dict[str, int]:
    """The bits of a file's quantised matrices.

    Raises:
        ArtefactError: it holds packed matrices and is to be trained, or a method that quantises them has others.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in trial.tensors().items()}
    bits, own = read_bits((config.get(KEY) or {}).get("bits"), shapes), quantised(trial)
    if own != {name: bits.get(name) for name in own} or not bits.keys() <= shapes.keys():
        raise ArtefactError(
            f"{path / CONFIG}: the quantised matrices it names are not those of this {type(trial).__name__}."
        )
    if trainable and any(isinstance(value, Packed) for value in values.values()):
        raise ArtefactError(
            f"{path} is packed: what its codes were rounded from, and training would change, is not in the file. Go on from a "
            "checkpoint of the run, or from a folder that was saved with latents=True."
        )
    return bits


def restore(adapter: Adapter, folder: str | Path) -> None:
    """Copy what was saved into an adapter that exists: one built with the same settings for the same base.

    Raises:
        ArtefactError: the folder is damaged, packed, or holds another adapter; nothing was changed.
    """
    config, tensors = read_json(Path(folder) / CONFIG), read_tensors(Path(folder) / TENSORS)
    layout, saved = _read_ours(Path(folder), config.get(KEY), tensors)
    mine, theirs = ({"method": c.method, **c.to_dict()} for c in (adapter.config, saved))
    differing = [key for key in {**mine, **theirs} if key not in adapter.moving and mine.get(key) != theirs.get(key)]
    if differing:
        raise ArtefactError(
            f"{folder} is of an adapter with other settings than this one; they differ in {', '.join(differing)}."
        )
    values = layout.read(config, tensors, adapter)
    if check_quantised(Path(folder), config, adapter, values, trainable=True) != quantised(adapter):
        raise ArtefactError(f"{folder} is of an adapter that is quantised otherwise than this one.")
    adapter.load_tensors(values)  # type: ignore[arg-type]  # none is packed
    adapter.follow(saved, config[KEY].get("scale", 1.0))


def _read_ours(path: Path, ours: Any, tensors: dict[str, Tensor]) -> tuple[Any, Any]:
    if not isinstance(ours, dict) or not isinstance(ours.get("config"), dict):
        raise ArtefactError(f"{path / CONFIG}: the {KEY!r} object is malformed.")
    if ours.get("format_version") != FORMAT_VERSION:
        raise ArtefactError(
            f"{path} has format version {ours.get('format_version')!r}, written by anyadapter {ours.get('library_version')}; "
            f"this version reads {FORMAT_VERSION}. Upgrade with `pip install -U anyadapter`."
        )
    if ours.get("tensors_sha256") not in (None, digest(tensors)):
        raise ArtefactError(
            f"{path / TENSORS} is not the file that {CONFIG} was saved with: damaged, or replaced by hand."
        )
    adapter_config = config_from_dict({**ours["config"], "method": ours.get("method", "")})
    return layouts.by_name(ours.get("layout", "native")), adapter_config


def _tensors(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if (path / TENSORS).exists():
        return read_tensors(path / TENSORS)
    if (path / PICKLE).exists():
        if not allow_pickle:
            raise ArtefactError(
                f"{path} holds a pickle ({PICKLE}) and no {TENSORS}. A pickle can run code; if you trust its source, pass "
                "allow_pickle=True to read plain tensors from it, and save it again."
            )
        return read_pickle(path / PICKLE)
    raise ArtefactError(f"{path} holds no {TENSORS}.")


def locate(
    folder: str | Path, *, root: str | Path | None = None, revision: str | None = None, token: str | None = None
) -> Path:
    """The local folder of an artefact, fetched from the Hub when it is a repository id.

    Raises:
        ArtefactError: there is no such folder, or it leaves ``root``.
    """
    if root is not None:
        path = inside(root, str(folder))
        if not path.is_dir():
            raise ArtefactError(f"There is no adapter {str(folder)!r} in {root}.")
        return path
    path = Path(folder)
    if path.is_dir():
        return path
    if str(folder).count("/") == 1 and not str(folder).startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            files = [CONFIG, TENSORS, PICKLE]
            return Path(snapshot_download(str(folder), revision=revision, token=token, allow_patterns=files))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ArtefactError(f"{folder} is no local folder, and the Hub did not give it: {error}") from None
    raise ArtefactError(f"There is no folder {path}.")


def inspect(folder: str | Path) -> dict[str, Any]:
    """What a folder holds, read without a model: method, base, settings, parameters, bytes, and the modules it wraps."""
    from anyadapter.formats.files import read_header

    path = locate(folder)
    config = read_json(path / CONFIG)
    shapes = read_header(path / TENSORS)
    ours = config.get(KEY, {})
    size = (path / TENSORS).stat().st_size
    return {
        "method": ours.get("method") or config.get("peft_type"),
        "layout": ours.get("layout", "foreign"),
        "base": config.get("base_model_name_or_path"),
        "host": ours.get("base", {}).get("class"),
        "library_version": ours.get("library_version"),
        "parameters": ours.get("parameters", sum(torch.Size(shape).numel() for shape in shapes.values())),
        **({"bits": widths(ours["bits"])} if "bits" in ours else {}),
        "bytes": size,
        "settings": ours.get("config", {k: v for k, v in config.items() if k != KEY}),
        "targets": wrapped_modules(shapes),
    }


def widths(bits: Any) -> Any:
    """The bits of quantised matrices in short: where they differ, how many matrices have each width."""
    return dict(Counter(read_bits(bits, {}).values())) if isinstance(bits, dict) else bits


def wrapped_modules(names: Iterable[str]) -> dict[str, int]:
    """How many modules there are of each kind: their paths with ``*`` for the numbers of layers."""
    paths = {name.removeprefix("base_model.model.").rsplit(".", 1)[0] for name in names if "." in name}
    parts = ("lora_A", "lora_B", "adapter_down", "adapter_up", "selector")
    paths = {path.rpartition(".")[0] if path.endswith(parts) else path for path in paths}
    stars = [".".join("*" if part.isdigit() else part for part in path.split(".")) for path in paths]
    return {star: stars.count(star) for star in sorted(set(stars))}


def push_to_hub(
    model: nn.Module, repo_id: str, name: str = "default", *, private: bool | None = None, token: str | None = None
) -> str:
    """Save an adapter and upload it as a repository on the Hugging Face Hub. Returns its address."""
    import tempfile

    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, name)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo.repo_id, folder_path=folder)
    return str(repo)


def digest(tensors: dict[str, Tensor]) -> str:
    """A hash of names, shapes, dtypes and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def model_card(adapter: Adapter, base: str | None) -> str:
    """A model card with what is known of an adapter."""
    settings = "\n".join(f"- `{key}`: {value}" for key, value in adapter.config.to_dict().items())
    front = [f"base_model: {base}"] if base else []
    front += ["library_name: anyadapter", "tags:", "- adapter", f"- {adapter.config.method}"]
    return (
        "---\n"
        + "\n".join(front)
        + f"""
---
# {method(adapter.config.method).__name__} adapter

{adapter.parameter_count():,} parameters{f" for `{base}`" if base else ""}.

```python
import anyadapter
anyadapter.load(model, "path/or/repo")  # model: the base, from its own from_pretrained
```

## Settings
{settings}
"""
    )
