"""The image corruptions of ImageNet-C, CIFAR-10-C and ImageNet-64-C, reproducible per image.

15 corruptions at severities 1 to 5, from D. Hendrycks and T. Dietterich, "Benchmarking Neural
Network Robustness to Common Corruptions and Perturbations", ICLR 2019,
https://arxiv.org/abs/1903.12261. Parameters and formulas are those of the authors' generation
scripts, with three parameter sets: a severity is far milder at 32 pixels than at 224, so ImageNet's
parameters on CIFAR-sized images do not give CIFAR-10-C (see `default_preset`).

The published files were made without seeds and cannot be reproduced bit by bit. Where they exist,
evaluate on them (`ssl_gradmix.data.corrupted`); images made here have the same distribution.

Kept from the authors' scripts, although it looks odd:

- Results are clipped to [0, 1], times 255, and truncated to uint8, so noise darkens by half a level
  on average.
- glass_blur copies the neighbor's value instead of swapping both, and draws offsets from [-d, d),
  without d.
- zoom_blur averages the image with its enlargements from factor 1 on, so the image itself counts
  twice, and rounding decides whether `numpy.arange` includes the last factor.
- elastic_transform at severity 1 of `cifar` and `imagenet64` is only a random affine map;
  ImageNet's parameters come from 244, not 224.
- frost never uses the sixth photograph, and the third is a copy of the second; the last row and
  column of crops is never drawn.
- defocus_blur's disks of radius 8 and 10 sum to 1.01, and so brighten.

Different from the authors' scripts:

- motion_blur and snow use the kernel of ImageMagick's MotionBlurImage without ImageMagick:
  one-sided Gaussian, whole-pixel steps, replicated borders, result rounded to uint8.
- elastic_transform evaluates the affine map at exact coordinates; OpenCV's warpAffine rounds them
  to 1/32 pixel.
- frost uses the photographs of torch-uncertainty-assets, which stores two of them as JPEG, and
  enlarges one that does not cover the image; fog's map is the next power of two that does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import metadata, resources
from io import BytesIO

import numpy as np
from joblib import Parallel, delayed
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy import ndimage, sparse

GROUPS: dict[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
"""The 15 corruptions by group."""

COMMON: tuple[str, ...] = tuple(name for group in GROUPS.values() for name in group)
"""The 15 corruptions of the benchmark, in its order."""

GROUP_OF: dict[str, str] = {name: group for group, names in GROUPS.items() for name in names}
"""Group of each corruption: `noise`, `blur`, `weather` or `digital`."""

PRESETS: dict[str, int] = {"cifar": 32, "imagenet64": 64, "imagenet": 224}
"""Parameter sets, and the image size in pixels that they were made for."""

SEVERITIES: tuple[int, ...] = (1, 2, 3, 4, 5)

SMALLEST_SIDE = 8
"""snow crops by a factor of up to 4.5, and needs two pixels to interpolate between."""

ELASTIC_SIDES = {"cifar": 32, "imagenet64": 64, "imagenet": 244}
"""Image sides in pixels that the parameters of elastic_transform are fractions of."""


def _read_parameters() -> dict[str, dict[str, list[list[float]]]]:
    table = json.loads((resources.files(__package__) / "corruptions.json").read_text("utf-8"))
    for preset, side in ELASTIC_SIDES.items():
        rows = table[preset]["elastic_transform"]
        table[preset]["elastic_transform"] = [[side * value for value in row] for row in rows]
    return table


PARAMETERS = _read_parameters()
"""`PARAMETERS[preset][name][severity - 1]`: arguments of the corruption's function."""


def corrupt(
    image: np.ndarray,
    name: str,
    severity: int,
    seed: int = 0,
    index: int = 0,
    preset: str = "cifar",
) -> np.ndarray:
    """Corrupts one image.

    The result depends only on the image and on (seed, name, severity, index): not on batches,
    order, processes or any global generator.

    Args:
        image: uint8 array (H, W, 3), RGB, at least 8 pixels a side. It is not changed.
        name: One of `COMMON`.
        severity: 1 (mild) to 5 (strong).
        seed: Seed of the whole corrupted set, at least 0.
        index: Number of the image in its set, at least 0; it selects the noise.
        preset: Parameter set, one of `PRESETS`. Images of another size are allowed.

    Returns:
        uint8 array (H, W, 3).

    Raises:
        ValueError: An argument is not as above.
    """
    return corrupt_batch(image[np.newaxis], name, severity, seed, [index], preset)[0]


