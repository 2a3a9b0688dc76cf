"""Attach, detach, merge: the verbs on a model. Each checks everything before it changes anything."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from anyadapter.core.adapter import Adapter, AdapterConfig, unescape
from anyadapter.core.catalogue import method_of
from anyadapter.core.errors import AttachError, TargetError, near
from anyadapter.core.host import CHILD, Host, device_of

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # of an adapter, and of a folder under a root


def attach(
    model: nn.Module, config: AdapterConfig, name: str = "default", *, dtype: torch.dtype | None = None
) -> Adapter:
    """Build an adapter for a model and put it in place, outside those attached before.

    The base is frozen; its ``state_dict`` keeps its keys and bytes.

    Args:
        model: any ``torch.nn.Module``; it is changed in place and stays the user's object.
        config: the method and its settings, such as ``LoRAConfig(rank=8)``.
        name: letters, digits, ``.``, ``_`` and ``-``, at most 128.
        dtype: of the adapter's tensors; by default the base's, or fp32 where that has 16 bits or fewer.

    Returns:
        The adapter, ready to train.

    Raises:
        AttachError: the name is taken or malformed.
        TargetError: a target selects nothing, or something the method cannot wrap.
    """
    host = Host.of(model)
    check_name(host, name)
    return place(host, build(host, config, name, dtype))


def place(host: Host, adapter: Adapter) -> Adapter:
    """Put an adapter that :func:`build` made in place, outside those attached before."""
    if not host.adapters:
        host.trainable = [p for p in host.model.parameters() if p.requires_grad]
        for parameter in host.trainable:
            parameter.requires_grad_(False)
    host.install(adapter)
    adapter.train(host.model.training)
    return adapter


def build(host: Host, config: AdapterConfig, name: str, dtype: torch.dtype | None = None) -> Adapter:
    """The adapter for a host, its tensors on the devices of its sites; the host is not touched."""
    adapter = method_of(config)(config, host)
    adapter.name = name
    if not adapter.placements:
        raise TargetError(f"{type(adapter).__name__} placed nothing in {host.describe()}.")
    base = next((p for p in host.model.parameters() if p.is_floating_point()), torch.empty(0))
    adapter.to(device_of(host.model), dtype or (base.dtype if base.dtype.itemsize >= 4 else torch.float32))
    for key, branch in adapter.branches.items():  # a base may lie on several devices
        path = unescape(key)
        while path and path not in host.modules:  # a part of a site: the site's path is in front
            path = path.rpartition(".")[0]
        branch.to(device_of(host.modules.get(path, host.model)))
    return adapter


def detach(model: nn.Module, name: str = "default", *, out_of_order: bool = False) -> Adapter:
    """Take an adapter off; with the last one gone the model is bit for bit what it was.

    Args:
        out_of_order: allow it although a later adapter wraps the same sites and may have been trained on top.

    Returns:
        The adapter, which no longer acts.

    Raises:
        AttachError: no such adapter, it is merged, a later one stands on it, or somebody else has since wrapped a module.
    """
    host = Host.of(model)
    adapter = get(host, name)
    if adapter.merged:
        raise AttachError(f"{name!r} is merged into the weights; call anyadapter.unmerge(model, {name!r}) first.")
    paths = {(p.path, p.kind) for p in adapter.placements}
    later = list(host.adapters.values())[list(host.adapters).index(name) + 1 :]
    above = [a.name for a in later if paths & {(p.path, p.kind) for p in a.placements}]
    if above and not out_of_order:
        raise AttachError(
            f"{above[-1]!r} was attached after {name!r} and wraps it; detach {above[-1]!r} first, or pass out_of_order=True "
            "if the two are independent."
        )
    for path, _ in paths:
        if not host.patches[path].outermost:
            raise AttachError(
                f"{path}.forward was replaced by something else after {name!r} was attached (accelerate hooks? a compiled "
                "module?); remove that first."
            )
    host.remove(adapter)
    if not host.adapters:
        for parameter in host.trainable:
            parameter.requires_grad_(True)
    return adapter


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The attached adapters by name, innermost first."""
    return Host.of(model).adapters


