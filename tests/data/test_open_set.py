from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ssl_gradmix import command_line
from ssl_gradmix.data.datasets import load
from ssl_gradmix.data.open_set import (
    ALL_CLASSES,
    ALL_LABELED,
    DATASETS,
    FURTHER_CLASSES,
    KNOWN_ONLY,
    N_TRIALS,
    NOT_OUR_RUN,
    data_name,
    distinct_trials,
    known_classes,
    load_known,
    own_trials,
    pretraining,
    random_split,
    split,
    trials,
)
from ssl_gradmix.settings import Data, SimCLRSettings

TEN = tuple("abcdefghij")
DIGITS = tuple("0123456789")
ANIMALS = ("cat", "dog", "fox", "owl")


# The literature's lists


@pytest.fixture
def five() -> Callable[[str], list]:
    """Known and unknown classes of a data set's five trials, without the warnings."""

    def read(dataset: str) -> list:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [split(dataset, trial) for trial in range(5)]

    return read


def digest(lists: list) -> str:
    return hashlib.sha256(json.dumps(lists).encode()).hexdigest()[:16]


# The digests are of the lists as read from the repositories of ARPL and of Vaze et al., each list in its order.
@pytest.mark.parametrize(
    ("dataset", "n_known", "n_classes", "digest_of_known"),
    [
        ("mnist", 6, 10, "d90b231de1a12928"),
        ("svhn", 6, 10, "a7ece39fe505d8f7"),
        ("cifar10", 6, 10, "f0fe4b8ec627794d"),
        ("tinyimagenet", 20, 200, "1b20f19879989139"),
    ],
)
def test_unknown_is_the_complement(five, dataset, n_known, n_classes, digest_of_known):
    for known, unknown in five(dataset):
        assert len(known) == n_known
        assert unknown == sorted(unknown)
        assert sorted(known + unknown) == list(range(n_classes))
    assert digest([known for known, _ in five(dataset)]) == digest_of_known


@pytest.mark.parametrize(
    ("dataset", "n_unknown", "digest_of_unknown"),
    [("cifar+10", 10, "8d59321ceb68e756"), ("cifar+50", 50, "30b23b31d131266e")],
)
def test_cifar_plus_n_takes_unknown_classes_from_cifar100(five, dataset, n_unknown, digest_of_unknown):
    for known, unknown in five(dataset):
        assert len(set(known)) == 4
        assert set(known) < set(range(10))
        assert len(set(unknown)) == len(unknown) == n_unknown
        assert set(unknown) < set(range(100))
    assert digest([known for known, _ in five(dataset)]) == "5f65fe7bea51ecf3"
    assert digest([unknown for _, unknown in five(dataset)]) == digest_of_unknown


def test_order_is_that_of_the_papers_and_lists_are_the_callers_own():
    assert split("cifar10", 0) == ([0, 6, 4, 9, 1, 7], [2, 3, 5, 8])
    split("mnist", 4)[0].clear()
    assert split("mnist", 4)[0] == [6, 3, 4, 9, 8, 2]


@pytest.mark.parametrize(
    ("dataset", "distinct"),
    [
        ("mnist", [0, 1, 2, 3, 4]),
        ("svhn", [0, 2, 3, 4]),
        ("cifar10", [0, 2, 3, 4]),
        ("cifar+10", [0, 1, 3, 4]),
        ("cifar+50", [0, 1, 3, 4]),
        ("tinyimagenet", [0, 1, 2, 3, 4]),
    ],
)
def test_coinciding_trials_warn(dataset, distinct):
    assert dataset in DATASETS
    assert distinct_trials(dataset) == distinct
    for trial in range(N_TRIALS):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            split(dataset, trial)
        assert len(caught) == (trial not in distinct)
        for warning in caught:
            assert f"trials {trial - 1} and {trial} of {dataset} have the same known" in str(warning.message)
            assert warning.filename == __file__


# Random ones


def test_random_split():
    known, unknown = random_split(100, 20, seed=3)
    assert known == sorted(np.random.default_rng(3).permutation(100)[:20].tolist())
    assert sorted(known + unknown) == list(range(100))
    assert unknown == sorted(unknown)
    assert random_split(100, 20, seed=3) == (known, unknown) != random_split(100, 20, seed=4)
    assert json.dumps(known)  # plain integers


def test_bad_numbers():
    with pytest.raises(KeyError, match=r"dataset 'CIFAR10' has no open-set trials: .* mnist, svhn, cifar10, cifar"):
        split("CIFAR10", 0)
    with pytest.raises(KeyError, match="dataset 'imagenet' has no open-set trials"):
        distinct_trials("imagenet")
    for trial in (-1, 5):
        with pytest.raises(ValueError, match=f"trial must be 0 to 4, got {trial}"):
            split("mnist", trial)
    for n_known in (0, 10):
        with pytest.raises(ValueError, match=f"n_known must be at least 1 and below n_classes=10, got {n_known}"):
            random_split(10, n_known, seed=0)


