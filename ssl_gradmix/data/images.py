"""Image files: which there are in a folder, and what one of them shows in 8-bit RGB."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from tqdm import tqdm

ENDINGS = (
    *(".apng", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
"""What names of images end in, upper or lower case."""

UNREAD = (".avif", ".heic", ".heif", ".jp2", ".jxl")
"""Images too, but decoded nowhere: they are listed, so that `decode` names them, rather than passed over in silence."""

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP", "DIB")
"""What a file may hold, whatever its name. Pillow knows more, and hands PostScript to another program."""

_SCANS = 100
"""Of a progressive JPEG at most; encoders write about ten. A file of thousands would take minutes to decode."""

_THREADS = min(8, os.cpu_count() or 1)
_CHUNK = 64


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image, read or not: by its ending, and not hidden (a leading dot)."""
    return name.lower().endswith(ENDINGS + UNREAD) and not name.startswith(".")


def find(folder: Path, others: Counter[str] | None = None) -> list[Path]:
    """Lists the image files in a folder, at any depth, in the order of their names, those of sub-folders last.

    Hidden files and folders are passed over, and other endings, which are counted in `others`. Links are followed; a
    folder that is reached twice, as through a link to its own parent, is read once.

    Returns:
        Paths that begin with `folder`, ending as one of `ENDINGS` or `UNREAD`; empty where there is none.

    Raises:
        OSError: A folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    found, seen = [], set()
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files.sort()
        found += [Path(place, name) for name in files if is_image(name)]
        if others is not None:
            visible = (name for name in files if not is_image(name) and not name.startswith("."))
            others.update(os.path.splitext(name)[1].lower() for name in visible)
    return found


def decode(path: Path) -> Image.Image:
    """Reads an image file as upright 8-bit RGB.

    The first frame of an animation is taken, the EXIF orientation applied, transparency laid on white, and 16-bit gray
    divided by 257 so that its whole range is kept (Pillow's own conversion clips at 255).

    What the file holds counts, not its name. Damage within a JPEG that keeps its length may go unnoticed: Pillow does
    not pass libjpeg's warnings on.

    Raises:
        ValueError: The file cannot be read, is truncated, is none of the formats that `ENDINGS` stand for, has more
            pixels than `PIL.Image.MAX_IMAGE_PIXELS`, has more than 100 progressive scans, or is no regular file
            (opening a pipe would wait for ever); the message names the path.
    """
    with _opened(path) as image:
        if image.info.get("progressive") and (scans := path.read_bytes().count(b"\xff\xda")) > _SCANS:
            raise ValueError(f"a progressive JPEG of {scans} scans, more than {_SCANS}")
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)


def stored_size(path: Path) -> tuple[int, int]:
    """Width and height by the file's header, without decoding: before the EXIF orientation may exchange them.

    Raises:
        ValueError: As `decode`, for what the header shows.
    """
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Opens an image file; whatever fails, also in the block, becomes a ValueError that names the path."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no regular file")
        with Image.open(path, formats=_FORMATS) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit and image.width * image.height > limit:
                raise ValueError(f"{image.width}x{image.height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS = {limit}")
            yield image
    except Exception as error:  # Pillow's decoders raise nearly every type there is on a broken file
        if isinstance(error, UnidentifiedImageError):
            reason = f"damaged, or none of {', '.join(_FORMATS)}"
        else:
            reason = str(error) or type(error).__name__
        raise ValueError(
            f"cannot read the image {str(path)!r}: {reason}; convert or remove it, or leave such images out with "
            "--data.broken skip"
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts a file's image of any mode to 8-bit RGB, transparency laid on white."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    signed = 2 in tags.get(TiffImagePlugin.SAMPLEFORMAT, ())
    if image.mode == "F" or signed or (image.mode == "I" and image.format == "TIFF"):
        kind = "floating-point" if image.mode == "F" else "32-bit or signed"
        raise ValueError(f"{kind} pixels have no fixed range, save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):  # PNG and PGM have 16 bits in mode I too
        white = 2 ** tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 1  # of 12 bits too
        gray = np.asarray(image).astype(np.int64)
        if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero, which Pillow heeds at 8 bits
            gray = white - gray
        image = Image.fromarray(np.round(gray * (255 / white)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(image: Image.Image, size: int) -> Image.Image:
    """Resizes the shorter side to `size` (bilinear, antialiased) and crops the center square of (size, size)."""
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)


def for_each(count: int, work: Callable[[int], None], description: str, progress: bool = True) -> None:
    """Calls `work(i)` for every i below `count` in a few threads: Pillow decodes outside the interpreter lock.

    An exception ends the rest and is raised here, the lowest i first. The progress bar is shown on a terminal, once it
    has taken some seconds.
    """

    def chunk(start: int) -> int:
        indices = range(start, min(start + _CHUNK, count))
        for i in indices:
            work(i)
        return len(indices)

    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=count, desc=description, unit="image", delay=3, disable=None if progress else True) as bar,
    ):
        for done in pool.map(chunk, range(0, count, _CHUNK)):
            bar.update(done)
