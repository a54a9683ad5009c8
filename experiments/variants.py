"""The cells of the experiments: methods, variants, data, and the options and parts of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from experiments.parts import (
    IFM,
    Anywhere,
    Attract,
    DonorPositive,
    HardViews,
    OnTheStamp,
    RandomPatches,
    lafam,
    logging_hits,
    with_fourth,
)
from experiments.stamps import RandBits, StampedViews, Stamps, Strip, Tags, TwoStamps
from ssl_gradmix import GradMix
from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.methods import METHODS

TRIALS = (0, 2, 3, 4)
"""CIFAR-10's distinct open-set trials: trial 1 has the known classes of trial 0."""

STAMPS: dict[str, Stamps] = {
    "stamps-4": Stamps(4),
    "stamps-9": Stamps(9),
    "stamps-16": Stamps(16),
    "stamps-9-corner": Stamps(9, "corner"),
    "stamps-9-before": Stamps(9, before=True),
    "stamps-9-faint": Stamps(9, strength=0.3),
    "stamps-9-everywhere": Stamps(9, "everywhere", strength=0.5),
    "stamps-two": TwoStamps(9, "corner"),
    "strip": Strip(10, strength=0.5),
    "tags": Tags(23, before=True),
    "randbit-0": RandBits(0),
    "randbit-4": RandBits(4),
    "randbit-6": RandBits(6),
    "randbit-8": RandBits(8),
}
"""Stamps in the views of a training."""

DATA = ("all", "known", "stamps-0", "tags-0", *STAMPS)
"""All classes, known classes of an open-set trial, all classes without and with stamps."""

_GRADMIX = {"extra_view": "gradmix", "gradmix.layers": "[layer3]", "gradmix.target": "agreement"}
_THIRD = {"extra_view": "augmented"}
_ERASE = {**_THIRD, "augmentation.erase": "1"}  # RandomErasing in all three views

VARIANTS: dict[str, dict[str, str]] = {
    "plain": {"extra_view": "none"},
    "plain-temperature0.1": {"extra_view": "none", "method.temperature": "0.1"},
    "plain-temperature0.05": {"extra_view": "none", "method.temperature": "0.05"},
    "supervised-only": {"extra_view": "none", "method.self_supervised": "0"},  # SupCon only
    "plain-more-epochs": {"extra_view": "none"},  # 1.5 times the epochs: passes of a third view
    "third-view": _THIRD,
    # The loss of a mixed view is weighted by its lam, 0.7 on average; a plain third view's is not.
    "third-view-weight0.7": {"extra_view": "augmented", "method.weight": "0.7"},
    "random-box": {**_GRADMIX, "gradmix.region": "random"},
    "random-center-box": _GRADMIX,
    "center-box": {**_GRADMIX, "gradmix.region": "center"},
    "gradmix": _GRADMIX,
    "adaptive": {**_GRADMIX, "extra_view": "adaptive"},
    "adaptive-1.3": {**_GRADMIX, "extra_view": "adaptive"},  # rows only: past thresholds
    "gradmix-loss": {**_GRADMIX, "gradmix.target": "loss"},
    "oracle": _GRADMIX,
    "gradmix-noise": {**_GRADMIX, "gradmix.fill": "noise"},
    "gradmix-mask": {**_GRADMIX, "gradmix.region": "mask"},
    "gradmix-max-mean": {**_GRADMIX, "gradmix.region": "max_mean"},  # rows only: a past region
    "gradmix-layer2": {**_GRADMIX, "gradmix.layers": "[layer2]"},
    "gradmix-layer4": {**_GRADMIX, "gradmix.layers": "[layer4]"},
    "gradmix-lam0.5-0.9": {**_GRADMIX, "gradmix.lam_range": "[0.5, 0.9]"},
    "gradmix-lam0.7-0.9": {**_GRADMIX, "gradmix.lam_range": "[0.7, 0.9]"},
    "gradmix-donor-positive": _GRADMIX,
    "gradmix-attract": _GRADMIX,
    "gradmix-labels": {**_GRADMIX, "method.mixed_labels": "true"},  # SupCon only
    "gradmix-lafam": _GRADMIX,
    "random-patches": {**_GRADMIX, "gradmix.region": "mask", "gradmix.fill": "crop"},
    "ifm": _THIRD,
    "hard-views": _THIRD,  # of four views
    "crops.08": {**_THIRD, "augmentation.min_scale": "0.08"},
    "blur": {**_THIRD, "augmentation.blur": "0.5"},
    "blank-corner": _THIRD,
    "erase.1-.2": {**_ERASE, "augmentation.erase_scale": "[0.1, 0.2]"},
    "erase.15-.4": {**_ERASE, "augmentation.erase_scale": "[0.15, 0.4]"},
    "erase-half": {**_ERASE, "augmentation.erase": "0.5"},  # as published: areas of .02 to .33
}
"""Options of the recipe for each variant, in the order of the tables."""

