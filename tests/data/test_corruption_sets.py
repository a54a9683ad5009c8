from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_gradmix.data import corruption_sets
from ssl_gradmix.data.corruption_sets import (
    Generated,
    Published,
    choose,
    make_c,
    read_cifar_c,
    read_imagenet_c,
)
from ssl_gradmix.data.corruptions import COMMON, EXTRA, PARAMETERS, corrupt, frost_source
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.evaluation.encoders import Encoder
from ssl_gradmix.evaluation.features import extract


@pytest.fixture(scope="module")
def images() -> ImageSet:
    """12 images of three classes, one without label."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    labels = np.array([2, 0, 1, 0, 1, 2, -1, 0, 1, 0, 0, 0])
    return ImageSet(pixels, labels, ("ant", "bee", "cat"), "insects/test")


LABELED = np.array([0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11])


def one_by_one(images: ImageSet, numbers, name: str, severity: int, seed: int = 0) -> np.ndarray:
    return np.stack([corrupt(images.images[i], name, severity, seed=seed, index=int(i)) for i in numbers])


def as_arrays(pixels: torch.Tensor) -> np.ndarray:
    return pixels.permute(0, 2, 3, 1).numpy()


# Which


def test_corruptions_come_in_the_benchmarks_order() -> None:
    assert choose() == list(COMMON)
    assert choose(extra=True) == [*COMMON, *EXTRA]
    assert choose(["saturate", "fog", "shot_noise", "fog"]) == ["shot_noise", "fog", "saturate"]
    assert choose(["fog"], extra=True) == ["fog", *EXTRA]
    for names, message in ((["fog", "smog"], "unknown corruption 'smog'"), ([], "corruptions must name at least one")):
        with pytest.raises(ValueError, match=f"{message}; there are gaussian_noise, .*, saturate$"):
            choose(names)


# Made here


def test_images_keep_their_noise_in_any_batch(images: ImageSet) -> None:
    whole = Generated(images, LABELED, size=16, seed=5).read("gaussian_noise", 4)
    expected = one_by_one(images, LABELED, "gaussian_noise", 4, seed=5)
    np.testing.assert_array_equal(as_arrays(whole.pixels(16)), expected)
    np.testing.assert_array_equal(as_arrays(whole.subset(np.array([9, 2])).pixels(16)), expected[[9, 2]])
    np.testing.assert_array_equal(as_arrays(whole.subset([9, 2]).subset([1]).pixels(16)), expected[[2]])
    assert whole.subset([9, 2]).labels.tolist() == [0, 1]
    assert (len(whole), len(whole.subset([9, 2]))) == (11, 2)
    part = Generated(images, LABELED[[2, 4, 7]], size=16, seed=5).read("gaussian_noise", 4)
    np.testing.assert_array_equal(as_arrays(part.pixels(16)), expected[[2, 4, 7]])


@pytest.mark.parametrize("at_most", [0, 2**30], ids=["files decoded each time", "decoded once"])
def test_files_are_corrupted_at_the_encoders_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_most: int
) -> None:
    monkeypatch.setattr(corruption_sets, "_DECODED_AT_MOST", at_most)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 30, 40, 3), dtype=np.uint8)
    for i in range(3):
        Image.fromarray(pixels[i]).save(tmp_path / f"{i}.png")
    files = ImageSet([tmp_path / f"{i}.png" for i in range(3)], np.arange(3), ("a", "b", "c"), "x/test")
    made = Generated(files, np.array([1, 2]), size=12).read("contrast", 2).pixels(12)
    for number, image in zip((1, 2), as_arrays(made), strict=True):
        resized = Image.fromarray(pixels[number]).resize((12, 12), Image.Resampling.BILINEAR, (5, 0, 35, 30))
        np.testing.assert_array_equal(image, corrupt(np.asarray(resized), "contrast", 2, index=number))


def test_the_preset_fits_the_size(images: ImageSet) -> None:
    presets = {size: Generated(images, LABELED, size).origin()["preset"] for size in (16, 64, 224)}
    assert presets == {16: "cifar", 64: "imagenet64", 224: "imagenet"}
    given = Generated(images, LABELED, 16, preset="imagenet", seed=2)
    assert given.origin() == {"source": "generated", "preset": "imagenet", "seed": 2, "frost_source": frost_source()}
    expected = corrupt(images.images[0], "contrast", 1, preset="imagenet")
    np.testing.assert_array_equal(as_arrays(given.read("contrast", 1).pixels(16))[0], expected)


def test_features_are_those_of_corrupted_images_and_never_cached(images: ImageSet, tmp_path: Path) -> None:
    encoder = Encoder(torch.nn.Flatten(), 16, (0.0,) * 3, (1.0,) * 3, "flatten")
    corrupted = Generated(images, LABELED, 16).read("fog", 3)
    features, labels = extract(encoder, corrupted, batch_size=4, progress=False)
    expected = one_by_one(images, LABELED, "fog", 3).transpose(0, 3, 1, 2).reshape(11, -1) / 255
    np.testing.assert_allclose(features, expected, atol=1e-6)
    assert labels.tolist() == images.labels[LABELED].tolist()
    with pytest.raises(AttributeError, match="images"):
        extract(encoder, corrupted, cache=tmp_path)


# Published


def labeled(images: ImageSet) -> np.ndarray:
    return np.flatnonzero(images.labels >= 0)


@pytest.fixture
def arrays(images: ImageSet, tmp_path: Path) -> Path:
    clean = images.subset(LABELED)
    make_c(clean.images, clean.labels, tmp_path / "c", "cifar", seed=7, names=["fog"], progress=False)
    return tmp_path / "c"


def test_published_arrays(images: ImageSet, arrays: Path) -> None:
    clean = images.subset(LABELED)
    published = Published(arrays, clean, lambda whole: np.flatnonzero(whole.labels == 1))
    read = published.read("fog", 4)
    assert read.labels.tolist() == [1, 1, 1]
    np.testing.assert_array_equal(read.images, one_by_one(clean, [2, 4, 7], "fog", 4, seed=7))
    made = {"preset": "cifar", "seed": 7, "frost_source": frost_source()}
    assert published.origin() == {"source": "published", **made}

    before = published.fingerprint()
    assert Published(str(arrays), images, labeled).fingerprint() == before
    np.save(arrays / "fog.npy", np.zeros((55, 16, 16, 3), np.uint8))
    assert published.fingerprint() != before

    (arrays / "meta.json").unlink()
    shuffled = Published(arrays, images.subset(np.random.default_rng(0).permutation(12)), labeled)
    assert shuffled.origin() == {"source": "published"}
    assert shuffled.read("fog", 1).labels.tolist() == images.labels[LABELED].tolist()


def test_published_sets_that_do_not_fit(images: ImageSet, arrays: Path, tmp_path: Path) -> None:
    published = Published(arrays, images, labeled)
    (arrays / "meta.json").write_text('{"seed": 1}')
    with pytest.raises(ValueError, match=r"meta\.json is damaged, or not by make_c: KeyError\('preset'\)"):
        published.origin()
    np.save(arrays / "labels.npy", np.tile([2, 0, 1, 0, 1, 2, 0, 1, 0, 0, 3], 5))
    with pytest.raises(ValueError, match="do not fit insects/test: it has 5 images of class 0, not 6; --data must be"):
        published.read("fog", 1)
    with pytest.raises(FileNotFoundError, match="no folder '.*nowhere' of published corruptions"):
        Published(tmp_path / "nowhere", images, labeled)


def imagenet_c(root: Path, counts: dict[str, int]) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        folder = root / "fog" / "2" / name
        folder.mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 20), (number, i, 0)).save(folder / f"{i}.png")
    return root


def test_published_folders_are_matched_by_class_name(images: ImageSet, tmp_path: Path) -> None:
    test = replace(images, classes=("wasp", "cat", "ant"))  # the order on disk is ant, cat, wasp
    root = imagenet_c(tmp_path / "c", {"ant": 2, "cat": 3, "wasp": 6})
    read = Published(root, test, lambda whole: np.flatnonzero(whole.labels != 1)).read("fog", 2)
    assert sorted(zip(read.labels.tolist(), (path.parent.name for path in read.images), strict=True)) == [
        *[(0, "wasp")] * 6,
        *[(2, "ant")] * 2,
    ]
    assert read.pixels(16).shape == (8, 3, 16, 16)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"ant": 6, "bee": 3, "dog": 2}, "has a class 'dog', which insects/test has not"),
        ({"ant": 6, "bee": 3}, "it has 0 images of class 2, not 2"),
    ],
)
def test_published_folders_of_other_classes(images: ImageSet, tmp_path: Path, counts: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Published(imagenet_c(tmp_path / "c", counts), images, labeled).read("fog", 2)


# Reading CIFAR-10-C


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder as CIFAR-10-C is published: four images, five severities; value = 10 * severity + image."""
    values = np.concatenate([10 * severity + np.arange(4) for severity in range(1, 6)])
    images = np.broadcast_to(values[:, np.newaxis, np.newaxis, np.newaxis], (20, 32, 32, 3)).astype(np.uint8)
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "labels.npy", np.tile(np.array([3, 1, 0, 2], np.uint8), 5))
    return tmp_path


