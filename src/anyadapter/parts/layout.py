"""Layouts: prompt vectors among the tokens of a query, and all that a model is given for each token moved along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyadapter.core.errors import SignalError


@dataclass(frozen=True, eq=False)
class Layout:
    """A query with vectors among its tokens.

    Attributes:
        source: (batch, places), what stands there: the token of that number, or vector k as −1 − k.
        attended: (batch, places), whether anything does.
        tokens: how many the query has.
    """

    source: Tensor
    attended: Tensor
    tokens: int

    @classmethod
    def prefix(cls, attended: Tensor, count: int) -> Layout:
        """Vectors before everything else."""
        rows, tokens = attended.shape
        vectors = -1 - torch.arange(count, device=attended.device)
        source = torch.cat([vectors, torch.arange(tokens, device=attended.device)]).expand(rows, -1)
        return cls(source, torch.cat([attended.new_ones(rows, count), attended], 1), tokens)

    @classmethod
    def ptuning(cls, attended: Tensor, mask: Tensor, subject: Tensor, template: tuple[int, ...]) -> Layout:
        """First token, vectors, mask token, vectors, subject, vectors, last token; other tokens have no place."""
        tokens = attended.shape[1]
        order = torch.arange(tokens, device=attended.device)
        last = order.where(attended, -1).amax(1, keepdim=True)
        first = order.where(attended, tokens).amin(1, keepdim=True)
        part = torch.full_like(attended, 7, dtype=torch.long)  # 0 to 6 in the order above, and what has no place
        for number, where in ((0, order == first), (6, order == last), (4, subject), (2, mask)):
            part = part.masked_fill(where & attended, number)
        vectors = [part.new_full((len(part), n), 2 * i + 1) for i, n in enumerate(template)]
        part = torch.cat([part, *vectors], 1)
        length = (part < 7).sum(1, keepdim=True)
        order = part.argsort(dim=1, stable=True)[:, : int(length.max())]
        source = torch.where(order < tokens, order, tokens - 1 - order)
        return cls(source, torch.arange(source.shape[1], device=source.device) < length, tokens)

    @property
    def first(self) -> Tensor:
        """(batch, 1), the first token that is attended to."""
        tokens = self.source.where((self.source >= 0) & self.attended, self.tokens - 1)
        return tokens.amin(1, keepdim=True)

    def place(self, values: Tensor, filling: Tensor | int) -> Tensor:
        """One value for each token → one for each place, with ``filling`` at the vectors."""
        return torch.where(self.source < 0, filling, values.gather(1, self.source.clamp(min=0)))

    def arrange(self, given: Mapping[str, Any], reader: str) -> dict[str, Any]:
        """The arguments of a call of the model, for the query as it is laid out.

        Raises:
            SignalError: there is another one with a value for each token, which we cannot move.
        """
        ids, mask = given["input_ids"], given.get("attention_mask")
        known = {"input_ids": self.place(ids, ids.gather(1, self.first))}  # never padding, which some tell from the ids
        known["attention_mask"] = self.attended.to(torch.long if mask is None else mask.dtype)
        if (types := given.get("token_type_ids")) is not None:
            known["token_type_ids"] = self.place(types.expand_as(ids), 0)
        if (positions := given.get("position_ids")) is not None:
            start = positions.expand_as(ids).gather(1, self.first)
            known["position_ids"] = start + (self.attended.long().cumsum(1) - 1).clamp(min=0)
        for name, value in given.items():
            if (
                isinstance(value, Tensor)
                and value.shape[:2] == ids.shape
                and name not in known
                and "encoder_" not in name
            ):
                raise SignalError(
                    f"{reader} lays out the query anew, and cannot move {name} {tuple(value.shape)} with it."
                )
        return {**given, **known}

    def restore(self, value: Any) -> Any:
        """What a model returned, its hidden states back at the tokens' own places; 0 at tokens without one."""
        if isinstance(value, Mapping):
            for key in value:
                value[key] = self.restore(value[key])  # type: ignore[index]
        if isinstance(value, tuple):
            return tuple(self.restore(each) for each in value)
        if not isinstance(value, Tensor) or value.dim() != 3 or value.shape[:2] != self.source.shape:
            return value
        rows, _, width = value.shape
        index = self.source.where((self.source >= 0) & self.attended, self.tokens)[..., None].expand_as(value)
        return value.new_zeros(rows, self.tokens + 1, width).scatter(1, index, value)[:, : self.tokens]
