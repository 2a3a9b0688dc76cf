"""A long run under random load: requests, cancels, uploads, replacements and removals of adapters, evictions, bad requests.

    python benchmarks/soak.py [--minutes 10] [--http] [--base smollm2] [--dtype bfloat16] [--seed 0]

Without ``--http`` the engine is driven directly and every cell's owner is checked at each step; with it, a server is started on
a free port of this machine and spoken to by several clients, some of which go away in the middle; it also makes adapters of
texts, which grow, and are removed while they do. It ends with exit status 1 when a cell has leaked, memory has grown, or anything
was answered that should not have been.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

import anyadapter as aa
from anyadapter.core.errors import AnyAdapterError, BusyError, RequestError, UnknownAdapterError
from anyadapter.methods.language.generative import GenerativeConfig
from anyadapter.serving.engine import Engine, EngineSettings
from anyadapter.serving.request import Request, Sampling
from anyadapter.training.base import load_base

RANKS = (4, 8, 16, 32, 8, 4)  # of the adapters made at the start; others are copies of them under other names
NAMES = 12
READERS = 4  # adapters made of texts, at a time
LONGEST = 100  # tokens of a prompt, and a fifth of it of an output
FLIGHT = 16  # requests in hand
CLIENTS = 12
CELLS = 4200  # a few adapters' worth, so that they evict one another
SAMPLE = 2.0  # seconds between looks at the memory
GROWTH, SLOPE = 64e6, 4e6  # bytes, and bytes a minute: more of both is a leak
WARM = 5.0  # minutes; a shorter run is all warm-up, and its growth is printed only
KEY = "soak"


def make_sources(model: Any, root: Path) -> list[str]:
    """Adapters with random values, on all linears or on attention alone; and a damaged one, ``bad``."""
    generator = torch.Generator().manual_seed(0)
    for i, rank in enumerate(RANKS):
        targets: Any = "all-linear" if i % 2 else ("self_attention.query", "self_attention.value")
        adapter = aa.attach(model, aa.LoRAConfig(rank=rank, alpha=rank, targets=targets), "made")
        with torch.no_grad():
            for tensor in adapter.tensors().values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.02)
            if i == len(RANKS) - 1:
                next(iter(adapter.tensors().values())).fill_(torch.nan)
        aa.save_pretrained(model, root / ("bad" if i == len(RANKS) - 1 else f"source{i}"), "made")
        aa.detach(model, "made")
    return [f"source{i}" for i in range(len(RANKS) - 1)]


def make_generator(model: Any, folder: Path) -> Path:
    """What makes adapters of texts, with random values."""
    torch.manual_seed(0)
    adapter = aa.attach(model, GenerativeConfig(inner=16, rank=16, max_rank=8, alpha=16, window=64), "made")
    for name, tensor in adapter.tensors().items():
        if name.endswith("B.weight"):
            torch.nn.init.normal_(tensor, std=0.1)
    aa.save_pretrained(model, folder, "made")
    aa.detach(model, "made")
    return folder


class Memory:
    """A process's resident bytes over time."""

    def __init__(self, pid: int) -> None:
        self.file, self.start = Path(f"/proc/{pid}/status"), time.monotonic()
        self.samples: list[tuple[float, int]] = []

    def look(self) -> None:
        now = time.monotonic() - self.start
        if not self.samples or now - self.samples[-1][0] >= SAMPLE:
            line = next(line for line in self.file.read_text().splitlines() if line.startswith("VmRSS"))
            self.samples.append((now, int(line.split()[1]) * 1024))

    def grown(self) -> tuple[float, float]:
        """Bytes gained over the second half of the run, and bytes a minute, both of a straight line through it.

        In the first half caches and the allocator fill up: a few hundred requests of all lengths, so give it minutes.
        """
        times, sizes = np.array([s for s in self.samples if s[0] > self.samples[-1][0] / 2], dtype=float).T
        slope = float(np.polyfit(times, sizes, 1)[0]) if len(times) > 2 else 0.0
        return slope * (times[-1] - times[0]), slope * 60


class Failure(Exception):
    """Something happened that must not."""


def ensure(true: Any, message: str) -> None:
    if not true:
        raise Failure(message)


# ------------------------------------------------------------------ the engine


