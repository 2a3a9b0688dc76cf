"""What the server must never do: one test or more for each rule. One engine with small limits serves them all."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import shutil
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi.routing import APIRoute
from live import BASE, Live, completion
from safetensors.torch import load_file, save_file
from served import lora, save_adapter
from torch import nn

from anyadapter.core.errors import ConfigError
from anyadapter.serving.engine import Engine, EngineSettings
from anyadapter.serving.gate import ROUTES, ServerSettings
from anyadapter.serving.metrics import LABELS, Metrics
from anyadapter.serving.request import Output
from anyadapter.serving.server import check_bind

KEY, ADMIN = "sesame-for-users", "sesame-for-admins"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
LIMITS: dict[str, Any] = {"max_n": 4, "max_tokens": 200, "max_prompts": 3, "max_prompt_tokens": 100, "max_body": 5000}
LIMITS |= {"max_stop": 2, "max_stop_chars": 10, "max_logprobs": 5, "max_adapters": 2, "body_seconds": 0.5}


@pytest.fixture(scope="module")
def root(smollm_and_tokenizer: tuple[nn.Module, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good adapters, and one damaged in each way we know."""
    model, root = smollm_and_tokenizer[0], tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(["good", "other"]):
        save_adapter(model, root, name, lora(4, "self_attention.query"), seed, strength=6)
    for name in ("nan", "extra", "missing", "shape", "header", "overflow", "dtype", "code", "not-json", "pickle"):
        shutil.copytree(root / "good", root / name)
    tensors = load_file(root / "good" / TENSORS)
    first = sorted(tensors)[0]
    save_file(tensors | {first: torch.full_like(tensors[first], torch.nan)}, root / "nan" / TENSORS)
    save_file(tensors | {"more": torch.ones(2)}, root / "extra" / TENSORS)
    save_file({k: v for k, v in tensors.items() if k != first}, root / "missing" / TENSORS)
    save_file(tensors | {first: tensors[first][:, :-1].contiguous()}, root / "shape" / TENSORS)
    save_file(tensors | {first: tensors[first].to(torch.complex64)}, root / "dtype" / TENSORS)
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    write_header(root / "header" / TENSORS, {f"t{n}": entry for n in range(100_000)})
    write_header(root / "overflow" / TENSORS, {first: {**entry, "shape": [2**62, 4]}})
    (root / "not-json" / CONFIG).write_text("{")
    config = json.loads((root / "code" / CONFIG).read_text())
    (root / "code" / CONFIG).write_text(json.dumps({**config, "auto_mapping": {"x": "evil.py"}, "peft_type": "EVIL"}))
    (root / "pickle" / TENSORS).unlink()
    (root / "pickle" / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(str(root.parent / "marker"))))
    outside = tmp_path_factory.mktemp("outside")
    shutil.copytree(root / "good", outside / "good")
    (root / "linked").symlink_to(outside / "good")
    return root


def write_header(path: Path, header: dict[str, Any]) -> None:
    data = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data + bytes(4))


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


@pytest.fixture(scope="module")
def engine(smollm_and_tokenizer: tuple[nn.Module, Any], root: Path) -> Iterator[Engine]:
    settings = EngineSettings(
        cells=1500, max_running=2, max_waiting=4, step_tokens=32, policy="vtc", adapters=str(root), max_context=600
    )
    engine = Engine(*smollm_and_tokenizer, settings=settings)
    for name in ("good", "other"):
        engine.store.register(name)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def shared(engine: Engine) -> Iterator[Live]:
    live = Live(engine, key=KEY, admin_key=ADMIN, allow_adapter_updates=True, **LIMITS)
    yield live
    live.engine = engine
    stop_keeping(live)


@pytest.fixture
def live(shared: Live) -> Iterator[Live]:
    yield shared
    shared.idle()  # no test leaves a cell, a request or a stream behind


