"""The view generator: what it keeps, what it replaces, and how it behaves in other people's code."""

from __future__ import annotations

import copy
import gc
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from lightly.loss import BarlowTwinsLoss, DINOLoss, NTXentLoss, VICRegLoss
from lightly.models.modules import SimCLRProjectionHead
from scipy.stats import chisquare
from support import Stage
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

from ssl_gradmix import GradMix, MixedViews
from ssl_gradmix.attribution import Observed


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def agreement_loss(z0: Tensor, z1: Tensor) -> Tensor:
    return -torch.cosine_similarity(z0, z1).mean()


def mix(gradmix: GradMix, images: Tensor, donors: Tensor | None = None, net: nn.Module | None = None) -> MixedViews:
    net = net or encoder()
    other = images.flip(3) if donors is None else donors
    with gradmix.observe(net) as observed:
        loss = agreement_loss(net(images), net(other))
    return gradmix(images, loss, observed, donors)


def test_donors_are_resized_whole_into_the_box() -> None:
    images, donors = torch.rand(2, 4, 3, 32, 32)
    mixed = mix(GradMix(layers=["1"]), images, donors)
    for i, (x0, y0, x1, y1) in enumerate(mixed.boxes.tolist()):
        expected = tv.resize(donors[mixed.donor_index[i]], [y1 - y0, x1 - x0], antialias=True)
        torch.testing.assert_close(mixed.images[i, :, y0:y1, x0:x1], expected)


def test_boxes_lie_at_the_maps_maximum() -> None:
    mixed = mix(GradMix(layers=["1"]), torch.rand(16, 3, 32, 32))
    for each, (x0, y0, x1, y1) in zip(mixed.attribution, mixed.boxes.tolist(), strict=True):
        y, x = divmod(int(each.argmax()), 32)
        assert x0 <= x < x1
        assert y0 <= y < y1
        assert (x0, x1) == (0, x1) or x1 == 32 or abs((x0 + x1) / 2 - x) <= 1
        assert (y0, y1) == (0, y1) or y1 == 32 or abs((y0 + y1) / 2 - y) <= 1


def test_finds_the_region_that_the_loss_looks_at() -> None:
    """An encoder that sees one corner alone: the agreement comes from there, and there the image is replaced."""

    class Corner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.stage(x)[:, :, 24:, :8].mean((2, 3))

    torch.manual_seed(0)
    mixed = mix(GradMix(layers=["stage"], lam_range=(0.8, 0.9)), torch.rand(8, 3, 32, 32), net=Corner())
    centers = (mixed.boxes[:, :2] + mixed.boxes[:, 2:]) / 2
    assert (centers[:, 0] < 13).all()
    assert (centers[:, 1] > 19).all()
    inside = mixed.attribution[:, 24:, :8].sum((1, 2)) / mixed.attribution.sum((1, 2))
    assert (inside > 0.7).all()


def test_targets_are_opposite_signs() -> None:
    """One channel raises the loss, the other lowers it; each target marks the places of one."""
    activation = torch.zeros(1, 2, 4, 4)
    activation[0, 0, 0, 0] = activation[0, 1, 3, 3] = 1
    activation.requires_grad_()
    loss = activation[:, 0].sum() - activation[:, 1].sum()
    peaks = {}
    for target in ("loss", "agreement"):
        gradmix = GradMix(layers=["stage"], target=target)
        mixed = gradmix(torch.rand(1, 3, 16, 16), loss, Observed({"stage": [activation]}))
        peaks[target] = divmod(int(mixed.attribution[0].argmax()), 16)
    assert peaks["loss"] == (0, 0)
    assert min(peaks["agreement"]) >= 13


@pytest.mark.parametrize("region", ["random", "center"])
def test_controls_need_neither_loss_nor_gradient(region: str) -> None:
    net, images = encoder(), torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    places = []
    for gradients in (True, False):
        gradmix = GradMix(region=region, generator=torch.Generator().manual_seed(0))
        with gradmix.observe(net) as observed, torch.set_grad_enabled(gradients):
            loss = net(images).sum()
        assert not observed
        mixed = gradmix(images, loss, observed)
        places.append(mixed.boxes)
        assert not mixed.attribution.any()
        assert not mixed.flat.any()
        assert mixed.layers == ()
    assert torch.equal(*places)


