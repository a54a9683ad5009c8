"""How classifiers of frozen features hold up where test images are corrupted, and open-set scores with them.

Classifiers are fitted on clean training images. Each test image is then corrupted at severities 1 to 5, here or by
others (CIFAR-10-C, ImageNet-C), and the encoder sees it as any other. Means give every severity of a corruption equal
weight, then every corruption; errors are fractions. The 4 extra corruptions are in no mean with the common ones.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssl_gradmix.data.corruption_sets import read_cifar_c, read_imagenet_c
from ssl_gradmix.data.corruptions import (
    COMMON,
    EXTRA,
    GROUPS,
    SEVERITIES,
    SMALLEST_SIDE,
    corrupt,
    corrupt_batch,
    default_preset,
    frost_source,
)
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.evaluation import scores
from ssl_gradmix.evaluation.intervals import Interval, accuracy_interval, bootstrap_interval
from ssl_gradmix.evaluation.knn import knn_predict, used_k
from ssl_gradmix.evaluation.metrics import (
    ALEXNET_CLEAN_ERROR,
    ALEXNET_ERRORS,
    auroc,
    mean_corruption_error,
    relative_mce,
)
from ssl_gradmix.evaluation.probes import LinearProbe, label_subset
from ssl_gradmix.evaluation.results import Row, read_rows, results_folder
from ssl_gradmix.files import read_json

CLASSIFIERS = ("linear", "knn")
"""Scores of the metrics `accuracy` and `clean_accuracy`: the linear probe and weighted kNN."""

OPEN_SET_SCORES = ("knn_distance", "max_logit")
"""Scores of the metrics `auroc` and `clean_auroc`."""

GROUP_OF: dict[str, str] = {name: group for group, names in {**GROUPS, "extra": EXTRA}.items() for name in names}
"""Group of each corruption: `noise`, `blur`, `weather`, `digital`, or `extra`."""

_DECODED_AT_MOST = 4 * 2**30  # bytes


def choose_corruptions(names: Sequence[str] | None = None, extra: bool = False) -> list[str]:
    """The corruptions to evaluate, in the benchmark's order.

    Args:
        names: Those wanted; None is the 15 common ones.
        extra: Add the 4 extra ones.

    Raises:
        ValueError: If there is none, or one is unknown.
    """
    wanted = {*(COMMON if names is None else names), *(EXTRA if extra else ())}
    unknown = sorted(wanted - GROUP_OF.keys())
    if unknown or not wanted:
        problem = f"unknown corruption {unknown[0]!r}" if unknown else "corruptions must name at least one"
        raise ValueError(f"{problem}; there are {', '.join(COMMON + EXTRA)}")
    return [name for name in COMMON + EXTRA if name in wanted]


def check_can_make(names: Iterable[str]) -> None:
    """Raises ValueError if one of these corruptions needs a library that is not installed."""
    for name in names:
        try:
            corrupt(np.zeros((SMALLEST_SIDE, SMALLEST_SIDE, 3), np.uint8), name, severity=1)
        except ImportError as error:
            raise ValueError(f"cannot make {name}: {error}") from error


@dataclass(frozen=True)
class Selection:
    """Which test images are evaluated.

    Args:
        classes: Labels to keep; None keeps all.
        count: About how many images, the same share of each class and at least one; None takes all.
        seed: Of that draw.
    """

    classes: Sequence[int] | None = None
    count: int | None = None
    seed: int = 0

    def numbers(self, images: ImageSet) -> np.ndarray:
        """Numbers of the selected images in a whole test set, ascending; unlabeled ones are never selected.

        Raises:
            ValueError: If no image is labeled, none is of these classes, or there are fewer than `count`.
        """
        kept = images.labels >= 0
        if not kept.any():
            raise ValueError(
                f"{images.name} has no labels, this evaluation needs them: a folder has one a class folder"
            )
        if self.classes is not None:
            kept &= np.isin(images.labels, self.classes)
        numbers = np.flatnonzero(kept)
        if len(numbers) == 0:
            raise ValueError(f"{images.name} has no image of the classes {list(self.classes)}")
        if self.count is None:
            return numbers
        if not 1 <= self.count <= len(numbers):
            raise ValueError(f"images must be 1 to the {len(numbers)} of {images.name}, got {self.count}")
        labels = torch.from_numpy(images.labels[numbers])
        return numbers[label_subset(labels, self.count / len(numbers), self.seed).numpy()]


@dataclass(eq=False)
class CorruptedImages:
    """Images that are corrupted when their pixels are asked for, at the size asked for.

    This is what `features.extract` reads of an `ImageSet`. The noise of an image depends on its number, which it keeps
    in every subset, so neither batches nor processes change it. There is no attribute `images`, so that features cannot
    be cached by mistake under the fingerprint of the clean images.

    Args:
        clean: The images.
        numbers: (N,), their numbers in the whole set.
        corruption: As `name` in `corruptions.corrupt`.
        severity: As there.
        preset: As there.
        seed: As there.
        workers: Processes that share the work.
    """

    clean: ImageSet
    numbers: np.ndarray
    corruption: str
    severity: int
    preset: str
    seed: int = 0
    workers: int = 1

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,)."""
        return self.clean.labels

    @property
    def name(self) -> str:
        """The clean images' name."""
        return self.clean.name

    def subset(self, indices: Sequence[int] | np.ndarray) -> CorruptedImages:
        """Takes the images at `indices`, in that order."""
        return replace(self, clean=self.clean.subset(indices), numbers=self.numbers[indices])

    def pixels(self, size: int, progress: bool = True) -> Tensor:
        """Corrupted pixels, uint8 (N, 3, size, size)."""
        clean = self.clean.pixels(size, progress).permute(0, 2, 3, 1).contiguous().numpy()
        corrupted = corrupt_batch(
            clean, self.corruption, self.severity, self.seed, self.numbers, self.preset, self.workers
        )
        return torch.from_numpy(corrupted).permute(0, 3, 1, 2).contiguous()


