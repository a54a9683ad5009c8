"""SimCLR and BYOL against their formulas, and the invariants of mixing inside one forward, SupCon's too."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lightly.loss import NTXentLoss
from support import Stage
from torch import Tensor, nn

from ssl_gradmix import GradMix
from ssl_gradmix.methods.byol import BYOL
from ssl_gradmix.methods.losses import embedding_std
from ssl_gradmix.methods.simclr import SimCLR
from ssl_gradmix.methods.supcon import SupCon

METHODS = {
    "simclr": lambda **kwargs: SimCLR(Stage(), 8, hidden_dim=16, output_dim=6, **kwargs),
    "byol": lambda **kwargs: BYOL(Stage(), 8, hidden_dim=16, output_dim=6, **kwargs),
    "supcon": lambda **kwargs: SupCon(Stage(), 8, hidden_dim=16, output_dim=6, **kwargs),
}
LABELS = torch.tensor([0, 0, 1, 1, -1, 2])


def method(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return METHODS[name](**kwargs)


def views(number: int, count: int = 6) -> list[Tensor]:
    return list(torch.rand(number, count, 3, 16, 16, generator=torch.Generator().manual_seed(7)))


def cosine_distance(predicted: Tensor, target: Tensor) -> float:
    """BYOL's squared distance of unit vectors, mean over the batch, image by image."""
    return sum(
        float((p / p.norm() - t / t.norm()).square().sum()) for p, t in zip(predicted.detach(), target, strict=True)
    ) / len(predicted)


def test_simclr_is_lightlys_loss_of_the_projected_views() -> None:
    simclr, (x0, x1, x2) = method("simclr", temperature=0.2, weight=0.7), views(3)
    z0, z1, z2 = copy.deepcopy(simclr.projector)(copy.deepcopy(simclr.backbone)(torch.cat([x0, x1, x2]))).chunk(3)
    criterion = NTXentLoss(0.2)
    losses = simclr([x0, x1, x2])
    torch.testing.assert_close(losses.loss_views, criterion(z0, z1).detach())
    torch.testing.assert_close(losses.loss_mixed, criterion(z2, z1).detach())
    torch.testing.assert_close(losses.total, criterion(z0, z1) + 0.7 * criterion(z2, z1))
    assert losses.lam == 1


def test_byol_compares_predictions_with_the_target_networks_other_view() -> None:
    byol, (x0, x1, x2) = method("byol", weight=0.7), views(3)
    for parameter in byol.target_backbone.parameters():  # a target network unlike the online one
        parameter.data.mul_(1.5).add_(0.1)
    other = copy.deepcopy(byol)
    p0, p1, p2 = other.predictor(other.projector(other.backbone(torch.cat([x0, x1, x2])))).chunk(3)
    t0, t1 = other.target_projector(other.target_backbone(torch.cat([x0, x1]))).chunk(2)
    expected = cosine_distance(p0, t1) + cosine_distance(p1, t0)
    third = cosine_distance(p2, t0) + cosine_distance(p2, t1)
    losses = byol([x0, x1, x2])
    assert losses.loss_views.item() == pytest.approx(expected, rel=1e-4)
    assert losses.loss_mixed.item() == pytest.approx(third, rel=1e-4)
    assert losses.total.item() == pytest.approx(expected + 0.7 * third, rel=1e-4)


def test_the_target_network_follows_a_cosine_momentum_and_gets_no_gradient() -> None:
    byol = method("byol", momentum=0.9)
    for parameter in byol.backbone.parameters():
        parameter.data.add_(1.0)
    online, target = (next(net.parameters()).clone() for net in (byol.backbone, byol.target_backbone))
    for step, steps in ((0, 100), (25, 100), (99, 100)):
        before = next(byol.target_backbone.parameters()).clone()
        byol.update_target(step, steps)
        momentum = 1 - 0.1 * (1 + math.cos(math.pi * step / (steps - 1))) / 2
        torch.testing.assert_close(
            next(byol.target_backbone.parameters()).data, momentum * before + (1 - momentum) * online
        )
    assert not torch.equal(target, next(byol.target_backbone.parameters()))
    byol(views(2)).total.backward()
    assert all(
        parameter.grad is None
        for parameter in [*byol.target_backbone.parameters(), *byol.target_projector.parameters()]
    )


