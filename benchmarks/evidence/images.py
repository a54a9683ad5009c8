"""The images of the experiments: a fixed part of a data set, two digits side by side, one of them easily neglected, and
images overlaid with digits.

All are folders in a cache, written once; they appear under their name when they are whole.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ssl_gradmix.data.datasets import load
from ssl_gradmix.settings import Data

CORRELATION = 0.9
"""Share of the pretraining images whose two digits show the same number."""

CONTRAST = 0.4
"""Of the right digit, against the left one: SimCLR tells images apart by what is easily seen."""


def subset(data: Path, images: int, target: Path) -> None:
    """A part of the training images, the same number of each class, and all test images: a folder of symbolic links.

    Args:
        data: Folder `train/<class>/*` and `test/<class>/*`; left as it is.
        images: How many training images, drawn with a fixed seed. A smaller part is contained in a larger one.
        target: The folder to make, with the layout of `data`.

    Raises:
        ValueError: `images` cannot be shared out over the classes, or the target is a part of another `data`.
    """
    train = load(Data("folder", str(data)), "train")
    counts = np.bincount(train.labels)
    each, rest = divmod(images, len(counts))
    if rest or not 1 <= each <= counts.min():
        raise ValueError(
            f"--images must be a multiple of the {len(counts)} classes of {data} and at most "
            f"{len(counts) * counts.min()}, got {images}"
        )

    def write(folder: Path) -> None:
        order = np.random.default_rng(0).permutation(len(train))
        for label, name in enumerate(train.classes):
            (folder / "train" / name).mkdir(parents=True)
            for i in order[train.labels[order] == label][:each]:
                path = train.images[i]
                (folder / "train" / name / f"{i:06d}{path.suffix}").symlink_to(path.resolve())
        (folder / "test").symlink_to((data / "test").resolve())

    _write_once(target, write)
    if (target / "test").resolve() != (data / "test").resolve():
        raise ValueError(f"--cache: {target} is a part of another folder than {data}; choose another cache")


def two_cues(pairs: int, target: Path) -> None:
    """Images of two digits side by side, 32x32: the left one is bright, the right one faint.

    An encoder pretrained where the two agree, as a rule, can do with the left one. What it has kept of the right one is
    read off images where they are independent: a classifier trained and tested on those cannot use the left digit in
    its place.

    Args:
        pairs: Pretraining images. A fifth as many, at least 40, each serve to train and to test the classifiers.
        target: The folder to make. In `pretraining/train/<left digit>/*` the right digit shows the left one's number in
            a share `CORRELATION` of the images. Those where they are independent lie there twice: by the left digit in
            `usual/{train,test}/<left digit>/*`, by the right one in `neglected/{train,test}/<right digit>/*`. Test
            images are made of digits that are in no other.
    """

    def write(folder: Path) -> None:
        rng = np.random.default_rng(0)
        left = np.arange(pairs) % 10
        right = agreeing(left, rng)
        _write_pairs("train", left, right, rng, {folder / "pretraining" / "train": left})
        left = np.arange(max(40, pairs // 5)) % 10
        for split in ("train", "test"):
            right = rng.permutation(left)
            _write_pairs(split, left, right, rng, {folder / "usual" / split: left, folder / "neglected" / split: right})

    _write_once(target, write)


def overlaid_digits(data: Path, target: Path) -> None:
    """A copy of a folder's training images, each with a digit of 10x10 px in it: C+Digits [0], with other digits.

    Any of scikit-learn's digits in place of MNIST's, at one of the four places {4, 16} x {4, 16}, the brighter pixel of
    digit and image. The test images are those of `data`.

    - [0]: Tamkin et al., Feature Dropout, 2023, https://arxiv.org/abs/2212.08378
    """

    def write(folder: Path) -> None:
        rng, train, digits = np.random.default_rng(0), load(Data("folder", str(data)), "train"), load(Data(), "train")
        for i, label in enumerate(train.labels):
            digit = digits[rng.integers(len(digits))][0].resize((10, 10), Image.Resampling.BILINEAR)
            pixels, (y, x) = np.array(train[i][0]), 4 + 12 * rng.integers(2, size=2)
            pixels[y : y + 10, x : x + 10] = np.maximum(pixels[y : y + 10, x : x + 10], digit)
            path = folder / "train" / train.classes[label] / f"{i:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        (folder / "test").symlink_to((data / "test").resolve())

    _write_once(target, write)


def agreeing(left: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Numbers beside others, the same ones in a share `CORRELATION`, else any of the nine others."""
    other = rng.random(len(left)) >= CORRELATION
    return np.where(other, (left + rng.integers(1, 10, len(left))) % 10, left)


def _write_pairs(
    split: str, left: np.ndarray, right: np.ndarray, rng: np.random.Generator, places: dict[Path, np.ndarray]
) -> None:
    """Writes an image of each pair of numbers, drawn from the digits, into every place under its label there."""
    digits = load(Data("digits"), split)
    members = [np.flatnonzero(digits.labels == label) for label in range(10)]
    for i, numbers in enumerate(zip(left, right, strict=True)):
        halves = [digits[rng.choice(members[number])][0].convert("L") for number in numbers]
        bright, faint = (np.asarray(half.resize((16, 32), Image.Resampling.BILINEAR)) for half in halves)
        image = np.concatenate([bright, np.round(CONTRAST * faint).astype(np.uint8)], 1)
        for folder, labels in places.items():
            path = folder / str(labels[i]) / f"{i:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)


def _write_once(target: Path, write: Callable[[Path], None]) -> None:
    """Has `write(folder)` fill a temporary folder and renames it, unless the target is there."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        write(temporary)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
