"""What RAFT learns from: annotators' votes, marks on pieces, runs that go on, and texts that are explained and shown."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from texts import BAD, PIECES, marked_rows, save_bert
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizer

import anyadapter as aa
from anyadapter.training import report
from anyadapter.training.rationales import (
    Collator,
    align,
    collate,
    few,
    load_predictor,
    majority,
    multi_hot,
    official_alignment,
    target_names,
)
from anyadapter.training.reasons import Explanation, Token, predict, to_html
from anyadapter.training.rows import Row
from anyadapter.training.run import train

TOKENIZER = BertTokenizer(vocab={piece: i for i, piece in enumerate(PIECES)})


# ------------------------------------------------------------------ votes


@settings(max_examples=40, deadline=None)
@given(masks=st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=4), min_size=1, max_size=5))
def test_more_than_half_decide(masks: list[list[int]]) -> None:
    votes = torch.tensor(masks).sum(0)
    assert majority(masks) == (votes * 2 > len(masks)).long().tolist()
    assert majority(masks, 3) == (votes * 2 > max(len(masks), 3)).long().tolist()


def test_targets_are_those_named_often_and_by_two() -> None:
    chosen = [["A", "B"]] * 3 + [["C"]]
    assert target_names(chosen, least=2) == ("A", "B", "Other")
    assert target_names(chosen[:3], least=2) == ("A", "B")
    names = ("A", "B", "Other")
    assert multi_hot(["B", "Z"], names) == [0, 1, 1]
    assert multi_hot([["A", "A"], ["B"], ["B", "Z"], ["Y"]], names) == [0, 1, 1]
    assert multi_hot([["A"]], names) == [1, 0, 0]
    assert multi_hot([], names) == [0, 0, 0]
    with pytest.raises(aa.DataError, match="no target 'Z'.*Add 'Other'"):
        multi_hot(["Z"], ("A", "B"))


# ------------------------------------------------------------------ pieces


words = st.lists(st.sampled_from(["cat", "awful", "vile", "ab", "the!", "."]), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(words=words, data=st.data(), length=st.integers(3, 20))
def test_a_piece_inherits_the_mark_of_its_word(words: list[str], data: st.DataObject, length: int) -> None:
    mask = data.draw(st.lists(st.integers(0, 1), min_size=len(words), max_size=len(words)))
    ids, marks = align(words, mask, TOKENIZER, length)
    assert ids == TOKENIZER(" ".join(words), truncation=True, max_length=length)["input_ids"]
    pieces = [mark for word, mark in zip(words, mask) for mark in [mark] * len(TOKENIZER.tokenize(word))]
    assert marks == [0, *pieces[: length - 2], 0]
    assert align(words, None, TOKENIZER, length) == (ids, [-100] * len(ids))


def test_the_authors_alignment_loses_the_last_piece_of_a_long_text_and_ours_does_not() -> None:
    words, mask = ["cat"] * 20, [0] * 19 + [1]
    ids, masks, marks = official_alignment(words, [mask, mask], TOKENIZER, length=22)
    assert (len(ids), len(masks), sum(marks)) == (21, 3, 0)
    ours, kept = align(words, mask, TOKENIZER, 22)
    assert (len(ours), sum(kept)) == (22, 1)


def test_a_batch_is_padded_with_what_does_not_count() -> None:
    one = {"input_ids": [2, 5, 3], "labels": 1, "rationale_labels": [0, 1, 0]}
    two = {"input_ids": [2, 3], "labels": -100, "rationale_labels": [0, 0]}
    batch = Collator(7)([one, two])
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "input_ids": (2, 8),
        "labels": (2,),
        "rationale_labels": (2, 8),
        "attention_mask": (2, 8),
    }
    padding = batch["attention_mask"] == 0
    assert padding.sum(1).tolist() == [5, 6]
    assert set(batch["input_ids"][padding].tolist()) == {7}
    assert set(batch["rationale_labels"][padding].tolist()) == {-100}
    given = [{"given": {"input_ids": one["input_ids"]}, "labels": 1, "rationale_logits": torch.ones(3, 2)}]
    given.append({"given": {"input_ids": two["input_ids"]}, "labels": 0, "rationale_logits": torch.ones(2, 2)})
    batch = collate(TOKENIZER, given)
    assert batch["rationale_logits"].shape == (2, 8, 2)
    assert torch.equal(batch["rationale_logits"].any(-1), batch["attention_mask"].bool())


def test_the_few_are_drawn_by_the_seed() -> None:
    rows = [Row(f"f:{i}", {"text": str(i)}) for i in range(30)]
    assert few(rows, 30, 0) == rows
    one, other = few(rows, 10, 2021), few(rows, 10, 2022)
    assert one == few(rows, 10, 2021) != other
    assert len(one) == len(other) == 10
    with pytest.raises(aa.DataError, match="31 rows cannot be drawn of 30"):
        few(rows, 31, 0)


# ------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    save_bert(folder)
    return folder


@pytest.fixture
def marked(bert: Path, tmp_path: Path) -> dict[str, Any]:
    """A small run of the predictor, the whole encoder trained."""
    (tmp_path / "marked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marked_rows(60)))
    return {
        "base": str(bert),
        "adapter": {
            "method": "rationale_predictor",
            "targets": ["cat", "dog"],
            "whole": ["embeddings", "encoder"],
            "rationale_impact": 3,
        },
        "data": {"train": str(tmp_path / "marked.jsonl"), "eval_rows": 20, "max_length": 24},
        "training": {"epochs": 6, "batch_size": 8, "learning_rate": 5e-3, "device": "cpu", "warmup": 0},
        "output": str(tmp_path / "predictor"),
    }


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(report.LogFile, "on_step_end", stop)


def test_a_predictor_then_a_classifier_each_going_on_where_it_stopped(
    marked: dict[str, Any], bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(12, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(marked, progress=False)
    result = train(marked, progress=False)
    assert result.resumed_from == 10
    whole = train({**marked, "output": str(tmp_path / "whole")}, progress=False)
    tensors, others = (load_file(r.adapter / "adapter_model.safetensors") for r in (whole, result))
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert result.metrics["rationale_macro_f1"] > 0.9  # a reason is one of two words
    assert result.metrics["rationale_macro_f1_padded"] >= result.metrics["rationale_macro_f1"]
    assert 0 <= result.metrics["label_macro_f1"] <= 1

    rows = [{"text": " ".join(row["words"]), "label": row["label"]} for row in marked_rows(60, seed=1)]
    for part, some in (("train", rows[:40]), ("eval", rows[40:])):
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    config = {
        "base": str(bert),
        "adapter": {"method": "raft", "heads": 4, "attention": "self", "length": 16, "rank": 2},
        "data": {
            "train": str(tmp_path / "train.jsonl"),
            "eval": str(tmp_path / "eval.jsonl"),
            "predictor": str(result.adapter),
            "shots": 24,
            "max_length": 16,
        },
        "training": {"epochs": 4, "batch_size": 8, "learning_rate": 3e-3, "device": "cpu", "warmup": 0},
        "output": str(tmp_path / "raft"),
    }
    stop_at(8, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=False)
    done = train(config, progress=False)
    assert done.resumed_from == 6
    assert done.metrics["steps"] == 12
    log = [json.loads(line) for line in (done.folder / "log.jsonl").read_text().splitlines()]
    state = json.loads((done.folder / "checkpoints/stage-1/checkpoint-12/trainer_state.json").read_text())
    by_step = {line["step"]: line["eval_macro_f1"] for line in state["log_history"] if "eval_macro_f1" in line}
    assert done.metrics["macro_f1"] == max(by_step.values()) == by_step[done.metrics["best_step"]]
    assert done.metrics["eval_loss"] in [line.get("eval_loss") for line in log]

    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    assert aa.load(model, done.adapter).config.length == 16
    expert, tokenizer = load_predictor(result.adapter)
    found, long = predict(["the cat saw some vile rain", "cat " * 30], expert, tokenizer, model)
    assert len(long.tokens) == 14
    assert sorted(found.probabilities) == ["abusive", "normal"]
    assert set(found.reasons(2)) == {"vi", "le"}
    (alone,) = predict(["the cat saw some vile rain"], expert, tokenizer)
    assert (list(alone.targets), alone.tokens) == (["cat", "dog"], found.tokens)


def test_an_adapter_without_reasons_is_taught_by_the_same_task(bert: Path, tmp_path: Path) -> None:
    rows = [{"text": " ".join(row["words"]), "label": row["label"]} for row in marked_rows(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "base": str(bert),
        "adapter": {"method": "lora", "rank": 2, "targets": "query", "whole": ["classifier"]},
        "data": {"task": "rationale_classification", "train": str(tmp_path / "rows.jsonl"), "eval_rows": 4},
        "training": {"steps": 2, "batch_size": 4, "device": "cpu"},
        "output": str(tmp_path / "plain"),
    }
    assert 0 <= train(config, progress=False).metrics["macro_f1"] <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": ["a", "b "]}, r"marked\.jsonl:1: 'words' is .*without white space"),
        ({"words": []}, "'words' is"),
        ({"rationales": [[1, 0]]}, "'rationales' does not hold 0 or 1 for each of the"),
        ({"rationales": None, "label": None, "targets": None}, "there is nothing to learn"),
        ({"label": "abusiv"}, "no label 'abusiv' among the adapter's. Did you mean 'abusive'"),
        ({"targets": ["bird"]}, r"marked\.jsonl:1: there is no target 'bird'"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(marked: dict[str, Any], change: dict[str, Any], message: str) -> None:
    path = Path(marked["data"]["train"])
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(first), **change}), *others]))
    with pytest.raises(aa.DataError, match=message):
        train({**marked, "data": {**marked["data"], "eval_rows": 0}}, progress=False)


def test_raft_needs_a_predictor_of_its_own_vocabulary(bert: Path, tmp_path: Path, marked: dict[str, Any]) -> None:
    rows = [{"text": "the cat", "label": label} for label in ("normal", "abusive")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "base": str(bert),
        "adapter": {"method": "raft", "heads": 4},
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "output": str(tmp_path / "raft"),
    }
    with pytest.raises(aa.ConfigError, match=r"data\.predictor is not set"):
        train(config, progress=False)
    with pytest.raises(aa.ConfigError, match=r"predictor is .*left out where random is set"):
        train({**config, "data": {**config["data"], "predictor": "p", "random": True}}, progress=False)
    other = train({**marked, "training": {**marked["training"], "epochs": 1}}, progress=False)
    save_bert(tmp_path / "other")
    BertTokenizer(vocab={p: i for i, p in enumerate([*PIECES[:-1], "?"])}).save_pretrained(tmp_path / "other")
    config |= {"base": str(tmp_path / "other"), "output": str(tmp_path / "raft-2")}
    with pytest.raises(aa.ConfigError, match="another vocabulary"):
        train({**config, "data": {**config["data"], "predictor": str(other.adapter)}}, progress=False)


def test_models_without_the_adapters_are_refused(bert: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    with pytest.raises(aa.ConfigError, match="0 adapters of the method 'rationale_predictor'"):
        predict(["the cat"], model, AutoTokenizer.from_pretrained(bert))


# ------------------------------------------------------------------ the page


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</p></article><h1>&lt;b&gt;",
    "{title} %s \x00",
]


class Seen(HTMLParser):
    """The elements, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


