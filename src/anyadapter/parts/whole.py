"""A module of the base trained as a whole: a copy of it runs in its place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anyadapter.core.adapter import Adapter, Branch, Targets
from anyadapter.core.errors import AttachError, ConfigError
from anyadapter.core.host import Host


class Whole(Branch):
    """y = copy(x). The copy starts equal, so that a fresh one changes nothing; the base's own stays as it is."""

    replaces = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.whole = copy.deepcopy(module).requires_grad_(True)

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the module takes and gives; it is computed in the copy's dtype."""
        given = next((x.dtype for x in (*args, *kwargs.values()) if _is_float(x)), None)
        own = next(self.whole.parameters()).dtype
        if given is None or given == own:
            return self.whole(*args, **kwargs)
        args = tuple(x.to(own) if _is_float(x) else x for x in args)
        out = self.whole(*args, **{k: x.to(own) if _is_float(x) else x for k, x in kwargs.items()})
        return out.to(given)

    def weight_delta(self, module: nn.Module) -> Tensor:
        """The difference of the two weights."""
        return self.whole.weight.float() - module.weight.float()  # type: ignore[operator]

    def bias_delta(self, module: nn.Module) -> Tensor | None:
        """The difference of the two biases."""
        if getattr(module, "bias", None) is None:
            return None
        return self.whole.bias.float() - module.bias.float()  # type: ignore[operator]


def place_whole(adapter: Adapter, host: Host, targets: Targets) -> tuple[str, ...]:
    """Put a :class:`Whole` at each target; return their paths.

    Raises:
        AttachError: an earlier adapter wraps something inside, which a copy cannot share.
    """
    sites = host.find(targets) if targets else []
    for site in sites:
        wrapped = next((path for path in host.patches if within(path, (site.path,))), None)
        if wrapped is not None:
            raise AttachError(
                f"{site.path} is to be trained as a whole, but an earlier adapter wraps {wrapped}. Attach this one first, "
                "or exclude the module there."
            )
        adapter.at(site, Whole(site.module))
    return tuple(site.path for site in sites)


def average_whole(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted average of the modules that adapters train as a whole, by tensor name.

    Raises:
        ConfigError: they are not the same modules, or the weights do not sum to 1: there is no zero to add a module to.
    """
    paths = [{p.path for p in adapter.placements if isinstance(p.branch, Whole)} for adapter in adapters]
    if any(other != paths[0] for other in paths):
        raise ConfigError(
            f"{adapters[0].name!r} trains {sorted(paths[0]) or 'no module'} as a whole, the others do not train the same."
        )
    if paths[0] and abs(sum(weights) - 1) > 1e-6:
        raise ConfigError(
            f"{', '.join(sorted(paths[0]))} is trained as a whole: such copies can be averaged, with weights that sum to 1, not "
            f"added; these sum to {sum(weights):g}."
        )
    values = [adapter.values() for adapter in adapters]
    names = [name for name in values[0] if any(name.startswith(f"{path}.whole.") for path in paths[0])]
    return {name: torch.stack([w * v[name].detach().float() for w, v in zip(weights, values)]).sum(0) for name in names}


def within(path: str, paths: tuple[str, ...]) -> bool:
    """Whether a module is one of these or inside one."""
    return any(path == outer or path.startswith(f"{outer}.") for outer in paths)


def _is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()
