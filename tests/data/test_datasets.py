"""Named data sets and image folders: what is loaded, and what is rejected."""

from __future__ import annotations

import hashlib
import pickle
import struct
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from ssl_gradmix.data.datasets import Data, ImageSet, load


def save(path: Path, value: int = 0, size: tuple[int, int] = (4, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def folder_of(root: Path, counts: dict[str, int]) -> Path:
    """Folders below `root` with that many images each."""
    for name, count in counts.items():
        for i in range(count):
            save(root / name / f"{i}.png", i)
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


def test_decoded_image_is_channels_first(in_memory: ImageSet) -> None:
    assert np.array_equal(in_memory.decoded(3).permute(1, 2, 0), in_memory.images[3])
    assert len(in_memory) == 6
    assert not in_memory.labeled
    assert in_memory.only([0, 1]).labeled


def test_subset_keeps_order_and_labels(in_memory: ImageSet, tmp_path: Path) -> None:
    for indices in ([4, 1], torch.tensor([4, 1])):
        taken = in_memory.subset(indices)
        assert taken.labels.tolist() == [0, 2]
        assert taken.classes == ("a", "b", "c")
        assert np.array_equal(taken.images, in_memory.images[[4, 1]])
    whole = in_folder(folder_of(tmp_path, {"train/a": 2, "train/b": 2}))
    assert names(whole.subset(whole.labels == 1), tmp_path) == ["train/b/0.png", "train/b/1.png"]
    assert len(whole.subset([])) == 0


def test_only_takes_classes(in_memory: ImageSet) -> None:
    assert in_memory.only([2, 0]).labels.tolist() == [0, 2, 2, 0]
    with pytest.raises(ValueError, match="7"):
        in_memory.only([7])


def test_few_labels_are_a_fraction_of_each_class() -> None:
    labels = np.repeat([0, 1, 2], [50, 20, 1])
    images = ImageSet(np.zeros((71, 1, 1, 3), np.uint8), labels, ("a", "b", "c"), "test")
    kept = images.with_few_labels(0.1, seed=3).labels
    assert np.bincount(kept + 1, minlength=4).tolist() == [64, 5, 2, 0]
    assert np.array_equal(kept[kept >= 0], labels[kept >= 0])
    assert not np.array_equal(kept, images.with_few_labels(0.1, seed=4).labels)


def test_pixels_are_resized_and_cropped(in_memory: ImageSet) -> None:
    pixels = in_memory.pixels(10)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (6, 3, 10, 10)
    for image, original in zip(pixels, in_memory.images, strict=True):
        resized = Image.fromarray(original).resize((10, 14), Image.Resampling.BILINEAR)
        difference = image.int().permute(1, 2, 0).numpy() - np.asarray(resized)[2:12]
        assert np.abs(difference).max() <= 1
    with pytest.raises(ValueError, match="size"):  # more than the memory of the machine
        in_memory.pixels(1_000_000)


def test_pixels_of_the_stored_size_are_copies() -> None:
    square = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    pixels = ImageSet(square, np.zeros(3, np.int64), ("a",), "test").pixels(16)
    assert np.array_equal(pixels.permute(0, 2, 3, 1), square)
    pixels.zero_()
    assert square.any()


def test_originals_keep_their_sizes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (*size, 3), np.uint8) for size in [(4, 6), (6, 4), (4, 6)]]
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    images = ImageSet(paths, np.full(3, -1), (), "test")

    originals = images.originals(3 * 4 * 6 * 3)
    for image, expected in zip(originals, pixels, strict=True):
        assert np.array_equal(image.permute(1, 2, 0), expected)
    assert images.originals(3 * 4 * 6 * 3 - 1) is None
    of_one_size = images.subset([0, 2]).originals(1000)
    assert of_one_size.shape == (2, 3, 4, 6)
    in_memory = ImageSet(np.stack(pixels[::2]), np.zeros(2, np.int64), ("a",), "test")
    assert torch.equal(in_memory.originals(1000), of_one_size)
    assert in_memory.originals(100) is None


