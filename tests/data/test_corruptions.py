from __future__ import annotations

import math
import sys
from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from skimage import color, filters
from sklearn.datasets import load_sample_images

from ssl_gradmix.data import corruptions
from ssl_gradmix.data.corruptions import COMMON, EXTRA, GROUPS, PARAMETERS, PRESETS, corrupt, corrupt_batch

ALL = COMMON + EXTRA
FIXED = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur"}


def photographs(size: int) -> np.ndarray:
    """Crops of the two photographs that scikit-learn carries, uint8 (N, size, size, 3)."""
    crops = []
    for photograph in load_sample_images().images:
        small = Image.fromarray(photograph).resize((5 * size, 3 * size), Image.Resampling.BOX)
        pixels = np.asarray(small).reshape(3, size, 5, size, 3)
        crops += list(pixels.transpose(0, 2, 1, 3, 4).reshape(15, size, size, 3))
    return np.stack(crops)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return photographs(32)


def generator() -> np.random.Generator:
    return np.random.Generator(np.random.Philox(7))


def gray(level: int, size: int = 32, count: int = 50) -> np.ndarray:
    return np.full((count, size, size, 3), level, np.uint8)


def assert_equal_but_for_rounding(result: np.ndarray, expected: np.ndarray, share: float = 0.01) -> None:
    """A value next to a whole number may be truncated either way."""
    difference = np.abs(result.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= share


# Names and arguments


def test_names_in_benchmark_order_and_five_severities_of_each() -> None:
    assert " ".join(COMMON) == (
        "gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost fog "
        "brightness contrast elastic_transform pixelate jpeg_compression"
    )
    assert EXTRA == ("speckle_noise", "gaussian_blur", "spatter", "saturate")
    assert [len(group) for group in GROUPS.values()] == [3, 4, 4, 4]
    for preset in PRESETS:
        assert set(PARAMETERS[preset]) == set(ALL)
        assert all(len(set(rows)) == 5 for rows in PARAMETERS[preset].values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "rain"}, "unknown corruption 'rain'; there are gaussian_noise, .*saturate"),
        ({"severity": 6}, "severity must be a whole number from 1 to 5, got 6"),
        ({"severity": 2.0}, "severity must be .* got 2.0"),
        ({"seed": -1}, "seed must be 0 or larger, got -1"),
        ({"preset": "cifar10"}, "unknown preset 'cifar10'; there are cifar, imagenet64, imagenet"),
        ({"image": np.zeros((32, 32), np.uint8)}, r"RGB with shape \(H, W, 3\), got \(32, 32\); repeat gray"),
        ({"image": np.zeros((32, 32, 3))}, "uint8 from 0 to 255, got float64"),
        ({"image": Image.new("RGB", (32, 32))}, "NumPy array of uint8 from 0 to 255, got Image"),
        ({"image": np.zeros((32, 7, 3), np.uint8)}, r"at least 8 pixels a side, got shape \(32, 7, 3\)"),
        ({"images": np.zeros((32, 32, 3), np.uint8)}, r"shape \(N, H, W, 3\), got \(32, 32, 3\)"),
        ({"images": gray(0, count=3), "indices": [0, 1]}, r"indices must be 3 numbers, one an image, got shape \(2,\)"),
        ({"images": gray(0, count=3), "indices": [0, -2, 1]}, "indices must be 0 or larger, got -2"),
        ({"images": gray(0, count=3), "workers": 0}, "workers must be 1 or larger, got 0"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    function, images = (
        (corrupt_batch, {}) if "images" in change else (corrupt, {"image": np.zeros((32, 32, 3), np.uint8)})
    )
    with pytest.raises(ValueError, match=message):
        function(**images | {"name": "contrast", "severity": 1} | change)


def test_default_preset_is_the_nearest_in_ratio() -> None:
    chosen = {size: corruptions.default_preset(size) for size in (28, 32, 45, 46, 64, 96, 119, 120, 224, 384)}
    assert [size for size, preset in chosen.items() if preset == "cifar"] == [28, 32, 45]
    assert [size for size, preset in chosen.items() if preset == "imagenet64"] == [46, 64, 96, 119]
    assert [size for size, preset in chosen.items() if preset == "imagenet"] == [120, 224, 384]
    with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
        corruptions.default_preset(0)


# What a result depends on


@pytest.mark.parametrize("name", ALL)
def test_depends_on_seed_name_severity_and_index_alone(name: str, images: np.ndarray) -> None:
    before = images[0].copy()
    first = corrupt(images[0], name, 3, seed=5, index=11)
    np.random.seed(0)
    corrupt(images[1], name, 2)
    assert np.array_equal(first, corrupt(images[0], name, 3, seed=5, index=11))
    assert np.array_equal(images[0], before)
    assert first.dtype == np.uint8
    assert first.shape == images[0].shape
    if name not in FIXED | {"saturate"}:
        assert not np.array_equal(first, corrupt(images[0], name, 3, seed=6, index=11))
        assert not np.array_equal(first, corrupt(images[0], name, 3, seed=5, index=12))


def test_noise_of_neighbors_severities_and_corruptions_is_unrelated() -> None:
    black = gray(100, count=1)[0]
    draws = [
        corrupt(black, "gaussian_noise", 5, seed=0, index=0),
        corrupt(black, "gaussian_noise", 5, seed=0, index=1),
        corrupt(black, "gaussian_noise", 5, seed=1, index=0),
        corrupt(black, "gaussian_noise", 4, seed=0, index=0),
        corrupt(black, "speckle_noise", 5, seed=0, index=0),
    ]
    correlation = np.corrcoef([draw.ravel() for draw in draws])
    assert np.abs(correlation - np.eye(len(draws))).max() < 5 / math.sqrt(black.size)


@pytest.mark.parametrize("name", ALL)
def test_batch_equals_single_in_any_order(name: str, images: np.ndarray) -> None:
    order = np.random.default_rng(0).permutation(len(images))[:7]
    together = corrupt_batch(images[order], name, 3, seed=2, indices=order)
    alone = [corrupt(images[i], name, 3, seed=2, index=int(i)) for i in order]
    assert np.array_equal(together, alone)
    assert np.array_equal(corrupt_batch(images[:2], name, 3)[1], corrupt(images[1], name, 3, index=1))
    assert corrupt_batch(gray(0, count=0), name, 1).shape == (0, 32, 32, 3)


def test_workers_change_nothing(images: np.ndarray) -> None:
    for name in ("glass_blur", "zoom_blur"):
        assert np.array_equal(corrupt_batch(images, name, 4), corrupt_batch(images, name, 4, workers=2))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ALL)
