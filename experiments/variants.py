"""What a cell of the grid is: one training and its evaluations, as the command lines that anyone can repeat."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

METHODS = ("simclr", "byol", "supcon")
DATA = ("all", "known", "two-cue")
"""All classes; the known classes of an open-set trial; two digits side by side."""

STAMPED = {f"stamps-{bits}": {"data.stamp_bits": bits} for bits in (0, 4, 9, 16)} | {
    "stamps-9-corner": {"data.stamp_bits": 9, "data.stamp_place": "corner"},
    "stamps-9-before": {"data.stamp_bits": 9, "data.stamp_when": "before"},
    "stamps-9-faint": {"data.stamp_bits": 9, "data.stamp_strength": 0.3},
    "stamps-9-everywhere": {"data.stamp_bits": 9, "data.stamp_place": "everywhere", "data.stamp_strength": 0.5},
    "time": {"data.stamp_time": "true", "data.stamp_place": "corner", "data.size": 64},
    "time-none": {"data.size": 64},
    "overlaid-digits": {},
}
"""All classes, with what is planted into every view of the training, see `ssl_gradmix/data/planted.py`, or into the
images themselves (`images.overlaid_digits`)."""

TRIALS = (0, 2, 3, 4)
"""CIFAR-10's distinct open-set trials: trial 1 has the known classes of trial 0."""

_GRADMIX = {"extra_view": "gradmix", "gradmix.layers": "[layer3]", "gradmix.target": "agreement"}

VARIANTS: dict[str, dict[str, str]] = {
    "plain": {"extra_view": "none"},
    "plain-temperature0.1": {"extra_view": "none", "method.temperature": "0.1"},
    "plain-temperature0.05": {"extra_view": "none", "method.temperature": "0.05"},
    "supervised-only": {"extra_view": "none", "method.self_supervised": "0"},  # of supcon alone
    "plain-more-epochs": {"extra_view": "none"},  # half as many again: as many encoder passes as with a third view
    "third-view": {"extra_view": "augmented"},
    # The loss of a mixed view is weighted by its lam, 0.7 on average; that of a plain third view is not.
    "third-view-weight0.7": {"extra_view": "augmented", "method.weight": "0.7"},
    "random-box": {**_GRADMIX, "gradmix.region": "random"},
    "random-center-box": _GRADMIX,  # centered on any pixel, then shifted inside, by benchmarks/evidence/boxes.py
    "center-box": {**_GRADMIX, "gradmix.region": "center"},
    "gradmix": _GRADMIX,
    "gradmix-loss": {**_GRADMIX, "gradmix.target": "loss"},
    "oracle": _GRADMIX,  # the box is put on the stamp, likewise
    "gradmix-donor-positive": _GRADMIX,  # other losses of mixed views, by benchmarks/evidence/mixed_loss.py
    "gradmix-attract": _GRADMIX,
    "gradmix-noise": {**_GRADMIX, "gradmix.fill": "noise"},
    "gradmix-crop": {**_GRADMIX, "gradmix.fill": "crop"},
    "gradmix-mask": {**_GRADMIX, "gradmix.region": "mask"},
    "gradmix-max-mean": {**_GRADMIX, "gradmix.region": "max_mean"},
    "gradmix-layer2": {**_GRADMIX, "gradmix.layers": "[layer2]"},
    "gradmix-layer4": {**_GRADMIX, "gradmix.layers": "[layer4]"},
    "gradmix-layer2+layer3": {**_GRADMIX, "gradmix.layers": "[layer2, layer3]"},
    "gradmix-layer2+layer4": {**_GRADMIX, "gradmix.layers": "[layer2, layer4]"},
    "gradmix-layer3+layer4": {**_GRADMIX, "gradmix.layers": "[layer3, layer4]"},
    "gradmix-lam0.3-0.7": {**_GRADMIX, "gradmix.lam_range": "[0.3, 0.7]"},
    "gradmix-lam0.5-0.9": {**_GRADMIX, "gradmix.lam_range": "[0.5, 0.9]"},
    "gradmix-lam0.7-0.9": {**_GRADMIX, "gradmix.lam_range": "[0.7, 0.9]"},
    "gradmix-weight2.0": {**_GRADMIX, "method.weight": "2.0"},
}
"""Options of the recipe by the variant's name, in the order of the tables."""

