"""Answers and marks."""

import json

import pytest
import torch
from tiny import rows

import anyadapter as aa
from anyadapter.training.evaluate import answer, evaluate, evaluate_file, generate, read_records

QUESTIONS = [
    "What is the capital of France?",
    "Hi",
    "Name a colour of the rainbow, and say where one sees it outside of the rainbow.",
    "What is 2 + 3?",
]


def test_a_real_model_answers_the_same_whatever_the_batch(smollm, smollm_tokenizer):
    one, four = (
        answer(smollm, smollm_tokenizer, QUESTIONS, template="chat", max_new_tokens=9, batch=b) for b in (1, 4)
    )
    assert one == four
    assert one[0] == "The capital of France is Paris."
    beams = [
        answer(smollm, smollm_tokenizer, QUESTIONS[:3], template="chat", max_new_tokens=4, beams=4, batch=b)
        for b in (1, 3)
    ]
    assert beams[0] == beams[1]


def test_the_base_alone_is_evaluated_with_the_adapter_off(smollm, smollm_tokenizer):
    records = [{"prompt": question, "answer": "The capital of France is Paris."} for question in QUESTIONS[:2]]
    before = evaluate(smollm, smollm_tokenizer, records, template="chat", max_new_tokens=9)
    assert (before.accuracy, before.summary()["count"]) == (0.5, 2)
    adapter = aa.attach(smollm, aa.LoRAConfig(rank=2, targets="self_attention.value"))
    with torch.no_grad():
        for name, tensor in adapter.tensors().items():
            if "lora_B" in name:
                tensor.add_(0.5)
    spoilt = evaluate(smollm, smollm_tokenizer, records, template="chat", max_new_tokens=9)
    assert spoilt.accuracy == 0
    assert spoilt.settings["adapters"] == ["default"]
    alone = evaluate(smollm, smollm_tokenizer, records, template="chat", max_new_tokens=9, adapter=False)
    assert alone.answers == before.answers
    assert alone.settings["adapters"] == []
    assert adapter.enabled


def test_generation_does_not_depend_on_the_order_and_leaves_the_model_as_it_was(model, tokenizer):
    prompts = [row["instruction"] for row in rows()[:7]] + ["red", ""]
    prompts[-1] = "blue blue blue"
    model.train()
    texts = generate(model, tokenizer, prompts, max_new_tokens=5, batch=3)
    assert generate(model, tokenizer, prompts[::-1], max_new_tokens=5, batch=2) == texts[::-1]
    assert model.training


def test_a_file_is_marked(model, tokenizer, tmp_path, monkeypatch):
    said = iter(["The answer is 4.", "5", "It is 6"])
    monkeypatch.setattr(
        "anyadapter.training.evaluate.generate", lambda m, t, prompts, **k: [next(said) for _ in prompts]
    )
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({"instruction": "?", "n": n}) + "\n" for n in ("4.0", "5", "7")))
    summary = evaluate_file(model, tokenizer, path, metric="SVAMP", fields={"answer": "n"})
    assert (summary["accuracy"], summary["correct"], summary["count"]) == (pytest.approx(2 / 3), 2, 3)
    assert (summary["max_new_tokens"], summary["metric"], summary["official"]) == (256, "SVAMP", False)
    assert json.loads(json.dumps(summary)) == summary


def test_metrics(model, tokenizer, monkeypatch):
    monkeypatch.setattr(
        "anyadapter.training.evaluate.generate", lambda m, t, prompts, **k: [" Blue\n" for _ in prompts]
    )
    for metric, label, right in (
        ("exact", "Blue", 1),
        ("exact", "blue", 0),
        ("number", "none", 1),
        ("letter", "(B)", 0),
    ):
        assert evaluate(model, tokenizer, [{"prompt": "?", "answer": label}], metric).accuracy == right, (metric, label)
    with pytest.raises(aa.ConfigError, match="'exact'"):
        evaluate(model, tokenizer, [], "exat")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": "?"}', r":2: has 'instruction'; expected .*'answer'"),
        ('{"answer": "4"}', ":2: has 'answer'; expected an 'instruction'"),
        ('["?"]', ":2: a JSON list"),
    ],
)
def test_a_record_without_question_or_answer_is_named(tmp_path, line, message):
    path = tmp_path / "test.jsonl"
    path.write_text('{"prompt": "?", "completion": "!"}\n' + line + "\n")
    with pytest.raises(aa.DataError, match=message):
        read_records(path)
