"""The golden strings of LLM-Adapters' evaluation: prompts and answer extraction, character for character."""

import math

import pytest
from golden_cases import Golden

from anyadapter.training import llm_adapters_protocol as protocol

KNOWN = {"paper", "case", "official", "what", "tolerance", "prompt_inputs"}


def run(case: Golden) -> None:
    about = case.about
    for key, cases in about.items():
        if key in KNOWN:
            continue
        check = CHECKS.get(key)
        if check is None:
            pytest.fail(f"{case.name}: nothing knows how to check {key!r}")
        check(cases, about.get("prompt_inputs", {}))


def numbers(cases: list[dict], inputs: dict) -> None:
    for each in cases:
        expected = math.inf if each["out"] == "inf" else each["out"]
        assert protocol.extract_number(each["in"], official=True) == expected, each


def letters(cases: list[dict], inputs: dict) -> None:
    for each in cases:
        assert protocol.extract_letter(each["in"], official=True) == each["out"], each


def keywords(cases: list[dict], inputs: dict) -> None:
    for each in cases:
        assert (
            protocol.LLMAdaptersProtocol(dataset=each["dataset"], official=True).extract(each["in"]) == each["out"]
        ), each


def eval_no_input(expected: str, inputs: dict) -> None:
    assert protocol.eval_prompt(*inputs["no_input"]) == expected


def eval_with_input(expected: str, inputs: dict) -> None:
    assert protocol.eval_prompt(*inputs["with_input"]) == expected


def train_no_input(expected: str, inputs: dict) -> None:
    assert protocol.train_text(inputs["train_record_no_input"]) == expected


def train_with_input(expected: str, inputs: dict) -> None:
    assert protocol.train_text(inputs["train_record_with_input"]) == expected


CHECKS = {
    "extract_number": numbers,
    "extract_letter": letters,
    "extract_commonsense": keywords,
    "prompt_eval_no_input": eval_no_input,
    "prompt_eval_with_input": eval_with_input,
    "prompt_commonsense_eval_no_input": eval_no_input,
    "prompt_train_no_input": train_no_input,
    "prompt_train_with_input": train_with_input,
}