@contextmanager
def disabled(model: nn.Module, *names: str) -> Iterator[None]:
    """Inside the block these adapters (with no name, all) are as if absent."""
    host = Host.of(model)
    with ExitStack() as stack:
        for adapter in [get(host, name) for name in names or host.adapters]:
            stack.enter_context(adapter.disabled())
        yield


@contextmanager
def signals(model: nn.Module, **values: Any) -> Iterator[None]:
    """Set signals for the calls inside the block.

    Raises:
        SignalError: no attached adapter reads one of the names.
    """
    host = Host.of(model)
    readable: dict[str, list[str]] = {}
    for name, adapter in host.adapters.items():
        for signal in adapter.reads:
            readable.setdefault(signal, []).append(name)
    with host.signals.set(readable, values):
        yield


def merge(model: nn.Module, name: str = "default", *, unload: bool = False) -> None:
    """Add a linear adapter into the base's weights, so that it costs nothing to run.

    The weights underneath are kept: :func:`unmerge` restores them bit for bit.

    Args:
        unload: keep nothing and take the adapter off: the base becomes the merged model for good.

    Raises:
        AttachError: the method is not linear, the adapter is merged already, or a weight is quantised or shared.
    """
    host = Host.of(model)
    adapter = get(host, name)
    if "merge" not in adapter.capabilities:
        raise AttachError(f"{type(adapter).__name__} is not linear in the weights and cannot be merged into them.")
    if adapter.merged:
        raise AttachError(f"{name!r} is merged already.")
    originals: dict[str, Tensor] = {}
    merged: dict[str, Tensor] = {}
    uses = [id(m._parameters.get("weight")) for m in host.modules.values()]
    for placement in adapter.placements:
        module: Any = host.modules[placement.path]
        branch: Any = placement.branch
        weight = module._parameters.get("weight")
        if weight is None:
            raise AttachError(f"{placement.path} ({type(module).__name__}) has no weight of its own to merge into.")
        if not weight.is_floating_point():
            raise AttachError(f"{placement.path} holds a quantised weight; merging would change its answers.")
        if uses.count(id(weight)) > 1:
            raise AttachError(f"{placement.path}.weight is shared with another module, which merging would change too.")
        for kind, delta in (("weight", branch.weight_delta(module)), ("bias", branch.bias_delta(module))):
            if delta is not None:
                path, before = f"{placement.path}.{kind}", module._parameters[kind].detach()
                merged[path] = merged.get(path, before.float()) + delta.detach()
                originals[path] = before.clone()
    with torch.no_grad():
        for path, value in merged.items():
            host.model.get_parameter(path).copy_(value)
    if unload:
        detach(model, name, out_of_order=True)
        return
    host.originals[name] = originals
    adapter.merged = True


def unmerge(model: nn.Module, name: str = "default") -> None:
    """Take a merged adapter out again; the weights are bit for bit what they were.

    Raises:
        AttachError: it is not merged, or a later merge lies over it.
    """
    host = Host.of(model)
    adapter = get(host, name)
    if not adapter.merged:
        raise AttachError(f"{name!r} is not merged.")
    mine = host.originals[name]
    for other in list(host.originals)[list(host.originals).index(name) + 1 :]:
        if set(mine) & set(host.originals[other]):
            raise AttachError(f"{other!r} was merged after {name!r} into the same weights; unmerge {other!r} first.")
    with torch.no_grad():
        for path, value in host.originals.pop(name).items():
            host.model.get_parameter(path).copy_(value)
    adapter.merged = False


def check_name(host: Host, name: str) -> None:
    """Raise an :class:`AttachError` unless ``name`` is well-formed and free."""
    if not NAME.fullmatch(name):
        raise AttachError(f"An adapter's name is 1 to 128 letters, digits, '.', '_' or '-', not {name!r}.")
    if name in host.adapters:
        raise AttachError(f"An adapter named {name!r} is attached already; choose another name or detach it first.")
    if CHILD in host.model._modules and not host.adapters:
        raise AttachError(f"{type(host.model).__name__} has a child module named {CHILD!r} of its own.")


def get(host: Host, name: str) -> Adapter:
    """The adapter of that name. Raises :class:`AttachError` with near names."""
    if name not in host.adapters:
        raise AttachError(f"No adapter named {name!r} is attached. {near(name, host.adapters)}")
    return host.adapters[name]
