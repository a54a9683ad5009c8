from __future__ import annotations

import re
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from ssl_gradmix.evaluation.open_set.trials import (
    ALL_CLASSES,
    FURTHER_CLASSES,
    KNOWN_ONLY,
    NOT_OUR_RUN,
    Group,
    Trial,
    choose_trials,
    distinct,
    load_cifar100,
    load_unknown,
    pretraining,
    set_groups,
    trial_groups,
)

from ssl_gradmix.data.datasets import ImageSet, load
from ssl_gradmix.settings import Data

TEN = tuple("abcdefghij")
DIGITS = tuple("0123456789")


def drawn(n_classes, n_known, seed):
    return set(np.random.default_rng(seed).permutation(n_classes)[:n_known].tolist())


@pytest.mark.parametrize(
    ("data", "asked", "protocol", "numbers", "first_known"),
    [
        (Data("cifar10"), {}, "cifar10", [0, 1, 2, 3, 4], {0, 6, 4, 9, 1, 7}),
        (Data("mnist"), {"numbers": [4, 2]}, "mnist", [4, 2], {6, 3, 4, 9, 8, 2}),
        (Data("digits"), {}, "random", [0, 1, 2, 3, 4], drawn(10, 6, 0)),
        (Data("digits"), {"protocol": "svhn", "numbers": [4]}, "svhn", [4], {4, 9, 2, 7, 1, 0}),
        (Data("digits"), {"n_known": 3, "numbers": [7]}, "random", [7], drawn(10, 3, 7)),
        (Data("digits", open_set="random:4:8"), {}, "random", [8], drawn(10, 4, 8)),
        (Data("digits", open_set="random:4:8"), {"numbers": [2, 3]}, "random", [2, 3], drawn(10, 4, 2)),
        (Data("digits", open_set="random:4:8"), {"n_known": 5}, "random", [8], drawn(10, 5, 8)),
        (Data("folder", "x", open_set="cifar10:2"), {}, "cifar10", [2], {1, 5, 7, 3, 9, 4}),
        (Data("cifar10", open_set="cifar+50:4"), {}, "cifar+50", [4], {1, 0, 9, 8}),
        (Data("folder", "x", classes=["b", 3, 0]), {}, "data.classes", [0], {0, 1, 3}),
        (Data("folder", "x", classes=[1, 2]), {"protocol": "random", "numbers": [5]}, "random", [5], drawn(10, 6, 5)),
    ],
)
def test_what_is_asked_for_is_resolved(data, asked, protocol, numbers, first_known):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen, trials = choose_trials(data, TEN, **asked)
    assert chosen == protocol
    assert [trial.number for trial in trials] == numbers
    assert set(trials[0].known) == first_known
    if not protocol.startswith("cifar+"):
        for trial in trials:
            assert sorted(trial.known + trial.unknown) == list(range(10))


def test_unknown_classes_of_cifar_plus_n_are_of_cifar100():
    _, (trial,) = choose_trials(Data("cifar10"), TEN, "cifar+10", [0])
    assert trial.unknown == (30, 25, 1, 9, 8, 0, 46, 52, 49, 71)