def test_the_random_region_takes_all_places_alike_and_the_central_one_the_middle() -> None:
    generator = torch.Generator().manual_seed(0)
    gradmix = GradMix(region="random", lam_range=(0.75, 0.75), generator=generator)
    boxes = mix(gradmix, torch.rand(5000, 3, 16, 16)).boxes
    assert (boxes[:, 2:] - boxes[:, :2] == 8).all()
    places = boxes[:, 1] * 9 + boxes[:, 0]  # 9 x 9 of them
    assert chisquare(places.bincount(minlength=81).numpy()).pvalue > 0.001
    central = mix(GradMix(region="center", lam_range=(0.75, 0.75)), torch.rand(1, 3, 16, 24)).boxes
    assert central.tolist() == [[6, 4, 18, 12]]


@pytest.mark.parametrize("attribution", ["layercam", "gradcam", lambda a, g: (a * g).sum(1)])
def test_a_map_that_is_nan_is_told_and_its_box_lies_anywhere(attribution: object) -> None:
    activation, scale = torch.rand(40, 2, 4, 4, requires_grad=True), torch.ones(40)
    scale[1:] = torch.nan
    loss = -(activation * scale[:, None, None, None]).square().sum()
    gradmix = GradMix(layers=["stage"], attribution=attribution, lam_range=(0.9, 0.9))
    views = gradmix(torch.rand(40, 3, 16, 16), loss, Observed({"stage": [activation]}))
    assert views.flat.tolist() == [False] + [True] * 39
    assert views.images.isfinite().all()
    assert views.attribution[0].max() == 1
    assert not views.attribution[1:].any()
    assert len(views.boxes[1:].unique(dim=0)) > 20


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("efficientnet_b0", 64, "blocks.4"),  # not blocks.5.0.bn1, inside a strided block
        ("densenet121", 64, "features.denseblock3"),  # not the norm of the transition behind it
        ("mobilevit_xxs", 64, "stages.3"),
        ("vit_tiny_patch16_224", 64, "blocks.10"),  # the last block's patch tokens do not reach the class token
        ("mixer_s32_224", 224, "blocks"),
    ],
)
def test_layers_none_takes_the_deepest_whole_stage_or_block_with_room(name: str, size: int, expected: str) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0, **({"img_size": size} if name.startswith("vit") else {}))
    assert mix(GradMix(), torch.rand(2, 3, size, size), net=net).layers == (expected,)


def test_layers_none_goes_by_the_encoder_at_hand_not_by_names() -> None:
    gradmix, images = GradMix(), torch.rand(2, 3, 64, 64)
    fine, coarse = (timm.create_model("resnet18", num_classes=0) for _ in range(2))
    coarse.conv1.stride = (4, 4)
    assert [mix(gradmix, images, net=net).layers for net in (fine, coarse, fine)] == [
        ("layer3",),
        ("layer2",),
        ("layer3",),
    ]
    assert mix(gradmix, torch.rand(2, 3, 128, 128), net=fine).layers == ("layer4",)


def test_layers_none_chooses_anew_when_the_layer_is_frozen() -> None:
    class Branches(nn.Module):
        """A shallow branch and a deep one, added up."""

        def __init__(self) -> None:
            super().__init__()
            self.shallow = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
            self.deep = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return (self.shallow(x) + self.deep(x)).mean((2, 3))

    gradmix, net = GradMix(), Branches()
    assert mix(gradmix, torch.rand(2, 3, 16, 16), net=net).layers == ("deep",)
    net.deep.requires_grad_(False)
    assert mix(gradmix, torch.rand(2, 3, 16, 16), net=net).layers == ("shallow",)


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        ((nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)), "2"),  # not what is changed in place
        ((nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU()), nn.AvgPool2d(2)), "0"),  # not a layer without parts
        # and not a stage that is too coarse, as VGG's one is
        ([nn.Sequential(*[part for _ in range(4) for part in (nn.Conv2d(3, 3, 3, 2, 1), nn.ReLU())])], "0.5"),
    ],
)
def test_layers_none_passes_over(net: tuple[nn.Module, ...], expected: str) -> None:
    net = nn.Sequential(*net, nn.Flatten())
    for parameter in net.parameters():
        parameter.data.abs_()  # no ReLU is dead
    assert mix(GradMix(), torch.rand(2, 3, 32, 32), net=net).layers == (expected,)


