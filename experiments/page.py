"""Tables and figures of all rows: results/*.md and *.png, and the tables of EVIDENCE.md.

python -m experiments.page [FOLDER OF ROWS]
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from experiments import figures, rows
from experiments.rows import MEASURES
from experiments.variants import VARIANTS
from ssl_gradmix.evaluation import plots

PRIMARY = "unstamped_linear"
"""The measure of the planted shortcuts that was fixed beforehand."""


def main(folder: Path = rows.RESULTS) -> None:
    evidence, stamps = (rows.read(folder / f"{name}.jsonl") for name in ("evidence", "shortcuts"))
    rewrite(folder / "evidence.md", evidence_page(evidence))
    rewrite(folder / "shortcuts.md", stamps_page(stamps))
    for (grid, method), part in evidence.groupby(["grid", "method"]):
        compared = rows.differences(part, figures.REFERENCE)
        if figures.shown(compared):
            path = folder / f"evidence-{grid}-{method}.png"
            figures.forest(compared, in_order(part.variant)).savefig(path, dpi=120)
    plots.write(folder / "shortcuts.png", figures.accuracy_by_bits(stamps[stamps.grid == "cpu"]))
    third = third_views(stamps)
    stamps = stamps.query("grid == 'cpu' and method == 'simclr' and data == 'stamps-9'")
    tables = [*third, "", *headline(stamps), "", *summary(evidence[evidence.grid == "cpu"])]
    print("\n".join(tables))


def rewrite(path: Path, lines: Iterable[str]) -> None:
    """Replaces everything from the first section of a page on; people write what is above."""
    introduction = path.read_text().partition("\n## ")[0].rstrip() if path.exists() else "# Tables"
    path.write_text("\n".join([introduction, *lines, ""]))


def evidence_page(found: pd.DataFrame) -> Iterator[str]:
    """Lines of results/evidence.md."""
    for (grid, method), part in found.groupby(["grid", "method"], sort=False):
        yield from ("", f"## {method}, grid `{grid}`", "", described(part), "", *costs(part), "")
        if figures.shown(rows.differences(part, figures.REFERENCE)):
            yield from (f"### Against {figures.REFERENCE}, in short", "", *summary(part), "")
            title = f"Differences to {figures.REFERENCE} with 95% intervals"
            yield from (f"![{title}](evidence-{grid}-{method}.png)", "")
        values = part.groupby(["measure", "variant"]).value.agg(["mean", "std", "count"])
        yield from ("### Means ± standard deviations over seeds (number of seeds)", "")
        yield from pivot({key: spread(key[0], row) for key, row in values.iterrows()})
        for reference in ("plain", figures.REFERENCE, "random-box", "gradmix"):
            compared = rows.differences(part, reference)
            if len(compared):
                yield from ("", f"### Differences to {reference}", "", *verdicts(compared))


def stamps_page(found: pd.DataFrame) -> Iterator[str]:
    """Lines of results/shortcuts.md: the primary measure with differences, then the others."""
    for (grid, method, data), part in found.groupby(["grid", "method", "data"], sort=False):
        yield f"\n## {method}, grid {grid}, {data}\n"
        values = part.groupby(["variant", "measure"]).value.agg(["mean", "std", "count"])
        cells = {key: spread(key[1], row) for key, row in values.iterrows()}
        variants = in_order(part.variant)
        usual = ("gradmix", "random-box", "third-view", "plain")
        references = [name for name in usual if name in variants]
        lines = {name: [name, cells.pop((name, PRIMARY))] for name in variants}
        for reference in references:
            compared = rows.differences(part[part.measure == PRIMARY], reference)
            for name, line in lines.items():
                key = (PRIMARY, name)
                line.append(interval(PRIMARY, compared.loc[key]) if key in compared.index else "")
        header = ["variant", "linear probe", *(f"minus {name}" for name in references)]
        yield from (*table(header, [*lines.values()]), *recovered(part), "")
        yield from pivot(cells, "variant")


def recovered(part: pd.DataFrame) -> Iterator[str]:
    """The fraction of the oracle's gain that GradMix has, paired by seed, if there is a gain."""
    probe = part[part.measure == PRIMARY].pivot(index="seed", columns="variant", values="value")
    if not {"plain", "gradmix", "oracle"} <= set(probe.columns):
        return
    gain = probe.oracle - probe.plain
    if rows.paired_interval(gain.dropna().tolist())[1] > 0:
        fractions = (probe.gradmix - probe.plain) / gain
        mean, low, high = rows.paired_interval(fractions.dropna().tolist())
        ends = f"[{low:.0%}, {high:.0%}]"
        yield f"\nGradMix has {mean:.0%} {ends} of what the oracle gains over plain views."


def third_views(stamps: pd.DataFrame) -> list[str]:
    """The first table of EVIDENCE.md: the primary measure, and what the adaptive view has more."""
    places = {
        "natural": ("long", "stamps-0"),
        "stamp in one corner": ("long", "stamps-9-corner"),
        "stamp anywhere, 8 epochs": ("anywhere", "stamps-9"),
    }
    cells = {}
    for column, (grid, data) in places.items():
        part = stamps[(stamps.grid == grid) & (stamps.data == data) & (stamps.measure == PRIMARY)]
        for name, values in part.groupby("variant").value:
            text = f"{number(PRIMARY, values.mean())} ({len(values)})"
            more = rows.differences(part, name)
            if (PRIMARY, "adaptive") in more.index:
                text += f"; {interval(PRIMARY, more.loc[PRIMARY, 'adaptive'])}"
            cells[name, column] = text
    lines = [
        [name, *(cells.get((name, column), "") for column in places)]
        for name in in_order({name for name, _ in cells})
    ]
    return table(["third view", *places], lines)


