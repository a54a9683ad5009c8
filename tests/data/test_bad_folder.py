"""One folder with everything that goes wrong in folders: each file is read right or named, and none is changed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import stat
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from ssl_gradmix.data.datasets import ImageSet, load
from ssl_gradmix.settings import Data

RED, GREEN, BLUE, WHITE, GRAY = (220, 30, 40), (30, 180, 60), (40, 60, 200), (255, 255, 255), (128, 128, 128)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """A test that waits for a pipe is ended with its process."""
    signal.alarm(120)
    yield
    signal.alarm(0)


class Kind(NamedTuple):
    """How a file is made, its colors above and below where it is read, and what its refusal says besides the path."""

    write: Callable[[Path], object]
    top: tuple[int, int, int] | None = None
    bottom: tuple[int, int, int] | None = None
    message: str = ""


def plain(mode: str = "RGB", color: object = RED, size: tuple[int, int] = (12, 12)) -> Image.Image:
    return Image.new(mode, size, color)


def halves(size: tuple[int, int] = (12, 12)) -> Image.Image:
    """Red above blue."""
    image = plain(color=BLUE, size=size)
    image.paste(RED, (0, 0, size[0], size[1] // 2))
    return image


def saved(image: Image.Image, form: str, color: tuple[int, int, int] = RED, **options: object) -> Kind:
    return Kind(lambda path: image.save(path, form, **options), color, color)


def bytes_of(content: bytes, message: str) -> Kind:
    return Kind(lambda path: path.write_bytes(content), message=message)


def encoded(image: Image.Image, form: str) -> bytes:
    with tempfile.TemporaryFile() as file:
        image.save(file, form)
        file.seek(0)
        return file.read()


def png_chunk(kind: bytes, content: bytes, flip: int = 0) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ flip)


def png_of(width: int, height: int, header_flip: int = 0) -> bytes:
    """Of that size by its header, without data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = png_chunk(b"IHDR", header, header_flip), png_chunk(b"IDAT", zlib.compress(b"")), png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def rotated(path: Path) -> None:
    """Stored lying on its side; orientation 6 says to turn it clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    halves().rotate(90).save(path, "JPEG", exif=exif, quality=95, subsampling=0)


def link_to(target: str, content: Image.Image | None = None) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        if content is not None:
            content.save(path.parent / target)
        path.symlink_to(target)

    return write


def loop(path: Path) -> None:
    """A folder that holds itself; the image in it counts once."""
    path.mkdir()
    (path / "again").symlink_to(path)
    plain().save(path / "inside.png")


def several(form: str, **options: object) -> Kind:
    """Three pictures in one file, the first of which counts."""

    def write(path: Path) -> None:
        others = [plain(color=GREEN), plain(color=BLUE)]
        plain().save(path, form, save_all=True, append_images=others, **options)

    return Kind(write, RED, RED)


NOISE = Image.effect_noise((64, 64), 60).convert("RGB")
NOT_ONE = "damaged, or none of BMP, GIF, JPEG"
PNG = encoded(plain(), "PNG")
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 12\n%%EndComments\n12 12 scale\nshowpage\n%%EOF\n"

KINDS: dict[str, Kind] = {
    # Names
    "line\nbreak.png": saved(plain(), "PNG"),
    "'quote\" {0} %s.png": saved(plain(), "PNG"),
    "\x1b[31mterminal.png": saved(plain(), "PNG"),
    os.fsdecode(b"latin-\xe9.png"): saved(plain(), "PNG"),
    "n" * 251 + ".png": saved(plain(), "PNG"),
    "UPPER.JPG": saved(plain(), "JPEG"),
    "broken\nline.png": bytes_of(b"", NOT_ONE),
    # Contents under another name
    "png-called.jpg": saved(plain(), "PNG"),
    "text.jpg": bytes_of(b"not an image\n", NOT_ONE),
    "postscript.png": bytes_of(POSTSCRIPT, NOT_ONE),
    "phone.heic": bytes_of(b"\x00\x00\x00\x18ftypheic" + bytes(40), NOT_ONE),
    "web.avif": bytes_of(b"\x00\x00\x00\x1cftypavif" + bytes(40), NOT_ONE),
    # Modes
    "palette.png": saved(plain().quantize(4), "PNG"),
    "rgba.png": saved(plain("RGBA", (*RED, 255)), "PNG"),
    "transparent.png": saved(plain("RGBA", (*RED, 0)), "PNG", WHITE),
    "la.png": saved(plain("LA", (128, 255)), "PNG", GRAY),
    "gray.png": saved(plain("L", 128), "PNG", GRAY),
    "one-bit.png": saved(plain("1", 1), "PNG", WHITE),
    "16-bit.png": saved(Image.fromarray(np.full((12, 12), 128 * 257, np.uint16)), "PNG", GRAY),
    "cmyk.jpg": Kind(lambda path: plain("CMYK", (0, 255, 255, 0)).save(path, "JPEG"), (255, 0, 0), (255, 0, 0)),
    "ycbcr.tif": saved(plain("YCbCr", (128, 128, 128)), "TIFF", GRAY),
    "float.tif": Kind(lambda path: plain("F", 0.5).save(path, "TIFF"), message="floating-point pixels have no fixed"),
    "32-bit.tif": Kind(lambda path: plain("I", 1 << 20).save(path, "TIFF"), message="32-bit or signed pixels have"),
    # Several pictures in one, and pictures lying on their side
    "animated.gif": several("GIF"),
    "animated.png": several("PNG"),
    "animated.webp": several("WEBP", lossless=True),
    "pages.tif": several("TIFF"),
    "burst.jpg": several("MPO"),
    "rotated.jpg": Kind(rotated, RED, BLUE),
    # Sizes
    "1x1.png": saved(plain(size=(1, 1)), "PNG"),
    "tall.png": Kind(lambda path: halves((3, 20_000)).save(path, "PNG"), RED, BLUE),
    "bomb.png": bytes_of(png_of(30_000, 30_000), "30000x30000 pixels|900000000 pixels"),
    "large.png": bytes_of(png_of(13_000, 13_000), "13000x13000 pixels, more than PIL.Image.MAX_IMAGE_PIXELS"),
    # Damage
    "empty.png": bytes_of(b"", NOT_ONE),
    "truncated.jpg": bytes_of(encoded(NOISE, "JPEG")[:900], "truncated"),
    "truncated.png": bytes_of(encoded(NOISE, "PNG")[:2000], "truncated|broken"),
    "truncated.tif": bytes_of(encoded(NOISE, "TIFF")[:2000], ""),
    "truncated.webp": bytes_of(encoded(NOISE, "WEBP")[:300], ""),
    "header-chunk.png": bytes_of(png_of(12, 12, header_flip=1), NOT_ONE),
    "data-chunk.png": bytes_of(PNG.replace(b"IDAT", b"IDAX"), ""),
    "garbage-behind.png": Kind(lambda path: path.write_bytes(PNG + b"\0garbage" * 9), RED, RED),
    # What is no regular file
    "pipe.png": Kind(os.mkfifo, message="no regular file"),
    "socket.png": Kind(lambda path: os.mknod(path, stat.S_IFSOCK | 0o600), message="no regular file"),
    "device.png": Kind(link_to("/dev/zero"), message="no regular file"),
    "dangling.png": Kind(link_to("nothing-there"), message="No such file"),
    "itself.png": Kind(link_to("itself.png"), message="Too many levels|symbolic links"),
    "link.png": Kind(link_to(".linked.png", plain()), RED, RED),
    "folder.jpg": Kind(loop, RED, RED),
    # What is passed over
    ".hidden.png": Kind(lambda path: path.write_bytes(b"")),
    "Thumbs.db": Kind(lambda path: path.write_bytes(b"")),
    "labels.csv": Kind(lambda path: path.write_bytes(b"")),
    ".checkpoints": Kind(lambda path: (path.mkdir(), (path / "x.png").write_bytes(b""))),
}
PASSED_OVER = (".hidden.png", "Thumbs.db", "labels.csv", ".checkpoints")
READ = [name for name, kind in KINDS.items() if kind.top is not None]
REFUSED = [name for name, kind in KINDS.items() if kind.top is None and name not in PASSED_OVER]


def snapshot(root: Path) -> dict[str, object]:
    """All that a folder holds: kinds, sizes, times, permissions, targets of links, and contents."""
    found: dict[str, object] = {}
    for place, folders, files in os.walk(root):
        for name in (*folders, *files, "."):
            path = Path(place, name)
            status = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
            target = os.readlink(path) if path.is_symlink() else None
            found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns, target, content)
    return found


@contextlib.contextmanager
def unchanged(root: Path) -> Iterator[None]:
    before = snapshot(root)
    yield
    assert snapshot(root) == before


def pixels(root: Path, **settings: object) -> tuple[ImageSet, np.ndarray]:
    """The train images of a folder, and what they show at 8x8, (N, 8, 8, 3)."""
    images = load(Data(name="folder", root=str(root), size=8, **settings), "train")
    return images, images.pixels(8, progress=False).permute(0, 2, 3, 1).numpy().astype(int)


def make(root: Path, names: list[str]) -> Path:
    """`root/train/kind/` with these kinds, and two good images, which are the first and the last."""
    folder = root / "train" / "kind"
    folder.mkdir(parents=True)
    for good in (" first.png", "~last.png"):
        plain(color=GREEN).save(folder / good)
    for name in names:
        KINDS[name].write(folder / name)
    return root


def check_shown(kind: Kind, shown: np.ndarray) -> None:
    assert np.abs(shown[:3] - kind.top).max() <= 12
    assert np.abs(shown[5:] - kind.bottom).max() <= 12


@pytest.mark.parametrize("name", READ)
def test_is_read_right(name: str, tmp_path: Path) -> None:
    root = make(tmp_path, [name])
    with unchanged(root):
        images, shown = pixels(root)
    (index,) = (i for i, path in enumerate(images.images) if name in path.parts)
    assert len(images) == 3
    check_shown(KINDS[name], shown[index])
    assert np.abs(np.delete(shown, index, 0) - GREEN).max() <= 1


@pytest.mark.parametrize("name", REFUSED)
def test_stops_with_its_path(name: str, tmp_path: Path) -> None:
    root = make(tmp_path, [name])
    with unchanged(root), pytest.raises(ValueError, match="cannot read the image ") as refusal:
        pixels(root)
    assert repr(str(root / "train" / "kind" / name)) in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
    assert re.search(KINDS[name].message, str(refusal.value))


def test_all_at_once_with_skip(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make(tmp_path, list(KINDS))
    caplog.set_level("INFO", logger="ssl_gradmix")
    counted = f"{len(REFUSED)} of {len(READ) + len(REFUSED) + 2} images cannot be read, left out"
    with unchanged(root), pytest.warns(UserWarning, match=counted):
        images, shown = pixels(root, broken="skip")

    read = {path.relative_to(root / "train" / "kind").parts[0]: shown[i] for i, path in enumerate(images.images)}
    assert sorted(read) == sorted([*READ, " first.png", "~last.png"])
    for name in READ:
        check_shown(KINDS[name], read[name])
    for name in REFUSED:
        assert any(repr(str(root / "train" / "kind" / name)) in message for message in caplog.messages)
    for name in (*PASSED_OVER, *READ):
        assert not any(repr(str(root / "train" / "kind" / name)) in message for message in caplog.messages)


def test_postscript_is_not_handed_to_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow rasterizes it by Ghostscript, whatever the file's name, unless it is told what a file may hold."""
    from PIL import EpsImagePlugin

    asked: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: asked.append(args) or plain().im)
    root = make(tmp_path, ["postscript.png"])
    with pytest.raises(ValueError, match=r"postscript\.png"):
        pixels(root)
    assert not asked
    Image.open(root / "train/kind/postscript.png").load()
    assert asked


