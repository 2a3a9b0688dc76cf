"""Several engines behind one address: who serves which request, and what happens when one of them dies.

A replica is the whole HTTP application with an engine of its own. :class:`Front` passes HTTP requests on to the one that the
router chooses, and repeats them elsewhere when a replica fails; at the end is what runs both on Ray Serve (extra ``cluster``).
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from anyadapter.core.errors import AnyAdapterError
from anyadapter.serving.gate import ServerSettings, respond
from anyadapter.serving.protocol import ApiError, event
from anyadapter.serving.router import Router, RouterSettings

if TYPE_CHECKING:
    from anyadapter.serving.engine import EngineSettings

logger = logging.getLogger(__name__)

CHANGES = ("POST", "PUT", "DELETE")  # methods that change adapters where the path is one of theirs
READY_SECONDS = 5.0  # in which a replica says that it is ready
CHANGE_SECONDS = 300.0  # in which it changes an adapter
NOT_NOW = (429, 503)  # a replica that is full, loading or leaving: another one may do it


# -------------------------------------------------------------------------- passing requests on


@dataclass(frozen=True)
class Message:
    """An HTTP request, as it is passed on."""

    method: str
    path: str
    query: str
    headers: list[tuple[str, str]]
    body: bytes


@dataclass(frozen=True)
class Head:
    """How an answer begins.

    Attributes:
        born: tells a replica's process from the one before it, which was told of changes that this one has not seen.
    """

    status: int
    headers: list[tuple[str, str]]
    born: str = ""


class Replica(Protocol):
    """Where requests are passed on to."""

    def ask(self, message: Message) -> AsyncIterator[Head | bytes]:
        """The head, then the body piece by piece. Raises whatever it likes when the replica is not there (any more)."""
        ...


class Front:
    """Passes each request to a replica, and to another one while nothing of the answer has been delivered.

    An answer that is not streamed is delivered as a whole, so it can always be repeated; a streamed one up to its first
    token. A replica that is full is not asked again under the same request; one that dies or is not ready is asked nothing but
    whether it is ready, until it is.

    Routes that change adapters go to all replicas that are not down. The last change to each name is kept, and a replica that
    was down or has started again is told of all of them before it is asked anything else. They are kept in memory: another
    front, or this one when it has started again, knows of none.

    Args:
        replicas: by name.
        model_name: the base's name in requests.
        max_body: bytes of a request.

    Attributes:
        changes: what was done to each name: the folder that it was given, or None where it was unloaded.
    """

    def __init__(
        self,
        replicas: Mapping[str, Replica],
        *,
        model_name: str,
        max_body: int = 1 << 20,
        settings: RouterSettings | None = None,
    ) -> None:
        self.replicas, self.model_name, self.max_body = replicas, model_name, max_body
        self.router = Router(replicas, settings)
        self.probes: dict[str, asyncio.Task[None]] = {}
        self.changes: dict[str, str | None] = {}
        self.changing = asyncio.Lock()  # one change at a time, so that all replicas see them in one order
        self.headers: list[tuple[str, str]] = []  # of the last change, with the key that it was made with
        self.born: dict[str, str] = {}  # the process of each replica that knows all changes

    async def answer(self, http: Request) -> Response:
        """Answer one HTTP request."""
        try:
            if http.url.path == "/cluster":
                return JSONResponse(self.router.stats())
            body = await self.body(http)
            headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in http.scope["headers"]]
            message = Message(http.method, http.url.path, http.url.query, headers, body)
            if http.method in CHANGES and http.url.path.startswith("/v1/adapters"):
                return await self.everywhere(message)
            return await self.somewhere(message)
        except ApiError as error:
            return respond(error)
        except ClientDisconnect:
            return Response(status_code=499)

    async def body(self, http: Request) -> bytes:
        parts, size = [], 0
        async for part in http.stream():
            size += len(part)
            if size > self.max_body:
                raise ApiError(413, f"The request has more bytes than this server takes ({self.max_body}).")
            parts.append(part)
        return b"".join(parts)

    def adapter_of(self, body: bytes) -> tuple[str | None, bool]:
        """The adapters a request asks for, as one name, and whether it wants a stream. Replicas say what is wrong with it."""
        try:
            asked = json.loads(body)
            named = asked.get("adapters") or ([] if asked.get("model") == self.model_name else [asked.get("model")])
            return "+".join(sorted(map(str, named))) or None, asked.get("stream") is True
        except (ValueError, AttributeError, TypeError, RecursionError):
            return None, False

    async def somewhere(self, message: Message) -> Response:
        """One replica's answer."""
        adapter, streamed = self.adapter_of(message.body)
        tried: list[str] = []
        failed, refusal = 0, None
        while (name := self.router.choose(adapter, tried)) is not None and failed < self.router.settings.tries:
            tried.append(name)
            self.router.begin(name)
            answer = Answer(self.replicas[name].ask(message), partial(self.router.end, name))
            try:
                await answer.begin(whole=not streamed)
            except Exception as error:
                await answer.close()
                self.failed(name, error)
                failed += 1
                continue
            except BaseException:  # the client is gone
                await answer.close()
                raise
            if self.is_new(name, answer.head):
                await answer.close()
                self.rest(name)
                continue
            if answer.head.status not in NOT_NOW:
                self.router.served(name, adapter)
                return answer.response(partial(self.failed, name))
            refusal = await answer.whole()
            if answer.head.status == 503 and await self.ready(name) is None:  # else it was late for this request only
                self.rest(name)
        if refusal is not None and not failed:
            return refusal
        raise ApiError(503, "No replica could answer. Send the request again.", retry=1.0)

    def failed(self, name: str, error: Exception) -> None:
        """A replica died; look from time to time whether it is back."""
        logger.warning(json.dumps({"event": "replica failed", "replica": name, "error": type(error).__name__}))
        self.router.fail(name)
        self.rest(name)

    def rest(self, name: str) -> None:
        self.router.rest(name)
        if name not in self.probes:
            self.probes[name] = asyncio.create_task(self.probe(name))

    async def probe(self, name: str) -> None:
        """Wait until a replica is ready, and tell it of all changes."""
        while self.router.replicas[name].down:
            await asyncio.sleep(self.router.settings.probe)
            if (head := await self.ready(name)) is not None:
                async with self.changing:
                    self.born[name] = head.born
                    if await self.catch_up(name):
                        self.router.back(name)
        del self.probes[name]

    async def ready(self, name: str) -> Head | None:
        """A replica's word that it takes requests; None without it."""
        answer = Answer(self.replicas[name].ask(Message("GET", "/ready", "", [], b"")), lambda: None)
        try:
            await asyncio.wait_for(answer.begin(whole=True), READY_SECONDS)
        except Exception as error:
            logger.debug("%s is not ready: %s", name, type(error).__name__)
            return None
        finally:
            await answer.close()
        return answer.head if answer.head.status == 200 else None

    # ------------------------------------------------------------------ changes

    def is_new(self, name: str, head: Head) -> bool:
        """Whether an answer comes from a process that was started since, and has not been told of the changes."""
        return self.born.setdefault(name, head.born) != head.born

    async def everywhere(self, message: Message) -> Response:
        """Change adapters on all replicas that are not down; the answer is the worst of theirs."""
        async with self.changing:
            up = [name for name, replica in self.router.replicas.items() if not replica.down]
            answers = [a for a in await asyncio.gather(*(self.change(name, message) for name in up)) if a is not None]
            if not answers:
                raise ApiError(503, "No replica could make the change. Send it again.", retry=1.0)
            for answer in answers:
                if answer.status_code < 300:
                    made = json.loads(bytes(answer.body))
                    self.changes[made["id"]] = made.get("root")
                    self.headers = [h for h in message.headers if h[0] in ("authorization", "content-type")]
            return max(answers, key=lambda answer: answer.status_code)

    async def change(self, name: str, message: Message) -> Response | None:
        """A replica's answer to a change; None where it cannot make it now, and will be told before it is back."""
        answer = Answer(self.replicas[name].ask(message), lambda: None)
        try:
            await asyncio.wait_for(answer.begin(whole=True), CHANGE_SECONDS)
        except Exception as error:
            await answer.close()
            self.failed(name, error)
            return None
        if answer.head.status in NOT_NOW or self.is_new(name, answer.head):
            await answer.close()
            self.rest(name)
            return None
        return await answer.whole()

    async def catch_up(self, name: str) -> bool:
        """Tell a replica of all changes; whether it was there to the end.

        One that it refuses is left: a replica without one adapter is better than none.
        """
        for adapter, folder in self.changes.items():
            answer = await self.repeat(name, adapter, folder)
            if answer is None:
                return False
            if answer.status_code >= 300 and (folder is not None or answer.status_code != 404):
                about = {"replica": name, "adapter": adapter, "status": answer.status_code}
                logger.warning(json.dumps({"event": "change refused", **about}))
        return True

    async def repeat(self, name: str, adapter: str, folder: str | None) -> Response | None:
        """A replica's answer to a change that the others have made; None as in :meth:`change`."""

        async def send(method: str, path: str, body: dict[str, str]) -> Response | None:
            return await self.change(name, Message(method, path, "", self.headers, json.dumps(body).encode()))

        if folder is None:
            return await send("DELETE", f"/v1/adapters/{adapter}", {})
        answer = await send("PUT", f"/v1/adapters/{adapter}", {"path": folder})
        if answer is None or answer.status_code != 404:
            return answer
        return await send("POST", "/v1/adapters", {"name": adapter, "path": folder})  # a name that it does not have


