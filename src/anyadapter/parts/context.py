"""What an adapter has read: contexts cut into windows, and the associative memories that are kept of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from anyadapter.core.errors import ConfigError


@dataclass(frozen=True, eq=False)
class State:
    """What was read of one or several contexts.

    Attributes:
        outer: S of every adapted linear by its path, (R1, R2) in fp32.
        windows: how many windows were summed.
        recipe: what it was read with, as JSON values: the adapter's settings, fingerprints of base and generator, and
            ``reads``, one entry for each context.
    """

    outer: Mapping[str, Tensor]
    windows: int
    recipe: Mapping[str, Any]
    cores: dict[str, Tensor] = field(default_factory=dict, repr=False)  # N(S), kept from its first use on

    def __add__(self, other: State) -> State:
        """Both contexts, as if each had been read alone (mode ``"parallel"``)."""
        reads = [*self.recipe["reads"], *other.recipe["reads"]]
        return self._joined(other, 1, reads)

    def __sub__(self, other: State) -> State:
        """Forget a context that was read into this state. What remains is exact up to rounding in fp32."""
        reads = list(self.recipe["reads"])
        for read in other.recipe["reads"]:
            if read not in reads:
                raise ConfigError(
                    f"A context of {read['tokens']} tokens is to be forgotten that was not read into this state."
                )
            reads.remove(read)
        return self._joined(other, -1, reads)

    def _joined(self, other: State, sign: int, reads: list[Any]) -> State:
        for part in ("config", "base", "generator"):
            if self.recipe[part] != other.recipe[part]:
                raise ConfigError(f"The two states were not read with the same {part}; read both contexts with one.")
        outer = {path: S + sign * other.outer[path] for path, S in self.outer.items()}
        return State(outer, self.windows + sign * other.windows, {**self.recipe, "reads": reads})


def windows(ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Tokens cut into ⌈n / length⌉ windows of one length, the last filled up: (n,) → ids and mask, (windows, tokens)."""
    count = math.ceil(len(ids) / length)
    each = math.ceil(len(ids) / count)
    filled = torch.zeros(2, count * each, dtype=torch.long)
    filled[0, : len(ids)], filled[1, : len(ids)] = ids, 1
    return filled[0].view(count, each), filled[1].view(count, each)


def token_ids(context: Tensor | Sequence[int] | str, tokenizer: Any = None) -> Tensor:
    """A context as token ids, (n,). Raises :class:`ConfigError` when there are none."""
    if isinstance(context, str):
        if tokenizer is None:
            raise ConfigError("To read text, pass the base's tokenizer, or the text's token ids.")
        context = tokenizer(context)["input_ids"]
    ids = torch.as_tensor(context).cpu()
    ids = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
    if ids.dim() != 1 or not len(ids) or ids.is_floating_point():
        raise ConfigError(f"A context is one row of token ids, not {tuple(ids.shape)} of {ids.dtype}.")
    return ids.long()


def digest(tensors: Sequence[Tensor]) -> str:
    """A hash of the shapes and of some values of tensors; of all values where they are few."""
    total = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        step = max(1, len(flat) // 4096)
        total.update(f"{tuple(tensor.shape)} {flat[::step].double().cpu().numpy().tobytes()!r}".encode())
    return total.hexdigest()
