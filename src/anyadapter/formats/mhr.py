"""The files of MHR's authors (microsoft/mttl, tag mhr-camera-ready), and PEFT's folders of Poly.

Theirs: a Lightning ``.ckpt``, a pickle of ``state_dict`` and ``hyper_parameters``. A key is ``model.<path>.<tensor>``:
``lora_a`` (S, K, in / S, r), ``lora_b`` (S, K, r, out / S), and ``selector.module_logits`` (tasks, S · K) or, for an average,
``selector.module_probs`` (S, K). A selector that several linears share stands there once for each of them, or, where only
trained parameters were saved, once. Their plain LoRA has ``lora_a`` (in, r) and ``lora_b`` (r, out).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyadapter.core.adapter import Adapter, AdapterConfig, check_tensors
from anyadapter.core.attach import build
from anyadapter.core.catalogue import config_from_dict
from anyadapter.core.errors import ArtefactError, near
from anyadapter.core.host import Host
from anyadapter.formats.files import read_file
from anyadapter.formats.peft import shortest, targets, task_of
from anyadapter.methods.language.mhr import MHR, MHRConfig
from anyadapter.parts.routing import GRANULARITIES, groups_of

A, B, LOGITS, PROBS = ".lora_a", ".lora_b", ".selector.module_logits", ".selector.module_probs"
GRAINS = dict(zip(("finegrained", "layerwise", "blockwise", "coderwise", "coarsegrained"), GRANULARITIES))


def read_official(
    source: str | Path | Mapping[str, Tensor],
    host: Host,
    *,
    tasks: tuple[str, ...] | None = None,
    hyper_parameters: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
    **settings: Any,
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Settings and tensors of an official file, for ``attach(model, config).load_tensors(tensors)``.

    Rank, heads, skills, tasks and kind of selector are read off the shapes.

    Args:
        source: a file, or the tensors in it.
        host: the base.
        tasks: names for the rows of Z, which the file does not have; by default their numbers.
        hyper_parameters: the authors' settings; by default those in the file, if there are any.
        allow_pickle: read a ``.ckpt`` (tensors and plain values only).
        settings: of ``MHRConfig``, in place of what the file says.

    Raises:
        ArtefactError: a tensor is missing, not known, of the wrong shape, or differs from one it is tied to.
        ConfigError, TargetError: a setting is not known, or the host cannot be adapted so.
    """
    tensors, found = contents(source, allow_pickle)
    tensors = rooted(tensors, host)
    sizes = describe(tensors)
    paths = [name.removesuffix(A) for name in tensors if name.endswith(A)]
    settings = official_settings(hyper_parameters if hyper_parameters is not None else found) | settings
    if sizes["selector"] is None:
        return plain_lora(tensors, sizes, paths, settings.get("alpha", 1.0), host)
    if sizes["selector"] == "learned" and "granularity" not in settings:
        settings["granularity"] = granularity_of(tensors, paths, host)
    rows = sizes["skills"] if sizes["selector"] == "private" else sizes["tasks"]
    names = tasks if tasks is not None else tuple(str(row) for row in range(rows or 0))
    known = {key: sizes[key] for key in ("rank", "skills", "splits", "selector")}
    chosen = tuple(targets([path for path in host.modules if path in paths], host))
    config = config_from_dict({"targets": chosen, **settings, **known, "tasks": names, "method": MHRConfig.method})
    trial = build(host, config, "trial")
    assert isinstance(trial, MHR)
    return config, tied(tensors, trial)


def write_official(adapter: Adapter, *, prefix: str = "", trained_only: bool = False) -> dict[str, Tensor]:
    """The tensors as the authors name them; ``torch.save({"state_dict": tensors, "hyper_parameters": {…}}, path)``.

    Args:
        prefix: of all names; ``"model."`` in their files.
        trained_only: a selector that linears share once, under the first, and no ``module_probs``.

    Raises:
        ArtefactError: it is an adapter of another method, or has a scale or a uniformity, which the file has no place for.
    """
    if not isinstance(adapter, MHR):
        raise ArtefactError(f"A {type(adapter).__name__} does not fit the file of an MHR.")
    if (why := unplaced(adapter)) is not None:
        raise ArtefactError(f"The authors' file cannot hold {adapter.name!r}: {why}.")
    mine, config = adapter.values(), adapter.config
    named = mine if trained_only else {name: mine[first] for name, first in adapter.aliases().items()}
    if config.selector == "average" and not trained_only:
        named = named | {path + PROBS: uniform(config) for path in adapter.routed_branches()}
    return {prefix + name: tensor.detach().cpu().clone() for name, tensor in named.items()}


