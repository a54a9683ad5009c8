"""The figures of a report, as SVG that stands in an HTML page and takes its fonts and colors.

Every text in them is plain: what looks like mathematics or markup is not read as such.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colors that the page knows by name, in a light and a dark shade each.
_INK, _MUTED, _RULE, _PAPER = "#1b1f27", "#626a76", "#dfe2e7", "#fefefe"
_RUNS = ("#0072b2", "#d55e00", "#009e73", "#b8559a", "#9a7500", "#5b5bd6")
_DASHES = ("-", (0, (5, 2)), (0, (2, 2)), (0, (6, 2, 2, 2)))
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _RULE: "--rule", _PAPER: "--paper"} | {
    c: f"--run-{i}" for i, c in enumerate(_RUNS)
}

_BINS = 60


@dataclass(frozen=True)
class Line:
    """A curve of one run.

    Args:
        run: Index of the run, which gives color and dashes.
        x: (N,).
        y: (N,).
    """

    run: int
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray


def curves(lines: Sequence[Line], x_label: str, shares: bool = False) -> str:
    """Draws measured points and lines between them.

    Args:
        lines: A curve a run.
        x_label: Said below.
        shares: Whether y is a share, to be shown in percent.
    """
    with _drawing(x_label) as (figure, axes):
        for line in lines:
            marker = "o" if len(line.x) <= 12 else None
            axes.plot(line.x, line.y, color=_color(line.run), linestyle=_dashes(line.run), marker=marker, markersize=3)
        if len({x for line in lines for x in line.x}) == 1:
            axes.set_xlim(lines[0].x[0] - 1, lines[0].x[0] + 1)  # or ticks would stand at fractions
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
        axes.yaxis.get_major_locator().set_params(nbins=6)
        if shares:
            axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g}")
        return _svg(figure)


def rates(lines: Sequence[Line], y_label: str, chance: bool = False) -> str:
    """Draws a ROC or OSCR curve a line over the share of unknown samples accepted, 0 to 1 both.

    Args:
        lines: One or several a run.
        y_label: Said above.
        chance: Draw the diagonal.
    """
    with _drawing("unknown accepted (%)", y_label, height=2.9) as (figure, axes):
        if chance:
            axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
        alone = len(lines) == len({line.run for line in lines})
        for line in lines:
            axes.plot(
                *_thinned(np.asarray(line.x), np.asarray(line.y), max(80, 4000 // len(lines))),
                color=_color(line.run),
                linestyle=_dashes(line.run),
                linewidth=1.4 if alone else 0.9,
            )
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda share, _: f"{100 * share:g}")
        return _svg(figure)


def histogram(known: np.ndarray, unknown: np.ndarray, run: int, threshold: float | None) -> str:
    """Draws how scores of known samples (filled) and of unknown ones (outlined) are distributed.

    Args:
        known: Scores.
        unknown: Scores.
        run: Index of the run, which gives the color.
        threshold: Marked by a dashed line.
    """
    low, high = np.quantile(np.concatenate([known, unknown]), [0.002, 0.998])
    edges = np.linspace(low, high, _BINS + 1) if high > low else np.linspace(low - 0.5, low + 0.5, _BINS + 1)
    with _drawing("score", height=1.75) as (figure, axes):
        for scores, style in (
            (known, {"fill": True, "color": _color(run), "alpha": 0.55}),
            (unknown, {"edgecolor": _INK, "linewidth": 1.1}),
        ):
            counts, _ = np.histogram(np.clip(scores, edges[0], edges[-1]), edges)
            axes.stairs(counts / len(scores), edges, **style)
        if threshold is not None and edges[0] <= threshold <= edges[-1]:
            axes.axvline(threshold, color=_INK, linewidth=1, linestyle="--")
        axes.set(yticks=[], ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(nbins=6)
        return _svg(figure)


def heat_map(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], difference: bool = False) -> str:
    """Draws a table of shares, in percent: dark is high, or, of differences, orange is below zero and violet above.

    Args:
        values: (len(rows), len(columns)), NaN where there is none.
        rows: Their names.
        columns: Their names.
        difference: Whether the values are differences of shares.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    reach = np.nanmax(np.abs(values), initial=0.01)
    scale = Normalize(-reach, reach) if difference else Normalize(0, 1)
    colors = colormaps["PuOr" if difference else "Blues"](scale(values))
    with _drawing("severity", height=0.55 + 0.245 * len(rows)) as (figure, axes):
        axes.pcolormesh(
            np.ma.masked_invalid(values),
            cmap="PuOr" if difference else "Blues",
            norm=scale,
            edgecolors=_PAPER,
            linewidth=1,
        )
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                light = colors[i, j, :3] @ (0.299, 0.587, 0.114) > 0.55
                text = f"{100 * value:+.1f}".replace("-", "−") if difference else f"{100 * value:.1f}"
                axes.text(
                    j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=7.5, color="black" if light else "white"
                )
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
        axes.set_yticks(np.arange(len(rows)) + 0.5, [_shortened(name) for name in rows])
        axes.invert_yaxis()
        axes.grid(False)
        axes.spines[:].set_visible(False)
        return _svg(figure)


def scatter(points: np.ndarray, colors: Sequence[str], labels: tuple[str, str]) -> str:
    """Draws points in the plane, as an image inside the SVG where they are many.

    Args:
        points: (N, 2).
        colors: One a point.
        labels: Of the axes.
    """
    with _drawing(*labels, height=3.1) as (figure, axes):
        axes.scatter(
            *points.T, c=list(colors), s=np.clip(8000 / len(points), 7, 16), alpha=0.75, linewidths=0, rasterized=True
        )
        axes.grid(False)
        axes.set(xticks=[], yticks=[])
        axes.set_aspect("equal", adjustable="datalim")
        return _svg(figure)


def _shortened(name: str, length: int = 24) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _color(run: int) -> str:
    return _RUNS[run % len(_RUNS)]


def _dashes(run: int) -> str | tuple:
    return _DASHES[run // len(_RUNS) % len(_DASHES)]


def _thinned(x: np.ndarray, y: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Keeps what can be seen of a rising curve: points evenly spaced along it, both ends among them."""
    if len(x) <= points:
        return x, y
    along = np.concatenate([[0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
    kept = np.unique(np.searchsorted(along, np.linspace(0, along[-1], points)))
    return x[kept], y[kept]


@contextmanager
def _drawing(x_label: str, y_label: str = "", height: float = 2.4) -> Iterator[tuple[Figure, Axes]]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "font.size": 8.5,
        "text.parse_math": False,
        "text.color": _INK,
        "axes.edgecolor": _MUTED,
        "axes.labelcolor": _MUTED,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "grid.color": _RULE,
        "grid.linewidth": 0.7,
        "lines.linewidth": 1.6,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "savefig.dpi": 220,
        "font.sans-serif": ["DejaVu Sans"],  # measures the text; the page's own font shows it
        "svg.fonttype": "none",
        "svg.hashsalt": "report",
    }
    with rc_context(style):
        figure = Figure(figsize=(3.6, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(x_label)
        axes.set_title(y_label, loc="left", fontsize=8.5, color=_MUTED)
        yield figure, axes


def _svg(figure: Figure) -> str:
    """The figure as an element of an HTML page: as wide as its place, in the page's colors, without own style.

    The ids left in it are those that it refers to.
    """
    buffer = StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = text.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "").replace(
        ' xmlns="http://www.w3.org/2000/svg"', ""
    )
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)  # a hundredth of a point
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text
