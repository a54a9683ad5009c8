"""What a cell of the grid is: one training and its evaluations, as the command lines that anyone can repeat."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ssl_gradmix.data import open_set

METHODS = ("simclr", "byol")

DATA = {
    "all": "all classes",
    "known": "known classes of an open-set trial",
    "two-cue": "two digits side by side",
}

_PLAIN = {"extra_view": "none"}
_GRADMIX = {"extra_view": "gradmix", "gradmix.layers": "[layer3]", "gradmix.target": "agreement"}

VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "a": ("plain two views", _PLAIN),
    "b": ("plain two views, more epochs: as many encoder passes as e", _PLAIN),
    "c": ("plain third view", {"extra_view": "augmented"}),
    "d": ("the same mixing at a random place", {**_GRADMIX, "gradmix.attribution": "random"}),
    "e": ("GradMix, target agreement", _GRADMIX),
    "f": ("GradMix, target loss (the authors' sign)", {**_GRADMIX, "gradmix.target": "loss"}),
    "g": ("noise at the attributed place", {**_GRADMIX, "gradmix.fill": "noise"}),
    "h": ("the attributed pixels, as a mask", {**_GRADMIX, "gradmix.region": "mask"}),
}

CHANGES: dict[str, dict[str, str]] = {
    **{f"layer{n}": {"gradmix.layers": f"[layer{n}]"} for n in (2, 4)},
    **{f"layer{m}+{n}": {"gradmix.layers": f"[layer{m}, layer{n}]"} for m, n in ((2, 3), (2, 4), (3, 4))},
    "lam0.3-0.7": {"gradmix.lam_range": "[0.3, 0.7]"},
    "lam0.7-0.9": {"gradmix.lam_range": "[0.7, 0.9]"},
    **{f"weight{weight}": {"method.weight": weight} for weight in ("0.5", "0.7", "2.0")},
    "crop": {"gradmix.fill": "crop"},
    "densest": {"gradmix.region": "densest"},
    "center": {"gradmix.attribution": "center"},
}
"""What may differ from one of the variants: `e-layer2` is e with another layer.

The loss of a plain third view counts in full, that of a mixed one by its `lam`, 0.7 on average: `c-weight0.7` makes up
for it.
"""

TRIALS = open_set.distinct_trials("cifar10")


@dataclass(frozen=True)
class Grid:
    """What all cells have in common.

    Args:
        name: Of the grid.
        data: CIFAR-10 as a folder, `train/<class>/*` and `test/<class>/*`.
        images: Training images.
        epochs: Passes over them; of variant b more.
        batch: Images in a batch.
        backbone: Name of the encoder.
        corrupted: Test images that are corrupted.
        ood: Folders of images to be told from those of `data`, beside digits.
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
    ood: tuple[Path, ...]
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

    def settings(self) -> dict[str, Any]:
        """What results depend on: cells may be compared where it is the same."""
        names = ("images", "epochs", "batch", "backbone", "corrupted", "recipe")
        chosen = {name: value for name, value in asdict(self).items() if name in names}
        ood = ["digits", *(path.resolve().name for path in self.ood)]
        return {"data": self.data.resolve().name, **chosen, "recipe": list(self.recipe), "ood": ood}


@dataclass(frozen=True)
class Cell:
    """One training and its evaluations; written `simclr/e/all/0`.

    Args:
        method: One of `METHODS`.
        variant: One of `VARIANTS`, or one with a hyphen and one of `CHANGES` behind it.
        data: One of `DATA`.
        seed: Of the training. With data `known` it chooses the open-set trial too, so that seeds are trials.
    """

    method: str
    variant: str
    data: str
    seed: int

    def __post_init__(self) -> None:
        base, _, change = self.variant.partition("-")
        if base not in VARIANTS or (change and change not in CHANGES):
            raise ValueError(
                f"variant must be one of {', '.join(VARIANTS)}, or one of them with a change such as e-layer2 "
                f"({', '.join(CHANGES)}), got {self.variant!r}"
            )
        settings = VARIANTS[base][1]
        views, changed = settings["extra_view"], "".join(CHANGES.get(change, {}))
        if change and (views == "none" or (views == "augmented" and changed.startswith("gradmix"))):
            raise ValueError(f"variant {self.variant!r} is the same as {base}, which does not read {changed}")
        for name, value, options in (("method", self.method, METHODS), ("data", self.data, tuple(DATA))):
            if value not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or larger, got {self.seed}")

    @classmethod
    def parse(cls, text: str) -> Cell:
        """Reads `simclr/e/all/0`.

        Raises:
            ValueError: It is none.
        """
        parts = text.split("/")
        if len(parts) != 4 or not parts[3].isdecimal():
            raise ValueError(f"a cell is METHOD/VARIANT/DATA/SEED, such as simclr/e/all/0, got {text!r}")
        return cls(*parts[:3], int(parts[3]))

    def __str__(self) -> str:
        return f"{self.method}/{self.variant}/{self.data}/{self.seed}"

    @property
    def trial(self) -> int:
        """The open-set trial of data `known`: the distinct ones in turn."""
        return TRIALS[self.seed % len(TRIALS)]

    def variant_settings(self) -> dict[str, str]:
        """Options of the recipe that make the variant."""
        base, _, change = self.variant.partition("-")
        return {**VARIANTS[base][1], **CHANGES.get(change, {})}

    def run(self, grid: Grid) -> Path:
        """Its run folder."""
        return grid.cache / "runs" / grid.name / str(self).replace("/", "-")


