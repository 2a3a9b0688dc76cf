"""Masked language modelling and classification from files, and MixDA's two stages from YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import COLOURS, THINGS, rows
from tokenizers import BertWordPieceTokenizer
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
)

import anyadapter as aa
from anyadapter.methods.language.mixda import MixDA
from anyadapter.training import report
from anyadapter.training.classes import macro_f1
from anyadapter.training.config import read_config
from anyadapter.training.masked_lm import MaskedLM, collate, hide, masked_loss, pieces
from anyadapter.training.run import train
from anyadapter.training.tasks import task

SPECIAL = 5  # tokens of every WordPiece vocabulary here


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny BERT and its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    words = BertWordPieceTokenizer(lowercase=True)
    words.train_from_iterator([sentence(row) for row in rows()], vocab_size=200, show_progress=False)
    tokenizer = BertTokenizerFast(tokenizer_object=words._tokenizer)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def words(bert: Path) -> Any:
    return AutoTokenizer.from_pretrained(bert)


def sentence(row: dict) -> str:
    return f"{row['instruction'].removeprefix('What colour is ').rstrip('?')} is {row['output']}."


def write(path: Path, values: list[dict]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


@pytest.fixture
def stage1(bert: Path, tmp_path: Path) -> dict:
    """A small run of MixDA's first stage, with general text."""
    texts = [
        {"text": sentence(row), "general": f"A {THINGS[i % 6]} and a {THINGS[i % 5]}."} for i, row in enumerate(rows())
    ]
    return {
        "base": {"name": str(bert)},
        "adapter": {"method": "mixda", "domains": ["colours"], "layers": [1, 2], "width": 8, "gate_width": 8},
        "data": {"train": write(tmp_path / "texts.jsonl", texts), "eval_rows": 6, "masked": 0.85, "random": 0.05},
        "training": {
            "steps": 12, "batch_size": 6, "learning_rate": 1e-2, "log_every": 3, "eval_every": 4, "save_every": 4,
            "device": "cpu", "stages": [{"groups": ["domains", "gate"]}],
        },
        "output": str(tmp_path / "colours"),
    }  # fmt: skip


def stage2(bert: Path, tmp_path: Path, sources: list[str]) -> dict:
    labelled = [{"text": sentence(row), "label": row["output"]} for row in rows()]
    return {
        "base": str(bert),
        "adapter": {
            "method": "mixda", "sources": sources, "gate_width": 8, "task_adapter": "pfeiffer", "task_width": 8,
            "whole": ["pooler", "classifier"],
        },
        "data": {"train": write(tmp_path / "labelled.jsonl", labelled), "eval_rows": 6, "task": "classification"},
        "training": {
            "steps": 200, "batch_size": 10, "learning_rate": 1e-2, "device": "cpu", "eval_every": 100, "keep_best": False,
            "stages": [{"groups": ["gate", "task", "head"]}],
        },
        "output": str(tmp_path / "labelled"),
    }  # fmt: skip


