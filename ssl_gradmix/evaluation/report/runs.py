"""What lies in run folders, read for a report. Nothing is unpickled, nothing is written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError

from ssl_gradmix.evaluation import rows as result_rows
from ssl_gradmix.evaluation.encoders import load_encoder
from ssl_gradmix.files import read_yaml
from ssl_gradmix.run_folder import RunFolder

TASKS = ("linear_probe", "osr", "ood", "corruption", "reliance")
"""The evaluations that a report knows; each has its results in `<task>.json`."""


@dataclass(eq=False)
class Results:
    """What one evaluation found, of one kind of features."""

    rows: pd.DataFrame
    about: dict[str, Any]  # what the file says of them
    samples: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # (N,) by trial or data set, then by name
    images: dict[str, str] = field(default_factory=dict)  # fingerprints by trial or data set


@dataclass(eq=False)
class Run:
    """A run, or a folder of results of another encoder."""

    path: str  # as the user gave it
    name: str  # what the report calls it
    config: dict[str, Any] | None  # None for a folder of results
    log: list[dict[str, Any]]
    picture: Path | None  # the last one of samples/
    results: dict[tuple[str, str], Results]  # by task and feature, for those evaluated
    outdated: list[tuple[str, str]]  # tasks and features whose results are of earlier weights

    def rows(self, task: str, feature: str = "backbone") -> pd.DataFrame:
        """The rows of an evaluation, none where there was none."""
        found = self.results.get((task, feature))
        return result_rows.typed([]) if found is None else found.rows


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Reads run folders, and folders of results that `--out` of an evaluation made.

    A run is called by its folder's name, or by its path where several have the same name.
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
    if not any(run.results for run in runs):
        raise ValueError(
            f"nothing to report: no evaluation in {', '.join(paths)}; run eval/linear_probe.py {paths[0]} first"
        )
    return runs


def _read(path: str, name: str) -> Run:
    folder = RunFolder(path)
    if not folder.path.is_dir():
        raise FileNotFoundError(f"no run folder {path!r}")
    is_run = folder.config.exists()
    out = folder.path / "eval" if is_run else folder.path
    results, outdated = {}, []
    for feature in ("backbone", "projector"):
        for task in TASKS:
            file = result_rows.results_folder(out, feature) / f"{task}.json"
            if not file.exists():
                continue
            found = _read_results(file)
            if is_run and _is_outdated(folder, feature, found.about):
                outdated.append((task, feature))
            else:
                results[task, feature] = found
    if not (is_run or results):
        raise ValueError(f"{path!r} is no run (it has no config.yaml) and holds no results of an evaluation")
    pictures = sorted(path for path in folder.samples.glob("*.png") if path.is_file())
    config = read_yaml(folder.config) if is_run else None
    picture = pictures[-1] if pictures else None
    return Run(path, name, config, folder.read_log(), picture, results, outdated)


def _is_outdated(folder: RunFolder, feature: str, about: Mapping[str, Any]) -> bool:
    """Whether the run's weights are others now than those that were evaluated."""
    encoder, data = about.get("encoder"), about.get("data")
    if not (folder.backbone / "model.safetensors").exists() or not isinstance(encoder, dict):
        return False
    size = data.get("size") if isinstance(data, dict) else None
    now = load_encoder(folder.path, image_size=size if isinstance(size, int) else None, feature=feature)
    return encoder.get("fingerprint") != now.fingerprint


def _read_results(path: Path) -> Results:
    rows, about = result_rows.read(path)
    samples = path.with_name(f"{path.stem}_samples.safetensors")
    found = Results(rows, about)
    if not samples.is_file():
        return found
    try:
        found.samples, header = result_rows.read_samples(samples)
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{samples} is damaged: {error}") from error
    found.images = dict(re.findall(r'"([^"]+)": "(\w+)"', header.get("images", "")))
    for group, arrays in found.samples.items():
        if "is_known" not in arrays:
            raise ValueError(f"{samples} is damaged: no {group}/is_known")
        shapes = {array.shape for array in arrays.values()}
        if len(shapes) > 1 or len(*shapes) != 1 or not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError(f"{samples} is damaged: the arrays of {group} are not as many finite numbers each")
    return found