class Passes(NamedTuple):
    """How often a training image goes through an encoder in the whole training.

    Attributes:
        encoder: Of the encoder that is trained, forward and backward.
        attribution: GradMix's backward passes to the observed layer, beside those.
        teacher: BYOL's teacher, forward only.
    """

    encoder: int
    attribution: int
    teacher: int


class Step(NamedTuple):
    """A command line, and the file that is there once it is done; None where the command itself knows."""

    command: list[str]
    writes: Path | None

    def shell(self, threads: int) -> str:
        """As it is typed in the folder of the repository."""
        return f"OMP_NUM_THREADS={threads} {shlex.join(self.command)}"


def epochs(cell: Cell, grid: Grid) -> int:
    """Epochs of a cell's training: those of b make up for its two views, rounded up in its favor."""
    return math.ceil(grid.epochs * 3 / 2) if cell.variant.startswith("b") else grid.epochs


def passes(cell: Cell, grid: Grid) -> Passes:
    """Counts the passes of a cell's training: views times epochs."""
    settings, n = cell.variant_settings(), epochs(cell, grid)
    views = 2 if settings["extra_view"] == "none" else 3
    attributed = settings["extra_view"] == "gradmix" and settings.get("gradmix.attribution") not in ("random", "center")
    return Passes(views * n, n if attributed else 0, 2 * n if cell.method == "byol" else 0)


def steps(cell: Cell, grid: Grid) -> list[Step]:
    """The commands of a cell in their order, to be run in the folder of the repository."""
    run = cell.run(grid)
    evaluations = run / "eval"

    def evaluate(script: str, writes: str, *options: str) -> Step:
        return Step(["python", script, str(run), *options], evaluations / writes)

    def probe(cue: str) -> Step:
        where = ["--data.root", str(grid.two_cues / cue), "--out", str(evaluations / cue)]
        return evaluate("eval/linear_probe.py", f"{cue}/linear_probe.json", *where)

    train = Step(["python", f"recipes/{cell.method}_gradmix.py", *_options(_training(cell, grid)), *grid.recipe], None)
    rank = evaluate("benchmarks/evidence/rankme.py", "rankme.json")
    match cell.data:
        case "known":
            return [train, evaluate("eval/osr.py", "osr.json")]
        case "two-cue":
            return [train, probe("usual"), probe("neglected"), rank]
    unknown = ["{name: digits}", *(f"{{name: folder, root: {str(path.resolve())!r}}}" for path in grid.ood)]
    return [
        train,
        evaluate("eval/linear_probe.py", "linear_probe.json", "--label_fractions", "[0.01, 0.1]"),
        rank,
        evaluate("eval/osr.py", "ood.json", "--unknown", f"[{', '.join(unknown)}]"),
        evaluate(
            "eval/corruption.py", "corruption.json", "--images", str(grid.corrupted), "--workers", str(grid.threads)
        ),
    ]


def _training(cell: Cell, grid: Grid) -> dict[str, str]:
    settings = {
        "run": str(cell.run(grid)),
        "data.name": "folder",
        "data.root": str(grid.two_cues / "pretraining" if cell.data == "two-cue" else grid.subset),
        "backbone.name": grid.backbone,
        "training.epochs": str(epochs(cell, grid)),
        "training.batch_size": str(grid.batch),
        "training.seed": str(cell.seed),
        "training.threads": str(grid.threads),
        **cell.variant_settings(),
    }
    if cell.data == "known":
        settings["data.open_set"] = f"cifar10:{cell.trial}"
    if cell.data == "two-cue":  # a flip would change sides, and a small crop leave one of the digits out
        settings |= {"augmentation.flip": "0", "augmentation.min_scale": "0.5"}
    return settings


def _options(settings: dict[str, str]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", value)]