class EngineSoak:
    """Random events between the steps of an engine in this process."""

    def __init__(self, model: Any, tokenizer: Any, root: Path, sources: list[str], seed: int) -> None:
        settings = EngineSettings(cells=CELLS, adapters=str(root), max_running=FLIGHT, max_waiting=2 * FLIGHT)
        self.engine = Engine(model, tokenizer, settings=settings)
        self.sources, self.random = sources, random.Random(seed)
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        self.memory, self.counts = Memory(os.getpid()), Counter[str]()
        self.alive: set[str] = set()
        self.made = 0

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if len(self.alive) < FLIGHT:
                self.submit()
            for action, chance in ((self.upload, 0.5), (self.unload, 0.2), (self.cancel, 0.1), (self.misbehave, 0.5)):
                if self.random.random() < chance:
                    action()
            self.step()
        for id in self.random.sample(sorted(self.alive), len(self.alive) // 2):
            self.engine.cancel(id)
            self.alive.discard(id)
        while self.engine.has_work:
            self.step()
        self.check_end()

    def check_end(self) -> None:
        engine, stats = self.engine, self.engine.stats()
        ensure(not self.alive, f"{len(self.alive)} requests never ended")
        ensure(stats["cells_sequences"] == 0, "ended requests hold cells")
        ensure(engine.pool.left + engine.residents.cells == engine.pool.cells, "cells have leaked")
        ensure(not engine.held and not engine.holders and not engine.reading, "adapters are held by nobody")
        ensure(not engine.sequences and not engine.samplers, "ended requests are remembered")
        engine.residents.keep(())
        ensure(engine.pool.left == engine.pool.cells, "an idle adapter could not be evicted")
        self.counts["evictions"] = int(stats["adapter_evictions"])
        self.counts["tokens"] = int(stats["output_tokens"])

    def step(self) -> None:
        for output in self.engine.step():
            ensure(output.id in self.alive, f"an output for {output.id}, which has ended")
            ensure(output.finish != "error", output.message)
            if output.finish:
                self.alive.discard(output.id)
                self.counts[f"ended by {output.finish}"] += 1
        self.engine.check_integrity()
        self.memory.look()
        self.counts["steps"] += 1

    def submit(self) -> None:
        names = self.engine.store.names()
        chosen = self.random.sample(names, min(len(names), self.random.choice((0, 1, 1, 1, 1, 2))))
        prompt = tuple(self.random.randrange(self.vocabulary) for _ in range(self.random.randint(1, LONGEST)))
        sampling = Sampling(
            max_tokens=self.random.randint(1, LONGEST // 5),
            temperature=self.random.choice((0.0, 0.8)),
            top_p=self.random.choice((1.0, 0.9)),
            ignore_eos=self.random.random() < 0.5,
            logprobs=self.random.choice((None, None, 3)),
            stop=self.random.choice(((), ("the", "\n\n"))),
        )
        self.made += 1
        request = Request(f"r{self.made}", prompt, {name: self.random.choice((1.0, 0.5)) for name in chosen}, sampling)
        try:
            self.engine.submit(request)
        except BusyError:
            self.counts["busy"] += 1
            return
        self.alive.add(request.id)
        self.counts["requests"] += 1

    def cancel(self) -> None:
        id = self.random.choice([*sorted(self.alive), "nobody"])
        self.engine.cancel(id)
        self.alive.discard(id)
        self.counts["cancels"] += 1

    def upload(self) -> None:
        """A new adapter, or another one under a name that may be in use."""
        self.engine.store.register(f"a{self.random.randrange(NAMES)}", self.random.choice(self.sources))
        self.counts["uploads"] += 1

    def unload(self) -> None:
        if names := self.engine.store.names():
            self.engine.store.unload(self.random.choice(names))
            self.counts["unloads"] += 1

    def misbehave(self) -> None:
        """One thing that must be refused and change nothing."""
        before = self.engine.stats(), self.engine.store.names()
        bad: Callable[[], Any] = self.random.choice(
            [
                lambda: self.engine.submit(Request("bad", ())),
                lambda: self.engine.submit(Request("bad", (1,), {"nobody": 1.0})),
                lambda: self.engine.submit(Request("bad", (self.vocabulary,))),
                lambda: self.engine.submit(Request("bad", (1,) * (self.engine.max_context + 1))),
                lambda: self.engine.submit(Request("bad", (1,), sampling=Sampling(max_tokens=10**9))),
                lambda: self.engine.store.register("bad"),
                lambda: self.engine.store.register("../bad"),
                lambda: self.engine.store.register("a0", "../../etc"),
                lambda: self.engine.store.unload("nobody"),
            ]
        )
        try:
            bad()
        except (RequestError, UnknownAdapterError, AnyAdapterError):
            self.counts["refusals"] += 1
        else:
            raise Failure("what cannot be done was not refused")
        ensure(before == (self.engine.stats(), self.engine.store.names()), "a refused request changed something")


# ------------------------------------------------------------------ the server


class HttpSoak:
    """Clients of a server in another process, on this machine only."""

    def __init__(
        self, base: str, dtype: str, root: Path, sources: list[str], generator: Path, seed: int, log: Path
    ) -> None:
        self.sources, self.seed, self.counts = sources, seed, Counter[str]()
        self.lock, self.problems = threading.Lock(), list[str]()
        self.readers: list[str] = []  # names of adapters made of texts
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable,
            "-c",
            "from anyadapter.cli import app; app()",
            "serve",
            "--base",
            base,
            "--dtype",
            dtype,
        ]
        command += ["--adapters", str(root), "--name", "base", "--port", str(port), "--pool-tokens", str(CELLS)]
        command += ["--max-running", str(FLIGHT), "--max-waiting", "8", "--allow-adapter-updates", "--admin-key", KEY]
        command += ["--generator", str(generator)]
        self.log = log
        self.process = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT)
        self.url = f"http://127.0.0.1:{port}"
        self.memory = Memory(self.process.pid)
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.wait(lambda: self.http.get("/ready").status_code == 200, 120)

    def wait(self, condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ensure(self.process.poll() is None, f"the server has ended: {self.log.read_text()[-1000:]}")
            try:
                if condition():
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise Failure(f"it did not happen in {seconds} s: {self.log.read_text()[-1000:]}")

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        clients = [threading.Thread(target=self.client, args=(i, end)) for i in range(CLIENTS)]
        for client in clients:
            client.start()
        while any(client.is_alive() for client in clients):
            ensure(self.process.poll() is None, f"the server has ended: {self.log.read_text()[-1000:]}")
            self.memory.look()
            time.sleep(0.5)
        self.check_end()

    def check_end(self) -> None:
        ensure(not self.problems, "; ".join(self.problems[:5]))
        self.wait(lambda: not self.number("running") and not self.number("waiting"), 60)
        ensure(self.number("cells_sequences") == 0, "ended requests hold cells")
        ensure(self.number("cells_free") + self.number("cells_adapters") == self.number("cells"), "cells have leaked")
        self.counts["evictions"] = int(self.number("adapter_evictions_total"))
        self.counts["steps"] = int(self.number("steps_total"))
        self.process.send_signal(signal.SIGTERM)
        ensure(self.process.wait(60) == 0, f"after SIGTERM the server ended with status {self.process.returncode}")

    def number(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"anyadapter_{name} ")))

    def client(self, index: int, end: float) -> None:
        """One client: an event after the other. All clients but the first two only ask for completions."""
        draw = random.Random(f"{self.seed}-{index}")
        with httpx.Client(base_url=self.url, timeout=120) as http:
            while time.monotonic() < end and not self.problems:
                changes = (self.upload, self.upload, self.upload, self.unload, self.misbehave, self.read, self.grow)
                action = draw.choice(changes) if index < 2 else self.ask
                try:
                    action(http, draw)
                except Exception as error:  # told at the end
                    with self.lock:
                        self.problems.append(f"{action.__name__}: {type(error).__name__}: {error}")
                if index < 2:
                    time.sleep(0.2 * draw.random())

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def ask(self, http: httpx.Client, draw: random.Random) -> None:
        name = draw.choice(["base", *(f"a{i}" for i in range(NAMES)), *self.readers])
        prompt = [draw.randrange(1, 40_000) for _ in range(draw.randint(1, LONGEST))]
        body: dict[str, Any] = {"model": name, "prompt": prompt, "max_tokens": draw.randint(1, LONGEST // 5)}
        body |= {"temperature": draw.choice((0, 0.8)), "stream": draw.random() < 0.6, "n": draw.choice((1, 1, 1, 2))}
        patience = draw.choice((0, 1, 3, 1000))  # lines after which the client goes away
        with http.stream("POST", "/v1/completions", json=body) as response:
            self.count(f"completions {response.status_code}")
            ensure(response.status_code in (200, 404, 429), f"completion: {response.status_code} {response.read()!r}")
            last = ""
            for number, line in enumerate(response.iter_lines()):
                if body["stream"] and response.status_code == 200 and number >= patience:
                    self.count("disconnects")
                    return
                last = line or last
        if response.status_code == 200:
            whole = last == "data: [DONE]" if body["stream"] else json.loads(last)["choices"]
            ensure(whole, f"a truncated answer: {last[-300:]}")

    def admin(self, http: httpx.Client, method: str, path: str, fine: tuple[int, ...], body: Any = None) -> Any:
        response = http.request(method, path, json=body, headers={"authorization": f"Bearer {KEY}"})
        self.count(f"{method} {'contexts ' * path.endswith('/contexts')}{response.status_code}")
        ensure(response.status_code in fine, f"{method} {path}: {response.status_code} {response.text}")
        return response.json()

    def upload(self, http: httpx.Client, draw: random.Random) -> None:
        """As new, or in another's place; it may be there already, or not yet."""
        name, source = f"a{draw.randrange(NAMES)}", draw.choice(self.sources)
        if draw.random() < 0.6:
            self.admin(http, "POST", "/v1/adapters", (200, 201, 409), {"name": name, "path": source})
        else:
            self.admin(http, "PUT", f"/v1/adapters/{name}", (200, 201, 404), {"path": source})

    def unload(self, http: httpx.Client, draw: random.Random) -> None:
        self.admin(http, "DELETE", f"/v1/adapters/a{draw.randrange(NAMES)}", (200, 204, 404))

    def text(self, draw: random.Random) -> dict[str, Any]:
        words = draw.choices(("king", "bees", "lake", "tower", "spring", "drum"), k=draw.randint(1, LONGEST))
        how = {"mode": draw.choice(("sequential", "parallel")), "window": draw.choice((16, 64))}
        return {"document": " ".join(words), **how}

    def read(self, http: httpx.Client, draw: random.Random) -> None:
        """A new adapter of a text. When there are too many, one of them is removed or replaced, though it may be growing."""
        name = self.admin(http, "POST", "/v1/adapters", (201,), self.text(draw))["id"]
        with self.lock:
            self.readers = [*self.readers, name]
            gone = self.readers.pop(draw.randrange(READERS)) if len(self.readers) > READERS else None
        if gone is not None and draw.random() < 0.5:
            self.admin(http, "PUT", f"/v1/adapters/{gone}", (200,), {"path": draw.choice(self.sources)})
        if gone is not None:
            self.admin(http, "DELETE", f"/v1/adapters/{gone}", (200,))

    def grow(self, http: httpx.Client, draw: random.Random) -> None:
        """It may be removed or replaced by the other client meanwhile."""
        name = draw.choice([*self.readers, "nobody"])
        self.admin(http, "POST", f"/v1/adapters/{name}/contexts", (200, 404, 409), self.text(draw))

    def misbehave(self, http: httpx.Client, draw: random.Random) -> None:
        body: Any = draw.choice(
            [
                {"model": "nobody", "prompt": "x"},
                {"model": "base", "prompt": ""},
                {"model": "base", "prompt": "x", "max_tokens": 10**9},
                {"model": "base", "prompt": [10**9]},
                {"model": "base", "prompt": "x", "temperature": -1},
                {"model": "base"},
                [1, 2],
            ]
        )
        response = http.post("/v1/completions", json=body)
        self.count(f"bad requests {response.status_code}")
        ensure(400 <= response.status_code < 500, f"{body}: {response.status_code} {response.text}")
        self.admin(
            http, "PUT", "/v1/adapters/a0", (400, 403, 404, 422), {"path": draw.choice(["bad", "../bad", "/etc"])}
        )

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.http.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--http", action="store_true")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        model, tokenizer = load_base(arguments.base, dtype=arguments.dtype)
        (root / "adapters").mkdir()
        sources = make_sources(model, root / "adapters")
        if arguments.http:
            generator = make_generator(model, root / "generator")
            del model
            soak: Any = HttpSoak(
                arguments.base,
                arguments.dtype,
                root / "adapters",
                sources,
                generator,
                arguments.seed,
                root / "server.log",
            )
        else:
            soak = EngineSoak(model, tokenizer, root / "adapters", sources, arguments.seed)
        problem = ""
        try:
            soak.run(60 * arguments.minutes)
        except (Failure, AssertionError) as error:
            problem = f"{type(error).__name__}: {error}"
        finally:
            soak.close() if arguments.http else soak.engine.close()
    finally:
        shutil.rmtree(root)
    gained, slope = soak.memory.grown() if soak.memory.samples else (0.0, 0.0)
    print(", ".join(f"{count:,} {what}" for what, count in sorted(soak.counts.items())))
    print(f"memory: {soak.memory.samples[-1][1] / 1e6:.0f} MB at the end, {slope / 1e6:+.2f} MB a minute")
    if not problem and arguments.minutes >= WARM and gained > GROWTH and slope > SLOPE:
        problem = f"memory has grown by {gained / 1e6:.0f} MB"
    print(f"FAILED: {problem}" if problem else "passed")
    sys.exit(bool(problem))


if __name__ == "__main__":
    main()
