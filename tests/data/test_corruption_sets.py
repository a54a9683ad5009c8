from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_gradmix.data import corruption_sets
from ssl_gradmix.data.corruption_sets import make_c, read_cifar_c, read_imagenet_c
from ssl_gradmix.data.corruptions import COMMON, PARAMETERS, corrupt, frost_source


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder as CIFAR-10-C is published: four images, five severities; value = 10 * severity + image."""
    values = np.concatenate([10 * severity + np.arange(4) for severity in range(1, 6)])
    images = np.broadcast_to(values[:, np.newaxis, np.newaxis, np.newaxis], (20, 32, 32, 3)).astype(np.uint8)
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "labels.npy", np.tile(np.array([3, 1, 0, 2], np.uint8), 5))
    return tmp_path


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(6, 16, 16, 3), dtype=np.uint8)


LABELS = [0, 1, 2, 2, 1, 0]


# Reading CIFAR-10-C


def test_reads_all_severities(published: Path) -> None:
    images, labels = read_cifar_c(published, "fog")
    assert images.shape == (20, 32, 32, 3)
    assert labels.dtype == np.int64
    assert labels.tolist() == [3, 1, 0, 2] * 5


@pytest.mark.parametrize("severity", [1, 4, 5])
def test_reads_one_severity(published: Path, severity: int) -> None:
    images, labels = read_cifar_c(str(published), "fog", severity)
    assert images[:, 0, 0, 0].tolist() == [10 * severity + number for number in range(4)]
    assert labels.tolist() == [3, 1, 0, 2]
    images[:] = 0
    assert read_cifar_c(published, "fog", severity)[0].any(), "changing what was read must not change the file"


def test_missing_file_says_what_is_there(published: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file '.*snow\.npy'; corruptions there: fog$"):
        read_cifar_c(published, "snow")
    (published / "labels.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file '.*labels\.npy'; corruptions there: fog$"):
        read_cifar_c(published, "fog")
    with pytest.raises(FileNotFoundError, match="corruptions there: none"):
        read_cifar_c(published / "nowhere", "fog")


@pytest.mark.parametrize("severity", [0, 6])
def test_severity_out_of_range(published: Path, severity: int) -> None:
    with pytest.raises(ValueError, match=f"severity must be a whole number from 1 to 5 or None, got {severity}"):
        read_cifar_c(published, "fog", severity)


class Trap:
    """Unpickling it would create a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("pickled_as", ["object array", "plain pickle"])
def test_pickles_are_refused_and_not_run(published: Path, tmp_path: Path, pickled_as: str) -> None:
    trap = Trap(tmp_path / "sprung")
    if pickled_as == "object array":
        np.save(published / "snow.npy", np.array([trap] * 20, dtype=object), allow_pickle=True)
    else:
        (published / "snow.npy").write_bytes(pickle.dumps(trap))
    with pytest.raises(ValueError, match=r"snow\.npy is damaged, or holds pickled objects, which are refused"):
        read_cifar_c(published, "snow")
    assert not trap.file.exists()


@pytest.mark.parametrize("keep", [0, 5, 70, 500])
def test_truncated_file_is_refused(published: Path, keep: int) -> None:
    whole = (published / "fog.npy").read_bytes()
    (published / "fog.npy").write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=r"fog\.npy is damaged"):
        read_cifar_c(published, "fog")


