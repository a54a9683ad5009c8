"""Named data sets and image folders, as images in memory or paths on disk, with labels."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import yaml
from jsonargparse.typing import OpenUnitInterval, PositiveInt
from PIL import Image

from ssl_gradmix.data import images as image_files

logger = logging.getLogger("ssl_gradmix")

MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
"""Memory of this machine in bytes."""

_DIGITS = tuple("0123456789")

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "valid", "validation"),
}
"""Folder names of each split in lower case, see `_split_folders`."""


@dataclass
class Data:
    """Which images to use, and where they are.

    Args:
        name: `digits` (in scikit-learn, nothing to download), `cifar10`, `cifar100`, `svhn`,
            `mnist`, `stl10` (by torchvision), or `folder`.
        root: Folder of the images. For `folder`: `root/train/<class>/*` and `root/test/<class>/*`
            (or `val/`), or `root/<class>/*` (split by `test_fraction`), or images without class
            folders (unlabeled). For torchvision's data sets: the folder where it keeps its files,
            `data` by default.
        size: Side of the square images that the encoder sees, in pixels.
        channels: 3 for RGB, or 1 for gray images, of which 16-bit files keep all their values.
        download: Download one of torchvision's data sets if it is not in `root`.
        classes: Use only these classes, by name or by number (a name wins), for instance the known
            ones of an open-set trial. They are text: `[yes, 01]` are the classes `yes` and `01`.
        open_set: Use only the known classes of an open-set trial: `cifar10:2` is trial 2 of the
            literature's five, `random:6:0` draws six classes with seed 0.
        test_fraction: Fraction of each class held out for testing, for folders that have no
            train/ and test/.
        split_seed: Seed of that split.
        broken: What to do with unreadable images: `stop` with the path, or `skip` and report
            them, which decodes every file once at the start.
    """

    name: Literal["digits", "cifar10", "cifar100", "svhn", "mnist", "stl10", "folder"] = "digits"
    root: str | None = None
    size: PositiveInt = 32
    channels: Literal[1, 3] = 3
    download: bool = False
    classes: list[str] | str | None = None  # str: YAML that jsonargparse reads as other types
    open_set: str | None = None
    test_fraction: OpenUnitInterval = 0.2
    split_seed: int = 0
    broken: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        if self.name == "folder" and not self.root:
            raise ValueError("data.root must be given with data.name=folder")
        if self.name == "digits" and self.root:
            raise ValueError(
                "data.root has no effect with data.name=digits: remove it or add --data.name folder"
            )
        if self.classes is not None and self.open_set is not None:
            raise ValueError("data.classes and data.open_set cannot be combined: give one of them")
        if isinstance(self.classes, str):
            self.classes = _texts(self.classes)
        elif self.classes is not None:
            self.classes = [str(name) for name in self.classes]


def _texts(value: str) -> list[str]:
    """The scalars of a list in YAML as text; any other value is a single name."""
    try:
        parsed = yaml.load(value, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        return [value]
    is_list = isinstance(parsed, list) and all(isinstance(name, str) for name in parsed)
    return parsed if is_list else [value]


@dataclass(eq=False)
class ImageSet:
    """Images, in memory or on disk, with labels.

    Args:
        images: uint8 or uint16 (N, H, W, C), or the paths of N image files, decoded on demand.
        labels: int64 (N,), -1 for unlabeled images.
        classes: Class names; label k is `classes[k]`. Subsets keep all of them, so labels keep
            their meaning.
        name: Name in messages and results, for instance `digits/train`.
        channels: 3 for RGB, 1 for gray files, which are decoded to 16 bits; C of arrays.
    """

    images: np.ndarray | list[Path]
    labels: np.ndarray
    classes: tuple[str, ...]
    name: str
    channels: int = 3

    def __post_init__(self) -> None:
        if isinstance(self.images, np.ndarray):
            self.channels = self.images.shape[-1]

    def __len__(self) -> int:
        return len(self.labels)

    def decoded(self, index: int) -> torch.Tensor:
        """Image `index` at its own size, (C, H, W), uint8, or int32 in [0, 65535] for 16 bits.

        Raises:
            ValueError: The file cannot be read; the message names its path.
        """
        return _as_tensor(np.atleast_3d(np.asarray(self._pil(index))))

    def _pil(self, index: int) -> Image.Image:
        if isinstance(self.images, np.ndarray):
            image = self.images[index]
            return Image.fromarray(image if self.channels == 3 else image[..., 0])
        decode = image_files.decode if self.channels == 3 else image_files.decode_gray
        return decode(self.images[index])

    @property
    def labeled(self) -> bool:
        """Whether every image has a label."""
        return bool((self.labels >= 0).all())

    def subset(self, indices: Sequence[int] | np.ndarray) -> ImageSet:
        """Takes the images at `indices`, in that order, or those where a boolean array is true."""
        kept = np.arange(len(self))[indices]
        images: np.ndarray | list[Path]
        if isinstance(self.images, np.ndarray):
            images = self.images[kept]
        else:
            images = [self.images[i] for i in kept]
        return replace(self, images=images, labels=self.labels[kept])

    def only(self, classes: Sequence[int]) -> ImageSet:
        """Takes the images with these labels, in order; ValueError if there are none."""
        kept = np.isin(self.labels, classes)
        if not kept.any():
            raise ValueError(f"{self.name} has no image of the classes {list(classes)}")
        return self.subset(kept)

    def with_few_labels(self, fraction: float, seed: int) -> ImageSet:
        """The same images, of which a random fraction of each class (at least one) keeps its label.

        The other images get the label -1.
        """
        kept = _draw_fraction(self.labels, fraction, seed)
        return replace(self, labels=np.where(kept, self.labels, -1))

    def describe(self) -> str:
        """A line such as `digits/train: 1,438 images, 10 classes, 0 without labels`."""
        unlabeled = int((self.labels < 0).sum())
        classes = len(np.unique(self.labels[self.labels >= 0]))
        return f"{self.name}: {len(self):,} images, {classes} classes, {unlabeled:,} without labels"

    def fingerprint(self) -> str:
        """A hash of the images, 16 hex digits: equal for copies, different for other images.

        Images in memory are hashed by their pixels; files by their size and their path relative
        to the folder that contains them all.

        Raises:
            OSError: A file does not exist.
        """
        digest = hashlib.sha256(np.ascontiguousarray(self.labels).data)
        if isinstance(self.images, np.ndarray):
            digest.update(repr(self.images.shape).encode())
            digest.update(np.ascontiguousarray(self.images).data)
        else:
            common = len(os.path.commonpath([path.parent for path in self.images]))
            for path in self.images:
                relative = str(path)[common:].lstrip(os.sep)
                digest.update(os.fsencode(f"{relative}\0{os.stat(path).st_size}\0"))
        return digest.hexdigest()[:16]

    def originals(self, limit: int) -> torch.Tensor | list[torch.Tensor] | None:
        """Decodes all images at their own sizes.

        Returns:
            (N, C, H, W) if all have the same size, else N tensors (C, H, W), as from `decoded`.
            None if they would take more than `limit` bytes, by the headers of the files.

        Raises:
            ValueError: As `decoded`.
        """
        if not self._fits(limit):
            return None
        if isinstance(self.images, np.ndarray):
            return _as_tensor(self.images)
        decoded = [torch.empty(0)] * len(self)

        def fill(i: int) -> None:
            decoded[i] = self.decoded(i)

        image_files.for_each(len(self), fill, f"decoding {self.name}")
        if len({image.shape for image in decoded}) > 1:
            return decoded
        stacked = decoded[0].new_empty(len(self), *decoded[0].shape)
        for i in range(len(self)):  # free one by one: memory may not hold all images twice
            stacked[i] = decoded[i]
            decoded[i] = stacked[i]
        return stacked

    def _fits(self, limit: int) -> bool:
        if isinstance(self.images, np.ndarray):
            return self.images.nbytes <= limit
        sizes = (image_files.stored_size(path) for path in self.images)
        each = 3 if self.channels == 3 else 4  # bytes per pixel, of uint8 RGB or int32 gray
        totals = accumulate(each * width * height for width, height in sizes)
        return all(total <= limit for total in totals)  # stops early: reading headers takes long

    def pixels(self, size: int, progress: bool = True) -> torch.Tensor:
        """Decodes all images to (N, C, size, size), the input of an evaluation, as `decoded`.

        The shorter side is resized (bilinear, antialiased), and the center square is kept.

        Raises:
            ValueError: As `decoded`, or the images need more memory than the machine has.
        """
        dtype: np.dtype | type = np.uint8 if self.channels == 3 else np.uint16
        if isinstance(self.images, np.ndarray):
            if self.images.shape[1:3] == (size, size):
                return _as_tensor(self.images)
            dtype = self.images.dtype
        shape = (len(self), size, size, self.channels)
        if np.prod(shape, dtype=float) > MEMORY:
            raise ValueError(
                f"{self.name} does not fit in memory at size={size}: use a smaller one"
            )
        pixels = np.empty(shape, dtype)

        def fill(i: int) -> None:
            image = image_files.fit(self._pil(i), size)
            pixels[i] = np.atleast_3d(np.asarray(image))

        image_files.for_each(len(self), fill, f"decoding {self.name}", progress)
        return _as_tensor(pixels)


def _as_tensor(pixels: np.ndarray) -> torch.Tensor:
    """A copy with channels first. uint16 becomes int32, as CUDA cannot index torch.uint16."""
    dtype = np.int32 if pixels.dtype == np.uint16 else pixels.dtype
    return torch.from_numpy(np.array(np.moveaxis(pixels, -1, -3), dtype, order="C"))


def load(data: Data, split: Literal["train", "test", "all"]) -> ImageSet:
    """Loads one split of a data set with all its classes.

    `data.classes` and `data.open_set` are not applied here, because open-set evaluations need the
    unknown classes too; `open_set.load_known` applies them.

    The splits are those of the data set, with these exceptions. `digits` has none: a fifth of each
    class, drawn with a fixed seed, is its test split. The train split of `stl10` is its 5,000
    labeled and 100,000 unlabeled images. Class folders without train/ and test/ are split by
    `data.test_fraction` and `data.split_seed`. Images without class folders are unlabeled and all
    in train.

    Args:
        data: The settings.
        split: `all` is for out-of-distribution images: all images of a folder without train/ and
            test/, otherwise the test split.

    Returns:
        At least two images. Those of a `folder` stay on disk.

    Raises:
        FileNotFoundError: The files or the split do not exist.
        ValueError: The folder's layout is ambiguous, or it has fewer than two images.
    """
    if data.name == "folder":
        images = _folder(data, split)
    elif data.name == "digits":
        images = _digits("train" if split == "train" else "test")
    else:
        images = _torchvision(data, "train" if split == "train" else "test")
    if isinstance(images.images, np.ndarray) and data.channels == 1:
        gray = [np.asarray(Image.fromarray(image).convert("L")) for image in images.images]
        images = replace(images, images=np.stack(gray)[..., None])
    if len(images) < 2:
        raise ValueError(f"{images.name} has fewer than 2 images")
    return images


def _draw_fraction(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draws a fraction of each class, bool (N,): at least one image, but not all of two or more."""
    rng = np.random.default_rng(seed)
    drawn = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        drawn[members[:count]] = True
    return drawn


