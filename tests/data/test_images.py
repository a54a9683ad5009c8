"""Listing image files, and decoding every kind of them to upright 8-bit RGB."""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from ssl_gradmix.data import images

NOISE = np.random.default_rng(0).integers(0, 256, (24, 36, 3), np.uint8)


def save(path: Path, image: Image.Image | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (4, 4), "red")).save(path, **options)
    return path


def pixels(path: Path) -> np.ndarray:
    decoded = images.decode(path)
    assert decoded.mode == "RGB"
    return np.asarray(decoded)


def test_find_lists_visible_images_at_any_depth_in_order(tmp_path: Path) -> None:
    wanted = ["b.JPG", "z.png", "deep/er/10.png", "deep/er/9.webp", "Ünïcode dir/naïve name.png"]
    for name in [*wanted, ".hidden.png", ".cache/x.png", "deep/._x.jpg", "deep/@eaDir/x/y.jpg"]:
        save(tmp_path / name)
    for name in ("notes.txt", "Thumbs.db", "png", "deep/labels.csv"):
        (tmp_path / name).write_text("")
    assert [str(path.relative_to(tmp_path)) for path in images.find(tmp_path)] == wanted


def test_subfolders_are_sorted_as_numbers_only_if_they_number_classes(tmp_path: Path) -> None:
    def made(root: str, names: list[str]) -> list[str]:
        for name in [*names, "__MACOSX", "@eaDir", ".ipynb_checkpoints", "$RECYCLE.BIN"]:
            (tmp_path / root / name).mkdir(parents=True)
        (tmp_path / root / "Thumbs.db").write_text("")
        return images.subfolders(tmp_path / root)

    numbers = [str(number) for number in range(12)]
    assert made("from 0", sorted(numbers)) == numbers
    for i, names in enumerate((numbers[1:], [*numbers, "other"], ["00", "01", "2"])):
        assert made(str(i), names) == sorted(names)


def gray(mode: str, *values: object) -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    return image


def palette() -> Image.Image:
    image = gray("P", 0, 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    return image


RGBA = gray("RGBA", (200, 0, 0, 255), (200, 0, 0, 0), (200, 0, 0, 51))


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (RGBA, {}, [[200, 0, 0], [255] * 3, [244, 204, 204]]),  # 255 - 0.2 * (255 - color)
        (gray("LA", (0, 255), (0, 0)), {}, [[0] * 3, [255] * 3]),
        (palette(), {}, [[10, 20, 30], [40, 50, 60]]),
        (palette(), {"transparency": 1}, [[10, 20, 30], [255] * 3]),
        (gray("L", 7, 8), {"transparency": 8}, [[7] * 3, [255] * 3]),
        (gray("1", 0, 1), {}, [[0] * 3, [255] * 3]),
    ],
)
def test_modes_become_rgb_on_white(
    tmp_path: Path, image: Image.Image, options: dict, expected: list
) -> None:
    assert pixels(save(tmp_path / "a.png", image, **options)).tolist() == [expected]


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_16_bit_gray_keeps_its_range(tmp_path: Path, ending: str) -> None:
    values = np.array([[0, 128, 129, 257, 300, 32768, 65535]], np.uint16)
    decoded = pixels(save(tmp_path / f"a.{ending}", Image.fromarray(values)))
    assert decoded[0].tolist() == [[value] * 3 for value in (0, 0, 1, 1, 1, 128, 255)]
    deep = np.asarray(images.decode_gray(tmp_path / f"a.{ending}"))
    assert deep.dtype == np.uint16
    assert np.array_equal(deep, values)


def test_8_bits_become_16_bit_gray(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", gray("L", 0, 7, 255))
    assert np.asarray(images.decode_gray(path)).tolist() == [[0, 7 * 257, 65535]]
    color = Image.fromarray(NOISE)
    found = np.asarray(images.decode_gray(save(tmp_path / "b.png", color))) / 257
    assert np.abs(found - NOISE @ [0.299, 0.587, 0.114]).max() <= 0.51


def test_fit_keeps_16_bits() -> None:
    values = np.random.default_rng(1).integers(0, 65536, (30, 30), np.uint16)
    fitted = np.asarray(images.fit(Image.fromarray(values), 10))
    image = torch.from_numpy(values[None].astype(np.float64))
    expected = F.resize(image, [10, 10], antialias=True)[0].numpy()
    assert fitted.dtype == np.uint16
    assert np.abs(fitted - expected).max() <= 1


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_is_taken(tmp_path: Path, form: str) -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    path = save(tmp_path / "a.png", first, format=form, save_all=True, append_images=[second])
    assert np.abs(pixels(path).astype(int) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    """What each of the EXIF standard's eight values says to do with the stored pixels."""
    upright = {
        1: NOISE,
        2: NOISE[:, ::-1],
        3: NOISE[::-1, ::-1],
        4: NOISE[::-1],
        5: NOISE.swapaxes(0, 1),
        6: np.rot90(NOISE, -1),
        7: NOISE.swapaxes(0, 1)[::-1, ::-1],
        8: np.rot90(NOISE),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", Image.fromarray(NOISE), exif=exif)
    assert np.array_equal(pixels(path), upright)
    assert images.stored_size(path) == (36, 24)


def test_orientation_is_applied_beside_an_invalid_tag(tmp_path: Path) -> None:
    """A resolution of -72/1, which EXIF defines as unsigned; Pillow cannot write it."""
    tags = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0), struct.pack("<HHII", 0x011A, 10, 1, 38)
    header = b"II*\0" + struct.pack("<IH", 8, 2)
    exif = b"Exif\0\0" + header + b"".join(tags) + struct.pack("<Iii", 0, -72, 1)
    path = save(tmp_path / "a.png", Image.fromarray(NOISE), exif=exif)
    assert Image.open(path).getexif()[0x011A] == -72
    assert np.array_equal(pixels(path), np.rot90(NOISE, -1))
    assert images.decode_gray(path).size == (24, 36)


def saved(form: str, mode: str = "RGB") -> bytes:
    file = BytesIO()
    Image.fromarray(NOISE).convert("L").convert(mode).save(file, form)
    return file.getvalue()


BROKEN = {
    "empty.png": b"",
    "text.jpg": b"not an image\n",
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 12\n%%EndComments\n%%EOF\n",
    "truncated.png": saved("PNG")[:500],
    "truncated.jpg": saved("JPEG")[:800],
    "renamed.png": saved("ICO"),
    "float.tif": saved("TIFF", "F"),
    "32-bit.tif": saved("TIFF", "I"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_raises_with_its_path(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(ValueError, match=name):
        images.decode(tmp_path / name)


@pytest.mark.parametrize(("width", "height"), [(96, 96), (64, 96), (20, 30), (200, 50), (32, 32)])
def test_fit_equals_torchvisions_resize_and_center_crop(width: int, height: int) -> None:
    """At sizes where torchvision need not round the longer side or the crop to whole pixels."""
    noise = np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(noise)
    expected = F.center_crop(F.resize(image, [32], antialias=True), [32, 32])
    fitted = np.asarray(images.fit(image, 32))
    assert np.abs(fitted.astype(int) - np.asarray(expected)).max() <= 1


def test_for_each_visits_every_index_and_raises_the_first_failure() -> None:
    done: set[int] = set()
    images.for_each(1000, done.add, "test", progress=False)
    assert done == set(range(1000))

    def fail(i: int) -> None:
        if i in (150, 700):
            raise ValueError(f"failed at {i}")

    with pytest.raises(ValueError, match="150"):
        images.for_each(1000, fail, "test", progress=False)
