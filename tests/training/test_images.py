"""Image classification from a run's settings: pieces of a real photograph, on the small ViT that the examples share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTImageProcessor

import anyadapter as aa
from anyadapter.training import report
from anyadapter.training.config import read_config
from anyadapter.training.images import Images, opened, read_images
from anyadapter.training.run import train

VIT = Path(__file__).parents[2] / "examples/bases/vit"
PHOTO = Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg"  # 512 × 600
PARTS = {"face": (180, 60), "flag": (20, 60), "uniform": (200, 400)}  # left, top of what their pieces are cut from
SIDE, SPREAD = 48, 60  # of a piece; of the places it is cut at


def pieces(folder: Path, count: int, seed: int) -> Path:
    """A folder of class folders; the first class as JPEG files, the others as PNG."""
    draw = np.random.default_rng(seed)
    photo = Image.open(PHOTO)
    for name, corner in PARTS.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            left, top = (int(at + draw.integers(SPREAD)) for at in corner)
            piece = photo.crop((left, top, left + SIDE, top + SIDE))
            piece.save(folder / name / f"{number}.{'jpg' if name == 'face' else 'png'}")
    return folder


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A small run of a Bi-Adapter."""
    return {
        "base": str(VIT),
        "adapter": {
            "method": "bi_adapter", "hidden": 8, "scale": 10.0, "head_classes": 3, "head_bits": 32,
            "pixel_mean": [0.5, 0.5, 0.5], "pixel_std": [0.5, 0.5, 0.5],
        },
        "data": {"train": str(pieces(tmp_path / "train", 10, 0)), "eval": str(pieces(tmp_path / "eval", 6, 1))},
        "training": {
            "steps": 12, "batch_size": 10, "learning_rate": 5e-3, "eval_every": 4, "log_every": 4, "device": "cpu",
        },
        "output": str(tmp_path / "run"),
    }  # fmt: skip


