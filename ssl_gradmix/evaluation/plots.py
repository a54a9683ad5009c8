"""Figures of results: one function a figure, for one encoder or several; PNG beside results, SVG in a report.

Every text in them is plain: a `$` in the name of a class starts no formula.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ssl_gradmix.data.corruptions import COMMON, GROUP_OF
from ssl_gradmix.evaluation.metrics import auroc, oscr, oscr_curve, roc_curve, threshold_at_tpr
from ssl_gradmix.files import write_whole

INK, MUTED, RULE, PAPER = "#1b1f27", "#626a76", "#dfe2e7", "#fefefe"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#b8559a", "#9a7500", "#5b5bd6")
_DASHES = ("-", (0, (5, 2)), (0, (2, 2)), (0, (6, 2, 2, 2)))
_GROUP_COLORS = dict(zip(("noise", "blur", "weather", "digital", "extra"), (*COLORS[:4], MUTED), strict=True))
_VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--paper"} | {
    color: f"--run-{i}" for i, color in enumerate(COLORS)
}
"""Colors that a report's page knows by name, in a light and a dark shade each."""

_STYLE = {
    "font.size": 9,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.titlesize": "medium",
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "font.sans-serif": ["DejaVu Sans"],  # measures the text in a page too, whose own font shows it
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
}
_FPR = np.linspace(0, 1, 101)
_CURVES = ("max_logit", "knn_distance", "top_k_cosine", "mahalanobis")
_SCORE = "max_logit"
_MOST_BARS = 50

Arrays = Mapping[str, np.ndarray]


class Line(NamedTuple):
    """A curve of one run, (N,) points."""

    run: int  # its number, which gives color and dashes
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    band: tuple[np.ndarray, np.ndarray] | None = None  # lowest and highest y of what y is the mean of
    label: str | None = None  # said in a legend, if there is to be one

    @property
    def style(self) -> dict:
        """How matplotlib draws it."""
        dashes = _DASHES[self.run // len(COLORS) % len(_DASHES)]
        return {"color": COLORS[self.run % len(COLORS)], "linestyle": dashes, "label": self.label}


def write(path: str | Path, figure: Figure) -> None:
    """Writes a figure as PNG: whole or not at all."""
    with rc_context(_STYLE):
        write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight"))


def svg(figure: Figure) -> str:
    """A figure as an element of an HTML page: as wide as its place, in the page's colors, without own style.

    The ids left in it are those that it refers to.
    """
    buffer = StringIO()
    with rc_context({**_STYLE, "savefig.dpi": 220}):
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)  # a hundredth of a point
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text


def p_value(p: float, resamples: int = 1000) -> str:
    """A p-value of `intervals.paired_difference`, which cannot come out smaller than 2 / (resamples + 1)."""
    return f"p {'≤' if p <= 2 / (resamples + 1) else '='} {p:.3f}"


def plain(name: str) -> str:
    """A score or corruption in words."""
    return name.replace("_", " ")


def mean_curve(
    run: int, groups: Sequence[Arrays], score: str, curve: Callable[..., tuple], *labels: str, label: str | None = None
) -> Line:
    """A score's `metrics.roc_curve` or `oscr_curve`, averaged over trials at equal false positive rates.

    `groups` are the samples of each trial: the score, and the further arguments of the curve by their names `labels`,
    (N,) each.
    """
    curves = [curve(arrays[score], *(arrays[name] for name in labels))[:2] for arrays in groups]
    ys = np.stack([np.interp(_FPR, *each) for each in curves])
    return Line(run, _FPR, ys.mean(0), (ys.min(0), ys.max(0)) if len(ys) > 1 else None, label)