def unplaced(adapter: MHR) -> str | None:
    """Why no file of others can hold an adapter as it acts now, or ``None``."""
    if adapter.uniformity:
        return f"its uniformity is {adapter.uniformity:g}; set it to 0, or write what to_average() gives"
    if adapter.scale != 1:
        return f"its scale is {adapter.scale:g}; set it to 1 and multiply alpha by it, lora_alpha in their settings"
    return None


def contents(source: str | Path | Mapping[str, Tensor], allow_pickle: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, hyper-parameters) of a file; of tensors, themselves and none."""
    if isinstance(source, Mapping):
        return dict(source), {}
    tensors = read_file(Path(source), allow_pickle, part="state_dict")
    if Path(source).suffix == ".safetensors":
        return tensors, {}
    whole = torch.load(source, map_location="cpu", weights_only=True)
    return tensors, dict(whole.get("hyper_parameters", {}))


def rooted(tensors: Mapping[str, Tensor], host: Host) -> dict[str, Tensor]:
    """The tensors by paths of the host: without Lightning's ``model.``, unless the host's own paths begin so."""
    paths = [name.removesuffix(A) for name in tensors if name.endswith(A)]
    if not paths:
        raise ArtefactError(f"An MHR file holds <path>{A} and <path>{B}; this one has: {', '.join(list(tensors)[:5])}.")
    if not all(path in host.modules for path in paths):
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        paths = [path.removeprefix("model.") for path in paths]
    for path in paths:
        if path not in host.modules:
            raise ArtefactError(f"{path!r} is no module of {host.describe()}. {near(path, host.modules)}")
    return dict(tensors)


def describe(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What an official file holds, told from its shapes.

    Returns:
        ``selector`` (``"learned"``, ``"average"``, ``"private"``, or None for their plain LoRA), ``rank``, ``splits``,
        ``skills``, ``tasks``, and the numbers of ``linears``, ``selectors`` and ``parameters``.

    Raises:
        ArtefactError: a tensor is none of theirs, or the linears are not of one kind.
    """
    for name in tensors:
        if not name.endswith((A, B, LOGITS, PROBS)):
            raise ArtefactError(
                f"{name[:200]!r} is none of {A}, {B}, {LOGITS} and {PROBS}: the file of another method?"
            )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    linears = {name.removesuffix(A): shape for name, shape in shapes.items() if name.endswith(A)}
    kinds = {tuple(kind_of(path, shape, shapes.get(path + B)).items()) for path, shape in linears.items()}
    if len(kinds) != 1:
        raise ArtefactError(
            f"The linears are of several kinds: {', '.join(str(dict(kind)) for kind in sorted(kinds))}."
        )
    kind = dict(kinds.pop())
    rows = {name: shape for name, shape in shapes.items() if name.endswith((LOGITS, PROBS))}
    learned = {shape for name, shape in rows.items() if name.endswith(LOGITS)}
    selector = "learned" if learned else "average" if rows else "private" if kind["splits"] else None
    wide = kind["splits"] * kind["skills"]
    if len(learned) > 1 or any(len(shape) != 2 or shape[1] != wide for shape in learned):
        raise ArtefactError(f"module_logits are {sorted(learned)}; expected one shape, (tasks, {wide}).")
    tasks = next(iter(learned))[0] if learned else kind["skills"] if selector == "private" else 0
    count = sum(t.numel() for name, t in tensors.items() if not name.endswith(PROBS))
    return {
        "selector": selector, **kind, "tasks": tasks, "linears": len(linears), "selectors": len(rows), "parameters": count,
    }  # fmt: skip


