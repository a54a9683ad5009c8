"""Named data sets and image folders, as images in memory or paths on disk with labels."""

from __future__ import annotations

import hashlib
import logging
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from ssl_gradmix.data import images as image_files
from ssl_gradmix.data.planted import Stamps, stamps_of
from ssl_gradmix.files import printable
from ssl_gradmix.settings import Data

logger = logging.getLogger("ssl_gradmix")

DIGITS = tuple("0123456789")

MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
"""Of the machine, in bytes."""

_SPLITS = {
    "train": (("train", "training"),),
    "test": (("test", "testing"), ("val", "valid", "validation")),
}
"""What the folder of a split is called, in upper or lower case. Where there are both, test/ is taken before val/."""


@dataclass(eq=False)
class ImageSet(torch.utils.data.Dataset):
    """Images, in memory or on disk, and what they show.

    Args:
        images: uint8 (N, H, W, 3), or the paths of N image files, decoded when they are asked for.
        labels: int64 (N,), -1 where unlabeled.
        classes: Label k is `classes[k]`. Kept whole when a subset of the classes is taken: labels keep their numbers.
        name: What messages and results call it, for instance `digits/train`.
        stamps: What is planted into their views, not into the images themselves; None for nothing.
    """

    images: np.ndarray | list[Path]
    labels: np.ndarray
    classes: tuple[str, ...]
    name: str
    stamps: Stamps | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Image `index` in RGB at its own size, and its label.

        Raises:
            ValueError: The file cannot be read; the message names its path.
        """
        image = self.images[index]
        decoded = Image.fromarray(image) if isinstance(self.images, np.ndarray) else image_files.decode(image)
        return decoded, int(self.labels[index])

    def decoded(self, index: int) -> torch.Tensor:
        """Image `index` at its own size, uint8 (3, H, W); raises as `__getitem__`."""
        return torch.from_numpy(np.array(self[index][0]).transpose(2, 0, 1).copy())

    @property
    def labeled(self) -> bool:
        """Whether every image has a label."""
        return bool((self.labels >= 0).all())

    def subset(self, indices: Sequence[int] | np.ndarray) -> ImageSet:
        """Takes the images at `indices` (or where a boolean array is true), in that order."""
        kept = np.arange(len(self))[indices]
        taken = self.images[kept] if isinstance(self.images, np.ndarray) else [self.images[i] for i in kept]
        return replace(self, images=taken, labels=self.labels[kept])

    def only(self, classes: Sequence[int]) -> ImageSet:
        """Takes the images of these classes, in their present order; ValueError where there are none."""
        kept = np.isin(self.labels, classes)
        if not kept.any():
            raise ValueError(
                f"{self.name} has no image of the classes {list(classes)}, only of {np.unique(self.labels).tolist()}"
            )
        return self.subset(kept)

    def with_few_labels(self, fraction: float, seed: int) -> ImageSet:
        """The same images: a share of each class, drawn and at least one, keeps its label, and the others get -1."""
        kept = _held_out(self.labels, fraction, seed)
        return replace(self, labels=np.where(kept, self.labels, -1))

    def describe(self) -> str:
        """One line for the user, such as `digits/train: 1,438 images of 10 classes (0, 1, 2, ...)`."""
        present = [self.classes[label] for label in np.unique(self.labels[self.labels >= 0])]
        unlabeled = int((self.labels < 0).sum())
        if not present:
            return f"{self.name}: {len(self):,} images without labels"
        few = ", ".join([*present[:3], *["..."] * (len(present) > 3)])
        rest = f", {unlabeled:,} of them without labels" if unlabeled else ""
        return f"{self.name}: {len(self):,} images of {len(present)} class{'es' * (len(present) > 1)} ({few}){rest}"

    def fingerprint(self) -> str:
        """What the images are, as 16 hex digits: the same for a copy elsewhere, another for any image more or less.

        Files go by their path below the folder that holds them all and by their size, images in memory by their pixels.

        Raises:
            OSError: A file is gone.
        """
        digest = hashlib.sha256(np.ascontiguousarray(self.labels))
        if isinstance(self.images, np.ndarray):
            digest.update(repr(self.images.shape).encode())
            digest.update(np.ascontiguousarray(self.images))
        else:
            common = len(os.path.commonpath([path.parent for path in self.images]))
            for path in self.images:
                below = str(path)[common:].lstrip(os.sep)
                digest.update(os.fsencode(f"{below}\0{os.stat(path).st_size}\0"))
        return digest.hexdigest()[:16]

    def originals(self, limit: int) -> torch.Tensor | list[torch.Tensor] | None:
        """Decodes all images at their own sizes; raises as `__getitem__`.

        Returns:
            uint8 (N, 3, H, W) where all are of one size, else N tensors (3, H, W). None where they take more than
            `limit` bytes, which the headers of files tell before any is decoded.
        """
        if isinstance(self.images, np.ndarray):
            if self.images.nbytes > limit:
                return None
            return torch.from_numpy(self.images).permute(0, 3, 1, 2).contiguous()
        total = 0
        for path in self.images:
            width, height = image_files.stored_size(path)
            total += 3 * width * height
            if total > limit:
                return None
        decoded: list[torch.Tensor] = [torch.empty(0)] * len(self)

        def fill(i: int) -> None:
            decoded[i] = self.decoded(i)

        image_files.for_each(len(self), fill, f"decoding {self.name}")
        if len({image.shape for image in decoded}) > 1:
            return decoded
        together = torch.empty(len(self), *decoded[0].shape, dtype=torch.uint8)
        for i in range(len(self)):  # one by one, each freed at once: both at a time may be more than the memory
            together[i], decoded[i] = decoded[i], together[i]
        return together

    def pixels(self, size: int, progress: bool = True) -> torch.Tensor:
        """Decodes all images to uint8 (N, 3, size, size): what an encoder is evaluated on.

        The shorter side is resized (bilinear, antialiased), and the center square kept.

        Raises:
            ValueError: As `__getitem__`, or the images take more memory than the machine has.
        """
        if isinstance(self.images, np.ndarray) and self.images.shape[1:3] == (size, size):
            return torch.from_numpy(self.images).permute(0, 3, 1, 2).contiguous()
        needed = len(self) * 3 * size * size
        if needed > MEMORY:
            raise ValueError(
                f"{self.name}: {len(self):,} images of {size}x{size} take {needed / 2**30:,.0f} GiB decoded, and this "
                f"machine has {MEMORY / 2**30:,.0f}: choose a smaller data.size"
            )
        pixels = np.empty((len(self), 3, size, size), np.uint8)

        def fill(i: int) -> None:
            pixels[i] = np.asarray(image_files.fit(self[i][0], size)).transpose(2, 0, 1)

        image_files.for_each(len(self), fill, f"decoding {self.name}", progress)
        return torch.from_numpy(pixels)


def load(data: Data, split: Literal["train", "test", "all"]) -> ImageSet:
    """Loads one split of the data set that the settings name, with all its classes.

    `data.classes` and `data.open_set` are not applied here, because an open-set evaluation needs the unknown classes
    too; `open_set.load_known` applies them.

    The splits are the data set's own, with these exceptions. `digits` has none: a fifth of each class, drawn with a
    fixed seed, is its test split. The train split of `stl10` is its 5,000 labeled and 100,000 unlabeled images. The
    test split of a `folder` is its test/, or its val/ where there is no test/; one of class folders without such
    folders is split by `data.test_fraction` and `data.split_seed`, or taken whole as `all`; images without class
    folders are unlabeled and all in train.

    Returns:
        At least two images. Those of a `folder` stay on disk. With `broken="skip"` each of its files is decoded once
        here, and those that fail are left out, each logged and all counted in one warning; with `broken="stop"` they
        raise when asked for.

    Raises:
        FileNotFoundError: The files are not there, or a split does not exist; the message says what would help.
        ConnectionError: A download failed.
        ValueError: A folder whose layout is ambiguous, which has no images, or the same file in two classes or splits;
            or fewer than two images.
    """
    if data.name == "digits":
        images = _digits(split)
    else:
        images = _folder(data, split) if data.name == "folder" else _torchvision(data, split)
    if len(images) < 2:
        raise ValueError(f"{images.name} has {len(images)} image{'' if len(images) else 's'}, at least 2 are needed")
    return replace(images, stamps=stamps_of(data))


def _held_out(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draws test images, boolean (N,): that share of each class, at least one but not all of a class of two or more."""
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held_out[members[:count]] = True
    return held_out


