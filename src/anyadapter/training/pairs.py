"""Pairs of texts that mean the same thing, and how a knowledge graph gives them: what MLKG's adapters learn from.

A file of training data holds

- facts, ``{"head", "relation", "tail"}``, also as lines of head, relation and tail in a ``.tsv`` file; their names stand in
  another file (``data.names``) of ``{"id", "labels": {language: name}, "descriptions": {language: sentence}}``, or, without
  one, are what the facts say. A fact may have a ``"sentence"`` that states it and in which a name of the tail stands;
- or pairs as they are, ``{"query", "positive", "role"}``, for adapters of other knowledge.

A fact gives pairs for each adapter. ``ep``: two names of the head, and of the tail, in different languages. ``tp``: head and
relation, and the tail, in languages drawn for each. ``es``: a description of the head, and of the tail, and its name. ``ts``:
the sentence without the tail, and the tail's name. An entity with one name gives none for ``ep``, one without descriptions none
for ``es``, a fact without a sentence none for ``ts``.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import AutoModel

from anyadapter.core.adapter import Adapter
from anyadapter.core.errors import ConfigError, DataError, near
from anyadapter.core.host import Host
from anyadapter.methods.language.mlkg import FUSION, MLKG, ROLES, info_nce, pool
from anyadapter.training.base import load_base
from anyadapter.training.ranking import find
from anyadapter.training.rows import Row, read_checked, renamed
from anyadapter.training.tasks import DataSettings, Task

FACT, PAIR = ("head", "relation", "tail"), ("query", "positive", "role")
EXPECTED = (
    'a row is {"head", "relation", "tail"} with an optional "sentence", or {"query", "positive", "role"}; name other columns by '
    "fields"
)
NAMED = 'a row is {"id", "labels": {language: name}} with optional "descriptions": {language: sentence}'


@dataclass(frozen=True, kw_only=True)
class PairSettings(DataSettings):
    """What to learn from, as pairs of texts.

    Attributes:
        names: a file of names and descriptions by language; by default the facts hold the names themselves.
        languages: use names and descriptions in these languages only; by default in all.
        roles: the kinds of pairs to make of facts; by default all that the adapter has, of ep, tp, es and ts.
        draws: how many pairs are drawn for each entity or fact.
        temperature: of the loss.
        official: pool over padding, as MLKG's authors do.
        max_length: tokens of a text, at most.
    """

    task: str = "pairs"
    names: str | None = None
    languages: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    draws: int = 1
    temperature: float = 0.1
    official: bool = False
    max_length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("roles", set(self.roles) <= set(ROLES), f"of {', '.join(ROLES)}")
        self.require("draws", self.draws >= 1, "at least 1")
        self.require("temperature", self.temperature > 0, "above 0")


@dataclass(frozen=True)
class Entity:
    """What an entity or relation is called, and how it is described, by language."""

    labels: dict[str, str]
    descriptions: dict[str, str]

    def within(self, languages: Sequence[str]) -> Entity:
        """What of it is in these languages; with none given, all."""
        parts = (self.labels, self.descriptions)
        return Entity(*({k: v for k, v in part.items() if not languages or k in languages} for part in parts))


@dataclass(frozen=True)
class Pair:
    """Two texts that mean the same thing, and which adapter learns it."""

    query: str
    positive: str
    role: str


# ---------------------------------------------------------------------- knowledge graphs


def read_facts(path: str | Path, fields: dict[str, str] | None = None) -> list[Row]:
    """Facts or pairs from a ``.jsonl``, ``.json`` or ``.tsv`` file. Raises :class:`DataError` naming file and line."""
    if Path(path).suffix == ".tsv":
        return read_tsv(Path(path))
    return read_checked(path, partial(check, fields=fields or {}), EXPECTED)


def read_tsv(path: Path) -> list[Row]:
    """Facts from lines of head, relation and tail; a first line of just these words is passed over."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        parts = tuple(part.strip() for part in line.rstrip("\r").split("\t"))
        if not line.strip() or (number == 1 and parts == FACT):
            continue
        if len(parts) != len(FACT) or not all(parts):
            raise DataError(
                f"{path}:{number}: {len(parts)} columns; expected head, relation and tail, with tabs between."
            )
        rows.append(Row(f"{path}:{number}", dict(zip(FACT, parts))))
    if not rows:
        raise DataError(f"{path} holds no rows; expected lines of head, relation and tail.")
    return rows