def _digits(split: str) -> ImageSet:
    from sklearn.datasets import load_digits

    digits = load_digits()  # values 0 to 16
    gray = np.round(digits.images * (255 / 16)).astype(np.uint8)
    enlarged = [image_files.fit(Image.fromarray(image), 32).convert("RGB") for image in gray]
    labels = digits.target.astype(np.int64)
    pixels = np.stack([np.asarray(image) for image in enlarged])
    images = ImageSet(pixels, labels, _DIGITS, f"digits/{split}")
    return images.subset(_draw_fraction(labels, 0.2, seed=0) == (split == "test"))


def _torchvision(data: Data, split: str) -> ImageSet:
    from torchvision import datasets

    root = Path(data.root or "data").expanduser()
    split_names = {"svhn": split, "stl10": "train+unlabeled" if split == "train" else "test"}
    by_name = data.name in split_names
    which = {"split": split_names[data.name]} if by_name else {"train": split == "train"}
    try:
        loaded = getattr(datasets, data.name.upper())(root, download=data.download, **which)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"cannot load {data.name} from data.root {str(root)!r} ({error}): "
            "--data.download true downloads it"
        ) from error
    images = np.asarray(loaded.data)
    if data.name == "mnist":
        images = images[..., None].repeat(3, axis=-1)
    if by_name:
        images = images.transpose(0, 2, 3, 1)
    labels = np.asarray(loaded.labels if by_name else loaded.targets, np.int64)
    classes = _DIGITS if data.name in ("mnist", "svhn") else tuple(loaded.classes)
    return ImageSet(images, labels, classes, f"{data.name}/{split}")


