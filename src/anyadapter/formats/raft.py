"""The checkpoints of RAFT's authors: whole models, encoder and heads, as they were fully fine-tuned.

The predictor is a folder as ``save_pretrained`` makes it; its encoder has no pooler of its own. The classifier is a pickled
state, ``model_weights.pt``. The encoder's tensors stand under ``bert.`` in both.

Where a file's encoder is the host's own, the adapter holds the heads alone; where it was trained, the adapter holds it whole.
:func:`load_official` makes the predictor's encoder the host, which is then no larger than the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anyadapter.core.adapter import Adapter, AdapterConfig, check_tensors
from anyadapter.core.attach import attach, build, get
from anyadapter.core.catalogue import config_from_dict
from anyadapter.core.errors import ArtefactError
from anyadapter.core.host import Host
from anyadapter.formats.files import read_file
from anyadapter.parts.low_rank import LowRank
from anyadapter.parts.whole import Whole

PREDICTOR, CLASSIFIER = "rationale_predictor", "raft"
ENCODER = "bert."  # in the authors' files
POSITIONS = f"{ENCODER}embeddings.position_ids"  # a buffer of older releases of transformers: 0, 1, 2, …
OLD_POOLER, POOLER = "bert_pooler.", "pooler."
ATTENTION = {"cross": "attn_with_CLS.", "self": "attn."}
MULTIHEAD = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
HEADS = ("token_classifier.", "classifier.", "target_classifier.")
Source = str | Path | Mapping[str, Tensor]


def read_predictor(
    source: Source,
    host: Host,
    *,
    labels: Sequence[str] = (),
    targets: Sequence[str] | None = None,
    allow_pickle: bool = False,
    **settings: Any,
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Settings and tensors of an official predictor, for ``attach(model, config).load_tensors(tensors)``.

    The older spelling, ``bert_pooler`` for ``pooler``, is read too.

    Args:
        source: ``model.safetensors`` or ``pytorch_model.bin``, or the tensors in it.
        host: the encoder, without a head.
        labels, targets: names of the classes and of the groups, which the file does not hold; by default their numbers.
            ``targets=()`` takes an older file, which has no head for them.
        allow_pickle: read a ``.bin`` (plain tensors only).
        settings: more of ``RationalePredictorConfig``.

    Raises:
        ArtefactError: a tensor is missing, not known or of the wrong shape.
    """
    tensors = read_source(source, allow_pickle)
    tensors = {POOLER + k[len(OLD_POOLER) :] if k.startswith(OLD_POOLER) else k: t for k, t in tensors.items()}
    encoder, heads = parted(tensors)
    if "target_classifier.weight" not in heads and targets != ():
        raise ArtefactError(
            "The file has no target_classifier: it is of the authors' older predictor, which knows no targets. Pass targets=() "
            "to read it as one."
        )
    found = {
        "labels": named(labels, heads, "classifier.weight"),
        "targets": () if targets == () else named(targets or (), heads, "target_classifier.weight"),
    }
    whole, updates = trained(encoder, host, ("embeddings", "encoder"), "")
    config = config_from_dict({**settings, **found, "method": PREDICTOR, "whole": whole})
    check_tensors(build(host, config, "trial").tensors(), heads | updates)
    return config, heads | updates