def test_what_is_remembered_of_an_encoder_goes_with_it_and_is_not_pickled() -> None:
    gradmix, net = GradMix(), encoder()
    mix(gradmix, torch.rand(2, 3, 16, 16), net=net)
    assert len(gradmix._settled) == 1
    for copied in (copy.deepcopy(gradmix), pickle.loads(pickle.dumps(gradmix))):
        assert copied == gradmix
        assert mix(copied, torch.rand(2, 3, 16, 16)).layers == ("1",)
    del net
    gc.collect()
    assert len(gradmix._settled) == 0


def without_gradients(net: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return net(images).sum()


def backwarded(net: nn.Module, images: Tensor) -> Tensor:
    loss = net(images).square().sum()
    loss.backward()
    return loss


GRADIENTS_OFF = "loss: gradients are off between it and the observed layers"


@pytest.mark.parametrize("layers", [None, ["1"]])
@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda net, images: torch.ones(()), "observed: nothing ran inside `observe`; run the encoder"),
        (without_gradients, GRADIENTS_OFF),
        (lambda net, images: net(images).sum().detach(), GRADIENTS_OFF),
        (lambda net, images: net.requires_grad_(False)(images).sum(), GRADIENTS_OFF),
        (
            lambda net, images: (net.requires_grad_(False)(images) * torch.ones(8, requires_grad=True)).sum(),
            GRADIENTS_OFF,
        ),
        (backwarded, r"loss: it went backwards already.*; call gradmix\(...\) before loss.backward\(\)"),
        (lambda net, images: 0 * net(images).sum(), "gradient .*is zero .*; does a head start at zeros"),
    ],
    ids=["nothing ran", "no_grad", "detached", "frozen", "frozen below a head", "backward first", "zero head"],
)
def test_the_most_probable_cause_is_said_first(
    step: Callable[[nn.Module, Tensor], Tensor], message: str, layers: list[str] | None
) -> None:
    gradmix, net, images = GradMix(layers=layers), encoder(), torch.rand(2, 3, 16, 16)
    with gradmix.observe(net) as observed:
        loss = step(net, images)
    with pytest.raises(ValueError, match=message):
        gradmix(images, loss, observed)


def test_images_without_room_for_a_map_are_named_with_the_layers_sizes() -> None:
    net = nn.Sequential(nn.MaxPool2d(2), timm.create_model("resnet18", num_classes=0))
    with pytest.raises(
        ValueError,
        match=r"no layer has a map of at least 4x4 for images of 16x16 \(the last are .*1.layer4 \(2, 512, 1, 1\)",
    ):
        mix(GradMix(), torch.rand(2, 3, 16, 16), net=net)


@pytest.mark.parametrize("layers", [["blocks.11"], ["norm"], ["blocks"], ["blocks.8", "blocks.11"]])
def test_a_layer_whose_places_do_not_reach_the_class_token_is_refused_and_the_one_before_named(
    layers: list[str],
) -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64)
    with pytest.raises(ValueError, match=rf"at all places of '{layers[-1]}', .*; name 'blocks.10', or leave"):
        mix(GradMix(layers=layers), torch.rand(2, 3, 64, 64), net=vit)


def test_other_images_than_those_observed_are_refused() -> None:
    net, x0, x1 = encoder(), *torch.rand(2, 4, 3, 16, 16)
    x0[0, 0, 0, 0] = x1[0, 0, 0, 0] = torch.nan  # equal to itself all the same
    gradmix = GradMix(layers=["1"])
    for passes in ([x0, x1], [torch.cat([x0, x1])], [x0[:1], x0[1:], x1]):
        with gradmix.observe(net) as observed:
            loss = torch.cat([net(images) for images in passes]).sum()
        for same in (x0, x0.clone(), x0[:3], torch.cat([x0, x1])):
            gradmix(same, loss, observed)
        for other in (x1, x0.flip(0), x0[..., :8]):
            with pytest.raises(ValueError, match="images: these .* are not those .* through the encoder first inside"):
                gradmix(other, loss, observed)
        with pytest.raises(ValueError, match="images: 12 given, but layer '1' was observed for 8 only"):
            gradmix(torch.cat([x0, x1, x1]), loss, observed)