def _digits(split: str) -> ImageSet:
    from sklearn.datasets import load_digits

    digits = load_digits()  # values 0 to 16
    gray = np.round(digits.images * (255 / 16)).astype(np.uint8)
    pixels = np.stack([np.asarray(image_files.fit(Image.fromarray(image), 32).convert("RGB")) for image in gray])
    chosen = _held_out(digits.target, 0.2, seed=0) == (split == "test")
    return ImageSet(pixels, digits.target.astype(np.int64), DIGITS, f"digits/{split}").subset(chosen)


def _torchvision(data: Data, split: str) -> ImageSet:
    from torchvision import datasets

    root = Path(data.root or "data").expanduser()
    names = {"svhn": split, "stl10": "train+unlabeled" if split == "train" else "test"}
    which = {"split": names[data.name]} if data.name in names else {"train": split == "train"}
    try:
        loaded = getattr(datasets, data.name.upper())(root, download=data.download, **which)
    except (RuntimeError, OSError) as error:
        if data.download:
            raise ConnectionError(
                f"cannot download {data.name} to data.root {str(root)!r} ({error}): check the network and that folder, "
                "or copy the files that torchvision keeps there from another machine"
            ) from error
        raise FileNotFoundError(
            f"{data.name} is not in data.root {str(root)!r}: --data.download true fetches it, or set data.root to the "
            f"folder where torchvision keeps it ({error})"
        ) from error
    images, labels = np.asarray(loaded.data), loaded.labels if data.name in names else loaded.targets
    images = images[..., None].repeat(3, axis=-1) if data.name == "mnist" else images
    images = images.transpose(0, 2, 3, 1) if data.name in names else images
    classes = DIGITS if data.name in ("mnist", "svhn") else tuple(loaded.classes)
    return ImageSet(images, np.asarray(labels, np.int64), classes, f"{data.name}/{split}")


