"""Trials of the literature and random ones, and what a run saw of their classes."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from jsonargparse import ArgumentParser

from ssl_gradmix.data.datasets import Data, load
from ssl_gradmix.data.open_set import (
    ALL_CLASSES,
    ALL_LABELED,
    FURTHER_CLASSES,
    KNOWN_ONLY,
    NOT_OUR_RUN,
    known_classes,
    load_known,
    load_labeled,
    own_trials,
    pretraining,
    trials,
)

TEN = tuple("abcdefghij")
DIGITS = tuple("0123456789")
ANIMALS = ("cat", "dog", "fox", "owl")


def digest(lists: list) -> str:
    return hashlib.sha256(json.dumps(lists).encode()).hexdigest()[:16]


# The digests are of the lists in the repositories of ARPL and of Vaze et al., in their order.
@pytest.mark.parametrize(
    ("dataset", "sizes", "digests"),
    [
        ("mnist", (6, 4), ("d90b231de1a12928",)),
        ("svhn", (6, 4), ("a7ece39fe505d8f7",)),
        ("cifar10", (6, 4), ("f0fe4b8ec627794d",)),
        ("tinyimagenet", (20, 180), ("1b20f19879989139",)),
        ("cifar+10", (4, 10), ("5f65fe7bea51ecf3", "8d59321ceb68e756")),
        ("cifar+50", (4, 50), ("5f65fe7bea51ecf3", "30b23b31d131266e")),
    ],
)
def test_published_trials_are_those_of_the_papers(dataset, sizes, digests) -> None:
    found = trials(dataset, "folder", 200 if dataset == "tinyimagenet" else 10)
    lists = [trial.known for trial in found], [trial.unknown for trial in found]
    assert [digest(each) for each in lists][: len(digests)] == list(digests)
    for trial in found:
        assert (len(set(trial.known)), len(set(trial.unknown))) == sizes
        assert trial.elsewhere == dataset.startswith("cifar+")
        if not trial.elsewhere:
            assert list(trial.unknown) == sorted(set(range(sum(sizes))) - set(trial.known))


def drawn(n_classes: int, n_known: int, seed: int) -> set[int]:
    return set(np.random.default_rng(seed).permutation(n_classes)[:n_known].tolist())


@pytest.mark.parametrize(
    ("name", "data", "names", "first_known"),
    [
        ("cifar10:2", "cifar10", ["cifar10:2"], {1, 5, 7, 3, 9, 4}),
        ("cifar10", "folder", [f"cifar10:{i}" for i in range(5)], {0, 6, 4, 9, 1, 7}),
        ("svhn:4", "digits", ["svhn:4"], {4, 9, 2, 7, 1, 0}),
        ("cifar+50:4", "cifar10", ["cifar+50:4"], {1, 0, 9, 8}),
        ("random:4:8", "digits", ["random:4:8"], drawn(10, 4, 8)),
        ("random:3", "stl10", [f"random:3:{i}" for i in range(5)], drawn(10, 3, 0)),
        ("random", "digits", [f"random:6:{i}" for i in range(5)], drawn(10, 6, 0)),
    ],
)
def test_name_gives_one_trial_or_five(name, data, names, first_known) -> None:
    found = trials(name, data, 10)
    assert [trial.name for trial in found] == names
    assert set(found[0].known) == first_known
    for trial in found:
        assert trial.protocol == name.partition(":")[0]
        assert trial.number == int(trial.name.rpartition(":")[2])
        if not trial.elsewhere:
            assert sorted(trial.known + trial.unknown) == list(range(10))


CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
WORDNET = tuple(f"n{number:08}" for number in range(200))


@pytest.mark.parametrize(
    ("name", "classes", "first"),
    [
        ("cifar+10:4", CIFAR, ["automobile", "airplane", "truck", "ship"]),
        ("cifar+10:4", CIFAR[::-1], ["automobile", "airplane", "truck", "ship"]),
        ("cifar10:0", tuple(map(str.title, CIFAR)), ["Airplane", "Frog", "Deer"]),
        ("svhn:0", DIGITS, list("537286")),
        ("tinyimagenet:0", tuple(f"{number:03}" for number in range(200)), ["108", "147", "017"]),
        ("tinyimagenet:0", WORDNET, ["n00000108", "n00000147", "n00000017"]),
    ],
)
def test_published_trials_of_folders_go_by_class_names(name, classes, first) -> None:
    (trial,) = trials(name, "folder", classes)
    assert [classes[label] for label in trial.known][: len(first)] == first


@pytest.mark.parametrize(
    ("data", "names", "first_known"),
    [
        (Data("cifar10"), [f"cifar10:{i}" for i in range(5)], {0, 6, 4, 9, 1, 7}),
        (Data("digits"), [f"random:6:{i}" for i in range(5)], drawn(10, 6, 0)),
        (Data("digits", open_set="random:4:8"), ["random:4:8"], drawn(10, 4, 8)),
        (Data("folder", "x", classes=["b", 3, 0]), ["data.classes"], {0, 1, 3}),
    ],
)
def test_own_trials_follow_the_settings(data, names, first_known) -> None:
    found = own_trials(data, TEN)
    assert [trial.name for trial in found] == names
    assert set(found[0].known) == first_known
    assert sorted(found[0].known + found[0].unknown) == list(range(10))


@pytest.mark.parametrize(
    ("wanted", "classes", "expected"),
    [
        (None, ANIMALS, None),
        ([3, 0], ANIMALS, [3, 0]),
        (["owl", 1], ANIMALS, [3, 1]),
        ([10, "9"], ("1", "10", "9"), [1, 2]),  # names, although they could be numbers
        (["01"], ("00", "01"), [1]),
        ("[yes, 01, 1e3, null]", ("01", "1e3", "no", "null", "yes"), [4, 0, 1, 3]),
        ("no", ("no", "yes"), [0]),
        ("'[a", ("'[a", "b"), [0]),
    ],
)
def test_classes_are_resolved_by_name_and_number(wanted, classes, expected) -> None:
    assert known_classes(Data(classes=wanted), classes) == expected


INVALID = [
    *((trials, (name, "cifar10", 10)) for name in ("", "cifar11", "cifar10:-1", "cifar10:5")),
    *((trials, (name, "cifar10", 10)) for name in ("cifar10:2:1", "random:six:0", "random:6:0:1")),
    (trials, ("cifar10:0", "digits", 10)),
    (trials, ("cifar10:0", "folder", 9)),
    (trials, ("cifar10:0", "folder", TEN)),
    (trials, ("mnist:0", "folder", [*"12345678", "10", "9"])),
    (trials, ("tinyimagenet:0", "folder", [f"class {number}" for number in range(200)])),
    (trials, ("random:10", "digits", 10)),
    (trials, ("random:1", "digits", 10)),
    *((own_trials, (Data(classes=classes), TEN)) for classes in (["a"], list(TEN))),
    *((known_classes, (Data(classes=classes), ANIMALS)) for classes in (["wolf"], [4], [-1], [])),
    (known_classes, (Data(classes=["dog", 1]), ANIMALS)),
    (known_classes, (Data(classes=[1]), ("01", "02"))),
    (known_classes, (Data(open_set="random:2"), ANIMALS)),
    (load_labeled, (Data(classes=[1]),)),
]


@pytest.mark.parametrize(("function", "arguments"), INVALID)
def test_invalid_trial_or_classes_raise(function, arguments) -> None:
    with pytest.raises(ValueError, match="data"):
        function(*arguments)


def test_load_known_keeps_labels() -> None:
    digits, known = (function(Data(open_set="mnist:0"), "test") for function in (load, load_known))
    assert set(digits.labels) == set(range(10))
    assert set(known.labels) == {2, 4, 5, 9, 8, 3}
    assert known.classes == digits.classes
    assert len(load_known(Data(), "test")) == len(digits)


def test_load_labeled_keeps_a_fraction_of_the_labels() -> None:
    data = Data(classes=[1, 2])
    whole, few = load_labeled(data), load_labeled(data, 0.1, seed=2)
    assert whole.labeled
    assert len(few) == len(whole)
    counts, kept = (np.bincount(images.labels + 1)[2:4] for images in (whole, few))
    assert kept.tolist() == (counts * 0.1).round().tolist()


# What a run saw


def test_class_names_on_the_command_line_are_text() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Data, "data")
    for given, expected in [
        ("[yes, no]", ["yes", "no"]),
        ("[01, 2, 1_000]", ["01", "2", "1_000"]),
        ("[cat, true]", ["cat", "true"]),
        ("off", ["off"]),
        ("null", None),
    ]:
        options = parser.instantiate(parser.parse_args(["--data.classes", given]))
        assert options.data.classes == expected


@pytest.mark.parametrize(
    ("run_data", "unknown", "expected"),
    [
        (None, [6, 7, 8, 9], NOT_OUR_RUN),
        ({"name": "digits"}, [6, 7, 8, 9], ALL_CLASSES),
        ({"name": "digits", "classes": [5, 4, "3", 2, 1, 0]}, [6, 7, 8, 9], KNOWN_ONLY),
        ({"name": "digits", "classes": [5, 4, 3, 2, 1, 0]}, [], KNOWN_ONLY),
        ({"name": "digits", "classes": list(range(9))}, [6, 7, 8], ALL_CLASSES),
        ({"name": "digits"}, [], FURTHER_CLASSES),
        ({"name": "mnist", "root": "data"}, [6, 7, 8, 9], "other data (mnist)"),
        ({"name": "folder", "root": "some/place"}, [6, 7, 8, 9], "other data (folder:place)"),
        ({"name": "folder", "root": "b/pets"}, [6, 7, 8, 9], ALL_CLASSES),
        ({"name": "folder", "root": "b/pets/train"}, [6, 7, 8, 9], ALL_CLASSES),
    ],
)
def test_pretraining_follows_the_runs_config(run_data, unknown, expected) -> None:
    config = None if run_data is None else {"recipe": "simclr", "data": run_data}
    pets = expected == ALL_CLASSES and run_data["name"] == "folder"
    data = Data("folder", "a/pets") if pets else Data()  # folders are the same by their name
    assert pretraining(config, data, DIGITS, [0, 1, 2, 3, 4, 5], unknown) == expected


def test_pretraining_mentions_labels_and_an_earlier_run() -> None:
    config = {"data": {"name": "digits"}, "recipe": "supcon", "init": "runs/first"}
    assert pretraining(config, Data(), DIGITS, [0, 1], [2]).startswith(ALL_LABELED)
    assert pretraining(config, Data(), DIGITS, [0, 1], [2]).endswith("runs/first")


@pytest.mark.parametrize("choice", [{"open_set": "cifar10:2"}, {"classes": [0, 6, 4, 9, 1, 7, 2]}])
def test_pretraining_on_another_trial_raises(choice) -> None:
    (trial,) = trials("cifar10:0", "cifar10", 10)
    config = {"data": {"name": "cifar10", "root": "data", **choice}}
    with pytest.raises(ValueError, match="known"):
        pretraining(config, Data("cifar10"), TEN, trial.known, trial.unknown)