# Names of trials


def drawn(n_classes: int, n_known: int, seed: int) -> set[int]:
    return set(np.random.default_rng(seed).permutation(n_classes)[:n_known].tolist())


@pytest.mark.parametrize(
    ("name", "data", "names", "first_known"),
    [
        ("cifar10:2", "cifar10", ["cifar10:2"], {1, 5, 7, 3, 9, 4}),
        ("cifar10:2", "folder", ["cifar10:2"], {1, 5, 7, 3, 9, 4}),
        ("cifar10", "cifar10", [f"cifar10:{i}" for i in range(5)], {0, 6, 4, 9, 1, 7}),
        ("svhn:4", "digits", ["svhn:4"], {4, 9, 2, 7, 1, 0}),
        ("cifar+50:4", "cifar10", ["cifar+50:4"], {1, 0, 9, 8}),
        ("random:4:8", "digits", ["random:4:8"], drawn(10, 4, 8)),
        ("random:3", "stl10", [f"random:3:{i}" for i in range(5)], drawn(10, 3, 0)),
        ("random", "digits", [f"random:6:{i}" for i in range(5)], drawn(10, 6, 0)),
    ],
)
def test_a_name_is_one_trial_or_five(name, data, names, first_known):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = trials(name, data, 10)
    assert [trial.name for trial in found] == names
    assert set(found[0].known) == first_known
    for trial in found:
        assert (trial.protocol, trial.number) == (name.partition(":")[0], int(trial.name.rpartition(":")[2]))
        assert trial.elsewhere == name.startswith("cifar+")
        if not trial.elsewhere:
            assert sorted(trial.known + trial.unknown) == list(range(10))


@pytest.mark.parametrize(
    ("name", "data", "n_classes", "message"),
    [
        *(
            (name, "cifar10", 10, rf"must be like cifar10:2, .* or random, got '{name}'; data sets .* mnist, svhn")
            for name in ("", "cifar11", "cifar10:-1", "cifar10:2:1", "random:six:0", "random:6:0:1", "random:-6")
        ),
        ("cifar10", "stl10", 10, "stl10 does not number its classes as cifar10 does; random ones, such as random:6:0"),
        ("tinyimagenet:0", "cifar100", 100, "cifar100 does not number its classes as tinyimagenet"),
        ("cifar10", "folder", 7, "cifar10 is for 10 classes, the data set has 7"),
        ("random:1:0", "digits", 10, "random:1:0 has 1 known and 9 unknown classes, at least 2 and 1 are needed"),
        ("random", "folder", 2, "random:1:0 has 1 known and 1 unknown"),
    ],
)
def test_names_that_do_not_fit_are_refused(name, data, n_classes, message):
    with pytest.raises(ValueError, match=message):
        trials(name, data, n_classes)


@pytest.mark.parametrize(
    ("data", "names", "first_known"),
    [
        (Data("cifar10"), [f"cifar10:{i}" for i in range(5)], {0, 6, 4, 9, 1, 7}),
        (Data("digits"), [f"random:6:{i}" for i in range(5)], drawn(10, 6, 0)),
        (Data("digits", open_set="random:4:8"), ["random:4:8"], drawn(10, 4, 8)),
        (Data("folder", "x", open_set="cifar10:2"), ["cifar10:2"], {1, 5, 7, 3, 9, 4}),
        (Data("folder", "x", classes=["b", 3, 0]), ["data.classes"], {0, 1, 3}),
    ],
)
def test_the_trials_of_settings(data, names, first_known):
    found = own_trials(data, TEN)
    assert [trial.name for trial in found] == names
    assert set(found[0].known) == first_known
    assert sorted(found[0].known + found[0].unknown) == list(range(10))


@pytest.mark.parametrize(("classes", "counts"), [(["a"], "1 known and 9 unknown"), (TEN, "10 known and 0 unknown")])
def test_settings_that_leave_too_few_classes(classes, counts):
    with pytest.raises(ValueError, match=counts):
        own_trials(Data("folder", "x", classes=list(classes)), TEN)


# What settings ask for


@pytest.mark.parametrize(
    ("wanted", "classes", "expected"),
    [
        (None, ANIMALS, None),
        ([3, 0], ANIMALS, [3, 0]),
        (["owl", 1], ANIMALS, [3, 1]),
        ([10, "9"], ("1", "10", "9"), [1, 2]),  # names, where they could be numbers
        ([2], ("a", "b", "2c"), [2]),
    ],
)
def test_classes_by_name_and_number(wanted, classes, expected):
    assert known_classes(Data(classes=wanted), classes) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": ["wolf"]}, r"'wolf', neither a class nor its number; the classes are cat, dog, fox, owl$"),
        ({"classes": [4]}, r"has 4, neither a class nor its number"),
        ({"classes": [-1]}, r"has -1, neither a class nor its number"),
        ({"classes": []}, r"data\.classes \[\] must name at least one class"),
        ({"classes": ["dog", 1]}, r"data\.classes \['dog', 1\] must name at least one class, and none twice"),
        ({"open_set": "random:2"}, r"data\.open_set must be a single trial, such as random:2:0, got 'random:2'"),
        ({"open_set": "cifar10:0"}, r"digits does not number its classes as cifar10 does"),
    ],
)
def test_classes_that_cannot_be_resolved(settings, message):
    with pytest.raises(ValueError, match=message):
        known_classes(Data(**settings), ANIMALS)


