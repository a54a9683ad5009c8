"""Figures of results: one function a figure, written as PNG beside the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from ssl_gradmix.data.corruptions import COMMON, GROUP_OF, SEVERITIES
from ssl_gradmix.evaluation.metrics import auroc, oscr, oscr_curve, roc_curve, threshold_at_tpr
from ssl_gradmix.files import write_whole

INK, MUTED, GRID, ACCENT = "#1f2430", "#6b7280", "#e5e7eb", "#3b6fb6"
_COLORS = ("#3b6fb6", "#d55e00", "#009e73", "#b8559a", "#9a7500", "#5b5bd6")
_GROUP_COLORS = {"noise": "#0072b2", "blur": "#d55e00", "weather": "#009e73", "digital": "#cc79a7", "extra": MUTED}
_MOST_BARS = 50
_CURVES = ("max_logit", "knn_distance", "top_k_cosine", "mahalanobis")
_SCORE = "max_logit"
_FPR = np.linspace(0, 1, 501)

Arrays = Mapping[str, np.ndarray]


def write(path: str | Path, figure: Figure) -> None:
    """Writes a figure as PNG: whole or not at all. A `$` in a class's name starts no formula in it."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with rc_context({"text.parse_math": False}):  # for texts that are made only now, as those of ticks
        write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight"))


def p_value(p: float, resamples: int = 1000) -> str:
    """A p-value of `intervals.paired_difference`, which cannot come out smaller than 2 / (resamples + 1)."""
    return f"p {'≤' if p <= 2 / (resamples + 1) else '='} {p:.3f}"