def test_damaged_header_is_refused(published: Path) -> None:
    whole = (published / "fog.npy").read_bytes()
    for place, byte in ((0, b"P"), (20, b"("), (40, b"'"), (60, b"\xff")):
        (published / "fog.npy").write_bytes(whole[:place] + byte + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"fog\.npy is damaged"):
            read_cifar_c(published, "fog")


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        (
            "fog",
            np.zeros((20, 3, 32, 32), np.uint8),
            r"fog\.npy must hold uint8 images \(5 \* N, H, W, 3\), got uint8 \(20, 3,",
        ),
        ("fog", np.zeros((20, 32, 32, 3), np.float32), "fog.npy must hold uint8 images .* got float32"),
        (
            "fog",
            np.zeros((21, 32, 32, 3), np.uint8),
            r"labels\.npy must hold .* of fog\.npy \(21, 32, 32, 3\), got uint8 \(20,\)",
        ),
        ("labels", np.zeros(4, np.uint8), r"labels\.npy must hold whole numbers, .* got uint8 \(4,\)"),
        ("labels", np.zeros(20), r"labels\.npy must hold whole numbers, .* got float64 \(20,\)"),
    ],
)
def test_arrays_of_another_layout_are_refused(published: Path, file: str, array: np.ndarray, message: str) -> None:
    np.save(published / f"{file}.npy", array)
    with pytest.raises(ValueError, match=message):
        read_cifar_c(published, "fog")


def test_not_five_severities(published: Path) -> None:
    np.save(published / "fog.npy", np.zeros((19, 32, 32, 3), np.uint8))
    np.save(published / "labels.npy", np.zeros(19, np.uint8))
    with pytest.raises(ValueError, match=r"one for each of the 5 \* N images"):
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


def test_imagenet_c_without_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no folder '.*fog.2'; ImageNet-C is <root>/<corruption>/<severity>/<class>/"
    ):
        read_imagenet_c(tmp_path, "fog", 2)
    (tmp_path / "fog" / "2").mkdir(parents=True)
    with pytest.raises(ValueError, match="must have class folders, got none"):
        read_imagenet_c(tmp_path, "fog", 2)
    (tmp_path / "fog" / "2" / "n03").mkdir()
    with pytest.raises(ValueError, match="must have images in all its class folders, got none in n03"):
        read_imagenet_c(tmp_path, "fog", 2)


# Writing


def test_writes_the_published_layout(tmp_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corruption_sets, "_CHUNK", 4)  # so that one chunk is short
    make_c(images, LABELS, tmp_path / "c", "cifar", seed=3, names=["shot_noise", "contrast"], progress=False)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "contrast.npy",
        "labels.npy",
        "meta.json",
        "shot_noise.npy",
    ]
    for name in ("shot_noise", "contrast"):
        written = np.load(tmp_path / "c" / f"{name}.npy", allow_pickle=False)
        assert written.dtype == np.uint8
        assert np.array_equal(
            written, [corrupt(images[i], name, severity, seed=3, index=i) for severity in range(1, 6) for i in range(6)]
        )
    assert np.load(tmp_path / "c" / "labels.npy").tolist() == LABELS * 5


def test_reader_reads_what_was_written(tmp_path: Path, images: np.ndarray) -> None:
    make_c(images, LABELS, tmp_path, "imagenet64", names=["pixelate"], progress=False)
    read, labels = read_cifar_c(tmp_path, "pixelate", 4)
    assert np.array_equal(read, [corrupt(image, "pixelate", 4, preset="imagenet64") for image in images])
    assert labels.tolist() == LABELS


def test_meta_says_how_it_was_made(tmp_path: Path, images: np.ndarray) -> None:
    make_c(images, LABELS, tmp_path, "cifar", seed=3, names=["contrast"], source="digits/test", progress=False)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["source"] == "digits/test"
    assert meta["images"] == [6, 16, 16, 3]
    assert (meta["preset"], meta["seed"], meta["frost_source"]) == ("cifar", 3, frost_source())
    assert meta["parameters"]["contrast"] == [[0.75], [0.5], [0.4], [0.3], [0.15]]
    assert set(meta["parameters"]) == set(PARAMETERS["cifar"])
    assert meta["versions"]["numpy"] == np.__version__


def test_writes_the_15_common_ones_by_default(tmp_path: Path, images: np.ndarray) -> None:
    make_c(images[:1], [0], tmp_path, "cifar", progress=False)
    assert {path.stem for path in tmp_path.glob("*.npy")} == {*COMMON, "labels"}


