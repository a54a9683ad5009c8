"""Corruptions: their strength for every severity, closed forms, and what they depend on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_sample_images

from ssl_gradmix.data.corruptions import (
    COMMON,
    PARAMETERS,
    PRESETS,
    SEVERITIES,
    corrupt,
    corrupt_batch,
    default_preset,
    frost_source,
)

DETERMINISTIC = (
    *("defocus_blur", "zoom_blur", "brightness"),
    *("contrast", "pixelate", "jpeg_compression"),
)


def photographs(size: int) -> np.ndarray:
    """The two photographs of scikit-learn, uint8 (2, size, size, 3)."""
    squares = [Image.fromarray(each[:400, :400]) for each in load_sample_images().images]
    return np.stack([each.resize((size, size), Image.Resampling.BOX) for each in squares])


IMAGES = photographs(32)

# Mean and deviation of (corrupted - clean) in gray levels at severity 1, at severity 2, and so on,
# for two photographs with seed 1. Recorded when every corruption agreed with a loop over its
# pixels, or with OpenCV, scikit-image, SciPy or Pillow.
STRENGTHS = """
cifar gaussian_noise -0.17 9.85 -0.37 14.56 0.24 19.51 -0.07 21.62 0.37 23.49
cifar shot_noise -0.34 7.29 -0.63 10.06 -1.38 15.72 -1.08 18.04 -1.35 21.29
cifar impulse_noise 0.41 15.58 0.61 21.16 0.70 26.00 0.57 33.25 1.83 41.80
cifar defocus_blur -0.48 2.34 -0.46 5.81 -0.45 8.68 -0.44 11.82 -0.38 15.41
cifar glass_blur 0.40 22.62 -0.77 23.33 -1.28 22.12 -0.56 33.34 -0.37 31.42
cifar motion_blur 1.13 9.90 0.10 17.83 0.24 23.67 0.08 21.56 3.15 25.06
cifar zoom_blur -0.63 14.43 -0.90 16.69 -1.11 19.25 -1.45 21.78 -1.88 24.13
cifar snow 10.91 9.48 22.35 11.41 23.66 15.06 37.59 22.29 46.80 20.31
cifar frost 32.90 8.12 50.00 14.29 61.53 18.65 49.17 19.27 49.92 29.55
cifar fog 0.47 12.28 3.30 30.75 17.66 37.25 17.45 43.56 4.21 48.43
cifar brightness 8.73 4.06 17.26 8.56 24.96 13.27 32.04 18.18 44.84 28.06
cifar contrast -0.50 17.14 -0.46 34.30 -0.50 41.15 -0.48 48.04 -0.49 58.31
cifar elastic_transform 3.57 35.47 2.38 27.52 0.65 24.52 1.51 23.50 -0.79 21.38
cifar pixelate 0.06 8.72 0.12 7.19 0.15 8.40 0.24 11.61 0.37 15.89
cifar jpeg_compression 0.14 10.44 0.09 11.98 0.15 12.68 0.31 13.40 -0.14 14.19
imagenet64 gaussian_noise -0.18 9.81 0.07 19.35 0.58 28.05 1.05 34.42 1.50 40.16
imagenet64 shot_noise -0.52 10.02 -0.72 15.62 -1.41 21.57 -1.95 27.01 -3.05 37.34
imagenet64 impulse_noise 0.07 15.48 0.27 21.06 1.20 33.86 2.01 43.62 3.40 56.12
imagenet64 defocus_blur -0.49 7.84 -0.40 10.52 -0.45 14.12 -0.46 17.98 -0.50 19.53
imagenet64 glass_blur -0.00 21.26 -0.67 17.34 -0.99 23.11 -0.74 21.19 -1.19 27.81
imagenet64 motion_blur 0.58 8.69 0.10 15.32 0.19 19.75 0.17 20.60 1.99 22.37
imagenet64 zoom_blur -0.68 14.95 -0.94 19.39 -1.18 22.35 -1.53 25.41 -1.93 27.94
imagenet64 snow 36.05 14.62 39.31 15.86 54.59 23.36 66.70 30.01 73.04 29.28
imagenet64 frost 48.53 14.17 57.27 18.26 63.80 21.96 58.06 24.72 63.06 35.92
imagenet64 fog 1.33 21.38 4.45 38.06 21.10 44.02 21.53 52.67 5.22 54.34
imagenet64 brightness 16.98 8.63 31.31 18.30 43.74 28.19 55.32 38.44 65.80 48.40
imagenet64 contrast -0.52 42.16 -0.51 49.21 -0.54 56.21 -0.51 63.26 -0.47 66.79
imagenet64 elastic_transform 3.41 40.40 1.67 30.44 0.85 30.36 1.42 24.41 -0.06 22.43
imagenet64 pixelate 0.11 6.63 0.20 10.03 0.31 12.37 0.40 13.60 0.48 15.29
imagenet64 jpeg_compression 0.10 10.91 0.21 11.40 0.11 11.96 0.20 12.72 0.31 14.45
imagenet gaussian_noise 0.22 19.12 0.49 28.21 1.41 40.31 3.16 55.17 5.83 73.38
imagenet shot_noise -1.04 19.73 -2.11 29.37 -3.83 40.69 -7.92 59.25 -11.06 73.81
imagenet impulse_noise 0.70 26.05 1.21 37.30 2.27 45.31 3.83 62.50 6.54 78.01
imagenet defocus_blur -0.50 19.53 -0.47 22.21 -0.47 26.51 0.88 29.41 0.68 32.28
imagenet glass_blur -0.83 22.79 -0.57 21.65 -0.31 31.53 -1.25 29.96 -0.12 31.18
imagenet motion_blur 2.56 21.05 0.52 29.84 0.80 37.71 0.61 42.28 12.48 46.22
imagenet zoom_blur -0.94 19.39 -1.18 22.35 -1.50 23.82 -1.81 26.03 -2.31 28.46
imagenet snow 40.30 21.89 62.50 31.17 61.78 31.09 75.41 40.83 91.02 42.94
imagenet frost 61.67 19.25 82.37 33.14 95.36 38.66 71.88 39.46 85.09 48.89
imagenet fog 2.77 45.12 4.32 63.48 23.73 63.31 12.82 66.71 8.64 63.63
imagenet brightness 16.98 8.63 31.31 18.30 43.74 28.19 55.32 38.44 65.80 48.40
imagenet contrast -0.52 42.16 -0.51 49.21 -0.54 56.21 -0.51 63.26 -0.47 66.79
imagenet elastic_transform 1.98 95.37 -6.50 79.31 0.70 34.78 3.98 38.51 0.87 37.98
imagenet pixelate 0.40 13.60 0.48 15.29 0.17 18.21 0.10 21.48 0.26 23.57
imagenet jpeg_compression 0.31 14.45 0.26 15.68 0.34 16.47 0.29 18.63 0.24 20.97"""


@pytest.mark.parametrize(
    "row", STRENGTHS.split("\n")[1:], ids=lambda row: " ".join(row.split()[:2])
)
def test_strength_follows_preset_and_severity(row: str) -> None:
    preset, name, *numbers = row.split()
    images = photographs(32 if preset == "cifar" else 64)
    for severity in SEVERITIES:
        corrupted = corrupt_batch(images, name, severity, seed=1, preset=preset)
        difference = corrupted - images.astype(float)
        expected = [float(number) for number in numbers[2 * severity - 2 : 2 * severity]]
        # JPEG and frost's photographs depend on the version of libjpeg.
        found = [difference.mean(), difference.std()]
        assert found == pytest.approx(
            expected, abs=0.3 if name in ("jpeg_compression", "frost") else 0.02
        )


def test_default_preset_is_the_nearest_in_ratio() -> None:
    chosen = [default_preset(size) for size in (28, 45, 46, 119, 120, 384)]
    assert chosen == ["cifar"] * 2 + ["imagenet64"] * 2 + ["imagenet"] * 2


# Randomness


@pytest.mark.parametrize("name", COMMON)
def test_result_depends_on_seed_name_severity_and_index_alone(name: str) -> None:
    before, order = IMAGES.copy(), np.array([11, 4, 7])
    images = IMAGES[[0, 1, 0]]
    together = corrupt_batch(images, name, 3, seed=5, indices=order)
    np.random.seed(0)
    alone = [
        corrupt(image, name, 3, seed=5, index=i) for image, i in zip(images, order, strict=True)
    ]
    assert np.array_equal(together, alone)
    assert np.array_equal(IMAGES, before)
    random = name not in DETERMINISTIC
    assert np.array_equal(together[0], together[2]) != random
    assert np.array_equal(together[0], corrupt(images[0], name, 3, seed=6, index=11)) != random


def test_workers_do_not_change_the_result() -> None:
    images = IMAGES[[0, 1] * 5]
    assert np.array_equal(*(corrupt_batch(images, "fog", 4, workers=workers) for workers in (1, 2)))


def test_noise_is_unrelated_between_indices_seeds_and_severities() -> None:
    gray = np.full((32, 32, 3), 100, np.uint8)
    settings = [(5, 0, 0), (5, 0, 1), (5, 1, 0), (4, 0, 0)]
    draws = [corrupt(gray, "gaussian_noise", *each).ravel() for each in settings]
    assert np.abs(np.corrcoef(draws) - np.eye(4)).max() < 5 / math.sqrt(gray.size)


def generator(name: str, severity: int, seed: int = 0, index: int = 0) -> np.random.Generator:
    """The random numbers of one image, as they are documented."""
    entropy = [seed, severity, int.from_bytes(name.encode(), "little")]
    key = np.random.SeedSequence(entropy).generate_state(2, np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, index]))


# Recomputations


def to_uint8(x: np.ndarray) -> np.ndarray:
    return (np.clip(x, 0, 1) * 255).astype(np.uint8)


def assert_equal_up_to_rounding(result: np.ndarray, expected: np.ndarray) -> None:
    """A value next to a whole number may be truncated either way."""
    difference = np.abs(result.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 0.01


@pytest.mark.parametrize("severity", [1, 5])
def test_glass_blur_copies_pixel_by_pixel(severity: int) -> None:
    sigma, reach, rounds = PARAMETERS["cifar"]["glass_blur"][severity - 1]
    smooth = lambda x: ndimage.gaussian_filter(x / 255, (sigma, sigma, 0), mode="nearest")  # noqa: E731
    moved = to_uint8(smooth(IMAGES[0]))
    places = [(y, x) for y in range(32 - reach, reach, -1) for x in range(32 - reach, reach, -1)]
    draws = generator("glass_blur", severity).integers(-reach, reach, (2, rounds, len(places)))
    for turn in range(rounds):
        for number, (y, x) in enumerate(places):
            dy, dx = draws[:, turn, number]
            moved[y, x] = moved[y + dy, x + dx]
    assert np.array_equal(corrupt(IMAGES[0], "glass_blur", severity), to_uint8(smooth(moved)))


@pytest.mark.parametrize("severity", [1, 5])
def test_motion_blur_is_a_weighted_sum_along_a_line(severity: int) -> None:
    radius, sigma = PARAMETERS["cifar"]["motion_blur"][severity - 1]
    angle = math.radians(generator("motion_blur", severity).uniform(-45, 45))
    expected, total = np.zeros((32, 32, 3)), 0.0
    for i in range(2 * radius + 1):
        weight = math.exp(-(i**2) / (2 * sigma**2))
        rows = np.clip(np.arange(32) + math.ceil(i * math.sin(angle) - 0.5), 0, 31)
        columns = np.clip(np.arange(32) + math.ceil(i * math.cos(angle) - 0.5), 0, 31)
        expected, total = expected + weight * IMAGES[0][rows][:, columns], total + weight
    blurred = corrupt(IMAGES[0], "motion_blur", severity)
    assert_equal_up_to_rounding(blurred, np.floor(expected / total + 0.5))


def test_frost_records_its_source_and_never_wraps_around() -> None:
    assert frost_source().startswith("torch-uncertainty-assets")
    assert (corrupt_batch(np.full((50, 32, 32, 3), 255, np.uint8), "frost", 1) == 255).all()
    assert corrupt(photographs(700)[0], "frost", 1).shape == (
        700,
        700,
        3,
    )  # larger than the photographs


# Input


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", COMMON)
def test_small_and_oblong_images_keep_their_shape(name: str, preset: str) -> None:
    for shape in ((8, 8), (8, 30), (30, 9)):
        image = np.ascontiguousarray(IMAGES[1, : shape[0], : shape[1]])
        assert corrupt(image, name, 5, preset=preset).shape == image.shape


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("name", "rain"),
        ("severity", 6),
        ("preset", "cifar10"),
        ("images", IMAGES.astype(float)),
        ("images", IMAGES[..., :1]),
        ("images", IMAGES[:, :, :7]),
        ("indices", [0, 1, 2]),
    ],
)
def test_invalid_argument_raises(argument: str, value: object) -> None:
    arguments = {"images": IMAGES, "name": "contrast", "severity": 1, argument: value}
    with pytest.raises(ValueError, match=argument):
        corrupt_batch(**arguments)