def test_only_the_first_call_for_an_encoder_reads_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step must not wait: no Python number is read off a tensor, other than of lam's draw on the CPU."""
    reads: list[str] = []
    for method in ("__bool__", "item", "tolist", "__int__", "__float__"):
        original = getattr(Tensor, method)

        def watched(self: Tensor, original=original, method=method) -> object:
            if self.dtype != torch.float64:
                reads.append(method)
            return original(self)

        monkeypatch.setattr(Tensor, method, watched)
    net, images = encoder(), torch.rand(4, 3, 16, 16)
    for layers in (None, ["0", "1"]):
        gradmix = GradMix(layers=layers)
        for first in (True, False):
            reads.clear()
            mix(gradmix, images, net=net)
            assert bool(reads) == first


def test_early_lets_an_encoder_that_is_compiled_as_a_whole_take_the_mixed_pass_outside_observe() -> None:
    torch._dynamo.reset()
    net = torch.compile(Stage(), backend="aot_eager")
    gradmix, images, target = GradMix(), torch.rand(4, 3, 16, 16), torch.rand(4, 8)
    with gradmix.observe(net) as observed:
        loss = agreement_loss(net(images), target)
    loss, mixed = gradmix.early(images, loss, observed)
    (loss + mixed.lam * agreement_loss(net(mixed.images), target)).backward()
    assert net._orig_mod.stage[0].weight.grad.any()


@pytest.mark.parametrize("inside", [True, False])
def test_an_encoder_compiled_as_a_whole_wants_the_mixed_pass_inside_observe(inside: bool) -> None:
    """As docs/torch-compile.md says; where it is outside, there is a warning ahead of torch's error."""
    torch._dynamo.reset()
    net = torch.compile(Stage(), backend="aot_eager")
    gradmix, (x0, x1) = GradMix(), torch.rand(2, 4, 3, 16, 16)
    with gradmix.observe(net) as observed:
        z1 = net(x1)
        loss = agreement_loss(net(x0), z1)
        if inside:
            mixed = gradmix(x1, loss, observed)
            loss = loss + mixed.lam * agreement_loss(net(mixed.images), z1)
    if not inside:
        with pytest.warns(UserWarning, match="BatchNorm .* unless its pass of the mixed views is inside too"):
            mixed = gradmix(x1, loss, observed)
        loss = loss + mixed.lam * agreement_loss(net(mixed.images), z1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:
        loss.backward()
    assert mixed.layers == ("stage",)


def distance(z: Tensor, target: Tensor) -> Tensor:
    return -torch.cosine_similarity(z, target.detach()).mean()


def simsiam(net: nn.Module, views: Tensor) -> tuple[Tensor, Tensor]:
    """The pair's loss, and the second view's embedding; the mixed views are to be drawn to that."""
    z0, z1 = net(views[0]), net(views[1])
    return distance(z0 @ net.predictor, z1) + distance(z1 @ net.predictor, z0), z1


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, depth=2)


def checkpointed() -> nn.Module:
    net = vit()
    net.set_grad_checkpointing()
    return net


def compiled() -> nn.Module:
    net = nn.Sequential(Stage().stage, nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), nn.Flatten())
    net[1].compile(backend="aot_eager")
    return net


def frozen() -> nn.Module:
    net = encoder()
    net[1][0].bias.requires_grad_(False)
    return net