def test_goes_on_where_it_was_interrupted(tmp_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    names = ["shot_noise", "fog", "contrast"]
    make_c(images, LABELS, whole, "cifar", names=names, progress=False)

    real, calls = corruption_sets.corrupt_batch, []

    def failing(chunk: np.ndarray, name: str, severity: int, *rest: object) -> np.ndarray:
        calls.append((name, severity))
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(chunk, name, severity, *rest)

    monkeypatch.setattr(corruption_sets, "corrupt_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        make_c(images, LABELS, interrupted, "cifar", names=names, progress=False)
    assert {path.name for path in interrupted.glob("*.npy")} == {"labels.npy", "shot_noise.npy"}
    with pytest.raises(FileNotFoundError, match=r"corruptions there: shot_noise$"):
        read_cifar_c(interrupted, "fog")

    make_c(images, LABELS, interrupted, "cifar", names=names, progress=False)
    assert ("shot_noise", 1) not in calls[8:], "what was finished is not made again"
    assert {path.name for path in interrupted.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.iterdir():
        assert path.read_bytes() == (interrupted / path.name).read_bytes()


def test_interrupted_before_meta_is_no_foreign_folder(tmp_path: Path, images: np.ndarray) -> None:
    (tmp_path / "meta.json.partial").write_text("{")
    make_c(images, LABELS, tmp_path, "cifar", names=["contrast"], progress=False)
    assert (tmp_path / "contrast.npy").exists()


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({"seed": 1}, "seed"),
        ({"preset": "imagenet64"}, "parameters, preset"),
        ({"source": "mine"}, "source"),
        ({"labels": [*LABELS[:5], 2]}, "labels_sha256"),
        ({"images": np.zeros((6, 16, 16, 3), np.uint8)}, "images_sha256"),
    ],
)
def test_does_not_mix_sets(tmp_path: Path, images: np.ndarray, change: dict, differing: str) -> None:
    same = {"images": images, "labels": LABELS, "out": tmp_path, "preset": "cifar", "names": ["contrast"]}
    make_c(**same, progress=False)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match=rf"meta\.json is of a set made otherwise, in {differing}: write to another folder"
    ):
        make_c(**{**same, **change, "names": ["contrast", "fog"]}, progress=False)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_leaves_a_foreign_folder_alone(tmp_path: Path, images: np.ndarray) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"out '.*' must be a new or empty folder, or one that make_c wrote"):
        make_c(images, LABELS, tmp_path, "cifar", progress=False)
    with pytest.raises(ValueError, match=r"out '.*thesis\.tex' must be a new or empty folder"):
        make_c(images, LABELS, tmp_path / "thesis.tex", "cifar", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_damaged_meta(tmp_path: Path, images: np.ndarray) -> None:
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"meta\.json is damaged"):
        make_c(images, LABELS, tmp_path, "cifar", progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["contrast", "rain"]}, "unknown corruption 'rain'"),
        ({"preset": "mnist"}, "unknown preset 'mnist'"),
        ({"images": np.zeros((6, 16, 16), np.uint8)}, "images must be RGB"),
        ({"labels": LABELS[1:]}, r"labels must be 6 whole numbers, one an image, got int64 \(5,\)"),
        ({"labels": [0.5] * 6}, r"labels must be 6 whole numbers, one an image, got float64 \(6,\)"),
        ({"images": np.zeros((0, 16, 16, 3), np.uint8), "labels": np.zeros(0, int)}, "labels must be 0 whole numbers"),
    ],
)
def test_refuses_before_it_writes(tmp_path: Path, images: np.ndarray, change: dict, message: str) -> None:
    out = tmp_path / "c"
    arguments = {"images": images, "labels": LABELS, "out": out, "preset": "cifar", "names": ["contrast"], **change}
    with pytest.raises(ValueError, match=message):
        make_c(**arguments, progress=False)
    assert not out.exists()
