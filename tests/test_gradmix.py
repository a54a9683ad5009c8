"""The view generator: what it keeps, what it replaces, and how it behaves in other people's code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import BarlowTwinsLoss, VICRegLoss
from lightly.models.modules import SimCLRProjectionHead
from scipy.stats import chisquare
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

from ssl_gradmix import GradMix, MixedViews


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


@given(
    count=st.integers(1, 5),
    height=st.integers(8, 40),
    width=st.integers(8, 40),
    fill=st.sampled_from(["donor", "crop", "noise", "mean"]),
    region=st.sampled_from(["box", "densest", "mask"]),
    attribution=st.sampled_from(["layercam", "gradcam", "random", "center"]),
    layers=st.sampled_from([["0"], ["1"], ["0", "1"]]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_every_pixel_is_the_images_own_or_replaced_and_lam_counts_them(
    count: int, height: int, width: int, fill: str, region: str, attribution: str, layers: list[str], seed: int
) -> None:
    draws = torch.Generator().manual_seed(seed)
    images, donors = torch.rand(2, count, 3, height, width, generator=draws)
    donors = donors + 2  # no donor pixel equals an image pixel
    generator = torch.Generator().manual_seed(seed)
    gradmix = GradMix(layers=layers, attribution=attribution, fill=fill, region=region, generator=generator)
    mixed = mix(gradmix, images, donors)
    changed = (mixed.images != images).any(1)
    assert mixed.images.shape == images.shape
    assert (1 - changed.float().mean((1, 2))).tolist() == pytest.approx([mixed.lam.item()] * count, abs=1e-6)
    assert mixed.attribution.shape == (count, height, width)
    assert mixed.attribution.min() >= 0
    assert mixed.attribution.max() <= 1
    if fill in ("donor", "crop"):
        assert torch.equal(mixed.images > 1.5, changed[:, None].expand_as(images))
        if count > 1:
            assert (mixed.donor_index != torch.arange(count)).all()
    if fill == "crop":
        assert torch.equal(torch.where(changed[:, None], donors[mixed.donor_index], images), mixed.images)
    if region != "mask":
        for each, (x0, y0, x1, y1) in zip(changed, mixed.boxes.tolist(), strict=True):
            assert each[y0:y1, x0:x1].all()
            assert each.sum() == (x1 - x0) * (y1 - y0)
    else:
        kept_highest = torch.where(changed, -1, mixed.attribution).amax((1, 2))
        taken_lowest = torch.where(changed, mixed.attribution, 2).amin((1, 2))
        assert (taken_lowest >= kept_highest).all()
        assert mixed.boxes is None


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
        mixed = gradmix(torch.rand(1, 3, 16, 16), loss, {"stage": [activation]})
        peaks[target] = divmod(int(mixed.attribution[0].argmax()), 16)
    assert peaks["loss"] == (0, 0)
    assert min(peaks["agreement"]) >= 13


@pytest.mark.parametrize("attribution", ["random", "center"])
def test_controls_ignore_the_loss(attribution: str) -> None:
    places = []
    for scale in (1.0, 0.0):
        net, images = encoder(), torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        gradmix = GradMix(layers=["1"], attribution=attribution, generator=torch.Generator().manual_seed(0))
        with gradmix.observe(net) as observed:
            loss = scale * net(images).sum()
        places.append(gradmix(images, loss, observed).boxes)
    assert torch.equal(*places)


@pytest.mark.parametrize("region", ["box", "densest"])
def test_random_attribution_takes_all_places_alike(region: str) -> None:
    generator = torch.Generator().manual_seed(0)
    gradmix = GradMix(layers=["1"], attribution="random", region=region, lam_range=(0.75, 0.75), generator=generator)
    boxes = mix(gradmix, torch.rand(5000, 3, 16, 16)).boxes
    assert (boxes[:, 2:] - boxes[:, :2] == 8).all()
    places = boxes[:, 1] * 9 + boxes[:, 0]  # 9 x 9 of them
    assert chisquare(places.bincount(minlength=81).numpy()).pvalue > 0.001


@pytest.mark.parametrize("region", ["box", "densest"])
def test_the_central_box_is_replaced(region: str) -> None:
    gradmix = GradMix(attribution="center", fill="mean", region=region, lam_range=(0.75, 0.75))
    images = torch.rand(4, 3, 16, 24)
    changed = (mix(gradmix, images).images != images).any(1)
    assert changed[:, 4:12, 6:18].all()
    assert changed.sum() == 4 * 8 * 12


def test_a_central_mask_takes_the_pixels_nearest_to_the_middle() -> None:
    images = torch.rand(2, 3, 16, 16)
    mixed = mix(GradMix(attribution="center", fill="mean", region="mask"), images)
    changed = (mixed.images != images).any(1)
    y, x = torch.meshgrid(torch.arange(16) - 7.5, torch.arange(16) - 7.5, indexing="ij")
    distance = torch.hypot(y, x).expand(2, 16, 16)
    assert distance[changed].max() <= distance[~changed].min() + 1e-6


def test_a_generator_decides_everything() -> None:
    images = torch.rand(6, 3, 24, 24)
    first, second, third = (
        mix(GradMix(layers=["1"], fill="noise", generator=torch.Generator().manual_seed(seed)), images)
        for seed in (3, 3, 4)
    )
    assert torch.equal(first.images, second.images)
    assert first.lam != third.lam


def test_layers_none_takes_the_deepest_stage_with_room(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="ssl_gradmix")
    resnet = torchvision.models.resnet18()
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64)
    for net, size, expected in ((resnet, 64, "layer3"), (resnet, 128, "layer4"), (vit, 64, "blocks.10")):
        caplog.clear()
        mix(GradMix(), torch.rand(2, 3, size, size), net=net)
        assert [record.getMessage() for record in caplog.records] == [
            f"GradMix attributes at layer {expected} for images of {size}x{size}"
        ]
    with pytest.raises(
        ValueError,
        match=r"no layer has a map of at least 4x4 .* \(the last are .*1.layer4 \(2, 512, 1, 1\), 1 \(2, 1000\)\)",
    ):
        mix(GradMix(), torch.rand(2, 3, 8, 8).repeat(1, 1, 2, 2), net=nn.Sequential(nn.MaxPool2d(2), resnet))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_memory_format_are_kept(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    images = torch.rand(4, 3, 32, 32).to(dtype).contiguous(memory_format=memory_format)
    net = encoder()
    for fill in ("donor", "crop", "noise", "mean"):
        for region in ("box", "densest", "mask"):
            gradmix = GradMix(layers=["1"], fill=fill, region=region)
            with gradmix.observe(net) as observed, torch.autocast("cpu", torch.bfloat16):
                loss = agreement_loss(net(images.float()), net(images.float().flip(3)))
            mixed = gradmix(images, loss, observed)
            assert mixed.images.dtype == dtype
            assert mixed.images.is_contiguous(memory_format=memory_format)
            assert mixed.images.isfinite().all()


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"layers": "layer3"},
            r"gradmix.layers must be a list of layer names such as \['layer3'\], or None; got 'layer3'",
        ),
        ({"layers": []}, r"gradmix.layers must be a list .* got \[\]"),
        ({"attribution": "cam"}, "gradmix.attribution must be one of layercam, gradcam, random, center, got 'cam'"),
        ({"target": "up"}, "gradmix.target must be one of agreement, loss, got 'up'"),
        ({"fill": "black"}, "gradmix.fill must be one of donor, crop, noise, mean, got 'black'"),
        ({"region": "disk"}, "gradmix.region must be one of box, densest, mask, got 'disk'"),
        ({"alpha": 0.0}, "gradmix.alpha must be above 0 and finite, got 0.0"),
        ({"alpha": float("nan")}, "gradmix.alpha must be above 0 and finite, got nan"),
        ({"lam_range": (0.9, 0.5)}, r"gradmix.lam_range must be two rising numbers within \(0, 1\), got \(0.9, 0.5\)"),
        ({"lam_range": (0.5, float("nan"))}, "gradmix.lam_range must be two rising numbers"),
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
        gradmix(images, torch.zeros(()), {}, images[:3])
    with pytest.raises(ValueError, match=r"images must be floating point \(N, C, H, W\), got torch.uint8"):
        gradmix((images * 255).byte(), torch.zeros(()), {})
    net = encoder()
    with gradmix.observe(net) as observed:
        loss = net(images).sum()
    with pytest.raises(ValueError, match="images: 8 given, but layer '1' was observed for 4 only"):
        gradmix(images.repeat(2, 1, 1, 1), loss, observed)
