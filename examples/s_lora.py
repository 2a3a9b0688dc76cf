"""S-LoRA: requests for many adapters in one batch, against one adapter at a time, merging, and padding; three seeds.

    python examples/s_lora.py [--out docs/results] [--quick]

SmolLM2-135M and real text messages, on the CPU, in some ten minutes. 32 clients each send their next request when the last is
answered. The adapters are random LoRAs on query, key, value and output, of ranks 64, 32, 16, 8 in turn, as in the paper's S2.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import StoppingCriteria, StoppingCriteriaList

import anyadapter as aa
from anyadapter import quickstart
from anyadapter.serving.admission import MiniBatch, Room
from anyadapter.serving.batch import Rows
from anyadapter.serving.engine import Engine, EngineSettings
from anyadapter.serving.kernels import Kernels
from anyadapter.serving.kernels.grouped import Grouped, matrices
from anyadapter.serving.policies import FCFS
from anyadapter.serving.request import Request, Sampling
from anyadapter.serving.workload import Workload, attained
from anyadapter.training.base import load_base

RANKS = (64, 32, 16, 8)
TARGETS = tuple(f"self_attention.{part}" for part in ("query", "key", "value", "output"))
LENGTHS = (8, 32)  # of prompts and of outputs; the paper's are 8 to 512
clock = time.perf_counter


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        adapters: the numbers of adapters to compare.
        traced: that of the trace with a rate.
        clients: requests in hand.
        warm, window: seconds before and while tokens are counted.
        trace: seconds of arrivals.
        pool: cells, where the pool is compared with two halves.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    adapters: tuple[int, ...] = (1, 4, 16, 64)
    traced: int = 16
    clients: int = 32
    warm: float = 1.0
    window: float = 2.5
    trace: float = 6.0
    pool: int = 8192


QUICK = Size(seeds=(0,), adapters=(1, 4), traced=4, clients=4, warm=0.1, window=0.5, trace=1.0, pool=2048)


@dataclass(eq=False)
class Job:
    """A request and what has come of it.

    Attributes:
        arrival, first: seconds on the clock; of its first token, None so far.
        done: tokens so far.
    """

    id: str
    adapter: str
    prompt: tuple[int, ...]
    output: int
    arrival: float = 0.0
    first: float | None = None
    done: int = 0

    def got(self, tokens: int) -> None:
        if tokens and self.first is None:
            self.first = clock()
        self.done += tokens


# ---------------------------------------------------------------------- the ways to serve


class Served:
    """Our engine: (a) all adapters in one batch; with the policy ``peft``, (b) one adapter at a time."""

    def __init__(self, model: Any, folder: Path, clients: int, policy: str = "fcfs") -> None:
        settings = EngineSettings(
            cells=sum(64 * 12 * rank // len(RANKS) for rank in RANKS) + 64 * clients,
            max_running=clients,
            policy=policy,
            adapters=str(folder),
        )
        self.engine = Engine(model, settings=settings)
        assert not self.engine.store.scan()
        self.jobs: dict[str, Job] = {}

    def submit(self, job: Job) -> None:
        self.jobs[job.id] = job
        self.engine.submit(request(job))

    def step(self) -> None:
        for output in self.engine.step():
            self.jobs[output.id].got(len(output.tokens))

    @property
    def has_work(self) -> bool:
        return self.engine.has_work

    def close(self) -> None:
        self.engine.close()


class Padded(Served):
    """(d) Our engine, its adapters' products padded to the largest rank and the longest prompt of the batch."""

    def __init__(self, model: Any, folder: Path, clients: int) -> None:
        super().__init__(model, folder, clients)
        self.engine.mixed.kernels = PaddedProducts(self.engine.mixed.kernels)


