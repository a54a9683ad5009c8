"""Which test images are known and which unknown: trials within a data set, or another data set against it.

And whether the encoder saw the unknown classes in pretraining, which decides what a result means.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_gradmix.data import open_set
from ssl_gradmix.data.datasets import ImageSet, has_splits, known_classes, load
from ssl_gradmix.settings import Data

ELSEWHERE = ("cifar+10", "cifar+50")
"""Protocols whose unknown classes are of another data set, CIFAR-100."""

KNOWN_ONLY = "known classes only"
ALL_CLASSES = "all classes, unlabeled"
FURTHER_CLASSES = "known and further classes, none unknown"
NOT_OUR_RUN = "unknown (not our run)"

Labeled = tuple[Tensor, Tensor]
"""Features (N, D) and labels (N,)."""


@dataclass(frozen=True)
class Trial:
    """Which classes are known and which are not.

    Args:
        number: Of the trial in its protocol, or the seed of a random one. None where the unknown images are those of
            another data set, whatever their class.
        known: Label numbers.
        unknown: Label numbers, of CIFAR-100 for the protocols `ELSEWHERE`.
    """

    number: int | None
    known: tuple[int, ...]
    unknown: tuple[int, ...]


@dataclass(eq=False)
class Group:
    """Test images of known classes against unknown ones: a trial, or another data set.

    Args:
        name: What results of it are kept under, for instance `trial0` or `svhn`.
        trial: Which classes are known.
        images: Where the unknown images are: the test images themselves, or another set.
        is_unknown: Boolean, which of `images` they are.
        params: What result rows say of it.
    """

    name: str
    trial: Trial
    images: ImageSet
    is_unknown: np.ndarray
    params: dict[str, Any]

    def check(self, train: ImageSet, test: ImageSet) -> None:
        """Makes sure that there are images of all kinds.

        Raises:
            ValueError: If a known class has no training image, or no test image is known, or none unknown.
        """
        missing = sorted(set(self.trial.known) - set(train.labels.tolist()))
        if missing:
            raise ValueError(f"{self.name}: {train.name} has no image of the known classes {missing}")
        if not np.isin(test.labels, self.trial.known).any():
            raise ValueError(f"{self.name}: {test.name} has no image of the known classes {list(self.trial.known)}")
        if not self.is_unknown.any():
            raise ValueError(f"{self.name}: {self.images.name} has no image of an unknown class")

    def fingerprint(self, test: ImageSet) -> str:
        """Of the test images and labels compared, in their order; of files by folder, name and size."""
        digest = hashlib.sha256()
        for images in (test.only(self.trial.known), self.images.subset(self.is_unknown)):
            digest.update(np.ascontiguousarray(images.labels))
            if isinstance(images.images, np.ndarray):
                digest.update(np.ascontiguousarray(images.images))
            else:
                for path in images.images:
                    digest.update(f"{path.parent.name}/{path.name} {path.stat().st_size}\n".encode())
        return digest.hexdigest()[:32]

    def select(self, train: Labeled, test: Labeled, unknown: Labeled) -> tuple[Labeled, Labeled, Tensor]:
        """Picks out of the features of all training images, all test images, and `images`.

        Returns:
            Those of known training images; those of known test images, then of unknown ones; and which of the latter
            are known, boolean.
        """
        of_known = [torch.isin(labels, labels.new_tensor(self.trial.known)) for _, labels in (train, test)]
        is_unknown = torch.from_numpy(self.is_unknown).to(of_known[1].device)
        known_train, known_test, unknown_test = (
            (features[chosen], labels[chosen])
            for (features, labels), chosen in zip((train, test, unknown), (*of_known, is_unknown), strict=True)
        )
        features, labels = (torch.cat(both) for both in zip(known_test, unknown_test, strict=True))
        return known_train, (features, labels), torch.arange(len(labels), device=labels.device) < len(known_test[1])


def choose_trials(
    data: Data,
    classes: Sequence[str],
    protocol: str = "auto",
    numbers: Sequence[int] | None = None,
    n_known: int | None = None,
) -> tuple[str, list[Trial]]:
    """Resolves the trials that a user asks for.

    Args:
        data: Settings of the data. With `auto`, `data.classes` or `data.open_set` say what is known.
        classes: All classes of the data set.
        protocol: One of `open_set.DATASETS`, or `random`. `auto` takes `data.classes` for the known ones, else the
            trial of `data.open_set`, else the protocol of the data set's name, else `random`.
        numbers: Trials, or seeds of random ones. None takes 0 to 4.
        n_known: Number of known classes of a random trial. None takes 60%, as the literature has 6 of 10.

    Returns:
        The protocol, or `data.classes`, and its trials.

    Raises:
        ValueError: If the split does not fit the data, there is no such trial, or fewer than two classes are known or
            none unknown.
    """
    if protocol == "auto" and data.classes is not None:
        if numbers is not None or n_known is not None:
            raise ValueError("trials and n_known need a protocol: with auto the known classes are data.classes")
        known = known_classes(data, classes)
        return "data.classes", [_trial(0, known, sorted(set(range(len(classes))) - set(known)))]
    with _coincidence_unsaid():
        if protocol == "auto" and data.open_set is not None:
            known_classes(data, classes)  # raises where the setting makes no sense
            protocol, *size, number = data.open_set.split(":")
            numbers = [int(number)] if numbers is None else numbers
            n_known = int(size[0]) if size and n_known is None else n_known
        if protocol == "auto":
            protocol = data.name if data.name in open_set.DATASETS else "random"
        numbers = list(range(open_set.N_TRIALS) if numbers is None else numbers)
        if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
            raise ValueError(f"trials must be at least one, 0 or above, and none twice, got {numbers}")
        if protocol == "random":
            n_known = round(0.6 * len(classes)) if n_known is None else n_known
            splits = [open_set.random_split(len(classes), n_known, number) for number in numbers]
        else:
            if n_known is not None:
                raise ValueError(f"n_known is for the protocol random, got {n_known} with {protocol}")
            open_set.check_fits(protocol, data.name, len(classes))
            splits = [open_set.split(protocol, number) for number in numbers]
    return protocol, [_trial(number, *split) for number, split in zip(numbers, splits, strict=True)]


def distinct(trials: Sequence[Trial]) -> list[int]:
    """Numbers of the trials whose known classes no earlier one has, as a mean over all would count a set twice.

    As `open_set.distinct_trials`, for random trials too, of which few differ where classes are few.
    """
    first: dict[frozenset[int], int] = {}
    for trial in trials:
        first.setdefault(frozenset(trial.known), trial.number)
    return list(first.values())


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
        classes: All classes of that data set.
        known: The known classes.
        unknown: The unknown ones, where they are of the same data set.

    Returns:
        `KNOWN_ONLY`, `ALL_CLASSES`, `FURTHER_CLASSES`, `NOT_OUR_RUN`, or `other data (NAME)`.

    Raises:
        ValueError: If it saw part of this data set's classes, and they are not the known ones: the trial is another
            run's.
    """
    if config is None or "data" not in config:
        return NOT_OUR_RUN
    of_run = replace(
        data,
        download=False,
        **{name: config["data"].get(name) for name in ("name", "root", "classes", "open_set")},
    )
    if data_name(of_run) != data_name(data):
        return f"other data ({data_name(of_run)})"
    with _coincidence_unsaid():
        seen = known_classes(of_run, classes)
    seen = range(len(classes)) if seen is None else seen
    if set(seen) == set(known):
        return KNOWN_ONLY
    if set(seen) >= {*known, *unknown}:
        return ALL_CLASSES if unknown else FURTHER_CLASSES
    raise ValueError(
        f"the run was pretrained on the classes {sorted(seen)} alone, but known are {sorted(known)}: evaluate it on "
        "its own trial, as is done where no other is asked for, or take a run that was pretrained on all classes"
    )


