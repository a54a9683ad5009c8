"""results/evidence.md from rows: tables and figures. EVIDENCE.md beside it, which people write, quotes them."""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from evidence.cells import DATA, VARIANTS, options
from evidence.rows import CHOSEN_BY, MEASURES, differences

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHORT = (
    *("linear", "knn", "corruption_error", "osr_auroc"),
    *("projector_auroc", "known_ood_auroc", "known_corruption_error"),  # of labels
)
"""The measures of the summary and the figure."""

REFERENCE = "third-view"
"""What they are compared with: as many encoder passes, no mixing."""

REFERENCES = ("plain", REFERENCE, "random-box", "gradmix")

INTRODUCTION = """# Tables of the controlled experiments

Written by `python benchmarks/evidence.py --report` from the rows in `evidence.jsonl`;
[EVIDENCE.md](../EVIDENCE.md) says what they mean.

Encoders are frozen. Shares are in percent, their differences in percentage points; RankMe is that of the training
images' features. A difference is the mean over seeds of one variant minus another at the same seed, with the 95% t
interval of that mean (and the number of seeds): **bold** where the interval excludes 0 for the better, ***bold
italics*** where for the worse. Seeds of one open-set trial are averaged first, so that the interval is over trials.
Nothing is corrected for the number of comparisons. Settings are chosen by the rows of held-out training images, which
are held out from classifiers and neighbors, not from pretraining, and which the verdicts do not count.

Rows without `probe` in their settings are of earlier evaluations, which do not mix with today's: the commands of the
grids `cpu...` need another name behind `--grid`.

OSR: seed s pretrains on the known classes of the s-th distinct trial of CIFAR-10 (0, 2, 3, 4) and meets the unknown
ones in the evaluation. OOD: digits against test images. Two cues: a bright digit on the left and a faint one on the
right, which show the same number in 90% of the pretraining images; a linear classifier reads each off the frozen
features of images where they are independent.

Options of the recipe that make each variant (`plain-more-epochs` trains half as many epochs again):
"""


def write(rows: pd.DataFrame, path: Path) -> list[Path]:
    """Writes the page, and a figure of each grid and method beside it; returns the files written.

    Raises:
        ValueError: Cells of one grid have different settings.
    """
    written, parts = [path], [INTRODUCTION]
    used = in_order(rows.variant)
    parts += [f"- `{name}`: `{shlex.join(options(VARIANTS[name]))}`" for name in used]
    for (grid, method), found in rows.groupby(["grid", "method"], sort=False):
        if any(settings != found.settings.iloc[0] for settings in found.settings):
            raise ValueError(f"grid {grid!r} has cells with different settings: their rows do not compare")
        parts += ["", f"## {method}, grid `{grid}`", "", *_described(found), "", *_cells(found), ""]
        figure = forest(differences(found, REFERENCE))
        if figure is not None:
            written.append(path.with_name(f"{path.stem}-{grid}-{method}.png"))
            figure.savefig(written[-1], dpi=120)
            parts += [f"### Against {REFERENCE}, in short", "", *summary(found), ""]
            parts += [f"![Differences to {REFERENCE} with 95% intervals]({written[-1].name})", ""]
        parts += ["### Means ± standard deviations over seeds (number of seeds)", "", *_means(found)]
        for reference in REFERENCES:
            compared = differences(found, reference)
            if len(compared):
                parts += ["", f"### Differences to {reference}", "", *_differences(compared)]
    path.write_text("\n".join(parts) + "\n")
    return written


def in_order(variants: Iterable[str]) -> list[str]:
    """Those that are there, in the order of `VARIANTS`."""
    present = set(variants)
    return [name for name in VARIANTS if name in present]


def summary(rows: pd.DataFrame) -> list[str]:
    """Markdown lines: variants by the measures in `SHORT`, mean and paired difference to `REFERENCE`."""
    found = rows[rows.measure.isin(SHORT)].groupby(["measure", "variant"]).value.agg(["mean", "count"])
    behind = texts(differences(rows, REFERENCE), difference).reindex(found.index)
    cells = texts(found, lambda measure, row: number(measure, row["mean"])) + "; " + behind
    cells = cells.fillna(texts(found, lambda measure, row: f"{number(measure, row['mean'])} ({row['count']:.0f})"))
    return pivot(cells.swaplevel())


def _described(rows: pd.DataFrame) -> list[str]:
    """The grid's settings, and the part of the command that all its cells share."""
    first = rows.iloc[0]
    names = ("data", "images", "epochs", "batch", "backbone", "corrupted")
    shared = options({name: first.settings[name] for name in names})
    recipe = ["--", *first.settings["recipe"]] if first.settings["recipe"] else []
    command = shlex.join(["--grid", first.grid, *shared, "--methods", first.method, "VARIANTS", *recipe])
    choice = "--variants ... --kinds ... --seeds ..."
    cells = rows.groupby(["variant", "data", "seed"]).ngroups
    commits = ", ".join(sorted(set(rows.commit)))
    return [
        f"{cells} cells, commits {commits}:",
        "",
        f"    python benchmarks/evidence.py {command.replace('VARIANTS', choice)}",
    ]


