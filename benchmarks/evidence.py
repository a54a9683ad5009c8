"""Does GradMix help? A grid of cells (method, variant, data, seed), each a training run and its evaluations.

    python benchmarks/evidence.py --data cifar10 --jobs 2                   runs it; stopped, it goes on where it was
    python benchmarks/evidence.py --data cifar10 --print                    its commands, such as anyone can repeat
    python benchmarks/evidence.py --report                                  tables and figures: results/evidence.md

On a GPU: --grid gpu --images 50000 --epochs 100 --backbone resnet18_small --batch 512 -- --training.precision bf16
What stands behind -- goes to the recipes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from evidence import page, rows, runner
from evidence.cells import DATA, METHODS, VARIANTS, Cell, Grid, steps

RESULTS = Path(__file__).parent / "results" / "evidence.jsonl"
USUAL = ("plain", "third-view", "random-box", "gradmix", "gradmix-loss")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"variants: {', '.join(VARIANTS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --data FOLDER [options] [-- RECIPE OPTIONS]",
    )
    add = made.add_argument
    add("--data", type=Path, help="CIFAR-10 as a folder: train/<class>/*, test/<class>/*")
    add("--grid", default="cpu", help="its name, in rows, figures and paths (default: %(default)s)")
    add("--methods", nargs="+", choices=METHODS, default=["simclr"])
    add("--variants", nargs="+", choices=VARIANTS, metavar="VARIANT", default=USUAL, help=f"(default: {USUAL})")
    add("--kinds", nargs="+", choices=DATA, default=DATA, help="of data (default: all of them)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    add("--images", type=int, default=10_000, help="training images (default: %(default)s)")
    add("--epochs", type=int, default=20, help="(default: %(default)s)")
    add("--batch", type=int, default=256, help="(default: %(default)s)")
    add("--backbone", default="resnet10_tiny", help="(default: %(default)s)")
    add("--corrupted", type=int, default=2000, help="test images that are corrupted (default: %(default)s)")
    add("--jobs", type=int, choices=(1, 2), default=1, help="cells at a time, which share the cores")
    add("--cache", type=Path, default=Path(".cache/evidence"), help="for images and runs (default: %(default)s)")
    add("--results", type=Path, default=RESULTS, help="file of rows; tables and figures beside it")
    add("--print", action="store_true", help="print the cells' commands")
    add("--report", action="store_true", help="write the tables and figures of all rows")
    add("recipe", nargs="*", help=argparse.SUPPRESS)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    if options.report:
        return print(*page.write(rows.read(options.results), options.results.with_suffix(".md")), sep="\n")
    if options.data is None:
        raise ValueError("--data is missing: CIFAR-10 as a folder with train/ and test/ in it")
    threads = max(1, len(os.sched_getaffinity(0)) // options.jobs)
    common = {name: getattr(options, name) for name in ("images", "epochs", "batch", "backbone", "corrupted")}
    data, cache = options.data.absolute(), options.cache.absolute()
    grid = Grid(options.grid, data, **common, recipe=tuple(options.recipe), cache=cache, threads=threads)
    # All variants of a seed before the next seed, so that what there is can be compared.
    cells = itertools.product(options.methods, options.seeds, options.kinds, options.variants)
    chosen = [Cell(method, variant, kind, seed) for method, seed, kind, variant in cells]
    if options.print:
        return print(*(step.shell(threads) for cell in chosen for step in steps(cell, grid)), sep="\n")
    rows.finished(rows.read(options.results), grid)  # refuses another grid's name before anything runs
    failed = runner.run(chosen, grid, options.results, options.jobs)
    if failed:
        raise ValueError(f"failed: {', '.join(map(str, failed))}; the same command tries them again")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"evidence.py: {error}")
