"""The checkpoints of P-Adapters' authors.

A pickled dictionary whose ``"embedding"`` is the state of the adapter, ``lstm_head.*`` and ``mlp_head.*``. Their own files hold
settings and dates in classes of other packages beside it, which we do not load: where you trust one, save its
``"embedding"`` alone. Which tokens were kept, and alpha, cannot be told from the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from anyadapter.core.adapter import Adapter, AdapterConfig, check_tensors
from anyadapter.core.attach import build
from anyadapter.core.catalogue import config_from_dict
from anyadapter.core.errors import ArtefactError
from anyadapter.core.host import Host
from anyadapter.formats.files import read_file

METHOD = "p_adapter"


def read_official(
    source: str | Path | Mapping[str, Tensor], host: Host, *, allow_pickle: bool = False, **settings: Any
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Settings and tensors of an official checkpoint, for ``attach(model, config).load_tensors(tensors)``.

    Args:
        source: a ``.ckpt`` file, or the tensors in it.
        host: the base.
        allow_pickle: read the ``.ckpt`` (plain tensors only).
        settings: of ``PAdapterConfig``, as the adapter was trained: ``rewrite-lstm-mo``, ``-so`` and ``-somo`` have
            ``keep``; ``rewrite-lstm-ensemble`` has ``alpha``.

    Raises:
        ArtefactError: a tensor is missing, not known (another variant?) or of the wrong shape.
        ConfigError, TargetError: a setting is not known, or the host cannot be adapted so.
    """
    tensors = dict(source) if isinstance(source, Mapping) else read_file(Path(source), allow_pickle, part="embedding")
    config = config_from_dict({**settings, "method": METHOD})
    check_tensors(build(host, config, "trial").tensors(), tensors)
    return config, tensors


def write_official(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors as the authors name them; ``torch.save({"embedding": tensors}, path)`` makes a file of them.

    Raises:
        ArtefactError: it is an adapter of another method.
    """
    if adapter.config.method != METHOD:
        raise ArtefactError(f"A {type(adapter).__name__} does not fit the checkpoint of a P-Adapter.")
    return {name: tensor.detach().cpu().clone() for name, tensor in adapter.tensors().items()}
