"""NT-Xent against its formula and against lightly."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from lightly.loss import NTXentLoss

from ssl_gradmix.methods.nt_xent import nt_xent
from ssl_gradmix.methods.supcon import supcon


def naive(z0: torch.Tensor, z1: torch.Tensor, temperature: float) -> float:
    z = [row / row.norm() for row in torch.cat([z0, z1]).detach().double()]
    count, total = len(z), 0.0
    for i in range(count):
        partner = (i + count // 2) % count
        others = sum(math.exp(float(z[i] @ z[k]) / temperature) for k in range(count) if k != i)
        total -= math.log(math.exp(float(z[i] @ z[partner]) / temperature) / others)
    return total / count


@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("count", [2, 5])
def test_equals_the_formula_and_lightly(temperature: float, count: int) -> None:
    z0, z1 = torch.randn(2, count, 7, generator=torch.Generator().manual_seed(count)).requires_grad_()
    ours, theirs = nt_xent(z0, z1, temperature), NTXentLoss(temperature)(z0, z1)
    assert ours.item() == pytest.approx(naive(z0, z1, temperature), rel=1e-5)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(torch.autograd.grad(ours, [z0, z1]), torch.autograd.grad(theirs, [z0, z1]), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("loss", [nt_xent, lambda z0, z1, t: supcon(z0, z1, torch.arange(16) // 3, t)])
def test_autocast_takes_nothing_from_its_precision(loss: Callable[..., torch.Tensor]) -> None:
    z = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = loss(*z, 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        under = loss(*z, 0.05)
    assert torch.equal(under, expected)
    assert torch.equal(torch.autograd.grad(under, z)[0], torch.autograd.grad(expected, z)[0])


def test_a_single_pair_has_no_negatives() -> None:
    z = torch.randn(1, 4)
    assert nt_xent(z, -z, 0.5).item() == 0
