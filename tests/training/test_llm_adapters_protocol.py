"""The LLM-Adapters protocol. Its official strings are golden tests; here: the strict reading, marking and leaks."""

import math

import pytest

import anyadapter as aa
from anyadapter.training.llm_adapters_protocol import (
    DATASETS,
    LLMAdaptersProtocol,
    extract_keyword,
    extract_letter,
    extract_number,
    leaks,
    without_leaks,
)


@pytest.mark.parametrize(
    ("text", "strict", "official"),
    [
        ("The answer is 5 (see step 2).", 5, 2),
        ("The answer is 16 - 12 = 4 kids.", 4, 4),
        ("The answer is $1,234.50", 1234.5, 1234.5),
        ("The answer is 3/4.", 0.75, 4),
        ("It is 7.", 7, 7),
        ("The answer is -3", -3, -3),
        ("10-3", 3, -3),
        ("see x2", math.inf, 2),
        ("1/0", math.inf, 0),
        ("none", math.inf, math.inf),
    ],
)
def test_numbers(text, strict, official):
    assert extract_number(text) == strict
    assert extract_number(text, official=True) == official


@pytest.mark.parametrize(
    ("text", "strict", "official"),
    [
        ("Answer: C", "C", "A"),
        ("A: the rate is 5, so the answer is C.", "C", "A"),
        ("The answer is (D).", "D", "D"),
        ("B", "B", "B"),
        ("Buy a Car", "", "B"),
        ("none", "", ""),
    ],
)
def test_letters(text, strict, official):
    assert extract_letter(text) == strict
    assert extract_letter(text, official=True) == official


@pytest.mark.parametrize(
    ("text", "strict", "official"),
    [
        ("the correct answer is true", "true", "true"),
        ("True", "true", ""),
        ("untrue", "", "true"),
        ("not true, false", "", "true"),
        ("It is not true. The answer is false.", "false", "true"),
    ],
)
def test_keywords(text, strict, official):
    assert extract_keyword(text, ("true", "false")) == strict
    assert extract_keyword(text, ("true", "false"), official=True) == official


def test_marking():
    maths = LLMAdaptersProtocol(dataset="GSM8K")
    assert (maths.dataset, maths.max_new_tokens) == ("gsm8k", 256)
    record = {"instruction": "?", "answer": "4.0"}
    assert maths.correct(maths.extract("The answer is 4.0005"), record)
    assert not maths.correct(maths.extract("The answer is 4.002"), record)
    assert not maths.correct(maths.extract("no idea"), record)
    with pytest.raises(aa.DataError, match="'four'"):
        maths.correct(4.0, {"instruction": "?", "answer": "four"})
    sense = LLMAdaptersProtocol(dataset="boolq", official=True)
    assert sense.max_new_tokens == 32
    assert sense.correct(sense.extract("true\n\n### Response:\nfalse"), {"instruction": "?", "answer": "true"})
    with pytest.raises(aa.ConfigError, match="'gsm8k'"):
        LLMAdaptersProtocol(dataset="gsm8")
    assert len(DATASETS) == len(set(DATASETS)) == 15


def test_leaks_are_found_whatever_the_spacing_and_case():
    test = [{"instruction": " How many  apples, in all?", "input": ""}]
    train = [
        {"instruction": "How many pears?"},
        {"instruction": "how many apples in all ?", "input": None},
        {"instruction": "How many pears ?"},
        {"instruction": "How many apples in all?", "input": "2 and 3"},
    ]
    assert leaks(train, test) == [1]
    assert without_leaks(train, test) == [train[0], train[3]]