# Whole folders


def class_folders(root: Path, *names: str) -> Path:
    for name in names:
        (root / "train" / name).mkdir(parents=True)
        plain().save(root / "train" / name / "a.png")
        plain().save(root / "train" / name / "b.png")
    return root


@pytest.mark.parametrize("broken", ["stop", "skip"])
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("", "no image in the folder '.*empty'"),
        ("__MACOSX", "no image in the folder '.*__MACOSX'"),
    ],
    ids=["empty class", "archive's litter"],
)
def test_layouts_that_would_give_wrong_classes(extra: str, message: str, broken: str, tmp_path: Path) -> None:
    root = class_folders(tmp_path, "cat", "dog")
    folder = root / "train" / (extra or "empty")
    folder.mkdir()
    (folder / "._x.png" if extra == "__MACOSX" else folder / "notes.txt").write_bytes(b"")
    with unchanged(root), pytest.raises(ValueError, match=message):
        pixels(root, broken=broken)


def test_images_of_any_kind_beside_class_folders_are_told(tmp_path: Path) -> None:
    root = class_folders(tmp_path, "cat")
    plain().save(root / "train" / "loose.png")
    os.mkfifo(root / "train" / "pipe.png")
    (root / "train" / "gone.png").symlink_to("nothing-there")
    with unchanged(root), pytest.warns(UserWarning, match="3 images beside the class folders"):
        assert len(pixels(root)[0]) == 2


