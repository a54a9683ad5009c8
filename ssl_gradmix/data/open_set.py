"""Which classes are known and which are not: the trials of the literature, and random ones.

The five trials of each data set are those of ARPL (Chen et al., 2021), copied by "Open-Set Recognition: a Good
Closed-Set Classifier is All You Need?" (Vaze et al., 2022) and by GradMix's authors; the class lists of the three were
compared and are the same. Train on the training images of the known classes; test on the test images of the known and
the unknown classes (for TinyImageNet, its validation images).

| data set       | known                   | unknown               |
|----------------|-------------------------|-----------------------|
| `mnist`        | 6 of 10 digits          | the other 4           |
| `svhn`         | 6 of 10 digits          | the other 4           |
| `cifar10`      | 6 of 10 classes         | the other 4           |
| `cifar+10`     | 4 classes of CIFAR-10   | 10 of CIFAR-100       |
| `cifar+50`     | 4 classes of CIFAR-10   | 50 of CIFAR-100       |
| `tinyimagenet` | 20 of 200 classes       | the other 180         |

Some trials coincide, see `distinct_trials`: a mean over all five counts a set of classes twice, and its spread is too
small. CIFAR+10 and CIFAR+50 are often described as vehicles against animals; only trial 4 is. Trials 0 to 3 have
animals among the known classes, and vehicles among the unknown ones.

Settings name a trial as `cifar10:2` (trial 2 of the data set's five) or `random:6:0` (six known classes, drawn with
seed 0); evaluations also name several at once, see `trials`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ssl_gradmix.data.datasets import ImageSet, load
from ssl_gradmix.settings import Data

# In the order of the papers' code, where a class's place in the list is the label it is trained with.
# fmt: off
_OF_CIFAR10 = ((4, 7, 9, 1), (6, 7, 1, 9), (9, 6, 1, 7), (6, 4, 9, 1), (1, 0, 9, 8))
_KNOWN: dict[str, tuple[tuple[int, ...], ...]] = {
    "mnist": (
        (2, 4, 5, 9, 8, 3),
        (3, 2, 6, 9, 4, 0),
        (5, 8, 3, 2, 4, 6),
        (3, 7, 8, 4, 0, 5),
        (6, 3, 4, 9, 8, 2),
    ),
    "svhn": (
        (5, 3, 7, 2, 8, 6),
        (3, 8, 7, 6, 2, 5),
        (8, 9, 4, 7, 2, 1),
        (3, 8, 2, 5, 0, 6),
        (4, 9, 2, 7, 1, 0),
    ),
    "cifar10": (
        (0, 6, 4, 9, 1, 7),
        (7, 6, 4, 9, 0, 1),
        (1, 5, 7, 3, 9, 4),
        (8, 6, 1, 9, 0, 7),
        (2, 4, 1, 7, 9, 6),
    ),
    "cifar+10": _OF_CIFAR10,
    "cifar+50": _OF_CIFAR10,
    "tinyimagenet": (
        (108, 147, 17, 58, 193, 123, 72, 144, 75, 167, 134, 14, 81, 171, 44, 197, 152, 66, 1, 133),
        (198, 161, 91, 59, 57, 134, 61, 184, 90, 35, 29, 23, 199, 38, 133, 19, 186, 18, 85, 67),
        (177, 0, 119, 26, 78, 80, 191, 46, 134, 92, 31, 152, 27, 60, 114, 50, 51, 133, 162, 93),
        (98, 36, 158, 177, 189, 157, 170, 191, 82, 196, 138, 166, 43, 13, 152, 11, 75, 174, 193, 190),
        (95, 6, 145, 153, 0, 143, 31, 23, 189, 81, 20, 21, 89, 26, 36, 170, 102, 177, 108, 169),
    ),
}
_CIFAR100_UNKNOWN: dict[str, tuple[tuple[int, ...], ...]] = {
    "cifar+10": (
        (30, 25, 1, 9, 8, 0, 46, 52, 49, 71),
        (41, 9, 49, 40, 73, 60, 48, 30, 95, 71),
        (8, 9, 49, 40, 73, 60, 48, 95, 30, 71),
        (95, 60, 30, 73, 46, 49, 68, 99, 8, 71),
        (33, 2, 3, 97, 46, 21, 64, 63, 88, 43),
    ),
    "cifar+50": (
        (27, 94, 29, 77, 88, 26, 69, 48, 75, 5, 59, 93, 39, 57, 45, 40, 78, 20, 98, 47, 66, 70, 91, 76, 41, 83,
         99, 32, 53, 72, 2, 95, 21, 73, 84, 68, 35, 11, 55, 60, 30, 25, 1, 9, 8, 0, 46, 52, 49, 71),
        (65, 97, 86, 24, 45, 67, 2, 3, 91, 98, 79, 29, 62, 82, 33, 76, 0, 35, 5, 16, 54, 11, 99, 52, 85, 1, 25,
         66, 28, 84, 23, 56, 75, 46, 21, 72, 55, 68, 8, 69, 41, 9, 49, 40, 73, 60, 48, 30, 95, 71),
        (20, 83, 65, 97, 94, 2, 93, 16, 67, 29, 62, 33, 24, 98, 5, 86, 35, 54, 0, 91, 52, 66, 85, 84, 56, 11, 1,
         76, 25, 55, 21, 99, 72, 41, 23, 75, 28, 68, 69, 46, 8, 9, 49, 40, 73, 60, 48, 95, 30, 71),
        (92, 82, 77, 64, 5, 33, 62, 56, 70, 0, 20, 28, 67, 14, 84, 53, 91, 29, 85, 2, 52, 83, 75, 35, 11, 21,
         72, 98, 55, 1, 41, 76, 25, 66, 69, 9, 48, 54, 40, 23, 95, 60, 30, 73, 46, 49, 68, 99, 8, 71),
        (47, 6, 19, 0, 62, 93, 59, 65, 54, 70, 34, 55, 23, 38, 72, 76, 53, 31, 78, 96, 77, 27, 92, 18, 82, 50,
         98, 32, 1, 75, 83, 4, 51, 35, 80, 11, 74, 66, 36, 42, 33, 2, 3, 97, 46, 21, 64, 63, 88, 43),
    ),
}
# fmt: on
_N_CLASSES = {"mnist": 10, "svhn": 10, "cifar10": 10, "cifar+10": 10, "cifar+50": 10, "tinyimagenet": 200}
"""Of the data set that the known classes are of."""

_DIGITS = ("digits", "mnist", "svhn")
_NUMBERED_ALIKE = {"mnist": _DIGITS, "svhn": _DIGITS} | dict.fromkeys(("cifar10", "cifar+10", "cifar+50"), ("cifar10",))
"""The named data sets, beside folders, whose labels mean what those of the trials mean."""

DATASETS = tuple(_KNOWN)
"""The data sets that have trials."""

N_TRIALS = 5

KNOWN_ONLY = "known classes only"
ALL_CLASSES = "all classes, unlabeled"
ALL_LABELED = "all classes, labeled"
FURTHER_CLASSES = "known and further classes, none unknown"
NOT_OUR_RUN = "unknown (not our run)"
"""What `pretraining` says."""


def split(dataset: str, trial: int) -> tuple[list[int], list[int]]:
    """Known and unknown classes of one of the literature's trials.

    Args:
        dataset: One of `DATASETS`. `cifar+10` and `cifar+50` take their known classes from CIFAR-10.
        trial: 0 to 4, in the order of the lists; ARPL runs them from 4 to 0, so column 0 of its results is trial 4.

    Returns:
        Known classes in the papers' order: the place of a class is its label where labels run from 0. Unknown classes:
        rising, except for `cifar+10` and `cifar+50`, where they are fine labels of CIFAR-100 in the papers' order.

    Raises:
        KeyError: If the data set has no trials.
        ValueError: If there is no such trial.

    Warns:
        UserWarning: If an earlier trial has the same known classes.
    """
    _check(dataset)
    if trial not in range(N_TRIALS):
        raise ValueError(f"trial must be 0 to {N_TRIALS - 1}, got {trial!r}")
    known = _KNOWN[dataset][trial]
    twin = _first_alike(dataset, trial)
    if twin != trial:
        warnings.warn(
            f"trials {twin} and {trial} of {dataset} have the same known classes, as published: "
            f"distinct_trials({dataset!r}) leaves repetitions out",
            stacklevel=2,
        )
    if dataset in _CIFAR100_UNKNOWN:
        return list(known), list(_CIFAR100_UNKNOWN[dataset][trial])
    return list(known), [label for label in range(_N_CLASSES[dataset]) if label not in known]


def distinct_trials(dataset: str) -> list[int]:
    """The trials whose known classes no earlier trial has.

    Trials 0 and 1 coincide for `cifar10` and for `svhn`. For `cifar+10` and `cifar+50` trials 1 and 2 share their known
    classes, and their unknown ones differ in one of ten and in four of fifty.

    Raises:
        KeyError: If the data set has no trials.
    """
    _check(dataset)
    return [trial for trial in range(N_TRIALS) if _first_alike(dataset, trial) == trial]


def random_split(n_classes: int, n_known: int, seed: int) -> tuple[list[int], list[int]]:
    """Known and unknown classes at random: the first `n_known` of `np.random.default_rng(seed).permutation(n_classes)`.

    Returns:
        Known classes and the others, both rising.

    Raises:
        ValueError: If `n_known` is not from 1 to `n_classes - 1`.
    """
    if not 1 <= n_known < n_classes:
        raise ValueError(f"n_known must be at least 1 and below n_classes={n_classes}, got {n_known}")
    order = np.random.default_rng(seed).permutation(n_classes)
    return sorted(order[:n_known].tolist()), sorted(order[n_known:].tolist())


@dataclass(frozen=True)
class Trial:
    """Which classes are known and which are not.

    Args:
        name: As settings name it, `cifar10:2` or `random:6:0`; or `data.classes`, where these say what is known.
        known: Label numbers.
        unknown: Label numbers; those of CIFAR-100 where the unknown classes are `elsewhere`.
    """

    name: str
    known: tuple[int, ...]
    unknown: tuple[int, ...]

    @property
    def number(self) -> int:
        """Of the trial, or the seed of a random one."""
        return 0 if self.name == "data.classes" else int(self.name.rpartition(":")[2])

    @property
    def protocol(self) -> str:
        """One of `DATASETS`, `random`, or `data.classes`."""
        return self.name.partition(":")[0]

    @property
    def elsewhere(self) -> bool:
        """Whether the unknown classes are those of CIFAR-100."""
        return self.protocol in _CIFAR100_UNKNOWN


def trials(name: str, data: str, n_classes: int) -> list[Trial]:
    """The trials of a name.

    Args:
        name: `cifar10:2`, one trial of the literature; `cifar10`, all five; `random:6:0`, six known classes drawn with
            seed 0; `random:6`, with seeds 0 to 4; `random`, the same with 60% of the classes known, as the
            literature has 6 of 10.
        data: `data.name` of the data. A `folder` is taken at its word where it has as many classes as the trials.
        n_classes: Number of classes of the data.

    Raises:
        ValueError: The name is not understood, or its trials do not fit the data.
    """
    match name.split(":"):
        case ["random", *rest] if len(rest) < 3 and all(part.isdecimal() for part in rest):
            n_known = int(rest[0]) if rest else round(0.6 * n_classes)
            seeds = [int(rest[1])] if len(rest) == 2 else range(N_TRIALS)
            found = [
                Trial(f"random:{n_known}:{seed}", *map(tuple, random_split(n_classes, n_known, seed))) for seed in seeds
            ]
        case [dataset, *rest] if dataset in DATASETS and len(rest) < 2 and all(part.isdecimal() for part in rest):
            _check_fits(dataset, data, n_classes)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # trials that coincide: whoever takes several leaves them out
                numbers = [int(rest[0])] if rest else range(N_TRIALS)
                found = [Trial(f"{dataset}:{number}", *map(tuple, split(dataset, number))) for number in numbers]
        case _:
            raise ValueError(
                f"an open-set split must be like cifar10:2, cifar10, random:6:0, random:6 or random, got {name!r}; "
                f"data sets with trials are {', '.join(DATASETS)}"
            )
    return [_checked(trial) for trial in found]


def own_trials(data: Data, classes: Sequence[str]) -> list[Trial]:
    """The trials to evaluate where none are asked for.

    The one that `data.classes` or `data.open_set` gives; else those of the data set, else random ones.

    Raises:
        ValueError: As `known_classes` and `trials`.
    """
    if data.classes is not None:
        known = known_classes(data, classes)
        return [_checked(Trial("data.classes", tuple(known), tuple(sorted(set(range(len(classes))) - set(known)))))]
    return trials(data.open_set or (data.name if data.name in DATASETS else "random"), data.name, len(classes))


def known_classes(data: Data, classes: Sequence[str]) -> list[int] | None:
    """Resolves `data.classes` or `data.open_set` to label numbers.

    Args:
        data: The settings. `data.classes` holds names or label numbers; what could be either, as 7 where there is a
            class folder `7`, is the name, and 1 where there is a class folder `01` is refused. `data.open_set` names
            one trial, as in `trials`.
        classes: All classes of the data set.

    Returns:
        Label numbers in the order given, or None where the settings ask for all classes.

    Raises:
        ValueError: A class that does not exist or is named twice, an empty list, or an open-set split that is not
            understood, is several trials, or does not fit the data.
    """
    if data.open_set is not None:
        found = trials(data.open_set, data.name, len(classes))
        if len(found) > 1:
            raise ValueError(f"data.open_set must be a single trial, such as {found[0].name}, got {data.open_set!r}")
        return list(found[0].known)
    if data.classes is None:
        return None
    known = [_label(wanted, classes) for wanted in data.classes]
    if not known or len(set(known)) < len(known):
        raise ValueError(f"data.classes {data.classes!r} must name at least one class, and none twice")
    return known


def load_known(data: Data, split: Literal["train", "test"]) -> ImageSet:
    """As `datasets.load`, with the images of `data.classes` or `data.open_set` alone, where one of the two is set.

    Raises:
        ValueError: As `known_classes`, or if no image is of these classes.
    """
    images = load(data, split)
    known = known_classes(data, images.classes)
    return images if known is None else images.only(known)


def load_labeled(data: Data, fraction: float = 1.0, seed: int = 0) -> ImageSet:
    """As `load_known` of the training images, for a training on labels.

    Args:
        data: The settings.
        fraction: Share of each class that keeps its labels, in (0, 1]; the others' are -1.
        seed: Of the draw of those images.

    Raises:
        ValueError: As `load_known`; or no image has a label, all are of one class, or a known class has no image here.
    """
    images = load_known(data, "train")
    if not (images.labels >= 0).any():
        raise ValueError(f"{images.name} has no labels, and this training needs them: a folder has one a class folder")
    present = np.unique(images.labels[images.labels >= 0])
    missing = set(known_classes(data, images.classes) or range(len(images.classes))) - set(present.tolist())
    if missing:
        names = [images.classes[label] for label in sorted(missing)]
        raise ValueError(f"{images.name} has no image of the classes {names}: add some, or name others as data.classes")
    if len(present) < 2:
        raise ValueError(f"{images.name} has images of the class {images.classes[present[0]]!r} alone, two are needed")
    return images if fraction == 1 else images.with_few_labels(fraction, seed)


def pretraining(
    config: Mapping[str, Any] | None,
    data: Data,
    classes: Sequence[str],
    known: Sequence[int],
    unknown: Sequence[int] = (),
) -> str:
    """What an encoder saw of the known and unknown classes in pretraining, by the config.yaml of its run.

    Args:
        config: What config.yaml holds, None for an encoder that is from no run.
        data: Settings of the data that it is evaluated on. Folders of the same name count as the same data, wherever
            they lie.
        classes: All classes of that data set, of which some are `known`.
        unknown: The unknown ones, where they are of the same data set.

    Returns:
        `KNOWN_ONLY`, `ALL_CLASSES`, `ALL_LABELED`, `FURTHER_CLASSES`, `NOT_OUR_RUN`, or `other data (NAME)`. Of a run
        that began from another one's weights, which may have seen anything, it says so.

    Raises:
        ValueError: If it saw part of this data set's classes, and they are not the known ones: the trial is another
            run's.
    """
    if config is None or "data" not in config:
        return NOT_OUR_RUN
    given = {name: config["data"].get(name) for name in ("name", "root", "classes", "open_set")}
    of_run = replace(data, download=False, **given)
    after = f", begun from {config['init']}" if config.get("init") else ""
    if data_name(of_run) != data_name(data):
        return f"other data ({data_name(of_run)}){after}"
    seen = known_classes(of_run, classes)
    seen = range(len(classes)) if seen is None else seen
    if set(seen) == set(known):
        return f"{KNOWN_ONLY}{after}"
    if set(seen) >= {*known, *unknown}:
        method = config.get("method")
        labeled = isinstance(method, dict) and method.get("name") == "supcon"
        all_classes = ALL_LABELED if labeled else ALL_CLASSES
        return f"{all_classes if unknown else FURTHER_CLASSES}{after}"
    raise ValueError(
        f"the run was pretrained on the classes {sorted(seen)} alone, but known are {sorted(known)}: evaluate it on "
        "its own trial, as is done where no other is asked for, or take a run that was pretrained on all classes"
    )


def data_name(data: Data) -> str:
    """What results call a data set: folders by their last name."""
    return f"folder:{Path(data.root).expanduser().resolve().name}" if data.name == "folder" else data.name


def _label(wanted: int | str, classes: Sequence[str]) -> int:
    if str(wanted) in classes:
        return classes.index(str(wanted))
    alike = [name for name in classes if name.isdecimal() and name.isascii() and str(int(name)) == str(wanted)]
    if alike:  # YAML reads 01 as 1, unless it is quoted
        raise ValueError(
            f"data.classes has {wanted!r}, the class {alike[0]!r} or the one of that number? Give it by its name, in "
            "quotes"
        )
    if str(wanted) in map(str, range(len(classes))):
        return int(wanted)
    names = ", ".join(classes[:20]) + (" ..." if len(classes) > 20 else "")
    raise ValueError(f"data.classes has {wanted!r}, neither a class nor its number; the classes are {names or 'none'}")


def _checked(trial: Trial) -> Trial:
    if len(trial.known) < 2 or not trial.unknown:
        raise ValueError(
            f"the split does not fit: {trial.name} has {len(trial.known)} known and {len(trial.unknown)} unknown "
            "classes, at least 2 and 1 are needed"
        )
    return trial


def _check_fits(dataset: str, data: str, n_classes: int) -> None:
    """Refuses trials whose label numbers do not hold for the data."""
    if data not in ("folder", *_NUMBERED_ALIKE.get(dataset, ())):
        raise ValueError(
            f"the split does not fit: {data} does not number its classes as {dataset} does; random ones, such as "
            "random:6:0, fit all data"
        )
    if n_classes != _N_CLASSES[dataset]:
        raise ValueError(
            f"the split does not fit: {dataset} is for {_N_CLASSES[dataset]} classes, the data set has {n_classes}"
        )


def _check(dataset: str) -> None:
    if dataset not in _KNOWN:
        raise KeyError(f"dataset {dataset!r} has no open-set trials: use random_split, or one of {', '.join(DATASETS)}")


def _first_alike(dataset: str, trial: int) -> int:
    sets = [frozenset(known) for known in _KNOWN[dataset]]
    return sets.index(sets[trial])