@pytest.mark.parametrize(
    ("make", "layers"),
    [(Stage, None), (frozen, ["0", "1"]), (vit, ["blocks.0"]), (checkpointed, ["blocks.0"]), (compiled, ["0"])],
)
def test_early_gradients_are_those_of_one_graph(make: Callable[[], nn.Module], layers: list[str] | None) -> None:
    """Of two scaled micro-batches that accumulate; BatchNorm sees each view once."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    net = make().double()
    views = torch.rand(2, 2, 4, 3, 32, 32, dtype=torch.float64)
    net.predictor = nn.Parameter(torch.randn([net(views[0, 0]).shape[1]] * 2, dtype=torch.float64))
    alone, gradmix = copy.deepcopy(net), GradMix(layers=layers)
    for batch in views:
        with gradmix.observe(net) as observed:
            loss, z1 = simsiam(net, batch)
        expected = loss.item()
        loss, mixed = gradmix.early(batch[0], loss, observed, donors=batch[1])
        assert loss.item() == expected
        assert mixed.layers == tuple(layers or ["stage"])
        (1000 / 3 * (loss + mixed.lam * distance(net(mixed.images) @ net.predictor, z1))).backward()
        loss, z1 = simsiam(alone, batch)
        (1000 / 3 * (loss + mixed.lam * distance(alone(mixed.images) @ alone.predictor, z1))).backward()
    for (name, ours), theirs in zip(net.named_parameters(), alone.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == (not ours.requires_grad), name
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-10, msg=name)
    assert all(map(torch.equal, net.buffers(), alone.buffers()))


def test_early_mixes_as_a_call_does() -> None:
    net, views = encoder(), torch.rand(2, 4, 3, 16, 16)
    found = []
    for early in (True, False):
        gradmix = GradMix(generator=torch.Generator().manual_seed(0))
        with gradmix.observe(net) as observed:
            loss = agreement_loss(net(views[0]), net(views[1]))
        found.append(gradmix.early(views[0], loss, observed)[1] if early else gradmix(views[0], loss, observed))
        assert all(parameter.grad is None for parameter in net.parameters())
        assert any(observed.values()) != early  # activations are let go of
    assert torch.equal(found[0].attribution, found[1].attribution)
    assert torch.equal(found[0].images, found[1].images)


def test_early_gradients_come_first_in_the_backward_pass() -> None:
    """Or each parameter would wait for them until the end, and DistributedDataParallel with its exchange."""
    net, images = nn.Sequential(*encoder(), nn.Linear(8, 8)), torch.rand(4, 3, 16, 16)
    gradmix, done = GradMix(layers=["1"]), []
    with gradmix.observe(net) as observed:
        loss = net(images).square().mean()
    loss, mixed = gradmix.early(images, loss, observed)
    net[4].weight.register_post_accumulate_grad_hook(lambda _: done.append("head"))
    net[0][0].register_full_backward_hook(lambda *_: done.append("first convolution"))
    (loss + net(mixed.images.requires_grad_()).square().mean()).backward()
    assert done == ["head", "first convolution"]


def test_early_losses_under_half_precision_do_not_underflow() -> None:
    """Gradients of 5e-9 where half precision lies on their way, whose smallest number is 6e-8."""
    net, images = encoder(), torch.rand(4, 3, 16, 16)
    (expected,) = torch.autograd.grad(1e-5 * net(images).mean(), [net[0][0].weight])
    gradmix = GradMix(layers=["1"])
    with gradmix.observe(net) as observed:
        loss = 1e-5 * net[2:](net[:2](images).half().float()).mean()
    early, _ = gradmix.early(images, loss, observed)
    early.backward()
    torch.testing.assert_close(net[0][0].weight.grad, expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("backward", ["in place of the loss", "beside it"])
def test_early_refuses_a_mixed_loss_that_depends_on_the_pairs_graph(backward: str) -> None:
    net, (x0, x1) = encoder(), torch.rand(2, 4, 3, 16, 16)
    gradmix = GradMix(layers=["1"])
    with gradmix.observe(net) as observed:
        z1 = net(x1)
        pair = agreement_loss(net(x0), z1)
    loss, mixed = gradmix.early(x1, pair, observed)
    with pytest.raises(ValueError, match=r"loss: the mixed views' loss sends a gradient into .* detach .* or use"):
        (loss + mixed.lam * (agreement_loss(net(mixed.images), z1) if backward == "beside it" else pair)).backward()


@pytest.mark.parametrize("region", ["random", "center"])
def test_early_leaves_a_control_its_loss(region: str) -> None:
    net, images = encoder(), torch.rand(4, 3, 16, 16)
    gradmix = GradMix(region=region)
    with gradmix.observe(net) as observed:
        loss = net(images).mean()
    assert gradmix.early(images, loss, observed)[0] is loss


def test_autocast_maps_are_close_to_float32_ones() -> None:
    net, images = encoder(), torch.rand(8, 3, 32, 32)
    maps = []
    for enabled in (False, True):
        gradmix = GradMix(layers=["1"])
        with gradmix.observe(net) as observed, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = agreement_loss(net(images).float(), net(images.flip(3)).float())
        assert observed["1"][0].dtype == (torch.bfloat16 if enabled else torch.float32)
        maps.append(gradmix(images, loss, observed).attribution)
    assert (maps[0] - maps[1]).abs().mean() < 0.05


class Head(nn.Module):
    """Somebody else's model: features, then a projection."""

    def __init__(self, backbone: nn.Module, features: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, SimCLRProjectionHead(features, 64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).flatten(1))