def class_accuracies(rows: pd.DataFrame, overall: pd.Series, title: str) -> Figure:
    """Draws accuracy by class as bars with 95% intervals, worst at the bottom, and the overall accuracy as a line.

    `rows` are one a class, with its name as `params["class"]`. Of more than 50, the 25 worst and the 25 best are drawn.
    """
    rows = rows.sort_values("value", kind="stable")
    if len(rows) > _MOST_BARS:
        title += f": {_MOST_BARS // 2} worst and best of {len(rows)} classes"
        rows = pd.concat([rows.iloc[: _MOST_BARS // 2], rows.iloc[-_MOST_BARS // 2 :]])
    figure, axes = _panel((6.4, 1.4 + 0.24 * len(rows)), title)
    whiskers = [rows["value"] - rows["ci_low"], rows["ci_high"] - rows["value"]]
    names = [params["class"] for params in rows["params"]]
    style = {"xerr": whiskers, "error_kw": {"ecolor": INK, "elinewidth": 0.8}}
    axes.barh(names, rows["value"], height=0.7, color=COLORS[0], **style)
    axes.axvline(overall["value"], color=INK, linewidth=1, linestyle="--")
    axes.set_xlabel(f"accuracy with 95% interval (dashed: all {overall['n']:,} images, {overall['value']:.1%})")
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", labelcolor=INK)
    return figure


def open_set(groups: Mapping[str, Arrays], rows: pd.DataFrame, title: str, several_sets: bool = False) -> Figure:
    """Draws AUROC by score, ROC and OSCR curves, and how one score is distributed.

    `groups` are the samples of each trial, or of each other data set: `is_known`, `correct` and the scores, (N,) each;
    `rows` hold their AUROCs in the same order. Curves of trials are averaged, those of several data sets are not.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(11.5, 8), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        (scores, roc), (histogram, classified) = figure.subplots(2, 2, width_ratios=(1.1, 1))
        _aurocs(scores, list(groups), rows[rows["metric"] == "auroc"], several_sets)
        if several_sets:
            curves = {name: (_SCORE, [arrays]) for name, arrays in groups.items()}
        else:
            curves = {score: (score, list(groups.values())) for score in _CURVES}
        how = f" of {plain(_SCORE)}" if several_sets else ", mean over trials" if len(groups) > 1 else ""
        for axes, curve, area, labels, what, title in (
            (roc, roc_curve, auroc, ("is_known",), "TPR: known accepted", "ROC and AUROC"),
            (classified, oscr_curve, oscr, ("is_known", "correct"), "CCR: known accepted and classified", "OSCR"),
        ):
            lines = []
            for i, (name, (score, found)) in enumerate(curves.items()):
                mean = np.mean([area(arrays[score], *(arrays[label] for label in labels)) for arrays in found])
                label = f"{plain(name)}  {mean:.3f}"
                lines.append(mean_curve(i, found, score, curve, *labels, label=label)._replace(band=None))
            _rates(axes, lines, what)
            axes.set_title(f"{title}{how}")
            axes.legend(loc="best")
        name, arrays = next(iter(groups.items()))
        _histogram(histogram, arrays, _SCORE, 0)
        histogram.set_title(f"Distribution of {plain(_SCORE)}{f', {name}' if len(groups) > 1 else ''}")
        histogram.set_ylabel("share of images")
        histogram.legend()
    return figure


def corruptions(table: pd.DataFrame, score: str, metric: str, clean: float, title: str) -> Figure:
    """Draws a heat map of corruptions by severity, and beside it the curve of each group over severity.

    Values are in [0, 1]: the table as of `rows.by_corruption`, and `clean` on clean images.
    """
    of = "the linear probe" if score == "linear" else plain(score)
    called = f"{'AUROC' if metric == 'auroc' else metric} of {of}"
    with rc_context(_STYLE):
        figure = Figure(figsize=(11, max(4.2, 1.4 + 0.29 * len(table))), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        _heat_map(left, table)
        left.set_title(f"{called} in %")
        for label, name in zip(left.get_yticklabels(), table.index, strict=True):
            label.set_color(_GROUP_COLORS[GROUP_OF[name]])
        right.axhline(clean, color=INK, linewidth=1, linestyle="--", label=f"clean images, {clean:.1%}")
        for group, members in table.groupby(table.index.map(GROUP_OF), sort=False):
            style = {"color": _GROUP_COLORS[group], "marker": "o", "markersize": 4}
            right.plot(table.columns, members.mean(), label=f"{group} ({len(members)})", **style)
        common = table[table.index.isin(COMMON)]
        if len(common):
            label = f"all common ({len(common)})"
            right.plot(table.columns, common.mean(), color=INK, linewidth=2.5, label=label)
        right.set_ylim(0, 1.02)
        right.yaxis.set_major_formatter("{x:.0%}")
        right.set_xticks(table.columns)
        right.set_xlabel("severity")
        right.set_title(f"{called}, mean over corruptions")
        right.legend(loc="best")
    return figure


def reliance(
    maps: Mapping[str, np.ndarray],
    examples: Sequence[tuple[np.ndarray, Sequence[int], float]],
    shares: Arrays,
    title: str,
) -> Figure:
    """Draws where an encoder looks on average, images that it reads most locally, and what images lose.

    Args:
        maps: Mean attributions (H, W), in [0, 1], by what they are of.
        examples: Images (H, W, 3) in [0, 1] with their box x0, y0, x1, y1 and the share that they lose; up to 12.
        shares: By place, the share of the agreement that each image loses when the part there is replaced, (N,).
        title: Said above.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(11.5, 4.2), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        left, middle, right = figure.subfigures(1, 3, width_ratios=(0.55, 1.35, 1.2))
        for axes, (name, values) in zip(left.subplots(len(maps), 1, squeeze=False).flat, maps.items(), strict=True):
            shown = axes.imshow(values, cmap="inferno", vmin=0)
            axes.set_title(f"mean attribution,\n{name}")
            left.colorbar(shown, ax=axes, shrink=0.85).outline.set_visible(False)
            _picture(axes)
        grid = middle.subplots(3, 4)
        middle.suptitle("images that lose most, and the part", x=0.02, ha="left", fontsize="medium")
        for axes in grid.flat:
            _picture(axes)
        for axes, (image, (x0, y0, x1, y1), share) in zip(grid.flat, examples, strict=False):
            axes.imshow(image)
            # Pixels are centered on whole numbers; two colors are seen on bright and on dark images.
            xs, ys = np.array([x0, x1, x1, x0, x0]) - 0.5, np.array([y0, y0, y1, y1, y0]) - 0.5
            axes.plot(xs, ys, color="black", linewidth=3, clip_on=False)
            axes.plot(xs, ys, color="white", linewidth=1.2, clip_on=False)
            axes.set_title(f"{share:.0%}", fontsize=8, loc="center", pad=2)
        axes = right.subplots()
        low, high = np.quantile(np.concatenate(list(shares.values())), (0.002, 0.998))
        edges = np.linspace(min(low, 0), max(high, 1), 41)
        for i, (place, values) in enumerate(shares.items()):
            counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
            color, label = COLORS[i % len(COLORS)], f"{place}, mean {values.mean():.0%}"
            axes.stairs(counts / len(values), edges, color=color, fill=i == 0, alpha=0.55 if i == 0 else 1, label=label)
            axes.axvline(values.mean(), color=color, linestyle="--", linewidth=1)
        axes.set(xlabel="share of the agreement that an image loses", ylabel="share of images")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:.0%}")
        legend = {"frameon": True, "facecolor": PAPER, "edgecolor": PAPER, "alignment": "left"}
        axes.legend(title="part replaced", loc="best", **legend)
    return figure


def _picture(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)


def curves(lines: Sequence[Line], x_label: str, shares: bool = False) -> Figure:
    """Draws measured points and lines between them; y is a share, shown in percent, where `shares` is set."""
    figure, axes = _panel()
    for line in lines:
        axes.plot(line.x, line.y, marker="o" if len(line.x) <= 12 else None, markersize=3, **line.style)
    if len({x for line in lines for x in line.x}) == 1:
        axes.set_xlim(lines[0].x[0] - 1, lines[0].x[0] + 1)  # or ticks would stand at fractions
    axes.set_xlabel(x_label)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    axes.yaxis.get_major_locator().set_params(nbins=6)
    if shares:
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g}")
    return figure


def rates(lines: Sequence[Line], y_label: str) -> Figure:
    """Draws ROC or OSCR curves over the false positive rate."""
    figure, axes = _panel((3.6, 2.9))
    _rates(axes, lines, y_label)
    axes.set_xlabel("FPR: unknown accepted (%)")
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda share, _: f"{100 * share:g}")
    return figure


