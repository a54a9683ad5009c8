"""What lies in run folders, read for a report. Nothing is unpickled, nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssl_gradmix.evaluation.results import Row, read_rows, results_folder
from ssl_gradmix.files import read_yaml
from ssl_gradmix.run_folder import RunFolder

TASKS = ("linear_probe", "osr", "ood", "corruption")
"""The evaluations that a report knows; each has its results in `<task>.json`."""


@dataclass(eq=False)
class Results:
    """What one evaluation of a run found.

    Args:
        rows: Its rows.
        data: Settings of the data that it read, empty where the file does not say.
        samples: Arrays (N,) by name, as they are in `<task>_samples.safetensors`; empty where there are none.
    """

    rows: list[Row]
    data: dict[str, Any]
    samples: dict[str, np.ndarray]


@dataclass(eq=False)
class Run:
    """A run, or a folder of results of another encoder.

    Args:
        path: As the user gave it.
        name: What the report calls it.
        config: What is in config.yaml, None for a folder of results.
        log: Lines of log.jsonl.
        picture: Last one of `samples/`.
        results: By task, for those evaluated: of backbone features.
        of_projector: The same of projector features.
    """

    path: str
    name: str
    config: dict[str, Any] | None
    log: list[dict[str, Any]]
    picture: Path | None
    results: dict[str, Results]
    of_projector: dict[str, Results]


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Reads run folders, and folders of results that `--out` of an evaluation made.

    Args:
        paths: At least one; a run's name is that of its folder, or its path where several have the same name.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If a folder is given twice, is neither a run nor holds results, a file is damaged, or no run was
            evaluated.
    """
    resolved = [Path(path).resolve() for path in paths]
    names = [path.name for path in resolved]
    for path, where in zip(paths, resolved, strict=True):
        if resolved.count(where) > 1:
            raise ValueError(f"the run {path!r} is given twice")
    runs = [
        _read(path, where.name if names.count(where.name) == 1 else path)
        for path, where in zip(paths, resolved, strict=True)
    ]
    if not any(run.results or run.of_projector for run in runs):
        raise ValueError(
            f"nothing to report: no evaluation in {', '.join(paths)}; run eval/linear_probe.py {paths[0]} first"
        )
    return runs


def plain(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return "–" if value is None else str(value)


def _read(path: str, name: str) -> Run:
    folder = RunFolder(path)
    if not folder.path.is_dir():
        raise FileNotFoundError(f"no run folder {path!r}")
    is_run = folder.config.exists()
    out = folder.path / "eval" if is_run else folder.path
    results, of_projector = (_read_results(results_folder(out, feature)) for feature in ("backbone", "projector"))
    if not (is_run or results or of_projector):
        raise ValueError(f"{path!r} is no run (it has no config.yaml) and holds no results of an evaluation")
    pictures = sorted(path for path in folder.samples.glob("*.png") if path.is_file())
    return Run(
        path,
        name,
        read_yaml(folder.config) if is_run else None,
        folder.read_log(),
        pictures[-1] if pictures else None,
        results,
        of_projector,
    )


def _read_results(folder: Path) -> dict[str, Results]:
    results = {}
    for task in TASKS:
        path = folder / f"{task}.json"
        if path.exists():
            rows, extra = read_rows(path)
            data = extra.get("data")
            results[task] = Results(
                rows, data if isinstance(data, dict) else {}, _read_samples(folder / f"{task}_samples.safetensors")
            )
    return results


def _read_samples(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path) if path.is_file() else {}
    except (SafetensorError, TypeError) as error:  # NumPy has no bfloat16
        raise ValueError(f"{path} is damaged: {error}") from error