def test_reads_all_severities_or_one(published: Path) -> None:
    images, labels = read_cifar_c(published, "fog")
    assert images.shape == (20, 32, 32, 3)
    assert labels.dtype == np.int64
    assert labels.tolist() == [3, 1, 0, 2] * 5
    for severity in (1, 4, 5):
        images, labels = read_cifar_c(str(published), "fog", severity)
        assert images[:, 0, 0, 0].tolist() == [10 * severity + number for number in range(4)]
        assert labels.tolist() == [3, 1, 0, 2]
    images[:] = 0
    assert read_cifar_c(published, "fog", severity)[0].any(), "changing what was read must not change the file"
    with pytest.raises(ValueError, match="severity must be a whole number from 1 to 5 or None, got 6"):
        read_cifar_c(published, "fog", 6)


def test_missing_file_says_what_is_there(published: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file '.*snow\.npy'; corruptions there: fog$"):
        read_cifar_c(published, "snow")
    (published / "labels.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file '.*labels\.npy'; corruptions there: fog$"):
        read_cifar_c(published, "fog")
    with pytest.raises(FileNotFoundError, match="corruptions there: none"):
        read_cifar_c(published / "nowhere", "fog")


def test_damaged_file_is_refused(published: Path) -> None:
    whole = (published / "fog.npy").read_bytes()
    cut = [whole[:keep] for keep in (0, 5, 70, 500)]
    changed = ((0, b"P"), (20, b"("), (40, b"'"), (60, b"\xff"))
    for damaged in (*cut, *(whole[:place] + byte + whole[place + 1 :] for place, byte in changed)):
        (published / "fog.npy").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"fog\.npy is damaged"):
            read_cifar_c(published, "fog")


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        ("fog", np.zeros((19, 32, 32, 3), np.uint8), r"one for each of the 5 \* N images"),
        ("fog", np.zeros((20, 3, 32, 32), np.uint8), r"fog\.npy must hold uint8 images \(5 \* N, H, W, 3\), got uint8"),
        ("fog", np.zeros((21, 32, 32, 3), np.uint8), r"of fog\.npy \(21, 32, 32, 3\), got uint8 \(20,\)"),
        ("labels", np.zeros(4, np.uint8), r"labels\.npy must hold whole numbers, .* got uint8 \(4,\)"),
    ],
)
def test_arrays_of_another_layout_are_refused(published: Path, file: str, array: np.ndarray, message: str) -> None:
    np.save(published / f"{file}.npy", array)
    with pytest.raises(ValueError, match=message):
        read_cifar_c(published, "fog")