class Generated:
    """A corrupted set made on the fly.

    Args:
        test: All clean test images.
        selection: Which of them.
        size: Side of the encoder's images in pixels, at which they are corrupted.
        preset: As in `corruptions.corrupt`; None takes `corruptions.default_preset(size)`.
        seed: As in `corruptions.corrupt`.
        workers: Processes that share the work.
    """

    def __init__(
        self,
        test: ImageSet,
        selection: Selection,
        size: int,
        preset: str | None = None,
        seed: int = 0,
        workers: int = 1,
    ) -> None:
        self.numbers = selection.numbers(test)
        self.clean = _decoded(test.subset(self.numbers), size)
        self.preset, self.seed, self.workers = preset or default_preset(size), seed, workers

    def read(self, name: str, severity: int) -> CorruptedImages:
        """The selected images with one corruption at one severity."""
        return CorruptedImages(self.clean, self.numbers, name, severity, self.preset, self.seed, self.workers)

    def origin(self) -> dict[str, object]:
        """What results say of it."""
        return {"source": "generated", "preset": self.preset, "seed": self.seed, "frost_source": frost_source()}

    def fingerprint(self) -> None:
        """None: images are fingerprinted clean, and `origin` says the rest."""


class Published:
    """A corrupted set on disk: CIFAR-10-C's arrays, as `make_c` writes them too, or ImageNet-C's folders.

    Args:
        root: Its folder.
        test: All clean test images. Folders are matched to its classes by name, the labels of arrays by number.
        selection: Which images, as many of each class. In a set of another order than `test` they are other images.

    Raises:
        FileNotFoundError: If there is no such folder.
    """

    def __init__(self, root: str | Path, test: ImageSet, selection: Selection) -> None:
        self.root, self.test, self.selection = Path(root).expanduser(), test, selection
        if not self.root.is_dir():
            raise FileNotFoundError(f"no folder {str(root)!r} of published corruptions")

    def read(self, name: str, severity: int) -> ImageSet:
        """Reads the selected images with one corruption at one severity.

        Raises:
            FileNotFoundError: If something is missing.
            ValueError: If something is damaged or pickled, or there are not as many images of each class as in `test`.
        """
        if any(self.root.glob("*.npy")):
            images, labels = read_cifar_c(self.root, name, severity)
        else:
            images, labels, folders = read_imagenet_c(self.root, name, severity)
            labels = self._labels_of(folders)[labels]
        theirs, ours = Counter(labels.tolist()), Counter(self.test.labels[self.test.labels >= 0].tolist())
        if theirs != ours:
            label = min(label for label in theirs | ours if theirs[label] != ours[label])
            raise ValueError(
                f"the labels of {name} in {self.root} do not fit {self.test.name}: it has {theirs[label]} images of "
                f"class {label}, not {ours[label]}; --data must be what it was made from"
            )
        whole = ImageSet(images, labels, self.test.classes, self.test.name)
        return whole.subset(self.selection.numbers(whole))

    def origin(self) -> dict[str, object]:
        """What results say of it; preset, seed and frost textures where `make_c` wrote a meta.json.

        Raises:
            ValueError: If that file is damaged.
        """
        path = self.root / "meta.json"
        if not path.exists():
            return {"source": "published"}
        try:
            meta = read_json(path)
            return {"source": "published", **{key: meta[key] for key in ("preset", "seed", "frost_source")}}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged, or not by make_c: {error!r}") from error

    def fingerprint(self) -> str:
        """Changes with the arrays' sizes and times, or with what the folders of severities list."""
        digest = hashlib.sha256()
        for path in sorted([*self.root.glob("*.npy"), *self.root.glob("*/[1-5]")]):
            status = path.stat()
            digest.update(os.fsencode(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n"))
        return digest.hexdigest()[:32]

    def _labels_of(self, folders: Sequence[str]) -> np.ndarray:
        labels = {name: label for label, name in enumerate(self.test.classes)}
        strange = [name for name in folders if name not in labels]
        if strange:
            raise ValueError(
                f"{self.root} has a class {strange[0]!r}, which {self.test.name} has not: --data must be what it was "
                "made from"
            )
        return np.array([labels[name] for name in folders])


class Measurement(NamedTuple):
    """A number about some images, in the terms of `results.Row`."""

    score: str
    metric: str
    interval: Interval
    n: int
    params: dict[str, float | None]


@dataclass(eq=False)
class Classifiers:
    """A linear probe and weighted kNN on clean training features, and the open-set scores that go with them.

    Args:
        probe: The linear probe.
        features: (N, D), what it was trained on, and kNN looks among.
        labels: (N,).
        k: Neighbors of kNN.
        temperature: Of kNN.
        open_set: Whether images of classes that are none of `labels` are to be told from the others.
    """

    probe: LinearProbe
    features: Tensor
    labels: Tensor
    k: int = 20
    temperature: float = 0.07
    open_set: bool = False

    def measure(self, features: Tensor, labels: Tensor) -> list[Measurement]:
        """How the classifiers do on images.

        Args:
            features: (M, D) of the images.
            labels: (M,), their classes. With `open_set` some must be of the training classes and some not, else all of
                them must.

        Returns:
            `accuracy` of each of `CLASSIFIERS` on images of the training classes, with Wilson 95% interval; with
            `open_set` also `auroc` of each of `OPEN_SET_SCORES`, with bootstrap 95% interval.

        Raises:
            ValueError: If labels are not as above.
        """
        rate = {"learning_rate": self.probe.learning_rate}
        known = torch.isin(labels, self.probe.classes) if self.open_set else torch.ones_like(labels, dtype=torch.bool)
        asked, wanted = features[known], labels[known]
        linear = self.probe.accuracy(asked, wanted).top1
        nearest = knn_predict(asked, self.features, self.labels, self.k, self.temperature)
        votes = {"k": used_k(self.k, self.features), "temperature": self.temperature}
        measured = [
            Measurement("linear", "accuracy", accuracy_interval(linear), len(wanted), rate),
            Measurement("knn", "accuracy", accuracy_interval(nearest == wanted), len(wanted), votes),
        ]
        if self.open_set:
            distance = scores.knn_distance(self.features, self.labels, features)
            neighbor = scores.parameters_used(self.features, self.labels)["knn_distance"]
            logit = scores.max_logit(self.probe.logits(features))
            for score, values, params in (("knn_distance", distance, neighbor), ("max_logit", logit, rate)):
                interval = bootstrap_interval(auroc, values, known, strata=known)
                measured.append(Measurement(score, "auroc", interval, len(labels), params))
        return measured


@dataclass(frozen=True)
class Baseline:
    """Errors to compare with.

    Args:
        name: What results call it.
        errors: By score and corruption, one a severity or their mean.
        clean_error: By score.
    """

    name: str
    errors: Mapping[str, Mapping[str, float | Sequence[float]]]
    clean_error: Mapping[str, float]


ALEXNET = Baseline(
    "alexnet", dict.fromkeys(CLASSIFIERS, ALEXNET_ERRORS), dict.fromkeys(CLASSIFIERS, ALEXNET_CLEAN_ERROR)
)
"""AlexNet's errors on ImageNet-C, by which the benchmark's authors normalize."""


def read_baseline(
    where: str, names: Iterable[str], images: Mapping[str, object], feature: str = "backbone"
) -> Baseline:
    """Reads the errors of another run, or gives AlexNet's.

    Args:
        where: A run's folder, its `corruption.json`, or `alexnet`, which is for ImageNet's 1000 classes alone.
        names: The corruptions that it must have; extra ones are passed over.
        images: What is evaluated: the file must say the same under `images`, for its errors to be comparable. For
            AlexNet `n_classes`, `known_classes` and `preset` count.
        feature: What of the encoder is evaluated; the other run's results must be of the same.

    Raises:
        FileNotFoundError: If the run has no results.
        ValueError: If these are no results of corruptions, lack a corruption, or are of other images or features.
    """
    if where == "alexnet":
        some = images.get("known_classes") is not None
        if some or images["n_classes"] != 1000 or images["preset"] not in ("imagenet", None):
            raise ValueError(
                "baseline alexnet is for ImageNet's 1000 classes and the preset imagenet, "
                f"got {'some of ' if some else ''}{images['n_classes']} classes and {images['preset']}: "
                "give another run as baseline"
            )
        return ALEXNET
    folder = Path(where).expanduser()
    in_folders = [results_folder(place, feature) / "corruption.json" for place in (folder / "eval", folder)]
    places = (*in_folders, folder)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"the baseline has no {str(places[0])!r}: run eval/corruption.py on it first")
    rows, extra = read_rows(path)
    theirs = extra.get("images", {})
    differing = [f"{key} {theirs.get(key)!r}, not {images[key]!r}" for key in images if theirs.get(key) != images[key]]
    if differing:
        raise ValueError(f"the baseline {path} is of other images: {'; '.join(differing)}")
    others = sorted({row.feature for row in rows} - {feature})
    if others:
        raise ValueError(f"the baseline {path} is of {others[0]} features, not of {feature} features")
    errors = {score: errors_by_corruption(rows, score) for score in CLASSIFIERS}
    missing = [name for name in names if name in COMMON and any(name not in errors[score] for score in CLASSIFIERS)]
    if missing:
        raise ValueError(f"the baseline {path} lacks {', '.join(missing)}: evaluate them there too, or not here")
    return Baseline(rows[0].encoder, errors, {score: 1 - clean_value(rows, score, "accuracy") for score in CLASSIFIERS})


def by_corruption(rows: Iterable[Row], score: str, metric: str) -> dict[str, list[float]]:
    """Values of one score and metric by corruption, in the benchmark's order, mildest first."""
    found = {
        (row.params["corruption"], row.params["severity"]): row.value
        for row in rows
        if (row.score, row.metric) == (score, metric)
    }
    return {
        name: [found[name, severity] for severity in SEVERITIES]
        for name in COMMON + EXTRA
        if (name, SEVERITIES[0]) in found
    }


def errors_by_corruption(rows: Iterable[Row], score: str) -> dict[str, list[float]]:
    """Errors in [0, 1] of one classifier by corruption, mildest first."""
    return {name: [1 - value for value in values] for name, values in by_corruption(rows, score, "accuracy").items()}


def clean_value(rows: Iterable[Row], score: str, metric: str) -> float:
    """Value of one score and metric on clean images."""
    return next(row.value for row in rows if (row.score, row.metric) == (score, f"clean_{metric}"))


def summarize(rows: Sequence[Row], baseline: Baseline | None = None) -> tuple[list[Row], list[str]]:
    """Means over corruptions.

    Args:
        rows: Of each corruption at each severity (`accuracy`, and `auroc` where unknown classes were evaluated too),
            and of clean images (`clean_accuracy`).
        baseline: What to divide errors by.

    Returns:
        Rows of these metrics, and remarks why a ratio cannot be had. `params["corruptions"]` counts those in a mean.

        - `mean_corruption_error`: of the common corruptions, not normalized; what is usual for CIFAR.
        - `group_corruption_error`: of those of `params["group"]`, which may be `extra`.
        - `mce`, `relative_mce`: of the common corruptions, as ratios to the baseline; papers print 100 times that.
        - `mean_corruption_auroc`: of the common corruptions.
    """
    summary, remarks = [], []

    def add(score: str, metric: str, value: float, corruptions: int, **params: object) -> None:
        like = next(row for row in rows if row.score == score and "corruption" in row.params)
        shared = {key: value for key, value in like.params.items() if key not in ("corruption", "severity", "group")}
        params = {"corruptions": corruptions, **params, **shared}
        summary.append(replace(like, metric=metric, value=value, ci_low=None, ci_high=None, params=params))

    for score in CLASSIFIERS:
        errors = errors_by_corruption(rows, score)
        common = {name: errors[name] for name in errors if name in COMMON}
        if common:
            add(score, "mean_corruption_error", mean_corruption_error(common), len(common))
        for group in dict.fromkeys(GROUP_OF[name] for name in errors):
            members = {name: errors[name] for name in errors if GROUP_OF[name] == group}
            add(score, "group_corruption_error", mean_corruption_error(members), len(members), group=group)
        if baseline is None or not common:
            continue
        theirs, clean_error = baseline.errors[score], 1 - clean_value(rows, score, "accuracy")
        ratios = {
            "mce": partial(mean_corruption_error, common, theirs),
            "relative_mce": partial(relative_mce, common, clean_error, theirs, baseline.clean_error[score]),
        }
        for metric, ratio in ratios.items():
            try:
                add(score, metric, ratio(), len(common), baseline=baseline.name)
            except ValueError as error:
                remarks.append(f"no {metric} of {score} against {baseline.name}: {error}")

    for score in OPEN_SET_SCORES:
        values = [values for name, values in by_corruption(rows, score, "auroc").items() if name in COMMON]
        if values:
            add(score, "mean_corruption_auroc", float(np.mean(values)), len(values))
    return summary, remarks


def severity_table(rows: Sequence[Row], score: str, metric: str) -> str:
    """Lays out one score and metric for a terminal, in %: a line a corruption, a column a severity, and the mean."""
    table = by_corruption(rows, score, metric)
    width = max(map(len, (*table, "clean images"))) + 2
    lines = [
        f"{'severity':{width}}{''.join(f'{severity:>7}' for severity in SEVERITIES)}{'mean':>8}",
        f"{'clean images':{width}}{'':{7 * len(SEVERITIES)}}{100 * clean_value(rows, score, metric):8.1f}",
    ]
    for name, values in table.items():
        lines.append(f"{name:{width}}{''.join(f'{100 * value:7.1f}' for value in values)}{100 * np.mean(values):8.1f}")
    return "\n".join(lines)


def summary_table(summary: Sequence[Row]) -> str:
    """Lays out what `summarize` gives for a terminal: a line a mean, a column a score."""
    lines: dict[str, dict[str, float]] = {}
    for row in summary:
        what = row.metric.replace("_", " ")
        if "baseline" in row.params:
            what += f" against {row.params['baseline']}"
        if "group" in row.params:
            what = f"  {row.params['group']}"
        lines.setdefault(f"{what} ({row.params['corruptions']})", {})[row.score] = row.value
    columns = list(dict.fromkeys(row.score for row in summary))
    width = max(map(len, lines))
    head = " " * width + "".join(f"  {score:>12}" for score in columns)
    body = [
        f"{what:{width}}" + "".join(f"  {f'{line[score]:.4f}' if score in line else '':>12}" for score in columns)
        for what, line in lines.items()
    ]
    return "\n".join(line.rstrip() for line in (head, *body))


def _decoded(images: ImageSet, size: int) -> ImageSet:
    """Images in memory at `size`, as each is corrupted many times, unless that takes too much of it."""
    if len(images) * size * size * 3 > _DECODED_AT_MOST:
        return images
    return replace(images, images=images.pixels(size).permute(0, 2, 3, 1).contiguous().numpy())
