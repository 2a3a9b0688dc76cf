"""Image classification: which of a user's own classes an image belongs to.

The data is a folder with a folder of images for each class, whose name is the class's, or a ``.jsonl`` file of
``{"image": path, "label": class}``, the paths being relative to the file's folder and inside it. Images are PNG or JPEG files;
every one is decoded once before training starts, and again when it is needed.

A head for the classes is trained as a part of the adapter (``head_classes`` of a Bi-Adapter, ``whole: [classifier]`` of a LoRA),
unless the base knows just these classes. The names of the classes, in the order of the scores, are saved beside the adapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, set_seed

from anyadapter.core.adapter import Adapter
from anyadapter.core.errors import ConfigError, DataError, near
from anyadapter.training.base import dtype_of
from anyadapter.training.classes import Classified, label_of
from anyadapter.training.rows import SHOWN, Row, read_checked, renamed

SUFFIXES, FORMATS = (".png", ".jpg", ".jpeg"), ("PNG", "JPEG")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel or fewer
EXPECTED = 'a row is {"image": path of a PNG or JPEG file, "label": its class}; name other columns by fields'


class Images(Classified):
    """Images and their classes."""

    heads = "adapter.head_classes (Bi-Adapters), or adapter.whole: [{head}]"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.normalise: Callable[[Tensor], Tensor] | None = None

    # ------------------------------------------------------------------ data

    def read(self, path: str | Path) -> list[Row]:
        rows = read_images(path, self.config.data.fields)
        self.learn_classes(rows, path)
        head = getattr(self.config.adapter, "head_classes", None)
        if head not in (None, len(self.classes)):
            raise ConfigError(f"adapter.head_classes is {head}, and {path} holds {len(self.classes)} classes.")
        return rows

    def digest(self, path: str | Path) -> str:
        """Of a file or folder and of every image."""
        found = hashlib.sha256(Path(path).read_bytes() if Path(path).is_file() else b"")
        for row in read_images(path, self.config.data.fields, decode=False):
            found.update(f"{row.values['image'].relative_to(folder_of(path))}\0{row.values['label']}\0".encode())
            found.update(hashlib.sha256(row.values["image"].read_bytes()).digest())
        return found.hexdigest()

    # ------------------------------------------------------------------ base

    def load(self) -> tuple[nn.Module, Any]:
        base, settings = self.config.base, {"revision": self.config.base.revision, "trust_remote_code": False}
        if base.gguf_file is not None:
            raise ConfigError("base.gguf_file is of language models; name the folder or repository of a vision model.")
        attention = {"attn_implementation": base.attn} if base.attn else {}
        try:
            config = AutoConfig.from_pretrained(base.name, **settings)
            new = self.needs_head(tuple(config.id2label[i] for i in range(config.num_labels)))
            if new:
                config.num_labels = len(self.classes)
            set_seed(self.config.training.seed)  # of a new head, which a copy in the adapter starts from
            model = AutoModelForImageClassification.from_pretrained(
                base.name,
                config=config,
                dtype=dtype_of(base.dtype),
                ignore_mismatched_sizes=new,
                **attention,
                **settings,
            )
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(
                f"The base {base.name!r} cannot be loaded as an image classifier: {error}\nExpected the folder of a vision "
                "model of transformers, or its repository on the Hugging Face Hub."
            ) from error
        if new:
            self.note_head(model)
        return model.eval(), self.processor(config, settings)

    def processor(self, config: Any, settings: dict[str, Any]) -> Any:
        """The base's image processor. A base without one has squares of its size, where the adapter normalises them itself."""
        try:
            return AutoImageProcessor.from_pretrained(self.config.base.name, **settings)
        except (OSError, ValueError) as error:
            side = getattr(config, "image_size", None)
            if type(side) is int and hasattr(self.config.adapter, "pixel_mean"):
                return partial(squares, side=side)
            raise ConfigError(
                f"The base {self.config.base.name!r} has no image processor (preprocessor_config.json), which says how large "
                f"its images are and how they are normalised: {error}"
            ) from error

    # ------------------------------------------------------------------ batches

    def encode(self, rows: list[Row], processor: Any, adapter: Adapter) -> list[dict[str, Any]]:
        if adapter.reads:
            raise ConfigError(f"{type(adapter).__name__} reads {', '.join(adapter.reads)}, which images do not carry.")
        self.normalise = getattr(adapter, "normalise", None)
        self.check_head(adapter)
        return [{"image": row.values["image"], "labels": self.classes.index(row.values["label"])} for row in rows]

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        return partial(self.collate, processor)

    def collate(self, processor: Any, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """``pixel_values`` (batch, 3, height, width) and ``labels`` (batch,).

        An adapter that stores its own normalisation is given values from 0 to 1 and applies it; without, it is the processor's.
        """
        own = {} if self.normalise is None else {"do_normalize": False}
        images = processor([opened(row["image"]) for row in rows], return_tensors="pt", **own)["pixel_values"]
        pixels = images if self.normalise is None else self.normalise(images)
        return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}

    def call(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """By position: vision models name their input differently."""
        return model(inputs["pixel_values"])


# ---------------------------------------------------------------------- reading


def read_images(path: str | Path, fields: dict[str, str] | None = None, decode: bool = True) -> list[Row]:
    """Rows of ``{"image": path, "label": class}``, from a folder of class folders or a .jsonl file.

    Args:
        fields: our name -> the column's, in a file.
        decode: decode every image, to find those that cannot be.

    Raises:
        DataError: there are none, or some cannot be used; the message names the file, and the line.
        ConfigError: ``fields`` maps a name that is none of ours.
    """
    path, fields = Path(path), fields or {}
    for name in fields:
        if name not in ("image", "label"):
            raise ConfigError(f"data.fields has no {name!r}. {near(name, ('image', 'label'))}")
    if path.is_dir():
        rows = list(in_folders(path))
    elif path.suffix in (".jsonl", ".json"):
        rows = read_checked(path, partial(check, fields=fields, folder=path.parent), EXPECTED)
    else:
        raise DataError(f"{path}: expected a folder with a folder of images for each class, or a .jsonl file.")
    if decode:
        check_images(rows)
    return rows


def in_folders(root: Path) -> Iterator[Row]:
    """A row for every image below the folders of a folder; what begins with a dot is not looked at.

    Raises:
        DataError: a class without images, or something that is neither a class's folder nor an image in one.
    """
    folders = sorted(each for each in root.iterdir() if not each.name.startswith("."))
    if not folders:
        raise DataError(f"{root} is empty; expected a folder of images for each class.")
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder}: a file beside the classes; expected a folder of images for each class.")
        images = sorted(each for each in folder.iterdir() if not each.name.startswith("."))
        if not images:
            raise DataError(f"{folder}: the class {folder.name!r} has no images; add some or remove the folder.")
        for image in images:
            yield Row(str(image), {"image": located(image, root, str(image)), "label": folder.name})