# Reading ImageNet-C


def test_lists_imagenet_c_in_class_order(tmp_path: Path) -> None:
    folder = tmp_path / "gaussian_noise" / "3"
    for name in ("n02/b.JPEG", "n02/a.JPEG", "n01/z.JPEG", "n01/notes.txt", ".hidden/c.JPEG"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name, "JPEG")
    paths, labels, classes = read_imagenet_c(tmp_path, "gaussian_noise", 3)
    assert [path.relative_to(folder).as_posix() for path in paths] == ["n01/z.JPEG", "n02/a.JPEG", "n02/b.JPEG"]
    assert labels.tolist() == [0, 1, 1]
    assert classes == ("n01", "n02")

    with pytest.raises(FileNotFoundError, match=r"no folder '.*fog.2'; ImageNet-C is <root>/<corruption>/<severity>/"):
        read_imagenet_c(tmp_path, "fog", 2)
    (tmp_path / "fog" / "2").mkdir(parents=True)
    with pytest.raises(ValueError, match="must have class folders, got none"):
        read_imagenet_c(tmp_path, "fog", 2)
    (tmp_path / "fog" / "2" / "n03").mkdir()
    with pytest.raises(ValueError, match="must have images in all its class folders, got none in n03"):
        read_imagenet_c(tmp_path, "fog", 2)


# Writing

LABELS = [0, 1, 2, 2, 1, 0]


@pytest.fixture
def six(images: ImageSet) -> np.ndarray:
    return images.images[:6]


