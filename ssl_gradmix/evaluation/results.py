"""The one row that every evaluation writes, and the JSON file that holds rows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from ssl_gradmix.files import read_json, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_NUMBERS = ("label_fraction", "p_value", "std")
"""Parameters that are shown as numbers."""


@dataclass
class Row:
    """One measured number.

    Args:
        task: What was evaluated: `linear_probe`, `osr`, `ood`, `corruption`.
        dataset: Name of the data set.
        split: Its part, `test` as a rule.
        trial: Open-set trial or repetition, None where there is just one.
        encoder: Name of the encoder.
        feature: What of the encoder is read, `backbone` or `projector`.
        score: What was computed from features, for instance `linear`, `knn`, `mahalanobis`.
        metric: What `value` is, for instance `top1`, `auroc`. Shares are in [0, 1].
        value: The number; finite.
        ci_low: Lower end of its 95% interval, None where there is none.
        ci_high: Upper end.
        n: Number of samples behind it.
        params: Everything else that the number depends on, such as k and temperature.
    """

    task: str
    dataset: str
    split: str
    trial: int | None
    encoder: str
    feature: str
    score: str
    metric: str
    value: float
    ci_low: float | None
    ci_high: float | None
    n: int
    params: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("value", "ci_low", "ci_high"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                raise ValueError(f"{name} of {self.score} {self.metric} must be finite, got {number}")


def results_folder(out: Path, feature: str = "backbone") -> Path:
    """Where results lie in a run's `eval/`, or in what `--out` names: a folder for each feature but the backbone's."""
    return out if feature == "backbone" else out / feature


def write_rows(path: str | Path, rows: Sequence[Row], extra: dict[str, Any] | None = None) -> None:
    """Writes rows, and what else belongs to them, as JSON: whole or not at all.

    Args:
        path: The file; its folder is made.
        rows: What was measured.
        extra: Further entries of the JSON object beside `rows`, such as settings or curves.

    Raises:
        ValueError: If something is NaN or infinite, or `extra` has an entry `rows`.
    """
    if extra and "rows" in extra:
        raise ValueError("extra must not have an entry 'rows'")
    try:
        text = json.dumps({"rows": [asdict(row) for row in rows], **(extra or {})}, indent=1, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"results for {path} must be finite numbers: {error}") from error
    write_whole(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def read_rows(path: str | Path) -> tuple[list[Row], dict[str, Any]]:
    """Reads what `write_rows` wrote: the rows, and the extra entries.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """
    try:
        content = read_json(path)
        rows = [_row(**columns) for columns in content.pop("rows")]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        wanted = ", ".join(field.name for field in fields(Row))
        raise ValueError(f"{path} is no file of result rows ({wanted}): {error}") from error
    return rows, content


def _row(**columns: Any) -> Row:
    """A row whose columns are of their types, as what reads it formats numbers and looks texts up."""
    row = Row(**columns)
    typed = {name: kind for name, kind in get_type_hints(Row).items() if kind in (str, int, int | None)}
    wrong = [name for name, kind in typed.items() if not isinstance(getattr(row, name), kind)]
    wrong += [f"params.{name}" for name in _NUMBERS if not isinstance(row.params.get(name), int | float | None)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} of another type")
    return row


def write_figure(path: str | Path, figure: Figure) -> None:
    """Writes a matplotlib figure as PNG: whole or not at all. A `$` in a class's name starts no formula in it."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with rc_context({"text.parse_math": False}):  # for texts that are made only now, as those of ticks
        write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight"))


def console_table(rows: Sequence[Row]) -> str:
    """Lays rows out for a terminal: score, metric, value with its interval, sample count, and parameters."""
    cells = [("score", "metric", "value", "95% interval", "n", "")]
    for row in rows:
        interval = "" if row.ci_low is None else f"{row.ci_low:.4f} to {row.ci_high:.4f}"
        params = ", ".join(f"{name} {_short(value)}" for name, value in row.params.items())
        cells.append((row.score, row.metric, f"{row.value:.4f}", interval, str(row.n), params))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