def test_long_lists_of_classes_are_cut_short_and_unlabeled_data_have_none():
    with pytest.raises(ValueError, match=r"the classes are 0x, .*, 19x \.\.\.$"):
        known_classes(Data(classes=["cat"]), [f"{i}x" for i in range(1000)])
    with pytest.raises(ValueError, match=r"the classes are none$"):
        known_classes(Data(classes=["cat"]), ())


def test_known_part_of_a_set_keeps_its_label_numbers():
    digits, known = (function(Data(open_set="mnist:0"), "test") for function in (load, load_known))
    assert set(digits.labels) == set(range(10))
    assert set(known.labels) == {2, 4, 5, 9, 8, 3}
    assert known.classes == digits.classes
    assert len(load_known(Data(), "test")) == len(digits)


@pytest.mark.parametrize("given", ["['01']", "[03]", "['2']", "[2]", "['010']", "['1_0']", "['0x1']"])
@pytest.mark.parametrize("by", ["command line", "file"])
def test_classes_that_look_like_numbers(given: str, by: str, tmp_path: Path):
    """A name is never taken for the number of another class; 03 is the text that it is written as."""
    parser = command_line.recipe_parser(SimCLRSettings, "", "test")
    (tmp_path / "c.yaml").write_text(f"data: {{classes: {given}}}")
    argv = ["--data.classes", given] if by == "command line" else ["--config", str(tmp_path / "c.yaml")]
    settings, plain = command_line.read(parser, argv)
    folders = ("01", "02", "03", "10")
    name = given.strip("[']")
    if name in folders:
        assert known_classes(settings.data, folders) == [folders.index(name)]
        assert plain["data"]["classes"] == [name]
    else:
        with pytest.raises(ValueError, match=r"data.classes has '?[0-9x_]+'?, (the class '0|neither a class)"):
            known_classes(settings.data, folders)
    if given in ("['2']", "[2]"):
        assert known_classes(settings.data, ("a", "b", "c")) == [2]


# What a run saw


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


def test_labels_and_an_earlier_run_are_told_of():
    labeled = {"data": {"name": "digits"}, "method": {"name": "supcon"}, "init": "runs/first"}
    assert pretraining(labeled, Data(), DIGITS, [0, 1], [2]) == f"{ALL_LABELED}, begun from runs/first"
    known = labeled | {"data": {"name": "digits", "classes": [0, 1]}}
    assert pretraining(known, Data(), DIGITS, [0, 1], [2]) == f"{KNOWN_ONLY}, begun from runs/first"


def test_a_run_of_all_classes_has_known_ones_only_where_all_are_known():
    assert pretraining({"data": {"name": "digits"}}, Data(), DIGITS, range(10)) == KNOWN_ONLY


def test_folders_go_by_their_name(tmp_path):
    data = Data("folder", str(tmp_path / "a" / "pets"))
    of_run = {"name": "folder", "root": str(tmp_path / "b" / "pets")}
    assert data_name(data) == "folder:pets"
    assert pretraining({"data": of_run}, data, TEN, [0, 1], [2]) == ALL_CLASSES
    assert pretraining({"data": of_run | {"root": "birds"}}, data, TEN, [0, 1], [2]) == "other data (folder:birds)"


@pytest.mark.parametrize(
    "choice", [{"open_set": "cifar10:2"}, {"classes": [0, 6, 4]}, {"classes": [0, 6, 4, 9, 1, 7, 2]}]
)
def test_a_run_of_other_known_classes_is_refused(choice):
    (trial,) = trials("cifar10:0", "cifar10", 10)
    config = {"data": {"name": "cifar10", "root": "data", **choice}}
    message = r"was pretrained on the classes \[.*\] alone, but known are \[0, 1, 4, 6, 7, 9\]"
    with pytest.raises(ValueError, match=message):
        pretraining(config, Data("cifar10"), TEN, trial.known, trial.unknown)


def test_a_run_of_a_coinciding_trial_is_known_only_without_warning():
    (trial,) = trials("cifar10:0", "cifar10", 10)
    config = {"data": {"name": "cifar10", "root": "data", "open_set": "cifar10:1"}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pretraining(config, Data("cifar10"), TEN, trial.known, trial.unknown) == KNOWN_ONLY
