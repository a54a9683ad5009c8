"""Does GradMix break a shortcut? Trainings on images whose views bear a stamp that names the image, and not its class.

A contrastive loss can be had from the stamp alone (ssl_gradmix/data/planted.py), and an encoder that does so knows
little of the rest. Fixed beforehand, the primary measure is the linear probe of the class on test images without stamps
(`unstamped_linear`), and the primary comparison GradMix minus a box at a random place, seed by seed. Controls are as
many passes, lower temperatures, a third plain view, boxes drawn otherwise, and an oracle whose box lies on the stamp.
Other data are stamps of other bits, in the corner only, repeated everywhere, faint, or put in before the augmentation,
a time of day in the corner of images of 64 px, and digits overlaid before the augmentation.

    python benchmarks/shortcuts.py --data cifar10 --jobs 2       runs it; stopped, it goes on where it was
    python benchmarks/shortcuts.py --data cifar10 --print        its commands, such as anyone can repeat
    python benchmarks/shortcuts.py --report                      tables of the rows that are there, and a figure

On a GPU: --grid gpu --images 50000 --epochs 100 --backbone resnet18_small --batch 512 -- --training.precision bf16
What stands behind -- goes to the recipes.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from evidence import command, picture, rows
from evidence.cells import METHODS, STAMPED, Cell
from evidence.page import table

from ssl_gradmix.evaluation import plots

RESULTS = Path(__file__).parent / "results" / "shortcuts.jsonl"
VARIANTS = (
    *("plain", "plain-temperature0.1", "plain-temperature0.05", "plain-more-epochs", "third-view"),
    *("random-box", "random-center-box", "center-box", "gradmix", "gradmix-loss", "oracle"),
)
OTHERS = (
    *("gradmix-mask", "gradmix-layer2", "gradmix-layer4"),
    *("gradmix-lam0.5-0.9", "gradmix-donor-positive", "gradmix-attract"),
)
REFERENCES = ("random-box", "third-view", "plain")
PRIMARY = "unstamped_linear"
OTHER_MEASURES = (
    *("unstamped_knn", "stamped_linear", "first_bit", "same_stamp", "other_bits", "other_place", "other_image"),
    *("reliance", "hit", "unstamped_corruption_error", "stamps_validation_loss"),
)

INTRODUCTION = """# Tables of the planted shortcuts

Written by `python benchmarks/shortcuts.py --report` from the rows in `shortcuts.jsonl`, which say the commit of each.
`--print` prints the commands of each cell.

The linear probe is of the class on test images without stamps, in percent, the primary measure: mean and standard
deviation over (seeds), then paired differences in percentage points with 95% t intervals over seeds; one seed has none.
Nothing is corrected for the number of comparisons. `random-box` lies anywhere inside the image, all places alike;
`random-center-box` is centered on any pixel and shifted inside; `oracle` has its box on the stamp.

In the second tables, shares and cosines are in percent. Cosines are of two views' embeddings, with the second one's
stamp or image exchanged; reliance is attributed at layer3 of the backbone, a tenth of the image; the probe's loss is of
held-out training images, by which settings are chosen.

![Linear probe by bits of the stamp](shortcuts.png)"""

RECIPE = ("--gradmix.lam_range", "[0.8, 0.9]", "--optimizer.lr", "0.4", "--optimizer.warmup_epochs", "1")
"""Of all cells. A box of a tenth to a fifth of the image covers a stamp, and at a random place seldom."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = command.parser(__doc__, RESULTS, ".cache/shortcuts", images=5000, epochs=8, corrupted=0)
    add, known = parser.add_argument, (*VARIANTS, *OTHERS)
    add("--method", choices=METHODS, default="simclr")
    text = "of %(choices)s (default: all but the last six)"
    add("--variants", nargs="+", choices=known, metavar="VARIANT", default=VARIANTS, help=text)
    text = "of %(choices)s (default: stamps-9)"
    add("--planted", nargs="+", choices=tuple(STAMPED), metavar="DATA", default=["stamps-9"], help=text)
    options = parser.parse_args(argv)
    if options.report:
        found, page = rows.read(options.results), options.results.with_suffix(".md")
        plots.write(page.with_suffix(".png"), picture.accuracy_by_bits(found[found.grid == options.grid]))
        page.write_text("\n".join([INTRODUCTION, *report(found), ""]))
        return print(page)
    # All variants of a seed before the next seed, so that what there is can be compared.
    chosen = itertools.product(options.seeds, options.planted, options.variants)
    cells = [Cell(options.method, variant, planted, seed) for seed, planted, variant in chosen]
    command.run(options, [cell for cell in cells if cell.variant != "oracle" or cell.stamped], RECIPE)


def report(found: pd.DataFrame) -> Iterator[str]:
    """Two tables of each grid, method and data: the primary measure with its differences, and the other measures."""
    for (grid, method, data), part in found.groupby(["grid", "method", "data"], sort=False):
        values = part.groupby(["measure", "variant"])["value"].agg(["mean", "std", "count"])
        variants = [name for name in (*VARIANTS, *OTHERS) if name in set(part.variant)]
        compared = {name: rows.differences(part, name) for name in REFERENCES if name in variants}

        def mean(measure: str, variant: str, values: pd.DataFrame = values) -> str:
            return _mean(measure, *values.loc[measure, variant]) if (measure, variant) in values.index else ""

        def difference(variant: str, found: pd.DataFrame) -> str:
            key = PRIMARY, variant
            return _interval(*found.loc[key, ["mean", "low", "high"]]) if key in found.index else ""

        yield f"\n## {method}, grid {grid}, {data}\n"
        lines = [
            [name, mean(PRIMARY, name), *(difference(name, each) for each in compared.values())] for name in variants
        ]
        yield from table(["variant", "linear probe", *(f"minus {name}" for name in compared)], lines)
        yield from recovered(part)
        yield ""
        measures = [measure for measure in OTHER_MEASURES if measure in set(part.measure)]
        header = [rows.MEASURES[measure].title for measure in measures]
        yield from table(["variant", *header], [[name, *(mean(each, name) for each in measures)] for name in variants])


def recovered(part: pd.DataFrame) -> Iterator[str]:
    """The share of the oracle's gain that GradMix has, seed by seed, with its 95% t interval, where there is a gain."""
    probe = part[part.measure == PRIMARY].pivot(index="seed", columns="variant", values="value")
    if {"plain", "gradmix", "oracle"} <= set(probe.columns):
        gain = probe.oracle - probe.plain
        if not rows.paired_interval(gain.dropna().tolist())[1] > 0:
            return
        mean, low, high = rows.paired_interval(((probe.gradmix - probe.plain) / gain).dropna().tolist())
        yield f"\nGradMix has {mean:.0%} [{low:.0%}, {high:.0%}] of what the oracle gains over plain views."


def _mean(measure: str, mean: float, std: float, seeds: float) -> str:
    scale, digits = (100, 1) if rows.MEASURES[measure].percent else (1, 2)
    return f"{scale * mean:.{digits}f}" + (f" ± {scale * std:.{digits}f} ({seeds:.0f})" if seeds > 1 else "")


def _interval(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:+.1f}" + ("" if pd.isna(low) else f" [{100 * low:+.1f}, {100 * high:+.1f}]")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"shortcuts.py: {error}")
