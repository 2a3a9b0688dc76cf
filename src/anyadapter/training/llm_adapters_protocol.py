"""The instruction protocol of LLM-Adapters: prompts, how an answer is found in a response, and when it is right.

Hu et al. 2023, arXiv 2304.01933; the strings and rules are those of the authors' evaluation code, down to its indentation, and
a change to any of them is a new ``VERSION``. Two things are better done otherwise than there, and are unless
``official=True`` asks for the numbers of the paper: the official search takes the first letter from A to E anywhere, so that
"Answer: C" is read as A, and the last number anywhere, so that "The answer is 5 (see step 2)" is read as 2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from anyadapter.core.errors import ConfigError, DataError, near

VERSION = 1
INDENT = " " * 16
MARK = "### Response:"
REQUEST = "Below is an instruction that describes a task"
CONTEXT = ", paired with an input that provides further context"
WRITE = ". Write a response that appropriately completes the request."

NUMBERS = ("AddSub", "MultiArith", "SingleEq", "SVAMP", "gsm8k", "mawps")
LETTERS = ("AQuA",)
KEYWORDS = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "ARC-Challenge": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "ARC-Easy": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
}
DATASETS = (*NUMBERS, *LETTERS, *KEYWORDS)
TOLERANCE = 0.001  # of a number


def train_text(record: Mapping[str, str]) -> str:
    """Prompt and answer of one training record, as one string."""
    return train_prompt(record["instruction"], record.get("input")) + record["output"]


def train_prompt(instruction: str, context: str | None = None) -> str:
    """The part of a training string before the answer. It is not quite :func:`eval_prompt`: so it is in the original."""
    gap = f"\n{INDENT}\n{INDENT}"
    if context:
        start = f"{REQUEST}{CONTEXT}{WRITE} \n\n{INDENT}### Instruction:\n{INDENT}{instruction}{gap}"
        return f"{start}### Input:\n{INDENT}{context}{gap}{MARK}\n{INDENT}"
    return f"{REQUEST}{WRITE}  \n\n{INDENT}### Instruction:\n{INDENT}{instruction}{gap}{MARK}\n{INDENT}"


def eval_prompt(instruction: str, context: str | None = None) -> str:
    """What the model is given when it is evaluated, in both families of datasets."""
    gap = f"\n\n{INDENT}"
    if context:
        start = f"{REQUEST}{CONTEXT}{WRITE}{gap}### Instruction:\n{INDENT}{instruction}{gap}"
        return f"{start}### Input:\n{INDENT}{context}{gap}{MARK}\n{INDENT}"
    return f"{REQUEST}{WRITE} {gap}### Instruction:\n{INDENT}{instruction}{gap}{MARK}\n{INDENT}"


def response(generated: str) -> str:
    """The model's own words: what it wrote up to a further prompt of its own making."""
    return generated.split(MARK)[0].strip()


# ---------------------------------------------------------------------- answers


def extract_number(text: str, *, official: bool = False) -> float:
    """The number a response gives, or infinity when there is none.

    Officially the last one after commas are removed. Strictly the first one after the last "answer is" where there is such a
    phrase (after the equals sign there, if there is one), else the last one; a comma counts only between thousands, and a
    fraction a/b as its value.
    """
    if official:
        found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
        return float(found[-1]) if found else math.inf
    number = r"(?<![\w.])-?\d+(?:\.\d+)?(?:\s*/\s*\d+(?:\.\d+)?)?"
    claimed, text = claim(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))
    found = re.findall(number, text.rpartition("=")[2] if claimed else text)
    if not found:
        return math.inf
    above, _, below = found[0 if claimed else -1].partition("/")
    if not below:
        return float(above)
    return float(above) / float(below) if float(below) else math.inf


def extract_letter(text: str, *, official: bool = False) -> str:
    """The choice A to E a response gives, or an empty string.

    Officially the first such character anywhere. Strictly a letter that stands for a choice: after "answer is" or "answer:",
    in brackets, or the whole response.
    """
    if official:
        found = re.findall(r"[A-E]", text)
        return found[0] if found else ""
    claimed, text = claim(text)
    start = r"^\W*([A-E])\b" if claimed else r"^\W*([A-E])\W*$"
    match = re.search(start, text) or re.search(r"\(([A-E])\)", text)
    return match.group(1) if match else ""


