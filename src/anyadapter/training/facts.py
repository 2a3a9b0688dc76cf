"""Facts, asked of a masked language model in many wordings (LAMA; Petroni et al. 2019, arXiv 1909.01066).

A row is ``{"subject": "France", "object": "Paris", "relation": "P36"}``; a file of templates gives each relation's wordings,
``The capital of [X] is [Y].``, with ``[X]`` for the subject and ``[Y]`` for the answer. Every fact is asked in every wording
of its relation, and the answer is learnt at the one mask token. Answers are single tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerBase

from anyadapter.core.adapter import Adapter
from anyadapter.core.attach import adapters, signals
from anyadapter.core.errors import ConfigError, DataError, SignalError, near
from anyadapter.core.host import Host
from anyadapter.training.base import load_base
from anyadapter.training.rows import Row, read_checked, read_objects, renamed
from anyadapter.training.tasks import DataSettings, Task

ROLES = ("subject", "object", "relation")
EXPECTED = (
    'a row is {"subject", "object", "relation"}, all text; name other columns by fields, as in fields: {subject: sub_label, '
    "object: obj_label, relation: predicate_id}"
)
IGNORED = -100  # the label of a token that is not asked for
SUBJECT, ANSWER = "[X]", "[Y]"


@dataclass(frozen=True, kw_only=True)
class FactsSettings(DataSettings):
    """What to learn from, as facts and wordings.

    Attributes:
        templates: the wordings of each relation, a .json of lists by relation, or a .jsonl of
            ``{"relation": "P36", "template": "The capital of [X] is [Y]."}``, as many lines a relation as it has wordings.
        eval_templates: other wordings for the rows of ``eval``; by default the same.
        vocabulary: a file of the words among which hit@1 seeks the answer, one a line, of which those that are no single token
            of the base do not count; by default the objects of all rows.
        base_dropout: keep the base's own dropout on while the adapter learns, as the authors did.
    """

    templates: str
    eval_templates: str | None = None
    vocabulary: str | None = None
    base_dropout: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        other = self.eval_templates is None or self.eval not in (None, self.train)
        self.require("eval_templates", other, "left out where data.eval is no file of its own")


class Facts(Task):
    """The answer at the mask token, whatever the wording; the loss is cross-entropy there."""

    Settings: ClassVar[type[DataSettings]] = FactsSettings

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.words: set[str] = set()  # all objects that were read

    def read(self, path: str | Path) -> list[Row]:
        data: Any = self.config.data
        for name in data.fields:
            if name not in ROLES:
                raise ConfigError(f"data.fields has no {name!r}. {near(name, ROLES)}")
        self.vocabulary()  # what is wrong with it is said before training
        wordings = read_templates(self.templates(path))
        rows = read_checked(path, partial(check, fields=data.fields, wordings=wordings), EXPECTED)
        self.words |= {row.values["object"] for row in rows}
        return rows

    def vocabulary(self) -> list[str]:
        """The words among which hit@1 seeks the answer. Raises :class:`DataError` when the file cannot be read."""
        file = self.config.data.vocabulary  # type: ignore[attr-defined]
        if file is None:
            return sorted(self.words)
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read: {error}; expected one word a line.") from None
        return [line.strip() for line in lines if line.strip()]

    def templates(self, path: str | Path) -> str:
        """The file of the wordings that the facts of another are asked in."""
        data: Any = self.config.data
        return data.eval_templates if data.eval_templates and str(path) == str(data.eval) else data.templates

    def digest(self, path: str | Path) -> str:
        return hashlib.sha256(Path(path).read_bytes() + Path(self.templates(path)).read_bytes()).hexdigest()

    def load(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        base = self.config.base
        more = {"dtype": base.dtype, "attn": base.attn, "revision": base.revision}
        return load_base(base.name, gguf_file=base.gguf_file, auto=AutoModelForMaskedLM, **more)  # type: ignore[arg-type]

    def encode(self, rows: list[Row], processor: Any, adapter: Adapter) -> list[dict[str, Any]]:
        data: Any = self.config.data
        token = getattr(adapter.config, "mask_token_id", None)
        if token not in (None, processor.mask_token_id):
            raise ConfigError(f"adapter.mask_token_id is {token}; the tokenizer's is {processor.mask_token_id}.")
        if data.vocabulary is not None and not self.known(processor):
            raise DataError(
                f"No word of {data.vocabulary} is one token of this base, so that hit@1 has nothing to rank."
            )
        return [
            encoded
            for row in rows
            for encoded in encode_fact(row, processor, data.max_length, adapter.reads, adapter.row_signal)
        ]

    def known(self, processor: Any) -> list[int]:
        """The tokens of the vocabulary."""
        return [i for word in self.vocabulary() if (i := answer_id(processor, word)) is not None]

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        return Collator(int(processor.pad_token_id or 0))

    def objective(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Cross-entropy at the mask tokens."""
        labels = batch["labels"]
        given = {key: value for key, value in batch.items() if key != "labels"}
        if model.training and not self.config.data.base_dropout:  # type: ignore[attr-defined]
            model.eval()
            for adapter in adapters(model).values():
                adapter.train()
        return nn.functional.cross_entropy(answer_logits(model, given, labels >= 0), labels[labels >= 0])

    def measure(self, model: nn.Module, rows: list[dict[str, Any]], processor: Any) -> dict[str, float]:
        """What :func:`evaluate` says."""
        return evaluate(
            model, rows, self.collator(processor), self.known(processor), batch=self.config.training.batch_size
        )


