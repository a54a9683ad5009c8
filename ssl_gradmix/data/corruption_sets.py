"""Corrupted test sets: made on the fly, read from the published ones, or written by us in CIFAR-10-C's layout.

CIFAR-10-C and CIFAR-100-C (https://zenodo.org/records/2535967, https://zenodo.org/records/3555552) are folders with one
array a corruption, `<name>.npy`, uint8 (5 * N, H, W, 3): the N test images at severity 1, then the same in the same
order at severity 2, and so on. `labels.npy` has 5 * N labels. ImageNet-C (https://zenodo.org/records/2235448) is
`<name>/<severity>/<class>/*.JPEG`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ssl_gradmix.data import images as image_files
from ssl_gradmix.data.corruptions import (
    COMMON,
    EXTRA,
    PARAMETERS,
    SEVERITIES,
    SMALLEST_SIDE,
    check_images,
    check_request,
    corrupt,
    corrupt_batch,
    default_preset,
    frost_source,
)
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.files import printable, read_json, write_whole
from ssl_gradmix.version import __version__

_CHUNK = 1000  # images corrupted at once: what bounds the memory beside the images themselves
_DECODED_AT_MOST = 4 * 2**30  # bytes


def choose(names: Sequence[str] | None = None, extra: bool = False) -> list[str]:
    """The corruptions to evaluate or to write, in the benchmark's order: None is the 15 common ones, `extra` adds 4.

    Raises:
        ValueError: If there is none, or one is unknown.
    """
    wanted = {*(COMMON if names is None else names), *(EXTRA if extra else ())}
    unknown = sorted(wanted - {*COMMON, *EXTRA})
    if unknown or not wanted:
        problem = f"unknown corruption {unknown[0]!r}" if unknown else "corruptions must name at least one"
        raise ValueError(f"{problem}; there are {', '.join(COMMON + EXTRA)}")
    return [name for name in COMMON + EXTRA if name in wanted]


def check_can_make(names: Sequence[str]) -> None:
    """Raises ValueError if one of these corruptions needs a library that is not installed."""
    for name in names:
        try:
            corrupt(np.zeros((SMALLEST_SIDE, SMALLEST_SIDE, 3), np.uint8), name, severity=1)
        except ImportError as error:
            raise ValueError(f"cannot make {name}: {error}") from error


@dataclass(eq=False)
class CorruptedImages:
    """Images that are corrupted when their pixels are asked for, at the size asked for.

    This is what `features.extract` reads of an `ImageSet`. The noise of an image depends on its number, which it keeps
    in every subset, so neither batches nor processes change it. There is no attribute `images`, so that features cannot
    be cached by mistake under the fingerprint of the clean images.

    Args:
        clean: The images.
        numbers: (N,), their numbers in the whole set.
        corruption: As `name` in `corruptions.corrupt`; severity, preset and seed are as there too.
        workers: Processes that share the work.
    """

    clean: ImageSet
    numbers: np.ndarray
    corruption: str
    severity: int
    preset: str
    seed: int = 0
    workers: int = 1

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,)."""
        return self.clean.labels

    @property
    def name(self) -> str:
        """The clean images' name."""
        return self.clean.name

    def subset(self, indices: Sequence[int] | np.ndarray) -> CorruptedImages:
        """Takes the images at `indices`, in that order."""
        return replace(self, clean=self.clean.subset(indices), numbers=self.numbers[indices])

    def pixels(self, size: int, progress: bool = True) -> Tensor:
        """Corrupted pixels, uint8 (N, 3, size, size)."""
        clean = self.clean.pixels(size, progress).permute(0, 2, 3, 1).contiguous().numpy()
        how = self.corruption, self.severity, self.seed, self.numbers, self.preset, self.workers
        return torch.from_numpy(corrupt_batch(clean, *how)).permute(0, 3, 1, 2).contiguous()


