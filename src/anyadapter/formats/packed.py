"""How quantised matrices lie in a file: each as its bytes under its own name, and one tensor with all their statistics.

The configuration says how many bits they have; a file that holds them as dense tensors is one that training goes on from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anyadapter.core.errors import ArtefactError
from anyadapter.parts.quantised import BITS, Packed

STATISTICS = "mean/std"  # (matrices, 2), in the order of their names; no tensor of an adapter has a "/" in its name


def dump(matrices: Mapping[str, Packed]) -> dict[str, Tensor]:
    """The tensors of a file for these matrices."""
    if not matrices:
        return {}
    rows = [(matrices[name].mean, matrices[name].std) for name in sorted(matrices)]
    return {name: matrix.data for name, matrix in matrices.items()} | {
        STATISTICS: torch.tensor(rows, dtype=torch.float32)
    }


def parse(
    bits: Mapping[str, int], tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor | Packed]:
    """The tensors of a file, its quantised matrices as such.

    Args:
        bits: of each quantised matrix, as :func:`read_bits` gives them.
        tensors: of the file.
        shapes: of the adapter's tensors; a matrix that has none there is left as it lies.

    Raises:
        ArtefactError: bytes or statistics are not those of such matrices.
    """
    if not bits or STATISTICS not in tensors:
        return dict(tensors)
    found: dict[str, Tensor | Packed] = {name: tensor for name, tensor in tensors.items() if name != STATISTICS}
    statistics = tensors[STATISTICS]
    if statistics.dtype != torch.float32 or statistics.shape != (len(bits), 2):
        raise ArtefactError(
            f"{STATISTICS!r} is {tuple(statistics.shape)} of {statistics.dtype}; expected a mean and a deviation in fp32 for "
            f"each of {len(bits)} matrices."
        )
    for name, (mean, std) in zip(sorted(bits), statistics.tolist()):
        if name in found and name in shapes:
            try:
                found[name] = Packed(tensors[name], mean, std, tuple(shapes[name]), bits[name])
            except ArtefactError as error:
                raise ArtefactError(f"{name}: {error}") from None
    return found


def unpacked_shapes(
    bits: Mapping[str, int], found: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shapes in a file's header as they are once its matrices are unpacked: what can be known without reading values.

    Raises:
        ArtefactError: bytes or statistics are not those of such matrices.
    """
    if not bits or STATISTICS not in found:
        return dict(found)
    if found[STATISTICS] != (len(bits), 2):
        raise ArtefactError(f"{STATISTICS!r} is {found[STATISTICS]}; expected ({len(bits)}, 2).")
    plain = {name: shape for name, shape in found.items() if name != STATISTICS}
    for name in bits.keys() & plain.keys() & shapes.keys():
        expected = (-(-torch.Size(shapes[name]).numel() * bits[name] // 8),)
        if plain[name] != expected:
            raise ArtefactError(f"{name}: {plain[name]} bytes; {shapes[name]} at {bits[name]} bits is {expected}.")
        plain[name] = tuple(shapes[name])
    return plain


def write_bits(bits: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> int | dict[str, int]:
    """The bits of an adapter's quantised matrices for its configuration: one number where all matrices have the same."""
    widths = set(bits.values())
    return widths.pop() if len(widths) == 1 and set(bits) == matrices(shapes) else dict(bits)


def read_bits(value: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The inverse of :func:`write_bits`; ``None`` is of an adapter that is not quantised.

    Raises:
        ArtefactError: a width that no matrix can have.
    """
    found = value if isinstance(value, dict) else {} if value is None else dict.fromkeys(matrices(shapes), value)
    for name, bits in found.items():
        if type(bits) is not int or bits not in BITS:
            raise ArtefactError(
                f"{name[:200]} is said to have {bits!r} bits a number; this version reads 1, 2, 4 and 8."
            )
    return found


def matrices(shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """What is quantised unless something else is said: all of two or more dimensions and two or more numbers."""
    return {name for name, shape in shapes.items() if len(shape) >= 2 and torch.Size(shape).numel() >= 2}
