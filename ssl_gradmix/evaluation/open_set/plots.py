"""The figure of an open-set evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ssl_gradmix.evaluation.metrics import auroc, oscr, oscr_curve, roc_curve, threshold_at_tpr
from ssl_gradmix.evaluation.plots import ACCENT, GRID, INK, MUTED
from ssl_gradmix.evaluation.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Arrays = Mapping[str, np.ndarray]

_COLORS = ("#3b6fb6", "#d55e00", "#009e73", "#b8559a", "#9a7500", "#5b5bd6")
_CURVES = ("max_logit", "knn_distance", "top_k_cosine", "mahalanobis")
_SHOWN = "max_logit"
_FPR = np.linspace(0, 1, 501)


def overview(groups: Mapping[str, Arrays], rows: Sequence[Row], title: str, several_sets: bool = False) -> Figure:
    """Draws AUROC by score, ROC and OSCR curves, and how one score is distributed.

    Args:
        groups: Samples of each trial, or of each other data set, as `recognition.detect` gives them.
        rows: Those of metric `auroc` are drawn: of the groups in their order, score by score.
        title: Said above.
        several_sets: Whether the groups are different data sets, of which each has its own curves; curves of trials are
            averaged.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 8), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    (scores, roc), (histogram, classified) = figure.subplots(2, 2, width_ratios=(1.1, 1))
    _aurocs(scores, list(groups), [row for row in rows if row.metric == "auroc"], several_sets)
    if several_sets:
        curves = {name: (_SHOWN, [arrays]) for name, arrays in groups.items()}
    else:
        curves = {score: (score, list(groups.values())) for score in _CURVES}
    how = f" of {_plain(_SHOWN)}" if several_sets else ", mean over trials" if len(groups) > 1 else ""
    _curves(roc, curves, roc_curve, auroc, ("is_known",))
    roc.set_title(f"ROC and AUROC{how}", loc="left", fontsize=10, color=INK)
    roc.set_ylabel("known accepted", color=INK)
    _curves(classified, curves, oscr_curve, oscr, ("is_known", "correct"))
    classified.set_title(f"OSCR{how}", loc="left", fontsize=10, color=INK)
    classified.set_ylabel("known accepted and named right", color=INK)
    name, arrays = next(iter(groups.items()))
    _histogram(histogram, arrays)
    of_group = f", {name}" if len(groups) > 1 else ""
    histogram.set_title(f"Distribution of {_plain(_SHOWN)}{of_group}", loc="left", fontsize=10, color=INK)
    for axes in (scores, roc, histogram, classified):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(MUTED)
        axes.tick_params(length=0, colors=INK, labelsize=9)
        axes.set_axisbelow(True)
    return figure


def _aurocs(axes: Axes, names: Sequence[str], rows: Sequence[Row], several_sets: bool) -> None:
    """A dot a group; of trials their mean as a line, of a single group its interval."""
    by_score: dict[str, list[Row]] = {}
    for row in rows:
        by_score.setdefault(row.score, []).append(row)
    order = sorted(by_score, key=lambda score: np.mean([row.value for row in by_score[score]]))
    for y, score in enumerate(order):
        values = [row.value for row in by_score[score]]
        if len(names) == 1:
            (row,) = by_score[score]
            axes.plot([row.ci_low, row.ci_high], [y, y], color=ACCENT, linewidth=1.5)
        elif not several_sets:
            axes.plot([np.mean(values)] * 2, [y - 0.3, y + 0.3], color=INK, linewidth=2)
        colors = [_COLORS[i % len(_COLORS)] for i in range(len(values))] if several_sets else ACCENT
        axes.scatter(
            values, [y] * len(values), s=28, c=colors, alpha=1 if several_sets else 0.7, linewidths=0, zorder=3
        )
    if several_sets:
        for i, name in enumerate(names):
            axes.scatter([], [], s=28, color=_COLORS[i % len(_COLORS)], label=name)
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    axes.axvline(0.5, color=MUTED, linewidth=1, linestyle=":")
    axes.set_yticks(range(len(order)), [_plain(score) for score in order])
    axes.set_xlabel("AUROC (dotted: chance)", color=INK)
    what = "one dot a data set" if several_sets else "one dot a trial, line: mean" if len(names) > 1 else "95% interval"
    axes.set_title(f"AUROC by score: {what}", loc="left", fontsize=10, color=INK)
    axes.grid(axis="x", color=GRID)


def _curves(
    axes: Axes,
    curves: Mapping[str, tuple[str, Sequence[Arrays]]],
    curve: Callable[..., tuple[np.ndarray, ...]],
    area: Callable[..., float],
    labels: Sequence[str],
) -> None:
    """A line each, the mean over groups at equal false positive rates, with the mean area below it."""
    for i, (name, (score, groups)) in enumerate(curves.items()):
        arguments = [[arrays[score], *(arrays[label] for label in labels)] for arrays in groups]
        mean = np.mean([np.interp(_FPR, *curve(*each)[:2]) for each in arguments], axis=0)
        mean_area = np.mean([area(*each) for each in arguments])
        axes.plot(_FPR, mean, color=_COLORS[i % len(_COLORS)], label=f"{_plain(name)}  {mean_area:.3f}")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.01)
    axes.set_xlabel("unknown accepted", color=INK)
    axes.grid(color=GRID)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="best")


def _histogram(axes: Axes, arrays: Arrays) -> None:
    scores, known = arrays[_SHOWN], arrays["is_known"]
    low, high = np.quantile(scores, (0.001, 0.999))
    bins = np.linspace(low, high, min(40, int(np.sqrt(len(scores)))) + 1)
    for chosen, label, color in ((known, "known", _COLORS[0]), (~known, "unknown", _COLORS[1])):
        weights = np.full(chosen.sum(), 1 / chosen.sum())
        axes.hist(scores[chosen].clip(low, high), bins, weights=weights, color=color, alpha=0.55, label=label)
    axes.axvline(threshold_at_tpr(scores, known), color=INK, linewidth=1, linestyle="--", label="accepts 95% of known")
    axes.set_xlabel(_plain(_SHOWN), color=INK)
    axes.set_ylabel("share of images", color=INK)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def _plain(name: str) -> str:
    return name.replace("_", " ")
