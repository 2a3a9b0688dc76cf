"""What the server must never do: keys, files and names from elsewhere, limits, leaks. One test or more for each rule."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from live import ADMIN, BASE, KEY, Live, ask, completion, error, raising, raw

from anyadapter.core.errors import ConfigError
from anyadapter.serving.gate import ROUTES, ServerSettings
from anyadapter.serving.metrics import LABELS, Metrics
from anyadapter.serving.server import check_bind

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
    wrong = ["", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", KEY, "Bearer \xe9"]
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

    assert asyncio.run(statuses()) == [403, 403, 403, 403, 503, 503]


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
    assert len(names) == 20
    stated = {
        "overlap": "overlaps the one before",
        "late": "SafetensorError",
        "base-text": "malformed",
        "base-other": "has other values than this one's",
        "scale": "not a finite number",
        "large": "1600 cells of the pool, which has room for 1499",
        "linked-file": "leads out of the folder",
    }
    with ThreadPoolExecutor(1) as pool:
        good = pool.submit(lambda: [ask(live, model="good").json()["choices"] for _ in range(4)])
        for name in names:
            got = admin.post("/v1/adapters", json={"name": f"new-{name}", "path": name})
            assert got.status_code == 400, (name, got.text)
            assert str(root) not in got.text, "the message tells where the folder is"
            assert stated.get(name, "") in error(got)["message"], (name, got.text)
            assert admin.put("/v1/adapters/good", json={"path": name}).status_code == 400
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
