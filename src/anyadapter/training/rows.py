"""Rows of a user's own data files. Everything that could be wrong with one is said before training starts.

A file is ``.jsonl`` (one JSON object a line) or ``.json`` (a list of objects); what an object must hold is its task's to say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anyadapter.core.errors import DataError, near

SHOWN = 5  # bad rows named in one message


@dataclass(frozen=True)
class Row:
    """One row: where it stands in its file, and its fields under our names."""

    where: str
    values: Mapping[str, Any]


def read_checked(path: str | Path, check: Callable[[str, Any], Row], expected: str) -> list[Row]:
    """All rows of a file, each checked; what is wrong with the first few is told at once.

    Args:
        path: a ``.jsonl`` or ``.json`` file.
        check: makes a row of (``file:line``, value), or raises :class:`DataError`.
        expected: what a row is, in words, for a file without any.

    Raises:
        DataError: the file or a row cannot be used; the message names the file, the line and what was expected.
    """
    rows, problems = [], []
    for where, value in read_objects(Path(path)):
        try:
            rows.append(check(where, value))
        except DataError as error:
            problems.append(str(error))
    if problems:
        more = f"\n… and {len(problems) - SHOWN} more rows of {path}" if len(problems) > SHOWN else ""
        raise DataError("\n".join(problems[:SHOWN]) + more)
    if not rows:
        raise DataError(f"{path} holds no rows; expected at least one: {expected}.")
    return rows


def renamed(
    where: str, value: Any, fields: Mapping[str, str], expected: str, optional: Sequence[str] = ()
) -> dict[str, Any]:
    """A JSON object with its columns under our names too.

    Args:
        where: ``file:line``.
        value: what stands there.
        fields: our name -> the column's, where they differ.
        expected: what a row is, in words.
        optional: our names whose columns may be missing.

    Raises:
        DataError: it is no object, or a column that ``fields`` names is missing.
    """
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON {type(value).__name__}, not an object; {expected}.")
    for name, column in fields.items():
        if column not in value and name not in optional:
            raise DataError(
                f"{where}: no column {column!r}, which fields maps to {name!r}. {near(column, map(str, value))}"
            )
    return {**value, **{name: value[column] for name, column in fields.items() if column in value}}


def read_objects(path: Path) -> Iterator[tuple[str, Any]]:
    """(``file:line``, value) of every JSON value in a file."""
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"{path}: expected a .jsonl file (one JSON object a line) or a .json file (a list of objects).")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text ({error.reason}); save the file as UTF-8.") from None
    yield from _lines(path, text) if path.suffix == ".jsonl" else _items(path, text)


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON ({error}); expected one JSON object a line.") from None


def _items(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The items of a list, one by one, so that each is known by its line."""
    decoder, space = json.JSONDecoder(), " \t\r\n"
    position, line, counted = len(text) - len(text.lstrip()), 1, 0
    if text[position : position + 1] != "[":
        raise DataError(f"{path}:1: expected a JSON list of objects; for one object a line, name the file .jsonl.")
    closing = True  # an empty list may close at once
    while True:
        position += 1
        while text[position : position + 1] in space and position < len(text):
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        if closing and text[position : position + 1] == "]":
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except ValueError as error:
            at = getattr(error, "lineno", line)
            raise DataError(f"{path}:{at}: not JSON ({error}); the item starts at line {line}.") from None
        yield f"{path}:{line}", value
        while text[position : position + 1] in space and position < len(text):
            position += 1
        if text[position : position + 1] == "]":
            return
        if text[position : position + 1] != ",":
            raise DataError(f"{path}:{line}: this item is not followed by ',' or ']'; the file may be cut short.")
        closing = False


def split(rows: Sequence[Row], held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(training rows, ``held_out`` evaluation rows), drawn at random, both in the order of the file."""
    if not 0 < held_out < len(rows):
        raise DataError(f"{held_out} of {len(rows)} rows cannot be held out; expected 1 to {len(rows) - 1}.")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(order[:held_out])
    return [r for i, r in enumerate(rows) if i not in chosen], [r for i, r in enumerate(rows) if i in chosen]
