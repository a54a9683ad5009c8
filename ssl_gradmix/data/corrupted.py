"""Corrupted test sets: made on the fly, or read from the published files.

CIFAR-10-C and CIFAR-100-C (https://zenodo.org/records/2535967, https://zenodo.org/records/3555552)
are folders with one array per corruption, `<name>.npy`, uint8 (5 * N, H, W, 3): the N test images
at severity 1, then the same in the same order at severity 2, and so on. `labels.npy` has 5 * N
labels. ImageNet-C (https://zenodo.org/records/2235448) is `<name>/<severity>/<class>/*.JPEG`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssl_gradmix.data import images as image_files
from ssl_gradmix.data.corruptions import (
    COMMON,
    SEVERITIES,
    corrupt_batch,
    default_preset,
    frost_source,
)
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.data.open_set import published_numbers

_DECODED_AT_MOST = 4 * 2**30  # bytes


def choose(names: Sequence[str] | None = None) -> list[str]:
    """The corruptions to evaluate, in the benchmark's order; all 15 by default.

    Raises:
        ValueError: There is none, or one is unknown.
    """
    wanted = set(COMMON if names is None else names)
    if not wanted or not wanted <= set(COMMON):
        raise ValueError(f"corruptions must be some of {', '.join(COMMON)}, got {names}")
    return [name for name in COMMON if name in wanted]


@dataclass(eq=False)
class CorruptedImages:
    """Images that are corrupted when their pixels are requested, at the requested size.

    It offers what `features.extract` reads of an `ImageSet`. Every image keeps its number, and with
    it its noise, in all subsets, so neither batches nor processes change it. There is no attribute
    `images`, so features cannot be cached under the fingerprint of the clean images by mistake.

    Args:
        clean: The images.
        numbers: Numbers of the images in the whole set, (N,).
        corruption: The `name` of `corruptions.corrupt`.
        severity: As in `corruptions.corrupt`.
        preset: As in `corruptions.corrupt`.
        seed: As in `corruptions.corrupt`.
        workers: Number of processes that corrupt images.
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
        """Name of the clean images."""
        return self.clean.name

    def subset(self, indices: Sequence[int] | np.ndarray) -> CorruptedImages:
        """Takes the images at `indices`, in that order."""
        return replace(self, clean=self.clean.subset(indices), numbers=self.numbers[indices])

    def pixels(self, size: int, progress: bool = True) -> Tensor:
        """Corrupted pixels, uint8 (N, 3, size, size)."""
        clean = self.clean.pixels(size, progress).permute(0, 2, 3, 1).contiguous().numpy()
        corrupted = corrupt_batch(
            clean,
            self.corruption,
            self.severity,
            self.seed,
            self.numbers,
            self.preset,
            self.workers,
        )
        return torch.from_numpy(corrupted).permute(0, 3, 1, 2).contiguous()


class Generated:
    """Corrupted images made on the fly.

    Args:
        test: All clean test images.
        numbers: Indices of the images to take, (N,).
        size: Image size of the encoder.
        preset: As in `corruptions.corrupt`; by default the one closest to `size`.
        seed: As in `corruptions.corrupt`.
        workers: Number of processes that corrupt images.
    """

    def __init__(
        self,
        test: ImageSet,
        numbers: np.ndarray,
        size: int,
        preset: str | None = None,
        seed: int = 0,
        workers: int = 1,
    ) -> None:
        _require_rgb(test)
        self.numbers, self.clean = numbers, test.subset(numbers)
        if len(numbers) * size * size * 3 <= _DECODED_AT_MOST:  # decoded once for all corruptions
            pixels = self.clean.pixels(size).permute(0, 2, 3, 1).contiguous().numpy()
            self.clean = replace(self.clean, images=pixels)
        self.preset, self.seed, self.workers = preset or default_preset(size), seed, workers

    def read(self, name: str, severity: int) -> CorruptedImages:
        """The images with one corruption at one severity."""
        return CorruptedImages(
            self.clean, self.numbers, name, severity, self.preset, self.seed, self.workers
        )

    def origin(self) -> dict[str, object]:
        """Provenance of the corruptions, stored with results."""
        return {
            "source": "generated",
            "preset": self.preset,
            "seed": self.seed,
            "frost_source": frost_source(),
        }


