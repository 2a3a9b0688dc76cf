"""The command line: what it prints, its exit codes, and that its errors are for people."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import anyadapter as aa
from anyadapter.cli import app
from anyadapter.training.base import load_base


def run(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(words))
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def adapter(smollm_and_tokenizer: tuple[nn.Module, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = smollm_and_tokenizer[0]
    for parameter in aa.attach(model, aa.LoRAConfig(rank=2, targets="self_attention.query"), "cli").parameters():
        nn.init.normal_(parameter, std=0.02)
    folder = aa.save_pretrained(model, tmp_path_factory.mktemp("cli") / "adapter", "cli")
    aa.detach(model, "cli")
    return folder


@pytest.mark.parametrize(
    "command", ["quickstart", "list", "train", "eval", "generate", "inspect", "merge", "convert", "quantize", "compose"]
)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Example" in out


def test_inspect(adapter: Path) -> None:
    code, out, _ = run("inspect", str(adapter), "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["method"], facts["layout"], facts["base"]) == ("lora", "peft", "smollm2")
    assert facts["bytes"] == (adapter / "adapter_model.safetensors").stat().st_size
    assert run("inspect", str(adapter))[0] == 0


def test_errors_are_messages_with_exit_code_1(tmp_path: Path) -> None:
    code, out, err = run("inspect", str(tmp_path / "nowhere"))
    assert (code, out) == (1, "")
    assert "There is no folder" in " ".join(err.split())
    assert "Traceback" not in err
    assert run("inspect")[0] == 2  # typer's own: wrong usage


def test_generate_eval_merge_and_convert(adapter: Path, tmp_path: Path) -> None:
    code, out, _ = run("generate", "The capital of France is", "--tokens", "3")
    assert code == 0
    assert "Paris" in out

    rows = [{"prompt": "The capital of France is", "answer": "Paris"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, _ = run("eval", str(tmp_path / "rows.jsonl"), "--tokens", "1", "--adapter", str(adapter), "--json")
    assert code == 0
    assert json.loads(out)["count"] == 1

    assert run("convert", str(adapter), str(tmp_path / "native"), "--to", "native")[0] == 0
    assert aa.inspect(tmp_path / "native")["layout"] == "native"
    code, _, err = run("convert", str(adapter), str(tmp_path / "x"), "--to", "nativ")
    assert (code, "There is no layout 'nativ'" in " ".join(err.split())) == (1, True)
    assert not (tmp_path / "x").exists()

    assert run("merge", str(adapter), str(tmp_path / "merged"))[0] == 0
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    beside, _ = load_base("smollm2", dtype="float32")
    aa.load(beside, adapter)
    ids = torch.arange(5)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, beside(ids).logits, atol=1e-3, rtol=1e-3)


def test_quantize(adapter: Path, tmp_path: Path) -> None:
    code, out, _ = run("quantize", str(adapter), "--bits", "4", "--out", str(tmp_path / "small"), "--json")
    facts = json.loads(out)
    assert (code, facts["bits"], facts["matrices"], facts["left"]) == (0, 4, 60, [])
    assert aa.inspect(tmp_path / "small")["bits"] == 4
    assert run("quantize", str(adapter), "--out", str(tmp_path / "a"), "--matrices", "*lora_A*")[0] == 0
    for words, message in (
        ((str(tmp_path / "small"), "--out", str(tmp_path / "b")), "quantised already, to 4 bits"),
        ((str(adapter), "--bits", "3", "--out", str(tmp_path / "b")), "1, 2, 4 or 8 bits"),
        ((str(adapter), "--matrices", "lora_a", "--out", str(tmp_path / "b")), "matches no tensor"),
    ):
        code, _, err = run("quantize", *words)
        assert (code, message in " ".join(err.split())) == (1, True), err
    assert not (tmp_path / "b").exists()
    assert run("convert", str(tmp_path / "small"), str(tmp_path / "dense"), "--to", "peft")[0] == 0
    assert "bits" not in aa.inspect(tmp_path / "dense")


def test_quantize_an_adapter_of_peft(adapter: Path, tmp_path: Path) -> None:
    """As the Hub has them, with nothing of ours in it; the result is beside it."""
    foreign = tmp_path / "foreign"
    shutil.copytree(adapter, foreign)
    config = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "anyadapter"}))
    assert run("quantize", str(foreign))[0] == 0
    assert run("quantize", str(adapter), "--out", str(tmp_path / "ours"))[0] == 0
    there, here = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("foreign-1bit", "ours"))
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in here)


def test_starting_is_quick() -> None:
    """Help must not import torch's world: a fresh process that lists the commands loads no model library."""
    code = "import sys; import anyadapter.cli; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
