"""A simulated cluster: 100 GPUs, a million adapters, the router and the scheduler that the server uses.

    python benchmarks/scale.py [--seconds 20] [--out scale.md]

Simulated are time and machines; what decides is the real code: :class:`Router` chooses replicas, :class:`Scheduler` decides
every pass of every GPU, and adapters take the cells that the real packing gives them. Nothing here was measured on a GPU: the
machine's numbers below are data-sheet values or assumptions, and say which.
"""

from __future__ import annotations

import argparse
import heapq
import math
import platform
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import anyadapter as aa
from anyadapter.core.catalogue import method_of
from anyadapter.core.host import Host
from anyadapter.serving.packing import plan as packing_of
from anyadapter.serving.policies import policy_named
from anyadapter.serving.request import Request, Sampling
from anyadapter.serving.router import Router, RouterSettings
from anyadapter.serving.scheduler import Limits, Plan, Scheduler

GB = 1e9
GPUS, NODE = 100, 4  # and GPUs of one node, which fail together
ADAPTERS = 1_000_000
RANKS = (8, 16, 32, 64)  # equally many of each, on q, k, v and o
COPIES = 3  # drives that hold each adapter: those of the first GPUs in its order
RATE = 1000.0  # requests a second for all: 10 for each GPU
PROMPT, OUTPUT = (8, 513), (8, 513)  # the paper's lengths, uniform
WARM = 10.0  # seconds that are simulated before anything is counted

# The base: 8 B parameters in bf16, 32 layers, 8 key heads of 128.
BASE = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
WEIGHTS = 16.06 * GB
CELL = 32 * 2 * 1024 * 2  # bytes: layers, halves, width, bf16

# A GPU and its share of a node.
HBM, HBM_SPEED = 80 * GB, 3350 * GB  # H100 SXM data sheet
REACHED = 0.7  # of HBM_SPEED; assumption
FLOPS = 989e12 * 0.4  # bf16 dense data sheet; the share reached is an assumption
STEP = 3e-3  # what a pass costs besides: launches and Python; assumption
RESERVED = 6 * GB  # activations and CUDA itself; assumption
PCIE = 50 * GB  # of the 64 of PCIe 5.0 x16; assumption
RAM = 200 * GB  # for adapters, of a node's 1 TB; assumption
NVME, NVME_SPEED = 3500 * GB, 6 * GB  # one drive for a GPU; PCIe 4.0 drives' data sheets say 7; assumption
STORE_SPEED, STORE_WAIT = 2.5 * GB, 0.05  # an object store over 25 Gbit/s; assumption

CELLS = int((HBM - WEIGHTS - RESERVED) / CELL)
TIERS = ("GPU", "RAM", "NVMe", "store")


def sizes() -> dict[int, tuple[int, float]]:
    """Cells and bytes of an adapter of each rank, as the server packs it."""
    found = {}
    with torch.device("meta"):
        host = Host.of(LlamaForCausalLM(LlamaConfig(**BASE)))
        targets = tuple(f"self_attention.{part}" for part in ("query", "key", "value", "output"))
        for rank in RANKS:
            config = aa.LoRAConfig(rank=rank, alpha=rank, targets=targets)
            adapter = method_of(config)(config, host)
            packing = packing_of(adapter, host, 32, 1024, torch.bfloat16)
            found[rank] = packing.cells, sum(tensor.numel() for tensor in adapter.tensors().values()) * 2.0
    return found


@dataclass(frozen=True)
class Scenario:
    """What is simulated.

    Attributes:
        skew: s of the adapters' popularity, 1/rank^s (Zipf).
        affinity: requests go to their adapter's replica; otherwise to the least loaded.
        rate: requests a second.
        dies: a node dies in the middle.
    """

    name: str
    skew: float = 1.0
    affinity: bool = True
    rate: float = RATE
    dies: bool = False


