"""Poly and MHR: many tasks share an inventory of small LoRAs, and each task learns how to mix them.

Caccia et al. 2023, arXiv 2211.03831: multi-head routing, with MHR-z and MHR-μ for few examples of a new task. With
``splits=1`` it is Poly, that is Polytropon (Ponti et al. 2022, arXiv 2202.13914).

Tasks are told by the signal ``task_ids``, one for each row of a batch, or one for all::

    with anyadapter.signals(model, task_ids=["rte", "cb", "rte"]):
        model(**batch)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import RelaxedBernoulli

from anyadapter.core.adapter import Adapter, AdapterConfig, Branch, Targets
from anyadapter.core.errors import ConfigError, SignalError, TargetError, near
from anyadapter.core.host import Host, features, is_linear
from anyadapter.methods.language.lora import LoRAConfig
from anyadapter.parts.routing import GRANULARITIES, discreteness, efficiency, groups_of, sparsity

EPS = 1e-12  # added to the sum that weights are divided by
NOISE = 1e-3  # Z starts uniform in ± this: every skill has nearly the same weight
GAIN = math.sqrt(2 / (1 + 5))  # lora_a starts uniform in ± GAIN / √in
SELECTORS = ("learned", "average", "private")
WEIGHTS = ("sigmoid", "relaxed", "straight-through", "l2")


@dataclass(frozen=True, kw_only=True)
class MHRConfig(AdapterConfig):
    """Settings of Poly and MHR.

    Attributes:
        tasks: their names, in the order of the rows of Z.
        rank: width r of each skill, a LoRA.
        alpha: numerator of the scaling, alpha / r.
        skills: number K of skills in the inventory.
        splits: number S of heads, into which inputs and outputs are cut; each has a mixture of its own. It divides the
            widths of all targets. 1 is Poly.
        selector: ``"learned"``; ``"average"``, where all skills have the weight 1 / K and tasks are not told apart (MHR-μ);
            or ``"private"``, where each task has a skill of its own and K is the number of tasks.
        granularity: what shares a selector: ``"linear"`` (nothing), the linears of a ``"sublayer"``, a ``"layer"``, a
            ``"stack"`` of layers such as the encoder, or the whole ``"model"``.
        weights: how Z becomes weights: ``"sigmoid"``; ``"relaxed"``, in training drawn from a relaxed Bernoulli of
            temperature 1; ``"straight-through"``, rounded to 0 or 1 with the sigmoid's gradient; or ``"l2"``, Z over its norm.
        dropout: probability, on the weights.
        shared_skill: the last skill is on for every task.
        normalise: divide the weights of a head by their sum; otherwise multiply them by √(S / K).
        uniformity: how far learned weights are on their way to 1 / K, from 0 to 1; see :attr:`MHR.uniformity`.
        official: as in the authors' code, dropout acts outside training too, and private skills are mixed up: B of a row has
            lines of other rows' tasks.
        targets: linears to adapt.
        exclude: targets to leave out.
        layers: indices of the layers to adapt; all by default, negative from the last.
    """

    method: ClassVar[str] = "mhr"
    tasks: tuple[str, ...] = ()
    rank: int = 1
    alpha: float = 1.0
    skills: int = 8
    splits: int = 16
    selector: str = "learned"
    granularity: str = "linear"
    weights: str = "sigmoid"
    dropout: float = 0.0
    shared_skill: bool = False
    normalise: bool = True
    uniformity: float = 0.0
    official: bool = False
    targets: Targets = "all-linear"
    exclude: Targets = ()
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        names = isinstance(self.tasks, tuple) and all(isinstance(task, str) and task for task in self.tasks)
        self.require("tasks", names and len(set(self.tasks)) == len(self.tasks), "a tuple of different names")
        for name in ("rank", "skills", "splits"):
            value = getattr(self, name)
            self.require(name, isinstance(value, int) and value >= 1, "a positive integer")
        self.require("alpha", math.isfinite(self.alpha), "finite")
        for name, known in (("selector", SELECTORS), ("granularity", GRANULARITIES), ("weights", WEIGHTS)):
            self.require(name, getattr(self, name) in known, f"one of {', '.join(map(repr, known))}")
        self.require("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        self.require("uniformity", 0 <= self.uniformity <= 1, "from 0 to 1")
        average, private = self.selector == "average", self.selector == "private"
        self.require("tasks", bool(self.tasks) or average, "the names of the tasks")
        self.require("tasks", not (self.tasks and average), "left out: an average does not tell tasks apart")
        self.require("skills", not private or self.skills == len(self.tasks), "the number of tasks: each has its own")
        shaped = self.shared_skill or not self.normalise or self.dropout > 0
        self.require("weights", self.weights != "l2" or not shaped, "another where dropout and the like are set")
        self.require("splits", not (private and self.official) or self.splits == 1, "1 for official private skills")
        plain = self.weights == "sigmoid" and not shaped
        learned = self.selector == "learned"
        self.require("selector", learned or plain, "'learned' where the weights are shaped")
        self.require("uniformity", learned or self.uniformity == 0, "0 where the weights are not learned")


@dataclass(frozen=True)
class Tasks:
    """The tasks of a batch whose rows some calls see several times, one after the other: beams, or answers to choose from.

    The encoder of a text-to-text model sees the rows of ``ids``, its decoder ``copies`` of each.
    """

    ids: Tensor | Sequence[str | int]
    copies: int


class MHR(Adapter):
    """y = W x + (alpha / r) · B_τᵀ A_τᵀ x, where A_τ and B_τ are mixtures of the inventory for the task τ of the row.

    A is mixed head by head along the input, B along the output, each by itself before their product (card, section 4).
    A fresh adapter changes nothing. The weights are computed in fp32, whatever the dtype of the base.

    :meth:`with_task`, :meth:`to_average`, :meth:`with_splits` and :meth:`collapse` make a new adapter of what this one
    computes with: its scale is in the new alpha, and what was quantised is dense, with the rounded values.
    """

    Config = MHRConfig
    reads: ClassVar[tuple[str, ...]] = ("task_ids",)
    capabilities = frozenset({"scale", "average", "slice_merge", "route"})
    groups = {"routing": ("*.module_logits",), "inventory": ("*.lora_a", "*.lora_b")}
    slices = {"*.module_logits": 0}  # a row for each task; the inventory is shared
    moving = ("uniformity",)
    config: MHRConfig

    def setup(self, host: Host) -> None:
        config = self.config
        sites = host.find(config.targets, exclude=config.exclude, layers=config.layers)
        keys = groups_of(host, [site.path for site in sites], config.granularity)
        selectors: dict[str, Selector] = {}
        for site in sites:
            check_widths(config, site.path, site.module)
            key = keys[site.path]
            if key not in selectors:
                selectors[key] = Selector(config)
            self.at(site, Routed(site.module, config, selectors[key], self.ids))
        if config.selector == "private":
            self.slices = {"*.lora_a": 1, "*.lora_b": 1}  # type: ignore[misc]  # a skill for each task
        if config.selector == "average":
            self.reads, self.slices = (), {}  # type: ignore[misc]
            self.capabilities = self.capabilities - {"slice_merge"}  # type: ignore[misc]  # tasks are not told apart
        self.checked: Tensor | None = None

    # ------------------------------------------------------------------ tasks

    def ids(self, x: Tensor) -> Tensor:
        """The row of Z for each row of ``x``, (batch,); (1,) where one task was given for all of them.

        Raises:
            SignalError: it is not set, has another number of rows, or a task is not known.
        """
        if not self.reads:
            return torch.zeros(1, dtype=torch.long, device=x.device)
        given, copies = self.signal("task_ids"), 1
        if isinstance(given, Tasks):
            given, copies = given.ids, given.copies
        ids = self.numbers(given).to(x.device)
        if ids.dim() == 0:
            return ids[None]
        if len(ids) == len(x):
            return ids
        if len(ids) * copies == len(x):
            return ids.repeat_interleave(copies)
        raise SignalError(
            f"MHR {self.name!r}: there are {len(ids)} task_ids, and a module inside works on {len(x)} rows. Give one for each "
            "row or one for all; where beams or choices multiply the rows, give Tasks(ids, copies=...)."
        )

    def numbers(self, given: Tensor | str | int | Iterable[str | int]) -> Tensor:
        """Tasks by name or number as rows of Z. A tensor is checked when it is first seen, not at every linear."""
        if isinstance(given, Tensor):
            if given is not self.checked:
                if given.is_floating_point() or given.dim() > 1:
                    raise SignalError(
                        f"MHR {self.name!r}: task_ids are {given.dtype} of shape {tuple(given.shape)}; expected integers, "
                        "(batch,)."
                    )
                for number in {int(given.min()), int(given.max())} if given.numel() else ():
                    self.number(number)
                self.checked = given
            return given
        if isinstance(given, (str, int)):
            return torch.tensor(self.number(given))
        return torch.tensor([self.number(task) for task in given], dtype=torch.long)

    def number(self, task: str | int) -> int:
        """The row of Z of one task. Raises :class:`SignalError` when there is no such task."""
        tasks = self.config.tasks
        if isinstance(task, str) and task in tasks:
            return tasks.index(task)
        if isinstance(task, int) and 0 <= task < len(tasks):
            return task
        hint = near(task, tasks) if isinstance(task, str) else f"There are {len(tasks)}: {', '.join(tasks[:20])}."
        raise SignalError(f"MHR {self.name!r} has no task {task!r}. {hint} Add one with with_task().")

    def row_signal(self, name: str, value: Any) -> Any:
        """A row of data may name its task."""
        return self.number(value) if isinstance(value, (str, int)) else value

    # ------------------------------------------------------------------ tensors

    def tensors(self) -> dict[str, Tensor]:
        """All its tensors by name. A shared selector is there once, under the first of its linears."""
        every = super().tensors()
        return {name: every[name] for name in dict.fromkeys(self.aliases().values())}

    def aliases(self) -> dict[str, str]:
        """Every name of a tensor -> the one under which :meth:`tensors` has it."""
        first: dict[int, str] = {}
        return {name: first.setdefault(id(tensor), name) for name, tensor in super().tensors().items()}

    def routed_branches(self) -> dict[str, Routed]:
        """The branches by the path of their linear."""
        return {p.path: p.branch for p in self.placements if isinstance(p.branch, Routed)}

    # ------------------------------------------------------------------ from many tasks to one

    def with_task(self, name: str, init: str = "fresh", *, alone: bool = False) -> tuple[MHRConfig, dict[str, Tensor]]:
        """Settings and tensors with a new task, for ``attach(model, config).load_tensors(tensors)``.

        To adapt to few examples, take it alone, and train everything (MHR) or ``train_only("routing")`` (MHR-z).

        Args:
            init: of its row of Z: ``"fresh"``, nearly uniform; ``"uniform"``; or ``"copy:<task>"``.
            alone: leave the other tasks' rows out.

        Raises:
            ConfigError: the selector is not learned, the name is taken, or there is no such start.
        """
        if self.config.selector != "learned":
            raise ConfigError(f"A selector that is {self.config.selector!r} has no rows to add a task to.")
        known = () if alone else self.config.tasks
        if name in known:
            raise ConfigError(f"There is a task {name!r} already.")
        config, tensors = replace(self.config, tasks=(*known, name), alpha=self.config.alpha * self.scale), {}
        for key, tensor in self.values().items():
            tensors[key] = tensor.detach().clone()
            if key.endswith(".module_logits"):
                row = self.first_row(tensors[key], init)
                tensors[key] = row if alone else torch.cat([tensors[key], row])
        return config, tensors

    def first_row(self, logits: Tensor, init: str) -> Tensor:
        """(1, S · K): how a new task starts."""
        kind, _, task = init.partition(":")
        if kind == "copy" and task in self.config.tasks:
            return logits[self.config.tasks.index(task)][None].clone()
        if init == "fresh":
            return torch.empty_like(logits[:1]).uniform_(-NOISE, NOISE)
        if init == "uniform":
            return torch.zeros_like(logits[:1])
        raise ConfigError(
            f"A new task starts 'fresh', 'uniform' or 'copy:<task>', not {init!r}. {near(task, self.config.tasks)}"
        )

    def to_average(self) -> tuple[MHRConfig, dict[str, Tensor]]:
        """Settings and tensors of MHR-μ: the same inventory, and every skill with the weight 1 / K."""
        config = replace(
            self.config,
            selector="average",
            tasks=(),
            alpha=self.config.alpha * self.scale,
            weights="sigmoid",
            dropout=0.0,
            shared_skill=False,
            normalise=True,
            uniformity=0.0,
        )
        return config, {k: t.detach().clone() for k, t in self.values().items() if not k.endswith(".module_logits")}

    def with_splits(self, splits: int) -> tuple[MHRConfig, dict[str, Tensor]]:
        """Settings and tensors with more heads and the same function: Poly as a start for MHR.

        Raises:
            ConfigError: it is no multiple of the heads there are, or the weights depend on how many there are.
        """
        if splits % self.config.splits or not self.config.normalise:
            raise ConfigError(
                f"{self.config.splits} heads can be cut into a multiple, with normalise=True, not {splits}."
            )
        parts, alpha = splits // self.config.splits, self.config.alpha * self.scale
        config, tensors = replace(self.config, splits=splits, alpha=alpha), {}
        for path, branch in self.routed_branches().items():
            check_widths(config, path, nn.Linear(*branch.widths, device="meta"))
        for key, tensor in self.values().items():
            if key.endswith(".module_logits"):
                heads = tensor.detach().unflatten(1, (self.config.splits, self.config.skills))
                tensors[key] = heads.repeat_interleave(parts, dim=1).flatten(1)
            else:
                axis = 2 if key.endswith(".lora_a") else 3
                cut = tensor.detach().unflatten(axis, (parts, tensor.shape[axis] // parts))
                tensors[key] = cut.movedim(axis, 1).flatten(0, 1).clone()
        return config, tensors

    def collapse(self, task: str | int | None = None) -> tuple[LoRAConfig, dict[str, Tensor]]:
        """Settings and tensors of the plain LoRA that one task's mixture is: it merges, exports and is served as any other.

        Args:
            task: by name or number; none for an average.

        Raises:
            SignalError: no such task.
            ConfigError: no task was named, and there are several.
        """
        if task is None and len(self.config.tasks) > 1:
            raise ConfigError(f"Name the task to collapse to. {near('', self.config.tasks)}")
        row = torch.tensor([self.number(task if task is not None else 0) if self.config.tasks else 0])
        config = LoRAConfig(
            rank=self.config.rank,
            alpha=self.config.alpha * self.scale,
            targets=self.config.targets,
            exclude=self.config.exclude,
            layers=self.config.layers,
        )
        tensors = {}
        with torch.no_grad():
            for path, branch in self.routed_branches().items():
                a, b = branch.mix(branch.selector.settled(row.to(branch.lora_a.device)))
                tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = (
                    a[0].T.contiguous(),
                    b[0].T.contiguous(),
                )
        return config, tensors

    # ------------------------------------------------------------------ while training

    @property
    def uniformity(self) -> float:
        """How far the weights are on their way to 1 / K, from 0 to 1: α ← c α + (1 − c) / K, c = cos(π / 2 · uniformity).

        Raise it from 0 to 1 over the last steps of the training on many tasks where :meth:`to_average` is to follow. It is one
        of the settings, so that an adapter that was saved on the way computes the same when it is loaded.
        """
        return self.config.uniformity

    @uniformity.setter
    def uniformity(self, value: float) -> None:
        self.config = replace(self.config, uniformity=float(value))
        for branch in self.routed_branches().values():
            branch.selector.config = self.config

    def monitor(self, part: str = "") -> dict[str, float]:
        """Means of :func:`discreteness`, :func:`sparsity` and :func:`efficiency` over the learned selectors.

        Args:
            part: of those alone whose names begin so, such as ``"encoder."``.
        """
        chosen = {name: tensor for name, tensor in self.values().items() if name.startswith(part)}
        logits = [tensor.detach().float() for name, tensor in chosen.items() if name.endswith(".module_logits")]
        measures = (discreteness, sparsity, efficiency)
        return {m.__name__: sum(map(m, logits)) / len(logits) for m in measures if logits}


class Selector(nn.Module):
    """The weights of K skills in S heads, for each task.

    ``module_logits`` Z is (tasks, S · K) where they are learned, and stays in fp32 when the rest is cast.
    """

    def __init__(self, config: MHRConfig) -> None:
        super().__init__()
        self.config = config
        if config.selector == "learned":
            start = torch.empty(len(config.tasks), config.splits * config.skills).uniform_(-NOISE, NOISE)
            self.module_logits = nn.Parameter(start)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Devices change, the dtype does not: first steps of 1e-3 would vanish in 16 bits."""

        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(kept, recurse)

    @property
    def by_row(self) -> bool:
        """Whether rows of one task get different weights: drawn at random, or mixed up."""
        drawn = self.training and (self.config.weights == "relaxed" or self.config.dropout > 0)
        return drawn or (self.config.official and (self.config.dropout > 0 or self.mixes_up))

    @property
    def mixes_up(self) -> bool:
        """Whether to reproduce the authors' order of B's lines."""
        return self.config.official and self.config.selector == "private"

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (batch,) → α: (batch, S, K)."""
        return self.weights(ids, self.training, self.training or self.config.official)

    def settled(self, ids: Tensor) -> Tensor:
        """α without noise."""
        return self.weights(ids, training=False, dropping=False)

    def weights(self, ids: Tensor, training: bool, dropping: bool) -> Tensor:
        """α from Z: weights, dropout, shared skill, then normalised, in the authors' order (card, section 4)."""
        config, shape = self.config, (len(ids), self.config.splits, self.config.skills)
        if config.selector == "average":
            return torch.full(shape, 1 / config.skills, device=ids.device)
        if config.selector == "private":
            return F.one_hot(ids, config.skills).float()[:, None].expand(shape)
        z = self.module_logits[ids].view(shape)
        if config.weights == "l2":
            return self.blend(F.normalize(z, dim=-1))
        if config.weights == "relaxed" and training:
            alpha = RelaxedBernoulli(torch.ones((), device=z.device), logits=z).rsample()
        else:
            alpha = z.sigmoid()
            if config.weights == "straight-through":
                alpha = alpha + (alpha.round() - alpha).detach()
        alpha = F.dropout(alpha, config.dropout, dropping)
        if config.shared_skill:
            alpha = torch.cat([alpha[..., :-1], torch.ones_like(alpha[..., -1:])], dim=-1)
        if config.normalise:
            return self.blend(alpha / (alpha.sum(dim=-1, keepdim=True) + EPS))
        return self.blend(alpha * math.sqrt(config.splits / config.skills))

    def blend(self, alpha: Tensor) -> Tensor:
        """α on its way to 1 / K."""
        if self.config.uniformity == 0:
            return alpha
        kept = math.cos(math.pi / 2 * self.config.uniformity)
        return kept * alpha + (1 - kept) / self.config.skills


