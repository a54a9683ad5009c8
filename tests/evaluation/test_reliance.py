"""Reliance against a loop over single images, and on encoders that read a known place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import tiny_encoder
from torch import Tensor, nn

from ssl_gradmix.data.augmentation import Augmentation, Views
from ssl_gradmix.data.datasets import Data, ImageSet, load
from ssl_gradmix.evaluation.reliance import (
    PLACES,
    fixed_place,
    in_images,
    measure,
    two_views,
    verdict,
)


class Reader(nn.Module):
    """Reads 4x4 pixels of an image, or the mean of all of it, behind a ReLU."""

    def __init__(self, patch: bool) -> None:
        super().__init__()
        self.stem, self.patch = nn.ReLU(), patch

    def forward(self, images: Tensor) -> Tensor:
        seen = self.stem(images)
        return seen[:, :, 4:8, 20:24].flatten(1) if self.patch else seen.mean((2, 3))


def pairs(count: int = 64, batches: int = 2, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Batches of two views that differ by noise."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(batches):
        color = torch.randn(count, 3, 1, 1, generator=generator)
        images = color + torch.randn(count, 3, size, size, generator=generator)
        noise = 0.1 * torch.randn(2, *images.shape, generator=generator)
        made.append((images + noise[0], images + noise[1]))
    return made


def telling_apart(encoder: nn.Module, images: Tensor) -> nn.Sequential:
    """The encoder with centered and scaled features; random ones are alike for all images."""
    norm = nn.BatchNorm1d(32, momentum=None)
    with torch.no_grad():
        norm(encoder.eval()(images))
    return nn.Sequential(encoder, norm).eval()


def by_hand(
    model: nn.Module, first: Tensor, second: Tensor, donor: Tensor
) -> tuple[float, float, list[int]]:
    """Similarity of a pair (3, 16, 16), whole and with the LayerCAM box at layer1 replaced."""
    kept: list[Tensor] = []
    handle = model[0].layer1.register_forward_hook(lambda module, args, output: kept.append(output))
    z0, z1 = model(first[None])[0], model(second[None])[0]
    handle.remove()
    cosine = z0 @ z1 / (z0.norm() * z1.norm())
    (gradient,) = torch.autograd.grad(cosine, kept[0])
    padded = np.pad(gradient[0].numpy(), ((0, 0), (1, 1), (1, 1)), mode="reflect")
    height, width = gradient.shape[2:]
    smoothed = sum(
        weight_y * weight_x / 16 * padded[:, y : y + height, x : x + width]
        for y, weight_y in enumerate((1, 2, 1))
        for x, weight_x in enumerate((1, 2, 1))
    )
    cam = (kept[0][0].detach().numpy() * np.maximum(smoothed, 0)).sum(0)
    cam = (cam - cam.min()) / (cam.max() - cam.min())
    cam = F.interpolate(torch.from_numpy(cam)[None, None], size=(16, 16), mode="bilinear")[
        0, 0
    ].numpy()
    y, x = np.unravel_index(cam.argmax(), cam.shape)
    top, left = min(max(y - 2, 0), 11), min(max(x - 2, 0), 11)
    mixed = first.clone()
    mixed[:, top : top + 5, left : left + 5] = donor[:, top : top + 5, left : left + 5]
    z0, z1 = (each.detach().double().numpy() for each in (model(mixed[None])[0], z1))
    return (
        cosine.item(),
        z0 @ z1 / np.linalg.norm(z0) / np.linalg.norm(z1),
        [left, top, left + 5, top + 5],
    )


def test_measure_equals_a_loop_over_images() -> None:
    torch.manual_seed(0)
    given = pairs(count=9, batches=2, size=16)
    first, second = (torch.cat(views) for views in zip(*given, strict=True))
    model = telling_apart(tiny_encoder(), first)
    (found,) = measure(model, given, ["layer1"], backbone=model[0])
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in model.parameters()
    )
    assert found.layer == "layer1"
    assert found.images.equal(first)
    assert (found.donors // 9 == torch.arange(18) // 9).all()  # of the same batch
    assert (found.donors != torch.arange(18)).all()
    whole, replaced, boxes = zip(
        *(by_hand(model, first[i], second[i], first[found.donors[i]]) for i in range(18)),
        strict=True,
    )
    assert found.boxes.tolist() == list(map(list, boxes))
    np.testing.assert_allclose(found.whole, whole, atol=1e-5)
    np.testing.assert_allclose(found.replaced["attributed"], replaced, atol=1e-5)
    with torch.no_grad():
        chance = [
            F.cosine_similarity(model(first[[j]]), model(second[[i]]))
            for i, j in enumerate(found.donors.tolist())
        ]
    chance = torch.cat(chance).numpy()
    np.testing.assert_allclose(found.chance, chance, atol=1e-5)

    lost, above = np.subtract(whole, replaced), np.subtract(whole, chance)
    share = found.share("attributed")
    assert share.value == pytest.approx(lost.mean() / above.mean(), abs=1e-4)
    assert share.value == pytest.approx(found.by_image("attributed").mean().item(), abs=1e-5)
    assert share.low < share.value < share.high
    beyond = found.share("attributed", "random")
    assert beyond.value == pytest.approx(share.value - found.share("random").value, abs=1e-6)


def test_encoder_of_a_patch_loses_all_agreement_with_it() -> None:
    (found,) = measure(Reader(patch=True), pairs(), ["stem"])
    x0, y0, x1, y1 = found.boxes.unbind(1)
    assert ((x0 <= 20) & (x1 >= 24) & (y0 <= 4) & (y1 >= 8)).all()
    assert found.share("attributed").value == pytest.approx(1, abs=1e-5)
    assert found.share("random").value < 0.2
    assert found.share("center").value == 0
    (other,) = measure(Reader(patch=True), pairs(), ["stem"], seed=1)
    assert other.share("attributed").value == pytest.approx(1, abs=1e-5)
    assert not other.donors.equal(found.donors)


def test_encoder_of_the_whole_image_loses_little_anywhere() -> None:
    given = pairs()
    (found,) = measure(Reader(patch=False), given, ["stem"])
    for place in PLACES:
        assert 0 <= found.share(place).value < 0.1
    (half,) = measure(Reader(patch=False), given, ["stem"], part=0.5)
    assert half.share("random").value > 3 * found.share("random").value


@pytest.mark.parametrize("fill", ["crop", "donor"])
def test_same_seed_repeats_all_numbers(fill) -> None:
    images = load(Data(), "train").subset(range(40))
    how = Augmentation(min_scale=0.8, jitter=0, gray=0)
    views = Views(how, 16, (0.5,) * 3, (0.25,) * 3)
    torch.manual_seed(0)
    first = torch.cat([pair[0] for pair, _ in two_views(images, views, 14, 5)])
    model = telling_apart(tiny_encoder(), first)
    found = []
    for _ in range(2):
        torch.rand(3)
        before = torch.get_rng_state()
        made = [pair for pair, _ in two_views(images, views, 14, 5)]
        assert torch.get_rng_state().equal(before)
        assert [len(pair[0]) for pair in made] == [14, 13, 13]
        found.append(measure(model, made, ["0.layer1", "0.layer2"], fill=fill, seed=5))
    for one, other in zip(*found, strict=True):
        assert one.share("attributed") == other.share("attributed")
        assert one.replaced["random"].equal(other.replaced["random"])
    assert [each.layer for each in found[0]] == ["0.layer1", "0.layer2"]
    assert found[0][0].replaced["random"].equal(found[0][1].replaced["random"])


def test_crops_are_where_views_lie_and_maps_are_put_back_there() -> None:
    """In images whose red rises from left to right, and green from top to bottom."""
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8)
    red, green = np.meshgrid(ramp, ramp)
    pixels = np.stack([red, green, 0 * red], -1)[None].repeat(16, 0)
    images = ImageSet(pixels, np.zeros(16, np.int64), ("ramp",), "ramps/train")
    views = Views(Augmentation(jitter=0, gray=0), 32, (0.0,) * 3, (1.0,) * 3)
    (((first, _), crops),) = two_views(images, views, 16, 0)
    top, left, height, width, flipped = crops.unbind(1)
    assert 0 < flipped.sum() < 16
    start = torch.where(flipped > 0, left + width, left)
    end = torch.where(flipped > 0, left, left + width)
    edges = [
        (first[:, 0, :, 0], start),
        (first[:, 0, :, -1], end),
        (first[:, 1, 0], top),
        (first[:, 1, -1], top + height),
    ]
    for pixels_of_edge, expected in edges:
        torch.testing.assert_close(pixels_of_edge.mean(1), expected, atol=0.03, rtol=0)
    corner = ((first[:, 0] > 0.75) & (first[:, 1] > 0.75)).float()
    back = in_images(corner, crops)
    assert back[26:30, 26:30].min() > 0.9
    assert back[:22].max() < 0.1
    assert back[:, :22].max() < 0.1


class Vector(nn.Module):
    """An encoder without maps."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.flatten(1))