class Answer:
    """A replica's answer on its way to the client."""

    def __init__(self, pieces: AsyncIterator[Head | bytes], done: Callable[[], None]) -> None:
        self.pieces, self.done = pieces, done
        self.parts: list[bytes] = []
        self.head: Head

    async def begin(self, *, whole: bool) -> None:
        """Wait for the head and the first piece of the body, or for all of it."""
        head = await self.pieces.__anext__()
        assert isinstance(head, Head)
        self.head = head
        async for part in self.pieces:
            self.parts.append(part)  # type: ignore[arg-type]
            if not whole and head.status == 200:
                return

    async def whole(self) -> Response:
        """The response, when its body is there or short."""
        async for part in self.pieces:
            self.parts.append(part)  # type: ignore[arg-type]
        await self.close()
        return self.dressed(Response(b"".join(self.parts), self.head.status))

    def response(self, fail: Callable[[Exception], None]) -> Response:
        return self.dressed(StreamingResponse(self.body(fail), self.head.status))

    def dressed(self, response: Response) -> Response:
        own = ("content-length", "transfer-encoding", "connection", "date", "server")
        for name, value in self.head.headers:
            if name.lower() not in own:
                response.headers[name] = value
        return response

    async def body(self, fail: Callable[[Exception], None]) -> AsyncIterator[bytes]:
        """What is there, then the rest. A stream that breaks off ends with an error, without ``[DONE]``."""
        try:
            for part in self.parts:
                yield part
            async for piece in self.pieces:
                yield piece  # type: ignore[misc]
        except Exception as error:
            fail(error)
            yield event(ApiError(502, "The server failed while it worked on this request. Send it again.").body())
        finally:
            await self.close()

    async def close(self) -> None:
        done, self.done = self.done, lambda: None
        done()
        close: Callable[[], Awaitable[None]] | None = getattr(self.pieces, "aclose", None)
        if close is not None:
            await close()


