from __future__ import annotations

import hashlib
import json
import warnings

import numpy as np
import pytest

from ssl_gradmix.data.open_set import DATASETS, N_TRIALS, distinct_trials, random_split, split


@pytest.fixture
def trials():
    """Known and unknown classes of a data set's five trials, without the warnings."""

    def five(dataset):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [split(dataset, trial) for trial in range(5)]

    return five


def digest(lists):
    return hashlib.sha256(json.dumps(lists).encode()).hexdigest()[:16]


def test_names():
    assert DATASETS == ("mnist", "svhn", "cifar10", "cifar+10", "cifar+50", "tinyimagenet")
    assert N_TRIALS == 5


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
def test_unknown_is_the_complement(trials, dataset, n_known, n_classes, digest_of_known):
    for known, unknown in trials(dataset):
        assert len(known) == n_known
        assert unknown == sorted(unknown)
        assert sorted(known + unknown) == list(range(n_classes))
    assert digest([known for known, _ in trials(dataset)]) == digest_of_known


@pytest.mark.parametrize(
    ("dataset", "n_unknown", "digest_of_unknown"),
    [("cifar+10", 10, "8d59321ceb68e756"), ("cifar+50", 50, "30b23b31d131266e")],
)
def test_cifar_plus_n_takes_unknown_classes_from_cifar100(trials, dataset, n_unknown, digest_of_unknown):
    for known, unknown in trials(dataset):
        assert len(set(known)) == 4
        assert set(known) < set(range(10))
        assert len(set(unknown)) == len(unknown) == n_unknown
        assert set(unknown) < set(range(100))
    assert digest([known for known, _ in trials(dataset)]) == "5f65fe7bea51ecf3"
    assert digest([unknown for _, unknown in trials(dataset)]) == digest_of_unknown


def test_cifar_plus_10_is_part_of_cifar_plus_50(trials):
    for (known, ten), (known_too, fifty) in zip(trials("cifar+10"), trials("cifar+50"), strict=True):
        assert known == known_too
        assert ten == fifty[-10:]


def test_only_the_last_trial_of_cifar_plus_n_is_vehicles_against_the_rest(trials):
    airplane, automobile, ship, truck = 0, 1, 8, 9
    cifar100_vehicles = {8, 13, 41, 48, 58, 69, 81, 85, 89, 90}  # superclasses vehicles 1 and 2
    for dataset in ("cifar+10", "cifar+50"):
        *others, (known, unknown) = trials(dataset)
        assert set(known) == {airplane, automobile, ship, truck}
        assert not cifar100_vehicles & set(unknown)
        for known, unknown in others:
            assert set(known) - {airplane, automobile, ship, truck}
            assert cifar100_vehicles & set(unknown)


def test_order_is_that_of_the_papers():
    assert split("cifar10", 0) == ([0, 6, 4, 9, 1, 7], [2, 3, 5, 8])
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
    assert distinct_trials(dataset) == distinct
    for trial in range(5):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            split(dataset, trial)
        assert len(caught) == (trial not in distinct)
        for warning in caught:
            assert f"trials {trial - 1} and {trial} of {dataset} have the same known" in str(warning.message)
            assert warning.filename == __file__


def test_lists_are_the_callers_own():
    split("mnist", 0)[0].clear()
    assert len(split("mnist", 0)[0]) == 6


def test_random_split():
    known, unknown = random_split(100, 20, seed=3)
    assert set(known) == set(np.random.default_rng(3).permutation(100)[:20])
    assert len(known) == 20
    assert sorted(known + unknown) == list(range(100))
    assert known == sorted(known)
    assert unknown == sorted(unknown)
    assert random_split(100, 20, seed=3) == (known, unknown) != random_split(100, 20, seed=4)
    assert json.dumps(known)  # plain integers


def test_random_split_draws_every_class_alike():
    counts = np.zeros(10)
    for seed in range(1000):
        counts[random_split(10, 4, seed)[0]] += 1
    assert np.abs(counts - 400).max() < 5 * np.sqrt(1000 * 0.4 * 0.6)


def test_bad_input():
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