# ---------------------------------------------------------------------- files


def read_templates(path: str | Path) -> dict[str, list[str]]:
    """The wordings of each relation. Raises :class:`DataError` when one has not one ``[X]`` and one ``[Y]``."""
    found: dict[str, list[str]] = defaultdict(list)
    expected = f'expected {{"relation": "P36", "template": "The capital of {SUBJECT} is {ANSWER}."}}'
    if Path(path).suffix == ".json":
        try:
            lists = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as JSON: {error}") from None
        if not isinstance(lists, dict) or not all(isinstance(each, list) for each in lists.values()):
            raise DataError(
                f'{path}: expected an object of lists, {{"P36": ["The capital of {SUBJECT} is {ANSWER}."]}}.'
            )
        lines = [(f"{path}, {name}", {"relation": name, "template": each}) for name in lists for each in lists[name]]
    else:
        lines = list(read_objects(Path(path)))
    for where, line in lines:
        relation, wording = (line.get(key) if isinstance(line, dict) else None for key in ("relation", "template"))
        if not isinstance(relation, str) or not isinstance(wording, str):
            raise DataError(f"{where}: {expected}.")
        if wording.count(SUBJECT) != 1 or wording.count(ANSWER) != 1:
            raise DataError(f"{where}: {wording!r}; expected one {SUBJECT} and one {ANSWER}.")
        found[relation].append(wording)
    return dict(found)


def check(where: str, value: Any, fields: Mapping[str, str], wordings: Mapping[str, list[str]]) -> Row:
    """A fact with its wordings. Raises :class:`DataError` when it is none, or its relation has no wording."""
    named = renamed(where, value, fields, EXPECTED)
    for name in ROLES:
        if not isinstance(named.get(name), str) or not named[name].strip():
            raise DataError(f"{where}: {name!r} is {named.get(name)!r}; {EXPECTED}.")
    relation = named["relation"]
    if relation not in wordings:
        raise DataError(f"{where}: no template is of the relation {relation!r}. {near(relation, wordings)}")
    return Row(where, {**{name: named[name].strip() for name in ROLES}, "wordings": wordings[relation]})


# ---------------------------------------------------------------------- tokens


def ask(tokenizer: Any, wording: str, subject: str) -> dict[str, list[int]]:
    """A query: ``input_ids`` with one mask token, and ``subject_mask``, 1 at the tokens that hold a part of the subject.

    Args:
        tokenizer: a fast one, which tells where in a text a token stands.
        wording: with ``[X]`` and ``[Y]``.
        subject: stands for ``[X]``; the mask token stands for ``[Y]``.
    """
    before, after = (part.replace(ANSWER, tokenizer.mask_token) for part in (" " + wording).split(SUBJECT))
    start, end = len(before), len(before) + len(subject)
    given = tokenizer(before + subject + after, return_offsets_mapping=True)
    spans = given["offset_mapping"]
    return {"input_ids": given["input_ids"], "subject_mask": [int(a < end and b > start) for a, b in spans]}


def answer_id(tokenizer: Any, word: str) -> int | None:
    """The one token of a word inside a sentence; None where it has several, or is not known."""
    ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def encode_fact(
    row: Row, tokenizer: Any, max_length: int, reads: Sequence[str], signal: Callable[[str, Any], Any]
) -> list[dict[str, Any]]:
    """One query for each wording of a fact: ids, labels, the signals an adapter reads, and which fact it is.

    Raises:
        DataError: the answer is not one token, the query is too long, or the adapter does not know the relation.
    """
    subject, word, relation = (row.values[name] for name in ROLES)
    answer = answer_id(tokenizer, word)
    if answer is None:
        raise DataError(
            f"{row.where}: the object {word!r} is not one token of this base; only such answers are learnt."
        )
    carried: dict[str, Any] = {}
    if "relation" in reads:
        try:
            carried["relation"] = torch.as_tensor(signal("relation", relation))
        except SignalError as error:
            raise DataError(f"{row.where}: {error}") from None
    encoded = []
    for wording in row.values["wordings"]:
        query = ask(tokenizer, wording, subject)
        ids, where = query["input_ids"], query["input_ids"].count(tokenizer.mask_token_id)
        if len(ids) > max_length or where != 1:
            raise DataError(
                f"{row.where}, {wording!r}: {len(ids)} tokens with {where} mask tokens; expected at most {max_length} with one."
            )
        labels = [answer if i == tokenizer.mask_token_id else IGNORED for i in ids]
        mask = {"subject_mask": query["subject_mask"]} if "subject_mask" in reads else {}
        encoded.append({"input_ids": ids, "labels": labels, "fact": row.where, **mask, **carried})
    return encoded


