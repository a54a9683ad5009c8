"""Reliance against a loop over single images, and on encoders of which it is known what they read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import tiny_encoder
from torch import Tensor, nn

from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.data.datasets import ImageSet, load
from ssl_gradmix.evaluation.reliance import PLACES, in_images, measure, two_views, verdict
from ssl_gradmix.settings import Augmentation, Data


class Reader(nn.Module):
    """Reads 4x4 pixels of an image, or the mean of all of it, behind a ReLU: no two of its features are orthogonal."""

    def __init__(self, patch: bool) -> None:
        super().__init__()
        self.stem, self.patch = nn.ReLU(), patch

    def forward(self, images: Tensor) -> Tensor:
        seen = self.stem(images)
        return seen[:, :, 4:8, 20:24].flatten(1) if self.patch else seen.mean((2, 3))


def pairs(count: int = 64, batches: int = 2, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Two views of images, which differ by noise."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(batches):
        color = torch.randn(count, 3, 1, 1, generator=generator)
        images = color + torch.randn(count, 3, size, size, generator=generator)
        noise = 0.1 * torch.randn(2, *images.shape, generator=generator)
        made.append((images + noise[0], images + noise[1]))
    return made


def telling_apart(encoder: nn.Module, images: Tensor) -> nn.Sequential:
    """The encoder with its features centered and scaled, as random ones are alike for all images."""
    norm = nn.BatchNorm1d(32, momentum=None)
    with torch.no_grad():
        norm(encoder.eval()(images))
    return nn.Sequential(encoder, norm).eval()


def by_hand(model: nn.Module, first: Tensor, second: Tensor, donor: Tensor) -> tuple[float, float, list[int]]:
    """Similarity of a pair (3, 16, 16), whole and with 5x5 pixels replaced, and the box: LayerCAM at layer1."""
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
    cam = (cam - cam.min()) / (cam.max() - cam.min())  # else a plateau at the border is not level, by rounding
    cam = F.interpolate(torch.from_numpy(cam)[None, None], size=(16, 16), mode="bilinear")[0, 0].numpy()
    y, x = np.unravel_index(cam.argmax(), cam.shape)
    top, left = min(max(y - 2, 0), 11), min(max(x - 2, 0), 11)
    mixed = first.clone()
    mixed[:, top : top + 5, left : left + 5] = donor[:, top : top + 5, left : left + 5]
    z0, z1 = (each.detach().double().numpy() for each in (model(mixed[None])[0], z1))
    return cosine.item(), z0 @ z1 / np.linalg.norm(z0) / np.linalg.norm(z1), [left, top, left + 5, top + 5]


def test_one_image_at_a_time_gives_the_same() -> None:
    torch.manual_seed(0)
    given = pairs(count=9, batches=2, size=16)
    first, second = (torch.cat(views) for views in zip(*given, strict=True))
    model = telling_apart(tiny_encoder(), first)
    (found,) = measure(model, given, ["layer1"], backbone=model[0])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert found.layer == "layer1"
    assert found.images.equal(first)
    assert (found.donors // 9 == torch.arange(18) // 9).all()  # of the same batch
    assert (found.donors != torch.arange(18)).all()
    whole, replaced, boxes = zip(
        *(by_hand(model, first[i], second[i], first[found.donors[i]]) for i in range(18)), strict=True
    )
    assert found.boxes.tolist() == list(map(list, boxes))
    np.testing.assert_allclose(found.whole, whole, atol=1e-5)
    np.testing.assert_allclose(found.replaced["attributed"], replaced, atol=1e-5)
    with torch.no_grad():
        chance = [
            F.cosine_similarity(model(first[[j]]), model(second[[i]])) for i, j in enumerate(found.donors.tolist())
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


def test_an_encoder_that_reads_a_patch_loses_all_with_it() -> None:
    (found,) = measure(Reader(patch=True), pairs(), ["stem"])
    x0, y0, x1, y1 = found.boxes.unbind(1)
    assert ((x0 <= 20) & (x1 >= 24) & (y0 <= 4) & (y1 >= 8)).all()
    assert found.share("attributed").value == pytest.approx(1, abs=1e-5)
    assert found.share("random").value < 0.2
    assert found.share("center").value == 0
    (other,) = measure(Reader(patch=True), pairs(), ["stem"], seed=1)
    assert other.share("attributed").value == pytest.approx(1, abs=1e-5)
    assert not other.donors.equal(found.donors)


def test_an_encoder_that_reads_all_of_the_image_loses_as_little_anywhere() -> None:
    given = pairs()
    (found,) = measure(Reader(patch=False), given, ["stem"])
    for place in PLACES:
        assert 0 <= found.share(place).value < 0.1
    (half,) = measure(Reader(patch=False), given, ["stem"], part=0.5)
    assert half.share("random").value > 3 * found.share("random").value


def test_flat_maps_are_told() -> None:
    flat = [(first.mean((2, 3), keepdim=True).expand_as(first).clone(), second) for first, second in pairs()]
    flat = [(first, first + 0.01) for first, _ in flat]
    (found,) = measure(Reader(patch=False), flat, ["stem"])
    assert found.flat.all()
    assert found.boxes[:, 0].unique().numel() > 10  # anywhere


def test_the_same_seed_gives_the_same_numbers_whatever_was_drawn_before() -> None:
    images = load(Data(stamp_bits=4), "train").subset(range(20))
    views = Views(Augmentation(min_scale=0.8), 16, (0.5,) * 3, (0.25,) * 3, stamps=images.stamps)
    torch.manual_seed(0)
    model = telling_apart(tiny_encoder(), torch.cat([pair[0] for pair, _ in two_views(images, views, 7, 5)]))
    found = []
    for _ in range(2):
        torch.rand(3)
        before = torch.get_rng_state()
        made = list(two_views(images, views, 7, 5))
        assert torch.get_rng_state().equal(before)
        assert [len(pair[0]) for pair, _ in made] == [7, 7, 6]
        found.append(measure(model, [pair for pair, _ in made], ["0.layer1", "0.layer2"], fill="donor", seed=5))
    for one, other in zip(*found, strict=True):
        assert one.share("attributed") == other.share("attributed")
        assert one.replaced["random"].equal(other.replaced["random"])
    assert found[0][0].replaced["random"].equal(found[0][1].replaced["random"])  # whatever the layer
    assert [each.layer for each in found[0]] == ["0.layer1", "0.layer2"]


def test_views_say_where_in_their_image_they_lie() -> None:
    """Of images whose red rises from left to right, and green from top to bottom."""
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8)
    red, green = np.meshgrid(ramp, ramp)
    pixels = np.stack([red, green, 0 * red], -1)[None].repeat(16, 0)
    images = ImageSet(pixels, np.zeros(16, np.int64), ("ramp",), "ramps/train")
    views = Views(Augmentation(jitter=0, gray=0), 32, (0.0,) * 3, (1.0,) * 3)
    ((first, _), crops), *rest = two_views(images, views, 16, 0)
    assert not rest
    top, left, height, width, flipped = crops.unbind(1)
    assert 0 < flipped.sum() < 16
    start, end = torch.where(flipped > 0, left + width, left), torch.where(flipped > 0, left, left + width)
    torch.testing.assert_close(first[:, 0, :, 0].mean(1), start, atol=0.03, rtol=0)
    torch.testing.assert_close(first[:, 0, :, -1].mean(1), end, atol=0.03, rtol=0)
    torch.testing.assert_close(first[:, 1, 0].mean(1), top, atol=0.03, rtol=0)
    torch.testing.assert_close(first[:, 1, -1].mean(1), top + height, atol=0.03, rtol=0)
    # A map that marks a corner of the images, wherever the views show it, marks it again when they are put back.
    corner = ((first[:, 0] > 0.75) & (first[:, 1] > 0.75)).float()
    back = in_images(corner, crops)
    assert back[26:30, 26:30].min() > 0.9
    assert back[:22].max() < 0.1
    assert back[:, :22].max() < 0.1


class Vector(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.flatten(1))

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, 5)


@pytest.mark.parametrize(
    ("model", "given", "layers", "message"),
    [
        (Reader(True), pairs(count=1), ["stem"], "at least 2 are needed"),
        (Vector(), pairs(), None, "no layer has a map of at least 4x4"),
        (Vector(), pairs(), ["head"], "'head' has no spatial extent"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), pairs(), ["0"], "one feature vector an image"),
        (Reader(True), [(first, first.roll(1, 0)) for first, _ in pairs()], ["stem"], "hardly agree more"),
        (Reader(True), [(first * float("nan"), second) for first, second in pairs()], ["stem"], "NaN or infinite"),
    ],
)
def test_what_cannot_be_measured_is_said(model, given, layers, message) -> None:
    with pytest.raises(ValueError, match=message):
        measure(model, given, layers)


def test_the_sentence() -> None:
    assert "loses 97% of its agreement with 10% of the image (13% with one at random), and those without" in verdict(
        0.97, 0.13, 0.1
    )
    assert verdict(0.14, -0.02, 0.1).endswith(
        "loses 14% of its agreement with 10% of the image, the part that matters most (0% with one at random)"
    )
    assert "loses all of its agreement" in verdict(1.2, 0.1, 0.1)
