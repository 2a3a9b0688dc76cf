"""The server under load and in trouble: full queues, clients that leave or read slowly, bad neighbours, and its end."""

from __future__ import annotations

import asyncio
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from live import KEY, Live, ask, completion, error, raising, raw, stop_keeping

from anyadapter.core.errors import ConfigError
from anyadapter.serving.engine import Engine
from anyadapter.serving.loop import EngineLoop, NotReadyError

# ---------------------------------------------------------------------- load, cancellation, neighbours


def test_ten_times_the_load_is_refused_at_once_and_what_is_taken_is_answered_as_ever(live: Live) -> None:
    """Six may be in hand; sixty come."""
    quiet = {name: ask(live, tokens=4, model=name).json()["choices"] for name in ("good", "other")}
    names = ["good", "other"] * 30
    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(lambda name: ask(live, tokens=4, model=name), names))
    busy = [got for got in answers if got.status_code == 429]
    fine = [(name, got) for name, got in zip(names, answers) if got.status_code == 200]
    assert len(busy) + len(fine) == 60
    assert busy
    assert len(fine) >= 4  # as many as may wait; those that run make room for more
    assert all(int(got.headers["retry-after"]) >= 1 and error(got)["type"] == "rate_limit_error" for got in busy)
    assert all(got.json()["choices"] == quiet[name] for name, got in fine)
    assert ask(live, n=4).status_code == 200
    live.idle()
    too_many = ask(live, ["a", "b"], n=4)
    assert too_many.status_code == 400, "more sequences than may ever wait: to come back later is no help"
    assert "retry-after" not in too_many.headers
    assert error(too_many)["param"] == "n"
    assert live.in_engine(live.engine.stats)["waiting"] == 0


def test_one_adapter_that_floods_does_not_starve_another(live: Live) -> None:
    done: list[str] = []

    def work(model: str, tokens: int) -> None:
        assert ask(live, tokens=tokens, model=model).status_code == 200  # long beside what it takes to ask
        done.append(model)

    with ThreadPoolExecutor(6) as pool:
        flood = [pool.submit(work, "good", 30) for _ in range(4)]
        live.until(lambda: (live.loop.stats["running"], live.loop.stats["waiting"]) == (2, 2))
        flood.append(pool.submit(work, "other", 20))  # shorter: what begins together must not end together
        for future in flood:
            future.result()
    assert done.index("other") <= 2, done


def holding(live: Live, state: str) -> int:
    return int(live.in_engine(live.engine.stats)[state])


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_everything(live: Live, stream: bool) -> None:
    """In the queue, in the middle of its prompt, and while it generates; who stays is answered as ever."""
    quiet = ask(live, tokens=30, model="other").json()["choices"]
    body = json.dumps({**completion([7] * 90, 200), "stream": stream, "model": "good"}).encode()
    with ThreadPoolExecutor(1) as pool:
        neighbour = pool.submit(ask, live, tokens=30, model="other")
        live.until(lambda: holding(live, "running") == 1)
        in_its_prompt = raw(live, body)  # 90 tokens, of which a pass takes 31
        live.until(lambda: holding(live, "running") == 2)
        in_its_prompt.close()
        live.until(lambda: holding(live, "running") < 2)
        assert neighbour.result().json()["choices"] == quiet
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


def test_a_cancelled_request_takes_part_in_no_further_step(live: Live) -> None:
    with live.http.stream("POST", "/v1/completions", json=completion(tokens=200, stream=True)) as response:
        lines = response.iter_lines()
        next(lines)
        (stream,) = set(live.loop.streams.values())
        live.loop.aio.call_soon_threadsafe(stream.cancel)
        live.until(lambda: not live.loop.streams)
        assert holding(live, "running") == 0, "it was still there at the next command"
        assert len([line for line in lines if line]) < 200


