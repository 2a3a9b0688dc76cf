"""The engine against single models: whatever shares its batch, a request gets what its own merged model would say."""

from __future__ import annotations

import ctypes
import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from served import disagreement, greedy, lora, run, save_adapter, tokens_of
from torch import nn

import anyadapter as aa
from anyadapter.core.errors import RequestError, UnknownAdapterError
from anyadapter.serving.engine import Engine, EngineSettings
from anyadapter.serving.loop import EngineLoop
from anyadapter.serving.request import Request, Sampling
from anyadapter.serving.threads import helper

TIE = 1e-3  # two logits closer than this are the same to fp32 sums of another order
RANKS = (8, 16, 32, 64, 12, 1)
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the sea, there lived",
    "Water boils at",
    "The three primary colours are",
    "Dear Sir or Madam,",
]


@pytest.fixture(scope="module")
def folder(smollm_and_tokenizer: tuple[nn.Module, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for i, rank in enumerate(RANKS):
        targets: Any = "all-linear" if i % 3 < 2 else ("self_attention.query", "self_attention.value")
        strength = 1 if targets == "all-linear" else 3
        save_adapter(smollm_and_tokenizer[0], root, f"a{i}", lora(rank, targets), i, strength)
    return root


def prompts(tokenizer: Any) -> list[tuple[int, ...]]:
    return [tuple(tokenizer(text)["input_ids"]) for text in PROMPTS]


def check_against_merged(model: nn.Module, folder: Path, name: str, prompt: tuple[int, ...], said: list[int]) -> None:
    aa.load(model, folder / name, "oracle")
    aa.merge(model, "oracle")
    try:
        assert disagreement(model, prompt, said) < TIE
    finally:
        aa.unmerge(model, "oracle")
        aa.detach(model, "oracle")


@pytest.fixture
def engine(smollm: nn.Module, smollm_tokenizer: Any, folder: Path) -> Any:
    made = Engine(smollm, smollm_tokenizer, settings=EngineSettings(cells=8000, adapters=str(folder)))
    assert made.store.scan() == {}
    yield made
    made.close()


def test_each_row_says_what_its_merged_model_says(
    engine: Engine, smollm: nn.Module, smollm_tokenizer: Any, folder: Path
) -> None:
    texts = prompts(smollm_tokenizer)
    for i, prompt in enumerate(texts):
        engine.submit(greedy(f"r{i}", prompt, 8, **{f"a{i}": 1.0}))
    engine.submit(greedy("base", texts[0], 8))
    said = {id: tokens_of(outputs) for id, outputs in run(engine).items()}
    engine.close()
    assert disagreement(smollm, texts[0], said["base"]) < TIE
    for i, prompt in enumerate(texts):
        assert len(said[f"r{i}"]) == 8
        assert disagreement(smollm, prompt, said[f"r{i}"]) > TIE, "the adapter changed nothing, so nothing was tested"
        check_against_merged(smollm, folder, f"a{i}", prompt, said[f"r{i}"])


def test_after_eviction_and_reload(smollm: nn.Module, folder: Path, smollm_tokenizer: Any) -> None:
    """A pool that holds one large adapter at a time: every request evicts another's."""
    prompt = prompts(smollm_tokenizer)[0]
    roomy = Engine(smollm, settings=EngineSettings(cells=8000, adapters=str(folder)))
    roomy.store.scan()
    quiet = {}
    for name in ("a2", "a3", "a1"):
        roomy.submit(greedy(name, prompt, 4, **{name: 1.0}))
        quiet |= {id: tokens_of(o) for id, o in run(roomy).items()}
    roomy.close()
    largest = max(r.cells for r in roomy.store.by_name.values())
    tight = Engine(smollm, settings=EngineSettings(cells=largest + 40, adapters=str(folder)))
    tight.store.scan()
    for round in range(2):
        for name in ("a2", "a3", "a1"):
            tight.submit(greedy(f"{name}-{round}", prompt, 4, **{name: 1.0}))
    said = {id: tokens_of(outputs) for id, outputs in run(tight).items()}
    assert tight.residents.evictions >= 2
    assert said == {f"{name}-{round}": quiet[name] for name in quiet for round in range(2)}
    tight.close()


def test_chunked_prefill_and_company_change_nothing(engine: Engine, smollm: nn.Module, smollm_tokenizer: Any) -> None:
    """A long prompt, computed in pieces beside decoding neighbours, alone says the same."""
    long = tuple(smollm_tokenizer("In the beginning " * 40)["input_ids"])
    engine.submit(greedy("alone", long, 4, a1=1.0))
    alone = tokens_of(run(engine)["alone"])
    engine.close()
    pieces = Engine(
        smollm, settings=EngineSettings(cells=8000, step_tokens=16, max_running=8, adapters=engine.settings.adapters)
    )
    pieces.store.scan()
    for i, prompt in enumerate(prompts(smollm_tokenizer)[:4]):
        pieces.submit(greedy(f"n{i}", prompt, 6, **({f"a{i}": 1.0} if i else {})))
    pieces.step()
    pieces.submit(greedy("long", long, 4, a1=1.0))
    assert tokens_of(run(pieces)["long"]) == alone
    pieces.close()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "omp_set_num_threads"), reason="another OpenMP")
