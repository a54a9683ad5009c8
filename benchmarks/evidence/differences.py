"""Paired differences over seeds: of what a table of rows holds, the numbers that it is made for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from scipy.stats import ttest_1samp

from evidence.rows import MEASURES, Measure, Row

Values = dict[tuple[str, str], dict[int, float]]
"""Numbers by (variant, measure) and seed."""


class Difference(NamedTuple):
    """The mean over seeds of one variant's number minus another's, with a 95% interval.

    Attributes:
        mean: Of the differences of each seed.
        low: Lower end; NaN where there is one seed.
        high: Upper end.
        seeds: That both variants have.
    """

    mean: float
    low: float
    high: float
    seeds: int

    def verdict(self, measure: Measure) -> str:
        """`better` or `worse` where the interval leaves 0 out, else `open`."""
        if not (self.low > 0 or self.high < 0):
            return "open"
        return "better" if (self.mean > 0) == measure.larger_is_better else "worse"


def values(rows: Iterable[Row]) -> Values:
    """Arranges rows of one grid and method."""
    found: Values = {}
    for row in rows:
        found.setdefault((row.variant, row.measure), {})[row.seed] = row.value
    return found


def paired(one: Mapping[int, float], two: Mapping[int, float]) -> Difference | None:
    """The difference of two variants over the seeds that both have, with the t interval of its mean.

    Seeds pair because they share initialization, the order of images and, on known classes, the trial. The interval
    speaks about further seeds (and trials), on the same images.

    Args:
        one: Numbers by seed.
        two: Those that are subtracted.

    Returns:
        None where no seed is common.
    """
    differences = [one[seed] - two[seed] for seed in sorted(one.keys() & two.keys())]
    if not differences:
        return None
    mean = math.fsum(differences) / len(differences)
    if len(set(differences)) == 1:  # a single one says nothing of its spread; of equal ones there is none
        return Difference(mean, *[math.nan if len(differences) == 1 else mean] * 2, len(differences))
    low, high = ttest_1samp(differences, 0).confidence_interval(0.95)
    return Difference(mean, float(low), float(high), len(differences))


def compare(found: Values, variant: str, reference: str) -> dict[Measure, Difference]:
    """One variant against another, on every measure that both have."""
    differences = {
        measure: paired(found.get((variant, measure.name), {}), found.get((reference, measure.name), {}))
        for measure in MEASURES
    }
    return {measure: difference for measure, difference in differences.items() if difference is not None}
