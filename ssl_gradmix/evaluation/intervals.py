"""How sure a number is: bootstrap intervals, a paired test of two runs, and the interval of an accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest
from torch import Tensor

Vector = np.ndarray | Tensor

_WEIGHTS_AT_ONCE = 2**20  # 8 MiB of int64: resamples so small that the metrics' passes over them stay in the cache


class Interval(NamedTuple):
    """A statistic of the samples and its confidence interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """A statistic of run a minus that of run b, its confidence interval, and the two-sided p-value of no difference."""

    value: float
    low: float
    high: float
    p_value: float


def bootstrap_interval(
    statistic: Callable[..., float],
    *arrays: Vector,
    strata: Vector,
    n: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a statistic of samples, for instance

        bootstrap_interval(auroc, scores, is_known, strata=is_known)

    Samples are drawn with replacement within each stratum, so that every resample holds as many known and unknown
    samples as the data. A resample is drawn as counts and handed to the statistic as weights, so that metrics sort once
    for many resamples. Only the test samples vary: the interval does not cover another training run or another choice
    of known classes. Percentile intervals (Efron, 1979) are not corrected for bias or skew: near the ends of [0, 1] or
    with few samples in a stratum they cover less than `level`.

    Args:
        statistic: `statistic(*arrays)` is a number, and `statistic(*arrays, weights=w)` an array (B,) for w (B, N), how
            often each sample counts in each resample, as in `ssl_gradmix.evaluation.metrics`. Bind other arguments with
            `functools.partial`.
        *arrays: (N,) each, one entry a sample.
        strata: (N,) group of each sample, usually `is_known`.
        n: Number of resamples.
        level: Share of intervals meant to cover the truth, in (0, 1).
        seed: Of the resampling. The same seed and strata draw the same resamples.

    Raises:
        ValueError: If an array is not as long as `strata`, `n` is below 1, or `level` is outside (0, 1).
    """
    return bootstrap_intervals(_named(statistic), *arrays, strata=strata, n=n, level=level, seed=seed)["value"]


def bootstrap_intervals(
    statistic: Callable[..., dict[str, float]],
    *arrays: Vector,
    strata: Vector,
    n: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """As `bootstrap_interval`, for a statistic that gives several numbers by name, such as `metrics.all_metrics`."""
    values = statistic(*arrays)
    replicates = _replicates(statistic, arrays, strata, n, seed)
    return {name: Interval(value, *_percentiles(replicates[name], level)) for name, value in values.items()}


def paired_difference(
    statistic: Callable[..., float],
    a: Sequence[Vector],
    b: Sequence[Vector],
    *,
    strata: Vector,
    n: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Bootstrap interval and test of `statistic(*a) - statistic(*b)` for two runs on the same samples, for instance

        paired_difference(auroc, (scores_a, is_known), (scores_b, is_known), strata=is_known)

    Both runs see the same resamples, so what makes a sample hard for both cancels. The p-value is twice the smaller
    share of resamples whose difference is at most, or at least, 0, with one added to both counts (Davison and Hinkley,
    1997), so never below 2 / (n + 1). It speaks about the test samples only: two training runs that differ in nothing
    but their seed may well differ significantly.

    Args:
        statistic: As in `bootstrap_interval`.
        a: Arrays (N,) of the first run.
        b: Those of the second, sample for sample.
        strata: (N,), as `n`, `level` and `seed` in `bootstrap_interval`.

    Raises:
        ValueError: As `bootstrap_interval`.
    """
    difference = statistic(*a) - statistic(*b)
    replicates_a, replicates_b = (_replicates(_named(statistic), run, strata, n, seed)["value"] for run in (a, b))
    replicates = replicates_a - replicates_b
    tail = min((replicates <= 0).sum(), (replicates >= 0).sum())
    return Difference(difference, *_percentiles(replicates, level), min(1.0, 2 * (1 + int(tail)) / (n + 1)))


def accuracy_interval(correct: Vector, level: float = 0.95) -> Interval:
    """Accuracy and its Wilson score interval (Wilson, 1927), good also where all samples are correct, or none.

    Args:
        correct: (N,) boolean, one entry a sample.
        level: Share of intervals meant to cover the truth, in (0, 1).

    Raises:
        ValueError: If `correct` is empty or not boolean of shape (N,), or `level` is outside (0, 1).
    """
    _check_level(level)
    correct = _as_array(correct)
    if correct.dtype != bool or correct.ndim != 1 or len(correct) == 0:
        raise ValueError(f"correct must be boolean of shape (N,), N at least 1, got {correct.dtype} {correct.shape}")
    interval = binomtest(int(correct.sum()), len(correct)).proportion_ci(level, method="wilson")
    return Interval(float(correct.mean()), float(interval.low), float(interval.high))


def _named(statistic: Callable[..., float]) -> Callable[..., dict[str, float]]:
    return lambda *arrays, **weights: {"value": statistic(*arrays, **weights)}


def _replicates(
    statistic: Callable[..., dict[str, np.ndarray]], arrays: Sequence[Vector], strata: Vector, n: int, seed: int
) -> dict[str, np.ndarray]:
    """The statistic of each of `n` resamples, (n,) by name."""
    strata = _as_array(strata)
    lengths = [len(array) for array in arrays]
    if strata.ndim != 1 or any(length != len(strata) for length in lengths):
        raise ValueError(f"arrays and strata must have shape (N,), got lengths {lengths} and strata {strata.shape}")
    chunks = [statistic(*arrays, weights=weights) for weights in _resamples(strata, n, seed)]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _resamples(strata: np.ndarray, n: int, seed: int) -> Iterator[np.ndarray]:
    """Counts (B, N) of how often each sample is drawn, `n` rows in all, chunk by chunk."""
    if n < 1:
        raise ValueError(f"n must be at least 1 resample, got {n}")
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    rows = max(1, _WEIGHTS_AT_ONCE // len(strata))
    for start in range(0, n, rows):
        size = min(rows, n - start)
        weights = np.empty((size, len(strata)), dtype=np.int64)
        for members in groups:
            drawn = rng.integers(len(members), size=(size, len(members)))
            drawn += len(members) * np.arange(size)[:, None]  # one bincount for all rows
            weights[:, members] = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        yield weights


def _percentiles(replicates: np.ndarray, level: float) -> tuple[float, float]:
    _check_level(level)
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level!r}")


def _as_array(values: Vector) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
