"""Hosts: a frozen model, what its parts are for, and the adapters attached to it."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from anyadapter.core.adapter import Adapter, Placement, Targets, escape
from anyadapter.core.attention import Port, port_of
from anyadapter.core.errors import TargetError, near
from anyadapter.core.roles import ROLES, Family, family_of
from anyadapter.core.signals import Signals
from anyadapter.core.site import Chain, Kind, Link, Patch, Site

CHILD = "anyadapter"  # the name under which the adapters are a child of the model


class Guests(nn.Module):
    """The adapters, as a child of the model: its ``parameters()``, ``to()``, ``train()`` and DDP reach them, its
    ``state_dict()`` does not know them.
    """

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.host = host
        self.adapters = nn.ModuleDict()
        self.register_load_state_dict_post_hook(forget_missing)

    def forward(self, x: Any) -> Any:
        """Pass on the input: a ``Sequential`` host runs all its children."""
        return x

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Add nothing: adapters are saved by themselves."""
        return {} if destination is None else destination


def forget_missing(guests: nn.Module, keys: Any) -> None:
    """A base checkpoint holds no adapter tensors; that is not an error."""
    prefix = f"{CHILD}.adapters."
    keys.missing_keys[:] = [k for k in keys.missing_keys if not (k.startswith(prefix) or f".{prefix}" in k)]


