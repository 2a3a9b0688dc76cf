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
            ``reads``, one entry for each context; its ``after`` is how many of the entries just before it were known when it
            was read. Empty where contexts were read in training, or by :meth:`Generative.read_windows`.
        readers: marks of the generators that have read it, or are known to be the same.
    """

    outer: Mapping[str, Tensor]
    windows: int
    recipe: Mapping[str, Any]
    readers: set[str] = field(default_factory=set, repr=False)
    cores: dict[Any, Tensor] = field(default_factory=dict, repr=False)  # N(S), kept from its first use on

    @property
    def reads(self) -> list[dict[str, Any]]:
        """The contexts, as the recipe has them. Raises :class:`ConfigError` when there is no recipe."""
        if not self.recipe:
            raise ConfigError(
                "This state does not say what was read into it; read the contexts with adapter.read(...)."
            )
        return list(self.recipe["reads"])

    def __add__(self, other: State) -> State:
        """The sum of both, each as it was read: neither knew the other, and a context that is in both counts twice.

        With mode ``"parallel"`` it is what reading both together gives. To read one by a model that knows the other, pass
        ``state`` to :meth:`Generative.read`.

        Raises:
            ConfigError: they were not read with the same settings, base and generator, or do not say with what.
        """
        return self._joined(other, 1, [*self.reads, *other.reads])

    def __sub__(self, other: State) -> State:
        """Forget contexts: what remains is, up to rounding in fp32, the state of one who has never read them.

        Raises:
            ConfigError: as for ``+``; or one of them is not in this state as it is in the other, or others were read by a
                model that knew it, and hold something of it.
        """
        left = units(self.reads)
        for unit in units(other.reads):
            if unit not in left or "after" not in unit[-1]:
                raise ConfigError(refusal(unit[-1], self.reads))
            left.remove(unit)
        return self._joined(other, -1, [read for unit in left for read in unit])

    def _joined(self, other: State, sign: int, reads: list[dict[str, Any]]) -> State:
        for part in ("config", "base", "generator"):
            if self.recipe[part] != other.recipe[part]:
                raise ConfigError(f"The two states were not read with the same {part}; read both contexts with one.")
        outer = {path: S + sign * other.outer[path] for path, S in self.outer.items()}
        recipe = {**self.recipe, "reads": reads}
        return State(outer, self.windows + sign * other.windows, recipe, self.readers | other.readers)


def units(reads: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Entries of contexts, each together with those that were known when it was read."""
    left, found = list(reads), []
    while left:
        start = len(left) - 1 - left[-1].get("after", 0)
        found.append(left[start:])
        del left[start:]
    return found[::-1]


def refusal(read: dict[str, Any], reads: Sequence[dict[str, Any]]) -> str:
    """Why a context cannot be forgotten by a state of these."""
    if any("after" not in one for one in (read, *reads)):
        return (
            "Nothing can be forgotten here: a state was saved by a version that did not note what was known when a context was "
            "read. Read the contexts again."
        )
    start = f"A context of {read['tokens']} tokens is to be forgotten that was"
    if all(one["context"] != read["context"] for one in reads):
        return f"{start} not read into this state."
    return (
        f"{start} read into this state in another way: in other windows or another mode, after other contexts, or with others "
        "after it that hold something of it. Read with mode='parallel' what is to be forgotten by itself, or keep the state "
        "that was there before."
    )


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


def digest(ids: Tensor) -> str:
    """A hash of all token ids, (n,)."""
    return hashlib.sha256(ids.long().cpu().numpy().tobytes()).hexdigest()


def sampled(tensors: Sequence[Tensor]) -> str:
    """A hash of the shapes and of some values of tensors; of all values where they are few."""
    total = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        step = max(1, len(flat) // 4096)
        total.update(f"{tuple(tensor.shape)} {flat[::step].double().cpu().numpy().tobytes()!r}".encode())
    return total.hexdigest()
