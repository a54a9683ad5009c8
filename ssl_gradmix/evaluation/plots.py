"""Figures of results, in one look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ssl_gradmix.evaluation.results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID, ACCENT = "#1f2430", "#6b7280", "#e5e7eb", "#3b6fb6"
_MOST_BARS = 50


def class_accuracies(rows: Sequence[Row], overall: Row, title: str) -> Figure:
    """Draws accuracy by class as bars with 95% intervals, worst at the bottom, and the overall accuracy as a line.

    Args:
        rows: One a class, with its name as `params["class"]`. Of more than 50, the 25 worst and the 25 best are drawn.
        overall: Accuracy over all classes.
        title: Said above.
    """
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: row.value)
    if len(rows) > _MOST_BARS:
        title += f": {_MOST_BARS // 2} worst and best of {len(rows)} classes"
        rows = rows[: _MOST_BARS // 2] + rows[-_MOST_BARS // 2 :]
    figure = Figure(figsize=(6.4, 1.4 + 0.24 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    values = [row.value for row in rows]
    whiskers = [[row.value - row.ci_low for row in rows], [row.ci_high - row.value for row in rows]]
    axes.barh(
        [row.params["class"] for row in rows],
        values,
        height=0.7,
        color=ACCENT,
        xerr=whiskers,
        error_kw={"ecolor": INK, "elinewidth": 0.8},
    )
    axes.axvline(overall.value, color=INK, linewidth=1, linestyle="--")
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(f"accuracy with 95% interval (dashed: all {overall.n} images, {overall.value:.1%})", color=INK)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, colors=INK)
    return figure
