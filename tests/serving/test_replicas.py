"""Replicas: who serves what, and that a replica's death loses nothing that can be repeated."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from served import lora, save_adapter
from starlette.applications import Starlette
from starlette.routing import Route
from tiny import save_base

from anyadapter.core.errors import ConfigError
from anyadapter.serving.engine import Engine, EngineSettings
from anyadapter.serving.gate import ServerSettings
from anyadapter.serving.loop import EngineLoop
from anyadapter.serving.replicas import Front, Head, Inside, Message, deploy
from anyadapter.serving.router import Router, RouterSettings

ADMIN = "admin-key"
NAMES = [f"replica-{i}" for i in range(8)]
ADAPTERS = [f"adapter-{i}" for i in range(2000)]


# -------------------------------------------------------------------------- the router


def test_an_adapter_has_its_replica_and_a_lost_replica_moves_only_its_own() -> None:
    router = Router(NAMES)
    homes = {adapter: router.choose(adapter) for adapter in ADAPTERS}
    shares = Counter(homes.values())
    assert set(shares) == set(NAMES)
    assert max(shares.values()) < 1.25 * len(ADAPTERS) / len(NAMES)
    assert homes == {adapter: Router(reversed(NAMES)).choose(adapter) for adapter in ADAPTERS}, "wherever it is asked"
    router.remove("replica-3")
    after = {adapter: router.choose(adapter) for adapter in ADAPTERS}
    assert {a for a in ADAPTERS if homes[a] != after[a]} == {a for a in ADAPTERS if homes[a] == "replica-3"}
    router.add("replica-3")
    assert {adapter: router.choose(adapter) for adapter in ADAPTERS} == homes


def test_a_hot_adapter_spreads_over_its_next_replicas_and_no_further() -> None:
    router = Router(NAMES, RouterSettings(slack=1.25, unloaded=4))
    where: list[Any] = []
    for _ in range(64):
        where.append(router.choose("hot"))
        router.begin(where[-1])
        router.served(where[-1], "hot")
    loads = [replica.load for replica in router.replicas.values()]
    assert sum(loads) == 64
    assert max(loads) <= -(-1.25 * 64 // 8), "nobody has more than the bound"
    assert where[:4] == [router.order("hot")[0]] * 4, "below it, no other is used"
    assert list(dict.fromkeys(where)) == list(router.order("hot"))[: len(set(where))], "in the adapter's own order"
    assert router.misses == len(set(where))
    assert router.stats()["hit_rate"] == 1 - len(set(where)) / 64


def test_the_base_goes_to_the_least_loaded_and_nothing_to_those_that_are_down() -> None:
    router = Router(["a", "b", "c"])
    for name, load in (("a", 3), ("b", 1), ("c", 2)):
        for _ in range(load):
            router.begin(name)
    assert router.choose(None) == "b"
    router.end("a")
    router.rest("b")
    assert router.choose(None) in ("a", "c")
    assert {router.choose(adapter) for adapter in ADAPTERS} == {"a", "c"}
    assert router.choose(None, without=["a", "c"]) is None
    router.back("b")
    assert {router.choose(adapter) for adapter in ADAPTERS} == {"a", "b", "c"}


def test_what_a_dead_replica_held_is_forgotten() -> None:
    router = Router(["a"], RouterSettings(remember=2))
    for adapter in ("x", "y", "x", "z", "y"):  # z pushes y out
        router.served("a", adapter)
    assert (router.hits, router.misses) == (1, 4)
    router.fail("a")
    router.back("a")
    router.served("a", "y")
    assert (router.hits, router.misses, router.failures) == (1, 5, 1)


@pytest.mark.parametrize("settings", [{"slack": 0.9}, {"slack": float("nan")}, {"tries": 0}, {"probe": 0.0}])
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        RouterSettings(**settings)


# -------------------------------------------------------------------------- the front


class Scripted:
    """A replica that plays a scene for each request: pieces to send, or an error to raise."""

    def __init__(self, *scene: Any) -> None:
        self.scene = scene
        self.asked: list[Message] = []
        self.ready = self.closed = False

    async def ask(self, message: Message) -> AsyncIterator[Head | bytes]:
        if message.path == "/ready":
            yield Head(200 if self.ready else 503, [])
            return
        self.asked.append(message)
        try:
            for piece in self.scene:
                if isinstance(piece, Exception):
                    raise piece
                if isinstance(piece, asyncio.Event):
                    await piece.wait()
                    continue
                yield piece
        finally:
            self.closed = True


OK = (Head(200, [("content-type", "application/json"), ("x-request-id", "7")]), b'{"a":', b"1}")
DEAD = ConnectionError("gone")
FULL = (Head(429, [("retry-after", "3")]), b'{"error":{}}')


def front(**replicas: Any) -> Front:
    return Front(replicas, model_name="base", max_body=1000, settings=RouterSettings(probe=0.01))


def client(front: Front) -> httpx.AsyncClient:
    app = Starlette(routes=[Route("/{path:path}", front.answer, methods=["GET", "POST", "PUT", "DELETE"])])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front")


def ask(front: Front, **more: Any) -> httpx.Response:
    async def work() -> httpx.Response:
        async with client(front) as http:
            return await http.post("/v1/completions", json={"model": "base", "prompt": "x", **more})

    return asyncio.run(work())


@pytest.mark.parametrize("scene", [(DEAD,), (OK[0], DEAD), (OK[0], OK[1], DEAD)])
def test_an_answer_that_is_not_streamed_is_repeated_whenever_its_replica_died(scene: Any) -> None:
    both = front(a=Scripted(*scene), b=Scripted(*OK))
    answer = ask(both)
    assert (answer.status_code, answer.json()) == (200, {"a": 1})
    assert answer.headers["x-request-id"] == "7"
    assert both.router.failures == 1
    assert {replica.load for replica in both.router.replicas.values()} == {0}


def test_a_stream_is_repeated_up_to_its_first_piece() -> None:
    both = front(a=Scripted(OK[0], DEAD), b=Scripted(Head(200, []), b"data: 1\n\n", b"data: [DONE]\n\n"))
    assert ask(both, stream=True).text == "data: 1\n\ndata: [DONE]\n\n"
    broken = front(a=Scripted(Head(200, []), b"data: 1\n\n", DEAD), b=Scripted(*OK))
    text = ask(broken, stream=True).text
    assert text.startswith("data: 1\n\n"), "one token was delivered: another replica might go on differently"
    assert "Send it again" in text
    assert "[DONE]" not in text
    assert broken.replicas["b"].asked == []
    assert broken.router.replicas["a"].load == 0


def test_a_full_replica_is_passed_over_and_a_full_cluster_says_so() -> None:
    assert ask(front(a=Scripted(*FULL), b=Scripted(*OK))).status_code == 200
    answer = ask(front(a=Scripted(*FULL), b=Scripted(*FULL)))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")


@pytest.mark.parametrize("ready", [False, True])
def test_a_replica_that_refuses_is_down_only_if_it_says_so(ready: bool) -> None:
    """Where no token came in time for one request, it serves others."""
    late = Scripted(Head(503, []), b"late")
    late.ready = ready
    both = front(a=late, b=Scripted(*OK))
    assert ask(both).status_code == 200
    assert both.router.replicas["a"].down is not ready


def test_a_request_that_kills_replicas_does_not_kill_them_all() -> None:
    replicas = {name: Scripted(DEAD) for name in "abcd"}
    answer = ask(front(**replicas))
    assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
    assert sum(len(replica.asked) for replica in replicas.values()) == 2


def test_a_replica_that_died_is_asked_again_when_it_is_ready() -> None:
    async def work() -> None:
        both = front(a=Scripted(DEAD), b=Scripted(*OK))
        dead: Any = both.replicas["a"]
        async with client(both) as http:
            for _ in range(3):
                assert (await http.post("/v1/completions", json={"model": "base"})).status_code == 200
            assert len(dead.asked) == 1
            assert (await http.get("/cluster")).json()["down"] == ["a"]
            dead.ready, dead.scene = True, OK
            while both.router.replicas["a"].down:
                await asyncio.sleep(0.01)
            await http.post("/v1/completions", json={"model": "base"})
        assert len(dead.asked) == 2
        assert both.probes == {}

    asyncio.run(work())


def test_changes_of_adapters_go_to_all_and_the_worst_answer_is_given() -> None:
    made = (Head(200, []), b'{"id": "x", "deleted": true}')
    all = front(a=Scripted(*made), b=Scripted(Head(404, []), b"no"), c=Scripted(*made))

    async def work() -> int:
        async with client(all) as http:
            return (await http.delete("/v1/adapters/x")).status_code

    assert asyncio.run(work()) == 404
    assert [len(replica.asked) for replica in all.replicas.values()] == [1, 1, 1]
    assert all.changes == {"x": None}


def test_a_change_that_no_replica_can_make_now_is_refused() -> None:
    async def work() -> httpx.Response:
        async with client(front(a=Scripted(DEAD), b=Scripted(Head(503, []), b"loading"))) as http:
            return await http.delete("/v1/adapters/x")

    answer = asyncio.run(work())
    assert (answer.status_code, "retry-after" in answer.headers) == (503, True)


def test_bodies_are_bounded_and_need_not_make_sense() -> None:
    replica = Scripted(*OK)
    both = front(a=replica)

    async def work() -> list[int]:
        async with client(both) as http:
            bodies = [b"x" * 1001, b"{", b"[]", b'{"model": 3}', b'{"model": null, "adapters": 7}', b"[" * 1000]
            return [(await http.post("/v1/completions", content=body)).status_code for body in bodies]

    assert asyncio.run(work()) == [413, *[200] * 5], "what is wrong with them, a replica says"
    assert len(replica.asked) == 5


def test_a_client_that_goes_away_is_noticed_by_the_replica() -> None:
    async def work() -> Scripted:
        replica = Scripted(Head(200, []), b"data: 1\n\n", asyncio.Event())
        answer = await front(a=replica).somewhere(Message("POST", "/v1/completions", "", [], b'{"stream": true}'))
        body = answer.body_iterator  # type: ignore[attr-defined]
        assert await body.__anext__() == b"data: 1\n\n"
        await body.aclose()
        return replica

    assert asyncio.run(work()).closed


# -------------------------------------------------------------------------- with engines


def make_engine(root: Path) -> Engine:
    from anyadapter.training.base import load_base

    torch.set_num_threads(1)
    model, tokenizer = load_base(str(root / "base"))
    settings = EngineSettings(cells=600, max_running=4, step_tokens=16, adapters=str(root / "adapters"))
    engine = Engine(model, tokenizer, settings=settings)
    engine.store.scan()
    return engine


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaForCausalLM

    root = tmp_path_factory.mktemp("cluster")
    save_base(root / "base")
    model = LlamaForCausalLM.from_pretrained(root / "base")
    for seed in range(6):
        save_adapter(model, root / "adapters", f"a{seed}", lora(4 + seed), seed, strength=10.0)
    return root


def bodies(count: int, tokens: int = 12) -> list[dict[str, Any]]:
    common = {"prompt": "What colour is the cat", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    models = ["base", "base", *(f"a{i % 6}" for i in range(12))]
    return [{**common, "model": models[i % 14]} for i in range(count)]


class Mortal(Inside):
    """An application that can be killed with all that it is doing, and started again."""

    def __init__(self, root: Path) -> None:
        self.root, self.loops = root, list[EngineLoop]()
        self.death = asyncio.Event()
        self.answered = 0

    async def start(self) -> None:
        """Begin, with all that is in the folder of adapters."""
        from anyadapter.serving.api import create_app

        loop = EngineLoop(partial(make_engine, self.root))
        self.loops.append(loop)
        settings = ServerSettings(model_name="base", admin_key=ADMIN, allow_adapter_updates=True)
        super().__init__(create_app(loop, settings))
        loop.start()
        await loop.loaded.wait()
        self.death.clear()

    async def ask(self, message: Message) -> AsyncIterator[Head | bytes]:
        pieces = super().ask(message)
        try:
            while True:
                following = asyncio.ensure_future(pieces.__anext__())
                death = asyncio.ensure_future(self.death.wait())
                await asyncio.wait({following, death}, return_when=asyncio.FIRST_COMPLETED)
                death.cancel()
                if self.death.is_set():
                    following.cancel()
                    await asyncio.gather(following, return_exceptions=True)
                    raise DEAD
                piece = following.result()
                yield replace(piece, born=str(len(self.loops))) if isinstance(piece, Head) else piece
        except StopAsyncIteration:
            self.answered += 1
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]


async def with_engines(root: Path, work: Callable[[Front, httpx.AsyncClient], Awaitable[Any]]) -> Any:
    replicas = {f"replica-{i}": Mortal(root) for i in range(2)}
    for replica in replicas.values():
        await replica.start()
    both = Front(replicas, model_name="base", settings=RouterSettings(probe=0.05, unloaded=3))
    try:
        async with client(both) as http:
            http.timeout = httpx.Timeout(60)
            return await work(both, http)
    finally:
        for replica in replicas.values():
            for loop in replica.loops:
                await loop.close()


def texts(answers: list[httpx.Response]) -> list[str]:
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    return [answer.json()["choices"][0]["text"] for answer in answers]


def test_killing_one_of_two_loses_no_request(root: Path) -> None:
    """And each says what it says in quiet."""

    async def work(both: Front, http: httpx.AsyncClient) -> None:
        quiet = texts([await http.post("/v1/completions", json=body) for body in bodies(14)])
        assert len(set(quiet)) > 4, "the adapters differ"
        calls = [asyncio.ensure_future(http.post("/v1/completions", json=body)) for body in bodies(28)]
        victim: Any = both.replicas["replica-0"]
        while both.router.replicas["replica-0"].load < 5:
            await asyncio.sleep(0.001)
        hit = both.router.replicas["replica-0"].load
        victim.death.set()
        assert texts(await asyncio.gather(*calls)) == [*quiet, *quiet]
        assert both.router.failures >= hit, "requests were in its hand"
        stats = (await http.get("/cluster")).json()
        assert stats["down"] == ["replica-0"]
        assert 0.3 < stats["hit_rate"] < 1
        assert (await http.post("/v1/completions", json={**bodies(1)[0], "model": "nobody"})).status_code == 404
        await victim.start()
        while both.router.replicas["replica-0"].down:
            await asyncio.sleep(0.01)
        before = victim.answered
        assert texts([await http.post("/v1/completions", json=body) for body in bodies(14)]) == quiet
        assert victim.answered > before

    asyncio.run(with_engines(root, work))


def test_a_replica_that_starts_again_is_told_of_all_changes(root: Path) -> None:
    """It finds in the folder what was there before; the changes are made once with both, once while one is down."""

    async def work(both: Front, http: httpx.AsyncClient) -> None:
        one, other = both.replicas.values()
        http.headers["authorization"] = f"Bearer {ADMIN}"

        async def change(method: str, name: str, path: str | None = None) -> int:
            at = "/v1/adapters" if method == "POST" else f"/v1/adapters/{name}"
            body = {"path": path, **({"name": name} if method == "POST" else {})} if path else None
            return (await http.request(method, at, json=body)).status_code

        async def says(name: str) -> str | int:
            answer = await http.post("/v1/completions", json={**bodies(1)[0], "model": name})
            return answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.status_code

        async def until_both_are_up() -> None:
            while any(replica.down for replica in both.router.replicas.values()):
                await asyncio.sleep(0.01)

        before = {f"a{i}": await says(f"a{i}") for i in range(6)}
        assert len(set(before.values())) == 6, "the adapters differ"
        assert [await change("DELETE", "a0"), await change("PUT", "a1", "a2"), await change("POST", "b", "a3")] == [
            200,
            200,
            201,
        ]
        one.death.set()
        assert [await change("DELETE", "a4"), await change("PUT", "b", "a5"), await change("POST", "c", "a3")] == [
            200,
            200,
            201,
        ]
        assert await change("PUT", "a5", "nowhere") == 404
        wanted = {"a0": 404, "a1": before["a2"], "a2": before["a2"], "a4": 404, "a5": before["a5"], "b": before["a5"]}
        wanted["c"] = before["a3"]
        assert {name: await says(name) for name in wanted} == wanted
        await one.start()
        await until_both_are_up()
        other.death.set()
        answered = one.answered
        assert {name: await says(name) for name in wanted} == wanted, "the one that was down has them now"
        assert one.answered >= answered + len(wanted)
        await other.start()
        await until_both_are_up()
        await other.start()  # died and came back while nothing was asked of it
        assert {name: await says(name) for name in wanted} == wanted
        await until_both_are_up()
        one.death.set()
        assert {name: await says(name) for name in wanted} == wanted
        assert set(both.changes) == {"a0", "a1", "a4", "b", "c"}

    asyncio.run(with_engines(root, work))


def test_a_stream_comes_through_piece_by_piece(root: Path) -> None:
    async def work(both: Front, http: httpx.AsyncClient) -> list[str]:
        body = {**bodies(3)[2], "stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            return [line async for line in answer.aiter_lines() if line]

    lines = asyncio.run(with_engines(root, work))
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0].removeprefix("data: "))["choices"][0]["index"] == 0


# -------------------------------------------------------------------------- on Ray Serve


@pytest.mark.slow
def test_on_ray_serve_killing_one_of_two_loses_no_request(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    from ray import serve

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", ":".join(__import__("sys").path))
    port = free_port()
    ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    try:
        server = ServerSettings(model_name="base")
        settings = RouterSettings(probe=0.2, unloaded=3)
        deploy(partial(make_engine, root), server, replicas=2, settings=settings, port=port)
        asyncio.run(kill_one(f"http://127.0.0.1:{port}", ray))
    finally:
        serve.shutdown()
        ray.shutdown()


async def kill_one(url: str, ray: Any) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        while (await http.get("/ready")).status_code != 200 or (await http.get("/cluster")).json()["down"]:
            await asyncio.sleep(0.2)
        quiet = texts([await http.post("/v1/completions", json=body) for body in bodies(14, 40)])
        calls = [asyncio.ensure_future(http.post("/v1/completions", json=body)) for body in bodies(56, 40)]
        while (stats := (await http.get("/cluster")).json())["load"]["replica-0"] < 3:
            await asyncio.sleep(0.001)
        victim = next(a for a in ray.util.list_named_actors(all_namespaces=True) if "#replica-0#" in a["name"])
        ray.kill(ray.get_actor(**victim), no_restart=True)
        assert texts(await asyncio.gather(*calls)) == quiet * 4
        stats = (await http.get("/cluster")).json()
        assert stats["failures"] >= 1
        assert stats["hit_rate"] > 0.5
        while (await http.get("/cluster")).json()["down"]:  # Ray starts it again
            await asyncio.sleep(0.2)
        assert texts([await http.post("/v1/completions", json=body) for body in bodies(14, 40)]) == quiet


def free_port() -> int:
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]