def check(where: str, value: Any, fields: dict[str, str], folder: Path) -> Row:
    """A row of a file. Raises :class:`DataError` when it is none."""
    named = renamed(where, value, fields, EXPECTED)
    if "image" not in named or "label" not in named:
        raise DataError(f"{where}: has the columns {', '.join(map(repr, value)) or 'none'}; {EXPECTED}.")
    image, label = named["image"], named["label"]
    if not isinstance(image, str) or not image or Path(image).is_absolute():
        raise DataError(f"{where}: 'image' is {image!r}; expected the path of a PNG or JPEG file from {folder}.")
    return Row(where, {"image": located(folder / image, folder, where), "label": label_of(where, label)})


def located(image: Path, root: Path, where: str) -> Path:
    """The image, which must exist and lie inside ``root``, also where links lead.

    Raises:
        DataError: it does not, or its name does not end as an image's.
    """
    if not image.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{where}: {image} leads out of {root}; images must lie inside it.")
    if image.suffix.lower() not in SUFFIXES:
        raise DataError(f"{where}: {image.name} is no image; expected files that end in {', '.join(SUFFIXES)}.")
    if not image.is_file():
        raise DataError(f"{where}: there is no image file {image}.")
    return image


def check_images(rows: list[Row]) -> None:
    """Decode every image; a :class:`DataError` names the first that cannot be."""
    problems = []
    for row in rows:
        try:
            opened(row.values["image"])
        except DataError as error:
            problems.append(str(error) if row.where == str(row.values["image"]) else f"{row.where}: {error}")
    if problems:
        more = f"\n… and {len(problems) - SHOWN} more images" if len(problems) > SHOWN else ""
        raise DataError("\n".join(problems[:SHOWN]) + more)


def opened(path: Path) -> Image.Image:
    """An image in RGB, the right way up.

    Raises:
        DataError: it cannot be decoded to its end, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode not in MODES:
                raise DataError(f"{path}: pixels of the kind {image.mode!r}; expected 8 bits a channel.")
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a PNG or JPEG image: {error}.") from None


def folder_of(path: str | Path) -> Path:
    """What the paths of images are relative to."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def squares(images: list[Image.Image], side: int, **settings: Any) -> dict[str, Tensor]:
    """Images as (batch, 3, side, side) with values from 0 to 1; their aspect is not kept."""
    resized = [np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for image in images]
    return {"pixel_values": torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255}
