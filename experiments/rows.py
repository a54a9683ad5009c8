"""Results of the experiments, one line per cell in results/*.jsonl, and differences of variants."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp

from experiments.variants import TRIALS, Cell, Grid, passes
from ssl_gradmix.data.open_set import KNOWN_ONLY
from ssl_gradmix.files import read_json, read_yaml

RESULTS = Path(__file__).parent / "results"

CELL = (
    *("grid", "method", "variant", "data", "seed", "passes", "attributions", "target_passes"),
    *("seconds", "threads", "commit", "settings"),
)
"""Description of a cell in its line: identity, cost (see `passes`), training time, and commit."""


@dataclass(frozen=True)
class Measure:
    """A quantity measured in a cell.

    Args:
        name: Name in tables, to which "(less is better)" is added.
        kind: Kind of cells that have it, see `Cell.kinds`. The kinds `two-cue` and `past` belong to
            evaluations that were removed.
        source: Evaluation whose file has it, and score and metric of its rows there, which are
            averaged (over open-set trials). Empty for measures read elsewhere by `read_value`.
        labels: Fraction of labels in those rows.
        feature: Feature that was evaluated.
        better: 1 if larger values are better, −1 if smaller values are.
        percent: Whether it lies in [0, 1] and is displayed in percent.
        digits: Digits after the decimal point.
    """

    name: str
    kind: str
    source: str = ""
    labels: float | None = None
    feature: str = "backbone"
    better: int = 1
    percent: bool = True
    digits: int = 1

    @property
    def title(self) -> str:
        return self.name if self.better > 0 else f"{self.name} (less is better)"


_LOSS = partial(Measure, better=-1, percent=False, digits=2)
_ERROR = partial(Measure, source="corruption linear mean_corruption_error", better=-1)
_PROBE = partial(Measure, source="linear_probe linear top1")
_KNN = partial(Measure, source="linear_probe knn top1")

MEASURES = {
    "validation_knn": Measure("kNN, held-out training images", "all"),
    "validation_linear": Measure("linear probe, held-out training images", "past"),
    "validation_loss": _LOSS("linear probe's loss, held-out training images", "all"),
    "linear": _PROBE("linear probe", "all"),
    "knn": _KNN("kNN", "all"),
    "linear_10": _PROBE("linear probe, 10% of labels", "all", labels=0.1),
    "linear_1": _PROBE("linear probe, 1% of labels", "all", labels=0.01),
    "corruption_error": _ERROR("mean corruption error", "all"),
    "ood_auroc": Measure("OOD AUROC, kNN distance", "all", "ood knn_distance auroc"),
    "ood_auroc_mahalanobis": Measure("OOD AUROC, Mahalanobis", "all", "ood mahalanobis auroc"),
    "rankme": Measure("RankMe", "all", percent=False),
    "osr_auroc": Measure("OSR AUROC, kNN distance", "known", "osr knn_distance auroc"),
    "osr_oscr": Measure("OSCR, kNN distance", "known", "osr knn_distance oscr"),
    "osr_auroc_logit": Measure("OSR AUROC, maximum logit", "known", "osr max_logit auroc"),
    "osr_oscr_logit": Measure("OSCR, maximum logit", "known", "osr max_logit oscr"),
    "osr_auroc_cosine": Measure("OSR AUROC, top-k cosine", "known", "osr top_k_cosine auroc"),
    "closed_set": Measure("accuracy, known classes", "known", "osr linear accuracy"),
    "projector_auroc": Measure(
        "OSR AUROC, top-k cosine of the projector",
        "labels",
        "osr top_k_cosine auroc",
        feature="projector",
    ),
    "known_ood_auroc": Measure(
        "OOD AUROC, kNN distance, known classes", "labels", "ood knn_distance auroc"
    ),
    "known_corruption_error": _ERROR("mean corruption error, known classes", "labels"),
    "usual_cue": Measure("two cues: the usual one", "two-cue"),
    "neglected_cue": Measure("two cues: the neglected one", "two-cue"),
    "two_cue_rank": Measure("two cues: RankMe", "two-cue", percent=False),
    "unstamped_linear": _PROBE("linear probe, without stamps", "stamps"),
    "unstamped_knn": _KNN("kNN, without stamps", "stamps"),
    "stamped_linear": Measure("linear probe, with stamps", "past"),
    "first_bit": Measure("linear probe of a bit", "past"),
    "same_stamp": Measure("cosine of two views", "past"),
    "other_bits": Measure("cosine, stamp of other bits", "past"),
    "other_place": Measure("cosine, stamp elsewhere", "past"),
    "other_image": Measure("cosine, other image", "past", better=-1),
    "reliance": Measure("reliance", "reliance", "reliance attributed reliance", better=-1),
    "hit": Measure("share of the stamp in the box, last epoch", "hit"),
    "unstamped_corruption_error": _ERROR("mean corruption error, without stamps", "stamps"),
    "stamps_validation_loss": _LOSS("linear probe's loss, held-out images", "stamps"),
}
"""Measures by their names in rows, in the order of the tables."""

IN_LOG = {"validation_knn": "knn", "rankme": "rankme", "hit": "hit"}
"""Measures that training itself logs."""

CHOSEN_BY = ("validation_knn", "validation_linear", "validation_loss", "stamps_validation_loss")
"""Measures of held-out training images. Settings are chosen by these, and verdicts ignore them."""


def condense(cell: Cell, grid: Grid) -> dict[str, Any]:
    """The line of a finished cell: `CELL`, and its numbers as `measures`.

    Raises:
        FileNotFoundError: Results of an evaluation are missing.
        ValueError: Results do not contain a measure.
    """
    folder = cell.folder(grid)
    config = read_yaml(folder / "config.yaml")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = np.diff([0, *(entry["step"] for entry in log)])
    rates = np.array([entry["images_per_second"] for entry in log])  # without interruptions
    seconds = float((steps * config["training"]["batch_size"] / rates).sum())
    kinds = cell.kinds | ({"hit"} if "hit" in log[-1] else set())
    measures = {
        name: read_value(name, cell, grid, log)
        for name, measure in MEASURES.items()
        if measure.kind in kinds and (grid.corrupted or not measure.source.startswith("corruption"))
    }
    return {
        "grid": grid.name,
        **cell._asdict(),
        **dict(zip(("passes", "attributions", "target_passes"), passes(cell, grid), strict=True)),
        "seconds": round(seconds, 1),
        "threads": grid.threads,
        "commit": config["environment"]["commit"],
        "settings": grid.settings(cell),
        "measures": measures,
    }


def read_value(name: str, cell: Cell, grid: Grid, log: Sequence[Mapping[str, Any]]) -> float:
    """Reads a measure from the files of a cell's run folder."""
    measure = MEASURES[name]
    if name in IN_LOG:
        return log[-1][IN_LOG[name]]
    if name in ("validation_loss", "stamps_validation_loss"):
        found = read_json(cell.result(grid, "linear_probe"))
        return min(found["validation"].values())
    task, score, metric = measure.source.split()
    path = cell.result(grid, task, measure.feature)
    wanted = {"label_fraction": measure.labels}
    if task == "osr":  # an encoder that saw the unknown classes does not count
        wanted["pretraining"] = KNOWN_ONLY
    values = [
        row["value"]
        for row in read_json(path)["rows"]
        if (row["score"], row["metric"]) == (score, metric)
        and all(row["params"].get(name) == value for name, value in wanted.items())
    ]
    if not values:
        raise ValueError(f"{path} has no row for the measure {name!r}")
    return float(np.mean(values))


