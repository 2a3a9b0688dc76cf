"""One system under test in a process of its own, which serving.py speaks to by lines of JSON.

    python serving_baselines.py '{"system": "ours", "base": FOLDER, "adapters": FOLDER, "dtype": "bfloat16", …}'

Systems: ours, static (transformers' generate), peft-mixed, peft-switch, peft-merge, vllm. Each imports only what it needs, so
that vLLM can live in an environment of its own.
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import sys
import time
from abc import ABC, abstractmethod
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

Call = dict[str, Any]  # id, adapter (None: the base), prompt (token ids), output (how many), arrival (seconds)
VOCABULARY = 40_000  # prompts are random tokens below this
PADDING = 0


def calls_of(job: dict[str, Any]) -> list[Call]:
    """The calls of a job; prompts are random, and the same in every system."""
    generator = random.Random(job["seed"])
    return [
        {**call, "id": str(i), "prompt": [generator.randrange(10, VOCABULARY) for _ in range(call["prompt"])]}
        for i, call in enumerate(job["calls"])
    ]


class Record:
    """When each call's tokens came, in seconds since the start."""

    def __init__(self, calls: list[Call]) -> None:
        self.calls = {call["id"]: call for call in calls}
        self.times: dict[str, list[float]] = {call["id"]: [] for call in calls}
        self.start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.start

    def push(self, id: str, count: int = 1) -> None:
        wanted = self.calls[id]["output"] - len(self.times[id])
        self.times[id] += [self.now()] * min(count, wanted)

    def result(self) -> dict[str, Any]:
        """The seconds each took to its first token, and from one token to the next."""
        done = {id: times for id, times in self.times.items() if times}
        gaps = [b - a for times in done.values() for a, b in pairwise(times)]
        return {
            "seconds": self.now(),
            "tokens": sum(map(len, done.values())),
            "wanted": sum(call["output"] for call in self.calls.values()),
            "first": [times[0] - self.calls[id]["arrival"] for id, times in done.items()],
            "token": statistics.median(gaps) if gaps else None,
            "calls": len(self.calls),
        }


class Stepped(ABC):
    """A system with continuous batching: requests are added between steps."""

    @abstractmethod
    def busy(self) -> bool:
        """Whether a request is in hand."""

    @abstractmethod
    def add(self, call: Call) -> None:
        """Take a request."""

    @abstractmethod
    def step(self) -> list[tuple[str, int]]:
        """Compute one pass: how many new tokens each request has."""

    @abstractmethod
    def drop(self, ids: list[str]) -> None:
        """End these requests, of which some may have ended."""

    def run(self, calls: list[Call], limit: float) -> dict[str, Any]:
        record, waiting = Record(calls), sorted(calls, key=lambda call: call["arrival"])
        while (waiting or self.busy()) and record.now() < limit:
            while waiting and waiting[0]["arrival"] <= record.now():
                self.add(waiting.pop(0))
            if not self.busy():
                time.sleep(0.002)
                continue
            for id, count in self.step():
                record.push(id, count)
        result = record.result()
        self.drop([call["id"] for call in calls])
        return result