def check(where: str, value: Any, fields: dict[str, str]) -> Row:
    """A fact or a pair under our names. Raises :class:`DataError` when it is neither."""
    named = renamed(where, value, fields, EXPECTED)
    kind = next((kind for kind in (FACT, PAIR) if all(name in named for name in kind)), None)
    if kind is None:
        raise DataError(f"{where}: has the columns {', '.join(map(repr, value)) or 'none'}; {EXPECTED}.")
    for name in (*kind, *(("sentence",) if "sentence" in named else ())):
        if not isinstance(named[name], str) or not named[name].strip():
            raise DataError(f"{where}: {name!r} is {named[name]!r}; expected text.")
    return Row(where, named)


def read_names(path: str | Path) -> dict[str, Entity]:
    """Names and descriptions by id. Raises :class:`DataError` naming file and line."""
    found: dict[str, Entity] = {}

    def one(where: str, value: Any) -> Row:
        value = renamed(where, value, {}, NAMED)
        parts = [value.get("labels"), value.get("descriptions", {})]
        texts = all(
            isinstance(part, dict) and all(isinstance(t, str) and t.strip() for t in part.values()) for part in parts
        )
        if not isinstance(value.get("id"), str) or not texts or not parts[0]:
            raise DataError(
                f"{where}: {NAMED}; this one has {', '.join(map(repr, value))}, or an empty or missing text."
            )
        if value["id"] in found:
            raise DataError(f"{where}: the id {value['id']!r} stands in the file twice.")
        found[value["id"]] = Entity(*parts)
        return Row(where, value)

    read_checked(path, one, NAMED)
    return found


class Graph:
    """The facts of rows with the names of what they speak of, and the pairs these give.

    Args:
        rows: facts.
        names: by id; by default each id is its own name.
        languages: those whose names and descriptions are used; by default all.

    Raises:
        DataError: a fact speaks of something that has no name in these languages.
    """

    def __init__(
        self, rows: Sequence[Row], names: dict[str, Entity] | None = None, languages: Sequence[str] = ()
    ) -> None:
        self.rows = list(rows)
        self.entities: dict[str, Entity] = {}  # heads and tails, in the order they come
        self.relations: dict[str, Entity] = {}
        for row in rows:
            for part, table in (("head", self.entities), ("relation", self.relations), ("tail", self.entities)):
                key = row.values[part]
                if names is not None and key not in names:
                    raise DataError(f"{row.where}: no name is given for the {part} {key!r}. {near(key, names)}")
                table[key] = Entity({"": key}, {}) if names is None else names[key].within(languages)
                if not table[key].labels:
                    raise DataError(f"{row.where}: the {part} {key!r} has no name in {', '.join(languages)}.")

    def pairs(self, role: str, draw: random.Random) -> Iterator[Pair]:
        """The pairs for one of the paper's four adapters: one for each entity or fact that can give one."""
        kinds = {"ep": self.entity_names, "tp": self.facts, "es": self.descriptions, "ts": self.sentences}
        yield from (Pair(query, positive, role) for query, positive in kinds[role](draw))

    def entity_names(self, draw: random.Random) -> Iterator[tuple[str, str]]:
        """Two names of an entity, in different languages."""
        for entity in self.entities.values():
            if len(entity.labels) > 1:
                yield tuple(draw.sample(list(entity.labels.values()), 2))  # type: ignore[misc]

    def facts(self, draw: random.Random) -> Iterator[tuple[str, str]]:
        """Subject and predicate, and the object, each in a language of its own."""
        for row in self.rows:
            tables = (self.entities, self.relations, self.entities)
            head, relation, tail = (any_of(table[row.values[part]].labels, draw) for part, table in zip(FACT, tables))
            yield f"{head} {relation}", tail

    def descriptions(self, draw: random.Random) -> Iterator[tuple[str, str]]:
        """A description of an entity, and its name in any language."""
        for entity in self.entities.values():
            if entity.descriptions:
                yield any_of(entity.descriptions, draw), any_of(entity.labels, draw)

    def sentences(self, draw: random.Random) -> Iterator[tuple[str, str]]:
        """A sentence that states a fact, without the object, and the object's name in any language."""
        for row in self.rows:
            if (sentence := row.values.get("sentence")) is None:
                continue
            labels = self.entities[row.values["tail"]].labels
            stated = max((label for label in labels.values() if label in sentence), key=len, default=None)
            if stated is None:
                raise DataError(
                    f"{row.where}: no name of the tail stands in the sentence; it has {', '.join(labels.values())}."
                )
            yield " ".join(sentence.replace(stated, " ", 1).split()), any_of(labels, draw)


