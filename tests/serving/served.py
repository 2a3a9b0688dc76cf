"""What serving tests share: adapters on disk, and the single model they are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import anyadapter as aa
from anyadapter.serving.engine import Engine
from anyadapter.serving.request import Output, Request, Sampling


def save_adapter(
    model: nn.Module,
    folder: Path,
    name: str,
    config: Any,
    seed: int,
    strength: float = 1.0,
    bits: int | None = None,
    **how: Any,
) -> Path:
    """An adapter with random values, strong enough to change what the model says; with ``bits``, quantised."""
    adapter = aa.attach(model, config, f"made-{name}")
    generator = torch.Generator().manual_seed(seed)
    for tensor_name, tensor in adapter.tensors().items():
        noise = torch.randn(tensor.shape, generator=generator)
        with torch.no_grad():
            if tensor_name.endswith("ia3_l"):
                tensor.copy_(1 + 0.3 * strength * noise)
            elif tensor_name.endswith(".gate") or "adapter_query" in tensor_name:  # of a gated prefix
                tensor.copy_(noise * strength)
            elif tensor.dim() > 1:
                tensor.copy_(noise * (0.2 * strength / tensor.shape[1] ** 0.5 if is_last(tensor_name) else 0.05))
            else:
                tensor.copy_(tensor + noise * 0.02)
    if bits is not None:
        aa.quantize(adapter, bits)
    aa.save_pretrained(model, folder / name, f"made-{name}", **how)
    aa.detach(model, f"made-{name}")
    return folder / name


def is_last(name: str) -> bool:
    """Whether it is the matrix that leads back to the model's width."""
    return "lora_B" in name or "adapter_up" in name


def lora(rank: int, targets: Any = "all-linear") -> aa.LoRAConfig:
    return aa.LoRAConfig(rank=rank, alpha=rank, targets=targets)


def greedy(id: str, prompt: Any, tokens: int, **adapters: float) -> Request:
    return Request(id, tuple(prompt), adapters, Sampling(max_tokens=tokens, temperature=0, ignore_eos=True))


def run(engine: Engine, limit: int = 1000) -> dict[str, list[Output]]:
    """Step until there is no work, checking every cell's owner at each step."""
    outputs: dict[str, list[Output]] = {}
    for _ in range(limit):
        if not engine.has_work:
            return outputs
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
        engine.check_integrity()
    raise AssertionError("the engine does not come to an end")


def tokens_of(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.tokens]


@torch.no_grad()
def disagreement(model: nn.Module, prompt: Any, output: list[int]) -> float:
    """How far the likeliest token of the model as it is now stands above each token of the output, at most.

    0 means that the model would have said the same, token by token.
    """
    ids = torch.tensor([*prompt, *output])[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    said = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
    return float((logits.amax(-1) - said).max())
