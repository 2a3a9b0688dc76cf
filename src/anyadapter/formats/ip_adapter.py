"""The authors' layout of IP-Adapter files, as published in ``h94/IP-Adapter``: the base variant.

``image_proj.proj.*`` and ``image_proj.norm.*``, and for the j-th cross-attention ``ip_adapter.<2j + 1>.to_k_ip.weight`` and
``to_v_ip.weight``. The number is the place among the U-Net's attention layers, self-attention even and cross-attention
odd, in the order down, up, middle: that of its modules, not that in which they run. A ``.bin`` holds the same under two
dictionaries, ``image_proj`` and ``ip_adapter``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from anyadapter.core.adapter import check_tensors
from anyadapter.core.errors import ArtefactError, BaseMismatchError
from anyadapter.core.host import Host, features
from anyadapter.formats.files import read_file
from anyadapter.formats.layouts import check_unscaled
from anyadapter.methods.image.ip_adapter import IPAdapter, IPAdapterConfig

PROJECTION = ("image_proj.proj.weight", "image_proj.proj.bias", "image_proj.norm.weight", "image_proj.norm.bias")
KINDS = ("to_k_ip", "to_v_ip")


def read_official(
    source: str | Path | Mapping[str, Tensor], host: Host, *, allow_pickle: bool = False
) -> tuple[IPAdapterConfig, dict[str, Tensor]]:
    """The configuration and tensors of a published file, for ``attach`` and ``load_tensors``.

    Args:
        source: a ``.safetensors`` or ``.bin`` file, or its tensors by name.
        host: the U-Net it is meant for.
        allow_pickle: read a ``.bin`` (plain tensors only).

    Raises:
        ArtefactError: the file is damaged, a pickle that was not allowed, or of another variant.
        BaseMismatchError: it was trained for another base.
    """
    tensors = dict(source) if isinstance(source, Mapping) else read_file(Path(source), allow_pickle)
    check_variant(tensors)
    cores = host.find("cross_attention")
    names = official_names([site.path for site in cores])
    layers = {
        names[f"{core.path}.{kind}.weight"]: features(site.module)[::-1]
        for kind, role in zip(KINDS, ("cross_attention.key", "cross_attention.value"))
        for core, site in zip(cores, host.find(role), strict=True)
    }
    check_base(tensors, layers, host)
    width = next(iter(layers.values()))[1]
    rows, image_width = tensors[PROJECTION[0]].shape
    shapes = layers | dict(zip(PROJECTION, [(rows, image_width), (rows,), (width,), (width,)]))
    if rows % width:
        raise ArtefactError(f"{PROJECTION[0]} has {rows} rows, not a multiple of the tokens' width {width}.")
    check_tensors({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, tensors)
    config = IPAdapterConfig(image_width=image_width, tokens=rows // width)
    return config, {ours: tensors[theirs] for ours, theirs in names.items()}


def write_official(adapter: IPAdapter) -> dict[str, Tensor]:
    """An adapter's tensors under the published names, for ``safetensors.torch.save_file``.

    Raises:
        ArtefactError: it has a scale, which is chosen anew where the file is read.
    """
    check_unscaled(adapter)
    names = official_names([placement.path for placement in adapter.placements])
    mine = adapter.values()
    return {theirs: mine[ours].detach().contiguous() for ours, theirs in names.items()}


def official_names(paths: list[str]) -> dict[str, str]:
    """Our tensor names to the published ones; ``paths`` are those of the cross-attentions, in the model's order."""
    return {name: name for name in PROJECTION} | {
        f"{path}.{kind}.weight": f"ip_adapter.{2 * j + 1}.{kind}.weight"
        for j, path in enumerate(paths)
        for kind in KINDS
    }


def check_variant(tensors: Mapping[str, Tensor]) -> None:
    """Raise an :class:`ArtefactError` unless the projection is that of the base variant."""
    variants = {
        "image_proj.perceiver_resampler.proj_in.weight": "FaceID-Plus",
        "image_proj.latents": "Plus",
        "image_proj.proj.3.weight": "full-face",
        "image_proj.proj.0.weight": "FaceID",
    }
    for name, variant in variants.items():
        if name in tensors:
            raise ArtefactError(f"The file is an IP-Adapter of the {variant} variant; only the base variant is read.")
    if PROJECTION[0] not in tensors or tensors[PROJECTION[0]].dim() != 2:
        raise ArtefactError(f"The file holds no matrix {PROJECTION[0]}, so it is no IP-Adapter of the base variant.")


def check_base(tensors: Mapping[str, Tensor], layers: Mapping[str, tuple[int, ...]], host: Host) -> None:
    """Raise a :class:`BaseMismatchError` when the file has other cross-attentions than the host."""
    theirs = summary({name: tuple(t.shape) for name, t in tensors.items() if name.startswith("ip_adapter.")})
    mine = summary(layers)
    if theirs != mine:
        raise BaseMismatchError(
            f"The file was made for another base: it has {theirs}, this {type(host.model).__name__} has {mine}. "
            "(SD 1.x has 16 of text width 768, SDXL 70 of 2048.)"
        )


def summary(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The layers that shapes belong to, in words."""
    widths = sorted({shape[-1] for shape in shapes.values() if shape})
    return f"{len(shapes) // 2} cross-attentions of text width {' and '.join(map(str, widths))}"
