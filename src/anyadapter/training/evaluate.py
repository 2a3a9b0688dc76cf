"""Generate answers and mark them. The answers do not depend on how questions are put into batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import track
from transformers import GenerationConfig, PreTrainedTokenizerBase

from anyadapter.core.attach import disabled
from anyadapter.core.errors import ConfigError, DataError, near
from anyadapter.core.host import Host, device_of
from anyadapter.training.causal_lm import ROLES, check_template, prompt_of
from anyadapter.training.llm_adapters_protocol import (
    DATASETS,
    LLMAdaptersProtocol,
    extract_letter,
    extract_number,
)
from anyadapter.training.rows import read_objects

OFFICIAL_BEAMS = 4  # of LLM-Adapters' evaluation, a deterministic beam search


class Marking(Protocol):
    """How answers are found and marked."""

    def extract(self, generated: str) -> Any:
        """The answer in what the model wrote."""

    def correct(self, answer: Any, record: Mapping[str, Any]) -> bool:
        """Whether it is the record's."""


@dataclass(frozen=True)
class Metric:
    """``exact``: all the model wrote, but for space at the ends, is the answer; ``number``, ``letter``: the one it gives is."""

    name: str

    def extract(self, generated: str) -> Any:
        if self.name == "exact":
            return generated.strip()
        return (extract_number if self.name == "number" else extract_letter)(generated)

    def correct(self, answer: Any, record: Mapping[str, Any]) -> bool:
        return bool(answer == self.extract(str(record["answer"])))


METRICS = ("exact", "number", "letter")


def marking(metric: str, *, official: bool = False) -> Marking:
    """The marking of that name: one of :data:`METRICS`, or of a dataset of the LLM-Adapters protocol.

    Raises:
        ConfigError: no such name.
    """
    if metric in METRICS:
        return Metric(metric)
    if metric.lower() in (name.lower() for name in DATASETS):
        return LLMAdaptersProtocol(dataset=metric, official=official)
    raise ConfigError(f"There is no metric {metric!r}. {near(metric, [*METRICS, *DATASETS])}")


@dataclass(frozen=True)
class Evaluation:
    """What a model answered.

    Attributes:
        answers: ``{"prompt", "generated", "answer", "label", "correct"}`` of every record, in their order.
        settings: how it was generated and marked.
    """

    answers: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return sum(answer["correct"] for answer in self.answers) / len(self.answers)

    def summary(self) -> dict[str, Any]:
        """The numbers, as JSON values."""
        right = sum(answer["correct"] for answer in self.answers)
        return {"accuracy": self.accuracy, "correct": right, "count": len(self.answers), **self.settings}


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, Any]],
    metric: str = "exact",
    *,
    template: str = "auto",
    batch: int = 8,
    max_new_tokens: int | None = None,
    beams: int = 1,
    adapter: bool = True,
    official: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Ask a model every record's question, and mark what it answers.

    Args:
        records: each with ``instruction`` (and ``input``) or ``prompt``, and the ``answer``.
        metric: one of :data:`METRICS`, or a dataset of LLM-Adapters, which brings its own prompt.
        template: of the prompt, as in training.
        max_new_tokens: of an answer; by default 32, or what the dataset's protocol says.
        beams: 1 is greedy; LLM-Adapters has 4.
        adapter: with the attached adapters; without, the base alone answers.
        official: mark as LLM-Adapters' own code does.

    Raises:
        ConfigError: no such metric or template.
    """
    check_template(template, tokenizer)
    mark = marking(metric, official=official)
    asks = isinstance(mark, LLMAdaptersProtocol)
    prompts = [mark.prompt(r) if asks else prompt_of(r, template, tokenizer) for r in records]  # type: ignore[attr-defined]
    tokens = max_new_tokens or (mark.max_new_tokens if asks else 32)  # type: ignore[attr-defined]
    special = asks or template != "chat"
    with nullcontext() if adapter else disabled(model):
        generated = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=tokens,
            beams=beams,
            batch=batch,
            special=special,
            progress=progress,
        )
    answers = []
    for record, prompt, text in zip(records, prompts, generated):
        answer = mark.extract(text)
        right = mark.correct(answer, record)
        answers.append(
            {"prompt": prompt, "generated": text, "answer": answer, "label": record["answer"], "correct": right}
        )
    names = list(Host.of(model).adapters) if adapter else []
    settings = {"metric": metric, "official": official, "beams": beams, "max_new_tokens": tokens, "adapters": names}
    return Evaluation(answers, settings if asks else {**settings, "template": template})


def evaluate_file(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    metric: str = "exact",
    fields: Mapping[str, str] | None = None,
    limit: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """:func:`evaluate` on a ``.jsonl`` or ``.json`` file. Returns the summary, with the base's name.

    Raises:
        DataError: a row has no question or no answer.
    """
    records = read_records(path, fields)[:limit]
    result = evaluate(model, tokenizer, records, metric, progress=True, **settings)
    base = getattr(model.config, "_name_or_path", None)
    return {**result.summary(), "base": base, "data": str(path)}


def read_records(path: str | Path, fields: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Questions with answers: rows with ``instruction`` or ``prompt``, and ``answer`` (else ``output`` or ``completion``).

    Raises:
        DataError: a row has not; the message names file and line.
    """
    records = []
    for where, value in read_objects(Path(path)):
        if not isinstance(value, dict):
            raise DataError(f"{where}: a JSON {type(value).__name__}, not an object.")
        record = {**value, **{name: value[column] for name, column in (fields or {}).items() if column in value}}
        label = next(
            (record[name] for name in ("answer", "output", "completion") if record.get(name) is not None), None
        )
        if label is None or not (record.get("instruction") or record.get("prompt")):
            raise DataError(
                f"{where}: has {', '.join(map(repr, value)) or 'no columns'}; expected an 'instruction' or 'prompt', and an "
                f"'answer' (else 'output' or 'completion'). Name other columns by fields, of {', '.join(ROLES)}."
            )
        records.append({**record, "answer": label})
    if not records:
        raise DataError(f"{path} holds no rows.")
    return records