def any_of(texts: dict[str, str], draw: random.Random) -> str:
    return draw.choice(list(texts.values()))


# ---------------------------------------------------------------------- in a run of `anyadapter train`


class Pairs(Task):
    """Pairs of texts, each near the other and far from the rest of its batch. A batch is of one adapter's pairs, and the
    adapters take turns: each step trains the one that its batch is of, or, in a stage that trains the fusion, all fused.
    """

    Settings: ClassVar[type[DataSettings]] = PairSettings
    names: dict[str, Entity] | None = None

    def read(self, path: str | Path) -> list[Row]:
        rows = read_facts(path, self.config.data.fields)
        data: Any = self.config.data
        if data.names and self.names is None:
            self.names = read_names(data.names)
        self.graph(rows)
        return rows

    def graph(self, rows: list[Row]) -> Graph:
        """The facts among rows."""
        data: Any = self.config.data
        return Graph([row for row in rows if "query" not in row.values], self.names, data.languages)

    def digest(self, path: str | Path) -> str:
        data: Any = self.config.data
        files = [path, *([data.names] if data.names else [])]
        return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()

    def load(self) -> tuple[nn.Module, Any]:
        base = self.config.base
        model, tokenizer = load_base(
            base.name, dtype=base.dtype, attn=base.attn, revision=base.revision, auto=AutoModel
        )
        if getattr(model, "pooler", None) is not None:
            # A mean needs none, and where the files have none it would be another random one each time.
            model.pooler = None  # type: ignore[assignment]
        return model, tokenizer

    def encode(self, rows: list[Row], processor: Any, adapter: Adapter) -> list[dict[str, Any]]:
        """Each pair as ``{"query", "positive", "role"}``."""
        data: Any = self.config.data
        has = tuple(adapter.config.roles) if isinstance(adapter, MLKG) else ()
        wanted = data.roles or tuple(role for role in ROLES if role in has or not has)
        pairs = [Pair(*(row.values[part] for part in PAIR)) for row in rows if "query" in row.values]
        graph, draw = self.graph(rows), random.Random(self.config.training.seed)
        pairs += [pair for _ in range(data.draws) for role in wanted for pair in graph.pairs(role, draw)]
        for role in {pair.role for pair in pairs}:
            if has and role not in has:
                raise DataError(f"There are pairs for {role!r}, which the adapter has not. {near(role, has)}")
        return [{"query": pair.query, "positive": pair.positive, "role": pair.role} for pair in pairs]

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return PairCollator(processor, self.config.data.max_length)

    def sampler(self, rows: list[dict[str, Any]], batch_size: int, seed: int, adapter: Adapter) -> Turns:
        """Batches of one role each, of those that the stage trains."""
        chosen = trained(adapter) or tuple(dict.fromkeys(row["role"] for row in rows))
        return Turns(
            {role: [i for i, row in enumerate(rows) if row["role"] == role] for role in chosen}, batch_size, seed
        )

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """InfoNCE of the pairs of each role among themselves, the mean over pairs."""
        data: Any = self.config.data
        adapter = next((a for a in Host.of(model).adapters.values() if isinstance(a, MLKG)), None)
        fused = adapter is not None and fuses(adapter)
        total: Any = 0.0
        for role in dict.fromkeys(batch["role"]):
            chosen = torch.tensor([other == role for other in batch["role"]], device=batch["input_ids"].device)
            if adapter is not None:
                adapter.act(*(adapter.config.roles if fused else (role,)))
            sides = []
            for side in ("", "positive_"):
                ids, mask = batch[f"{side}input_ids"][chosen], batch[f"{side}attention_mask"][chosen]
                hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
                sides.append(pool(hidden, mask, official=data.official))
            total = total + info_nce(*sides, temperature=data.temperature) * chosen.sum()
        return total / len(batch["role"])

    def measure(self, model: nn.Module, rows: list[dict[str, Any]], processor: Any) -> dict[str, float]:
        """hit@1, hit@10 and MRR of the pairs of each role, each query's positive among those of all."""
        data: Any = self.config.data
        found: dict[str, float] = {}
        for role in dict.fromkeys(row["role"] for row in rows):
            pairs = [(row["query"], row["positive"]) for row in rows if row["role"] == role]
            measured = find(model, processor, pairs, (1, 10), data.official, {"max_length": data.max_length})
            found |= {f"{role}_{name}": value for name, value in measured.items()}
        return found


