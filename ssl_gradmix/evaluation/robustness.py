"""How classifiers of frozen features hold up where test images are corrupted, and the open-set scores with them.

Classifiers are fitted on clean training images. Each test image is then corrupted at severities 1 to 5, here or by
others (CIFAR-10-C, ImageNet-C), and the encoder sees it as any other. Means take every severity of a corruption with
equal weight, then every corruption; errors are fractions. The 4 extra corruptions are never in a mean over all.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

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
    check_request,
    corrupt,
    corrupt_batch,
)
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.evaluation import scores
from ssl_gradmix.evaluation.knn import knn_predict, used_k
from ssl_gradmix.evaluation.metrics import (
    ALEXNET_CLEAN_ERROR,
    ALEXNET_ERRORS,
    mean_corruption_error,
    relative_mce,
)
from ssl_gradmix.evaluation.probes import LinearProbe, label_subset
from ssl_gradmix.evaluation.results import Row, read_rows

TASK = "corruption"

CLASSIFIERS = ("linear", "knn")
"""Scores of the metric `accuracy`: the linear probe and weighted kNN."""

OPEN_SET_SCORES = ("knn_distance", "max_logit")
"""Scores of the metric `auroc`."""

GROUP_OF: dict[str, str] = {name: group for group, names in {**GROUPS, "extra": EXTRA}.items() for name in names}
"""Group of each corruption: `noise`, `blur`, `weather`, `digital`, or `extra`."""

_DECODED_AT_MOST = 4 * 2**30  # bytes


def choose_corruptions(names: Sequence[str] | None = None, extra: bool = False, seed: int = 0) -> list[str]:
    """The corruptions to evaluate, in the benchmark's order.

    Args:
        names: Those wanted; None is the 15 common ones.
        extra: Add the 4 extra ones.
        seed: Of the corruptions, checked here too.

    Raises:
        ValueError: If there is none or an unknown one, `seed` is negative, or one needs a library that is missing.
    """
    wanted = {*(COMMON if names is None else names), *(EXTRA if extra else ())}
    if not wanted:
        raise ValueError(f"corruptions must name at least one; there are {', '.join(COMMON + EXTRA)}")
    for name in sorted(wanted):
        check_request(name, SEVERITIES[0], seed, "cifar")
        try:
            corrupt(np.zeros((SMALLEST_SIDE, SMALLEST_SIDE, 3), np.uint8), name, SEVERITIES[0])
        except ImportError as error:
            raise ValueError(f"cannot make {name}: {error}") from error
    return [name for name in COMMON + EXTRA if name in wanted]


def choose_images(
    images: ImageSet, classes: Sequence[int] | None = None, count: int | None = None, seed: int = 0
) -> np.ndarray:
    """Numbers of the labelled images to evaluate, ascending.

    Args:
        images: The whole test set.
        classes: Labels to keep; None keeps all.
        count: About how many images, the same share of each class and at least one; None takes all.
        seed: Of the draw.

    Raises:
        ValueError: If no image is labelled, none is of these classes, or there are fewer than `count`.
    """
    labelled = images.labels >= 0
    if not labelled.any():
        raise ValueError(f"{images.name} has no labels, this evaluation needs them: a folder has one a class folder")
    if classes is not None:
        labelled &= np.isin(images.labels, classes)
    numbers = np.flatnonzero(labelled)
    if len(numbers) == 0:
        raise ValueError(f"{images.name} has no image of the classes {list(classes)}")
    if count is None:
        return numbers
    if not 1 <= count <= len(numbers):
        raise ValueError(f"images must be 1 to the {len(numbers)} of {images.name}, got {count}")
    return numbers[label_subset(torch.from_numpy(images.labels[numbers]), count / len(numbers), seed).numpy()]


def decoded(images: ImageSet, size: int) -> ImageSet:
    """Images in memory at `size`, if that takes no more than 4 GiB: each is corrupted many times. Else as they are."""
    if len(images) * size * size * 3 > _DECODED_AT_MOST:
        return images
    return replace(images, images=images.pixels(size).permute(0, 2, 3, 1).contiguous().numpy())


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


class Published:
    """A corrupted set on disk: CIFAR-10-C's arrays, as `make_c` writes them too, or ImageNet-C's folders.

    Args:
        root: Its folder.
        clean: All clean test images. Folders are matched to its classes by name, the labels of arrays by number.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If its meta.json is damaged.
    """

    def __init__(self, root: str | Path, clean: ImageSet) -> None:
        self.root, self.clean = Path(root).expanduser(), clean
        if not self.root.is_dir():
            raise FileNotFoundError(f"no folder {str(root)!r} of published corruptions")
        self.origin = {"source": "published", **self._meta()}
        """What results say of it, with preset, seed and frost textures where `make_c` wrote a meta.json."""

    def read(self, name: str, severity: int) -> ImageSet:
        """Reads the images of all classes at one severity, in the order of the disk.

        Raises:
            FileNotFoundError: If something is missing.
            ValueError: If something is damaged or pickled, or there are not as many images of each class as in `clean`.
        """
        if any(self.root.glob("*.npy")):
            images, labels = read_cifar_c(self.root, name, severity)
        else:
            images, labels, folders = read_imagenet_c(self.root, name, severity)
            labels = self._numbers_of(folders)[labels]
        theirs, ours = Counter(labels.tolist()), Counter(self.clean.labels[self.clean.labels >= 0].tolist())
        if theirs != ours:
            label = min(label for label in theirs | ours if theirs[label] != ours[label])
            raise ValueError(
                f"the labels of {name} in {self.root} do not fit {self.clean.name}: there are {theirs[label]} images of "
                f"class {label}, not {ours[label]}; give the data set that it was made from as --data"
            )
        return ImageSet(images, labels, self.clean.classes, self.clean.name)

    def fingerprint(self) -> str:
        """Changes with the arrays' sizes and times, or with what the folders of severities list."""
        digest = hashlib.sha256()
        for path in sorted([*self.root.glob("*.npy"), *self.root.glob("*/[1-5]")]):
            status = path.stat()
            digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:32]

    def _meta(self) -> dict[str, object]:
        path = self.root / "meta.json"
        if not path.exists():
            return {}
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            return {key: meta[key] for key in ("preset", "seed", "frost_source")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged, or not by make_c: {error!r}") from error

    def _numbers_of(self, folders: Sequence[str]) -> np.ndarray:
        numbers = {name: number for number, name in enumerate(self.clean.classes)}
        strange = [name for name in folders if name not in numbers]
        if strange:
            raise ValueError(
                f"{self.root} has classes that {self.clean.name} has not, such as {strange[0]!r}: give the data set that "
                "it was made from as --data"
            )
        return np.array([numbers[name] for name in folders])


@dataclass(eq=False)
class Classifiers:
    """A linear probe and weighted kNN on clean training features: scores `linear` and `knn`.

    Args:
        probe: The linear probe.
        features: (N, D) that kNN looks among, those that the probe was trained on.
        labels: (N,).
        k: Neighbours of kNN.
        temperature: Of kNN.
    """

    probe: LinearProbe
    features: Tensor
    labels: Tensor
    k: int = 20
    temperature: float = 0.07

    def params(self) -> dict[str, dict[str, float | None]]:
        """What results depend on, by score."""
        used = scores.parameters_used(self.features, self.labels)
        return {
            "linear": {"learning_rate": self.probe.learning_rate},
            "knn": {"k": used_k(self.k, self.features), "temperature": self.temperature},
            "knn_distance": used["knn_distance"],
            "max_logit": {"learning_rate": self.probe.learning_rate},
        }

    def correct(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Whether each guess is right, boolean (M,) by score, for features (M, D) and their labels (M,)."""
        nearest = knn_predict(features, self.features, self.labels, self.k, self.temperature)
        return {"linear": self.probe.accuracy(features, labels).top1, "knn": nearest == labels}

    def known_scores(self, features: Tensor) -> dict[str, np.ndarray]:
        """How known features (M, D) look, float64 (M,) by score, larger = more known."""
        return {
            "knn_distance": scores.knn_distance(self.features, self.labels, features),
            "max_logit": scores.max_logit(self.probe.logits(features)),
        }


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
    "alexnet",
    {score: ALEXNET_ERRORS for score in CLASSIFIERS},
    {score: ALEXNET_CLEAN_ERROR for score in CLASSIFIERS},
)
"""AlexNet's errors on ImageNet-C, as the benchmark's authors normalise by; for ImageNet alone."""


def read_baseline(where: str | Path, names: Iterable[str], images: Mapping[str, object]) -> Baseline:
    """Reads the errors of another run.

    Args:
        where: Its folder, or its `corruption.json`.
        names: The common corruptions that it must have.
        images: What that file must say of the images, for the errors to be comparable.

    Raises:
        FileNotFoundError: If it has no results.
        ValueError: If these are no results of corruptions, lack a corruption, or are of other images.
    """
    where = Path(where).expanduser()
    places = (where / "eval" / f"{TASK}.json", where / f"{TASK}.json", where)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"the baseline has no {str(places[0])!r}: run eval/corruption.py on it first")
    rows, extra = read_rows(path)
    theirs = extra.get("images", {})
    differing = [f"{key} {theirs.get(key)!r}, not {images[key]!r}" for key in images if theirs.get(key) != images[key]]
    if differing:
        raise ValueError(f"the baseline {path} is of other images: {'; '.join(differing)}")
    errors = {score: errors_by_corruption(rows, score) for score in CLASSIFIERS}
    missing = [name for name in names if any(name not in errors[score] for score in CLASSIFIERS)]
    if missing:
        raise ValueError(f"the baseline {path} lacks {', '.join(missing)}: evaluate them there too, or not here")
    return Baseline(rows[0].encoder, errors, {score: 1 - clean_value(rows, score, "accuracy") for score in CLASSIFIERS})


def errors_by_corruption(rows: Sequence[Row], score: str) -> dict[str, list[float]]:
    """Errors in [0, 1] of one score by corruption, mildest first."""
    return {name: [1 - value for value in values] for name, values in by_corruption(rows, score, "accuracy").items()}


def by_corruption(rows: Sequence[Row], score: str, metric: str) -> dict[str, list[float]]:
    """Values of one score and metric by corruption, mildest first, in the benchmark's order."""
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


def clean_value(rows: Sequence[Row], score: str, metric: str) -> float:
    """Value of `clean_<metric>` of one score."""
    return next(row.value for row in rows if (row.score, row.metric) == (score, f"clean_{metric}"))


def summarise(rows: Sequence[Row], baseline: Baseline | None = None) -> tuple[list[Row], list[str]]:
    """Means over corruptions, from the rows of each corruption and severity and of clean images.

    Args:
        rows: Of metrics `accuracy` and `clean_accuracy`, and `auroc` and `clean_auroc` where unknown classes were
            evaluated too.
        baseline: What to divide errors by.

    Returns:
        Rows of the metrics `mean_corruption_error` (common corruptions, not normalised; the usual number for CIFAR),
        `group_corruption_error` (of each group, the extra ones too, `params["group"]`), `mce` and `relative_mce` (as
        ratios to the baseline; papers print 100 times that) and `mean_corruption_auroc`. `params["corruptions"]` counts
        those in a mean. Second, remarks: why a ratio could not be had.
    """
    summary, remarks = [], []
    like = next(row for row in rows if row.metric == "accuracy")
    origin = {key: like.params[key] for key in like.params if key in ("source", "preset", "seed", "frost_source")}

    def add(score: str, metric: str, value: float, corruptions: int, **params: object) -> None:
        n = next(row.n for row in rows if row.score == score)
        params = {"corruptions": corruptions, **params, **origin}
        summary.append(
            replace(like, score=score, metric=metric, value=value, ci_low=None, ci_high=None, n=n, params=params)
        )

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
        aurocs = {name: v for name, v in by_corruption(rows, score, "auroc").items() if name in COMMON}
        if aurocs:
            value = float(np.mean([np.mean(values) for values in aurocs.values()]))
            add(score, "mean_corruption_auroc", value, len(aurocs))
    return summary, remarks


def severity_table(rows: Sequence[Row], score: str, metric: str) -> str:
    """Lays out values of one score for a terminal, in %: a line a corruption, a column a severity, and their mean."""
    table = by_corruption(rows, score, metric)
    width = max(map(len, (*table, "corruption"))) + 2
    lines = [f"{'severity':{width}}" + "".join(f"{severity:>7}" for severity in SEVERITIES) + f"{'mean':>8}"]
    lines.append(f"{'(none)':{width}}" + " " * 7 * len(SEVERITIES) + f"{clean_value(rows, score, metric):8.1%}")
    group = None
    for name, values in table.items():
        if GROUP_OF[name] != group:
            group = GROUP_OF[name]
            lines.append(group)
        lines.append(f"  {name:{width - 2}}" + "".join(f"{v:7.1%}" for v in values) + f"{np.mean(values):8.1%}")
    return "\n".join(lines)


def summary_table(summary: Sequence[Row]) -> str:
    """Lays out what `summarise` gives for a terminal: a line a number, a column a score."""
    columns = list(dict.fromkeys(row.score for row in summary))
    cells: dict[str, dict[str, str]] = {}
    for row in summary:
        what = f"{row.metric.replace('_', ' ')}, {row.params['corruptions']} corruptions"
        if "group" in row.params:
            what = f"  {row.params['group']} ({row.params['corruptions']})"
        if "baseline" in row.params:
            what += f", against {row.params['baseline']}"
        cells.setdefault(what, {})[row.score] = f"{row.value:.4f}"
    width = max(map(len, cells)) + 2
    lines = [" " * width + "".join(f"{score:>14}" for score in columns)]
    lines += [f"{what:{width}}" + "".join(f"{line.get(s, ''):>14}" for s in columns) for what, line in cells.items()]
    return "\n".join(line.rstrip() for line in lines)

