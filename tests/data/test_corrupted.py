"""Corrupted test sets: made on the fly, and read from files as they are published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_gradmix.data import corrupted
from ssl_gradmix.data.corrupted import Generated, Published, choose
from ssl_gradmix.data.corruptions import COMMON, corrupt
from ssl_gradmix.data.datasets import Data, ImageSet, load

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
LABELS = np.array([2, 0, 1, 0, 1, 2, -1, 0, 1, 0, 0, 0])
IMAGES = ImageSet(PIXELS, LABELS, ("ant", "bee", "cat"), "insects/test")
NUMBERED = replace(IMAGES, classes=("0", "1", "2"))
GRAY = replace(IMAGES, images=PIXELS[..., :1])
LABELED = np.flatnonzero(LABELS >= 0)


def one_by_one(numbers, name: str, severity: int, seed: int = 0) -> np.ndarray:
    return np.stack([corrupt(PIXELS[i], name, severity, seed=seed, index=int(i)) for i in numbers])


def as_arrays(pixels: torch.Tensor) -> np.ndarray:
    return pixels.permute(0, 2, 3, 1).numpy()


def test_choose_keeps_the_benchmarks_order() -> None:
    assert choose() == list(COMMON)
    assert choose(["fog", "shot_noise", "fog"]) == ["shot_noise", "fog"]


# Made on the fly


def test_images_keep_their_noise_in_any_subset() -> None:
    whole = Generated(IMAGES, LABELED, size=16, seed=5).read("gaussian_noise", 4)
    expected = one_by_one(LABELED, "gaussian_noise", 4, seed=5)
    np.testing.assert_array_equal(as_arrays(whole.pixels(16)), expected)
    part = whole.subset(np.array([9, 2]))
    np.testing.assert_array_equal(as_arrays(part.pixels(16)), expected[[9, 2]])
    np.testing.assert_array_equal(as_arrays(part.subset([1]).pixels(16)), expected[[2]])
    assert part.labels.tolist() == [0, 1]
    assert (len(whole), len(part), whole.name) == (11, 2, "insects/test")
    selected = Generated(IMAGES, LABELED[[2, 4, 7]], size=16, seed=5).read("gaussian_noise", 4)
    np.testing.assert_array_equal(as_arrays(selected.pixels(16)), expected[[2, 4, 7]])
    assert not hasattr(whole, "images")


@pytest.mark.parametrize("limit", [0, 2**30], ids=["decoded each time", "decoded once"])
def test_files_are_corrupted_at_the_encoders_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(corrupted, "_DECODED_AT_MOST", limit)
    stored = np.random.default_rng(0).integers(0, 256, (3, 30, 40, 3), dtype=np.uint8)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, pixels in zip(paths, stored, strict=True):
        Image.fromarray(pixels).save(path)
    files = ImageSet(paths, np.arange(3), ("a", "b", "c"), "x/test")
    made = Generated(files, np.array([1, 2]), size=12).read("contrast", 2).pixels(12)
    for number, image in zip((1, 2), as_arrays(made), strict=True):
        square = Image.fromarray(stored[number]).resize((12, 12), 2, (5, 0, 35, 30))
        expected = corrupt(np.asarray(square), "contrast", 2, index=number)
        np.testing.assert_array_equal(image, expected)


def test_preset_fits_the_size() -> None:
    presets = {size: Generated(IMAGES, LABELED, size).origin()["preset"] for size in (16, 64, 224)}
    assert presets == {16: "cifar", 64: "imagenet64", 224: "imagenet"}


# Published files


def labeled(images: ImageSet) -> np.ndarray:
    return np.flatnonzero(images.labels >= 0)


def write_arrays(root: Path, labels: np.ndarray) -> Path:
    """As CIFAR-10-C: pixel value = 20 * severity + image."""
    root.mkdir()
    values = np.concatenate([20 * severity + np.arange(len(labels)) for severity in range(1, 6)])
    images = np.broadcast_to(values[:, None, None, None], (len(values), 16, 16, 3))
    np.save(root / "fog.npy", images.astype(np.uint8))
    np.save(root / "labels.npy", np.tile(labels.astype(np.uint8), 5))
    return root


def test_published_arrays_are_read_by_severity(tmp_path: Path) -> None:
    root = write_arrays(tmp_path / "c", LABELS[LABELED])
    for severity in (1, 4, 5):
        read = Published(root, NUMBERED, labeled).read("fog", severity)
        assert read.images[:, 0, 0, 0].tolist() == [20 * severity + number for number in range(11)]
        assert read.labels.tolist() == LABELS[LABELED].tolist()
    bees = Published(root, NUMBERED, lambda whole: np.flatnonzero(whole.labels == 1)).read("fog", 4)
    assert bees.images[:, 0, 0, 0].tolist() == [82, 84, 87]


CIFAR = ("Airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.mark.parametrize(
    "classes", [[str(i) for i in range(12)], [f"{i:02}" for i in range(12)], CIFAR, CIFAR[::-1]]
)
def test_labels_of_arrays_are_matched_to_class_folders(tmp_path: Path, classes) -> None:
    """Arrays have numbers: of a class named `k`, or of CIFAR-10's k-th name."""
    for name in classes:
        (tmp_path / "clean/test" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (16, 16)).save(tmp_path / "clean/test" / name / f"{i}.png")
    test = load(Data("folder", str(tmp_path / "clean")), "test")
    published = np.random.default_rng(0).permutation(np.repeat(np.arange(len(classes)), 2))
    read = Published(write_arrays(tmp_path / "c", published), test, labeled).read("fog", 2)
    named = [test.classes[label] for label in read.labels]
    by_number = sorted(classes, key=str.lower) if "cat" in classes else classes
    assert named == [by_number[number] for number in published]


