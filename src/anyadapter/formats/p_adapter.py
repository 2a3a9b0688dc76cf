"""The checkpoints of P-Adapters' authors.

A pickled dictionary whose ``"embedding"`` is the state of the adapter: ``lstm_head.*`` and ``mlp_head.*``, of an expert also
``embedding.weight`` or, in an ensemble, ``embeddings`` and ``mixture_weights``. Each relation's expert is a file of its own.
Their own files hold settings and dates in classes of other packages beside it, which we do not load. The variant is told from
the tensors; which tokens were kept, alpha and what a rewrite is made of cannot be.
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
from anyadapter.formats.layouts import check_unscaled

METHOD = "p_adapter"
BASE = ("mlm_embeddings.", "transformer.")  # of the frozen model, which some variants' files hold too
CONVERT = """Where you trust it, write its tensors alone once, with omegaconf installed:
    state = torch.load("theirs.ckpt", weights_only=False, map_location="cpu")["embedding"]
    torch.save({"embedding": state}, "plain.ckpt")"""

Source = str | Path | Mapping[str, Tensor]


def read_official(
    source: Source | Mapping[str, Source], host: Host, *, allow_pickle: bool = False, **settings: Any
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Settings and tensors of an official checkpoint, for ``attach(model, config).load_tensors(tensors)``.

    Args:
        source: a ``.ckpt`` file, or the tensors in it; of experts, such a one for each relation, by its name.
        host: the base.
        allow_pickle: read the ``.ckpt`` (plain tensors only).
        settings: of ``PAdapterConfig``, as the adapter was trained: ``rewrite-lstm-mo``, ``-so``, ``-somo`` and
            ``rewrite-ptuning-mo`` have ``keep``; ``rewrite-lstm-ensemble`` has ``alpha``; ``rewrite-trans`` has
            ``features="model"``; where the mask token is kept, ``mask_token_id``. What is told from the tensors need not be
            given.

    Raises:
        ArtefactError: a tensor is missing, not known (another variant?) or of the wrong shape, or of another base.
        ConfigError, TargetError: a setting is not known, or the host cannot be adapted so.
    """
    several = isinstance(source, Mapping) and not all(isinstance(value, Tensor) for value in source.values())
    if several:
        states = {name: read_state(each, host, allow_pickle) for name, each in source.items()}  # type: ignore[union-attr, arg-type]
        tensors = {f"experts.{i}.{k}": t for i, state in enumerate(states.values()) for k, t in state.items()}
        told = variant_of(next(iter(states.values()), {})) | {"relations": list(states)}
    else:
        tensors = read_state(source, host, allow_pickle)  # type: ignore[arg-type]
        told = variant_of(tensors)
        if told["variant"] == "experts":
            tensors = {f"experts.0.{name}": tensor for name, tensor in tensors.items()}
    config = config_from_dict({**told, **settings, "method": METHOD})
    check_tensors(build(host, config, "trial").tensors(), tensors)
    return config, tensors


def read_state(source: Source, host: Host, allow_pickle: bool) -> dict[str, Tensor]:
    """The adapter's tensors in one checkpoint, without those of the base.

    Raises:
        ArtefactError: it cannot be read, or belongs to another base.
    """
    try:
        found = dict(source) if isinstance(source, Mapping) else read_file(Path(source), allow_pickle, part="embedding")
    except ArtefactError as error:
        raise ArtefactError(f"{error}\n{CONVERT}" if allow_pickle else str(error)) from None
    table = getattr(host.head, "weight", None)  # tied to the word embeddings in every base of theirs
    theirs = found.get("mlm_embeddings.weight")
    if table is not None and theirs is not None and not same(theirs, table):
        raise ArtefactError(f"The checkpoint holds the word embeddings of another base than this {host.describe()}.")
    return {name: tensor for name, tensor in found.items() if not name.startswith(BASE)}


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tables are one, but for rounding."""
    return one.shape == other.shape and torch.allclose(one.cpu().float(), other.detach().cpu().float(), atol=1e-3)


def variant_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings that the tensors tell."""
    last, first = tensors.get("mlp_head.2.weight"), tensors.get("mlp_head.0.weight")
    if "mlp_head.weight" in tensors or last is None or first is None:
        return {"variant": "rewrite"}
    if "embeddings" in tensors:
        return {"variant": "experts", "ensemble": len(tensors["embeddings"]), "keep": ("mask", "subject")}
    if "embedding.weight" not in tensors:
        return {"variant": "prefix", "prompts": len(last) // len(first)}
    return {"variant": "experts" if len(last) == len(first) else "ptuning", "keep": ("mask", "subject")}


def write_official(adapter: Adapter, relation: str | None = None) -> dict[str, Tensor]:
    """The tensors as the authors name them; ``torch.save({"embedding": tensors}, path)`` makes a file of them.

    Their classes of ``rewrite-ptuning`` and ``rewrite-trans`` also load the base, as ``mlm_embeddings.weight`` (its word
    embeddings) and ``transformer.*`` (the whole model); add these where their code is to read the file.

    Args:
        relation: of experts, which one.

    Raises:
        ArtefactError: it is an adapter of another method, has no such expert, or has a scale.
    """
    if adapter.config.method != METHOD:
        raise ArtefactError(f"A {type(adapter).__name__} does not fit the checkpoint of a P-Adapter.")
    check_unscaled(adapter)
    relations: tuple[str, ...] = adapter.config.relations  # type: ignore[attr-defined]
    prefix = ""
    if relations:
        relation = relations[0] if relation is None and len(relations) == 1 else relation
        if relation not in relations:
            raise ArtefactError(f"A checkpoint is one expert's, not {relation!r}. {near(str(relation), relations)}")
        prefix = f"experts.{relations.index(relation)}."
    return {
        name.removeprefix(prefix): tensor.detach().cpu().clone()
        for name, tensor in adapter.values().items()
        if name.startswith(prefix)
    }