def _folder(data: Data, split: str) -> ImageSet:
    root = Path(data.root or "").expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data.root {str(root)!r} is not a folder")
    folders = _split_folders(root)
    name = folder_name(root)
    if folders:
        folder = _folder_of_split(root, folders, "test" if split == "all" else split)
        images = _list_images(folder, f"{name}/{folder.name}")
    else:
        images = _list_images(root, f"{name}/{split}")
        if split == "test" and not images.classes:
            raise FileNotFoundError(f"data.root {str(root)!r} has no test/ and no classes to split")
        is_part = split != "all" and bool(images.classes)
        if is_part:
            held_out = _draw_fraction(images.labels, data.test_fraction, data.split_seed)
            images = images.subset(held_out == (split == "test"))
        if _is_split(root):
            own = root.resolve().name
            images.name = f"{name}/{own}-{split}" if is_part else f"{name}/{own}"
    images.channels = data.channels
    return _without_broken(images) if data.broken == "skip" else images


def folder_name(root: str | Path) -> str:
    """Name of a folder in results: `folder:pets` for `data/pets`, and also for `data/pets/val`."""
    path = Path(root).expanduser().resolve()
    return f"folder:{(path.parent if _is_split(path) else path).name}"


def _is_split(folder: Path) -> bool:
    """Whether a folder is named as a split of the folder that contains it."""
    path = folder.resolve()
    return path.name.lower() in chain(*_SPLIT_NAMES.values()) and bool(path.parent.name)


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders of `train` and `test` in `root`; empty if it has neither.

    Of several, the first with the classes of `train` is taken, else the first with classes: a
    benchmark's test/ is often unlabeled, and its val/ is not.
    """
    by_name = {name.lower(): root / name for name in image_files.subfolders(root)}
    found: dict[str, Path] = {}
    classes: list[str] | None = None
    for split, names in _SPLIT_NAMES.items():
        if present := [by_name[name] for name in names if name in by_name]:
            inside = [image_files.subfolders(folder) for folder in present]
            fit = [(each == classes, bool(each)) for each in inside]
            chosen = fit.index(max(fit))
            found[split], classes = present[chosen], inside[chosen]
    return found


def _folder_of_split(root: Path, folders: dict[str, Path], split: str) -> Path:
    """The folder of one split; raises if it does not exist or if the splits' classes differ."""
    if split not in folders:
        (only,) = folders.values()
        raise FileNotFoundError(
            f"data.root {str(root)!r} has no {split}/: add it, or give {str(only)!r} as data.root, "
            "of which data.test_fraction is held out"
        )
    classes = [set(image_files.subfolders(folder)) for folder in folders.values()]
    if all(classes) and classes[0] != classes[-1]:
        differing = sorted(classes[0] ^ classes[-1])
        both = " and ".join(f"{folder.name}/" for folder in folders.values())
        raise ValueError(f"{both} in data.root {str(root)!r} differ in {differing}")
    if not any(classes) and len(folders) == 1 and len(image_files.subfolders(root)) > 1:
        raise ValueError(
            f"data.root {str(root)!r} has folders beside {split}/, which has no class folders: "
            "move all classes into a folder train/, or set data.root to it if it is unlabeled"
        )
    return folders[split]


