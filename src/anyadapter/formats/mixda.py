"""The files of MixDA's authors, and the domains in our own folders.

Stage 1 writes a pickled dictionary of modules, ``"<layer>-<k>-adapter"`` and ``"<layer>-gating"``; their loader looks for
``"<layer>-adapter"``, an older spelling, one domain a file, and passes over what it does not find. Here both are read, and
nothing is passed over. In a whole model the same tensors lie at ``….layer.<layer>.output.kas.<k>`` and ``….output.gating``,
and a task adapter at ``….output.adapters.<name>``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from anyadapter.core.adapter import Adapter, AdapterConfig, check_tensors
from anyadapter.core.attach import build
from anyadapter.core.catalogue import config_from_dict
from anyadapter.core.errors import ArtefactError
from anyadapter.core.fingerprint import check_fingerprint
from anyadapter.core.host import Host
from anyadapter.formats.files import CONFIG, TENSORS, read_file, read_json, read_tensors
from anyadapter.formats.layouts import KEY
from anyadapter.formats.native import digest, locate
from anyadapter.methods.language.mixda import MixDA, MixDAConfig

Source = str | Path | Mapping[str, Tensor]

STAGE1 = re.compile(r"(?P<layer>\d+)-(?:(?:(?P<k>\d+)-)?adapter|gating)\.(?P<leaf>.+)")
IN_MODEL = re.compile(r"(?P<block>.+)\.(?:kas\.(?P<k>\d+)|(?P<gate>gating)|adapters\.(?P<task>[^.]+))\.(?P<leaf>.+)")


def read_official(
    source: Source | Sequence[Source], host: Host, *, allow_pickle: bool = False, **settings: Any
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Settings and tensors of stage-1 files, for ``attach(model, config).load_tensors(tensors)``.

    Layers, number of domains, width and the gate's shape are read off the tensors.

    Args:
        source: a file, the tensors in it (``"7-0-adapter.adapter_up.weight"``), or several of these, whose domains are put
            side by side under a new gate.
        host: the base.
        allow_pickle: read their files (plain tensors only).
        settings: of ``MixDAConfig``: the names of ``domains``, a ``task_adapter``, …. ``pool`` is ``"last"`` unless given.

    Raises:
        ArtefactError: there are no domain adapters, or a tensor is missing, not known or of the wrong shape.
        ConfigError, TargetError: a setting is not known, or the host cannot be adapted so.
    """
    sources = [source] if isinstance(source, (str, Path, Mapping)) else list(source)
    parts = [
        stage1_parts(each if isinstance(each, Mapping) else read_file(Path(each), allow_pickle)) for each in sources
    ]
    kas: dict[tuple[int, int, str], Tensor] = {}
    place = 0
    for domains, _ in parts:
        kas |= {(layer, k + place, leaf): tensor for (layer, k, leaf), tensor in domains.items()}
        place += 1 + max(k for _, k, _ in domains)
    gates = parts[0][1] if len(parts) == 1 else {}
    layers = tuple(sorted({layer for layer, _, _ in kas}))
    config = config_of(kas, gates, layers, place, settings)
    trial = build(host, config, "trial")
    assert isinstance(trial, MixDA)
    paths = dict(zip(layers, trial.mixtures))
    tensors = {f"{paths[layer]}.kas.{k}.{ours(leaf)}": tensor for (layer, k, leaf), tensor in kas.items()}
    for (layer, leaf), tensor in gates.items():
        if layer not in paths:
            raise ArtefactError(f"The file holds a gate of layer {layer} and no domain adapter there.")
        tensors[f"{paths[layer]}.gating.{leaf}"] = tensor
    return config, completed(trial, tensors, fresh=(".task.", ".whole.", *(() if gates else (".gating.",))))


def write_official(adapter: Adapter, *, numbered: bool = True) -> dict[str, dict[str, Tensor]]:
    """The dictionary of stage 1, for ``torch.save``: domains and gates, no task adapter and no head.

    Args:
        numbered: the keys that the authors' code writes, ``"<layer>-<k>-adapter"``; otherwise those that it reads,
            ``"<layer>-adapter"``.

    Raises:
        ArtefactError: it is an adapter of another method, has the gate of the paper, or several domains that the keys without
            numbers cannot tell apart.
    """
    check_writable(adapter)
    assert isinstance(adapter, MixDA)
    if not numbered and len(adapter.config.branches) > 2:
        raise ArtefactError("Keys without numbers hold one domain a file; this adapter has several.")
    found, values = {}, adapter.values()
    for path, mixture in adapter.mixtures.items():
        layer = next(part for part in path.split(".") if part.isdigit())
        for k in range(len(mixture.kas)):
            key = f"{layer}-{k}-adapter" if numbered else f"{layer}-adapter"
            found[key] = {theirs(leaf): copied(tensor) for leaf, tensor in inside(values, f"{path}.kas.{k}.")}
        if mixture.gating is not None:
            found[f"{layer}-gating"] = {leaf: copied(tensor) for leaf, tensor in inside(values, f"{path}.gating.")}
    return found