def test_both_stages_from_yaml(stage1: dict, bert: Path, tmp_path: Path) -> None:
    first = train(stage1, progress=False)
    assert set(first.metrics) >= {"eval_loss", "masked_accuracy"}
    log = [json.loads(line) for line in (first.folder / "log.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in log if "eval_loss" in line]
    assert losses[-1] < losses[0]
    second = train(
        {**stage1, "adapter": {**stage1["adapter"], "domains": ["again"]}, "output": str(tmp_path / "b")},
        progress=False,
    )
    config = stage2(bert, tmp_path, [str(first.adapter), str(second.adapter)])
    result = train(config, progress=False)
    assert set(result.metrics) >= {"accuracy", "macro_f1"}
    assert json.loads((result.adapter / "classes.json").read_text()) == sorted(COLOURS)
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=6)
    adapter = aa.load(model, result.adapter)
    assert isinstance(adapter, MixDA)
    assert adapter.config.branches == ("colours", "again", "ffn")
    for k, run in enumerate((first, second)):  # stage 2 leaves the domains as they were
        for name, tensor in load_file(run.adapter / "adapter_model.safetensors").items():
            if ".kas." in name:
                assert torch.equal(adapter.tensors()[name.replace(".kas.0.", f".kas.{k}.")], tensor), name
    words = AutoTokenizer.from_pretrained(bert)
    right = [
        sorted(COLOURS)[model(**words(sentence(row), return_tensors="pt")).logits.argmax().item()] == row["output"]
        for row in rows()
    ]
    assert sum(right) / len(right) > 0.6


def test_a_run_goes_on_where_it_stopped(stage1: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train({**stage1, "output": str(tmp_path / "whole")}, progress=False)

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(report.LogFile, "on_step_end", stop)
    with pytest.raises(KeyboardInterrupt):
        train(stage1, progress=False)
    result = train(stage1, progress=False)
    assert result.resumed_from == 4
    assert result.metrics == whole.metrics
    one, other = (load_file(r.adapter / "adapter_model.safetensors") for r in (whole, result))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_loss_of_a_stage_is_that_of_the_paper(stage1: dict, bert: Path, words: Any) -> None:
    teaching = MaskedLM(read_config(stage1))
    model = BertForMaskedLM.from_pretrained(bert).eval()
    adapter: Any = aa.attach(model, aa.MixDAConfig(layers=(1, 2), gate_width=8, knowledge_weight=0.25))
    batch = teaching.collator(words)(teaching.encode(teaching.read(stage1["data"]["train"])[:4], words, adapter))
    with torch.no_grad():
        loss = teaching.objective(model, batch)
        general = {"input_ids": batch["general_input_ids"], "attention_mask": batch["general_attention_mask"]}
        sampling = adapter.sampling_loss(model, **general)
        knowledge = masked_loss(*teaching.answers(model, batch, fixed=True))
    torch.testing.assert_close(loss, 0.25 * knowledge + sampling)
    assert sampling > 0


# ------------------------------------------------------------------ what is hidden


def test_tokens_are_hidden_in_the_shares_that_are_asked_for(words: Any) -> None:
    ids = torch.full((400, 50), 9)
    special = torch.zeros_like(ids)
    special[:, 0] = 1
    batch = {"input_ids": ids, "special": special, "labels": torch.full_like(ids, -100)}
    torch.manual_seed(0)
    hidden, labels = hide(batch, (0.15, 0.85, 0.05), 4, 200)
    asked = labels != -100
    assert bool((labels[asked] == 9).all())
    assert not bool(asked[:, 0].any())
    assert torch.equal(hidden[~asked], ids[~asked])
    assert asked[:, 1:].float().mean() == pytest.approx(0.15, abs=0.01)
    assert (hidden[asked] == 4).float().mean() == pytest.approx(0.85, abs=0.02)
    assert (hidden[asked] == 9).float().mean() == pytest.approx(0.10, abs=0.02)
    again = [hide(batch, (0.15, 0.85, 0.05), 4, 200, torch.Generator().manual_seed(3))[0] for _ in range(2)]
    assert torch.equal(*again)


def test_a_target_is_masked_whole_and_nothing_beside_it(stage1: dict, bert: Path, words: Any, tmp_path: Path) -> None:
    facts = [{"text": "the cat of the {} is red.", "target": "brown dog"}, {"text": "{} is the hat", "target": "black"}]
    stage1["data"] = {"train": write(tmp_path / "facts.jsonl", facts)}
    teaching = MaskedLM(read_config(stage1))
    model: nn.Module = BertForMaskedLM.from_pretrained(bert).eval()
    adapter = aa.attach(model, aa.MixDAConfig(layers=(1,)))
    encoded = teaching.encode(teaching.read(stage1["data"]["train"]), words, adapter)
    for row, fact in zip(encoded, facts):
        learnt = [label for label in row["labels"] if label != -100]
        assert learnt == words(fact["target"], add_special_tokens=False)["input_ids"]
        filled = [token if label == -100 else label for token, label in zip(row["input_ids"], row["labels"])]
        assert filled == words(fact["text"].replace("{}", fact["target"]))["input_ids"]
        assert row["input_ids"].count(words.mask_token_id) == len(learnt)
    batch = collate(encoded, 0)
    logits, labels, targets = teaching.answers(model, batch, fixed=False)
    assert targets.tolist() == [True, True]
    each = [nn.functional.cross_entropy(one, label) for one, label in zip(logits, labels)]
    torch.testing.assert_close(masked_loss(logits, labels, targets), torch.stack(each).mean())
    stage1["data"]["max_length"] = 6
    with pytest.raises(aa.DataError, match=r"facts.jsonl:1: the target 'brown dog' is cut off at 6 tokens"):
        MaskedLM(read_config(stage1)).encode(teaching.read(stage1["data"]["train"]), words, adapter)


def test_a_long_text_is_cut_and_none_of_it_is_lost(words: Any) -> None:
    text = " ".join(sentence(row) for row in rows())
    cut = pieces(text, words, 20)
    assert max(len(each["input_ids"]) for each in cut) <= 20
    inner = [token for each in cut for token, special in zip(each["input_ids"], each["special"]) if not special]
    assert inner == words(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([{"texts": "a"}], r"x.jsonl:1: has the columns 'texts'; a row is"),
        ([{"text": " "}], "'text' is ' '; expected text"),
        ([{"text": "a {} and {}", "target": "b"}], "has {} once"),
        ([{"text": "a", "target": "b"}], "has {} once"),
        ([{"text": "a", "general": "b"}, {"text": "c"}], r"x.jsonl:2: no 'general' text, which other rows"),
    ],
)
def test_rows_that_cannot_be_learnt_are_named(stage1: dict, tmp_path: Path, values: list[dict], message: str) -> None:
    stage1["data"] = {"train": write(tmp_path / "x.jsonl", values)}
    with pytest.raises(aa.DataError, match=message):
        train(stage1, progress=False)
    assert not Path(stage1["output"]).exists()


def test_other_methods_learn_masked_tokens_too_and_take_no_general_text(stage1: dict) -> None:
    stage1["adapter"] = {"method": "bottleneck", "placement": "pfeiffer", "width": 8, "bias": True}
    stage1["data"]["task"] = "masked_lm"
    stage1["training"] |= {"stages": [], "steps": 4}
    assert train(stage1, progress=False).metrics["masked_accuracy"] >= 0


# ------------------------------------------------------------------ classes


def test_classes_that_the_base_does_not_know_need_a_head(bert: Path, tmp_path: Path) -> None:
    config = stage2(bert, tmp_path, [])
    config["adapter"] = {"method": "lora", "rank": 2, "targets": ["query"]}
    config["training"]["stages"] = []
    with pytest.raises(aa.ConfigError, match=r"does not know the 6 classes .* Set adapter.whole: \[classifier\]"):
        train(config, progress=False)
    config["adapter"]["whole"] = ["classifier"]
    config["training"]["steps"] = 2
    config["training"]["eval_every"] = 1
    config["output"] = str(tmp_path / "lora")
    assert set(train(config, progress=False).metrics) >= {"accuracy", "macro_f1"}


def test_a_class_of_the_evaluation_file_alone_is_named(bert: Path, tmp_path: Path) -> None:
    config = stage2(bert, tmp_path, [])
    config["data"] |= {"eval": write(tmp_path / "e.jsonl", [{"text": "a cat", "label": "pink"}]), "eval_rows": 0}
    with pytest.raises(aa.DataError, match=r"e.jsonl:1: the class 'pink' is not among those of"):
        train(config, progress=False)


def test_pairs_and_numbers(bert: Path, tmp_path: Path, words: Any) -> None:
    values = [{"text": "the cat", "second": "the dog", "label": 10}, {"text": "the hat", "label": 9}]
    config = stage2(bert, tmp_path, [])
    config["data"] = {"train": write(tmp_path / "p.jsonl", values), "task": "classification"}
    teaching: Any = task("classification")(read_config(config))
    found = teaching.read(config["data"]["train"])
    assert teaching.classes == ("9", "10")
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    adapter = aa.attach(model, aa.LoRAConfig(targets="query"))
    one, other = teaching.encode(found, words, adapter)
    assert one["given"]["input_ids"] == words("the cat", "the dog")["input_ids"]
    batch = teaching.collator(words)([one, other])
    assert batch["labels"].tolist() == [1, 0]
    assert batch["token_type_ids"][0].sum() > 0


def test_macro_f1_is_the_mean_over_classes() -> None:
    assert macro_f1([0, 0, 1, 1], [0, 0, 1, 1], 2) == 1
    assert macro_f1([0, 0, 0, 0], [0, 0, 0, 1], 3) == pytest.approx((2 * 3 / 7) / 3)
