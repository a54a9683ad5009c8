"""The figure of an evaluation under corruption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ssl_gradmix.data.corruptions import COMMON, SEVERITIES
from ssl_gradmix.evaluation.plots import GRID, INK, MUTED
from ssl_gradmix.evaluation.results import Row
from ssl_gradmix.evaluation.robustness import GROUP_OF, by_corruption, clean_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = {"noise": "#0072b2", "blur": "#d55e00", "weather": "#009e73", "digital": "#cc79a7", "extra": MUTED}


def severities(rows: Sequence[Row], score: str, metric: str, title: str) -> Figure:
    """Draws a heat map of corruptions by severity, and beside it the curve of each group over severity.

    Args:
        rows: As `robustness.summarize` takes them.
        score: What to draw, for instance `linear`.
        metric: `accuracy` or `auroc`.
        title: Said above.
    """
    from matplotlib.figure import Figure

    table = by_corruption(rows, score, metric)
    clean = clean_value(rows, score, metric)
    figure = Figure(figsize=(11, max(4.2, 1.4 + 0.29 * len(table))), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    for axes in (left, right):
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, colors=INK, labelsize=9)
        axes.set_xlabel("severity", color=INK)
    _heat_map(left, table, metric)
    _curves(right, table, clean, metric)
    return figure


def _heat_map(axes: Axes, table: dict[str, list[float]], metric: str) -> None:
    """One row a corruption, groups set apart; each cell says its value in percent."""
    names, values = list(table), np.array(list(table.values()))
    mesh = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        light = np.dot(mesh.to_rgba(value)[:3], (0.299, 0.587, 0.114)) > 0.5
        axes.text(j, i, f"{100 * value:.1f}", ha="center", va="center", fontsize=8, color="black" if light else "white")
    for i in range(1, len(names)):
        if GROUP_OF[names[i]] != GROUP_OF[names[i - 1]]:
            axes.axhline(i - 0.5, color="white", linewidth=3)
    axes.set_xticks(range(len(SEVERITIES)), SEVERITIES)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(_COLORS[GROUP_OF[name]])
    axes.set_title(f"{_called(metric)} in %", loc="left", fontsize=10, color=MUTED)


def _curves(axes: Axes, table: dict[str, list[float]], clean: float, metric: str) -> None:
    """The mean of each group's corruptions by severity, that of all common ones, and the clean value."""
    axes.axhline(clean, color=INK, linewidth=1, linestyle="--", label=f"clean images, {clean:.1%}")
    for group in dict.fromkeys(GROUP_OF[name] for name in table):
        members = [values for name, values in table.items() if GROUP_OF[name] == group]
        axes.plot(
            SEVERITIES,
            np.mean(members, axis=0),
            color=_COLORS[group],
            marker="o",
            markersize=4,
            label=f"{group} ({len(members)})",
        )
    common = [values for name, values in table.items() if name in COMMON]
    if common:
        axes.plot(
            SEVERITIES,
            np.mean(common, axis=0),
            color=INK,
            linewidth=2.5,
            label=f"all common ({len(common)})",
        )
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_xticks(SEVERITIES)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="best")
    axes.set_title(f"{_called(metric)}, mean over corruptions", loc="left", fontsize=10, color=MUTED)


def _called(metric: str) -> str:
    return "AUROC" if metric == "auroc" else metric
