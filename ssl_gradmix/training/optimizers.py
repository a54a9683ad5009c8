"""Optimizers with their parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat
from lightly.models.utils import get_weight_decay_parameters
from timm.optim import Lars
from torch import nn

REFERENCE_BATCH = 256
"""Learning rates are for a global batch of this size and scaled linearly (Goyal et al. 2017,
arXiv 1706.02677)."""


@dataclass
class Optimizer:
    """How weights are updated.

    Args:
        name: `sgd` (momentum 0.9), `lars` (momentum 0.9) or `adamw`.
        lr: Learning rate for a global batch of 256 images; it is scaled by batch_size / 256.
        weight_decay: Weight decay. Norms and biases are not decayed.
        warmup_epochs: Epochs of linear warm-up from 0, before a cosine decay to 0.
        clip: Largest gradient norm; null does not clip.
    """

    name: Literal["sgd", "lars", "adamw"] = "sgd"
    lr: PositiveFloat = 0.2
    weight_decay: NonNegativeFloat = 5e-4
    warmup_epochs: NonNegativeFloat = 3.0
    clip: PositiveFloat | None = None


def create(method: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """Creates an optimizer of all parameters that require a gradient."""
    modules = [m for m in method.children() if any(p.requires_grad for p in m.parameters())]
    decayed, plain = get_weight_decay_parameters(modules)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr)
    if settings.name == "lars":
        # lightly's LARS reads two norms of every weight from the device at each step.
        return Lars(groups, lr=settings.lr, momentum=0.9)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9)


def peak_rate(settings: Optimizer, batch_size: int) -> float:
    """The highest learning rate of the training, `lr * batch_size / 256`."""
    return settings.lr * batch_size / REFERENCE_BATCH


def rate(step: int, steps: int, warmup: float, peak: float) -> float:
    """Learning rate of a step: linear to `peak` over `warmup` steps, then a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / math.ceil(warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