class Collator:
    """Queries to a batch, padded on the right to the longest: everything (batch, tokens), ``relation`` (batch,)."""

    def __init__(self, pad_token_id: int) -> None:
        self.padding = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORED, "subject_mask": 0}

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        length = max(len(row["input_ids"]) for row in rows)
        batch = {
            key: torch.tensor([[*row[key], *[filling] * (length - len(row[key]))] for row in rows])
            for key, filling in self.padding.items()
            if key in rows[0]
        }
        return batch | ({"relation": torch.stack([row["relation"] for row in rows])} if "relation" in rows[0] else {})


# ---------------------------------------------------------------------- answers


def answer_logits(model: nn.Module, given: Mapping[str, Tensor], asked: Tensor) -> Tensor:
    """Logits at the tokens where ``asked`` is true, (batch, tokens): (questions, vocabulary). The last projection, onto the
    whole vocabulary, is computed for these alone.
    """
    head = Host.of(model).head
    if head is None:
        return model(**given).logits[asked]
    handle = head.register_forward_pre_hook(lambda module, args: (args[0][asked], *args[1:]))
    try:
        return model(**given).logits
    finally:
        handle.remove()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    collate: Callable[[list[Any]], dict[str, Tensor]],
    vocabulary: Sequence[int],
    *,
    batch: int = 64,
) -> dict[str, float]:
    """How well, and how consistently, a model answers queries.

    Args:
        model: a masked language model, with or without an adapter.
        rows: of :func:`encode_fact`; signals that no attached adapter reads are passed over.
        collate: makes a batch of them.
        vocabulary: tokens among which hit@1 seeks the answer; duplicates do not matter.
        batch: queries at once.

    Returns:
        Means over queries: ``hit@1``, whether the answer is the likeliest token of the vocabulary; ``p@1`` and ``p@10``,
        whether it is the likeliest, or among the ten likeliest, of all tokens; ``mrr``, 1 over its rank among all. And over
        facts that are asked in at least two wordings, ``consistency``: the share of pairs of wordings whose likeliest tokens
        of the vocabulary agree, right or wrong.
    """
    device = next(model.parameters()).device
    allowed = torch.tensor(sorted(set(vocabulary)), device=device)
    read = {name for adapter in adapters(model).values() for name in adapter.reads}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    answers, ranks, best = [0] * len(rows), [0] * len(rows), [0] * len(rows)
    for start in range(0, len(rows), batch):
        chosen = order[start : start + batch]
        given = {key: value.to(device) for key, value in collate([rows[i] for i in chosen]).items()}
        labels, inputs = given["labels"], {key: given[key] for key in ("input_ids", "attention_mask")}
        with signals(model, **{name: given[name] for name in read & given.keys()}):
            logits = answer_logits(model, inputs, labels >= 0)
        right = labels[labels >= 0]
        rank = (logits > logits.gather(1, right[:, None])).sum(1)
        first = allowed[logits[:, allowed].argmax(1)]
        for i, *values in zip(chosen, right.tolist(), rank.tolist(), first.tolist()):
            answers[i], ranks[i], best[i] = values
    count, agreed = len(rows), consistency([row["fact"] for row in rows], best)
    return {
        "hit@1": sum(a == b for a, b in zip(answers, best)) / count,
        "p@1": sum(r == 0 for r in ranks) / count,
        "p@10": sum(r < 10 for r in ranks) / count,
        "mrr": sum(1 / (r + 1) for r in ranks) / count,
        **({} if agreed is None else {"consistency": agreed}),
    }


def consistency(facts: Sequence[Any], answers: Sequence[Any]) -> float | None:
    """The share of pairs of wordings of one fact with the same answer, the mean over facts; None without such pairs."""
    given: dict[Any, Counter[Any]] = defaultdict(Counter)
    for fact, answer in zip(facts, answers, strict=True):
        given[fact][answer] += 1
    shares = [
        sum(n * (n - 1) for n in counts.values()) / (counts.total() * (counts.total() - 1))
        for counts in given.values()
        if counts.total() > 1
    ]
    return sum(shares) / len(shares) if shares else None
