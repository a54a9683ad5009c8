"""How long the corruptions take: milliseconds an image for each, and for the 15 corruptions x 5 severities together.

    python benchmarks/corruption_speed.py --images 10000 --workers 2

Where the package imagecorruptions is installed, its functions are timed beside ours, on one core, on a few images, and
with ImageNet's parameters, as it has no others. Those of them that fail with today's libraries are marked so.
"""

from __future__ import annotations

import argparse
import platform
import time
import warnings
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from ssl_gradmix.data.corruptions import COMMON, EXTRA, PRESETS, SEVERITIES, corrupt, corrupt_batch, frost_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, help="number of images (default: %(default)s)")
    parser.add_argument(
        "--preset", choices=PRESETS, default="cifar", help="parameters and image size (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument(
        "--reference-images", type=int, default=20, help="images for imagecorruptions (default: %(default)s)"
    )
    arguments = parser.parse_args()

    images = photographs(arguments.images, PRESETS[arguments.preset])
    print(f"{arguments.images} images {images.shape[1:]}, preset {arguments.preset}, {arguments.workers} workers")
    print(f"Python {platform.python_version()}, NumPy {np.__version__}, frost from: {frost_source()}")
    corrupt_batch(images[:16], "contrast", 1, workers=arguments.workers)  # starts the workers

    reference = reference_corrupt()
    print(f"\n{'':20}{'ms/image, severity 1 to 5':^40}{'mean':>8}  imagecorruptions")
    total = 0.0
    for name in COMMON + EXTRA:
        corrupt(images[0], name, 1, preset=arguments.preset)  # reads textures and the like outside the clock
        seconds = []
        for severity in SEVERITIES:
            start = time.perf_counter()
            corrupt_batch(images, name, severity, preset=arguments.preset, workers=arguments.workers)
            seconds.append(time.perf_counter() - start)
        milliseconds = 1000 * np.array(seconds) / len(images)
        beside = reference_milliseconds(reference, images[: arguments.reference_images], name)
        columns = "".join(f"{ms:8.3f}" for ms in (*milliseconds, milliseconds.mean()))
        print(f"{name:20}{columns}    {beside}", flush=True)
        total += sum(seconds) if name in COMMON else 0
    print(f"\n{len(COMMON)} corruptions x {len(SEVERITIES)} severities: {total:.0f} s, {total / 60:.1f} min")


def photographs(count: int, size: int) -> np.ndarray:
    """Smooth random colors with some detail in place of photographs, uint8 (count, size, size, 3)."""
    random = np.random.default_rng(0)
    noise = random.normal(size=(count, size, size, 3)).astype(np.float32)
    smooth = ndimage.gaussian_filter(noise, size / 16, axes=(1, 2))
    return np.clip(128 + 50 * smooth / smooth.std() + 8 * noise, 0, 255).astype(np.uint8)


def reference_corrupt() -> Callable | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from imagecorruptions import corrupt as reference
    except ImportError as error:
        print(f"imagecorruptions is left out: {error}")
        return None
    return reference


def reference_milliseconds(reference: Callable | None, images: np.ndarray, name: str) -> str:
    """The mean over the five severities, or why there is none."""
    if reference is None:
        return "-"
    start = time.perf_counter()
    try:
        for severity in SEVERITIES:
            for image in images:
                reference(image, severity, name)
    except Exception as error:  # whatever that package raises is the finding
        return f"fails: {type(error).__name__}"
    return f"{1000 * (time.perf_counter() - start) / len(SEVERITIES) / len(images):.3f}"


if __name__ == "__main__":
    main()
