"""S-LoRA's control plane: its event traces, and its workload generator and measures."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from golden_cases import Golden

from anyadapter.serving.policies import FCFS, VTC, Cluster, EarlyAbort, OneAdapter, Pets, Policy
from anyadapter.serving.request import Request, Sampling
from anyadapter.serving.scheduler import Limits, Plan, Scheduler
from anyadapter.serving.workload import Workload, attained, satisfaction

OUR_NAMES = {"num_adapters": "adapters", "req_rate": "rate", "input_range": "prompt", "output_range": "output"}
LOOP = r"decodes (\d+) times between attempts.*idle loop advances ([\d.]+) s"
NUMBER = r"([\d.]+)"
COSTS = (
    rf"base\[b\]\[s\]={NUMBER}\+{NUMBER}\*b\*s/(\d+) ; with adapter rank r add {NUMBER}\+{NUMBER}\*r\*b\*s/(\d+) ; "
    r"s rounded up to multiples of (\d+)"
)


def scheduler_traces(case: Golden) -> None:
    """Every event of every scheduler, the end of the simulated time, and what fairness has charged."""
    for name, trace in case.about["traces"].items():
        sim = Simulation(case, trace)
        sim.run()
        for i, (mine, theirs) in enumerate(zip(sim.events, trace["events"])):
            assert mine == theirs, f"{name}, event {i}: {mine} instead of {theirs}"
        assert len(sim.events) == len(trace["events"]), f"{name}: {len(sim.events)} events"
        end = round(sim.now, 6), sim.steps
        assert end == (trace["sim_end"], trace["steps"]), f"{name}: ends at {end}"
        if trace["vtc_served"] is not None:
            assert isinstance(sim.policy, VTC)
            assert sim.policy.given == trace["vtc_served"], name


class Simulation:
    """The paper's loop around our scheduler, and a model that only takes time."""

    def __init__(self, case: Golden, trace: dict[str, Any]) -> None:
        about = case.about
        steps, idle = re.search(LOOP, about["what"]).groups()
        queue = about["queue"]
        limits = Limits(
            cells=queue["max_total_token_num"],
            max_running=queue["running_max_req_size"],
            batch_tokens=queue["batch_max_tokens"],
            max_waiting=len(about["requests"]),
            wait_steps=int(steps),
            chunked=False,
        )
        self.idle, self.times = float(idle), trace["sim"]
        self.prefetch = trace["scheduler_options"].get("prefetch", False)
        self.policy = official_policy(about, trace["scheduler_options"])
        self.scheduler = Scheduler(limits, lambda id: 4 * about["adapters"][id], self.policy)
        self.coming = list(about["requests"])
        self.events: list[list[Any]] = []
        self.now, self.steps = 0.0, 0

    def run(self) -> None:
        while self.coming or self.scheduler.waiting or self.scheduler.running:
            while self.coming and self.coming[0]["t"] <= self.now:
                self.scheduler.submit(self.request(self.coming.pop(0)))
            was_idle = not self.scheduler.running
            plan = self.scheduler.plan(self.now)
            self.before(plan, was_idle)
            self.compute(plan)
            if plan.aborted:  # decided first, noted in the trace at the end of the step
                self.events.append(["abort", ids(plan.aborted)])
            self.steps += 1

    def request(self, row: dict[str, Any]) -> Request:
        return Request(
            row["id"],
            (0,) * row["in"],
            {row["adapter"]: 1.0},
            Sampling(max_tokens=row["out"], ignore_eos=True),
            arrival=self.now,
            held=(row["adapter"],),
        )

    def before(self, plan: Plan, was_idle: bool) -> None:
        """What happens before the forward pass."""
        if plan.admitted:
            self.events.append(["load", sorted(plan.load)])
            if was_idle and isinstance(self.policy, OneAdapter):
                self.events.append(["merge"])
        if plan.prefetch and self.prefetch:
            self.events.append(["prefetch", sorted(plan.prefetch)])

    def compute(self, plan: Plan) -> None:
        """The forward pass, and what happens when requests end in it."""
        if not plan.prefill and not plan.decode:
            self.now += self.idle
            return
        took = plan.decode or [request for request, _ in plan.prefill]
        kind = "decode" if plan.decode else "prefill"
        self.events.append([kind, ids(took)])
        self.now += self.times[f"t_{kind}"]
        for request in took:
            request.computed = len(request.prompt) + len(request.output)
            request.output.append(0)
        ended = [request for request in took if not request.remaining]
        for request in ended:
            self.scheduler.remove(request.id)
        if len(ended) == len(took) and isinstance(self.policy, OneAdapter):
            self.events.append(["unmerge"])
        if ended and plan.decode:
            self.events.append(["offload_keep", sorted(self.scheduler.needed)])
        if not self.scheduler.running:
            self.events.append(["offload_keep", []])  # the paper's loop does it again with the empty batch


def official_policy(about: dict[str, Any], options: dict[str, Any]) -> Policy:
    """The policy of a trace, with what the paper's code does where ours differs by default."""
    slo = about["slo"]
    match options:
        case {"scheduler": "vtc_fair", **rest}:
            weights = dict(zip(about["adapters"], rest.get("fair_weights", ())))
            return VTC(weights, lift_idle=False)
        case {"scheduler": "peft"}:
            return OneAdapter()
        case {"scheduler": "pets"}:
            return official_pets(about)
        case {"scheduler": "slora", "batch_num_adapters": adapters}:
            return Cluster(adapters, overtakes=None, counts_new=False)
        case {"scheduler": "slora", "enable_abort": True}:
            return EarlyAbort(slo["first_token_seconds"], slo["safety_margin"])
        case {"scheduler": "slora"}:
            return FCFS(overtakes=0)
    pytest.fail(f"no policy for a trace with {options}")


def official_pets(about: dict[str, Any]) -> Pets:
    """The cost model is a formula in the case."""
    a, b, unit, c, d, unit_2, step = map(float, re.fullmatch(COSTS, about["pets_cost_model"]).groups())
    ranks = about["adapters"]

    def base(count: int, length: int) -> float:
        return a + b * count * (-(-length // step) * step) / unit

    def extra(held: tuple[str, ...], count: int, length: int) -> float:
        rows = -(-length // step) * step
        return base(count, length) + (c + d * ranks[held[0]] * count * rows / unit_2) - base(count, length)

    return Pets(base, extra)


def ids(requests: Any) -> list[str]:
    return [request.id for request in requests]


def workload_and_slo(case: Golden) -> None:
    """Adapters, lengths and times of arrival of each configuration; satisfaction and attainment."""
    for i, config in enumerate(case.about["configs"]):
        calls = Workload.from_dict({OUR_NAMES.get(name, name): value for name, value in config.items()}).calls()
        case.close(torch.tensor([call.adapter for call in calls]), f"out/{i}.adapter")
        case.close(torch.tensor([call.prompt for call in calls]), f"out/{i}.input_len")
        case.close(torch.tensor([call.output for call in calls]), f"out/{i}.output_len")
        case.close(torch.tensor([call.arrival for call in calls], dtype=torch.float64), f"out/{i}.arrival_time")
    latencies = case.tensors["in/first_token_latency"].tolist()
    case.close(torch.tensor([satisfaction(t) for t in latencies], dtype=torch.float64), "out/satisfaction")
    case.close(torch.tensor([float(attained(t)) for t in latencies], dtype=torch.float64), "out/attainment")
