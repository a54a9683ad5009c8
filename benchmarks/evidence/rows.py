"""Tidy rows: what is measured of a cell, condensed from its run folder, and the file that holds all."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from evidence.cells import Cell, Grid, passes
from ssl_gradmix.evaluation.open_set.trials import KNOWN_ONLY
from ssl_gradmix.evaluation.results import read_rows
from ssl_gradmix.files import read_yaml, write_whole
from ssl_gradmix.run_folder import RunFolder


@dataclass(frozen=True)
class Measure:
    """A number of a cell.

    Args:
        name: In rows.
        title: In tables.
        data: The kind of data it belongs to.
        read: Takes it from a run folder.
        larger_is_better: Which direction helps.
        share: Whether it lies in [0, 1] and is shown in percent.
        chosen_by: Whether it is of held-out training images, so that settings may be chosen by it.
    """

    name: str
    title: str
    data: str
    read: Callable[[Path], float]
    larger_is_better: bool = True
    share: bool = True
    chosen_by: bool = False


@dataclass(frozen=True)
class Row:
    """One number of one cell.

    Args:
        grid: Name of the grid.
        method: As in `Cell`.
        variant: As in `Cell`.
        data: As in `Cell`.
        seed: As in `Cell`.
        measure: Name of the measure.
        value: The number.
        passes: Encoder passes of a training image in the whole training.
        attributions: GradMix's backward passes beside them.
        target_passes: BYOL's teacher's forward passes beside them.
        seconds: Training alone took, by the run's log.
        threads: It had.
        commit: Of this project, at the run's start.
        settings: Of the grid.
    """

    grid: str
    method: str
    variant: str
    data: str
    seed: int
    measure: str
    value: float
    passes: int
    attributions: int
    target_passes: int
    seconds: float
    threads: int
    commit: str
    settings: dict[str, Any]

    @property
    def cell(self) -> Cell:
        """The cell it is of."""
        return Cell(self.method, self.variant, self.data, self.seed)


def _value(file: str, score: str, metric: str, **params: object) -> Callable[[Path], float]:
    """Reads the mean of the rows of `eval/<file>` that match; a parameter that is to be None is not in the row."""

    def read(run: Path) -> float:
        path = run / "eval" / file
        found = [
            row
            for row in read_rows(path)[0]
            if (row.score, row.metric) == (score, metric)
            and all(row.params.get(name) == wanted for name, wanted in params.items())
        ]
        if not found:
            raise ValueError(f"{path} has no row {score} {metric} with {params}")
        return fmean(row.value for row in found)

    return read


def _validation_knn(run: Path) -> float:
    return RunFolder(run).read_log()[-1]["knn"]


def _validation_linear(run: Path) -> float:
    path = run / "eval" / "linear_probe.json"
    return max(read_rows(path)[1]["validation"].values())


MEASURES = (
    Measure("validation_knn", "kNN on held-out training images", "all", _validation_knn, chosen_by=True),
    Measure("validation_linear", "linear probe on held-out training images", "all", _validation_linear, chosen_by=True),
    Measure("linear", "linear probe", "all", _value("linear_probe.json", "linear", "top1", label_fraction=None)),
    Measure("knn", "kNN", "all", _value("linear_probe.json", "knn", "top1")),
    Measure(
        "linear_10", "linear probe, 10% of labels", "all",
        _value("linear_probe.json", "linear", "top1", label_fraction=0.1),
    ),
    Measure(
        "linear_1", "linear probe, 1% of labels", "all",
        _value("linear_probe.json", "linear", "top1", label_fraction=0.01),
    ),
    Measure(
        "corruption_error", "mean corruption error", "all",
        _value("corruption.json", "linear", "mean_corruption_error"), larger_is_better=False,
    ),
    Measure("ood_auroc", "out-of-distribution AUROC, kNN distance", "all", _value("ood.json", "knn_distance", "auroc")),
    Measure(
        "ood_auroc_mahalanobis", "out-of-distribution AUROC, Mahalanobis", "all",
        _value("ood.json", "mahalanobis", "auroc"),
    ),
    Measure(
        "rankme", "effective rank", "all",
        _value("rankme.json", "rankme", "rankme"), share=False,
    ),
    Measure("osr_auroc", "open set AUROC, kNN distance", "known", _value("osr.json", "knn_distance", "auroc")),
    Measure("osr_oscr", "open set OSCR, kNN distance", "known", _value("osr.json", "knn_distance", "oscr")),
    Measure("osr_auroc_logit", "open set AUROC, maximum logit", "known", _value("osr.json", "max_logit", "auroc")),
    Measure("osr_oscr_logit", "open set OSCR, maximum logit", "known", _value("osr.json", "max_logit", "oscr")),
    Measure("osr_auroc_cosine", "open set AUROC, top-k cosine", "known", _value("osr.json", "top_k_cosine", "auroc")),
    Measure("closed_set", "accuracy on the known classes", "known", _value("osr.json", "linear", "accuracy")),
    Measure("usual_cue", "two cues: the usual one", "two-cue", _value("usual/linear_probe.json", "linear", "top1")),
    Measure(
        "neglected_cue", "two cues: the neglected one", "two-cue",
        _value("neglected/linear_probe.json", "linear", "top1"),
    ),
    Measure(
        "two_cue_rank", "two cues: effective rank", "two-cue",
        _value("rankme.json", "rankme", "rankme"), share=False,
    ),
)  # fmt: skip


def condense(cell: Cell, grid: Grid) -> list[Row]:
    """The rows of a cell whose commands are done.

    Raises:
        FileNotFoundError: An evaluation has left no results.
        ValueError: They hold not what is wanted, or an open-set evaluation's encoder saw unknown classes.
    """
    run = cell.run(grid)
    config = read_yaml(run / "config.yaml")
    if cell.data == "known":
        seen = {row.params.get("pretraining") for row in read_rows(run / "eval" / "osr.json")[0]}
        if seen != {KNOWN_ONLY}:
            raise ValueError(f"{run} must have been pretrained on {KNOWN_ONLY}, its results say {seen}")
    count = passes(cell, grid)
    return [
        Row(
            grid.name,
            cell.method,
            cell.variant,
            cell.data,
            cell.seed,
            measure.name,
            measure.read(run),
            count.encoder,
            count.attribution,
            count.teacher,
            round(training_seconds(run), 1),
            grid.threads,
            config["environment"]["commit"],
            grid.settings(),
        )
        for measure in MEASURES
        if measure.data == cell.data
    ]


def training_seconds(run: Path) -> float:
    """How long training took, by its log: interruptions, and what was done again after them, do not count."""
    batch = read_yaml(run / "config.yaml")["training"]["batch_size"]
    seconds, before = 0.0, 0
    for entry in RunFolder(run).read_log():
        seconds += (entry["step"] - before) * batch / entry["images_per_second"]
        before = entry["step"]
    return seconds


def read(path: Path) -> list[Row]:
    """All rows of a file, none where there is no file.

    Raises:
        ValueError: A line is no row, or a number stands there twice.
    """
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
            rows.append(Row(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no row: {error}") from error
    keys = [(row.grid, row.cell, row.measure) for row in rows]
    twice = [key for key in keys if keys.count(key) > 1] if len(set(keys)) < len(keys) else []
    if twice:
        grid, cell, measure = twice[0]
        raise ValueError(f"{path} has {measure} of the cell {cell} of the grid {grid} twice: remove one")
    return rows


def append(path: Path, new: Sequence[Row]) -> None:
    """Adds rows to the file, all or none; other processes may do so at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        lines = [json.dumps(asdict(row), allow_nan=False) + "\n" for row in [*read(path), *new]]
        write_whole(path, lambda temporary: temporary.write_text("".join(lines), encoding="utf-8"))
    finally:
        os.close(folder)


def finished(rows: Iterable[Row], grid: Grid) -> set[Cell]:
    """The cells of a grid that have rows.

    Raises:
        ValueError: They were made with other settings.
    """
    cells = set()
    for row in rows:
        if row.grid != grid.name:
            continue
        wanted = grid.settings()
        other = [f"{name} was {row.settings.get(name)!r}, now {wanted[name]!r}" for name in wanted]
        other = [text for text, name in zip(other, wanted, strict=True) if row.settings.get(name) != wanted[name]]
        if other:
            raise ValueError(f"--grid {grid.name} has rows with other settings ({'; '.join(other)}): name another grid")
        cells.add(row.cell)
    return cells
