"""Which classes are known and which are unknown: the literature's open-set trials and random ones.

The five trials of each data set are those of ARPL (Chen et al., 2021), copied by "Open-Set
Recognition: a Good Closed-Set Classifier is All You Need?" (Vaze et al., 2022) and by GradMix's
authors; the three lists were compared and are equal. Train on the training images of the known
classes; test on the test images of the known and unknown classes (for TinyImageNet, its validation
images).

| data set       | known                   | unknown               |
|----------------|-------------------------|-----------------------|
| `mnist`        | 6 of 10 digits          | the other 4           |
| `svhn`         | 6 of 10 digits          | the other 4           |
| `cifar10`      | 6 of 10 classes         | the other 4           |
| `cifar+10`     | 4 classes of CIFAR-10   | 10 of CIFAR-100       |
| `cifar+50`     | 4 classes of CIFAR-10   | 50 of CIFAR-100       |
| `tinyimagenet` | 20 of 200 classes       | the other 180         |

Some trials coincide, as published: 0 and 1 of `cifar10` and of `svhn`; the known classes of 1 and 2
of `cifar+10` and of `cifar+50`, whose unknown classes differ in one of ten and four of fifty. A
mean over all five counts such a set twice, and its spread is too small. CIFAR+10 and CIFAR+50 are
often described as vehicles against animals; only trial 4 is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Literal

import numpy as np

from ssl_gradmix.data.datasets import Data, ImageSet, folder_name, load

# In the order of the papers' code, where the position of a class is its training label.
_TABLE = json.loads((resources.files(__package__) / "open_set.json").read_text("utf-8"))
_KNOWN: dict[str, list[list[int]]] = _TABLE["known"]
_CIFAR100_UNKNOWN: dict[str, list[list[int]]] = _TABLE["unknown of CIFAR-100"]
_CIFAR: dict[int, list[str]] = {len(names): names for names in _TABLE["classes of CIFAR"]}
"""Class names of CIFAR-10 and CIFAR-100, in the order of their numbers."""

_N_CLASSES = dict.fromkeys(_KNOWN, 10) | {"tinyimagenet": 200}
"""Number of classes of the data set that contains the known classes."""

_DIGITS = ("digits", "mnist", "svhn")
_SAME_LABELS = {
    "mnist": _DIGITS,
    "svhn": _DIGITS,
    "cifar10": ("cifar10",),
    "cifar+10": ("cifar10",),
    "cifar+50": ("cifar10",),
    "tinyimagenet": (),
}
"""The values of `data.name`, besides `folder`, whose labels are those of the trials."""

DATASETS = tuple(_KNOWN)
"""The data sets that have trials."""

N_TRIALS = 5

KNOWN_ONLY = "known classes only"
ALL_CLASSES = "all classes, unlabeled"
ALL_LABELED = "all classes, labeled"
FURTHER_CLASSES = "known and further classes, none unknown"
NOT_OUR_RUN = "unknown (not our run)"
"""Results of `pretraining`."""


@dataclass(frozen=True)
class Trial:
    """Known and unknown classes.

    Args:
        name: `cifar10:2` or `random:6:0`, as in settings; `data.classes` if that setting names the
            known classes.
        known: Labels of the known classes, in the papers' order for their trials.
        unknown: Labels of the unknown classes; labels of CIFAR-100 if they are `elsewhere`.
    """

    name: str
    known: tuple[int, ...]
    unknown: tuple[int, ...]

    @property
    def number(self) -> int:
        """Number of the trial, or the seed of a random one."""
        return 0 if self.name == "data.classes" else int(self.name.rpartition(":")[2])

    @property
    def protocol(self) -> str:
        """One of `DATASETS`, `random`, or `data.classes`."""
        return self.name.partition(":")[0]

    @property
    def elsewhere(self) -> bool:
        """Whether the unknown classes are classes of CIFAR-100."""
        return self.protocol in _CIFAR100_UNKNOWN


def published_numbers(classes: Sequence[str]) -> list[int]:
    """The numbers of classes in published lists, which go by number.

    Classes are matched if they are named by their numbers (`0` or `007`), as in CIFAR-10 or
    CIFAR-100, or, 200 of them, by the WordNet numbers of TinyImageNet.

    Returns:
        The published number of each class.

    Raises:
        ValueError: The classes have other names.
    """
    order = list(range(len(classes)))
    if all(name.isdecimal() and int(name) == number for number, name in enumerate(classes)):
        return order
    if len(classes) == 200 and all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return order
    names = [re.sub(r"[\W_]+", "_", name).lower() for name in classes]
    cifar = _CIFAR.get(len(classes), [])
    if sorted(names) == sorted(cifar):
        return [cifar.index(name) for name in names]
    raise ValueError(
        f"data: the published classes are numbered, and {', '.join(classes[:3])}, ... cannot be "
        f"matched to numbers: name the class folders 0 to {len(classes) - 1}, or as CIFAR does"
    )


def trials(name: str, data_name: str, classes: Sequence[str] | int) -> list[Trial]:
    """The trials of a name.

    Args:
        name: `cifar10:2`, one trial of the literature, 0 to 4 (ARPL runs them from 4 to 0, so that
            column 0 of its results is trial 4); `cifar10`, all five; `random:6:0`, six known
            classes drawn with seed 0; `random:6`, with seeds 0 to 4; `random`, the same with 60%
            of the classes known, as the literature has 6 of 10.
        data_name: `data.name` of the data. The classes of a `folder` are matched to those of the
            literature by `published_numbers`.
        classes: All classes of the data, or only their number, with which those of a `folder` are
            trusted to be in the order of the literature.

    Raises:
        ValueError: The name is invalid, or its trials do not fit the data.
    """
    protocol, *numbers = name.split(":")
    longest = 2 if protocol == "random" else 1
    if protocol not in ("random", *DATASETS) or len(numbers) > longest:
        raise ValueError(
            f"data.open_set must be like cifar10:2, cifar10, random:6:0, random:6 or random, got "
            f"{name!r}; the data sets with trials are {', '.join(DATASETS)}"
        )
    if not all(number.isdecimal() for number in numbers):
        raise ValueError(f"data.open_set must have numbers after the colons, got {name!r}")
    given = [int(number) for number in numbers]
    n_classes = classes if isinstance(classes, int) else len(classes)
    if protocol == "random":
        n_known = given[0] if given else round(0.6 * n_classes)
        return [_random_trial(n_classes, n_known, seed) for seed in given[1:] or range(N_TRIALS)]
    if data_name not in ("folder", *_SAME_LABELS[protocol]) or n_classes != _N_CLASSES[protocol]:
        raise ValueError(
            f"data.open_set {name!r} does not fit the {n_classes} classes of {data_name}; random "
            "trials, such as random:6:0, fit all data"
        )
    order: Sequence[int] = range(n_classes)
    if data_name == "folder" and not isinstance(classes, int):
        order = published_numbers(classes)
    return [_published_trial(protocol, number, order) for number in given or range(N_TRIALS)]


def _random_trial(n_classes: int, n_known: int, seed: int) -> Trial:
    """Takes the first `n_known` of `np.random.default_rng(seed).permutation(n_classes)`."""
    if not 2 <= n_known < n_classes:
        raise ValueError(
            f"data.open_set must have at least 2 known and 1 unknown of {n_classes} classes, got "
            f"{n_known} known"
        )
    order = np.random.default_rng(seed).permutation(n_classes).tolist()
    known, unknown = tuple(sorted(order[:n_known])), tuple(sorted(order[n_known:]))
    return Trial(f"random:{n_known}:{seed}", known, unknown)


def _published_trial(protocol: str, number: int, order: Sequence[int]) -> Trial:
    """A trial of the literature; `order` has the published number of each label."""
    if number >= N_TRIALS:
        raise ValueError(
            f"data.open_set {protocol} has the trials 0 to {N_TRIALS - 1}, got {number}"
        )
    known = [order.index(published) for published in _KNOWN[protocol][number]]
    if protocol in _CIFAR100_UNKNOWN:
        unknown = _CIFAR100_UNKNOWN[protocol][number]
    else:
        unknown = [label for label in range(_N_CLASSES[protocol]) if label not in known]
    return Trial(f"{protocol}:{number}", tuple(known), tuple(unknown))


def own_trials(data: Data, classes: Sequence[str]) -> list[Trial]:
    """The trials to evaluate by default.

    The one of `data.classes` or `data.open_set`, else those of the data set, else random ones.

    Raises:
        ValueError: As `known_classes` and `trials`, or fewer than 2 known or 1 unknown classes.
    """
    if data.classes is None:
        default = data.name if data.name in DATASETS else "random"
        return trials(data.open_set or default, data.name, classes)
    known = known_classes(data, classes) or []
    unknown = sorted(set(range(len(classes))) - set(known))
    if len(known) < 2 or not unknown:
        raise ValueError(
            f"data.classes must leave at least 2 known and 1 unknown class, got {len(known)} known "
            f"of {len(classes)}"
        )
    return [Trial("data.classes", tuple(known), tuple(unknown))]


def known_classes(data: Data, classes: Sequence[str]) -> list[int] | None:
    """Resolves `data.classes` or `data.open_set` to labels.

    Args:
        data: The settings. An entry of `data.classes` that could be a name or a number is a name.
        classes: All classes of the data set.

    Returns:
        Labels in the order given, or None if the settings ask for all classes.

    Raises:
        ValueError: A class does not exist or is repeated, the list is empty, or `data.open_set` is
            invalid, names several trials, or does not fit the data.
    """
    if data.open_set is not None:
        found = trials(data.open_set, data.name, classes)
        if len(found) > 1:
            raise ValueError(f"data.open_set must be a single trial, such as {found[0].name}")
        return list(found[0].known)
    if data.classes is None:
        return None
    known = [_label(wanted, classes) for wanted in data.classes]
    if not known or len(set(known)) < len(known):
        raise ValueError(
            f"data.classes must name at least one class and none twice: {data.classes}"
        )
    return known


def _label(wanted: str, classes: Sequence[str]) -> int:
    if wanted in classes:
        return classes.index(wanted)
    if any(name.isdecimal() and str(int(name)) == wanted for name in classes):
        # An integer of Python or of another program's YAML may have been 01.
        raise ValueError(f"data.classes has {wanted!r}: write class names in full, such as '01'")
    if wanted.isdecimal() and int(wanted) < len(classes):
        return int(wanted)
    names = ", ".join(classes[:20])
    raise ValueError(f"data.classes has {wanted!r}, not a class or its number; classes: {names}")


def load_known(data: Data, split: Literal["train", "test", "all"]) -> ImageSet:
    """As `datasets.load`, with only the images of `data.classes` or `data.open_set`, if given.

    Raises:
        ValueError: As `known_classes`, or if these classes have no images.
    """
    images = load(data, split)
    known = known_classes(data, images.classes)
    return images if known is None else images.only(known)


def load_labeled(data: Data, fraction: float = 1.0, seed: int = 0) -> ImageSet:
    """As `load_known` for the training split, for a training with labels.

    Args:
        data: The settings.
        fraction: Fraction of each class that keeps its labels, in (0, 1]; others get -1.
        seed: Seed of the draw of these images.

    Raises:
        ValueError: As `load_known`, or fewer than two classes, or a known class without images.
    """
    images = load_known(data, "train")
    present = set(images.labels[images.labels >= 0].tolist())
    known = known_classes(data, images.classes) or range(len(images.classes))
    if missing := [images.classes[label] for label in known if label not in present]:
        raise ValueError(f"data.classes has classes without images in {images.name}: {missing}")
    if len(present) < 2:
        raise ValueError(f"data: {images.name} must have labels of at least 2 classes")
    return images if fraction == 1 else images.with_few_labels(fraction, seed)


def pretraining(
    config: Mapping[str, Any] | None,
    data: Data,
    classes: Sequence[str],
    known: Sequence[int],
    unknown: Sequence[int] = (),
) -> str:
    """What an encoder saw of the known and unknown classes during pretraining.

    Args:
        config: Content of the run's config.yaml; None for an encoder that is not from a run.
        data: Settings of the evaluated data. Folders of the same name count as the same data.
        classes: All classes of the evaluated data.
        known: Labels of the known classes.
        unknown: Labels of the unknown classes, if they are in the same data set.

    Returns:
        `KNOWN_ONLY`, `ALL_CLASSES`, `ALL_LABELED`, `FURTHER_CLASSES`, `NOT_OUR_RUN`, or
        `other data (NAME)`. Runs initialized from another run are marked as such, because that run
        may have seen any class.

    Raises:
        ValueError: The encoder saw only part of the classes, and these are not the known ones: it
            was trained for another trial.
    """
    if config is None or "data" not in config:
        return NOT_OUR_RUN
    fields = {name: config["data"].get(name) for name in ("name", "root", "classes", "open_set")}
    run_data = replace(data, **fields)
    after = f", begun from {config['init']}" if config.get("init") else ""
    if data_name(run_data) != data_name(data):
        return f"other data ({data_name(run_data)}){after}"
    seen = set(known_classes(run_data, classes) or range(len(classes)))
    if seen == set(known):
        return f"{KNOWN_ONLY}{after}"
    if not seen >= {*known, *unknown}:
        raise ValueError(
            f"the run was pretrained only on the classes {sorted(seen)}, but the known classes are "
            f"{sorted(known)}: evaluate it on its own trial, or use a run that saw all classes"
        )
    all_classes = ALL_LABELED if config.get("recipe") == "supcon" else ALL_CLASSES
    return f"{all_classes if unknown else FURTHER_CLASSES}{after}"


def data_name(data: Data) -> str:
    """Name of a data set in results, for instance `cifar10` or `folder:pets`."""
    return folder_name(data.root or "") if data.name == "folder" else data.name
