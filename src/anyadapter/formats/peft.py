"""PEFT's layout."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from anyadapter.core.adapter import Adapter, AdapterConfig
from anyadapter.core.errors import ArtefactError
from anyadapter.core.host import Host


class Peft:
    """Folders that `peft` writes and reads."""

    name = "peft"

    def writes(self, adapter: Adapter) -> bool:
        return False

    def write(self, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
        raise ArtefactError("not yet")

    def reads(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
        return False

    def read_config(self, config: dict[str, Any], tensors: dict[str, Tensor], host: Host) -> AdapterConfig:
        raise ArtefactError("not yet")

    def read(self, config: dict[str, Any], tensors: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
        return tensors
