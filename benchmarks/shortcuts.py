"""Does GradMix break a shortcut? Trainings on images whose views bear a stamp that names the image, and not its class.

A contrastive loss can be had from the stamp alone (ssl_gradmix/data/planted.py), and an encoder that does so knows
little of the rest. Fixed beforehand, the primary measure is the linear probe of the class on test images without stamps
(`unstamped_linear`), and the primary comparison GradMix minus a box at a random place, seed by seed. Controls are as
many passes, a third plain view, a box in the middle, and an oracle whose box lies on the stamp.

    python benchmarks/shortcuts.py --data cifar10 --jobs 2       runs it; stopped, it goes on where it was
    python benchmarks/shortcuts.py --data cifar10 --print        its commands, such as anyone can repeat
    python benchmarks/shortcuts.py --report                      tables of the rows that are there

On a GPU: --grid gpu --images 50000 --epochs 100 --backbone resnet18_small --batch 512 -- --training.precision bf16
What stands behind -- goes to the recipes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from evidence import rows, runner
from evidence.cells import METHODS, STAMPED, Cell, Grid, steps
from evidence.page import table

RESULTS = Path(__file__).parent / "results" / "shortcuts.jsonl"
VARIANTS = ("plain", "plain-more-epochs", "third-view", "random-box", "center-box", "gradmix", "gradmix-loss", "oracle")
BITS = tuple(int(name.removeprefix("stamps-")) for name in STAMPED)
REFERENCES = ("random-box", "third-view", "plain")
MEASURES = ("unstamped_linear", "unstamped_knn", "reliance")

RECIPE = ("--gradmix.lam_range", "[0.8, 0.9]", "--optimizer.lr", "0.4", "--optimizer.warmup_epochs", "1")
"""Of all cells. A box of a tenth to a fifth of the image covers a stamp, and at a random place seldom."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --data FOLDER [options] [-- RECIPE OPTIONS]",
    )
    add = made.add_argument
    add("--data", type=Path, help="CIFAR-10 as a folder: train/<class>/*, test/<class>/*")
    add("--grid", default="cpu", help="its name, in rows and paths (default: %(default)s)")
    add("--method", choices=METHODS, default="simclr")
    add("--variants", nargs="+", choices=VARIANTS, metavar="VARIANT", default=VARIANTS, help=f"(default: {VARIANTS})")
    add("--bits", nargs="+", type=int, choices=BITS, default=(9, 0, 16, 4), help="of stamps (default: %(default)s)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    add("--images", type=int, default=5000, help="training images (default: %(default)s)")
    add("--epochs", type=int, default=8, help="(default: %(default)s)")
    add("--batch", type=int, default=256, help="(default: %(default)s)")
    add("--backbone", default="resnet10_tiny", help="(default: %(default)s)")
    add("--jobs", type=int, choices=(1, 2), default=1, help="cells at a time, which share the cores")
    add("--cache", type=Path, default=Path(".cache/shortcuts"), help="for images and runs (default: %(default)s)")
    add("--results", type=Path, default=RESULTS, help="file of rows")
    add("--print", action="store_true", help="print the cells' commands")
    add("--report", action="store_true", help="print tables of all rows")
    add("recipe", nargs="*", help=argparse.SUPPRESS)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    if options.report:
        return print(*report(rows.read(options.results)), sep="\n")
    if options.data is None:
        raise ValueError("--data is missing: CIFAR-10 as a folder with train/ and test/ in it")
    threads = max(1, len(os.sched_getaffinity(0)) // options.jobs)
    common = {name: getattr(options, name) for name in ("images", "epochs", "batch", "backbone")}
    places = options.data.absolute(), options.cache.absolute()
    grid = Grid(
        options.grid,
        places[0],
        **common,
        corrupted=0,
        recipe=(*RECIPE, *options.recipe),
        cache=places[1],
        threads=threads,
    )
    # All variants of a seed before the next seed, so that what there is can be compared.
    cells = itertools.product(options.seeds, options.bits, options.variants)
    chosen = [Cell(options.method, variant, f"stamps-{bits}", seed) for seed, bits, variant in cells]
    chosen = [cell for cell in chosen if (cell.variant, cell.data) != ("oracle", "stamps-0")]
    if options.print:
        return print(*(step.shell(threads) for cell in chosen for step in steps(cell, grid)), sep="\n")
    rows.finished(rows.read(options.results), grid)  # refuses another grid's name before anything runs
    failed = runner.run(chosen, grid, options.results, options.jobs)
    if failed:
        raise ValueError(f"failed: {', '.join(map(str, failed))}; the same command tries them again")


def report(found: pd.DataFrame) -> Iterator[str]:
    """Tables of each grid, method and number of bits: means over seeds, and differences with 95% t intervals."""
    for (grid, method, data), part in found.groupby(["grid", "method", "data"], sort=False):
        yield f"\n### {method}, grid {grid}, {data}\n"
        values = part.groupby(["variant", "measure"])["value"].agg(["mean", "std", "count"])
        differences = {name: rows.differences(part, name) for name in REFERENCES if name in set(part.variant)}
        lines = []
        for variant in (name for name in VARIANTS if name in set(part.variant)):
            cells = [_percent(*values.loc[variant, measure]) for measure in MEASURES]
            for compared in differences.values():
                key = (MEASURES[0], variant)
                cells.append(_interval(*compared.loc[key, ["mean", "low", "high"]]) if key in compared.index else "")
            lines.append([variant, *cells])
        header = [rows.MEASURES[measure].title for measure in MEASURES]
        yield from table(["variant", *header, *(f"probe, minus {name}" for name in differences)], lines)


def _percent(mean: float, std: float, seeds: float) -> str:
    return f"{100 * mean:.1f}" + (f" ± {100 * std:.1f} ({seeds:.0f})" if seeds > 1 else "")


def _interval(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:+.1f}" + ("" if pd.isna(low) else f" [{100 * low:+.1f}, {100 * high:+.1f}]")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"shortcuts.py: {error}")
