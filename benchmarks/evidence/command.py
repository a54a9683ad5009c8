"""What the command lines of grids share: their options, and what is done with the cells chosen."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from evidence import rows, runner
from evidence.cells import Cell, Grid, steps


def parser(description: str | None, results: Path, cache: str, **defaults: int) -> argparse.ArgumentParser:
    """The options of a grid, with defaults of `images`, `epochs` and `corrupted`."""
    made = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s --data FOLDER [options] [-- RECIPE OPTIONS]",
    )
    add = made.add_argument
    add("--data", type=Path, help="CIFAR-10 as a folder: train/<class>/*, test/<class>/*")
    add("--grid", default="cpu", help="its name, in rows, figures and paths (default: %(default)s)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    add("--images", type=int, help="training images (default: %(default)s)")
    add("--epochs", type=int, help="(default: %(default)s)")
    add("--batch", type=int, default=256, help="(default: %(default)s)")
    add("--backbone", default="resnet10_tiny", help="(default: %(default)s)")
    add("--corrupted", type=int, help="test images that are corrupted, 0 for none (default: %(default)s)")
    add("--jobs", type=int, choices=(1, 2), default=1, help="cells at a time, which share the cores")
    add("--cache", type=Path, default=Path(cache), help="for images and runs (default: %(default)s)")
    add("--results", type=Path, default=results, help="file of rows; tables and figures beside it")
    add("--print", action="store_true", help="print the cells' commands")
    add("--report", action="store_true", help="write the tables and figures of all rows")
    add("recipe", nargs="*", help=argparse.SUPPRESS)
    made.set_defaults(**defaults)
    return made


def run(options: argparse.Namespace, cells: Sequence[Cell], recipe: Sequence[str] = ()) -> None:
    """Prints the commands of cells, or runs them, with options of the recipes for all of them.

    Raises:
        ValueError: The data is missing, the grid has rows of other settings, or cells failed.
    """
    if options.data is None:
        raise ValueError("--data is missing: CIFAR-10 as a folder with train/ and test/ in it")
    grid = Grid(
        name=options.grid,
        data=options.data.absolute(),
        images=options.images,
        epochs=options.epochs,
        batch=options.batch,
        backbone=options.backbone,
        corrupted=options.corrupted,
        recipe=(*recipe, *options.recipe),
        cache=options.cache.absolute(),
        threads=max(1, len(os.sched_getaffinity(0)) // options.jobs),
    )
    if options.print:
        return print(*(step.shell(grid.threads) for cell in cells for step in steps(cell, grid)), sep="\n")
    rows.finished(rows.read(options.results), grid)  # refuses another grid's name before anything runs
    failed = runner.run(cells, grid, options.results, options.jobs)
    if failed:
        raise ValueError(f"failed: {', '.join(map(str, failed))}; the same command tries them again")