def trial_groups(
    protocol: str,
    trials: Sequence[Trial],
    data: Data,
    test: ImageSet,
    images: ImageSet,
    config: Mapping[str, Any] | None,
) -> list[Group]:
    """The images of trials.

    Args:
        protocol: What `choose_trials` gives, as `trials`.
        trials: Its trials.
        data: Settings of the data.
        test: Its test images, of all classes.
        images: Where the unknown ones are: `test`, or for the protocols `ELSEWHERE` what `load_cifar100` gives.
        config: As in `pretraining`.

    Raises:
        ValueError: As `pretraining`.
    """
    groups = []
    for trial in trials:
        unknown_here = trial.unknown if images is test else ()
        params = {
            "protocol": protocol,
            "pretraining": pretraining(config, data, test.classes, trial.known, unknown_here),
            "n_known": len(trial.known),
            **({} if images is test else {"unknown": images.name}),
        }
        is_unknown = np.isin(images.labels, trial.unknown)
        groups.append(Group(f"trial{trial.number}", trial, images, is_unknown, params))
    return groups


def set_groups(data: Data, test: ImageSet, config: Mapping[str, Any] | None, others: Sequence[Data]) -> list[Group]:
    """The test images of a data set, of those classes that the settings name, against each of other sets.

    Args:
        data: Settings of the data.
        test: Its test images, of all classes.
        config: As in `pretraining`.
        others: Settings of the other sets. Of a folder that has neither train/ nor test/, all images are taken.

    Raises:
        ValueError: If there are no other sets, one is named twice or has known images, or fewer than two classes are
            known, and as `pretraining`.
    """
    with _coincidence_unsaid():
        known = known_classes(data, test.classes)
    known = list(range(len(test.classes))) if known is None else known
    if len(known) < 2:
        raise ValueError(f"at least two known classes are needed, {test.name} has {[test.classes[i] for i in known]}")
    names = [data_name(other) for other in others]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"unknown must be at least one data set, and none twice, got {names}")
    groups = []
    for name, other in zip(names, others, strict=True):
        images = load_unknown(other)
        unknown_here = np.unique(images.labels).tolist() if _same(data, other) else []
        if set(unknown_here) & set(known):
            raise ValueError(f"unknown: {images.name} has images of the known classes, as it is the same data")
        params = {
            "known": test.name,
            "pretraining": pretraining(config, data, test.classes, known, unknown_here),
            "n_known": len(known),
        }
        groups.append(Group(name, Trial(None, tuple(known), ()), images, np.ones(len(images), bool), params))
    return groups


