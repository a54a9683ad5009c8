"""Compares runs on one page: settings that differ, results, training curves and figures."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure

from ssl_gradmix.evaluation import plots, results
from ssl_gradmix.evaluation.detection import SHOWN
from ssl_gradmix.files import read_yaml, write_whole
from ssl_gradmix.run_folder import RunFolder, flat, near_runs
from ssl_gradmix.version import __version__

TASKS = {
    "linear_probe": "Linear probe and kNN",
    "osr": "Open-set recognition",
    "ood": "Out-of-distribution detection",
    "corruption": "Corruption robustness",
    "reliance": "Reliance on a small region",
}
"""Titles of the evaluations, in the order of the page. Their files are `<task>-<data set>.json`."""

CURVES = {
    "loss": "Training loss",
    "knn": "kNN accuracy on held-out training images",
    "reliance": "Reliance",
}
"""Titles of the values in log.jsonl that are drawn by epoch."""

OUTCOMES = {"at", "learning_rate", "labels", "std", "over"}
"""Parameters of a row that are outcomes or repeat others. The rest is the protocol of the row."""

FOLDED_PARAMS = {"class", "corruption", "severity"}
FOLDED_METRICS = ("aupr", "fpr95_ood", "threshold")
"""Rows with such a parameter, or with a metric that starts so, go to a folded table."""

MAY_DIFFER = ("training.seed", "environment.")
"""Settings in which the runs of a group of seeds differ."""

NOTE = (
    "Brackets are 95% confidence intervals over test images; ± is the standard deviation over "
    "trials or seeds. Runs that differ in their seed alone share a column, named after the first. "
    "Differences are the first run minus another one: + means that the first is larger. "
    "↓ marks measures where lower is better."
)


@dataclass(eq=False)
class Run:
    """The content of a run folder, or of a folder of results."""

    name: str
    folder: RunFolder
    results: Path  # folder of results and their figures
    settings: dict[str, str]  # without nesting; empty for a folder of results
    log: pd.DataFrame  # one row per epoch
    rows: dict[str, pd.DataFrame]  # results by file name without ending, such as osr-cifar10


@dataclass(eq=False)
class Section:
    """The results of one evaluation on one data set."""

    title: str
    table: pd.DataFrame
    details: pd.DataFrame  # folded; can be empty
    figures: dict[str, str]  # data URIs by name of the run
    missing: list[str]  # names of runs without these results


def write_report(paths: Sequence[str], out: str | Path) -> list[Path]:
    """Writes `report.html`, one page that opens without network, and `report.md`, its tables.

    Args:
        paths: Run folders, or folders of results (`--out` of an evaluation). Differences are the
            first one minus another one. Runs that differ in their seed alone share a column.
        out: Folder to write to.

    Returns:
        The two files.

    Raises:
        FileNotFoundError: A folder does not exist, or holds neither a run nor results.
        ValueError: A folder is given twice, or a file is damaged.
    """
    runs = read_runs(paths)
    settings = differing_settings(runs)
    sections = compare(runs)
    texts = {
        "report.html": render_html(runs, settings, sections),
        "report.md": render_markdown(settings, sections),
    }
    for name, text in texts.items():
        write_whole(Path(out, name), partial(Path.write_text, data=text, encoding="utf-8"))
    return [Path(out, name) for name in texts]


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Reads run folders. Runs are named by their folder, or by their path if names repeat."""
    if len(set(paths)) < len(paths):
        raise ValueError("runs: a folder is given twice")
    names = [Path(path).resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = list(paths)
    return list(map(_read_run, paths, names))


def _read_run(path: str, name: str) -> Run:
    folder = RunFolder(path)
    is_run = folder.config.exists()
    out = folder.path / "eval" if is_run else folder.path
    files = [file for task in TASKS for file in out.glob(f"{task}-*.json")]
    if not is_run and not files:
        near = f"; did you mean {' '.join(found)}?" if (found := near_runs(folder.path)) else ""
        raise FileNotFoundError(f"runs: {path} has neither a config.yaml nor results{near}")
    config = flat(read_yaml(folder.config)) if is_run else {}
    settings = {key: str(value) for key, value in config.items() if key != "run"}
    rows = {file.stem: read_rows(file) for file in files}
    return Run(name, folder, out, settings, pd.DataFrame(folder.read_log()), rows)


def read_rows(path: Path) -> pd.DataFrame:
    """Reads results, and adds the columns `protocol` (list of str) and `folded` (bool)."""
    rows, about = results.read(path)
    fingerprints = about.get("images", {})
    protocols = [_protocol(row, fingerprints) for row in rows.itertuples()]
    rows["protocol"] = pd.Series(protocols, dtype=object)
    averaged = results.param(rows, "trials").explode().dropna()
    by_params = [not FOLDED_PARAMS.isdisjoint(params) for params in rows["params"]]
    by_metric = rows["metric"].str.startswith(FOLDED_METRICS)
    rows["folded"] = by_metric | rows["trial"].isin(averaged) | pd.Series(by_params, dtype=bool)
    return rows


def _protocol(row: Any, fingerprints: Mapping[str, str]) -> list[str]:
    """Everything that must agree in two rows before their values can be compared."""
    images = f"{row.dataset}/{row.split}"
    fingerprint = fingerprints.get(images, "")
    protocol = [f"on {images} {fingerprint[:8]}", f"n {row.n}"]
    if pd.notna(row.trial):
        protocol.append(f"trial {row.trial}")
    params = [name for name in row.params if name not in OUTCOMES]
    return protocol + [f"{name.replace('_', ' ')} {row.params[name]}" for name in params]


def differing_settings(runs: Sequence[Run]) -> pd.DataFrame:
    """Settings that are not the same in all runs: one row per setting, one column per run."""
    table = pd.DataFrame({run.name: run.settings for run in runs if run.settings}).fillna("–")
    return table[table.nunique(axis=1) > 1].rename_axis("setting")


def group_seeds(runs: Sequence[Run]) -> dict[str, str]:
    """The title of each run's column. Runs that differ in their seed alone share a column."""
    titles: dict[object, str] = {}
    return {run.name: titles.setdefault(_without_seed(run), run.name) for run in runs}


def _without_seed(run: Run) -> object:
    same = {item for item in run.settings.items() if not item[0].startswith(MAY_DIFFER)}
    return frozenset(same) or run.name


def compare(runs: Sequence[Run]) -> list[Section]:
    """Compares all results: a section for each evaluation and data set."""
    titles = group_seeds(runs)
    names = sorted({name for run in runs for name in run.rows})
    in_order = [name for task in TASKS for name in names if name.startswith(f"{task}-")]
    return [_section(name, runs, titles) for name in in_order]


def _section(name: str, runs: Sequence[Run], titles: Mapping[str, str]) -> Section:
    found, figures, missing = [], {}, []
    for run in runs:
        if name not in run.rows:
            missing.append(run.name)
            continue
        found.append(run.rows[name].assign(column=titles[run.name]))
        figure = run.results / f"{name}.png"
        if figure.exists():
            figures[run.name] = data_uri(figure.read_bytes())
    rows = pd.concat(found)
    task, _, dataset = name.partition("-")
    title = f"{TASKS[task]}: {dataset}"
    table = comparison(rows[~rows["folded"]])
    details = comparison(rows[rows["folded"]])
    return Section(title, table, details, figures, missing)


def comparison(rows: pd.DataFrame) -> pd.DataFrame:
    """Sets values side by side where measure and protocol are the same.

    Args:
        rows: Rows of `read_rows` of all runs, with the title of their `column`.

    Returns:
        Text, one row per measure and protocol, one column per run or group of seeds, and the first
        minus each other one. The name of the index is the protocol that all rows share.
    """
    if rows.empty:
        return pd.DataFrame()
    shared = set.intersection(*map(set, rows["protocol"]))
    rows = rows.assign(label=[_label(row, shared) for row in rows.itertuples()])
    labels = rows.groupby("metric", sort=False)["label"].unique().explode()
    columns = rows["column"].unique()
    same = rows.groupby(["label", "column"])
    cells = pd.Series({place: _cell(values) for place, values in same})
    table = cells.unstack().reindex(index=labels, columns=columns)
    means = same["value"].mean().unstack()
    first = columns[0]
    for other in columns[1:]:
        difference = (means[first] - means[other]).dropna()
        table[f"{first} − {other} (+: {first} larger)"] = difference.map("{:+.3f}".format)
    common = [part for part in rows["protocol"].iloc[0] if part in shared]
    return table.fillna("–").rename_axis(", ".join(common))


def _label(row: Any, shared: set[str]) -> str:
    """Score and metric, and the part of the protocol that other rows do not share."""
    measure = f"{row.score} {SHOWN.get(row.metric, row.metric)}".replace("_", " ")
    arrow = "↓ " if re.search("error|fpr95", row.metric) else ""
    own = [part for part in row.protocol if part not in shared]
    return ", ".join([arrow + measure, *own])


def _cell(rows: pd.DataFrame) -> str:
    """The value of one run with its spread, or mean and spread of several seeds."""
    values, row = rows["value"], rows.iloc[0]
    value = f"{values.mean():.3f}"
    if len(values) > 1:
        return f"{value} ± {values.std():.3f} ({len(values)} seeds)"
    if pd.notna(row.ci_low):
        return f"{value} [{row.ci_low:.3f}, {row.ci_high:.3f}]"
    if "std" in row.params:
        return f"{value} ± {row.params['std']:.3f} ({len(row.params['trials'])} trials)"
    return value


def curve(log: pd.DataFrame, name: str) -> str:
    """Draws a column of the runs' logs by epoch, as a data URI."""
    buffer = io.BytesIO()
    with rc_context(plots.STYLE):
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.set_prop_cycle(color=plots.COLORS)
        for run, points in log.dropna(subset=name).groupby("run", sort=False):
            axes.plot(points["epoch"], points[name], ".-", label=run)
        axes.set_xlabel("epoch")
        figure.legend(loc="outside lower left", ncols=2)
        figure.savefig(buffer, format="png", dpi=160)
    return data_uri(buffer.getvalue())


def data_uri(png: bytes) -> str:
    """An image as an address that contains it."""
    encoded = base64.b64encode(png).decode()
    return f"data:image/png;base64,{encoded}"


def render_html(runs: Sequence[Run], settings: pd.DataFrame, sections: Sequence[Section]) -> str:
    """The report as one HTML page. Everything in it is escaped."""
    log = pd.concat({run.name: run.log for run in runs}, names=["run"])
    samples = {}
    for run in runs:
        for latest in sorted(run.folder.samples.glob("*.png"))[-1:]:
            samples[run.name] = data_uri(latest.read_bytes())
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = Path(__file__).with_suffix(".html").read_text("utf-8")
    return environment.from_string(template).render(
        note=NOTE,
        settings=settings,
        sections=sections,
        curves={CURVES[name]: curve(log, name) for name in CURVES if name in log},
        samples=samples,
        version=__version__,
    )


def render_markdown(settings: pd.DataFrame, sections: Sequence[Section]) -> str:
    """The tables of the report, except folded ones, as Markdown. Everything in it is escaped."""
    blocks = ["# Comparison of runs", NOTE]
    if len(settings):
        blocks += ["## Settings that differ", _markdown(settings)]
    for section in sections:
        blocks += [f"## {_escaped(section.title)}", _markdown(section.table)]
        if section.missing:
            blocks.append(f"Not evaluated: {_escaped(', '.join(section.missing))}.")
    return "\n\n".join(blocks) + "\n"


def _markdown(table: pd.DataFrame) -> str:
    cells = table.reset_index()
    lines = [cells.columns, ["---"] * len(cells.columns), *cells.to_numpy()]
    return "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)


def _escaped(text: str) -> str:
    """Text on one line, without HTML or Markdown of its own."""
    without_html = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*|\[\]])", r"\\\1", without_html)
