"""Adapters of 1, 2, 4 or 8 bits a number, whatever their method.

::

    aa.quantize(adapter, bits=1)           # from now on it computes with rounded matrices, and trains what is rounded
    ...                                    # train adapter.parameters(), or not at all
    aa.save_pretrained(model, "folder")    # packed: 8 numbers a byte
    aa.load(other_model, "folder")         # the same bits
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from anyadapter.core.adapter import Adapter, Targets, check_tensors, unescape
from anyadapter.core.errors import ArtefactError, AttachError, ConfigError, near
from anyadapter.parts.quantised import Packed, bits_of, check_bits, fake_quantise, is_constant, undo_fake_quantise

START_STD, START_LIMIT = 1e-3, 2e-3  # of a matrix that would otherwise start constant (card binary-adapters, section 4)
CAST = 2**-8  # what a matrix may have lost by a cast to 16 bits and back since it was packed


def quantize(
    adapter: Adapter, bits: int = 1, matrices: Targets | None = None, *, generator: torch.Generator | None = None
) -> Adapter:
    """Round matrices of an adapter to ``bits`` bits a number, now and in all training to come.

    What is trained is the latent matrix underneath, through the rounding (quantisation-aware training); an adapter that
    was trained before is quantised after training by the same call. Saving packs it. A matrix that is constant, such as
    LoRA's B before training, has nothing to round: it gets noise first, from a normal of deviation 1e-3 cut at ±2e-3, so
    that a fresh quantised adapter is near the base and not equal to it.

    Do this once the tensors are what they shall start from: after ``imitate`` or ``fold`` of a prefix, say.

    Args:
        adapter: of any method, attached or not.
        bits: 1, 2, 4 or 8.
        matrices: patterns of tensor names, as :meth:`Adapter.tensors` gives them; by default all floating tensors of two or
            more dimensions and two or more numbers. Call again for matrices of another width.
        generator: of the noise; torch's own by default.

    Returns:
        The adapter.

    Raises:
        ConfigError: no such width, a pattern that matches nothing that can be quantised, a matrix that is already.
        AttachError: the adapter is merged.
    """
    check_bits(bits)
    if adapter.merged:
        raise AttachError(f"{adapter.name!r} is merged into the weights; unmerge it before quantising it.")
    known, before = places(adapter), quantised(adapter)
    chosen = select(known, matrices)
    for name in chosen:
        if name in before:
            hint = "; its codes are fixed, and rounding them anew would shrink it" if name in adapter.packed else ""
            raise ConfigError(f"{name} is quantised to {before[name]} bits already{hint}.")
        if not torch.isfinite(values := latent(*known[name])).all():
            raise ConfigError(f"{name} {tuple(values.shape)} holds NaN or infinity and cannot be quantised.")
    for name in chosen:
        values = latent(*known[name])
        if is_constant(values):
            values.data.add_(start_noise(values, generator))
    round_in_training(adapter, dict.fromkeys(chosen, bits))
    return adapter


def round_in_training(adapter: Adapter, bits: Mapping[str, int]) -> None:
    """Compute these matrices, by name, from latents that are rounded; nothing is checked and no value changed."""
    known = places(adapter)
    for name, width in bits.items():
        module, key = known[name]
        if bits_of(module, key) is None:  # a module in two places is met twice
            fake_quantise(module, key, width)


def pack(adapter: Adapter) -> dict[str, Packed]:
    """End the training of a quantised adapter: its matrices become plain frozen ones, beside the codes they stand for.

    Faster than an adapter that still rounds, and what :func:`anyadapter.load` makes of a packed file; the outputs are the
    same. The codes stay what they are however the adapter is cast or moved.

    Returns:
        ``adapter.packed``: every quantised matrix by name.

    Raises:
        ConfigError: nothing is quantised.
        ArtefactError: a matrix has become constant or not finite; nothing was changed.
    """
    if not quantised(adapter):
        raise ConfigError(
            f"{adapter.name!r} has no quantised matrices; call anyadapter.quantize(adapter, bits=1) first."
        )
    fill(adapter, packed(adapter))
    return adapter.packed


def quantised(adapter: Adapter) -> dict[str, int]:
    """The bits of each quantised matrix, by name: those in training and those packed."""
    found = {name: bits_of(*where) for name, where in places(adapter).items()}
    return {name: bits for name, bits in found.items() if bits} | {name: m.bits for name, m in adapter.packed.items()}


def packed(adapter: Adapter) -> dict[str, Packed]:
    """Every quantised matrix as it is saved; the adapter is not changed.

    Raises:
        ArtefactError: one cannot be packed, or was changed after it had been.
    """
    found, known = {}, places(adapter)
    for name, bits in quantised(adapter).items():
        held = adapter.packed.get(name)
        if held is None:
            found[name] = Packed.of(latent(*known[name]), bits, name)
        elif name in known and same(latent(*known[name]), held):
            found[name] = held
        else:
            raise ArtefactError(
                f"{name} was changed after it had been packed, so that its codes no longer say what it is. Train a quantised "
                "adapter before it is packed, or clear adapter.packed to go on with the dense numbers."
            )
    return found


@torch.no_grad()
def fill(adapter: Adapter, tensors: Mapping[str, Tensor | Packed]) -> None:
    """Give an adapter values: dense ones as :meth:`Adapter.load_tensors` does, packed ones with their codes, frozen.

    Raises:
        ArtefactError: a name is not the adapter's, or a shape differs; nothing was changed.
    """
    mine, known = adapter.tensors(), places(adapter)
    check_tensors({name: tensor for name, tensor in mine.items() if name in tensors}, tensors)  # type: ignore[arg-type]
    for name, value in tensors.items():
        if isinstance(value, Packed):
            module, key = known[name]
            if bits_of(module, key) is not None:
                undo_fake_quantise(module, key)
            getattr(module, key).requires_grad_(False).copy_(value.dequantise())
            adapter.packed[name] = value
        else:
            mine[name].copy_(value)


# -------------------------------------------------------------------------- which


def places(adapter: Adapter) -> dict[str, tuple[nn.Module, str]]:
    """Where each tensor is, by the name it is saved under: (module, attribute)."""
    saved, found = adapter.tensors(), {}
    for path, module in adapter.named_modules(remove_duplicate=False):
        if isinstance(module, ParametrizationList):
            continue
        for key in [*module._parameters, *module._buffers, *getattr(module, "parametrizations", ())]:
            name = unescape(f"{path}.{key}" if path else key)
            if name in saved:
                found[name] = module, key
    return found


def latent(module: nn.Module, key: str) -> Tensor:
    """The tensor itself, also where the attribute is computed from it."""
    return module.parametrizations[key].original if bits_of(module, key) else getattr(module, key)  # type: ignore[index, return-value, union-attr]


def select(known: Mapping[str, tuple[nn.Module, str]], matrices: Targets | None) -> list[str]:
    """The names of the tensors that patterns select. Raises :class:`ConfigError` when one selects none."""
    values = {name: latent(*where) for name, where in known.items()}
    able = [name for name, value in values.items() if value.is_floating_point() and value.numel() >= 2]
    if matrices is None:
        found = [name for name in able if values[name].dim() >= 2]
        if not found:
            raise ConfigError(f"There is no matrix among {', '.join(known) or 'no tensors'}; name what to quantise.")
        return found
    patterns = (matrices,) if isinstance(matrices, str) else tuple(matrices)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in able):
            raise ConfigError(f"{pattern!r} matches nothing that can be quantised. {near(pattern, able)}")
    return [name for name in able if any(fnmatchcase(name, pattern) for pattern in patterns)]


def start_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Values of a normal of deviation 1e-3 cut at ±2e-3, made on the CPU so that they do not depend on the device."""
    noise = torch.empty(like.shape, device="cpu")
    nn.init.trunc_normal_(noise, std=START_STD, a=-START_LIMIT, b=START_LIMIT, generator=generator)
    return noise.to(like)


def same(matrix: Tensor, held: Packed) -> bool:
    """Whether a matrix holds the values of its codes, but for casts."""
    return tuple(matrix.shape) == tuple(held.shape) and torch.allclose(
        matrix.detach().float().cpu(), held.dequantise(), rtol=CAST, atol=1e-7
    )
