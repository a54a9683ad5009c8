"""EVIDENCE.md from rows: tables and figures. What people wrote around the generated part stays."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev

from evidence import figures as drawing
from evidence.cells import CHANGES, DATA, VARIANTS
from evidence.differences import Difference, Values, compare, values
from evidence.rows import MEASURES, Measure, Row
from ssl_gradmix.files import write_whole

BEGIN, END = "<!-- generated from rows: begin -->", "<!-- generated from rows: end -->"

TEMPLATE = f"""# Does GradMix help?

Controlled experiments: the same training with and without GradMix's parts, on the same images, seed by seed. Losing
rows stay.

## Answers

Not measured yet.

{BEGIN}
{END}
"""

QUESTIONS = {
    "a": "plain two views, equal epochs",
    "b": "plain two views, equal encoder passes",
    "c": "plain third view, equal both",
    "c-weight0.7": "plain third view that counts as little as a mixed one, equal both",
    "d": "random place, equal both",
    "d-center": "the center, equal both",
}
"""What GradMix's e and f are compared with, and what is equal then."""

PROTOCOL = """## How to read the tables

Encoders are frozen, protocols those of the README's evaluation, and a cell's test images are read once. Settings are
chosen by the rows of held-out training images alone: held out from classifiers and neighbors, not from pretraining,
which reads no labels. Those rows are not counted in verdicts. A difference is the mean over seeds of one variant
minus another at the same seed, with the 95% t interval of that mean (and the number of seeds): **bold** where it
leaves 0 out for the better, ***bold italics*** where for the worse. Nothing is corrected for the number of comparisons:
of twenty where nothing differs, about one stands out. Shares are in percent, their differences in percentage points. A
cell is repeated by its grid's command with `--cells simclr/e/all/0` behind it; `--print simclr/e/all/0` lists its
single commands.

Open set: seed s pretrains on the known classes of the s-th distinct trial of CIFAR-10 (0, 2, 3, 4), and meets the
unknown ones in the evaluation. Two cues: a bright digit on the left and a faint one on the right, which show the same
number in 90% of the pretraining images; a linear classifier reads each off the frozen features where they are
independent. Effective rank: RankMe of the training images' features.
"""


def write(rows: Sequence[Row], page: Path, figures: Path) -> list[Path]:
    """Writes the page, anew between its two marks, and the figures it shows.

    Args:
        rows: Of all grids.
        page: The Markdown file; begun from a template where it is not there.
        figures: Folder for the figures.

    Returns:
        The files written.

    Raises:
        ValueError: The page has not the marks, or cells of one grid have different settings.
    """
    text = page.read_text(encoding="utf-8") if page.exists() else TEMPLATE
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} must have the lines {BEGIN!r} and {END!r}, between which it is generated")
    written: list[Path] = []
    parts = ["", PROTOCOL, *(f"- **{name}**: {title}" for name, (title, _) in VARIANTS.items()), ""] if rows else [""]
    for grid, method in dict.fromkeys((row.grid, row.method) for row in rows):
        of_grid = [row for row in rows if (row.grid, row.method) == (grid, method)]
        pictures = {}
        for reference in ("a", "d"):
            figure = drawing.forest(values(of_grid), reference)
            if figure is not None:
                path = figures / f"{grid}-{method}-against-{reference}.png"
                drawing.write(path, figure)
                written.append(path)
                pictures[reference] = Path(os.path.relpath(path, page.parent)).as_posix()
        parts += _section(of_grid, pictures)
    generated = "\n".join(parts)
    write_whole(
        page, lambda temporary: temporary.write_text(f"{before}{BEGIN}\n{generated}\n{END}{after}", encoding="utf-8")
    )
    return [page, *written]


