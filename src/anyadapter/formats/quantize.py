"""Quantisation of a saved adapter after its training, from its folder alone: no base is read."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from anyadapter.core.adapter import Targets
from anyadapter.core.errors import ArtefactError, ConfigError, near
from anyadapter.core.host import as_tuple, ends_with
from anyadapter.formats.files import CONFIG, TENSORS, read_json, read_tensors, write_folder
from anyadapter.formats.layouts import KEY
from anyadapter.formats.native import FORMAT_VERSION, digest, locate
from anyadapter.formats.packed import dump, matrices, write_bits
from anyadapter.formats.peft import PROMPT, ROOTS, TAILS
from anyadapter.parts.quantised import Packed, check_bits, is_constant


def quantize_folder(
    folder: str | Path, out: str | Path, bits: int = 1, selected: Targets | None = None
) -> dict[str, Any]:
    """Pack the matrices of a saved adapter into another folder, which loads as the same adapter with rounded matrices.

    Args:
        folder: as :func:`anyadapter.save_pretrained` wrote it, or its id on the Hub.
        out: the new folder.
        bits: 1, 2, 4 or 8.
        selected: patterns of tensor names, as in :func:`anyadapter.quantize`; by default all matrices.

    Returns:
        How many matrices were packed, the bytes of the tensors before and after, and the names of those left as they are
        because all their numbers are the same, as those of LoRA's B before any training.

    Raises:
        ConfigError: no such width, or a pattern that matches nothing.
        ArtefactError: the folder is damaged, quantised already, or of another library; nothing was written.
    """
    check_bits(bits)
    path, target = locate(folder), Path(out)
    if path.resolve() == target.resolve():
        raise ArtefactError(f"{target} holds what is to be quantised; choose another folder for the result.")
    config, tensors = read_json(path / CONFIG), read_tensors(path / TENSORS)
    ours = config.get(KEY)
    if not isinstance(ours, dict) or ours.get("layout") not in ("native", "peft"):
        raise ArtefactError(
            f"{path} was not saved by anyadapter in its own layout or PEFT's, and does not say all that is needed to build the "
            "adapter. Write it anew first: `anyadapter convert FOLDER NEW --to native`."
        )
    if ours.get("format_version") != FORMAT_VERSION:
        raise ArtefactError(
            f"{path} has format version {ours.get('format_version')!r}; this version reads {FORMAT_VERSION}."
        )
    if "bits" in ours:
        raise ArtefactError(f"{path} is quantised already, to {ours['bits']} bits; rounding it anew would shrink it.")
    if ours.get("tensors_sha256") not in (None, digest(tensors)):
        raise ArtefactError(f"{path / TENSORS} is not the file that {CONFIG} was saved with.")
    if ours["layout"] == "peft":
        tensors = own_names(config, ours, tensors)
    chosen, left = select(tensors, selected)
    packed = {name: Packed.of(tensors[name], bits, name) for name in chosen}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    written = tensors | dump(packed)
    about = {
        "bits": write_bits(dict.fromkeys(chosen, bits), shapes),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "layout": "native",
        "tensors_sha256": digest(written),
    }
    common: dict[str, Any] = {
        key: config[key] for key in ("base_model_name_or_path", "inference_mode") if key in config
    }
    card = path / "README.md"
    write_folder(
        target,
        {**common, "peft_type": str(ours.get("method")).upper(), KEY: ours | about},
        written,
        card.read_text(encoding="utf-8") if card.is_file() else "",
    )
    sizes = [(where / TENSORS).stat().st_size for where in (path, target)]
    return {"matrices": len(packed), "bits": bits, "bytes_before": sizes[0], "bytes": sizes[1], "left": left}


def own_names(config: Mapping[str, Any], ours: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a folder in PEFT's layout under an adapter's own names."""
    method, found = str(ours.get("method")), {}
    if method not in ROOTS:
        raise ArtefactError(f"PEFT's layout does not know the method {method!r}; the folder is damaged.")
    for key, tensor in tensors.items():
        name = key.removeprefix(ROOTS[method])
        if key == PROMPT:
            name = "prompt.weight"
        elif not name.endswith(TAILS[method] or ("",)):  # of a module that is trained as a whole
            parts = name.split(".")
            outer = (".".join(parts[:i]) for i in range(1, len(parts)))
            path = next(
                (p for p in outer if any(ends_with(p, end) for end in config.get("modules_to_save") or ())), None
            )
            if path is None:
                raise ArtefactError(f"{key[:200]!r} is neither {', '.join(TAILS[method])} nor in modules_to_save.")
            name = f"{path}.whole{name.removeprefix(path)}"
        found[name] = tensor
    return found


def select(tensors: Mapping[str, Tensor], selected: Targets | None) -> tuple[list[str], list[str]]:
    """The names to quantise, and those of constant matrices. Raises :class:`ConfigError` when there is none to quantise."""
    able = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.is_floating_point()}
    names = sorted(matrices(able))
    if selected is not None:
        patterns = as_tuple(selected)
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in able):
                raise ConfigError(f"{pattern!r} matches no tensor that can be quantised. {near(pattern, able)}")
        names = [name for name in able if any(fnmatchcase(name, pattern) for pattern in patterns)]
    left = [name for name in names if is_constant(tensors[name])]
    if left == names:
        raise ConfigError(f"There is nothing to quantise: {len(names)} matrices, and each holds one number throughout.")
    return [name for name in names if name not in left], left
