"""Section of a report on corrupted images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ssl_gradmix.data.corruptions import COMMON, EXTRA, SEVERITIES
from ssl_gradmix.evaluation.report import figures
from ssl_gradmix.evaluation.report.page import Figures, Panel, Part, Section
from ssl_gradmix.evaluation.report.runs import Run
from ssl_gradmix.evaluation.report.tables import (
    NOT_ALIKE,
    alike,
    comparison,
    measured,
    name_of,
    not_evaluated,
    with_projector,
)

_Values = Mapping[str, Mapping[int, float]]
"""By corruption and severity; clean images are severity 0 of each."""

_MEANS = (
    "In percent; of errors, less is better. The mean corruption error is the mean over severities of each corruption, "
    "then over the common corruptions, not normalized. mCE divides each corruption's error by the baseline's, relative "
    "mCE its rise above the error on clean images by the baseline's rise: 100 is the baseline itself."
)


def corruption_section(runs: Sequence[Run]) -> Section:
    """Means, heat maps of corruption by severity, and curves over severity, of the runs that have them."""
    text = "Accuracy on corrupted test images, of classifiers that were fitted on clean training images."
    return Section("Corruption robustness", with_projector(runs, "corruption", _parts), text)


def _parts(runs: Sequence[Run]) -> list[Part]:
    means = [measured(run, "corruption", lambda row: "corruption" not in row.params) for run in runs]
    shown = [measured(run, "corruption", lambda row: (row.score, row.metric) == ("linear", "accuracy")) for run in runs]
    remark = "" if alike(shown) else NOT_ALIKE
    linear = [_values(run, "linear", "accuracy") for run in runs]
    parts: list[Part] = [comparison("Means over corruptions", runs, means, _MEANS)] if any(means) else []
    if any(linear):
        parts += [
            Figures(
                "Accuracy by corruption and severity",
                _heat_maps(runs, linear, differences=not remark),
                "Of the linear probe, in percent: dark is high. Of further runs, where the data are the same, the "
                "difference to the first, in points: orange is worse, violet better.",
            ),
            Figures(
                "Mean by severity",
                [
                    *_mean_curves("Accuracy of the linear probe", linear),
                    *_mean_curves("Accuracy of weighted kNN", [_values(run, "knn", "accuracy") for run in runs]),
                    *_mean_curves("AUROC of kNN distance", [_values(run, "knn_distance", "auroc") for run in runs]),
                    *_mean_curves("AUROC of the maximum logit", [_values(run, "max_logit", "auroc") for run in runs]),
                ],
                f"Over the common corruptions, in percent; severity 0 is clean images.{remark}",
                runs=[run.name for run in runs],
            ),
            Figures(
                "Accuracy by severity, each corruption",
                [
                    _curves(name_of(name), [of_run.get(name, {}) for of_run in linear])
                    for name in _in_order(name for of_run in linear for name in of_run)
                ],
                f"Of the linear probe, in percent; severity 0 is clean images.{remark}",
                runs=[run.name for run in runs],
                folded=True,
            ),
        ]
    return [*parts, *not_evaluated(runs, "corruption")]


def _values(run: Run, score: str, metric: str) -> _Values:
    rows = [row for row in run.results["corruption"].rows if row.score == score] if "corruption" in run.results else []
    clean = [(0, row.value) for row in rows if row.metric == f"clean_{metric}"]
    values: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.metric == metric and row.params.get("severity") in SEVERITIES:
            values.setdefault(str(row.params.get("corruption")), dict(clean))[row.params["severity"]] = row.value
    return {name: values[name] for name in _in_order(values)}


def _in_order(names: Iterable[str]) -> list[str]:
    """Each once, the known ones as the benchmark has them."""
    known = {name: place for place, name in enumerate(COMMON + EXTRA)}
    return sorted(dict.fromkeys(names), key=lambda name: known.get(name, len(known)))


def _heat_maps(runs: Sequence[Run], values: Sequence[_Values], differences: bool) -> list[Panel]:
    severities = [str(severity) for severity in SEVERITIES]
    panels, first = [], None
    for index, (run, of_run) in enumerate(zip(runs, values, strict=True)):
        if not of_run:
            continue
        names = [name_of(name) for name in of_run]
        table = _table(of_run, of_run)
        first = index if first is None else first
        if index == first or not differences:
            panels.append(Panel(run.name, figures.heat_map(table, names, severities), index))
        else:
            picture = figures.heat_map(table - _table(values[first], of_run), names, severities, difference=True)
            panels.append(Panel(f"{run.name} minus {runs[first].name}", picture, index))
    return panels


def _table(values: _Values, names: Iterable[str]) -> np.ndarray:
    return np.array([[values.get(name, {}).get(severity, np.nan) for severity in SEVERITIES] for name in names])


def _mean_curves(title: str, values: Sequence[_Values]) -> list[Panel]:
    """Means over the common corruptions, at the severities that all of them have."""
    means = []
    for of_run in values:
        common = [of_name for name, of_name in of_run.items() if name in COMMON]
        shared = set.intersection(*map(set, common)) if common else ()
        means.append({severity: float(np.mean([of_name[severity] for of_name in common])) for severity in shared})
    return [_curves(title, means)] if any(means) else []


def _curves(title: str, values: Sequence[Mapping[int, float]]) -> Panel:
    lines = [
        figures.Line(index, *zip(*sorted(of_run.items()), strict=True)) for index, of_run in enumerate(values) if of_run
    ]
    return Panel(title, figures.curves(lines, "severity", shares=True))
