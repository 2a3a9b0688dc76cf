"""The errors users meet. Each says what was wrong, what was expected and what to do; each is raised before anything changed."""

from __future__ import annotations

import difflib
from bisect import bisect
from collections.abc import Iterable

MANY = 200  # names among which a near one is looked for


class AnyAdapterError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(AnyAdapterError, ValueError):
    """A configuration holds an unknown field or an impossible value."""


class TargetError(AnyAdapterError, ValueError):
    """A role, pattern or path selects nothing in this host, or something the method cannot wrap."""


class AttachError(AnyAdapterError, RuntimeError):
    """An adapter cannot be attached, detached, merged or unmerged now."""


class SignalError(AnyAdapterError, LookupError):
    """A signal is unknown, missing or of the wrong batch size."""


class ArtefactError(AnyAdapterError, ValueError):
    """A file or folder cannot be trusted, read or written."""


class DivergedError(ArtefactError):
    """Numbers are not finite, or all the same where they must differ: training diverged, or a file is damaged."""


class BaseMismatchError(ArtefactError):
    """The adapter was trained on another base model."""


class DataError(AnyAdapterError, ValueError):
    """A data file has a missing field, an empty row or an unreadable line."""


class RequestError(AnyAdapterError, ValueError):
    """A request to the engine is malformed or larger than the engine can ever hold.

    Attributes:
        param: the field at fault, in the request's own words, or None.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownAdapterError(AnyAdapterError, LookupError):
    """No adapter of that name is registered."""


class BusyError(AnyAdapterError, RuntimeError):
    """As many requests wait as may wait.

    Attributes:
        retry_after: seconds after which to try again.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def near(name: str, known: Iterable[str], *, limit: int = 5) -> str:
    """A sentence that names what is close to ``name``, or all that exists when nothing is."""
    known = sorted(set(known))
    if not known:
        return "There are none."
    if len(known) > MANY:  # likeness is slow to compute, and a typing error is mostly behind the first letters
        at = bisect(known, name)
        known = known[max(at - MANY // 2, 0) : at + MANY // 2]
    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.5)
    close += [k for k in known if name and k not in close and (name in k or k in name)][: limit - len(close)]
    if close:
        return f"Did you mean {', '.join(map(repr, close))}?"
    shown = ", ".join(map(repr, known[:20]))
    return f"There are: {shown}{', …' if len(known) > 20 else ''}."