def stop_keeping(live: Live) -> None:
    """Stop a server and leave its engine usable for another."""
    live.engine.close, close = (lambda: None), live.engine.close  # type: ignore[method-assign]
    live.stop()
    live.engine.close = close  # type: ignore[method-assign]


@pytest.fixture
def admin(live: Live) -> Iterator[httpx.Client]:
    with live.client(ADMIN) as client:
        yield client


def ask(live: Live, prompt: Any = "The capital of France is", tokens: int = 3, **more: Any) -> httpx.Response:
    return live.http.post("/v1/completions", json={**completion(prompt, tokens), **more})


def error(response: httpx.Response) -> dict[str, Any]:
    body = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return body


# ---------------------------------------------------------------------- keys and routes


def test_the_table_holds_every_route(live: Live) -> None:
    found = {(m, r.path) for r in live.app.routes if isinstance(r, APIRoute) for m in r.methods}
    found |= {("GET", r.path) for r in live.app.routes if not isinstance(r, APIRoute)}  # openapi.json
    assert found == {(route.method, route.path) for route in ROUTES}
    assert {route.path for route in ROUTES if route.auth == "public"} == {
        "/health",
        "/ready",
        "/metrics",
        "/openapi.json",
    }
    assert all(route.auth == "admin" for route in ROUTES if "adapters" in route.path)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_no_route_opens_without_its_key(live: Live, route: Any) -> None:
    path = route.path.replace("{id:path}", BASE).replace("{name}", "good")
    wrong = ["", "Bearer ", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", KEY, "Bearer \xe9"]
    with live.client() as client:
        for header in wrong + ([f"Bearer {KEY}"] if route.auth == "admin" else []):
            headers = [("authorization", header.encode("latin-1"))]
            got = client.request(route.method, path, headers=headers, json={})
            if route.auth == "public":
                assert got.status_code == 200
            else:
                assert got.status_code == 401, header
                assert error(got)["code"] == "invalid_api_key"
        assert client.get("/v1/not-in-the-table").status_code == 401
        assert client.get("/v2").status_code == 401
    assert "good" in live.engine.store.names()


def test_adapters_cannot_be_changed_unless_that_was_allowed() -> None:
    with pytest.raises(ConfigError, match="admin-key"):
        ServerSettings(model_name="m", allow_adapter_updates=True)
    from anyadapter.serving.api import create_app
    from anyadapter.serving.loop import EngineLoop

    app = create_app(EngineLoop(lambda: pytest.fail("not needed")), ServerSettings(model_name="m", admin_key=ADMIN))

    async def statuses() -> list[int]:
        headers = {"authorization": f"Bearer {ADMIN}"}
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://x", headers=headers
        ) as client:
            got = [await client.request(r.method, r.path, json={}) for r in ROUTES if r.auth == "admin"]
            unready = [await client.get("/ready"), await client.get("/v1/models")]
            return [response.status_code for response in [*got, *unready]]

    assert asyncio.run(statuses()) == [403, 403, 403, 503, 503]


@pytest.mark.parametrize(
    ("host", "key", "insecure", "fine"),
    [
        ("127.0.0.1", None, False, True),
        ("::1", None, False, True),
        ("localhost", None, False, True),
        ("0.0.0.0", None, False, False),
        ("::", None, False, False),
        ("192.168.0.7", None, False, False),
        ("example.org", None, False, False),
        ("0.0.0.0", "key", False, True),
        ("0.0.0.0", None, True, True),
    ],
)
def test_only_this_machine_without_a_key(host: str, key: str | None, insecure: bool, fine: bool) -> None:
    if fine:
        check_bind(host, key, insecure)
    else:
        with pytest.raises(ConfigError, match="--api-key"):
            check_bind(host, key, insecure)


# ---------------------------------------------------------------------- files and names from elsewhere

HOSTILE = ["..", "../good", "/etc", "good/../../x", "good\x00", "ɡood", "good/", ".hidden", "", "a" * 129, "linked"]