def changed(config: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {
        k: {**v, **sections[k]} if isinstance(v, dict) and k in sections else sections.get(k, v)
        for k, v in config.items()
    }


def right(model: torch.nn.Module, classes: list[str], folder: Path) -> float:
    """The share of a folder's images that a user would find classified rightly, without our training code."""
    processor, found = ViTImageProcessor.from_pretrained(VIT), []
    for image in sorted(folder.glob("*/*")):
        pixels = processor(Image.open(image).convert("RGB"), return_tensors="pt")["pixel_values"]
        found.append(classes[int(model(pixels).logits.argmax())] == image.parent.name)
    return sum(found) / len(found)


def test_a_run_leaves_an_adapter_and_the_names_of_its_classes(config: dict[str, Any], tmp_path: Path) -> None:
    result = train(config, progress=False)
    classes = json.loads((result.adapter / "classes.json").read_text())
    assert classes == ["face", "flag", "uniform"]
    assert result.metrics["accuracy"] >= 0.8  # a third is chance
    model = AutoModelForImageClassification.from_pretrained(VIT).eval()
    aa.load(model, result.adapter)
    assert right(model, classes, tmp_path / "eval") == pytest.approx(result.metrics["accuracy"])
    assert result.metrics["base_parameters"] == sum(
        p.numel()
        for p in AutoModelForImageClassification.from_pretrained(
            VIT, num_labels=3, ignore_mismatched_sizes=True
        ).parameters()
    )


def test_interrupted_and_started_again_it_ends_as_if_undisturbed(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train({**config, "output": str(tmp_path / "whole")}, progress=False)

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            monkeypatch.undo()
            raise KeyboardInterrupt

    config = changed(config, training={"save_every": 4})
    monkeypatch.setattr(report.LogFile, "on_step_end", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=False)
    result = train(config, progress=False)
    assert result.resumed_from == 4
    assert result.metrics == whole.metrics
    one, other = (load_file(r.adapter / "adapter_model.safetensors") for r in (whole, result))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_on_an_image_that_has_changed_is_not_gone_on_with(config: dict[str, Any], tmp_path: Path) -> None:
    train(config, progress=False)
    shutil.copy(tmp_path / "eval/flag/0.png", tmp_path / "train/flag/0.png")
    with pytest.raises(aa.ConfigError, match="a run on other data"):
        train(config, progress=False)


# ---------------------------------------------------------------------- heads


def of_lora(config: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The run with a LoRA in the place of the Bi-Adapter."""
    adapter = {"method": "lora", "rank": 4, "targets": "all-linear", **settings}
    return {**config, "adapter": adapter, "data": {**config["data"], "task": "image_classification"}}


def test_a_lora_with_a_new_head_meets_its_base_with_any_other_head(config: dict[str, Any], tmp_path: Path) -> None:
    result = train(of_lora(config, whole=["classifier"]), progress=False)
    assert result.metrics["accuracy"] >= 0.8
    torch.manual_seed(1)  # another start of the head that the adapter stands in for
    model = AutoModelForImageClassification.from_pretrained(VIT, num_labels=3, ignore_mismatched_sizes=True).eval()
    aa.load(model, result.adapter)
    assert right(model, ["face", "flag", "uniform"], tmp_path / "eval") == pytest.approx(result.metrics["accuracy"])


def test_new_classes_without_a_new_head_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(
        aa.ConfigError, match=r"does not know the 3 classes .*adapter\.head_classes .*whole: \[classifier\]"
    ):
        train(of_lora(config), progress=False)


def test_a_base_that_knows_the_classes_keeps_its_head_and_their_order(config: dict[str, Any], tmp_path: Path) -> None:
    names = ["uniform", "face", "flag"]
    model = AutoModelForImageClassification.from_pretrained(
        VIT, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}, ignore_mismatched_sizes=True
    )
    model.save_pretrained(tmp_path / "base")
    shutil.copy(VIT / "preprocessor_config.json", tmp_path / "base")
    result = train({**of_lora(config), "base": str(tmp_path / "base")}, progress=False)
    assert json.loads((result.adapter / "classes.json").read_text()) == names
    fresh = AutoModelForImageClassification.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(fresh.classifier.weight, model.classifier.weight)
    aa.load(fresh, result.adapter)
    assert right(fresh, names, tmp_path / "eval") == pytest.approx(result.metrics["accuracy"])


# ---------------------------------------------------------------------- pixels


def test_an_adapter_that_stores_its_normalisation_applies_it(config: dict[str, Any], tmp_path: Path) -> None:
    images = sorted((tmp_path / "train").glob("*/0.*"))
    processor = ViTImageProcessor.from_pretrained(VIT)  # mean and deviation 0.5
    expected = processor([Image.open(i) for i in images], return_tensors="pt")["pixel_values"]
    model = AutoModelForImageClassification.from_pretrained(VIT)
    for mean, wanted in ((0.5, expected), (0.0, expected / 2 + 0.5)):
        settings = changed(config, adapter={"pixel_mean": [mean] * 3, "pixel_std": [0.5 if mean else 1.0] * 3})
        task = Images(read_config(settings))
        rows = [row for row in task.read(settings["data"]["train"]) if row.values["image"] in images]
        encoded = task.encode(rows, processor, aa.attach(model, task.config.adapter))
        aa.detach(model)
        batch = task.collator(processor)(encoded)
        assert batch["labels"].tolist() == [0, 1, 2]
        torch.testing.assert_close(batch["pixel_values"], wanted, atol=1e-6, rtol=0)


def test_a_base_without_an_image_processor_has_squares_of_its_size(config: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(VIT, tmp_path / "base", ignore=shutil.ignore_patterns("preprocessor_config.json"))
    config["base"] = str(tmp_path / "base")
    task = Images(read_config(config))
    task.read(config["data"]["train"])
    pixels = task.load()[1]([Image.new("RGB", (7, 90), (255, 0, 51))])["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    assert pixels[0].amax((1, 2)).tolist() == pytest.approx([1, 0, 0.2])
    task = Images(read_config(of_lora(config, whole=["classifier"])))
    task.read(config["data"]["train"])
    with pytest.raises(aa.ConfigError, match="has no image processor"):
        task.load()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_images_of_every_usual_kind_become_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{'jpg' if mode == 'CMYK' else 'png'}"
    Image.open(PHOTO).resize((20, 30)).convert("RGB").convert(mode).save(path)
    assert (opened(path).mode, opened(path).size) == ("RGB", (20, 30))


def test_a_photograph_lying_on_its_side_is_put_upright(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn
    Image.new("RGB", (20, 30)).save(tmp_path / "image.jpg", exif=turned)
    assert opened(tmp_path / "image.jpg").size == (30, 20)


# ---------------------------------------------------------------------- what is refused


def spoilt(folder: Path, how: str) -> Path:
    """A good folder of class folders with one thing wrong."""
    image = folder / "flag/3.png"
    if how == "cut off":
        image.write_bytes(image.read_bytes()[:-100])
    elif how == "no image":
        image.write_bytes(b"hello")
    elif how == "another format":
        Image.open(image).save(image, "GIF")
    elif how == "16 bits":
        Image.fromarray(np.zeros((9, 9), np.uint16)).save(image)
    elif how == "another file":
        (folder / "flag/notes.txt").write_text("mine")
    elif how == "a folder within":
        (folder / "flag/more.png").mkdir()
    elif how == "empty class":
        (folder / "hat").mkdir()
    elif how == "a file beside":
        (folder / "3.png").write_bytes(image.read_bytes())
    elif how == "one class":
        for name in ("flag", "uniform"):
            shutil.rmtree(folder / name)
    elif how == "a link":
        image.unlink()
        image.symlink_to(PHOTO)
    elif how == "nothing":
        shutil.rmtree(folder)
        folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut off", r"flag/3\.png cannot be read as a PNG or JPEG image"),
        ("no image", r"flag/3\.png cannot be read as a PNG or JPEG image"),
        ("another format", r"flag/3\.png cannot be read as a PNG or JPEG image"),
        ("16 bits", r"flag/3\.png: pixels of the kind 'I;16'; expected 8 bits"),
        ("another file", r"notes\.txt is no image; expected files that end in \.png"),
        ("a folder within", r"there is no image file .*more\.png"),
        ("empty class", r"the class 'hat' has no images; add some or remove the folder"),
        ("a file beside", r"3\.png: a file beside the classes"),
        ("one class", r"holds the class 'face' only; expected at least two"),
        ("a link", r"flag/3\.png leads out of "),
        ("nothing", r"is empty; expected a folder of images for each class"),
    ],
)
def test_a_folder_that_cannot_be_learnt_from_says_what_is_wrong(
    how: str, message: str, config: dict[str, Any], tmp_path: Path
) -> None:
    spoilt(tmp_path / "train", how)
    with pytest.raises(aa.DataError, match=message):
        train(config, progress=False)
    assert not Path(config["output"]).exists()


def test_an_evaluation_image_of_another_class_is_named(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "eval/flag").rename(tmp_path / "eval/flags")
    with pytest.raises(
        aa.DataError, match=r"flags/0\.png: the class 'flags' is not among .*Did you mean 'flag'(.|\n)*1 more"
    ):
        train(config, progress=False)


def test_the_new_head_has_as_many_classes_as_the_data(config: dict[str, Any]) -> None:
    with pytest.raises(aa.ConfigError, match=r"adapter\.head_classes is 4, and .*train holds 3 classes"):
        train(changed(config, adapter={"head_classes": 4}), progress=False)


def test_a_language_model_is_no_base_for_images(config: dict[str, Any], base: Path) -> None:
    with pytest.raises(aa.ConfigError, match="cannot be loaded as an image classifier"):
        train({**config, "base": str(base)}, progress=False)
    with pytest.raises(aa.ConfigError, match="gguf_file is of language models"):
        train(
            {**config, "base": {"name": str(VIT), "gguf_file": "a.gguf"}, "output": config["output"] + "2"},
            progress=False,
        )


# ---------------------------------------------------------------------- files of rows


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_of_rows_is_read_as_its_folder_is(config: dict[str, Any], tmp_path: Path) -> None:
    images = sorted((tmp_path / "train").glob("*/*"))
    rows = [{"file": str(i.relative_to(tmp_path)), "what": i.parent.name} for i in images]
    path = written(tmp_path, *rows)
    found = read_images(path, {"image": "file", "label": "what"})
    assert [row.values for row in found] == [row.values for row in read_images(tmp_path / "train")]
    numbered = [{"image": row["file"], "label": 9 + list(PARTS).index(row["what"])} for row in rows]
    task = Images(read_config(changed(config, data={"train": str(written(tmp_path, *numbered))})))
    task.read(path)
    assert task.classes == ("9", "10", "11")  # as numbers, not as text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "../photo.png", "label": "a"}, r"rows\.jsonl:1: .*leads out of"),
        (
            {"image": str(PHOTO), "label": "a"},
            r"rows\.jsonl:1: 'image' is '/.*expected the path of a PNG or JPEG file from",
        ),
        ({"image": "train/flag/99.png", "label": "a"}, r"rows\.jsonl:1: there is no image file"),
        (
            {"image": "train/flag/0.png", "label": True},
            r"rows\.jsonl:1: 'label' is True; expected the name or the number",
        ),
        ({"image": "train/flag/0.png", "label": ""}, r"rows\.jsonl:1: 'label' is ''"),
        ({"image": "train/flag/0.png"}, r"rows\.jsonl:1: has the columns 'image'; a row is"),
        ({"image": 3, "label": "a"}, r"rows\.jsonl:1: 'image' is 3"),
        (["train/flag/0.png", "a"], r"rows\.jsonl:1: a JSON list, not an object"),
    ],
)
def test_a_row_that_cannot_be_learnt_from_is_named(row: Any, message: str, tmp_path: Path) -> None:
    pieces(tmp_path / "train", 1, 0)
    with pytest.raises(aa.DataError, match=message):
        read_images(written(tmp_path, row))


def test_other_paths_and_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        aa.DataError, match=r"expected a folder with a folder of images for each class, or a \.jsonl file"
    ):
        read_images(tmp_path / "nowhere")
    with pytest.raises(aa.ConfigError, match=r"data\.fields has no 'imag'\. Did you mean 'image'"):
        read_images(tmp_path, {"imag": "file"})