def load_unknown(data: Data) -> ImageSet:
    """Loads the test images of another data set, or all images of a folder that has neither train/ nor test/.

    Raises:
        ValueError: If they cannot be had.
    """
    try:
        if data.name != "folder" or has_splits(Path(data.root).expanduser()):
            images = load(data, "test")
        else:
            images = load(data, "train")
            if images.classes:  # some were held out
                rest = load(data, "test")
                labels = np.concatenate([images.labels, rest.labels])
                images = replace(images, images=[*images.images, *rest.images], labels=labels)
            images = replace(images, name=f"{data_name(data)}/all")
        wanted = known_classes(data, images.classes)
    except (OSError, ValueError) as error:
        raise ValueError(f"unknown: {error}") from error
    return images if wanted is None else images.only(wanted)


def load_cifar100(data: Data, others: Sequence[Data] | None) -> ImageSet:
    """Loads the test images that have the unknown classes of the protocols `ELSEWHERE`.

    Args:
        data: Settings of the known data. Where that is the data set `cifar10`, CIFAR-100 is looked for beside it.
        others: One data set, wherever else it is.

    Raises:
        ValueError: If it is not said where CIFAR-100 is, or the data set has not its number of classes.
    """
    if others is None and data.name == "cifar10":
        others = [Data("cifar100", data.root, download=data.download)]
    if others is None or len(others) != 1:
        raise ValueError(
            "the unknown classes are CIFAR-100's: say where it is, as --unknown.name cifar100 --unknown.root DIR"
        )
    images = load_unknown(replace(others[0], classes=None, open_set=None))
    if len(images.classes) != 100:
        raise ValueError(
            f"the split does not fit: {images.name} has {len(images.classes)} classes, and CIFAR-100, of which the "
            "unknown ones are, has 100"
        )
    return images


def data_name(data: Data) -> str:
    """What results call a data set: folders by their last name."""
    return f"folder:{Path(data.root).expanduser().resolve().name}" if data.name == "folder" else data.name


def _same(data: Data, other: Data) -> bool:
    if data.name != "folder" or other.name != "folder":
        return data.name == other.name
    return Path(data.root).expanduser().resolve() == Path(other.root).expanduser().resolve()


def _trial(number: int, known: Sequence[int], unknown: Sequence[int]) -> Trial:
    if len(known) < 2 or not unknown:
        raise ValueError(
            f"the split does not fit: trial {number} has {len(known)} known and {len(unknown)} unknown classes, "
            "at least 2 and 1 are needed"
        )
    return Trial(number, tuple(known), tuple(unknown))


@contextmanager
def _coincidence_unsaid() -> Iterator[None]:
    """Trials that coincide are said once, by who asks `distinct`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="trials .* have the same known classes")
        yield
