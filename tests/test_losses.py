"""Contrastive losses against their formulas, loop by loop, and lightly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lightly.loss import NTXentLoss
from torch import Tensor

from ssl_gradmix.losses import embedding_std, nt_xent, supcon

LABELS = {
    "classes": [0, 0, 1, 7, 1],
    "some unlabeled": [0, -1, 1, 0, -1],
    "one of each class": [4, 3, 2, 1, 0],
    "one class": [3, 3, 3, 3, 3],
    "one labeled": [-1, -1, 2, -1, -1],
}


def embeddings(count: int = 5) -> Tensor:
    return torch.randn(2, count, 7, generator=torch.Generator().manual_seed(count)).requires_grad_()


def naive_supcon(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Khosla et al. 2020, equation 2, over the labeled images of z (2, N, D) in float64."""
    rows = torch.nn.functional.normalize(z.double(), dim=2).flatten(0, 1)
    pairs = zip(rows, labels.repeat(2).tolist(), strict=True)
    labeled = [(row, label) for row, label in pairs if label >= 0]
    losses = []
    for i, (anchor, label) in enumerate(labeled):
        others = [pair for j, pair in enumerate(labeled) if j != i]
        total = sum((anchor @ other / temperature).exp() for other, _ in others)
        positives = [other for other, its in others if its == label]
        shares = [((anchor @ p / temperature).exp() / total).log() for p in positives]
        losses.append(-sum(shares) / len(shares))
    return sum(losses) / len(losses)


def naive_nt_xent(z: Tensor, temperature: float) -> Tensor:
    """Each image is a class of its own."""
    return naive_supcon(z, torch.arange(z.shape[1]), temperature)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("count", [2, 5])
def test_nt_xent_equals_the_formula_and_lightly(temperature: float, count: int) -> None:
    z = embeddings(count)
    ours, theirs = nt_xent(z[0], z[1], temperature), NTXentLoss(temperature)(z[0], z[1])
    assert ours.item() == pytest.approx(naive_nt_xent(z, temperature).item(), rel=1e-5)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, z)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_single_pair_has_no_negatives() -> None:
    z = torch.randn(1, 4)
    assert nt_xent(z, -z, 0.5).item() == 0


@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_supcon_equals_the_formula_and_its_gradient(labels: list[int], temperature: float) -> None:
    z, given = embeddings(), torch.tensor(labels)
    ours, theirs = supcon(z[0], z[1], given, temperature), naive_supcon(z, given, temperature)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    mine, other = (torch.autograd.grad(loss, z)[0] for loss in (ours, theirs))
    torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-4)


def test_supcon_without_labels_is_zero_and_so_is_its_gradient() -> None:
    z = embeddings()
    loss = supcon(z[0], z[1], torch.full((5,), -1), 0.05)
    assert loss == 0
    assert not torch.autograd.grad(loss, z)[0].any()


@pytest.mark.parametrize(
    "loss", [nt_xent, lambda z0, z1, t: supcon(z0, z1, torch.arange(16) // 3, t)]
)
def test_losses_are_computed_in_float32_under_autocast(loss: Callable[..., Tensor]) -> None:
    z = embeddings(16)
    expected = loss(z[0], z[1], 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        under = loss(z[0], z[1], 0.05)
    assert torch.equal(under, expected)
    gradients = [torch.autograd.grad(each, z)[0] for each in (under, expected)]
    assert torch.equal(gradients[0], gradients[1])


def test_embedding_std_is_one_on_the_sphere_and_zero_when_collapsed() -> None:
    assert embedding_std(torch.randn(5000, 64)).item() == pytest.approx(1, abs=0.02)
    assert embedding_std(torch.ones(10, 1) * torch.randn(64)).item() == pytest.approx(0, abs=1e-6)
