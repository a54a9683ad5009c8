from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from ssl_gradmix.evaluation.open_set.samples import Samples, Settings

ARRAYS = {
    "is_known": np.array([True, True, False]),
    "correct": np.array([True, False, False]),
    "labels": np.array([3, 1, 40]),
    "msp": np.array([1.0, 1 - 1e-12, 0.3]),
    "vim": np.array([0.1, -2.5, 1e-30]),
}


@pytest.fixture
def samples():
    arrays = {"trial0": ARRAYS, "folder:x": {name: array[:2] for name, array in ARRAYS.items()}}
    return Samples("mine", Settings(k=4, epochs=5), {"trial0": "abc", "folder:x": "def"}, arrays)


def test_samples_survive_the_disk_exactly(samples, tmp_path):
    path = tmp_path / "deep" / "osr_samples.safetensors"
    samples.write(path)
    stored = load_file(path)
    assert sorted(stored) == sorted(f"{group}/{name}" for group in ("trial0", "folder:x") for name in ARRAYS)
    assert (stored["trial0/is_known"].dtype, stored["trial0/labels"].dtype) == (np.uint8, np.int64)
    read = Samples.read(path)
    assert (read.encoder, read.settings, read.images) == (samples.encoder, samples.settings, samples.images)
    for name, array in samples.arrays["trial0"].items():
        assert read.arrays["trial0"][name].dtype == array.dtype
        assert np.array_equal(read.arrays["trial0"][name], array)


def test_files_that_are_no_samples_are_refused(samples, tmp_path):
    save_file({"weight": np.zeros(3)}, tmp_path / "weights.safetensors")
    samples.write(tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-40])
    for name in ("weights", "cut"):
        with pytest.raises(ValueError, match=f"{name}.safetensors is no file of open-set samples, or damaged"):
            Samples.read(tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match="nothing"):
        Samples.read(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("images", "arrays", "message"),
    [
        ({"trial0": "abc", "trial1": "x"}, {"trial0": ARRAYS}, "it has arrays of trial0, but names trial0, trial1"),
        ({"trial0": "abc"}, {"trial0": {"vim": ARRAYS["vim"]}}, "trial0 lacks is_known or correct, or"),
        (
            {"trial0": "abc"},
            {"trial0": ARRAYS | {"vim": np.zeros(2)}},
            "trial0 .* its arrays differ in length",
        ),
        (["trial0"], {"trial0": ARRAYS}, "'list' object"),
    ],
)
def test_samples_that_do_not_fit_together_are_refused(tmp_path, images, arrays, message):
    Samples("theirs", Settings(), images, arrays).write(tmp_path / "osr_samples.safetensors")
    with pytest.raises(ValueError, match=f"is no file of open-set samples, or damaged: {message}"):
        Samples.read(tmp_path / "osr_samples.safetensors")


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        ({"trial1": "abc"}, Settings(k=4, epochs=5), "evaluated on trial1, not trial0, folder:x"),
        ({"trial0": "other"}, Settings(k=4, epochs=5), "the images of trial0 differ"),
        ({"trial0": "abc"}, Settings(k=5, epochs=5), "was scored with .*k=5.*this with .*k=4"),
    ],
)
def test_other_samples_are_not_compared(samples, images, settings, message):
    with pytest.raises(ValueError, match=f"theirs .*{message}"):
        samples.check_comparable(Samples("theirs", settings, images))


def test_samples_of_some_of_the_groups_compare(samples):
    samples.check_comparable(Samples("theirs", samples.settings, {"trial0": "abc", "trial4": "ghi"}))


def test_more_neighbors_than_there_are_may_not_be_asked_for():
    labels = np.array([3, 3, 8, 8, 8])
    Settings().check(labels)  # 50 and 3, to be clamped
    Settings(k=5, top_k=2).check(labels)
    with pytest.raises(ValueError, match="k must be from 1 to 5, the training images of all known classes, got 6"):
        Settings(k=6).check(labels)
    with pytest.raises(ValueError, match="top_k must be from 1 to 2, those of the smallest known class, got 3"):
        Settings(top_k=3).check(labels)
    with pytest.raises(ValueError, match="k must be from 1 to 5, .* got 0"):
        Settings(k=0).check(labels)
