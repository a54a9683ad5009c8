"""Parameter groups and the learning rate."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lightly.utils.lars import LARS
from timm.optim import Lars
from torch import nn

from ssl_gradmix.methods.byol import BYOL
from ssl_gradmix.settings import Optimizer
from ssl_gradmix.training import optimizers


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("lars", Lars), ("adamw", torch.optim.AdamW)])
def test_norms_and_biases_are_not_decayed_and_the_target_network_is_left_out(name: str, kind: type) -> None:
    byol = BYOL(Backbone(), 4, hidden_dim=8, output_dim=4)
    optimizer = optimizers.create(byol, Optimizer(name=name, weight_decay=0.3))
    assert type(optimizer) is kind
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for module_name, module in byol.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if module_name.startswith("target_"):
                assert id(parameter) not in decay
            else:
                plain = parameter_name == "bias" or isinstance(module, nn.GroupNorm | nn.BatchNorm1d)
                assert decay[id(parameter)] == (0.0 if plain else 0.3), f"{module_name}.{parameter_name}"


def test_lars_steps_as_lightly_s_does() -> None:
    """Its scale by the norms of weight and gradient, weights of zero, and none of it without weight decay."""
    torch.manual_seed(0)
    ours = nn.Sequential(Backbone(), nn.Linear(4, 4))
    nn.init.zeros_(ours[1].weight)
    theirs = copy.deepcopy(ours)
    one = optimizers.create(ours, Optimizer("lars", lr=2.0, weight_decay=0.1))
    groups = [
        {"params": [p for p in theirs.parameters() if (p.ndim > 1) == (decay > 0)], "weight_decay": decay}
        for decay in (0.1, 0.0)
    ]
    other = LARS(groups, lr=2.0, momentum=0.9)
    for _ in range(4):
        for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            yours.grad = mine.grad.clone()
        one.step()
        other.step()
    for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, yours)


def test_the_rate_scales_with_the_global_batch() -> None:
    assert optimizers.peak_rate(Optimizer(lr=0.3), 1024) == pytest.approx(1.2)


def test_the_rate_warms_up_and_follows_a_cosine_by_step() -> None:
    rates = [optimizers.rate(step, 100, 10, 2.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10:] == pytest.approx([1 + math.cos(math.pi * done / 90) for done in range(90)])
    assert optimizers.rate(0, 10, 0, 2.0) == 2.0
    assert optimizers.rate(4, 5, 10, 2.0) == pytest.approx(1.0)  # stopped within the warm-up