class Popularity:
    """How often each adapter is asked for, and where it is to be found in a cluster that has run for long.

    A cache of least recent use holds what was asked for within a time T, such that what is asked for within T fills it (Che et
    al. 2002). So the time since an adapter's last request, which is exponential, tells the fastest tier that still has it.
    """

    def __init__(self, scenario: Scenario, average: float) -> None:
        share = 1 / np.arange(1, ADAPTERS + 1) ** scenario.skew
        share /= share.sum()
        self.sums = np.cumsum(share)
        # With affinity each GPU sees its own adapters; otherwise every GPU sees all of them, each a hundredth as often.
        self.rates = scenario.rate * share / (1 if scenario.affinity else GPUS)
        machines = GPUS if scenario.affinity else 1
        room = (0.9 * CELLS * CELL, RAM, NVME)
        self.times = [self.time(machines * bytes / average) for bytes in room]

    def time(self, count: float) -> float:
        """T, by bisection, for a cache of so many adapters."""
        if count >= ADAPTERS:
            return math.inf
        low, high = 0.0, 1e12
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if -np.expm1(-self.rates * middle).sum() < count else (low, middle)
        return low

    def tier(self, adapter: int, random: np.random.Generator) -> int:
        """The fastest tier that has it, the first time that it is asked for."""
        age = random.exponential() / self.rates[adapter]
        return sum(age >= time for time in self.times)


@dataclass(eq=False)
class Call:
    """A request on its way."""

    id: str
    adapter: int
    prompt: int
    output: int
    arrival: float
    first: float | None = None
    gpu: str = ""
    request: Request | None = None


@dataclass(eq=False)
class Gpu:
    """One replica.

    Attributes:
        adapters: those in its pool; in the simulated time none of them has to leave.
        coming: when those will be in its memory that are being read.
        free: when the channel to its drive and the store is free.
        work: the pass that runs: its start, the seconds of a pass, how many are made before the scheduler is asked again.
        version: of ``work``; an event for an older one is void.
    """

    scheduler: Scheduler
    adapters: set[int] = field(default_factory=set)
    coming: dict[int, float] = field(default_factory=dict)
    free: float = 0.0
    work: tuple[float, float, int, Plan] | None = None
    version: int = 0


