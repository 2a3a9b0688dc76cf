"""What an attached LoRA costs: forward and training step of the bare base, ours and PEFT's, on the same real base.

    python benchmarks/overhead.py [--rounds 15] [--out overhead.md]

The three take turns inside one run, so that a slow moment of the machine meets all; medians and ratios are reported.
"""

from __future__ import annotations

import argparse
import copy
import functools
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import peft
import torch
from torch import nn

import anyadapter as aa
from anyadapter.training.base import load_base

BATCH, LENGTH, RANK, THREADS = 4, 64, 8, 2
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def forward(model: nn.Module, ids: torch.Tensor) -> None:
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)


def training_step(model: nn.Module, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)

    base, _ = load_base("smollm2")
    base.requires_grad_(False)
    base.enable_input_require_grads()  # the bare base's step goes back to its embeddings, as an adapter's does
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    mine = aa.LoRAConfig(rank=RANK, alpha=2 * RANK, targets=TARGETS)
    attaching = []
    for turn in range(5):
        attaching.append(timed(lambda: aa.attach(ours, mine)))
        if turn < 4:
            aa.detach(ours)
    settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    start = time.perf_counter()
    wrapped = peft.get_peft_model(theirs, settings)
    peft_attaching = time.perf_counter() - start

    models: dict[str, nn.Module] = {"base": base, "anyadapter": ours, "PEFT": wrapped}
    ids = torch.randint(0, base.config.vocab_size, (BATCH, LENGTH))
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(arguments.rounds + 2):
        for name, model in models.items():
            for kind, step in (("forward", forward), ("training step", training_step)):
                seconds = timed(functools.partial(step, model, ids))
                if turn >= 2:  # the first two warm caches up
                    times.setdefault((kind, name), []).append(seconds)

    lines = [
        f"Measured {date.today()} on {platform.processor() or platform.machine()}, {THREADS} threads, torch {torch.__version__}, "
        f"PEFT {peft.__version__}; SmolLM2-135M fp32, batch {BATCH} × {LENGTH} tokens, LoRA rank {RANK} on all seven linears "
        f"of 30 layers; median of {arguments.rounds} interleaved rounds.",
        "",
        "| | base | anyadapter | PEFT | anyadapter / base | anyadapter / PEFT |",
        "|---|---|---|---|---|---|",
    ]
    for kind in ("forward", "training step"):
        b, a, p = (statistics.median(times[kind, name]) for name in models)
        paired = statistics.median(x / y for x, y in zip(times[kind, "anyadapter"], times[kind, "PEFT"]))
        lines.append(
            f"| {kind} | {b * 1e3:.0f} ms | {a * 1e3:.0f} ms | {p * 1e3:.0f} ms | {a / b:.2f} | {paired:.2f} |"
        )
    attached = statistics.median(attaching)
    lines.append(
        f"| attach | | {attached * 1e3:.0f} ms | {peft_attaching * 1e3:.0f} ms | | {attached / peft_attaching:.2f} |"
    )
    table = "\n".join(lines)
    print(table)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(table + "\n")


if __name__ == "__main__":
    main()
