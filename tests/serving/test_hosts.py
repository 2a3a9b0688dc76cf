"""The engine on every family of causal language models: the same tokens as the merged model, or a refusal at the start."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import FAMILIES, case
from served import disagreement, greedy, lora, run, save_adapter, tokens_of

import anyadapter as aa
from anyadapter.core.errors import AttachError, TargetError
from anyadapter.serving.engine import Engine, EngineSettings

SERVED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gpt2", "gptj", "opt")
REFUSED = ("bloom", "gpt_neo")  # no position_ids, or a table of its own that says which keys are seen
FUSED = ("gpt2",)  # query, key and value are one linear there, which LLaMA-Adapter cannot take apart
PROMPT = (5, 9, 3, 11, 7, 2, 8)


@pytest.mark.parametrize("name", SERVED)
def test_tokens_are_those_of_the_merged_model(name: str, tmp_path: Path) -> None:
    model = case(name).build().requires_grad_(False)
    for seed, rank in enumerate((1, 3, 8)):
        save_adapter(model, tmp_path, f"a{seed}", lora(rank), seed, strength=10.0)
    save_adapter(model, tmp_path, "ia3", aa.IA3Config(), 5, strength=2.0)
    gated = ["gated"] if name not in FUSED else []
    for other in gated:
        save_adapter(model, tmp_path, other, aa.LlamaAdapterConfig(length=3, last_layers=1), 6)
    engine = Engine(model, settings=EngineSettings(cells=600, step_tokens=8, max_running=8, adapters=str(tmp_path)))
    assert engine.store.scan() == {}
    for adapter in ("a0", "a1", "a2", "ia3", *gated):
        engine.submit(greedy(adapter, PROMPT, 12, **{adapter: 1.0}))
    engine.submit(greedy("base", PROMPT, 12))
    said = {id: tokens_of(outputs) for id, outputs in run(engine).items()}
    engine.close()
    assert disagreement(model, PROMPT, said["base"]) < 1e-4
    assert len({tuple(tokens) for tokens in said.values()}) > 1, "no adapter changed anything"
    for adapter in ("a0", "a1", "a2", "ia3", *gated):
        aa.load(model, tmp_path / adapter, "oracle")
        if adapter not in gated:
            aa.merge(model, "oracle")
        assert disagreement(model, PROMPT, said[adapter]) < 1e-4, adapter
        if adapter not in gated:
            aa.unmerge(model, "oracle")
        aa.detach(model, "oracle")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_and_left_as_it_was(name: str) -> None:
    model = case(name).build()
    with pytest.raises(TargetError):
        Engine(model, settings=EngineSettings(cells=100))
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert aa.adapters(model) == {}


def test_every_causal_family_is_covered() -> None:
    causal = {c.name for c in FAMILIES if c.generates and c.name not in ("t5", "bart")}
    assert causal == {*SERVED, *REFUSED}


def test_one_engine_a_model() -> None:
    model = case("llama").build()
    engine = Engine(model, settings=EngineSettings(cells=100))
    with pytest.raises(AttachError, match="serving"):
        Engine(model, settings=EngineSettings(cells=100))
    engine.close()
    Engine(model, settings=EngineSettings(cells=100)).close()
