"""The server as a process: where it listens, how it begins, and how it ends without cutting anybody off."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import uvicorn

from anyadapter.core.errors import ConfigError
from anyadapter.serving.api import create_app
from anyadapter.serving.contexts import attach_generator
from anyadapter.serving.engine import Engine, EngineSettings
from anyadapter.serving.gate import ServerSettings
from anyadapter.serving.loop import EngineLoop, trace
from anyadapter.serving.policies import policy_named
from anyadapter.training.base import load_base

logger = logging.getLogger(__name__)

LAST_WORDS = 5  # seconds for responses that are ready to leave, after the drain


def serve(
    base: str,
    engine: EngineSettings,
    server: ServerSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str | None = None,
    device: str | None = None,
    generator: str | None = None,
    drain_seconds: float = 30.0,
    insecure: bool = False,
) -> None:
    """Load a base and serve it until a signal comes.

    Args:
        generator: folder of a GenerativeAdapter, which then makes adapters of the contexts that clients send.

    Raises:
        ConfigError: the settings cannot be meant, or there is no such base.
        AnyAdapterError: the base cannot be served.
    """
    check_bind(host, server.api_key, insecure)
    if engine.adapters is not None and not Path(engine.adapters).is_dir():
        raise ConfigError(
            f"There is no folder {engine.adapters!r}; --adapters is the folder that holds adapters' folders."
        )
    if server.allow_adapter_updates and engine.adapters is None:
        raise ConfigError("--allow-adapter-updates needs --adapters, the only place that adapters are taken from.")
    if generator is not None and not server.allow_adapter_updates:
        raise ConfigError("--generator needs --allow-adapter-updates: what it makes are new adapters.")
    policy_named(engine.policy)  # known before the model is loaded
    logging.basicConfig(level=logging.INFO, handlers=[log_handler()], force=True)
    loop = EngineLoop(lambda: load(base, engine, server.model_name, dtype, device, generator))
    process = Process(create_app(loop, server), loop, host, port, drain_seconds)
    loop.on_failure = process.stop
    process.run()
    if loop.thread is not None and loop.thread.is_alive():  # still loading
        os._exit(0)
    if loop.error is not None:
        raise loop.error


def load(
    base: str, settings: EngineSettings, name: str, dtype: str | None, device: str | None, generator: str | None = None
) -> Engine:
    """The engine with all adapters of its folder; those that are refused are named in the log."""
    start = time.perf_counter()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_base(base, dtype=dtype, device=device)
    if generator is not None:
        attach_generator(model, generator, settings.max_context)
    engine = Engine(model, tokenizer, settings=settings)
    refused = engine.store.scan()
    if name in engine.store.by_name:
        engine.store.unload(name)
        refused[name] = "It has the name of the base."
    for adapter, reason in refused.items():
        logger.warning(json.dumps({"event": "adapter refused", "adapter": adapter, "reason": reason}))
    seconds = round(time.perf_counter() - start, 1)
    logger.info(
        json.dumps({"event": "loaded", "model": name, "adapters": len(engine.store.names()), "seconds": seconds})
    )
    return engine


def check_bind(host: str, api_key: str | None, insecure: bool) -> None:
    """Raise a :class:`ConfigError` where anybody on the network could use the server."""
    try:
        near = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        near = False
    if not near and api_key is None and not insecure:
        raise ConfigError(
            f"Without a key, everybody who reaches {host} could use this server. Give --api-key (or ANYADAPTER_API_KEY), listen "
            "on 127.0.0.1, or say --insecure."
        )


class Process(uvicorn.Server):
    """uvicorn, which on the first SIGTERM or SIGINT goes on answering until the requests in hand are done.

    Meanwhile /ready and new requests get 503. A second signal ends it at once.
    """

    def __init__(self, app: Any, loop: EngineLoop, host: str, port: int, drain_seconds: float) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=LAST_WORDS,
        )
        logging.getLogger("uvicorn.access").disabled = True  # it would tell addresses; the gate's line takes its place
        super().__init__(config)
        self.engine_loop, self.drain_seconds = loop, drain_seconds
        self.leaving: asyncio.Task[None] | None = None
        self.stop: Callable[[], None] = lambda: setattr(self, "should_exit", True)

    async def startup(self, sockets: Any = None) -> None:
        self.aio = asyncio.get_running_loop()
        await super().startup(sockets)
        for server in getattr(self, "servers", ()):
            for socket in server.sockets:
                host, port = socket.getsockname()[:2]
                logger.info(json.dumps({"event": "listening", "host": host, "port": port}))

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.aio.call_soon_threadsafe(self.leave)

    def leave(self) -> None:
        if self.leaving is not None:
            os._exit(1)  # not by way of the interpreter, which a thread in the middle of a pass would bring down
        logger.info(json.dumps({"event": "draining", "seconds": self.drain_seconds}))
        self.leaving = self.aio.create_task(self.engine_loop.drain(self.drain_seconds))
        self.leaving.add_done_callback(lambda _: self.stop())


class Lines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        facts: dict[str, Any] = {"time": round(record.created, 3), "level": record.levelname.lower()}
        if record.name.startswith("anyadapter.") and text.startswith("{"):
            facts |= json.loads(text)
        else:
            facts |= {"event": "log", "logger": record.name, "message": text}
        if record.exc_info and record.exc_info[1] is not None:
            facts["error"] = trace(record.exc_info[1])  # without its message, which may quote a request
        return json.dumps(facts)


def log_handler() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    return handler
