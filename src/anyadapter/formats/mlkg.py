"""The files of MLKG's authors, which adapter-transformers writes.

A set is a folder with a sub-folder for each adapter (``adapter_config.json``, ``pytorch_adapter.bin``), and beside these the
fusion (``adapter_fusion_config.json``, ``pytorch_model_adapter_fusion.bin``). A key is the encoder's own path with
``.adapters.<name>.`` or ``.adapter_fusion_layer.<names, by commas>.`` in it. What the Hub publishes is one such sub-folder
each, in which the adapter has a name of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyadapter.core.adapter import Adapter, AdapterConfig, check_tensors
from anyadapter.core.attach import build
from anyadapter.core.catalogue import config_from_dict
from anyadapter.core.errors import ArtefactError
from anyadapter.core.host import Host
from anyadapter.formats.files import CONFIG, read_file, read_json
from anyadapter.formats.layouts import check_unscaled
from anyadapter.methods.language.mlkg import ROLES

METHOD = "mlkg"
VERSION = "3.1.0"  # of adapter-transformers, whose files these are
WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
FUSION_CONFIG = "adapter_fusion_config.json"
FUSION_WEIGHTS = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")
ADAPTER, FUSION = ".adapters.", ".adapter_fusion_layer."

# Their settings of an adapter; ours are the first two. The others say what our layer does.
SETTINGS: dict[str, Any] = {
    "reduction_factor": 16,
    "non_linearity": "relu",
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "is_parallel": False,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": False,
    "original_ln_after": True,
    "original_ln_before": True,
    "output_adapter": True,
    "phm_layer": False,
    "residual_before_ln": True,
    "scaling": 1.0,
    "use_gating": False,
}
# These change nothing once an adapter is trained and is no PHM; they are written as the authors' files have them.
IDLE: dict[str, Any] = {
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "bert",
    "learn_phm": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_rank": 1,
    "shared_W_phm": False,
    "shared_phm_rule": True,
}
FUSION_SETTINGS: dict[str, Any] = {
    "key": True,
    "query": True,
    "query_before_ln": False,
    "residual_before": False,
    "temperature": False,
    "value": True,
    "value_before_softmax": True,
}
FUSION_IDLE: dict[str, Any] = {"regularization": True, "value_initialized": True}


def read_official(
    source: str | Path | Mapping[str, str | Path], host: Host, *, allow_pickle: bool = False
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Settings and tensors of official files, for ``attach(model, config).load_tensors(tensors)``.

    Args:
        source: the folder of a set, or the folder of each adapter by the role it shall have: ``{"ep": "unzipped/…", …}``. The
            name it has in its file does not matter.
        host: the encoder.
        allow_pickle: read ``.bin`` files (tensors only, nothing in them is executed).

    Returns:
        With the fusion of a set; where there is none, with a fresh one, as the authors start from on a new task.

    Raises:
        ArtefactError: a file is missing, a tensor is missing, not known or of the wrong shape, a setting is none of ours, or
            the adapters differ in their settings.
    """
    folders, fusion = of_set(Path(source)) if isinstance(source, (str, Path)) else (dict(source), None)
    if not folders:
        raise ArtefactError(f"{source} holds no adapters; expected sub-folders, each with {CONFIG}.")
    settings: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for role, folder in folders.items():
        found, own = read_adapter(Path(folder), allow_pickle)
        settings[role] = json.dumps(found, sort_keys=True)
        if settings[role] != next(iter(settings.values())):
            raise ArtefactError(
                f"{role!r} has {settings[role]}, and {next(iter(settings))!r} {next(iter(settings.values()))}."
            )
        tensors |= {key.replace(f"{ADAPTER}{{}}.", f"{ADAPTER}{role}."): tensor for key, tensor in own.items()}
    if fusion is not None:
        tensors |= read_fusion(fusion, allow_pickle)
    roles = {role: ROLES.get(role, "") for role in folders}
    found = {"reduction": found["reduction_factor"], "activation": found["non_linearity"]}
    config = config_from_dict({"method": METHOD, "roles": roles, **found})
    trial = build(host, config, "trial")
    expected = named(trial)
    if fusion is None:
        tensors |= {key: tensor.detach() for key, tensor in expected.items() if FUSION in key}
    check_tensors(expected, tensors)
    names = {key: name for name, key in keys(trial).items()}
    return config, {names[key]: tensor for key, tensor in tensors.items()}


def of_set(folder: Path) -> tuple[dict[str, Path], Path | None]:
    """The adapters' folders of a set by name, in the order they are fused in, and the folder of the fusion if it is there."""
    fused = (folder / FUSION_CONFIG).is_file()
    found = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    names = str(read_json(folder / FUSION_CONFIG).get("name", "")).split(",") if fused else found
    if fused and set(names) != set(found):
        raise ArtefactError(f"{folder} fuses {', '.join(names)}, and has the adapters {', '.join(found) or 'none'}.")
    return {name: folder / name for name in names}, folder if fused else None