def test_small_and_oblong_images(name: str, preset: str, images: np.ndarray) -> None:
    for shape in ((8, 8), (8, 30), (30, 9)):
        image = np.ascontiguousarray(images[3, : shape[0], : shape[1]])
        for severity in (1, 5):
            assert corrupt(image, name, severity, preset=preset).shape == image.shape


# Severities

# What the published parameters do not order by distance to the clean image, for every preset or for one.
NOT_MONOTONE = {
    "elastic_transform": "the first severities are the most affine, and move the whole image",
    "saturate": "saturation is taken away at 1 and 2, and added from 3 on",
    "glass_blur": "some severities smooth more, others shuffle more",
    "frost": "the weight of the image falls with severity, and frost alone brightens",
    "cifar spatter": "it is water up to 3 and mud from 4 on",
    "cifar motion_blur": "3 and 4 differ in the kernel's negligible end alone",
    "imagenet fog": "from 4 on the image is hidden, and what is left of the distance is chance",
}


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        (preset, name)
        for preset in PRESETS
        for name in ALL
        if name not in NOT_MONOTONE and f"{preset} {name}" not in NOT_MONOTONE
    ],
)
def test_severities_are_monotone(preset: str, name: str) -> None:
    images = photographs(64 if preset == "imagenet64" else 32)
    distances = [
        np.sqrt(
            np.mean((corrupt_batch(images, name, severity, preset=preset) - images.astype(float)) ** 2, axis=(1, 2, 3))
        )
        for severity in range(1, 6)
    ]
    means = np.mean(distances, axis=1)
    assert (np.diff(means) > 0).all(), means


