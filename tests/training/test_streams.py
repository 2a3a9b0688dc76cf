"""Two streams in one run: each trains groups of its own, with images where it has any, from a file and from Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import rows
from transformers import TrainingArguments

import anyadapter as aa
from anyadapter.training import report
from anyadapter.training.causal_lm import Collator
from anyadapter.training.run import train
from anyadapter.training.streams import StreamCollator, joint_loss
from anyadapter.training.trainer import AdapterTrainer

STREAMS = {"captions": ["visual"], "instructions": ["prompts", "norms", "biases"]}
ADAPTER = {
    "length": 3, "last_layers": 1, "norms": "final_norm", "biases": "q_proj", "visual": "early", "visual_features": 6,
    "visual_width": 8, "visual_depth": 1, "visual_heads": 2,
}  # fmt: skip


@pytest.fixture
def streams(config: dict, tmp_path: Path) -> dict:
    """A small run: two rows of three are instructions, the third is a caption of an image in a file."""
    written, draw = [], np.random.default_rng(0)
    for i, row in enumerate(rows()):
        if i % 3:
            written.append({**row, "stream": "instructions"})
        else:
            np.save(tmp_path / f"{i}.npy", draw.normal(size=(5, 6)))
            written.append({"text": row["instruction"], "stream": "captions", "visual_features": f"{i}.npy"})
    path = tmp_path / "streams.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    data = {**config["data"], "train": str(path), "task": "streams", "streams": STREAMS}
    return {**config, "adapter": {"method": "llama_adapter", **ADAPTER}, "data": data}


def groups(adapter: Any) -> dict[str, list[torch.Tensor]]:
    return {name: [p.detach().clone() for p in adapter.group(name)] for name in adapter.groups}


def test_a_run_trains_both_and_goes_on_where_it_stopped(
    streams: dict, model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: dict[str, Any] = {}
    whole = train(
        {**streams, "output": str(tmp_path / "whole")},
        progress=False,
        model=model,
        tokenizer=tokenizer,
        prepare=lambda adapter: started.update(groups(adapter)),
    )
    after = groups(aa.adapters(model)["default"])
    for name in ("visual", "prompts", "norms", "biases"):
        assert any(not torch.equal(a, b) for a, b in zip(started[name], after[name])), name
    assert {"eval_loss_captions", "eval_loss_instructions"} <= whole.metrics.keys()

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(report.LogFile, "on_step_end", stop)
    broken = {**streams, "output": str(tmp_path / "broken")}
    with pytest.raises(KeyboardInterrupt):
        train(broken, progress=False)
    image = tmp_path / "3.npy"
    kept = image.read_bytes()
    np.save(image, np.zeros((5, 6)))
    with pytest.raises(aa.ConfigError, match="on other data"):
        train(broken, progress=False)
    image.write_bytes(kept)
    result = train(broken, progress=False)
    assert result.resumed_from == 4
    one, other = (load_file(r.adapter / "adapter_model.safetensors") for r in (whole, result))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("stream", STREAMS)
def test_a_stream_moves_its_own_groups_and_no_others(stream: str, streams: dict, model: Any, tokenizer: Any) -> None:
    path = Path(streams["data"]["train"])
    kept = [line for line in path.read_text().splitlines() if json.loads(line)["stream"] == stream]
    path.write_text("\n".join(kept))
    started: dict[str, Any] = {}
    settings = {**streams, "training": {**streams["training"], "weight_decay": 0.1}}
    prepare: Any = lambda adapter: started.update(groups(adapter))  # noqa: E731
    train(settings, progress=False, model=model, tokenizer=tokenizer, prepare=prepare)
    after = groups(aa.adapters(model)["default"])
    for name in after:
        moved = any(not torch.equal(a, b) for a, b in zip(started[name], after[name]))
        assert moved is (name in STREAMS[stream]), name


def test_the_joint_gradient_is_each_streams_own(model: Any) -> None:
    adapter = aa.attach(model, aa.LlamaAdapterConfig(**ADAPTER))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    ids = torch.randint(5, 60, (4, 6))
    images = [torch.randn(5, 6), None, None, torch.randn(5, 6)]
    batch = {"input_ids": ids, "labels": ids, "stream": torch.tensor([0, 1, 1, 0]), "visual_features": images}
    loss = joint_loss(model, adapter, batch, list(STREAMS.values()))
    loss.backward()
    found = {name: p.grad for name, p in adapter.named_parameters()}
    adapter.zero_grad()
    total = 0.0
    for index, stream in enumerate(STREAMS):
        chosen = (batch["stream"] == index).nonzero()[:, 0].tolist()
        adapter.train_only()
        with aa.signals(model, visual_features=[images[i] for i in chosen]):
            part = model(input_ids=ids[chosen], labels=ids[chosen]).loss
        mine = [p for group in STREAMS[stream] for p in adapter.group(group)]
        for p, grad in zip(mine, torch.autograd.grad(part / 2, mine)):
            p.grad = grad
        total += part.item() / 2
    assert loss.item() == pytest.approx(total, abs=1e-6)
    assert all(p.requires_grad for p in adapter.parameters())
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)


def test_it_trains_from_python(model: Any, tmp_path: Path) -> None:
    adapter = aa.attach(model, aa.LlamaAdapterConfig(**ADAPTER))
    before = groups(adapter)
    rows_ = [
        {"input_ids": [5, 6, 7 + i], "labels": [5, 6, 7 + i], "stream": 1, "visual_features": None} for i in range(4)
    ]
    arguments = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], remove_unused_columns=False)
    AdapterTrainer(
        model,
        arguments,
        train_dataset=rows_,
        data_collator=StreamCollator(Collator(0)),
        objective=lambda model, batch: joint_loss(model, adapter, batch, list(STREAMS.values())),
    ).train()
    after = groups(adapter)
    moved = {name for name in after if any(not torch.equal(a, b) for a, b in zip(before[name], after[name]))}
    assert moved == {"prompts", "norms", "biases"}


@pytest.mark.parametrize(
    ("section", "change", "error", "message"),
    [
        ("data", {"streams": {}}, aa.ConfigError, "streams is {}; it must be names of streams"),
        ("data", {"streams": {"captions": ["visual"]}}, aa.DataError, r"streams\.jsonl:2: 'stream' is 'instructions'"),
        (
            "data",
            {"streams": {**STREAMS, "captions": ["visuals"]}},
            aa.ConfigError,
            "no group 'visuals'. Did you mean 'visual'",
        ),
        ("training", {"stages": [{"groups": "visual"}]}, aa.ConfigError, "leave training.stages out"),
        ("training", {"gradient_checkpointing": True}, aa.ConfigError, "gradient_checkpointing"),
    ],
)
def test_what_cannot_be_is_refused(
    section: str, change: dict, error: type[Exception], message: str, streams: dict, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        train({**streams, section: {**streams[section], **change}}, progress=False)
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("3.npy", r"streams\.jsonl:4: 'visual_features' is '3\.npy', no number or numbers"),
        ("missing.npy", r"streams\.jsonl:4: .*missing\.npy does not exist"),
        ("objects.npy", r"streams\.jsonl:4: 'visual_features' is 'objects\.npy', no number"),
        ("../3.npy", r"streams\.jsonl:4: \.\./3\.npy leads out of"),
        ("blue", r"streams\.jsonl:4: 'visual_features' is 'blue', no number or numbers"),
    ],
)
def test_a_row_with_a_wrong_image_is_named(image: str, message: str, streams: dict, tmp_path: Path) -> None:
    (tmp_path / "3.npy").write_bytes(b"not numbers")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    path = Path(streams["data"]["train"])
    path.write_text(path.read_text().replace('"3.npy"', json.dumps(image)))
    with pytest.raises(aa.DataError, match=message):
        train(streams, progress=False)