# ---------------------------------------------------------------------- generating


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 32,
    beams: int = 1,
    batch: int = 8,
    special: bool = True,
    progress: bool = False,
) -> list[str]:
    """What the model writes after each prompt, without sampling.

    Prompts of like length share a batch; they are padded on the left, and the padding is masked.

    Args:
        special: let the tokenizer add its special tokens; a chat template has written them already.
    """
    was_training = model.training
    model.eval()
    tokens = [tokenizer(prompt, add_special_tokens=special)["input_ids"] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(tokens[i]))
    texts = [""] * len(prompts)
    settings = generation_settings(model, tokenizer, max_new_tokens, beams)
    starts: Iterable[int] = range(0, len(order), batch)
    for start in track(starts, "answering", transient=True) if progress else starts:
        chosen = order[start : start + batch]
        longest = max(len(tokens[i]) for i in chosen)
        padded = [[settings.pad_token_id] * (longest - len(tokens[i])) + tokens[i] for i in chosen]
        mask = [[0] * (longest - len(tokens[i])) + [1] * len(tokens[i]) for i in chosen]
        device = device_of(model)
        ids, attention = torch.tensor(padded, device=device), torch.tensor(mask, device=device)
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=attention, generation_config=settings)
        for i, text in zip(chosen, tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)):
            texts[i] = text
    model.train(was_training)
    return texts


def generation_settings(
    model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, beams: int
) -> GenerationConfig:
    """Deterministic generation to the model's own end-of-sequence tokens."""
    own: Any = model.generation_config
    end = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    first = end[0] if isinstance(end, list) else end
    pad = next((p for p in (tokenizer.pad_token_id, own.pad_token_id, first) if p is not None), 0)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=beams,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=pad,
        bos_token_id=own.bos_token_id,
    )


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    template: str = "plain",
    **settings: Any,
) -> list[str]:
    """Answer plain questions: each is framed by a template and given to :func:`generate`."""
    check_template(template, tokenizer)
    prompts = [prompt_of({"prompt": question}, template, tokenizer) for question in questions]
    return generate(model, tokenizer, prompts, special=template != "chat", **settings)