def _section(rows: Sequence[Row], pictures: dict[str, str]) -> list[str]:
    """Markdown lines of one grid and method."""
    first, found = rows[0], values(rows)
    if any(row.settings != first.settings for row in rows):
        raise ValueError(f"grid {first.grid!r} has cells with different settings: their rows do not compare")
    variants = _in_order({row.variant for row in rows})
    plain = [variant for variant in variants if "-" not in variant]
    lines = [f"## {_method(first.method)}, grid `{first.grid}`", "", *_described(rows), ""]
    lines += ["### Every number", "", "Mean ± standard deviation over seeds (number of seeds).", ""]
    lines += _numbers(found, plain)
    for variant in ("e", "f"):
        if variant in plain:
            lines += _help(found, variant)
    contrasts = [*((x, "e") for x in "fgh"), *((x, y) for y in ("a", "d") for x in "bcdgh" if x != y)]
    lines += _differences(found, "The sign, and the controls", contrasts)
    for base in plain:
        changed = [variant for variant in variants if variant.startswith(f"{base}-")]
        if changed:
            lines += [f"### Settings of {base}: every number", "", *_numbers(found, [base, *changed])]
            lines += _differences(found, f"Settings of {base}: differences", [(variant, base) for variant in changed])
    for reference, path in pictures.items():
        title = f"Differences to {reference}, {VARIANTS[reference][0]}"
        lines += [f"### {title}", "", f"![{title}, with 95% intervals]({path})", ""]
    return [*lines, *_cost(rows, variants)]


def _described(rows: Sequence[Row]) -> list[str]:
    """The grid's settings, and the commands that make it."""
    first, settings = rows[0], rows[0].settings
    cells = {row.cell for row in rows}
    commits = ", ".join(f"`{commit}`" for commit in sorted({row.commit for row in rows}))
    ways: dict[tuple[str, ...], list[str]] = {}
    for variant in _in_order({cell.variant for cell in cells}):
        kinds_of: dict[tuple[str, ...], list[str]] = {}
        for kind in DATA:
            seeds = sorted(cell.seed for cell in cells if (cell.variant, cell.data) == (variant, kind))
            kinds_of.setdefault(tuple(map(str, seeds)), []).append(kind)
        for seeds, kinds in kinds_of.items():
            if seeds:
                ways.setdefault(("--kinds", *kinds, "--seeds", *seeds), []).append(variant)
    return [
        f"{settings['images']:,} training images of {settings['data']}, {settings['backbone']}, "
        f"{settings['epochs']} epochs, batch {settings['batch']}; corruption on {settings['corrupted']:,} test images; "
        f"out of distribution: {', '.join(settings['ood'])}. {len(cells)} cells, commit {commits}.",
        "",
        *(f"    {_command(first, variants, way)}" for way, variants in ways.items()),
    ]


def _command(row: Row, variants: Sequence[str], way: Sequence[str]) -> str:
    """Makes cells of a row's grid and method, for `way`'s kinds of data and seeds."""
    settings = row.settings
    command = ["python", "benchmarks/evidence.py", "--grid", row.grid]
    for name in ("data", "images", "epochs", "batch", "backbone", "corrupted"):
        command += [f"--{name}", str(settings[name])]
    command += ["--ood", *settings["ood"][1:]] if settings["ood"][1:] else []  # digits always are
    command += ["--methods", row.method, "--variants", *variants, *way]
    return shlex.join([*command, "--", *settings["recipe"]] if settings["recipe"] else command)


def _numbers(found: Values, variants: Sequence[str]) -> list[str]:
    """A table of means and spreads, a column a variant."""
    return _table(variants, lambda measure, variant: _spread(measure, found.get((variant, measure.name), {})))


def _help(found: Values, variant: str) -> list[str]:
    """Whether a variant beats its controls: a table, and a count of verdicts for each."""
    compared = {
        reference: differences for reference in QUESTIONS if (differences := compare(found, variant, reference))
    }
    if not compared:
        return []
    lines = [f"### Does {variant} help? ({VARIANTS[variant][0]})", ""]
    lines += _table(
        list(compared),
        lambda measure, reference: _difference(measure, compared[reference].get(measure)),
        {reference: f"− {reference}: {QUESTIONS[reference]}" for reference in compared},
    )
    for reference, differences in compared.items():
        verdicts = [difference.verdict(measure) for measure, difference in differences.items() if not measure.chosen_by]
        lines.append(
            f"- {variant} against {reference} ({QUESTIONS[reference]}): better on {verdicts.count('better')}, worse on "
            f"{verdicts.count('worse')}, open on {verdicts.count('open')} of {len(verdicts)} measures."
        )
    return [*lines, ""]