def test_a_class_folder_that_is_a_link_is_read_and_one_that_leads_nowhere_is_none(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "data", "cat")
    elsewhere = class_folders(tmp_path / "elsewhere", "dog") / "train" / "dog"
    (root / "train" / "dog").symlink_to(elsewhere)
    (root / "train" / "gone").symlink_to("nowhere")
    (root / "train" / "round").symlink_to("round")
    with unchanged(tmp_path):
        images, _ = pixels(root)
    assert images.classes == ("cat", "dog")
    assert np.bincount(images.labels).tolist() == [2, 2]


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder that is read by another user: permissions do not bind the superuser, who runs tests in containers."""
    path = Path(tempfile.mkdtemp())  # another user reaches it, unlike pytest's
    path.chmod(0o755)
    yield path
    os.seteuid(os.getuid())
    for locked in path.rglob("locked*"):
        locked.chmod(0o755)
    shutil.rmtree(path)


@pytest.mark.parametrize("folder", [False, True])
def test_what_may_not_be_read(nobody: Path, folder: bool) -> None:
    root = class_folders(nobody, "cat")
    locked = root / "train" / "cat" / "locked.png"
    (locked.mkdir if folder else locked.touch)(mode=0)
    if os.getuid() == 0:
        os.seteuid(65534)
    with pytest.raises((ValueError, PermissionError), match=r"locked\.png"):
        pixels(root)
    if not folder:
        with pytest.warns(UserWarning, match=r"1 of 3 images cannot be read, left out: \['.*locked\.png'\]"):
            assert len(pixels(root, broken="skip")[0]) == 2


# A whole run


def test_a_run_over_all_of_it(recipe: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make(tmp_path / "images", list(KINDS))
    with unchanged(root):
        assert recipe("--data.broken", "stop") == 2
        assert (
            len([line for line in capsys.readouterr().err.splitlines() if line.startswith("error: cannot read")]) == 1
        )
        with pytest.warns(UserWarning, match=f"{len(REFUSED)} of .* images cannot be read"):
            assert recipe("--data.broken", "skip") == 0
    assert (tmp_path / "runs/simclr/backbone/model.safetensors").exists()