def test_presets_grow_harsher_with_their_image_size(images: np.ndarray) -> None:
    """The common mistake: ImageNet's parameters at 32 pixels."""
    for name in ("gaussian_noise", "contrast", "defocus_blur"):
        distances = [
            np.abs(corrupt_batch(images, name, 3, preset=preset) - images.astype(float)).mean() for preset in PRESETS
        ]
        assert distances == sorted(distances)


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("name", sorted({*FIXED, "glass_blur", "motion_blur", "elastic_transform"} - {"brightness"}))
def test_black_and_white_stay(name: str, level: int) -> None:
    image = gray(level, count=1)[0]
    for severity in range(1, 6):
        assert np.abs(corrupt(image, name, severity).astype(int) - level).max() <= (name == "jpeg_compression")


# Noise, by its moments. Truncation takes half a level off every mean.


@pytest.mark.parametrize(("preset", "severity", "std"), [("cifar", 1, 0.04), ("cifar", 5, 0.1), ("imagenet", 1, 0.08)])
def test_gaussian_noise_has_the_standard_deviation(preset: str, severity: int, std: float) -> None:
    noise = corrupt_batch(gray(128), "gaussian_noise", severity, preset=preset) + 0.5 - 128
    assert noise.mean() == pytest.approx(0, abs=5 * 255 * std / math.sqrt(noise.size))
    assert noise.std() == pytest.approx(255 * std, rel=0.01)


def test_speckle_noise_grows_with_the_value() -> None:
    for level in (50, 150):
        noise = corrupt_batch(gray(level), "speckle_noise", 3) + 0.5 - level
        assert noise.mean() == pytest.approx(0, abs=5 * level * 0.12 / math.sqrt(noise.size))
        assert noise.std() == pytest.approx(level * 0.12, rel=0.01)


def test_shot_noise_is_poisson() -> None:
    photons, level = 75, 90
    values = corrupt_batch(gray(level), "shot_noise", 4)
    counts = np.ceil(values / 255 * photons)
    assert np.array_equal((counts / photons * 255).astype(np.uint8), values)
    expected = level / 255 * photons
    assert counts.mean() == pytest.approx(expected, abs=5 * math.sqrt(expected / counts.size))
    assert counts.var() == pytest.approx(expected, rel=0.02)


def test_impulse_noise_is_half_salt_half_pepper_in_each_value() -> None:
    values = corrupt_batch(gray(128), "impulse_noise", 5)
    flipped = values != 128
    tolerance = 5 * math.sqrt(0.07 / values.size)
    assert (values == 255).mean() == pytest.approx(0.035, abs=tolerance)
    assert (values == 0).mean() == pytest.approx(0.035, abs=tolerance)
    assert set(np.unique(values)) == {0, 128, 255}
    all_three = flipped.all(axis=-1).mean()
    assert all_three == pytest.approx(0.07**3, abs=5 * math.sqrt(0.07**3 / flipped[..., 0].size))


# Closed forms


def test_contrast_by_hand(images: np.ndarray) -> None:
    for factor, severity in ((0.75, 1), (0.15, 5)):
        x = images[0] / 255
        expected = np.empty_like(images[0])
        for channel in range(3):
            mean = x[..., channel].sum() / 1024
            for row in range(32):
                for column in range(32):
                    value = mean + factor * (x[row, column, channel] - mean)
                    expected[row, column, channel] = math.floor(255 * min(max(value, 0), 1))
        assert_equal_but_for_rounding(corrupt(images[0], "contrast", severity), expected, share=0.002)


@pytest.mark.parametrize(("severity", "added"), [(1, 0.05), (3, 0.15), (5, 0.3)])
def test_brightness_is_scikit_images_hsv(severity: int, added: float, images: np.ndarray) -> None:
    hsv = color.rgb2hsv(images / 255)
    hsv[..., 2] = np.clip(hsv[..., 2] + added, 0, 1)
    expected = (np.clip(color.hsv2rgb(hsv), 0, 1) * 255).astype(np.uint8)
    assert np.array_equal(corrupt_batch(images, "brightness", severity), expected)