def trained(adapter: Adapter) -> tuple[str, ...]:
    """The roles whose adapters a stage trains; none where it trains the fusion, or the adapter has no roles: all take part."""
    if not isinstance(adapter, MLKG) or fuses(adapter):
        return ()
    return tuple(role for role in adapter.config.roles if any(p.requires_grad for p in adapter.group(role)))


def fuses(adapter: MLKG) -> bool:
    """Whether the fusion is trained."""
    return FUSION in adapter.groups and any(p.requires_grad for p in adapter.group(FUSION))


class PairCollator:
    """Pairs to a batch: ``input_ids`` and ``attention_mask`` of the queries, the same of the positives, and ``role``."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.settings = {"padding": True, "truncation": True, "max_length": max_length, "return_tensors": "pt"}
        self.tokenizer = tokenizer

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        query, positive = (
            self.tokenizer([row[side] for row in rows], **self.settings) for side in ("query", "positive")
        )
        names = ("input_ids", "attention_mask")
        batch = {name: query[name] for name in names} | {f"positive_{name}": positive[name] for name in names}
        return {**batch, "role": [row["role"] for row in rows]}


class Turns(Sampler[int]):
    """Rows by whole batches of one role, the roles taking turns; where one has more batches, its turns come more often.

    What does not fill a batch is left out, and is another rest in each epoch.

    Args:
        rows: the numbers of the rows of each role.
        batch_size: rows of a batch.
        seed: of the order, which is another in each epoch.

    Raises:
        ConfigError: a role has not even one batch.
    """

    def __init__(self, rows: dict[str, list[int]], batch_size: int, seed: int) -> None:
        for role, own in rows.items():
            if len(own) < batch_size:
                raise ConfigError(
                    f"There are {len(own)} pairs for {role!r}, and a batch is of {batch_size} of one role. Lower batch_size, "
                    "give more data, or leave this adapter out of the stage's groups."
                )
        self.rows, self.size, self.seed, self.epoch = rows, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(len(own) // self.size * self.size for own in self.rows.values())

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed} {self.epoch}")
        turns = []
        for order, own in enumerate(self.rows.values()):
            shuffled, count = draw.sample(own, len(own)), len(own) // self.size
            turns += [((i + 0.5) / count, order, shuffled[i * self.size : (i + 1) * self.size]) for i in range(count)]
        for _, _, batch in sorted(turns):
            yield from batch
