"""What others read: their layouts and the files of the systems' authors get what an adapter computes with, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import case
from subjects import FORMS, attached
from torch import Tensor, nn

import anyadapter as aa
from anyadapter.core.catalogue import method_of
from anyadapter.formats import bi_adapter, ip_adapter, layouts, llama_adapter, mhr, mixda, mlkg, p_adapter, raft
from anyadapter.quantize import packed, quantised


@pytest.mark.parametrize("layout", [name for name in layouts.names() if name != "native"])
def test_other_layouts_get_what_it_computes_with(layout: str, tmp_path: Path) -> None:
    written = []
    for name, subject in FORMS.items():
        m, other = subject.model(), subject.model()
        adapter = attached(m, subject.config)
        if not layouts.by_name(layout).writes(adapter):
            continue
        written.append(name)
        aa.quantize(adapter)
        folder = aa.save_pretrained(m, tmp_path / name, layout=layout)
        assert aa.inspect(folder)["layout"] == layout
        assert "bits" not in aa.inspect(folder)
        loaded = aa.load(other, folder, trainable=True)
        assert torch.equal(subject.outputs(other), subject.outputs(m)), name
        assert all(torch.equal(loaded.tensors()[n], matrix.dequantise()) for n, matrix in packed(adapter).items())
        assert quantised(adapter)  # it still trains
        with pytest.raises(aa.ArtefactError, match="no place for them"):
            aa.save_pretrained(m, tmp_path / "latents", layout=layout, latents=True)
    assert written


def mlkg_files(m: nn.Module, adapter: Any, host: aa.Host, folder: Path) -> Any:
    mlkg.write_official(adapter, folder, m)
    return mlkg.read_official(folder, host, allow_pickle=True)


OFFICIAL: dict[str, tuple[str, Any]] = {
    "mhr": ("mhr", lambda m, a, h, _: mhr.read_official(mhr.write_official(a), h, granularity="layer")),
    "mixda": ("domains", lambda m, a, h, _: mixda.read_official(flat(mixda.write_official(a)), h, pool=a.config.pool)),
    "mixda, whole": (
        "mixda",
        lambda m, a, h, _: mixda.read_model(mixda.write_model(a), h, task="domain", pool=a.config.pool),
    ),
    "mlkg": ("mlkg", mlkg_files),
    "p_adapter": ("p_adapter", lambda m, a, h, _: p_adapter.read_official(p_adapter.write_official(a), h)),
    "predictor": ("rationale_predictor", lambda m, a, h, _: raft.read_predictor(raft.write_official(m), h)),
    "classifier": ("raft", lambda m, a, h, _: raft.read_classifier(raft.write_official(m), h, heads=4)),
    "llama_adapter": (
        "llama_adapter",
        lambda m, a, h, _: llama_adapter.read_official(llama_adapter.write_official(a, h), h, length=3),
    ),
    "ip_adapter": ("ip_adapter", lambda m, a, h, _: ip_adapter.read_official(ip_adapter.write_official(a), h)),
}


def flat(nested: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{key}.{leaf}": tensor for key, leaves in nested.items() for leaf, tensor in leaves.items()}


@pytest.mark.parametrize("form", ["training", "packed"])
@pytest.mark.parametrize("file", OFFICIAL)
def test_official_files_get_what_it_computes_with(file: str, form: str, tmp_path: Path) -> None:
    name, there_and_back = OFFICIAL[file]
    subject = FORMS[name]
    m, other = subject.model(), subject.model()
    adapter = aa.quantize(attached(m, subject.config))
    if form == "packed":
        aa.pack(adapter)
    config, tensors = there_and_back(m, adapter, aa.Host.of(other), tmp_path)
    aa.attach(other, config).load_tensors(tensors)
    assert bool(adapter.packed) == (form == "packed")
    tolerance = 1e-5 if name in ("rationale_predictor", "raft") else 0  # their files hold the sum of W and B A
    torch.testing.assert_close(subject.outputs(other), subject.outputs(m), atol=tolerance, rtol=tolerance)


def test_a_scaled_or_otherwise_quantised_bi_adapter_is_not_for_the_authors() -> None:
    config = aa.BiAdapterConfig(hidden=4, head_classes=8, head_bits=32)
    adapter = aa.attach(case("vit").build(), config)
    assert bi_adapter.write_official(adapter)
    adapter.scale = 0.5
    with pytest.raises(aa.ArtefactError, match=r"no place for the scale 0\.5 of 'default'"):
        bi_adapter.write_official(adapter)
    adapter.scale = 1
    aa.quantize(adapter, 1, "*.head.weight")
    with pytest.raises(aa.ArtefactError, match="head.weight was quantised to 1 bits"):
        bi_adapter.write_official(adapter)


@pytest.mark.parametrize(
    "file", [f for f, (n, _) in OFFICIAL.items() if "scale" in method_of(FORMS[n].config).capabilities]
)
def test_a_scale_is_never_lost_in_official_files(file: str, tmp_path: Path) -> None:
    name, there_and_back = OFFICIAL[file]
    m = FORMS[name].model()
    adapter = attached(m, FORMS[name].config)
    adapter.scale = 0.5
    with pytest.raises(aa.ArtefactError, match=r"scale (0\.5 of 'default'|is 0\.5)"):
        there_and_back(m, adapter, aa.Host.of(m), tmp_path)
    assert not list(tmp_path.iterdir())
