"""Listing image files, and decoding every kind of them to upright 8-bit RGB."""

from __future__ import annotations

import contextlib
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.v2 import functional as F

from ssl_gradmix.data import images


def save(path: Path, image: Image.Image | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (4, 4), "red")).save(path, **options)
    return path


def pixels(path: Path) -> np.ndarray:
    decoded = images.decode(path)
    assert decoded.mode == "RGB"
    return np.asarray(decoded)


# Listing


def test_find_lists_images_at_any_depth_in_order_and_nothing_else(tmp_path: Path) -> None:
    wanted = ["b.JPG", "z.png", "deep/er/10.png", "deep/er/9.webp", "Ünïcode dir/naïve\nname.png"]
    for name in [*wanted, ".hidden.png", ".cache/x.png", "deep/._x.jpg"]:
        save(tmp_path / name)
    for name in ("notes.txt", "Thumbs.db", "png", "deep/labels.csv"):
        (tmp_path / name).write_text("")

    assert [str(path.relative_to(tmp_path)) for path in images.find(tmp_path)] == wanted


# Decoding


@pytest.mark.parametrize("ending", images.ENDINGS)
def test_every_ending_can_be_decoded(tmp_path: Path, ending: str) -> None:
    mode = {".pbm": "1", ".pgm": "L"}.get(ending, "RGB")
    path = save(tmp_path / f"a{ending}", Image.new("RGB", (6, 4), "white").convert(mode))
    assert pixels(path).shape == (4, 6, 3)
    assert pixels(path).min() > 250


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (3, 1))
    for x, color in enumerate([(200, 0, 0, 255), (200, 0, 0, 0), (200, 0, 0, 51)]):
        rgba.putpixel((x, 0), color)
    half = 255 - round(51 / 255 * (255 - 0))
    assert pixels(save(tmp_path / "rgba.png", rgba)).tolist() == [[[200, 0, 0], [255] * 3, [244, half, half]]]

    la = Image.new("LA", (2, 1), (0, 255))
    la.putpixel((1, 0), (0, 0))
    assert pixels(save(tmp_path / "la.png", la)).tolist() == [[[0] * 3, [255] * 3]]

    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert pixels(save(tmp_path / "p.png", palette)).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert pixels(save(tmp_path / "pt.png", palette, transparency=1)).tolist() == [[[10, 20, 30], [255] * 3]]

    gray = Image.new("L", (2, 1), 7)
    gray.putpixel((1, 0), 8)
    assert pixels(save(tmp_path / "lt.png", gray, transparency=8)).tolist() == [[[7] * 3, [255] * 3]]


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_16_bit_gray_keeps_its_range(tmp_path: Path, ending: str) -> None:
    values = np.array([[0, 128, 129, 257, 300, 32768, 65535]], np.uint16)
    path = save(tmp_path / f"a.{ending}", Image.fromarray(values))
    assert pixels(path)[0, :, 0].tolist() == [0, 0, 1, 1, 1, 128, 255]
    assert (pixels(path) == pixels(path)[..., :1]).all()


def test_big_endian_16_bit_gray_is_read_alike(tmp_path: Path) -> None:
    path = save(tmp_path / "a.tif", Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 257, 65535)))
    assert pixels(path)[0, :, 0].tolist() == [1, 255]


