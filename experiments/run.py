"""Runs cells of an experiment: a training with its parts, then its evaluations, then its rows.

    python -m experiments.run shortcuts --data cifar10 --variants plain gradmix --seeds 0 1
    python -m experiments.run shortcuts --data cifar10 --print | xargs -d '\\n' -n 1 -P 2 sh -c
    python -m experiments.run evidence --data cifar10 --kinds all known

The data is CIFAR-10 as a folder, train/<class>/* and test/<class>/*. Cells that have rows are
skipped, and a stopped cell continues where it was. `--print` prints a command for each cell. On a
GPU: --grid gpu --images 50000 --epochs 100 --backbone resnet18_small --batch 512
-- --training.precision bf16. Options after -- go to the recipe.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eval import corruption, linear_probe, ood, osr, reliance
from experiments import rows
from experiments.stamps import StampedViews, Stamps
from experiments.variants import DATA, VARIANTS, Cell, Grid, options, recipe_options, recipe_parts
from recipes import byol_gradmix, simclr_gradmix, supcon_gradmix
from ssl_gradmix import cli
from ssl_gradmix.data.datasets import Data, load

RESULTS = Path(__file__).parent / "results"
RECIPES = {"simclr": simclr_gradmix, "byol": byol_gradmix, "supcon": supcon_gradmix}

EXPERIMENTS: dict[str, dict[str, Any]] = {
    "shortcuts": {
        **{"images": 5000, "epochs": 8, "corrupted": 0, "kinds": ["stamps-9"]},
        "variants": [
            *("plain", "plain-temperature0.1", "plain-temperature0.05", "plain-more-epochs"),
            *("third-view", "random-box", "random-center-box", "center-box"),
            *("gradmix", "gradmix-loss", "oracle"),
        ],
    },
    "evidence": {
        **{"images": 10_000, "epochs": 20, "corrupted": 2000, "kinds": ["all", "known"]},
        "variants": ["plain", "third-view", "random-box", "gradmix", "gradmix-loss"],
    },
}
"""Default options."""

# A box of a tenth to a fifth of the image covers a stamp; at a random location it rarely does.
SHORTCUTS = ["--gradmix.lam_range", "[0.8, 0.9]", "--optimizer.lr", "0.4"]
RECIPE = {"shortcuts": [*SHORTCUTS, "--optimizer.warmup_epochs", "1"], "evidence": []}
"""Options of the recipe for all cells of an experiment."""


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    given = parser().parse_args(argv)
    given.recipe = (*RECIPE[given.experiment], *given.recipe)
    grid = Grid(**{each.name: getattr(given, each.name) for each in fields(Grid)})
    # All variants of a seed before the next seed, so that what is there can be compared.
    chosen = itertools.product(given.methods, given.seeds, given.kinds, given.variants)
    cells = [Cell(method, variant, kind, seed) for method, seed, kind, variant in chosen]
    done = rows.finished(rows.read(given.results), grid)
    cells = [cell for cell in cells if cell.possible and cell not in done]
    subset(grid.data, grid.images, grid.subset)
    for cell in cells:
        if given.print:
            print(command(cell, argv, grid.threads))
        else:
            print(f"{cell}: run folder {cell.folder(grid)}", flush=True)
            run(cell, grid)
            rows.append(given.results, rows.condense(cell, grid))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    experiments = made.add_subparsers(dest="experiment", required=True)
    for name, defaults in EXPERIMENTS.items():
        each = experiments.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        add = each.add_argument
        add("--data", type=folder, required=True, help="CIFAR-10 as a folder")
        add("--methods", nargs="+", choices=RECIPES, default=["simclr"], help="recipes")
        add("--variants", nargs="+", choices=VARIANTS, metavar="VARIANT", help=", ".join(VARIANTS))
        add("--kinds", nargs="+", choices=DATA, metavar="KIND", help=f"of data: {', '.join(DATA)}")
        add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of the training")
        add("--grid", dest="name", default="cpu", help="name in rows, figures and paths")
        add("--images", type=int, help="number of training images")
        add("--epochs", type=int, help="epochs of each training")
        add("--batch", type=int, default=256, help="batch size")
        add("--backbone", default="resnet10_tiny", help="encoder")
        add("--corrupted", type=int, help="number of test images to corrupt, 0 for none")
        add("--threads", type=int, default=1, help="threads of each cell")
        add("--cache", type=folder, default=f".cache/{name}", help="folder for images and runs")
        add("--results", type=Path, default=RESULTS / f"{name}.jsonl", help="file of rows")
        add("--print", action="store_true", help="print a command for each cell")
        add("recipe", nargs="*", help="after --: options of the recipe")
        each.set_defaults(**defaults)
    return made


def folder(path: str) -> Path:
    return Path(path).resolve()


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
    folder, kinds = str(cell.folder(grid)), cell.kinds(grid)
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
    if "stamps" in kinds:
        views = {} if stamps is None else {"views": partial(StampedViews, stamps=stamps)}
        look = partial(reliance.main, [folder, "--layers", "[layer3]"], **views)
        yield cell.result(grid, "reliance"), look
    if kinds & {"all", "labels", "corrupted"}:
        images = ["--images", str(grid.corrupted), "--workers", str(grid.threads)]
        yield cell.result(grid, "corruption"), partial(corruption.main, [folder, *images])


def subset(data: Path, images: int, target: Path) -> None:
    """Makes a folder with some of the training images and all test images, as symbolic links.

    Args:
        data: Folder `train/<class>/*` and `test/<class>/*`.
        images: Number of training images, the same for each class, drawn with a fixed seed. A
            larger subset contains a smaller one.
        target: Folder to make, unless it exists.

    Raises:
        ValueError: `images` is not a multiple of the number of classes, or too large.
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
