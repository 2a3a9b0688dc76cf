"""One model over two processes, talking over gloo: the same as in one, token by token and logit by logit."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from families import case
from safetensors.torch import load_file, save_file
from served import greedy, lora, run, save_adapter, tokens_of
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import anyadapter as aa
from anyadapter.core.errors import AnyAdapterError, TargetError
from anyadapter.formats.files import CONFIG, TENSORS
from anyadapter.formats.native import KEY
from anyadapter.serving import split
from anyadapter.serving.engine import Engine, EngineSettings
from anyadapter.serving.request import Request, Sampling
from anyadapter.serving.split import Split
from anyadapter.serving.tensor_parallel import SplitEngine

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2")
RANKS = {"a3": 3, "a5": 5, "a8": 8, "a16": 16, "a1": 1}
QUANTISED = {"bits": 1, "nibbles": 4}
OTHERS = {
    "ia3": aa.IA3Config(),
    "prefix": aa.PrefixConfig(tokens=3, init=0.3),
    "beside": aa.BottleneckConfig(placement="parallel_block", width=8, activation="relu", scaling="learned", bias=True),
}
PROMPT = (5, 9, 3, 11, 7, 2, 8)
POISON = 1  # a token that no test's model says
SIZES = {"cells": 1500, "step_tokens": 16, "max_running": 16}


def requests(names: list[str]) -> list[Request]:
    made = [greedy(name, PROMPT[: 3 + i % 5], 6, **{name: 1.0}) for i, name in enumerate(names)]
    made += [greedy("base", PROMPT, 6), greedy("both", PROMPT, 6, a3=0.7, a16=-0.4)]
    made.append(Request("drawn", PROMPT, {"a8": 1.0}, Sampling(max_tokens=6, seed=3, logprobs=1, ignore_eos=True)))
    return made


def serve(engine: Engine, names: list[str]) -> dict[str, Any]:
    """The tokens of all requests, and the logits of all steps."""
    logits: list[Tensor] = []
    forward = engine.forward

    def watched(pieces: Any) -> Tensor:
        logits.append(forward(pieces))
        return logits[-1]

    engine.forward = watched  # type: ignore[method-assign]
    for request in requests(names):
        engine.submit(request)
    outputs = run(engine)
    return {"tokens": {id: tokens_of(o) for id, o in outputs.items()}, "logits": logits}


# -------------------------------------------------------------------------- in each of the processes


def work(rank: int, size: int, folder: str) -> None:
    """All that the tests look at: starting processes takes longer than what they do."""
    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    found: dict[str, Any] = {name: on_family(case(name).build(), f"{folder}/{name}") for name in FAMILIES}
    config = DistributedConfig(tp_plan="auto")
    loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/base", distributed_config=config, dtype=torch.float32)
    found["loaded"] = on_family(loaded.eval(), f"{folder}/llama")
    found["trouble"] = on_trouble(case("llama").build(), f"{folder}/llama")
    split.PATIENCE = timedelta(seconds=2)
    found["lost"] = on_poison(case("llama").build())
    torch.save(found, f"{folder}/found-{rank}.pt")
    os._exit(0)  # torch's own threads now and then abort a process that takes its group down


def on_poison(model: Any) -> list[str]:
    """The second process alone fails in a pass, and leaves; what each of them raises."""
    engine = SplitEngine(model.requires_grad_(False), settings=EngineSettings(**SIZES))
    if not engine.leads:
        poison(model)
        with pytest.raises(AnyAdapterError) as raised:
            engine.follow()
        return [f"{raised.typename}: {raised.value}"]
    engine.submit(greedy("r", (*PROMPT, POISON), 4))
    errors = []
    for _ in range(3):
        with pytest.raises(AnyAdapterError) as raised:
            engine.step()
        errors.append(raised.typename)
    engine.cancel("r")
    engine.check_integrity()
    engine.close()
    return errors


def poison(model: Any) -> None:
    """Let passes that read a certain token fail in the middle."""
    read: list[bool] = []

    def look(module: Any, args: tuple[Tensor]) -> None:
        read.append(bool((args[0] == POISON).any()))

    def fail(module: Any, args: Any) -> None:
        if read[-1]:
            raise RuntimeError("injected")

    model.model.embed_tokens.register_forward_pre_hook(look)
    model.model.layers[1].register_forward_pre_hook(fail)


def cannot_load(engine: SplitEngine, adapter: str) -> None:
    """Let this process have no room for an adapter that it has read."""
    load = engine.residents.load

    def fail(id: str, *what: Any) -> Any:
        if id.startswith(f"{adapter}@"):
            raise torch.OutOfMemoryError("injected")
        return load(id, *what)

    engine.residents.load = fail  # type: ignore[method-assign]


def on_family(model: Any, folder: str) -> dict[str, Any]:
    engine = SplitEngine(model.requires_grad_(False), settings=EngineSettings(**SIZES, adapters=folder))
    found = {}
    if engine.leads:
        for name in (*RANKS, *OTHERS, *QUANTISED):
            engine.store.register(name)
        found = serve(engine, engine.store.names())
        engine.close()
    else:
        engine.follow()
    engine.check_integrity()
    weights = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters())
    return found | {"names": engine.store.names(), "stats": engine.stats(), "weights": weights}


def on_trouble(model: Any, folder: str) -> dict[str, Any]:
    """Registering, replacing, cancelling, files that one process cannot read; and how many bytes go over the wire."""
    engine = SplitEngine(model.requires_grad_(False), settings=EngineSettings(**SIZES, adapters=folder))
    found: dict[str, Any] = {}
    raised = [disagree(engine.split, rank) for rank in range(2)]
    poison(model)
    if not engine.leads:
        cannot_load(engine, "a5")
    if engine.leads:
        found = trouble(engine)
        engine.close()
    else:
        engine.follow()
    engine.check_integrity()
    return found | {"names": engine.store.names(), "stats": engine.stats(), "raised": raised}


def disagree(group: Split, rank: int) -> str:
    """What comes of an action that fails in one process, in a way that was not foreseen."""

    def action() -> None:
        if group.rank == rank:
            raise ValueError("injected")

    with pytest.raises(ValueError) as raised:  # noqa: PT011  # an ArtefactError is one
        group.agree(action)
    return raised.typename


def trouble(engine: SplitEngine) -> dict[str, Any]:
    for name in ("a3", "a5", "a16"):
        engine.store.register(name)
    for name in ("nan", "nobody"):
        with pytest.raises(AnyAdapterError):
            engine.store.register(name)
    engine.store.register("nan", check=False)
    engine.submit(greedy("bad", PROMPT, 4, nan=1.0))
    engine.submit(greedy("large", PROMPT, 4, a5=1.0))
    engine.submit(greedy("good", PROMPT, 4, a3=1.0))
    engine.submit(greedy("gone", PROMPT, 40, a16=1.0))
    early = engine.step()
    engine.cancel("gone")
    outputs = run(engine)
    for output in reversed(early):
        outputs.setdefault(output.id, []).insert(0, output)
    engine.store.register("a3", "a16")
    engine.submit(greedy("new", PROMPT, 4, a3=1.0))
    new = run(engine)["new"]
    engine.submit(greedy("poisoned", (*PROMPT, POISON), 4))
    outputs |= run(engine)
    engine.store.unload("nan")
    engine.split.traffic.clear()
    engine.submit(greedy("counted", PROMPT, 1, a16=1.0))
    engine.submit(greedy("base", PROMPT, 1))
    engine.step()
    said = {"good": tokens_of(outputs["good"]), "new": tokens_of(new)}
    failed = {name: outputs[name][-1] for name in ("bad", "large", "poisoned")}
    return said | failed | {"traffic": dict(engine.split.traffic)}


# -------------------------------------------------------------------------- compared with one


def save_adapters(model: Any, folder: Path) -> None:
    for seed, (name, rank) in enumerate(RANKS.items()):
        save_adapter(model, folder, name, lora(rank), seed, strength=10.0)
    for seed, (name, config) in enumerate(OTHERS.items()):
        save_adapter(model, folder, name, config, seed, strength=2.0)
    for name, bits in QUANTISED.items():
        save_adapter(model, folder, name, lora(8), 9, strength=10.0, bits=bits)


def save_sick(folder: Path, healthy: str) -> None:
    """An adapter with a NaN in the half of a matrix that the second process reads, and no digest that would tell."""
    shutil.copytree(folder / healthy, folder / "nan")
    tensors = load_file(folder / "nan" / TENSORS)
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    tensors[name][-1] = float("nan")
    save_file(tensors, folder / "nan" / TENSORS)
    config = json.loads((folder / "nan" / CONFIG).read_text())
    del config[KEY]["tensors_sha256"]
    (folder / "nan" / CONFIG).write_text(json.dumps(config))


def in_one(name: str, folder: Path) -> dict[str, Any]:
    model = case(name).build().requires_grad_(False)
    engine = Engine(model, settings=EngineSettings(**SIZES, adapters=str(folder)))
    for adapter in (*RANKS, *OTHERS, *QUANTISED):
        engine.store.register(adapter)
    found = serve(engine, engine.store.names())
    engine.close()
    return found | {"weights": sum(p.numel() for p in model.parameters())}


def check_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert two["tokens"] == one["tokens"]
    assert len({tuple(tokens) for tokens in one["tokens"].values()}) > 6, "the adapters changed nothing"
    assert len(one["logits"]) == len(two["logits"])
    for expected, got in zip(one["logits"], two["logits"]):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("split")
    for name in FAMILIES:
        save_adapters(case(name).build(), root / name)
    case("llama").build().save_pretrained(root / "base")
    return root


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes has found."""
    save_sick(folder / "llama", "a8")
    mp.spawn(work, args=(2, str(folder)), nprocs=2)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process, as the only one of its group."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", [*FAMILIES, "loaded"])
