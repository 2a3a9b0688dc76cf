"""A tiny base with a real tokenizer, saved as any base is, and a small task for it."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import anyadapter as aa

COLOURS = ["red", "green", "blue", "white", "black", "brown"]
THINGS = ["cat", "dog", "cup", "hat", "car", "pen"]
CHAT = (
    "{% for message in messages %}<user>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)


def rows() -> list[dict]:
    """What colour follows from the first letters: small enough to learn, and every row differs."""
    return [
        {"instruction": f"What colour is the {thing} of the {other}?", "output": COLOURS[(i + j) % len(COLOURS)]}
        for i, thing in enumerate(THINGS)
        for j, other in enumerate(THINGS)
    ]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<user>", "<model>"]
    texts = [f"{row['instruction']} {row['output']} instruction response" for row in rows()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attention_dropout=0.0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def model(base: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.fixture(scope="session")
def tokenizer(base: Path):
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The task as a .jsonl file."""
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


@pytest.fixture
def config(base: Path, data: Path, tmp_path: Path) -> dict:
    """The settings of a small run, to be changed by a test."""
    return {
        "base": {"name": str(base)},
        "adapter": {"method": "lora", "rank": 4, "dropout": 0.1},
        "data": {"train": str(data), "eval_rows": 6, "template": "plain"},
        "training": {
            "steps": 12, "batch_size": 4, "accumulation": 2, "learning_rate": 1e-2, "log_every": 3, "eval_every": 4,
            "save_every": 4, "warmup": 2, "device": "cpu",
        },
        "output": str(tmp_path / "run"),
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AffineConfig(aa.AdapterConfig):
    """For the tests: y = (1 + scale[task]) · call(x) + shift[task] after each feed-forward."""

    method: ClassVar[str] = "test_affine"
    tasks: int = 2


class Affine(aa.Adapter):
    Config = AffineConfig
    reads = ("task",)
    groups = {"scale": ("scale",), "shift": ("shift",)}

    def setup(self, host):
        sites = host.find("feed_forward.down")
        shape = (len(sites), self.config.tasks, sites[0].module.out_features)
        self.scale, self.shift = torch.nn.Parameter(torch.zeros(shape)), torch.nn.Parameter(torch.zeros(shape))
        for index, site in enumerate(sites):
            self.at(site, partial(self.affine, index))

    def affine(self, index, call, x):
        task = self.signal("task")
        return (1 + self.scale[index, task, None]) * call(x) + self.shift[index, task, None]


aa.register(Affine)