def _folder(data: Data, split: str) -> ImageSet:
    root = Path(data.root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data.root {str(root)!r} is not a folder")
    name = f"folder:{printable(root.resolve().name)}/{split}"
    if has_splits(root):
        images = _list_split(root, split, name)
    else:
        images = _list_folder(root, name)
        if split == "test" and not images.classes:
            raise FileNotFoundError(
                f"data.root {str(root)!r} has no test images: it has neither class folders to split nor a folder test/"
            )
        if split != "all" and images.classes:
            held_out = _held_out(images.labels, data.test_fraction, data.split_seed)
            groups = zip(images.labels.tolist(), held_out.tolist(), strict=True)
            _refuse_links(zip(images.images, groups, strict=True))
            images = images.subset(held_out == (split == "test"))
    return _without_broken(images) if data.broken == "skip" else images


def split_folder(root: Path, split: str) -> Path | None:
    """Where the images of a split lie: `root/train`, `root/Test`, or `root/val` where there is no test/.

    Raises:
        ValueError: Several folders could be that split.
    """
    for names in _SPLITS[split]:
        found = [name for name in _class_folders(root) if name.casefold() in names]
        if len(found) > 1:
            raise ValueError(f"data.root {str(root)!r} has {found}, any of which may hold the {split} images: keep one")
        if found:
            return root / found[0]
    return None


def has_splits(root: Path) -> bool:
    """Whether a folder has train/ or test/, by any of their names, in place of class folders."""
    return root.is_dir() and any(split_folder(root, split) for split in _SPLITS)


def _list_split(root: Path, split: str, name: str) -> ImageSet:
    """Lists one of the split folders; refuses where it is missing, may be a class, or does not fit the other one."""
    other_split = "test" if split == "train" else "train"
    folder, other = split_folder(root, split), split_folder(root, other_split)
    if folder is None:
        raise FileNotFoundError(
            f"data.root {str(root)!r} has a folder {other.name}/ but no {split}/: add it, or move the class folders to "
            "data.root itself, where data.test_fraction of each is held out"
        )
    classes = _class_folders(folder)
    other_classes = _class_folders(other) if other else []
    if classes and other_classes and classes != other_classes:
        raise ValueError(
            f"the class folders of {str(folder)!r} and {str(other)!r} differ: "
            f"only in {folder.name}/ are {sorted(set(classes) - set(other_classes))}, "
            f"only in {other.name}/ are {sorted(set(other_classes) - set(classes))}"
        )
    beside = [place for place in _class_folders(root) if root / place != folder]
    if not classes and beside and other is None:
        raise ValueError(
            f"{str(folder)!r} has images without class folders and lies beside {beside}: if {folder.name!r} is a "
            f"class, move all class folders into a folder train/; if its images are unlabeled, set data.root to "
            f"{str(folder)!r}"
        )
    images = _list_folder(folder, name)
    groups = [*zip(images.images, images.labels.tolist(), strict=True)]
    if split == "test" and other:
        paths = [path for place in other_classes or [""] for path in image_files.find(other / place)]
        groups += [(path, other_split) for path in paths]
    _refuse_links(groups)
    return images


def _refuse_links(grouped: Iterable[tuple[Path, object]]) -> None:
    """Refuses where images of two groups, such as classes, are the same file: by a link to it, or to its folder."""
    first: dict[tuple[int, int], tuple[Path, object]] = {}
    for path, group in grouped:
        try:
            status = os.stat(path)
        except OSError:  # decoding it says so
            continue
        other, its_group = first.setdefault((status.st_dev, status.st_ino), (path, group))
        if its_group != group:
            raise ValueError(
                f"{str(other)!r} and {str(path)!r} are the same file, by a link: an image cannot be in two classes, "
                "nor in both the training and the test images"
            )


def _list_folder(folder: Path, name: str) -> ImageSet:
    """Lists `folder/<class>/*` at any depth, or where there are no class folders the unlabeled images of `folder`."""
    others: Counter[str] = Counter()
    classes = _class_folders(folder)
    if not classes:
        paths = _images_in(folder, others)
        labels = np.full(len(paths), -1, np.int64)
    else:
        alike: dict[str, str] = {}
        for label in classes:
            key = unicodedata.normalize("NFC", label).strip().casefold()
            if (same := alike.setdefault(key, label)) != label:
                raise ValueError(
                    f"the class folders {same!r} and {label!r} in {str(folder)!r} differ in case alone, in spaces "
                    "around them, or in the Unicode form of their letters: rename or merge one"
                )
        if loose := _loose_images(folder):
            warnings.warn(
                f"{name}: {loose} images beside the class folders of {str(folder)!r} are left out", stacklevel=2
            )
        members = [_images_in(folder / label, others) for label in classes]
        _refuse_wrapping(folder)
        paths = [path for each in members for path in each]
        labels = np.repeat(np.arange(len(classes)), [len(each) for each in members])
    if others:
        counts = [f"{count:,} {f'in {ending}' if ending else 'without any'}" for ending, count in others.most_common(5)]
        logger.info("%s: passed over are files by their endings: %s", name, printable(", ".join(counts)))
    return ImageSet(paths, labels, tuple(map(printable, classes)), name)


def _refuse_wrapping(folder: Path) -> None:
    """Refuses a single folder around the class folders, or around train/ and test/: it would be the only class."""
    inner = folder
    while len(inside := _class_folders(inner)) == 1 and not has_splits(inner) and not _loose_images(inner):
        inner = inner / inside[0]
    if not inside or _loose_images(inner):
        inner = inner.parent  # a class, and the only one
    if inner not in (folder, folder.parent):
        raise ValueError(
            f"{str(folder)!r} holds one folder around all others: set data.root to {str(inner)!r}, or move what is in "
            "there up"
        )


def _loose_images(folder: Path) -> int:
    return sum(image_files.is_image(entry.name) and not entry.is_dir() for entry in folder.iterdir())


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images_in(folder: Path, others: Counter[str]) -> list[Path]:
    paths = image_files.find(folder, others)
    if not paths:
        raise ValueError(f"no image in the folder {str(folder)!r}; looked for {' '.join(image_files.ENDINGS)}")
    return paths


def _without_broken(images: ImageSet) -> ImageSet:
    """Decodes every file once and leaves out those that fail: each is logged, and one warning counts them."""
    readable = np.ones(len(images), bool)

    def check(i: int) -> None:
        try:
            images[i]
        except ValueError as error:
            readable[i] = False
            logger.info("left out: %s", error)

    image_files.for_each(len(images), check, f"checking {images.name}")
    if not readable.all():
        broken = [str(images.images[i]) for i in np.flatnonzero(~readable)]
        more = " ..." if len(broken) > 3 else ""
        warnings.warn(
            f"{images.name}: {len(broken)} of {len(images)} images cannot be read, left out: {broken[:3]}{more}",
            stacklevel=2,
        )
    return images.subset(readable)