def _cells(rows: pd.DataFrame) -> list[str]:
    """Seeds of each variant by the kind of data, and what it costs."""
    cells = rows.drop_duplicates(["variant", "data", "seed"])
    seeds = cells.groupby(["variant", "data"]).seed.agg(lambda found: " ".join(map(str, sorted(found))))
    seconds = cells[cells.data == "all"].groupby("variant").seconds.mean()
    lines = []
    for variant in in_order(rows.variant):
        row = cells[cells.variant == variant].iloc[0]
        passes = f"{row.passes} + {row.attributions} + {row.target_passes}"
        taken = f"{seconds[variant]:,.0f}" if variant in seconds else ""
        lines.append([variant, *(seeds.get((variant, kind), "") for kind in DATA), passes, taken])
    return [
        "Passes of a training image: through the encoder, of GradMix's attribution (backward, to the observed layer), "
        "and of BYOL's target network (forward). Seconds of training alone, data `all`: of several machines and beside "
        "other work, so that they do not compare variants.",
        "",
        *table(["variant", *(f"seeds, {kind}" for kind in DATA), "passes", "seconds"], lines),
    ]


def _means(rows: pd.DataFrame) -> list[str]:
    def text(measure: str, row: pd.Series) -> str:
        spread = f" ± {number(measure, row['std'])}" if row["count"] > 1 else ""
        return f"{number(measure, row['mean'])}{spread} ({row['count']:.0f})"

    return pivot(texts(rows.groupby(["measure", "variant"]).value.agg(["mean", "std", "count"]), text))


def _differences(compared: pd.DataFrame) -> list[str]:
    counted = compared[~compared.index.isin(CHOSEN_BY, level="measure")]
    verdicts = counted.groupby("variant").verdict.value_counts().unstack(fill_value=0)
    verdicts = verdicts.reindex(in_order(verdicts.index), columns=["better", "worse", "open"], fill_value=0)
    ends = [" / ".join(map(str, line)) for line in verdicts.values]
    return [*pivot(texts(compared, difference)), f"| better / worse / open | {' | '.join(ends)} |"]


def texts(found: pd.DataFrame, text: Callable[[str, pd.Series], str]) -> pd.Series:
    """What `text` makes of each line's measure and numbers, by measure and variant."""
    return pd.Series([text(key[0], row) for key, row in found.iterrows()], found.index, dtype=object)


def pivot(cells: pd.Series) -> list[str]:
    """Markdown lines of texts by two names, measures and variants in their usual order."""
    frame = cells.unstack(fill_value="")
    order = [*MEASURES, *VARIANTS]
    frame = frame.sort_index(key=lambda names: names.map(order.index))
    frame = frame.sort_index(axis=1, key=lambda names: names.map(order.index))
    titles = {name: measure.title for name, measure in MEASURES.items()}
    frame = frame.rename(index=titles, columns=titles)
    lines = [[name, *line] for name, line in zip(frame.index, frame.values, strict=True)]
    return table([frame.index.name, *frame.columns], lines)


def table(header: list[str], lines: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines)]


def difference(measure: str, found: pd.Series) -> str:
    """A paired difference with its interval, marked by its verdict."""
    text = number(measure, found["mean"], "+")
    if not math.isnan(found.low):
        text += f" [{number(measure, found.low, '+')}, {number(measure, found.high, '+')}]"
    mark = {"better": "**", "worse": "***", "open": ""}[found.verdict]
    return f"{mark}{text}{mark} ({found.seeds})"


def number(measure: str, value: float, sign: str = "") -> str:
    shown = round(float(100 * value if MEASURES[measure].percent else value), 1) + 0.0  # no "-0.0"
    return f"{shown:{sign}.1f}".replace("-", "−")


def forest(compared: pd.DataFrame) -> Figure | None:
    """Draws paired differences to `REFERENCE` with their 95% intervals, a panel for each measure in `SHORT`.

    Filled marks are differences whose interval excludes 0. To the right is better in every panel: where less is better,
    the axis runs the other way.

    Returns:
        None where there is nothing to compare.
    """
    from matplotlib.figure import Figure

    shown = [measure for measure in SHORT if measure in compared.index]
    if not shown:
        return None
    variants = in_order(compared.index.get_level_values("variant"))
    figure = Figure(figsize=(1.5 + 2.1 * len(shown), 1 + 0.2 * len(variants)), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, shown, strict=True):
        scale = 100 if MEASURES[measure].percent else 1
        for variant, found in compared.loc[measure].iterrows():
            y = -variants.index(variant)
            axes.plot([scale * found.low, scale * found.high], [y, y], color="C0", linewidth=1)
            face = "white" if found.verdict == "open" else "C0"
            axes.plot(scale * found["mean"], y, "o", color="C0", markerfacecolor=face, markersize=4)
        axes.axvline(0, color="0.5", linewidth=0.8)
        axes.set_title(textwrap.fill(MEASURES[measure].title, 34), loc="left", fontsize=7)
        axes.margins(y=0.15)
        axes.set_yticks([-i for i in range(len(variants))], variants)
        axes.tick_params(labelsize=7, length=0)
        axes.grid(axis="x", color="0.9")
        axes.spines[["top", "right", "left"]].set_visible(False)
        if not MEASURES[measure].larger_is_better:
            axes.invert_xaxis()
    over = "95% interval over seeds, or open-set trials"
    figure.supxlabel(f"difference to {REFERENCE} in points, {over}; right is better", fontsize=7)
    return figure