def headline(part: pd.DataFrame) -> list[str]:
    """The second table of EVIDENCE.md: the primary measure, and what GradMix has beyond it."""
    part = part[part.measure == PRIMARY]
    titles = {"gradmix": "**gradmix**", "oracle": "oracle, boxes on the stamp"}
    lines = []
    for name in ("plain", "third-view", "random-box", "gradmix", "oracle"):
        seeds = part[part.variant == name].value
        mean = f"{number(PRIMARY, seeds.mean())} ± {number(PRIMARY, seeds.std())}"
        behind = rows.differences(part, name)
        beyond = "" if name == "gradmix" else interval(PRIMARY, behind.loc[PRIMARY, "gradmix"])
        lines.append([titles.get(name, name), mean, beyond])
    return table(["variant", "linear probe", "GradMix minus it"], lines)


def summary(part: pd.DataFrame) -> list[str]:
    """Variants by some measures: mean, and paired difference to the reference."""
    part = part[part.measure.isin(figures.SHORT)]
    compared = rows.differences(part, figures.REFERENCE)
    cells = {}
    for key, row in part.groupby(["measure", "variant"]).value.agg(["mean", "count"]).iterrows():
        behind = f" ({row['count']:.0f})"
        if key in compared.index:
            behind = f"; {difference(key[0], compared.loc[key])}"
        cells[key[::-1]] = number(key[0], row["mean"]) + behind
    return pivot(cells, "variant")


def described(part: pd.DataFrame) -> str:
    """Number of cells, commits, and the settings that all cells share."""
    first = part.iloc[0].settings
    cells = part.groupby(["variant", "data", "seed"]).ngroups
    names = ("data", "images", "epochs", "batch", "backbone", "corrupted")
    shared = ", ".join(f"{name} {first[name]}" for name in names)
    recipe = f"; `{shlex.join(first['recipe'])}`" if first["recipe"] else ""
    return f"{cells} cells, commits {', '.join(sorted(set(part.commit)))}: {shared}{recipe}."


def costs(part: pd.DataFrame) -> list[str]:
    """Seeds of each variant by the kind of data, passes and seconds."""
    kinds = ("all", "known", "two-cue")
    cells = part.drop_duplicates(["variant", "data", "seed"])
    seconds = cells[cells.data == "all"].groupby("variant").seconds.mean()
    lines = []
    for variant in in_order(part.variant):
        mine = cells[cells.variant == variant]
        row = mine.iloc[0]
        seeds = (" ".join(map(str, sorted(mine.seed[mine.data == kind]))) for kind in kinds)
        passes = f"{row.passes} + {row.attributions} + {row.target_passes}"
        taken = f"{seconds[variant]:,.0f}" if variant in seconds else ""
        lines.append([variant, *seeds, passes, taken])
    return table(["variant", *(f"seeds, {kind}" for kind in kinds), "passes", "seconds"], lines)


def verdicts(compared: pd.DataFrame) -> list[str]:
    """Differences of all measures, and how many are better, worse and open."""
    lines = pivot({key: difference(key[0], row) for key, row in compared.iterrows()})
    counted = compared[~compared.index.isin(rows.CHOSEN_BY, level="measure")]
    ends = []
    for variant in in_order(counted.index.get_level_values("variant")):
        found = counted.xs(variant, level="variant").verdict.tolist()
        ends.append(" / ".join(str(found.count(each)) for each in ("better", "worse", "open")))
    return [*lines, f"| better / worse / open | {' | '.join(ends)} |"]


def in_order(variants: Iterable[str]) -> list[str]:
    """The variants in their usual order."""
    return [name for name in VARIANTS if name in set(variants)]


def pivot(cells: dict[tuple[str, str], str], corner: str = "measure") -> list[str]:
    """A table of texts by two keys, measures and variants, both in their usual order."""
    order = [*MEASURES, *VARIANTS]
    names, columns = (sorted({key[i] for key in cells}, key=order.index) for i in (0, 1))
    titles = {name: measure.title for name, measure in MEASURES.items()}
    header = [corner, *(titles.get(column, column) for column in columns)]
    lines = [
        [titles.get(name, name), *(cells.get((name, column), "") for column in columns)]
        for name in names
    ]
    return table(header, lines)


def table(header: list[str], lines: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines)]


def difference(measure: str, row: pd.Series) -> str:
    """A paired difference with its interval and seeds, marked by its verdict."""
    mark = {"better": "**", "worse": "***", "open": ""}[row.verdict]
    return f"{mark}{interval(measure, row)}{mark} ({row.seeds})"


def interval(measure: str, row: pd.Series) -> str:
    """A paired difference with its interval."""
    text = number(measure, row["mean"], "+")
    if math.isnan(row.low):
        return text
    return f"{text} [{number(measure, row.low, '+')}, {number(measure, row.high, '+')}]"


def spread(measure: str, row: pd.Series) -> str:
    """A mean with its standard deviation over seeds and their number."""
    deviation = f" ± {number(measure, row['std'])}" if row["count"] > 1 else ""
    return f"{number(measure, row['mean'])}{deviation} ({row['count']:.0f})"


def number(measure: str, value: float, sign: str = "") -> str:
    kind = MEASURES[measure]
    shown = round(float(100 * value if kind.percent else value), kind.digits) + 0.0  # no "-0.0"
    return f"{shown:{sign}.{kind.digits}f}".replace("-", "−")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
