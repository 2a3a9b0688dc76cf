"""What a GenerativeAdapter learns from, and a run of it from the command line's configuration."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from families import case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import anyadapter as aa
from anyadapter.methods.language.generative import Generative, GenerativeConfig
from anyadapter.training import report
from anyadapter.training.causal_lm import IGNORED, read_rows
from anyadapter.training.generative import (
    ContextCollator,
    answering,
    collate,
    pretraining,
    pretraining_labels,
    tokenise_contexts,
)
from anyadapter.training.run import train

SMALL = GenerativeConfig(inner=6, rank=6, max_rank=3, alpha=12.0, window=4)


@given(length=st.integers(2, 40), window=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_pretraining_completes_each_window_and_reconstructs_what_came_before(length: int, window: int) -> None:
    ids = list(range(length))
    block = pretraining(ids, window)
    n = block.contexts
    assert list(chain(*block.ids[:n])) == ids
    assert len(block.ids) == 2 * n
    for i in range(n):
        assert block.sees[i].tolist() == [1.0] * i + [0.0] * (2 * n - i)
        assert block.sees[n + i].tolist() == [1.0] * (i + 1) + [0.0] * (2 * n - i - 1)
        piece, read = block.ids[n + i], list(chain(*block.ids[: i + 1]))
        assert piece == list(range(piece[0], piece[-1] + 1))  # one piece of the text
        assert piece[-1] <= read[-1]
        assert len(piece) == len(block.ids[0]) or piece[-1] == read[-1]
    assert block.ids == pretraining(ids, window).ids


def test_one_task_alone_leaves_the_other_unlabelled() -> None:
    labels = torch.arange(24).view(6, 4)
    assert (pretraining_labels(labels, ("reconstruction",))[:3] == IGNORED).all()
    assert torch.equal(pretraining_labels(labels, ("reconstruction",))[3:], labels[3:])
    assert (pretraining_labels(labels, ("completion",))[3:] == IGNORED).all()
    assert torch.equal(pretraining_labels(labels), labels)
    assert {x for row in pretraining(range(9), 3, ("completion",)).labels[3:] for x in row} == {IGNORED}
    with pytest.raises(aa.ConfigError, match="completion and reconstruction, or one of them"):
        pretraining_labels(labels, ("copying",))


def test_blocks_in_a_batch_do_not_know_one_another() -> None:
    one = answering([1, 2, 3, 4, 5], [([6, 7, 8], [IGNORED, 7, 8])], window=3)
    other = answering([9, 10], [([11, 12], [IGNORED, 12]), ([13, 14], [IGNORED, 14])], window=3)
    batch = collate([one, other], pad_token_id=0)
    assert batch["input_ids"].shape == (6, 8)
    assert batch["sees"].tolist() == [
        [0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0, 0],
    ]
    assert batch["context_mask"].sum(1).tolist() == [3, 2, 0, 2, 0, 0]
    assert batch["labels"][2].tolist() == [IGNORED, 7, 8] + [IGNORED] * 5
    assert (batch["labels"][[0, 1, 3]] == IGNORED).all()


def test_a_batch_learns_as_its_blocks_do_alone() -> None:
    model = case("llama").build().requires_grad_(False)
    adapter = aa.attach(model, SMALL)
    for name, parameter in adapter.named_parameters():
        if name.endswith("B.weight"):
            nn.init.normal_(parameter)
    blocks = [pretraining([5, 9, 3, 33, 21, 60, 7, 8], 4), answering([8, 4, 44], [([12, 6], [IGNORED, 6])], 4)]

    def losses(blocks: list[Any]) -> float:
        batch = collate(blocks, 0)
        signals = {name: batch.pop(name) for name in ("sees", "context_mask")}
        labels = batch.pop("labels")
        with aa.signals(model, **signals), torch.no_grad():
            logits = model(**batch).logits[:, :-1]
        return float(nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"))

    assert losses(blocks) == pytest.approx(losses(blocks[:1]) + losses(blocks[1:]), rel=1e-4)


# ------------------------------------------------------------------ a run


ANSWERS = [
    {"context": f"Today I met {a} {b}.", "prompt": f"I met {a}", "completion": f" {b}"}
    for a, b in (("Nora", "Hill"), ("Omar", "West"), ("Nora", "Hill"), ("Lena", "Stone"))
]
TEXTS = [{"text": f"The quick brown {thing} jumps over the lazy dog and runs away."} for thing in ("fox", "cat", "hen")]
ADAPTER = {"method": "generative", "inner": 8, "rank": 8, "max_rank": 4, "alpha": 16.0, "window": 16}


@pytest.mark.parametrize("rows", [ANSWERS, TEXTS], ids=["answers", "texts"])
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(
    rows: list[dict[str, str]], config: dict[str, Any], model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    settings = {
        **config,
        "adapter": ADAPTER,
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 64},
        "training": {"steps": 6, "batch_size": 2, "learning_rate": 1e-2, "save_every": 2, "keep_best": False},
    }
    whole = train({**settings, "output": str(tmp_path / "whole")}, progress=False)
    broken = {**settings, "output": str(tmp_path / "broken")}

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(report.LogFile, "on_step_end", stop)
    with pytest.raises(KeyboardInterrupt):
        train(broken, progress=False)
    result = train(broken, progress=False)
    assert result.resumed_from == 2
    assert result.metrics == whole.metrics
    first = aa.load(model, whole.adapter, "first")
    second = aa.load(model, result.adapter, "second")
    assert isinstance(first, Generative)
    assert all(torch.equal(t, second.tensors()[name]) for name, t in first.tensors().items())
    assert any((t != 0).any() for name, t in first.tensors().items() if name.endswith("B.weight"))


def test_rows_without_a_context_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "I met Nora", "completion": " Hill"}))
    with pytest.raises(aa.DataError, match=r"rows.jsonl:1: a GenerativeAdapter answers from a context"):
        tokenise_contexts(read_rows(tmp_path / "rows.jsonl"), tokenizer)


def test_rows_with_one_context_share_its_reading(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ANSWERS))
    rows = tokenise_contexts(read_rows(tmp_path / "rows.jsonl"), tokenizer)
    batch = ContextCollator(0, SMALL)(rows)
    contexts = int(batch["context_mask"].any(1).sum())
    alone = [int(ContextCollator(0, SMALL)([row])["context_mask"].any(1).sum()) for row in rows]
    assert contexts == sum(alone) - alone[2]
    assert batch["sees"].sum(1)[-1] == alone[3]
