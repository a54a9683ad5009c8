"""Results of evaluations: tables with one measured number per row, and the files that keep them.

| column      | content                                                                            |
|-------------|------------------------------------------------------------------------------------|
| `task`      | `linear_probe`, `osr`, `ood`, `corruption` or `reliance`                           |
| `dataset`   | name of the data set                                                               |
| `split`     | part of the data set, usually `test`                                               |
| `trial`     | number of the open-set trial or seed of a random one; missing if there is none     |
| `encoder`   | name of the encoder                                                                |
| `feature`   | `backbone` or `projector`                                                          |
| `score`     | what was computed from the features: `linear`, `knn`, `mahalanobis`, ...           |
| `metric`    | what `value` is: `top1`, `auroc`, ... Rates are in [0, 1]                          |
| `value`     | the number, always finite                                                          |
| `ci_low`    | lower end of the 95% interval; missing if there is none                            |
| `ci_high`   | upper end                                                                          |
| `n`         | number of images                                                                   |
| `params`    | dictionary of everything else that the number depends on, such as k                |
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ssl_gradmix.evaluation.intervals import Interval
from ssl_gradmix.files import read_json, write_whole

COLUMNS = (
    *("task", "dataset", "split", "trial", "encoder", "feature"),
    *("score", "metric", "value", "ci_low", "ci_high", "n", "params"),
)

Number = dict[str, Any]
"""One measured number: the columns from `score` to `params`."""


def number(score: str, metric: str, value: float | Interval, n: int, **params: Any) -> Number:
    """A measured number of n images, with its interval if it has one.

    Raises:
        ValueError: The number is NaN or infinite.
    """
    low, high = None, None
    if isinstance(value, Interval):
        value, low, high = value
    for part in (value, low, high):
        if part is not None and not math.isfinite(part):
            raise ValueError(f"value: {metric} of {score} must be finite, got {part}")
    measured = {"value": value, "ci_low": low, "ci_high": high, "n": n}
    return {"score": score, "metric": metric, **measured, "params": params}


def frame(
    numbers: Iterable[Number],
    task: str,
    images: str,
    encoder: str,
    /,
    feature: str = "backbone",
    trial: int | None = None,
    **params: Any,
) -> pd.DataFrame:
    """A table of numbers about the same images.

    Args:
        numbers: One for each row.
        task: Name of the evaluation.
        images: `<dataset>/<split>`, the name of an `ImageSet`.
        encoder: Name of the encoder.
        feature: `backbone` or `projector`.
        trial: Number of the open-set trial.
        **params: Added to the parameters of every row.
    """
    dataset, _, split = images.rpartition("/")
    shared: dict[str, Any] = {"task": task, "dataset": dataset, "split": split}
    shared |= {"trial": trial, "encoder": encoder, "feature": feature}
    return table([{**shared, **each, "params": each["params"] | params} for each in numbers])


def table(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A table of records that have all columns."""
    rows = pd.DataFrame(list(records), columns=list(COLUMNS), dtype=object)
    types = {"trial": "Int64", "n": "int64"} | dict.fromkeys(
        ("value", "ci_low", "ci_high"), "float64"
    )
    return rows.astype(types)


def param(rows: pd.DataFrame, name: str) -> pd.Series:
    """One parameter of each row, None for rows without it."""
    return pd.Series([params.get(name) for params in rows["params"]], rows.index, dtype=object)


def write(path: str | Path, rows: pd.DataFrame, about: Mapping[str, Any]) -> None:
    """Writes rows as JSON, replacing an earlier file.

    Args:
        path: The file. Its folder is created.
        rows: Table with `COLUMNS`.
        about: Further entries of the JSON object beside `rows`, such as the encoder.

    Raises:
        ValueError: A parameter or an entry is NaN or infinite, which JSON cannot represent.
    """
    plain = rows[list(COLUMNS)].astype(object)
    records = plain.where(plain.notna(), None).to_dict("records")
    text = json.dumps({"rows": records, **about}, indent=1, allow_nan=False)
    write_whole(path, lambda temporary: temporary.write_text(f"{text}\n", encoding="utf-8"))


def read(path: str | Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Reads a file of `write`: the rows, and the other entries.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not JSON, or does not hold rows with these columns.
    """
    about = read_json(path)
    try:
        records = [{name: row[name] for name in COLUMNS} for row in about.pop("rows")]
        return table(records), about
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file of results: {error!r}") from error


def console(rows: pd.DataFrame) -> str:
    """A table for the terminal, one line per row."""
    params = [
        ", ".join(f"{name} {value}" for name, value in each.items()) for each in rows["params"]
    ]
    shown = rows[["score", "metric", "value", "ci_low", "ci_high", "n"]].assign(params=params)
    return shown.to_string(index=False, na_rep="", float_format="{:.4f}".format)


def comparison(rows: pd.DataFrame, metrics: Mapping[str, str]) -> str:
    """A table for the terminal, one line per score and one column per metric.

    Args:
        rows: At most one row for each score and metric. Its spread is the parameter `std` if there
            is one, else the interval.
        metrics: Titles of the columns by metric.
    """
    shown = rows[rows["metric"].isin(metrics)]
    cells = []
    for row in shown.to_dict("records"):
        spread = f"({row['ci_low']:.4f} to {row['ci_high']:.4f})"
        if "std" in row["params"]:
            spread = f"± {row['params']['std']:.4f}"
        cells.append(f"{row['value']:.4f} {spread}")
    table = shown.assign(cell=cells).pivot(index="score", columns="metric", values="cell")
    table = table.reindex(index=shown["score"].unique(), columns=list(metrics))
    return table.rename(columns=metrics).to_string(na_rep="")
