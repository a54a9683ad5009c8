"""Regions and fills against loops over single images."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from ssl_gradmix import mixing


def maps_with_peaks(peaks: list[tuple[int, int]], height: int, width: int) -> torch.Tensor:
    maps = torch.rand(len(peaks), height, width) * 0.5
    for each, (y, x) in zip(maps, peaks, strict=True):
        each[y, x] = 1
    return maps


def test_boxes_are_centered_on_the_peak_and_shifted_inside() -> None:
    maps = maps_with_peaks([(16, 20), (0, 0), (31, 39), (0, 39)], 32, 40)
    boxes = mixing.peak_boxes(maps, (10, 8))
    assert boxes.tolist() == [[16, 11, 24, 21], [0, 0, 8, 10], [32, 22, 40, 32], [32, 0, 40, 10]]


@pytest.mark.parametrize("extent", [(1, 1), (4, 7), (12, 3), (12, 15)])
def test_the_max_mean_box_holds_most_of_all_that_fit(extent: tuple[int, int]) -> None:
    maps = torch.rand(6, 12, 15, generator=torch.Generator().manual_seed(0)) ** 4
    boxes = mixing.max_mean_boxes(maps, extent).tolist()
    for each, (x0, y0, x1, y1) in zip(maps, boxes, strict=True):
        assert (y1 - y0, x1 - x0) == extent
        most = max(
            each[y : y + extent[0], x : x + extent[1]].sum().item()
            for y in range(12 - extent[0] + 1)
            for x in range(15 - extent[1] + 1)
        )
        assert each[y0:y1, x0:x1].sum().item() == pytest.approx(most, rel=1e-5)


def test_the_max_mean_box_prefers_a_bright_field_to_a_brighter_speck() -> None:
    maps = torch.zeros(1, 16, 16)
    maps[0, 2, 13] = 1
    maps[0, 9:13, 3:7] = 0.5
    assert mixing.max_mean_boxes(maps, (4, 4)).tolist() == [[3, 9, 7, 13]]
    assert mixing.peak_boxes(maps, (4, 4)).tolist() == [[11, 0, 15, 4]]


@pytest.mark.parametrize("size", [(16, 16), (15, 20), (9, 7)])
@pytest.mark.parametrize("extent", [(1, 1), (4, 7), (7, 4), (9, 7)])
def test_central_boxes_leave_as_much_on_either_side(extent: tuple[int, int], size: tuple[int, int]) -> None:
    boxes = mixing.central_boxes(3, extent, size, torch.device("cpu"))
    assert boxes.dtype == torch.int64
    for x0, y0, x1, y1 in boxes.tolist():
        assert (y1 - y0, x1 - x0) == extent
        assert size[0] - y1 - y0 in (0, 1)
        assert size[1] - x1 - x0 in (0, 1)


@pytest.mark.parametrize("place", [mixing.peak_boxes, mixing.max_mean_boxes])
def test_flat_maps_put_boxes_anywhere(place: Callable[..., torch.Tensor]) -> None:
    boxes = place(torch.zeros(2000, 16, 16), (4, 4), torch.Generator().manual_seed(0))
    starts = boxes[:, :2]
    assert starts.min() == 0
    assert starts.max() == 12
    assert (starts.float().mean(0) - 6).abs().max() < 0.5


SHARES = [(0.5, 0.9), (0.3, 0.7), (0.75, 0.75), (0.9, 0.9), (1e-9, 1e-9), (0.999999, 0.999999)]


@pytest.mark.parametrize("size", [(8, 8), (5, 3), (1000, 8), (32, 32), (7, 9), (1, 2), (224, 224)])
@pytest.mark.parametrize("lam_range", SHARES)
def test_the_exact_share_lies_inside_lam_range_where_a_box_can_have_it(
    size: tuple[int, int], lam_range: tuple[float, float]
) -> None:
    low, high = lam_range
    shares = {1 - h * w / (size[0] * size[1]) for h in range(1, size[0] + 1) for w in range(1, size[1] + 1)}
    possible = any(low - 1e-12 <= share <= high + 1e-12 for share in shares)
    for step in range(21):
        lam = low + (high - low) * step / 20
        extent = mixing.box_extent(lam, size, lam_range)
        kept = mixing.box_kept(extent, size)
        assert 0 < kept < 1
        if possible:
            assert low - 1e-12 <= kept <= high + 1e-12
        else:  # the rounded box
            assert all(abs(e - s * (1 - lam) ** 0.5) <= 1 for e, s in zip(extent, size, strict=True))
        pixels = mixing.mask_pixels(lam, size, lam_range)
        assert 0 < pixels < size[0] * size[1]
        assert abs(pixels - (1 - lam) * size[0] * size[1]) <= 1


def test_a_box_that_fits_keeps_the_images_aspect_ratio() -> None:
    # 6 x 6 of 8 x 8 would keep 0.4375; of those inside, 5 x 6 is the most similar one.
    assert mixing.box_extent(0.5, (8, 8), (0.5, 0.9)) == (5, 6)
    assert mixing.box_extent(0.5, (8, 8)) == (6, 6)
    assert mixing.box_extent(0.75, (32, 64), (0.5, 0.9)) == (16, 32)


def test_paste_and_shrink_equal_a_loop_with_torchvision_resize() -> None:
    images, donors = torch.rand(2, 5, 3, 32, 24)
    boxes = torch.tensor([[0, 0, 9, 12], [15, 20, 24, 32], [3, 4, 12, 16], [1, 0, 10, 12], [7, 7, 16, 19]])
    expected = images.clone()
    for image, donor, (x0, y0, x1, y1) in zip(expected, donors, boxes.tolist(), strict=True):
        image[:, y0:y1, x0:x1] = tv.resize(donor, [12, 9], antialias=True)
    before = images.clone()
    pasted = mixing.paste(images, mixing.shrink(donors, (12, 9)), boxes)
    torch.testing.assert_close(pasted, expected)
    assert torch.equal(images, before)


def test_crop_takes_the_boxes_content() -> None:
    images = torch.rand(3, 2, 10, 12)
    boxes = torch.tensor([[0, 0, 5, 4], [7, 6, 12, 10], [2, 3, 7, 7]])
    expected = torch.stack(
        [image[:, y0:y1, x0:x1] for image, (x0, y0, x1, y1) in zip(images, boxes.tolist(), strict=True)]
    )
    assert torch.equal(mixing.crop(images, boxes, (4, 5)), expected)


@pytest.mark.parametrize("pixels", [1, 7, 35])
def test_mask_marks_exactly_the_highest(pixels: int) -> None:
    maps = torch.stack([torch.randperm(35).float().view(5, 7) for _ in range(4)])
    mask = mixing.top_mask(maps, pixels)
    assert torch.equal(mask, maps >= 35 - pixels)


def test_mask_of_a_tied_map_is_exact_and_random() -> None:
    masks = mixing.top_mask(torch.zeros(500, 6, 6), 9, torch.Generator().manual_seed(0))
    assert (masks.flatten(1).sum(1) == 9).all()
    assert (masks.float().mean(0) - 0.25).abs().max() < 0.1


def test_derangement_of_one_is_itself() -> None:
    assert mixing.derangement(1, torch.device("cpu")).tolist() == [0]


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_lam_follows_the_rescaled_beta(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([mixing.draw_lam(alpha, (0.5, 0.9), generator) for _ in range(4000)])
    assert draws.min() >= 0.5
    assert draws.max() <= 0.9
    assert draws.mean().item() == pytest.approx(0.7, abs=0.01)
    # Var Beta(a, a) = 1 / (4 (2a + 1))
    assert draws.var().item() == pytest.approx(0.16 / (4 * (2 * alpha + 1)), rel=0.08)


def test_noise_has_the_batchs_moments_and_mean_its_channels() -> None:
    images = torch.randn(16, 3, 20, 20) * torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1) + torch.tensor(
        [-1.0, 0.0, 3.0]
    ).view(3, 1, 1)
    noise = mixing.noise_like(images, (64, 3, 30, 30), torch.Generator().manual_seed(0))
    for channel in range(3):
        assert noise[:, channel].mean().item() == pytest.approx(images[:, channel].mean().item(), abs=0.03)
        assert noise[:, channel].std().item() == pytest.approx(images[:, channel].std().item(), rel=0.02)
        # Uniform: nothing beyond sqrt(3) deviations.
        assert (noise[:, channel] - images[:, channel].mean()).abs().max() <= 3**0.5 * images[:, channel].std() * 1.001
    torch.testing.assert_close(mixing.mean_like(images).flatten(), images.mean((0, 2, 3)))