class Published:
    """A corrupted set on disk: the arrays of CIFAR-10-C or the folders of ImageNet-C.

    Args:
        root: Its folder.
        test: All clean test images. Folders are matched to its classes by name, labels of arrays
            by `published_numbers`.
        select: Function from a set of all images to the indices of those to read.

    Raises:
        FileNotFoundError: The folder does not exist.
    """

    def __init__(
        self, root: str | Path, test: ImageSet, select: Callable[[ImageSet], np.ndarray]
    ) -> None:
        _require_rgb(test)
        self.root, self.test, self.select = Path(root).expanduser(), test, select
        if not self.root.is_dir():
            raise FileNotFoundError(f"the folder {str(root)!r} of published corruptions is missing")

    def read(self, name: str, severity: int) -> ImageSet:
        """The selected images with one corruption at one severity.

        Raises:
            FileNotFoundError: A file or folder is missing.
            ValueError: A file is damaged, or the labels are not those of `test`.
        """
        images: np.ndarray | list[Path]
        if any(self.root.glob("*.npy")):
            numbers = np.array(published_numbers(self.test.classes))
            images, labels = _read_cifar_c(self.root, name, severity)
        else:
            numbers = np.arange(len(self.test.classes))
            images, labels = _list_imagenet_c(self.root, name, severity, self.test.classes)
        clean = self.test.labels[self.test.labels >= 0]
        if not np.array_equal(np.sort(labels), np.sort(numbers[clean])):
            raise ValueError(
                f"the labels of {name} in {self.root} are not those of {self.test.name}"
            )
        labels = np.argsort(numbers)[labels]
        whole = ImageSet(images, labels, self.test.classes, self.test.name)
        return whole.subset(self.select(whole))

    def origin(self) -> dict[str, object]:
        """Provenance of the corruptions, stored with results."""
        return {"source": "published"}


def _require_rgb(images: ImageSet) -> None:
    if images.channels != 3:
        raise ValueError(f"data.channels 1: corruptions are of RGB images, {images.name} is gray")


def _read_cifar_c(root: Path, name: str, severity: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, H, W, 3) and labels int64 (N,) of one corruption at one severity."""
    images, labels = _open_array(root / f"{name}.npy"), _open_array(root / "labels.npy")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"{name}.npy must be uint8 (5 * N, H, W, 3), got {images.shape}")
    if labels.shape != images.shape[:1] or len(labels) % len(SEVERITIES):
        raise ValueError(
            f"labels.npy must have 5 * N labels, as many as {name}.npy has images, got "
            f"{labels.shape} for {images.shape}"
        )
    size = len(images) // len(SEVERITIES)
    block = slice((severity - 1) * size, severity * size)
    return np.array(images[block]), np.array(labels[block], np.int64)


def _open_array(path: Path) -> np.ndarray:
    """Maps an array into memory; NumPy cannot map pickled objects, so nothing is unpickled."""
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.npy")))
        raise FileNotFoundError(f"the file {str(path)!r} is missing; there are {there}")
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        raise ValueError(f"{path} is damaged or holds pickled objects: {error}") from error


def _list_imagenet_c(
    root: Path, name: str, severity: int, classes: Sequence[str]
) -> tuple[list[Path], np.ndarray]:
    """Paths and labels int64 (N,) of one corruption at one severity, ordered by class and name."""
    folder = root / name / str(severity)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the folder {str(folder)!r} is missing; ImageNet-C is <corruption>/<severity>/<class>/"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for class_name in image_files.subfolders(folder):
        if class_name not in classes:
            raise ValueError(f"{folder / class_name} is not a class of the test images in --data")
        found = image_files.find(folder / class_name)
        paths += found
        labels += [classes.index(class_name)] * len(found)
    return paths, np.array(labels, np.int64)