@pytest.mark.parametrize("name", METHODS)
def test_mixing_adds_the_mixed_views_loss_and_leaves_the_two_views_gradient(name: str) -> None:
    """With weight 0 the gradient is the plain method's, bit for bit: the attribution leaves no trace."""
    factor = {"self_supervised": 0.0} if name == "supcon" else {"weight": 0.0}
    plain, mixing = method(name, **factor), method(name, gradmix=GradMix(layers=["stage"]), **factor)
    for each in (plain, mixing):
        each.eval()  # or the mixed pass would move BatchNorm's statistics
        each(views(2), LABELS).total.backward()
    for (name_, one), two in zip(plain.named_parameters(), mixing.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, two.grad, msg=name_)


def test_byols_gradient_is_that_of_one_graph() -> None:
    """Though the pair is differentiated before the mixed view exists."""
    byol = method("byol", gradmix=GradMix(layers=["stage"]), weight=0.7).double()
    x0, x1 = (view.double() for view in views(2))
    other = copy.deepcopy(byol)
    torch.manual_seed(3)
    mixed = copy.deepcopy(byol).mixed_views([x0, x1])
    torch.manual_seed(3)
    byol([x0, x1]).total.backward()

    t0, t1 = other.target_projector(other.target_backbone(torch.cat([x0, x1]))).float().chunk(2)
    p0, p1 = other.predictor(other.projector(other.backbone(torch.cat([x0, x1])))).float().chunk(2)
    p2 = other.predictor(other.projector(other.backbone(mixed.images))).float()
    similarity = torch.cosine_similarity
    loss = 4 - 2 * similarity(p0, t1).mean() - 2 * similarity(p1, t0).mean()
    loss = loss + 0.7 * mixed.lam * (4 - 2 * similarity(p2, t0).mean() - 2 * similarity(p2, t1).mean())
    loss.backward()
    for (name, one), two in zip(byol.named_parameters(), other.parameters(), strict=True):
        assert one.requires_grad == (one.grad is not None), name
        if one.requires_grad:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-7, msg=name)
    assert all(map(torch.equal, byol.buffers(), other.buffers()))


@pytest.mark.parametrize("name", METHODS)
def test_the_mixed_view_is_the_third_view(name: str) -> None:
    """The same loss as the control's, had it been given the mixed images as its third view."""
    mixing, control = method(name, gradmix=GradMix(layers=["stage"])).eval(), method(name).eval()
    torch.manual_seed(3)
    mixed = mixing.mixed_views(views(2), LABELS)
    torch.manual_seed(3)
    losses = mixing(views(2), LABELS)
    expected = control([*views(2), mixed.images], LABELS)
    torch.testing.assert_close(losses.loss_mixed, expected.loss_mixed)
    torch.testing.assert_close(losses.loss_views, expected.loss_views)
    total = losses.loss_views + mixed.lam * losses.loss_mixed
    if name == "supcon":
        total = losses.loss_supervised + 1.2 * total
    torch.testing.assert_close(losses.total, total)
    assert losses.lam == mixed.lam
    assert losses.flat == 0


@pytest.mark.parametrize("name", METHODS)
def test_the_share_of_flat_maps_is_told(name: str) -> None:
    net = method(name, gradmix=GradMix(layers=["stage"])).eval()
    net.gradmix.attribution = lambda activation, gradient: activation.sum(1)
    first, second = views(2)
    first[:2] = torch.nan  # of six images
    assert net([first, second], LABELS).flat.item() == pytest.approx(2 / 6)
    assert method(name)(views(3), LABELS).flat == 0


@pytest.mark.parametrize("name", METHODS)
def test_no_gradient_exists_before_backward_and_flags_stay(name: str) -> None:
    net = method(name, gradmix=GradMix(layers=["stage"]))
    net.backbone.stage[1].eval()
    training = [module.training for module in net.modules()]
    losses = net(views(2), LABELS)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert [module.training for module in net.modules()] == training
    assert all(not module._forward_hooks for module in net.modules())
    losses.total.backward()


def test_embedding_std_is_one_on_the_sphere_and_zero_when_collapsed() -> None:
    assert embedding_std(torch.randn(5000, 64)).item() == pytest.approx(1, abs=0.02)
    assert embedding_std(torch.ones(10, 1) * torch.randn(64)).item() == pytest.approx(0, abs=1e-6)
