"""Two processes on one machine, talking over gloo: the run is the same on both, and so is what sharding gives back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SCRIPT = """
import json, os, sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import anyadapter as aa
from anyadapter.formats.native import digest
from anyadapter.training.base import load_base
from anyadapter.training.run import train
from anyadapter.training.trainer import gather, scatter
from copy import deepcopy

config, base, out = sys.argv[1:]
torch.set_num_threads(1)
model, tokenizer = load_base(base)
result = train(config, model=model, tokenizer=tokenizer, progress=False)
adapter = aa.detach(model)
mine = {"adapter": digest(adapter.tensors()), "metrics": result.metrics, "rank": dist.get_rank(), "size": dist.get_world_size()}

# A base sharded over both, as FSDP does it.
adapter = aa.attach(model, aa.LoRAConfig(rank=3))
with torch.no_grad():
    for tensor in adapter.parameters():
        tensor.add_(0.01)
whole, plain = deepcopy(adapter), deepcopy(model)
before = digest(adapter.tensors())
ids = torch.arange(5, 13)[None]
expected = plain(input_ids=ids, labels=ids).loss
expected.backward()
mesh = init_device_mesh("cpu", (2,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
loss = model(input_ids=ids, labels=ids).loss
loss.backward()
gradients = [p.grad.full_tensor() for p in adapter.parameters()]
mine["sharded"] = any(hasattr(p, "full_tensor") and p.to_local().numel() < p.numel() for p in adapter.parameters())
mine["loss"] = abs((loss - expected).item())
mine["gradient"] = max((g - p.grad).abs().max().item() for g, p in zip(gradients, aa.adapters(plain)["default"].parameters()))
gather(adapter, whole)
mine["gathered"] = digest(whole.tensors()) == before
with torch.no_grad():
    for tensor in adapter.parameters():
        tensor.zero_()
scatter(whole, adapter)
again = deepcopy(whole)
gather(adapter, again)
mine["scattered"] = digest(again.tensors()) == before
everyone = [None, None]
dist.all_gather_object(everyone, mine)
if dist.get_rank() == 0:
    with open(out, "w") as file:
        json.dump(everyone, file)
dist.barrier()
os._exit(0)  # torch's own threads now and then abort a process that takes its group down (gloo, on a busy machine)
"""


@pytest.fixture
def both(config, base, tmp_path) -> list[dict]:
    """What each of the two processes reports."""
    script, settings, out = tmp_path / "script.py", tmp_path / "config.yaml", tmp_path / "out.json"
    script.write_text(SCRIPT)
    settings.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(settings), str(base), str(out)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


def test_two_processes_train_one_adapter(both, config):
    first, second = both
    assert (first["rank"], second["rank"], first["size"]) == (0, 1, 2)
    assert first["adapter"] == second["adapter"]
    assert first["metrics"] == second["metrics"]
    assert 0 < first["metrics"]["eval_loss"] < 100
    folder = Path(config["output"])
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)  # one process writes
    assert json.loads((folder / "versions.json").read_text())["processes"] == 2
    states = {p.name for p in folder.glob("checkpoints/stage-1/checkpoint-12/rng_state*")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}
    for report in both:
        assert report["sharded"]
        assert report["loss"] < 1e-6
        assert report["gradient"] < 1e-6
        assert report["gathered"]
        assert report["scattered"]