def histogram(arrays: Arrays, score: str, run: int) -> Figure:
    """Draws how a score of known samples (filled) and of unknown ones (outlined) is distributed."""
    figure, axes = _panel((3.6, 1.75))
    _histogram(axes, arrays, score, run)
    axes.set(yticks=[], ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(nbins=6)
    return figure


def heat_map(table: pd.DataFrame, difference: bool = False) -> Figure:
    """Draws shares by corruption and severity, in percent; of differences orange is below zero and violet above."""
    figure, axes = _panel((3.6, 0.55 + 0.245 * len(table)))
    _heat_map(axes, table, difference)
    return figure


def scatter(points: np.ndarray, colors: Sequence[str], labels: tuple[str, str]) -> Figure:
    """Draws points (N, 2) in the plane, as an image inside the SVG."""
    figure, axes = _panel((3.6, 3.1))
    size = np.clip(8000 / len(points), 7, 16)
    axes.scatter(*points.T, c=list(colors), s=size, alpha=0.75, linewidths=0, rasterized=True)
    axes.grid(False)
    axes.set(xticks=[], yticks=[], xlabel=labels[0], ylabel=labels[1])
    axes.set_aspect("equal", adjustable="datalim")
    return figure


def _panel(size: tuple[float, float] = (3.6, 2.4), title: str = "") -> tuple[Figure, Axes]:
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        return figure, axes


def _aurocs(axes: Axes, names: Sequence[str], rows: pd.DataFrame, several_sets: bool) -> None:
    """A dot a group; of trials their mean as a line, of a single group its interval."""
    means = rows.groupby("score")["value"].mean().sort_values(kind="stable")
    for y, (score, mean) in enumerate(means.items()):
        found = rows[rows["score"] == score]
        if len(names) == 1:
            axes.plot(found[["ci_low", "ci_high"]].iloc[0], [y, y], color=COLORS[0], linewidth=1.5)
        elif not several_sets:
            axes.plot([mean] * 2, [y - 0.3, y + 0.3], color=INK, linewidth=2)
        colors = [COLORS[i % len(COLORS)] for i in range(len(found))] if several_sets else COLORS[0]
        alpha = 1 if several_sets else 0.7
        axes.scatter(found["value"], [y] * len(found), s=28, c=colors, alpha=alpha, linewidths=0, zorder=3)
    if several_sets:
        for i, name in enumerate(names):
            axes.scatter([], [], s=28, color=COLORS[i % len(COLORS)], label=name)
        axes.legend()
    axes.axvline(0.5, color=MUTED, linewidth=1, linestyle=":")
    axes.set_yticks(range(len(means)), [plain(score) for score in means.index])
    axes.set_xlabel("AUROC (dotted: chance)")
    what = "one dot a data set" if several_sets else "one dot a trial, line: mean" if len(names) > 1 else "95% interval"
    axes.set_title(f"AUROC by score: {what}")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", labelcolor=INK)


def _rates(axes: Axes, lines: Sequence[Line], y_label: str) -> None:
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
    for line in lines:
        axes.plot(line.x, line.y, **line.style)
        if line.band is not None:
            axes.fill_between(line.x, *line.band, color=line.style["color"], alpha=0.15, linewidth=0)
    axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="FPR: unknown accepted", ylabel=y_label)


