"""Optimizers with their parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from lightly.models.utils import get_weight_decay_parameters
from timm.optim import Lars
from torch import nn

from ssl_gradmix.settings import Optimizer

REFERENCE_BATCH = 256
"""Learning rates are given for so many images a global batch and scaled (Goyal et al. 2017, arXiv 1706.02677)."""


def create(method: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """An optimizer over what requires a gradient, with no weight decay on norms and biases."""
    modules = [module for module in method.children() if any(p.requires_grad for p in module.parameters())]
    decayed, plain = get_weight_decay_parameters(modules)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr)
    if settings.name == "lars":
        return Lars(groups, lr=settings.lr, momentum=0.9)  # timm's: lightly's reads two norms of every weight
    return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9)


def peak_rate(settings: Optimizer, batch_size: int) -> float:
    """The highest learning rate of the training: `lr * batch_size / 256`."""
    return settings.lr * batch_size / REFERENCE_BATCH


def rate(step: int, steps: int, warmup: float, peak: float) -> float:
    """Learning rate of optimizer step `step` of `steps`: linear to `peak` over `warmup` steps, then a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / math.ceil(warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
