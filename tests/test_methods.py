"""SimCLR, BYOL and SupCon against their formulas, and what holds of mixing in one forward."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lightly.loss import NTXentLoss
from support import Stage
from torch import Tensor, nn

from ssl_gradmix import GradMix
from ssl_gradmix.adaptive import Adaptive
from ssl_gradmix.losses import nt_xent, supcon
from ssl_gradmix.methods import BYOL, METHODS, Method, SupCon

LABELS = torch.tensor([0, 0, 1, 1, -1, 2])


def method(name: str, **kwargs) -> Method:
    torch.manual_seed(0)
    return METHODS[name](Stage(), 8, hidden_dim=16, output_dim=6, **kwargs)


def views(number: int, count: int = 6) -> list[Tensor]:
    draws = torch.Generator().manual_seed(7)
    return list(torch.rand(number, count, 3, 16, 16, generator=draws))


def cosine_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """BYOL's squared distance of unit vectors, mean over the batch."""
    p, t = (nn.functional.normalize(each, dim=1) for each in (predicted, target))
    return (p - t).square().sum(1).mean()


def test_simclr_is_lightlys_loss_of_the_projected_views() -> None:
    simclr, given = method("simclr", temperature=0.2, weight=0.7), views(3)
    other = copy.deepcopy(simclr)
    z0, z1, z2 = other.projector(other.backbone(torch.cat(given))).chunk(3)
    criterion = NTXentLoss(0.2)
    loss, metrics = simclr(given)
    torch.testing.assert_close(metrics["loss_views"], criterion(z0, z1).detach())
    torch.testing.assert_close(metrics["loss_mixed"], criterion(z2, z1).detach())
    torch.testing.assert_close(loss, criterion(z0, z1) + 0.7 * criterion(z2, z1))
    assert metrics["lam"] == 1


def test_byol_compares_predictions_with_the_target_networks_other_view() -> None:
    byol, given = method("byol", weight=0.7), views(3)
    assert isinstance(byol, BYOL)
    for parameter in byol.target_backbone.parameters():  # a target network unlike the online one
        parameter.data.mul_(1.5).add_(0.1)
    other = copy.deepcopy(byol)
    p = other.predictor(other.projector(other.backbone(torch.cat(given)))).chunk(3)
    t = other.target_projector(other.target_backbone(torch.cat(given[:2]))).chunk(2)
    pair = cosine_distance(p[0], t[1]) + cosine_distance(p[1], t[0])
    third = cosine_distance(p[2], t[0]) + cosine_distance(p[2], t[1])
    loss, metrics = byol(given)
    torch.testing.assert_close(metrics["loss_views"], pair.detach())
    torch.testing.assert_close(metrics["loss_mixed"], third.detach())
    torch.testing.assert_close(loss, pair + 0.7 * third)


def test_the_target_network_follows_a_cosine_momentum_and_gets_no_gradient() -> None:
    byol = method("byol", momentum=0.9)
    assert isinstance(byol, BYOL)
    for parameter in byol.backbone.parameters():
        parameter.data.add_(1.0)
    online = next(byol.backbone.parameters()).clone()
    for step, steps in ((0, 100), (25, 100), (99, 100)):
        before = next(byol.target_backbone.parameters()).clone()
        byol.update_target(step, steps)
        momentum = 1 - 0.1 * (1 + math.cos(math.pi * step / (steps - 1))) / 2
        after = next(byol.target_backbone.parameters()).data
        torch.testing.assert_close(after, momentum * before + (1 - momentum) * online)
    byol(views(2))[0].backward()
    for part in (byol.target_backbone, byol.target_projector):
        assert all(parameter.grad is None for parameter in part.parameters())


@pytest.mark.parametrize("mixed_labels", [False, True])
def test_supcon_weighs_labels_and_views(mixed_labels: bool) -> None:
    weights = {"supervised": 0.5, "self_supervised": 2.0}
    net = method("supcon", temperature=0.3, mixed_labels=mixed_labels, **weights)
    given = views(3)
    z0, z1, z2 = net.projector(net.backbone(torch.cat(given))).chunk(3)
    loss, metrics = net(given, LABELS)
    labels = supcon(z0, z1, LABELS, 0.3)
    if mixed_labels:  # lam is 1 for a plain third view
        labels = labels + supcon(z2, z1, LABELS, 0.3)
    torch.testing.assert_close(metrics["loss_supervised"], labels.detach())
    unlabeled = nt_xent(z0, z1, 0.3) + nt_xent(z2, z1, 0.3)
    torch.testing.assert_close(loss, 0.5 * labels + 2.0 * unlabeled)