class Host:
    """A model and what is attached to it. ``Host.of(model)`` finds or makes it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.family: Family | None = family_of(model)
        self.signals = Signals()
        self.patches: dict[str, Patch] = {}
        self.cores: dict[str, tuple[Port, Chain]] = {}
        self.trainable: list[nn.Parameter] = []  # of the base, before it was frozen
        self.originals: dict[str, dict[str, Tensor]] = {}  # parameters under each merged adapter, by name

    @classmethod
    def of(cls, model: nn.Module) -> Host:
        """The host of a model, which may be compiled or wrapped for data-parallel training.

        Raises:
            TargetError: not a torch module (a diffusers pipeline: pass ``pipe.unet`` or ``pipe.transformer``).
        """
        if not isinstance(model, nn.Module):
            hint = next((f"; pass pipeline.{n}" for n in ("unet", "transformer") if hasattr(model, n)), "")
            raise TargetError(f"A host is a torch.nn.Module, not a {type(model).__name__}{hint}.")
        model = unwrap(model)
        guests = model._modules.get(CHILD)
        return guests.host if isinstance(guests, Guests) else cls(model)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The attached adapters by name, in the order they were attached."""
        guests = self.model._modules.get(CHILD)
        return {a.name: a for a in guests.adapters.values()} if isinstance(guests, Guests) else {}  # type: ignore[misc, union-attr]

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every module of the base by dotted path."""
        return {
            path: module
            for path, module in self.model.named_modules()
            if path and path != CHILD and not path.startswith(f"{CHILD}.")
        }

    def describe(self) -> str:
        """The model's class, and its family where it is registered."""
        family = f", family {self.family.names[0]}" if self.family else ", an unregistered architecture"
        return f"{type(self.model).__name__}{family}"

    # ------------------------------------------------------------------ finding sites

    def find(
        self,
        targets: Targets,
        *,
        kind: Kind = "call",
        exclude: Targets = (),
        layers: Iterable[int] | None = None,
        types: tuple[type[nn.Module], ...] = (),
    ) -> list[Site]:
        """The sites that targets select, in the model's order, each once.

        Args:
            targets: one or several of: a role (``"self_attention.query"``), a role inside a part of the model
                (``"decoder:self_attention.query"``), the end of module paths with ``*`` for one component
                (``"q_proj"``, ``"layers.*.mlp"``), or ``"all-linear"``: every linear but the output head.
            kind: a module call or an attention core.
            exclude: targets to leave out.
            layers: keep only sites in these layers; negative numbers count from the last.
            types: what the modules must be.

        Raises:
            TargetError: a target selects nothing (the message says what is near), or a module of the wrong type.
        """
        chosen = {path for target in as_tuple(targets) for path in self.paths(target)}
        chosen -= {path for target in as_tuple(exclude) for path in self.paths(target)}
        sites = [Site(path, module, kind) for path, module in self.modules.items() if path in chosen]
        if layers is not None:
            count = 1 + max((site.layer for site in sites if site.layer is not None), default=-1)
            wanted = {layer + count if layer < 0 else layer for layer in layers}
            sites = [site for site in sites if site.layer in wanted]
        if not sites:
            raise TargetError(
                f"{targets!r} selects nothing in {self.describe()} once layers and exclusions are applied."
            )
        for site in sites:
            if types and not isinstance(site.module, types):
                names = " or ".join(t.__name__ for t in types)
                raise TargetError(f"{site.path} is a {type(site.module).__name__}; this adapter wraps {names}.")
            if kind == "attention":
                port_of(site.path, site.module)
        return sites

    def paths(self, target: str) -> list[str]:
        """The module paths one target selects. Raises :class:`TargetError` when there are none."""
        if target == "all-linear":
            found = [path for path, module in self.modules.items() if is_linear(module) and module is not self.head]
        else:
            scope, _, name = target.rpartition(":")
            patterns = self.role(name) if name in ROLES else (name,)
            found = [path for path in self.modules if any(ends_with(path, p) for p in patterns)]
            if scope:
                found = [path for path in found if f".{scope}." in f".{path}."]
        if not found:
            known = {part for path in self.modules for part in (path.split(".")[-1], path)}
            known |= set(self.family.roles) if self.family else set()
            raise TargetError(f"{target!r} matches no module of {self.describe()}. {near(target, known)}")
        return found

    def role(self, name: str) -> tuple[str, ...]:
        """The patterns of a role. Raises :class:`TargetError` when this architecture has no such part."""
        if self.family is None:
            raise TargetError(
                f"{name!r} is a role, and {type(self.model).__name__} is of no registered family. Name modules by their "
                "path or its end instead, or register the family with anyadapter.register_family(Family(...))."
            )
        if name not in self.family.roles:
            raise TargetError(
                f"{self.describe()} has no {name!r} ({ROLES[name]}). It has: {', '.join(self.family.roles)}."
            )
        return as_tuple(self.family.roles[name])

    def has(self, role: str) -> bool:
        """Whether this host has a part of that role: its family's table says where, and there is a module there."""
        patterns = as_tuple(self.family.roles.get(role, ())) if self.family else ()
        return any(ends_with(path, pattern) for path in self.modules for pattern in patterns)

    @property
    def head(self) -> nn.Module | None:
        """The output projection of a transformers model."""
        get = getattr(self.model, "get_output_embeddings", None)
        try:
            return get() if get else None
        except (AttributeError, NotImplementedError):
            return None

    # ------------------------------------------------------------------ placing branches

    def install(self, adapter: Adapter) -> None:
        """Make ``adapter`` a guest and run its sites through it. All checks were made before."""
        if CHILD not in self.model._modules:
            self.model.add_module(CHILD, Guests(self))
        guests: Any = self.model._modules[CHILD]
        guests.adapters[escape(adapter.name)] = adapter
        for placement in adapter.placements:
            self.place(adapter, placement)

    def place(self, adapter: Adapter, placement: Placement) -> None:
        """Run one site through a guest."""
        module = self.modules[placement.path] if placement.path else self.model
        patch = self.patches.get(placement.path) or self.patches.setdefault(placement.path, Patch(module))
        if placement.kind == "attention":
            if placement.path not in self.cores:
                port, chain = port_of(placement.path, module), Chain()
                port.install(patch, chain)
                self.cores[placement.path] = port, chain
            chain = self.cores[placement.path][1]
        else:
            chain = patch.chain
        chain.links.append(Link(adapter, placement.branch))

    def remove(self, adapter: Adapter) -> None:
        """Undo :meth:`install`; the last guest leaves nothing behind."""
        for path in {placement.path for placement in adapter.placements}:
            patch = self.patches[path]
            patch.chain.links = [link for link in patch.chain.links if link.adapter is not adapter]
            if path in self.cores:
                port, chain = self.cores[path]
                chain.links = [link for link in chain.links if link.adapter is not adapter]
                if not chain.links:
                    port.remove(patch)
                    del self.cores[path]
            if not patch.chain.links and path not in self.cores:
                patch.remove()
                del self.patches[path]
        guests: Any = self.model._modules[CHILD]
        del guests.adapters[escape(adapter.name)]
        if not guests.adapters:
            del self.model._modules[CHILD]


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself inside ``torch.compile`` and (distributed) data-parallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: torch's, a quantised subclass of it, or transformers' transposed Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) features of a linear or the channels of a convolution.

    Raises:
        TargetError: the module has neither.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        return module.nx, module.nf  # type: ignore[return-value]
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    raise TargetError(f"A {type(module).__name__} has no number of features; expected a linear layer or a convolution.")


def ends_with(path: str, pattern: str) -> bool:
    """Whether the last components of ``path`` match those of ``pattern``, each by itself."""
    want = pattern.split(".")
    have = path.split(".")[-len(want) :]
    return len(have) == len(want) and all(map(fnmatchcase, have, want))


def as_tuple(value: Targets) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def device_of(module: nn.Module) -> torch.device:
    """Where a module's tensors are."""
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
