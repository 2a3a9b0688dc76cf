"""Adapters made while serving: a GenerativeAdapter reads a context, and what it has read is served as a LoRA.

The generator is attached to the served model before the engine is, and is off in the engine's passes. It reads one window
between two steps, so that a long document holds nobody up; the LoRA is made and written in the thread that changes adapters.
What was read is kept beside the LoRA, so that the adapter can grow, also after the server was started again.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import uuid
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from anyadapter.core.attach import detach
from anyadapter.core.errors import ConfigError
from anyadapter.formats.generative import load_state, save_lora, save_state
from anyadapter.formats.native import load
from anyadapter.methods.language.generative import Generative
from anyadapter.parts.context import State
from anyadapter.serving.loop import EngineLoop
from anyadapter.serving.store import Registered

GENERATOR = "generator"  # the name it is attached under
STATE = "context.safetensors"  # in the adapter's folder


def attach_generator(model: nn.Module, folder: str | Path) -> Generative:
    """Attach a saved generator to a model that will be served.

    Raises:
        ConfigError: the folder holds an adapter of another method.
        AnyAdapterError: it cannot be loaded.
    """
    adapter = load(model, folder, GENERATOR)
    if not isinstance(adapter, Generative):
        detach(model, GENERATOR)
        raise ConfigError(f"{folder} holds a {type(adapter).__name__}; a server's generator is a GenerativeAdapter.")
    adapter.enabled = False
    return adapter


class Contexts:
    """Makes adapters of contexts, one at a time."""

    def __init__(self, loop: EngineLoop) -> None:
        self.loop = loop
        self.lock = asyncio.Lock()

    def generator(self) -> Generative | None:
        """The generator, where the server was started with one."""
        return self.loop.check().host.adapters.get(GENERATOR)  # type: ignore[return-value]

    async def make(self, name: str, ids: list[int], *, mode: str, window: int | None, grows: bool) -> Registered:
        """Read a context into a new adapter, or into one that was made so before, and serve it.

        Args:
            name: of the adapter, and of its folder.
            ids: the context.
            mode, window: as :meth:`Generative.read` has them.
            grows: extend what the adapter of that name has read; requests in hand keep what they began with.

        Raises:
            AnyAdapterError: what was read before is damaged, or the folder cannot be read or written; what was served before
                is served still.
        """
        engine, adapter = self.loop.check(), self.generator()
        assert adapter is not None
        assert engine.settings.adapters is not None
        folder = Path(engine.settings.adapters) / name
        async with self.lock:
            state = await self.aside(partial(load_state, folder / STATE, engine.model, GENERATOR)) if grows else None
            reading = adapter.reading(engine.model, ids, mode=mode, window=window, state=state)
            while (found := await self.loop.call(partial(self.look, reading))) is not None:
                state = found
            assert state is not None
            try:
                await self.aside(partial(self.write, state, folder, engine.store.by_name.get(name)))
                return await self.loop.register(name, name)
            except BaseException:
                if not grows:  # so that the name is free to be tried again
                    await self.aside(partial(shutil.rmtree, folder, ignore_errors=True))
                raise

    def look(self, reading: Any) -> State | None:
        """Read the next window; None after the last."""
        adapter = self.generator()
        assert adapter is not None
        adapter.enabled = True
        try:
            return next(reading, None)
        finally:
            adapter.enabled = False

    def write(self, state: State, folder: Path, old: Registered | None) -> None:
        """The LoRA and the state. Requests in hand no longer find the old LoRA in its file: its cells are kept for them."""
        store = self.loop.check().store
        if old is not None and old.kept is None:
            old.kept = store.pack(old)
        save_lora(self.loop.check().model, state, folder, GENERATOR)
        scratch = folder / f".{uuid.uuid4().hex}"
        try:
            save_state(state, scratch)
            os.replace(scratch, folder / STATE)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise ConfigError(f"Could not write {folder / STATE}: {error}.") from error

    async def aside(self, function: Any) -> Any:
        """Run in the thread that changes adapters."""
        return await self.loop.aio.run_in_executor(self.loop.admin, function)
