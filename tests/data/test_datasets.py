"""Named sets and folders: what is loaded, in which layout, and what is said where it cannot be."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import struct
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from ssl_gradmix.data.datasets import ImageSet, load
from ssl_gradmix.settings import Data


def save(path: Path, value: int = 0, size: tuple[int, int] = (4, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def folder_of(root: Path, **counts: int) -> Path:
    """Class folders `root/<name>` of that many images each; `a__b` stands for a/b."""
    for name, count in counts.items():
        for i in range(count):
            save(root / name.replace("__", "/") / f"{i}.png", i)
    return root


def in_folder(root: Path, split: str = "train", **settings: object) -> ImageSet:
    return load(Data(name="folder", root=str(root), **settings), split)


def names(images: ImageSet, root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in images.images]


# ImageSet


@pytest.fixture
def in_memory() -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 42, 30, 3), np.uint8)
    return ImageSet(pixels, np.array([0, 2, 1, 2, 0, -1]), ("a", "b", "c"), "test")


def test_items_are_pil_images_and_labels(in_memory: ImageSet) -> None:
    image, label = in_memory[3]
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), in_memory.images[3])
    assert type(label) is int
    assert label == 2
    assert len(in_memory) == 6


def test_subset_keeps_order_and_class_numbers(in_memory: ImageSet, tmp_path: Path) -> None:
    for indices in ([4, 1], torch.tensor([4, 1])):
        taken = in_memory.subset(indices)
        assert taken.labels.tolist() == [0, 2]
        assert taken.classes == ("a", "b", "c")
        assert np.array_equal(taken.images, in_memory.images[[4, 1]])
    whole = in_folder(folder_of(tmp_path, train__a=2, train__b=2))
    assert names(whole.subset(whole.labels == 1), tmp_path) == ["train/b/0.png", "train/b/1.png"]
    assert len(whole.subset([])) == 0


def test_only_takes_classes_and_refuses_where_nothing_is_left(in_memory: ImageSet) -> None:
    taken = in_memory.only([2, 0])
    assert taken.labels.tolist() == [0, 2, 2, 0]
    with pytest.raises(ValueError, match=r"test has no image of the classes \[7\], only of \[-1, 0, 1, 2\]"):
        in_memory.only([7])


def test_pixels_resize_and_crop_every_image(in_memory: ImageSet) -> None:
    pixels = in_memory.pixels(10)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (6, 3, 10, 10)
    for image, original in zip(pixels, in_memory.images, strict=True):
        resized = Image.fromarray(original).resize((10, 14), Image.Resampling.BILINEAR)
        assert np.abs(image.int().permute(1, 2, 0).numpy() - np.asarray(resized)[2:12]).max() <= 1


def test_pixels_of_that_size_are_the_images_themselves() -> None:
    square = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    pixels = ImageSet(square, np.zeros(3, np.int64), ("a",), "test").pixels(16)
    assert np.array_equal(pixels.permute(0, 2, 3, 1), square)
    pixels.zero_()
    assert square.any()


def test_pixels_that_no_memory_holds_are_refused_with_the_way_out(in_memory: ImageSet) -> None:
    with pytest.raises(ValueError, match=r"1000000x1000000 take 16,764 GiB .* choose a smaller data.size"):
        in_memory.pixels(1_000_000)


# Named sets


def test_digits_are_scikit_learns_split_by_class() -> None:
    train, test = (load(Data(), split) for split in ("train", "test"))
    assert (train.name, test.name) == ("digits/train", "digits/test")
    assert train.classes == tuple("0123456789")
    assert train.images.shape[1:] == (32, 32, 3)
    assert np.array_equal(load(Data(split_seed=5), "test").images, test.images)
    counts = np.bincount(load_digits().target)
    assert np.bincount(train.labels).tolist() == (counts - np.bincount(test.labels)).tolist()
    assert np.abs(np.bincount(test.labels) / counts - 0.2).max() < 0.01

    # Each image of either split is one of scikit-learn's, enlarged by torch, and none is in both.
    original = torch.from_numpy(load_digits().images)[:, None] * (255 / 16)
    enlarged = torch.nn.functional.interpolate(original, 32, mode="bilinear").flatten(1)
    loaded = torch.from_numpy(np.concatenate([train.images, test.images])).double()
    assert (loaded == loaded[..., :1]).all()
    loaded = loaded[..., 0].flatten(1)
    nearest = torch.cdist(loaded, enlarged).argmin(1)
    assert len(nearest.unique()) == len(original)
    assert (loaded - enlarged[nearest]).abs().max() <= 1.5
    assert np.array_equal(load_digits().target[nearest], np.concatenate([train.labels, test.labels]))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "svhn", "stl10"])
def test_missing_named_set_and_failing_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"{name} is not in data\.root 'data'.*--data\.download true"):
        load(Data(name=name), "train")
    assert not list(tmp_path.iterdir())

    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(ConnectionError, match=rf"(?s)cannot download {name}.*no route to host.*another machine"):
        load(Data(name=name, root=str(tmp_path), download=True), "train")


@pytest.fixture
def random_images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)


def checksum(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("name", "key"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_images: np.ndarray, name: str, key: str
) -> None:
    kind = getattr(torchvision.datasets, name.upper())
    folder = tmp_path / kind.base_folder
    folder.mkdir()

    def write(file: str, content: dict) -> tuple[str, str]:
        (folder / file).write_bytes(pickle.dumps(content))
        return file, checksum(folder / file)

    flat = random_images.transpose(0, 3, 1, 2).reshape(6, -1)
    monkeypatch.setattr(kind, "train_list", [write("one", {"data": flat[:4], key: [1, 0, 1, 0]})])
    monkeypatch.setattr(kind, "test_list", [write("two", {"data": flat[4:], key: [0, 1]})])
    meta, md5 = write("meta", {kind.meta["key"]: ["cat", "dog"]})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "filename": meta, "md5": md5})

    train, test = (load(Data(name=name, root=str(tmp_path)), split) for split in ("train", "test"))

    assert np.array_equal(train.images, random_images[:4])
    assert train.labels.tolist() == [1, 0, 1, 0]
    assert train.classes == ("cat", "dog")
    assert np.array_equal(test.images, random_images[4:])
    assert test.labels.dtype == np.int64
    assert test.name == f"{name}/test"


def test_mnist_files_become_rgb(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST/raw"
    folder.mkdir(parents=True)
    digits = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    for split in ("train", "t10k"):
        header = struct.pack(">IIII", 0x803, 3, 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + digits.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 3) + bytes([7, 0, 9]))

    loaded = load(Data(name="mnist", root=str(tmp_path)), "test")

    assert loaded.classes == tuple("0123456789")
    assert loaded.labels.tolist() == [7, 0, 9]
    assert np.array_equal(loaded.images, np.stack([digits] * 3, axis=-1))


def test_svhn_files_have_zero_as_label_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_images: np.ndarray
) -> None:
    file = tmp_path / "train_32x32.mat"
    scipy.io.savemat(file, {"X": random_images.transpose(1, 2, 3, 0), "y": np.array([[1], [10], [9], [2], [3], [4]])})
    monkeypatch.setitem(torchvision.datasets.SVHN.split_list, "train", ["", file.name, checksum(file)])

    loaded = load(Data(name="svhn", root=str(tmp_path)), "train")

    assert loaded.labels.tolist() == [1, 0, 9, 2, 3, 4]
    assert np.array_equal(loaded.images, random_images)


def test_stl10_train_has_the_unlabeled_images_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 96, 96, 3), np.uint8)

    def write(file: str, content: np.ndarray) -> list[str]:
        (folder / file).write_bytes(content.tobytes())
        return [file, checksum(folder / file)]

    stored = pixels.transpose(0, 3, 2, 1)  # column by column
    labels = np.array([10, 1], np.uint8)
    train = [write("train_X.bin", stored[:2]), write("train_y.bin", labels), write("unlabeled_X.bin", stored[2:])]
    monkeypatch.setattr(torchvision.datasets.STL10, "train_list", train)
    test = [write("test_X.bin", stored[:2]), write("test_y.bin", labels)]
    monkeypatch.setattr(torchvision.datasets.STL10, "test_list", test)
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))

    loaded = load(Data(name="stl10", root=str(tmp_path)), "train")

    assert loaded.labels.tolist() == [9, 0, -1, -1, -1]
    assert not loaded.labeled
    assert np.array_equal(loaded.images, pixels)
    assert loaded.classes == tuple("abcdefghij")
    assert load(Data(name="stl10", root=str(tmp_path)), "test").labeled


# Folders


def test_train_and_test_folders(tmp_path: Path) -> None:
    folder_of(tmp_path, train__dog=2, train__cat__deep=3, test__cat=2, test__dog=2)
    (tmp_path / "train/.cache").mkdir()
    save(tmp_path / "train/dog/.hidden.png")
    (tmp_path / "train/dog/notes.txt").write_text("")
    (tmp_path / "annotations").mkdir()

    train, test = in_folder(tmp_path), in_folder(tmp_path, "test")

    assert train.classes == test.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    assert names(train, tmp_path) == [f"train/cat/deep/{i}.png" for i in range(3)] + [
        "train/dog/0.png",
        "train/dog/1.png",
    ]
    assert train.name == f"folder:{tmp_path.name}/train"
    assert len(test) == 4
    reference = torchvision.datasets.ImageFolder(str(tmp_path / "test"))
    assert [(str(path), label) for path, label in zip(test.images, test.labels, strict=True)] == reference.samples


def test_class_folders_are_split_by_class_and_seed(tmp_path: Path) -> None:
    folder_of(tmp_path, many=50, some=10, two=2, one=1)
    train, test = in_folder(tmp_path, test_fraction=0.3), in_folder(tmp_path, "test", test_fraction=0.3)

    assert sorted(names(train, tmp_path) + names(test, tmp_path)) == sorted(
        str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*.png")
    )
    assert np.bincount(train.labels).tolist() == [35, 1, 7, 1]  # many, one, some, two
    assert np.bincount(test.labels).tolist() == [15, 0, 3, 1]
    assert names(test, tmp_path) == names(in_folder(tmp_path, "test", test_fraction=0.3), tmp_path)
    assert names(test, tmp_path) != names(in_folder(tmp_path, "test", test_fraction=0.3, split_seed=1), tmp_path)


def test_images_without_class_folders_are_unlabeled(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png")
    train = in_folder(tmp_path)
    assert train.labels.tolist() == [-1] * 3
    assert train.classes == ()
    assert not train.labeled
    with pytest.raises(
        FileNotFoundError, match=r"no test images: it has neither class folders to split nor a folder test/"
    ):
        in_folder(tmp_path, "test")


def test_split_folder_that_is_missing(tmp_path: Path) -> None:
    folder_of(tmp_path, train__a=2)
    assert len(in_folder(tmp_path)) == 2
    with pytest.raises(FileNotFoundError, match=r"has a folder train/ but no test/.*data\.test_fraction"):
        in_folder(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match=r"nowhere' is not a folder"):
        in_folder(tmp_path / "nowhere")


def test_different_classes_in_train_and_test(tmp_path: Path) -> None:
    folder_of(tmp_path, train__cat=2, train__dog=2, test__cat=2, test__fox=2)
    with pytest.raises(ValueError, match=r"differ: only in train/ are \['dog'\], only in test/ are \['fox'\]"):
        in_folder(tmp_path)


def test_a_class_called_train_is_not_taken_for_the_split(tmp_path: Path) -> None:
    folder_of(tmp_path, bus=3, train=3)
    with pytest.raises(ValueError, match=r"beside \['bus'\]: if 'train' is a class, move all class folders into"):
        in_folder(tmp_path)


@pytest.mark.parametrize("names", [("Cat", "cat"), ("cat", "cat "), ("cafe\u0301", "caf\xe9")])
def test_class_names_that_look_alike(names: tuple[str, str], tmp_path: Path) -> None:
    folder_of(tmp_path, **dict.fromkeys(names, 2))
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("this file system does not tell them apart")
    with pytest.raises(ValueError, match=rf"'{names[0]}' and '{names[1]}' in .* differ in case alone, in spaces"):
        in_folder(tmp_path)


@pytest.mark.parametrize(
    ("train", "test"),
    [("Train", "Test"), ("training", "testing"), ("train", "val"), ("TRAIN", "Validation"), ("train", "valid")],
)
def test_splits_by_their_other_names(train: str, test: str, tmp_path: Path) -> None:
    folder_of(tmp_path, **{f"{train}__a": 2, f"{train}__b": 2, f"{test}__a": 3, f"{test}__b": 1})
    images = [in_folder(tmp_path, split) for split in ("train", "test")]
    assert [each.name for each in images] == [f"folder:{tmp_path.name}/train", f"folder:{tmp_path.name}/test"]
    assert [each.classes for each in images] == [("a", "b")] * 2
    assert [np.bincount(each.labels).tolist() for each in images] == [[2, 2], [3, 1]]


def test_of_val_and_test_the_latter_is_read_and_of_two_names_of_one_split_none(tmp_path: Path) -> None:
    folder_of(tmp_path, train__a=2, val__a=3, test__a=4)
    assert len(in_folder(tmp_path, "test")) == 4
    folder_of(tmp_path, testing__a=4)
    with pytest.raises(ValueError, match=r"has \['test', 'testing'\], any of which may hold the test images"):
        in_folder(tmp_path)


@pytest.mark.parametrize(
    ("folders", "right"),
    [
        (["x/a", "x/b"], "x"),
        (["x/y/a", "x/y/b"], "x/y"),
        (["x/y/a"], "x/y"),
        (["x/train/a", "x/test/a"], "x"),
        (["train/x/a", "train/x/b", "test/x/a"], "train/x"),
    ],
)
def test_a_folder_around_the_classes_is_not_taken_for_one(folders: list[str], right: str, tmp_path: Path) -> None:
    for name in folders:
        folder_of(tmp_path / name, inside=0)
        save(tmp_path / name / "0.png")
        save(tmp_path / name / "1.png", 1)
        save(tmp_path / name / "2.png", 2)
    with pytest.raises(ValueError, match=rf"one folder around all others: set data.root to '{tmp_path / right}', or"):
        in_folder(tmp_path)
    if right != "train/x":
        assert in_folder(tmp_path / right).classes == tuple(sorted({Path(name).name for name in folders}))


@pytest.mark.parametrize("linked", ["test/a", "test/a/0.png", "train/b", "train/b/0.png"])
@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_a_file_in_two_classes_or_splits(linked: str, make: Callable[[Path, Path], None], tmp_path: Path) -> None:
    folder_of(tmp_path, train__a=2, train__b=2, test__a=2, test__b=2)
    made, split = tmp_path / linked, linked.partition("/")[0]
    whole = tmp_path / linked.replace("test", "train").replace("/b", "/a")
    if made.is_dir():
        shutil.rmtree(made)
        made.symlink_to(whole)
    else:
        made.unlink()
        make(whole, made)
    with pytest.raises(ValueError, match=r"train/a/0\.png' (and .*)?are the same file, by a link"):
        in_folder(tmp_path, split)


def test_a_file_on_both_sides_of_a_drawn_split(tmp_path: Path) -> None:
    folder_of(tmp_path, a=10)
    assert len(in_folder(tmp_path)) == 8
    for i in range(10):
        os.link(tmp_path / f"a/{i}.png", tmp_path / f"a/again-{i}.png")
    with pytest.raises(ValueError, match="are the same file, by a link"):
        in_folder(tmp_path)


def test_files_that_are_passed_over_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder_of(tmp_path, train__a=2, train__b=2)
    for name in ("a/1.tga", "a/2.TGA", "b/3.tga", "b/deep/notes.txt", "b/README", "a/.hidden.xyz"):
        (tmp_path / "train" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"")
    caplog.set_level("INFO", logger="ssl_gradmix")
    in_folder(tmp_path)
    assert caplog.messages == [
        f"folder:{tmp_path.name}/train: passed over are files by their endings: 3 in .tga, 1 without any, 1 in .txt"
    ]


def test_folder_without_images_names_itself_and_the_endings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"no image in the folder '{tmp_path}'; looked for \.apng .*\.jpg"):
        in_folder(tmp_path)


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder_of(tmp_path / "pictures", train__cat=2)
    assert len(load(Data(name="folder", root="~/pictures"), "train")) == 2


# Broken files


def test_broken_images_stop_or_are_skipped_and_counted_once(tmp_path: Path) -> None:
    folder_of(tmp_path, train__cat=70, train__dog=80)
    for name in ("cat/7.png", "cat/69.png", "dog/1.png", "dog/50.png"):
        (tmp_path / "train" / name).write_bytes(b"broken")
    whole = in_folder(tmp_path)
    assert len(whole) == 150
    with pytest.raises(ValueError, match=r"cannot read the image '.*cat/69\.png'"):
        whole.pixels(4)
    with pytest.raises(ValueError, match=r"dog/50\.png"):
        whole[[path.name for path in whole.images].index("50.png", 70)]
    message = (
        r"/train: 4 of 150 images cannot be read, left out: \['.*cat/69\.png', '.*cat/7\.png', '.*dog/1\.png'\] \.\.\."
    )
    with pytest.warns(UserWarning, match=message) as caught:
        kept = in_folder(tmp_path, broken="skip")
    assert len(caught) == 1
    assert kept.pixels(4)[:, 1, 0, 1].tolist() == [int(path.stem) for path in kept.images]


def test_skipping_leaves_the_same_split_without_the_broken_ones(tmp_path: Path) -> None:
    folder_of(tmp_path, cat=20, dog=20)
    whole = [set(names(in_folder(tmp_path, split), tmp_path)) for split in ("train", "test")]
    (tmp_path / "cat/3.png").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = [set(names(in_folder(tmp_path, split, broken="skip"), tmp_path)) for split in ("train", "test")]
    assert [before - after for before, after in zip(whole, kept, strict=True)] in (
        [{"cat/3.png"}, set()],
        [set(), {"cat/3.png"}],
    )


def test_all_broken(tmp_path: Path) -> None:
    folder_of(tmp_path, train__cat=3)
    for path in tmp_path.glob("train/cat/*"):
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="3 of 3 images cannot be read"),
        pytest.raises(ValueError, match="has 0 images, at least 2 are needed"),
    ):
        in_folder(tmp_path, broken="skip")


# What was asked for, and what it is


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"root": "images"},
            "data.root must be left out where data.name is digits.* add --data.name folder .*'images'",
        ),
        ({"root": ""}, "data.root must be a folder .*, got ''"),
        ({"name": "folder", "root": ""}, "data.root must be a folder .*, got ''"),
        ({"name": "folder"}, "data.root must be given where data.name is folder, got None"),
        ({"download": True}, "data.download must be left out where data.name is digits"),
        ({"name": "folder", "root": "x", "download": True}, "data.download must be left out where data.name is folder"),
        ({"size": 10**10}, "data.size must be at least 8 and at most 4096, got 10000000000"),
    ],
)
def test_settings_that_would_be_ignored_or_read_the_wrong_images(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        Data(**settings)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_line_that_describes_the_images(tmp_path: Path, in_memory: ImageSet) -> None:
    folder_of(tmp_path, train__cat=2, train__dog=1, flat=2)
    assert in_folder(tmp_path).describe() == f"folder:{tmp_path.name}/train: 3 images of 2 classes (cat, dog)"
    assert in_folder(tmp_path).only([0]).describe().endswith("/train: 2 images of 1 class (cat)")
    assert in_folder(tmp_path / "flat").describe() == "folder:flat/train: 2 images without labels"
    assert in_memory.describe() == "test: 6 images of 3 classes (a, b, c), 1 of them without labels"
    assert load(Data(), "train").describe() == "digits/train: 1,438 images of 10 classes (0, 1, 2, ...)"


def test_a_fingerprint_tells_other_images_and_knows_a_copy(
    tmp_path: Path, in_memory: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path / "one", train__a=3, train__b=3)
    before = in_folder(tmp_path / "one").fingerprint()
    assert re.fullmatch("[0-9a-f]{16}", before)
    shutil.copytree(tmp_path / "one", tmp_path / "elsewhere/two")
    assert in_folder(tmp_path / "elsewhere/two").fingerprint() == before
    monkeypatch.chdir(tmp_path / "one")
    assert load(Data("folder", "."), "train").fingerprint() == before

    seen = {before, in_folder(tmp_path / "one").only([0]).fingerprint()}
    save(tmp_path / "one/train/a/more.png")
    seen.add(in_folder(tmp_path / "one").fingerprint())
    (tmp_path / "one/train/a/more.png").rename(tmp_path / "one/train/b/more.png")
    seen.add(in_folder(tmp_path / "one").fingerprint())
    save(tmp_path / "one/train/b/more.png", size=(40, 40))
    seen.add(in_folder(tmp_path / "one").fingerprint())
    assert len(seen) == 5

    changed = replace(in_memory, images=in_memory.images.copy())
    assert changed.fingerprint() == in_memory.fingerprint()
    changed.images[3, 2, 1, 0] ^= 1
    other_labels = replace(in_memory, labels=in_memory.labels[::-1])
    assert len({images.fingerprint() for images in (in_memory, changed, other_labels)}) == 3


def test_originals_keep_their_sizes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (*size, 3), np.uint8) for size in [(4, 6), (6, 4), (4, 6)]]
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: upright it has the sides of the others exchanged
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path, image, options in zip(paths, [*pixels, pixels[0]], [{}] * 3 + [{"exif": exif}], strict=True):
        Image.fromarray(image).save(path, **options)
    images = ImageSet(paths, np.full(4, -1), (), "test")

    originals = images.originals(4 * 4 * 6 * 3)
    expected = [*pixels, np.rot90(pixels[0], -1)]
    assert all(np.array_equal(image.permute(1, 2, 0), want) for image, want in zip(originals, expected, strict=True))
    assert images.originals(4 * 4 * 6 * 3 - 1) is None
    alike = images.subset([0, 2]).originals(1000)
    assert alike.shape == (2, 3, 4, 6)
    assert np.array_equal(alike[1].permute(1, 2, 0), pixels[2])
    in_memory = ImageSet(np.stack(pixels[::2]), np.zeros(2, np.int64), ("a",), "test")
    assert torch.equal(in_memory.originals(1000), alike)
    assert in_memory.originals(100) is None
