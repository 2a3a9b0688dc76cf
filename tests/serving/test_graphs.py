"""Recorded decoding against computed decoding. Without a GPU the recording is a tape of the operations, played again as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from families import case
from served import disagreement, greedy, lora, run, save_adapter, tokens_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import anyadapter as aa
from anyadapter.serving import graphs
from anyadapter.serving.engine import Engine, EngineSettings
from anyadapter.serving.graphs import Decoder, size_for
from anyadapter.serving.kernels.native import CompilerError, Native

FAMILIES = ("llama", "gemma", "gpt2")


class Tape(TorchDispatchMode):
    """What a function does, operation by operation, each with the very tensors and numbers that it had, as in a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Callable[..., Any], tuple, dict, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for the device"
        return self.note(func, *args, **kwargs or {})

    def note(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do it, and keep it."""
        with _disable_current_modes():
            out = func(*args, **kwargs)
        given = {a.untyped_storage().data_ptr() for a in (*args, *kwargs.values()) if isinstance(a, Tensor)}
        made = [o for o in tensors(out) if o.untyped_storage().data_ptr() not in given]  # a view needs no copy
        self.operations.append((func, args, kwargs, made))
        return out

    def play(self) -> None:
        for func, args, kwargs, made in self.operations:
            out = func(*args, **kwargs)
            for old, new in zip(made, tensors(out)):
                old.copy_(new)


def tensors(out: Any) -> list[Tensor]:
    return [o for o in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(o, Tensor)]


class Kernels:
    """Those in C are no operations of torch, and noted by themselves."""

    def __init__(self, kernels: Any, tape: Tape) -> None:
        self.attend, self.add = partial(tape.note, kernels.attend), partial(tape.note, kernels.add)


class Taped(Decoder):
    """A decoder that records on the CPU, and counts."""

    def __init__(self, engine: Engine) -> None:
        self.played = self.refused = 0
        super().__init__(engine.mixed, engine.call, engine.settings.max_running)

    def run(self, *args: Any) -> Tensor | None:
        out = super().run(*args)
        self.refused += out is None
        return out

    def record(self, size: int) -> Callable[[], Tensor]:
        compute, kernels, tape = super().record(size), self.mixed.kernels, Tape()
        self.mixed.kernels = Kernels(kernels, tape)  # type: ignore[assignment]
        try:
            with tape:
                out = compute()
        finally:
            self.mixed.kernels = kernels

        def play() -> Tensor:
            self.played += 1
            out.fill_(torch.nan)
            tape.play()
            return out

        return play


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model, adapters on disk, and for each of them a model that has it attached."""
    try:
        Native(torch.float32)
    except CompilerError as error:
        pytest.skip(str(error))
    model, folder = case(request.param).build(), tmp_path_factory.mktemp("adapters")
    some = ("self_attention.query", "feed_forward.down") if request.param != "gpt2" else ("feed_forward.down",)
    configs: dict[str, Any] = {
        "r2": lora(2),
        "r8": lora(8),
        "some": lora(4, some),
        "prefix": aa.PrefixConfig(tokens=3, init=0.5),
    }
    configs |= {"ia3": aa.IA3Config(), "wide": lora(16)}
    oracles = {"": case(request.param).build()}
    for seed, (name, config) in enumerate(configs.items()):
        save_adapter(model, folder, name, config, seed, strength=10.0)
        oracles[name] = case(request.param).build()
        aa.load(oracles[name], folder / name)
    return model, folder, oracles


@pytest.fixture
def engine(served: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(graphs, "ROWS", 8)  # so that layouts grow
    model, folder, _ = served
    made = Engine(model, settings=EngineSettings(cells=900, max_running=12, adapters=str(folder), pack=False))
    made.decoder = Taped(made)
    assert made.store.scan() == {}
    yield made
    made.close()


def ask(engine: Engine, names: list[str], tokens: list[int]) -> dict[str, Any]:
    requests = {}
    for i, (name, count) in enumerate(zip(names, tokens)):
        ids = torch.randint(3, 32, (2 + i % 4,), generator=torch.Generator().manual_seed(i)).tolist()
        requests[str(i)] = greedy(str(i), ids, count, **({name: 1.0} if name else {}))
        engine.submit(requests[str(i)])
    return requests


def test_a_played_pass_is_a_computed_one(engine: Engine, served: Any) -> None:
    """Adapters of other ranks, subsets and none, that come and go: each request says what its own model says."""
    names = ["r8", "", "r8", "some", "r2", "prefix", "wide", "prefix", "r2", "", "some"]
    for _ in range(2):  # the second time nothing is recorded any more
        requests = ask(engine, names, [9, 4, 7, 12, 3, 8, 10, 2, 6, 11, 5])
        before = len(engine.decoder.recorded), engine.decoder.played
        said = {id: tokens_of(outputs) for id, outputs in run(engine).items()}
        for id, request in requests.items():
            assert len(said[id]) == request.sampling.max_tokens
            assert disagreement(served[2][next(iter(request.adapters), "")], request.prompt, said[id]) < 1e-4
        assert engine.decoder.played > before[1]
    assert engine.decoder.rows > graphs.ROWS
    assert len(engine.decoder.recorded) == before[0]


def test_what_cannot_be_recorded_is_computed(engine: Engine, served: Any) -> None:
    requests = ask(engine, ["ia3", "r2", ""], [3, 6, 8])
    said = {id: tokens_of(outputs) for id, outputs in run(engine).items()}
    assert engine.decoder.refused
    assert engine.decoder.played  # after the first had ended
    for id, request in requests.items():
        assert disagreement(served[2][next(iter(request.adapters), "")], request.prompt, said[id]) < 1e-4


def test_a_recording_that_fails_is_given_up(engine: Engine, served: Any, caplog: pytest.LogCaptureFixture) -> None:
    def fail(size: int) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    engine.decoder.record = fail  # type: ignore[method-assign, union-attr]
    requests = ask(engine, ["r2", ""], [4, 4])
    said = {id: tokens_of(outputs) for id, outputs in run(engine).items()}
    assert caplog.text.count("without CUDA graphs") == 1
    assert disagreement(served[2]["r2"], requests["0"].prompt, said["0"]) < 1e-4


def test_sizes() -> None:
    sizes = [size_for(n) for n in range(1, 70)]
    assert sorted(set(sizes)) == [1, 2, 4, *range(8, 73, 8)]
    assert all(n <= size < 2 * n + 1 for n, size in enumerate(sizes, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_on_a_gpu(served: Any, dtype: torch.dtype) -> None:
    """The same tokens with and without, and played, not computed."""
    said = []
    for on in (True, False):
        model = case(served[0].config.model_type).build().to("cuda", dtype)
        engine = Engine(model, settings=EngineSettings(cells=900, max_running=12, adapters=str(served[1]), graphs=on))
        engine.store.scan()
        for name in ("r2", "r8", "", "some", "wide", "prefix"):
            engine.submit(greedy(name or "base", [3, 4, 5], 12, **({name: 1.0} if name else {})))
        said.append({id: tokens_of(outputs) for id, outputs in run(engine).items()})
        assert (engine.decoder is not None and bool(engine.decoder.recorded) and engine.decoder.works) is on
        engine.close()
    assert said[0] == said[1]
