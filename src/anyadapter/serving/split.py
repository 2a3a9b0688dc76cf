"""A model divided among processes by its own plan, and how the processes talk.

transformers reduces inside a divided module's ``forward``, where no branch can see the partial sum. Here a divided linear is a
plain one that holds its part, and the all-reduce is a forward hook, which runs after all branches.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anyadapter.core.attention import key_heads
from anyadapter.core.errors import AnyAdapterError, ArtefactError, TargetError
from anyadapter.core.fingerprint import fingerprint
from anyadapter.core.host import Host

SPLIT = ("colwise", "rowwise")  # the styles of a plan that are done here; each divides this dimension of the weight
LEFT = ("replicated_with_grad_allreduce", "replicate", "embedding_rowwise", "colwise_gather_output", "colwise_rep")
FOREVER = timedelta(days=3650)  # an idle server waits for its next request
PATIENCE = timedelta(seconds=10)  # in which a pass that fails in all processes has failed in the last of them

T = TypeVar("T")


class LostError(AnyAdapterError, ConnectionError):
    """The model's processes no longer do the same: one is gone, or has failed where the others have not. None can go on."""


all_gather = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)  # its name since and before torch 2.13


class Split:
    """A model that is divided among the processes of ``torch.distributed``, and how they talk.

    Args:
        model: the same in every process: whole, or as transformers loads it under ``DistributedConfig(tp_plan="auto")``,
            each process its own part. Its linears are replaced by their parts.

    Attributes:
        styles: how each divided linear is divided, by path.
        whole: the undivided model, on the meta device.
        traffic: bytes this process has sent for the base and for adapters, as a ring of processes would send them.
        place: how many tensors have been exchanged so far.
        lost: these processes no longer do the same; all that talks raises a :class:`LostError`.

    Raises:
        TargetError: the model has no plan, one that is not known here, or parts that do not divide evenly. Nothing has changed.
    """

    def __init__(self, model: Any) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.traffic: Counter[str] = Counter()
        self.place, self.lost = 0, False
        host = Host.of(model)
        self.styles = styles_of(model, host)
        check_divisible(host, self.styles, self.size)
        self.fingerprint = fingerprint(host)
        with torch.device("meta"):
            self.whole = Host.of(type(model)(model.config))
        for path, style in self.styles.items():
            self.divide(host.modules[path], style)
        self.control = dist.new_group(backend="gloo", timeout=FOREVER)
        self.failures = dist.new_group(backend="gloo", timeout=PATIENCE)

    def divide(self, linear: Any, style: str) -> None:
        """Replace a linear's weight and bias by this process's part."""
        if hasattr(linear.weight, "to_local"):
            linear.__dict__.pop("forward", None)  # transformers' own way of running it
        dim = SPLIT.index(style)
        linear.weight = nn.Parameter(self.part(linear.weight, dim), requires_grad=False)
        if style == "colwise":
            linear.out_features //= self.size
            if linear.bias is not None:
                linear.bias = nn.Parameter(self.part(linear.bias, 0), requires_grad=False)
            return
        linear.in_features //= self.size
        if linear.bias is not None:  # once in the sum
            bias = linear.bias.to_local() if hasattr(linear.bias, "to_local") else linear.bias
            linear.bias = nn.Parameter(bias.detach(), requires_grad=False) if self.rank == 0 else None
        linear.register_forward_hook(self.sum)

    def part(self, tensor: Any, dim: int) -> Tensor:
        """This process's part of a parameter."""
        if hasattr(tensor, "to_local"):
            return tensor.to_local().detach()
        width = tensor.shape[dim] // self.size
        return tensor.detach().narrow(dim, self.rank * width, width).clone()

    @contextmanager
    def talking(self) -> Iterator[None]:
        if self.lost:
            raise LostError("The model's processes no longer do the same; start them all again.")
        try:
            yield
        except RuntimeError as error:
            self.lost = True
            raise LostError(
                f"Another of the model's processes does not answer; start them all again. ({error})"
            ) from error

    # ------------------------------------------------------------------ tensors

    def sum(self, module: nn.Module, args: Any, partial_sum: Tensor) -> Tensor:
        """Behind a row-wise linear and its branches."""
        return self.reduce(partial_sum, "base")

    def reduce(self, x: Tensor, what: str) -> Tensor:
        """The sum over all processes, in place."""
        with self.talking():
            dist.all_reduce(x)
        self.place += 1
        self.traffic[what] += 2 * x.nbytes * (self.size - 1) // self.size
        return x

    def gather(self, x: Tensor, what: str) -> Tensor:
        """(n,) of each process, one after the other."""
        out = x.new_empty(self.size * len(x))
        with self.talking():
            all_gather(out, x)
        self.place += 1
        self.traffic[what] += x.nbytes * (self.size - 1)
        return out

    # ------------------------------------------------------------------ agreement

    def agree(self, action: Callable[[], T]) -> T:
        """Do something in every process, without talking; when it fails in one, it fails in all.

        Raises:
            Exception: what the action raised here.
            ArtefactError: it has failed in another process only.
        """
        result, error = None, None
        try:
            result = action()
        except Exception as mine:
            error = mine
        failures = torch.tensor([float(error is not None)])
        with self.talking():
            dist.all_reduce(failures, group=self.control)
        if error is not None:
            raise error
        if failures.item():
            raise ArtefactError("Another of the model's processes could not do its part; its log says why.")
        return result  # type: ignore[return-value]

    def check_same(self, error: Exception) -> None:
        """After an error between two exchanges of tensors: whether the others have met the same one there.

        Those that have not are waiting for this process's next tensor, so that nothing can be agreed with them.

        Raises:
            LostError: they have not, or have not said so within ``PATIENCE``.
        """
        mine = torch.tensor([self.place, isinstance(error, torch.OutOfMemoryError)])
        found = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            with self.talking():
                dist.all_gather(found, mine, group=self.failures)
            same = all(other.equal(mine) for other in found)
        except LostError:
            same = False
        if not same:
            raise self.lose(error) from error

    def lose(self, error: Exception) -> LostError:
        """What to raise after an error that the others do not know of; this process does not talk to them again."""
        self.lost = True
        return LostError(
            f"This process has failed where others have not ({type(error).__name__}); start them all again."
        )

    def spread(self, x: Tensor) -> None:
        """Give all processes what the first one has in a tensor on the CPU."""
        with self.talking():
            dist.broadcast(x, 0, group=self.control)

    def share(self, data: Any = None) -> Any:
        """The first process's data, in every process; JSON, as what comes over a wire must not be able to run code."""
        size = torch.zeros(1, dtype=torch.int64)
        text = torch.empty(0, dtype=torch.uint8)
        if self.rank == 0:
            text = torch.frombuffer(bytearray(json.dumps(data).encode()), dtype=torch.uint8)
            size[0] = len(text)
        self.spread(size)
        if self.rank != 0:
            text = torch.empty(int(size), dtype=torch.uint8)
        self.spread(text)
        return json.loads(bytes(text.numpy())) if self.rank != 0 else data