class Cluster:
    """The simulation: a heap of events, in order of time."""

    def __init__(self, scenario: Scenario, seconds: float, adapters: dict[int, tuple[int, float]]) -> None:
        self.scenario, self.seconds, self.adapters = scenario, seconds, adapters
        self.random = np.random.default_rng(0)
        self.popularity = Popularity(scenario, float(np.mean([bytes for _, bytes in adapters.values()])))
        self.names = [f"gpu-{i}" for i in range(GPUS)]
        self.router = Router(self.names, RouterSettings(unloaded=32, remember=CELLS // 500))
        self.gpus = {name: self.gpu() for name in self.names}
        self.calls: dict[str, Call] = {}
        self.done: list[Call] = []
        self.found: Counter[str] = Counter()
        self.fetched = 0.0
        self.copies: dict[int, set[str]] = {}
        self.repeated = self.broken = self.passes = 0
        self.spent: Counter[str] = Counter()  # seconds of this CPU
        self.events: list[tuple[float, int, str, Any]] = []
        self.count = 0

    def gpu(self) -> Gpu:
        limits = Limits(cells=CELLS, max_running=128, batch_tokens=4096, step_tokens=1024, max_waiting=4096)
        return Gpu(Scheduler(limits, lambda id: self.adapters[rank_of(int(id))][0], policy_named("fcfs")))

    def at(self, moment: float, what: str, data: Any) -> None:
        self.count += 1
        heapq.heappush(self.events, (moment, self.count, what, data))

    def run(self) -> None:
        end, moment = WARM + self.seconds, 0.0
        while (moment := moment + self.random.exponential(1 / self.scenario.rate)) < end:
            adapter = int(np.searchsorted(self.popularity.sums, self.random.random()))
            prompt, output = (int(self.random.integers(*lengths)) for lengths in (PROMPT, OUTPUT))
            call = Call(str(len(self.calls)), min(adapter, ADAPTERS - 1), prompt, output, moment)
            self.calls[call.id] = call
            self.at(moment, "arrive", call)
        if self.scenario.dies:
            self.at(WARM + self.seconds / 2, "die", self.names[:NODE])
        while self.events:
            moment, _, what, data = heapq.heappop(self.events)
            getattr(self, what)(moment, data)

    def arrive(self, now: float, call: Call) -> None:
        """Choose a replica, and bring the adapter into its memory."""
        adapter = str(call.adapter)
        start = time.perf_counter()
        name = self.router.choose(adapter if self.scenario.affinity else None)
        self.spent["route"] += time.perf_counter() - start
        assert name is not None
        call.gpu = name
        self.router.begin(name)
        self.router.served(name, adapter)
        gpu = self.gpus[name]
        ready = gpu.coming.get(call.adapter)
        if ready is None or ready < now:
            tier = 0 if call.adapter in gpu.adapters else self.look(call.adapter, name)
            ready = self.read(now, call.adapter, gpu, tier)
        else:
            tier = 0  # on its way for another request
        self.found[TIERS[tier]] += now >= WARM
        self.copies.setdefault(call.adapter, set()).add(name)
        self.at(max(now, ready), "submit", (call, gpu))

    def look(self, adapter: int, name: str) -> int:
        """Where an adapter is found that this simulation has not yet brought to this GPU."""
        if not self.scenario.affinity:
            return self.popularity.tier(adapter, self.random)
        place = self.router.order(str(adapter)).index(name)
        return self.popularity.tier(adapter, self.random) if place == 0 else 2 if place < COPIES else 3

    def read(self, now: float, adapter: int, gpu: Gpu, tier: int) -> float:
        """Bring an adapter into the replica's memory; the time at which it is there."""
        bytes = self.adapters[rank_of(adapter)][1]
        self.fetched += bytes if tier and now >= WARM else 0
        if tier == 0:
            gpu.adapters.add(adapter)
        if tier < 2:
            return now
        speed, wait = ((NVME_SPEED, 0.0), (STORE_SPEED, STORE_WAIT))[tier - 2]
        gpu.free = max(gpu.free, now) + bytes / speed
        gpu.coming[adapter] = gpu.free + wait
        return gpu.coming[adapter]

    def submit(self, now: float, what: tuple[Call, Gpu]) -> None:
        call, gpu = what
        if self.gpus.get(call.gpu) is not gpu:  # it died meanwhile
            self.arrive(now, call)
            return
        sampling = Sampling(max_tokens=call.output)
        adapter = str(call.adapter)
        call.request = Request(call.id, (0,) * call.prompt, {adapter: 1.0}, sampling, call.arrival, held=(adapter,))
        gpu.scheduler.submit(call.request)
        if gpu.work is None:
            self.begin(now, gpu)
        elif gpu.work[2] > 1:  # look again after the pass that runs
            start, seconds, count, plan = gpu.work
            self.plan_end(gpu, start, seconds, min(count, int((now - start) / seconds) + 1), plan)

    def begin(self, now: float, gpu: Gpu) -> None:
        """The next pass; several at once while nothing but decoding can happen."""
        start = time.perf_counter()
        plan = gpu.scheduler.plan(now)
        self.spent["schedule"] += time.perf_counter() - start
        self.passes += 1
        if not plan.prefill and not plan.decode:
            gpu.work = None
            return
        alone = not plan.prefill and not gpu.scheduler.waiting
        count = min(request.remaining for request in plan.decode) if alone else 1
        self.plan_end(gpu, now, self.cost(gpu, plan), count, plan)

    def cost(self, gpu: Gpu, plan: Plan) -> float:
        """Seconds of a pass: memory or arithmetic, whichever is slower, and adapters copied into the pool before it."""
        tokens = len(plan.decode) + sum(count for _, count in plan.prefill)
        active = [*plan.decode, *(request for request, _ in plan.prefill)]
        cells = sum(request.computed for request in active)
        ids = {int(id) for request in active for id in request.held}
        copied = sum(self.adapters[rank_of(int(id))][1] for id in plan.load if int(id) not in gpu.adapters)
        gpu.adapters |= ids
        read = WEIGHTS + cells * CELL + sum(self.adapters[rank_of(id)][1] for id in ids)
        return STEP + copied / PCIE + max(read / (HBM_SPEED * REACHED), WEIGHTS * tokens / FLOPS)

    def plan_end(self, gpu: Gpu, start: float, seconds: float, count: int, plan: Plan) -> None:
        gpu.work = start, seconds, count, plan
        gpu.version += 1
        self.at(start + count * seconds, "end", (gpu, gpu.version))

    def end(self, now: float, what: tuple[Gpu, int]) -> None:
        """Give the pass's tokens to its requests."""
        gpu, version = what
        if version != gpu.version or gpu.work is None:
            return
        _, _, count, plan = gpu.work
        for request, tokens in plan.prefill:
            request.computed += tokens
            if request.computed == len(request.prompt):
                request.output.append(0)
                call = self.calls[request.id]
                call.first = call.first or now
        for request in plan.decode:
            request.computed += count
            request.output.extend([0] * count)
        finished = [request for request in gpu.scheduler.running if not request.remaining]
        for request in finished:
            gpu.scheduler.remove(request.id)
            self.router.end(self.calls[request.id].gpu)
            self.done.append(self.calls[request.id])
        self.begin(now, gpu)

    def die(self, now: float, names: list[str]) -> None:
        """Nodes take their GPUs, pools and drives with them; what they had in hand begins again elsewhere."""
        for name in names:
            gpu = self.gpus.pop(name)
            gpu.work, gpu.version = None, gpu.version + 1
            self.router.fail(name)
            for request in [*gpu.scheduler.running, *gpu.scheduler.waiting]:
                call = self.calls[request.id]
                self.repeated += 1
                self.broken += call.first is not None
                self.arrive(now, call)


def rank_of(adapter: int) -> int:
    return RANKS[adapter % len(RANKS)]


def row(cluster: Cluster) -> str:
    counted = [call for call in cluster.done if call.arrival >= WARM]
    assert len(cluster.done) == len(cluster.calls), "no request is lost"
    waits = np.array([(call.first or math.inf) - call.arrival for call in counted])
    found = cluster.found
    total = sum(found.values())
    tokens = sum(call.output for call in counted) / cluster.seconds / GPUS
    hottest = max(map(len, cluster.copies.values()))
    cells = [
        cluster.scenario.name,
        *(f"{np.quantile(waits, q) * 1e3:.0f}" for q in (0.5, 0.99)),
        f"{100 * np.mean(waits < 1):.1f}",
        *(f"{100 * found[tier] / total:.1f}" for tier in TIERS),
        f"{cluster.fetched / cluster.seconds / GPUS / 1e6:.0f}",
        f"{tokens:,.0f}",
        str(hottest),
    ]
    return f"| {' | '.join(cells)} |"


SCENARIOS = (
    Scenario("least loaded, s = 1.0", affinity=False),
    Scenario("affinity, s = 1.0"),
    Scenario("affinity, s = 0.8", skew=0.8),
    Scenario("affinity, s = 1.2", skew=1.2),
    Scenario("affinity, s = 1.0, twice the rate", rate=2 * RATE),
    Scenario("affinity, s = 1.0, a node dies", dies=True),
)
HEADER = (
    "| routing, popularity | first token p50, ms | p99, ms | within 1 s, % | on the GPU, % | in RAM, % | on NVMe, % | "
    "in the store, % | copied, MB/s a GPU | tokens/s a GPU | copies of the hottest |\n|---|" + "---|" * 10
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="simulated and counted, after a warm-up of 10")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    adapters, lines, spent, routed, passes = sizes(), [HEADER], Counter[str](), 0, 0
    for scenario in SCENARIOS:
        start = time.perf_counter()
        cluster = Cluster(scenario, arguments.seconds, adapters)
        cluster.run()
        lines.append(row(cluster))
        print(lines[-1], f"  ({time.perf_counter() - start:.0f} s)", flush=True)
        spent += cluster.spent
        routed, passes = routed + len(cluster.calls), passes + cluster.passes
        if scenario.dies:
            fate = f"{cluster.repeated} requests in hand began again elsewhere, none was lost; {cluster.broken} of them had "
            fate += "begun to answer, and would end with an error were they streams."
    notes = [
        f"{date.today()}, {GPUS} GPUs in nodes of {NODE}, {ADAPTERS:,} adapters of ranks {RANKS}, "
        f"{RATE:g} requests/s, {arguments.seconds:g} s after {WARM:g} s of warm-up.",
        f"When the node died, {fate}",
        f"Measured on this CPU ({platform.processor() or platform.machine()}): {1e6 * spent['route'] / routed:.0f} µs to choose "
        f"a replica among {GPUS}, {1e6 * spent['schedule'] / passes:.0f} µs to decide a pass.",
    ]
    text = "\n".join([*lines, "", *notes])
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