class Generated:
    """A corrupted set made on the fly: of all clean test images those of `numbers` (N,), at the encoder's image size.

    The preset, seed and workers are as in `CorruptedImages`; no preset is `corruptions.default_preset(size)`.
    """

    def __init__(
        self, test: ImageSet, numbers: np.ndarray, size: int, preset: str | None = None, seed: int = 0, workers: int = 1
    ) -> None:
        self.numbers, self.clean = numbers, test.subset(numbers)
        if len(numbers) * size * size * 3 <= _DECODED_AT_MOST:  # in memory, as each is corrupted many times
            pixels = self.clean.pixels(size).permute(0, 2, 3, 1).contiguous().numpy()
            self.clean = replace(self.clean, images=pixels)
        self.preset, self.seed, self.workers = preset or default_preset(size), seed, workers

    def read(self, name: str, severity: int) -> CorruptedImages:
        """The selected images with one corruption at one severity."""
        return CorruptedImages(self.clean, self.numbers, name, severity, self.preset, self.seed, self.workers)

    def origin(self) -> dict[str, object]:
        """What results say of it."""
        return {"source": "generated", "preset": self.preset, "seed": self.seed, "frost_source": frost_source()}

    def fingerprint(self) -> None:
        """None: images are fingerprinted clean, and `origin` says the rest."""