def tiff(path: Path, width: int, data: bytes, bits: int, photometric: int, sample_format: int) -> Path:
    """A gray image of one row, by hand: Pillow writes neither of these."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(data)}
    tags |= {339: sample_format}
    data += b"\0" * (len(data) % 2)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    path.write_bytes(b"II" + struct.pack("<HI", 42, 8 + len(data)) + data + directory)
    return path


@pytest.mark.parametrize(
    ("data", "bits", "photometric", "shown"),
    [
        (struct.pack("<3H", 0, 257, 65535), 16, 0, [255, 254, 0]),  # white is zero
        (struct.pack("<3H", 0, 257, 65535), 16, 1, [0, 1, 255]),
        (bytes([0, 1, 255]), 8, 0, [255, 254, 0]),
        (bytes([0x00, 0x08, 0x00, 0xFF, 0xF0]), 12, 1, [0, 128, 255]),
    ],
)
def test_gray_tiffs_of_every_depth_and_polarity(
    tmp_path: Path, data: bytes, bits: int, photometric: int, shown: list[int]
) -> None:
    path = tiff(tmp_path / "a.tif", 3, data, bits, photometric, 1)
    assert pixels(path)[0, :, 0].tolist() == shown


@pytest.mark.parametrize("bits", [8, 16])
def test_signed_pixels_are_refused(tmp_path: Path, bits: int) -> None:
    path = tiff(tmp_path / "a.tif", 2, bytes(bits // 4), bits, 1, 2)
    with pytest.raises(ValueError, match=r"a\.tif.*32-bit or signed pixels have no fixed range"):
        images.decode(path)


def test_a_progressive_jpeg_of_many_scans_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", Image.effect_noise((64, 64), 60).convert("RGB"), progressive=True)
    assert pixels(path).shape == (64, 64, 3)
    content = path.read_bytes()
    scan = content[content.rindex(b"\xff\xda") : -2]
    path.write_bytes(content[:-2] + 100 * scan + content[-2:])
    with pytest.raises(ValueError, match=r"a\.jpg.*a progressive JPEG of 110 scans, more than 100"):
        images.decode(path)


def test_a_failure_without_a_text_is_named_by_its_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise IndexError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ValueError, match=r"cannot read the image '.*a\.png': IndexError; convert or remove it"):
        images.decode(save(tmp_path / "a.png"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    """The pixels as stored, and what each of the EXIF standard's eight values says to do with them."""
    stored = np.random.default_rng(1).integers(0, 256, (4, 6, 3), np.uint8)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: stored.swapaxes(0, 1)[::-1, ::-1],
        8: np.rot90(stored),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", Image.fromarray(stored), exif=exif)
    assert np.array_equal(pixels(path), upright)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_any_flipped_byte_gives_an_image_or_a_value_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    noise = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
    for ending in ("png", "jpg", "gif", "tif", "webp", "bmp"):
        content = save(tmp_path / f"a.{ending}", noise).read_bytes()
        broken = tmp_path / f"broken.{ending}"
        for position in rng.integers(0, min(len(content), 200), 40):
            changed = bytearray(content)
            changed[position] ^= int(rng.integers(1, 256))
            broken.write_bytes(changed)
            with contextlib.suppress(ValueError):
                assert images.decode(broken).mode == "RGB"


# Fitting to a square


@pytest.mark.parametrize(("width", "height"), [(96, 96), (64, 96), (20, 30), (200, 50)])
def test_fit_is_torchvisions_resize_and_center_crop(width: int, height: int) -> None:
    """At sizes where torchvision need not round the longer side or the crop to whole pixels."""
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8))
    expected = F.center_crop(F.resize(image, [32], antialias=True), [32, 32])
    assert np.abs(np.asarray(images.fit(image, 32)).astype(int) - np.asarray(expected)).max() <= 1


def test_fit_leaves_an_image_of_that_size_as_it_is() -> None:
    image = Image.fromarray(np.random.default_rng(4).integers(0, 256, (32, 32, 3), np.uint8))
    assert np.array_equal(np.asarray(images.fit(image, 32)), np.asarray(image))


# Threads


def test_for_each_does_every_index_once() -> None:
    lock, done = threading.Lock(), []

    def work(i: int) -> None:
        with lock:
            done.append(i)

    images.for_each(1000, work, "test", progress=False)
    assert sorted(done) == list(range(1000))


def test_for_each_raises_the_first_failure() -> None:
    def work(i: int) -> None:
        if i in (150, 700):
            raise ValueError(f"failed at {i}")

    with pytest.raises(ValueError, match="failed at 150"):
        images.for_each(1000, work, "test", progress=False)
