"""Rows, one number of one cell each: read from a run folder, kept a line a cell, compared seed by seed."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from scipy.stats import ttest_1samp

from evidence.cells import TRIALS, Cell, Grid, passes

CELL = (
    *("grid", "method", "variant", "data", "seed", "passes", "attributions", "target_passes"),
    *("seconds", "threads", "commit", "settings"),
)
"""Of a cell: which one, the passes of a training image as in `passes`, what training alone took, of which commit."""


@dataclass(frozen=True)
class Measure:
    """A number of a cell.

    Args:
        title: In tables.
        data: The kind of data it belongs to; `labels` are known classes whose labels are trained on.
        file: In a run's `eval/`; empty where it is read otherwise.
        score: Of the rows in `file` whose mean it is.
        metric: Of them.
        params: Of them; None is for a parameter that must not be there.
        larger_is_better: Which direction helps.
        percent: Whether it lies in [0, 1] and is shown in percent.
    """

    title: str
    data: str
    file: str = ""
    score: str = ""
    metric: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    larger_is_better: bool = True
    percent: bool = True


_OSR = {"pretraining": "known classes only"}

MEASURES = {
    "validation_knn": Measure("kNN, held-out training images", "all"),
    # Of rows from before the probe's learning rate was chosen by its loss; no evaluation writes it any more.
    "validation_linear": Measure("linear probe, held-out training images", ""),
    "validation_loss": Measure(
        "linear probe's loss, held-out training images (less is better)", "all", larger_is_better=False, percent=False
    ),
    "linear": Measure("linear probe", "all", "linear_probe.json", "linear", "top1", {"label_fraction": None}),
    "knn": Measure("kNN", "all", "linear_probe.json", "knn", "top1"),
    "linear_10": Measure(
        "linear probe, 10% of labels", "all", "linear_probe.json", "linear", "top1", {"label_fraction": 0.1}
    ),
    "linear_1": Measure(
        "linear probe, 1% of labels", "all", "linear_probe.json", "linear", "top1", {"label_fraction": 0.01}
    ),
    "corruption_error": Measure(
        "mean corruption error (less is better)", "all", "corruption.json", "linear", "mean_corruption_error",
        larger_is_better=False,
    ),
    "ood_auroc": Measure("OOD AUROC, kNN distance", "all", "ood.json", "knn_distance", "auroc"),
    "ood_auroc_mahalanobis": Measure("OOD AUROC, Mahalanobis", "all", "ood.json", "mahalanobis", "auroc"),
    "rankme": Measure("RankMe", "all", percent=False),
    "osr_auroc": Measure("OSR AUROC, kNN distance", "known", "osr.json", "knn_distance", "auroc", _OSR),
    "osr_oscr": Measure("OSCR, kNN distance", "known", "osr.json", "knn_distance", "oscr", _OSR),
    "osr_auroc_logit": Measure("OSR AUROC, maximum logit", "known", "osr.json", "max_logit", "auroc", _OSR),
    "osr_oscr_logit": Measure("OSCR, maximum logit", "known", "osr.json", "max_logit", "oscr", _OSR),
    "osr_auroc_cosine": Measure("OSR AUROC, top-k cosine", "known", "osr.json", "top_k_cosine", "auroc", _OSR),
    "closed_set": Measure("accuracy, known classes", "known", "osr.json", "linear", "accuracy", _OSR),
    "projector_auroc": Measure(
        "OSR AUROC, top-k cosine of the projector", "labels", "projector/osr.json", "top_k_cosine", "auroc", _OSR
    ),
    "known_ood_auroc": Measure("OOD AUROC, kNN distance, known classes", "labels", "ood.json", "knn_distance", "auroc"),
    "known_corruption_error": Measure(
        "mean corruption error, known classes (less is better)", "labels", "corruption.json", "linear",
        "mean_corruption_error", larger_is_better=False,
    ),
    "usual_cue": Measure("two cues: the usual one", "two-cue", "usual/linear_probe.json", "linear", "top1"),
    "neglected_cue": Measure("two cues: the neglected one", "two-cue", "neglected/linear_probe.json", "linear", "top1"),
    "two_cue_rank": Measure("two cues: RankMe", "two-cue", percent=False),
    "unstamped_linear": Measure("linear probe, without stamps", "stamps", "linear_probe.json", "linear", "top1"),
    "unstamped_knn": Measure("kNN, without stamps", "stamps", "linear_probe.json", "knn", "top1"),
    "stamped_linear": Measure("linear probe, with stamps", "stamps"),
    "first_bit": Measure("linear probe of a bit", "stamps"),
    "same_stamp": Measure("cosine of two views", "stamps"),
    "other_bits": Measure("cosine, stamp of other bits", "stamps"),
    "other_place": Measure("cosine, stamp elsewhere", "stamps"),
    "other_image": Measure("cosine, other image (less is better)", "stamps", larger_is_better=False),
    "hit": Measure("share of the stamp in the box, last epoch", "stamps"),
    "stamps_validation_loss": Measure(
        "linear probe's loss, held-out images (less is better)", "stamps", larger_is_better=False, percent=False
    ),
    "unstamped_corruption_error": Measure(
        "mean corruption error, without stamps (less is better)", "stamps", "corruption.json", "linear",
        "mean_corruption_error", larger_is_better=False,
    ),
    "reliance": Measure(
        "reliance (less is better)", "stamps", "reliance.json", "attributed",
        "reliance", larger_is_better=False,
    ),
}  # fmt: skip
"""By their names in rows, in the order of the tables."""

EXCHANGED = ("stamped_linear", "first_bit", "same_stamp", "other_bits", "other_place", "other_image")
"""Read where all views bear stamps."""

CHOSEN_BY = ("validation_knn", "validation_linear", "validation_loss", "stamps_validation_loss")
"""Of held-out training images: settings are chosen by these alone, and verdicts do not count them."""


def condense(cell: Cell, grid: Grid) -> dict[str, Any]:
    """`CELL` of a cell whose commands are done, and its numbers as `measures`.

    Raises:
        FileNotFoundError: An evaluation has left no results.
        ValueError: They do not hold what is wanted.
    """
    run = cell.run(grid)
    config = yaml.safe_load((run / "config.yaml").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    about = dict(grid=grid.name, **cell._asdict())
    cost = dict(zip(("passes", "attributions", "target_passes"), passes(cell, grid), strict=True))
    cost |= dict(seconds=round(_seconds(log, config["training"]["batch_size"]), 1), threads=grid.threads)
    origin = dict(commit=config["environment"]["commit"], settings=grid.settings())
    kinds = (cell.kind, "labels") if cell.labeled else (cell.kind,)
    wanted = {name: measure for name, measure in MEASURES.items() if measure.data in kinds}
    absent = set() if cell.stamped else set(EXCHANGED)
    if "hit" not in log[-1]:
        absent.add("hit")
    if not grid.corrupted:
        absent.add("unstamped_corruption_error")
    measures = {name: _value(name, measure, run, log) for name, measure in wanted.items() if name not in absent}
    return {**about, **cost, **origin, "measures": measures}


def _value(name: str, measure: Measure, run: Path, log: list[dict]) -> float:
    if name == "validation_knn":
        return log[-1]["knn"]
    if name in ("validation_loss", "stamps_validation_loss"):
        return min(json.loads((run / "eval/linear_probe.json").read_text())["validation"].values())
    if name == "hit":
        return log[-1]["hit"]
    if name in EXCHANGED:
        return json.loads((run / "exchange.json").read_text())[name]
    if name in ("rankme", "two_cue_rank"):
        return json.loads((run / "rankme.json").read_text())["rankme"]
    path = run / "eval" / measure.file
    found = [
        row["value"]
        for row in json.loads(path.read_text())["rows"]
        if (row["score"], row["metric"]) == (measure.score, measure.metric)
        and all(row["params"].get(key) == wanted for key, wanted in measure.params.items())
    ]
    if not found:
        raise ValueError(f"{path} has no row {measure.score} {measure.metric} with {dict(measure.params)}")
    return float(np.mean(found))


def _seconds(log: list[dict], batch: int) -> float:
    """How long training took: interruptions do not count, nor an epoch that was resumed at its very end, at no rate."""
    steps = np.diff([0, *(entry["step"] for entry in log)])
    rates = (entry.get("images_per_second") for entry in log)
    return float(sum(count * batch / rate for count, rate in zip(steps, rates, strict=True) if rate))


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Adds what `condense` gave of a cell to the file; other processes may do so at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"{json.dumps(line, allow_nan=False)}\n".encode())
        os.fsync(file)


def read(path: Path) -> pd.DataFrame:
    """All rows of a file, with `CELL`, `measure` and `value`; none where there is no file.

    Raises:
        ValueError: A line is no cell's, or a number is there twice.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            found = json.loads(line)
            cell = [found[name] for name in CELL]
            rows += [(*cell, measure, value) for measure, value in found["measures"].items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number} is no cell's: {error!r}") from error
    frame = pd.DataFrame(rows, columns=(*CELL, "measure", "value"))
    twice = frame[frame.duplicated(["grid", *Cell._fields, "measure"])]
    if len(twice):
        row = twice.iloc[0]
        raise ValueError(f"{path} has {row.measure} of {Cell(*row[list(Cell._fields)])} in grid {row.grid} twice")
    return frame


