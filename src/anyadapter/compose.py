"""Mixing trained adapters of one base: weighted sum, average, slice-merge, and another mixture for each row of a batch.

::

    aa.weighted_sum(model, {"maths": 1.0, "polite": 0.5, "verbose": -0.3}, "mix")  # of effects, exactly: LoRA, (IA)³
    aa.average(model, {"seed-0": 0.5, "seed-1": 0.5}, "mean")  # LoRA as above, other methods by their parameters
    aa.slice_merge(model, {0: "run-a", 1: "run-b"}, "languages")  # each language from its best run
    with aa.routed(model, ["maths", None, {"maths": 0.7, "polite": 0.3}]):
        model(**batch)  # each row with its own

Which method can do what is in the catalogue. Attaching several adapters stacks them, the first innermost, each with its
``scale``; :func:`anyadapter.merge` and :func:`anyadapter.unmerge` put one into the weights and take it out again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from anyadapter.core.adapter import Adapter, AdapterConfig, same_config
from anyadapter.core.attach import NAME, build, check_name, get, place
from anyadapter.core.errors import AttachError, ConfigError
from anyadapter.core.host import Host
from anyadapter.formats.native import locate, read
from anyadapter.parts.whole import Whole

Source = str | Path  # the name of an attached adapter, or the folder or Hub repository of a saved one
Route = str | Mapping[str, float] | None  # what one row uses: an adapter, several with weights, or none


def weighted_sum(
    model: nn.Module, weights: Mapping[Source, float], name: str = "sum", *, rank: int | None = None
) -> Adapter:
    """One adapter whose effect is the weighted sum of the effects of several.

    Of LoRA: every update is Σ w · scale · (alpha / r) · B A, exactly, by putting ranks side by side, so that modules, ranks
    and alphas may differ. The result is a plain LoRA. Of (IA)³: 1 + Σ w · scale · (l − 1). This is task arithmetic
    (Ilharco et al. 2023, arXiv 2212.04089) on what the adapters add to the weights: a weight may be negative, which unlearns,
    and one adapter alone may be scaled, or cut to a lower rank.

    The result is attached, frozen, outside all others. Sources that are attached stay so, and are switched off.

    Args:
        weights: of each source, in any order: the name of an attached adapter, or a folder.
        name: of the result.
        rank: keep only so many directions of each update, the strongest. What that costs is ``lost`` of the result: the
            relative error of each module's update in the Frobenius norm.

    Raises:
        ConfigError: the method has no sum, the sources do not fit together, or a weight is not finite.
        AttachError: the name is taken, a source is not attached or is merged into the weights.
        ArtefactError: a folder cannot be read.
    """
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank is {rank!r}; it must be a positive integer or None.")
    check_weights(weights)
    found = sources(model, weights, "weighted_sum", name)
    config, tensors, lost = type(found[0]).weighted_sum(found, list(weights.values()), rank)
    return put(model, weights, config, tensors, name, lost=lost)


def average(
    model: nn.Module, weights: Mapping[Source, float], name: str = "average", *, apart: bool = False
) -> Adapter:
    """The weighted average of adapters of one method.

    Where effects have a sum (LoRA, (IA)³) it is the average of the effects: :func:`weighted_sum` with weights that sum to 1. Of
    other methods it is the average of the parameters, tensor by tensor, which needs equal settings and is a good adapter
    only where the sources were trained from the same start, such as checkpoints of one run.

    Args:
        weights: as of :func:`weighted_sum`; they sum to 1.
        name: of the result.
        apart: average the parameters of LoRA too, A and B apart, as AdapterSoup and MHR-μ do. The rank stays, and it is
            another model: the product of averages is not the average of products.

    Raises:
        ConfigError: as :func:`weighted_sum`, or the weights do not sum to 1.
        AttachError, ArtefactError: as :func:`weighted_sum`.
    """
    check_weights(weights)
    if abs(sum(weights.values()) - 1) > 1e-6:
        raise ConfigError(
            f"The weights of an average sum to 1, these to {sum(weights.values()):g}. anyadapter.weighted_sum takes any, where "
            "the method has it."
        )
    found = sources(model, weights, "average", name)
    if "weighted_sum" in found[0].capabilities and not apart:
        config, tensors, lost = type(found[0]).weighted_sum(found, list(weights.values()))
        return put(model, weights, config, tensors, name, lost=lost)
    same_config(found)
    tensors = mean([adapter.values() for adapter in found], list(weights.values()))
    return put(model, weights, found[0].config, tensors, name, found[0].scale)


def slice_merge(model: nn.Module, slices: Mapping[int, Source], name: str = "merged") -> Adapter:
    """One adapter that takes the part of each language or task from another training run (card lda-asr, section 4).

    For methods whose tensors hold a part per language or task, along the axes in ``Adapter.slices``. Nothing is averaged: the
    result acts on each as the run it came from does, so that every language is taken where it was at its best.

    Args:
        slices: for every index along these axes, where its part comes from. All sources have the same settings, and the same
            values in tensors that are not per language.
        name: of the result, which is attached as that of :func:`weighted_sum` is.

    Raises:
        ConfigError: the method has no slices, an index is missing or not there, or a shared tensor differs.
        AttachError, ArtefactError: as :func:`weighted_sum`.
    """
    if not slices:
        raise ConfigError("Name a source for every slice, such as {0: 'run-a', 1: 'run-b'}.")
    unique = list(dict.fromkeys(slices.values()))
    found = sources(model, unique, "slice_merge", name)
    same_config(found)
    values = dict(zip(unique, (adapter.values() for adapter in found)))
    tensors = {}
    for tensor, value in values[unique[0]].items():
        axis = next((axis for pattern, axis in found[0].slices.items() if fnmatchcase(tensor, pattern)), None)
        if axis is None:
            check_shared(tensor, {str(key): each[tensor] for key, each in values.items()})
            tensors[tensor] = value
        else:
            check_slices(tensor, value.shape[axis], slices)
            parts = [values[slices[i]][tensor].select(axis, i) for i in sorted(slices)]
            tensors[tensor] = torch.stack(parts, dim=axis)
    return put(model, unique, found[0].config, tensors, name, found[0].scale)


@contextmanager
def routed(model: nn.Module, rows: Sequence[Route] | Tensor, names: Sequence[str] = ()) -> Iterator[None]:
    """Inside the block every row of a batch runs through its own attached adapters, and only through those.

    A row gives what it would give alone, with the named adapters at weight times their own ``scale``, in the order of
    attachment, and the others off; also where a branch is not additive, for a weight multiplies what the branch itself adds.
    Each adapter is computed for all rows, so that n adapters cost what a stack of n does; the server computes only what a
    row uses. Gradients reach the weights when ``rows`` is a tensor that asks for them.

    Args:
        rows: one for each row of the batch: an adapter's name, several with their weights, or None for the base alone; or a
            tensor of weights, (batch, len(names)).
        names: of the adapters that the columns of a tensor are for.

    Raises:
        ConfigError: a method cannot act on some rows only, a tensor is of another shape, a weight is not finite.
        AttachError: no such adapter, or one is merged into the weights.
        SignalError: (in a call) its batch has another number of rows.
    """
    host = Host.of(model)
    names, table = tabulate(rows, names)
    columns = dict(zip(names, table.unbind(1)))
    for name in names:
        get(host, name)
    for name, adapter in host.adapters.items():
        check_routable(adapter, columns.get(name))
    with ExitStack() as stack:
        for name, adapter in host.adapters.items():
            column = columns.get(name)
            stack.callback(setattr, adapter, "enabled", adapter.enabled)
            adapter.enabled = column is not None and (column.requires_grad or bool(column.any()))
            if column is not None and can_route(adapter):
                stack.enter_context(adapter.routed(column))
        yield


# -------------------------------------------------------------------------- what is given


def sources(model: nn.Module, keys: Iterable[Source], verb: str, name: str) -> list[Adapter]:
    """The adapters to make one of, which is to be called ``name``; those of folders are read and not attached.

    Raises:
        AttachError: the name is taken, there is no such adapter, or it is merged.
        ConfigError: they are of several methods, or of one that cannot do this.
        ArtefactError: a folder cannot be read.
    """
    host, found = Host.of(model), []
    check_name(host, name)
    for key in keys:
        if isinstance(key, str) and (key in host.adapters or (NAME.fullmatch(key) and not Path(key).is_dir())):
            found.append(get(host, key))
        else:
            found.append(read(host, locate(key), str(key)))
    for adapter in found:
        if type(adapter) is not type(found[0]):
            raise ConfigError(
                f"{found[0].name!r} is a {type(found[0]).__name__} and {adapter.name!r} a {type(adapter).__name__}. One "
                "adapter can be made of adapters of one method only; attached together, they stack."
            )
        if verb not in adapter.capabilities:
            can = ", ".join(sorted(adapter.capabilities)) or "none of this"
            raise ConfigError(f"{type(adapter).__name__} cannot {verb}; it can: {can}.")
        if adapter.merged:
            raise AttachError(f"{adapter.name!r} is merged into the weights; unmerge it first.")
    return found


def check_weights(weights: Mapping[Source, float]) -> None:
    """Raise a :class:`ConfigError` unless there are some and all are finite."""
    if not weights or not all(math.isfinite(weight) for weight in weights.values()):
        raise ConfigError(f"Expected a finite weight for each of at least one adapter, not {dict(weights)!r}.")


def check_slices(tensor: str, count: int, slices: Mapping[int, Source]) -> None:
    """Raise a :class:`ConfigError` unless every slice of a tensor has a source, and no other does."""
    if sorted(slices) != list(range(count)):
        raise ConfigError(
            f"{tensor} has the slices 0 to {count - 1}, each of which needs a source; given: {sorted(slices)}."
        )


def check_shared(tensor: str, values: Mapping[str, Tensor]) -> None:
    """Raise a :class:`ConfigError` unless a tensor is the same in all sources."""
    first = next(iter(values.values()))
    differing = [name for name, value in values.items() if not torch.equal(value, first)]
    if differing:
        raise ConfigError(
            f"{tensor} is shared by all slices and differs between {next(iter(values))!r} and {differing[0]!r}: slices of one "
            "do not fit the other. Freeze what is shared when runs are to be merged."
        )


def mean(values: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Σ w v of each tensor, in fp32."""
    return {
        name: torch.stack([weight * each[name].detach().float() for weight, each in zip(weights, values)]).sum(0)
        for name in values[0]
    }