def read(path: Path) -> pd.DataFrame:
    """All numbers of a file, one per row, with the columns `CELL`, `measure` and `value`."""
    text = path.read_text() if path.exists() else ""
    rows = []
    for line in map(json.loads, text.splitlines()):
        cell = [line[name] for name in CELL]
        rows += [(*cell, measure, value) for measure, value in line["measures"].items()]
    return pd.DataFrame(rows, columns=[*CELL, "measure", "value"])


def finished(found: pd.DataFrame, cell: Cell, grid: Grid) -> bool:
    """Whether a cell has rows.

    Raises:
        ValueError: Its grid has rows of other settings, which do not compare.
    """
    mine, settings = found[found.grid == grid.name], grid.settings(cell)
    for others in mine.settings:
        if others != settings:
            raise ValueError(f"--grid {grid.name} has rows of {others}, not of {settings}; rename")
    return bool((mine[list(Cell._fields)] == list(cell)).all(axis=1).any())


def differences(rows: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Paired differences of all variants to one, with the 95% t interval of their mean.

    Seeds pair because they share initialization, the order of images and, with known classes, the
    open-set trial. Differences of one trial are averaged first, as its seeds agree more with each
    other than trials do. The interval covers further seeds, or trials, on the same images.

    Args:
        rows: Rows of one grid and method.
        reference: Variant to subtract.

    Returns:
        By measure and variant: `mean`, `low` and `high` (NaN for a single seed or trial), the
        number of `seeds` that both have, and `verdict`: `better` or `worse` if the interval
        excludes 0, else `open`.
    """
    over = rows.seed.where(rows.data != "known", rows.seed % len(TRIALS))
    index = ["measure", "over", "seed"]
    numbers = rows.assign(over=over).pivot(index=index, columns="variant", values="value")
    subtracted = numbers.pop(reference) if reference in numbers else np.nan
    paired = numbers.sub(subtracted, axis=0).stack().dropna()
    seeds = paired.groupby(["measure", "variant"], sort=False).size()
    averaged = paired.groupby(["measure", "over", "variant"], sort=False).mean()
    lines = {}
    for key, values in averaged.groupby(["measure", "variant"], sort=False):
        mean, low, high = paired_interval(values.tolist())
        lines[key] = (mean, low, high, seeds[key], _verdict(mean, low, high, MEASURES[key[0]]))
    columns = ["mean", "low", "high", "seeds", "verdict"]
    frame = pd.DataFrame.from_dict(lines, "index", columns=columns)
    frame.index = pd.MultiIndex.from_tuples(frame.index, names=["measure", "variant"])
    return frame


def paired_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences and its 95% t interval, which is NaN for a single difference."""
    mean = math.fsum(values) / len(values)
    if len(set(values)) == 1:
        return (mean, *2 * [mean if len(values) > 1 else math.nan])
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    return mean, float(low), float(high)


def _verdict(mean: float, low: float, high: float, measure: Measure) -> str:
    if not (low > 0 or high < 0):
        return "open"
    return "better" if mean * measure.better > 0 else "worse"