def corrupt_batch(
    images: np.ndarray,
    name: str,
    severity: int,
    seed: int = 0,
    indices: Sequence[int] | np.ndarray | None = None,
    preset: str = "cifar",
    workers: int = 1,
) -> np.ndarray:
    """Corrupts many images; bit by bit as `corrupt` on each with its index.

    Args:
        images: uint8 array (N, H, W, 3). It is not changed.
        name: As in `corrupt`.
        severity: As in `corrupt`.
        seed: As in `corrupt`.
        indices: Numbers of the images in their set, (N,); 0 to N - 1 by default.
        preset: As in `corrupt`.
        workers: Number of processes; 1 stays in this one. They stay alive between calls.

    Returns:
        uint8 array (N, H, W, 3).

    Raises:
        ValueError: As `corrupt`, or there are not as many indices as images.
    """
    numbers = np.arange(len(images)) if indices is None else np.asarray(indices)
    _check(images, numbers, name, severity, preset)
    parts = min(4 * workers, len(images))
    if parts <= 1:
        return _corrupt_part(images, numbers, name, severity, seed, preset)
    corrupted = Parallel(n_jobs=workers)(
        delayed(_corrupt_part)(*part, name, severity, seed, preset)
        for part in zip(np.array_split(images, parts), np.array_split(numbers, parts), strict=True)
    )
    return np.concatenate(corrupted)


def default_preset(size: int) -> str:
    """The preset made for images closest, as a ratio, to `size` pixels.

    Up to 45 pixels that is `cifar`, up to 119 `imagenet64`, beyond that `imagenet`. Using
    ImageNet's parameters on small images is a common mistake; they are far harsher than
    CIFAR-10-C: noise of .08 to .38 instead of .04 to .10.
    """
    return min(PRESETS, key=lambda preset: abs(math.log(size / PRESETS[preset])))


def frost_source() -> str:
    """Package and version of frost's photographs, to be recorded with results."""
    return f"{_FROST_PACKAGE} {metadata.version(_FROST_PACKAGE)}"


def _check(images: np.ndarray, indices: np.ndarray, name: str, severity: int, preset: str) -> None:
    if name not in _FUNCTIONS:
        raise ValueError(f"name must be one of {', '.join(COMMON)}, got {name!r}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be 1, 2, 3, 4 or 5, got {severity!r}")
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        got = f"{images.dtype} {images.shape}"
        raise ValueError(f"images must be RGB as uint8 (N, H, W, 3), got {got}")
    if min(images.shape[1:3]) < SMALLEST_SIDE:
        raise ValueError(f"images must be at least 8 pixels a side, got {images.shape}")
    if indices.shape != (len(images),):
        raise ValueError(f"indices must be one number per image, got shape {indices.shape}")


def _corrupt_part(
    images: np.ndarray, indices: np.ndarray, name: str, severity: int, seed: int, preset: str
) -> np.ndarray:
    function, parameters = _FUNCTIONS[name], PARAMETERS[preset][name][severity - 1]
    philox = np.random.Philox(key=_key(seed, name, severity))
    # Each image has its own generator: this one, moved to the image's place in the stream, because
    # creating one takes as long as some corruptions.
    generator, start = np.random.Generator(philox), philox.state
    corrupted = np.empty_like(images)
    for i, index in enumerate(indices):
        start["state"]["counter"][3] = index
        philox.state = start
        corrupted[i] = function(images[i], generator, *parameters)
    return corrupted


@lru_cache(maxsize=128)
def _key(seed: int, name: str, severity: int) -> np.ndarray:
    """Philox's key, the same for all images.

    Their index is the highest word of the counter, so their streams are 2**192 blocks apart.
    """
    seeds = np.random.SeedSequence([seed, severity, int.from_bytes(name.encode(), "little")])
    return seeds.generate_state(2, np.uint64)


def _to_uint8(x: np.ndarray) -> np.ndarray:
    """From [0, 1] to uint8, truncated as in the authors' scripts."""
    return (np.clip(x, 0, 1) * 255).astype(np.uint8)


# Noise


def _gaussian_noise(image: np.ndarray, generator: np.random.Generator, std: float) -> np.ndarray:
    return _to_uint8(image / 255 + generator.normal(scale=std, size=image.shape))


