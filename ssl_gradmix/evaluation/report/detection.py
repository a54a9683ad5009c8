"""Sections of a report on telling known from unknown images: open-set recognition and out-of-distribution detection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from ssl_gradmix.evaluation.metrics import oscr_curve, roc_curve
from ssl_gradmix.evaluation.report import figures
from ssl_gradmix.evaluation.report.page import Cell, Figures, Missing, Panel, Part, Section, Table
from ssl_gradmix.evaluation.report.runs import Run
from ssl_gradmix.evaluation.report.tables import (
    NOT_ALIKE,
    alike,
    comparison,
    measured,
    name_of,
    not_evaluated,
    value_cell,
    with_projector,
)
from ssl_gradmix.evaluation.results import Row

_METRICS = ("auroc", "aupr_in", "aupr_out", "fpr95_id_pos", "fpr95_ood_pos", "oscr")
_DIFFERENCES = {"auroc_difference": "Difference of AUROC", "oscr_difference": "Difference of OSCR"}
_SHOWN_FIRST = ("knn_distance", "top_k_cosine", "max_logit")
_NO_SCORES = ("is_known", "correct", "labels")

_AUROC = (
    "In percent: the probability that a known image scores above an unknown one, 50 by chance. In small print the "
    "standard deviation over trials, or the bootstrap 95% interval of a single one."
)
_OSCR = (
    "In percent. OSCR is the area under the share of known images accepted and named right over the share of unknown "
    "images accepted; it is at most the closed-set accuracy."
)
_EVERY_METRIC = (
    "In percent. AUPR is average precision. FPR95 is the rate of false positives where 95% of the positives are found: "
    "with known images as positives, the share of unknown images accepted; with unknown images as positives, the share "
    "of known images rejected. Of both, less is better."
)
_PAIRED = (
    "In points, with 95% intervals and two-sided p-values of a paired bootstrap over the test images, not corrected "
    "for the number of tests. Two trainings that differ in their seed alone may well differ significantly."
)
_HISTOGRAMS = (
    "Filled: known test images. Outlined: unknown ones. Dashed: the threshold that accepts 95% of the known. The "
    "outermost bins hold what lies beyond. Of several trials, or data sets, the first is shown."
)

_Samples = Mapping[str, Mapping[str, np.ndarray]]
"""Arrays of a run by trial or data set, then by name."""


def open_set_section(runs: Sequence[Run]) -> Section:
    """Known classes against unknown ones of the same data, by score and trial."""
    text = (
        "Telling test images of known classes from those of unknown classes. Every score is larger the more an image "
        "looks known."
    )
    return Section("Open set recognition", with_projector(runs, "osr", partial(_parts, task="osr")), text)


def out_of_distribution_section(runs: Sequence[Run]) -> Section:
    """Known test images against other data sets, by score."""
    text = "Telling test images of the known classes from images of another data set, with the same scores."
    return Section("Out-of-distribution detection", with_projector(runs, "ood", partial(_parts, task="ood")), text)


def _parts(runs: Sequence[Run], task: str) -> list[Part]:
    aurocs = [measured(run, task, lambda row: row.metric == "auroc") for run in runs]
    rates = [measured(run, task, lambda row: row.metric in ("oscr", "accuracy")) for run in runs]
    parts: list[Part] = []
    parts += [comparison("AUROC", runs, aurocs, _AUROC)] if any(aurocs) else []
    parts += [comparison("OSCR and closed-set accuracy", runs, rates, _OSCR)] if any(rates) else []
    parts += _figures(runs, task, "" if alike(aurocs) else NOT_ALIKE)
    parts += [_differences(run, task) for run in runs if _differing(run, task)]
    parts += [_every_metric(run, task) for run in runs if task in run.results]
    return [*parts, *not_evaluated(runs, task)]


def _every_metric(run: Run, task: str) -> Table:
    """A line a score and trial."""
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for row in run.results[task].rows:
        if row.metric in _METRICS:
            lines.setdefault((name_of(row.score), _what(row)), {})[row.metric] = row
    rows = [
        [Cell(*line), *(value_cell(found[metric]) if metric in found else Cell("–") for metric in _METRICS)]
        for line, found in lines.items()
    ]
    head = [Cell("Score"), *(Cell(name_of(metric)) for metric in _METRICS)]
    return Table(f"All metrics of {run.name}", head, rows, _EVERY_METRIC, folded=True)


def _differing(run: Run, task: str) -> list[Row]:
    rows = run.results[task].rows if task in run.results else []
    return [row for row in rows if row.metric in _DIFFERENCES]


def _differences(run: Run, task: str) -> Table:
    """A line a score and trial."""
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for row in _differing(run, task):
        lines.setdefault((name_of(row.score), _what(row)), {})[row.metric] = row
    rows = [
        [Cell(*line), *(_difference_cell(found[metric]) if metric in found else Cell("–") for metric in _DIFFERENCES)]
        for line, found in lines.items()
    ]
    head = [Cell("Score"), *map(Cell, _DIFFERENCES.values())]
    title = f"{run.name} minus {_differing(run, task)[0].params.get('compared_with')}, image by image"
    return Table(title, head, rows, _PAIRED, folded=True)


def _difference_cell(row: Row) -> Cell:
    cell = value_cell(row, signed=True)
    p_value = row.params.get("p_value")
    return cell if p_value is None else replace(cell, detail=f"{cell.detail}, p = {p_value:.3f}")


def _what(row: Row) -> str:
    """Which images: of a trial, of all trials, or of another data set."""
    trial = f", trial {row.trial}" if row.trial is not None else ", mean over trials" if "std" in row.params else ""
    return f"{row.dataset} {row.split}{trial}"


def _figures(runs: Sequence[Run], task: str, remark: str) -> list[Part]:
    samples = [_samples(run, task) for run in runs]
    scores = dict.fromkeys(name for of_run in samples for arrays in of_run.values() for name in arrays)
    first = [name for name in _SHOWN_FIRST if name in scores]
    others = [name for name in scores if name not in (*_SHOWN_FIRST, *_NO_SCORES)]
    parts: list[Part] = [
        Missing(f"{run.name}: no curves and histograms, as {task}_samples.safetensors is not there.")
        for run, of_run in zip(runs, samples, strict=True)
        if task in run.results and not of_run
    ]
    for chosen, which in ((first, ""), (others, ", other scores")):
        curves = [*_roc_curves(samples, chosen), *_oscr_curves(samples, chosen)]
        histograms = _histograms(runs, samples, task, chosen)
        if chosen:
            note = f"A line for each trial or data set; better ones run closer to the top left.{remark}"
            names = [run.name for run in runs]
            parts.append(Figures(f"ROC and OSCR curves{which}", curves, note, names, folded=bool(which)))
            parts.append(Figures(f"Distribution of scores{which}", histograms, _HISTOGRAMS, folded=bool(which)))
    return parts


def _samples(run: Run, task: str) -> _Samples:
    groups: dict[str, dict[str, np.ndarray]] = {}
    for key, array in run.results[task].samples.items() if task in run.results else ():
        group, _, name = key.rpartition("/")
        groups.setdefault(group, {})[name] = array.astype(bool) if name in ("is_known", "correct") else array
    for group, arrays in groups.items():
        damaged = f"{task}_samples.safetensors of the run {run.path!r} is damaged"
        if "is_known" not in arrays:
            raise ValueError(f"{damaged}: no {group}/is_known")
        shapes = {array.shape for array in arrays.values()}
        if len(shapes) > 1 or len(*shapes) != 1 or not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError(f"{damaged}: the arrays of {group} are not as many finite numbers each")
    return groups


def _roc_curves(samples: Sequence[_Samples], scores: Sequence[str]) -> list[Panel]:
    panels = []
    for score in scores:
        lines = []
        for index, of_run in enumerate(samples):
            for arrays in of_run.values():
                if score in arrays:
                    x, y, _ = roc_curve(arrays[score], arrays["is_known"])
                    lines.append(figures.Line(index, x, y))
        panels.append(Panel(f"{name_of(score)}: ROC", figures.rates(lines, "known accepted (%)", chance=True)))
    return panels


def _oscr_curves(samples: Sequence[_Samples], scores: Sequence[str]) -> list[Panel]:
    panels = []
    for score in scores:
        lines = []
        for index, of_run in enumerate(samples):
            for arrays in of_run.values():
                if score in arrays and "correct" in arrays:
                    x, y, _ = oscr_curve(arrays[score], arrays["is_known"], arrays["correct"])
                    lines.append(figures.Line(index, x, y))
        if lines:
            panels.append(Panel(f"{name_of(score)}: OSCR", figures.rates(lines, "known accepted and named right (%)")))
    return panels


def _histograms(runs: Sequence[Run], samples: Sequence[_Samples], task: str, scores: Sequence[str]) -> list[Panel]:
    panels = []
    for index, (run, of_run) in enumerate(zip(runs, samples, strict=True)):
        for score in scores:
            group = next((group for group, arrays in of_run.items() if score in arrays), None)
            if group is not None:
                values, known = of_run[group][score], of_run[group]["is_known"]
                threshold = _threshold(run.results[task].rows, score, group)
                picture = figures.histogram(values[known], values[~known], index, threshold)
                panels.append(Panel(f"{run.name}: {name_of(score)}", picture, index))
    return panels


def _threshold(rows: Sequence[Row], score: str, group: str) -> float | None:
    found = (row for row in rows if (row.score, row.metric) == (score, "threshold_tpr95"))
    return next((row.value for row in found if group in (f"trial{row.trial}", row.dataset, row.split)), None)
