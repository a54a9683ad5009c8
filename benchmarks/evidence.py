"""Does GradMix help? A grid of cells (method, variant, data, seed), each a training run and its evaluations.

    python benchmarks/evidence.py --data cifar10 --estimate               what there is to do, and how long it takes
    python benchmarks/evidence.py --data cifar10 --jobs 2                 does it; stopped, it goes on where it was
    python benchmarks/evidence.py --data cifar10 --print simclr/e/all/0   the commands of one cell, to be repeated
    python benchmarks/evidence.py --report                                tables and figures: EVIDENCE.md

On a GPU: --grid gpu --images 50000 --epochs 100 --backbone resnet18_small --batch 512 -- --training.precision bf16
What stands behind -- goes to the recipes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from evidence.cells import CHANGES, DATA, METHODS, VARIANTS, Cell, Grid, passes, steps

from ssl_gradmix import command_line

HERE = Path(__file__).parent

RATE = 900
"""Passes a second, where no cell of the grid is done yet: `resnet10_tiny` at 32 px on two threads."""

ATTRIBUTION = 0.2
"""GradMix's backward pass to the observed layer, in encoder passes."""

SHARE = {"all": 1.0, "known": 0.6, "two-cue": 0.5}
"""Of the grid's images that a training sees."""

EVALUATION_MINUTES = {"all": 4, "known": 2, "two-cue": 1}
"""Of two cores, roughly."""


def parser() -> argparse.ArgumentParser:
    variants = "; ".join(f"{name} {title}" for name, (title, _) in VARIANTS.items())
    made = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"variants: {variants}. With -CHANGE: {', '.join(CHANGES)}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --data FOLDER [options] [-- RECIPE OPTIONS]",
    )
    add = made.add_argument
    add("--data", type=Path, help="CIFAR-10 as a folder: train/<class>/*, test/<class>/*")
    add("--grid", default="cpu", help="its name, in rows, figures and paths (default: %(default)s)")
    add("--methods", nargs="+", choices=METHODS, default=["simclr"])
    add("--variants", nargs="+", default=list("acdef"), help="such as a e e-layer2 (default: a c d e f)")
    add("--kinds", nargs="+", choices=tuple(DATA), default=list(DATA), help="of data (default: all of them)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    add("--cells", nargs="+", metavar="CELL", help="only these, such as simclr/e/all/0")
    add("--images", type=int, default=10_000, help="training images (default: %(default)s)")
    add("--epochs", type=int, default=20, help="(default: %(default)s)")
    add("--batch", type=int, default=256, help="(default: %(default)s)")
    add("--backbone", default="resnet10_tiny", help="(default: %(default)s)")
    add("--corrupted", type=int, default=2000, help="test images that are corrupted (default: %(default)s)")
    add("--ood", nargs="+", type=Path, default=[], help="folders of out-of-distribution images, beside digits")
    add("--jobs", type=int, choices=(1, 2), default=1, help="cells at a time, which share the cores")
    add("--cache", type=Path, default=Path(".cache/evidence"), help="for images and runs (default: %(default)s)")
    add("--results", type=Path, default=HERE / "results" / "evidence.jsonl", help="rows, and figures beside them")
    add("--page", type=Path, default=HERE / "EVIDENCE.md", help="what --report writes")
    task = made.add_mutually_exclusive_group()
    task.add_argument("--print", metavar="CELL", help="print a cell's commands")
    task.add_argument("--estimate", action="store_true", help="print how long the cells take")
    task.add_argument("--report", action="store_true", help="write the page and its figures")
    add("recipe", nargs="*", help=argparse.SUPPRESS)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    if options.report:
        return report(options)
    if options.data is None:
        raise ValueError("--data is missing: CIFAR-10 as a folder with train/ and test/ in it")
    grid = Grid(
        options.grid,
        options.data.absolute(),
        options.images,
        options.epochs,
        options.batch,
        options.backbone,
        options.corrupted,
        tuple(path.absolute() for path in options.ood),
        tuple(options.recipe),
        options.cache.absolute(),
        max(1, len(os.sched_getaffinity(0)) // options.jobs),
    )
    if options.print:
        cell = Cell.parse(options.print)
        print("\n".join(step.shell(grid.threads) for step in steps(cell, grid)))
        return None

    from evidence import rows
    from evidence.runner import Runner

    found = rows.read(options.results)
    done = rows.finished(found, grid)
    cells = [cell for cell in chosen(options) if cell not in done]
    if options.estimate:
        seconds = {row.cell: row.seconds for row in found if row.cell in done and row.grid == grid.name}
        return estimate(cells, grid, seconds)
    failed = Runner(grid, options.results).run(cells, options.jobs)
    if failed:
        raise ValueError(f"failed: {', '.join(map(str, failed))}; the same command tries them again")


def chosen(options: argparse.Namespace) -> list[Cell]:
    """The cells asked for, all variants of a seed before the next seed, so that what there is can be compared."""
    if options.cells:
        return [Cell.parse(text) for text in options.cells]
    cells = itertools.product(options.methods, options.seeds, options.kinds, options.variants)
    return [Cell(method, variant, kind, seed) for method, seed, kind, variant in cells]


def estimate(cells: Sequence[Cell], grid: Grid, seconds: Mapping[Cell, float]) -> None:
    """Prints minutes of one cell at a time, at the median rate of the done ones, whose training took `seconds`."""
    rate = statistics.median([weight(cell, grid) / taken for cell, taken in seconds.items()] or [RATE])
    print(f"{len(seconds)} cells are done, {len(cells)} to do at {rate:.0f} passes a second; minutes:")
    total = 0.0
    for cell in cells:
        count = passes(cell, grid)
        training, evaluation = weight(cell, grid) / rate / 60, EVALUATION_MINUTES[cell.data]
        total += training + evaluation
        print(
            f"{cell!s:<28} {count.encoder:>4} encoder passes, {count.attribution:>3} attributions, "
            f"{count.teacher:>3} of a teacher: {training:5.1f} training, {evaluation} evaluation"
        )
    print(f"{total:.0f} minutes, {total / 60:.1f} hours")


def weight(cell: Cell, grid: Grid) -> float:
    """All passes of a training together, in those of one image through the encoder and back."""
    count = passes(cell, grid)
    each = count.encoder + ATTRIBUTION * count.attribution + count.teacher / 3
    return each * SHARE[cell.data] * grid.images


def report(options: argparse.Namespace) -> None:
    from evidence import page, rows

    for path in page.write(rows.read(options.results), options.page, options.results.parent):
        print(path)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
