"""Supervised contrast against its formula, and what GradMix attributes in it."""

from __future__ import annotations

import pytest
import torch
from support import Stage
from torch import Tensor

from ssl_gradmix import GradMix
from ssl_gradmix.attribution import attribute
from ssl_gradmix.methods.nt_xent import nt_xent
from ssl_gradmix.methods.supcon import SupCon, supcon

LABELS = {
    "classes": [0, 0, 1, 7, 1],
    "some without": [0, -1, 1, 0, -1],
    "one of each class": [4, 3, 2, 1, 0],
    "one class": [3, 3, 3, 3, 3],
    "one with": [-1, -1, 2, -1, -1],
}


def naive(z0: Tensor, z1: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Khosla et al. 2020, equation 2, loop by loop in float64, over the embeddings of labeled images."""
    pairs = zip(torch.cat([z0, z1]).double(), labels.repeat(2).tolist(), strict=True)
    labeled = [(row / row.norm(), label) for row, label in pairs if label >= 0]
    losses = []
    for i, (anchor, label) in enumerate(labeled):
        others = [pair for j, pair in enumerate(labeled) if j != i]
        total = sum((anchor @ other / temperature).exp() for other, _ in others)
        positives = [other for other, its in others if its == label]
        losses.append(-sum(((anchor @ p / temperature).exp() / total).log() for p in positives) / len(positives))
    return sum(losses) / len(losses)


def embeddings(count: int = 5) -> Tensor:
    return torch.randn(2, count, 7, generator=torch.Generator().manual_seed(count)).requires_grad_()


@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_equals_the_formula_and_its_gradient(labels: list[int], temperature: float) -> None:
    z, labels = embeddings(), torch.tensor(labels)
    ours, theirs = supcon(*z, labels, temperature), naive(*z, labels, temperature)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    mine, other = (torch.autograd.grad(loss, z)[0] for loss in (ours, theirs))
    torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-4)


def test_alone_in_its_class_an_image_has_its_other_view_as_in_nt_xent() -> None:
    z = embeddings()
    torch.testing.assert_close(supcon(*z, torch.arange(5), 0.2), nt_xent(*z, 0.2))


def test_without_labels_it_is_zero_and_so_is_its_gradient() -> None:
    z = embeddings()
    loss = supcon(*z, torch.full((5,), -1), 0.05)
    assert loss == 0
    assert not torch.autograd.grad(loss, z)[0].any()


def test_the_loss_weighs_labels_and_views() -> None:
    torch.manual_seed(0)
    net = SupCon(Stage(), 8, 16, 6, 0.3, supervised=0.5, self_supervised=2.0)
    views, labels = list(torch.rand(3, 5, 3, 16, 16)), torch.tensor(LABELS["some without"])
    z0, z1, z2 = net.projector(net.backbone(torch.cat(views))).chunk(3)
    losses = net(views, labels)
    supervised = naive(z0, z1, labels, 0.3).float()
    torch.testing.assert_close(losses.loss_supervised, supervised.detach())
    torch.testing.assert_close(losses.loss_views, nt_xent(z0, z1, 0.3).detach())
    torch.testing.assert_close(losses.loss_mixed, nt_xent(z2, z1, 0.3).detach())
    torch.testing.assert_close(losses.total, 0.5 * supervised + 2.0 * (nt_xent(z0, z1, 0.3) + nt_xent(z2, z1, 0.3)))
    plain = net(views[:2], labels)
    torch.testing.assert_close(plain.total.detach(), 0.5 * plain.loss_supervised + 2.0 * plain.loss_views)
    assert plain.lam == plain.loss_mixed == 0


def test_gradmix_attributes_the_loss_that_is_asked_for() -> None:
    views, labels = list(torch.rand(2, 5, 3, 16, 16)), torch.tensor(LABELS["classes"])
    maps = {}
    for which in ("self_supervised", "whole"):
        torch.manual_seed(0)
        gradmix = GradMix(layers=["stage"])
        net = SupCon(Stage(), 8, 16, 6, 0.3, gradmix, supervised=3.0, attributed_loss=which)
        activation = net.backbone.stage(torch.cat(views)).detach().requires_grad_()
        z0, z1 = net.projector(activation.mean((2, 3))).chunk(2)
        loss = 1.2 * naive(z0, z1, torch.arange(5), 0.3)  # NT-Xent: each image a class of its own
        if which == "whole":
            loss = loss + 3.0 * naive(z0, z1, labels, 0.3)
        maps[which] = net.mixed_views(views, labels).attribution
        expected = attribute(loss, {"stage": [activation]}, (16, 16), 5)
        torch.testing.assert_close(maps[which], expected, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(maps["self_supervised"], maps["whole"], atol=0.05)