class PaddedProducts(Grouped):
    """The paper's bmm variant: A and B are copied into (segments, largest rank, width), then multiplied in one go."""

    def __init__(self, kernels: Kernels) -> None:
        self.attend = kernels.attend  # type: ignore[method-assign]

    def shrink(self, x: Tensor, pool: Tensor, rows: Rows) -> Tensor:
        tokens, ranks = rows.tokens.diff().tolist(), rows.rows.diff().tolist()
        hidden = torch.bmm(padded(x, tokens), padded(matrices(pool, rows.cells[None], x.shape[1])[0], ranks).mT)
        return torch.cat([hidden[i, :n, :r].flatten() for i, (n, r) in enumerate(zip(tokens, ranks))])

    def expand(self, hidden: Tensor, y: Tensor, pool: Tensor, rows: Rows) -> None:
        tokens, ranks = rows.tokens.diff().tolist(), rows.rows.diff().tolist()
        b = matrices(pool, rows.cells[None], y.shape[1])[0] * rows.scale[:, None]
        h = torch.zeros(len(tokens), max(tokens), max(ranks))
        for i, part in enumerate(hidden.split([n * r for n, r in zip(tokens, ranks)])):
            h[i, : tokens[i], : ranks[i]] = part.view(tokens[i], ranks[i])
        out = torch.bmm(h, padded(b, ranks))
        y += torch.cat([out[i, :n] for i, n in enumerate(tokens)])


def padded(rows: Tensor, counts: list[int]) -> Tensor:
    return pad_sequence(rows.split(counts), batch_first=True)


class Switched:
    """(c) The first request's adapter is merged into the weights, all that wait for it run as one static batch."""

    def __init__(self, model: Any, folder: Path, pad: int) -> None:
        self.model, self.folder, self.pad = model, folder, pad
        self.waiting: list[Job] = []
        self.merged = ""

    def submit(self, job: Job) -> None:
        self.waiting.append(job)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting)

    def step(self) -> None:
        name = self.waiting[0].adapter
        batch = [job for job in self.waiting if job.adapter == name]
        self.waiting = [job for job in self.waiting if job.adapter != name]
        longest = max(len(job.prompt) for job in batch)
        ids = torch.tensor([[self.pad] * (longest - len(job.prompt)) + [*job.prompt] for job in batch])
        mask = torch.tensor([[0] * (longest - len(job.prompt)) + [1] * len(job.prompt) for job in batch])
        most = max(job.output for job in batch)
        self.switch(name)
        self.model.generate(
            ids,
            attention_mask=mask,
            min_new_tokens=most,
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=self.pad,
            stopping_criteria=StoppingCriteriaList([Told(batch)]),
        )

    def switch(self, name: str) -> None:
        """Have the adapter of that name in the weights, or none."""
        if self.merged != name:
            if self.merged:
                aa.unmerge(self.model)
                aa.detach(self.model)
            if name:
                aa.load(self.model, self.folder / name)
                aa.merge(self.model)
            self.merged = name

    def close(self) -> None:
        self.switch("")


class Told(StoppingCriteria):
    """Counts each token when it is there; those beyond what a job asked for do not count."""

    def __init__(self, batch: list[Job]) -> None:
        self.batch = batch

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        for job in self.batch:
            job.got(int(job.done < job.output))
        return torch.zeros(len(input_ids), dtype=torch.bool)


def request(job: Job) -> Request:
    sampling = Sampling(max_tokens=job.output, temperature=0, ignore_eos=True)
    return Request(job.id, job.prompt, {job.adapter: 1.0}, sampling)


# ---------------------------------------------------------------------- the measurements


def saturated(way: Any, jobs: Iterator[Job], size: Size) -> float:
    """Tokens a second with ``clients`` requests always in hand."""
    asked: list[Job] = []
    in_hand: list[Job] = []
    base, start, begin = 0, None, clock()
    while start is None or clock() - start < size.window:
        in_hand = [job for job in in_hand if job.done < job.output]
        for job in islice(jobs, size.clients - len(in_hand)):
            in_hand.append(job)
            asked.append(job)
            way.submit(job)
        way.step()
        if start is None and clock() - begin >= size.warm:
            start, base = clock(), sum(job.done for job in asked)
    return (sum(job.done for job in asked) - base) / (clock() - start)


