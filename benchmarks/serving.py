"""Our serving engine against PEFT, transformers and vLLM: one base, the same adapters and requests, all in one run.

    python benchmarks/serving.py [--part saturated --part growth --part trace --part registry] [--quick]
        [--vllm-python PYTHON] [--dtype bfloat16] [--rounds 3] [--limit 25] [--adapters-folder FOLDER] [--out docs/benchmarks]

Every system lives in a process of its own (serving_baselines.py) and they take turns round by round, so that a slow moment of the
machine meets all. Medians of the rounds are reported, and ratios within a round. A system that needs more than ``--limit``
seconds for a round is stopped there, and judged by the tokens it made until then.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from anyadapter.serving.workload import SLO, Workload, attained, satisfaction
from anyadapter.training.base import load_base

ROWS, PROMPT, OUTPUT = 32, 64, 64
MIXED = (8, 16, 32, 64)
ONE_BY_ONE = ("peft-switch", "peft-merge")  # they compute one adapter's requests at a time, and are run once
PARTS = ("saturated", "growth", "trace", "registry")
WORKER = Path(__file__).with_name("serving_baselines.py")
POOL_BYTES = 3 << 30
LOAD_LIMIT = 150.0  # seconds for PEFT to load its adapters
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB: forty times what 32 rows need
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@dataclass
class Setup:
    """The command line, and what all parts share."""

    options: argparse.Namespace
    base: Path
    root: Path
    logs: Path
    config: Any = None
    notes: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.options.dtype)


# ------------------------------------------------------------------ adapters


def shapes(config: Any, rank: int) -> dict[str, tuple[int, int]]:
    """The tensors of a LoRA on all seven linears of a LLaMA, in PEFT's names."""
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * (getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    linears = {f"self_attn.{n}_proj": (hidden, out) for n, out in zip("qkvo", (hidden, keys, keys, hidden))}
    linears |= {"mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner), "mlp.down_proj": (inner, hidden)}
    found = {}
    for layer in range(config.num_hidden_layers):
        for name, (wide, out) in linears.items():
            where = f"base_model.model.model.layers.{layer}.{name}"
            found[f"{where}.lora_A.weight"], found[f"{where}.lora_B.weight"] = (rank, wide), (out, rank)
    return found


def make_adapters(setup: Setup, kind: str, ranks: Sequence[int], count: int) -> tuple[Path, list[str]]:
    """``count`` different PEFT folders in ``root``/``kind``, made unless they are there. Values are windows of one random row."""
    folder, size, dtype = setup.root / kind, setup.dtype.itemsize, {2: "BF16", 4: "F32"}[setup.dtype.itemsize]
    names = [f"a{i:04d}" for i in range(count)]
    plans = {}
    for rank in set(ranks):
        at, header = 0, {}
        for name, shape in shapes(setup.config, rank).items():
            stop = at + shape[0] * shape[1] * size
            header[name], at = {"dtype": dtype, "shape": shape, "data_offsets": (at, stop)}, stop
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        plans[rank] = len(text).to_bytes(8, "little") + text, at
    longest = max(numbers for _, numbers in plans.values()) // size
    values = (torch.randn(longest + 1009 * count, generator=torch.Generator().manual_seed(0)) * 0.02).to(setup.dtype)
    raw = values.view(torch.uint8).numpy()
    for i, name in enumerate(names):
        rank = ranks[i % len(ranks)]
        header_bytes, numbers = plans[rank]
        file = folder / name / "adapter_model.safetensors"
        if file.exists() and file.stat().st_size == len(header_bytes) + numbers:
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as out:
            out.write(header_bytes)
            out.write(raw[1009 * i * size : 1009 * i * size + numbers].data)
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": rank,
            "inference_mode": True,
        }
        settings |= {"base_model_name_or_path": str(setup.base), "bias": "none", "fan_in_fan_out": False}
        settings["target_modules"] = sorted({n.split(".")[-3] for n in shapes(setup.config, rank)})
        (folder / name / "adapter_config.json").write_text(json.dumps(settings))
    return folder, names


def adapter_bytes(folder: Path, names: Iterable[str]) -> int:
    return sum((folder / name / "adapter_model.safetensors").stat().st_size for name in names)


# ------------------------------------------------------------------ the systems


class Worker:
    """A system in its own process. ``error`` says why it cannot be measured."""

    def __init__(self, setup: Setup, system: str, folder: Path, names: Sequence[str], **more: Any) -> None:
        self.setup, self.system, self.names = setup, system, list(names)
        self.once = system in ONE_BY_ONE
        given, threads = setup.options, setup.options.threads
        options = {"system": system, "base": str(setup.base), "adapters": str(folder), "dtype": given.dtype}
        options |= {"names": self.names, "rows": ROWS, "threads": threads, "pool_bytes": POOL_BYTES}
        options |= {"load_limit": LOAD_LIMIT, "eager": given.vllm_eager, **more}
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        }
        python = sys.executable
        if system == "vllm":
            cores = sorted(os.sched_getaffinity(0))[:threads]
            environment |= {**VLLM, "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
            python = given.vllm_python
        start = time.perf_counter()
        self.log = (setup.logs / f"{system}-{len(names)}.log").open("w")
        # -I keeps this folder off the path: a kernels.py in it would be taken for the package of that name.
        self.process = subprocess.Popen(
            [python, "-I", str(WORKER), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        self.error = ""
        self.error = self.read(LOAD_LIMIT + 150).get("error", "")
        self.loading = time.perf_counter() - start

    def read(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if not line:
            return {"error": self.error or f"it died, or gave no answer in {seconds:.0f} s; see {self.log.name}"}
        return json.loads(line)

    def ask(self, **job: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        if self.error:
            return {"error": self.error}
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.error = f"it died; see {self.log.name}"
            return {"error": self.error}
        answer = self.read(job.get("limit", 60) + 120)
        self.error = answer.get("error", "")
        return answer

    def batch(self, round: int, *, count: int = ROWS, output: int = OUTPUT) -> dict[str, Any]:
        """``count`` requests at once, each with the next adapter."""
        adapters: list[str | None] = [None] * count
        if self.names:
            adapters = [self.names[(round * count + i) % len(self.names)] for i in range(count)]
        calls = [{"adapter": a, "prompt": PROMPT, "output": output, "arrival": 0.0} for a in adapters]
        return self.ask(do="run", calls=calls, seed=round, limit=self.setup.options.limit)

    def warm_up(self) -> None:
        """Short outputs of its first 64 adapters, unless it takes them one by one."""
        if not self.once:
            for round in range(max(1, -(-min(len(self.names), 64) // ROWS))):
                self.batch(round, output=2)

    def close(self) -> None:
        if self.process.stdin is not None:
            try:
                self.process.stdin.close()
                self.process.wait(20)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                self.process.kill()
                self.process.wait()
        self.log.close()


@contextmanager
def workers(setup: Setup, *wanted: tuple[str, Path, Sequence[str]]) -> Iterator[list[Worker]]:
    """Those systems, running; vLLM only where it is."""
    with ExitStack() as stack:
        running = []
        for system, folder, names in wanted:
            if system in setup.options.without or (system == "vllm" and not setup.options.vllm_python):
                continue
            longest = max((rank_of(folder / name) for name in names[:8]), default=8)
            print(f"  starting {system} with {len(names)} adapters", flush=True)
            running.append(Worker(setup, system, folder, names, rank=longest))
            stack.callback(running[-1].close)
        yield running


def rank_of(folder: Path) -> int:
    return json.loads((folder / "adapter_config.json").read_text())["r"]


# ------------------------------------------------------------------ closed batches

Key = tuple[str, int]  # system and number of adapters
Results = dict[Key, list[dict[str, Any]]]  # a result for each round


def take_turns(setup: Setup, running: list[Worker], *, count: int = ROWS) -> Results:
    """The results of all rounds, after a warm-up."""
    for worker in running:
        worker.warm_up()
    results: Results = {}
    for round in range(setup.options.rounds):
        for worker in running:
            if worker.once and round:
                continue
            result = worker.batch(round + 1, count=count)
            results.setdefault((worker.system, len(worker.names)), []).append(result)
            told = result.get("error") or f"{speed(result):.0f} tokens/s, {result['seconds']:.1f} s"
            print(f"  round {round}: {worker.system} with {len(worker.names)} adapters: {told}", flush=True)
    return results


def speed(result: dict[str, Any]) -> float:
    return result["tokens"] / result["seconds"]


def median(values: Iterable[float | None]) -> float:
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else float("nan")


def together(results: Results, *keys: Key) -> Iterator[tuple[dict[str, Any], ...]]:
    """The results of several in each round in which none failed."""
    for found in zip(*(results.get(key, []) for key in keys)):
        if not any("error" in result for result in found):
            yield found


def ratio(results: Results, key: Key, other: Key) -> str:
    """Tokens/s of one over another's, the median of the rounds."""
    found = [speed(a) / speed(b) for a, b in together(results, key, other)]
    return f"{statistics.median(found):.2f}" if found else "–"


def bound(results: Results, key: Key) -> list[str]:
    """Two cells: the least seconds of a step with so many adapters, and what share of it the system reaches.

    That least is our own step without adapters, and once the bytes of the adapters that are active in it, at the bandwidth
    of the moment, for it varies as much as the steps do.
    """
    rounds = together(results, key, ("ours", key[1]), ("ours", 0))
    steps = [(base["token"] + ours["bytes"] / ours["bandwidth"], r["token"]) for r, ours, base in rounds if r["token"]]
    if not steps:
        return ["", ""]
    # A step of those that take one adapter at a time has fewer rows: the bound is not theirs.
    reached = "" if key[0] in ONE_BY_ONE else f"{median(least / real for least, real in steps):.0%}"
    return [f"{median(least for least, _ in steps) * 1e3:.0f} ms", reached]


HEAD = [
    "| system | adapters | tokens/s | of ours | of ours without | first token | 90 % | in time | satisfaction | per token "
    "| bound | reached | memory | remark |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
]


def table(results: Results) -> list[str]:
    lines = []
    for key, rounds in results.items():
        system, count = key
        good = [r for r in rounds if "error" not in r]
        if not good:
            lines.append(f"| {system} | {count} | – {'| ' * 10}| {rounds[0]['error']} |")
            continue
        cells = [system, str(count), f"{median(map(speed, good)):.0f}"]
        cells += [ratio(results, key, ("ours", count)), ratio(results, key, ("ours", 0))]
        cells += [f"{median(quantile(r['first'], q) for r in good):.2f} s" for q in (0.5, 0.9)]
        cells += [
            f"{median(share(r, attained) for r in good):.0%}",
            f"{median(share(r, satisfaction) for r in good):.2f}",
        ]
        cells += [f"{median(r['token'] for r in good) * 1e3:.0f} ms", *bound(results, key)]
        cells.append(f"{max(r['peak'] for r in good) / 1e9:.1f} GB")
        done = median(r["tokens"] / r["wanted"] for r in good)
        cells.append("" if done > 0.999 else f"stopped after {done:.0%} of the tokens")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[int(q * (len(values) - 1))] if values else float("nan")


def share(result: dict[str, Any], rating: Callable[[float], float]) -> float:
    """The mean rating of the first tokens' times; of a request that had none it is 0."""
    return sum(map(rating, result["first"])) / result["calls"]


def note_settings(setup: Setup, running: list[Worker]) -> None:
    """What vLLM runs with."""
    for worker in running:
        told = worker.ask(do="tell")
        if worker.system == "vllm" and "settings" in told:
            note = f"vLLM with {len(worker.names)} adapters: `{json.dumps({**told['settings'], **VLLM})}`"
            setup.notes += [note] if note not in setup.notes else []


def saturated(setup: Setup) -> list[str]:
    """32 rows at once, 64 adapters, of rank 8 and of mixed ranks."""
    count, lines, ranks_of = 8 if setup.options.quick else 64, [], {"8": (8,), "8 to 64": MIXED}
    for label, ranks in ranks_of.items():
        folder, names = make_adapters(setup, f"ranks-{len(ranks)}", ranks, count)
        wanted = [("ours", folder, []), ("ours", folder, names), ("static", folder, []), ("vllm", folder, [])]
        wanted += [(system, folder, names) for system in ("vllm", "peft-mixed", "peft-switch", "peft-merge")]
        with workers(setup, *wanted) as running:
            note_settings(setup, running)
            results = take_turns(setup, running)
        read = median(round.get("bandwidth") for round in results["ours", count]) / 1e9
        lines += ["", f"### A full batch, rank {label}", "", f"A plain read: {read:.1f} GB/s.", "", *HEAD]
        lines += table(results)
        draw_bars(results, f"rank {label}", setup.options.out / f"saturated-{len(ranks)}.png")
    return lines


def growth(setup: Setup) -> list[str]:
    """The same batch while the number of adapters grows."""
    counts = (1, 4) if setup.options.quick else (1, 16, 64, 256, 1000, 2000)
    folder, names = make_adapters(setup, "ranks-1", (8,), max(counts))
    lines = ["", "### As the number of adapters grows, rank 8", "", *HEAD]
    most = {"vllm": setup.options.vllm_most, "peft-mixed": setup.options.peft_most}
    most |= {"peft-switch": setup.options.switch_most, "peft-merge": setup.options.switch_most}
    every: Results = {}
    for count in (0, *counts):
        few = names[:count]
        wanted: list[tuple[str, Path, Sequence[str]]] = [("ours", folder, [])]
        wanted += [("ours", folder, few)] if count else [("static", folder, []), ("vllm", folder, [])]
        wanted += [(system, folder, few) for system, limit in most.items() if 0 < count <= limit]
        with workers(setup, *wanted) as running:
            note_settings(setup, running)
            results = take_turns(setup, running)
        lines += [line for line in table(results) if not count or not line.startswith("| ours | 0 ")]
        every |= results
    left_out = ", ".join(f"{system} beyond {limit:,}" for system, limit in most.items() if limit < max(counts))
    lines += ["", f"Not measured, for time: {left_out}."] if left_out else []
    draw_growth(every, setup.options.out / "growth.png")
    return lines


# ------------------------------------------------------------------ the paper's workload


def trace(setup: Setup) -> list[str]:
    """Requests that arrive by themselves: bursts, some adapters more wanted than others, prompts and outputs of all lengths."""
    quick, count = setup.options.quick, 8 if setup.options.quick else 64
    folder, names = make_adapters(setup, "ranks-4", MIXED, count)
    duration = 5.0 if quick else setup.options.duration
    work = Workload(
        adapters=count, rate=setup.options.rate, duration=duration, alpha=0.5, cv=2.0, prompt=(8, 129), output=(8, 65)
    )
    results: Results = {}
    wanted: list[tuple[str, Sequence[str]]] = [("ours", [])]
    wanted += [(system, names) for system in ("ours", "vllm", "peft-mixed", "peft-switch", "peft-merge")]
    for system, few in wanted:
        calls = [
            {**vars(c), "adapter": few[c.adapter] if few and c.adapter is not None else None} for c in work.calls()
        ]
        with workers(setup, (system, folder, few)) as running:
            for worker in running:
                worker.warm_up()
                results[system, len(few)] = [worker.ask(do="run", calls=calls, seed=0, limit=1.5 * duration + 5)]
                print(" ", table(results)[-1], flush=True)
    rates = {system: share(r, attained) for (system, n), [r] in results.items() if n and "error" not in r}
    draw(
        setup.options.out / "trace.png", list(rates), list(rates.values()), f"share of first tokens within {SLO:.0f} s"
    )
    lines = ["", f"### The paper's workload: `{work}`, ranks 8 to 64, first token wanted within {SLO:.0f} s", ""]
    return [*lines, *HEAD, *table(results)]


# ------------------------------------------------------------------ thousands of adapters


def registry(setup: Setup) -> list[str]:
    """2,000 registered adapters against 100: start, memory, throughput when any of them may be asked for."""
    few, many = (4, 40) if setup.options.quick else (100, 2000)
    folder, names = make_adapters(setup, "ranks-1", (8,), many)
    size = adapter_bytes(folder, names)
    wanted: list[tuple[str, Path, Sequence[str]]] = [("ours", folder, names[:count]) for count in (0, few, many)]
    with workers(setup, *wanted) as running:
        start = {len(w.names): w.ask(do="tell") for w in running}
        results = take_turns(setup, running, count=2 * ROWS)
        end = {len(w.names): w.ask(do="tell") for w in running}
    kept = Worker(setup, "ours", folder, names[:few], keep=True, pool_bytes=1 << 28)
    try:
        before = kept.ask(do="tell")["rss"]
        for round in range(-(-few // ROWS)):
            kept.batch(round, output=2)
        after = kept.ask(do="tell")["rss"]
    finally:
        kept.close()
    lines = ["", f"### {many:,} registered adapters of rank 8, {size / 1e9:.1f} GB in {many:,} folders", ""]
    lines += [
        "| registered | start-up | adapters brought in | memory beside base and pool | of the adapters' bytes |",
        "|---|---|---|---|---|",
    ]
    for count in (few, many):
        told = end[count]
        grown, asked = told["rss"] - told["before"], told["adapter_hits"] + told["adapter_misses"]
        cells = [f"{count:,}", f"{start[count]['start_up']:.1f} s", f"{told['adapter_misses']:.0f} of {asked:.0f}"]
        cells += [f"{grown / 1e9:.2f} GB", f"{grown / adapter_bytes(folder, names[:count]):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *HEAD, *table(results)]
    kept_share = (after - before) / adapter_bytes(folder, names[:few])
    lines += [
        "",
        f"Throughput with {many:,} over that with {few}: {ratio(results, ('ours', many), ('ours', few))}.",
        f"Adapters stay in their files; the pool takes {POOL_BYTES / 1e9:.1f} GB however many there are. With "
        f"`keep`, {few} adapters take {kept_share:.2f} times their bytes of memory.",
    ]
    return lines


# ------------------------------------------------------------------ pictures and the command line


def draw(file: Path, labels: list[str], values: list[float], what: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.45 * len(labels) + 1.2), layout="constrained")
    axes.barh(labels[::-1], values[::-1])
    axes.set_xlabel(what)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def draw_bars(results: Results, title: str, file: Path) -> None:
    good = {key: [r for r in rounds if "error" not in r] for key, rounds in results.items()}
    labels = [f"{system}, {count} adapters" for (system, count), rounds in good.items() if rounds]
    draw(file, labels, [median(map(speed, rounds)) for rounds in good.values() if rounds], f"tokens/s, {title}")


def draw_growth(results: Results, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "tokens/s": speed,
        "first token, median, s": lambda result: quantile(result["first"], 0.5),
        "per token, s": lambda result: result["token"],
        "peak memory, GB": lambda result: result["peak"] / 1e9,
    }
    figure, grid = pyplot.subplots(2, 2, figsize=(10, 7), sharex=True, layout="constrained")
    for axes, (title, value) in zip(grid.flat, panels.items()):
        for system in dict.fromkeys(system for system, _ in results):
            points = {n: [r for r in rounds if "error" not in r] for (s, n), rounds in results.items() if s == system}
            points = {n: rounds for n, rounds in sorted(points.items()) if rounds}
            axes.plot(
                list(points), [median(map(value, rounds)) for rounds in points.values()], marker="o", label=system
            )
        axes.set(title=title, xlabel="adapters", ylim=(0, None))
        axes.set_xscale("symlog", linthresh=1)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="by default all")
    parser.add_argument("--quick", action="store_true", help="few adapters and one round, to see that all works")
    parser.add_argument("--without", action="append", default=[], metavar="SYSTEM", help="leave one out, as peft-merge")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=float, default=25.0, help="seconds of one round of one system")
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second of the trace")
    parser.add_argument("--duration", type=float, default=30.0, help="seconds of the trace")
    parser.add_argument(
        "--vllm-python", default=os.environ.get("VLLM_PYTHON"), help="the Python of vllm-cpu's environment"
    )
    parser.add_argument("--vllm-eager", action="store_true", help="vLLM without torch.compile")
    parser.add_argument("--vllm-most", type=int, default=2000, help="most adapters for vLLM as they grow")
    parser.add_argument("--peft-most", type=int, default=256, help="the same for PEFT's mixed batch")
    parser.add_argument("--switch-most", type=int, default=64, help="the same for PEFT switching and merging")
    parser.add_argument("--adapters-folder", type=Path, help="keep the adapters there and use them again")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.limit = 1, min(options.limit, 15.0)
    return options


def main() -> None:
    options = command_line()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="serving-") as scratch:
        setup = Setup(options, Path(scratch, "base"), options.adapters_folder or Path(scratch, "adapters"), options.out)
        model, tokenizer = load_base("smollm2", dtype=options.dtype)
        model.save_pretrained(setup.base)
        tokenizer.save_pretrained(setup.base)
        del model
        setup.config = AutoConfig.from_pretrained(setup.base)
        need = 11 * setup.dtype.itemsize // 2  # GB, of 2,000 adapters of rank 8
        if not options.quick and shutil.disk_usage(scratch).free < need * 1e9:
            sys.exit(f"{scratch} has less than {need} GB free; name another disk in TMPDIR.")
        lines = [
            f"Measured {date.today()} on {processor()}, {options.threads} threads, torch {torch.__version__}; SmolLM2-135M "
            f"{options.dtype}, LoRAs on all seven linears; closed batches of {ROWS} rows, prompt {PROMPT}, output {OUTPUT} "
            f"tokens; medians of {options.rounds} interleaved rounds, none longer than {options.limit:.0f} s."
        ]
        for part in options.part or PARTS:
            start = time.perf_counter()
            print(f"{part}:", flush=True)
            lines += globals()[part](setup)
            print(f"{part} took {time.perf_counter() - start:.0f} s", flush=True)
            text = "\n".join([*lines, "", *setup.notes]) + "\n"
            (options.out / "serving.md").write_text(text)  # after each part, so that nothing measured is lost
    print("\n" + text)


if __name__ == "__main__":
    main()
