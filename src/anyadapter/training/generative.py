"""What a GenerativeAdapter learns from: windows of contexts, and what follows from having read them, all rows of one call.

Stage 1, ``{"text": ...}``: a text is cut into n windows. Window i is *completed* by a model that has read the windows before
it, and pieces of windows 0 to i are *reconstructed* by one that has read these (the authors' ``abcdabcd``, which has n = 8).
Stage 2, ``{"context": ..., "instruction": ..., "output": ...}``: the answer is learnt by a model that has read the context.
Rows of a batch with the same context share its reading.

The signals ``sees`` and ``context_mask`` tell the adapter which rows know which; the loss is the model's own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from anyadapter.core.adapter import Adapter
from anyadapter.core.errors import ConfigError, DataError
from anyadapter.methods.language.generative import GenerativeConfig
from anyadapter.parts.context import windows
from anyadapter.training import causal_lm
from anyadapter.training.causal_lm import IGNORED, CausalLM, kind_of
from anyadapter.training.rows import Row

TASKS = ("completion", "reconstruction")


@dataclass(frozen=True, eq=False)
class Block:
    """Rows that belong together.

    Attributes:
        ids: of each row.
        labels: likewise; ``IGNORED`` where nothing is learnt.
        contexts: how many of the rows, the first ones, are windows of a context.
        sees: (rows, rows), which rows each row has read.
    """

    ids: list[list[int]]
    labels: list[list[int]]
    contexts: int
    sees: Tensor


def pretraining_sees(count: int) -> Tensor:
    """(2n, 2n): row i of n windows knows those before it, row n + i knows windows 0 to i."""
    sees = torch.zeros(2 * count, 2 * count)
    sees[:count, :count] = torch.ones(count, count).tril(-1)
    sees[count:, :count] = torch.ones(count, count).tril()
    return sees


def pretraining_labels(labels: Tensor, tasks: Sequence[str] = TASKS) -> Tensor:
    """Labels of 2n rows, (2n, tokens), without those of a task that is not trained.

    Raises:
        ConfigError: a task is not one of :data:`TASKS`.
    """
    if not tasks or not set(tasks) <= set(TASKS):
        raise ConfigError(f"The tasks of pre-training are {' and '.join(TASKS)}, or one of them, not {tuple(tasks)!r}.")
    done = labels.clone()
    for task, part in zip(TASKS, done.tensor_split(2)):
        if task not in tasks:
            part.fill_(IGNORED)
    return done


def pretraining(ids: Sequence[int], window: int, tasks: Sequence[str] = TASKS) -> Block:
    """The rows of one text: its n windows, then for each i a piece of the text up to the end of window i.

    Where a piece starts is drawn from the text itself, so that a run that is taken up draws the same.
    """
    cut, mask = windows(torch.as_tensor(ids), window)
    rows = [row[seen.bool()].tolist() for row, seen in zip(cut, mask)]
    seed = int.from_bytes(hashlib.sha256(repr(list(ids)).encode()).digest()[:7], "big")
    draw = torch.Generator().manual_seed(seed)
    each, ends = cut.shape[1], [min((i + 1) * cut.shape[1], len(ids)) for i in range(len(rows))]
    starts = [int(torch.randint(end, (1,), generator=draw)) for end in ends]
    pieces = [list(ids[start : min(start + each, end)]) for start, end in zip(starts, ends)]
    kept = [task in tasks for task in TASKS for _ in rows]
    labels = [row if keep else [IGNORED] * len(row) for row, keep in zip(rows + pieces, kept)]
    return Block(rows + pieces, labels, len(rows), pretraining_sees(len(rows)))


def answering(context: Sequence[int], rows: Sequence[tuple[list[int], list[int]]], window: int) -> Block:
    """The rows of one context: its windows, each knowing those before it, then (ids, labels) of what knows them all."""
    cut, mask = windows(torch.as_tensor(context), window)
    read = [row[seen.bool()].tolist() for row, seen in zip(cut, mask)]
    count, total = len(read), len(read) + len(rows)
    sees = torch.zeros(total, total)
    sees[:count, :count] = torch.ones(count, count).tril(-1)
    sees[count:, :count] = 1
    labels = [[IGNORED] * len(row) for row in read] + [labels for _, labels in rows]
    return Block(read + [ids for ids, _ in rows], labels, count, sees)


def collate(blocks: Sequence[Block], pad_token_id: int, multiple: int = 8) -> dict[str, Tensor]:
    """Blocks to one batch, padded on the right: ``input_ids``, ``attention_mask``, ``labels``, ``sees``, ``context_mask``."""
    ids = [row for block in blocks for row in block.ids]
    labels = [row for block in blocks for row in block.labels]
    length = math.ceil(max(map(len, ids)) / multiple) * multiple

    def padded(rows: Iterable[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])

    mask = padded(([1] * len(row) for row in ids), 0)
    read = torch.cat([torch.arange(len(block.ids)) < block.contexts for block in blocks])
    return {
        "input_ids": padded(ids, pad_token_id),
        "attention_mask": mask,
        "labels": padded(labels, IGNORED),
        "sees": torch.block_diag(*(block.sees for block in blocks)),
        "context_mask": mask * read[:, None],
    }


# ---------------------------------------------------------------------- in a run of `anyadapter train`


class Contexts(CausalLM):
    """Rows of either stage: texts, or answers that follow from a context."""

    def encode(self, rows: list[Row], processor: Any, adapter: Adapter) -> list[dict[str, Any]]:
        data: Any = self.config.data
        settings = {"template": data.template, "max_length": data.max_length, "train_on_inputs": data.train_on_inputs}
        return tokenise_contexts(rows, processor, **settings)

    def collator(self, processor: Any) -> ContextCollator:
        config: Any = self.config.adapter
        return ContextCollator(int(processor.pad_token_id or 0), config)


def tokenise_contexts(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, **settings: Any) -> list[dict[str, Any]]:
    """As :func:`anyadapter.training.causal_lm.tokenise`, with ``"context"``: a list of tokens, or None for a text of stage 1.

    Raises:
        DataError: a row with a prompt has no context, or an empty one.
    """
    rows = list(rows)
    encoded = causal_lm.tokenise(rows, tokenizer, **settings)
    for row, one in zip(rows, encoded):
        if kind_of(row) == "text":
            one["context"] = None
            continue
        context = row.values.get("context")
        if not isinstance(context, str) or not context.strip():
            raise DataError(
                f"{row.where}: a GenerativeAdapter answers from a context; expected its text under 'context', not {context!r}."
            )
        one["context"] = tokenizer(context)["input_ids"]
    return encoded


class ContextCollator:
    """Tokenised rows to a batch; rows with the same context share its windows."""

    def __init__(self, pad_token_id: int, config: GenerativeConfig) -> None:
        self.pad_token_id, self.window = pad_token_id, config.window

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        blocks = [pretraining(row["input_ids"], self.window) for row in rows if row["context"] is None]
        asked: dict[tuple[int, ...], list[tuple[list[int], list[int]]]] = {}
        for row in rows:
            if row["context"] is not None:
                asked.setdefault(tuple(row["context"]), []).append((row["input_ids"], row["labels"]))
        blocks += [answering(context, answers, self.window) for context, answers in asked.items()]
        return collate(blocks, self.pad_token_id)