def kind_of(path: str, a: tuple[int, ...], b: tuple[int, ...] | None) -> dict[str, int]:
    """Rank, heads and skills of one linear; no heads and skills in a plain LoRA."""
    if b is None:
        raise ArtefactError(f"The file has {path}{A} and no {path}{B}.")
    if len(a) == len(b) == 2 and a[1] == b[0]:
        return {"rank": a[1], "splits": 0, "skills": 0}
    if len(a) == len(b) == 4 and a[:2] == b[:2] and a[3] == b[2]:
        return {"rank": a[3], "splits": a[0], "skills": a[1]}
    later = len(a) == len(b) == 4 and (a[0], a[3], a[1]) == b[:3]
    raise ArtefactError(
        f"{path}: lora_a is {a} and lora_b {b}; expected (heads, skills, in / heads, r) and (heads, skills, r, out / heads)"
        + (". This is the order of mttl's later releases, which we do not read." if later else ".")
    )


def official_settings(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the authors' settings that say how an adapter acts, as ours. Raises :class:`ArtefactError` for others' values."""
    if theirs.get("adapter_type", "lora") not in ("lora", None):
        raise ArtefactError(f"adapter_type is {theirs['adapter_type']!r}; we read 'lora'.")
    grain = theirs.get("router_granularity")
    if grain is not None and grain not in GRAINS:
        raise ArtefactError(f"router_granularity is {grain!r}. {near(str(grain), GRAINS)}")
    ours: dict[str, Any] = {"granularity": GRAINS[grain]} if grain else {}
    for name, key in (("lora_alpha", "alpha"), ("module_logits_dropout", "dropout")):
        if name in theirs:
            ours[key] = float(theirs[name])
    for name, weights in (
        ("relaxed_bernoulli", "relaxed"),
        ("straight_through", "straight-through"),
        ("l2_norm", "l2"),
    ):
        if theirs.get(f"module_logits_{name}"):
            ours["weights"] = weights
    ours |= {"shared_skill": True} if theirs.get("poly_use_shared_skill") else {}
    return ours | ({"normalise": False} if theirs.get("poly_average_correction") else {})


def granularity_of(tensors: Mapping[str, Tensor], paths: list[str], host: Host) -> str:
    """What shares a selector, told from which linears have one: all, or the first of each group."""
    owners = {name.removesuffix(LOGITS) for name in tensors if name.endswith(LOGITS)}
    ordered = [path for path in host.modules if path in set(paths)]
    for granularity in GRANULARITIES:
        first: dict[str, str] = {}
        for path, group in groups_of(host, ordered, granularity).items():
            first.setdefault(group, path)
        if set(first.values()) == owners:
            return granularity
    raise ArtefactError(
        f"{len(owners)} selectors for {len(paths)} linears are those of no granularity; is the file whole?"
    )


def tied(tensors: dict[str, Tensor], adapter: MHR) -> dict[str, Tensor]:
    """The tensors under our names, each once. Raises :class:`ArtefactError` where copies of one selector differ."""
    mine: dict[str, Tensor] = {}
    aliases, wanted = adapter.aliases(), uniform(adapter.config)
    for name, tensor in tensors.items():
        if name.endswith(PROBS) and adapter.config.selector == "average":
            if tensor.shape != wanted.shape or not torch.equal(tensor.to(wanted.dtype), wanted):
                raise ArtefactError(f"{name} is not {tuple(wanted.shape)} of 1 / K, which an average is.")
            continue
        first = aliases.get(name, name)
        if first in mine and not torch.equal(mine[first], tensor):
            raise ArtefactError(
                f"{name} and {first} are one selector at this granularity, and differ. Pass granularity=."
            )
        mine[first] = tensor
    check_tensors(adapter.tensors(), mine)
    return mine


def uniform(config: MHRConfig) -> Tensor:
    """The authors' buffer of an average."""
    return torch.full((config.splits, config.skills), 1 / config.skills)


def plain_lora(
    tensors: Mapping[str, Tensor], sizes: Mapping[str, Any], paths: list[str], alpha: float, host: Host
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Their plain LoRA, which is transposed against everyone else's."""
    chosen = tuple(targets([path for path in host.modules if path in paths], host))
    config = config_from_dict({"method": "lora", "rank": sizes["rank"], "alpha": alpha, "targets": chosen})
    mine = {f"{path}.lora_A.weight": tensors[path + A].T.contiguous() for path in paths}
    mine |= {f"{path}.lora_B.weight": tensors[path + B].T.contiguous() for path in paths}
    check_tensors(build(host, config, "trial").tensors(), mine)
    return config, mine


# ---------------------------------------------------------------------- PEFT

ROOT = "base_model.model."
TENSORS = {A: ".poly_lora_A", B: ".poly_lora_B", LOGITS: ".poly_router.module_logits"}
SIZES = {"rank": "r", "skills": "n_skills", "splits": "n_splits"}
SETTINGS = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"}
SETTINGS |= {
    "peft_version",
    "target_modules",
    "exclude_modules",
    "init_weights",
    "poly_type",
    "n_tasks",
    *SIZES.values(),
}


class PeftPoly:
    """Folders that PEFT writes and reads: every linear with a selector, the scaling 1 / r, relaxed weights in training."""

    name = "peft-poly"

    def reads(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
        return config.get("peft_type") == "POLY"

    def read_config(self, config: dict[str, Any], tensors: dict[str, Tensor], host: Host) -> AdapterConfig:
        for key, value in config.items():
            if key not in SETTINGS and value not in (None, False, [], {}):
                raise ArtefactError(f"{key} is {value!r}, which we do not know. {near(key, SETTINGS)}")
        if config.get("poly_type", "poly") != "poly":
            raise ArtefactError(f"poly_type is {config['poly_type']!r}; we know 'poly'.")
        paths = {name.removeprefix(ROOT).removesuffix(TENSORS[A]) for name in tensors if name.endswith(TENSORS[A])}
        for path in paths:
            if path not in host.modules:
                raise ArtefactError(f"{path[:200]!r} is no module of {host.describe()}. {near(path, host.modules)}")
        if not paths:
            raise ArtefactError(f"The file has no {TENSORS[A]}.")
        sizes = {ours: config.get(theirs) for ours, theirs in SIZES.items()}
        names = tuple(str(row) for row in range(config.get("n_tasks", 0)))
        chosen = tuple(targets([path for path in host.modules if path in paths], host))
        return config_from_dict(
            {"method": MHRConfig.method, "tasks": names, "weights": "relaxed", "targets": chosen, **sizes}
        )

    def read(self, config: dict[str, Any], tensors: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
        ours = {theirs: ours for ours, theirs in peft_names(adapter).items()}
        return {ours.get(name, name): tensor for name, tensor in tensors.items()}

    def writes(self, adapter: Adapter) -> bool:
        return misfit(adapter) is None

    def write(self, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if (why := misfit(adapter)) is not None:
            raise ArtefactError(f"PEFT's layout of Poly cannot hold this {type(adapter).__name__}: {why}.")
        ours: Any = adapter.config
        config = {
            "peft_type": "POLY",
            "task_type": "SEQ_2_SEQ_LM"
            if adapter.base_class.endswith("ForConditionalGeneration")
            else task_of(adapter),
            "poly_type": "poly",
            "n_tasks": len(ours.tasks),
            **{theirs: getattr(ours, name) for name, theirs in SIZES.items()},
            "target_modules": shortest((p.path for p in adapter.placements), adapter.base_paths),
            "init_weights": True,
        }
        values = adapter.values()
        return config, {theirs: values[name] for name, theirs in peft_names(adapter).items()}


def peft_names(adapter: Adapter) -> dict[str, str]:
    """PEFT's name for each of an adapter's tensors."""
    tails = {name: next(tail for tail in TENSORS if name.endswith(tail)) for name in adapter.tensors()}
    return {name: ROOT + name.removesuffix(tail) + TENSORS[tail] for name, tail in tails.items()}


def misfit(adapter: Adapter) -> str | None:
    """Why PEFT's layout cannot hold an adapter, or ``None``."""
    config: Any = adapter.config
    if not isinstance(adapter, MHR):
        return "it knows MHR alone"
    if adapter.uniformity:
        return unplaced(adapter)
    if config.selector != "learned" or config.granularity != "linear":
        return "each linear there has a learned selector of its own"
    if config.alpha * adapter.scale != 1:
        return f"the scaling there is 1 / r, not {config.alpha * adapter.scale} / r"
    if config.weights not in ("relaxed", "sigmoid") or config.dropout or config.shared_skill or not config.normalise:
        return "the weights there are a sigmoid, relaxed in training, over their sum"
    return None
