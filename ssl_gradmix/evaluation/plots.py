"""Figures of results, one function per figure.

Text in figures is plain: a `$` in the name of a class does not start a formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ssl_gradmix.data.corruptions import GROUP_OF
from ssl_gradmix.evaluation.metrics import threshold_at_tpr
from ssl_gradmix.files import write_whole

INK, MUTED, RULE = "#1b1f27", "#626a76", "#dfe2e7"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#b8559a", "#9a7500", "#5b5bd6")
GROUP_COLORS = {"noise": COLORS[0], "blur": COLORS[1], "weather": COLORS[2], "digital": COLORS[3]}

STYLE = {
    "font.size": 9,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}

CURVES = ("max_logit", "knn_distance", "top_k_cosine", "mahalanobis")
"""Scores that have ROC and OSCR curves."""

MOST_BARS = 50
"""Of more classes than this, the worst and the best are drawn."""

CHANCE = {"color": MUTED, "linewidth": 0.8, "linestyle": (0, (1, 2))}
MARK = {"color": INK, "linewidth": 1, "linestyle": "--"}


def write(path: str | Path, figure: Figure) -> None:
    """Writes a figure as PNG, replacing an earlier file."""

    def save(temporary: Path) -> None:
        with rc_context(STYLE):
            figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")

    write_whole(path, save)


def plain(name: str) -> str:
    """A score or corruption in words."""
    return name.replace("_", " ")


def class_accuracies(by_class: pd.DataFrame, overall: pd.Series, title: str) -> Figure:
    """Draws the accuracy of each class with its interval, sorted, and a line at the overall one.

    Args:
        by_class: Result rows, one per class, with its name as `params["class"]`. Of more than 50
            classes, the 25 worst and the 25 best are drawn.
        overall: The result row of all images.
        title: Title of the figure.
    """
    rows = by_class.sort_values("value", kind="stable")
    if len(rows) > MOST_BARS:
        half = MOST_BARS // 2
        title = f"{title}: {half} worst and best of {len(rows)} classes"
        rows = pd.concat([rows.iloc[:half], rows.iloc[-half:]])
    with rc_context(STYLE):
        figure = _figure((6.4, 1.4 + 0.24 * len(rows)), title)
        axes = figure.subplots()
        names = [params["class"] for params in rows["params"]]
        whiskers = [rows["value"] - rows["ci_low"], rows["ci_high"] - rows["value"]]
        thin = {"ecolor": INK, "elinewidth": 0.8}
        places = range(len(rows))  # two classes may have the same name
        axes.barh(places, rows["value"], height=0.7, color=COLORS[0], xerr=whiskers, error_kw=thin)
        axes.axvline(overall["value"], **MARK)
        total = f"{overall['n']:,} images, {overall['value']:.1%}"
        axes.set_xlabel(f"accuracy with 95% interval (dashed: all {total})")
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter("{x:.0%}")
        _name_rows(axes, places, names)
    return figure


def open_set(samples: Mapping[str, pd.DataFrame], rows: pd.DataFrame, title: str) -> Figure:
    """Draws the AUROC of all scores, ROC and OSCR curves, and the distribution of one score.

    Args:
        samples: Tables by trial, as of `detection.detect`: one line per image, with columns
            `is_known`, `correct` and the scores. Curves are averaged over trials.
        rows: Result rows of all trials.
        title: Title of the figure.
    """
    trials = list(samples.values())
    averaged = ", mean over trials" if len(trials) > 1 else ""
    with rc_context(STYLE):
        figure = _figure((11.5, 8), title)
        (areas, roc), (histogram, oscr) = figure.subplots(2, 2, width_ratios=(1.1, 1))
        _areas(areas, rows[rows["metric"] == "auroc"])
        _curves(roc, trials, "is_known")
        roc.set_ylabel("TPR: known accepted")
        roc.set_title(f"ROC and AUROC{averaged}")
        _curves(oscr, trials, "correct")
        oscr.set_ylabel("CCR: known accepted and classified correctly")
        oscr.set_title(f"OSCR{averaged}")
        _histogram(histogram, trials[0], CURVES[0])
        first = f", {next(iter(samples))}" if len(trials) > 1 else ""
        histogram.set_title(f"Distribution of {plain(CURVES[0])}{first}")
    return figure


def corruptions(accuracies: pd.DataFrame, clean: float, title: str) -> Figure:
    """Draws accuracies as a heat map, and their means over groups of corruptions as curves.

    Args:
        accuracies: In [0, 1], one line per corruption and one column per severity.
        clean: Accuracy on clean images.
        title: Title of the figure.
    """
    with rc_context(STYLE):
        figure = _figure((11, max(4.2, 1.4 + 0.29 * len(accuracies))), title)
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        _heat_map(left, accuracies)
        left.set_title("accuracy in %")
        right.axhline(clean, **MARK, label=f"clean images, {clean:.1%}")
        severities = list(accuracies.columns)
        for group, color in GROUP_COLORS.items():
            members = accuracies[accuracies.index.map(GROUP_OF) == group]
            if len(members):
                label = f"{group} ({len(members)})"
                right.plot(severities, members.mean(), color=color, marker="o", ms=4, label=label)
        mean = accuracies.mean()
        right.plot(severities, mean, color=INK, linewidth=2.5, label=f"all ({len(accuracies)})")
        right.yaxis.set_major_formatter("{x:.0%}")
        right.set_xticks(severities)
        right.set_xlabel("severity")
        right.set_title("mean over corruptions")
        right.legend()
    return figure


def reliance(
    maps: Mapping[str, np.ndarray],
    examples: Sequence[tuple[np.ndarray, Sequence[int], float]],
    fractions: Mapping[str, np.ndarray],
    title: str,
) -> Figure:
    """Draws where an encoder looks, the images that depend most on a small part, and the losses.

    Args:
        maps: Mean attributions (H, W) in [0, 1] by title.
        examples: Up to 12 images (H, W, 3) in [0, 1], each with its box x0, y0, x1, y1 and the
            fraction of agreement that is lost without it.
        fractions: Fraction of agreement that each image loses, (N,), by the place of the box.
        title: Title of the figure.
    """
    with rc_context(STYLE):
        figure = _figure((11.5, 4.2), title)
        left, middle, right = figure.subfigures(1, 3, width_ratios=(0.55, 1.35, 1.2))
        panels = left.subplots(len(maps), 1, squeeze=False).flat
        for axes, (name, values) in zip(panels, maps.items(), strict=True):
            shown = axes.imshow(values, cmap="inferno", vmin=0)
            axes.set_title(f"mean attribution,\n{name}")
            left.colorbar(shown, ax=axes, shrink=0.85).outline.set_visible(False)
            _frameless(axes)
        middle.suptitle("images that lose most", x=0.02, ha="left", fontsize="medium")
        grid = list(middle.subplots(3, 4).flat)
        for axes in grid:
            _frameless(axes)
        for axes, (image, box, fraction) in zip(grid, examples, strict=False):
            axes.imshow(image)
            axes.set_title(f"{fraction:.0%}", fontsize=8, loc="center", pad=2)
            _outline(axes, box)
        _losses(right.subplots(), fractions)
    return figure


def _figure(size: tuple[float, float], title: str) -> Figure:
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def _name_rows(axes: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)


def _areas(axes: Axes, rows: pd.DataFrame) -> None:
    """One line per score: a dot per trial and their mean, or the interval of a single trial."""
    trials = rows[rows["ci_low"].notna()]
    means = trials.groupby("score")["value"].mean().sort_values(kind="stable")
    several = len(trials) > len(means)
    for y, (score, mean) in enumerate(means.items()):
        found = trials[trials["score"] == score]
        if several:
            axes.plot([mean, mean], [y - 0.3, y + 0.3], color=INK, linewidth=2)
        else:
            axes.plot(found[["ci_low", "ci_high"]].iloc[0], [y, y], color=COLORS[0], linewidth=1.5)
        heights = [y] * len(found)
        axes.scatter(found["value"], heights, s=28, color=COLORS[0], alpha=0.7, zorder=3)
    axes.axvline(0.5, **CHANCE)
    axes.set_xlabel("AUROC (dotted: chance)")
    dots = "one dot per trial, line: mean" if several else "95% interval"
    axes.set_title(f"AUROC by score: {dots}")
    _name_rows(axes, range(len(means)), [plain(str(score)) for score in means.index])


def _curves(axes: Axes, trials: Sequence[pd.DataFrame], accepted: str) -> None:
    """The rate of accepted known images over that of unknown ones, and its area, per score."""
    grid = np.linspace(0, 1, 201)
    axes.plot([0, 1], [0, 1], **CHANCE)
    for score, color in zip(CURVES, COLORS, strict=False):
        curves = [_curve(found, score, accepted) for found in trials]
        area = np.mean([np.diff(x) @ (y[1:] + y[:-1]) / 2 for x, y in curves])
        mean = np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)
        axes.plot(grid, mean, color=color, label=f"{plain(score)}  {area:.3f}")
    axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="FPR: unknown accepted")
    axes.legend(loc="lower right")


def _curve(found: pd.DataFrame, score: str, accepted: str) -> tuple[np.ndarray, np.ndarray]:
    """Rates over all thresholds, from accepting nothing to accepting everything."""
    known = found["is_known"].to_numpy(bool)
    scores = found[score].to_numpy(float)
    thresholds = np.append(np.inf, np.unique(scores)[::-1])

    def count(chosen: np.ndarray) -> np.ndarray:
        return chosen.sum() - np.searchsorted(np.sort(scores[chosen]), thresholds)

    unknown_rate = count(~known) / (~known).sum()
    return unknown_rate, count(found[accepted].to_numpy(bool)) / known.sum()


def _histogram(axes: Axes, found: pd.DataFrame, score: str) -> None:
    scores, known = found[score].to_numpy(float), found["is_known"].to_numpy(bool)
    low, high = np.quantile(scores, (0.002, 0.998))
    edges = np.linspace(low, max(high, low + 1e-6), 41)
    filled = {"fill": True, "color": COLORS[0], "alpha": 0.55}
    outlined = {"edgecolor": INK, "linewidth": 1.1}
    for chosen, label, style in ((known, "known", filled), (~known, "unknown", outlined)):
        counts, _ = np.histogram(scores[chosen].clip(low, high), edges)
        axes.stairs(counts / chosen.sum(), edges, label=label, **style)
    axes.axvline(threshold_at_tpr(scores, known), **MARK, label="accepts 95% of known")
    axes.set(xlabel=plain(score), ylabel="fraction of images")
    axes.legend()


def _heat_map(axes: Axes, values: pd.DataFrame) -> None:
    """One line per corruption with a number in each cell; colors span the data."""
    cells = values.to_numpy(float)
    scale = Normalize(cells.min(), max(cells.max(), cells.min() + 0.01))
    colors = colormaps["cividis"]
    axes.pcolormesh(cells, cmap=colors, norm=scale, edgecolors="white", linewidth=1)
    for (i, j), value in np.ndenumerate(cells):
        luma = np.dot(colors(scale(value))[:3], (0.299, 0.587, 0.114))
        where = {"ha": "center", "va": "center", "fontsize": 7.5}
        color = "black" if luma > 0.5 else "white"
        axes.text(j + 0.5, i + 0.5, f"{100 * value:.1f}", color=color, **where)
    axes.set_xticks(np.arange(len(values.columns)) + 0.5, values.columns)
    axes.set_yticks(np.arange(len(values)) + 0.5, [plain(name) for name in values.index])
    for label, name in zip(axes.get_yticklabels(), values.index, strict=True):
        label.set_color(GROUP_COLORS[GROUP_OF[name]])
    axes.set_xlabel("severity")
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _losses(axes: Axes, fractions: Mapping[str, np.ndarray]) -> None:
    """Distributions of the agreement that images lose, one per place."""
    low, high = np.quantile(np.concatenate(list(fractions.values())), (0.002, 0.998))
    edges = np.linspace(min(low, 0), max(high, 1), 41)
    for i, (place, values) in enumerate(fractions.items()):
        counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
        label = f"{place}, mean {values.mean():.0%}"
        style = {"fill": True, "alpha": 0.55} if i == 0 else {"fill": False}
        axes.stairs(counts / len(values), edges, color=COLORS[i], label=label, **style)
        axes.axvline(values.mean(), color=COLORS[i], linestyle="--", linewidth=1)
    axes.set(xlabel="agreement that an image loses", ylabel="fraction of images")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(title="replaced box", alignment="left", frameon=True, edgecolor="white")


def _outline(axes: Axes, box: Sequence[int]) -> None:
    """A frame that is visible on bright and on dark images."""
    x0, y0, x1, y1 = np.asarray(box) - 0.5  # pixel centers lie at integers
    xs, ys = [x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0]
    axes.plot(xs, ys, color="black", linewidth=3, clip_on=False)
    axes.plot(xs, ys, color="white", linewidth=1.2, clip_on=False)


def _frameless(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
