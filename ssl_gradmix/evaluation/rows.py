"""What every evaluation writes: measured numbers as the rows of a DataFrame, and the JSON file that keeps them.

| column      | what it holds                                                                                       |
|-------------|-----------------------------------------------------------------------------------------------------|
| `task`      | What was evaluated: `linear_probe`, `osr`, `ood`, `corruption`, `reliance`.                         |
| `dataset`   | Name of the data set.                                                                               |
| `split`     | Its part, `test` as a rule.                                                                         |
| `trial`     | Open-set trial, or the seed of a random one; missing where there is none.                           |
| `encoder`   | Name of the encoder.                                                                                |
| `feature`   | What of the encoder is read, `backbone` or `projector`.                                             |
| `score`     | What was computed from features: `linear`, `knn`, `mahalanobis`, ...                                |
| `metric`    | What `value` is: `top1`, `auroc`, ... Shares are in [0, 1].                                         |
| `value`     | The number; finite.                                                                                 |
| `ci_low`    | Lower end of its 95% interval, missing where there is none.                                         |
| `ci_high`   | Upper end.                                                                                          |
| `n`         | Number of images behind it; of a mean over trials, those of one trial.                              |
| `params`    | A dictionary: all else that the number depends on, such as k, and the learning rate that was found. |
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import safe_open

from ssl_gradmix.data.corruptions import COMMON, EXTRA, SEVERITIES
from ssl_gradmix.files import read_json, write_whole

logger = logging.getLogger("ssl_gradmix")

_TEXTS = ("task", "dataset", "split", "encoder", "feature", "score", "metric")
COLUMNS = (
    *("task", "dataset", "split", "trial", "encoder", "feature"),
    *("score", "metric", "value", "ci_low", "ci_high", "n", "params"),
)

_FOUND = ("learning_rate", "p_value", "std", "corruptions")
"""Parameters that say what came out, and so do not set two rows apart."""

_KINDS = {
    **dict.fromkeys(("label_fraction", "p_value", "std"), int | float | None),
    **dict.fromkeys(("class", "corruption", "group", "baseline", "compared_with"), str | None),
    "severity": int | None,
}
"""Types of the parameters that tables are made by."""

Number = dict[str, Any]
"""A measured number: the columns `score`, `metric`, `value`, `ci_low`, `ci_high`, `n` and `params`."""


def number(
    score: str, metric: str, value: float | tuple[float, float | None, float | None], n: int, **params: Any
) -> Number:
    """A measured number, with its 95% interval where `value` is (value, low, high).

    Raises:
        ValueError: It is NaN or infinite.
    """
    value, low, high = value if isinstance(value, tuple) else (value, None, None)
    for part in (value, low, high):
        if part is not None and not math.isfinite(part):
            raise ValueError(f"{metric} of {score} must be finite, got {part}")
    return {"score": score, "metric": metric, "value": value, "ci_low": low, "ci_high": high, "n": n, "params": params}


def frame(
    numbers: Iterable[Number],
    task: str = "",
    images: str = "",
    encoder: str = "",
    feature: str = "backbone",
    trial: int | None = None,
    /,
    **params: Any,
) -> pd.DataFrame:
    """Rows of numbers about the same images, which are called `<dataset>/<split>`; `params` are added to all."""
    dataset, _, split = images.rpartition("/")
    shared = {"task": task, "dataset": dataset, "split": split, "trial": trial, "encoder": encoder, "feature": feature}
    return typed([{**shared, **each, "params": {**each["params"], **params}} for each in numbers])


def typed(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows of records that have the columns."""
    rows = pd.DataFrame(records, columns=list(COLUMNS))
    kinds = {**dict.fromkeys(_TEXTS, object), "trial": "Int64", "n": "int64", "params": object}
    return rows.astype({**kinds, **dict.fromkeys(("value", "ci_low", "ci_high"), "float64")})


