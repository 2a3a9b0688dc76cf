"""Adapters for frozen models: every adapter the same kind of thing.

::

    import anyadapter as aa

    adapter = aa.attach(model, aa.LoRAConfig(rank=8))   # model: any torch module, frozen, yours
    ...                                                 # train adapter.parameters()
    aa.save_pretrained(model, "my-adapter")
    aa.load(other_model, "my-adapter")
"""

from importlib import import_module
from typing import Any

from anyadapter.compose import average, routed, slice_merge, weighted_sum
from anyadapter.core.adapter import Adapter, AdapterConfig, Branch, Targets
from anyadapter.core.attach import adapters, attach, detach, disabled, merge, signals, unmerge
from anyadapter.core.catalogue import SYSTEMS, System, methods, register
from anyadapter.core.errors import (
    AnyAdapterError,
    ArtefactError,
    AttachError,
    BaseMismatchError,
    ConfigError,
    DataError,
    DivergedError,
    SignalError,
    TargetError,
)
from anyadapter.core.host import Host
from anyadapter.core.roles import ROLES, Family, register_family
from anyadapter.core.site import Site
from anyadapter.formats.native import inspect, load, push_to_hub, save_pretrained
from anyadapter.quantize import pack, quantize

__version__ = "0.1.0"

# Methods are imported when they are first asked for, with the libraries they need.
_CONFIGS = {
    "BiAdapterConfig": "anyadapter.methods.vision.bi_adapter",
    "BottleneckConfig": "anyadapter.methods.language.bottleneck",
    "GenerativeConfig": "anyadapter.methods.language.generative",
    "IA3Config": "anyadapter.methods.language.ia3",
    "IPAdapterConfig": "anyadapter.methods.image.ip_adapter",
    "LlamaAdapterConfig": "anyadapter.methods.language.llama_adapter",
    "LoRAConfig": "anyadapter.methods.language.lora",
    "MHRConfig": "anyadapter.methods.language.mhr",
    "MLKGConfig": "anyadapter.methods.language.mlkg",
    "MixDAConfig": "anyadapter.methods.language.mixda",
    "PAdapterConfig": "anyadapter.methods.language.p_adapter",
    "PrefixConfig": "anyadapter.methods.language.prefix",
    "RAFTConfig": "anyadapter.methods.language.raft",
    "RationalePredictorConfig": "anyadapter.methods.language.raft",
}


def __getattr__(name: str) -> Any:
    if name in _CONFIGS:
        return getattr(import_module(_CONFIGS[name]), name)
    raise AttributeError(f"module 'anyadapter' has no attribute {name!r}")


__all__ = [
    "ROLES",
    "SYSTEMS",
    "Adapter",
    "AdapterConfig",
    "AnyAdapterError",
    "ArtefactError",
    "AttachError",
    "BaseMismatchError",
    "Branch",
    "ConfigError",
    "DataError",
    "DivergedError",
    "Family",
    "Host",
    "SignalError",
    "Site",
    "System",
    "TargetError",
    "Targets",
    "adapters",
    "attach",
    "average",
    "detach",
    "disabled",
    "inspect",
    "load",
    "merge",
    "methods",
    "pack",
    "push_to_hub",
    "quantize",
    "register",
    "register_family",
    "routed",
    "save_pretrained",
    "signals",
    "slice_merge",
    "unmerge",
    "weighted_sum",
    *_CONFIGS,
]