def styles_of(model: Any, host: Host) -> dict[str, str]:
    """The divided linears and their styles, by path. Raises :class:`TargetError` for plans not known here."""
    plan = getattr(model, "tp_plan", None) or {}
    found = {}
    for path in dict.fromkeys([*host.modules, *(name for name, _ in model.named_parameters())]):
        style = plan.get(re.sub(r"(?<=\.)\d+(?=\.)", "*", path))
        if style is None or style in LEFT:
            continue
        if style not in SPLIT or type(host.modules.get(path)) is not nn.Linear:
            raise TargetError(
                f"The plan of {host.describe()} divides {path} as {style!r}; known are plain linears as {' or '.join(SPLIT)}."
            )
        found[path] = style
    if not found:
        raise TargetError(f"{host.describe()} has no plan for tensor parallelism (tp_plan); serve replicas instead.")
    return found


def check_divisible(host: Host, styles: dict[str, str], size: int) -> None:
    """Raise a :class:`TargetError` where ``size`` processes cannot have equal parts."""
    for site in host.find("self_attention", kind="attention"):
        heads, _ = key_heads(site.module)
        if heads % size:
            raise TargetError(
                f"{site.path} has {heads} heads of keys and values, which {size} processes cannot share evenly. Use a number "
                f"of processes that divides {heads}, or replicas."
            )
    for path, style in styles.items():
        linear: Any = host.modules[path]
        width = linear.weight.shape[SPLIT.index(style)]
        if width % size:
            raise TargetError(f"{path} has {width} columns to share among {size} processes, which is not even.")