def test_work_beside_the_engines_takes_no_thread_from_it() -> None:
    own = torch.get_num_threads()
    with helper("beside") as pool:
        assert pool.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == own
        with ThreadPoolExecutor(1) as another:
            assert another.submit(torch.get_num_threads).result() == own


def test_reading_an_adapter_again_leaves_nothing_behind(engine: Engine) -> None:
    def objects() -> int:
        gc.collect()
        return sys.getallocatedblocks()

    for _ in range(3):
        engine.store.register("a0")
    before = objects()
    for _ in range(20):
        engine.store.register("a0")
    assert objects() - before < 400, "20 readings of 420 tensors have left a piece for each"


def test_the_model_is_what_it_was(smollm: nn.Module, folder: Path) -> None:
    ids = torch.arange(5, 15)[None]
    before, keys = smollm(ids).logits, list(smollm.state_dict())
    engine = Engine(smollm, settings=EngineSettings(cells=2000, adapters=str(folder)))
    engine.store.scan()
    engine.submit(greedy("a", (1, 2, 3), 2, a0=1.0))
    run(engine)
    assert torch.equal(smollm(ids).logits, before), "the engine is attached, and others may still call the model"
    engine.close()
    assert list(smollm.state_dict()) == keys
    assert not any("forward" in module.__dict__ for module in smollm.modules())
    assert torch.equal(smollm(ids).logits, before)


def test_weights_and_combinations(engine: Engine, smollm: nn.Module, smollm_tokenizer: Any, folder: Path) -> None:
    """Two LoRAs with weights on one request act as both attached with these scales."""
    prompt = prompts(smollm_tokenizer)[1]
    engine.submit(greedy("both", prompt, 6, a1=0.7, a0=-0.4))
    engine.submit(greedy("half", prompt, 6, a0=0.5))
    said = {id: tokens_of(outputs) for id, outputs in run(engine).items()}
    engine.close()
    for request, weights in (("both", {"a1": 0.7, "a0": -0.4}), ("half", {"a0": 0.5})):
        for name, weight in weights.items():
            aa.load(smollm, folder / name, name).scale = weight
        assert disagreement(smollm, prompt, said[request]) < TIE
        for name in reversed(weights):
            aa.detach(smollm, name)


KINDS = {
    "ia3": aa.IA3Config(),
    "series": aa.BottleneckConfig(placement="series", width=24, activation="gelu", bias=True),
    "parallel": aa.BottleneckConfig(placement="parallel", width=16, scaling=2.0),
    "beside-mlp": aa.BottleneckConfig(placement="parallel_block", width=8, activation="relu", scaling="learned"),
    "after-layer": aa.BottleneckConfig(placement="after", targets="layer", width=8, bias=True),
    "prefix": aa.PrefixConfig(tokens=7, init=0.3),
    "unshifted": aa.PrefixConfig(tokens=3, init=0.3, shift=False),
    "gated": aa.LlamaAdapterConfig(length=5),
    "gated-layers": aa.LlamaAdapterConfig(length=2, last_layers=4, gate="layer", activation="identity"),
    "lora": aa.LoRAConfig(rank=4, targets="all-linear"),
}