def joined(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Rows one below the other."""
    frames = [rows for rows in frames if len(rows)]
    return pd.concat(frames, ignore_index=True) if frames else typed([])


def param(rows: pd.DataFrame, name: str) -> pd.Series:
    """One parameter of each row, None where it has none."""
    return pd.Series([params.get(name) for params in rows["params"]], rows.index, dtype=object)


def by_corruption(rows: pd.DataFrame, score: str, metric: str) -> pd.DataFrame:
    """Values of one score and metric: a line a corruption in the benchmark's order, a column a severity."""
    found = rows[(rows["score"] == score) & (rows["metric"] == metric)]
    found = found.assign(**{name: param(found, name) for name in ("corruption", "severity")})
    found = found[found["corruption"].isin(COMMON + EXTRA) & found["severity"].isin(SEVERITIES)]
    table = found.pivot_table(index="corruption", columns="severity", values="value", aggfunc="last")
    table = table.reindex(index=[name for name in COMMON + EXTRA if name in table.index], columns=SEVERITIES)
    return table.astype(float)


def results_folder(out: Path, feature: str = "backbone") -> Path:
    """Where results lie in a run's `eval/`, or in what `--out` names: a folder for each feature but the backbone's."""
    return out if feature == "backbone" else out / feature


def write(path: str | Path, rows: pd.DataFrame, about: Mapping[str, Any]) -> None:
    """Writes rows, and what is to be said about them, as JSON: whole or not at all.

    `about` holds further entries of the JSON object beside `rows`, such as the encoder.

    Raises:
        ValueError: If something is NaN or infinite.
    """
    records = [
        {name: None if name != "params" and pd.isna(value) else value for name, value in row.items()}
        for row in rows[list(COLUMNS)].astype(object).to_dict("records")
    ]
    try:
        text = json.dumps({"rows": records, **about}, indent=1, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"results for {path} must be finite numbers: {error}") from error
    write_whole(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def read(path: str | Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Reads what `write` wrote: the rows, and the other entries.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """
    try:
        about = read_json(path)
        records = about.pop("rows")
        for record in records:
            _check(record)
        return typed(records), about
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is no file of result rows ({', '.join(COLUMNS)}): {error}") from error


def add(path: str | Path, rows: pd.DataFrame, about: Mapping[str, Any]) -> None:
    """Writes rows beside those that earlier evaluations left and that still hold, see `kept`.

    Earlier rows of the same images, trial, score, metric and parameters are replaced.
    """
    earlier, about = kept(path, about)
    replaced = set(map(_identity, rows.to_dict("records")))
    stays = np.array([_identity(row) not in replaced for row in earlier.to_dict("records")], bool)
    write(path, joined([earlier[stays], rows]), about)


def kept(path: str | Path, about: Mapping[str, Any]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Rows of earlier evaluations that still hold: of the same weights, and of images that did not change since.

    Args:
        path: The file; a damaged one is as good as none.
        about: What is to be written with new rows. `encoder` holds the fingerprint of the encoder, `images` those of
            the images by name; `groups`, where it is given, holds what is said of each trial, with the names of its
            images as `known_from` and `unknown_from`.

    Returns:
        The rows, and `about` with the images and groups of the earlier ones.
    """
    none = typed([]), dict(about)
    try:
        rows, before = read(path)
        same_weights = before["encoder"]["fingerprint"] == about["encoder"]["fingerprint"]
        earlier = {name: dict(before.get(name, {})) for name in ("images", "groups") if name in about}
        digests = {name: about["images"].get(name, digest) for name, digest in earlier["images"].items()}
        changed = {_data_set(name) for name, digest in digests.items() if digest != earlier["images"][name]}
    except FileNotFoundError:
        return none
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is written anew: %s", path, error)
        return none
    if not same_weights:
        logger.info("%s: the results of earlier weights are replaced", path)
        return none
    if changed:
        logger.info("%s: results are replaced, as the images of %s are others now", path, ", ".join(sorted(changed)))
    for images in (rows["dataset"] + "/", param(rows, "known"), param(rows, "unknown")):
        rows = rows[~images.loc[rows.index].map(_data_set).isin(changed)]
    if "groups" in earlier:
        earlier["groups"] = {name: group for name, group in earlier["groups"].items() if not _uses(group, changed)}
    return rows, {**about, **{name: {**earlier[name], **about[name]} for name in earlier if name in about}}


def read_samples(path: str | Path) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, str]]:
    """Reads what is kept of each image, beside the rows: arrays (N,) by group and name, uint8 as booleans; a header.

    Raises:
        FileNotFoundError: If there is no such file.
        SafetensorError, TypeError: If it holds something else. (NumPy has no bfloat16.)
    """
    arrays: dict[str, dict[str, np.ndarray]] = {}
    with safe_open(path, "numpy") as file:
        header, keys = file.metadata() or {}, file.keys()
        for key in keys:
            group, _, name = key.rpartition("/")
            array = file.get_tensor(key)
            arrays.setdefault(group, {})[name] = array.astype(bool) if array.dtype == np.uint8 else array
    return arrays, header


def console(rows: pd.DataFrame) -> str:
    """Lays rows out for a terminal: score, metric, value with its interval, number of images, and parameters."""
    cells = [("score", "metric", "value", "95% interval", "n", "")]
    for row in rows.itertuples():
        interval = "" if pd.isna(row.ci_low) else f"{row.ci_low:.4f} to {row.ci_high:.4f}"
        params = {name: f"{each:g}" if isinstance(each, float) else each for name, each in row.params.items()}
        params = ", ".join(f"{name} {each}" for name, each in params.items())
        cells.append((row.score, row.metric, f"{row.value:.4f}", interval, str(row.n), params))
    return aligned(cells)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text, the columns below each other."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _check(record: Mapping[str, Any]) -> None:
    """Refuses columns of other types, as what reads rows formats numbers and looks texts up."""
    if set(record) != set(COLUMNS):
        raise ValueError(f"it has the columns {', '.join(record)}")
    number(**{name: record[name] for name in ("score", "metric", "value", "n")})
    number(record["score"], record["metric"], (0.0, record["ci_low"], record["ci_high"]), record["n"])
    wrong = [name for name in _TEXTS if not isinstance(record[name], str)]
    kinds = {"trial": int | None, "n": int, "params": dict}
    wrong += [name for name, kind in kinds.items() if not isinstance(record[name], kind)]
    params = record["params"] if isinstance(record["params"], dict) else {}
    wrong += [f"params.{name}" for name, kind in _KINDS.items() if not isinstance(params.get(name), kind)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} of another type")


def _data_set(images: Any) -> str:
    return str(images).rpartition("/")[0]


def _uses(group: Any, changed: set[str]) -> bool:
    """Whether a group is of these data sets, or is none."""
    return not isinstance(group, dict) or any(
        _data_set(group.get(side)) in changed for side in ("known_from", "unknown_from")
    )


def _identity(row: Mapping[str, Any]) -> tuple:
    params = {name: value for name, value in row["params"].items() if name not in _FOUND}
    trial = None if pd.isna(row["trial"]) else int(row["trial"])
    names = ("task", "dataset", "split", "feature", "score", "metric")
    return (*(row[name] for name in names), trial, json.dumps(params, sort_keys=True))
