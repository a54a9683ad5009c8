"""Corrupted sets on disk: the published CIFAR-10-C, CIFAR-100-C and ImageNet-C, and our own in CIFAR-10-C's layout.

CIFAR-10-C and CIFAR-100-C (https://zenodo.org/records/2535967, https://zenodo.org/records/3555552) are folders with one
array a corruption, `<name>.npy`, uint8 (5 * N, H, W, 3): the N test images at severity 1, then the same in the same
order at severity 2, and so on. `labels.npy` has 5 * N labels. ImageNet-C (https://zenodo.org/records/2235448) is
`<name>/<severity>/<class>/*.JPEG`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ssl_gradmix.data import images as image_files
from ssl_gradmix.data.corruptions import (
    COMMON,
    PARAMETERS,
    SEVERITIES,
    check_images,
    check_request,
    corrupt_batch,
    frost_source,
)
from ssl_gradmix.files import printable, read_json
from ssl_gradmix.version import __version__

_PARTIAL = ".partial"
_CHUNK = 1000  # images corrupted at once: what bounds the memory beside the images themselves


def read_cifar_c(root: str | Path, name: str, severity: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Reads one corruption of CIFAR-10-C, CIFAR-100-C or a folder that `make_c` wrote.

    Nothing is unpickled: an array of Python objects is refused.

    Args:
        root: Folder with `<name>.npy` and `labels.npy`.
        name: The corruption, by its file's name without ending.
        severity: 1 to 5 for one block of N images; None for all five, mildest first.

    Returns:
        Images uint8 (N, H, W, 3) or (5 * N, H, W, 3), labels int64 of the same length.

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
    block = slice(None)
    if severity is not None:
        if severity not in SEVERITIES:
            raise ValueError(f"severity must be a whole number from 1 to 5 or None, got {severity!r}")
        size = len(images) // len(SEVERITIES)
        block = slice((severity - 1) * size, severity * size)
    return np.array(images[block]), np.array(labels[block], np.int64)


def read_imagenet_c(root: str | Path, name: str, severity: int) -> tuple[list[Path], np.ndarray, tuple[str, ...]]:
    """Lists one corruption and severity of ImageNet-C, or of any folder laid out as `<name>/<severity>/<class>/*`.

    The published images are JPEG files of quality 85, already cropped to 224 pixels.

    Args:
        root: Folder of the set.
        name: The corruption's folder.
        severity: The severity's folder.

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

    A file is written under another name and renamed when it is whole. Called again with the same arguments, it leaves
    out the corruptions that are there, so an interrupted run goes on where it stopped and more names can be added.

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

    if not (out / "labels.npy").exists():
        with open(out / f"labels.npy{_PARTIAL}", "wb") as file:
            np.save(file, np.tile(labels.astype(np.int64), len(SEVERITIES)))
        os.replace(file.name, out / "labels.npy")
    missing = [name for name in names if not (out / f"{name}.npy").exists()]
    with tqdm(
        total=len(missing) * len(SEVERITIES) * len(images), unit="image", disable=None if progress else True
    ) as bar:
        for name in missing:
            bar.set_description(name)
            _write_corruption(images, out / f"{name}.npy", name, seed, preset, workers, bar)


def _write_corruption(
    images: np.ndarray, path: Path, name: str, seed: int, preset: str, workers: int, bar: tqdm
) -> None:
    partial = path.with_name(path.name + _PARTIAL)
    shape = (len(SEVERITIES) * len(images), *images.shape[1:])
    corrupted = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
    for block, severity in enumerate(SEVERITIES):
        for start in range(0, len(images), _CHUNK):
            chunk = images[start : start + _CHUNK]
            indices = range(start, start + len(chunk))
            first = block * len(images) + start
            corrupted[first : first + len(chunk)] = corrupt_batch(chunk, name, severity, seed, indices, preset, workers)
            bar.update(len(chunk))
    del corrupted  # writes it out; Windows would not rename it before
    os.replace(partial, path)


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
    if out.exists() and (not out.is_dir() or any(entry.suffix != _PARTIAL for entry in out.iterdir())):
        raise ValueError(f"out {str(out)!r} must be a new or empty folder, or one that make_c wrote with its meta.json")
    out.mkdir(parents=True, exist_ok=True)
    partial = out / f"meta.json{_PARTIAL}"
    partial.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _open_array(path: Path) -> np.ndarray:
    """Maps an array into memory; NumPy cannot map pickled objects, so none are loaded."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # NumPy's header parser raises nearly every type there is on a damaged file
        raise ValueError(
            f"{path} is damaged, or holds pickled objects, which are refused: get or make it again ({error})"
        ) from error
