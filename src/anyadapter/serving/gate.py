"""What every request to the server passes: an id, the key its route asks for, a limit to its body, errors in OpenAI's shape,
and one line in the log, which never holds what people wrote or what the model answered.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path

from anyadapter.core.adapter import Settings
from anyadapter.core.errors import AnyAdapterError, BusyError, ConfigError, RequestError, UnknownAdapterError
from anyadapter.serving.loop import EngineLoop, NotReadyError, trace
from anyadapter.serving.protocol import ApiError
from anyadapter.serving.request import MAX_LOGPROBS

if TYPE_CHECKING:
    from anyadapter.serving.api import Server

T = TypeVar("T")
logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
GONE = 499  # nginx's word for a client that went away
HINTS = {
    "prompt": "a text, a list of texts, a list of token ids, or a list of such lists",
    "stop": "a text or a list of texts",
}


@dataclass(frozen=True, kw_only=True)
class ServerSettings(Settings):
    """What the server allows.

    Attributes:
        model_name: the base's name in requests.
        api_key: asked of all /v1 routes; None asks nothing.
        admin_key: asked of the routes that change adapters.
        allow_adapter_updates: whether those routes do anything.
        max_body: bytes of a request.
        body_seconds: in which a body has to arrive.
        max_prompts: in one completion request.
        max_prompt_tokens: of each; None leaves it to the context.
        max_tokens: most tokens to generate; None leaves it to the context.
        default_tokens: the most that a chat generates when it does not say.
        max_n: choices for a prompt.
        max_stop: stop texts, and max_stop_chars characters in each.
        max_logprobs: likeliest tokens reported for each.
        max_adapters: in one request.
        first_token_seconds: after which a request that has no token yet is given up; None never.
    """

    model_name: str
    api_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    allow_adapter_updates: bool = False
    max_body: int = 1 << 20
    body_seconds: float = 30.0
    max_prompts: int = 64
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    default_tokens: int = 512
    max_n: int = 16
    max_stop: int = 16
    max_stop_chars: int = 256
    max_logprobs: int = MAX_LOGPROBS
    max_adapters: int = 8
    first_token_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("api_key", "admin_key"):
            key = getattr(self, name)
            if key is not None and (not key.isascii() or not key.isprintable() or " " in key or not key):
                raise ConfigError(f"The {name} must be printable ASCII without spaces, at least one character.")
        if self.allow_adapter_updates and self.admin_key is None:
            raise ConfigError("Changing adapters over HTTP needs a key of its own: give an admin_key (--admin-key).")
        self.require("max_logprobs", 0 <= self.max_logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}")


@dataclass(frozen=True)
class Route:
    """A method and path, what it asks for, and the name of the :class:`Server` method that answers."""

    method: str
    path: str
    auth: Literal["public", "key", "admin"]
    answer: str = ""


ROUTES = (
    Route("GET", "/health", "public", "health"),
    Route("GET", "/ready", "public", "ready"),
    Route("GET", "/metrics", "public", "metrics"),
    Route("GET", "/openapi.json", "public"),  # FastAPI's own
    Route("GET", "/v1/models", "key", "models"),
    Route("GET", "/v1/models/{id:path}", "key", "model"),
    Route("POST", "/v1/completions", "key", "completions"),
    Route("POST", "/v1/chat/completions", "key", "chat"),
    Route("POST", "/v1/adapters", "admin", "load_adapter"),
    Route("POST", "/v1/adapters/{name}/contexts", "admin", "extend_adapter"),
    Route("PUT", "/v1/adapters/{name}", "admin", "replace_adapter"),
    Route("DELETE", "/v1/adapters/{name}", "admin", "unload_adapter"),
)
PATTERNS = [(compile_path(route.path)[0], route) for route in ROUTES]


def route_of(path: str) -> Route | None:
    """The route of a path; all methods of a path ask for the same."""
    return next((route for pattern, route in PATTERNS if pattern.match(path)), None)


class GoneError(Exception):
    """The client has closed the connection."""


async def unless_gone(
    receive: Callable[[], Awaitable[Mapping[str, Any]]],
    work: Coroutine[Any, Any, T],
    close: Callable[[], None] = lambda: None,
) -> T:
    """The result of ``work``, which is stopped when the client goes away. ``close`` is called in any case."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks: tuple[asyncio.Task[T], asyncio.Task[None]] = (asyncio.ensure_future(work), asyncio.ensure_future(gone()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise GoneError
        return tasks[0].result()
    finally:
        close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def facts(http: Request) -> dict[str, Any]:
    """What the log will say about a request."""
    return http.scope["anyadapter.facts"]