def _list_images(folder: Path, name: str) -> ImageSet:
    """Lists `folder/<class>/*`, or the unlabeled images of `folder`.

    Raises:
        ValueError: A class has no images, or it is not clear which folders are classes.
    """
    classes = image_files.subfolders(folder)
    class_folders = [folder / each for each in classes] or [folder]
    members = [image_files.find(each) for each in class_folders]
    for each, paths in zip(class_folders, members, strict=True):
        if not paths:
            raise ValueError(f"data.root has no image in {str(each)!r}")
    if classes:
        _require_one_depth(folder, class_folders, members)
    if len(classes) == 1:
        message = f"{name} has one class, {classes[0]!r}: is data.root one level too high?"
        warnings.warn(message, stacklevel=2)
    numbers = np.arange(len(classes)) if classes else np.array([-1])
    labels = np.repeat(numbers, [len(paths) for paths in members])
    return ImageSet([path for paths in members for path in paths], labels, tuple(classes), name)


def _require_one_depth(folder: Path, classes: Sequence[Path], members: list[list[Path]]) -> None:
    """Raises ValueError unless all images lie in `<class>/`, or all in the same `<class>/<x>/`.

    The latter is the layout of TinyImageNet, `<class>/images/*`. Otherwise the folders inside a
    class, or those around it, may be the classes that are meant.
    """
    files = (each.name for each in folder.iterdir() if each.is_file())
    beside = [name for name in files if image_files.is_image(name)]
    if beside:
        raise ValueError(
            f"data.root: {str(folder)!r} has images, such as {min(beside)}, beside its class "
            "folders: move either away"
        )
    inside = [_inner_folders(*each) for each in zip(classes, members, strict=True)]
    if len(inside[0]) == 1 and all(each == inside[0] for each in inside):
        return
    where, folders = next(pair for pair in zip(classes, inside, strict=True) if pair[1] != {"."})
    some = ", ".join(sorted(folders - {"."})[:3])
    raise ValueError(
        f"data.root: {str(where)!r} should be a class, but has images in its folders {some}: move "
        "them up if they are of one class, or, if these are the classes, all into one folder"
    )


def _inner_folders(folder: Path, paths: Sequence[Path]) -> set[str]:
    """The folders of `paths`, relative to `folder`."""
    if paths[-1].parent == folder:  # those of sub-folders are last
        return {"."}
    return {os.path.relpath(parent, folder) for parent in {path.parent for path in paths}}


def _without_broken(images: ImageSet) -> ImageSet:
    """Decodes every file once and leaves out those that fail: each is logged, and all counted."""
    readable = np.ones(len(images), bool)

    def check(i: int) -> None:
        try:
            images.decoded(i)
        except ValueError as error:
            readable[i] = False
            logger.info("skipped: %s", error)

    image_files.for_each(len(images), check, f"checking {images.name}")
    if not readable.all():
        count = int((~readable).sum())
        message = f"{images.name}: {count} of {len(images)} images cannot be read and are skipped"
        warnings.warn(message, stacklevel=2)
    return images.subset(readable)