@pytest.mark.parametrize("path", HOSTILE, ids=ascii)
def test_no_path_leads_out_of_the_folder(live: Live, admin: httpx.Client, path: str) -> None:
    got = admin.post("/v1/adapters", json={"name": "new", "path": path})
    assert got.status_code in (400, 403), got.text
    assert admin.put("/v1/adapters/good", json={"path": path}).status_code in (400, 403)
    if path != "linked":
        named = admin.post("/v1/adapters", json={"name": path, "path": "good"})
        assert named.status_code in (400, 403), named.text
    assert live.engine.store.names() == ["good", "other"]


@pytest.mark.parametrize("name", ["..%2fgood", "%2fetc", "good%00", "%2e%2e", "%C9%A1ood", "good%2f"])
def test_no_name_in_an_address_leads_out(live: Live, admin: httpx.Client, name: str) -> None:
    for method in ("PUT", "DELETE"):
        got = admin.request(method, httpx.URL(f"{live.url}/v1/adapters/{name}"), json={"path": "good"})
        assert got.status_code in (400, 401, 404, 405), got.text
    assert live.http.get(httpx.URL(f"{live.url}/v1/models/{name}")).status_code == 404
    assert live.engine.store.names() == ["good", "other"]


@pytest.mark.parametrize(
    "more",
    [
        {"path": "https://example.org/adapter"},
        {"path": "someone/their-adapter"},
        {"source": "hub"},
        {"revision": "main"},
        {"token": "hf_x"},
        {"trust_remote_code": True},
    ],
    ids=str,
)
def test_a_request_cannot_name_another_source(live: Live, admin: httpx.Client, more: dict[str, Any]) -> None:
    assert admin.post("/v1/adapters", json={"name": "new", "path": "good", **more}).status_code == 403
    if "path" not in more:
        assert ask(live, **more).status_code == 403


def test_damaged_and_hostile_files_are_refused_while_others_are_served(
    live: Live, admin: httpx.Client, root: Path
) -> None:
    quiet = ask(live, model="good").json()["choices"]
    names = sorted(path.name for path in root.iterdir() if path.name not in ("good", "other"))
    assert len(names) == 11
    with ThreadPoolExecutor(1) as pool:
        good = pool.submit(lambda: [ask(live, model="good").json()["choices"] for _ in range(4)])
        for name in names:
            got = admin.post("/v1/adapters", json={"name": f"new-{name}", "path": name})
            assert got.status_code == 400, (name, got.text)
            assert str(root) not in got.text, "the message tells where the folder is"
        assert good.result() == [quiet] * 4
    assert not (root.parent / "marker").exists(), "a pickle was executed"
    assert live.engine.store.names() == ["good", "other"]