def read_model(
    source: Source, host: Host, *, allow_pickle: bool = False, task: str | None = None, **settings: Any
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """As :func:`read_official`, of the state of a whole model, whose other tensors are the base's own.

    Args:
        source: a file, or the tensors in it.
        host: the base, with the same module paths.
        task: the name of the task adapter in it, where it is to be read; Pfeiffer's or Houlsby's, as its places tell.
        allow_pickle, settings: as of :func:`read_official`. Of modules trained as a ``whole``, the state's values are taken.

    Raises:
        ArtefactError, ConfigError, TargetError: as :func:`read_official`.
    """
    state = dict(source) if isinstance(source, Mapping) else read_file(Path(source), allow_pickle)
    found = {name: match for name in state if (match := IN_MODEL.fullmatch(name))}
    found = {name: match for name, match in found.items() if match["task"] in (None, task)}
    kas = {(layer_of(m["block"]), int(m["k"]), m["leaf"]): state[name] for name, m in found.items() if m["k"]}
    gates = {(layer_of(m["block"]), m["leaf"]): state[name] for name, m in found.items() if m["gate"]}
    tasks = [m["block"] for m in found.values() if m["task"]]
    if not kas or (task is not None and not tasks):
        named = sorted({m["task"] for name in state if (m := IN_MODEL.fullmatch(name)) and m["task"]})
        raise ArtefactError(
            f"The state holds {len(kas)} tensors of domain adapters (….output.kas.<k>) and the task adapters {named or 'none'}; "
            f"expected domain adapters{f' and {task!r}' if task else ''}."
        )
    if task is not None:
        up = next((state[n] for n, m in found.items() if m["task"] and m["leaf"] == "adapter_up.weight"), None)
        if up is None:
            raise ArtefactError(f"The task adapter {task!r} has no adapter_up.weight, from which its width is read.")
        kind = "houlsby" if any(block.endswith("attention.output") for block in tasks) else "pfeiffer"
        settings = {"task_adapter": kind, "task_width": up.shape[1], **settings}
    config = config_of(
        kas, gates, tuple(sorted({layer for layer, _, _ in kas})), 1 + max(k for _, k, _ in kas), settings
    )
    trial = build(host, config, "trial")
    tensors = {}
    for name, m in found.items():
        middle = f"kas.{m['k']}" if m["k"] else "gating" if m["gate"] else "task"
        tensors[f"{m['block']}.{middle}.{m['leaf'] if m['gate'] else ours(m['leaf'])}"] = state[name]
    tensors |= {n: state[n.replace(".whole.", ".")] for n in trial.tensors() if n.replace(".whole.", ".") in state}
    return config, completed(trial, tensors, fresh=())


def write_model(adapter: Adapter, task: str = "domain") -> dict[str, Tensor]:
    """The tensors under the names they have in the authors' whole model. Raises :class:`ArtefactError` as :func:`write_official`.

    Args:
        task: the name of the task adapter; theirs is always called "domain".
    """
    check_writable(adapter)
    named = {}
    for name, tensor in adapter.values().items():
        if ".kas." in name or ".task." in name:
            name = theirs(name).replace(".task.", f".adapters.{task}.")
        named[name.replace(".whole.", ".")] = copied(tensor)
    return named


# ---------------------------------------------------------------------- our own folders


def read_domains(folder: str | Path, host: Host) -> tuple[MixDAConfig, dict[str, Tensor]]:
    """Settings, domain adapters and gate of a folder that stage 1 saved; its head and task adapter are left where they are.

    Raises:
        ArtefactError: it holds no domain adapters, is packed, or damaged.
        BaseMismatchError: it was trained on another base. Only tensors that both bases have count, for their heads may differ.
    """
    path = locate(folder)
    about, tensors = read_json(path / CONFIG).get(KEY), read_tensors(path / TENSORS)
    if not isinstance(about, dict) or about.get("method") != MixDAConfig.method:
        raise ArtefactError(f"{path} holds no MixDA of ours; a source is a folder that stage 1 saved.")
    if about.get("tensors_sha256") not in (None, digest(tensors)):
        raise ArtefactError(f"{path / TENSORS} is not the file that {CONFIG} was saved with.")
    if about.get("bits"):
        raise ArtefactError(f"{path} is packed; a source holds plain tensors. Save it before it is quantised.")
    config = config_from_dict({**about["config"], "method": MixDAConfig.method})
    kept = {name: tensor for name, tensor in tensors.items() if ".kas." in name or ".gating." in name}
    if not kept:
        raise ArtefactError(f"{path} holds no domain adapters.")
    base = about.get("base", {})
    own = host.model.state_dict()
    shared = {name: sample for name, sample in base.get("tensors", {}).items() if name in own}
    check_fingerprint(host, {**base, "tensors": shared or base.get("tensors", {})})
    assert isinstance(config, MixDAConfig)
    return config, kept


# ---------------------------------------------------------------------- small parts


def stage1_parts(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[tuple[int, int, str], Tensor], dict[tuple[int, str], Tensor]]:
    """(domain adapters by layer, number and leaf; gates by layer and leaf). Raises :class:`ArtefactError` for anything else."""
    domains: dict[tuple[int, int, str], Tensor] = {}
    gates: dict[tuple[int, str], Tensor] = {}
    for name, tensor in tensors.items():
        found = STAGE1.fullmatch(name)
        if not found:
            raise ArtefactError(
                f"{name[:200]!r} is none of <layer>-<k>-adapter, <layer>-adapter and <layer>-gating: the file of another method?"
            )
        if "gating" in name.partition(".")[0]:
            gates[int(found["layer"]), found["leaf"]] = tensor
        elif (key := (int(found["layer"]), int(found["k"] or 0), found["leaf"])) in domains:
            raise ArtefactError(f"{name!r} stands in the file in both spellings.")
        else:
            domains[key] = tensor
    if not domains:
        raise ArtefactError("The file holds no domain adapter, <layer>-<k>-adapter or <layer>-adapter.")
    return domains, gates


def config_of(
    kas: Mapping[tuple[int, int, str], Tensor],
    gates: Mapping[tuple[int, str], Tensor],
    layers: tuple[int, ...],
    count: int,
    settings: Mapping[str, Any],
) -> AdapterConfig:
    """The settings that the shapes tell, under those given."""
    down = next((t for (_, _, leaf), t in kas.items() if leaf == "adapter_down.0.weight"), None)
    if down is None:
        raise ArtefactError("The domain adapters have no adapter_down.0.weight, from which their width is read.")
    told: dict[str, Any] = {"layers": layers, "width": down.shape[0], "pool": "last"}
    told["domains"] = ("domain",) if count == 1 else tuple(f"domain-{k}" for k in range(count))
    mlp = [leaf for layer, leaf in gates if layer == layers[0] and leaf.endswith(".weight")]
    if mlp:
        told |= {"gate_width": gates[layers[0], mlp[0]].shape[0], "gate_layers": len(mlp) - 1}
    return config_from_dict({**told, **settings, "method": MixDAConfig.method})


def completed(trial: Adapter, tensors: dict[str, Tensor], fresh: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors, with fresh ones of the parts that a file does not hold. Raises :class:`ArtefactError` for others."""
    own = trial.tensors()
    tensors = tensors | {n: own[n].detach() for n in own if n not in tensors and any(part in f".{n}" for part in fresh)}
    check_tensors(own, tensors)
    return tensors


def check_writable(adapter: Adapter) -> None:
    """Raise an :class:`ArtefactError` unless the authors' classes have a place for this adapter."""
    if not isinstance(adapter, MixDA):
        raise ArtefactError(f"A {type(adapter).__name__} does not fit the file of a MixDA.")
    if not adapter.mixtures or adapter.config.gate == "paper":
        what = "the gate of the paper" if adapter.mixtures else "no domain adapters"
        raise ArtefactError(f"{adapter.name!r} has {what}, for which the authors' files have no place.")


def layer_of(block: str) -> int:
    """The number of the layer in a path. Raises :class:`ArtefactError` when there is none."""
    number = next((part for part in block.split(".") if part.isdigit()), None)
    if number is None:
        raise ArtefactError(f"{block!r} lies in no numbered layer.")
    return int(number)


def ours(leaf: str) -> str:
    return leaf.replace("adapter_down.0.", "adapter_down.")


def theirs(leaf: str) -> str:
    return leaf.replace("adapter_down.", "adapter_down.0.")


def inside(tensors: Mapping[str, Tensor], path: str) -> list[tuple[str, Tensor]]:
    """The tensors below a path that ends with a dot, by the rest of their names."""
    return [(name.removeprefix(path), tensor) for name, tensor in tensors.items() if name.startswith(path)]


def copied(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()