# -------------------------------------------------------------------------- a replica in this process


class Inside:
    """An ASGI application of this process as a replica."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def ask(self, message: Message) -> AsyncIterator[Head | bytes]:
        """The application's answer; closing the iterator is the client's going away."""
        sent: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(maxsize=64)
        gone, begun = asyncio.Event(), False

        async def receive() -> dict[str, Any]:
            nonlocal begun
            if not begun:
                begun = True
                return {"type": "http.request", "body": message.body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self.app(scope_of(message), receive, sent.put)
            finally:
                await sent.put(None)

        task = asyncio.ensure_future(run())
        try:
            while (piece := await sent.get()) is not None:
                if piece["type"] == "http.response.start":
                    headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in piece["headers"]]
                    yield Head(piece["status"], headers)
                elif piece.get("body"):
                    yield piece["body"]
            await task
        finally:
            gone.set()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def scope_of(message: Message) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": message.method,
        "scheme": "http",
        "path": message.path,
        "raw_path": message.path.encode(),
        "query_string": message.query.encode(),
        "root_path": "",
        "headers": [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in message.headers],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
    }


# -------------------------------------------------------------------------- on Ray Serve


class RayReplica:
    """A Ray Serve deployment: the application with an engine of its own. It fails its health check when the engine has failed,
    and Ray starts it again.

    Args:
        make: makes the engine, in the replica's process.
    """

    def __init__(self, make: Callable[[], Any], server: Mapping[str, Any]) -> None:
        from anyadapter.serving.api import create_app
        from anyadapter.serving.loop import EngineLoop

        self.loop = EngineLoop(make)
        self.inside = Inside(create_app(self.loop, ServerSettings(**server)))
        self.started = False
        self.born = uuid.uuid4().hex

    async def ask(self, message: Message) -> AsyncIterator[Head | bytes]:
        """One request's answer."""
        await self.check_health()
        async for piece in self.inside.ask(message):
            yield replace(piece, born=self.born) if isinstance(piece, Head) else piece

    async def check_health(self) -> None:
        """Asked by Ray from time to time; also starts the engine's thread, in the event loop that requests are in."""
        if not self.started:
            self.started = True
            self.loop.start()
        if self.loop.error is not None:
            raise AnyAdapterError("The engine has failed.")