def class_accuracies(rows: pd.DataFrame, overall: pd.Series, title: str) -> Figure:
    """Draws accuracy by class as bars with 95% intervals, worst at the bottom, and the overall accuracy as a line.

    Args:
        rows: One a class, with its name as `params["class"]`. Of more than 50, the 25 worst and the 25 best are drawn.
        overall: The row of all classes.
        title: Said above.
    """
    rows = rows.sort_values("value", kind="stable")
    if len(rows) > _MOST_BARS:
        title += f": {_MOST_BARS // 2} worst and best of {len(rows)} classes"
        rows = pd.concat([rows.iloc[: _MOST_BARS // 2], rows.iloc[-_MOST_BARS // 2 :]])
    figure = Figure(figsize=(6.4, 1.4 + 0.24 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(
        [params["class"] for params in rows["params"]],
        rows["value"],
        height=0.7,
        color=ACCENT,
        xerr=[rows["value"] - rows["ci_low"], rows["ci_high"] - rows["value"]],
        error_kw={"ecolor": INK, "elinewidth": 0.8},
    )
    axes.axvline(overall["value"], color=INK, linewidth=1, linestyle="--")
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(
        f"accuracy with 95% interval (dashed: all {overall['n']:,} images, {overall['value']:.1%})", color=INK
    )
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, colors=INK)
    return figure


def open_set(groups: Mapping[str, Arrays], rows: pd.DataFrame, title: str, several_sets: bool = False) -> Figure:
    """Draws AUROC by score, ROC and OSCR curves, and how one score is distributed.

    Args:
        groups: Samples of each trial, or of each other data set: `is_known`, `correct` and the scores, (N,) each.
        rows: Those of metric `auroc` are drawn: of the groups in their order, score by score.
        title: Said above.
        several_sets: Whether the groups are different data sets, of which each has its own curves; curves of trials are
            averaged.
    """
    figure = Figure(figsize=(11.5, 8), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    (scores, roc), (histogram, classified) = figure.subplots(2, 2, width_ratios=(1.1, 1))
    _aurocs(scores, list(groups), rows[rows["metric"] == "auroc"], several_sets)
    if several_sets:
        curves = {name: (_SCORE, [arrays]) for name, arrays in groups.items()}
    else:
        curves = {score: (score, list(groups.values())) for score in _CURVES}
    how = f" of {_plain(_SCORE)}" if several_sets else ", mean over trials" if len(groups) > 1 else ""
    _rates(roc, curves, roc_curve, auroc, ("is_known",))
    roc.set_title(f"ROC and AUROC{how}", loc="left", fontsize=10, color=INK)
    roc.set_ylabel("TPR: known accepted", color=INK)
    _rates(classified, curves, oscr_curve, oscr, ("is_known", "correct"))
    classified.set_title(f"OSCR{how}", loc="left", fontsize=10, color=INK)
    classified.set_ylabel("CCR: known accepted and classified correctly", color=INK)
    name, arrays = next(iter(groups.items()))
    _histogram(histogram, arrays)
    of_group = f", {name}" if len(groups) > 1 else ""
    histogram.set_title(f"Distribution of {_plain(_SCORE)}{of_group}", loc="left", fontsize=10, color=INK)
    for axes in (scores, roc, histogram, classified):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(MUTED)
        axes.tick_params(length=0, colors=INK, labelsize=9)
        axes.set_axisbelow(True)
    return figure


def corruptions(rows: pd.DataFrame, score: str, metric: str, clean: float, title: str) -> Figure:
    """Draws a heat map of corruptions by severity, and beside it the curve of each group over severity.

    Args:
        rows: A line a corruption and a column a severity, values in [0, 1].
        score: What is drawn, for instance `linear`.
        metric: `accuracy` or `auroc`.
        clean: The value on clean images.
        title: Said above.
    """
    figure = Figure(figsize=(11, max(4.2, 1.4 + 0.29 * len(rows))), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    for axes in (left, right):
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, colors=INK, labelsize=9)
        axes.set_xlabel("severity", color=INK)
    called = f"{'AUROC' if metric == 'auroc' else metric} of {_plain(score)}"
    _heat_map(left, rows)
    left.set_title(f"{called} in %", loc="left", fontsize=10, color=MUTED)
    _by_severity(right, rows, clean)
    right.set_title(f"{called}, mean over corruptions", loc="left", fontsize=10, color=MUTED)
    return figure


def _aurocs(axes: Axes, names: Sequence[str], rows: pd.DataFrame, several_sets: bool) -> None:
    """A dot a group; of trials their mean as a line, of a single group its interval."""
    means = rows.groupby("score")["value"].mean().sort_values(kind="stable")
    for y, (score, mean) in enumerate(means.items()):
        found = rows[rows["score"] == score]
        if len(names) == 1:
            axes.plot(found[["ci_low", "ci_high"]].iloc[0], [y, y], color=ACCENT, linewidth=1.5)
        elif not several_sets:
            axes.plot([mean] * 2, [y - 0.3, y + 0.3], color=INK, linewidth=2)
        colors = [_COLORS[i % len(_COLORS)] for i in range(len(found))] if several_sets else ACCENT
        alpha = 1 if several_sets else 0.7
        axes.scatter(found["value"], [y] * len(found), s=28, c=colors, alpha=alpha, linewidths=0, zorder=3)
    if several_sets:
        for i, name in enumerate(names):
            axes.scatter([], [], s=28, color=_COLORS[i % len(_COLORS)], label=name)
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    axes.axvline(0.5, color=MUTED, linewidth=1, linestyle=":")
    axes.set_yticks(range(len(means)), [_plain(score) for score in means.index])
    axes.set_xlabel("AUROC (dotted: chance)", color=INK)
    what = "one dot a data set" if several_sets else "one dot a trial, line: mean" if len(names) > 1 else "95% interval"
    axes.set_title(f"AUROC by score: {what}", loc="left", fontsize=10, color=INK)
    axes.grid(axis="x", color=GRID)


def _rates(
    axes: Axes,
    curves: Mapping[str, tuple[str, Sequence[Arrays]]],
    curve: Callable[..., tuple[np.ndarray, ...]],
    area: Callable[..., float],
    labels: Sequence[str],
) -> None:
    """A line each, the mean over groups at equal false positive rates, with the mean area below it."""
    for i, (name, (score, groups)) in enumerate(curves.items()):
        arguments: list[list[Any]] = [[arrays[score], *(arrays[label] for label in labels)] for arrays in groups]
        mean = np.mean([np.interp(_FPR, *curve(*each)[:2]) for each in arguments], axis=0)
        mean_area = np.mean([area(*each) for each in arguments])
        axes.plot(_FPR, mean, color=_COLORS[i % len(_COLORS)], label=f"{_plain(name)}  {mean_area:.3f}")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.01)
    axes.set_xlabel("FPR: unknown accepted", color=INK)
    axes.grid(color=GRID)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="best")


def _histogram(axes: Axes, arrays: Arrays) -> None:
    scores, known = arrays[_SCORE], arrays["is_known"]
    low, high = np.quantile(scores, (0.001, 0.999))
    bins = np.linspace(low, high, min(40, int(np.sqrt(len(scores)))) + 1)
    for chosen, label, color in ((known, "known", _COLORS[0]), (~known, "unknown", _COLORS[1])):
        weights = np.full(chosen.sum(), 1 / chosen.sum())
        axes.hist(scores[chosen].clip(low, high), bins, weights=weights, color=color, alpha=0.55, label=label)
    axes.axvline(threshold_at_tpr(scores, known), color=INK, linewidth=1, linestyle="--", label="accepts 95% of known")
    axes.set_xlabel(_plain(_SCORE), color=INK)
    axes.set_ylabel("share of images", color=INK)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def _heat_map(axes: Axes, rows: pd.DataFrame) -> None:
    """One row a corruption, groups set apart; each cell says its value in percent."""
    names, values = list(rows.index), rows.to_numpy()
    mesh = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        light = np.dot(mesh.to_rgba(value)[:3], (0.299, 0.587, 0.114)) > 0.5
        axes.text(j, i, f"{100 * value:.1f}", ha="center", va="center", fontsize=8, color="black" if light else "white")
    for i in range(1, len(names)):
        if GROUP_OF[names[i]] != GROUP_OF[names[i - 1]]:
            axes.axhline(i - 0.5, color="white", linewidth=3)
    axes.set_xticks(range(len(SEVERITIES)), SEVERITIES)
    axes.set_yticks(range(len(names)), map(_plain, names))
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(_GROUP_COLORS[GROUP_OF[name]])


def _by_severity(axes: Axes, rows: pd.DataFrame, clean: float) -> None:
    """The mean of each group's corruptions by severity, that of all common ones, and the clean value."""
    axes.axhline(clean, color=INK, linewidth=1, linestyle="--", label=f"clean images, {clean:.1%}")
    for group, members in rows.groupby(rows.index.map(GROUP_OF), sort=False):
        label = f"{group} ({len(members)})"
        axes.plot(SEVERITIES, members.mean(), color=_GROUP_COLORS[group], marker="o", markersize=4, label=label)
    common = rows[rows.index.isin(COMMON)]
    if len(common):
        axes.plot(SEVERITIES, common.mean(), color=INK, linewidth=2.5, label=f"all common ({len(common)})")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_xticks(SEVERITIES)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="best")


def _plain(name: str) -> str:
    return name.replace("_", " ")