def finished(rows: pd.DataFrame, grid: Grid) -> set[Cell]:
    """The cells of a grid that have rows.

    Raises:
        ValueError: They were made with other settings.
    """
    mine, wanted = rows[rows.grid == grid.name], grid.settings()
    for settings in mine.settings:
        if settings != wanted:
            raise ValueError(f"--grid {grid.name} has rows of {settings}, not of {wanted}: name another grid")
    return {Cell(*row) for row in mine[list(Cell._fields)].itertuples(index=False)}


def differences(rows: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Paired differences of all variants to one, with the 95% t interval of their mean.

    Seeds pair because they share initialization, the order of images and, on known classes, the trial. Differences of
    one open-set trial are averaged first, as its seeds agree more with each other than trials do. The interval speaks
    about further seeds, or trials, on the same images.

    Args:
        rows: Of one grid and method.
        reference: The variant that is subtracted.

    Returns:
        By measure and variant: `mean`, `low`, `high` (NaN for one seed, or trial), the number of `seeds` that both
        have, and the `verdict`: `better` or `worse` where the interval leaves 0 out, else `open`.
    """
    over = rows.seed.where(rows.data != "known", rows.seed % len(TRIALS))  # seeds, or trials, as in `cells`
    numbers = rows.assign(over=over).pivot(index=["measure", "over", "seed"], columns="variant", values="value")
    subtracted = numbers.pop(reference) if reference in numbers else np.nan
    paired = numbers.sub(subtracted, axis=0).stack().dropna()
    seeds = paired.groupby(["measure", "variant"], sort=False).size()
    found = paired.groupby(["measure", "over", "variant"], sort=False).mean()
    found = found.groupby(["measure", "variant"], sort=False).agg(list)
    columns = ("mean", "low", "high", "seeds", "verdict")
    summary = {key: (*paired_interval(values), seeds[key]) for key, values in found.items()}
    frame = pd.DataFrame.from_dict(
        {key: (*row, _verdict(*row[:3], MEASURES[key[0]])) for key, row in summary.items()}, "index", columns=columns
    )
    frame.index = pd.MultiIndex.from_tuples(frame.index, names=["measure", "variant"])
    return frame


def paired_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences, with the ends of its 95% t interval: NaN of a single one, the mean of equal ones."""
    mean = math.fsum(values) / len(values)
    if len(set(values)) == 1:
        return (mean, *[math.nan if len(values) == 1 else mean] * 2)
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    return mean, float(low), float(high)


def _verdict(mean: float, low: float, high: float, measure: Measure) -> str:
    if not (low > 0 or high < 0):
        return "open"
    return "better" if (mean > 0) == measure.larger_is_better else "worse"
