"""Reading data and turning it into batches, and every way a file can be wrong."""

import json

import pytest
import torch

import anyadapter as aa
from anyadapter.training.causal_lm import Collator, alpaca, kind_of, prompt_of, read_rows, tokenise
from anyadapter.training.rows import Row, split

GOOD = {"instruction": "Add 2 and 3.", "output": "5"}


def written(tmp_path, text, name="data.jsonl"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json}", "not JSON"),
        ('{"instruction": "a", "output": "b"', "not JSON"),
        ("[1, 2]", "a JSON list, not an object"),
        ('{"question": "a", "answer": "b"}', "has the columns 'question', 'answer'; a row is"),
        ('{"instruction": "a"}', "has the columns 'instruction'; a row is"),
        ("{}", "has the columns none"),
        ('{"instruction": "a", "output": "  "}', "'output' is empty"),
        ('{"text": ""}', "'text' is empty"),
        ('{"instruction": "a", "output": 5}', "'output' is a int; expected text"),
        ('{"prompt": ["a"], "completion": "b"}', "'prompt' is a list; expected text"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    path = written(tmp_path, json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(aa.DataError, match=message) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:3: ")


def test_all_bad_rows_are_told_at_once(tmp_path):
    path = written(tmp_path, '{"text": "a"}\n{"text": ""}\n' * 9)
    with pytest.raises(aa.DataError) as caught:
        read_rows(path)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:5]] == [f"{path}:{n}" for n in (2, 4, 6, 8, 10)]
    assert lines[5:] == [f"… and 4 more rows of {path}"]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('{"text": "a"}', 1, "expected a JSON list"),
        ('[\n{"text": "a"},\n{"text": 1}\n]', 3, "'text' is a int"),
        ('[\n{"text": "a"},\n\n{"text": "b"}\n', 4, "cut short"),
        ('[{"text": "a"},\n{"text": "b" "c"}]', 2, "not JSON"),
        ('[{"text": "a"},\n]', 2, "not JSON"),
        ('[{"text": "a"}\n{"text": "b"}]', 1, "not followed by"),
    ],
)
def test_a_bad_item_of_a_list_is_named_by_its_line(tmp_path, text, line, message):
    path = written(tmp_path, text, "data.json")
    with pytest.raises(aa.DataError, match=message) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")


@pytest.mark.parametrize(("text", "name"), [("", "data.jsonl"), ("\n\n", "data.jsonl"), ("[ ]", "data.json")])
def test_a_file_without_rows(tmp_path, text, name):
    with pytest.raises(aa.DataError, match="no rows"):
        read_rows(written(tmp_path, text, name))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(aa.DataError, match=r"expected a \.jsonl"):
        read_rows(tmp_path / "data.csv")
    with pytest.raises(aa.DataError, match="No such file"):
        read_rows(tmp_path / "data.jsonl")


def test_both_forms_of_a_file_hold_the_same_rows(tmp_path):
    items = [GOOD, {"prompt": "a", "completion": "b"}, {"text": "Ünïcode\nand lines"}]
    lines = written(tmp_path, "\ufeff" + "\n".join(json.dumps(item, ensure_ascii=False) for item in items))
    listed = written(tmp_path, json.dumps(items, indent=2), "data.json")
    assert [row.values for row in read_rows(lines)] == [row.values for row in read_rows(listed)] == items
    assert [kind_of(row) for row in read_rows(lines)] == ["instruction", "prompt", "text"]
    assert read_rows(listed)[1].where == f"{listed}:6"


def test_columns_by_other_names(tmp_path):
    path = written(tmp_path, '{"question": "1+1?", "reply": "2", "id": 7}')
    row = read_rows(path, {"instruction": "question", "output": "reply"})[0]
    assert (row.values["instruction"], row.values["output"]) == ("1+1?", "2")
    with pytest.raises(aa.DataError, match="no column 'questoin'.*'question'"):
        read_rows(path, {"instruction": "questoin", "output": "reply"})
    with pytest.raises(aa.ConfigError, match="no 'instructions'.*'instruction'"):
        read_rows(path, {"instructions": "question"})


def test_a_split_is_the_same_for_the_same_seed_and_loses_nothing():
    rows = [Row(str(i), {"text": str(i)}) for i in range(20)]
    train, held = split(rows, 5, seed=1)
    assert len(held) == 5
    assert sorted((*train, *held), key=lambda row: int(row.where)) == rows
    assert split(rows, 5, seed=1) == (train, held)
    assert split(rows, 5, seed=2) != (train, held)
    with pytest.raises(aa.DataError, match="20 of 20"):
        split(rows, 20, seed=1)


