"""Image files: listing those of a folder, and decoding them to 8-bit RGB or 16-bit gray."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ssl_gradmix import console

ENDINGS = (
    *(".apng", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
"""File name endings of images, in lower case; upper case counts too."""

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP", "DIB")
"""Formats that are decoded. Pillow knows more, and passes PostScript to another program."""

LITTER = (
    *("@eadir", "@recycle", "#recycle", "__macosx", "__pycache__", "lost+found"),
    *("$recycle.bin", "system volume information"),
)
"""Names of folders that systems leave behind, in lower case. Hidden folders are skipped too."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How an image with each EXIF orientation is turned upright."""

_THREADS = min(8, os.cpu_count() or 1)
_CHUNK = 64


def find(folder: Path) -> list[Path]:
    """Lists the image files in a folder at any depth, sorted by name, those of sub-folders last.

    Hidden files and folders and `LITTER` are skipped, links are followed.

    Raises:
        OSError: A folder cannot be read.
    """
    found = []
    for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        folders[:] = sorted(name for name in folders if _is_visible(name))
        found += [Path(parent, name) for name in sorted(filter(is_image, files))]
    return found


def is_image(name: str) -> bool:
    """Whether a file of this name is listed as an image."""
    return not name.startswith(".") and name.lower().endswith(ENDINGS)


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, without hidden ones and `LITTER`.

    They are sorted as text, or as numbers if they are exactly 0 to C - 1.
    """
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir())
    names = [name for name in names if _is_visible(name)]
    numbers = [str(number) for number in range(len(names))]
    return numbers if set(numbers) == set(names) else names


def _is_visible(folder: str) -> bool:
    return not folder.startswith(".") and folder.lower() not in LITTER


def _raise(error: OSError) -> None:
    raise error


def decode(path: Path) -> Image.Image:
    """Reads an image file as upright 8-bit RGB.

    The first frame of an animation is taken, the EXIF orientation is applied, transparent pixels
    are blended with white, and 16-bit gray is divided by 257 (Pillow's own conversion clips at
    255). The format is detected from the content, not from the name.

    Raises:
        ValueError: The file cannot be decoded; the message names its path.
    """
    with _opened(path) as image:
        return _upright(image, _to_rgb(image))


def decode_gray(path: Path) -> Image.Image:
    """Reads an image file as upright 16-bit gray, mode I;16.

    As `decode`, but 16-bit gray keeps its values. Values of 8 bits are multiplied by 257, so that
    white is 65535. Color is converted with the weights of ITU-R 601.

    Raises:
        ValueError: As `decode`.
    """
    with _opened(path) as image:
        if _is_16_bit(image):
            gray = np.asarray(image).astype(np.uint16)
        else:
            gray = np.asarray(_to_rgb(image).convert("L")) * np.uint16(257)
        return _upright(image, Image.fromarray(gray))


def stored_size(path: Path) -> tuple[int, int]:
    """Width and height from the header, without decoding and before the EXIF orientation.

    Raises:
        ValueError: As `decode`.
    """
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Opens an image file. Any failure, also in the block, becomes a ValueError with the path."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            yield image
    except Exception as error:  # Pillow's decoders raise nearly every type on a broken file
        raise ValueError(
            f"cannot read the image {str(path)!r} ({error}): convert or remove it, or skip such "
            "images with --data.broken skip"
        ) from error


def _upright(image: Image.Image, pixels: Image.Image) -> Image.Image:
    """Turns the pixels of an image as its EXIF orientation says.

    `ImageOps.exif_transpose` would write all other tags anew, and fail if one is invalid.
    """
    image.load()  # of a TIFF, Pillow turns the pixels and removes the tag
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return pixels if turn is None else pixels.transpose(turn)


def _is_16_bit(image: Image.Image) -> bool:
    """Whether an image is 16-bit gray; ValueError for types without a fixed range."""
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError("float and 32-bit pixels have no fixed range, save it with 8 or 16 bits")
    return image.mode.startswith("I")  # I;16, or I for PNG and PGM in older Pillows


def _to_rgb(image: Image.Image) -> Image.Image:
    if _is_16_bit(image):
        gray = np.asarray(image).astype(np.int64)
        image = Image.fromarray(np.round(gray / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def fit(image: Image.Image, size: int) -> Image.Image:
    """Resizes the shorter side to `size` (bilinear, antialiased) and crops the center square."""
    if image.mode.startswith("I"):
        fitted = ImageOps.fit(image.convert("F"), (size, size), Image.Resampling.BILINEAR)
        return Image.fromarray(np.asarray(fitted).round().astype(np.uint16))
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)


def for_each(
    count: int, work: Callable[[int], None], description: str, progress: bool = True
) -> None:
    """Calls `work(i)` for all i below `count` in a few threads (Pillow decodes outside the GIL).

    The first exception, by lowest i, stops the rest and is raised here. Progress is reported after
    some seconds.
    """

    def chunk(start: int) -> int:
        indices = range(start, min(start + _CHUNK, count))
        for i in indices:
            work(i)
        return len(indices)

    with (
        ThreadPoolExecutor(_THREADS) as pool,
        console.progress(count, description, "image", delay=3, silent=not progress) as bar,
    ):
        for done in pool.map(chunk, range(0, count, _CHUNK)):
            bar.update(done)
