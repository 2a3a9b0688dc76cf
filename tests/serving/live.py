"""A server on a free port of this machine, in a thread, over a real engine."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx

from anyadapter.serving.api import create_app
from anyadapter.serving.engine import Engine
from anyadapter.serving.gate import ServerSettings
from anyadapter.serving.loop import EngineLoop
from anyadapter.serving.server import Process

BASE = "smollm2"
KEY, ADMIN = "sesame-for-users", "sesame-for-admins"


class Live:
    """A running server.

    Attributes:
        http: a client for it.
    """

    def __init__(self, engine: Engine, *, drain_seconds: float = 20.0, key: str | None = None, **settings: Any) -> None:
        self.engine = engine
        self.loop = EngineLoop(engine)
        self.app = create_app(self.loop, ServerSettings(**{"model_name": BASE, "api_key": key, **settings}))
        self.process = Process(self.app, self.loop, "127.0.0.1", 0, drain_seconds)
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.process.run, kwargs={"sockets": [listening]}, daemon=True)
        self.thread.start()
        self.http = self.client(key)
        self.until(lambda: self.loop.ready)

    def client(self, key: str | None = None) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, limits=httpx.Limits(max_connections=200))

    def in_engine(self, function: Callable[[], Any]) -> Any:
        """The result of a function, run between two steps."""
        return asyncio.run_coroutine_threadsafe(self.loop.call(function), self.loop.aio).result(30)

    def until(self, condition: Callable[[], Any], seconds: float = 30.0) -> None:
        waited = threading.Event()
        for _ in range(int(seconds / 0.01)):
            if condition():
                return
            waited.wait(0.01)
        raise AssertionError("it did not happen in time")

    def idle(self) -> None:
        """Wait until nothing is in hand; then every cell must have its owner and no stream be left."""
        self.until(lambda: not self.in_engine(lambda: self.engine.has_work))
        self.in_engine(self.engine.check_integrity)
        stats = self.in_engine(self.engine.stats)
        assert (stats["waiting"], stats["running"], stats["cells_sequences"]) == (0, 0, 0)
        self.until(lambda: not self.loop.streams)

    def stop(self) -> None:
        self.http.close()
        self.process.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


def completion(prompt: Any = "The capital of France is", tokens: int = 4, **more: Any) -> dict[str, Any]:
    return {"model": BASE, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}


def ask(live: Live, prompt: Any = "The capital of France is", tokens: int = 3, **more: Any) -> httpx.Response:
    return live.http.post("/v1/completions", json={**completion(prompt, tokens), **more})


def error(response: httpx.Response) -> dict[str, Any]:
    body = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return body


def raw(live: Live, body: bytes, length: int | None = None, path: str = "/v1/completions") -> socket.socket:
    """A connection on which a request was sent."""
    connection = socket.create_connection(("127.0.0.1", live.port))
    connection.settimeout(20)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"
    size = f"content-length: {len(body) if length is None else length}\r\n\r\n" if length != -1 else ""
    connection.sendall(head.encode() + size.encode() + body)
    return connection


def raising(text: str) -> None:
    raise KeyError(text)


def stop_keeping(live: Live) -> None:
    """Stop a server and leave its engine usable for another."""
    live.engine.close, close = (lambda: None), live.engine.close  # type: ignore[method-assign]
    live.stop()
    live.engine.close = close  # type: ignore[method-assign]
