"""Views against torchvision: operations image by image, random numbers by their distribution."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms import ColorJitter, InterpolationMode, RandomErasing, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from ssl_gradmix.data import augmentation
from ssl_gradmix.data.augmentation import CROP_NUMBERS, Augmentation, Views, eval_transform

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
OFF = {"min_scale": 1.0, "flip": 0.0, "jitter": 0.0, "gray": 0.0}
STRONG = Augmentation(0.1, 0.5, 0.8, 0.8, 0.8, 0.8, 0.4, gray=0.3, blur=0.5, solarize=0.5)
ORDERS = list(itertools.permutations(range(4)))
ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


STRONG_AND_MORE = replace(STRONG, rotation=25.0, erase=0.6, erase_scale=(0.05, 0.4))


def photographs(n: int, height: int = 32, width: int = 32) -> torch.Tensor:
    """uint8 (n, 3, height, width): smooth, with sharp edges, gray and saturated parts."""
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    smooth = F.resize(coarse, [height, width], antialias=True)
    smooth[:, :, :, : width // 4] = (smooth[:, :, :, : width // 4] > 0.5).float()
    smooth[:, :, : height // 4] = smooth[:, :1, : height // 4]
    return (smooth * 255).round().byte()


def views_of(images, settings: Augmentation, size: int = 32, seed: int = 0, n_views: int = 1):
    torch.manual_seed(seed)
    return Views(settings, size, MEAN, STD)(images, n_views)


def crops_of(extents: list, min_scale: float = 0.05) -> torch.Tensor:
    torch.manual_seed(1)
    drawn = torch.rand(len(extents), CROP_NUMBERS)
    return augmentation.crop_boxes(torch.tensor(extents), min_scale, drawn)


def jittered(image: torch.Tensor, factors: list[float], order) -> torch.Tensor:
    for column in order:
        image = ADJUST[column](image, factors[column] + (column < 3))
    return image


# Operations


@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 32), (96, 64, 32), (20, 30, 32), (224, 224, 48)]
)
def test_resized_crop_equals_torchvisions(height: int, width: int, size: int) -> None:
    images = photographs(12, height, width)
    boxes = crops_of([[height, width]] * 12)
    boxes[:2] = torch.tensor([[0, 0, height, width], [height - 1, 3, 1, 2]])
    flip = torch.tensor([0.0, 1.0]).repeat(6).view(12, 1)
    crops = augmentation.resized_crop(images, boxes, flip, size)
    for crop, image, box, flipped in zip(crops, images, boxes.int().tolist(), flip, strict=True):
        expected = F.resized_crop(image.float(), *box, [size, size], antialias=True)
        expected = F.hflip(expected) if flipped else expected
        torch.testing.assert_close(crop, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("order", ORDERS[::5])
def test_color_jitter_equals_torchvisions(order: tuple[int, ...]) -> None:
    images = photographs(8) / 255
    jitter = torch.empty(8, 4).uniform_(-1, 1, generator=torch.Generator().manual_seed(2))
    jitter[:, 3] /= 2
    jitter[0] = torch.tensor([-1.0, -1.0, -1.0, 0.5])  # black, then no contrast, no saturation
    changed = augmentation.color_jitter(images, jitter, order)
    for result, image, factors in zip(changed, images, jitter.tolist(), strict=True):
        torch.testing.assert_close(result, jittered(image, factors, order), rtol=0, atol=2e-5)


@pytest.mark.parametrize("shift", [-0.5, -0.3, 0.05, 0.25, 0.5])
def test_shift_hue_equals_torchvisions_on_every_tie_between_channels(shift: float) -> None:
    levels = torch.tensor([0.0, 0.2, 0.5, 1.0])
    colors = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 8, 8)
    shifted = augmentation.shift_hue(colors, torch.full((1, 1, 1, 1), shift))
    torch.testing.assert_close(shifted, F.adjust_hue(colors, shift), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("size", "kernel"), [(32, 3), (96, 9), (224, 23)])
def test_gaussian_blur_equals_torchvisions(size: int, kernel: int) -> None:
    images = photographs(3, size, size) / 255
    sigmas = torch.tensor([[0.1], [0.7], [2.0]])
    blurred = augmentation.gaussian_blur(images, sigmas)
    for result, image, sigma in zip(blurred, images, sigmas.view(-1).tolist(), strict=True):
        expected = F.gaussian_blur(image, [kernel] * 2, [sigma] * 2)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def rotated(image: torch.Tensor, angle: float) -> torch.Tensor:
    return F.rotate(image, angle, InterpolationMode.BILINEAR, fill=0)


def test_rotation_equals_torchvisions() -> None:
    images = photographs(6, 31, 31) / 255
    angles = torch.tensor([0.0, 3.0, -33.5, 90.0, 170.0, -300.0])
    turned = augmentation.rotate(images, angles.view(-1, 1))
    for result, image, angle in zip(turned, images, angles.tolist(), strict=True):
        torch.testing.assert_close(result, rotated(image, angle), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [STRONG, STRONG_AND_MORE])
def test_view_equals_torchvisions_chain_with_the_drawn_numbers(settings: Augmentation) -> None:
    images = photographs(70, 64, 64)  # more than are processed at a time
    torch.manual_seed(3)
    views = Views(settings, 48, MEAN, STD)
    draws = views.draw(images, second=True)
    assert draws.order != sorted(draws.order)
    result = views.apply_draws(images, draws)
    for i, image in enumerate(images):
        box = draws.boxes[i].int().tolist()
        image = F.resized_crop(image.float(), *box, [48, 48], antialias=True) / 255
        image = F.hflip(image) if draws.flip[i] else image
        image = rotated(image, draws.angle[i].item()) if draws.angle[i] else image
        image = jittered(image, draws.jitter[i].tolist(), draws.order)
        image = F.rgb_to_grayscale(image, 3) if draws.gray[i] else image
        sigma = [draws.sigma[i].item()] * 2
        image = F.gaussian_blur(image, [5, 5], sigma) if draws.blur[i] else image
        near_threshold = (image - 128 / 255).abs() < 1e-4
        image = F.solarize(image, 128 / 255) if draws.solarize[i] else image
        image = F.erase(F.normalize(image, MEAN, STD), *draws.erased[i].int().tolist(), 0)
        difference = (result[i] - image).abs()
        assert difference[~near_threshold].max() < 1e-3


# Random numbers


@pytest.mark.parametrize(
    ("height", "width", "min_scale"), [(32, 32, 0.2), (224, 224, 0.08), (40, 16, 0.7)]
)
def test_crops_are_distributed_as_torchvisions(height: int, width: int, min_scale: float) -> None:
    boxes = crops_of([[height, width], [7, 90]] * 3000, min_scale)[::2]  # sizes do not interact
    image, scale, ratio = torch.empty(3, height, width), [min_scale, 1.0], [3 / 4, 4 / 3]
    expected = [RandomResizedCrop.get_params(image, scale, ratio) for _ in range(3000)]

    def measures(drawn: torch.Tensor) -> list[torch.Tensor]:
        top, left, tall, wide = drawn.double().unbind(1)
        return [top, left, top + tall, left + wide, wide / tall, wide * tall]

    for values, wanted in zip(measures(boxes), measures(torch.tensor(expected)), strict=True):
        assert ks_2samp(values, wanted).pvalue > 1e-3


@pytest.mark.parametrize(
    ("size", "scale", "ratio"), [(32, (0.02, 0.33), (0.3, 3.3)), (96, (0.5, 0.9), (0.1, 4.0))]
)
def test_erased_boxes_and_angles_are_distributed_as_torchvisions(size, scale, ratio) -> None:
    settings = Augmentation(erase=0.7, erase_scale=scale, erase_ratio=ratio, rotation=20)
    torch.manual_seed(8)
    images = photographs(1, size, size).expand(4000, -1, -1, -1)
    draws = Views(settings, size, MEAN, STD).draw(images, second=False)
    assert ks_2samp(draws.angle.view(-1), np.linspace(-20, 20, 4001)).pvalue > 1e-3
    image = images[0].float()
    drawn = [RandomErasing.get_params(image, scale, ratio, [0.0])[:4] for _ in range(4000)]
    # Without a box torchvision returns that of the whole image, and sets it to itself.
    expected = torch.tensor([each if each[2] < size else (0, 0, 0, 0) for each in drawn])
    erased = draws.erased[:, 2] > 0
    share = (expected[:, 2] > 0).float().mean().item()
    assert erased.float().mean().item() == pytest.approx(0.7 * share, abs=0.03)
    expected = expected[expected[:, 2] > 0].double()
    for column in range(4):
        assert ks_2samp(draws.erased[erased, column], expected[:, column]).pvalue > 1e-3


def test_options_that_are_off_draw_nothing() -> None:
    """So views are those of earlier versions, in which these options did not exist."""
    torch.manual_seed(9)
    torch.rand(8, 5), torch.rand(8, CROP_NUMBERS), torch.rand(8, 4), torch.rand(8, 1)
    torch.randperm(4)
    state = torch.random.get_rng_state()
    images = photographs(8)
    torch.manual_seed(9)
    without = Views(STRONG, 32, MEAN, STD).draw(images, second=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(9)
    with_more = Views(STRONG_AND_MORE, 32, MEAN, STD).draw(images, second=True)
    assert all(map(torch.equal, without[:7], with_more[:7]))


def test_color_factors_are_distributed_as_torchvisions() -> None:
    settings = Augmentation(brightness=0.4, contrast=0.3, saturation=0.6, hue=0.2, jitter=0.8)
    torch.manual_seed(5)
    images = photographs(1).expand(4000, -1, -1, -1)
    jitter = Views(settings, 32, MEAN, STD).draw(images, second=False).jitter
    ranges = (0.6, 1.4), (0.7, 1.3), (0.4, 1.6), (-0.2, 0.2)
    expected = torch.tensor([ColorJitter.get_params(*ranges)[1:] for _ in range(4000)])
    changed = (jitter != 0).all(1)
    assert torch.equal(changed, (jitter != 0).any(1))
    assert changed.float().mean().item() == pytest.approx(0.8, abs=0.025)
    for column in range(4):
        factors = jitter[changed, column] + (column < 3)
        assert ks_2samp(factors, expected[:, column]).pvalue > 1e-3
    assert np.abs(np.corrcoef(jitter[changed].T) - np.eye(4)).max() < 0.08


def test_orders_of_the_color_changes_are_equally_likely() -> None:
    torch.manual_seed(6)
    views, images = Views(Augmentation(), 32, MEAN, STD), photographs(1)
    drawn = [tuple(views.draw(images, second=False).order) for _ in range(2400)]
    assert chisquare([drawn.count(order) for order in ORDERS]).pvalue > 1e-3


def test_probabilities_and_sigma_follow_the_settings() -> None:
    views = Views(Augmentation(flip=0.3, gray=0.1, blur=0.6, solarize=0.2), 112, MEAN, STD)
    torch.manual_seed(7)
    draws = views.draw(photographs(1, 112, 112).expand(4000, -1, -1, -1), second=True)
    happens = torch.cat([draws.flip, draws.gray, draws.blur, draws.solarize], dim=1)
    assert set(happens.unique().tolist()) == {0.0, 1.0}
    assert happens.mean(0).tolist() == pytest.approx([0.3, 0.1, 0.6, 0.2], abs=0.03)
    assert ks_2samp(draws.sigma.view(-1), np.linspace(0.05, 1.0, 4001)).pvalue > 1e-3


# Views


def test_views_without_changes_are_normalized_images() -> None:
    images = photographs(70)
    plain = eval_transform(32, MEAN, STD)
    first, second, third = views_of(images, Augmentation(**OFF, solarize=1.0), n_views=3)
    assert torch.equal(first, plain(images))
    assert torch.equal(third, plain(images))
    torch.testing.assert_close(second, plain(torch.where(images >= 128, 255 - images, images)))


def test_eval_transform_equals_torchvisions_normalization() -> None:
    images = photographs(3)
    expected = F.normalize(F.to_dtype(images, torch.float32, scale=True), MEAN, STD)
    torch.testing.assert_close(eval_transform(32, MEAN, STD)(images), expected)


def test_gray_views_equal_torchvisions_chain() -> None:
    """Of 8 bits and of 16, which torchvision sees as floats."""
    images = photographs(20, 48, 48)[:, :1]
    deep = images.int() * 257
    deep[:, :, 9:, 9:] -= (deep[:, :, 9:, 9:] > 100) * 100
    torch.manual_seed(4)
    views = Views(replace(STRONG, blur=0.0), 32, MEAN[:1], STD[:1])
    draws = views.draw(images, second=True)
    for stored, white in ((images, 255), (deep, 65535)):
        result = views.apply_draws(stored, draws)
        assert result.shape == (20, 1, 32, 32)
        for i, image in enumerate(stored.float() / white):
            box = draws.boxes[i].int().tolist()
            image = F.resized_crop(image, *box, [32, 32], antialias=True)
            image = F.hflip(image) if draws.flip[i] else image
            order = [column for column in draws.order if column < 2]
            image = jittered(image, draws.jitter[i].tolist(), order)
            near_threshold = (image - 128 / 255).abs() < 1e-4
            image = F.solarize(image, 128 / 255) if draws.solarize[i] else image
            difference = (result[i] - F.normalize(image, MEAN[:1], STD[:1])).abs()
            assert difference[~near_threshold].max() < 1e-3
    (as_list,) = views_of_gray(list(deep))
    assert torch.equal(as_list, views_of_gray(deep)[0])


def views_of_gray(images) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return Views(STRONG_AND_MORE, 32, MEAN[:1], STD[:1])(images, 1)


def test_16_bits_become_a_float_without_loss() -> None:
    values = torch.arange(65536, dtype=torch.int32).view(1, 1, 256, 256)
    expected = torch.arange(65536) / 65535
    normalized = eval_transform(256, [0.0], [1.0])(values)
    torch.testing.assert_close(normalized.view(-1), expected, rtol=0, atol=0)
    assert len(normalized.unique()) == 65536
    same = eval_transform(256, [0.0], [1.0])((values % 256).byte())
    torch.testing.assert_close(eval_transform(256, [0.0], [1.0])(values % 256 * 257), same)


def test_views_differ_by_image_view_and_seed() -> None:
    images = photographs(1).expand(4, -1, -1, -1)
    views = torch.cat(views_of(images, STRONG, n_views=3))
    distances = torch.cdist(views.flatten(1), views.flatten(1)) + 100 * torch.eye(12)
    assert distances.min() > 1
    with torch.autocast("cpu", torch.bfloat16):  # does not round views
        assert torch.equal(torch.cat(views_of(images, STRONG, n_views=3)), views)
    assert not torch.equal(torch.cat(views_of(images, STRONG, n_views=3, seed=1)), views)


def test_views_of_a_list_equal_those_of_a_batch() -> None:
    images = photographs(70, 40, 56)
    together, as_list = (views_of(each, STRONG, 24, n_views=2) for each in (images, list(images)))
    assert all(map(torch.equal, together, as_list))
    crops = Augmentation(**OFF | {"min_scale": 0.1, "flip": 0.5})
    unequal = [*images[:-1], photographs(1, 30, 30)[0]]
    (expected,), (found,) = views_of(images, crops, 24), views_of(unequal, crops, 24)
    torch.testing.assert_close(found[:-1], expected[:-1], rtol=0, atol=1e-5)
    (alone,) = views_of([unequal[-1]] * 70, crops, 24)  # the same draws at the last position
    torch.testing.assert_close(found[-1], alone[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("processes", [2, 3])
def test_views_do_not_depend_on_the_number_of_processes(processes: int) -> None:
    images = photographs(12, 40, 56)
    parts = []
    for process, part in enumerate(images.chunk(processes)):
        torch.manual_seed(0)
        parts.append(Views(STRONG_AND_MORE, 24, MEAN, STD, process, processes)(part, 3))
        state = torch.random.get_rng_state()
    together = views_of(images, STRONG_AND_MORE, 24, n_views=3)
    assert all(map(torch.equal, map(torch.cat, zip(*parts, strict=True)), together))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_views_do_not_synchronize_with_the_device() -> None:
    """Meta tensors hold no values: reading one (item, nonzero, a mask as index) raises."""
    views, images = Views(STRONG_AND_MORE, 32, MEAN, STD), photographs(5)
    made = views.to("meta").apply_draws(images.to("meta"), views.draw(images, second=True))
    assert made.shape == (5, 3, 32, 32)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 1, 8, 8), (2, 3, 8, 8)])
def test_invalid_images_raise(shape: tuple[int, ...]) -> None:
    images = torch.zeros(shape, dtype=torch.float32 if shape == (2, 3, 8, 8) else torch.uint8)
    for make in (
        Views(STRONG, 8, MEAN, STD),
        lambda images, _: eval_transform(8, MEAN, STD)(images),
    ):
        with pytest.raises(ValueError, match="images"):
            make(images, 1)
    with pytest.raises(ValueError, match="images"):
        eval_transform(32, MEAN, STD)(photographs(2, 16, 16))
    with pytest.raises(ValueError, match="images"):
        views_of(list(photographs(2)[:, :1]), STRONG)
    for option in ("erase_scale", "erase_ratio"):
        with pytest.raises(ValueError, match=option):
            Augmentation(**{option: (0.5, 0.2)})
