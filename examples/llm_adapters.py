"""LLM-Adapters: the four families on one frozen model, three seeds, against the frozen base.

    python examples/llm_adapters.py [--out results/llm_adapters] [--data FOLDER]

By default the quickstart's task (spam or ham in real text messages), which two CPU cores do in some ten minutes. ``--data`` takes
a folder in the paper's form, such as ``openbookqa`` with ``train.json`` and ``test.json``, and scores with its protocol.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import anyadapter as aa
from anyadapter import quickstart
from anyadapter.training.base import load_base
from anyadapter.training.evaluate import evaluate, read_records
from anyadapter.training.run import train

SEEDS = (0, 1, 2)


def one_seed(model: Any, tokenizer: Any, seed: int, out: Path, data: Path | None, limit: int) -> dict[str, float]:
    """Accuracy of the base and of each family for one seed of the data, the start and the order."""
    if data is None:
        files = quickstart.write_rows(out, *quickstart.spam_rows(seed))
        options: dict[str, Any] = {"metric": "exact", "max_new_tokens": quickstart.NEW_TOKENS}
    else:
        files = {"train": data / "train.json", "test": data / "test.json"}
        options = {"metric": data.name}
    records = read_records(files["test"])[:limit]
    scores = {"base": evaluate(model, tokenizer, records, batch=16, **options).accuracy}
    for name, recipe in quickstart.RECIPES.items():
        config = quickstart.run_config(recipe, "smollm2", files, out / name, None, seed)
        if data is not None:
            config["data"] |= {"template": "llm-adapters", "max_length": 256}
        result = train(
            config,
            model=model,
            tokenizer=tokenizer,
            prepare=lambda adapter, name=name: quickstart.prepare(adapter, name, model, tokenizer),
        )
        if result.was_finished:
            aa.load(model, result.adapter)
        scores[name] = evaluate(model, tokenizer, records, batch=16, **options).accuracy
        aa.detach(model)
        print(f"seed {seed} {name}: {scores[name]:.1%} (base {scores['base']:.1%})", flush=True)
    return scores


def table(scores: list[dict[str, float]]) -> str:
    """Mean and range over the seeds, in Markdown."""
    lines = [
        "| | " + " | ".join(f"seed {seed}" for seed in SEEDS[: len(scores)]) + " | mean |",
        "|---" * (len(scores) + 2) + "|",
    ]
    for name in scores[0]:
        values = [s[name] for s in scores]
        title = quickstart.RECIPES[name].title if name in quickstart.RECIPES else "frozen base"
        lines.append(
            f"| {title} | " + " | ".join(f"{v:.1%}" for v in values) + f" | **{statistics.mean(values):.1%}** |"
        )
    return "\n".join(lines)


def plot(scores: list[dict[str, float]], path: Path) -> None:
    """Bars of the means, a dot for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    names = list(scores[0])
    axes.bar(
        names,
        [statistics.mean(s[n] for s in scores) for n in names],
        color=["#b0b8c4", *["#3b6ea5"] * (len(names) - 1)],
    )
    for position, name in enumerate(names):
        axes.plot([position] * len(scores), [s[name] for s in scores], "o", color="#222", markersize=4)
    axes.set(ylabel="exact answers", ylim=(0, 1.05))
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/llm_adapters"))
    parser.add_argument("--data", type=Path, help="a data set of the paper, with train.json and test.json")
    parser.add_argument("--limit", type=int, default=160, help="test questions")
    arguments = parser.parse_args()
    model, tokenizer = load_base("smollm2")
    scores = [
        one_seed(model, tokenizer, seed, arguments.out / f"seed-{seed}", arguments.data, arguments.limit)
        for seed in SEEDS
    ]
    (arguments.out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    (arguments.out / "table.md").write_text(table(scores) + "\n")
    plot(scores, arguments.out / "accuracy.png")
    print(table(scores))


if __name__ == "__main__":
    main()