def _histogram(axes: Axes, arrays: Arrays, score: str, run: int) -> None:
    scores, known = arrays[score], arrays["is_known"]
    low, high = np.quantile(scores, (0.002, 0.998))
    low, high = (low, high) if high > low else (low - 0.5, low + 0.5)
    edges = np.linspace(low, high, 41)
    styles = {"fill": True, "color": COLORS[run % len(COLORS)], "alpha": 0.55}, {"edgecolor": INK, "linewidth": 1.1}
    for chosen, label, style in ((known, "known", styles[0]), (~known, "unknown", styles[1])):
        counts, _ = np.histogram(scores[chosen].clip(low, high), edges)
        axes.stairs(counts / chosen.sum(), edges, label=label, **style)
    threshold = threshold_at_tpr(scores, known)
    if low <= threshold <= high:
        axes.axvline(threshold, color=INK, linewidth=1, linestyle="--", label="accepts 95% of known")
    axes.set_xlabel(plain(score))


def _heat_map(axes: Axes, table: pd.DataFrame, difference: bool = False) -> None:
    """One row a corruption, groups set apart; each cell says its value in percent."""
    values = table.to_numpy(float)
    reach = np.nanmax(np.abs(values), initial=0.01)
    scale = Normalize(-reach, reach) if difference else Normalize(0, 1)
    colors = colormaps["PuOr" if difference else "cividis"]
    axes.pcolormesh(np.ma.masked_invalid(values), cmap=colors, norm=scale, edgecolors=PAPER, linewidth=1)
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            light = np.dot(colors(scale(value))[:3], (0.299, 0.587, 0.114)) > 0.5
            text = f"{100 * value:{'+' if difference else ''}.1f}".replace("-", "−")
            color = "black" if light else "white"
            axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=7.5, color=color)
    groups = [GROUP_OF.get(name) for name in table.index]
    for i in (i for i in range(1, len(groups)) if groups[i] != groups[i - 1]):
        axes.axhline(i, color=PAPER, linewidth=3)
    axes.set_xticks(np.arange(len(table.columns)) + 0.5, table.columns)
    axes.set_yticks(np.arange(len(table)) + 0.5, [plain(name)[:24] for name in table.index])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_xlabel("severity")
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines[:].set_visible(False)
