"""The batched operations against torchvision's, image by image; the draws against torchvision's by distribution."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms import ColorJitter, InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from ssl_gradmix.data import augmentation
from ssl_gradmix.data.augmentation import CROP_NUMBERS, Views, eval_transform
from ssl_gradmix.settings import Augmentation

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
OFF = {"min_scale": 1.0, "flip": 0.0, "jitter": 0.0, "gray": 0.0, "blur": 0.0, "solarize": 0.0}
STRONG = Augmentation(
    min_scale=0.1, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.4, gray=0.3, blur=0.5, solarize=0.5
)
ORDERS = list(itertools.permutations(range(4)))


def photographs(n: int, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    """uint8 (n, 3, height, width): smooth, with sharp edges, gray and saturated parts."""
    rng = torch.Generator().manual_seed(seed)
    smooth = F.resize(torch.rand(n, 3, 5, 5, generator=rng), [height, width], antialias=True)
    smooth[:, :, :, : width // 4] = (smooth[:, :, :, : width // 4] > 0.5).float()
    smooth[:, :, : height // 4] = smooth[:, :1, : height // 4]
    return (smooth * 255).round().byte()


def view_of(images: torch.Tensor, settings: Augmentation, size: int = 32, seed: int = 0, n_views: int = 1):
    torch.manual_seed(seed)
    return Views(settings, size, MEAN, STD)(images, n_views)


# One operation after the other, against torchvision


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (96, 64, 32), (20, 30, 32), (224, 224, 48)])
def test_resized_crop_is_torchvisions_antialiased_one(height: int, width: int, size: int) -> None:
    images = photographs(12, height, width)
    torch.manual_seed(1)
    boxes = augmentation.crop_boxes(torch.tensor([[height, width]]).expand(12, 2), 0.05, torch.rand(12, CROP_NUMBERS))
    boxes[0], boxes[1] = torch.tensor([0, 0, height, width]), torch.tensor([height - 1, 3, 1, 2])
    flip = torch.tensor([0.0, 1.0]).repeat(6).view(12, 1)

    crops = augmentation.resized_crop(images, boxes, flip, size)

    assert crops.dtype == torch.float32
    assert crops.is_contiguous()
    for crop, image, box, flipped in zip(crops, images, boxes.int().tolist(), flip.view(-1), strict=True):
        expected = F.resized_crop(image.float(), *box, [size, size], InterpolationMode.BILINEAR, antialias=True)
        torch.testing.assert_close(crop, F.hflip(expected) if flipped else expected, rtol=0, atol=1e-3)


def test_images_of_different_sizes_are_cropped_as_each_alone() -> None:
    images = [photographs(1, *size)[0] for size in [(96, 64), (40, 120), (33, 33), (8, 300)]]
    torch.manual_seed(1)
    boxes = augmentation.crop_boxes(
        torch.tensor([image.shape[1:] for image in images]), 0.05, torch.rand(4, CROP_NUMBERS)
    )
    flip = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    crops = augmentation.resized_crop(images, boxes, flip, 24)
    for i, (image, (top, left, height, width)) in enumerate(zip(images, boxes.tolist(), strict=True)):
        assert 0 <= top <= image.shape[1] - height
        assert 0 <= left <= image.shape[2] - width
        alone = augmentation.resized_crop(image[None], boxes[i : i + 1], flip[i : i + 1], 24)
        torch.testing.assert_close(crops[i : i + 1], alone, rtol=0, atol=1e-3)


@pytest.mark.parametrize("order", ORDERS[::5])
def test_color_jitter_is_torchvisions_for_each_image(order: tuple[int, ...]) -> None:
    images = photographs(8) / 255
    jitter = torch.empty(8, 4).uniform_(-1, 1, generator=torch.Generator().manual_seed(2))
    jitter[:, 3] /= 2
    jitter[0] = torch.tensor([-1.0, -1.0, -1.0, 0.5])  # black, then no contrast, no saturation

    changed = augmentation.color_jitter(images, jitter, order)

    for result, expected, factors in zip(changed, images, jitter.tolist(), strict=True):
        for column in order:
            adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[column]
            expected = adjust(expected, factors[column] + (column < 3))
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shift", [-0.5, -0.3, 0.05, 0.25, 0.5])
def test_hue_is_torchvisions_on_every_tie_between_channels(shift: float) -> None:
    levels = torch.tensor([0.0, 0.2, 0.5, 1.0])
    colors = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 8, 8)

    torch.testing.assert_close(
        augmentation.shift_hue(colors, torch.full((1, 1, 1, 1), shift)), F.adjust_hue(colors, shift), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize(("size", "kernel"), [(32, 3), (96, 9), (224, 23)])
def test_blur_is_torchvisions_with_a_kernel_of_a_tenth(size: int, kernel: int) -> None:
    images = photographs(3, size, size) / 255
    sigma = torch.tensor([[0.1], [0.7], [2.0]])

    blurred = augmentation.gaussian_blur(images, sigma)

    for result, image, sd in zip(blurred, images, sigma.view(-1).tolist(), strict=True):
        torch.testing.assert_close(result, F.gaussian_blur(image, [kernel] * 2, [sd] * 2), rtol=0, atol=1e-5)


def test_a_view_is_torchvisions_chain_with_the_drawn_numbers() -> None:
    images = photographs(70, 64, 64)  # more than are worked on at a time
    torch.manual_seed(3)
    views = Views(STRONG, 48, MEAN, STD)
    draws = views.draw(images, second=True)
    assert draws.order != sorted(draws.order)

    result = views.apply_draws(images, draws)

    for i, image in enumerate(images):
        top, left, height, width = draws.boxes[i].int().tolist()
        image = F.resized_crop(image.float(), top, left, height, width, [48, 48], antialias=True) / 255
        image = F.hflip(image) if draws.flip[i] else image
        for column in draws.order:
            adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[column]
            image = adjust(image, draws.jitter[i, column].item() + (column < 3))
        image = F.rgb_to_grayscale(image, 3) if draws.gray[i] else image
        image = F.gaussian_blur(image, [5, 5], [draws.sigma[i].item()] * 2) if draws.blur[i] else image
        near_threshold = (image - 128 / 255).abs() < 1e-4
        image = F.solarize(image, 128 / 255) if draws.solarize[i] else image
        difference = (result[i] - F.normalize(image, MEAN, STD)).abs()
        assert difference[~near_threshold].max() < 1e-3


# What is drawn


@pytest.mark.parametrize(("height", "width", "min_scale"), [(32, 32, 0.2), (224, 224, 0.08), (40, 16, 0.7)])
def test_crops_are_distributed_as_torchvisions(height: int, width: int, min_scale: float) -> None:
    torch.manual_seed(4)
    # Every other image is of another size, which draws of this one must not depend on.
    extents = torch.tensor([[height, width], [7, 90]]).repeat(3000, 1)
    boxes = augmentation.crop_boxes(extents, min_scale, torch.rand(6000, CROP_NUMBERS))[::2]
    image = torch.empty(3, height, width)
    expected = torch.tensor(
        [RandomResizedCrop.get_params(image, [min_scale, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    )

    def measures(drawn: torch.Tensor) -> dict[str, torch.Tensor]:
        top, left, box_height, box_width = drawn.double().unbind(1)
        return {
            "top": top,
            "left": left,
            "bottom": top + box_height,
            "right": left + box_width,
            "ratio": box_width / box_height,
            "area": box_width * box_height,
        }

    for name, values in measures(expected).items():
        assert ks_2samp(measures(boxes)[name], values).pvalue > 1e-3, name


def test_color_factors_are_distributed_as_torchvisions() -> None:
    settings = Augmentation(brightness=0.4, contrast=0.3, saturation=0.6, hue=0.2, jitter=0.8)
    torch.manual_seed(5)
    draws = Views(settings, 32, MEAN, STD).draw(photographs(1).expand(4000, -1, -1, -1), second=False)
    expected = torch.tensor(
        [ColorJitter.get_params((0.6, 1.4), (0.7, 1.3), (0.4, 1.6), (-0.2, 0.2))[1:] for _ in range(4000)]
    )

    jittered = (draws.jitter != 0).all(1)
    assert torch.equal(jittered, (draws.jitter != 0).any(1))
    assert jittered.float().mean().item() == pytest.approx(0.8, abs=0.025)
    for column in range(4):
        factors = draws.jitter[jittered, column] + (column < 3)
        assert ks_2samp(factors, expected[:, column]).pvalue > 1e-3
    assert np.abs(np.corrcoef(draws.jitter[jittered].T) - np.eye(4)).max() < 0.08


def test_every_order_of_the_color_changes_is_equally_likely() -> None:
    torch.manual_seed(6)
    views, images = Views(Augmentation(), 32, MEAN, STD), photographs(1)
    drawn = [tuple(views.draw(images, second=False).order) for _ in range(2400)]
    assert chisquare([drawn.count(order) for order in ORDERS]).pvalue > 1e-3


def test_chances_and_blur_follow_the_settings() -> None:
    settings = Augmentation(flip=0.3, gray=0.1, blur=0.6, solarize=0.2)
    torch.manual_seed(7)
    images = photographs(1, 112, 112).expand(4000, -1, -1, -1)
    draws = Views(settings, 112, MEAN, STD).draw(images, second=True)

    for chance, drawn in ((0.3, draws.flip), (0.1, draws.gray), (0.6, draws.blur), (0.2, draws.solarize)):
        assert drawn.mean().item() == pytest.approx(chance, abs=0.03)  # four standard deviations
        assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert ks_2samp(draws.sigma.view(-1), np.linspace(0.05, 1.0, 4001)).pvalue > 1e-3
    assert not Views(settings, 112, MEAN, STD).draw(images, second=False).solarize.any()


# Views as a whole


def test_everything_off_is_exactly_the_normalized_image() -> None:
    images = photographs(70)
    (view,) = view_of(images, Augmentation(**OFF))
    assert torch.equal(view, eval_transform(32, MEAN, STD)(images))


def test_only_the_second_view_is_solarized() -> None:
    images = photographs(5)
    plain = eval_transform(32, MEAN, STD)
    first, second, third = view_of(images, Augmentation(**OFF | {"solarize": 1.0}), n_views=3)
    assert torch.equal(first, plain(images))
    assert torch.equal(third, plain(images))
    torch.testing.assert_close(second, plain(torch.where(images >= 128, 255 - images, images)))


def test_views_differ_between_images_and_between_views_but_not_between_equal_seeds() -> None:
    images = photographs(1).expand(4, -1, -1, -1)
    views = torch.stack(view_of(images, STRONG, n_views=3)).flatten(0, 1)
    apart = torch.cdist(views.flatten(1), views.flatten(1)) + 100 * torch.eye(12)
    assert apart.min() > 1
    assert torch.equal(torch.stack(view_of(images, STRONG, n_views=3)).flatten(0, 1), views)
    assert not torch.equal(torch.stack(view_of(images, STRONG, n_views=3, seed=1)).flatten(0, 1), views)


def test_views_of_a_list_are_those_of_a_batch() -> None:
    images = photographs(70, 40, 56)
    together, one_by_one = (view_of(given, STRONG, 24, n_views=2) for given in (images, list(images)))
    assert all(map(torch.equal, together, one_by_one))
    crops_alone = Augmentation(**OFF | {"min_scale": 0.1, "flip": 0.5})
    torch.manual_seed(0)
    mixed = Views(crops_alone, 24, MEAN, STD)([*images[:-1], photographs(1, 30, 30)[0]], 1)[0]
    torch.testing.assert_close(mixed[:-1], view_of(images, crops_alone, 24)[0][:-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("processes", [2, 3])
def test_views_do_not_depend_on_how_many_processes_share_a_batch(processes: int) -> None:
    images = photographs(12, 40, 56)
    shares = []
    for process, share in enumerate(images.chunk(processes)):
        torch.manual_seed(0)
        shares.append(Views(STRONG, 24, MEAN, STD, process, processes)(share, 3))
        state = torch.random.get_rng_state()
    together = view_of(images, STRONG, 24, n_views=3)
    assert all(map(torch.equal, (torch.cat(parts) for parts in zip(*shares, strict=True)), together))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_batch_of_one_at_another_size() -> None:
    first, second = view_of(photographs(1, 40, 60), STRONG, size=24, n_views=2)
    assert first.shape == second.shape == (1, 3, 24, 24)
    assert first.dtype == torch.float32
    assert first.isfinite().all()


def test_input_is_left_alone_and_autocast_does_not_round() -> None:
    images = photographs(3)
    kept = images.clone()
    (plain,) = view_of(images, STRONG)
    assert torch.equal(images, kept)
    with torch.autocast("cpu", torch.bfloat16):
        (view,) = view_of(images, STRONG)
    assert torch.equal(view, plain)


def test_no_operation_waits_for_the_device() -> None:
    """Meta tensors hold no values: whatever would read one back (item, nonzero, a mask as index) raises."""
    views = Views(STRONG, 32, MEAN, STD)
    images = photographs(5)
    made = views.to("meta").apply_draws(images.to("meta"), views.draw(images, second=True))
    assert made.shape == (5, 3, 32, 32)
    assert made.is_meta


@pytest.mark.parametrize(
    "images", [torch.rand(2, 3, 8, 8), torch.zeros(3, 8, 8).byte(), torch.zeros(2, 1, 8, 8).byte()]
)
def test_device_views_refuse_what_is_not_a_batch_of_8_bit_rgb(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"images must be uint8 \(N, 3, H, W\), got"):
        view_of(images, STRONG)


def test_eval_transform_normalizes_as_torchvision() -> None:
    images = photographs(3)
    expected = F.normalize(F.to_dtype(images, torch.float32, scale=True), MEAN, STD)
    torch.testing.assert_close(eval_transform(32, MEAN, STD)(images), expected)


@pytest.mark.parametrize("images", [torch.rand(2, 3, 32, 32), torch.zeros(2, 3, 16, 16).byte()])
def test_eval_transform_refuses_other_images(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"images must be uint8 \(N, 3, 32, 32\), got"):
        eval_transform(32, MEAN, STD)(images)