def put(
    model: nn.Module,
    used: Iterable[Source],
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    name: str,
    scale: float = 1.0,
    lost: dict[str, float] | None = None,
) -> Adapter:
    """Attach the result, and switch off those attached that it was made of."""
    host = Host.of(model)
    adapter = build(host, config, name)
    adapter.load_tensors(tensors)
    adapter.lost = lost or {}
    if scale != 1:
        adapter.scale = scale
    for key in used:
        if key in host.adapters:
            host.adapters[key].enabled = False  # type: ignore[index]
    return place(host, adapter).requires_grad_(False)


# -------------------------------------------------------------------------- rows


def tabulate(rows: Sequence[Route] | Tensor, names: Sequence[str]) -> tuple[list[str], Tensor]:
    """The adapters in use, and their weights, (batch, adapters).

    Raises:
        ConfigError: the tensor has another shape, or a weight is not finite.
    """
    if isinstance(rows, Tensor):
        found, table = list(names), rows
        if table.dim() != 2 or table.shape[1] != len(found) or len(set(found)) != len(found):
            raise ConfigError(
                f"Weights of {tuple(table.shape)} for the adapters {found}; expected (batch, {len(found)})."
            )
    else:
        routes = [{row: 1.0} if isinstance(row, str) else dict(row or {}) for row in rows]
        found = list(dict.fromkeys(name for route in routes for name in route))
        table = torch.tensor([[float(route.get(name, 0.0)) for name in found] for route in routes])
        table = table.view(len(routes), len(found))
    if not torch.isfinite(table).all():
        raise ConfigError("A weight of a route is not finite.")
    return found, table


def can_route(adapter: Adapter) -> bool:
    """Whether it can act on each row by another weight."""
    return "route" in adapter.capabilities and not any(isinstance(p.branch, Whole) for p in adapter.placements)


def check_routable(adapter: Adapter, column: Tensor | None) -> None:
    """Raise unless an attached adapter can have these weights; without any, it is to be off.

    Raises:
        AttachError: it is merged, so acts on every row.
        ConfigError: it is to act on some rows, and its method cannot.
    """
    if adapter.merged:
        raise AttachError(f"{adapter.name!r} is merged into the weights and acts on every row; unmerge it first.")
    if column is None:
        return
    what, switched = f"{type(adapter).__name__} {adapter.name!r}", bool(((column == 0) | (column == 1)).all())
    if "scale" not in adapter.capabilities and not switched:
        raise ConfigError(f"{what} has no scale: in each row its weight is 1 or 0.")
    if not can_route(adapter) and not (switched and len(column.unique()) == 1):
        why = "it trains modules as a whole" if "route" in adapter.capabilities else "its method cannot tell rows apart"
        raise ConfigError(
            f"{what} acts on all rows with weight 1, or on none: {why}. Run the other rows in a batch of their own."
        )
