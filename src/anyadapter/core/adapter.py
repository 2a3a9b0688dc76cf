"""Adapters: configuration, tensors, and what they do at each site.

A method is a subclass of :class:`Adapter`: its ``setup`` asks the host for sites and puts a *branch* at each. A branch is
middleware, ``branch(call, *args, **kwargs) -> result``: a :class:`Branch` module with its own tensors, or a bound method of
the adapter where sites share them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from anyadapter.core.errors import ArtefactError, ConfigError, SignalError, near
from anyadapter.core.site import Kind, Site

if TYPE_CHECKING:
    from typing_extensions import Self

    from anyadapter.core.host import Host

Targets = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user chooses. Subclasses are frozen, flat and JSON-able, and check themselves in ``__post_init__``."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; tuples become lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: a key is not a field (a newer version may know it), or a value is refused.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise ConfigError(
                    f"{cls.__name__} has no setting {key!r}. {near(key, known)} If the file comes from a newer anyadapter, "
                    "upgrade with `pip install -U anyadapter`."
                )
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except TypeError as error:
            raise ConfigError(f"{cls.__name__}: {error}") from None

    def require(self, name: str, ok: bool, expected: str) -> None:
        """Raise a :class:`ConfigError` naming field, value and what is allowed unless ``ok``."""
        if not ok:
            raise ConfigError(f"{type(self).__name__}.{name} is {getattr(self, name)!r}; it must be {expected}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig(Settings):
    """The settings of a method."""

    method: ClassVar[str]


class Branch(nn.Module):
    """One adapter's part at one site.

    Attributes:
        scale: how strongly it acts; 1 as trained, 0 as absent.
        rows: (batch,), by what more to multiply the scale in each row of the running call, or None.
        replaces: whether it runs in the module's place, so that it does not matter what the module's own tensors hold.
    """

    replaces: ClassVar[bool] = False
    scale: float = 1.0
    rows: Tensor | None = None

    def strength(self, like: Tensor) -> float | Tensor:
        """What to multiply this branch's effect by: the scale, or a factor for each row, (batch, 1, …), as ``like`` has axes."""
        return strength(self.scale, self.rows, like)

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped ``call`` and return the new result."""
        raise NotImplementedError

    def weight_delta(self, module: nn.Module) -> Tensor:
        """What to add to ``module.weight`` for the same effect, in fp32; only where the branch is linear."""
        raise NotImplementedError

    def bias_delta(self, module: nn.Module) -> Tensor | None:
        """What to add to ``module.bias``, in fp32, or None for nothing."""
        return None


@dataclasses.dataclass(eq=False)
class Placement:
    """A branch and where it goes."""

    path: str
    kind: Kind
    branch: Callable[..., Any]


class Adapter(nn.Module):
    """One adapter: built for one host, attached to it under a name.

    Class attributes of a method:
        Config: its configuration class.
        task: what a training run teaches it unless its settings say otherwise, a name in :mod:`anyadapter.training.tasks`.
        reads: the signals it needs.
        capabilities: what it supports besides attaching, training and saving: ``"scale"``, ``"merge"``, and the verbs of
            :mod:`anyadapter.compose`: ``"weighted_sum"``, ``"average"``, ``"slice_merge"``, ``"route"``.
        groups: named groups of trainable tensors, each a tuple of patterns of tensor names.
        slices: patterns of the names of tensors that hold a part for each task, language or the like, and the axis along
            which those parts lie. Tensors that match none are shared by all.
        moving: names of settings that change while it trains; each can be set on the adapter too.
    """

    Config: ClassVar[type[AdapterConfig]]
    task: ClassVar[str] = "causal_lm"
    reads: ClassVar[tuple[str, ...]] = ()
    capabilities: ClassVar[frozenset[str]] = frozenset()
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    slices: ClassVar[Mapping[str, int]] = {}
    moving: ClassVar[tuple[str, ...]] = ()
    rows: Tensor | None = None

    def __init__(self, config: AdapterConfig, host: Host) -> None:
        super().__init__()
        self.config = config
        self.name = ""  # given by attach
        self.enabled = True
        self.merged = False
        self.signals = host.signals
        # What a file says of the base; not the host itself, which a copy or a pickle of the adapter would drag along.
        self.base_class = type(host.model).__name__
        self.base_paths = tuple(host.modules)
        self.branches = nn.ModuleDict()
        self.placements: list[Placement] = []
        self.packed: dict[str, Any] = {}  # codes of matrices that are quantised and no longer trained, by name
        self.lost: dict[str, float] = {}  # of a weighted sum: the relative error of each update cut to a lower rank
        self._scale = 1.0
        self.setup(host)

    def setup(self, host: Host) -> None:
        """Create the tensors and place the branches; called once, before anything in the host changes."""
        raise NotImplementedError

    def at(self, site: Site, branch: Callable[..., Any], part: str = "") -> None:
        """Place ``branch`` at ``site``. ``part`` tells apart two modules at the same site."""
        if isinstance(branch, nn.Module):
            self.branches[escape(f"{site.path}.{part}" if part else site.path)] = branch
        self.placements.append(Placement(site.path, site.kind, branch))

    @property
    def active(self) -> bool:
        """Whether it takes part in the calls: enabled, and not already merged into the weights."""
        return self.enabled and not self.merged

    @property
    def scale(self) -> float:
        """How strongly it acts; 1 as trained."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        if "scale" not in self.capabilities:
            raise ConfigError(f"{type(self).__name__} has no scale. Turn it off with `adapter.enabled = False`.")
        self._scale = float(value)
        for branch in self.branches.values():
            branch.scale = self._scale  # type: ignore[assignment]

    def signal(self, name: str) -> Any:
        """The value of a signal for this call. Raises :class:`SignalError` when it is not set."""
        return self.signals.read(name, f"{type(self).__name__} {self.name!r}")

    def strength(self, like: Tensor) -> float | Tensor:
        """:meth:`Branch.strength`, for sites that share the adapter's own tensors."""
        return strength(self._scale, self.rows, like)

    @contextmanager
    def routed(self, rows: Tensor) -> Iterator[None]:
        """Inside the block it acts on each row of a batch with another strength, ``rows`` (batch,) times its scale."""
        parts = [self, *(branch for branch in self.branches.values() if isinstance(branch, Branch))]
        before = [part.rows for part in parts]
        try:
            for part in parts:
                part.rows = rows
            yield
        finally:
            for part, value in zip(parts, before):
                part.rows = value

    @classmethod
    def weighted_sum(
        cls, adapters: Sequence[Any], weights: Sequence[float], rank: int | None = None
    ) -> tuple[AdapterConfig, dict[str, Tensor], dict[str, float]]:
        """One adapter whose effect is the weighted sum of these; of methods with that capability.

        Returns:
            Its configuration, its tensors, and what cutting it to ``rank`` cost, by module.
        """
        raise NotImplementedError

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block the adapter is as if absent."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def tensors(self) -> dict[str, Tensor]:
        """All its tensors by name, ``<module path>.<tensor>``: what is saved. Not copies."""
        return {unescape(name): tensor for name, tensor in self.state_dict(keep_vars=True).items()}

    def values(self) -> dict[str, Tensor]:
        """:meth:`tensors`, but each as it is computed with: of a quantised matrix in training, the rounded one."""
        found = self.tensors()
        for path, module in self.named_modules(remove_duplicate=False):
            for key in getattr(module, "parametrizations", ()):
                if (name := unescape(f"{path}.{key}" if path else key)) in found:
                    found[name] = getattr(module, key)
        return found

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the values in, in place: a compiled model sees them without recompiling.

        Raises:
            ArtefactError: a key is missing or not known, or a shape differs; nothing was changed.
        """
        mine = self.tensors()
        check_tensors(mine, tensors)
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(tensors[name])

    def follow(self, config: AdapterConfig, scale: float) -> None:
        """Act as a twin with this scale does, and these values of the settings that move."""
        for name in self.moving:
            setattr(self, name, getattr(config, name))
        if scale != self.scale:
            self.scale = scale

    def train_only(self, *groups: str) -> None:
        """Make the tensors of these groups trainable and no others; with no name, all.

        Raises:
            ConfigError: no such group, or the adapter is packed.
        """
        if self.packed:
            raise ConfigError(
                f"{type(self).__name__} {self.name!r} is packed: what its codes were rounded from, and training would change, "
                "is not kept with them. Go on from a checkpoint, or from a folder saved with latents=True."
            )
        chosen = {id(parameter) for group in groups for parameter in self.group(group)}
        for parameter in self.parameters():
            parameter.requires_grad_(not groups or id(parameter) in chosen)

    def group(self, name: str) -> list[nn.Parameter]:
        """The tensors of one of its groups. Raises :class:`ConfigError` when there is no such group."""
        from fnmatch import fnmatchcase

        if name not in self.groups:
            raise ConfigError(f"{type(self).__name__} has no group {name!r}. {near(name, self.groups)}")
        patterns = self.groups[name]
        return [p for key, p in self.named_parameters() if any(fnmatchcase(unescape(key), each) for each in patterns)]

    def row_signal(self, name: str, value: Any) -> Any:
        """A signal for one row of training data, from the row's entry: a number or numbers; by default the entry itself.

        Raises:
            SignalError: it is none.
        """
        return value

    def parameter_count(self) -> int:
        """How many numbers it holds."""
        return sum(p.numel() for p in self.parameters())


def same_config(adapters: Sequence[Adapter]) -> None:
    """Raise a :class:`ConfigError` that names what differs, unless all have the same settings and scale."""
    first = adapters[0]
    for other in adapters[1:]:
        mine, theirs = ({**a.config.to_dict(), "adapter.scale": a.scale} for a in (first, other))
        differing = [f"{key} ({mine[key]!r} and {theirs[key]!r})" for key in mine if mine[key] != theirs[key]]
        if differing:
            raise ConfigError(
                f"{first.name!r} and {other.name!r} differ in {', '.join(differing)}; their tensors do not correspond."
            )


def check_tensors(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise an :class:`ArtefactError` that names every missing, unknown and mis-shaped tensor, if there is one."""
    problems = [f"missing {name} {tuple(expected[name].shape)}" for name in expected if name not in given]
    problems += [f"not known {name}. {near(name, expected, limit=1)}" for name in given if name not in expected]
    problems += [
        f"{name} is {tuple(given[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if problems:
        more = f"\n  … and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ArtefactError("The tensors do not fit this adapter:\n  " + "\n  ".join(problems[:10]) + more)


def strength(scale: float, rows: Tensor | None, like: Tensor) -> float | Tensor:
    """A scale as a factor of something of the shape of ``like``, whose first axis is the batch.

    Raises:
        SignalError: there are factors for another number of rows.
    """
    if rows is None:
        return scale
    if len(like) != len(rows):
        raise SignalError(
            f"This call's batch is routed as {len(rows)} rows, and a module inside works on {len(like)}. Beams, choices and "
            "guidance multiply the rows of a batch: repeat the routes likewise. A model that folds the tokens of a batch "
            "together, or windows or frames, cannot be routed."
        )
    return scale * rows.to(like.device).view(-1, *[1] * (like.dim() - 1))


def escape(name: str) -> str:
    """A dotted path as one key of a module dictionary, which allows neither dots nor the names of its own methods."""
    return "/" + name.replace(".", "/")


def unescape(name: str) -> str:
    """The inverse of :func:`escape`, also for the name of a tensor in a branch: no prefix, plain dots.

    A parameter that torch computes from another one (``parametrizations.weight.original``) keeps its name (``weight``).
    """
    name = re.sub(r"parametrizations\.([^.]+)\.original$", r"\1", name)
    return name.removeprefix("branches.").removeprefix("/").replace("/", ".")
