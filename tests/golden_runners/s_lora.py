"""S-LoRA: the allocator, unified paging, a mixed batch through the whole engine; kernels and scheduler in files of their own."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import Golden
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from anyadapter.core.host import Host
from anyadapter.serving.engine import Engine, EngineSettings
from anyadapter.serving.pool import KEYS, VALUES, Pool, PoolFullError
from anyadapter.serving.request import Request, Sampling
from anyadapter.serving.residents import Resident, Residents
from anyadapter.serving.store import AdapterStore
from golden_runners import s_lora_control, s_lora_kernels


def run(case: Golden) -> None:
    runners = {
        "allocator": allocator,
        "paging_load_offload": paging,
        "engine_mixed_batch": mixed_batch,
        "mbgmm_prefill_kernels": s_lora_kernels.mbgmm_prefill_kernels,
        "scheduler_traces": s_lora_control.scheduler_traces,
        "workload_and_slo": s_lora_control.workload_and_slo,
    }
    runner = next((runner for name, runner in runners.items() if case.about["case"].startswith(name)), None)
    if runner is None:
        pytest.fail(f"no runner knows s-lora's case {case.name}")
    runner(case)


def allocator(case: Golden) -> None:
    play(case.about["pool_cells"], case.about["operations"], case.about["final_free_mask"])
    fragmented = case.about["fragmented"]
    play(fragmented["pool_cells"], fragmented["operations"], fragmented.get("final_free_mask"))


def play(cells: int, operations: list, mask: list[bool] | None) -> None:
    pool, taken = Pool(1, cells, 1, torch.float32), []
    for step in operations:
        name, *args = step["op"]
        try:
            if name == "free_slice":
                result = taken[args[0]][args[1]]
                pool.release(result)
            else:
                alloc = {
                    "alloc": pool.alloc,
                    "alloc_contiguous": pool.alloc_contiguous,
                    "alloc_strip": lambda count, size: pool.alloc_blocks(count, size, aligned=False),
                    "alloc_grid": lambda count, size: pool.alloc_blocks(count, size, aligned=True),
                }[name]
                result = alloc(*args)
                if result is not None:
                    taken.append(result)
        except PoolFullError:
            result = "raise"
        shown = result if isinstance(result, str) else "None" if result is None else result.tolist()
        assert shown == step["result"], step
        assert pool.left == pool.free.sum() == step["free_after"], step
    if mask is not None:
        assert pool.free.tolist() == mask


def llama(case: Golden, layers: int, **sizes: int) -> LlamaForCausalLM:
    dims = case.about["dims"]
    config = LlamaConfig(
        hidden_size=dims["H"],
        num_attention_heads=dims["heads"],
        num_key_value_heads=dims["heads"],
        num_hidden_layers=layers,
        **sizes,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def adapter_folder(case: Golden, index: int, root: Path) -> Path:
    """One of the case's adapters as a PEFT folder."""
    dims, folder = case.about["dims"], root / f"adapter{index}"
    folder.mkdir()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = {"peft_type": "LORA", "r": dims["ranks"][index], "lora_alpha": dims["alphas"][index]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": targets}))
    prefix = f"adapter{index}."
    state = {k.removeprefix(prefix): v for k, v in case.part("state").items() if k.startswith(prefix)}
    save_file(state, folder / "adapter_model.safetensors")
    return folder


def check_rows(residents: list[Resident], pool: Pool, case: Golden, keys: Tensor, values: Tensor) -> None:
    """The adapters' rows in layer 0. Ours hold column j of B in row j; the official B is its flattening, cut into rows."""
    start = 0
    for resident in residents:
        cells = torch.from_numpy(resident.cells).long()
        count = len(cells)
        mine_a, mine_b = pool.half(0, KEYS)[cells], pool.half(0, VALUES)[cells]
        rank = count // 4
        turned = torch.cat([block.T.reshape(rank, -1) for block in mine_b.split(rank)])
        for mine, theirs in ((mine_a, keys), (turned, values)):
            theirs = theirs[start : start + count].flatten(1)
            torch.testing.assert_close(mine.to(theirs), theirs, atol=0, rtol=0)
        start += count


def check_table(residents: list[Resident], case: Golden, prefix: str) -> None:
    cells = [r.cells for r in residents]
    lengths = np.array([len(c) for c in cells], dtype=np.int64)
    out = {key: case.tensors[f"out/{prefix}.{key}"] for key in ("a_loc", "a_start", "a_len", "a_scaling")}
    assert np.concatenate([np.empty(0, np.int32), *cells]).tolist() == out["a_loc"].tolist()
    assert (np.cumsum(lengths) - lengths).tolist() == out["a_start"].tolist()
    assert lengths.tolist() == out["a_len"].tolist()
    scalings = [next(iter(r.packing.parts.values())).scaling for r in residents]
    assert scalings == out["a_scaling"].tolist()


def paging(case: Golden) -> None:
    dims = case.about["dims"]
    pool = Pool(dims["layers"], dims["pool"], dims["H"], torch.float16)
    store = AdapterStore(Host.of(llama(case, dims["layers"])), dims["layers"], dims["H"], torch.float16)
    residents, tokens = Residents(pool, together=False), np.empty(0, dtype=np.int64)  # cells that sequences hold
    with tempfile.TemporaryDirectory() as root:
        for index in range(len(dims["ranks"])):
            store.register(f"adA{index}-{index}", adapter_folder(case, index, Path(root)))
        for step, order in case.about["adapter_order"].items():
            mask, table = case.tensors[f"out/{step}.free_mask"].numpy(), case.tensors[f"out/{step}.a_loc"].numpy()
            held = np.setdiff1d(np.flatnonzero(~mask), table)
            pool.release(np.setdiff1d(tokens, held))
            pool._take(np.setdiff1d(held, tokens))
            tokens = held
            if "offload" in step:
                residents.keep([store.get(name).id for name in order])
            for name in order:
                adapter = store.get(name)
                residents.load(adapter.id, adapter.packing, adapter.scale, lambda a=adapter: store.pack(a))
            found = [residents.by_id[store.get(name).id] for name in order]
            assert pool.free.tolist() == mask.tolist(), step
            check_table(found, case, step)
            check_rows(
                found, pool, case, case.tensors[f"out/{step}.key0"][table], case.tensors[f"out/{step}.value0"][table]
            )


def mixed_batch(case: Golden) -> None:
    dims = case.about["dims"]
    model = llama(case, dims["L"], intermediate_size=dims["I"], vocab_size=dims["V"])
    base = {k.removeprefix("base."): v.float() for k, v in case.part("state").items() if k.startswith("base.")}
    model.load_state_dict(base)
    prompts = case.tensors["in/prompt_ids_concat"].split(case.tensors["in/prompt_lens"].tolist())
    engine = Engine(model, settings=EngineSettings(cells=dims["pool"], read_ahead=False))
    table = case.tensors["out/page_table.a_loc"].numpy()
    engine.pool._take(np.setdiff1d(np.arange(table.max() + 1), table))  # cells that somebody else held
    engine.residents.together = False
    with tempfile.TemporaryDirectory() as root, torch.inference_mode():
        for index in range(len(dims["ranks"])):
            adapter = engine.store.register(f"a{index}", adapter_folder(case, index, Path(root)))
            engine.residents.load(adapter.id, adapter.packing, 1.0, lambda a=adapter: engine.store.pack(a))
        found = list(engine.residents.by_id.values())
        check_table(found, case, "page_table")
        rows = (case.tensors[f"out/pool.{half}_buffer.0_adapter_rows"] for half in ("key", "value"))
        check_rows(found, engine.pool, case, *rows)
        requests = [
            Request(str(i), tuple(prompt.tolist()), {f"a{who}": 1.0}, Sampling(max_tokens=dims["steps"] + 1))
            for i, (prompt, who) in enumerate(zip(prompts, case.tensors["in/adapter_index_per_request"].tolist()))
        ]
        for request in requests:
            engine.submit(request)
            assert engine.start(request) is None
        sequences = [engine.sequences[request.id] for request in requests]
        case.close(engine.forward([(s, len(s.request.prompt)) for s in sequences]), "out/logits.prefill")
        for step in range(dims["steps"]):
            for request, token in zip(requests, case.tensors[f"out/token.{step}"].tolist()):
                request.output.append(token)
            case.close(engine.forward([(s, 1) for s in sequences]), f"out/logits.decode.{step}")