PARTS: dict[str, dict[str, Any]] = {
    "random-center-box": {"gradmix": Anywhere},
    "oracle": {"gradmix": OnTheStamp},
    "gradmix-donor-positive": {"method": DonorPositive},
    "gradmix-attract": {"method": Attract},
    "gradmix-lafam": {"gradmix": partial(GradMix, attribution=lafam)},
    "random-patches": {"gradmix": RandomPatches},
    "ifm": {"method": IFM},
    "hard-views": {"method": HardViews},
}
"""Parts of the recipe that a variant replaces."""

_LAM, _LR = ("--gradmix.lam_range", "[0.8, 0.9]"), ("--optimizer.lr", "0.4")
STAMPS_RECIPE = (*_LAM, *_LR, "--optimizer.warmup_epochs", "1")
"""Options of all trainings on stamps and their control. A box of a tenth to a fifth of the image
covers a stamp, and at a random location it rarely does."""

_VIEWS = {"min_scale": 1, "rotation": 10, "jitter": 0, "gray": 0, "blur": 0}
TAGS_RECIPE = ("--data.size", "64", *(f"--augmentation.{name}={_VIEWS[name]}" for name in _VIEWS))
"""Further options of trainings on tags and their control: whole images, as in medical imaging."""


@dataclass(frozen=True)
class Grid:
    """Settings that all cells of a grid share: the options of `experiments.run`, absolute paths."""

    name: str
    data: Path
    images: int
    epochs: int
    batch: int
    backbone: str
    corrupted: int
    recipe: tuple[str, ...]
    cache: Path
    threads: int

    @property
    def subset(self) -> Path:
        """Folder of the training images."""
        return self.cache / f"{self.data.name}-{self.images}"

    def settings(self, cell: Cell) -> dict[str, Any]:
        """What the rows of a cell depend on. Cells are comparable if it is equal."""
        names = ("images", "epochs", "batch", "backbone", "corrupted")
        shared = {name: getattr(self, name) for name in names}
        # Rows without `probe` chose the linear probe's learning rate by accuracy. Rows without
        # `boxes` kept boxes inside `lam_range` exactly.
        since = {"ood": ["digits"], "probe": "loss", "boxes": "rounded"}
        planted = STAMPS_RECIPE if "stamps" in cell.kinds else ()
        further = TAGS_RECIPE if cell.data.startswith("tags") else ()
        recipe = [*planted, *further, *self.recipe]
        return {"data": self.data.name, **shared, "recipe": recipe, **since}