class Gate:
    """Outermost: id, key, body, errors, log.

    An unknown path asks for the key like any other, so that a route that is forgotten in the table is not open.
    """

    def __init__(self, app: Any, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        route, start, status = route_of(scope["path"]), time.perf_counter(), 0
        scope["anyadapter.facts"] = found = dict[str, Any]()

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", id.encode())]}
            await send(message)

        try:
            self.admit(route, headers)
            body = await self.body(receive, headers)
            await self.app(scope, replay(body, receive), answer)
        except GoneError:
            status = status or GONE
        except Exception as error:
            failed = as_error(error, self.server.loop)
            if failed.status == 500 and not isinstance(error, ApiError):
                logger.error(json.dumps({"event": "failure", "request": id, "error": trace(error)}))
            if not status:
                await respond(failed)(scope, receive, answer)
        finally:
            path = route.path if route is not None else "(unknown)"
            self.server.numbers.responses.labels(path, str(status)).inc()
            line = {"event": "request", "request": id, "method": scope["method"], "route": path, "status": status}
            logger.info(json.dumps({**line, "ms": round((time.perf_counter() - start) * 1e3, 1), **found}))

    def admit(self, route: Route | None, headers: Mapping[str, str]) -> None:
        """Raise an :class:`ApiError` unless the request may come in."""
        settings = self.server.settings
        auth = route.auth if route is not None else "key"
        if auth == "admin" and not settings.allow_adapter_updates:
            raise ApiError(403, "Adapters cannot be changed here: the server runs without --allow-adapter-updates.")
        expected = {"public": None, "key": settings.api_key, "admin": settings.admin_key}[auth]
        if expected is None:
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(key.encode(), expected.encode())
        if kind.lower() != "bearer" or not same:
            which = "admin" if auth == "admin" else "API"
            message = f"This needs the {which} key: 'Authorization: Bearer KEY'."
            raise ApiError(401, message, code="invalid_api_key")

    async def body(self, receive: Any, headers: Mapping[str, str]) -> bytes:
        """The whole body, unless it is too long or too slow."""
        limit, seconds = self.server.settings.max_body, self.server.settings.body_seconds
        said = headers.get("content-length", "0")
        size = int(said) if said.isascii() and said.isdigit() else 0
        parts: list[bytes] = []

        async def read() -> bytes:
            length = size
            while length <= limit:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise GoneError
                parts.append(message.get("body", b""))
                length = sum(map(len, parts))
                if not message.get("more_body") and length <= limit:
                    return b"".join(parts)
            raise ApiError(413, f"The request has {length} bytes or more; this server takes at most {limit}.")

        try:
            return await asyncio.wait_for(read(), seconds)
        except asyncio.TimeoutError:
            raise ApiError(408, f"The request's body did not arrive within {seconds:g} s.") from None


def replay(body: bytes, receive: Any) -> Callable[[], Awaitable[Mapping[str, Any]]]:
    """A ``receive`` that gives the body once, and then what else the client does."""
    left: list[Mapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Mapping[str, Any]:
        return left.pop() if left else await receive()

    return again


def respond(error: ApiError) -> Response:
    headers = {}
    if error.retry is not None:
        headers["retry-after"] = str(max(1, round(error.retry)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    body = json.dumps(error.body())  # in ASCII: a message may quote half a character
    return Response(body, error.status, headers, "application/json")


def as_error(error: Exception, loop: EngineLoop) -> ApiError:
    """Any error in OpenAI's shape. What was not meant for clients stays here."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return invalid(error)
    if isinstance(error, HTTPException):
        named = {404: "There is no such route.", 405: "This route has no such method."}
        return ApiError(error.status_code, named.get(error.status_code, str(error.detail)))
    if isinstance(error, NotReadyError):
        return ApiError(503, str(error), retry=1.0)
    if isinstance(error, BusyError):
        return ApiError(429, str(error), code="rate_limit_exceeded", retry=error.retry_after)
    if isinstance(error, UnknownAdapterError):
        return ApiError(404, str(error), param="model", code="model_not_found")
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.param)
    if isinstance(error, AnyAdapterError):
        return ApiError(400, scrub(str(error), loop))
    return ApiError(500, "The server failed; nothing of the request is kept.")


def scrub(message: str, loop: EngineLoop) -> str:
    """A message without the place of the adapters' folder."""
    root = loop.engine.settings.adapters if loop.engine is not None else None
    return message if root is None else message.replace(str(Path(root).resolve()), "(adapters)")


def invalid(error: RequestValidationError) -> ApiError:
    """The first thing wrong with a body."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not JSON: {first.get('ctx', {}).get('error', 'it ends early')}.")
    place = first["loc"]
    param = str(place[1])[:128] if len(place) > 1 else None
    if param is None:
        return ApiError(400, "The body must be a JSON object, sent with content-type application/json.")
    message = f"{param} must be {HINTS[param]}." if param in HINTS else f"{param}: {first['msg']}."
    return ApiError(400, message, param=param)