def write_folders(root: Path, counts: dict[str, int]) -> Path:
    """As ImageNet-C."""
    for name, count in counts.items():
        (root / "fog" / "2" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 20)).save(root / "fog" / "2" / name / f"{i}.JPEG")
    return root


def test_published_folders_are_matched_by_class_name(tmp_path: Path) -> None:
    test = replace(IMAGES, classes=("wasp", "cat", "ant"))  # the order on disk is ant, cat, wasp
    root = write_folders(tmp_path / "c", {"ant": 2, "cat": 3, "wasp": 6})
    read = Published(root, test, lambda whole: np.flatnonzero(whole.labels != 1)).read("fog", 2)
    pairs = read.labels, read.images
    found = sorted((label, path.parent.name) for label, path in zip(*pairs, strict=True))
    assert found == [*[(0, "wasp")] * 6, *[(2, "ant")] * 2]
    assert read.pixels(16).shape == (8, 3, 16, 16)


def published(root: Path, name: str = "fog", test: ImageSet = IMAGES) -> ImageSet:
    test = NUMBERED if test is IMAGES and any(root.glob("*.npy")) else test
    return Published(root, test, labeled).read(name, 2)


def replaced(root: Path, file: str, array: np.ndarray) -> ImageSet:
    write_arrays(root, LABELS[LABELED])
    np.save(root / file, array, allow_pickle=True)
    return published(root)


def damaged(root: Path) -> ImageSet:
    path = write_arrays(root, LABELS[LABELED]) / "fog.npy"
    path.write_bytes(path.read_bytes()[:70])
    return published(root)


INVALID: list[tuple[Callable[[Path], object], type[Exception], str]] = [
    (lambda root: choose(["fog", "smog"]), ValueError, "corruptions"),
    (lambda root: choose([]), ValueError, "corruptions"),
    (published, FileNotFoundError, "root"),
    (lambda root: published(write_arrays(root, LABELS), "snow"), FileNotFoundError, "snow.npy"),
    (lambda root: published(write_arrays(root, LABELS[3:5])), ValueError, "labels"),
    (lambda root: replaced(root, "labels.npy", np.zeros(4, np.uint8)), ValueError, "labels.npy"),
    (lambda root: replaced(root, "fog.npy", np.zeros((55, 3, 8, 8))), ValueError, "fog.npy"),
    (lambda root: replaced(root, "fog.npy", np.array([{}])), ValueError, "fog.npy"),
    (damaged, ValueError, "fog.npy"),
    (
        lambda root: published(write_arrays(root, LABELS[LABELED]), "fog", replace(IMAGES)),
        ValueError,
        "ant, bee, cat",
    ),
    (lambda root: published(root.parent, "fog", GRAY), ValueError, "channels"),
    (lambda root: Generated(GRAY, LABELED, 16), ValueError, "channels"),
    (lambda root: published(write_folders(root, {"ant": 6}), "snow"), FileNotFoundError, "snow"),
    (lambda root: published(write_folders(root, {"ant": 6, "dog": 3})), ValueError, "dog"),
    (lambda root: published(write_folders(root, {"ant": 6, "bee": 3})), ValueError, "labels"),
]


@pytest.mark.parametrize(("use", "error", "name"), INVALID)
def test_invalid_input_raises(tmp_path: Path, use, error, name: str) -> None:
    with pytest.raises(error) as caught:
        use(tmp_path / "root")
    assert name in str(caught.value)