@pytest.mark.parametrize(("severity", "factor", "added"), [(2, 0.1, 0), (3, 1.5, 0), (5, 2.5, 0.2)])
def test_saturate_is_scikit_images_hsv(severity: int, factor: float, added: float, images: np.ndarray) -> None:
    images = np.concatenate([images, gray(200, count=1)])  # gray gets red
    hsv = color.rgb2hsv(images / 255)
    hsv[..., 1] = np.clip(hsv[..., 1] * factor + added, 0, 1)
    expected = (np.clip(color.hsv2rgb(hsv), 0, 1) * 255).astype(np.uint8)
    assert np.array_equal(corrupt_batch(images, "saturate", severity), expected)


def test_jpeg_compression_is_pillows(images: np.ndarray) -> None:
    for quality, severity in ((80, 1), (40, 5)):
        encoded = BytesIO()
        Image.fromarray(images[0]).save(encoded, "JPEG", quality=quality)
        assert np.array_equal(corrupt(images[0], "jpeg_compression", severity), Image.open(encoded))


def test_pixelate_averages_blocks() -> None:
    image = photographs(64)[0]
    pairs = np.floor(image.reshape(64, 32, 2, 3).mean(axis=2) + 0.5)  # Pillow rounds after each axis
    blocks = np.floor(pairs.reshape(32, 2, 32, 3).mean(axis=1) + 0.5)
    expected = blocks.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    assert np.array_equal(corrupt(image, "pixelate", 5, preset="imagenet64"), expected)


def test_pixelate_is_pillows_box_filter(images: np.ndarray) -> None:
    for side, severity in ((30, 1), (20, 5)):
        small = Image.fromarray(images[0]).resize((side, side), Image.Resampling.BOX)
        assert np.array_equal(corrupt(images[0], "pixelate", severity), small.resize((32, 32), Image.Resampling.BOX))


# Blur, against loops over pixels and other libraries


def test_gaussian_blur_is_scikit_images(images: np.ndarray) -> None:
    expected = (filters.gaussian(images[0] / 255, sigma=0.7, channel_axis=-1) * 255).astype(np.uint8)
    assert np.array_equal(corrupt(images[0], "gaussian_blur", 3), expected)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_defocus_blur_is_opencvs(severity: int, preset: str) -> None:
    image = photographs(PRESETS["imagenet64"])[0]
    radius, alias_blur = PARAMETERS[preset]["defocus_blur"][severity - 1]
    reach, taps = (8, 3) if radius <= 8 else (radius, 5)
    columns, rows = np.meshgrid(np.arange(-reach, reach + 1), np.arange(-reach, reach + 1))
    disk = (columns**2 + rows**2 <= radius**2).astype(np.float32)
    kernel = cv2.GaussianBlur(disk / disk.sum(), (taps, taps), alias_blur)
    channels = [cv2.filter2D(image[..., channel] / 255, -1, kernel) for channel in range(3)]
    expected = (np.clip(np.stack(channels, axis=-1), 0, 1) * 255).astype(np.uint8)
    assert_equal_but_for_rounding(corrupt(image, "defocus_blur", severity, preset=preset), expected, share=0.0005)


@pytest.mark.parametrize(("sigma", "reach", "rounds"), [(0.4, 1, 2), (0.9, 2, 2), (0.05, 1, 1)])
def test_glass_blur_copies_pixel_after_pixel(sigma: float, reach: int, rounds: int, images: np.ndarray) -> None:
    result = corruptions._glass_blur(images[0], generator(), sigma, reach, rounds)

    def smooth(x: np.ndarray) -> np.ndarray:
        return np.stack([ndimage.gaussian_filter(x[..., c], sigma, mode="nearest") for c in range(3)], axis=-1)

    moved = (smooth(images[0] / 255) * 255).astype(np.uint8)
    places = [(row, column) for row in range(32 - reach, reach, -1) for column in range(32 - reach, reach, -1)]
    offsets = generator().integers(-reach, reach, size=(2, rounds, len(places)))
    assert offsets.min() == -reach
    assert offsets.max() == reach - 1
    for turn in range(rounds):
        for number, (row, column) in enumerate(places):
            dy, dx = offsets[:, turn, number]
            here, there = moved[row, column], moved[row + dy, column + dx]
            moved[row, column], moved[row + dy, column + dx] = there, here  # views: both end up as `there` was
    assert np.array_equal(result, (smooth(moved / 255) * 255).astype(np.uint8))


