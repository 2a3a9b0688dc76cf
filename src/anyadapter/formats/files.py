"""Reading and writing the files of an artefact. Files from elsewhere are untrusted.

A safetensors file is checked from its header alone, before any tensor is allocated; a pickle is read only when asked for,
and only as plain tensors; writing is atomic, so that an interrupted or full disk loses nothing.
"""

from __future__ import annotations

import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from anyadapter.core.attach import NAME
from anyadapter.core.errors import ArtefactError, DivergedError

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MAX_CONFIG_BYTES = 4 << 20
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 50_000
MAX_DIMENSIONS = 8
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def inside(root: str | Path, name: str) -> Path:
    """The folder ``name`` under ``root``, for names that come from elsewhere.

    Raises:
        ArtefactError: the name is malformed, or its real path (links followed) leaves ``root``.
    """
    if not NAME.fullmatch(name):
        raise ArtefactError(
            f"{name!r} is not a name: 1 to 128 letters, digits, '.', '_' or '-', the first a letter or digit."
        )
    base = Path(root).resolve()
    path = (base / name).resolve()
    if base not in path.parents:
        raise ArtefactError(f"{name!r} leads out of {base}.")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises :class:`ArtefactError` when it is none."""
    if not path.is_file():
        raise ArtefactError(f"{path} does not exist; an adapter's folder holds {CONFIG} and {TENSORS}.")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ArtefactError(f"{path} is larger than {MAX_CONFIG_BYTES >> 20} MB, which no adapter's configuration is.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ArtefactError(f"{path} holds a JSON {type(value).__name__}, not an object.")
    return value


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, after checking every promise its header makes.

    Raises:
        ArtefactError: truncated, oversized, malformed, with gaps or overlaps, or of a dtype no adapter has.
    """
    if not path.is_file():
        raise ArtefactError(f"{path} does not exist.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if length < 2 or length > size - 8:
            raise ArtefactError(
                f"{path} is not a whole safetensors file ({size} bytes); it is truncated or something else."
            )
        if length > MAX_HEADER_BYTES:
            raise ArtefactError(f"{path} has a header of {length} bytes; the limit is {MAX_HEADER_BYTES}.")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise ArtefactError(f"{path} has a damaged header; download or save it again.") from None
    if not isinstance(header, dict):
        raise ArtefactError(f"{path} has a damaged header; download or save it again.")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(type(v) is str for v in metadata.values())):
        raise ArtefactError(f"{path}: __metadata__ is malformed; its values are texts.")
    if len(header) > MAX_TENSORS:
        raise ArtefactError(f"{path} declares {len(header)} tensors; the limit is {MAX_TENSORS}.")
    shapes, places = {}, []
    for name, entry in header.items():
        try:
            dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sound = len(shape) <= MAX_DIMENSIONS and all(type(n) is int and n >= 0 for n in (*shape, first, last))
        except (KeyError, TypeError, ValueError):
            sound, dtype, shape, first, last = False, "", (), 0, 0
        if not sound or not isinstance(dtype, str):
            raise ArtefactError(f"{path}: the entry of {name[:200]!r} is malformed.")
        if dtype not in ITEM_BYTES:
            raise ArtefactError(f"{path}: {name[:200]!r} has dtype {dtype!r}; expected one of {', '.join(ITEM_BYTES)}.")
        if last - first != math.prod(shape) * ITEM_BYTES[dtype]:
            raise ArtefactError(f"{path}: {name[:200]!r} declares shape {shape} but {last - first} bytes.")
        shapes[name] = shape
        places.append((first, last, name))
    end = 0
    for first, last, name in sorted(places):
        if first != end:
            what = "overlaps the one before" if first < end else "leaves a gap before it"
            raise ArtefactError(f"{path}: {name[:200]!r} {what}; download or save it again.")
        end = last
    if end != size - 8 - length:
        raise ArtefactError(
            f"{path} holds {size - 8 - length} bytes of tensors, its header says {end}: truncated or damaged."
        )
    return shapes


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file on the CPU. Raises :class:`ArtefactError` when it is unsound or not finite."""
    read_header(path)
    try:
        tensors = load(path.read_bytes())  # version 0.8.0's load_file and safe_open lose 64 bytes with every tensor
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtefactError(f"{path} cannot be read: {error}") from None
    return finite(path, tensors)


def read_file(path: Path, allow_pickle: bool, part: str | None = None) -> dict[str, Tensor]:
    """The tensors of a single published file, safetensors or, only when asked for, a pickle (of which ``part`` is read).

    Raises:
        ArtefactError: it is a pickle and that was not allowed, or it is unsound.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)
    if not allow_pickle:
        raise ArtefactError(
            f"{path} is a pickle, which can run code; if you trust its source, pass allow_pickle=True to read plain tensors "
            "from it. The same weights are often published as .safetensors."
        )
    return read_pickle(path, part)


def read_pickle(path: Path, part: str | None = None) -> dict[str, Tensor]:
    """A legacy pickle: plain tensors only, nothing in it is executed. Nested dictionaries become dotted names.

    Args:
        part: read what is under this key, and nothing else of it.

    Raises:
        ArtefactError: it holds anything else.
    """
    try:
        whole = torch.load(path, map_location="cpu", weights_only=True)
        tensors = flat(whole if part is None else whole[part])
    except Exception as error:
        raise ArtefactError(
            f"{path} holds more than tensors and was not loaded: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from None
    return finite(path, tensors)


def flat(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """Tensors in nested dictionaries by dotted name. Raises :class:`ArtefactError` when there is anything else."""
    if not isinstance(value, dict):
        raise ArtefactError(f"{prefix or 'it'} is a {type(value).__name__}, not a dictionary of tensors.")
    found: dict[str, Tensor] = {}
    for key, item in value.items():
        found |= {f"{prefix}{key}": item} if isinstance(item, Tensor) else flat(item, f"{prefix}{key}.")
    return found


def finite(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors. Raises :class:`DivergedError` when one holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DivergedError(
                f"{path}: {name!r} holds NaN or infinity; the training diverged or the file is damaged."
            )
    return tensors


def umask() -> int:
    """The process's mask of file permissions; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_folder(folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor], card: str) -> None:
    """Write an artefact; at every moment the folder holds the old one or the new one.

    Raises:
        ArtefactError: a tensor is empty, or the disk is full or read-only; what was there before is intact.
    """
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or tensor.is_meta:
            raise ArtefactError(
                f"{name} is empty. With sharded training, gather the parameters before saving (Trainer and accelerate do)."
            )
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    files: dict[str, Callable[[Path], Any]] = {
        TENSORS: lambda path: save_file(whole, path, metadata={"format": "pt"}),
        CONFIG: lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"),
        "README.md": lambda path: path.write_text(card, encoding="utf-8"),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
            for name, write in files.items():
                write(Path(scratch) / name)
                os.chmod(Path(scratch) / name, 0o666 & ~umask())  # safetensors would keep it to the owner
                with open(Path(scratch) / name, "rb+") as file:
                    os.fsync(file.fileno())
            for name in files:
                if name == "README.md" and (folder / name).exists():
                    continue  # the user may have written their own
                os.replace(Path(scratch) / name, folder / name)
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in an error of its own
        raise ArtefactError(f"Could not write {folder}: {error}. What was there before is unchanged.") from error
