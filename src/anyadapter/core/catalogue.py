"""The catalogue: the methods one can attach, and the 28 published systems with their true status.

A *method* is an :class:`~anyadapter.core.adapter.Adapter` under a name; a *system* is a paper, built of one or several.
"""

from __future__ import annotations

import dataclasses
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal

from anyadapter.core.adapter import Adapter, AdapterConfig
from anyadapter.core.errors import ConfigError, near

_METHODS: dict[str, str | type[Adapter]] = {
    "lora": "anyadapter.methods.language.lora:LoRA",
    "ia3": "anyadapter.methods.language.ia3:IA3",
    "bottleneck": "anyadapter.methods.language.bottleneck:Bottleneck",
    "prefix": "anyadapter.methods.language.prefix:Prefix",
    "llama_adapter": "anyadapter.methods.language.llama_adapter:LlamaAdapter",
    "p_adapter": "anyadapter.methods.language.p_adapter:PAdapter",
    "mixda": "anyadapter.methods.language.mixda:MixDA",
    "mhr": "anyadapter.methods.language.mhr:MHR",
    "mlkg": "anyadapter.methods.language.mlkg:MLKG",
    "generative": "anyadapter.methods.language.generative:Generative",
    "rationale_predictor": "anyadapter.methods.language.raft:RationalePredictor",
    "raft": "anyadapter.methods.language.raft:RAFT",
    "bi_adapter": "anyadapter.methods.vision.bi_adapter:BiAdapter",
    "ip_adapter": "anyadapter.methods.image.ip_adapter:IPAdapter",
}


def register(cls: type[Adapter]) -> type[Adapter]:
    """Class decorator: make a method known under ``cls.Config.method``.

    Packages can do without it by an entry point in the group ``anyadapter.methods``.

    Raises:
        ConfigError: the name is taken by another class.
    """
    name = cls.Config.method
    taken = _METHODS.get(name)
    if taken is not None and (taken if isinstance(taken, str) else _address(taken)) != _address(cls):
        raise ConfigError(f"The method name {name!r} is taken by {taken}.")
    _METHODS[name] = cls
    return cls


def methods() -> list[str]:
    """The names of all methods, those of installed plug-ins included."""
    return sorted({*_METHODS, *(e.name for e in entry_points(group="anyadapter.methods"))})


def method(name: str) -> type[Adapter]:
    """The class of a method, imported now.

    Raises:
        ConfigError: no such method; the message names near ones.
    """
    found = _METHODS.get(name)
    if found is None:
        plugin = next((e for e in entry_points(group="anyadapter.methods") if e.name == name), None)
        if plugin is None:
            raise ConfigError(f"There is no method {name!r}. {near(name, methods())}")
        return plugin.load()
    if isinstance(found, str):
        module, _, cls = found.partition(":")
        found = getattr(import_module(module), cls)
    return found


def method_of(config: AdapterConfig) -> type[Adapter]:
    """The class that a configuration configures. Raises :class:`ConfigError` when it is not one of ours."""
    if not isinstance(config, AdapterConfig):
        raise ConfigError(f"Expected an adapter configuration such as LoRAConfig(rank=8), not {type(config).__name__}.")
    return method(config.method)


def config_from_dict(values: dict[str, Any]) -> AdapterConfig:
    """A configuration from plain values; ``values["method"]`` names the method."""
    if "method" not in values:
        raise ConfigError(f"An adapter's settings need a 'method'. {near('', methods())}")
    return method(values["method"]).Config.from_dict({k: v for k, v in values.items() if k != "method"})


