"""Signals: the values that travel with one call of the model to every site.

A task id, the image tokens of a picture, a mask over the subject's words: things an adapter needs that are not
arguments of the module it wraps. They are set for a block of code and read where they are needed::

    with anyadapter.signals(unet, image_tokens=tokens):
        pipe("a cat", ...)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from anyadapter.core.errors import SignalError, near


class Signals:
    """The signals of one host, shared by all adapters attached to it.

    Not thread-safe: one model runs one call at a time.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def read(self, name: str, reader: str) -> Any:
        """The value of ``name``; ``reader`` is the adapter that asks, for the message.

        Raises:
            SignalError: nobody set it for this call.
        """
        if name not in self.values:
            raise SignalError(
                f"{reader} needs the signal {name!r}, which is not set for this call. Wrap the call (and, with gradient "
                f"checkpointing, the backward pass) in `with anyadapter.signals(model, {name}=...):`."
            )
        return self.values[name]

    @contextmanager
    def set(self, readable: dict[str, list[str]], values: dict[str, Any]) -> Iterator[None]:
        """Overlay ``values`` inside the block; ``readable`` maps each signal to the adapters that read it.

        Raises:
            SignalError: no attached adapter reads one of the names.
        """
        for name in values:
            if name not in readable:
                raise SignalError(f"No attached adapter reads the signal {name!r}. {near(name, readable)}")
        before = dict(self.values)
        self.values.update(values)
        try:
            yield
        finally:
            # The same dict object, so that a compiled model sees the change without a new guard on identity.
            self.values.clear()
            self.values.update(before)
