"""The HTTP server: OpenAI's routes for a base model and its adapters."""

from __future__ import annotations

import asyncio
import copy
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from anyadapter.core.attach import NAME
from anyadapter.core.errors import near
from anyadapter.serving.contexts import Contexts
from anyadapter.serving.gate import ROUTES, Gate, ServerSettings, facts, scrub, unless_gone
from anyadapter.serving.loop import EngineLoop, NotReadyError, Stream, trace
from anyadapter.serving.metrics import Metrics
from anyadapter.serving.protocol import (
    DONE,
    AdapterBody,
    ApiError,
    ChatBody,
    ChatReply,
    CompletionBody,
    CompletionReply,
    ContextBody,
    NewAdapterBody,
    Reply,
    SamplingBody,
    event,
)
from anyadapter.serving.request import Output
from anyadapter.serving.request import Request as Sequence

logger = logging.getLogger(__name__)


def create_app(loop: EngineLoop, settings: ServerSettings) -> FastAPI:
    """The application; it starts the loop and closes it."""
    server = Server(loop, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop.start()
        yield
        await loop.close()

    async def pass_on(_: Request, error: Exception) -> Response:
        raise error  # the gate answers all errors

    handlers: Any = {RequestValidationError: pass_on, HTTPException: pass_on}
    app = FastAPI(title="anyadapter", docs_url=None, redoc_url=None, lifespan=lifespan, exception_handlers=handlers)
    for route in ROUTES:
        if route.answer:
            answer = getattr(server, route.answer)
            app.add_api_route(route.path, answer, methods=[route.method], response_model=None)
    app.add_middleware(Gate, server=server)
    return app


class Server:
    """Answers requests, given the engine's loop."""

    def __init__(self, loop: EngineLoop, settings: ServerSettings) -> None:
        self.loop, self.settings = loop, settings
        self.numbers = Metrics(lambda: loop.stats)
        self.contexts = Contexts(loop)
        self.making: set[str] = set()  # names that requests are making adapters for
        self.encoder = ThreadPoolExecutor(1, "tokenizer")
        self.started = int(time.time())
        self._tokenizer: Any = None

    # ------------------------------------------------------------------ state

    async def health(self) -> Response:
        """Whether the process works. It does while the model is loaded and while it shuts down."""
        broken = self.loop.error is not None
        return JSONResponse({"status": "failed" if broken else "alive"}, 503 if broken else 200)

    async def ready(self) -> Response:
        """Whether requests are taken."""
        try:
            self.loop.check()
        except NotReadyError as error:
            return JSONResponse({"status": str(error)}, 503)
        return JSONResponse({"status": "ready"})

    async def metrics(self) -> Response:
        """Numbers for Prometheus."""
        return Response(self.numbers.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # ------------------------------------------------------------------ models

    async def models(self) -> Response:
        """The base model and all adapters."""
        store = self.loop.check().store
        adapters = [self.show(registered) for registered in list(store.by_name.values())]
        return JSONResponse({"object": "list", "data": [self.show(None), *adapters]})

    async def model(self, id: str) -> Response:
        """One of them."""
        if id == self.settings.model_name:
            return JSONResponse(self.show(None))
        return JSONResponse(self.show(self.registered(id)))

    def show(self, registered: Any) -> dict[str, Any]:
        """A model as clients see it; an adapter with where it comes from."""
        base = self.settings.model_name
        common = {"object": "model", "owned_by": "anyadapter", "max_model_len": self.loop.check().max_context}
        if registered is None:
            return {"id": base, "created": self.started, **common, "root": base, "parent": None}
        names = {"root": registered.folder.name, "parent": base}
        return {"id": registered.name, "created": int(registered.created), **common, **names}

    def registered(self, name: str) -> Any:
        adapters = self.loop.check().store.by_name
        if name in adapters:
            return adapters[name]
        message = f"There is no model {name[:128]!r}. {near(name[:128], [self.settings.model_name, *adapters])}"
        raise ApiError(404, message, param="model", code="model_not_found")

    # ------------------------------------------------------------------ changing adapters

    async def load_adapter(self, http: Request, body: NewAdapterBody) -> Response:
        """Register a folder under a new name, or make an adapter of a context."""
        context = body.context()
        if body.path is not None and context is None and body.name is not None:
            with self.claimed(body.name):
                return await self.put_adapter(http, body.name, body.path, 201)
        if body.path is not None or context is None:
            message = "Give a name and the path of an adapter, or a context: a document or messages."
            raise ApiError(400, message, param="path" if context is None else "document")
        name = body.name or f"context-{uuid.uuid4().hex[:12]}"
        with self.claimed(name):
            if not NAME.fullmatch(name):
                raise ApiError(400, "A name is 1 to 128 letters, digits, '.', '_' and '-'.", param="name")
            if (self.root() / name).exists():
                raise ApiError(409, f"The folder of adapters holds {name!r} already.", param="name")
            return await self.read_context(http, name, body, context, 201)

    @contextmanager
    def claimed(self, name: str) -> Iterator[None]:
        """Keep a new name from other requests. Refuses one that is taken."""
        if name in self.loop.check().store.by_name or name == self.settings.model_name:
            raise ApiError(409, f"There is a model {name!r} already; PUT replaces an adapter.", param="name")
        if name in self.making:
            raise ApiError(409, f"Another request makes {name!r} already.", param="name")
        self.making.add(name)
        try:
            yield
        finally:
            self.making.remove(name)

    async def extend_adapter(self, http: Request, name: str, body: ContextBody) -> Response:
        """Let an adapter that was made of a context read another. Requests in hand keep what they began with."""
        self.root()
        self.registered(name)
        self.contexts.growing(name)
        context = body.context()
        if context is None:
            raise ApiError(400, "Give a context: a document or messages.", param="document")
        return await self.read_context(http, name, body, context, 200)

    async def read_context(
        self, http: Request, name: str, body: ContextBody, context: str | list[dict[str, str]], status: int
    ) -> Response:
        if self.contexts.generator() is None:
            raise ApiError(403, "This server was started without a generator.", param="document")
        ids = await self.encode(context, answer=False)
        most = self.loop.check().max_context
        if body.window is not None and body.window > most:
            raise ApiError(400, f"window is {body.window}; this model reads {most} tokens at a time.", param="window")
        mode = body.mode or "sequential"
        registered = await self.contexts.make(name, ids, mode=mode, window=body.window, grows=status == 200)
        facts(http).update(changed=name, context_tokens=len(ids))
        return JSONResponse({**self.show(registered), "context_tokens": len(ids)}, status)

    def root(self) -> Path:
        """The folder of adapters."""
        root = self.loop.check().settings.adapters
        if root is None:
            raise ApiError(403, "This server was started without a folder of adapters.")
        return Path(root)

    async def replace_adapter(self, http: Request, name: str, body: AdapterBody) -> Response:
        """Put another folder under a name. Requests in hand finish with what they began with."""
        self.registered(name)
        return await self.put_adapter(http, name, body.path, 200)

    async def put_adapter(self, http: Request, name: str, path: str, status: int) -> Response:
        root = self.root()
        if not NAME.fullmatch(path):
            message = "This server takes adapters from its own folder only; path is the name of a folder in it."
            raise ApiError(403, message, param="path")
        if not (root / path).exists():
            raise ApiError(404, f"The folder of adapters holds no {path!r}.", param="path")
        async with self.contexts.changing:
            registered = await self.loop.register(name, path)
        facts(http).update(changed=name)
        return JSONResponse(self.show(registered), status)

    async def unload_adapter(self, http: Request, name: str) -> Response:
        """Forget a name. Requests in hand finish with the adapter."""
        self.registered(name)
        await self.loop.unload(name)
        facts(http).update(changed=name)
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    # ------------------------------------------------------------------ generating

    async def completions(self, http: Request, body: CompletionBody) -> Response:
        """Continue prompts."""
        adapters = self.adapters_of(body)
        if body.echo and body.logprobs is not None:
            raise ApiError(400, "logprobs of the prompt are not supported; leave out echo.", param="echo")
        prompt: Any = body.prompt
        given = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
        if not given:
            raise ApiError(400, "The prompt is empty.", param="prompt")
        at_most("prompt", "The number of prompts", len(given), self.settings.max_prompts)
        prompts = [await self.encode(text) if isinstance(text, str) else text for text in given]
        shown = [text if isinstance(text, str) else self.tokenizer.decode(text) for text in given] if body.echo else []
        reply = partial(CompletionReply, echoes=[t for t in shown or [""] * len(given) for _ in range(body.n or 1)])
        return await self.answer(http, body, prompts, adapters, reply, body.max_tokens or 16)

    async def chat(self, http: Request, body: ChatBody) -> Response:
        """Answer a conversation."""
        adapters = self.adapters_of(body)
        if not getattr(self.tokenizer, "chat_template", None):
            raise ApiError(400, "This model has no chat template; use /v1/completions.", param="messages")
        prompt = await self.encode([message.plain() for message in body.messages])
        asked = body.max_completion_tokens or body.max_tokens
        room = self.loop.check().max_context - len(prompt)
        most = asked or max(1, min(self.settings.default_tokens, room))
        reply = partial(ChatReply, echoes=[""] * (body.n or 1))
        return await self.answer(http, body, [prompt], adapters, reply, most)

    def adapters_of(self, body: SamplingBody) -> dict[str, float]:
        """The adapters a request asks for, after its limits were checked. An unknown one is never the base."""
        limits, stops = self.settings, body.stops()
        at_most("n", "n", body.n or 1, limits.max_n)
        at_most("stop", "The number of stop texts", len(stops), limits.max_stop)
        for stop in stops:
            at_most("stop", "The length of a stop text", len(stop), limits.max_stop_chars)
        name = "top_logprobs" if isinstance(body, ChatBody) else "logprobs"
        at_most(name, name, body.likeliest() or 0, limits.max_logprobs)
        at_most("stop_token_ids", "The number of stop_token_ids", len(body.stop_token_ids or ()), limits.max_stop)
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options needs stream to be true.", param="stream_options")
        if body.model != limits.model_name:
            if body.adapters:
                message = f"With adapters, model is the base's name, {limits.model_name!r}."
                raise ApiError(400, message, param="model")
            return {self.registered(body.model).name: 1.0}
        at_most("adapters", "The number of adapters", len(body.adapters or ()), limits.max_adapters)
        return {self.registered(name).name: weight for name, weight in (body.adapters or {}).items()}

    @property
    def tokenizer(self) -> Any:
        """A copy of the engine's: tokenizers must not be used in two threads at once."""
        if self._tokenizer is None:
            self._tokenizer = copy.deepcopy(self.loop.check().tokenizer)
        return self._tokenizer

    async def encode(self, prompt: str | list[dict[str, str]], answer: bool = True) -> list[int]:
        """Tokens of a text or a conversation, in a thread: a long one takes a while.

        Args:
            answer: whether a conversation ends where the model is to answer.
        """
        tokenizer = self.tokenizer

        def work() -> list[int]:
            if isinstance(prompt, str):
                return tokenizer(prompt)["input_ids"]
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=answer)
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        try:
            return await asyncio.get_running_loop().run_in_executor(self.encoder, work)
        except Exception as error:  # templates refuse conversations, tokenizers texts, each in its own way
            logger.debug("a prompt was refused: %s", trace(error))
            what = "prompt" if isinstance(prompt, str) else "messages"
            raise ApiError(400, f"The model's tokenizer refuses the {what}.", param=what) from None

    async def answer(
        self,
        http: Request,
        body: SamplingBody,
        prompts: list[list[int]],
        adapters: dict[str, float],
        form: Callable[..., Reply],
        max_tokens: int,
    ) -> Response:
        """Queue the sequences of a request and give what comes out of them, whole or piece by piece."""
        engine, limits, n = self.loop.check(), self.settings, body.n or 1
        at_most("max_tokens", "max_tokens", max_tokens, limits.max_tokens or engine.max_context)
        for prompt in prompts:
            at_most("prompt", "The prompt's tokens", len(prompt), limits.max_prompt_tokens or engine.max_context - 1)
        logprobs = body.likeliest()
        reply = form(
            uuid.uuid4().hex,
            body.model,
            self.tokenizer,
            prompt_tokens=sum(map(len, prompts)),
            logprobs=logprobs is not None,
        )
        now = engine.clock()
        patience = [p for p in (limits.first_token_seconds, body.first_token_seconds) if p]
        sequences = [
            Sequence(
                id=f"{reply.id}-{index}",
                prompt=tuple(prompts[index // n]),
                adapters=adapters,
                sampling=body.sampling(max_tokens, logprobs, index % n),
                arrival=now,
                deadline=now + min(patience) if patience else None,
            )
            for index in range(len(prompts) * n)
        ]
        stream = await self.loop.submit(*sequences)
        label = self.numbers.label(limits.model_name, list(adapters))
        work = Work(stream, reply, Tally(self.numbers, label, facts(http), [s.prompt for s in sequences]))
        if body.stream:
            first = await unless_gone(
                http.receive, work.first()
            )  # a request given up before that is an error of its own
            usage = body.stream_options is not None and body.stream_options.include_usage
            return Events(work.events(first, usage), work.close)
        await unless_gone(http.receive, work.whole(), work.close)
        return JSONResponse(reply.whole())


class Tally:
    """What one request adds to the numbers and the log."""

    def __init__(self, metrics: Metrics, label: str, facts: dict[str, Any], prompts: list[tuple[int, ...]]) -> None:
        self.metrics, self.label, self.facts, self.open = metrics, label, facts, len(prompts)
        self.start = time.perf_counter()
        self.begun: set[str] = set()
        self.metrics.prompt.labels(label).inc(sum(map(len, prompts)))
        facts.update(adapter=label, sequences=len(prompts), prompt_tokens=sum(map(len, prompts)), output_tokens=0)

    def add(self, output: Output) -> None:
        if output.tokens and output.id not in self.begun:
            self.begun.add(output.id)
            seconds = time.perf_counter() - self.start
            self.metrics.first.labels(self.label).observe(seconds)
            self.facts.setdefault("first_token_ms", round(seconds * 1e3, 1))
        self.metrics.output.labels(self.label).inc(len(output.tokens))
        self.facts["output_tokens"] += len(output.tokens)
        if output.finish is not None:
            self.end(output.finish, 1)

    def end(self, reason: str, count: int) -> None:
        self.open -= count
        self.facts["finish"] = reason
        self.metrics.requests.labels(self.label, reason).inc(count)

    def close(self) -> None:
        """What has not ended by now was cancelled."""
        if self.open:
            self.end("cancel", self.open)


class Work:
    """The outputs of one request on their way into its reply."""

    def __init__(self, stream: Stream, reply: Reply, tally: Tally) -> None:
        self.stream, self.reply, self.tally = stream, reply, tally
        self.opening = [*reply.opening()]

    def close(self) -> None:
        self.stream.cancel()
        self.tally.close()

    def take(self, output: Output) -> int:
        """Add an output to the reply; the index of its choice. Raises :class:`ApiError` where the sequence failed."""
        self.tally.add(output)
        if output.finish == "error":
            raise ApiError(500, scrub(output.message, self.stream.loop))
        if output.finish in ("abort", "cancel"):
            raise ApiError(503, output.message or "No token came in time: too many requests wait.", retry=1.0)
        index = int(output.id.rpartition("-")[2])
        self.reply.choices[index].add(output)
        return index

    async def whole(self) -> None:
        async for output in self.stream:
            self.take(output)

    async def first(self) -> dict[str, Any]:
        """The first piece; afterwards the response begins."""
        try:
            output = await self.stream.__anext__()
            return self.reply.show_piece(self.take(output), output)
        except BaseException:
            self.close()
            raise

    async def events(self, first: dict[str, Any], usage: bool) -> AsyncIterator[bytes]:
        """Server-sent events; an error is the last one, and then there is no ``[DONE]``."""
        more = {"usage": None} if usage else {}
        for piece in self.opening:
            yield event({**piece, **more})
        yield event({**self.reply.piece(first), **more})
        try:
            async for output in self.stream:
                index = self.take(output)
                if output.text or output.finish or output.logprobs:
                    yield event({**self.reply.piece(self.reply.show_piece(index, output)), **more})
        except ApiError as error:
            yield event(error.body())
            return
        if usage:
            yield event(self.reply.usage_piece())
        yield DONE


class Events(StreamingResponse):
    """Server-sent events that stop when the client goes away, also while nothing is sent."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(content, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self.close = close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await unless_gone(receive, self.stream_response(send), self.close)


def at_most(param: str, what: str, value: int, limit: int) -> None:
    if value > limit:
        raise ApiError(400, f"{what} is {value}; this server allows at most {limit}.", param=param)
