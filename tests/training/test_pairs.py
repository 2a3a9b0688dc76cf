"""Pairs of texts: how facts give them, how batches take turns, and whole runs in stages on a tiny encoder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModel
from typer.testing import CliRunner

import anyadapter as aa
from anyadapter.cli import app
from anyadapter.methods.language.mlkg import MLKG
from anyadapter.training import report
from anyadapter.training.base import load_base
from anyadapter.training.pairs import Graph, Turns, read_facts, read_names
from anyadapter.training.run import train

NAMES = {
    "Q1": {"en": "France", "de": "Frankreich", "pl": "Francja"},
    "Q2": {"en": "Germany", "de": "Deutschland", "pl": "Niemcy"},
    "Q3": {"en": "Poland", "de": "Polen", "pl": "Polska"},
    "Q4": {"en": "euro"},
    "P1": {"en": "borders", "de": "grenzt an"},
    "P2": {"en": "has the money"},
}
TEXTS = {"Q1": {"en": "a country in the west", "de": "ein Land im Westen"}, "Q4": {"en": "money of many countries"}}
FACTS = [("Q1", "P1", "Q2"), ("Q2", "P1", "Q3"), ("Q1", "P2", "Q4"), ("Q2", "P2", "Q4")]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def names(tmp_path: Path) -> Path:
    rows = [{"id": key, "labels": labels, "descriptions": TEXTS.get(key, {})} for key, labels in NAMES.items()]
    return write(tmp_path / "names.jsonl", rows)


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    path = tmp_path / "facts.tsv"
    path.write_text("head\trelation\ttail\n" + "".join("\t".join(fact) + "\n" for fact in FACTS))
    return path


# -------------------------------------------------------------------------- knowledge graphs


def test_each_kind_of_pair_is_what_it_says(names: Path, facts: Path) -> None:
    graph = Graph(read_facts(facts), read_names(names))
    language = {label: (key, code) for key, labels in NAMES.items() for code, label in labels.items()}
    seen: dict[str, set[str]] = {"ep": set(), "tp": set(), "es": set()}
    for seed in range(20):
        draw = random.Random(seed)
        entities = list(graph.pairs("ep", draw))
        assert [language[pair.query][0] for pair in entities] == ["Q1", "Q2", "Q3"]  # euro has one name only
        for pair in entities:
            (one, a), (other, b) = language[pair.query], language[pair.positive]
            assert one == other
            assert a != b
            seen["ep"].add(a + b)
        for pair, (head, relation, tail) in zip(graph.pairs("tp", draw), FACTS, strict=True):
            assert pair.query in {f"{h} {r}" for h in NAMES[head].values() for r in NAMES[relation].values()}
            assert pair.positive in NAMES[tail].values()
            seen["tp"].add(pair.query)
        described = list(graph.pairs("es", draw))
        assert [language[pair.positive][0] for pair in described] == ["Q1", "Q4"]
        assert all(pair.query in TEXTS[language[pair.positive][0]].values() for pair in described)
        seen["es"] |= {pair.query for pair in described}
    assert len(seen["ep"]) == 6  # every language with every other
    assert {"France grenzt an", "Frankreich borders"} <= seen["tp"]  # mixed
    assert len(seen["es"]) == 3
    assert list(graph.pairs("ts", random.Random(0))) == []


def test_a_sentence_is_given_without_its_object(names: Path, tmp_path: Path) -> None:
    row = {"s": "Q1", "p": "P1", "o": "Q2", "sentence": "France shares a long border with Germany , in the east."}
    path = write(tmp_path / "facts.jsonl", [row])
    rows = read_facts(path, {"head": "s", "relation": "p", "tail": "o"})
    (pair,) = Graph(rows, read_names(names)).pairs("ts", random.Random(0))
    assert pair.query == "France shares a long border with , in the east."
    assert pair.positive in NAMES["Q2"].values()
    with pytest.raises(aa.DataError, match=r"facts.jsonl:1: no name of the tail .*Deutschland"):
        list(Graph(rows, read_names(names), ["de"]).pairs("ts", random.Random(0)))


def test_only_the_chosen_languages_are_used_and_without_names_the_facts_are_the_names(names: Path, facts: Path) -> None:
    rows = read_facts(facts)[:2]
    graph = Graph(rows, read_names(names), ["de", "en"])
    texts = " ".join(f"{pair.query} {pair.positive}" for s in range(20) for pair in graph.pairs("ep", random.Random(s)))
    assert not any(labels.get("pl", "Q") in texts for labels in NAMES.values())
    bare = Graph(rows)
    assert list(bare.pairs("ep", random.Random(0))) == []
    assert [(pair.query, pair.positive) for pair in bare.pairs("tp", random.Random(0))] == [
        ("Q1 P1", "Q2"),
        ("Q2 P1", "Q3"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("facts.tsv", "Q1\tP1\n", r"facts.tsv:1: 2 columns"),
        ("facts.tsv", "Q1\tP1\tQ2\n\nQ1\t\tQ2\n", r"facts.tsv:3: 3 columns"),
        ("facts.tsv", "head\trelation\ttail\n", "holds no rows"),
        ("facts.jsonl", '{"head": "Q1", "relation": "P1"}\n', r"facts.jsonl:1: has the columns"),
        ("facts.jsonl", '{"head": "Q1", "relation": "P1", "tail": " "}\n', "'tail' is ' '"),
        ("facts.jsonl", '{"query": "a", "positive": 3, "role": "ep"}\n', "'positive' is 3"),
        ("facts.csv", "Q1,P1,Q2\n", "expected a .jsonl file"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(aa.DataError, match=says):
        read_facts(tmp_path / name)


def test_bad_names_and_facts_of_the_unknown_are_named(names: Path, facts: Path, tmp_path: Path) -> None:
    for row in (
        {"id": "Q1"},
        {"id": "Q1", "labels": {}},
        {"id": 1, "labels": {"en": "x"}},
        {"id": "Q1", "labels": {"en": ""}},
    ):
        with pytest.raises(aa.DataError, match=r"bad.jsonl:1: a row is"):
            read_names(write(tmp_path / "bad.jsonl", [row]))
    twice = [{"id": "Q1", "labels": {"en": "x"}}] * 2
    with pytest.raises(aa.DataError, match=r"bad.jsonl:2: the id 'Q1' stands"):
        read_names(write(tmp_path / "bad.jsonl", twice))
    known = read_names(names)
    with pytest.raises(aa.DataError, match=r"facts.tsv:4: the tail 'Q4' has no name in de"):
        Graph(
            read_facts(facts)[:1] + read_facts(facts)[2:],
            {k: v for k, v in known.items() if k != "P2"} | {"P2": known["P1"]},
            ["de"],
        )
    del known["Q3"]
    with pytest.raises(aa.DataError, match=r"facts.tsv:3: no name is given for the tail 'Q3'"):
        Graph(read_facts(facts), known)


# -------------------------------------------------------------------------- turns


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(3, 40), min_size=1, max_size=4), size=st.integers(1, 3), seed=st.integers(0, 99))
def test_batches_are_of_one_role_each_row_once_and_roles_take_turns(counts: list[int], size: int, seed: int) -> None:
    starts = [sum(counts[:i]) for i in range(len(counts))]
    rows = {str(i): list(range(start, start + n)) for i, (start, n) in enumerate(zip(starts, counts))}
    turns = Turns(rows, size, seed)
    order = list(turns)
    assert len(order) == len(turns) == sum(n // size * size for n in counts)
    assert len(set(order)) == len(order)
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    roles = [next(role for role, own in rows.items() if batch[0] in own) for batch in batches]
    assert all(set(batch) <= set(rows[role]) for batch, role in zip(batches, roles))
    if len({n // size for n in counts}) == 1:  # as many batches of each: strictly one after the other
        assert roles == [str(i) for i in range(len(counts))] * (counts[0] // size)
    assert list(turns) == order
    turns.set_epoch(1)
    assert len(order) < 8 or list(turns) != order


def test_too_few_pairs_for_a_batch_are_refused() -> None:
    with pytest.raises(aa.ConfigError, match="3 pairs for 'tp'"):
        Turns({"ep": list(range(9)), "tp": [9, 10, 11]}, 4, 0)


# -------------------------------------------------------------------------- whole runs


@pytest.fixture
def config(letters_bert: Path, names: Path, facts: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "base": str(letters_bert),
        "adapter": {"method": "mlkg", "roles": {"ep": "", "tp": "", "es": ""}, "use": "ep"},
        "data": {"train": str(facts), "names": str(names), "eval": str(facts), "draws": 6},
        "training": {
            "epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "device": "cpu", "log_every": 1, "keep_best": False,
            "stages": [{"groups": ["ep", "tp"]}, {"groups": ["es"]}, {"groups": ["fusion"]}],
        },
        "output": str(tmp_path / "run"),
    }  # fmt: skip


def folder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_each_stage_trains_its_own_and_the_result_is_used_as_its_settings_say(config: dict[str, Any]) -> None:
    model, tokenizer = load_base(config["base"], auto=AutoModel)
    started: dict[str, torch.Tensor] = {}

    def note(adapter: aa.Adapter) -> None:
        started.update({name: tensor.detach().clone() for name, tensor in adapter.tensors().items()})

    result = train(config, model=model, tokenizer=tokenizer, prepare=note, progress=False)
    before = started
    for stage, groups in (
        ("checkpoints/stage-1/adapter", {"ep", "tp"}),
        ("checkpoints/stage-2/adapter", {"es"}),
        ("adapter", {"fusion"}),
    ):
        after = folder_tensors(result.folder / stage)
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        kinds = {"fusion" if ".fusion." in name else name.split(".adapters.")[1].split(".")[0] for name in changed}
        assert kinds == groups, stage
        before = after
    adapter = aa.adapters(model)["default"]
    assert isinstance(adapter, MLKG)
    assert adapter.config.use == ("ep",)
    assert {branch.used for branch in adapter.branches.values()} == {("ep",)}
    assert {"ep_hit@1", "tp_mrr", "es_hit@10"} <= result.metrics.keys()


def test_each_step_changes_one_adapter_and_they_take_turns(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No gradient is left over from the step before, as in the authors' code, where EP's step repeats TP's."""
    attached: list[aa.Adapter] = []
    before: dict[str, torch.Tensor] = {}
    steps: list[set[str]] = []

    def remember(*args: Any, **kwargs: Any) -> None:
        now = {name: tensor.detach().clone() for name, tensor in attached[0].tensors().items()}
        changed = [name for name, tensor in now.items() if before and not torch.equal(tensor, before[name])]
        steps.append({name.split(".adapters.")[1].split(".")[0] for name in changed})
        before.update(now)

    monkeypatch.setattr(report.LogFile, "on_step_end", remember)
    monkeypatch.setattr(report.LogFile, "on_train_begin", remember)
    settings = {"stages": [{"groups": ["ep", "tp"], "steps": 8}], "weight_decay": 0.1, "keep_best": False}
    config["training"] |= settings
    train(config, prepare=attached.append, progress=False)
    turns = [next(iter(changed)) for changed in steps[2:] if len(changed) == 1]  # the first has a rate of zero
    assert len(turns) == len(steps) - 2
    assert set(turns) == {"ep", "tp"}
    assert turns.count("tp") >= 3