class TestTokens:
    def test_the_answer_and_the_end_are_learnt_and_the_prompt_is_not(self, tokenizer):
        row = Row("a:1", {"instruction": "What colour?", "output": "red"})
        encoded = tokenise([row], tokenizer, template="alpaca")[0]
        learnt = [i for i in encoded["labels"] if i != -100]
        assert tokenizer.decode(learnt) == "red</s>"
        assert tokenizer.decode(encoded["input_ids"]) == alpaca("What colour?", None) + "red</s>"
        whole = tokenise([row], tokenizer, template="alpaca", train_on_inputs=True)[0]
        assert whole["labels"] == whole["input_ids"] == encoded["input_ids"]

    def test_a_prompt_and_completion_are_joined_as_they_are(self, tokenizer):
        row = Row("a:1", {"prompt": "Sky: ", "completion": "blue"})
        assert tokenizer.decode(tokenise([row], tokenizer)[0]["input_ids"]) == "Sky: blue</s>"
        assert tokenizer.decode(tokenise([Row("a:1", {"text": "red cat"})], tokenizer)[0]["input_ids"]) == "red cat</s>"

    def test_a_chat_template_frames_the_prompt(self, tokenizer):
        row = Row("a:1", {"instruction": "What colour?", "input": "Of the sky", "output": "blue"})
        encoded = tokenise([row], tokenizer, template="chat")[0]
        text = tokenizer.decode(encoded["input_ids"])
        assert text == "<user>What colour?\n\nOf the sky</s><model>blue</s>"
        assert tokenizer.decode([i for i in encoded["labels"] if i != -100]) == "blue</s>"

    def test_a_row_is_cut_and_the_end_is_only_put_where_there_is_room(self, tokenizer):
        row = Row("a:1", {"text": "red green blue white"})
        full = tokenise([row], tokenizer)[0]["input_ids"]
        assert full[-1] == tokenizer.eos_token_id
        assert tokenise([row], tokenizer, max_length=len(full) - 1)[0]["input_ids"] == full[:-1]
        assert tokenise([row], tokenizer, max_length=3)[0]["input_ids"] == full[:3]

    def test_a_row_whose_answer_is_cut_off_is_an_error(self, tokenizer):
        row = Row("file.jsonl:9", {"instruction": "a long question " * 20, "output": "red"})
        with pytest.raises(aa.DataError, match=r"^file\.jsonl:9: .*max_length"):
            tokenise([row], tokenizer, max_length=16)
        assert tokenise([row], tokenizer, max_length=16, train_on_inputs=True)

    def test_signals_are_carried_along(self, tokenizer):
        rows = [
            Row("a:1", {"text": "red", "task": 1, "mask": [0, 1]}),
            Row("a:2", {"text": "blue cat", "task": 0, "mask": [1, 1]}),
        ]
        batch = Collator(0)(tokenise(rows, tokenizer, carry=("task", "mask")))
        assert batch["task"].tolist() == [1, 0]
        assert batch["mask"].tolist() == [[0, 1], [1, 1]]
        with pytest.raises(aa.DataError, match=r"a:1: no 'tasks'.*'task'"):
            tokenise(rows, tokenizer, carry=("tasks",))
        with pytest.raises(aa.DataError, match="a:1: 'text' is 'red'; a signal is a number"):
            tokenise(rows, tokenizer, carry=("text",))

    def test_templates_that_are_not_there(self, tokenizer):
        with pytest.raises(aa.ConfigError, match="'alpaca'"):
            tokenise([], tokenizer, template="alpacas")
        template, tokenizer.chat_template = tokenizer.chat_template, None
        with pytest.raises(aa.ConfigError, match="no chat template"):
            tokenise([], tokenizer, template="chat")
        tokenizer.chat_template = template

    @pytest.mark.parametrize("template", ["auto", "plain", "alpaca", "llm-adapters", "chat"])
    def test_what_is_trained_starts_with_what_is_asked(self, smollm_tokenizer, template):
        row = Row("a:1", {"instruction": "What is 2 + 3?", "input": "", "output": "5"})
        encoded = tokenise([row], smollm_tokenizer, template=template)[0]
        text = smollm_tokenizer.decode(encoded["input_ids"])
        assert text == prompt_of(row.values, template, smollm_tokenizer) + "5" + smollm_tokenizer.eos_token
        assert "5" in smollm_tokenizer.decode([i for i in encoded["labels"] if i != -100])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_padded_to_a_multiple_of_eight_and_the_padding_is_not_learnt(side):
    rows = [{"input_ids": [7] * 5, "labels": [-100, 7, 7, 7, 7]}, {"input_ids": [8] * 9, "labels": [8] * 9}]
    batch = Collator(3, side)(rows)
    assert all(batch[key].shape == (2, 16) for key in ("input_ids", "attention_mask", "labels"))
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 9]
    own = batch["attention_mask"].bool()
    assert own[0, -1 if side == "left" else 0]
    assert (batch["input_ids"][~own] == 3).all()
    assert (batch["labels"][~own] == -100).all()
    assert torch.equal(batch["labels"][1][own[1]], torch.tensor([8] * 9))
    with pytest.raises(aa.ConfigError, match="'up'"):
        Collator(3, "up")