def test_fingerprint_is_that_of_a_copy_and_of_no_other_images(
    tmp_path: Path, in_memory: ImageSet
) -> None:
    def fingerprint(folder: str, *files: str, size: tuple[int, int] = (4, 4)) -> str:
        for file in files:
            save(tmp_path / folder / file, size=size)
        return in_folder(tmp_path / folder).fingerprint()

    first = fingerprint("1", "a/0.png", "a/1.png", "b/0.png")
    assert fingerprint("2", "a/0.png", "a/1.png", "b/0.png") == first
    others = [
        fingerprint("3", "a/0.png", "b/1.png", "b/0.png"),
        fingerprint("4", "a/0.png", "a/1.png", "b/0.png", "b/1.png"),
        fingerprint("5", "a/0.png", "a/1.png", "b/0.png", size=(40, 40)),
    ]
    assert len({first, *others}) == 4

    changed = replace(in_memory, images=in_memory.images.copy())
    assert changed.fingerprint() == in_memory.fingerprint()
    changed.images[3, 2, 1, 0] ^= 1
    relabeled = replace(in_memory, labels=in_memory.labels[::-1])
    assert len({images.fingerprint() for images in (in_memory, changed, relabeled)}) == 3


# Named data sets


def test_digits_are_scikit_learns_split_by_class() -> None:
    train, test = (load(Data(), split) for split in ("train", "test"))
    assert train.classes == tuple("0123456789")
    digits = load_digits()
    counts, held_out = np.bincount(digits.target), np.bincount(test.labels)
    assert np.abs(held_out / counts - 0.2).max() < 0.01
    assert np.array_equal(np.bincount(train.labels), counts - held_out)
    gray = np.round(digits.images * (255 / 16)).astype(np.uint8)
    enlarged = [Image.fromarray(each).resize((32, 32), Image.Resampling.BILINEAR) for each in gray]
    pairs = zip(enlarged, digits.target, strict=True)
    expected = {np.stack([each] * 3, -1).tobytes(): label for each, label in pairs}
    for images in (train, test):
        labels = [expected.pop(image.tobytes()) for image in images.images]  # in one split alone
        assert labels == images.labels.tolist()


RANDOM = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)