def read_classifier(
    source: Source, host: Host, *, labels: Sequence[str] = (), allow_pickle: bool = False, **settings: Any
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Settings and tensors of an official classifier, as :func:`read_predictor`; which attention it has is seen by its keys.

    Args:
        source: ``model_weights.pt``, or the tensors in it.
        host: a BERT that classifies texts, with as many classes and a pooler.
        labels: names of the classes; by default their numbers.
        settings: of ``RAFTConfig`` what the tensors do not tell: ``heads``, ``keep_special``, ``rationales``.

    Raises:
        ArtefactError: a tensor is missing, not known or of the wrong shape.
    """
    encoder, heads = parted(read_source(source, allow_pickle))
    attention = next((kind for kind, name in ATTENTION.items() if f"{name}in_proj_weight" in heads), None)
    if attention is None or "classifier.weight" not in heads:
        raise ArtefactError(
            f"The file holds {', '.join(list(heads)[:5]) or 'no head'}; expected {ATTENTION['cross']}* or {ATTENTION['self']}* "
            "and classifier.*."
        )
    settings["labels"] = named(labels, heads, "classifier.weight")
    if attention == "self":
        width = heads[f"{ATTENTION[attention]}in_proj_weight"].shape[1]
        settings["length"] = heads["classifier.weight"].shape[1] // width
    path = f"{host.model.base_model_prefix}."
    whole, updates = trained(encoder, host, ("embeddings", "encoder", "pooler"), path)
    config = config_from_dict({**settings, "method": CLASSIFIER, "attention": attention, "whole": whole})
    trial = build(host, config, "trial")
    rename = renaming(trial)
    tensors = {rename(name): tensor for name, tensor in heads.items()} | updates
    check_tensors(trial.tensors(), tensors)
    return config, tensors


def write_official(model: nn.Module, name: str = "default", *, older: bool = False) -> dict[str, Tensor]:
    """An attached predictor or classifier under the authors' keys, whole, with the encoder it runs on.

    Args:
        model: the host.
        name: of the adapter.
        older: the predictor's older spelling, ``bert_pooler``.

    Raises:
        ArtefactError: it is an adapter of another method, or with a pooler of its own, or the host is no BERT.
    """
    host = Host.of(model)
    adapter: Any = get(host, name)
    if adapter.config.method not in (PREDICTOR, CLASSIFIER) or host.model.config.model_type != "bert":  # type: ignore
        raise ArtefactError(
            f"A {type(adapter).__name__} on {host.describe()} does not fit a checkpoint of RAFT's authors."
        )
    mine = adapter.values()
    if adapter.config.method == PREDICTOR:
        spelled = OLD_POOLER if older else POOLER
        state = encoder_state(host, adapter, "")
        state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{ENCODER}{POOLER}")}
        heads = {key: tensor for key, tensor in mine.items() if key.startswith((POOLER, *HEADS))}
        heads = {spelled + k[len(POOLER) :] if k.startswith(POOLER) else k: t for k, t in heads.items()}
    else:
        if adapter.classifier.pooler is not None:
            raise ArtefactError("The authors' classifier reads the encoder's own pooler, and this host has none.")
        rename, theirs = renaming(adapter), ATTENTION[adapter.config.attention]
        state = encoder_state(host, adapter, f"{host.model.base_model_prefix}.")
        names = (*(f"{theirs}{part}" for part in MULTIHEAD), "classifier.weight", "classifier.bias")
        heads = {key: mine[rename(key)] for key in names}
    return {key: tensor.detach().cpu().clone() for key, tensor in {**state, **heads}.items()}


def load_official(
    folder: str | Path,
    *,
    labels: Sequence[str] = (),
    targets: Sequence[str] | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[nn.Module, Any]:
    """The authors' predictor, ready to use: its encoder as the host, its heads as an adapter, and its tokenizer.

    Args:
        folder: a local folder, or a repository on the Hugging Face Hub, such as
            ``"Hate-speech-CNERG/Rationale_predictor"``.
        labels, targets, allow_pickle: as of :func:`read_predictor`.
        revision, token: of a Hub repository.

    Raises:
        ArtefactError: a file is missing or does not fit.
    """
    from transformers import AutoTokenizer, BertConfig, BertModel

    path = fetched(folder, revision, token)
    weights = next((path / f for f in ("model.safetensors", "pytorch_model.bin") if (path / f).is_file()), None)
    if weights is None:
        raise ArtefactError(f"{path} holds no model.safetensors and no pytorch_model.bin.")
    tensors = read_source(weights, allow_pickle)
    model = BertModel(BertConfig.from_pretrained(path), add_pooling_layer=False)
    encoder = {key.removeprefix(ENCODER): t for key, t in parted(tensors)[0].items()}
    check_tensors(model.state_dict(), encoder)
    model.load_state_dict(encoder)
    model.eval().config._name_or_path = str(folder)
    config, found = read_predictor(tensors, Host.of(model), labels=labels, targets=targets)
    attach(model, config).load_tensors(found)
    return model.eval(), AutoTokenizer.from_pretrained(path)


# ---------------------------------------------------------------------- keys


def read_source(source: Source, allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors of a file. Raises :class:`ArtefactError` when the positions in it are not 0, 1, 2, …"""
    tensors = dict(source) if isinstance(source, Mapping) else read_file(Path(source), allow_pickle)
    positions = tensors.pop(POSITIONS, None)
    if positions is not None and not torch.equal(positions.flatten(), torch.arange(positions.numel())):
        raise ArtefactError(
            f"{POSITIONS} is not 0, 1, 2, …: the model was changed in a way that BERT has no place for."
        )
    return tensors


def parted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the encoder's tensors, the heads')."""
    encoder = {key: tensor for key, tensor in tensors.items() if key.startswith(ENCODER)}
    return encoder, {key: tensor for key, tensor in tensors.items() if key not in encoder}


def named(names: Sequence[str], heads: Mapping[str, Tensor], key: str) -> tuple[str, ...]:
    """Names of the rows of a head; by default their numbers. Raises :class:`ArtefactError` when there are more or fewer."""
    if key not in heads:
        raise ArtefactError(f"The file has no {key}.")
    count = len(heads[key])
    if names and len(names) != count:
        raise ArtefactError(f"{key} has {count} rows, and {len(names)} names are given for them.")
    return tuple(names) or tuple(map(str, range(count)))


def trained(
    encoder: Mapping[str, Tensor], host: Host, parts: tuple[str, ...], path: str
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """(modules to hold whole, their tensors under our names): nothing where the file's encoder is the host's, bit for bit.

    Args:
        encoder: tensors under the authors' keys.
        parts: the modules of the encoder that the file holds.
        path: of the encoder in the host, with a dot.
    """
    base = {
        f"{ENCODER}{key.removeprefix(path)}": tensor
        for key, tensor in host.model.state_dict().items()
        if key.startswith(tuple(f"{path}{part}." for part in parts))
    }
    check_tensors(base, encoder)
    if all(torch.equal(base[key].cpu(), tensor) for key, tensor in encoder.items()):
        return (), {}
    whole = tuple(f"{path}{part}" for part in parts)
    updates = {}
    for key, tensor in encoder.items():
        part, _, rest = key.removeprefix(ENCODER).partition(".")
        updates[f"{path}{part}.whole.{rest}"] = tensor
    return whole, updates


def encoder_state(host: Host, adapter: Adapter, path: str) -> dict[str, Tensor]:
    """The encoder as it runs, under the authors' keys: trained modules, and low-rank updates added to their weights."""
    state, values = {k: t for k, t in host.model.state_dict().items() if k.startswith(path)}, adapter.values()
    for placement in adapter.placements:
        branch: Any = placement.branch
        if isinstance(branch, Whole):
            held = f"{placement.path}.whole."
            state |= {f"{placement.path}.{k.removeprefix(held)}": t for k, t in values.items() if k.startswith(held)}
        elif isinstance(branch, LowRank):
            weight = state[f"{placement.path}.weight"]
            delta = branch.weight_delta(host.modules[placement.path])
            state[f"{placement.path}.weight"] = (weight.float() + delta).to(weight.dtype)
    return {f"{ENCODER}{key.removeprefix(path)}": tensor for key, tensor in state.items()}


def renaming(adapter: Any) -> Callable[[str], str]:
    """What gives a head's tensor of the authors' classifier our name."""
    path, theirs = adapter.path, ATTENTION[adapter.config.attention]

    def rename(name: str) -> str:
        return f"{path}.attend.{name[len(theirs) :]}" if name.startswith(theirs) else f"{path}.{name}"

    return rename


def fetched(folder: str | Path, revision: str | None, token: str | None) -> Path:
    """The local folder of a model, fetched from the Hub when it is a repository id."""
    path = Path(folder)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "model.safetensors", "pytorch_model.bin"]
    try:
        return Path(snapshot_download(str(folder), revision=revision, token=token, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ArtefactError(f"{folder} is no local folder, and the Hub did not give it: {error}") from None