def test_writes_the_published_layout(tmp_path: Path, six: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corruption_sets, "_CHUNK", 4)  # so that one chunk is short
    names = ["shot_noise", "contrast"]
    make_c(six, LABELS, tmp_path / "c", "cifar", 3, names, source="digits/test", progress=False)
    files = {path.name for path in (tmp_path / "c").iterdir()}
    assert files == {"contrast.npy", "labels.npy", "meta.json", "shot_noise.npy"}
    for name in names:
        written = np.load(tmp_path / "c" / f"{name}.npy", allow_pickle=False)
        expected = [corrupt(six[i], name, severity, seed=3, index=i) for severity in range(1, 6) for i in range(6)]
        assert written.dtype == np.uint8
        assert np.array_equal(written, expected)
        assert np.array_equal(read_cifar_c(tmp_path / "c", name, 4)[0], expected[18:24])
    assert np.load(tmp_path / "c" / "labels.npy").tolist() == LABELS * 5

    meta = json.loads((tmp_path / "c" / "meta.json").read_text())
    assert (meta["source"], meta["images"]) == ("digits/test", [6, 16, 16, 3])
    assert (meta["preset"], meta["seed"], meta["frost_source"]) == ("cifar", 3, frost_source())
    assert meta["parameters"]["contrast"] == [[0.75], [0.5], [0.4], [0.3], [0.15]]
    assert set(meta["parameters"]) == set(PARAMETERS["cifar"])
    assert meta["versions"]["numpy"] == np.__version__


def test_writes_the_15_common_ones_by_default(tmp_path: Path, six: np.ndarray) -> None:
    (tmp_path / "meta.json.partial").write_text("{")  # left by an interruption: no foreign folder
    make_c(six[:1], [0], tmp_path, "cifar", progress=False)
    assert {path.stem for path in tmp_path.glob("*.npy")} == {*COMMON, "labels"}


def test_goes_on_where_it_was_interrupted(tmp_path: Path, six: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    names = ["shot_noise", "fog", "contrast"]
    make_c(six, LABELS, whole, "cifar", names=names, progress=False)
    real, calls = corruption_sets.corrupt_batch, []

    def failing(chunk: np.ndarray, name: str, severity: int, *rest: object) -> np.ndarray:
        calls.append((name, severity))
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(chunk, name, severity, *rest)

    monkeypatch.setattr(corruption_sets, "corrupt_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        make_c(six, LABELS, interrupted, "cifar", names=names, progress=False)
    assert {path.name for path in interrupted.glob("*.npy")} == {"labels.npy", "shot_noise.npy"}
    with pytest.raises(FileNotFoundError, match=r"corruptions there: shot_noise$"):
        read_cifar_c(interrupted, "fog")

    make_c(six, LABELS, interrupted, "cifar", names=names, progress=False)
    assert ("shot_noise", 1) not in calls[8:], "what was finished is not made again"
    assert {path.name for path in interrupted.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.iterdir():
        assert path.read_bytes() == (interrupted / path.name).read_bytes()


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({"seed": 1}, "seed"),
        ({"preset": "imagenet64"}, "parameters, preset"),
        ({"labels": [*LABELS[:5], 2]}, "labels_sha256"),
        ({"images": np.zeros((6, 16, 16, 3), np.uint8)}, "images_sha256"),
    ],
)
def test_does_not_mix_sets(tmp_path: Path, six: np.ndarray, change: dict, differing: str) -> None:
    same = {"images": six, "labels": LABELS, "out": tmp_path, "preset": "cifar", "names": ["contrast"]}
    make_c(**same, progress=False)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    message = rf"meta\.json is of a set made otherwise, in {differing}: write to another folder"
    with pytest.raises(ValueError, match=message):
        make_c(**{**same, **change, "names": ["contrast", "fog"]}, progress=False)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_leaves_a_foreign_folder_alone(tmp_path: Path, six: np.ndarray) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"out '.*' must be a new or empty folder, or one that make_c wrote"):
        make_c(six, LABELS, tmp_path, "cifar", progress=False)
    with pytest.raises(ValueError, match=r"out '.*thesis\.tex' must be a new or empty folder"):
        make_c(six, LABELS, tmp_path / "thesis.tex", "cifar", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"meta\.json is damaged"):
        make_c(six, LABELS, tmp_path, "cifar", progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["contrast", "rain"]}, "unknown corruption 'rain'"),
        ({"labels": LABELS[1:]}, r"labels must be 6 whole numbers, one an image, got int64 \(5,\)"),
        ({"images": np.zeros((0, 16, 16, 3), np.uint8), "labels": np.zeros(0, int)}, "labels must be 0 whole numbers"),
    ],
)
def test_refuses_before_it_writes(tmp_path: Path, six: np.ndarray, change: dict, message: str) -> None:
    out = tmp_path / "c"
    arguments = {"images": six, "labels": LABELS, "out": out, "preset": "cifar", "names": ["contrast"], **change}
    with pytest.raises(ValueError, match=message):
        make_c(**arguments, progress=False)
    assert not out.exists()
