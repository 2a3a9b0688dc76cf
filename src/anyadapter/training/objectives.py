"""Losses of published training recipes, where they differ from a model's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def label_smoothed_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.1) -> Tensor:
    """The loss of SuperNI: cross-entropy with smoothed labels, summed over tokens, over the number of ROWS.

    Args:
        logits: (batch, tokens, vocabulary).
        labels: (batch, tokens); −100 is not learnt.
    """
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing, reduction="sum")
    return total / len(labels)


def choice_loss(logits: Tensor, labels: Tensor, right: Tensor) -> Tensor:
    """The loss of T0's few-shot tasks (T-Few, Liu et al. 2022): likelihood of the right answer, unlikelihood of the others'
    tokens, and cross-entropy over all answers' mean log-likelihoods.

    Args:
        logits: (batch, choices, tokens, vocabulary).
        labels: (batch, choices, tokens); −100 is padding.
        right: (batch,), the number of the right choice.
    """
    real = labels >= 0
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * real
    scores = picked.sum(-1) / real.sum(-1).clamp(min=1)
    wrong = real & (torch.arange(labels.shape[1], device=labels.device) != right[:, None])[..., None]
    unlikely = -torch.log1p(-picked.exp().clamp(max=1 - 1e-6))[wrong].sum() / wrong.sum().clamp(min=1)
    chosen = picked[torch.arange(len(right), device=right.device), right]
    likely = -chosen.sum() / real[torch.arange(len(right), device=right.device), right].sum()
    return likely + unlikely + F.cross_entropy(scores, right)