def test_supcon_attributes_the_loss_without_labels() -> None:
    given = views(2)
    torch.manual_seed(0)
    net = SupCon(Stage(), 8, 16, 6, 0.3, GradMix(layers=["stage"]), supervised=3.0)
    activation = net.backbone.stage(torch.cat(given)).detach().requires_grad_()
    z0, z1 = net.projector(activation.mean((2, 3))).chunk(2)
    mixer = GradMix(layers=["layer"])
    expected = mixer.attribute(given[0], nt_xent(z0, z1, 0.3), {"layer": [activation]})
    maps = net.mixed_views(given, LABELS).attribution
    torch.testing.assert_close(maps, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_the_mixed_view_takes_the_place_of_a_plain_third_view(name: str) -> None:
    """The same losses as without GradMix, had it been given the mixed images."""
    mixing = method(name, gradmix=GradMix(layers=["stage"])).eval()
    torch.manual_seed(3)
    mixed = mixing.mixed_views(views(2), LABELS)
    torch.manual_seed(3)
    loss, metrics = mixing(views(2), LABELS)
    _, expected = method(name).eval()([*views(2), mixed.images], LABELS)
    for part in ("loss_mixed", "loss_views"):
        torch.testing.assert_close(metrics[part], expected[part])
    total = metrics["loss_views"] + mixed.lam * metrics["loss_mixed"]
    if name == "supcon":
        total = metrics["loss_supervised"] + 1.2 * total
    torch.testing.assert_close(loss.detach(), total)
    assert metrics["lam"] == mixed.lam
    assert metrics["flat"] == 0


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_is_the_pairs_and_the_third_views(name: str) -> None:
    """Attribution in the middle of the step leaves no trace in the parameters' gradients."""
    mixing = method(name, gradmix=GradMix(layers=["stage"])).eval()
    torch.manual_seed(3)
    mixed = mixing.mixed_views(views(2), LABELS)
    torch.manual_seed(3)
    mixing(views(2), LABELS)[0].backward()
    plain = method(name, **({} if name == "supcon" else {"weight": mixed.lam.item()})).eval()
    if name == "supcon":
        plain.weight = mixed.lam.item()
    plain([*views(2), mixed.images], LABELS)[0].backward()
    for (key, one), two in zip(mixing.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), key
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", METHODS)
def test_no_gradient_exists_before_backward_and_flags_stay(name: str) -> None:
    net = method(name, gradmix=GradMix(layers=["stage"]))
    net.backbone.stage[1].eval()
    training = [module.training for module in net.modules()]
    loss, metrics = net(views(2), LABELS)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert [module.training for module in net.modules()] == training
    assert all(not module._forward_hooks for module in net.modules())
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())
    loss.backward()


@pytest.mark.parametrize("name", METHODS)
def test_metrics_tell_what_there_is(name: str) -> None:
    first, second = views(2)
    plain = set(method(name)([first, second], LABELS)[1])
    own = {"loss_supervised"} if name == "supcon" else set()
    assert plain == {"loss_views", "embedding_std"} | own
    assert set(method(name)(views(3), LABELS)[1]) == plain | {"loss_mixed", "lam"}
    net = method(name, gradmix=GradMix(layers=["stage"], attribution=lambda a, g: a.sum(1))).eval()
    first[:2] = torch.nan  # of six images
    metrics = net([first, second], LABELS)[1]
    mixing = {"loss_mixed", "lam", "flat", "agreement_lost"}
    assert set(metrics) == plain | mixing
    assert metrics["flat"].item() == pytest.approx(2 / 6)
    adaptive = method(name, gradmix=GradMix(layers=["stage"]), adaptive=Adaptive())
    metrics = adaptive(views(3), LABELS)[1]
    assert set(metrics) == plain | mixing | {"mixed", "mix_probability"}
    assert metrics["mixed"] == 1


@pytest.mark.parametrize("name", METHODS)
def test_adaptive_takes_the_plain_third_view_where_nothing_is_mixed(name: str) -> None:
    net = method(name, gradmix=GradMix(layers=["stage"]), adaptive=Adaptive(floor=1e-9)).eval()
    net.adaptive.reading.fill_(0)
    _, metrics = net(views(3), LABELS)
    _, expected = method(name).eval()(views(3), LABELS)
    assert metrics["mixed"] == 0
    for part in ("loss_mixed", "loss_views", "lam"):
        torch.testing.assert_close(metrics[part], expected[part])
