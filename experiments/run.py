"""Runs cells: a training with its parts, then its evaluations, then its rows.

    python -m experiments.run --data cifar10 --variants plain gradmix --seeds 0 1
    python -m experiments.run --data cifar10 --print | xargs -d '\\n' -n 1 -P 2 sh -c

The data is CIFAR-10 as a folder, train/<class>/* and test/<class>/*. Cells that have rows are
skipped, and a stopped cell continues where it was. `--print` prints a command for each cell.
Options after -- go to the recipe, for instance on a GPU: --grid gpu --images 50000 --epochs 100
--backbone resnet18_small --batch 512 -- --training.precision bf16
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np

from eval import corruption, linear_probe, ood, osr, reliance
from experiments import rows
from experiments.stamps import StampedViews, Stamps
from experiments.variants import DATA, VARIANTS, Cell, Grid, options, recipe_options, recipe_parts
from recipes import byol_gradmix, simclr_gradmix, supcon_gradmix
from ssl_gradmix import cli
from ssl_gradmix.data.datasets import Data, load

RECIPES = {"simclr": simclr_gradmix, "byol": byol_gradmix, "supcon": supcon_gradmix}


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    given = parser().parse_args(argv)
    given.recipe = tuple(given.recipe)
    grid = Grid(**{each.name: getattr(given, each.name) for each in fields(Grid)})
    # All variants of a seed before the next seed, so that what is there can be compared.
    chosen = itertools.product(given.methods, given.seeds, given.kinds, given.variants)
    subset(grid.data, grid.images, grid.subset)
    for method, seed, kind, variant in chosen:
        cell = Cell(method, variant, kind, seed)
        results = given.results / cell.results
        if rows.finished(rows.read(results), cell, grid):
            continue
        if given.print:
            print(command(cell, argv, grid.threads))
        else:
            print(f"{cell}: run folder {cell.folder(grid)}", flush=True)
            run(cell, grid)
            results.parent.mkdir(exist_ok=True)
            with results.open("a") as file:
                file.write(f"{json.dumps(rows.condense(cell, grid))}\n")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, path = made.add_argument, lambda name: Path(name).resolve()
    usual = ("plain", "third-view", "random-box", "gradmix", "oracle")
    add("--data", type=path, required=True, help="CIFAR-10 as a folder")
    add("--methods", nargs="+", choices=RECIPES, default=["simclr"])
    add("--variants", nargs="+", choices=VARIANTS, default=usual, help=f"(default: {usual})")
    add("--kinds", nargs="+", choices=DATA, default=["stamps-9"], help="(default: stamps-9)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    add("--grid", dest="name", default="again", help="name in rows, figures and paths")
    add("--images", type=int, default=5000, help="training images (default: %(default)s)")
    add("--epochs", type=int, default=8, help="(default: %(default)s)")
    add("--batch", type=int, default=256, help="(default: %(default)s)")
    add("--backbone", default="resnet10_tiny", help="(default: %(default)s)")
    add("--corrupted", type=int, default=0, help="test images to corrupt (default: none)")
    add("--threads", type=int, default=1, help="of each cell (default: %(default)s)")
    add("--cache", type=path, default=".cache/experiments", help="folder for images and runs")
    add("--results", type=path, default=rows.RESULTS, help="folder of rows")
    add("--print", action="store_true", help="print a command for each cell")
    add("recipe", nargs="*", help="after --: options of the recipe")
    return made


def command(cell: Cell, argv: Sequence[str], threads: int) -> str:
    """Shell command of one of the cells that a command line selects; its last options count."""
    end = argv.index("--") if "--" in argv else len(argv)
    given = [each for each in argv[:end] if each != "--print"]
    own = {"methods": cell.method, "variants": cell.variant, "kinds": cell.data, "seeds": cell.seed}
    parts = ["python", "-m", "experiments.run", *given, *options(own), *argv[end:]]
    return f"OMP_NUM_THREADS={threads} {shlex.join(parts)}"


def run(cell: Cell, grid: Grid) -> None:
    """Trains and evaluates a cell. What an earlier call finished is not done again."""
    stamps = cell.stamps()
    RECIPES[cell.method].main(recipe_options(cell, grid), **recipe_parts(cell, stamps))
    for path, evaluate in evaluations(cell, grid, stamps):
        if not path.exists():
            evaluate()


def evaluations(
    cell: Cell, grid: Grid, stamps: Stamps | None
) -> Iterator[tuple[Path, Callable[[], object]]]:
    """The evaluations of a cell, each with the file that it writes."""
    folder, kinds = str(cell.folder(grid)), cell.kinds
    if "known" in kinds:
        yield cell.result(grid, "osr"), partial(osr.main, [folder])
    else:
        fractions = ["--label_fractions", "[0.01, 0.1]"] if "all" in kinds else []
        probe = partial(linear_probe.main, [folder, *fractions])
        yield cell.result(grid, "linear_probe"), probe
    if "labels" in kinds:
        projector = partial(osr.main, [folder, "--feature", "projector"])
        yield cell.result(grid, "osr", "projector"), projector
    if kinds & {"all", "labels"}:
        yield cell.result(grid, "ood"), partial(ood.main, [folder, "--unknown.name", "digits"])
    if "reliance" in kinds:
        views = {} if stamps is None else {"views": partial(StampedViews, stamps=stamps)}
        look = partial(reliance.main, [folder, "--layers", "[layer3]"], **views)
        yield cell.result(grid, "reliance"), look
    if grid.corrupted and kinds != {"known"}:
        images = ["--images", str(grid.corrupted), "--workers", str(grid.threads)]
        yield cell.result(grid, "corruption"), partial(corruption.main, [folder, *images])


def subset(data: Path, images: int, target: Path) -> None:
    """Makes a folder of links to all test images and some training images, the same of each class.

    A larger subset contains a smaller one.
    """
    if target.exists():
        return
    train = load(Data("folder", str(data)), "train")
    counts = np.bincount(train.labels)
    each, rest = divmod(images, len(counts))
    if rest or not 1 <= each <= counts.min():
        most = len(counts) * counts.min()
        raise ValueError(
            f"--images must be a multiple of the {len(counts)} classes of {data}, at most {most}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent))
    order = np.random.default_rng(0).permutation(len(train))
    for label, name in enumerate(train.classes):
        (temporary / "train" / name).mkdir(parents=True)
        for i in order[train.labels[order] == label][:each]:
            path = Path(train.images[i])
            link = temporary / "train" / name / f"{i:06d}{path.suffix}"
            link.symlink_to(path.resolve())
    (temporary / "test").symlink_to((data / "test").resolve())
    temporary.rename(target)


if __name__ == "__main__":
    sys.exit(cli.run(main))