def test_two_processes_say_what_one_says(name: str, both: list[dict[str, Any]], folder: Path) -> None:
    """Adapters of ranks 1 to 16 and of other kinds, several in one request, and none, in one batch.

    "loaded" is a model that transformers has divided while loading it; its embedding and head stay as they are.
    """
    first, second = (found[name] for found in both)
    family = "llama" if name == "loaded" else name
    one = in_one(family, folder / family)
    check_same(one, first)
    assert first["weights"] < one["weights"]
    assert second["names"] == sorted([*RANKS, *OTHERS, *QUANTISED])
    assert second["stats"] == first["stats"], "they have made the same decisions"


def test_what_fails_in_one_process_fails_in_both(both: list[dict[str, Any]], folder: Path) -> None:
    first, second = (found["trouble"] for found in both)
    for name in ("bad", "large"):
        assert first[name].finish == "error"
        assert "Another of the model's processes" in first[name].message
    assert first["poisoned"].message == "The model could not compute this request (RuntimeError)."
    model = case("llama").build()
    engine = Engine(model, settings=EngineSettings(**SIZES, adapters=str(folder / "llama")))
    for name in ("a3", "a16"):
        engine.store.register(name)
        engine.submit(greedy(name, PROMPT, 4, **{name: 1.0}))
    alone = {id: tokens_of(outputs) for id, outputs in run(engine).items()}
    assert first["good"] == alone["a3"]
    assert first["new"] == alone["a16"], "replaced in both"
    assert first["names"] == second["names"] == ["a16", "a3", "a5"]
    own = re.compile("adapter_|adapters_|cells_")  # what one could load and another could not
    decided, also = ({k: v for k, v in found["stats"].items() if not own.match(k)} for found in (first, second))
    assert decided == also
    assert first["stats"]["finished_error"] == 3
    assert first["stats"]["finished_cancel"] == 1
    check_traffic(first["traffic"], model.config)


