"""Confidence intervals: a bootstrap over test samples, and the interval of an accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest

from ssl_gradmix.evaluation.metrics import Vector, as_numpy

_WEIGHTS_AT_ONCE = 2**20  # 8 MiB of int64, so that the metrics' passes over them stay in the cache


class Interval(NamedTuple):
    """A statistic of the samples and its confidence interval."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    statistic: Callable[..., Any],
    *arrays: Vector,
    strata: Vector,
    n: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a statistic of samples, for instance

        bootstrap_interval(auroc, scores, is_known, strata=is_known)

    Samples are drawn with replacement within each stratum, so that every resample holds as many
    known and unknown samples as the data. Resamples are passed to the statistic as weights, many at
    a time, so that metrics sort once. The interval covers the choice of test samples only, not that
    of the training seed or of the known classes. Percentile intervals (Efron, 1979) are not
    corrected for bias or skew: near 0 and 1, or with few samples in a stratum, they cover less than
    `level`.

    Args:
        statistic: `statistic(*arrays)` returns a number, and `statistic(*arrays, weights=w)` an
            array (B,) for w (B, N), how often each sample counts in each resample.
        *arrays: (N,) each, one entry a sample.
        strata: (N,) group of each sample, usually `is_known`.
        n: Number of resamples.
        level: Nominal coverage in (0, 1).
        seed: Seed of the resampling. The same seed and strata give the same resamples.

    Raises:
        ValueError: An array is not as long as `strata`.
    """

    def named(*arrays: Vector, **weights: np.ndarray) -> dict[str, Any]:
        return {"value": statistic(*arrays, **weights)}

    return bootstrap_intervals(named, *arrays, strata=strata, n=n, level=level, seed=seed)["value"]


def bootstrap_intervals(
    statistic: Callable[..., dict[str, Any]],
    *arrays: Vector,
    strata: Vector,
    n: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """As `bootstrap_interval`, for a statistic of several named numbers: `metrics.all_metrics`."""
    groups = as_numpy(strata)
    lengths = [len(array) for array in arrays]
    if any(length != len(groups) for length in lengths):
        raise ValueError(f"strata must be as long as the arrays, got {len(groups)} and {lengths}")
    statistics = statistic(*arrays)
    resampled = [statistic(*arrays, weights=weights) for weights in _resamples(groups, n, seed)]
    intervals = {}
    for name, value in statistics.items():
        replicates = np.concatenate([values[name] for values in resampled])
        low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
        intervals[name] = Interval(value, float(low), float(high))
    return intervals


def accuracy_interval(correct: Vector, level: float = 0.95) -> Interval:
    """Accuracy and its Wilson score interval (Wilson, 1927), also valid if all or none are correct.

    Args:
        correct: (N,) boolean, one entry a sample, N at least 1.
        level: Nominal coverage in (0, 1).
    """
    hits = as_numpy(correct)
    result = binomtest(int(hits.sum()), len(hits))
    interval = result.proportion_ci(level, method="wilson")
    return Interval(float(hits.mean()), float(interval.low), float(interval.high))


def _resamples(strata: np.ndarray, n: int, seed: int) -> Iterator[np.ndarray]:
    """Yields counts (B, N) of how often each sample is drawn, `n` rows in all."""
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    rows = max(1, _WEIGHTS_AT_ONCE // len(strata))
    for start in range(0, n, rows):
        size = min(rows, n - start)
        weights = np.empty((size, len(strata)), dtype=np.int64)
        for members in groups:
            shape = (size, len(members))
            drawn = rng.integers(len(members), size=shape)
            drawn += len(members) * np.arange(size)[:, None]  # one bincount for all rows
            counts = np.bincount(drawn.ravel(), minlength=drawn.size)
            weights[:, members] = counts.reshape(shape)
        yield weights