def test_a_slow_reader_holds_up_nobody_and_its_outputs_are_joined(live: Live) -> None:
    """A connection that takes one message and then none until all is computed."""
    quiet = ask(live, model="good").json()["choices"]
    go, sent = asyncio.Event(), []
    body = json.dumps(completion(tokens=12, stream=True, logprobs=1)).encode()
    headers = [(b"content-type", b"application/json"), (b"authorization", f"Bearer {KEY}".encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    messages = [{"type": "http.request", "body": body}]

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) > 1:
            await go.wait()

    reading = asyncio.run_coroutine_threadsafe(live.app(scope, receive, send), live.loop.aio)
    live.until(lambda: holding(live, "running") == 1)
    assert ask(live, model="good").json()["choices"] == quiet
    live.until(lambda: holding(live, "running") == 0)
    assert len(sent) == 2, "it was read on"
    live.loop.aio.call_soon_threadsafe(go.set)
    reading.result(20)
    lines = b"".join(message.get("body", b"") for message in sent).split(b"\n\n")
    events = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith(b"data: {")]
    assert len(events) == 2, "what nobody had read was not joined"
    assert sum(len(event["logprobs"]["tokens"]) for event in events) == 12
    assert events[-1]["finish_reason"] == "length"
    assert "".join(event["text"] for event in events) == ask(live, tokens=12).json()["choices"][0]["text"]


def test_a_step_that_fails_ends_its_requests_only(
    live: Live, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
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
    assert "RuntimeError at test_api_load.py" in caplog.text
    assert "secret" not in caplog.text
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
    good, other = (ask(live, tokens=8, model=name).json()["choices"][0]["text"] for name in ("good", "other"))
    assert good != other
    assert admin.post("/v1/adapters", json={"name": "mine", "path": "good"}).status_code == 201
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, live, tokens=8, model="mine")
        live.until(lambda: holding(live, "running") == 1)
        assert admin.delete("/v1/adapters/mine").status_code == 200
        assert ask(live, model="mine").status_code == 404
        assert admin.post("/v1/adapters", json={"name": "mine", "path": "other"}).status_code == 201
        assert ask(live, tokens=8, model="mine").json()["choices"][0]["text"] == other
        assert running.result().json()["choices"][0]["text"] == good
    assert admin.delete("/v1/adapters/mine").status_code == 200


def test_an_adapter_that_breaks_after_it_was_loaded(live: Live, admin: httpx.Client, root: Path) -> None:
    shutil.copytree(root / "good", root / "fragile")
    assert admin.post("/v1/adapters", json={"name": "fragile", "path": "fragile"}).status_code == 201
    (root / "fragile" / "adapter_model.safetensors").write_bytes(b"nothing")
    with ThreadPoolExecutor(2) as pool:
        good, bad = pool.submit(ask, live, model="good"), pool.submit(ask, live, model="fragile")
        assert (good.result().status_code, bad.result().status_code) == (200, 500)
    assert "load it again" in error(bad.result())["message"]
    assert str(root) not in bad.result().text
    assert admin.delete("/v1/adapters/fragile").status_code == 200
    shutil.rmtree(root / "fragile")


def test_an_adapter_that_was_never_read_and_cannot_be(live: Live) -> None:
    """As those found at the start: each request for it fails, beside a good one too, and no other one does."""
    live.in_engine(lambda: live.engine.store.register("late", check=False))
    quiet = ask(live, model="good").json()["choices"]
    with ThreadPoolExecutor(1) as pool:
        good = pool.submit(lambda: [ask(live, model="good", tokens=3).json()["choices"] for _ in range(4)])
        for adapters in ({"good": 1.0, "late": 1.0}, {"late": 1.0}) * 2:
            bad = ask(live, adapters=adapters)
            assert bad.status_code == 500
            assert "'late' cannot be read" in error(bad)["message"]
        assert good.result() == [quiet] * 4
    live.in_engine(lambda: live.engine.store.unload("late"))
    live.idle()
    assert live.http.get("/ready").status_code == 200


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


@pytest.mark.parametrize(("server", "own"), [(0.3, {}), (60.0, {"first_token_seconds": 0.3})])
def test_a_request_that_waits_too_long_for_its_first_token_is_given_up(
    shared: Live, engine: Engine, server: float, own: dict[str, float]
) -> None:
    live = second(engine, first_token_seconds=server)
    long = json.dumps(completion(tokens=400)).encode()
    connections = [raw(live, long) for _ in range(2)]
    live.until(lambda: holding(live, "running") == 2)
    for stream in (False, True):
        late = ask(live, stream=stream, **own)
        assert (late.status_code, late.headers["retry-after"]) == (503, "1")
    for connection in connections:
        connection.close()
    live.until(lambda: holding(live, "running") == 0)
    stop_keeping(live)


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
