"""Where the golden cases are, and how a test finds its own.

A case is ``<folder>/<slug>/<case>.json`` with ``<case>.safetensors``; its sizes are read from these, never written in a test.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(os.environ.get("ANYADAPTER_GOLDEN", Path(__file__).parent / "golden"))


@dataclass(frozen=True)
class Golden:
    """One case: what the authors' own code gave."""

    slug: str
    name: str
    about: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under ``prefix/``, without it."""
        return {k.removeprefix(f"{prefix}/"): v for k, v in self.tensors.items() if k.startswith(f"{prefix}/")}

    def close(self, mine: Tensor, key: str) -> None:
        """Assert that ``mine`` agrees with the tensor at ``key``, within the tolerance of the case."""
        tolerance = self.about["tolerance"]
        torch.testing.assert_close(
            mine,
            self.tensors[key],
            atol=tolerance["atol"],
            rtol=tolerance["rtol"],
            msg=lambda m: f"{self.name} {key}: {m}",
        )


def discover() -> list[tuple[str, str]]:
    """(slug, case) of every case in the folder in use."""
    return sorted((path.parent.name, path.stem) for path in FOLDER.glob("*/*.json"))


def read(slug: str, name: str) -> Golden:
    """One case with its tensors (all parts of them)."""
    path = FOLDER / slug / f"{name}.json"
    tensors: dict[str, Tensor] = {}
    for file in (*path.parent.glob(f"{name}.safetensors"), *sorted(path.parent.glob(f"{name}.part*.safetensors"))):
        tensors |= load_file(file)
    return Golden(slug, name, json.loads(path.read_text()), tensors)