# ---------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("body", "status", "param", "stated"),
    [
        ({"n": 5}, 400, "n", ["5", "4"]),
        ({"max_tokens": 201}, 400, "max_tokens", ["201", "200"]),
        ({"prompt": ["a"] * 4}, 400, "prompt", ["4", "3"]),
        ({"prompt": [5] * 101}, 400, "prompt", ["101", "100"]),
        ({"prompt": "word " * 101}, 400, "prompt", ["102", "100"]),
        ({"prompt": "x" * 6000}, 413, None, ["5000"]),
        ({"stop": ["a"] * 3}, 400, "stop", ["3", "2"]),
        ({"stop": "a" * 11}, 400, "stop", ["11", "10"]),
        ({"logprobs": 6}, 400, "logprobs", ["6", "5"]),
        ({"adapters": dict.fromkeys("abc", 1.0)}, 400, "adapters", ["3", "2"]),
        ({"prompt": []}, 400, "prompt", ["empty"]),
        ({"prompt": ""}, 400, "prompt", ["empty"]),
        ({"prompt": [10**9]}, 400, "prompt", ["49152"]),
        ({"prompt": [-1]}, 400, "prompt", []),
        ({"temperature": -1}, 400, "temperature", ["0"]),
        ({"top_p": 0}, 400, "top_p", ["0"]),
        ({"seed": 2**63}, 400, "seed", []),
        ({"stop": ""}, 400, None, ["stop"]),
        ({"adapters": {"good": 1e9}}, 400, "adapters", ["100"]),
        ({"best_of": 2}, 400, "best_of", ["not supported"]),
        ({"echo": True, "logprobs": 1}, 400, "echo", []),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", []),
        ({"model": "x" * 300}, 400, "model", ["256"]),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_one_over_the_limit(
    live: Live, body: dict[str, Any], status: int, param: str | None, stated: list[str]
) -> None:
    got = ask(live, **body)
    assert got.status_code == status, got.text
    told = error(got)
    assert told["param"] == param
    assert all(word in told["message"] for word in stated), told["message"]


def test_bodies_that_are_no_requests(live: Live) -> None:
    begin = b'{"model": "smollm2", "prompt": "a", '
    bodies = [b"", b"{", b"[]", b"null", b"\xff", b"[" * 4000, b'{"model": "\\ud800", "prompt": "a"}']
    bodies += [b'{"model": "smollm2", "prompt": "\\ud800"}', begin + b'"seed": 1' + b"0" * 4500 + b"}"]
    bodies += [begin + b'"temperature": NaN}', begin + b'"temperature": 1e999}', begin + b'"\\ud800": 1}']
    bodies += [begin + b",".join(b'"k%d": 0' % n for n in range(400)) + b"}"]
    for body in bodies:
        got = live.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert got.status_code == 400, (body[:50], got.text)
        error(got)
    plain = live.http.post("/v1/completions", content=json.dumps(completion()), headers={"content-type": "text/plain"})
    assert plain.status_code == 400, "a web page could send this without asking"


def raw(live: Live, body: bytes, length: int | None = None, path: str = "/v1/completions") -> socket.socket:
    """A connection on which a request was sent."""
    connection = socket.create_connection(("127.0.0.1", live.port))
    connection.settimeout(20)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"
    size = f"content-length: {len(body) if length is None else length}\r\n\r\n" if length != -1 else ""
    connection.sendall(head.encode() + size.encode() + body)
    return connection


def test_a_body_without_a_length_is_limited_too_and_a_slow_one_is_given_up(live: Live) -> None:
    chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    with raw(live, b"transfer-encoding: chunked\r\n\r\n" + chunk * 2, -1) as connection:
        assert b" 413 " in connection.recv(200)
    start = time.perf_counter()
    with raw(live, b"{", 100) as connection:
        assert b" 408 " in connection.recv(200)
    assert time.perf_counter() - start < 5


def test_an_unknown_adapter_is_never_the_base(live: Live, admin: httpx.Client) -> None:
    for body in ({"model": "goood"}, {"adapters": {"goood": 1.0}}, {"model": "Good"}, {"model": f"{BASE} "}):
        got = ask(live, **body)
        assert got.status_code == 404, got.text
        assert error(got)["code"] == "model_not_found"
    assert "'good'" in error(ask(live, model="goood"))["message"]


# ---------------------------------------------------------------------- load, cancellation, neighbours


def test_a_full_queue_answers_at_once_and_says_when_to_come_back(live: Live) -> None:
    with ThreadPoolExecutor(20) as pool:
        answers = [f.result() for f in [pool.submit(ask, live, tokens=4) for _ in range(20)]]
    busy = [got for got in answers if got.status_code == 429]
    fine = [got for got in answers if got.status_code == 200]
    assert len(busy) + len(fine) == 20
    assert busy
    assert len(fine) >= 4
    assert all(int(got.headers["retry-after"]) >= 1 and error(got)["type"] == "rate_limit_error" for got in busy)
    assert len({got.json()["choices"][0]["text"] for got in fine}) == 1
    assert ask(live, n=4).status_code == 200
    live.idle()
    too_many = ask(live, ["a", "b"], n=4)
    assert too_many.status_code == 429, "more sequences than may wait were taken, or only some of them"
    assert live.in_engine(live.engine.stats)["waiting"] == 0


def test_one_adapter_that_floods_does_not_starve_another(live: Live) -> None:
    done: list[str] = []

    def work(model: str) -> None:
        assert ask(live, tokens=6, model=model).status_code == 200
        done.append(model)

    with ThreadPoolExecutor(6) as pool:
        flood = [pool.submit(work, "good") for _ in range(5)]
        live.until(lambda: live.loop.stats["waiting"] >= 3)
        flood.append(pool.submit(work, "other"))
        for future in flood:
            future.result()
    assert done.index("other") <= 2, done


def holding(live: Live, state: str) -> int:
    return int(live.in_engine(live.engine.stats)[state])


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_everything(live: Live, stream: bool) -> None:
    """In the queue, in the middle of its prompt, and while it generates."""
    body = json.dumps({**completion([7] * 90, 200), "stream": stream, "model": "good"}).encode()
    connections = [raw(live, body) for _ in range(4)]
    live.until(lambda: holding(live, "running") == 2 and holding(live, "waiting") == 2)
    connections.pop().close()  # in the queue, most likely
    live.until(lambda: holding(live, "running") + holding(live, "waiting") == 3)
    for connection in connections:
        connection.close()
    steps = holding(live, "steps")
    live.until(lambda: holding(live, "running") + holding(live, "waiting") == 0)
    assert holding(live, "steps") - steps < 60, "they went on for long"
    assert holding(live, "cells_sequences") == 0


def test_cancelled_within_one_step(live: Live) -> None:
    with live.http.stream("POST", "/v1/completions", json=completion(tokens=200, stream=True)) as response:
        next(response.iter_lines())
        (stream,) = set(live.loop.streams.values())

        def cancel() -> int:
            stream.cancel()
            return int(live.loop.stats["steps"])

        asyncio.run_coroutine_threadsafe(asyncio.to_thread(lambda: None), live.loop.aio).result()
        live.loop.aio.call_soon_threadsafe(cancel)
        live.until(lambda: not live.loop.streams)
        assert holding(live, "running") == 0, "it still ran at the next command"


def test_a_slow_reader_holds_up_nobody(live: Live) -> None:
    body = json.dumps({**completion(tokens=60, n=2, logprobs=5), "stream": True}).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(("127.0.0.1", live.port))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
    connection.sendall(f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    live.until(lambda: holding(live, "running") == 2)
    assert ask(live).status_code == 200
    live.until(lambda: holding(live, "running") == 0)  # it was computed to its end although nobody reads
    connection.settimeout(20)
    got = b""
    while b"[DONE]" not in got:
        part = connection.recv(65536)
        assert part, "the stream was cut"
        got += part
    connection.close()
    events = [json.loads(line[6:]) for line in got.split(b"\n") if line.startswith(b"data: {")]
    tokens = [len(e["choices"][0]["logprobs"]["tokens"]) for e in events]
    assert sum(tokens) == 120


def test_a_step_that_fails_ends_its_requests_only(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = ask(live, model="good").json()["choices"]
    real, failing = live.engine.forward, [True]

    def forward(pieces: Any) -> Any:
        logits = real(pieces)
        if failing and any(s.request.adapters.get("other") for s, _ in pieces):
            failing.pop()
            raise RuntimeError("secret words of a user")
        return logits

    monkeypatch.setattr(live.engine, "forward", forward)
    with ThreadPoolExecutor(3) as pool:
        bad = pool.submit(ask, live, model="other")
        live.until(lambda: not failing)
        good = [pool.submit(ask, live, model="good") for _ in range(2)]
        assert bad.result().status_code == 500
        assert error(bad.result())["type"] == "server_error"
        assert "secret" not in bad.result().text
        assert all(f.result().json()["choices"] == quiet for f in good)
    assert live.http.get("/ready").status_code == 200
    assert ask(live, model="other").status_code == 200


def test_numbers_that_are_not_finite_end_one_request(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = ask(live, model="good").json()["choices"]
    real = live.engine.forward

    def forward(pieces: Any) -> Any:
        logits = real(pieces)
        for row, (sequence, _) in enumerate(pieces):
            if sequence.request.adapters.get("other"):
                logits[row, 17] = torch.nan
        return logits

    monkeypatch.setattr(live.engine, "forward", forward)
    with ThreadPoolExecutor(2) as pool:
        good, bad = pool.submit(ask, live, model="good"), pool.submit(ask, live, model="other")
        assert (bad.result().status_code, good.result().json()["choices"]) == (500, quiet)


def test_an_adapter_deleted_while_in_use_and_a_name_reused(live: Live, admin: httpx.Client) -> None:
    good, other = (ask(live, tokens=12, model=name).json()["choices"][0]["text"] for name in ("good", "other"))
    assert good != other
    assert admin.post("/v1/adapters", json={"name": "mine", "path": "good"}).status_code == 201
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, live, tokens=12, model="mine")
        live.until(lambda: holding(live, "running") == 1)
        assert admin.delete("/v1/adapters/mine").status_code == 200
        assert ask(live, model="mine").status_code == 404
        assert admin.post("/v1/adapters", json={"name": "mine", "path": "other"}).status_code == 201
        assert ask(live, tokens=12, model="mine").json()["choices"][0]["text"] == other
        assert running.result().json()["choices"][0]["text"] == good
    assert admin.delete("/v1/adapters/mine").status_code == 200


def test_an_adapter_that_breaks_after_it_was_loaded(live: Live, admin: httpx.Client, root: Path) -> None:
    shutil.copytree(root / "good", root / "fragile")
    assert admin.post("/v1/adapters", json={"name": "fragile", "path": "fragile"}).status_code == 201
    (root / "fragile" / TENSORS).write_bytes(b"nothing")
    with ThreadPoolExecutor(2) as pool:
        good, bad = pool.submit(ask, live, model="good"), pool.submit(ask, live, model="fragile")
        assert (good.result().status_code, bad.result().status_code) == (200, 500)
    assert "load it again" in error(bad.result())["message"]
    assert str(root) not in bad.result().text
    assert admin.delete("/v1/adapters/fragile").status_code == 200
    shutil.rmtree(root / "fragile")


# ---------------------------------------------------------------------- leaks


def test_logs_metrics_and_errors_hold_no_prompts_answers_or_keys(
    live: Live, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "xylophone-in-the-cellar"
    with caplog.at_level(logging.DEBUG):
        whole = ask(live, secret, tokens=8)
        answer = whole.json()["choices"][0]["text"].strip()
        ask(live, secret, tokens=8, stream=True)
        texts = [ask(live, [secret], temperature=secret).text, ask(live, secret, n=99).text]
        texts.append(live.http.post("/v1/completions", content=f'{{"{secret}": '.encode()).text)
        live.http.get(f"/v1/{secret}?key={secret}")
        monkeypatch.setattr(live.engine, "submit", lambda _: raising(secret))
        texts.append(ask(live, secret).text)
        live.until(lambda: sum('"event": "request"' in r.getMessage() for r in caplog.records) >= 7)
    mine = [r for r in caplog.records if r.name.startswith(("anyadapter", "uvicorn", "asyncio", "fastapi"))]
    logged = "\n".join(f"{record.getMessage()} {record.exc_text or ''} {record.exc_info or ''}" for record in mine)
    for hidden in (secret, KEY, ADMIN, answer):
        assert hidden
        assert hidden not in logged
        assert hidden not in live.http.get("/metrics").text
    assert all(secret not in text for text in texts[:2] + texts[3:])
    line = next(json.loads(r.getMessage()) for r in caplog.records if '"event": "request"' in r.getMessage())
    assert line["request"] == whole.headers["x-request-id"]
    assert (line["route"], line["status"], line["adapter"]) == ("/v1/completions", 200, BASE)
    assert (line["output_tokens"], line["finish"]) == (8, "length")
    assert line["ms"] >= line["first_token_ms"] > 0


def raising(text: str) -> None:
    raise KeyError(text)


def test_a_request_id_is_taken_over_only_if_it_is_harmless(live: Live) -> None:
    assert live.http.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert live.http.get("/health", headers={"x-request-id": 'a"} {"x'}).headers["x-request-id"].isalnum()


def test_five_thousand_adapters_give_a_bounded_number_of_series() -> None:
    metrics = Metrics(dict)
    for n in range(5000):
        label = metrics.label(BASE, [f"adapter-{n}"])
        metrics.first.labels(label).observe(0.1)
        metrics.requests.labels(label, "stop").inc()
    text = metrics.text().decode()
    assert text.count("anyadapter_requests_total{") == LABELS + 1
    assert 'anyadapter_requests_total{adapter="(other)",reason="stop"} 4900.0' in text
    assert metrics.label(BASE, ["a", "b"]) in ("(several)", "(other)")


def test_unknown_routes_and_models_make_no_series(live: Live) -> None:
    for n in range(20):
        live.http.get(f"/v1/nothing-{n}")
        ask(live, model=f"nobody-{n}")
    text = live.http.get("/metrics").text
    assert "nothing-1" not in text
    assert "nobody-1" not in text


# ---------------------------------------------------------------------- the end (these servers are the last)


def second(engine: Engine, **settings: Any) -> Live:
    return Live(engine, key=KEY, **settings)


def test_what_the_drain_cannot_wait_for_ends_with_an_error(shared: Live, engine: Engine) -> None:
    stop_keeping(shared)
    live = second(engine, drain_seconds=0.5)
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(ask, live, tokens=500)
        with live.http.stream("POST", "/v1/completions", json=completion(tokens=500, stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            live.process.handle_exit(15, None)
            rest = [line for line in lines if line]
        assert "shutting down" in json.loads(rest[-1][6:])["error"]["message"]
        assert whole.result().status_code == 503, "an answer was cut and called whole"
        assert "shutting down" in error(whole.result())["message"]
    engine.close, close = (lambda: None), engine.close  # type: ignore[method-assign]
    live.thread.join(20)
    engine.close = close  # type: ignore[method-assign]
    assert not live.thread.is_alive()
    assert not engine.has_work
    engine.check_integrity()


def test_an_engine_that_keeps_failing_is_not_ready(
    shared: Live, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = second(engine)
    monkeypatch.setattr(engine, "forward", lambda pieces: raising("always"))
    assert [ask(live).status_code for _ in range(3)] == [500, 500, 500]
    live.until(lambda: live.http.get("/ready").status_code == 503)
    assert live.http.get("/health").status_code == 503
    assert ask(live).status_code == 503
    stop_keeping(live)


def test_an_engine_that_cannot_be_made_is_not_ready_and_says_so() -> None:
    from anyadapter.serving.loop import EngineLoop, NotReadyError

    def make() -> Engine:
        raise ConfigError("no such base")

    async def run() -> None:
        told = asyncio.Event()
        loop = EngineLoop(make, on_failure=told.set)
        loop.start()
        await asyncio.wait_for(told.wait(), 5)
        assert isinstance(loop.error, ConfigError)
        with pytest.raises(NotReadyError, match="failed"):
            loop.check()
        await loop.close()

    asyncio.run(run())
    assert Output("x").finish is None
