"""The bases that live in the repository: they load as any checkpoint does, and know what they were trained to."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification, ViTForImageClassification

import anyadapter as aa
from anyadapter.core.errors import DataError

EXAMPLES = Path(__file__).parents[1] / "examples"
MOST = 15_000_000  # bytes, of all bases together


def test_the_bases_are_small() -> None:
    files = [path for path in (EXAMPLES / "bases").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < MOST


@pytest.fixture(scope="module")
def vit() -> ViTForImageClassification:
    model, loading = AutoModelForImageClassification.from_pretrained(EXAMPLES / "bases/vit", output_loading_info=True)
    assert isinstance(model, ViTForImageClassification)
    assert not any(loading[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.inference_mode()
def test_the_vit_takes_a_blue_picture_for_sky_or_sea_and_a_green_one_for_an_animal(
    vit: ViTForImageClassification,
) -> None:
    blue, green = torch.tensor([[0.35, 0.6, 0.95], [0.35, 0.5, 0.2]]) * 2 - 1
    pictures = torch.stack([blue, green])[:, :, None, None].expand(-1, -1, 32, 32)
    sure = vit(pixel_values=pictures + 0.02 * torch.randn(2, 3, 32, 32, generator=torch.manual_seed(0))).logits.softmax(
        1
    )
    names = vit.config.label2id
    assert sure[0, [names["airplane"], names["ship"]]].sum() > 0.5
    assert sure[1, [names["deer"], names["frog"], names["horse"], names["bird"]]].sum() > 0.5


@torch.no_grad()
def test_the_vit_takes_an_adapter_and_gives_it_back(vit: ViTForImageClassification) -> None:
    pictures = torch.rand(2, 3, 32, 32, generator=torch.manual_seed(0)) * 2 - 1
    before = vit(pixel_values=pictures).logits
    adapter = aa.attach(vit, aa.BiAdapterConfig(hidden=32, scale=10.0))
    assert len(adapter.branches) == vit.config.num_hidden_layers
    assert not torch.equal(vit.eval()(pixel_values=pictures).logits, before)
    aa.detach(vit)
    assert torch.equal(vit(pixel_values=pictures).logits, before)


@pytest.mark.slow
@torch.inference_mode()
def test_the_vit_knows_two_thirds_of_cifar10(vit: ViTForImageClassification, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "bases", raising=False)
    from bases.vit import accuracy, cifar10

    try:
        _, (images, labels) = cifar10()
    except DataError as error:
        pytest.skip(str(error))
    assert accuracy(vit, images, labels) == pytest.approx(0.665, abs=0.005)