_BOXES = {"oracle": "stamp", "random-center-box": "anywhere"}
"""Where `benchmarks/evidence/boxes.py` puts the boxes of a variant."""

_LOSSES = {"gradmix-donor-positive": "donor", "gradmix-attract": "attract"}
"""The loss of a variant's mixed views in `benchmarks/evidence/mixed_loss.py`."""


@dataclass(frozen=True)
class Grid:
    """What all cells have in common.

    Args:
        name: Of the grid, in rows and paths.
        data: CIFAR-10 as a folder, `train/<class>/*` and `test/<class>/*`.
        images: Training images.
        epochs: Passes over them; `plain-more-epochs` makes more.
        batch: Images in a batch.
        backbone: Name of the encoder.
        corrupted: Test images that are corrupted; with stamps, 0 measures no corruption.
        recipe: Further options of the recipes.
        cache: Folder for images and runs.
        threads: Of each command.
    """

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
        """Where the training images are."""
        return self.cache / f"{self.data.resolve().name}-{self.images}"

    @property
    def pairs(self) -> int:
        """Pretraining images of the two-cue data."""
        return self.images // 2

    @property
    def two_cues(self) -> Path:
        """Where the two-cue data is."""
        return self.cache / f"two-cues-{self.pairs}"

    @property
    def overlaid(self) -> Path:
        """Where the training images with digits in them are."""
        return self.cache / f"{self.subset.name}-digits"

    def settings(self) -> dict[str, Any]:
        """What results depend on: cells may be compared where it is the same."""
        names = ("images", "epochs", "batch", "backbone", "corrupted")
        chosen = {name: getattr(self, name) for name in names}
        # Rows without `probe` are from before its learning rate was chosen by held-out loss.
        others = {"recipe": list(self.recipe), "ood": ["digits"], "probe": "loss"}
        return {"data": self.data.resolve().name, **chosen, **others}


class Cell(NamedTuple):
    """One training and its evaluations.

    Attributes:
        method: One of `METHODS`.
        variant: One of `VARIANTS`.
        data: One of `DATA` or `STAMPED`.
        seed: Of the training. With data `known` it chooses the open-set trial too, so that seeds are trials.
    """

    method: str
    variant: str
    data: str
    seed: int

    def __str__(self) -> str:
        return f"{self.method}/{self.variant}/{self.data}/{self.seed}"

    @property
    def kind(self) -> str:
        """Of its data, `stamps` whatever is planted."""
        return "stamps" if self.data in STAMPED else self.data

    @property
    def stamped(self) -> bool:
        """Whether every view of the training bears a stamp of bits."""
        return STAMPED.get(self.data, {}).get("data.stamp_bits", 0) > 0

    @property
    def labeled(self) -> bool:
        """Whether it learns the labels of known classes, and is measured by more than unlabeled training is."""
        return self.method == "supcon" and self.data == "known"

    def run(self, grid: Grid) -> Path:
        """Its run folder."""
        return grid.cache / "runs" / grid.name / str(self).replace("/", "-")


class Step(NamedTuple):
    """A command line, and the file that is there once it is done; None where the command itself knows."""

    command: list[str]
    writes: Path | None

    def shell(self, threads: int) -> str:
        """As it is typed in the folder of the repository."""
        return f"OMP_NUM_THREADS={threads} {shlex.join(self.command)}"


def epochs(cell: Cell, grid: Grid) -> int:
    """Epochs of a cell's training; those that make up for a third view are rounded up."""
    return math.ceil(grid.epochs * 3 / 2) if cell.variant == "plain-more-epochs" else grid.epochs


