"""Figures of results, one function per figure.

Text in figures is plain: a `$` in the name of a class does not start a formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from ssl_gradmix.data.corruptions import GROUP_OF, GROUPS
from ssl_gradmix.files import write_whole

INK = "#1b1f27"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#b8559a")
GROUP_COLORS = dict(zip(GROUPS, COLORS, strict=True))

STYLE: Any = {
    "font.size": 9,
    "text.parse_math": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "legend.frameon": False,
    "grid.color": "#dfe2e7",
}

CURVES = ("max_logit", "knn_distance", "top_k_cosine", "mahalanobis")
"""Scores that have ROC and OSCR curves."""

MOST_CLASSES = 50
"""Of more classes than this, the worst and the best are drawn."""

LINE: Any = {"color": INK, "linewidth": 1, "linestyle": "--"}


def write(path: str | Path, figure: Figure) -> None:
    """Writes a figure as PNG, replacing an earlier file."""
    save = partial(figure.savefig, format="png", dpi=150, bbox_inches="tight")
    with rc_context(STYLE):
        write_whole(path, save)


@rc_context(STYLE)
def class_accuracies(by_class: pd.DataFrame, overall: pd.Series, title: str) -> Figure:
    """Draws the accuracy of each class with its interval, sorted, and a line at the overall one.

    Args:
        by_class: Result rows, one per class, with its name as `params["class"]`. Of more than 50
            classes, the 25 worst and the 25 best are drawn.
        overall: The result row of all images.
        title: Title of the figure.
    """
    rows = by_class.sort_values("value", kind="stable")
    if len(rows) > MOST_CLASSES:
        half = MOST_CLASSES // 2
        title = f"{title}, {half} worst and best of {len(rows)} classes"
        rows = pd.concat([rows.iloc[:half], rows.iloc[-half:]])
    figure = _figure(title, 6.4, 1.4 + 0.24 * len(rows))
    axes = figure.subplots()
    whiskers = [rows["value"] - rows["ci_low"], rows["ci_high"] - rows["value"]]
    places = range(len(rows))
    axes.errorbar(rows["value"], places, xerr=whiskers, fmt="o", color=COLORS[0])
    axes.axvline(overall["value"], **LINE)
    total = f"{overall['n']:,} images, {overall['value']:.1%}"
    axes.set_xlabel(f"accuracy with 95% interval (dashed: all {total})")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    _name_rows(axes, places, [params["class"] for params in rows["params"]])
    return figure


@rc_context(STYLE)
def open_set(samples: Mapping[str, pd.DataFrame], rows: pd.DataFrame, title: str) -> Figure:
    """Draws the AUROC of all scores, and ROC and OSCR curves of some.

    Args:
        samples: Tables of `detection.detect` by trial. Curves are averaged over trials.
        rows: Result rows of all trials.
        title: Title of the figure.
    """
    trials = list(samples.values())
    averaged = f", mean over {len(trials)} trials" if len(trials) > 1 else ""
    figure = _figure(title, 13, 4)
    areas, roc, oscr = figure.subplots(1, 3)
    _areas(areas, rows[(rows["metric"] == "auroc") & rows["ci_low"].notna()])
    _curves(roc, trials, [found["known"] for found in trials])
    roc.set(title=f"ROC{averaged}", ylabel="TPR: known accepted")
    right = [found["known"] & (found["prediction"] == found["label"]) for found in trials]
    _curves(oscr, trials, right)
    oscr.set(title=f"OSCR{averaged}", ylabel="CCR: known accepted, class correct")
    return figure


@rc_context(STYLE)
def corruptions(accuracies: pd.DataFrame, clean: float, title: str) -> Figure:
    """Draws accuracies as a heat map, and their means over groups of corruptions as curves.

    Args:
        accuracies: In [0, 1], one line per corruption and one column per severity.
        clean: Accuracy on clean images.
        title: Title of the figure.
    """
    figure = _figure(title, 11, 1.6 + 0.29 * len(accuracies))
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _heat_map(left, accuracies)
    severities = list(accuracies.columns)
    for group, members in accuracies.groupby(accuracies.index.map(GROUP_OF), sort=False):
        style = {"color": GROUP_COLORS[str(group)], "marker": "o", "markersize": 4}
        right.plot(severities, members.mean(), label=f"{group} ({len(members)})", **style)
    mean, label = accuracies.mean(), f"all ({len(accuracies)})"
    right.plot(severities, mean, color=INK, linewidth=2.5, label=label)
    right.axhline(clean, **LINE, label=f"clean images, {clean:.1%}")
    right.set(xticks=severities, xlabel="severity", title="mean over corruptions")
    right.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside right upper")
    return figure


@rc_context(STYLE)
def reliance(
    maps: Mapping[str, np.ndarray],
    examples: Sequence[tuple[np.ndarray, Sequence[int], float]],
    fractions: Mapping[str, np.ndarray],
    title: str,
) -> Figure:
    """Draws where an encoder looks, the images that depend most on a small part, and the losses.

    Args:
        maps: Two mean attributions (H, W) in [0, 1] by title.
        examples: Up to 12 images (H, W, 3) in [0, 1], each with its box x0, y0, x1, y1 and the
            fraction of agreement that is lost without it.
        fractions: Fraction of agreement that each image loses, (N,), by the place of the box.
        title: Title of the figure.
    """
    figure = _figure(title, 11.5, 4.2)
    left, middle, right = figure.subfigures(1, 3, width_ratios=(0.55, 1.35, 1.2))
    for axes, (name, values) in zip(left.subplots(2, 1), maps.items(), strict=True):
        shown = axes.imshow(values, cmap="inferno", vmin=0)
        axes.set_title(f"mean attribution,\n{name}")
        left.colorbar(shown, ax=axes, shrink=0.85).outline.set_visible(False)
        axes.set_axis_off()
    middle.suptitle("images that lose most", x=0.02, ha="left", fontsize="medium")
    grid = list(middle.subplots(3, 4).flat)
    for axes in grid:
        axes.set_axis_off()
    for axes, (image, box, fraction) in zip(grid, examples, strict=False):
        axes.imshow(image)
        axes.set_title(f"{min(max(fraction, 0), 1):.0%}", fontsize=8, loc="center", pad=2)
        x0, y0, x1, y1 = box
        corner = (x0 - 0.5, y0 - 0.5)  # pixel centers lie at integers
        axes.add_patch(Rectangle(corner, x1 - x0, y1 - y0, fill=False, color="red"))
    _losses(right, fractions)
    return figure


@rc_context(STYLE)
def image_rows(
    rows: Mapping[str, tuple[np.ndarray, Sequence[str], Sequence[bool]]], title: str
) -> Figure:
    """Draws rows of images, each with a caption.

    Args:
        rows: By title: images (n, H, W, 3), a caption for each, and whether it is emphasized.
        title: Title of the figure.
    """
    columns = max(len(images) for images, _, _ in rows.values())
    figure = _figure(title, 1.25 * max(columns, 4), 0.4 + 1.7 * len(rows))
    for part, (name, row) in zip(figure.subfigures(len(rows), 1), rows.items(), strict=True):
        part.suptitle(name, x=0.01, ha="left", fontsize="medium")
        grid = part.subplots(1, columns, squeeze=False)[0]
        for axes in grid:
            axes.set_axis_off()
        for axes, image, caption, emphasized in zip(grid, *row, strict=False):
            axes.imshow(image)
            color = COLORS[1] if emphasized else INK
            axes.set_title(caption, fontsize=8, loc="center", pad=3, color=color)
    return figure


def _figure(title: str, width: float, height: float) -> Any:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _name_rows(axes: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    axes.set_yticks(places, names)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)


def _areas(axes: Axes, rows: pd.DataFrame) -> None:
    """One line per score: a dot per trial and their mean, or the interval of a single trial."""
    means = rows.groupby("score")["value"].mean().sort_values(kind="stable")
    several = len(rows) > len(means)
    for y, (score, mean) in enumerate(means.items()):
        found = rows[rows["score"] == score]
        axes.scatter(found["value"], [y] * len(found), s=28, color=COLORS[0], alpha=0.7, zorder=3)
        if several:
            axes.plot([mean, mean], [y - 0.3, y + 0.3], color=INK, linewidth=2)
        else:
            axes.plot(found[["ci_low", "ci_high"]].iloc[0], [y, y], color=COLORS[0])
    axes.axvline(0.5, **LINE)
    axes.set_xlabel("AUROC (dashed: chance)")
    dots = "one dot per trial, line: mean" if several else "95% interval"
    axes.set_title(f"AUROC by score: {dots}")
    _name_rows(axes, range(len(means)), list(means.index))


def _curves(axes: Axes, trials: Sequence[pd.DataFrame], accepted: Sequence[pd.Series]) -> None:
    """The rate of accepted known images over that of unknown ones, and its area, per score."""
    grid = np.linspace(0, 1, 201)
    axes.plot([0, 1], [0, 1], **LINE)
    for score, color in zip(CURVES, COLORS, strict=False):
        curves = [_curve(*each, score) for each in zip(trials, accepted, strict=True)]
        area = np.mean([np.diff(x) @ (y[1:] + y[:-1]) / 2 for x, y in curves])
        mean = np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)
        axes.plot(grid, mean, color=color, label=f"{score}  {area:.3f}")
    axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="FPR: unknown accepted")
    axes.legend(loc="lower right")


def _curve(found: pd.DataFrame, accepted: pd.Series, score: str) -> tuple[np.ndarray, np.ndarray]:
    """Rates over all thresholds, from accepting nothing to accepting everything."""
    known = found["known"].to_numpy(bool)
    scores = found[score].to_numpy(float)
    thresholds = np.append(np.inf, np.unique(scores)[::-1])

    def count(chosen: np.ndarray) -> np.ndarray:
        return chosen.sum() - np.searchsorted(np.sort(scores[chosen]), thresholds)

    unknown_rate = count(~known) / (~known).sum()
    return unknown_rate, count(accepted.to_numpy(bool)) / known.sum()


def _heat_map(axes: Axes, values: pd.DataFrame) -> None:
    """One line per corruption with a number in each cell; colors span the data."""
    cells = values.to_numpy(float)
    axes.imshow(cells, cmap="cividis", aspect="auto")
    middle = (cells.min() + cells.max()) / 2
    for (i, j), value in np.ndenumerate(cells):
        color = "white" if value < middle else "black"
        axes.text(j, i, f"{100 * value:.1f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(values.columns)), values.columns)
    _name_rows(axes, range(len(values)), list(values.index))
    for label, name in zip(axes.get_yticklabels(), values.index, strict=True):
        label.set_color(GROUP_COLORS[GROUP_OF[name]])
    axes.set(xlabel="severity", title="accuracy in %")
    axes.grid(False)


def _losses(figure: Any, fractions: Mapping[str, np.ndarray]) -> None:
    """Distributions of the agreement that images lose, one per place.

    Values are drawn between -50% and 100%, because those beyond depend on single images.
    """
    axes = figure.subplots()
    values = np.stack(list(fractions.values()), 1)
    low, high = np.quantile(values, (0.002, 0.998)).clip(-0.5, 1)
    labels = [f"{name}, mean {min(lost.mean(), 1):.0%}" for name, lost in fractions.items()]
    colors = COLORS[: len(labels)]
    axes.hist(values.clip(low, high), 40, histtype="step", color=colors, label=labels)
    axes.set(xlabel="agreement that an image loses (end bars: and beyond)", ylabel="images")
    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside upper right", ncols=2, title="replaced box", reverse=True)