@pytest.mark.parametrize(
    ("model", "given", "layers", "error", "argument"),
    [
        (Reader(True), pairs(count=1), ["stem"], ValueError, "images"),
        (Vector(), pairs(), None, ValueError, "layers"),
        (Vector(), pairs(), ["head"], ValueError, "layers"),
        (Vector(), pairs(), ["neck"], KeyError, "layers"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), pairs(), ["0"], ValueError, "model"),
        (Reader(True), [(x * float("nan"), y) for x, y in pairs()], ["stem"], ValueError, "model"),
        (Reader(True), [(x, x.roll(1, 0)) for x, _ in pairs()], ["stem"], ValueError, "encoder"),
    ],
)
def test_invalid_input_raises(model, given, layers, error, argument) -> None:
    with pytest.raises(error, match=argument):
        measure(model, given, layers)


def hot(top: int, bottom: int, left: int, right: int, size: int = 32) -> Tensor:
    """A map that is 0.9 in a box and 0.1 elsewhere."""
    values = torch.full((size, size), 0.1)
    values[top:bottom, left:right] = 0.9
    return values


@pytest.mark.parametrize(
    ("attribution", "expected"),
    [
        (hot(26, 32, 26, 32), "lower right corner"),
        (hot(26, 32, 26, 32).flip(1), "lower left corner"),
        (hot(26, 32, 26, 32).flip(0), "upper right corner"),
        (hot(26, 32, 26, 32).flip(0, 1), "upper left corner"),
        (hot(0, 8, 0, 32), "upper margin"),
        (hot(0, 8, 4, 28), "upper margin"),
        (hot(24, 32, 0, 32), "lower margin"),
        (hot(0, 32, 0, 8), "left margin"),
        (hot(0, 32, 24, 32), "right margin"),
        (hot(0, 50, 150, 200, size=200), "upper right corner"),
        (hot(8, 24, 8, 24), None),
        (hot(12, 20, 12, 20), None),
        (hot(0, 32, 0, 32), None),
        (torch.zeros(32, 32), None),
    ],
)
def test_corner_or_margin_of_a_map_is_named(attribution: Tensor, expected: str | None) -> None:
    place = fixed_place({"images": attribution}, 100)
    assert place == (expected and f"{expected} of all images")
    nearly = attribution + 1e-6 * attribution**2  # of whole images, the two maps are the same
    assert fixed_place({"images": 7 * attribution, "views": nearly}, 100) == place
    assert fixed_place({"images": attribution}, 1) is None


