"""The report that compares runs: an HTML page and a Markdown file, made from what lies in their folders."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from ssl_gradmix.evaluation.report import figures
from ssl_gradmix.evaluation.report.corruption import corruption_section
from ssl_gradmix.evaluation.report.detection import open_set_section, out_of_distribution_section
from ssl_gradmix.evaluation.report.map import POINTS, FeatureMap, feature_map
from ssl_gradmix.evaluation.report.page import (
    Cell,
    Figures,
    Missing,
    Panel,
    Part,
    Section,
    Table,
    render_html,
    render_markdown,
)
from ssl_gradmix.evaluation.report.runs import Run, plain, read_runs
from ssl_gradmix.evaluation.report.tables import (
    class_comparison,
    comparison,
    measured,
    not_evaluated,
    transposed,
    with_projector,
)
from ssl_gradmix.evaluation.results import Row
from ssl_gradmix.files import write_whole
from ssl_gradmix.run_folder import flat

MapMethod = Literal["pca", "tsne", "none"]

_HEADLINES = {("linear", "top1"), ("knn", "top1"), ("knn_distance", "auroc"), ("linear", "mean_corruption_error")}
_DESCRIBED = {
    "extra_view": ("third view ", ""),
    "backbone.name": ("", ""),
    "data.name": ("", ""),
    "data.open_set": ("known classes ", ""),
    "training.epochs": ("", " epochs"),
}
_GRAY = "#9099a5"
_LARGEST = 1e30
"""Numbers in a log beyond it, infinite ones and NaN are not drawn."""


def write_report(paths: Sequence[str], out: str | Path, map_method: MapMethod = "pca") -> tuple[Path, Path]:
    """Compares runs in `report.html`, which holds its figures and needs no network, and `report.md`, tables only.

    What a run lacks is said in its place. Values are compared only where data and protocol are the same; the largest of
    a line is marked (of errors the smallest), and intervals stand beside.

    Args:
        paths: Run folders, or folders of results that `--out` of an evaluation made. Differences are to the first.
        out: Folder to write to.
        map_method: How test features are laid out in the plane. Features are computed where none are kept in the run.

    Returns:
        The two files.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If a folder is neither a run nor holds results, a file is damaged, or no run was evaluated.
    """
    runs = read_runs(paths)
    title = f"{len(runs)} runs compared" if len(runs) > 1 else f"Report on {runs[0].name}"
    sections = [
        _overview(runs),
        _settings(runs),
        _training(runs),
        _accuracy(runs),
        open_set_section(runs),
        out_of_distribution_section(runs),
        corruption_section(runs),
        *([] if map_method == "none" else [_maps(runs, map_method)]),
        _attribution(runs),
    ]
    texts = {
        Path(out, "report.html"): render_html(title, [run.name for run in runs], sections),
        Path(out, "report.md"): render_markdown(title, sections),
    }
    for path, text in texts.items():
        write_whole(
            path, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        )
    return tuple(texts)


def _overview(runs: Sequence[Run]) -> Section:
    def is_headline(row: Row) -> bool:
        return (row.score, row.metric) in _HEADLINES and not {"label_fraction", "corruption"} & row.params.keys()

    found = [{m: row for task in run.results for m, row in measured(run, task, is_headline).items()} for run in runs]
    note = (
        "Of backbone features, in percent. In small print 95% intervals, or standard deviations over trials. Marked is "
        "the largest value of a column (the smallest error); whether the difference is more than chance, the intervals "
        "tell, and they cover the draw of test images, not another training run. One open-set score, kNN distance, "
        "stands for all: it was fixed beforehand, while the best of them would have been chosen on test images."
    )
    table = transposed(comparison("Overview", runs, found, note))
    described = [
        [Cell(run.name, _description(run), run=index), *line[1:]]
        for index, (run, line) in enumerate(zip(runs, table.rows, strict=True))
    ]
    head = [Cell("Run"), *table.head[1:]]
    return Section("Overview", [Table(table.title, head, described, table.note)])


def _description(run: Run) -> str:
    settings = flat(run.config or {})
    said = [
        f"{before}{plain(settings[name])}{after}" for name, (before, after) in _DESCRIBED.items() if name in settings
    ]
    return ", ".join(said) or "results only"


def _settings(runs: Sequence[Run]) -> Section:
    trained = {index: flat(run.config) for index, run in enumerate(runs) if run.config is not None}
    parts: list[Part] = []
    if trained:
        names = dict.fromkeys(name for settings in trained.values() for name in settings)
        words = {name: [plain(settings.get(name)) for settings in trained.values()] for name in names}
        differing = {
            name: values
            for name, values in words.items()
            if name == "environment.commit" or (len({*values}) > 1 and name not in ("run", "overwrite"))
        }
        shared = [
            f"{name.removeprefix('environment.')} {values[0]}"
            for name, values in words.items()
            if name.startswith("environment.") and name not in differing
        ]
        head = [Cell("Setting"), *(Cell(runs[index].name, run=index) for index in trained)]
        rows = [[Cell(name), *map(Cell, values)] for name, values in differing.items()]
        note = f"Versions common to all: {', '.join(shared)}." if shared else ""
        parts.append(Table("Settings that differ, and the commit", head, rows, note))
    parts += [
        Missing(f"{run.name} holds results only, not the settings of a training.") for run in runs if run.config is None
    ]
    return Section("Settings", parts)


def _training(runs: Sequence[Run]) -> Section:
    curves = {
        "loss": "Loss",
        "loss_views": "Loss between the two plain views",
        "knn": "kNN accuracy, held-out training images (%)",
    }
    panels = []
    for name, title in curves.items():
        points = [[(e["epoch"], e[name]) for e in run.log if _has_numbers(e, "epoch", name)] for run in runs]
        lines = [figures.Line(i, *zip(*found, strict=True)) for i, found in enumerate(points) if found]
        if lines:
            panels.append(Panel(title, figures.curves(lines, "epoch", shares=name == "knn")))
    parts: list[Part] = []
    if panels:
        note = (
            "The loss is what was minimized. Where there is a third view it holds that view's term too: compare runs "
            "with and without one by the loss between the two plain views. kNN accuracy is read on training images "
            "that were held out, never on test images."
        )
        parts.append(Figures("Curves over epochs", panels, note, [run.name for run in runs]))
    return Section(
        "Training", [*parts, *(Missing(f"{run.name} has no log of a training.") for run in runs if not run.log)]
    )


def _has_numbers(entry: Mapping[str, object], *names: str) -> bool:
    return all(isinstance(entry.get(name), int | float) and abs(entry[name]) < _LARGEST for name in names)


def _accuracy(runs: Sequence[Run]) -> Section:
    text = "How well classifiers of frozen features name what test images show."
    return Section("Accuracy", with_projector(runs, "linear_probe", _accuracies), text)


def _accuracies(runs: Sequence[Run]) -> list[Part]:
    found = [measured(run, "linear_probe", lambda row: row.metric != "class_accuracy") for run in runs]
    note = (
        "In percent, with 95% Wilson intervals. The learning rate of the linear probe was chosen on a tenth of the "
        "training images, and its test accuracy read once, after the last epoch. With a fraction of the labels it was "
        "trained on those alone. Weighted kNN: the k nearest training images vote, by exp(cosine / temperature)."
    )
    parts: list[Part] = [comparison("Accuracy", runs, found, note)] if any(found) else []
    by_class = class_comparison(runs)
    parts += [by_class] if by_class else []
    return [*parts, *not_evaluated(runs, "linear_probe")]


def _maps(runs: Sequence[Run], method: Literal["pca", "tsne"]) -> Section:
    from accelerate import Accelerator

    accelerator = Accelerator()
    parts: list[Part] = []
    panels = []
    for index, run in enumerate(runs):
        try:
            drawn = feature_map(run.path, _data_of(run), method, accelerator)
        except (ValueError, TypeError, AttributeError, OSError) as error:  # settings may be of any type
            parts.append(Missing(f"{run.name}: no map, {error}"))
        else:
            panels.append(_map_panel(run.name, index, drawn))
    if panels:
        how = {
            "pca": "their two directions of largest variance",
            "tsne": "by t-SNE, which keeps neighbors together; distances between groups mean little",
        }[method]
        note = (
            f"L2-normalized backbone features of test images, {how}. At most {POINTS:,} images, drawn at random. "
            "Classes that a run's settings leave out are gray; more than 20 classes have no legend."
        )
        parts.insert(0, Figures("Map of test features", panels, note))
    return Section("Features", parts)


def _data_of(run: Run) -> dict:
    """Settings of the data that the run was evaluated on, or else trained."""
    return next((results.data for results in run.results.values() if results.data), (run.config or {}).get("data", {}))


def _map_panel(name: str, index: int, drawn: FeatureMap) -> Panel:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    known = [label for label in drawn.known if label in drawn.labels]
    if len(known) <= 20:
        palette = colormaps["tab10" if len(known) <= 10 else "tab20"].colors
    else:
        palette = colormaps["turbo"].resampled(len(known))(range(len(known)))
    colors = {label: to_hex(color) for label, color in zip(known, palette, strict=False)}
    order = np.argsort([label in colors for label in drawn.labels.tolist()], kind="stable")  # gray below the others
    picture = figures.scatter(
        drawn.points[order], [colors.get(label, _GRAY) for label in drawn.labels[order].tolist()], drawn.axes
    )
    legend = [(drawn.classes[label], color) for label, color in colors.items()] if len(known) <= 20 else []
    legend += [("other classes, or unlabeled", _GRAY)] if len(colors) < len({*drawn.labels.tolist()}) else []
    return Panel(f"{name}: {drawn.images}, {len(drawn.points):,} of {drawn.total:,}", picture, index, legend)


def _attribution(runs: Sequence[Run]) -> Section:
    panels = [
        Panel(f"{run.name}: {run.picture.stem}", _image(run.picture), index)
        for index, run in enumerate(runs)
        if run.picture
    ]
    note = (
        "Training images, a column each: the augmented view; where the loss looks, over the view, bright is much; the "
        "region that is mixed out; the mixed view."
    )
    parts: list[Part] = [Figures("Attribution and mixed views", panels, note, wide=True)] if panels else []
    parts += [Missing(f"{run.name} has no pictures of mixed views.") for run in runs if not run.picture]
    return Section("Attribution samples", parts)


def _image(path: Path) -> str:
    """A picture as an address that holds it."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.verify()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # no nearer name for a broken PNG
        raise ValueError(f"{path} is damaged: {error}") from error
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
