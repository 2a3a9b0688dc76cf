"""The checkpoints of P-Adapters' authors.

A pickled dictionary whose ``"embedding"`` is the state of the adapter, ``lstm_head.*`` and ``mlp_head.*``, beside settings
and dates in classes of other packages. Which tokens were kept, and alpha, cannot be told from the tensors.
"""

from __future__ import annotations

import pickle
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
from anyadapter.formats.files import finite

METHOD = "p_adapter"


def read_official(
    source: str | Path | Mapping[str, Tensor], host: Host, **settings: Any
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Settings and tensors of an official checkpoint, for ``attach(model, config).load_tensors(tensors)``.

    Args:
        source: a ``.ckpt`` file, or the tensors in it.
        host: the base.
        settings: of ``PAdapterConfig``, as the adapter was trained: ``rewrite-lstm-mo``, ``-so`` and ``-somo`` have
            ``keep``; ``rewrite-lstm-ensemble`` has ``alpha``.

    Raises:
        ArtefactError: a tensor is missing, not known (another variant?) or of the wrong shape.
        ConfigError, TargetError: a setting is not known, or the host cannot be adapted so.
    """
    tensors = dict(source) if isinstance(source, Mapping) else read_checkpoint(Path(source))
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


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors under ``"embedding"``; nothing else in the file is run or built.

    Raises:
        ArtefactError: it is no such file.
    """
    try:
        tensors = torch.load(path, map_location="cpu", pickle_module=TensorsOnly, weights_only=False)["embedding"]
        sound = all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items())
    except Exception as error:
        raise ArtefactError(f"{path} is no P-Adapters checkpoint: {type(error).__name__}: {error}") from None
    if not sound:
        raise ArtefactError(f"{path} holds other things than tensors under 'embedding'.")
    return finite(path, dict(tensors))


class TensorsOnly:
    """In the place of the module ``pickle``: builds dictionaries and tensors, and :class:`Inert` objects for all else."""

    BUILT = {("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2")}

    class Unpickler(pickle.Unpickler):
        """Looks no other class or function up."""

        def find_class(self, module: str, name: str) -> Any:
            return super().find_class(module, name) if (module, name) in TensorsOnly.BUILT else Inert

    @classmethod
    def load(cls, file: Any, **options: Any) -> Any:
        """One object; files from before torch 1.6 begin with some."""
        return cls.Unpickler(file, **options).load()


class Inert:
    """An object of a class we do not load: it takes whatever a pickle does to it, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Nothing."""

    def extend(self, items: Any) -> None:
        """Nothing."""