def test_place_is_named_from_a_ratio_of_four_on() -> None:
    """By hand: a corner cell of 1.0, and 15 cells of 0.4 or 0.2, have ratios of 2.5 and 5."""
    for rest, named in ((0.4, False), (0.2, True)):
        cells = torch.full((4, 4), rest)
        cells[0, -1] = 1.0
        place = fixed_place({"images": cells.repeat_interleave(8, 0).repeat_interleave(8, 1)}, 64)
        assert (place == "upper right corner of all images") is named
        assert (place is None) is not named


@pytest.mark.parametrize("in_views", [False, True])
def test_place_is_fixed_in_images_or_in_views(in_views: bool) -> None:
    """Maps of crops, half of them flipped, that are hot in the lower right of one of the two."""
    generator = torch.Generator().manual_seed(0)
    height, width = 0.5 + 0.5 * torch.rand(2, 256, generator=generator)
    top, left = (1 - height) * torch.rand(256, generator=generator), 1 - width
    left = left * torch.rand(256, generator=generator)
    crops = torch.stack([top, left, height, width, torch.arange(256) % 2], 1)
    at = (torch.arange(32) + 0.5) / 32
    down = top[:, None] + height[:, None] * at
    across = left[:, None] + width[:, None] * torch.where(crops[:, 4:] > 0, 1 - at, at)
    if in_views:
        down, across = at.expand(256, 32), at.expand(256, 32)
    attribution = ((down > 0.8)[:, :, None] & (across > 0.8)[:, None, :]).float()
    maps = {"images": in_images(attribution, crops), "views": attribution.mean(0)}
    frame = "views" if in_views else "images"
    assert fixed_place(maps, 256) == f"lower right corner of all {frame}"


def test_encoder_of_a_corner_of_all_images_is_found() -> None:
    """Bright pixels there, in images that are flipped and not cropped."""

    class Corner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.ReLU()

        def forward(self, images: Tensor) -> Tensor:
            seen = self.stem(images)[:, :, 28:]
            return (seen[..., :4].flip(3) + seen[..., 28:]).flatten(1)

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 60, (128, 32, 32, 3), np.uint8)
    pixels[:, 28:, 28:] = rng.integers(100, 256, (128, 4, 4, 3), np.uint8)
    images = ImageSet(pixels, np.zeros(128, np.int64), ("x",), "x/train")
    views = Views(Augmentation(min_scale=1, jitter=0, gray=0), 32, (0.5,) * 3, (0.2,) * 3)
    made, crops = zip(*two_views(images, views, 64, 0), strict=True)
    (found,) = measure(Corner().eval(), made, ["stem"])
    maps = {
        "images": in_images(found.attribution, torch.cat(crops)),
        "views": found.attribution.mean(0),
    }
    assert fixed_place(maps, 128) == "lower right corner of all images"


@pytest.mark.parametrize(
    ("share", "at_random", "stands_out", "relies"),
    [
        (0.97, 0.13, True, True),
        (7.07, 0.13, True, True),
        (0.14, -0.02, True, False),
        (0.1, 0.1, False, False),
        (0.6, 0.7, False, False),
    ],
)
def test_verdict_has_the_numbers_and_the_comparison(share, at_random, stands_out, relies) -> None:
    sentence = verdict(share, at_random, 0.1, "layer2")
    assert f"{min(share, 1):.0%}" in sentence
    assert f"{max(at_random, 0):.0%}" in sentence
    assert "layer2" in sentence
    assert ("No part" in sentence) is not stands_out
    assert ("shortcut" in sentence) is stands_out
    assert ("--extra_view adaptive" in sentence) is relies
    placed = verdict(share, at_random, 0.1, "layer2", "left margin of all images")
    assert ("left margin of all images" in placed) is relies
    assert ("blank" in placed) is relies
    assert "adaptive" not in placed