class Ours(Stepped):
    """This library's engine."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch

        from anyadapter.serving.engine import Engine, EngineSettings
        from anyadapter.training.base import load_base

        model, _ = load_base(options["base"], dtype=options["dtype"])
        start = time.perf_counter()
        settings = EngineSettings(
            adapters=options["adapters"],
            max_running=options["rows"],
            max_waiting=100_000,
            pool_bytes=options["pool_bytes"],
            keep=options.get("keep", False),
        )
        self.engine = Engine(model, settings=settings)
        self.plain = torch.ones(1 << 26)  # what is read plainly, for the bandwidth
        self.sizes = {
            n: Path(options["adapters"], n, "adapter_model.safetensors").stat().st_size for n in options["names"]
        }
        self.active: list[int] = []  # bytes of the adapters of running requests, for each pass
        before = memory("VmRSS")  # the base and the pool
        for name in options["names"]:
            self.engine.store.register(name, check=False)
        self.facts = {"start_up": time.perf_counter() - start, "before": before}

    def busy(self) -> bool:
        return self.engine.has_work

    def add(self, call: Call) -> None:
        from anyadapter.serving.request import Request, Sampling

        sampling = Sampling(max_tokens=call["output"], temperature=0, ignore_eos=True)
        adapters = {call["adapter"]: 1.0} if call["adapter"] else {}
        self.engine.submit(Request(call["id"], tuple(call["prompt"]), adapters, sampling))

    def step(self) -> list[tuple[str, int]]:
        outputs = self.engine.step()
        failed = [output.message for output in outputs if output.finish == "error"]
        if failed:
            raise RuntimeError(failed[0])
        names = {name for request in self.engine.scheduler.running for name in request.adapters}
        self.active.append(sum(self.sizes[name] for name in names))
        return [(output.id, len(output.tokens)) for output in outputs]

    def drop(self, ids: list[str]) -> None:
        for id in ids:
            self.engine.cancel(id)

    def run(self, calls: list[Call], limit: float) -> dict[str, Any]:
        self.active.clear()
        result = super().run(calls, limit)
        return {**result, "bytes": statistics.median(self.active), "bandwidth": bandwidth(self.plain)}

    def tell(self) -> dict[str, Any]:
        return {**self.facts, **self.engine.stats(), "rss": memory("VmRSS")}


class Vllm(Stepped):
    """vLLM for the CPU, in this process."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        names, rows = options["names"], options["rows"]
        self.options, self.ids = options, {name: i + 1 for i, name in enumerate(names)}
        self.settings: dict[str, Any] = {
            "dtype": options["dtype"],
            "max_num_seqs": rows,
            "max_model_len": 512,
            "enable_prefix_caching": False,
            "enforce_eager": options.get("eager", False),
        }
        if names:
            slots = min(rows, len(names))
            self.settings |= {"enable_lora": True, "max_loras": slots, "max_cpu_loras": max(slots, len(names))}
            self.settings["max_lora_rank"] = options["rank"]
        llm = LLM(model=options["base"], skip_tokenizer_init=True, disable_log_stats=True, **self.settings)
        self.engine = llm.llm_engine
        self.begun: dict[str, int] = {}

    def busy(self) -> bool:
        return self.engine.has_unfinished_requests()

    def add(self, call: Call) -> None:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        name, lora = call["adapter"], None
        if name:
            lora = LoRARequest(name, self.ids[name], str(Path(self.options["adapters"], name)))
        sampling = SamplingParams(max_tokens=call["output"], temperature=0, ignore_eos=True, detokenize=False)
        self.begun[call["id"]] = 0
        prompt = {"prompt_token_ids": call["prompt"]}
        self.engine.add_request(call["id"], prompt, sampling, lora_request=lora)

    def step(self) -> list[tuple[str, int]]:
        new = []
        for output in self.engine.step():
            id = output.request_id
            if id in self.begun:
                count = len(output.outputs[0].token_ids)
                new.append((id, count - self.begun[id]))
                self.begun[id] = count
        return new

    def drop(self, ids: list[str]) -> None:
        left = [id for id in ids if id in self.begun]
        if self.busy():
            self.engine.abort_request(left)
        while self.busy():
            self.engine.step()
        self.begun.clear()

    def tell(self) -> dict[str, Any]:
        return {"settings": {**self.settings, "threads": os.environ.get("VLLM_CPU_OMP_THREADS_BIND")}}