class RayFront:
    """A Ray Serve deployment: the front, with a handle to each replica."""

    def __init__(self, handles: Sequence[Any], settings: Mapping[str, Any], **front: Any) -> None:
        replicas = {f"replica-{i}": Handle(handle) for i, handle in enumerate(handles)}
        self.front = Front(replicas, settings=RouterSettings(**settings), **front)

    async def __call__(self, http: Request) -> Response:
        return await self.front.answer(http)


class Handle:
    """A replica, reached through Ray."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle.options(stream=True)

    async def ask(self, message: Message) -> AsyncIterator[Head | bytes]:
        answer = self.handle.ask.remote(message)
        try:
            async for piece in answer:
                yield piece
        finally:
            answer.cancel()  # nothing, once it has ended


def deploy(
    make: Callable[[], Any],
    server: ServerSettings,
    *,
    replicas: int,
    settings: RouterSettings | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    resources: Mapping[str, Any] | None = None,
) -> None:
    """Run replicas and a front on Ray Serve, in the cluster that this process is connected to, or in a new local one.

    Each replica is a deployment of its own, so that it keeps its name, and with it its adapters, when Ray starts it again.

    Args:
        make: makes an engine; called in each replica.
        replicas: how many.
        resources: of a replica, as Ray's ``ray_actor_options``: ``{"num_gpus": 1}``.
    """
    from ray import serve as ray_serve

    serve: Any = ray_serve
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    options = {"num_cpus": 1, **(resources or {})}
    handles = []
    for i in range(replicas):
        deployment = serve.deployment(RayReplica).options(
            name=f"replica-{i}",
            num_replicas=1,
            max_ongoing_requests=10_000,  # the engine has a queue of its own
            ray_actor_options=options,
            health_check_period_s=2,
        )
        handles.append(deployment.bind(make, asdict(server)))
    front = serve.deployment(RayFront).options(
        name="front", num_replicas=1, max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0}
    )
    router = asdict(settings or RouterSettings())
    app = front.bind(handles, router, model_name=server.model_name, max_body=server.max_body)
    serve.run(app, name="anyadapter", route_prefix="/")


def engine_of(base: str, engine: EngineSettings, name: str, dtype: str | None, device: str | None) -> Callable[[], Any]:
    """What makes a served base's engine, for :func:`deploy`."""
    from anyadapter.serving.server import load

    return partial(load, base, engine, name, dtype, device)