def smeared_by_hand(image: np.ndarray, radius: int, sigma: float, angle: float) -> np.ndarray:
    """ImageMagick's MotionBlurImage: every pixel is a weighted sum along a line, read with replicated borders."""
    height, width, channels = image.shape
    weights = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(2 * radius + 1)]
    blurred = np.zeros(image.shape, np.uint8)
    for row in range(height):
        for column in range(width):
            total = np.zeros(channels)
            for i, weight in enumerate(weights):
                y = row + math.ceil(i * math.sin(math.radians(angle)) - 0.5)
                x = column + math.ceil(i * math.cos(math.radians(angle)) - 0.5)
                total += weight * image[min(max(y, 0), height - 1), min(max(x, 0), width - 1)]
            blurred[row, column] = np.floor(total / sum(weights) + 0.5)
    return blurred


@pytest.mark.parametrize(("radius", "sigma"), [(6, 1), (9, 2.5), (20, 15)])
def test_motion_blur_by_hand(radius: int, sigma: float, images: np.ndarray) -> None:
    image = images[4, :20]
    angle = generator().uniform(-45, 45)
    expected = smeared_by_hand(image, radius, sigma, angle)
    assert_equal_but_for_rounding(corruptions._motion_blur(image, generator(), radius, sigma), expected, share=0.002)


def zoomed_by_hand(x: np.ndarray, factor: float) -> np.ndarray:
    """Crops the center, enlarges it by scipy.ndimage.zoom, trims it."""
    side = x.shape[0]
    crop = math.ceil(side / factor)
    top = (side - crop) // 2
    large = ndimage.zoom(x[top : top + crop, top : top + crop], (factor, factor, 1), order=1)
    trim = (large.shape[0] - side) // 2
    return large[trim : trim + side, trim : trim + side]


@pytest.mark.parametrize(("preset", "severity", "factors"), [("cifar", 1, 7), ("cifar", 5, 26), ("imagenet", 5, 11)])
def test_zoom_blur_by_hand(preset: str, severity: int, factors: int, images: np.ndarray) -> None:
    enlarged = np.arange(1, *PARAMETERS[preset]["zoom_blur"][severity - 1])
    assert len(enlarged) == factors
    x = images[0] / 255
    total = x + sum(zoomed_by_hand(x, factor) for factor in enlarged)
    expected = (np.clip(total / (factors + 1), 0, 1).astype(np.float32) * 255).astype(np.uint8)
    assert_equal_but_for_rounding(corrupt(images[0], "zoom_blur", severity, preset=preset), expected)


# Weather


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_snow_by_hand(severity: int, images: np.ndarray) -> None:
    loc, scale, zoom, threshold, radius, sigma, mix = PARAMETERS["cifar"]["snow"][severity - 1]
    draws = generator()
    flakes = zoomed_by_hand(draws.normal(loc, scale, size=(32, 32))[..., np.newaxis], zoom)
    flakes = np.where(flakes < threshold, 0, flakes)
    flakes = (np.clip(flakes, 0, 1) * 255).astype(np.uint8)
    layer = smeared_by_hand(flakes, radius, sigma, draws.uniform(-135, -45)) / 255
    x = images[0] / 255
    luma = np.sum(x * [0.299, 0.587, 0.114], axis=-1, keepdims=True)
    whitened = mix * x + (1 - mix) * np.maximum(x, luma * 1.5 + 0.5)
    expected = (np.clip(whitened + layer + layer[::-1, ::-1], 0, 1) * 255).astype(np.uint8)
    result = corruptions._snow(images[0], generator(), *PARAMETERS["cifar"]["snow"][severity - 1])
    assert_equal_but_for_rounding(result, expected, share=0.02)