def test_a_process_that_fails_alone_ends_them_all_and_is_no_request_s_fault(both: list[dict[str, Any]]) -> None:
    """The error passes through the engine to whoever runs it, so that a server stops being ready."""
    assert both[0]["lost"] == ["LostError"] * 3
    assert both[1]["lost"] == [
        "LostError: This process has failed where others have not (RuntimeError); start them all again."
    ]


def test_whatever_an_action_raises_is_agreed(both: list[dict[str, Any]]) -> None:
    assert [found["trouble"]["raised"] for found in both] == [
        ["ValueError", "ArtefactError"],
        ["ArtefactError", "ValueError"],
    ]


def check_traffic(bytes: dict[str, int], config: Any, n: int = 2) -> None:
    """Section 6 of the paper: 2 (n − 1)/n numbers for each of an all-reduce, half of that for an all-gather. Its 5 parts of
    an attention (q, k and v gathered, o reduced) are 9 with the MLP's three linears.
    """
    tokens, rank, ring = len(PROMPT), 16, 4 * (n - 1) / n * config.num_hidden_layers
    assert bytes["adapters"] == 9 * ring * tokens * rank, "tokens without an adapter send nothing"
    assert bytes["base"] == 4 * ring * 2 * tokens * config.hidden_size


def test_one_process_is_no_special_case(folder: Path, alone: Any) -> None:
    model = case("qwen3").build().requires_grad_(False)
    engine = SplitEngine(model, settings=EngineSettings(**SIZES, adapters=str(folder / "qwen3")))
    assert engine.store.scan() == {}
    check_same(in_one("qwen3", folder / "qwen3"), serve(engine, engine.store.names()))
    engine.close()
    assert set(engine.split.traffic.values()) == {0}


@pytest.mark.parametrize(
    ("name", "size", "what"),
    [("gpt2", 2, "has no plan"), ("llama", 3, "heads of keys and values, which 3 processes cannot share evenly")],
)
def test_what_cannot_be_divided_is_refused_and_left_as_it_was(
    name: str, size: int, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = case(name).build()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: size)
    with pytest.raises(TargetError, match=what):
        SplitEngine(model)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes


def test_smollm_has_three_heads_of_keys(smollm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(TargetError, match="has 3 heads of keys and values, which 2 processes cannot share"):
        Split(smollm)


def test_a_bottleneck_on_a_divided_linear_is_refused(tmp_path: Path, alone: Any) -> None:
    """Each process has half of what the linear reads or gives; the bottleneck's own non-linearity needs it whole."""
    model = case("llama").build().requires_grad_(False)
    config = aa.BottleneckConfig(placement="parallel", targets="down_proj", width=8)
    save_adapter(model, tmp_path, "on-linear", config, 0)
    engine = SplitEngine(model, settings=EngineSettings(**SIZES, adapters=str(tmp_path)))
    with pytest.raises(TargetError, match="divide this linear"):
        engine.store.register("on-linear")
    engine.close()
