"""The thread that owns the engine, and how asyncio talks to it.

Whatever touches the engine is a command that the thread runs between two steps. Outputs go the other way in one call a
step; from there on they belong to asyncio, so that a slow reader never holds up the engine.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from anyadapter.core.errors import AnyAdapterError, RequestError
from anyadapter.serving.request import Output, Request
from anyadapter.serving.threads import helper

if TYPE_CHECKING:
    from anyadapter.serving.engine import Engine
    from anyadapter.serving.store import Registered

T = TypeVar("T")
logger = logging.getLogger(__name__)

CRASHES = 3  # steps in a row that may fail before the engine counts as broken
LONGEST_STEP = 10.0  # seconds to wait for the thread at the end; it may be loading a model
FRESH = 0.25  # seconds between two looks at the engine's numbers
CRASHED = "The server failed while it worked on this request; nothing of it is kept. Send it again."
LEAVING = "The server is shutting down; send the request again."


class NotReadyError(AnyAdapterError, RuntimeError):
    """The engine is not yet loaded, is broken, or takes no new requests because the server is shutting down."""


class Stream:
    """The outputs of one caller's requests, in order for each of them. What nobody has read yet is joined into one.

    Lives in asyncio. Iterating ends when all requests have.
    """

    def __init__(self, loop: EngineLoop, ids: Iterable[str]) -> None:
        self.loop = loop
        self.open = set(ids)
        self.unread: dict[str, Output] = {}
        self.news = asyncio.Event()

    def put(self, output: Output) -> None:
        before = self.unread.get(output.id)
        self.unread[output.id] = join(before, output) if before is not None else output
        if output.finish is not None:
            self.open.discard(output.id)
        self.news.set()

    def cancel(self) -> None:
        """Stop what has not ended; its cells are free before the next step."""
        for id in self.open:
            self.loop.cancel(id)
        self.open.clear()
        self.news.set()

    def __aiter__(self) -> AsyncIterator[Output]:
        return self

    async def __anext__(self) -> Output:
        while not self.unread:
            if not self.open:
                raise StopAsyncIteration
            self.news.clear()
            await self.news.wait()
        return self.unread.pop(next(iter(self.unread)))


class EngineLoop:
    """Steps an engine in a thread of its own while it has work.

    Args:
        engine: the engine, or what makes it: that is called in the thread, and until it is done the loop is not ready.
        on_failure: called in asyncio when there is no engine (any more); ``error`` says why.

    Attributes:
        error: why the engine could not be made, or what broke it.
        draining: no new requests are taken.
        stats: the engine's numbers, at most a quarter of a second or a step old.
    """

    def __init__(self, engine: Engine | Callable[[], Engine], *, on_failure: Callable[[], None] | None = None) -> None:
        self.make: Callable[[], Engine] = engine if callable(engine) else lambda: engine
        self.on_failure = on_failure
        self.engine: Engine | None = None
        self.error: BaseException | None = None
        self.draining = self.closing = False
        self.stats: dict[str, float] = {}
        self.looked = 0.0
        self.crashes = 0
        self.commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.streams: dict[str, Stream] = {}
        self.thread: threading.Thread | None = None
        self.admin = helper("admin")  # one change of the adapters at a time

    # ------------------------------------------------------------------ in asyncio

    def start(self) -> None:
        """Begin, from inside the event loop that the streams belong to."""
        self.aio = asyncio.get_running_loop()
        self.loaded = asyncio.Event()
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self.engine is not None and self.error is None and not self.draining

    def check(self) -> Engine:
        """The engine, if new requests are taken. Raises :class:`NotReadyError`."""
        if self.draining:
            raise NotReadyError("The server is shutting down and takes no new requests.")
        if self.error is not None:
            raise NotReadyError("The engine has failed; the server has to be started again.")
        if self.engine is None:
            raise NotReadyError("The model is being loaded.")
        return self.engine

    async def submit(self, *requests: Request) -> Stream:
        """Queue the requests of one caller, all of them or none.

        Raises:
            RequestError: there are more of them than may wait, or as the engine's ``submit``.
            UnknownAdapterError, BusyError: as the engine's ``submit``.
            NotReadyError: no new requests are taken.
        """
        engine = self.check()
        most = engine.settings.max_waiting
        if len(requests) > most:
            raise RequestError(f"n for each prompt makes {len(requests)} sequences; here {most} may wait.", "n")
        stream = Stream(self, (request.id for request in requests))
        self.streams |= dict.fromkeys(stream.open, stream)
        try:
            await self.call(partial(submit_all, engine, requests))
        except BaseException:
            stream.cancel()
            raise
        return stream

    def cancel(self, id: str) -> None:
        """End a request before the next step; nothing more comes out of it."""
        if self.streams.pop(id, None) is not None and self.engine is not None:
            self.commands.put(partial(self.engine.cancel, id))

    async def register(self, name: str, folder: str) -> Registered:
        """Make an adapter known, or replace it; it is checked while the engine works on.

        Raises:
            AnyAdapterError: what the store raises; nothing has changed.
        """
        store = self.check().store

        def examine() -> Registered:
            found = store.examine(name, folder)
            store.pack(found)
            return found

        found = await self.aio.run_in_executor(self.admin, examine)
        await self.call(partial(store.enter, found))
        return found

    async def unload(self, name: str) -> Registered:
        """Forget an adapter; requests in hand keep it. Raises :class:`UnknownAdapterError`."""
        return await self.call(partial(self.check().store.unload, name))

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function in the engine's thread, between two steps."""
        if self.thread is None or not self.thread.is_alive():
            raise NotReadyError("The engine has stopped.")
        future: asyncio.Future[T] = self.aio.create_future()

        def command() -> None:
            try:
                result = function()
            except Exception as error:
                self.tell(settle, future, None, error)
            else:
                self.tell(settle, future, result, None)

        self.commands.put(command)
        return await future

    async def drain(self, seconds: float) -> None:
        """Take no new requests, let those in hand finish, and end after ``seconds`` those that have not."""
        self.draining = True
        end = time.monotonic() + seconds
        while self.streams and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for id in list(self.streams):
            stream = self.streams[id]
            self.cancel(id)
            stream.put(Output(id, finish="abort", message=LEAVING))

    async def close(self) -> None:
        """Stop the thread and take the engine off the model."""
        await self.drain(0)
        self.closing = True
        self.commands.put(lambda: None)
        if self.thread is not None:
            await self.aio.run_in_executor(None, self.thread.join, LONGEST_STEP)
        self.admin.shutdown(wait=False, cancel_futures=True)

    def deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            stream = self.streams.get(output.id)
            if stream is not None:
                if output.finish is not None:
                    del self.streams[output.id]
                stream.put(output)

    def failed(self) -> None:
        """There is no engine (any more)."""
        self.deliver([Output(id, finish="error", message=CRASHED) for id in self.streams])
        if self.on_failure is not None:
            self.on_failure()

    # ------------------------------------------------------------------ in the engine's thread

    def run(self) -> None:
        try:
            engine = self.engine = self.make()
            self.stats = engine.stats()
            self.tell(self.loaded.set)
        except BaseException as error:
            self.error = error
            self.tell(self.loaded.set)
            self.tell(self.failed)
            return
        while not self.closing:
            self.obey(wait=self.error is not None or not engine.has_work)
            if self.error is None and engine.has_work:
                self.step(engine)
            self.look(engine)
        engine.close()
        self.obey(wait=False)

    def obey(self, *, wait: bool) -> None:
        """Run the commands that have come; wait for one when there is nothing else to do."""
        try:
            while True:
                command = self.commands.get(block=wait)
                wait = False
                try:
                    command()
                except Exception as error:  # of a command that nobody waits for
                    logger.error("a command failed: %s", trace(error))
        except Empty:
            pass

    def step(self, engine: Engine) -> None:
        try:
            outputs = engine.step()
            self.crashes = 0
        except Exception as error:
            logger.error("a step failed: %s", trace(error))
            outputs = self.recover(engine, error)
        if outputs:
            self.tell(self.deliver, outputs)
        if self.error is not None:
            self.tell(self.failed)

    def recover(self, engine: Engine, error: Exception) -> list[Output]:
        """End all requests but those that wait. Where that fails, or is needed too often, the engine is broken."""
        self.crashes += 1
        outputs = engine.take()
        try:
            hit = [id for id in engine.requests if id not in engine.scheduler.queue]
            for id in hit:
                engine.cancel(id)
            outputs += [Output(id, finish="error", message=CRASHED) for id in hit]
            engine.check_integrity()
            if self.crashes < CRASHES:
                return outputs
        except Exception as worse:
            logger.error("the engine cannot be mended: %s", trace(worse))
        self.error = error
        return outputs

    def look(self, engine: Engine) -> None:
        """Keep the engine's numbers for others to read."""
        now = time.monotonic()
        if now - self.looked > FRESH or not engine.has_work:
            self.stats, self.looked = engine.stats(), now

    def tell(self, function: Callable[..., Any], *what: Any) -> None:
        try:
            self.aio.call_soon_threadsafe(function, *what)
        except RuntimeError:  # asyncio is gone, and nobody listens
            logger.debug("nobody to tell")


def trace(error: BaseException) -> str:
    """An error's kind and where it came from. Its message may quote what a user sent, and is left out."""
    frames = traceback.extract_tb(error.__traceback__)
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
    return f"{type(error).__name__} at {places}"


def submit_all(engine: Engine, requests: Iterable[Request]) -> None:
    """Submit all requests or, when one is refused, none."""
    done: list[str] = []
    try:
        for request in requests:
            engine.submit(request)
            done.append(request.id)
    except AnyAdapterError:
        for id in done:
            engine.cancel(id)
        raise


def settle(future: asyncio.Future, result: Any, error: Exception | None) -> None:
    """Give a waiting caller the result, if there still is one."""
    if future.cancelled():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


def join(first: Output, second: Output) -> Output:
    """Two outputs of one request as one."""
    logprobs = None
    if first.logprobs is not None or second.logprobs is not None:
        logprobs = (first.logprobs or ()) + (second.logprobs or ())
    return Output(
        first.id,
        first.tokens + second.tokens,
        first.text + second.text,
        logprobs,
        second.finish,
        second.message,
    )