def plasma_by_hand(size: int, decay: float, draws: np.random.Generator) -> np.ndarray:
    """Diamond-square on a torus, point by point."""
    heights = np.zeros((size, size))
    amplitude, step = 100.0, size

    def average(row: int, column: int, directions: list[tuple[int, int]]) -> float:
        neighbors = [heights[(row + step // 2 * dy) % size, (column + step // 2 * dx) % size] for dy, dx in directions]
        return sum(neighbors) / 4 + amplitude * draws.uniform(-amplitude, amplitude)

    diagonal, straight = [(-1, -1), (-1, 1), (1, -1), (1, 1)], [(-1, 0), (1, 0), (0, -1), (0, 1)]
    while step > 1:
        half = step // 2
        for rows, columns, directions in ((half, half, diagonal), (0, half, straight), (half, 0, straight)):
            for row in range(rows, size, step):
                for column in range(columns, size, step):
                    heights[row, column] = average(row, column, directions)
        step, amplitude = half, amplitude / decay
    return (heights - heights.min()) / (heights.max() - heights.min())


@pytest.mark.parametrize(("shape", "size"), [((32, 32), 32), ((24, 33), 64)])
def test_fog_by_hand(shape: tuple[int, int], size: int) -> None:
    image = photographs(40)[1, : shape[0], : shape[1]]
    strength, decay = 0.75, 2.5
    x = image / 255
    haze = plasma_by_hand(size, decay, generator())[: shape[0], : shape[1], np.newaxis]
    expected = (np.clip((x + strength * haze) * x.max() / (x.max() + strength), 0, 1) * 255).astype(np.uint8)
    assert_equal_but_for_rounding(corruptions._fog(image, generator(), strength, decay), expected, share=0.002)


def test_frost_mixes_in_a_random_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = np.mgrid[:40, :60]
    textures = tuple(
        np.stack([rows, columns, np.full_like(rows, number)], axis=-1).astype(np.uint8) for number in range(5)
    )
    monkeypatch.setattr(corruptions, "_frost_textures", lambda *_: textures)
    image = gray(100, count=1)[0]
    random = generator()
    crops = [corruptions._frost(image, random, 0.5, 2, 0.2).astype(int) - 50 for _ in range(300)]
    tops, lefts, numbers = (np.array([crop[0, 0, channel] // 2 for crop in crops]) for channel in range(3))
    for crop, top, left, number in zip(crops, tops, lefts, numbers, strict=True):
        assert np.array_equal(crop, 2 * textures[number][top : top + 32, left : left + 32].astype(int))
    assert (tops.min(), tops.max()) == (0, 7)
    assert (lefts.min(), lefts.max()) == (0, 27)
    assert set(numbers) == {0, 1, 2, 3, 4}


def test_frost_never_wraps_round() -> None:
    assert (corrupt_batch(gray(255), "frost", 1) == 255).all()


@pytest.fixture
def frost_package(tmp_path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    """A package of five one-colored textures, as `imagecorruptions` or `torch_uncertainty_assets` would be found."""
    package, files = request.param
    folder = tmp_path / package / "frost"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise ImportError('broken, as imagecorruptions is at times')")
    for number, file in enumerate(files):
        Image.new("RGBA" if file.endswith("png") else "RGB", (400, 300), (40 * number, 0, 0)).save(folder / file)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    caches = (corruptions._frost_textures, corruptions._read_frost_textures)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


ORIGINAL = ("imagecorruptions", ["frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg", "frost6.jpg"])
REENCODED = ("torch_uncertainty_assets", [f"frost{number}.jpg" for number in range(1, 6)])


@pytest.mark.parametrize(
    ("frost_package", "source", "reds"),
    [
        (ORIGINAL, "imagecorruptions", [0, 40, 80, 120, 160]),
        (REENCODED, "torch-uncertainty-assets", [0, 40, 40, 80, 120]),
        (("another", []), "synthetic", None),
    ],
    indirect=["frost_package"],
)
def test_frost_takes_the_photographs_of_an_installed_package(
    frost_package: None, source: str, reds: list[int] | None
) -> None:
    assert corruptions.frost_source() == source
    textures = corruptions._frost_textures(0.2, 32, 32)
    assert len(textures) == 5
    if reds is not None:
        assert [texture.shape for texture in textures] == [(60, 80, 3)] * 5
        assert np.abs([texture[..., 0].mean() for texture in textures] - np.array(reds)).max() < 2
    else:
        assert all(texture.std() > 5 for texture in textures)


def test_frost_enlarges_photographs_that_do_not_cover_the_image() -> None:
    for texture in corruptions._frost_textures(0.2, 150, 40):
        assert texture.shape[0] > 150
        assert texture.shape[1] > 40


@pytest.mark.parametrize("scale", [0.2, 0.3, 1.0, 1.7])
def test_frost_is_resized_as_by_opencv(scale: float) -> None:
    texture = load_sample_images().images[0][:315, :560]
    expected = cv2.resize(texture, (0, 0), fx=scale, fy=scale)
    difference = np.abs(corruptions._resize(texture, scale).astype(int) - expected)
    assert difference.max() <= 1


# Elastic transform and spatter


def bilinear_by_hand(x: np.ndarray, row: float, column: float, twice_edge: bool) -> np.ndarray:
    """Reads one point; outside, the image is mirrored with its edge pixels repeated or not."""

    def pixel(row: int, column: int) -> np.ndarray:
        place = []
        for index, size in ((row, x.shape[0]), (column, x.shape[1])):
            while not 0 <= index < size:
                index = -index - twice_edge if index < 0 else 2 * (size - 1) + twice_edge - index
            place.append(index)
        return x[tuple(place)].astype(np.float64)

    top, left = math.floor(row), math.floor(column)
    down, right = row - top, column - left
    upper = (1 - right) * pixel(top, left) + right * pixel(top, left + 1)
    lower = (1 - right) * pixel(top + 1, left) + right * pixel(top + 1, left + 1)
    return (1 - down) * upper + down * lower


@pytest.mark.parametrize("severity", [1, 2, 5])
def test_elastic_transform_by_hand(severity: int, images: np.ndarray) -> None:
    image = images[2, :20, :16]
    alpha, sigma, jitter = PARAMETERS["cifar"]["elastic_transform"][severity - 1]
    draws = generator()
    points = np.array(
        [(10 + 5, 8 + 5), (10 - 5, 8 + 5), (10 - 5, 8 - 5)], float
    )  # center and a third of the shorter side
    moved = points + draws.uniform(-jitter, jitter, size=(3, 2))
    forward = np.linalg.solve(np.column_stack([points, np.ones(3)]), moved)
    linear, shift = forward[:2].T, forward[2]
    x = (image / 255).astype(np.float32)  # rounded at each step: in float64 flat areas would lose a level
    mapped = np.empty_like(x)
    for row in range(20):
        for column in range(16):
            source = np.linalg.inv(linear) @ (np.array([row, column]) - shift)
            mapped[row, column] = bilinear_by_hand(x, *source, twice_edge=False)
    fields = draws.uniform(-1, 1, size=(2, 20, 16))
    dy, dx = (alpha * ndimage.gaussian_filter(field, sigma, mode="reflect", truncate=3) for field in fields)
    expected = np.empty_like(x)
    for row in range(20):
        for column in range(16):
            place = (row + dy[row, column], column + dx[row, column])
            expected[row, column] = bilinear_by_hand(mapped, *place, twice_edge=True)
    result = corruptions._elastic_transform(image, generator(), alpha, sigma, jitter)
    assert_equal_but_for_rounding(result, (np.clip(expected, 0, 1) * 255).astype(np.uint8), share=0.002)


def test_spatter_with_mud_is_brown_and_needs_no_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    image = gray(200, count=1)[0]
    everywhere = corruptions._spatter(image, generator(), 0.9, 0, 1, 0.69, 0.6, mud=1)
    assert np.abs(everywhere - np.array([63, 42, 20])).max() <= 1
    splashes = corrupt(image, "spatter", 5)
    assert 0.01 < (splashes != 200).mean() < 0.5


def test_spatter_with_water_without_opencv_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match="spatter at severities 1 to 3 needs OpenCV: pip install opencv"):
        corrupt(gray(200, count=1)[0], "spatter", 3)


def test_spatter_with_water_adds_pale_turquoise_and_no_drop_adds_nothing() -> None:
    image = gray(10, count=1)[0]
    added = corrupt(image, "spatter", 3).astype(float) - 10
    assert added.min() >= -1
    assert added.max() == pytest.approx(238 * 0.5, abs=1)
    assert np.abs(added[..., 0] / 175 - added[..., 1] / 238).max() < 2 / 175
    assert np.array_equal(added[..., 1], added[..., 2])
    assert np.array_equal(corruptions._spatter(image, generator(), 0.1, 0.1, 1, 0.7, 0.5, mud=0), image)