def write(folder: Path, file: str, content: bytes) -> list[str]:
    """Writes a file; returns its name and checksum, as torchvision lists them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(content)
    return [file, hashlib.md5(content).hexdigest()]


@pytest.mark.parametrize(("name", "key"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, key: str) -> None:
    kind = getattr(torchvision.datasets, name.upper())
    folder = tmp_path / kind.base_folder
    flat = RANDOM.transpose(0, 3, 1, 2).reshape(6, -1)
    train = pickle.dumps({"data": flat[:4], key: [1, 0, 1, 0]})
    test = pickle.dumps({"data": flat[4:], key: [0, 1]})
    monkeypatch.setattr(kind, "train_list", [write(folder, "one", train)])
    monkeypatch.setattr(kind, "test_list", [write(folder, "two", test)])
    meta, md5 = write(folder, "meta", pickle.dumps({kind.meta["key"]: ["cat", "dog"]}))
    monkeypatch.setattr(kind, "meta", {**kind.meta, "filename": meta, "md5": md5})

    loaded = load(Data(name=name, root=str(tmp_path)), "train")
    assert np.array_equal(loaded.images, RANDOM[:4])
    assert loaded.labels.tolist() == [1, 0, 1, 0]
    assert loaded.classes == ("cat", "dog")
    assert np.array_equal(load(Data(name=name, root=str(tmp_path)), "test").images, RANDOM[4:])


def test_mnist_files_become_rgb(tmp_path: Path) -> None:
    digits = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    for split in ("train", "t10k"):
        images = struct.pack(">IIII", 0x803, 3, 28, 28) + digits.tobytes()
        write(tmp_path / "MNIST/raw", f"{split}-images-idx3-ubyte", images)
        labels = struct.pack(">II", 0x801, 3) + bytes([7, 0, 9])
        write(tmp_path / "MNIST/raw", f"{split}-labels-idx1-ubyte", labels)
    loaded = load(Data(name="mnist", root=str(tmp_path)), "test")
    assert loaded.classes == tuple("0123456789")
    assert loaded.labels.tolist() == [7, 0, 9]
    assert np.array_equal(loaded.images, np.stack([digits] * 3, axis=-1))


def test_svhn_files_label_zeros_as_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "train_32x32.mat"
    labels = np.array([[1], [10], [9], [2], [3], [4]])
    scipy.io.savemat(file, {"X": RANDOM.transpose(1, 2, 3, 0), "y": labels})
    listed = ["", *write(tmp_path, file.name, file.read_bytes())]
    monkeypatch.setitem(torchvision.datasets.SVHN.split_list, "train", listed)
    loaded = load(Data(name="svhn", root=str(tmp_path)), "train")
    assert loaded.labels.tolist() == [1, 0, 9, 2, 3, 4]
    assert np.array_equal(loaded.images, RANDOM)


def test_stl10_train_includes_unlabeled_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stl10_binary"
    pixels = np.random.default_rng(0).integers(0, 256, (5, 96, 96, 3), np.uint8)
    stored = pixels.transpose(0, 3, 2, 1)  # column by column
    train = [
        write(folder, "train_X.bin", stored[:2].tobytes()),
        write(folder, "train_y.bin", bytes([10, 1])),
        write(folder, "unlabeled_X.bin", stored[2:].tobytes()),
    ]
    monkeypatch.setattr(torchvision.datasets.STL10, "train_list", train)
    monkeypatch.setattr(torchvision.datasets.STL10, "test_list", [])
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    loaded = load(Data(name="stl10", root=str(tmp_path)), "train")
    assert loaded.labels.tolist() == [9, 0, -1, -1, -1]
    assert np.array_equal(loaded.images, pixels)
    assert loaded.classes == tuple("abcdefghij")


# Folders


def test_split_folders_are_read_as_torchvision_reads_them(tmp_path: Path) -> None:
    folder_of(tmp_path, {"train/dog": 2, "train/cat": 3, "test/cat": 2, "test/dog": 2})
    (tmp_path / "annotations").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "train/dog/notes.txt").write_text("")
    for split in ("train", "test"):
        images = in_folder(tmp_path, split)
        reference = torchvision.datasets.ImageFolder(str(tmp_path / split))
        expected = [(path, int(label)) for path, label in reference.samples]
        assert list(zip(map(str, images.images), images.labels, strict=True)) == expected
        assert images.classes == ("cat", "dog")
        assert images.name == f"folder:{tmp_path.name}/{split}"


@pytest.mark.parametrize(
    ("train", "test"),
    [("Train", "Test"), ("training", "testing"), ("train", "val"), ("TRAIN", "Validation")],
)
def test_split_folders_have_other_names(train: str, test: str, tmp_path: Path) -> None:
    folder_of(tmp_path, {f"{train}/a": 2, f"{train}/b": 2, f"{test}/a": 3, f"{test}/b": 1})
    counts = [np.bincount(in_folder(tmp_path, split).labels) for split in ("train", "test", "all")]
    assert [each.tolist() for each in counts] == [[2, 2], [3, 1], [3, 1]]


def test_class_folders_are_split_by_class_and_seed(tmp_path: Path) -> None:
    folder_of(tmp_path, {"many": 50, "some": 10, "two": 2, "one": 1})
    train, test = (in_folder(tmp_path, split, test_fraction=0.3) for split in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [35, 1, 7, 1]  # many, one, some, two
    assert np.bincount(test.labels).tolist() == [15, 0, 3, 1]
    everything = sorted(names(in_folder(tmp_path, "all"), tmp_path))
    assert sorted(names(train, tmp_path) + names(test, tmp_path)) == everything
    again, other = (
        in_folder(tmp_path, "test", test_fraction=0.3, split_seed=seed) for seed in (0, 1)
    )
    assert names(again, tmp_path) == names(test, tmp_path) != names(other, tmp_path)


def test_name_is_that_of_the_folder_that_is_read(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "pets", {"Training/a": 5, "Training/b": 5, "val/a": 2, "val/b": 2})
    flat = folder_of(tmp_path / "flat", {"train": 3})
    plain = folder_of(tmp_path / "plain", {"a": 3, "b": 3})
    found = [
        *(in_folder(root, split).name for split in ("train", "test", "all")),
        *(in_folder(root / "val", split).name for split in ("train", "test", "all")),
        *(in_folder(flat / "train", split).name for split in ("train", "all")),
        *(in_folder(plain, split).name for split in ("train", "test", "all")),
    ]
    assert found == [
        *("folder:pets/Training", "folder:pets/val", "folder:pets/val"),
        *("folder:pets/val-train", "folder:pets/val-test", "folder:pets/val"),
        *("folder:flat/train", "folder:flat/train"),
        *("folder:plain/train", "folder:plain/test", "folder:plain/all"),
    ]


@pytest.mark.parametrize(
    ("folders", "read"),
    [
        ({"test": 3, "val/a": 1, "val/b": 1}, ["val/a", "val/b"]),
        ({"test/images": 3, "val/a": 1, "val/b": 1}, ["val/a", "val/b"]),
        ({"test/a": 1, "test/b": 1, "val/a": 1, "val/b": 1}, ["test/a", "test/b"]),
        ({"test": 1, "val": 1, "validation/a": 2, "validation/b": 2}, ["validation/a"]),
    ],
)
def test_labeled_images_stand_in_for_an_unlabeled_test_split(
    tmp_path: Path, folders: dict[str, int], read: list[str]
) -> None:
    folder_of(tmp_path, {"train/a": 2, "train/b": 2, **folders})
    images = in_folder(tmp_path, "test")
    assert images.labeled
    found = {str(path.parent.relative_to(tmp_path)) for path in images.images}
    assert found >= set(read)
    assert len({name.partition("/")[0] for name in found}) == 1


def test_numbered_folders_are_their_own_labels(tmp_path: Path) -> None:
    folder_of(tmp_path, {str(number): 2 for number in range(11)})
    images = in_folder(tmp_path, "all")
    assert images.classes == tuple(str(number) for number in range(11))
    assert [int(path.parent.name) for path in images.images] == images.labels.tolist()


def test_litter_of_other_programs_is_ignored(tmp_path: Path) -> None:
    wanted = {"train/a": 2, "train/b": 2, "test/a": 2, "test/b": 2}
    litter = ("@eaDir", "__MACOSX", "train/@eaDir", "train/a/@eaDir/0.png", "test/.thumbnails")
    folder_of(tmp_path, {**wanted, **dict.fromkeys(litter, 1)})
    for split in ("train", "test"):
        images = in_folder(tmp_path, split)
        assert images.classes == ("a", "b")
        assert images.labels.tolist() == [0, 0, 1, 1]


def test_images_inside_every_class_are_tinyimagenets_layout(tmp_path: Path) -> None:
    images = in_folder(folder_of(tmp_path, {"n01/images": 2, "n02/images": 3}), "all")
    assert (images.classes, images.labels.tolist()) == (("n01", "n02"), [0, 0, 1, 1, 1])


def test_gray_images_have_one_channel(tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (2, 8, 8), np.uint16)
    for i, image in enumerate(deep):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    images = in_folder(tmp_path, channels=1)
    assert np.array_equal(images.decoded(1), deep[1:])
    for tensor in (images.pixels(8), images.originals(1000)):
        assert (tensor.dtype, tensor.shape) == (torch.int32, (2, 1, 8, 8))
        assert np.array_equal(tensor[:, 0], deep)
    assert images.originals(4 * 2 * 8 * 8 - 1) is None
    in_memory = replace(images, images=deep[..., None])
    for size in (8, 5):
        assert torch.equal(in_memory.pixels(size), images.pixels(size))
    save(tmp_path / "2.png", 100)  # 8 bits
    assert in_folder(tmp_path, channels=1).decoded(2).unique().tolist() == [25700]


@pytest.mark.parametrize("size", [32, 20])
def test_gray_digits_are_a_channel_of_the_rgb_ones(size: int) -> None:
    rgb, gray = (load(Data(channels=channels), "test") for channels in (3, 1))
    assert gray.images.shape == (len(rgb), 32, 32, 1)
    assert torch.equal(gray.pixels(size), rgb.pixels(size)[:, :1])
    assert torch.equal(gray.decoded(3), rgb.decoded(3)[:1])


def test_images_without_class_folders_are_unlabeled(tmp_path: Path) -> None:
    train = in_folder(folder_of(tmp_path, {"": 3}))
    assert train.labels.tolist() == [-1] * 3
    assert train.classes == ()
    assert in_folder(tmp_path, "all").fingerprint() == train.fingerprint()


def test_single_class_warns(tmp_path: Path) -> None:
    folder_of(tmp_path, {"images": 4})
    with pytest.warns(UserWarning, match=r"data\.root"):
        in_folder(tmp_path)


def test_broken_images_raise_or_are_skipped(tmp_path: Path) -> None:
    folder_of(tmp_path, {"cat": 20, "dog": 20})
    before = [names(in_folder(tmp_path, split), tmp_path) for split in ("train", "test")]
    broken = ["cat/3.png", "dog/11.png"]
    for name in broken:
        (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"(cat/3|dog/11)\.png"):
        in_folder(tmp_path, "all").pixels(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = [in_folder(tmp_path, split, broken="skip") for split in ("train", "test")]
    for images, all_names in zip(kept, before, strict=True):
        assert names(images, tmp_path) == [name for name in all_names if name not in broken]
    with pytest.warns(UserWarning, match="2 of 40"):
        whole = in_folder(tmp_path, "all", broken="skip")
    assert whole.pixels(4)[:, 1, 0, 1].tolist() == [int(path.stem) for path in whole.images]


@pytest.mark.parametrize(
    ("folders", "split", "error", "name"),
    [
        (None, "train", FileNotFoundError, "data.root"),
        ({"train/a": 2, "train/b": 2}, "test", FileNotFoundError, "test/"),
        ({"": 3}, "test", FileNotFoundError, "test/"),
        ({"train/a": 2, "train/b": 2, "test/a": 2, "test/c": 2}, "train", ValueError, "['b', 'c']"),
        ({"bus": 3, "train": 3}, "train", ValueError, "train/"),
        ({"cat": 2, "dog": 2, "empty": 0}, "train", ValueError, "empty"),
        ({"": 0}, "train", ValueError, "data.root"),
        ({"": 1}, "train", ValueError, "fewer than 2"),
        ({"images/a": 2, "images/b": 2}, "train", ValueError, "a, b"),
        ({"a/airfield": 2, "a/alley": 2, "b/bar": 2}, "all", ValueError, "airfield, alley"),
        ({"train/a": 2, "train/b/x": 2, "test/a": 2, "test/b": 2}, "train", ValueError, "x"),
        ({"cat": 2, "dog": 2, "dog/old": 2}, "train", ValueError, "old"),
        ({"cat": 2, "dog": 2, "": 2}, "train", ValueError, "0.png"),
    ],
)
def test_invalid_folder_raises(
    folders: dict | None, split: str, error: type[Exception], name: str, tmp_path: Path
) -> None:
    for folder in folders or ():
        (tmp_path / "root" / folder).mkdir(parents=True, exist_ok=True)
    folder_of(tmp_path / "root", folders or {})
    with pytest.raises(error) as caught:
        in_folder(tmp_path / "root", split)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "error", "name"),
    [
        ({"name": "cifar10", "root": "missing"}, FileNotFoundError, "data.download"),
        ({"name": "mnist", "root": "missing"}, FileNotFoundError, "data.download"),
        ({"root": "images"}, ValueError, "data.root"),
        ({"name": "folder"}, ValueError, "data.root"),
        ({"name": "folder", "root": ""}, ValueError, "data.root"),
        ({"classes": ["1"], "open_set": "random:6:0"}, ValueError, "data.open_set"),
    ],
)
def test_invalid_settings_raise(settings: dict, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        load(Data(**settings), "train")
