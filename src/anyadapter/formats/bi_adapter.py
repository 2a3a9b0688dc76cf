"""The files of Bi-Adapters' authors: ``<data set>-bit<b>-dim<h>.bin``, raw bytes without a header.

Layer by layer, for each matrix its packed codes, then its mean and deviation in fp32; then the head, packed in the same way
or as fp32 weight and bias. Nothing in the file says what it is of: form, hidden width, bits, classes and scale stand in the
``.yaml`` beside it (``method``, ``dim``, ``bit``, ``num_class``, ``scale``).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anyadapter.core.adapter import Adapter, AdapterConfig
from anyadapter.core.attach import build
from anyadapter.core.catalogue import config_from_dict
from anyadapter.core.errors import ArtefactError, TargetError
from anyadapter.core.host import Host
from anyadapter.formats.layouts import check_unscaled
from anyadapter.parts.quantised import Packed
from anyadapter.quantize import packed, quantised

METHOD = "bi_adapter"
EPSILON = 1e-6  # of every LayerNorm in their base
STATISTICS = struct.Struct("<ff")


def read_official(
    source: str | Path | bytes,
    host: Host,
    *,
    form: str,
    hidden: int,
    classes: int,
    scale: float,
    bits: int = 1,
    bihead: bool = True,
) -> tuple[AdapterConfig, dict[str, Tensor | Packed]]:
    """Settings and values of an official file, for ``quantize.fill(attach(model, config), values)``.

    Args:
        source: a ``.bin`` file, or the bytes in it.
        host: the base, with LayerNorms of epsilon 1e-6 as theirs.
        form: ``"adaptformer"`` or ``"lora"``.
        hidden, classes, scale, bits: ``dim``, ``num_class``, ``scale`` and ``bit`` of the ``.yaml``.
        bihead: whether the ``.yaml``'s method ends in ``-bihead``: the head has 1 bit a weight and no bias.

    Raises:
        ArtefactError: the file is of another size than these settings ask for, or a matrix is not sound.
        ConfigError, TargetError: a setting is refused, or the host cannot be adapted so.
    """
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    settings = {"form": form, "hidden": hidden, "bits": bits, "scale": scale, "head_classes": classes}
    config = config_from_dict({"method": METHOD, **settings, "head_bits": 1 if bihead else 32})
    check_norms(host)
    trial = build(host, config, "trial")
    if len(data) != size(trial):
        raise ArtefactError(
            f"The file has {len(data)} bytes; {form} with hidden={hidden}, bits={bits}, classes={classes} and "
            f"bihead={bihead} on {host.describe()} takes {size(trial)}. Are these the settings of its .yaml?"
        )
    values: dict[str, Tensor | Packed] = {}
    width_of, at = quantised(trial), 0
    for name, tensor in trial.tensors().items():
        width = width_of.get(name, 32)
        end = at + tensor.numel() * width // 8
        if width == 32:
            values[name] = torch.frombuffer(bytearray(data[at:end]), dtype=torch.float32).view(tensor.shape)
        else:
            codes = torch.frombuffer(bytearray(data[at:end]), dtype=torch.uint8)
            mean, std = STATISTICS.unpack_from(data, end)
            try:
                values[name] = Packed(codes, mean, std, tuple(tensor.shape), width)
            except ArtefactError as error:
                raise ArtefactError(f"{name}: {error}") from None
            end += STATISTICS.size
        at = end
    return config, values


def write_official(adapter: Adapter) -> bytes:
    """The bytes of the authors' file.

    Raises:
        ArtefactError: another method's adapter, or one that their file cannot hold.
    """
    config: Any = adapter.config
    if config.method != METHOD:
        raise ArtefactError(f"A {type(adapter).__name__} does not fit the file of a Bi-Adapter.")
    if config.bits == 32 or config.head_classes is None or config.head_bits not in (1, 32):
        raise ArtefactError(
            "The authors' file holds adapters of 1 to 8 bits with a new head of 1 bit or fp32; this one has "
            f"bits={config.bits}, head_classes={config.head_classes} and head_bits={config.head_bits}."
        )
    check_unscaled(adapter)
    for name, bits in quantised(adapter).items():
        if bits != (config.head_bits if ".head." in name else config.bits):
            raise ArtefactError(
                f"{name} was quantised to {bits} bits, of which these settings, and a reader of the authors' file, know nothing; "
                "save it with save_pretrained."
            )
    size(adapter)
    codes, parts = packed(adapter), []
    for name, tensor in adapter.tensors().items():
        if name in codes:
            parts.append(codes[name].data.numpy().tobytes() + STATISTICS.pack(codes[name].mean, codes[name].std))
        else:
            parts.append(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return b"".join(parts)


def size(adapter: Adapter) -> int:
    """The bytes of the authors' file (card binary-adapters, section 7).

    Raises:
        ArtefactError: a matrix does not fill its last byte, which their file would leave out.
    """
    bits, total = quantised(adapter), 0
    for name, tensor in adapter.tensors().items():
        if tensor.numel() * bits.get(name, 32) % 8:
            raise ArtefactError(
                f"{name} {tuple(tensor.shape)} does not fill its last byte at {bits[name]} bits, which the authors' file leaves "
                "out; save it with save_pretrained."
            )
        total += tensor.numel() * bits.get(name, 32) // 8 + (STATISTICS.size if name in bits else 0)
    return total


def check_norms(host: Host) -> None:
    """Raise a :class:`TargetError` unless the base's LayerNorms are as those the files were trained with."""
    for path, module in host.modules.items():
        if isinstance(module, nn.LayerNorm) and module.eps != EPSILON:
            raise TargetError(
                f"{path} has epsilon {module.eps:g}; the authors' base has {EPSILON:g} everywhere. Load the base with "
                f"from_pretrained(..., layer_norm_eps={EPSILON:g})."
            )