def _differences(found: Values, title: str, contrasts: Sequence[tuple[str, str]]) -> list[str]:
    """A table of differences, a column a contrast; nothing where there are none."""
    compared = {f"{one} − {two}": differences for one, two in contrasts if (differences := compare(found, one, two))}
    if not compared:
        return []
    table = _table(list(compared), lambda measure, name: _difference(measure, compared[name].get(measure)))
    return [f"### {title}", "", *table]


def _cost(rows: Sequence[Row], variants: Sequence[str]) -> list[str]:
    """What variants cost: passes, and seconds against the plain third view's, seed by seed."""
    lines = [
        "### What it costs",
        "",
        "Passes of a training image in the whole training: of the encoder; of GradMix's attribution (backward, to the "
        "observed layer); of BYOL's teacher (forward). Seconds are those of training alone, on all classes: mean over "
        "seeds, and mean ratio to c at the same seed (range).",
        "",
        "| variant | encoder | attribution | teacher | threads | seconds | against c |",
        "|---|---|---|---|---|---|---|",
    ]
    seconds = {(row.variant, row.seed): row.seconds for row in rows if row.data == "all"}
    for variant in variants:
        row = next(row for row in rows if row.variant == variant)
        own = {seed: taken for (name, seed), taken in seconds.items() if name == variant}
        ratios = [taken / seconds["c", seed] for seed, taken in own.items() if ("c", seed) in seconds]
        threads = sorted({str(each.threads) for each in rows if each.variant == variant})
        lines.append(
            f"| {variant} | {row.passes} | {row.attributions} | {row.target_passes} | {' or '.join(threads)} | "
            f"{f'{fmean(own.values()):,.0f}' if own else ''} | "
            f"{f'{fmean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})' if ratios else ''} |"
        )
    return [*lines, ""]


def _table(
    columns: Sequence[str], cell: Callable[[Measure, str], str], headings: dict[str, str] | None = None
) -> list[str]:
    """A line a measure, those without any number left out."""
    shown = [(headings or {}).get(column, column) for column in columns]
    lines = [f"| measure | {' | '.join(shown)} |", "|---|" + "---|" * len(columns)]
    for measure in MEASURES:
        cells = [cell(measure, column) for column in columns]
        if any(cells):
            lower = "" if measure.larger_is_better else " (less is better)"
            lines.append(f"| {measure.title}{lower} | {' | '.join(cells)} |")
    return [*lines, ""]


def _spread(measure: Measure, by_seed: dict[int, float]) -> str:
    if not by_seed:
        return ""
    mean = _number(measure, fmean(by_seed.values()))
    spread = f" ± {_number(measure, stdev(by_seed.values()))}" if len(by_seed) > 1 else ""
    return f"{mean}{spread} ({len(by_seed)})"


def _difference(measure: Measure, difference: Difference | None) -> str:
    if difference is None:
        return ""
    text = _number(measure, difference.mean, "+")
    if not math.isnan(difference.low):
        text += f" [{_number(measure, difference.low, '+')}, {_number(measure, difference.high, '+')}]"
    mark = {"better": "**", "worse": "***", "open": ""}[difference.verdict(measure)]
    return f"{mark}{text}{mark} ({difference.seeds})"


def _number(measure: Measure, value: float, sign: str = "") -> str:
    shown = round(100 * value if measure.share else value, 1) + 0.0  # no "-0.0"
    return f"{shown:{sign}.1f}".replace("-", "−")


def _in_order(variants: set[str]) -> list[str]:
    """By letter, each with its changes behind it."""
    changes = ["", *CHANGES]
    return sorted(variants, key=lambda variant: (variant[0], changes.index(variant.partition("-")[2])))


def _method(name: str) -> str:
    return {"simclr": "SimCLR", "byol": "BYOL"}[name]