def extract_keyword(text: str, keywords: Iterable[str], *, official: bool = False) -> str:
    """The first of a family's answer words in a response, or an empty string.

    Officially in lower case and also inside a longer word. Strictly a whole word in any case, and none where two different
    ones follow the last "answer is".
    """
    choice = "|".join(map(re.escape, keywords))
    if official:
        found = re.findall(choice, text)
        return found[0] if found else ""
    found = re.findall(rf"\b(?:{choice})\b", claim(text)[1].lower())
    return found[0] if len(set(found)) == 1 else ""


def claim(text: str) -> tuple[bool, str]:
    """Whether a response says "answer is" or "answer:", and what follows the last time it does; else all of it."""
    parts = re.split(r"(?:answer|option|choice) is:?|answer:", text, flags=re.IGNORECASE)
    return len(parts) > 1, parts[-1]


# ---------------------------------------------------------------------- one dataset


@dataclass(frozen=True, kw_only=True)
class LLMAdaptersProtocol:
    """How one dataset is asked and marked.

    Attributes:
        dataset: its name in the authors' repository, such as ``"gsm8k"`` or ``"boolq"``; it decides how answers are found.
        official: reproduce the authors' search for the answer, with its errors.
    """

    version: ClassVar[int] = VERSION
    dataset: str
    official: bool = False

    def __post_init__(self) -> None:
        known = {name.lower(): name for name in DATASETS}
        if self.dataset.lower() not in known:
            raise ConfigError(f"LLM-Adapters has no dataset {self.dataset!r}. {near(self.dataset, DATASETS)}")
        object.__setattr__(self, "dataset", known[self.dataset.lower()])

    @property
    def max_new_tokens(self) -> int:
        """How long an answer may be: 32 for the commonsense sets, 256 for the others."""
        return 32 if self.dataset in KEYWORDS else 256

    def prompt(self, record: Mapping[str, Any]) -> str:
        """What the model is given for a record."""
        return eval_prompt(record["instruction"], record.get("input"))

    def extract(self, generated: str) -> float | str:
        """The answer in what the model wrote."""
        text = response(generated)
        if self.dataset in KEYWORDS:
            return extract_keyword(text, KEYWORDS[self.dataset], official=self.official)
        if self.dataset in LETTERS:
            return extract_letter(text, official=self.official)
        return extract_number(text, official=self.official)

    def correct(self, answer: float | str, record: Mapping[str, Any]) -> bool:
        """Whether an extracted answer is the record's. Raises :class:`DataError` when the record's own is no number."""
        label = record["answer"]
        if self.dataset not in NUMBERS:
            return answer == label
        try:
            return abs(float(label) - float(answer)) <= TOLERANCE
        except ValueError:
            raise DataError(
                f"{self.dataset}: the answer {label!r} of {record['instruction']!r} is no number."
            ) from None


# ---------------------------------------------------------------------- leaks


def same_text(record: Mapping[str, Any]) -> str:
    """A record's question, with nothing left of case, spacing and punctuation: equal for equal questions."""
    text = f"{record['instruction']} {record.get('input') or ''}"
    return " ".join(re.findall(r"\w+", text.casefold()))


def leaks(train: Iterable[Mapping[str, Any]], test: Iterable[Mapping[str, Any]]) -> list[int]:
    """The positions of training records whose question is also a test question.

    The authors' math_10k holds MAWPS, which holds AddSub, MultiArith and SingleEq: train on what is left.
    """
    asked = {same_text(record) for record in test}
    return [i for i, record in enumerate(train) if same_text(record) in asked]


def without_leaks(train: Iterable[Mapping[str, Any]], test: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The training records whose question is no test question, each question once."""
    seen = {same_text(record) for record in test}
    kept = []
    for record in train:
        if (text := same_text(record)) not in seen:
            seen.add(text)
            kept.append(record)
    return kept