def _address(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


Status = Literal["planned", "partial", "implemented"]


@dataclasses.dataclass(frozen=True)
class System:
    """One published system.

    Attributes:
        slug: short name, also of its golden fixtures.
        system: the name its authors gave it.
        modality: what kind of base it adapts.
        status: ``implemented`` only with golden tests, an example and a docs page; ``partial`` where some variants run.
        methods: the methods it is built of, or serves, as far as they exist.
        hosts: the families it was tested on.
        note: what a user must know of the status.
    """

    slug: str
    system: str
    modality: str
    status: Status = "planned"
    methods: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    note: str = ""

    @property
    def supports(self) -> dict[str, list[str]]:
        """What each of its methods can do besides being attached, trained, saved and stacked."""
        return {name: sorted(method(name).capabilities) for name in self.methods}

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON values."""
        return {**dataclasses.asdict(self), "supports": self.supports}


SYSTEMS: tuple[System, ...] = (
    System(
        "llm-adapters",
        "LLM-Adapters",
        "language",
        status="implemented",
        methods=("lora", "bottleneck", "prefix"),
        hosts=("llama", "bloom", "gptj", "opt", "gpt_neo"),
    ),
    System(
        "llama-adapter-v2",
        "LLaMA-Adapter V2",
        "language",
        status="implemented",
        methods=("llama_adapter",),
        hosts=("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "opt", "gptj", "gpt_neo"),
        note="V1 and V2; V1's gated prefixes are served",
    ),
    System(
        "p-adapters",
        "P-Adapters",
        "language",
        status="implemented",
        methods=("p_adapter",),
        hosts=("bert", "roberta", "distilbert", "llama", "t5"),
        note="not served: it rewrites whole queries of models that fill gaps",
    ),
    System(
        "mixda",
        "MixDA",
        "language",
        status="implemented",
        methods=("mixda",),
        hosts=("bert", "roberta", "distilbert", "vit", "gpt2", "llama"),
        note="models that generate take the gate of the paper only",
    ),
    System(
        "mlkg-adapters",
        "Multilingual knowledge adapters",
        "language",
        status="implemented",
        methods=("mlkg", "bottleneck"),
        hosts=("bert", "roberta", "xlm-roberta"),
        note="tried on an English encoder only; the published adapters were not available",
    ),
    System(
        "mhr",
        "Poly / Multi-Head Routing",
        "language",
        status="implemented",
        methods=("mhr",),
        hosts=("t5", "bart", "bert", "gpt2", "gptj", "llama"),
    ),
    System(
        "generative-adapter",
        "GenerativeAdapter",
        "language",
        status="implemented",
        methods=("generative",),
        hosts=(
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "gpt2",
            "gptj",
            "gpt_neo",
            "opt",
            "bloom",
        ),
        note="contexts to adapters, states and LoRA folders",
    ),
    System(
        "raft",
        "RAFT",
        "language",
        status="implemented",
        methods=("rationale_predictor", "raft"),
        hosts=("bert", "roberta", "distilbert"),
        note="not tried on HateXplain and the published weights",
    ),
    System(
        "s-lora",
        "S-LoRA",
        "serving",
        status="implemented",
        methods=("lora", "ia3", "bottleneck", "prefix", "llama_adapter"),
        hosts=("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gptj", "opt"),
        note="an engine and a server for adapters of these methods; not yet run on a GPU",
    ),
    System(
        "binary-adapters",
        "Bi-Adapters",
        "vision and language",
        status="implemented",
        methods=("bi_adapter",),
        hosts=("vit",),
        note="adapters of every other method are quantised by anyadapter.quantize; only its LoRA form merges",
    ),
    System("iaa", "Inner-Adaptor Architecture", "vision-language"),
    System("vl-adapter", "VL-Adapter", "vision-language"),
    System("caps-adapter", "CapS-Adapter", "vision-language"),
    System("tem-adapter", "Tem-Adapter", "vision-language"),
    System(
        "ip-adapter",
        "IP-Adapter",
        "image",
        status="partial",
        methods=("ip_adapter",),
        hosts=("UNet2DConditionModel",),
        note="the base variant",
    ),
    System("story-adapter", "Story-Adapter", "image"),
    System("dp-adapter", "DP-Adapter", "image"),
    System("unic-adapter", "UNIC-Adapter", "image"),
    System("sur-adapter", "SUR-adapter", "image"),
    System("spm", "SPM", "image"),
    System("tryon-adapter", "TryOn-Adapter", "image"),
    System("i2v-adapter", "I2V-Adapter", "video"),
    System("ctrl-adapter", "Ctrl-Adapter", "video"),
    System("ge-adapter", "GE-Adapter", "video"),
    System("mv-adapter", "MV-Adapter", "multi-view"),
    System("3dsam-adapter", "3DSAM-adapter", "medical vision"),
    System("label-shift-adapter", "Label Shift Adapter", "vision"),
    System("lda-asr", "Language-Dependent Adapters", "speech"),
)
