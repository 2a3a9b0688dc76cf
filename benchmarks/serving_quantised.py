"""One-bit adapters in the serving pool against the same ones in the base's 16 bits: how many fit, and how fast a batch is.

    python benchmarks/serving_quantised.py [--rank 8] [--rows 32] [--adapters 64] [--rounds 5] [--gigabytes 0.5] [--base smollm2]

Both kinds take turns on one model. A round is a full batch, each row with another adapter, on all linears; prompts included.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import anyadapter as aa
from anyadapter.serving.engine import Engine, EngineSettings
from anyadapter.serving.pool import PoolFullError
from anyadapter.serving.request import Request, Sampling
from anyadapter.training.base import load_base

KINDS = ("16 bits", "1 bit")
TOKENS = 64  # of a prompt, and of an output


def make_adapters(model: Any, root: Path, rank: int, count: int) -> None:
    """``count`` random LoRAs, each in both kinds."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        adapter = aa.attach(model, aa.LoRAConfig(rank=rank, alpha=rank, targets="all-linear"), "made")
        for tensor in adapter.tensors().values():
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.02)
        aa.save_pretrained(model, root / f"dense{i}", "made", dtype=torch.float16)
        aa.quantize(adapter, bits=1)
        aa.save_pretrained(model, root / f"bits{i}", "made")
        aa.detach(model, "made")


def names(kind: str, count: int) -> list[str]:
    return [f"{'dense' if kind == KINDS[0] else 'bits'}{i}" for i in range(count)]


def fit(engine: Engine, kind: str, count: int) -> int:
    """How many adapters of this kind the pool holds at once: as many names as it takes, over ``count`` folders."""
    engine.residents.keep(())
    folders, held = names(kind, count), 0
    try:
        while True:
            registered = engine.store.get(folders[held % count])
            resident = f"{registered.id}/{held}"
            engine.residents.load(resident, registered.packing, 1.0, lambda found=registered: engine.store.pack(found))
            engine.residents.use([resident])
            held += 1
    except PoolFullError:
        for resident in list(engine.residents.by_id):
            engine.residents.leave([resident])
        engine.residents.keep(())
        return held


def speed(engine: Engine, kind: str, count: int, rows: int) -> float:
    """Tokens a second of a full batch."""
    generator = torch.Generator().manual_seed(1)
    chosen = names(kind, count) if kind else []
    for i in range(rows):
        prompt = tuple(torch.randint(5, 40_000, (TOKENS,), generator=generator).tolist())
        adapters = {chosen[i % count]: 1.0} if kind else {}
        engine.submit(Request(str(i), prompt, adapters, Sampling(max_tokens=TOKENS, temperature=0, ignore_eos=True)))
    start = time.perf_counter()
    while engine.has_work:
        engine.step()
    return rows * TOKENS / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--base", default="smollm2")
    arguments = parser.parse_args()
    model, tokenizer = load_base(arguments.base, dtype="bfloat16")
    root = Path(tempfile.mkdtemp(prefix="quantised-"))
    try:
        make_adapters(model, root, arguments.rank, arguments.adapters)
        sizes = {
            k: (root / f"{n[0]}" / "adapter_model.safetensors").stat().st_size for k in KINDS if (n := names(k, 1))
        }
        settings = EngineSettings(
            pool_bytes=int(arguments.gigabytes * 2**30), adapters=str(root), max_running=arguments.rows
        )
        engine = Engine(model, tokenizer, settings=settings)
        engine.store.scan()
        cells = {kind: engine.store.get(names(kind, 1)[0]).cells for kind in KINDS}
        held = {kind: fit(engine, kind, arguments.adapters) for kind in KINDS}
        speeds: dict[str, list[float]] = {kind: [] for kind in ("", *KINDS)}
        for _ in range(arguments.rounds + 1):  # the first warms up
            for kind, found in speeds.items():
                found.append(speed(engine, kind, arguments.adapters, arguments.rows))
        engine.close()
    finally:
        shutil.rmtree(root)
    print(f"rank {arguments.rank}, {arguments.rows} rows, a pool of {arguments.gigabytes} GiB")
    print("| | file | cells | fit into the pool | tokens/s, median of the rounds |\n|---|---|---|---|---|")
    for kind in KINDS:
        rounds = speeds[kind][1:]
        print(f"| {kind} | {sizes[kind]:,} | {cells[kind]} | {held[kind]:,} | {statistics.median(rounds):.0f} |")
    print(f"without adapters: {statistics.median(speeds[''][1:]):.0f} tokens/s")
    dense, bits = (speeds[kind][1:] for kind in KINDS)
    ratios = [b / d for b, d in zip(bits, dense)]
    print(
        f"1 bit over 16: {held[KINDS[1]] / held[KINDS[0]]:.1f} times as many, {statistics.median(ratios):.2f} times the speed"
    )
    print("rounds: " + ", ".join(f"{d:.0f} and {b:.0f}" for d, b in zip(dense, bits)))


if __name__ == "__main__":
    main()
