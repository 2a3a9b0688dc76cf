"""Facts: wordings and rows are read and checked, queries know their subject, marks are right, a run ends and goes on."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    pipeline,
)

import anyadapter as aa
from anyadapter.training import report
from anyadapter.training.facts import (
    Collator,
    answer_id,
    answer_logits,
    ask,
    consistency,
    encode_fact,
    evaluate,
    read_templates,
)
from anyadapter.training.rows import Row
from anyadapter.training.run import train

FACTS = [
    {"subject": "france", "object": "paris", "relation": "capital"},
    {"subject": "new zealand", "object": "wellington", "relation": "capital"},
    {"subject": "france", "object": "euro", "relation": "coin"},
    {"subject": "new zealand", "object": "dollar", "relation": "coin"},
]
WORDINGS = {
    "capital": ["the capital of [X] is [Y] .", "[Y] is the capital of [X] .", "[X] is ruled from [Y] ."],
    "coin": ["[X] pays with the [Y] .", "the [Y] is the coin of [X] ."],
}
WORDS = sorted(
    {w for each in (*WORDINGS.values(), [" ".join(f.values()) for f in FACTS]) for t in each for w in t.split()}
)


def bert_tokenizer() -> Any:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(w for w in WORDS if "[" not in w)]
    return BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})


def roberta_tokenizer() -> Any:
    """Bytes with a space before the word, as RoBERTa's."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    texts = [" " + " ".join(w for w in WORDS if "[" not in w)] * 50
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, **names, pad_token="<pad>", unk_token="<unk>", mask_token="<mask>"
    )
    tokenizer.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True, special=True)})
    return tokenizer


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny masked language model and its tokenizer."""
    torch.manual_seed(0)
    path, tokenizer = tmp_path_factory.mktemp("bert"), bert_tokenizer()
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS[:2]))
    (tmp_path / "templates.json").write_text(json.dumps(WORDINGS))
    (tmp_path / "other.jsonl").write_text(
        "".join(json.dumps({"relation": "capital", "template": t}) + "\n" for t in ("[Y] rules [X]", "of [X] is [Y]"))
    )
    files = {
        "train": "facts.jsonl",
        "eval": "dev.jsonl",
        "templates": "templates.json",
        "eval_templates": "other.jsonl",
    }
    return {
        "base": {"name": str(folder)},
        "adapter": {
            "method": "p_adapter",
            "variant": "experts",
            "relations": ["capital", "coin"],
            "keep": ["mask", "subject"],
            "mask_token_id": 4,
        },
        "data": {name: str(tmp_path / file) for name, file in files.items()},
        "training": {
            "steps": 6, "batch_size": 4, "learning_rate": 1e-2, "log_every": 2, "eval_every": 2, "save_every": 2, "device": "cpu",
        },
        "output": str(tmp_path / "run"),
    }  # fmt: skip


# ------------------------------------------------------------------ queries


@pytest.mark.parametrize("make", [bert_tokenizer, roberta_tokenizer])
def test_a_query_knows_where_its_subject_is(make: Any) -> None:
    tokenizer = make()
    for wordings in WORDINGS.values():
        for wording in wordings:
            for subject in ("france", "new zealand"):
                query = ask(tokenizer, wording, subject)
                ids = query["input_ids"]
                assert ids.count(tokenizer.mask_token_id) == 1
                assert ids[0] == tokenizer.cls_token_id
                assert ids[-1] == tokenizer.sep_token_id
                marked = [i for i, m in zip(ids, query["subject_mask"]) if m]
                assert tokenizer.decode(marked).strip() == subject
    assert answer_id(tokenizer, "paris") is not None
    assert answer_id(tokenizer, "new zealand") is None
    assert answer_id(tokenizer, "atlantis") is None


def test_a_fact_is_asked_in_every_wording() -> None:
    tokenizer = bert_tokenizer()
    row = Row("facts:1", {**FACTS[0], "wordings": WORDINGS["capital"]})
    rows = encode_fact(row, tokenizer, 64, ("subject_mask",), lambda name, value: value)
    assert len(rows) == 3
    assert all(tokenizer.decode([i for i in r["labels"] if i >= 0]) == "paris" for r in rows)
    assert all((r["labels"][r["input_ids"].index(4)] >= 0) and r["fact"] == "facts:1" for r in rows)
    batch = Collator(0)(rows)
    assert {key: tuple(value.shape) for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels", "subject_mask"), tuple(batch["input_ids"].shape)
    )
    assert batch["attention_mask"].sum(1).tolist() == [len(r["input_ids"]) for r in rows]
    for change, length, message in (
        ({"object": "new zealand"}, 64, r"facts:1: the object 'new zealand' is not one token"),
        ({}, 5, "facts:1, .* 9 tokens with 1 mask tokens; expected at most 5"),
    ):
        with pytest.raises(aa.DataError, match=message):
            encode_fact(Row("facts:1", {**row.values, **change}), tokenizer, length, (), lambda name, value: value)


# ------------------------------------------------------------------ marks


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=12))
def test_consistency_is_the_share_of_pairs_that_agree(given: list[tuple[int, int]]) -> None:
    shares = []
    for fact in range(4):
        pairs = list(combinations([answer for f, answer in given if f == fact], 2))
        if pairs:
            shares.append(sum(a == b for a, b in pairs) / len(pairs))
    found = consistency([f for f, _ in given], [a for _, a in given])
    assert found == (pytest.approx(sum(shares) / len(shares)) if shares else None)


def test_marks_are_those_of_the_full_logits(folder: Path) -> None:
    model, tokenizer = BertForMaskedLM.from_pretrained(folder).eval(), bert_tokenizer()
    rows: list[Any] = []
    for i, fact in enumerate(FACTS):
        row = Row(f"facts:{i}", {**fact, "wordings": WORDINGS[fact["relation"]]})
        rows += encode_fact(row, tokenizer, 64, (), lambda name, value: value)
    words = [answer_id(tokenizer, fact["object"]) for fact in FACTS]
    marks = evaluate(model, rows, Collator(0), [i for i in words if i is not None], batch=3)
    hits, first, ranks, answers = 0, 0, [], []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, row["input_ids"].index(4)]
        right = max(row["labels"])
        answers.append(max(words, key=lambda i: logits[i]))
        hits += answers[-1] == right
        first += int(logits.argmax() == right)
        ranks.append(int((logits > logits[right]).sum()) + 1)
    assert marks == {
        "hit@1": hits / len(rows),
        "p@1": first / len(rows),
        "p@10": sum(r <= 10 for r in ranks) / len(rows),
        "mrr": pytest.approx(sum(1 / r for r in ranks) / len(rows)),
        "consistency": consistency([row["fact"] for row in rows], answers),
    }


def test_rows_may_carry_signals_that_the_adapter_does_not_read(folder: Path) -> None:
    model, tokenizer = BertForMaskedLM.from_pretrained(folder).eval(), bert_tokenizer()
    row = Row("facts:1", {**FACTS[0], "wordings": WORDINGS["capital"]})
    rich, poor = (
        encode_fact(row, tokenizer, 64, reads, lambda name, value: 0) for reads in (("subject_mask", "relation"), ())
    )
    for config in (None, aa.PAdapterConfig(variant="prefix"), aa.PAdapterConfig()):
        torch.manual_seed(0)
        if config is not None:
            aa.attach(model, config)
        assert evaluate(model, rich, Collator(0), [5, 6]) == evaluate(model, poor, Collator(0), [5, 6])
        if config is not None:
            aa.detach(model)


@pytest.mark.parametrize("cls", [BertForMaskedLM, RobertaForMaskedLM])
def test_the_head_is_run_at_the_questions_alone_and_put_back(cls: Any) -> None:
    config = (BertConfig if cls is BertForMaskedLM else RobertaConfig)(vocab_size=40, pad_token_id=1, **SIZES)
    model = cls(config).eval()
    ids = torch.tensor([[2, 9, 4, 3], [2, 4, 8, 3]])
    given, asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids == 4
    with torch.no_grad():
        torch.testing.assert_close(answer_logits(model, given, asked), model(**given).logits[asked])
    assert model(**given).logits.shape == (2, 4, 40)


def test_a_pipeline_fills_the_gap_through_an_adapter(folder: Path) -> None:
    model, tokenizer = BertForMaskedLM.from_pretrained(folder).eval(), bert_tokenizer()
    torch.manual_seed(0)
    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")
    plain = fill("the capital of france is [MASK] .")
    aa.attach(model, aa.PAdapterConfig(variant="prefix"))
    prefixed = fill("the capital of france is [MASK] .")
    query = ask(tokenizer, WORDINGS["capital"][0], "france")
    ids = torch.tensor([query["input_ids"]])
    with torch.no_grad():
        wanted = model(ids).logits[ids == 4].softmax(-1)[0]
    assert prefixed[0]["token"] == int(wanted.argmax())
    assert prefixed[0]["score"] == pytest.approx(float(wanted.max()), rel=1e-5)
    assert prefixed[0]["score"] != pytest.approx(plain[0]["score"], rel=1e-3)


# ------------------------------------------------------------------ runs


@pytest.mark.parametrize("variant", [{}, {"variant": "rewrite", "relations": []}])
def test_a_run_ends_with_marks_and_goes_on_where_it_stopped(
    config: dict[str, Any], variant: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**config, "adapter": {**config["adapter"], **variant}}
    (tmp_path / "words.txt").write_text("paris\n\nwellington\nnew zealand\n")
    config["data"] = {**config["data"], "vocabulary": str(tmp_path / "words.txt")}
    whole = train({**config, "output": str(tmp_path / "whole")}, progress=False)
    assert {"hit@1", "p@1", "p@10", "mrr", "consistency", "eval_loss"} <= set(whole.metrics)
    model = BertForMaskedLM.from_pretrained(folder)
    assert aa.load(model, whole.adapter).config.to_dict()["keep"] == ["mask", "subject"]

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(report.LogFile, "on_step_end", stop)
    broken = {**config, "output": str(tmp_path / "broken")}
    with pytest.raises(KeyboardInterrupt):
        train(broken, progress=False)
    result = train(broken, progress=False)
    assert result.resumed_from == 2
    one, other = (load_file(r.adapter / "adapter_model.safetensors") for r in (whole, result))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert result.metrics == whole.metrics
    (tmp_path / "other.jsonl").write_text(json.dumps({"relation": "capital", "template": "[X] [Y]"}) + "\n")
    with pytest.raises(aa.ConfigError, match="other data"):
        train(broken, progress=False)


def test_without_the_bases_dropout_only_the_adapter_trains(config: dict[str, Any], folder: Path) -> None:
    seen = []
    model, tokenizer = BertForMaskedLM.from_pretrained(folder), bert_tokenizer()
    model.bert.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    for dropout in (True, False):
        changed = {"data": {**config["data"], "base_dropout": dropout}, "output": config["output"] + str(dropout)}
        train({**config, **changed}, model=model, tokenizer=tokenizer, progress=False)
        trained = any(seen)
        assert trained is dropout
        aa.detach(model)
        seen.clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relation": "capitol"}, r"facts\.jsonl:1: no template is of the relation 'capitol'.* 'capital'"),
        ({"subject": " "}, r"facts\.jsonl:1: 'subject' is ' '"),
        ({"object": 3}, r"facts\.jsonl:1: 'object' is 3"),
        ({"object": "atlantis"}, r"facts\.jsonl:1: the object 'atlantis' is not one token"),
    ],
)
def test_a_fact_that_cannot_be_used_is_named(config: dict[str, Any], change: dict[str, Any], message: str) -> None:
    facts = [{**FACTS[0], **change}, *FACTS[1:]]
    Path(config["data"]["train"]).write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    with pytest.raises(aa.DataError, match=message):
        train(config, progress=False)


def test_settings_and_templates_that_cannot_be_used_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    for change, message in (
        ({"adapter": {**config["adapter"], "mask_token_id": 5}}, r"mask_token_id is 5; the tokenizer's is 4"),
        ({"data": {**config["data"], "eval": config["data"]["train"]}}, r"eval_templates is .* is no file of its own"),
        ({"data": {**config["data"], "fields": {"subjct": "s"}}}, "Did you mean 'subject'"),
    ):
        with pytest.raises(aa.ConfigError, match=message):
            train({**config, **change}, progress=False)
    unknown = {"adapter": {**config["adapter"], "relations": ["capital", "money"]}, "output": str(tmp_path / "other")}
    with pytest.raises(aa.DataError, match=r"facts\.jsonl:3: .* no expert of the relation 'coin'"):
        train({**config, **unknown}, progress=False)
    for name, text, message in (
        (
            "a.json",
            '{"capital": ["[X] is near"]}',
            r"a\.json, capital: '\[X\] is near'; expected one \[X\] and one \[Y\]",
        ),
        ("b.json", '["[X] [Y]"]', "an object of lists"),
        ("c.json", "{", "cannot be read as JSON"),
        ("d.jsonl", '{"relation": "capital"}', r"d\.jsonl:1: expected"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(aa.DataError, match=message):
            read_templates(tmp_path / name)