class Routed(Branch):
    """The inventory of one linear: ``lora_a`` (S, K, in / S, r) and ``lora_b`` (S, K, r, out / S), and its selector."""

    def __init__(
        self, module: nn.Module, config: MHRConfig, selector: Selector, ids: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.widths, r, bound = features(module), config.rank, GAIN / math.sqrt(features(module)[0])
        width_in, width_out = (width // config.splits for width in self.widths)
        self.lora_a = nn.Parameter(torch.empty(config.splits, config.skills, width_in, r).uniform_(-bound, bound))
        self.lora_b = nn.Parameter(torch.zeros(config.splits, config.skills, r, width_out))
        self.selector = selector
        self.scaling = config.alpha / r
        self.ids = ids

    def forward(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """x: (batch, …, in) → (batch, …, out)."""
        out = call(x)
        ids = self.ids(x)
        a, b = self.mix(self.selector(ids.expand(len(x)) if self.selector.by_row else ids))
        if self.selector.mixes_up:
            b = b.transpose(0, 1).reshape(b.shape)
        rows = x.to(a.dtype).reshape(len(a), -1, x.shape[-1])
        delta = (rows @ a @ b).view_as(out)
        return (out + delta * (self.scaling * self.strength(out))).to(out.dtype)

    def mix(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """α: (n, S, K) → A: (n, in, r), and B: (n, r, out)."""
        alpha = alpha.to(self.lora_a.dtype)
        a = torch.einsum("nsk,skir->nsir", alpha, self.lora_a)
        b = torch.einsum("nsk,skro->nrso", alpha, self.lora_b)
        return a.flatten(1, 2), b.flatten(2, 3)


def check_widths(config: MHRConfig, path: str, module: nn.Module) -> None:
    """Raise unless a target is a linear whose widths the heads divide, and no narrower than the rank."""
    if not is_linear(module):
        raise TargetError(f"{path} is a {type(module).__name__}; this adapter wraps linears.")
    widths = features(module)
    even = all(width % config.splits == 0 for width in widths)
    config.require("splits", even, f"a divisor of {widths[0]} and {widths[1]}, the widths of {path} (or exclude it)")
    config.require("rank", config.rank <= max(widths), f"at most {max(widths)}, the width of {path}")