def attainment(way: Any, jobs: Sequence[Job], slo: float) -> float:
    """Share of requests whose first token came in time, when they arrive by themselves."""
    start, left = clock(), list(jobs)
    for job in left:
        job.arrival += start
    end = left[-1].arrival + slo
    while clock() < end and any(job.first is None for job in jobs):
        while left and left[0].arrival <= clock():
            way.submit(left.pop(0))
        if way.has_work:
            way.step()
        elif left:
            time.sleep(max(0.0, left[0].arrival - clock()))
    latencies = [job.first - job.arrival if job.first is not None else None for job in jobs]
    return statistics.mean(attained(latency, slo) for latency in latencies)


def jobs_of(texts: list[list[int]], seed: int, adapters: int, rate: float = 100.0, seconds: float = 60.0) -> list[Job]:
    """The workload's requests with real text for prompts."""
    workload = Workload(adapters=adapters, rate=rate, duration=seconds, prompt=LENGTHS, output=LENGTHS, seed=seed)
    draw = random.Random(seed)
    jobs = []
    for i, call in enumerate(workload.calls()):
        prompt: list[int] = []
        while len(prompt) < call.prompt:
            prompt += draw.choice(texts)
        jobs.append(Job(str(i), f"r{call.adapter}", tuple(prompt[: call.prompt]), call.output, call.arrival))
    return jobs


class FixedSplit(FCFS):
    """What memory with a fixed half for adapters admits, in order of arrival: each half must suffice for its own."""

    def __init__(self, cells: int, adapter_cells: Callable[[str], int]) -> None:
        super().__init__(overtakes=0)
        self.half, self.adapter_cells = cells // 2, adapter_cells

    def admit(self, waiting: Collection[Request], batch: MiniBatch) -> None:
        tokens, adapters = Room(self.half, lambda id: 0), set[str]()
        for request in waiting:  # nothing runs when this is asked
            adapters.update(request.held)
            room = tokens.fits(request) and sum(map(self.adapter_cells, adapters)) <= self.half
            if not room or not batch.admit(request):
                return
            tokens.take(request)


