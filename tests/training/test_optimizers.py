"""Parameter groups, update rules, and the learning rate."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lightly.utils.lars import LARS
from timm.optim import Lars
from torch import nn

from ssl_gradmix.methods import BYOL
from ssl_gradmix.training import optimizers
from ssl_gradmix.training.optimizers import Optimizer


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("lars", Lars), ("adamw", torch.optim.AdamW)]
)
def test_norms_and_biases_are_not_decayed_and_the_target_is_left_out(name: str, kind: type) -> None:
    byol = BYOL(Backbone(), 4, hidden_dim=8, output_dim=4)
    optimizer = optimizers.create(byol, Optimizer(name=name, weight_decay=0.3))
    assert type(optimizer) is kind
    groups = optimizer.param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for module_name, module in byol.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if module_name.startswith("target_"):
                assert id(parameter) not in decay
            else:
                norm = isinstance(module, nn.GroupNorm | nn.BatchNorm1d)
                plain = parameter_name == "bias" or norm
                assert decay[id(parameter)] == (0.0 if plain else 0.3)


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_step_equals_another_implementation(name: str) -> None:
    """SGD with momentum by hand; LARS by lightly, weights of zero included."""
    torch.manual_seed(0)
    ours = nn.Sequential(Backbone(), nn.Linear(4, 4))
    nn.init.zeros_(ours[1].weight)
    theirs = copy.deepcopy(ours)
    optimizer = optimizers.create(ours, Optimizer(name, lr=2.0, weight_decay=0.1))
    decayed = [p for p in theirs.parameters() if p.ndim > 1]
    plain = [p for p in theirs.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    lars = LARS(groups, lr=2.0, momentum=0.9)
    velocity = {p: torch.zeros_like(p) for p in theirs.parameters()}
    for _ in range(4):
        for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            yours.grad = mine.grad.clone()
            if name == "sgd":
                decay = 0.1 * yours.detach() if yours.ndim > 1 else 0
                velocity[yours] = 0.9 * velocity[yours] + yours.grad + decay
                yours.data -= 2.0 * velocity[yours]
        optimizer.step()
        if name == "lars":
            lars.step()
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()))


def test_rate_scales_with_the_global_batch() -> None:
    assert optimizers.peak_rate(Optimizer(lr=0.3), 1024) == pytest.approx(1.2)


def test_rate_warms_up_and_follows_a_cosine() -> None:
    rates = [optimizers.rate(step, 100, 10, 2.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10:] == pytest.approx([1 + math.cos(math.pi * t / 90) for t in range(90)])
    assert optimizers.rate(0, 10, 0, 2.0) == 2.0
    assert optimizers.rate(4, 5, 10, 2.0) == pytest.approx(1.0)  # ends within the warm-up