class Batched:
    """A system that generates one fixed batch at a time: the calls that have come by then, up to a number of rows."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, options["dtype"])
        self.options = options
        self.model = AutoModelForCausalLM.from_pretrained(options["base"], dtype=dtype).eval()
        self.model.generation_config.eos_token_id = None  # as ignore_eos
        self.model.generation_config.pad_token_id = PADDING
        self.load(options["names"])

    def load(self, names: list[str]) -> None:
        """Bring adapters in, if it can."""

    def tell(self) -> dict[str, Any]:
        return {}

    def run(self, calls: list[Call], limit: float) -> dict[str, Any]:
        record, waiting = Record(calls), sorted(calls, key=lambda call: call["arrival"])
        while waiting and record.now() < limit:
            arrived = [call for call in waiting if call["arrival"] <= record.now()]
            if not arrived:
                time.sleep(0.002)
                continue
            batch = self.choose(arrived)[: self.options["rows"]]
            taken = {call["id"] for call in batch}
            waiting = [call for call in waiting if call["id"] not in taken]
            self.generate(batch, record, limit)
        return record.result()

    def choose(self, arrived: list[Call]) -> list[Call]:
        """Those that can share a batch with the first."""
        return arrived

    def generate(self, batch: list[Call], record: Record, limit: float, **how: Any) -> None:
        """Run one batch to the end of its longest output, or to the limit."""
        import torch
        from transformers import StoppingCriteria

        class Watch(StoppingCriteria):
            def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                for call in batch:
                    record.push(call["id"])
                return torch.full((len(ids),), record.now() > limit)

        longest = max(len(call["prompt"]) for call in batch)
        ids = torch.full((len(batch), longest), PADDING)
        mask = torch.zeros_like(ids)
        for row, call in enumerate(batch):
            ids[row, longest - len(call["prompt"]) :] = torch.tensor(call["prompt"])
            mask[row, longest - len(call["prompt"]) :] = 1
        output = max(call["output"] for call in batch)
        with torch.inference_mode():
            self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=output,
                do_sample=False,
                stopping_criteria=[Watch()],
                **how,
            )


class Mixed(Batched):
    """PEFT with an adapter for each row."""

    def load(self, names: list[str]) -> None:
        from peft import PeftModel

        folder = Path(self.options["adapters"])
        first, *rest = names
        self.model = PeftModel.from_pretrained(self.model, folder / first, adapter_name=first)
        end = time.perf_counter() + self.options["load_limit"]
        for name in rest:
            if time.perf_counter() > end:
                raise TimeoutError(f"loading {len(names)} adapters takes more than {self.options['load_limit']:.0f} s")
            self.model.load_adapter(folder / name, adapter_name=name)
        self.model.eval()

    def generate(self, batch: list[Call], record: Record, limit: float, **how: Any) -> None:
        names = [call["adapter"] or "__base__" for call in batch]
        super().generate(batch, record, limit, adapter_names=names)


class Switching(Mixed):
    """PEFT with one adapter for a batch."""

    def choose(self, arrived: list[Call]) -> list[Call]:
        return [call for call in arrived if call["adapter"] == arrived[0]["adapter"]]

    def generate(self, batch: list[Call], record: Record, limit: float, **how: Any) -> None:
        self.model.set_adapter(batch[0]["adapter"])
        Batched.generate(self, batch, record, limit)


class Merging(Switching):
    """PEFT with one adapter for a batch, merged into the weights before and taken out after."""

    def generate(self, batch: list[Call], record: Record, limit: float, **how: Any) -> None:
        self.model.merge_adapter([batch[0]["adapter"]])
        try:
            Batched.generate(self, batch, record, limit)
        finally:
            self.model.unmerge_adapter()


SYSTEMS: dict[str, Any] = {
    "ours": Ours,
    "static": Batched,
    "peft-mixed": Mixed,
    "peft-switch": Switching,
    "peft-merge": Merging,
    "vllm": Vllm,
}


def memory(what: str) -> int:
    """Bytes, from the kernel: ``VmRSS`` now, ``VmHWM`` the most since the last job began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[what].split()[0]) * 1024


def bandwidth(tensor: Any) -> float:
    """Bytes a second of a plain read of a big tensor: the median of five."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        tensor.sum()
        times.append(time.perf_counter() - start)
    return tensor.nbytes / statistics.median(times)


def talk(system: Any, lines: TextIO, out: TextIO) -> None:
    """Answer each line: ``{"do": "run", …}`` or ``{"do": "tell"}``."""
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in lines:
        job = json.loads(line)
        if job["do"] == "tell":
            answer = system.tell()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
            answer = {**system.run(calls_of(job), job["limit"]), "peak": memory("VmHWM")}
        print(json.dumps(answer), file=out, flush=True)


def main() -> None:
    options = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import torch

    if options["system"] != "vllm":
        torch.set_num_threads(options["threads"])
    try:
        system = SYSTEMS[options["system"]](options)
    except Exception as error:  # said to the other side, which puts it into the table
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:300]}), file=out, flush=True)
        raise
    talk(system, sys.stdin, out)


if __name__ == "__main__":
    main()