class Published:
    """A corrupted set on disk: CIFAR-10-C's arrays, as `make_c` writes them too, or ImageNet-C's folders.

    Args:
        root: Its folder.
        test: All clean test images. Folders are matched to its classes by name, the labels of arrays by number.
        select: From a set of all images to the numbers of those to read. In a set of another order than `test` they
            are other images.

    Raises:
        FileNotFoundError: If there is no such folder.
    """

    def __init__(self, root: str | Path, test: ImageSet, select: Callable[[ImageSet], np.ndarray]) -> None:
        self.root, self.test, self.select = Path(root).expanduser(), test, select
        if not self.root.is_dir():
            raise FileNotFoundError(f"no folder {str(root)!r} of published corruptions")

    def read(self, name: str, severity: int) -> ImageSet:
        """Reads the selected images with one corruption at one severity.

        Raises:
            FileNotFoundError: If something is missing.
            ValueError: If something is damaged or pickled, or there are not as many images of each class as in `test`.
        """
        if any(self.root.glob("*.npy")):
            images, labels = read_cifar_c(self.root, name, severity)
        else:
            images, labels, folders = read_imagenet_c(self.root, name, severity)
            if strange := [folder for folder in folders if folder not in self.test.classes]:
                raise ValueError(
                    f"{self.root} has a class {strange[0]!r}, which {self.test.name} has not: --data must be what it "
                    "was made from"
                )
            labels = np.array([self.test.classes.index(folder) for folder in folders])[labels]
        theirs, ours = Counter(labels.tolist()), Counter(self.test.labels[self.test.labels >= 0].tolist())
        if theirs != ours:
            label = min(label for label in theirs | ours if theirs[label] != ours[label])
            raise ValueError(
                f"the labels of {name} in {self.root} do not fit {self.test.name}: it has {theirs[label]} images of "
                f"class {label}, not {ours[label]}; --data must be what it was made from"
            )
        whole = ImageSet(images, labels, self.test.classes, self.test.name)
        return whole.subset(self.select(whole))

    def origin(self) -> dict[str, object]:
        """What results say of it; preset, seed and frost textures where `make_c` wrote a meta.json.

        Raises:
            ValueError: If that file is damaged.
        """
        path = self.root / "meta.json"
        if not path.exists():
            return {"source": "published"}
        try:
            meta = read_json(path)
            return {"source": "published", **{key: meta[key] for key in ("preset", "seed", "frost_source")}}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged, or not by make_c: {error!r}") from error

    def fingerprint(self) -> str:
        """Changes with the arrays' sizes and times, or with what the folders of severities list."""
        digest = hashlib.sha256()
        for path in sorted([*self.root.glob("*.npy"), *self.root.glob("*/[1-5]")]):
            status = path.stat()
            digest.update(os.fsencode(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n"))
        return digest.hexdigest()[:32]


def read_cifar_c(root: str | Path, name: str, severity: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Reads one corruption of CIFAR-10-C, CIFAR-100-C or a folder that `make_c` wrote.

    Nothing is unpickled: an array of Python objects is refused.

    Returns:
        Images uint8 (N, H, W, 3), labels int64 (N,); for no severity (5 * N, H, W, 3) of all five, mildest first.

    Raises:
        FileNotFoundError: A file is missing; the message lists the corruptions that are there.
        ValueError: A file is damaged, pickled, or not of that shape and type, or `severity` is not 1 to 5.
    """
    root = Path(root).expanduser()
    path, labels_path = root / f"{name}.npy", root / "labels.npy"
    for needed in (path, labels_path):
        if not needed.is_file():
            there = sorted(file.stem for file in root.glob("*.npy") if file != labels_path)
            raise FileNotFoundError(f"no file {str(needed)!r}; corruptions there: {', '.join(there) or 'none'}")
    images, labels = _open_array(path), _open_array(labels_path)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"{path} must hold uint8 images (5 * N, H, W, 3), got {images.dtype} {images.shape}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or len(labels) % len(SEVERITIES):
        raise ValueError(
            f"{labels_path} must hold whole numbers, one for each of the 5 * N images of {path.name} {images.shape}, "
            f"got {labels.dtype} {labels.shape}"
        )
    if severity not in (None, *SEVERITIES):
        raise ValueError(f"severity must be a whole number from 1 to 5 or None, got {severity!r}")
    block = slice(None)
    if severity is not None:
        size = len(images) // len(SEVERITIES)
        block = slice((severity - 1) * size, severity * size)
    return np.array(images[block]), np.array(labels[block], np.int64)


def read_imagenet_c(root: str | Path, name: str, severity: int) -> tuple[list[Path], np.ndarray, tuple[str, ...]]:
    """Lists one corruption and severity of ImageNet-C, or of any folder laid out as `<name>/<severity>/<class>/*`.

    The published images are JPEG files of quality 85, already cropped to 224 pixels.

    Returns:
        Paths of the images, ordered by class and name; labels int64 (N,); and the class folders in order, label k being
        `classes[k]`. Labels count the folders that are there: of a part of the classes, match them by name.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It has no class folders, or one without images.
    """
    folder = Path(root).expanduser() / name / str(severity)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}; ImageNet-C is <root>/<corruption>/<severity>/<class>/")
    class_folders = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    members = [image_files.find(class_folder) for class_folder in class_folders]
    if not members:
        raise ValueError(f"{str(folder)!r} must have class folders, got none")
    if not all(members):
        empty = [entry.name for entry, paths in zip(class_folders, members, strict=True) if not paths]
        raise ValueError(f"{str(folder)!r} must have images in all its class folders, got none in {', '.join(empty)}")
    labels = np.repeat(np.arange(len(members)), [len(paths) for paths in members])
    classes = tuple(printable(entry.name) for entry in class_folders)
    return [path for paths in members for path in paths], labels, classes


def make_c(
    images: np.ndarray,
    labels: np.ndarray,
    out: str | Path,
    preset: str,
    seed: int = 0,
    names: Sequence[str] = COMMON,
    source: str = "",
    workers: int = 1,
    progress: bool = True,
) -> None:
    """Writes a corrupted set in CIFAR-10-C's layout, with a `meta.json` that says how it was made.

    A file is there when it is whole. Called again with the same arguments, it leaves out the corruptions that are
    there, so an interrupted run goes on where it stopped and more names can be added.

    Args:
        images: uint8 (N, H, W, 3), the clean images; image i has index i.
        labels: Whole numbers (N,).
        out: Folder to write to: new, empty, or from an earlier call with the same images, labels, seed and preset, and
            the same library versions and frost textures.
        preset: Parameter set, as in `corruptions.corrupt`.
        seed: Seed of the whole set.
        names: The corruptions to make.
        source: What the images are, for instance `cifar10/test`; kept in meta.json.
        workers: Processes that share the work.
        progress: Show a bar.

    Raises:
        ValueError: An argument is not as above, or `out` holds something else; nothing is written then.
        ImportError: As `corruptions.corrupt`, for `spatter`.
    """
    out = Path(out).expanduser()
    for name in names:
        check_request(name, SEVERITIES[0], seed, preset)
    check_images(images)
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),) or len(images) == 0:
        raise ValueError(f"labels must be {len(images)} whole numbers, one an image, got {labels.dtype} {labels.shape}")
    _claim(out, _describe(images, labels, preset, seed, source))
    for left in out.glob(".*.npy.*.tmp"):  # by a call that was killed
        left.unlink()

    if not (out / "labels.npy").exists():
        content = io.BytesIO()
        np.save(content, np.tile(labels.astype(np.int64), len(SEVERITIES)))
        write_whole(out / "labels.npy", lambda temporary: temporary.write_bytes(content.getvalue()))
    missing = [name for name in names if not (out / f"{name}.npy").exists()]
    total = len(missing) * len(SEVERITIES) * len(images)
    with tqdm(total=total, unit="image", disable=None if progress else True) as bar:
        for name in missing:
            bar.set_description(name)
            corrupt_all = partial(_write_corruption, images, name, seed, preset, workers, bar)
            write_whole(out / f"{name}.npy", corrupt_all)


def _write_corruption(
    images: np.ndarray, name: str, seed: int, preset: str, workers: int, bar: tqdm, path: Path
) -> None:
    shape = (len(SEVERITIES) * len(images), *images.shape[1:])
    corrupted = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    for block, severity in enumerate(SEVERITIES):
        for start in range(0, len(images), _CHUNK):
            chunk = images[start : start + _CHUNK]
            indices = range(start, start + len(chunk))
            first = block * len(images) + start
            corrupted[first : first + len(chunk)] = corrupt_batch(chunk, name, severity, seed, indices, preset, workers)
            bar.update(len(chunk))


def _describe(images: np.ndarray, labels: np.ndarray, preset: str, seed: int, source: str) -> dict:
    return {
        "source": source,
        "images": list(images.shape),
        "images_sha256": hashlib.sha256(np.ascontiguousarray(images)).hexdigest(),
        "labels_sha256": hashlib.sha256(labels.astype(np.int64)).hexdigest(),
        "preset": preset,
        "seed": seed,
        "severities": list(SEVERITIES),
        "frost_source": frost_source(),
        "parameters": {name: [list(row) for row in rows] for name, rows in PARAMETERS[preset].items()},
        "versions": {
            "ssl_gradmix": __version__,
            **{library: version(library) for library in ("numpy", "scipy", "pillow", "matplotlib")},
        },
    }


def _claim(out: Path, meta: dict) -> None:
    """Makes the folder and its meta.json, or checks that the one there says the same."""
    path = out / "meta.json"
    if path.exists():
        try:
            there = dict(read_json(path))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): write to another folder") from error
        differing = sorted(key for key in meta if key not in there or there[key] != meta[key])
        if differing:
            raise ValueError(f"{path} is of a set made otherwise, in {', '.join(differing)}: write to another folder")
        return
    # A call that was killed may have left a beginning of meta.json, under a name with something before or behind.
    if out.exists() and (not out.is_dir() or any(path.name not in entry.name for entry in out.iterdir())):
        raise ValueError(f"out {str(out)!r} must be a new or empty folder, or one that make_c wrote with its meta.json")
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8"))


def _open_array(path: Path) -> np.ndarray:
    """Maps an array into memory; NumPy cannot map pickled objects, so none are loaded."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # NumPy's header parser raises nearly every type there is on a damaged file
        raise ValueError(
            f"{path} is damaged, or holds pickled objects, which are refused: get or make it again ({error})"
        ) from error
