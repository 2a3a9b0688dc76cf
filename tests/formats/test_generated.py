"""GenerativeAdapter: what was read as a LoRA, in our server, in PEFT, and as a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import case
from generated import IDS, attached, logits, ready, same, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import anyadapter as aa
from anyadapter.formats.generative import load_state, save_lora, save_state
from anyadapter.methods.language.generative import Generative, generate_lora
from anyadapter.serving.engine import Engine, EngineSettings
from anyadapter.serving.request import Request, Sampling

# ------------------------------------------------------------------ as a LoRA


@pytest.mark.parametrize("norm", ["frobenius", "spectral", "svd"])
@pytest.mark.parametrize("target", ["self_attention.output", "feed_forward.down"])
def test_an_export_of_full_rank_is_the_adapter(norm: str, target: str) -> None:
    model, adapter = ready(norm=norm, targets=target)
    adapter.scale = 0.7
    state = adapter.read(model, tokens(9))
    expected = logits(model, state=state)
    config, tensors = adapter.export(state)
    assert config.rank == (3 if norm == "svd" else 5)
    lora = aa.attach(model, config, "lora")
    lora.load_tensors(tensors)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


@given(rank=st.integers(1, 8), norm=st.sampled_from(["frobenius", "svd"]), length=st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_a_lower_rank_is_the_nearest_update(rank: int, norm: str, length: int) -> None:
    model, adapter = ready(norm=norm)
    state = adapter.read(model, tokens(length))
    whole, cut = adapter.export(state, 8)[1], adapter.export(state, rank)[1]
    for path in adapter.layer_of:
        full = whole[f"{path}.lora_B.weight"] @ whole[f"{path}.lora_A.weight"]
        near = cut[f"{path}.lora_B.weight"] @ cut[f"{path}.lora_A.weight"]
        assert cut[f"{path}.lora_A.weight"].shape[0] == rank
        best = torch.linalg.svdvals(full)[rank:].norm()
        torch.testing.assert_close((full - near).norm(), best, atol=1e-4, rtol=1e-3)


def test_an_exported_folder_is_read_by_us_and_by_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    model, adapter = ready()
    state = adapter.read(model, tokens(9))
    expected = logits(model, state=state)
    save_lora(model, state, tmp_path / "lora")
    with aa.disabled(model):
        aa.load(model, tmp_path / "lora", "lora")
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)
    other = PeftModel.from_pretrained(case("llama").build(), str(tmp_path / "lora")).eval()
    with torch.no_grad():
        torch.testing.assert_close(other(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_server_gives_the_same_answers(tmp_path: Path) -> None:
    model, adapter = ready()
    prompts, expected = [IDS[0].tolist(), IDS[1, :4].tolist()], {}
    for i, prompt in enumerate(prompts):
        state = adapter.read(model, tokens(9, seed=i))
        save_lora(model, state, tmp_path / f"context-{i}")
        with aa.signals(model, state=state):
            out = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)
        expected[f"context-{i}"] = out[0, len(prompt) :].tolist()
    aa.detach(model)
    engine = Engine(model, settings=EngineSettings(cells=256, max_running=4, adapters=str(tmp_path)))
    assert not engine.store.scan()
    greedy = Sampling(max_tokens=5, temperature=0, ignore_eos=True)
    for name, prompt in zip(expected, prompts):
        engine.submit(Request(name, tuple(prompt), {name: 1.0}, greedy))
    found: dict[str, list[int]] = {name: [] for name in expected}
    while engine.has_work:
        for output in engine.step():
            found[output.id] += output.tokens
    assert found == expected


def test_generate_lora_is_a_read_and_an_export() -> None:
    model, adapter = ready()
    first, _, _ = generate_lora(model, adapter, tokens(5).tolist())
    state, config, tensors = generate_lora(model, adapter, tokens(6, seed=1).tolist(), first, rank=2, mode="parallel")
    same(state, adapter.read(model, tokens(6, seed=1), mode="parallel", state=first))
    assert config.rank == 2
    for name, tensor in adapter.export(state, 2)[1].items():
        torch.testing.assert_close(tensors[name], tensor)


# ------------------------------------------------------------------ files


def test_a_state_and_its_generator_survive_their_files(tmp_path: Path) -> None:
    model, adapter = ready()
    state = adapter.read(model, tokens(9))
    expected = logits(model, state=state)
    aa.save_pretrained(model, tmp_path / "generator")
    path = save_state(state, tmp_path / "state.safetensors")
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode, "readable as any file is"
    aa.detach(model)
    aa.load(model, tmp_path / "generator")
    again = load_state(tmp_path / "state.safetensors", model)
    same(again, state, atol=0, rtol=0)
    assert again.recipe == state.recipe
    assert torch.equal(logits(model, state=again), expected)
    mine = aa.adapters(model)["default"]
    assert isinstance(mine, Generative)
    same(mine.read(model, tokens(4), state=again), mine.read(model, tokens(4), state=state), atol=0, rtol=0)


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A state's file with another description."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["anyadapter_state"])
    change(about)
    save_file(load_file(path), path, metadata={"anyadapter_state": json.dumps(about)})


def test_a_state_saved_before_after_was_noted_is_used_but_not_forgotten(tmp_path: Path) -> None:
    def older(about: dict[str, Any]) -> None:
        for read in about["recipe"]["reads"]:
            del read["after"]

    model, adapter = ready()
    first = adapter.read(model, tokens(5))
    state = adapter.read(model, tokens(9, seed=1), state=first)
    path = save_state(state, tmp_path / "state.safetensors")
    rewritten(path, older)
    old = load_state(path, model)
    assert torch.equal(logits(model, state=old), logits(model, state=state))
    more, new = adapter.read(model, tokens(4), state=old), adapter.read(model, tokens(4))
    same(more, adapter.read(model, tokens(4), state=state))
    same(old + new - new, old, atol=1e-4, rtol=1e-4)
    for left, right in ((old, old), (old, first), (old, new), (state, old), (more, new)):
        with pytest.raises(aa.ConfigError, match="did not note what was known"):
            left - right


def damaged(path: Path, how: str) -> None:
    tensors = load_file(path)
    if how == "no description":
        save_file(tensors, path)
    elif how.startswith("after "):
        rewritten(path, lambda about: about["recipe"]["reads"][0].update(after=int(how.split()[1])))
    elif how == "no context":
        rewritten(path, lambda about: about["recipe"]["reads"][0].pop("context"))
    elif how == "a linear is missing":
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        save_file(dict(list(tensors.items())[1:]), path, metadata=metadata)
    else:
        path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no description", "is not the state of a GenerativeAdapter"),
        ("after 1", "its description is damaged"),
        ("after -1", "its description is damaged"),
        ("no context", "its description is damaged"),
        ("a linear is missing", "one matrix for each of the 2 linears"),
        ("cut off", "truncated or damaged"),
    ],
)
def test_a_damaged_state_is_refused(tmp_path: Path, how: str, message: str) -> None:
    model, adapter = ready()
    path = save_state(adapter.read(model, tokens(5)), tmp_path / "state.safetensors")
    damaged(path, how)
    with pytest.raises(aa.ArtefactError, match=message):
        load_state(path, model)


def test_a_state_of_another_generator_or_base_is_refused(tmp_path: Path) -> None:
    model, adapter = ready()
    path = save_state(adapter.read(model, tokens(5)), tmp_path / "state.safetensors")
    other = case("llama").build().requires_grad_(False)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2.0)
    twin = attached(other)
    twin.load_tensors(adapter.tensors())
    with pytest.raises(aa.BaseMismatchError, match="other values"):
        load_state(path, other)
    assert load_state(path, other, check_base=False).windows == 2
    with torch.no_grad():
        next(iter(adapter.parameters())).mul_(1.01)
    with pytest.raises(aa.BaseMismatchError, match="another generator"):
        load_state(path, model)
    twin.load_tensors(adapter.tensors())
    state = twin.read(other, tokens(5))
    with torch.no_grad():
        next(iter(adapter.parameters())).mul_(1.01)
    with pytest.raises(aa.BaseMismatchError, match="another generator than 'default'"):
        save_lora(model, state, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    aa.attach(model, aa.LoRAConfig(rank=2), "lora")
    with pytest.raises(aa.ArtefactError, match="'lora' is a LoRA"):
        load_state(path, model, "lora")
    hidden = adapter.record(model, IDS, torch.ones(2, 7))
    with pytest.raises(aa.ArtefactError, match="made in training"):
        save_state(adapter.recall(hidden, torch.ones(2, 7)), tmp_path / "training.safetensors")