def test_other_kinds_share_the_batch(smollm: nn.Module, smollm_tokenizer: Any, tmp_path: Path) -> None:
    """(IA)³, bottlenecks, prefixes, gated prefixes and a LoRA in one batch: each as if attached alone."""
    for seed, (name, config) in enumerate(KINDS.items()):
        save_adapter(smollm, tmp_path, name, config, seed, strength=2.0)
    engine = Engine(smollm, settings=EngineSettings(cells=8000, adapters=str(tmp_path)))
    assert engine.store.scan() == {}
    texts = prompts(smollm_tokenizer)
    for i, name in enumerate(KINDS):
        engine.submit(greedy(name, texts[i % len(texts)], 6, **{name: 1.0}))
        engine.submit(greedy(f"{name}-base", texts[i % len(texts)], 6))
    said = {id: tokens_of(outputs) for id, outputs in run(engine).items()}
    engine.close()
    for i, name in enumerate(KINDS):
        prompt = texts[i % len(texts)]
        assert disagreement(smollm, prompt, said[f"{name}-base"]) < TIE
        assert disagreement(smollm, prompt, said[name]) > TIE, f"{name} changed nothing"
        aa.load(smollm, tmp_path / name, "oracle")
        assert disagreement(smollm, prompt, said[name]) < TIE, name
        aa.detach(smollm, "oracle")


def test_what_would_change_a_gated_prefix_is_refused(smollm: nn.Module, tmp_path: Path) -> None:
    """By a LoRA at the projections that make its keys, or by an image; nothing is served that would say something else."""
    config = aa.LlamaAdapterConfig(length=3, lora_rank=2, lora_targets="self_attention.key")
    save_adapter(smollm, tmp_path, "both", config, 1)
    engine = Engine(smollm, settings=EngineSettings(cells=500, adapters=str(tmp_path)))
    save_adapter(smollm, tmp_path, "sees", aa.LlamaAdapterConfig(visual="early", visual_depth=1), 1)
    refused = engine.store.scan()
    assert "served alone" in refused["both"]
    assert "visual_features" in refused["sees"]
    engine.close()


def test_seeds_sampling_and_logprobs(engine: Engine) -> None:
    """The same seed gives the same tokens alone and in company; log-probabilities are the model's."""
    sampling = Sampling(max_tokens=5, temperature=0.9, top_p=0.9, seed=11, logprobs=2)
    engine.submit(Request("alone", (504, 260, 2), {"a1": 1.0}, sampling))
    alone = run(engine)["alone"]
    for i in range(3):
        engine.submit(Request(f"other{i}", (7, 8, 9), {"a0": 1.0}, Sampling(max_tokens=4, seed=i)))
    engine.submit(Request("company", (504, 260, 2), {"a1": 1.0}, sampling))
    company = run(engine)["company"]
    assert tokens_of(alone) == tokens_of(company)
    for one, other in zip(alone, company):
        (chosen, *likely), (chosen_too, *_) = one.logprobs[0], other.logprobs[0]
        assert chosen[0] == one.tokens[0]
        assert chosen[1] == pytest.approx(chosen_too[1], abs=1e-3)
        assert len(likely) == 2
        assert likely[0][1] >= likely[1][1]
        assert chosen[1] <= likely[0][1] + 1e-6


def test_bad_requests_are_refused_at_the_door(engine: Engine) -> None:
    for request, error in [
        (greedy("r", (), 4), RequestError),
        (greedy("r", (1,), 4, nobody=1.0), UnknownAdapterError),
        (greedy("r", (10**9,), 4), RequestError),
        (greedy("r", (1,) * 9000, 4), RequestError),
        (greedy("r", (1,), 9000), RequestError),
        (greedy("r", (1,), 4, a0=float("nan")), RequestError),
    ]:
        with pytest.raises(error):
            engine.submit(request)
    assert not engine.has_work
    assert engine.held == {}
    with pytest.raises(UnknownAdapterError, match="'a0'"):
        engine.submit(greedy("r", (1,), 4, a00=1.0))


def test_a_bad_adapter_harms_nobody_else(engine: Engine, folder: Path, tmp_path: Path) -> None:
    """Its file is damaged after it was registered: its request ends with an error, its neighbour is as in quiet."""
    import shutil

    shutil.copytree(folder / "a0", folder / "broken")
    try:
        engine.store.register("broken", check=False)
        engine.submit(greedy("quiet", (504, 260, 2), 5, a1=1.0))
        quiet = tokens_of(run(engine)["quiet"])
        file = folder / "broken" / "adapter_model.safetensors"
        data = bytearray(file.read_bytes())
        data[-4:] = b"\x00\x00\xc0\x7f"  # NaN
        file.write_bytes(data)
        engine.submit(greedy("bad", (504, 260, 2), 5, broken=1.0))
        engine.submit(greedy("good", (504, 260, 2), 5, a1=1.0))
        said = run(engine)
    finally:
        shutil.rmtree(folder / "broken")
    assert said["bad"][-1].finish == "error"
    assert "load it again" in said["bad"][-1].message
    assert tokens_of(said["good"]) == quiet