@pytest.mark.parametrize(
    ("data", "classes", "asked", "message"),
    [
        (
            Data("stl10"),
            TEN,
            {"protocol": "cifar10"},
            "split does not fit: stl10 does not number its classes as cifar10",
        ),
        (Data("folder", "x"), TEN[:7], {"protocol": "cifar10"}, "cifar10 is for 10 classes, the data set has 7"),
        (
            Data("folder", "x"),
            TEN,
            {"protocol": "tinyimagenet"},
            "tinyimagenet is for 200 classes, the data set has 10",
        ),
        (Data("mnist"), TEN, {"n_known": 3}, "n_known is for the protocol random, got 3 with mnist"),
        (Data("mnist"), TEN, {"numbers": [5]}, "trial must be 0 to 4, got 5"),
        (Data(), TEN, {"numbers": []}, r"trials must be at least one, .* got \[\]"),
        (Data(), TEN, {"numbers": [3, 3]}, "none twice"),
        (Data(), TEN, {"numbers": [-1]}, "0 or above"),
        (Data(), TEN, {"n_known": 1}, "trial 0 has 1 known and 9 unknown classes, at least 2 and 1 are needed"),
        (Data(), TEN, {"n_known": 10}, "n_known must be at least 1 and below n_classes=10, got 10"),
        (Data(), ("cat", "dog"), {}, "trial 0 has 1 known and 1 unknown"),
        (Data("folder", "x", classes=["a"]), TEN, {}, "1 known and 9 unknown"),
        (Data("folder", "x", classes=list(TEN)), TEN, {}, "10 known and 0 unknown"),
        (Data("folder", "x", classes=["a", "z"]), TEN, {}, "data.classes has 'z'"),
        (Data("folder", "x", classes=["a", "b"]), TEN, {"numbers": [1]}, "trials and n_known need a protocol"),
        (Data(open_set="random:6"), TEN, {}, "dataset 'random' has no open-set trials"),
        (Data(open_set="tinyimagenet:0"), TEN, {}, "digits does not number its classes as tinyimagenet"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(data, classes, asked, message):
    with pytest.raises((ValueError, KeyError), match=message):
        choose_trials(data, classes, **asked)


def test_distinct_leaves_out_repeated_known_classes():
    assert distinct(choose_trials(Data("cifar10"), TEN)[1]) == [0, 2, 3, 4]
    assert distinct(choose_trials(Data("cifar10"), TEN, "cifar+10")[1]) == [0, 1, 3, 4]
    assert distinct(choose_trials(Data("mnist"), TEN)[1]) == [0, 1, 2, 3, 4]
    few = choose_trials(Data(), ("x", "y", "z"), "random", range(30), 2)[1]
    assert len(distinct(few)) == 3
    assert len({frozenset(trial.known) for trial in few if trial.number in distinct(few)}) == 3
    assert distinct([Trial(None, (1, 2), ()), Trial(None, (1, 2), ())]) == [None]


@pytest.mark.parametrize(
    ("of_run", "unknown", "expected"),
    [
        (None, [6, 7, 8, 9], NOT_OUR_RUN),
        ({"name": "digits"}, [6, 7, 8, 9], ALL_CLASSES),
        ({"name": "digits", "classes": None, "open_set": None}, [6, 7, 8, 9], ALL_CLASSES),
        ({"name": "digits", "classes": [5, 4, "3", 2, 1, 0]}, [6, 7, 8, 9], KNOWN_ONLY),
        ({"name": "digits", "classes": [5, 4, 3, 2, 1, 0]}, [], KNOWN_ONLY),
        ({"name": "digits", "classes": list(range(9))}, [6, 7, 8], ALL_CLASSES),
        ({"name": "digits"}, [], FURTHER_CLASSES),
        ({"name": "mnist", "root": "data"}, [6, 7, 8, 9], "other data (mnist)"),
        ({"name": "folder", "root": "some/place"}, [6, 7, 8, 9], "other data (folder:place)"),
    ],
)
def test_pretraining_is_named_by_the_runs_config(of_run, unknown, expected):
    config = None if of_run is None else {"data": of_run, "method": {}}
    assert pretraining(config, Data(), DIGITS, [0, 1, 2, 3, 4, 5], unknown) == expected


def test_a_run_of_all_classes_has_known_ones_only_where_all_are_known():
    config = {"data": {"name": "digits"}}
    assert pretraining(config, Data(), DIGITS, range(10)) == KNOWN_ONLY


def test_folders_go_by_their_name(tmp_path):
    data, of_run = (
        Data("folder", str(tmp_path / "a" / "pets")),
        {"name": "folder", "root": str(tmp_path / "b" / "pets")},
    )
    assert pretraining({"data": of_run}, data, TEN, [0, 1], [2]) == ALL_CLASSES
    assert pretraining({"data": of_run | {"root": "birds"}}, data, TEN, [0, 1], [2]) == "other data (folder:birds)"


@pytest.mark.parametrize(
    "choice", [{"open_set": "cifar10:2"}, {"classes": [0, 6, 4]}, {"classes": [0, 6, 4, 9, 1, 7, 2]}]
)
def test_a_run_of_other_known_classes_is_refused(choice):
    _, trials = choose_trials(Data("cifar10"), TEN, "cifar10", [0])
    config = {"data": {"name": "cifar10", "root": "data", **choice}}
    with pytest.raises(
        ValueError, match=r"was pretrained on the classes \[.*\] alone, but known are \[0, 1, 4, 6, 7, 9\]"
    ):
        pretraining(config, Data("cifar10"), TEN, trials[0].known, trials[0].unknown)


def test_a_run_of_a_coinciding_trial_is_known_only_without_warning():
    _, trials = choose_trials(Data("cifar10"), TEN, "cifar10", [0])
    config = {"data": {"name": "cifar10", "root": "data", "open_set": "cifar10:1"}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pretraining(config, Data("cifar10"), TEN, trials[0].known, trials[0].unknown) == KNOWN_ONLY


def image_set(labels, name="toy/test", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (len(labels), 4, 4, 3), dtype=np.uint8)
    return ImageSet(pixels, np.asarray(labels, np.int64), TEN, name)


def test_groups_of_trials_and_their_parameters():
    test = image_set([0, 1, 2, 3, 4, 4])
    trials = [Trial(3, (1, 0), (4,)), Trial(5, (0, 2, 3), (1, 4))]
    config = {"data": {"name": "folder", "root": "toy"}}
    first, second = trial_groups("random", trials, Data("folder", "toy"), test, test, config)
    assert (first.name, second.name) == ("trial3", "trial5")
    assert first.is_unknown.tolist() == [False] * 4 + [True] * 2
    assert second.is_unknown.tolist() == [False, True, False, False, True, True]
    assert first.params == {"protocol": "random", "pretraining": ALL_CLASSES, "n_known": 2}


def test_unknown_of_another_set_is_named():
    test, other = image_set([0, 1, 2, 3]), image_set([0, 1, 30], "cifar100/test")
    trials = [Trial(0, (0, 1), (30, 1))]
    (group,) = trial_groups("cifar+10", trials, Data("folder", "toy"), test, other, None)
    assert group.params["unknown"] == "cifar100/test"
    assert group.is_unknown.tolist() == [False, True, True]


@pytest.mark.parametrize("same", [True, False])
def test_select_picks_what_a_loop_picks(same):
    rng = np.random.default_rng(0)
    train, test = image_set(rng.integers(0, 6, 50)), image_set(rng.integers(0, 6, 30))
    images = test if same else image_set(rng.integers(0, 9, 20), "other/test")
    trial = Trial(0, (4, 1), (0, 5))
    group = Group("trial0", trial, images, np.isin(images.labels, trial.unknown), {})

    def labeled(part, offset):
        return torch.arange(len(part)).float()[:, None] + offset, torch.from_numpy(part.labels)

    (features, labels), (tested, tested_labels), is_known = group.select(
        labeled(train, 0), labeled(test, 100), labeled(images, 100 if same else 200)
    )
    assert features[:, 0].tolist() == [i for i, label in enumerate(train.labels) if label in (1, 4)]
    assert labels.tolist() == [label for label in train.labels if label in (1, 4)]
    offset = 100 if same else 200
    known = [(100 + i, label, True) for i, label in enumerate(test.labels) if label in (1, 4)]
    unknown = [(offset + i, label, False) for i, label in enumerate(images.labels) if label in (0, 5)]
    found = zip(tested[:, 0].tolist(), tested_labels.tolist(), is_known.tolist(), strict=True)
    assert list(found) == known + unknown


def test_missing_images_are_refused():
    train, test, trial = image_set([0, 0, 1]), image_set([0, 1, 2]), Trial(0, (0, 1), (2,))
    some, none = np.array([False, False, True]), np.zeros(3, bool)
    Group("trial0", trial, test, some, {}).check(train, test)
    with pytest.raises(ValueError, match="trial0: toy/test has no image of an unknown class"):
        Group("trial0", trial, test, none, {}).check(train, test)
    with pytest.raises(ValueError, match=r"toy/test has no image of the known classes \[3, 4\]"):
        Group("trial0", Trial(0, (3, 4), (2,)), test, some, {}).check(image_set([3, 4]), test)
    with pytest.raises(ValueError, match=r"toy/train has no image of the known classes \[2\]"):
        Group("trial0", Trial(0, (0, 2), (1,)), test, some, {}).check(image_set([0, 1], "toy/train"), test)


def test_fingerprint_tells_samples_apart():
    test = image_set([0, 1, 2, 2])
    trial, unknown = Trial(0, (0, 1), (2,)), np.array([False, False, True, True])

    def fingerprint(images, is_unknown=unknown, trial=trial):
        return Group("trial0", trial, images, is_unknown, {}).fingerprint(images)

    first = fingerprint(test)
    assert fingerprint(image_set([0, 1, 2, 2])) == first
    assert fingerprint(image_set([0, 1, 2, 2], seed=1)) != first
    assert fingerprint(test.subset([1, 0, 2, 3])) != first
    assert fingerprint(test, np.array([False, False, True, False])) != first
    assert fingerprint(test, trial=Trial(0, (0, 2), (1,)), is_unknown=np.array([False, True, False, False])) != first


def write_images(folder, names, count=2, size=9):
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")


def test_fingerprint_of_files_survives_a_move_but_no_edit(tmp_path):
    write_images(tmp_path / "one" / "test", "ab")
    write_images(tmp_path / "one" / "train", "ab")

    def fingerprint(root):
        images = load(Data("folder", str(root)), "test")
        return Group("trial0", Trial(0, (0,), (1,)), images, images.labels == 1, {}).fingerprint(images)

    first = fingerprint(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two" / "copy")
    assert fingerprint(tmp_path / "two" / "copy") == first
    Image.new("RGB", (30, 30), "red").save(tmp_path / "two" / "copy" / "test" / "a" / "0.png")
    assert fingerprint(tmp_path / "two" / "copy") != first


def test_unknown_images_are_all_of_a_folder_without_test_split(tmp_path):
    write_images(tmp_path, ["flat"], count=3)
    flat = load_unknown(Data("folder", str(tmp_path / "flat")))
    assert (len(flat), flat.name, set(flat.labels)) == (3, "folder:flat/all", {-1})

    write_images(tmp_path / "classes", "abc", count=5)
    everything = load_unknown(Data("folder", str(tmp_path / "classes")))
    assert everything.name == "folder:classes/all"
    assert sorted(everything.images) == sorted((tmp_path / "classes").rglob("*.png"))
    for path, label in zip(everything.images, everything.labels, strict=True):
        assert path.parent.name == "abc"[label]
    assert len(load_unknown(Data("folder", str(tmp_path / "classes"), classes=["b"]))) == 5


def test_unknown_images_are_test_images_where_there_are_such(tmp_path):
    write_images(tmp_path / "split" / "train", "ab", count=4)
    write_images(tmp_path / "split" / "test", "ab", count=3)
    held_out = load_unknown(Data("folder", str(tmp_path / "split")))
    assert (len(held_out), held_out.name) == (6, "folder:split/test")
    assert load_unknown(Data()).labels.tolist() == load(Data(), "test").labels.tolist()
    with pytest.raises(ValueError, match="unknown: data.root '.*nowhere' is not a folder"):
        load_unknown(Data("folder", str(tmp_path / "nowhere")))


def test_groups_of_other_sets(tmp_path):
    write_images(tmp_path / "noise", "ab", count=3)
    test, noise = load(Data(), "test"), Data("folder", str(tmp_path / "noise"))
    config = {"data": {"name": "digits"}}
    (group,) = set_groups(Data(), test, config, [noise])
    assert (group.name, group.trial.number, group.trial.known) == ("folder:noise", None, tuple(range(10)))
    assert group.is_unknown.tolist() == [True] * 6
    assert group.params == {"known": "digits/test", "pretraining": KNOWN_ONLY, "n_known": 10}

    of_same = replace(Data(), classes=[8, 9])
    first, second = set_groups(Data(classes=[1, 2, 3]), test, config, [noise, of_same])
    assert first.params["pretraining"] == FURTHER_CLASSES
    assert (second.name, second.params["pretraining"]) == ("digits", ALL_CLASSES)
    assert set(second.images.labels) == {8, 9}


@pytest.mark.parametrize(
    ("data", "others", "message"),
    [
        (Data(), [], r"at least one data set, and none twice, got \[\]"),
        (Data(), [Data("folder", "x/a"), Data("folder", "y/a")], "none twice, got"),
        (Data(), [Data()], "digits/test has images of the known classes"),
        (Data(classes=[1, 2]), [Data(classes=[2, 3])], "has images of the known classes"),
        (Data(classes=[1]), [Data(classes=[2])], r"at least two known classes are needed, digits/test has \['1'\]"),
    ],
)
def test_other_sets_that_make_no_sense_are_refused(data, others, message):
    with pytest.raises(ValueError, match=message):
        set_groups(data, load(Data(), "test"), None, others)


def test_cifar100_must_be_told_and_have_its_classes(tmp_path):
    with pytest.raises(ValueError, match="say where it is, as --unknown.name cifar100"):
        load_cifar100(Data("folder", "x"), None)
    with pytest.raises(ValueError, match="digits/test has 10 classes, and CIFAR-100"):
        load_cifar100(Data("folder", "x"), [Data()])
    with pytest.raises(ValueError, match=re.escape(f"unknown: cifar100 is not in data.root {str(tmp_path)!r}")):
        load_cifar100(Data("cifar10", str(tmp_path)), None)
    write_images(tmp_path / "hundred" / "test", [f"class{i:02}" for i in range(100)], count=1)
    images = load_cifar100(Data("folder", "x"), [Data("folder", str(tmp_path / "hundred"), classes=[1])])
    assert sorted(images.labels) == list(range(100))
