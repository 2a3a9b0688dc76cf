"""An adapter of every method, on a model of its own, for tests that all of them have to pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from families import case
from generated import SMALL
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

import anyadapter as aa

IDS = torch.arange(14).reshape(2, 7)
METHODS = {
    "lora": aa.LoRAConfig(rank=3, dropout=0.1),
    "ia3": aa.IA3Config(),
    "bottleneck": aa.BottleneckConfig(width=5, bias=True, scaling="learned"),
    "houlsby": aa.BottleneckConfig(placement="houlsby", reduction=4),
    "prefix": aa.PrefixConfig(tokens=3),
    "projected": aa.PrefixConfig(tokens=3, projection=6),
    "llama_adapter": aa.LlamaAdapterConfig(length=3),
}


def model() -> nn.Module:
    return case("llama").build().requires_grad_(False).eval()


def attached(m: nn.Module, config: aa.AdapterConfig, std: float | None = 0.3) -> aa.Adapter:
    torch.manual_seed(3)
    adapter = aa.attach(m, config)
    for parameter in adapter.parameters() if std else ():
        nn.init.normal_(parameter, std=std)
    return adapter


@torch.no_grad()
def logits(m: nn.Module) -> Tensor:
    return m(input_ids=IDS).logits


# What a method runs on, where it is not the tiny LLaMA and a text: (model, adapter) -> the outputs it changes.
Run = Callable[[nn.Module, Any], Tensor]
BERT = BertConfig(
    vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


def text(m: nn.Module, adapter: Any) -> Tensor:
    return m(input_ids=IDS).logits


def text_of_two_tasks(m: nn.Module, adapter: Any) -> Tensor:
    with aa.signals(m, task_ids=[1, 0]):
        return text(m, adapter)


def text_after_a_context(m: nn.Module, adapter: Any) -> Tensor:
    with aa.signals(m, sees=torch.tensor([[0, 0], [1, 0]]), context_mask=torch.tensor([[1] * 7, [0] * 7])):
        return text(m, adapter)


def reasons(m: nn.Module, adapter: Any) -> Tensor:
    out: Any = m(input_ids=IDS)
    return torch.cat([out.label_logits, out.target_probs, out.rationale_logits.flatten(1)], dim=1)


def text_with_reasons(m: nn.Module, adapter: Any) -> Tensor:
    with aa.signals(m, rationale_logits=torch.stack([IDS, -IDS], dim=-1) / 5):
        return text(m, adapter)


def image(m: nn.Module, adapter: Any) -> Tensor:
    return case("vit").output(m(**case("vit").inputs(m, 2)))


def drawing(m: nn.Module, adapter: Any) -> Tensor:
    embeds = torch.linspace(-1, 1, 24).view(2, 12)
    with aa.signals(m, image_tokens=adapter.tokens(embeds)):
        return case("sd15").output(m(**case("sd15").inputs(m, 2)))


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return make()

    return build


@dataclass(frozen=True)
class Subject:
    """An adapter, the model it is for, and a run of both."""

    config: aa.AdapterConfig
    build: Callable[[], nn.Module] = case("llama").build
    run: Run = text

    def model(self) -> nn.Module:
        return self.build().requires_grad_(False).eval()

    @torch.no_grad()
    def outputs(self, m: nn.Module) -> Tensor:
        return self.run(m, aa.adapters(m)["default"])


SUBJECTS = {name: Subject(config) for name, config in METHODS.items()} | {
    "mhr": Subject(
        aa.MHRConfig(tasks=("a", "b"), rank=2, skills=3, splits=4, granularity="layer"), run=text_of_two_tasks
    ),
    "generative": Subject(aa.GenerativeConfig(**SMALL), run=text_after_a_context),
    "p_adapter": Subject(aa.PAdapterConfig(), case("bert").build),
    "mixda": Subject(aa.MixDAConfig(layers=(0, 1), gate_width=6, task_adapter="pfeiffer"), case("bert").build),
    "mlkg": Subject(aa.MLKGConfig(reduction=4), case("bert").build),
    "rationale_predictor": Subject(
        aa.RationalePredictorConfig(targets=("a", "b"), whole="embeddings", rank=2),
        seeded(lambda: BertModel(BERT)),
        reasons,
    ),
    "raft": Subject(
        aa.RAFTConfig(heads=4, whole="bert.pooler", rank=2),
        seeded(lambda: BertForSequenceClassification(BERT)),
        text_with_reasons,
    ),
    "bi_adapter": Subject(
        aa.BiAdapterConfig(hidden=4, bits=32, head_classes=3, head_bits=32), case("vit").build, image
    ),
    "ip_adapter": Subject(aa.IPAdapterConfig(image_width=12), case("sd15").build, drawing),
}

# What the layouts of others hold may be another form of a method.
FORMS = SUBJECTS | {
    "poly": Subject(
        aa.MHRConfig(tasks=("0", "1"), rank=2, skills=3, splits=4, weights="relaxed"), run=text_of_two_tasks
    ),
    "domains": Subject(aa.MixDAConfig(layers=(0, 1), gate_width=6), case("bert").build),
    "series": Subject(aa.BottleneckConfig(width=5)),
}
