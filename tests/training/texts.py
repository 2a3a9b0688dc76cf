"""A tiny BERT and its tokenizer in a folder, and texts in which a word is the reason."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, BertTokenizer

FILLERS = ["the", "cat", "dog", "sat", "on", "a", "mat", "and", "saw", "some", "rain", "today"]
BAD = ["awful", "vile"]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLERS, "aw", "##ful", "vi", "##le", ".", "!"]


def save_bert(folder: Path) -> None:
    """A tiny random BERT; the reasons are words of two pieces in its vocabulary."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(PIECES),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab={piece: i for i, piece in enumerate(PIECES)}).save_pretrained(folder)


def marked_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of words; one with a bad word is abusive, for that word, and aimed at whom it names."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        words = draw.choices(FILLERS, k=draw.randint(4, 9))
        if number % 2:
            words[draw.randrange(len(words))] = draw.choice(BAD)
        mask = [int(word in BAD) for word in words]
        found.append(
            {
                "words": words,
                "rationales": [mask, mask, [0] * len(words)],
                "label": "abusive" if number % 2 else "normal",
                "targets": [animal for animal in ("cat", "dog") if animal in words],
            }
        )
    return found