def test_a_reload_serves_the_new_one_and_runs_the_old_to_its_end(
    engine: Engine, smollm: nn.Module, folder: Path
) -> None:
    prompt = (504, 260, 2)
    engine.submit(greedy("old", prompt, 6, a1=1.0))
    begun = tokens_of(engine.step())
    engine.store.register("a1", "a2")
    engine.submit(greedy("new", prompt, 6, a1=1.0))
    said = {id: tokens_of(outputs) for id, outputs in run(engine).items()}
    resident = [id for id in engine.residents.by_id if id.startswith("a1@")]
    assert resident == [engine.store.get("a1").id], "the old one can no longer be asked for"
    engine.close()
    check_against_merged(smollm, folder, "a2", prompt, said["new"])
    check_against_merged(smollm, folder, "a1", prompt, begun + said["old"])


def test_cancel_gives_everything_back(engine: Engine) -> None:
    for i in range(4):
        engine.submit(greedy(f"r{i}", (5, 6, 7, 8), 20, **{f"a{i % 2}": 1.0}))
    engine.cancel("r3")  # while it waits
    for _ in range(3):
        engine.step()
    engine.cancel("r0")
    engine.check_integrity()
    engine.cancel("nobody")
    said = run(engine)
    assert "r3" not in said
    assert engine.stats()["cells_sequences"] == 0
    assert engine.pool.left + engine.residents.cells == engine.pool.cells


