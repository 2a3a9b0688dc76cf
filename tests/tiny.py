"""A tiny base with a real tokenizer, a task small enough for it, and an adapter that reads a signal."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


def save_base(folder: Path) -> None:
    """A tiny random Llama and a tokenizer trained on the task, as files of any base."""
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


@dataclass(frozen=True, kw_only=True)
class AffineConfig(aa.AdapterConfig):
    """For the tests: y = (1 + factor[task]) · call(x) + shift[task] after each feed-forward."""

    method: ClassVar[str] = "test_affine"
    tasks: int = 2


class Affine(aa.Adapter):
    Config = AffineConfig
    reads = ("task",)
    groups = {"factor": ("factor",), "shift": ("shift",)}

    def setup(self, host):
        sites = host.find("feed_forward.down")
        shape = (len(sites), self.config.tasks, sites[0].module.out_features)
        self.factor, self.shift = torch.nn.Parameter(torch.zeros(shape)), torch.nn.Parameter(torch.zeros(shape))
        for index, site in enumerate(sites):
            self.at(site, partial(self.affine, index))

    def affine(self, index, call, x):
        task = self.signal("task")
        return (1 + self.factor[index, task, None]) * call(x) + self.shift[index, task, None]


aa.register(Affine)