def read_adapter(folder: Path, allow_pickle: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(settings, tensors) of one adapter, with ``{}`` for its name in the keys."""
    config = read_json(folder / CONFIG)
    settings, name = checked(folder / CONFIG, config, SETTINGS, IDLE), str(config.get("name"))
    tensors = read_file(weights(folder, WEIGHTS), allow_pickle)
    return settings, {key.replace(f"{ADAPTER}{name}.", f"{ADAPTER}{{}}."): tensor for key, tensor in tensors.items()}


def read_fusion(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors of a fusion. Raises :class:`ArtefactError` when it has other settings than ours."""
    checked(folder / FUSION_CONFIG, read_json(folder / FUSION_CONFIG), FUSION_SETTINGS, FUSION_IDLE)
    return read_file(weights(folder, FUSION_WEIGHTS), allow_pickle)


def checked(path: Path, whole: Mapping[str, Any], fixed: Mapping[str, Any], idle: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a file, with ours where it is silent.

    Raises:
        ArtefactError: one of them asks for what our layer does not do.
    """
    config = whole.get("config")
    if not isinstance(config, dict):
        raise ArtefactError(f"{path} holds no settings under 'config'.")
    for key, value in config.items():
        if key in idle or key in ("reduction_factor", "non_linearity"):
            continue
        if key not in fixed or value != fixed[key]:
            raise ArtefactError(f"{path}: {key} is {value!r}; this method has {fixed.get(key, 'no such setting')!r}.")
    return {key: config.get(key, value) for key, value in fixed.items()}


def weights(folder: Path, names: tuple[str, ...]) -> Path:
    """The first of these files that is there."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ArtefactError(f"{folder} holds neither of {' and '.join(names)}.")


# ---------------------------------------------------------------------- there and back


def keys(adapter: Adapter) -> dict[str, str]:
    """Their key of each tensor, by our name."""
    fused, found = ",".join(adapter.config.roles), {}  # type: ignore[attr-defined]
    for name in adapter.tensors():
        _, layer, rest = name.rpartition("encoder.layer.")  # theirs are of the encoder, also inside a model with a head
        if not layer:
            raise ArtefactError(f"{name} lies in no encoder.layer of BERT or XLM-R, which the authors' files are of.")
        key = (layer + rest).replace(".fusion.", f"{FUSION}{fused}.").replace(".adapter_down.", ".adapter_down.0.")
        found[name] = key
    return found


def named(adapter: Adapter) -> dict[str, Tensor]:
    """The values by their keys."""
    values = adapter.values()
    return {key: values[name] for name, key in keys(adapter).items()}


def write_official(adapter: Adapter, folder: str | Path, model: Any) -> None:
    """Write the folder of a set, with pickles as adapter-transformers reads them.

    Args:
        model: the encoder, of which the files say class, kind and width.

    Raises:
        ArtefactError: another method's adapter, or one with a scale or on some layers only, which theirs do not know.
    """
    config: Any = adapter.config
    if config.method != METHOD or config.layers is not None:
        raise ArtefactError(
            f"A {type(adapter).__name__} does not fit MLKG's files, which hold knowledge adapters on all layers."
        )
    check_unscaled(adapter)
    base = {
        "hidden_size": model.config.hidden_size,
        "model_class": type(model).__name__,
        "model_name": getattr(model.config, "_name_or_path", "") or None,
        "model_type": model.config.model_type,
        "version": VERSION,
    }
    tensors = {key: tensor.detach().cpu().clone() for key, tensor in named(adapter).items()}
    settings = {**SETTINGS, **IDLE, "reduction_factor": config.reduction, "non_linearity": config.activation}
    parts = {Path(role): (CONFIG, WEIGHTS[1], f"{ADAPTER}{role}.", settings, role) for role in config.roles}
    if len(parts) > 1:
        fusion = {**FUSION_SETTINGS, **FUSION_IDLE}
        parts[Path()] = (FUSION_CONFIG, FUSION_WEIGHTS[1], FUSION, fusion, ",".join(config.roles))
    for place, (about, file, mark, values, name) in parts.items():
        target = Path(folder) / place
        target.mkdir(parents=True, exist_ok=True)
        more = {"config_id": config_id(values)} if mark != FUSION else {}
        whole = {"config": values, **more, **base, "name": name}
        (target / about).write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        torch.save({key: tensor for key, tensor in tensors.items() if mark in key}, target / file)


def config_id(settings: Mapping[str, Any]) -> str:
    """adapter-transformers' name for an adapter's settings: a hash of those that are neither empty nor newer than it."""
    new = {**IDLE, "scaling": 1.0}
    kept = {key: value for key, value in settings.items() if value and new.get(key) != value}
    return hashlib.sha1(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