def _shot_noise(image: np.ndarray, generator: np.random.Generator, photons: float) -> np.ndarray:
    return _to_uint8(generator.poisson(image / 255 * photons) / photons)


def _impulse_noise(image: np.ndarray, generator: np.random.Generator, amount: float) -> np.ndarray:
    """Salt and pepper with equal probability, drawn for every channel of every pixel."""
    flipped = generator.random(image.shape) <= amount
    salt = generator.random(image.shape) <= 0.5
    return np.where(flipped, np.where(salt, np.uint8(255), np.uint8(0)), image)


# Blur


def _smooth(x: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of (H, W) or (H, W, 3) along its first two axes."""
    return ndimage.gaussian_filter(x, sigma, mode="nearest", axes=(0, 1))


def _defocus_blur(
    image: np.ndarray, generator: np.random.Generator, radius: float, alias_blur: float
) -> np.ndarray:
    kernel = _disk(radius, alias_blur)[..., np.newaxis]
    return _to_uint8(ndimage.correlate(image / 255, kernel, mode="mirror"))


@lru_cache(maxsize=32)
def _disk(radius: float, alias_blur: float) -> np.ndarray:
    """A disk of whole pixels, softened by a small Gaussian; in float32, as OpenCV computes it."""
    reach, taps = (8, 1) if radius <= 8 else (radius, 2)
    offsets = np.arange(-reach, reach + 1)
    disk = (offsets[:, np.newaxis] ** 2 + offsets**2 <= radius**2).astype(np.float32)
    disk /= disk.sum()
    edge = np.exp(-(np.arange(-taps, taps + 1) ** 2) / (2 * alias_blur**2))
    for axis in (0, 1):
        disk = ndimage.correlate1d(
            disk, (edge / edge.sum()).astype(np.float32), axis=axis, mode="mirror"
        )
    margin = np.flatnonzero(disk.any(axis=0))[0]
    inside = slice(margin, len(disk) - margin)
    return disk[inside, inside]


def _glass_blur(
    image: np.ndarray, generator: np.random.Generator, sigma: float, reach: int, rounds: int
) -> np.ndarray:
    """Copies pixels from nearby, one after the other, so that a copy may be copied again.

    That order cannot be vectorized, but it does not depend on the pixels: the loop moves indices.
    """
    height, width = image.shape[:2]
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    targets = (rows[:, np.newaxis] * width + columns).ravel()
    dy, dx = generator.integers(-reach, reach, size=(2, rounds, len(targets)))
    sources = targets + dy * width + dx
    origin = list(range(height * width))
    for target, source in zip(targets.tolist() * rounds, sources.ravel().tolist(), strict=True):
        origin[target] = origin[source]

    blurred = _to_uint8(_smooth(image / 255, sigma))
    shuffled = blurred.reshape(-1, 3)[origin].reshape(image.shape)
    return _to_uint8(_smooth(shuffled / 255, sigma))


def _motion_blur(
    image: np.ndarray, generator: np.random.Generator, radius: int, sigma: float
) -> np.ndarray:
    return _smear(image, radius, sigma, angle=generator.uniform(-45, 45))


def _smear(image: np.ndarray, radius: int, sigma: float, angle: float) -> np.ndarray:
    """ImageMagick's motion blur of a uint8 image (H, W, C) along `angle`, in degrees."""
    height, width = image.shape[:2]
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    rows = np.ceil(steps * math.sin(math.radians(angle)) - 0.5).astype(int)
    columns = np.ceil(steps * math.cos(math.radians(angle)) - 0.5).astype(int)
    margin = 2 * radius
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    blurred = np.zeros(image.shape)
    for weight, top, left in zip(weights, margin + rows, margin + columns, strict=True):
        blurred += weight * padded[top : top + height, left : left + width]
    return (blurred + 0.5).astype(np.uint8)


def _zoom_blur(
    image: np.ndarray, generator: np.random.Generator, stop: float, step: float
) -> np.ndarray:
    blurred = _zoom_blur_matrix(*image.shape[:2], stop, step) @ (image / 255).reshape(-1, 3)
    # In float64 white would become .9999... and be truncated to 254.
    return _to_uint8(blurred.astype(np.float32).reshape(image.shape))


@lru_cache(maxsize=8)
def _zoom_blur_matrix(height: int, width: int, stop: float, step: float) -> sparse.csr_array:
    """Zoom blur as a matrix (H * W, H * W): the mean of all enlargements, which are linear."""
    factors = (1, *np.arange(1, stop, step))
    total = sparse.csr_array((height * width, height * width))
    for factor in factors:
        total += sparse.kron(
            _zoom_matrix(height, factor), _zoom_matrix(width, factor), format="csr"
        )
    return total / len(factors)


@lru_cache(maxsize=128)
def _zoom_matrix(size: int, factor: float) -> sparse.csr_array:
    """The matrix (size, size) that enlarges the middle of a line linearly by `factor`."""
    crop = math.ceil(size / factor)
    enlarged = round(crop * factor)
    position = (np.arange(size) + (enlarged - size) // 2) * (crop - 1) / (enlarged - 1)
    lower = np.minimum(position.astype(int), crop - 2)
    weight = position - lower
    rows = np.arange(size)
    columns = (size - crop) // 2 + lower
    entries = np.concatenate([1 - weight, weight])
    indices = np.tile(rows, 2), np.concatenate([columns, columns + 1])
    return sparse.csr_array((entries, indices), shape=(size, size))


# Weather


def _snow(
    image: np.ndarray,
    generator: np.random.Generator,
    loc: float,
    scale: float,
    zoom: float,
    threshold: float,
    radius: int,
    sigma: float,
    mix: float,
) -> np.ndarray:
    height, width = image.shape[:2]
    flakes = generator.normal(loc, scale, size=(height, width))
    flakes = _zoom_matrix(height, zoom) @ flakes @ _zoom_matrix(width, zoom).T
    flakes[flakes < threshold] = 0
    angle = generator.uniform(-135, -45)
    layer = _smear(_to_uint8(flakes)[..., np.newaxis], radius, sigma, angle) / 255

    x = image / 255
    gray = 0.299 * x[..., :1] + 0.587 * x[..., 1:2] + 0.114 * x[..., 2:]
    whitened = mix * x + (1 - mix) * np.maximum(x, 1.5 * gray + 0.5)
    return _to_uint8(whitened + layer + np.rot90(layer, 2))


def _frost(
    image: np.ndarray,
    generator: np.random.Generator,
    image_weight: float,
    frost_weight: float,
    scale: float,
) -> np.ndarray:
    height, width = image.shape[:2]
    textures = _frost_textures(scale, height, width)
    texture = textures[generator.integers(len(textures))]
    top, left = generator.integers(0, (texture.shape[0] - height, texture.shape[1] - width))
    crop = texture[top : top + height, left : left + width]
    mixed = image_weight * image + frost_weight * crop
    return np.clip(mixed, 0, 255).astype(np.uint8)


_FROST_PACKAGE = "torch-uncertainty-assets"

_FROST_FILES = ("frost1.jpg", "frost2.jpg", "frost2.jpg", "frost3.jpg", "frost4.jpg")
"""The package leaves out the authors' third photograph, which is a copy of the second."""


@lru_cache(maxsize=8)
def _frost_textures(scale: float, height: int, width: int) -> tuple[np.ndarray, ...]:
    """The five textures, resized by `scale`, or by more if that does not cover height x width."""
    resized = []
    for texture in _read_frost_textures():
        covering = max((height + 1) / texture.shape[0], (width + 1) / texture.shape[1])
        resized.append(_resize(texture, max(scale, covering)))
    return tuple(resized)


@lru_cache(maxsize=1)
def _read_frost_textures() -> tuple[np.ndarray, ...]:
    folder = resources.files("torch_uncertainty_assets") / "frost"
    opened = (Image.open(BytesIO((folder / file).read_bytes())) for file in _FROST_FILES)
    return tuple(np.asarray(photograph.convert("RGB")) for photograph in opened)


def _resize(texture: np.ndarray, scale: float) -> np.ndarray:
    """Bilinear without antialiasing, as OpenCV's resize; Pillow's antialiases."""
    rows, columns = (
        (np.arange(round(side * scale)) + 0.5) / scale - 0.5 for side in texture.shape[:2]
    )
    grid = np.meshgrid(rows, columns, indexing="ij")
    return np.rint(_sample(texture.astype(np.float64), grid, mode="nearest")).astype(np.uint8)


def _fog(
    image: np.ndarray, generator: np.random.Generator, strength: float, decay: float
) -> np.ndarray:
    height, width = image.shape[:2]
    x = image / 255
    brightest = x.max()
    size = 1 << (max(height, width) - 1).bit_length()
    haze = _plasma(size, decay, generator)[:height, :width, np.newaxis]
    return _to_uint8((x + strength * haze) * brightest / (brightest + strength))


def _plasma(size: int, decay: float, generator: np.random.Generator) -> np.ndarray:
    """Height map (size, size) in [0, 1] by the diamond-square algorithm on a torus.

    `size` is a power of two. As in the authors' code, the amplitude multiplies draws of that same
    amplitude: heights shrink by `decay` squared per level.
    """
    heights = np.zeros((size, size))
    amplitude, step = 100.0, size

    def displaced(four: np.ndarray) -> np.ndarray:
        return four / 4 + amplitude * generator.uniform(-amplitude, amplitude, size=four.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        pairs = corners + _neighbor(corners, 1, axis=0)
        heights[half::step, half::step] = displaced(pairs + _neighbor(pairs, 1, axis=1))
        centers = heights[half::step, half::step]
        above_and_below = centers + _neighbor(centers, -1, axis=0)
        heights[::step, half::step] = displaced(
            above_and_below + corners + _neighbor(corners, 1, axis=1)
        )
        left_and_right = centers + _neighbor(centers, -1, axis=1)
        heights[half::step, ::step] = displaced(
            left_and_right + corners + _neighbor(corners, 1, axis=0)
        )
        step, amplitude = half, amplitude / decay
    heights -= heights.min()
    return heights / heights.max()


def _neighbor(x: np.ndarray, step: int, axis: int) -> np.ndarray:
    """numpy.roll by -step, which is slower than the rest of fog on maps this small."""
    return x.take(np.arange(step, step + x.shape[axis]), axis, mode="wrap")


def _brightness(image: np.ndarray, generator: np.random.Generator, added: float) -> np.ndarray:
    hsv = rgb_to_hsv(image / 255)
    hsv[..., 2] = np.clip(hsv[..., 2] + added, 0, 1)
    return _to_uint8(hsv_to_rgb(hsv))


# Digital


def _contrast(image: np.ndarray, generator: np.random.Generator, factor: float) -> np.ndarray:
    x = image / 255
    mean = x.mean(axis=(0, 1), keepdims=True)
    return _to_uint8((x - mean) * factor + mean)


def _elastic_transform(
    image: np.ndarray, generator: np.random.Generator, alpha: float, sigma: float, jitter: float
) -> np.ndarray:
    """A random affine map, given by the displacement of three points, and a smooth random one."""
    height, width = image.shape[:2]
    x = (image / 255).astype(np.float32)
    rows, columns = np.mgrid[:height, :width]

    corners = np.array([[1, 1], [-1, 1], [-1, -1]])
    points = np.array([height // 2, width // 2]) + min(height, width) // 3 * corners
    moved = points + generator.uniform(-jitter, jitter, size=points.shape)
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), points)  # from result to source
    sources = [rows * back[0, axis] + columns * back[1, axis] + back[2, axis] for axis in (0, 1)]
    x = _sample(x, sources, mode="mirror")

    shifts = generator.uniform(-1, 1, size=(2, height, width))
    shifts = alpha * ndimage.gaussian_filter(shifts, sigma, mode="reflect", truncate=3, axes=(1, 2))
    return _to_uint8(_sample(x, [rows + shifts[0], columns + shifts[1]], mode="reflect"))


def _sample(x: np.ndarray, grid: Sequence[np.ndarray], mode: str) -> np.ndarray:
    """Reads (H, W, C) bilinearly at the rows and columns of `grid`."""
    channels = np.moveaxis(x, -1, 0)
    read = [ndimage.map_coordinates(channel, grid, order=1, mode=mode) for channel in channels]
    return np.stack(read, axis=-1)


def _pixelate(image: np.ndarray, generator: np.random.Generator, factor: float) -> np.ndarray:
    height, width = image.shape[:2]
    smaller = int(width * factor), int(height * factor)
    small = Image.fromarray(image).resize(smaller, Image.Resampling.BOX)
    return np.array(small.resize((width, height), Image.Resampling.BOX))


def _jpeg_compression(
    image: np.ndarray, generator: np.random.Generator, quality: int
) -> np.ndarray:
    encoded = BytesIO()
    Image.fromarray(image).save(encoded, "JPEG", quality=quality)
    return np.array(Image.open(encoded))


_FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
