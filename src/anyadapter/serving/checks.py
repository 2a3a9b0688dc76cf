"""What the engine refuses before it begins: models that cannot run on flat tokens, adapters that cannot act together."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from anyadapter.core.errors import RequestError, TargetError
from anyadapter.core.host import Host
from anyadapter.serving.store import Registered


def check_model(model: Any, host: Host) -> None:
    """Raise a :class:`TargetError` for what is known not to work on flat tokens."""
    parameters = inspect.signature(type(model).forward).parameters
    if "position_ids" not in parameters or "attention_mask" not in parameters:
        raise TargetError(f"{host.describe()} takes no position_ids; its positions cannot be told apart in one batch.")
    config: Any = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise TargetError(
            f"{host.describe()} has layers of {', '.join(sorted(kinds))}, which the engine does not know."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise TargetError(f"The rotary embedding {kind!r} depends on what else is in the batch; it cannot be served.")


def check_combination(adapters: list[Registered], weights: list[float]) -> None:
    """Raise a :class:`RequestError` unless these adapters can act together with these weights."""
    for adapter, weight in zip(adapters, weights):
        if not np.isfinite(weight) or abs(weight) > 100:
            raise RequestError(f"The weight of {adapter.name!r} is {weight}; it must be from -100 to 100.", "adapters")
        if len(adapters) > 1 and not adapter.packing.sums:
            raise RequestError(f"{adapter.name!r} is no LoRA; only LoRAs can be combined in one request.", "adapters")
        if weight != 1 and adapter.packing.prefix:
            raise RequestError(
                f"{adapter.name!r} is a prefix, which has no strength; its weight must be 1.", "adapters"
            )


def end_tokens(model: Any) -> frozenset[int]:
    """The model's own ends of text."""
    for config in (getattr(model, "generation_config", None), model.config):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return frozenset(eos if isinstance(eos, (list, tuple)) else [eos])
    return frozenset()