def admitted(model: Any, folder: Path, texts: list[list[int]], seed: int, cells: int, split: bool) -> dict[str, int]:
    """How many requests run at once, first for adapters of the highest rank, then, while those lie idle, for others."""
    settings = EngineSettings(cells=cells, max_running=cells // 32, step_tokens=cells // 32, adapters=str(folder))
    engine = Engine(model, settings=settings)
    engine.store.scan()
    halves = FixedSplit(cells, engine.scheduler.adapter_cells)
    engine.scheduler.policy = halves if split else FCFS(overtakes=0)
    kinds = {
        "all of rank 64": range(0, 64, 4),
        "all of rank 8": range(3, 64, 4),
        "one of rank 8": (3,),
        "mixed ranks": range(64),
    }
    found, number = {}, count()
    for kind, numbers in kinds.items():
        jobs = jobs_of(texts, seed, len(numbers), rate=300, seconds=1)
        for job in jobs:
            job.id, job.adapter = str(next(number)), f"r{numbers[int(job.adapter[1:])]}"
            engine.submit(request(job))
        engine.step()
        engine.check_integrity()
        found[kind] = len(engine.scheduler.running)
        for job in jobs:
            engine.cancel(job.id)
    engine.close()
    return found


# ---------------------------------------------------------------------- the run


def make_adapters(model: Any, folder: Path, number: int) -> None:
    """Random LoRAs in PEFT's layout."""
    for i in range(number):
        rank = RANKS[i % len(RANKS)]
        adapter = aa.attach(model, aa.LoRAConfig(rank=rank, alpha=rank, targets=TARGETS))
        generator = torch.Generator().manual_seed(i)
        for parameter in adapter.parameters():
            with torch.no_grad():
                parameter.normal_(std=0.02, generator=generator)
        aa.save_pretrained(model, folder / f"r{i}")
        aa.detach(model)


def ways(model: Any, folder: Path, clients: int, pad: int) -> dict[str, Callable[[], Any]]:
    return {
        "one batch": lambda: Served(model, folder, clients),
        "one adapter at a time": lambda: Served(model, folder, clients, "peft"),
        "merge and switch": lambda: Switched(model, folder, pad),
        "padded bmm": lambda: Padded(model, folder, clients),
    }


Scores = dict[str, Any]


def measure(model: Any, tokenizer: Any, folder: Path, size: Size, seed: int, progress: Progress, task: Any) -> Scores:
    """All measurements of one seed."""
    texts = [tokenizer(row["prompt"].split("\n")[0][5:])["input_ids"] for row in quickstart.spam_rows(seed)[0]]
    makers = ways(model, folder, size.clients, tokenizer.pad_token_id)
    scores: Scores = {"rate": {}, "slo": {}}

    def run(name: str, what: str, function: Callable[[Any], float]) -> float:
        progress.update(task, description=f"seed {seed}, {what}, {name}")
        way = makers[name]()
        try:
            return function(way)
        finally:
            way.close()
            progress.advance(task)

    for number in size.adapters:
        for name in makers:
            jobs = iter(jobs_of(texts, seed, number))
            scores["rate"][number, name] = run(name, f"{number} adapters", lambda way: saturated(way, jobs, size))  # noqa: B023
    capacity = scores["rate"][size.traced, "one batch"] / (sum(LENGTHS) - 1) * 2  # requests a second
    rate, slo = 0.9 * capacity, size.clients / capacity / 2
    scores["seconds"] = slo
    for name in makers:
        jobs = jobs_of(texts, seed, size.traced, rate, max(size.trace, 8 / rate))
        scores["slo"][name] = run(name, "trace", lambda way: attainment(way, jobs, slo))  # noqa: B023
    scores["admitted"] = {split: admitted(model, folder, texts, seed, size.pool, split) for split in (False, True)}
    progress.advance(task)
    return scores


def mean(values: Iterator[float]) -> float:
    return statistics.mean(values)


def report(all_scores: list[Scores], size: Size) -> str:
    """Tables and what they say of the paper's claims, in Markdown."""
    names = list(all_scores[0]["slo"])
    rate = {key: [s["rate"][key] for s in all_scores] for key in all_scores[0]["rate"]}
    best = {number: max(names, key=lambda name: mean(rate[number, name])) for number in size.adapters}
    lines = [f"| adapters | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for number in size.adapters:
        cells = []
        for name in names:
            values = rate[number, name]
            shown = f"**{mean(values):.0f}**" if name == best[number] else f"{mean(values):.0f}"
            cells.append(f"{shown} ({min(values):.0f}–{max(values):.0f})")
        lines.append(f"| {number} | {' | '.join(cells)} |")
    attained = [f"{mean(s['slo'][name] for s in all_scores):.0%}" for name in names]
    lines.append(f"| first token in time, {size.traced} adapters | {' | '.join(attained)} |")
    kinds = all_scores[0]["admitted"][False]
    lines += ["", f"| requests for adapters | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for title, split in (("one pool", False), ("half and half", True)):
        values = [f"{mean(s['admitted'][split][kind] for s in all_scores):.0f}" for kind in kinds]
        lines.append(f"| {title} | {' | '.join(values)} |")
    return "\n".join([*lines, "", *verdicts(all_scores, size, rate)])


def verdicts(all_scores: list[Scores], size: Size, rate: dict[Any, list[float]]) -> list[str]:
    """Whether what the paper leads to expect was seen."""
    lines = []
    for name, least in (("one adapter at a time", 4), ("merge and switch", 10)):
        for number in [n for n in size.adapters if n >= 16]:
            factor = mean(rate[number, "one batch"]) / mean(rate[number, name])
            held = "held" if factor >= least else "**did not hold**"
            lines.append(
                f"* {number} adapters: one batch is {factor:.1f} times as fast as {name}; at least {least} was expected: {held}."
            )
    alone = mean(rate[1, "merge and switch"]) / mean(rate[1, "one batch"])
    held = "held" if alone >= 1 else "**did not hold**"
    lines.append(
        f"* One adapter: merged, it was expected to be fastest; it is {alone:.2f} times as fast as one batch: {held}."
    )
    pairs = [
        (s["admitted"][False][kind], s["admitted"][True][kind]) for s in all_scores for kind in s["admitted"][False]
    ]
    more = Counter(one > half for one, half in pairs)
    held = "held" if not more[False] else f"**did not hold** in {more[False]} of {len(pairs)} cases"
    lines.append(f"* One pool was expected to admit more than two halves: {held}.")
    return lines


def plot(all_scores: list[Scores], size: Size, path: Path) -> None:
    """Tokens a second, first tokens in time, requests admitted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.4, 1, 1.2))
    colours = dict(zip(all_scores[0]["slo"], ("#3b6ea5", "#c9803a", "#7a9a5b", "#9a7aa5")))
    for letter, (name, colour) in zip("abcd", colours.items()):
        left.plot(
            size.adapters,
            [mean(s["rate"][n, name] for s in all_scores) for n in size.adapters],
            color=colour,
            label=f"{letter}: {name}",
        )
        for scores in all_scores:
            left.plot(size.adapters, [scores["rate"][n, name] for n in size.adapters], ".", color=colour)
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:.0f}")
    left.yaxis.set_minor_formatter("{x:.0f}")
    left.set(xlabel="adapters", ylabel="tokens a second", xticks=size.adapters, xticklabels=size.adapters)
    left.legend(frameon=False, fontsize=8)
    middle.bar(
        list("abcd"), [mean(s["slo"][name] for s in all_scores) for name in colours], color=list(colours.values())
    )
    middle.set(ylabel="first token in time", ylim=(0, 1.05), xlabel=f"{size.traced} adapters, at 90 % of a's capacity")
    kinds = list(all_scores[0]["admitted"][False])
    for split, colour, title in ((False, "#3b6ea5", "one pool"), (True, "#b0b8c4", "half and half")):
        places = [i + 0.4 * split for i in range(len(kinds))]
        right.bar(
            places, [mean(s["admitted"][split][k] for s in all_scores) for k in kinds], 0.4, color=colour, label=title
        )
    right.set(ylabel="requests at once", xticks=[i + 0.2 for i in range(len(kinds))])
    right.set_xticklabels([kind.replace(" of ", "\nof ") for kind in kinds], fontsize=7)
    right.legend(frameon=False, fontsize=8)
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "results")
    parser.add_argument("--quick", action="store_true", help="a minute, to see that it works; the numbers mean nothing")
    arguments = parser.parse_args()
    size, begin = QUICK if arguments.quick else Size(), clock()
    model, tokenizer = load_base("smollm2", dtype="float32")
    model.requires_grad_(False)
    with tempfile.TemporaryDirectory() as scratch, Progress() as progress:
        task = progress.add_task("random adapters", total=len(size.seeds) * (4 * len(size.adapters) + 5))
        make_adapters(model, Path(scratch), 64)
        all_scores = [measure(model, tokenizer, Path(scratch), size, seed, progress, task) for seed in size.seeds]
    threads, slo = torch.get_num_threads(), mean(s["seconds"] for s in all_scores)
    where = f"{platform.machine()}, {threads} threads, torch {torch.__version__}"
    lengths = f"{LENGTHS[0]} to {LENGTHS[1] - 1} tokens"
    head = (
        f"`python examples/s_lora.py`, {date.today():%-d %B %Y}, {where}: SmolLM2-135M fp32, {size.clients} requests in\n"
        f"hand, real text messages of {lengths}, as many generated, {len(size.seeds)} seeds. Output tokens a second,\n"
        f"mean (range). In time is within {slo:.1f} s, half of what a request takes in a full batch; requests arrive at 90 % of\n"
        "what one batch can do."
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = f"{head}\n\n{report(all_scores, size)}\n"
    (arguments.out / "s_lora.md").write_text(text, encoding="utf-8")
    plot(all_scores, size, arguments.out / "s_lora.png")
    print(f"{text}\n{clock() - begin:.0f} seconds in all.")


if __name__ == "__main__":
    main()
