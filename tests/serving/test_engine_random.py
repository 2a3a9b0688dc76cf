"""Random arrivals, cancels, reloads and evictions; whatever happens, each request says what its merged model would say."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import disagreement, greedy, lora, run, save_adapter, tokens_of
from torch import nn

import anyadapter as aa
from anyadapter.serving.engine import Engine, EngineSettings
from anyadapter.serving.graphs import Decoder
from anyadapter.serving.request import Output, Request

RANKS = (1, 4, 6, 8, 12)
OTHERS = {
    "ia3": aa.IA3Config(),
    "bottleneck": aa.BottleneckConfig(placement="parallel_block", width=5, bias=True, activation="gelu"),
    "prefix": aa.PrefixConfig(tokens=3, init=0.5),
    "gated": aa.LlamaAdapterConfig(length=3, last_layers=1),
}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[nn.Module, Path, dict[str, nn.Module]]]:
    """A tiny LLaMA, its adapters on disk, and for each a model that has it attached."""
    model = case("llama").build().requires_grad_(False)
    with tempfile.TemporaryDirectory() as root:
        folder, oracles = Path(root), {"": case("llama").build()}
        configs: dict[str, Any] = {f"r{rank}": lora(rank) for rank in RANKS} | OTHERS
        for seed, (name, config) in enumerate(configs.items()):
            save_adapter(model, folder, name, config, seed, strength=10.0)
            oracles[name] = case("llama").build()
            aa.load(oracles[name], folder / name)
        yield model, folder, oracles


names = st.sampled_from(["", *(f"r{rank}" for rank in RANKS), *OTHERS])
events = st.one_of(
    st.tuples(st.just("submit"), names, st.integers(1, 12), st.integers(1, 8)),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
    st.tuples(st.just("reload"), names),
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    history=st.lists(events, min_size=5, max_size=40),
    cells=st.integers(220, 700),
    pace=st.sampled_from([4, 7, 64]),
    recorded=st.booleans(),
)
def test_random_histories(served: Any, history: list[tuple], cells: int, pace: int, recorded: bool) -> None:
    model, folder, oracles = served
    engine = Engine(model, settings=EngineSettings(cells=cells, max_running=4, step_tokens=pace, adapters=str(folder)))
    if recorded:
        engine.decoder = Decoder(engine.mixed, engine.call, engine.settings.max_running)
    requests: dict[str, Request] = {}
    outputs: dict[str, list[Output]] = {}
    cancelled = set()
    try:
        assert engine.store.scan() == {}
        for event in history:
            if event[0] == "submit":
                _, name, prompt, tokens = event
                id = str(len(requests))
                ids = torch.randint(3, 32, (prompt,), generator=torch.Generator().manual_seed(len(requests)))
                requests[id] = greedy(id, ids.tolist(), tokens, **({name: 1.0} if name else {}))
                engine.submit(requests[id])
            elif event[0] == "step":
                for _ in range(event[1]):
                    for output in engine.step():
                        outputs.setdefault(output.id, []).append(output)
                    engine.check_integrity()
            elif event[0] == "cancel" and str(event[1]) in requests:
                engine.cancel(str(event[1]))
                cancelled.add(str(event[1]))
                engine.check_integrity()
            elif event[0] == "reload" and event[1]:
                engine.store.register(event[1])
        for id, more in run(engine).items():
            outputs.setdefault(id, []).extend(more)
        assert engine.held == {} == engine.sequences
        assert engine.pool.left + engine.residents.cells == engine.pool.cells
    finally:
        engine.close()
    for id, request in requests.items():
        said = tokens_of(outputs.get(id, []))
        if id not in cancelled:
            assert len(said) == request.sampling.max_tokens
            assert outputs[id][-1].finish == "length"
        if said:
            oracle = oracles[next(iter(request.adapters), "")]
            assert disagreement(oracle, request.prompt, said) < 1e-4


@pytest.mark.slow
def test_64_adapters_on_a_real_model(smollm: nn.Module, smollm_tokenizer: Any, tmp_path: Path) -> None:
    """SmolLM2-135M in fp32 with 64 LoRAs of ranks 8 to 64 and a pool that holds a few: every row against its merged model."""
    ranks = [(8, 16, 32, 64)[i % 4] for i in range(64)]
    for i, rank in enumerate(ranks):
        save_adapter(smollm, tmp_path, f"a{i}", lora(rank), i)
    engine = Engine(smollm, settings=EngineSettings(cells=14_000, max_running=32, adapters=str(tmp_path)))
    assert engine.store.scan() == {}
    texts = ["The capital of France is", "Water boils at", "Dear Sir or Madam,", "def fibonacci(n):"]
    prompts = [tuple(smollm_tokenizer(f"{i}. {texts[i % 4]}")["input_ids"]) for i in range(64)]
    for round in range(2):  # the second time many are read again
        for i in range(64):
            engine.submit(greedy(f"{round}-{i}", prompts[i], 8, **{f"a{i}": 1.0}))
    said = {id: tokens_of(outputs) for id, outputs in run(engine).items()}
    assert engine.residents.evictions > 64
    engine.close()
    for i in range(64):
        assert said[f"0-{i}"] == said[f"1-{i}"]
        aa.load(smollm, tmp_path / f"a{i}", "oracle")
        aa.merge(smollm, "oracle")
        assert disagreement(smollm, prompts[i], said[f"0-{i}"]) < 1e-3
        aa.unmerge(smollm, "oracle")
        aa.detach(smollm, "oracle")