@settings(max_examples=60, deadline=None)
@given(
    text=st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_characters="\r"), max_size=30)),
    cuts=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=5),
)
def test_nothing_in_a_text_is_markup(text: str, cuts: list[tuple[int, int]]) -> None:
    tokens = tuple(Token(min(a, len(text)), min(a + b, len(text)), 0.1, 0.5) for a, b in cuts)
    one = Explanation(text, text, {text: 0.7, "x": 0.3}, {text: 0.9}, tokens)
    page = Seen(to_html([one], title=text))
    known = {"html", "head", "meta", "title", "style", "body", "h1", "article", "h2", "p", "mark"}
    assert page.tags <= known
    assert page.attributes <= {"lang", "charset", "http-equiv", "content", "style", "title"}
    body = page.text.split("</style>")[-1]
    assert body.count(text) >= 3 if text.strip() else True  # label, target and the text itself, whole
    assert "http://" not in to_html([one]) or "http://" in text


def test_a_token_is_shaded_by_its_score() -> None:
    text = "a vile cat"
    tokens = (Token(0, 1, 0.1, 0.0), Token(2, 6, 0.8, 1.0), Token(7, 10, 0.1, 0.0))
    one = Explanation(text, "abusive", {"normal": 0.1, "abusive": 0.9}, {"cats": 0.7, "dogs": 0.2}, tokens)
    page = to_html([one])
    assert 'rgba(230, 90, 30, 0.80)" title="0.800">vile</mark>' in page
    assert "abusive (90%) · cats</h2>" in page
    assert one.reasons(1) == ["vile"]
    assert one.word_scores(text.split()) == [0.1, 0.8, 0.1]
    assert BAD[1] in Seen(page).text
