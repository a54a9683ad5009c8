"""From result rows of several runs to tables that set only like beside like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ssl_gradmix.evaluation import plots
from ssl_gradmix.evaluation.report.page import Cell, Table
from ssl_gradmix.evaluation.report.runs import Run

_NAMES = {
    "linear": "Linear probe",
    "knn": "Weighted kNN",
    "knn_distance": "kNN distance",
    "top_k_cosine": "Top-k cosine",
    "ncm": "Nearest class mean, cosine",
    "ncm_euclidean": "Nearest class mean, Euclidean",
    "mahalanobis": "Mahalanobis",
    "rmd": "Relative Mahalanobis",
    "feature_norm": "Feature norm",
    "energy": "Energy",
    "vim": "ViM",
    "msp": "Maximum softmax",
    "max_logit": "Maximum logit",
    "attributed": "Attributed part",
    "random": "Part at a random place",
    "center": "Part in the middle",
    "reliance": "",
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
_NO_PROTOCOL = {"learning_rate", "labels", "label_fraction", "class", "corruption", "severity", "group", "std", "over"}
"""Parameters that say what was found, or that stand elsewhere, and so do not set two numbers apart."""

_COUNTS = {"epochs": "epochs", "corruptions": "corruptions", "n_known": "known classes"}
_MOST_CLASSES = 50


class Measure(NamedTuple):
    """What a number is, in words. Numbers compare where all that is said of them is the same."""

    score: str
    metric: str
    protocol: tuple[str, ...]


Measured = Mapping[Measure, pd.Series]


def measured(rows: pd.DataFrame) -> Measured:
    """Rows by what they measure: means over trials where there are such."""
    found = [row for _, row in rows.iterrows()]
    means = [row for row in found if pd.isna(row["trial"])]
    averaged = {(*_of_trial(row), trial) for row in means for trial in row["params"].get("trials", ())}
    return {
        measure_of(row): row
        for row in found
        if pd.isna(row["trial"]) or (*_of_trial(row), row["trial"]) not in averaged
    }


def _of_trial(row: pd.Series) -> tuple:
    params = [row["params"].get(name) for name in ("protocol", "n_known", "epochs", "k")]
    return row["dataset"], row["score"], row["metric"], *params


def measure_of(row: pd.Series) -> Measure:
    """What a row measures."""
    params, trials = row["params"], row["params"].get("trials")
    images = f"{row['n']:,} images" + (f" a trial, {len(trials)} trials" if isinstance(trials, list) else "")
    protocol = [f"{row['dataset']} {row['split']}", images]
    if row["metric"] == "class_accuracy":
        return Measure(str(params.get("class")), "", tuple(protocol))
    metric = name_of(row["metric"])
    if "label_fraction" in params:
        metric += f", {100 * params['label_fraction']:g}% of the labels"
    if "group" in params:
        metric += f", {in_words(params['group'])}"
    protocol += [] if pd.isna(row["trial"]) else [f"trial {row['trial']}"]
    protocol += [_said(name, value) for name, value in params.items() if name not in _NO_PROTOCOL]
    return Measure(name_of(row["score"]), metric, tuple(protocol))


def _said(name: str, value: object) -> str:
    if name in _COUNTS:
        return f"{in_words(value)} {_COUNTS[name].removesuffix('s' * (value == 1))}"
    return f"{plots.plain(name)} {in_words(value)}"


def comparison(
    title: str, runs: Sequence[Run], found: Sequence[Measured], note: str = "", bars: bool = False, folded: bool = False
) -> Table:
    """A line a measure and a column a run. What all measures have in common is said in the note."""
    measures = list(dict.fromkeys(measure for of_run in found for measure in of_run))
    if bars:
        worst = {m: np.mean([of_run[m]["value"] for of_run in found if m in of_run]) for m in measures}
        measures.sort(key=worst.__getitem__)
        if len(measures) > _MOST_CLASSES:
            note += f" Shown are the {_MOST_CLASSES // 2} worst and {_MOST_CLASSES // 2} best of {len(measures)}."
            measures = measures[: _MOST_CLASSES // 2] + measures[-_MOST_CLASSES // 2 :]
    protocols = [measure.protocol for measure in measures]
    common = [said for said in next(iter(protocols), ()) if all(said in protocol for protocol in protocols)]
    lines = []
    for measure in measures:
        cells = [value_cell(of_run[measure], bars) if measure in of_run else Cell("–") for of_run in found]
        what = ", ".join(part for part in (measure.score, measure.metric) if part and part != title)
        lines.append([Cell(what, " · ".join(said for said in measure.protocol if said not in common)), *cells])
    head = [Cell(""), *(Cell(run.name, run=i) for i, run in enumerate(runs))]
    return Table(title, head, lines, f"On {' · '.join(common)}. {note}" if common else note, folded)


def value_cell(row: pd.Series, bar: bool = False, signed: bool = False) -> Cell:
    """A share in percent, or a difference in points, with its interval or its standard deviation over trials."""
    detail = ""
    if not pd.isna(row["ci_low"]):
        detail = f"{percent(row['ci_low'], signed)} to {percent(row['ci_high'], signed)}"
    elif isinstance(row["params"].get("std"), int | float):
        detail = f"± {100 * row['params']['std']:.1f}"
    if isinstance(row["params"].get("p_value"), int | float):
        detail += f", {plots.p_value(row['params']['p_value'])}"
    return Cell(percent(row["value"], signed), detail, bar=row["value"] if bar else None)


def percent(share: float, signed: bool = False) -> str:
    """In percent, or in points."""
    return f"{100 * share:{'+' if signed else ''}.1f}".replace("-", "−")


def name_of(score_or_metric: str) -> str:
    """What people call it."""
    return _NAMES.get(score_or_metric, plots.plain(score_or_metric))


def in_words(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value))
    return "–" if value is None else str(value)
