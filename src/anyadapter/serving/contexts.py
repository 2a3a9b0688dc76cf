"""Adapters made while serving: a GenerativeAdapter reads a context, and what it has read is served as a LoRA.

The generator is attached to the served model before the engine is, and is off in the engine's passes. It reads one window
between two steps, so that a long document holds nobody up; the LoRA is made and written in the thread that changes adapters.
What was read is kept beside the LoRA, so that the adapter can grow, also after the server was started again. Both lie in a
folder of the adapter's name, where they are put together, when all is written and checked.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import uuid
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from anyadapter.core.attach import detach
from anyadapter.core.errors import ArtefactError, ConfigError
from anyadapter.formats.files import CONFIG, TENSORS
from anyadapter.formats.generative import load_state, save_lora, save_state
from anyadapter.formats.native import load
from anyadapter.methods.language.generative import Generative
from anyadapter.parts.context import State
from anyadapter.serving.loop import EngineLoop
from anyadapter.serving.protocol import ApiError
from anyadapter.serving.store import Registered

GENERATOR = "generator"  # the name it is attached under
STATE = "context.safetensors"  # in the adapter's folder
GRAIN = 32  # windows are filled up to multiples of so many tokens: oneDNN keeps kernels for each length it has met


def attach_generator(model: nn.Module, folder: str | Path, max_context: int | None = None) -> Generative:
    """Attach a saved generator to a model that will be served.

    Args:
        max_context: most tokens the engine will take, where that is less than the model can.

    Raises:
        ConfigError: the folder holds an adapter of another method, or its windows are longer than what may be read.
        AnyAdapterError: it cannot be loaded.
    """
    adapter = load(model, folder, GENERATOR)
    config: Any = model.config
    limits = max_context, getattr(config.get_text_config(), "max_position_embeddings", None)
    most = min(filter(None, limits), default=None)
    if not isinstance(adapter, Generative):
        problem = f"{folder} holds a {type(adapter).__name__}; a server's generator is a GenerativeAdapter."
    elif most is not None and adapter.config.window > most:
        problem = (
            f"The generator in {folder} reads {adapter.config.window} tokens at a time; here {most} are allowed. Raise "
            "--max-context if the model can do more, or train one with a smaller window."
        )
    else:
        adapter.enabled = False
        return adapter
    detach(model, GENERATOR)
    raise ConfigError(problem)


class Contexts:
    """Makes adapters of contexts, one at a time.

    Attributes:
        changing: held while an adapter's files are put in place; whoever registers a folder holds it too, so that what was
            examined is what is entered.
    """

    def __init__(self, loop: EngineLoop) -> None:
        self.loop = loop
        self.lock = asyncio.Lock()
        self.changing = asyncio.Lock()

    def generator(self) -> Generative | None:
        """The generator, where the server was started with one."""
        return self.loop.check().host.adapters.get(GENERATOR)  # type: ignore[return-value]

    def folder(self, name: str) -> Path:
        """Where the adapter of a name lies."""
        root = self.loop.check().store.root
        assert root is not None
        return root / name

    def growing(self, name: str) -> Registered:
        """The adapter of a name, if it can grow.

        Raises:
            UnknownAdapterError: there is none.
            ApiError: it was not made of a context, or its folder has another name: what it learns would be another's.
        """
        found = self.loop.check().store.get(name)
        if not (found.folder / STATE).exists():
            raise ApiError(409, f"{name!r} was not made of a context; it cannot grow.")
        if found.folder != self.folder(name):
            message = (
                f"{name!r} is served from the folder {found.folder.name!r}; it grows only in a folder of its own name."
            )
            raise ApiError(409, message)
        return found

    async def make(self, name: str, ids: list[int], *, mode: str, window: int | None, grows: bool) -> Registered:
        """Read a context into a new adapter, or into one that was made so before, and serve it.

        Args:
            name: of the adapter, and of its folder.
            ids: the context.
            mode, window: as :meth:`Generative.read` has them.
            grows: extend what the adapter of that name has read; requests in hand keep what they began with.

        Raises:
            UnknownAdapterError, ApiError: as :meth:`growing` and :meth:`enter`.
            AnyAdapterError: what was read before is damaged, or the folder cannot be read or written. Whatever is raised,
                files and adapters are as they were.
        """
        engine, adapter = self.loop.check(), self.generator()
        assert adapter is not None
        async with self.lock:
            old = self.growing(name) if grows else None
            state = await self.aside(partial(load_state, old.folder / STATE, engine.model, GENERATOR)) if old else None
            reading = adapter.reading(engine.model, ids, mode=mode, window=window, state=state, multiple=GRAIN)
            while (found := await self.loop.call(partial(self.look, reading))) is not None:
                state = found
            assert state is not None
            scratch = self.folder(f".{uuid.uuid4().hex}")
            try:
                made = await self.aside(partial(self.write, name, state, scratch))
                async with self.changing:
                    return await self.loop.call(partial(self.enter, made, old))
            finally:
                await self.aside(partial(shutil.rmtree, scratch, ignore_errors=True))

    def look(self, reading: Any) -> State | None:
        """Read the next window; None after the last."""
        adapter = self.generator()
        assert adapter is not None
        adapter.enabled = True
        try:
            return next(reading, None)
        finally:
            adapter.enabled = False

    def write(self, name: str, state: State, scratch: Path) -> Registered:
        """The adapter and its state in a folder of their own, checked as any that is registered."""
        engine = self.loop.check()
        try:
            scratch.mkdir()
            save_state(state, scratch / STATE)
            with open(scratch / STATE, "rb+") as file:
                os.fsync(file.fileno())
        except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in an error of its own
            raise ArtefactError(f"Could not write what {name!r} has read: {error}. Nothing has changed.") from error
        save_lora(engine.model, state, scratch, GENERATOR)
        made = engine.store.examine(name, scratch, anywhere=True)  # the folder's name is none that a client could give
        engine.store.pack(made)
        return made

    def enter(self, made: Registered, old: Registered | None) -> Registered:
        """Put the files in place and serve them, in the engine's thread: nothing else can happen in between.

        Whoever is served from the old files no longer finds itself there: its cells are kept for it.

        Raises:
            ApiError: the adapter that was to grow is no longer there.
            ArtefactError: the files cannot be put in place, or the old ones be read.
        """
        engine, folder = self.loop.check(), self.folder(made.name)
        if engine.store.by_name.get(made.name) is not old:
            message = f"{made.name!r} was replaced or removed while the context was read; nothing of that is kept."
            raise ApiError(409, message)
        for other in {*engine.store.by_name.values(), *engine.held.values()}:
            if other.folder == folder and other.kept is None:
                other.kept = engine.packed(other)
        try:
            if old is None:
                os.rename(made.folder, folder)
            else:
                for file in (TENSORS, CONFIG, STATE):
                    os.replace(made.folder / file, folder / file)
        except OSError as error:
            raise ArtefactError(f"Could not write {folder}: {error}.") from error
        made.folder = folder
        engine.store.enter(made)
        return made

    async def aside(self, function: Any) -> Any:
        """Run in the thread that changes adapters."""
        return await self.loop.aio.run_in_executor(self.loop.admin, function)