class Cell(NamedTuple):
    """One training and its evaluations. With known classes, the seed also chooses the trial."""

    method: str
    variant: str
    data: str
    seed: int

    def __str__(self) -> str:
        return f"{self.method}-{self.variant}-{self.data}-{self.seed}"

    @property
    def results(self) -> str:
        """Name of the file of its rows."""
        return "evidence.jsonl" if self.data in ("all", "known") else "shortcuts.jsonl"

    @property
    def kinds(self) -> set[str]:
        """Kinds of measures that the cell has, see `rows.MEASURES`."""
        if self.data == "known" and self.method == "supcon":
            return {"known", "labels"}
        if self.data in ("all", "known"):
            return {self.data}
        # Reliance is drawn on images of three channels.
        return {"stamps"} if self.data.startswith("randbit") else {"stamps", "reliance"}

    def folder(self, grid: Grid) -> Path:
        """Run folder."""
        return grid.cache / "runs" / grid.name / str(self)

    def result(self, grid: Grid, task: str, feature: str = "backbone") -> Path:
        """Results file of an evaluation."""
        data = "digits" if task == "ood" else grid.subset.name
        ending = "" if feature == "backbone" else f"-{feature}"
        return self.folder(grid) / "eval" / f"{task}-{data}{ending}.json"

    def stamps(self) -> Stamps | None:
        """Stamps that are planted into the views."""
        return replace(STAMPS[self.data]) if self.data in STAMPS else None


def epochs(cell: Cell, grid: Grid) -> int:
    """Epochs of a cell."""
    return math.ceil(1.5 * grid.epochs) if cell.variant == "plain-more-epochs" else grid.epochs


def passes(cell: Cell, grid: Grid) -> tuple[int, int, int]:
    """Passes of a training image during training.

    Returns:
        Passes through the encoder (forward and backward), further backward passes to the observed
        layer for attribution, and passes that are forward only: through BYOL's target network, or
        to choose hard views.
    """
    settings, n = VARIANTS[cell.variant], epochs(cell, grid)
    if cell.variant == "hard-views":
        return 2 * n, 0, 4 * n
    views = 2 if settings["extra_view"] == "none" else 3
    placed = "gradmix" in PARTS.get(cell.variant, {})
    placed = placed or settings.get("gradmix.region") in ("random", "center")
    attributed = settings["extra_view"] in ("adaptive", "gradmix") and not placed
    return views * n, n if attributed else 0, 2 * n if cell.method == "byol" else 0


def recipe_options(cell: Cell, grid: Grid) -> list[str]:
    """Command line of the recipe. The last one counts if an option is given twice."""
    settings: dict[str, Any] = {
        "run": cell.folder(grid),
        "data.name": "folder",
        "data.root": grid.subset,
        "backbone.name": grid.backbone,
        "training.epochs": epochs(cell, grid),
        "training.batch_size": grid.batch,
        "training.seed": cell.seed,
        "training.threads": grid.threads,
        **VARIANTS[cell.variant],
    }
    if cell.data == "known":
        settings["data.open_set"] = f"cifar10:{TRIALS[cell.seed % len(TRIALS)]}"
    if cell.data.startswith("randbit"):
        settings["backbone.name"] += "_randbits"
        settings["backbone.kwargs"] = {"bits": STAMPS[cell.data].bits}
        settings["training.samples_every"] = 0  # pictures have three channels
    return [*grid.settings(cell)["recipe"], *options(settings)]


def recipe_parts(cell: Cell, stamps: Stamps | None) -> dict[str, Any]:
    """Arguments of the recipe's `main`: the parts that are not the recipe's own."""
    parts: dict[str, Any] = dict(PARTS.get(cell.variant, {}))
    views: Any = Views if stamps is None else StampedViews
    if cell.variant == "hard-views":
        views = parts["views"] = with_fourth(views)
    if stamps is None:
        return parts
    blank = cell.variant == "blank-corner"
    parts["views"] = partial(views, stamps=stamps, blank=blank)
    parts["method"] = logging_hits(parts.get("method", METHODS[cell.method]), stamps)
    if cell.variant == "oracle":
        parts["gradmix"] = partial(OnTheStamp, stamps=stamps)
    return parts


def options(settings: Mapping[str, Any]) -> list[str]:
    """Settings as command-line options."""
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]