@pytest.mark.parametrize(
    ("model", "layers", "criterion", "size"),
    [
        (
            lambda: Head(timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64), 192),
            ["blocks.9"],
            VICRegLoss(),
            64,
        ),
        (lambda: Head(torchvision.models.resnet18(num_classes=64), 64), ["layer2", "layer3"], BarlowTwinsLoss(), 64),
    ],
    ids=["timm ViT with VICReg", "torchvision ResNet with Barlow Twins"],
)
def test_trains_in_somebody_elses_loop(model, layers: list[str], criterion: nn.Module, size: int) -> None:
    torch.manual_seed(0)
    model = model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    gradmix = GradMix(layers=layers)
    x0 = torch.rand(8, 3, size, size)
    x1 = x0 + 0.1 * torch.randn_like(x0)
    before = [parameter.clone() for parameter in model.parameters()]
    losses = []
    for _ in range(4):
        with gradmix.observe(model.backbone) as observed:
            z0, z1 = model(x0), model(x1)
            loss = criterion(z0, z1)
        mixed = gradmix(x0, loss, observed, donors=x1)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert mixed.attribution.amax((1, 2)).tolist() == [1] * 8
        total = loss + mixed.lam * criterion(model(mixed.images), z1)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    assert losses[-1] < losses[0]
    changed = [not torch.equal(new, old) for new, old in zip(model.parameters(), before, strict=True)]
    assert sum(changed) / len(changed) > 0.95


def test_the_readmes_code_runs() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?from ssl_gradmix import GradMix.*?)```", readme, re.DOTALL)
    names: dict[str, object] = {}
    exec(block, names)
    assert isinstance(names["mixed"], MixedViews)


def documented(start: str) -> str:
    text = (Path(__file__).parent.parent / "docs" / "your-own-encoder.md").read_text()
    (block,) = (each for each in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if each.startswith(start))
    return block


def test_the_documented_moco_fills_its_bank_once_a_step() -> None:
    criterion = NTXentLoss(memory_bank_size=(64, 8))
    alone = copy.deepcopy(criterion)
    net, loader = encoder(), [torch.rand(2, 4, 3, 16, 16)] * 3
    names = {"encoder": net, "head": nn.Identity(), "key_encoder": net, "key_head": nn.Identity(), "copy": copy}
    exec(
        documented("for x0, x1"),
        names | {"torch": torch, "criterion": criterion, "loader": loader, "gradmix": GradMix()},
    )
    for x0, x1 in loader:
        alone(net(x0), net(x1).detach())
    assert criterion.memory_bank.bank_ptr == 12
    torch.testing.assert_close(criterion.memory_bank.bank, alone.memory_bank.bank)


def test_the_documented_dino_moves_its_center_once_a_step() -> None:
    criterion, alone = DINOLoss(8), DINOLoss(8)
    net, crops = encoder(), [*torch.rand(2, 4, 3, 16, 16), torch.rand(4, 3, 8, 8)]
    names = {"encoder": net, "head": nn.Identity(), "target": net, "target_head": nn.Identity(), "copy": copy}
    names |= {"torch": torch, "criterion": criterion, "loader": [crops] * 2, "gradmix": GradMix()}
    exec(documented("for crops"), names)
    for _ in range(2):
        alone.update_center(torch.stack([net(crop) for crop in crops[:2]]))
    torch.testing.assert_close(criterion.center, alone.center)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"layers": "layer3"},
            r"gradmix.layers must be a list of layer names such as \['layer3'\], or None; got 'layer3'",
        ),
        ({"attribution": "cam"}, "gradmix.attribution must be one of layercam, gradcam, got 'cam'"),
        ({"region": "disk"}, "gradmix.region must be one of peak, max_mean, mask, random, center, got"),
        ({"alpha": float("nan")}, "gradmix.alpha must be above 0 and finite, got nan"),
        ({"lam_range": (0.9, 0.5)}, r"gradmix.lam_range must be two rising numbers within \(0, 1\), got \(0.9, 0.5\)"),
    ],
)
def test_refuses_settings_that_mean_nothing(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradMix(**arguments)


def test_refuses_batches_that_do_not_match() -> None:
    gradmix, images = GradMix(layers=["1"]), torch.rand(4, 3, 16, 16)
    with pytest.raises(
        ValueError,
        match=r"donors must match the images \(torch.float32 \(4, 3, 16, 16\)\), got torch.float32 \(3, 3, 16, 16\)",
    ):
        gradmix(images, torch.zeros(()), Observed(), images[:3])
    with pytest.raises(ValueError, match=r"images must be floating point \(N, C, H, W\), got torch.uint8"):
        gradmix((images * 255).byte(), torch.zeros(()), Observed())
