"""Sites: where an adapter meets its host.

A *call* site wraps one module's ``forward(*args, **kwargs) -> out``; an *attention* site wraps the attention core
``(q, k, v, mask) -> heads`` inside one. At either, each adapter is a link of a chain: it is given the call it wraps and
the arguments, and returns the result. The first attached is innermost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

if TYPE_CHECKING:
    from anyadapter.core.adapter import Adapter

Kind = Literal["call", "attention"]


@dataclass(frozen=True)
class Site:
    """An address in a host.

    Attributes:
        path: dotted path of the module, relative to the model.
        module: the module itself.
        kind: ``"call"`` or ``"attention"``.
    """

    path: str
    module: nn.Module = field(compare=False, repr=False)
    kind: Kind = "call"

    @property
    def layer(self) -> int | None:
        """The number of the layer the site lies in: the first integer component of its path."""
        return next((int(part) for part in self.path.split(".") if part.isdigit()), None)


@dataclass(eq=False)
class Link:
    """One adapter's part at one site. ``branch(call, *args, **kwargs)`` returns the new result."""

    adapter: Adapter
    branch: Callable[..., Any]


class Chain:
    """The links round one call, innermost first."""

    def __init__(self) -> None:
        self.links: list[Link] = []

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for link in self.links:
            if link.adapter.active:
                call = partial(link.branch, call)
        return call(*args, **kwargs)


class Patch:
    """Stands as the instance attribute ``forward`` of a wrapped module; deleting it restores the class's own.

    A plain object, not a closure: a deep copy or a pickle of the model carries it along with the module it belongs to.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        # Somebody else's instance-level forward (accelerate's hooks, say) stays in place underneath.
        self.previous = module.__dict__.get("forward")
        self.base: Callable[..., Any] = self.previous or partial(type(module).forward, module)
        self.chain = Chain()
        module.forward = self  # type: ignore[method-assign, assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args and "input" in kwargs:  # torch's own layers by keyword: branches take their input by position
            args = (kwargs.pop("input"),)
        return self.chain(self.base, *args, **kwargs)

    @property
    def __signature__(self) -> Any:
        import inspect

        return inspect.signature(self.previous or partial(type(self.module).forward, self.module))

    @property
    def outermost(self) -> bool:
        """Whether the module still runs through this patch first."""
        return self.module.__dict__.get("forward") is self

    def remove(self) -> None:
        """Give the module back the forward it had."""
        del self.module.forward
        if self.previous is not None:
            self.module.forward = self.previous  # type: ignore[method-assign]