@pytest.mark.parametrize(
    ("error", "ended"), [(torch.OutOfMemoryError("no memory"), {"long"}), (RuntimeError("broken"), {"long", "a"})]
)
def test_a_pass_that_breaks_is_undone(
    engine: Engine, error: Exception, ended: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory costs the largest piece; the others say what they say in quiet."""
    engine.submit(greedy("quiet", (504, 260, 2), 6, a1=1.0))
    quiet = tokens_of(run(engine)["quiet"])
    engine.submit(greedy("a", (504, 260, 2), 6, a1=1.0))
    begun = tokens_of(engine.step())
    engine.submit(greedy("long", range(100, 160), 4, a0=1.0))

    def broken(*_: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(engine, "call", broken)
        outputs = engine.step()
    engine.check_integrity()
    assert {output.id for output in outputs} == ended
    assert all(output.finish == "error" and output.message for output in outputs)
    said = run(engine)
    assert ("a" in said) == ("a" not in ended)
    if "a" in said:
        assert begun + tokens_of(said["a"]) == quiet
    engine.submit(greedy("after", (504, 260, 2), 6, a1=1.0))
    assert tokens_of(run(engine)["after"]) == quiet


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("words of a user"), KeyError("words of a user")], ids=repr)
def test_an_adapter_that_the_pool_cannot_take_harms_nobody_else(
    engine: Engine, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its cells, and the use of the adapter that was loaded before it, are given back."""
    engine.submit(greedy("quiet", (504, 260, 2), 5, a1=1.0))
    quiet = tokens_of(run(engine)["quiet"])
    engine.submit(greedy("before", (504, 260, 2), 5, a1=1.0))
    begun = tokens_of(engine.step())
    free, size = engine.pool.left, engine.store.get("a0").cells
    write = engine.pool.write

    def broken(cells: Any, values: Any) -> None:
        if len(cells) == size:
            raise error
        write(cells, values)

    with monkeypatch.context() as patch:
        patch.setattr(engine.pool, "write", broken)
        engine.submit(greedy("bad", (504, 260, 2), 5, a1=1.0, a0=1.0))
        engine.submit(greedy("after", (504, 260, 2), 5, a1=1.0))
        outputs = engine.step()
    engine.check_integrity()
    (bad,) = [output for output in outputs if output.id == "bad"]
    assert bad.finish == "error"
    assert type(error).__name__ in bad.message
    assert "words of a user" not in bad.message + caplog.text
    assert engine.pool.left == free - 1 - 3, "a token of one request and three of the other"
    begun += [token for output in outputs if output.id == "before" for token in output.tokens]
    rest = run(engine)
    assert begun + tokens_of(rest["before"]) == quiet
    assert tokens_of([o for o in outputs if o.id == "after"] + rest["after"]) == quiet
    engine.submit(greedy("again", (504, 260, 2), 5, a0=1.0))
    assert run(engine)["again"][-1].finish == "length"


def test_an_unforeseen_error_loses_nothing_that_was_made(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """After one request was given up, one could not start and one has ended, another one's text fails in the same step."""
    loop = EngineLoop(engine)
    late, waits = greedy("late", (1, 2), 4), greedy("waits", (1, 2), 4)
    late.deadline = engine.clock() - 1
    engine.submit(greedy("ends", (504, 260, 2), 2))
    engine.submit(greedy("fails", (504, 260, 2), 5, a1=1.0))
    engine.step()
    engine.submit(late)
    engine.store.register("a0", check=False)
    engine.submit(greedy("cannot start", (504, 260, 2), 2, a0=1.0))
    engine.store.get("a0").stamp = (0, 0)
    text: Any = engine.sequences["fails"].text
    monkeypatch.setattr(text, "decode", lambda _: {}[0])
    with pytest.raises(KeyError) as raised:
        engine.step()
    engine.submit(waits)
    outputs = loop.recover(engine, raised.value)
    told = {output.id: (output.finish, len(output.tokens)) for output in outputs}
    assert told == {"late": ("abort", 0), "cannot start": ("error", 0), "ends": ("length", 1), "fails": ("error", 0)}
    assert len(outputs) == 4
    assert loop.error is None
    assert engine.held == {} == engine.samplers
    assert engine.stats()["finished_length"] == 1
    assert {id: o[-1].finish for id, o in run(engine).items()} == {"waits": "length"}


def test_a_policy_that_fails_leaves_no_request_without_an_answer(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has taken one out of the queue when it fails, before anybody could be told."""
    loop, late = EngineLoop(engine), greedy("late", (1, 2), 4, a1=1.0)
    late.deadline = engine.clock() - 1
    engine.submit(late)
    engine.submit(greedy("waits", (1, 2), 4))
    with monkeypatch.context() as patch:
        patch.setattr(engine.scheduler.policy, "admit", lambda *_: {}[0])
        with pytest.raises(KeyError) as raised:
            engine.step()
    assert [(o.id, o.finish) for o in loop.recover(engine, raised.value)] == [("late", "error")]
    assert engine.held == {}
    assert {id: o[-1].finish for id, o in run(engine).items()} == {"waits": "length"}


def test_an_ended_request_cannot_end_again(engine: Engine) -> None:
    engine.submit(greedy("r", (504, 260, 2), 4, a1=1.0))
    engine.step()
    request = engine.requests["r"]
    for _ in range(2):
        engine.end(request, "error", "once")
    assert [output.message for output in engine.take()] == ["once"]
    assert engine.stats()["finished_error"] == 1
    engine.check_integrity()


def test_the_least_recently_used_adapter_makes_room(smollm: nn.Module, folder: Path) -> None:
    """Of three in the pool, whatever the order they came in; and none that a request still needs."""
    sizes = Engine(smollm, settings=EngineSettings(cells=8000, adapters=str(folder)))
    sizes.store.scan()
    cells = {name: sizes.store.get(name).cells for name in ("a0", "a1", "a4", "a5")}
    sizes.close()
    engine = Engine(smollm, settings=EngineSettings(cells=sum(cells.values()) - cells["a5"] + 8, adapters=str(folder)))
    engine.store.scan()

    def serve(*names: str) -> list[str]:
        for name in names:
            engine.submit(greedy(name, (1, 2, 3), 2, **{name: 1.0}))
            run(engine)
        return [id.partition("@")[0] for id in engine.residents.by_id]

    try:
        assert serve("a0", "a4", "a1") == ["a0", "a4", "a1"]
        assert serve("a0") == ["a4", "a1", "a0"]
        assert engine.residents.evictions == 0
        assert serve("a5") == ["a1", "a0", "a5"]
        engine.submit(greedy("long", (1, 2, 3), 4, a1=1.0))
        engine.step()
        assert serve("a4") == ["a5", "a1", "a4"], "a0 was idle for longest; a1 was in use"
        assert engine.residents.evictions == 2
    finally:
        engine.close()
