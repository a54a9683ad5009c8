"""First section of a report: what the runs reached, and whether they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
from scipy import stats

from ssl_gradmix.evaluation.intervals import Interval, paired_difference
from ssl_gradmix.evaluation.metrics import auroc
from ssl_gradmix.evaluation.report.page import Cell, Section, Table
from ssl_gradmix.evaluation.report.runs import Run
from ssl_gradmix.evaluation.report.tables import in_words, measure_of, percent, value_cell
from ssl_gradmix.evaluation.rows import param
from ssl_gradmix.run_folder import flat

_HEADLINES = {
    "Linear probe": ("linear_probe", "linear", "top1"),
    "Weighted kNN": ("linear_probe", "knn", "top1"),
    "AUROC of kNN distance": ("osr", "knn_distance", "auroc"),
    "Corruption error": ("corruption", "linear", "mean_corruption_error"),
}


def overview(runs: Sequence[Run]) -> Section:
    """What runs reached, their difference to the first, and means over seeds."""
    columns = {name: [_headline(run, *which) for run in runs] for name, which in _HEADLINES.items()}
    columns = {name: found for name, found in columns.items() if any(row is not None for row in found)}
    groups = _groups_of_seeds(runs)
    lines = []
    for indices in groups:
        for i in indices:
            cells = [Cell("–") if found[i] is None else value_cell(found[i]) for found in columns.values()]
            lines.append([Cell(runs[i].name, _description(runs[i]), run=i), *cells])
        if len(indices) > 1:
            means = [_mean_of_seeds([found[i] for i in indices]) for found in columns.values()]
            lines.append([Cell(f"Mean of {len(indices)} seeds", "95% t interval"), *means])
    note = (
        "Of backbone features, in percent. In small print 95% intervals, or standard deviations over trials; they "
        "cover the draw of test images, not another training run. One open-set score, kNN distance, stands for all: it "
        "was fixed beforehand, while the best of them would have been chosen on test images."
    )
    if any(len({measure_of(row).protocol for row in found if row is not None}) > 1 for found in columns.values()):
        note += " Some of these numbers are of different data or protocols, and do not compare: see the tables below."
    table = Table("Results", [Cell("Run"), *map(Cell, columns)], lines, note)
    if len(groups) == 1:
        return Section("Overview", [table])
    differences, said = _of_groups(runs, groups, columns) if len(groups) < len(runs) else _paired(runs)
    return Section("Overview", [differences, table], " ".join(said))


def _groups_of_seeds(runs: Sequence[Run]) -> list[list[int]]:
    """Numbers of the runs that differ in their seed alone."""
    groups: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        settings = flat(run.config or {"results": i})
        left_out = ("run", "training.seed")
        kept = {k: v for k, v in settings.items() if k not in left_out and not k.startswith("environment")}
        groups.setdefault(repr(sorted(kept.items(), key=str)), []).append(i)
    return list(groups.values())


def _headline(run: Run, task: str, score: str, metric: str) -> pd.Series | None:
    """The last row of that kind, a mean over trials where there are such."""
    rows = run.rows(task)
    rows = rows[(rows["score"] == score) & (rows["metric"] == metric)]
    rows = rows[param(rows, "label_fraction").isna() & param(rows, "corruption").isna()]
    means = rows[rows["trial"].isna()]
    found = rows if means.empty else means
    return None if found.empty else found.iloc[-1]


def _mean_of_seeds(found: Sequence[pd.Series | None]) -> Cell:
    if any(row is None for row in found):
        return Cell("–")
    mean, low, high = _with_t_interval([row["value"] for row in found])
    return Cell(percent(mean), f"{percent(low)} to {percent(high)}")


def _with_t_interval(values: Sequence[float]) -> Interval:
    """Mean and 95% t interval."""
    mean, margin = float(np.mean(values)), float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    return Interval(mean, mean - margin, mean + margin)


def _paired(runs: Sequence[Run]) -> tuple[Table, list[str]]:
    """Differences to the first run on the same images."""
    measures = {
        "Linear probe": partial(_difference_of_hits, score="linear"),
        "Weighted kNN": partial(_difference_of_hits, score="knn"),
        "AUROC of kNN distance": _difference_of_aurocs,
    }
    found = {i: [measure(runs[0], run) for measure in measures.values()] for i, run in enumerate(runs) if i}
    note = (
        "In points, on the same test images: paired bootstrap over images with 95% interval; of several trials "
        "mean and t interval over trials. Marked are intervals clear of 0. Two trainings that differ in their seed "
        "alone may well differ so: give several seeds of each to have them compared."
    )
    return _difference_table(runs[0].name, [(runs[i].name, i) for i in found], list(measures), found, note)


def _of_groups(
    runs: Sequence[Run], groups: Sequence[Sequence[int]], columns: Mapping[str, Sequence[pd.Series | None]]
) -> tuple[Table, list[str]]:
    """Differences to the first group of seeds."""

    def difference(rows: Sequence[pd.Series | None], group: Sequence[int]) -> Interval | None:
        found = [[rows[i] for i in members if rows[i] is not None] for members in (group, groups[0])]
        if min(map(len, found)) < 2 or len({measure_of(row).protocol for rows in found for row in rows}) > 1:
            return None
        a, b = ([row["value"] for row in rows] for rows in found)
        interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
        return Interval(float(np.mean(a) - np.mean(b)), *map(float, interval))

    names = [runs[group[0]].name + f" ({len(group)} seeds)" * (len(group) > 1) for group in groups]
    found = {i: [difference(rows, group) for rows in columns.values()] for i, group in enumerate(groups) if i}
    note = "In points, means over seeds with Welch's 95% t interval. Marked are intervals clear of 0."
    return _difference_table(names[0], [(names[i], groups[i][0]) for i in found], [*columns], found, note)


def _difference_table(
    first: str,
    names: Sequence[tuple[str, int]],
    measures: Sequence[str],
    found: Mapping[int, Sequence[Interval | None]],
    note: str,
) -> tuple[Table, list[str]]:
    lines, said = [], []
    for (name, run), differences in zip(names, found.values(), strict=True):
        cells, clear, unclear = [], [], []
        for measure, difference in zip(measures, differences, strict=True):
            if difference is None:
                cells.append(Cell("–"))
                continue
            text = percent(difference.value, True)
            detail = f"{percent(difference.low, True)} to {percent(difference.high, True)}"
            is_clear = difference.low > 0 or difference.high < 0
            cells.append(Cell(text, detail, is_clear))
            (clear if is_clear else unclear).append(f"{measure} {text} ({detail})")
        lines.append([Cell(name, run=run), *cells])
        parts = [f"clear of 0: {', '.join(clear)}"] if clear else []
        parts += [f"no difference shown: {', '.join(unclear)}"] if unclear else []
        said.append(f"{name} minus {first}: {'; '.join(parts) or 'not evaluated on the same images'}.")
    return Table(f"Difference from {first}", [Cell(""), *map(Cell, measures)], lines, note), said


def _difference_of_hits(first: Run, other: Run, score: str) -> Interval | None:
    """Of two classifiers on the same test images."""
    hits = []
    for run in (first, other):
        about = run.results["linear_probe", "backbone"].about if ("linear_probe", "backbone") in run.results else {}
        found = about.get("hits", {})
        try:
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(found[score]), np.uint8))[: found["n"]]
            hits.append((found["images"], bits.astype(float)))
        except (KeyError, TypeError, ValueError):
            return None
    (images, ours), (others, theirs) = hits
    if images != others or len(ours) != len(theirs) or not len(ours):
        return None
    return Interval(*paired_difference(_mean, (theirs,), (ours,), strata=np.zeros(len(ours)))[:3])


def _mean(hits: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray | float:
    return float(hits.mean()) if weights is None else weights @ hits / weights.sum(-1)


def _difference_of_aurocs(first: Run, other: Run, score: str = "knn_distance") -> Interval | None:
    if not all(("osr", "backbone") in run.results for run in (first, other)):
        return None
    ours, theirs = (run.results["osr", "backbone"] for run in (first, other))
    shared = [
        (theirs.samples[group], ours.samples[group])
        for group, digest in ours.images.items()
        if theirs.images.get(group) == digest
        and all(score in results.samples.get(group, {}) for results in (ours, theirs))
    ]
    if not shared:
        return None
    if len(shared) == 1:
        ((a, b),) = shared
        known = a["is_known"]
        return Interval(*paired_difference(auroc, (a[score], known), (b[score], known), strata=known)[:3])
    return _with_t_interval([auroc(a[score], a["is_known"]) - auroc(b[score], b["is_known"]) for a, b in shared])


def _description(run: Run) -> str:
    settings = flat(run.config or {})
    described = {
        "method.name": ("", ""),
        "extra_view": ("third view ", ""),
        "gradmix.region": ("region ", ""),
        "backbone.name": ("", ""),
        "data.name": ("", ""),
        "data.open_set": ("known classes ", ""),
        "training.epochs": ("", " epochs"),
        "training.seed": ("seed ", ""),
    }
    skipped = {"gradmix.region"} if settings.get("extra_view") != "gradmix" else set()
    said = [
        f"{before}{in_words(settings[name])}{after}"
        for name, (before, after) in described.items()
        if name in settings and name not in skipped
    ]
    return ", ".join(said) or "results only"
