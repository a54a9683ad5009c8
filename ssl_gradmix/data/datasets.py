"""Named data sets and image folders, as images in memory or paths on disk with labels."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from ssl_gradmix.data import images as image_files
from ssl_gradmix.files import printable
from ssl_gradmix.settings import Data

logger = logging.getLogger("ssl_gradmix")

DIGITS = tuple("0123456789")


@dataclass(eq=False)
class ImageSet(torch.utils.data.Dataset):
    """Images, in memory or on disk, and what they show.

    Args:
        images: uint8 (N, H, W, 3), or the paths of N image files, decoded when they are asked for.
        labels: int64 (N,), -1 where unlabeled.
        classes: Label k is `classes[k]`. Kept whole when a subset of the classes is taken: labels keep their numbers.
        name: What messages and results call it, for instance `digits/train`.
    """

    images: np.ndarray | list[Path]
    labels: np.ndarray
    classes: tuple[str, ...]
    name: str

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
        """Takes the images of these classes, in their present order; labels keep their numbers.

        Raises:
            ValueError: No image is of these classes.
        """
        kept = np.isin(self.labels, classes)
        if not kept.any():
            raise ValueError(
                f"{self.name} has no image of the classes {list(classes)}, only of {np.unique(self.labels).tolist()}"
            )
        return self.subset(kept)

    def pixels(self, size: int, progress: bool = True) -> torch.Tensor:
        """Decodes all images to one size: what is kept on the device.

        Args:
            size: The shorter side is resized to it (bilinear, antialiased), and the center square kept.
            progress: Show a bar where it takes some seconds.

        Returns:
            uint8 (N, 3, size, size).

        Raises:
            ValueError: A file cannot be read, the message names its path; or the images take more memory than the
                machine has.
        """
        if isinstance(self.images, np.ndarray) and self.images.shape[1:3] == (size, size):
            return torch.from_numpy(self.images).permute(0, 3, 1, 2).contiguous()
        needed, has = len(self) * 3 * size * size, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > has:
            raise ValueError(
                f"{self.name}: {len(self):,} images of {size}x{size} take {needed / 2**30:,.0f} GiB decoded, and this "
                f"machine has {has / 2**30:,.0f}: choose a smaller data.size, or in a training "
                "--augmentation.where workers, which decodes as it goes"
            )
        pixels = np.empty((len(self), 3, size, size), np.uint8)

        def fill(i: int) -> None:
            pixels[i] = np.asarray(image_files.fit(self[i][0], size)).transpose(2, 0, 1)

        image_files.for_each(len(self), fill, f"decoding {self.name}", progress)
        return torch.from_numpy(pixels)


def load(data: Data, split: Literal["train", "test"]) -> ImageSet:
    """Loads one split of the data set that the settings name, with all its classes.

    `data.classes` and `data.open_set` are not applied here, because an open-set evaluation needs the unknown classes
    too; `load_known` applies them.

    The splits are the data set's own, with these exceptions. `digits` has none: a fifth of each class, drawn with a
    fixed seed, is its test split. The train split of `stl10` is its 5,000 labeled and 100,000 unlabeled images. A
    `folder` of class folders without train/ and test/ is split by `data.test_fraction` and `data.split_seed`; images
    without class folders are unlabeled and all in train.

    Args:
        data: The settings.
        split: `train` or `test`.

    Returns:
        At least two images. Those of a `folder` stay on disk. With `broken="skip"` each of its files is decoded once
        here, and those that fail are left out, each logged and all counted in one warning; with `broken="stop"` they
        raise when asked for.

    Raises:
        FileNotFoundError: The files are not there, or a split does not exist; the message says what would help.
        ConnectionError: A download failed.
        ValueError: A folder whose layout is ambiguous or has no images, or fewer than two images.
    """
    if data.name == "digits":
        images = _digits(split)
    elif data.name == "folder":
        images = _folder(data, split)
    else:
        images = _torchvision(data, split)
    if len(images) < 2:
        raise ValueError(f"{images.name} has {len(images)} image{'' if len(images) else 's'}, at least 2 are needed")
    return images


def load_known(data: Data, split: Literal["train", "test"]) -> ImageSet:
    """As `load`, with the images of `data.classes` or `data.open_set` alone, where one of the two is set.

    Raises:
        ValueError: As `known_classes`, or if no image is of these classes.
    """
    images = load(data, split)
    known = known_classes(data, images.classes)
    return images if known is None else images.only(known)


def known_classes(data: Data, classes: Sequence[str]) -> list[int] | None:
    """Resolves `data.classes` or `data.open_set` to label numbers.

    Args:
        data: The settings. `data.classes` holds names or label numbers; what could be either, as 7 where there is a
            class folder `7`, is the name. `data.open_set` is `<split>:<trial>`, with a split of `open_set.split` whose
            label numbers hold for these classes, or `random:<number of known classes>:<seed>`.
        classes: All classes of the data set.

    Returns:
        Label numbers in the order given, or None where the settings ask for all classes.

    Raises:
        ValueError: A class that does not exist or is named twice, an empty list, or an open-set split that is not
            understood or does not fit the data.
    """
    if data.classes is not None:
        known = [_label(wanted, classes) for wanted in data.classes]
        setting = f"data.classes {data.classes!r}"
    elif data.open_set is not None:
        known = _open_set(data.open_set, data.name, len(classes))
        setting = f"data.open_set {data.open_set!r}"
    else:
        return None
    if not known or len(set(known)) < len(known):
        raise ValueError(f"{setting} must name at least one class, and none twice")
    return known


def _label(wanted: int | str, classes: Sequence[str]) -> int:
    if str(wanted) in classes:
        return classes.index(str(wanted))
    if isinstance(wanted, int) and 0 <= wanted < len(classes):
        return wanted
    names = ", ".join(classes[:20]) + (" ..." if len(classes) > 20 else "")
    raise ValueError(f"data.classes has {wanted!r}, neither a class nor its number; the classes are {names or 'none'}")


def _open_set(setting: str, name: str, n_classes: int) -> list[int]:
    from ssl_gradmix.data import open_set

    match setting.split(":"):
        case ["random", n_known, seed] if n_known.isdecimal() and seed.isdecimal():
            known, _ = open_set.random_split(n_classes, int(n_known), int(seed))
        case [dataset, trial] if trial.isdecimal():
            open_set.check_fits(dataset, name, n_classes)
            known, _ = open_set.split(dataset, int(trial))
        case _:
            raise ValueError(f"data.open_set must be like 'cifar10:2' or 'random:6:0', got {setting!r}")
    return list(known)


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

    root, train = Path(data.root).expanduser(), split == "train"
    try:
        match data.name:
            case "cifar10" | "cifar100":
                loaded = getattr(datasets, data.name.upper())(root, train=train, download=data.download)
                images, labels, classes = loaded.data, loaded.targets, loaded.classes
            case "mnist":
                loaded = datasets.MNIST(root, train=train, download=data.download)
                images, labels, classes = loaded.data.numpy()[..., None].repeat(3, axis=-1), loaded.targets, DIGITS
            case "svhn":
                loaded = datasets.SVHN(root, split=split, download=data.download)
                images, labels, classes = loaded.data.transpose(0, 2, 3, 1), loaded.labels, DIGITS
            case "stl10":
                loaded = datasets.STL10(root, split="train+unlabeled" if train else "test", download=data.download)
                images, labels, classes = loaded.data.transpose(0, 2, 3, 1), loaded.labels, loaded.classes
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
    return ImageSet(images, np.asarray(labels, np.int64), tuple(classes), f"{data.name}/{split}")


def _folder(data: Data, split: str) -> ImageSet:
    root = Path(data.root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data.root {str(root)!r} is not a folder")
    inside = _class_folders(root)
    if len(inside) == 1 and (root / inside[0] / "train").is_dir():
        raise ValueError(
            f"data.root {str(root)!r} holds one folder with train/ in it: set data.root to {str(root / inside[0])!r}"
        )
    name = f"folder:{printable(root.resolve().name)}/{split}"
    if (root / "train").is_dir() or (root / "test").is_dir():
        _check_split_folders(root, split)
        images = _list_folder(root / split, name)
    else:
        images = _list_folder(root, name)
        if images.classes:
            held_out = _held_out(images.labels, data.test_fraction, data.split_seed)
            images = images.subset(held_out == (split == "test"))
        elif split == "test":
            raise FileNotFoundError(
                f"data.root {str(root)!r} has no test images: it has neither class folders to split nor a folder test/"
            )
    return _without_broken(images) if data.broken == "skip" else images


def _check_split_folders(root: Path, split: str) -> None:
    """Refuses where `root/<split>` is missing, may be a class, or has other classes than the other split."""
    folder, other = root / split, root / ("test" if split == "train" else "train")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data.root {str(root)!r} has a folder {other.name}/ but no {split}/: add it, or move the class folders to "
            "data.root itself, where data.test_fraction of each is held out"
        )
    classes = _class_folders(folder)
    other_classes = _class_folders(other) if other.is_dir() else []
    if classes and other_classes and classes != other_classes:
        raise ValueError(
            f"the class folders of {str(folder)!r} and {str(other)!r} differ: "
            f"only in {split}/ are {sorted(set(classes) - set(other_classes))}, "
            f"only in {other.name}/ are {sorted(set(other_classes) - set(classes))}"
        )
    beside = [name for name in _class_folders(root) if name not in ("train", "test")]
    if not classes and beside and not other.is_dir():
        raise ValueError(
            f"{str(folder)!r} has images without class folders and lies beside {beside}: if {split!r} is a class, move "
            f"all class folders into a folder train/; if its images are unlabeled, set data.root to {str(folder)!r}"
        )


def _list_folder(folder: Path, name: str) -> ImageSet:
    """Lists `folder/<class>/*` at any depth, or where there are no class folders the unlabeled images of `folder`."""
    classes = _class_folders(folder)
    if not classes:
        paths = _images_in(folder)
        return ImageSet(paths, np.full(len(paths), -1, np.int64), (), name)
    by_case: dict[str, str] = {}
    for label in classes:
        if (same := by_case.setdefault(label.casefold(), label)) != label:
            raise ValueError(
                f"the class folders {same!r} and {label!r} in {str(folder)!r} differ in case alone: rename or merge one"
            )
    loose = sum(image_files.is_image(entry.name) and not entry.is_dir() for entry in folder.iterdir())
    if loose:
        warnings.warn(f"{name}: {loose} images beside the class folders of {str(folder)!r} are left out", stacklevel=2)
    members = [_images_in(folder / label) for label in classes]
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in members])
    return ImageSet([path for paths in members for path in paths], labels, tuple(map(printable, classes)), name)


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images_in(folder: Path) -> list[Path]:
    paths = image_files.find(folder)
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