def passes(cell: Cell, grid: Grid) -> tuple[int, int, int]:
    """Passes of a training image in the whole training.

    Returns:
        Through the encoder, forward and backward; GradMix's backward passes to the observed layer beside those; and
        through BYOL's target network, forward only.
    """
    settings, n = VARIANTS[cell.variant], epochs(cell, grid)
    views = 2 if settings["extra_view"] == "none" else 3
    mixed = settings["extra_view"] == "gradmix" and cell.variant not in _BOXES
    attributed = mixed and settings.get("gradmix.region") not in ("random", "center")
    return views * n, n if attributed else 0, 2 * n if cell.method == "byol" else 0


def steps(cell: Cell, grid: Grid) -> list[Step]:
    """The commands of a cell in their order, to be run in the folder of the repository."""
    run = cell.run(grid)

    def evaluate(script: str, writes: str, *options: str) -> Step:
        return Step(["python", script, str(run), *options], run / writes)

    def probe(cue: str) -> Step:
        where = ["--data.root", str(grid.two_cues / cue), "--out", str(run / "eval" / cue)]
        return evaluate("eval/linear_probe.py", f"eval/{cue}/linear_probe.json", *where)

    recipe = [f"recipes/{cell.method}_gradmix.py"]
    if cell.variant in _LOSSES:
        recipe = ["benchmarks/evidence/mixed_loss.py", _LOSSES[cell.variant], *recipe]
    if cell.kind == "stamps" or cell.variant in _BOXES:
        recipe = ["benchmarks/evidence/boxes.py", _BOXES.get(cell.variant, "attributed"), *recipe]
    # The last one counts where an option is there twice: a variant's own.
    train = Step(["python", *recipe, *grid.recipe, *_training(cell, grid)], None)
    rank = evaluate("benchmarks/evidence/rankme.py", "rankme.json")
    ood = evaluate("eval/osr.py", "eval/ood.json", "--unknown", "[{name: digits}]")
    clean = ["--data.root", str(grid.subset)] if cell.kind == "stamps" else []  # without overlaid digits
    judged = "--images", str(grid.corrupted), "--workers", str(grid.threads)
    corruption = evaluate("eval/corruption.py", "eval/corruption.json", *clean, *judged)
    if cell.labeled:
        projector = evaluate("eval/osr.py", "eval/projector/osr.json", "--feature", "projector")
        return [train, evaluate("eval/osr.py", "eval/osr.json"), projector, ood, corruption]
    if cell.data == "known":
        return [train, evaluate("eval/osr.py", "eval/osr.json")]
    if cell.data == "two-cue":
        return [train, probe("usual"), probe("neglected"), rank]
    if cell.kind == "stamps":
        linear = evaluate("eval/linear_probe.py", "eval/linear_probe.json", *clean)
        reliance = evaluate("eval/reliance.py", "eval/reliance.json", "--layers", "[layer3]")
        exchange = [evaluate("benchmarks/evidence/exchange.py", "exchange.json")] if cell.stamped else []
        return [train, linear, reliance, *exchange, *([corruption] if grid.corrupted else [])]
    return [
        train,
        evaluate("eval/linear_probe.py", "eval/linear_probe.json", "--label_fractions", "[0.01, 0.1]"),
        rank,
        ood,
        corruption,
    ]


def _training(cell: Cell, grid: Grid) -> list[str]:
    """Options of the recipe."""
    settings = {
        "run": cell.run(grid),
        "data.name": "folder",
        "data.root": grid.two_cues / "pretraining" if cell.data == "two-cue" else grid.subset,
        "backbone.name": grid.backbone,
        "training.epochs": epochs(cell, grid),
        "training.batch_size": grid.batch,
        "training.seed": cell.seed,
        "training.threads": grid.threads,
        **VARIANTS[cell.variant],
    }
    if cell.data == "known":
        settings["data.open_set"] = f"cifar10:{TRIALS[cell.seed % len(TRIALS)]}"
    settings |= STAMPED.get(cell.data, {})
    if cell.data == "overlaid-digits":
        settings["data.root"] = grid.overlaid
    if cell.data == "two-cue":  # a flip would change sides, and a small crop leave one of the digits out
        settings |= {"augmentation.flip": 0, "augmentation.min_scale": 0.5}
    return options(settings)


def options(settings: Mapping[str, Any]) -> list[str]:
    """Settings as a command line has them."""
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]
