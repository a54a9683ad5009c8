"""From result rows of several runs to tables that compare them, honestly: only like is set beside like."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ssl_gradmix.evaluation.report.page import Cell, Missing, Part, Table
from ssl_gradmix.evaluation.report.runs import Results, Run, plain
from ssl_gradmix.evaluation.results import Row

_NAMES = {
    "linear": "Linear probe",
    "linear_augmented": "Linear probe, augmented",
    "logistic_regression": "Logistic regression",
    "knn": "Weighted kNN",
    "knn_distance": "kNN distance",
    "top_k_cosine": "Top-k cosine",
    "top_k_cosine_divided": "Top-k cosine, divided",
    "ncm": "Nearest class mean, cosine",
    "ncm_euclidean": "Nearest class mean, Euclidean",
    "mahalanobis": "Mahalanobis",
    "rmd": "Relative Mahalanobis",
    "feature_norm": "Feature norm",
    "energy": "Energy",
    "vim": "ViM",
    "msp": "Maximum softmax",
    "max_logit": "Maximum logit",
    "top1": "top‑1",
    "top5": "top‑5",
    "auroc": "AUROC",
    "aupr_in": "AUPR, known positive",
    "aupr_out": "AUPR, unknown positive",
    "fpr95_id_pos": "FPR95, known positive",
    "fpr95_ood_pos": "FPR95, unknown positive",
    "oscr": "OSCR",
    "group_corruption_error": "corruption error",
    "mce": "mCE",
    "relative_mce": "relative mCE",
    "mean_corruption_auroc": "mean AUROC",
}
_COMMANDS = {
    "linear_probe": ("python eval/linear_probe.py", ""),
    "osr": ("python eval/osr.py", ""),
    "ood": ("python eval/osr.py", " --unknown.name NAME --unknown.root ROOT"),
    "corruption": ("python eval/corruption.py", ""),
}
_LESS_IS_BETTER = {
    *("fpr95_id_pos", "fpr95_ood_pos"),
    *("mean_corruption_error", "group_corruption_error", "mce", "relative_mce"),
}
_NO_PROTOCOL = {"learning_rate", "labels", "label_fraction", "class", "corruption", "severity", "group", "std", "over"}
"""Parameters that say what was found, or that stand elsewhere, and so do not set two numbers apart."""

_COUNTS = {"epochs": "epochs", "corruptions": "corruptions", "n_known": "known classes"}
_MOST_CLASSES = 50

NOT_ALIKE = " These runs were measured on different data or by different protocols: see the tables."


class Measure(NamedTuple):
    """What a number is, in words. Numbers compare where all that is said of them is the same.

    Attributes:
        score: What was computed, or the class that it is about.
        metric: What is told of it, empty where the score says all.
        protocol: Data and parameters.
        less_is_better: Whether it is an error.
    """

    score: str
    metric: str
    protocol: tuple[str, ...]
    less_is_better: bool


Measured = Mapping[Measure, Row]


def measured(run: Run, task: str, wanted: Callable[[Row], bool]) -> Measured:
    """The rows of an evaluation that are wanted, by what they measure: means over trials where there are such."""
    if task not in run.results:
        return {}
    results = run.results[task]
    averaged = {(row.dataset, row.score, row.metric) for row in results.rows if row.trial is None}
    return {
        _measure(row, results): row
        for row in results.rows
        if wanted(row) and (row.trial is None or (row.dataset, row.score, row.metric) not in averaged)
    }


def alike(found: Sequence[Measured]) -> bool:
    """Whether runs, but for those without results, were measured on the same data by the same protocols."""
    return len({frozenset(measure.protocol for measure in of_run) for of_run in found if of_run}) <= 1


def comparison(title: str, runs: Sequence[Run], found: Sequence[Measured], note: str = "", bars: bool = False) -> Table:
    """A line a measure and a column a run. The best value of a line is marked where runs differ in it.

    Args:
        title: Of the table; a metric of that name is not repeated in the lines.
        runs: The columns.
        found: What of each run is compared.
        note: Said below, after what is common to all lines.
        bars: Draw values as bars, and mark none.
    """
    measures = list(dict.fromkeys(measure for of_run in found for measure in of_run))
    protocols = [measure.protocol for measure in measures]
    common = [said for said in next(iter(protocols), ()) if all(said in protocol for protocol in protocols)]
    rows = []
    for measure in measures:
        values = [of_run[measure].value for of_run in found if measure in of_run]
        best = (min if measure.less_is_better else max)(values) if len({*values}) > 1 and not bars else None
        cells = [value_cell(of_run[measure], best, bars) if measure in of_run else Cell("–") for of_run in found]
        what = ", ".join(part for part in (measure.score, measure.metric) if part and part != title)
        rows.append([Cell(what, " · ".join(said for said in measure.protocol if said not in common)), *cells])
    head = [Cell(""), *(Cell(run.name, run=index) for index, run in enumerate(runs))]
    return Table(title, head, rows, f"On {' · '.join(common)}. {note}" if common else note)


def class_comparison(runs: Sequence[Run]) -> Table | None:
    """Accuracies by class, the worst first, or None where there are none."""
    found = [measured(run, "linear_probe", lambda row: row.metric == "class_accuracy") for run in runs]
    measures = dict.fromkeys(measure for of_run in found for measure in of_run)
    if not measures:
        return None
    table = comparison("Linear probe by class", runs, found, bars=True)
    means = [np.mean([of_run[measure].value for of_run in found if measure in of_run]) for measure in measures]
    order = np.argsort(means, kind="stable").tolist()
    note = "In percent, with 95% Wilson intervals; worst classes first."
    if len(order) > _MOST_CLASSES:
        note += f" Shown are the {_MOST_CLASSES // 2} worst and {_MOST_CLASSES // 2} best of {len(order)} classes."
        order = order[: _MOST_CLASSES // 2] + order[-_MOST_CLASSES // 2 :]
    return Table(table.title, table.head, [table.rows[i] for i in order], note, folded=len(order) > 12)


def transposed(table: Table) -> Table:
    """A line a run and a column a measure, for few measures of many runs."""
    columns = list(zip(table.head, *table.rows, strict=True))
    return Table(table.title, columns[0], columns[1:], table.note, table.folded)


def value_cell(row: Row, best: float | None = None, bar: bool = False, signed: bool = False) -> Cell:
    """A share in percent, or a difference in points, with its interval or its standard deviation over trials."""

    def percent(share: float) -> str:
        return f"{100 * share:{'+' if signed else ''}.1f}".replace("-", "−")

    spread = ""
    if row.ci_low is not None and row.ci_high is not None:
        spread = f"{percent(row.ci_low)} to {percent(row.ci_high)}"
    elif isinstance(row.params.get("std"), int | float):
        spread = f"± {100 * row.params['std']:.1f}"
    return Cell(percent(row.value), spread, row.value == best, bar=row.value if bar else None)


def not_evaluated(runs: Sequence[Run], task: str) -> list[Missing]:
    """Says which runs have no results of an evaluation, and how to get them."""
    script, options = _COMMANDS[task]
    return [
        Missing(f"{run.name}: not evaluated. Run", f"{script} {shlex.quote(run.path)}{options}")
        for run in runs
        if task not in run.results
    ]


def with_projector(runs: Sequence[Run], task: str, parts: Callable[[Sequence[Run]], list[Part]]) -> list[Part]:
    """What `parts` makes of results on backbone features, and after it on projector features where there are such."""
    others = [replace(run, results=run.of_projector) for run in runs]
    if not any(task in run.results for run in others):
        return parts(runs)
    further = [part for part in parts(others) if not isinstance(part, Missing)]
    return [*parts(runs), *(replace(part, title=f"{part.title}, projector features") for part in further)]


def name_of(score_or_metric: str) -> str:
    """What people call it."""
    plain_name = score_or_metric.replace("_", " ")
    return _NAMES.get(score_or_metric, plain_name)


def _measure(row: Row, results: Results) -> Measure:
    protocol = [f"{row.dataset} {row.split}", f"{row.n:,} images"]
    protocol += [f"classes {plain(results.data[name])}" for name in ("open_set", "classes") if results.data.get(name)]
    protocol += [f"{row.feature} features"] if row.feature != "backbone" else []
    if row.metric == "class_accuracy":
        return Measure(str(row.params.get("class")), "", tuple(protocol), False)
    metric = name_of(row.metric)
    if "label_fraction" in row.params:
        metric += f", {100 * row.params['label_fraction']:g}% of the labels"
    if "group" in row.params:
        metric += f", {row.params['group']}"
    protocol += [f"trial {row.trial}"] if row.trial is not None else []
    protocol += [_said(name, value) for name, value in row.params.items() if name not in _NO_PROTOCOL]
    return Measure(name_of(row.score), metric, tuple(protocol), row.metric in _LESS_IS_BETTER)


def _said(name: str, value: object) -> str:
    return f"{plain(value)} {_COUNTS[name]}" if name in _COUNTS else f"{name.replace('_', ' ')} {plain(value)}"