def test_broken_off_and_called_again_it_ends_with_the_same_numbers(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train({**config, "output": config["output"] + "-whole"}, progress=False)
    for stage, step in ((1, 13), (3, 20)):

        def stop(
            self: Any, args: Any, state: Any, control: Any, stage: int = stage, step: int = step, **kwargs: Any
        ) -> None:
            if (self.stage, state.global_step) == (stage, step):
                raise KeyboardInterrupt

        monkeypatch.setattr(report.LogFile, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, progress=False)
        monkeypatch.undo()
    resumed = train(config, progress=False)
    assert resumed.resumed_from is not None
    assert resumed.metrics == whole.metrics
    one, other = folder_tensors(whole.adapter), folder_tensors(resumed.adapter)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_from_the_command_line_the_wide_baseline_learns_the_same_pairs(
    config: dict[str, Any], names: Path, tmp_path: Path
) -> None:
    wide = {
        "method": "bottleneck",
        "placement": "houlsby",
        "reduction": 1,
        "activation": "relu",
        "init": "bert",
        "bias": True,
    }
    config = {**config, "adapter": wide, "data": {**config["data"], "task": "pairs", "roles": ["ep", "tp"]}}
    config["training"] = {**config["training"], "stages": [], "learning_rate": 1e-3, "epochs": 6}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(app, ["train", str(path)])
    assert result.exit_code == 0, result.output
    log = [json.loads(line) for line in (Path(config["output"]) / "log.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in log if "eval_loss" in line]
    assert losses[-1] < losses[0]
    aa.load(load_base(config["base"], auto=AutoModel)[0], Path(config["output"]) / "adapter")
    # The names belong to the data: a run does not go on when they have changed.
    names.write_text(names.read_text().replace("Frankreich", "Gallien"))
    again = CliRunner().invoke(app, ["train", str(path)])
    assert again.exit_code != 0
    assert "other data" in " ".join(again.output.split())


def test_pairs_as_they_are_teach_any_knowledge_and_an_unknown_role_is_refused(
    config: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{"query": f"star {i}", "positive": f"stella {i}", "role": "stars"} for i in range(8)]
    config["data"] = {"train": str(write(tmp_path / "pairs.jsonl", rows))}
    config["training"] |= {"stages": [], "steps": 2}
    config["adapter"] = {"method": "mlkg", "roles": {"stars": "names of stars", "plants": ""}}
    assert train(config, progress=False).metrics["steps"] == 2
    with pytest.raises(aa.DataError, match="no-names.jsonl cannot be read"):
        train(
            {**config, "data": {**config["data"], "names": "no-names.jsonl"}, "output": str(tmp_path / "no")},
            progress=False,
        )
    assert not (tmp_path / "no").exists()
    config["adapter"] = {"method": "mlkg", "roles": {"plants": ""}}
    with pytest.raises(aa.DataError, match="pairs for 'stars'"):
        train({**config, "output": config["output"] + "-2"}, progress=False)
