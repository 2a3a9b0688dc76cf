"""Layouts: how an adapter's settings and tensors are named in a folder. Each is a map of keys and shapes, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from anyadapter.core.adapter import Adapter, AdapterConfig
from anyadapter.core.errors import ArtefactError, near
from anyadapter.core.host import Host
from anyadapter.formats.packed import dump, parse, read_bits
from anyadapter.parts.quantised import Packed
from anyadapter.quantize import packed, quantised

KEY = "anyadapter"  # of our own object in a configuration

_LAYOUTS = {
    "native": "anyadapter.formats.layouts:Native",
    "peft": "anyadapter.formats.peft:Peft",
    "llm-adapters": "anyadapter.formats.llm_adapters:LLMAdapters",
    "peft-poly": "anyadapter.formats.mhr:PeftPoly",
    "generative-adapter": "anyadapter.formats.generative:FastLora",
}


class Layout(Protocol):
    """One naming of files' contents."""

    name: str

    def writes(self, adapter: Adapter) -> bool:
        """Whether this layout can hold the adapter whole."""

    def write(self, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The configuration and tensors to save. Raises :class:`ArtefactError` when it cannot hold the adapter."""

    def reads(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
        """Whether a folder without our own configuration is of this layout."""

    def read_config(self, config: dict[str, Any], tensors: dict[str, Tensor], host: Host) -> AdapterConfig:
        """Our configuration for a folder of this layout. Refuses every setting we cannot honour, by name."""

    def read(
        self, config: dict[str, Any], tensors: dict[str, Tensor], adapter: Adapter
    ) -> Mapping[str, Tensor | Packed]:
        """The tensors under the names ``adapter.tensors()`` has."""


class Native:
    """Our own names. Quantised matrices are packed."""

    name = "native"

    def writes(self, adapter: Adapter) -> bool:
        return True

    def write(self, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"peft_type": adapter.config.method.upper()}, adapter.tensors() | dump(packed(adapter))

    def reads(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
        return False

    def read_config(self, config: dict[str, Any], tensors: dict[str, Tensor], host: Host) -> AdapterConfig:
        raise ArtefactError("The folder was not written by anyadapter.")

    def read(
        self, config: dict[str, Any], tensors: dict[str, Tensor], adapter: Adapter
    ) -> Mapping[str, Tensor | Packed]:
        shapes = {name: tuple(tensor.shape) for name, tensor in adapter.tensors().items()}
        return parse(read_bits((config.get(KEY) or {}).get("bits"), shapes), tensors, shapes)


def by_name(name: str) -> Layout:
    """The layout of that name. Raises :class:`ArtefactError` with near names."""
    if name not in _LAYOUTS:
        raise ArtefactError(f"There is no layout {name!r}. {near(name, _LAYOUTS)}")
    module, _, cls = _LAYOUTS[name].partition(":")
    return getattr(import_module(module), cls)()


def names() -> list[str]:
    """The names of all layouts."""
    return list(_LAYOUTS)


def of(adapter: Adapter) -> Layout:
    """The layout an adapter is saved in: PEFT's where that holds it whole, else our own."""
    peft = by_name("peft")
    return peft if peft.writes(adapter) and not quantised(adapter) else by_name("native")


def detect(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Layout:
    """The layout of a foreign folder. Raises :class:`ArtefactError` when none reads it."""
    for name in _LAYOUTS:
        layout = by_name(name)
        if layout.reads(config, tensors):
            return layout
    raise ArtefactError(
        f"{path} is of no layout we read (peft_type {config.get('peft_type')!r}). We read: {', '.join(_LAYOUTS)}."
    )


def check_unscaled(adapter: Adapter) -> None:
    """Raise an :class:`ArtefactError` where an adapter has a scale, which the files of its system's authors cannot hold."""
    if adapter.scale != 1:
        raise ArtefactError(
            f"The authors' file has no place for the scale {adapter.scale:g} of {adapter.name!r}. Set it to 1 before, and again "
            "where the file is read."
        )
