"""Sections of a report: accuracy, detection, corruption, maps, pictures and training."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from PIL import Image
from safetensors import SafetensorError, safe_open

from ssl_gradmix.data.corruptions import COMMON
from ssl_gradmix.data.datasets import load
from ssl_gradmix.data.open_set import known_classes
from ssl_gradmix.evaluation import plots
from ssl_gradmix.evaluation import rows as result_rows
from ssl_gradmix.evaluation.encoders import load_encoder
from ssl_gradmix.evaluation.features import extract
from ssl_gradmix.evaluation.metrics import oscr_curve, roc_curve
from ssl_gradmix.evaluation.report.page import Cell, Figures, Missing, Panel, Part, Section, Table
from ssl_gradmix.evaluation.report.runs import Run
from ssl_gradmix.evaluation.report.tables import comparison, in_words, measured, name_of, value_cell
from ssl_gradmix.run_folder import flat
from ssl_gradmix.settings import Data

MAP_POINTS = 2000
"""A map shows so many test images at most, drawn at random."""

_COMMANDS = {
    "linear_probe": ("python eval/linear_probe.py", ""),
    "osr": ("python eval/osr.py", ""),
    "ood": ("python eval/osr.py", " --unknown.name NAME --unknown.root ROOT"),
    "corruption": ("python eval/corruption.py", ""),
    "reliance": ("python eval/reliance.py", ""),
}
"""How to get the results of each task."""

_METRICS = ("auroc", "aupr_in", "aupr_out", "fpr95_id_pos", "fpr95_ood_pos", "oscr")
_DIFFERENCES = {"auroc_difference": "AUROC", "oscr_difference": "OSCR"}
_DRAWN = ("knn_distance", "max_logit", "mahalanobis", "energy")
_LARGEST = 1e30
"""Numbers in a log beyond it, infinite ones and NaN are not drawn."""

_GRAY = "#9099a5"


def not_evaluated(runs: Sequence[Run], task: str) -> list[Missing]:
    """Says which runs have no results of an evaluation, or outdated ones, and how to get them."""
    script, options = _COMMANDS[task]
    found = []
    for run in runs:
        command = f"{script} {shlex.quote(run.path)}{options}"
        if (task, "backbone") in run.outdated:
            found.append(Missing(f"{run.name}: its results are of earlier weights and left out. Run", command))
        elif (task, "backbone") not in run.results:
            found.append(Missing(f"{run.name}: not evaluated. Run", command))
    return found


def _with_projector(runs: Sequence[Run], task: str, parts: Callable[[str], list[Part]]) -> list[Part]:
    """What `parts` makes of backbone features, and after it of projector features where there are such."""
    found = parts("backbone")
    if any((task, "projector") in run.results for run in runs):
        found += [replace(part, title=f"{part.title}, projector features") for part in parts("projector")]
    return [*found, *not_evaluated(runs, task)]


def accuracy(runs: Sequence[Run]) -> Section:
    def parts(feature: str) -> list[Part]:
        of_runs = [run.rows("linear_probe", feature) for run in runs]
        found = [measured(rows[rows["metric"] != "class_accuracy"]) for rows in of_runs]
        by_class = [measured(rows[rows["metric"] == "class_accuracy"]) for rows in of_runs]
        made: list[Part] = [comparison("Accuracy", runs, found, note)] if any(found) else []
        if any(by_class):
            worst_first = "In percent, with 95% Wilson intervals; worst classes first."
            folded = len({measure for of_run in by_class for measure in of_run}) > 12
            made.append(comparison("Linear probe by class", runs, by_class, worst_first, bars=True, folded=folded))
        return made

    text = "How well classifiers of frozen features name what test images show."
    note = (
        "In percent, with 95% Wilson intervals. The learning rate of the linear probe was chosen by its loss on "
        "held-out training images, and its test accuracy read once, after the last epoch. With a fraction of the "
        "labels it was trained on those alone. Weighted kNN: the k nearest training images vote, by exp(cosine / "
        "temperature)."
    )
    return Section("Accuracy", _with_projector(runs, "linear_probe", parts), text)


def detection(runs: Sequence[Run], task: Literal["osr", "ood"]) -> Section:
    """Known test images against unknown classes, or against other data sets, by score."""
    if task == "osr":
        title = "Open set recognition"
        text = "Telling test images of known classes from those of unknown classes."
    else:
        title = "Out-of-distribution detection"
        text = "Telling test images of the known classes from images of another data set, with the same scores."

    def parts(feature: str) -> list[Part]:
        of_runs = [run.rows(task, feature) for run in runs]
        aurocs = [measured(rows[rows["metric"] == "auroc"]) for rows in of_runs]
        rates = [measured(rows[rows["metric"].isin(["oscr", "accuracy"])]) for rows in of_runs]
        made: list[Part] = []
        if any(aurocs):
            note = "In percent; 50 is chance. Every score is larger the more an image looks known."
            made.append(comparison("AUROC", runs, aurocs, note))
        if any(rates):
            note = "In percent. OSCR is the area under CCR over FPR; it is at most the closed-set accuracy."
            made.append(comparison("OSCR and closed-set accuracy", runs, rates, note))
        made += _detection_figures(runs, task, feature)
        for run, rows in zip(runs, of_runs, strict=True):
            made += _tables_of_run(run, rows)
        return made

    return Section(title, _with_projector(runs, task, parts), text)


def _tables_of_run(run: Run, rows: pd.DataFrame) -> list[Table]:
    """Paired differences to another run, and all metrics: a line a score and trial."""
    made = []
    for metrics, title, note in (
        (
            tuple(_DIFFERENCES),
            "{name} minus {other}, image by image",
            "In points, with 95% intervals and two-sided p-values of a paired bootstrap over the test images, not "
            "corrected for the number of tests. Two trainings that differ in their seed alone may well differ "
            "significantly.",
        ),
        (
            _METRICS,
            "All metrics of {name}",
            "In percent. AUPR is average precision. FPR95 is the rate of false positives where 95% of the positives "
            "are found: with known images as positives, the share of unknown images accepted; with unknown images as "
            "positives, the share of known images rejected. Of both, less is better. Intervals are of a bootstrap over "
            "test images: near 0 and 100, or with few images, they are too narrow.",
        ),
    ):
        found = rows[rows["metric"].isin(metrics)]
        if found.empty:
            continue
        lines: dict[tuple[str, str], dict[str, Cell]] = {}
        for _, row in found.iterrows():
            trial = f", trial {row['trial']}" if not pd.isna(row["trial"]) else ""
            trial = ", mean over trials" if "std" in row["params"] else trial
            what = name_of(row["score"]), f"{row['dataset']} {row['split']}{trial}"
            lines.setdefault(what, {})[row["metric"]] = value_cell(row, signed=row["metric"] in _DIFFERENCES)
        cells = [[Cell(*what), *(of.get(m, Cell("–")) for m in metrics)] for what, of in lines.items()]
        head = [Cell("Score"), *(Cell(_DIFFERENCES.get(metric, name_of(metric))) for metric in metrics)]
        other = found["params"].iloc[0].get("compared_with")
        made.append(Table(title.format(name=run.name, other=other), head, cells, note, folded=True))
    return made


def _detection_figures(runs: Sequence[Run], task: str, feature: str) -> list[Part]:
    results = [run.results.get((task, feature)) for run in runs]
    parts: list[Part] = [
        Missing(f"{run.name}: no curves and histograms, as {task}_samples.safetensors is not there.")
        for run, found in zip(runs, results, strict=True)
        if found is not None and not found.samples
    ]
    groups = [{} if found is None else found.samples for found in results]
    lines, histograms = [], []
    for score in _DRAWN:
        for curve, labels, title, y_label in (
            (roc_curve, ("is_known",), "ROC", "TPR: known accepted (%)"),
            (oscr_curve, ("is_known", "correct"), "OSCR", "CCR: known accepted and classified (%)"),
        ):
            drawn = []
            for i, of_run in enumerate(groups):
                having = [arrays for arrays in of_run.values() if {score, *labels} <= arrays.keys()]
                drawn += [plots.mean_curve(i, having, score, curve, *labels)] if having else []
            if drawn:
                lines.append(Panel(f"{name_of(score)}: {title}", plots.svg(plots.rates(drawn, y_label))))
    for i, of_run in enumerate(groups):
        for score in _DRAWN:
            arrays = next((arrays for arrays in of_run.values() if score in arrays), None)
            if arrays is not None:
                picture = plots.svg(plots.histogram(arrays, score, i))
                histograms.append(Panel(f"{runs[i].name}: {name_of(score)}", picture, i))
    if lines:
        note = "Means over trials or data sets, with a band from the lowest to the highest. Dotted: chance."
        parts.append(Figures("ROC and OSCR curves", lines, note, [run.name for run in runs]))
        note = (
            "Filled: known test images. Outlined: unknown ones. Dashed: the threshold that accepts 95% of the known. "
            "The outermost bins hold what lies beyond. Of several trials, or data sets, the first is shown."
        )
        parts.append(Figures("Distribution of scores", histograms, note, folded=True))
    return parts


def corruption(runs: Sequence[Run]) -> Section:
    means_note = (
        "In percent; of errors, less is better. The mean corruption error is the mean over severities of each "
        "corruption, then over the common corruptions, not normalized. mCE divides each corruption's error by the "
        "baseline's, relative mCE its rise above the error on clean images by the baseline's rise: 100 is the baseline."
    )

    def parts(feature: str) -> list[Part]:
        of_runs = [run.rows("corruption", feature) for run in runs]
        means = [measured(rows[result_rows.param(rows, "corruption").isna()]) for rows in of_runs]
        made: list[Part] = [comparison("Means over corruptions", runs, means, means_note)] if any(means) else []
        tables = [by_severity(rows, "linear", "accuracy") for rows in of_runs]
        if all(table.empty for table in tables):
            return made
        first = next(i for i, table in enumerate(tables) if len(table))
        alike = len({frozenset(m.protocol for m in of_run if "error" in m.metric) for of_run in means if of_run}) <= 1
        remark = "" if alike else " These runs were measured on different data or by different protocols."
        maps = []
        for i, table in enumerate(tables):
            if table.empty:
                continue
            severities = table.drop(columns=0, errors="ignore")
            if i > first and alike:
                others = tables[first].reindex(index=severities.index, columns=severities.columns)
                picture, title = plots.heat_map(severities - others, True), f"{runs[i].name} minus {runs[first].name}"
            else:
                picture, title = plots.heat_map(severities), runs[i].name
            maps.append(Panel(title, plots.svg(picture), i))
        note = (
            "Of the linear probe, in percent: bright is high. Of further runs, where the data are the same, the "
            "difference to the first, in points: orange is worse, violet better."
        )
        made.append(Figures("Accuracy by corruption and severity", maps, note))
        panels = []
        for score, metric, title in (
            ("linear", "accuracy", "Accuracy of the linear probe"),
            ("knn", "accuracy", "Accuracy of weighted kNN"),
            ("knn_distance", "auroc", "AUROC of kNN distance"),
            ("max_logit", "auroc", "AUROC of the maximum logit"),
        ):
            curves = [by_severity(rows, score, metric) for rows in of_runs]
            curves = [table[table.index.isin(COMMON)].mean().dropna() for table in curves]
            lines = [plots.Line(i, mean.index.tolist(), mean.to_numpy()) for i, mean in enumerate(curves) if len(mean)]
            panels += [Panel(title, plots.svg(plots.curves(lines, "severity", shares=True)))] if lines else []
        note = f"Over the common corruptions, in percent; severity 0 is clean images.{remark}"
        made.append(Figures("Mean by severity", panels, note, [run.name for run in runs]))
        return made

    text = "Accuracy on corrupted test images, of classifiers that were fitted on clean training images."
    return Section("Corruption robustness", _with_projector(runs, "corruption", parts), text)


def by_severity(rows: pd.DataFrame, score: str, metric: str) -> pd.DataFrame:
    """As `rows.by_corruption`, with a column 0 of clean images."""
    table = result_rows.by_corruption(rows, score, metric)
    clean = rows[(rows["score"] == score) & (rows["metric"] == f"clean_{metric}")]["value"]
    if len(clean) and len(table):
        table.insert(0, 0, clean.iloc[-1])
    return table


def reliance(runs: Sequence[Run]) -> Section:
    """What of the agreement of two views hangs on a small part."""

    def parts(feature: str) -> list[Part]:
        shown = ("reliance", "beyond_random", "beyond_center")
        of_runs = [run.rows("reliance", feature) for run in runs]
        found = [measured(rows[rows["metric"].isin(shown)]) for rows in of_runs]
        note = (
            "In percent of what replacing the whole view takes, with 95% bootstrap intervals over images; beyond a "
            "place: what the attributed part takes more than a box there, image by image."
        )
        return [comparison("Reliance", runs, found, note)] if any(found) else []

    text = "What the agreement of two views loses when a small part of the image is replaced."
    return Section("Reliance on a small part", _with_projector(runs, "reliance", parts), text)


def maps(runs: Sequence[Run], method: Literal["pca", "tsne"]) -> Section:
    parts: list[Part] = []
    panels = []
    for i, run in enumerate(runs):
        try:
            panels.append(_map(run, i, method))
        except (ValueError, TypeError, AttributeError, OSError) as error:  # settings may be of any type
            parts.append(Missing(f"{run.name}: no map, {error}"))
    if panels:
        how = {
            "pca": "their two directions of largest variance",
            "tsne": "by t-SNE, which keeps neighbors together; distances between groups mean little",
        }[method]
        note = (
            f"L2-normalized backbone features of test images, {how}. At most {MAP_POINTS:,} images, drawn at random. "
            "Classes that a run's settings leave out are gray; more than 20 classes have no legend."
        )
        parts.insert(0, Figures("Map of test features", panels, note))
    return Section("Features", parts)


def _map(run: Run, index: int, method: Literal["pca", "tsne"], seed: int = 0) -> Panel:
    """Test features of all classes in the plane, also of those a run was not trained on."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import normalize

    encoder = load_encoder(run.path)
    data = next((found.about["data"] for found in run.results.values() if "data" in found.about), None)
    data = (run.config or {}).get("data", {}) if data is None else data
    given = {field.name: data[field.name] for field in fields(Data) if field.name in data}
    settings = replace(Data(**given), size=encoder.size, download=False)
    images = load(settings, "test")
    known = known_classes(settings, images.classes)
    if len(images) < 3:
        raise ValueError(f"a map needs at least 3 test images, {images.name} has {len(images)}")
    features, _ = extract(encoder, images, cache=Path(run.path, "eval", "features"))
    drawn = np.sort(np.random.default_rng(seed).permutation(len(images))[:MAP_POINTS])
    directions, labels = normalize(features.double().numpy()[drawn]), images.labels[drawn]
    if method == "pca":
        pca = PCA(2, svd_solver="full")
        points = pca.fit_transform(directions)
        shares = np.nan_to_num(pca.explained_variance_ratio_)  # none where the encoder collapsed
        axes = tuple(f"component {i + 1}, {share:.0%} of variance" for i, share in enumerate(shares))
    else:
        perplexity = min(30.0, (len(drawn) - 1) / 3)
        points = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(directions)
        axes = ("", "")
    shown = [label for label in (range(len(images.classes)) if known is None else known) if label in labels]
    if len(shown) <= 20:
        palette = colormaps["tab10" if len(shown) <= 10 else "tab20"].colors
    else:
        palette = colormaps["turbo"].resampled(len(shown))(range(len(shown)))
    colors = {label: to_hex(color) for label, color in zip(shown, palette, strict=False)}
    order = np.argsort([label in colors for label in labels.tolist()], kind="stable")  # gray below the others
    of_points = [colors.get(label, _GRAY) for label in labels[order].tolist()]
    legend = [(images.classes[label], color) for label, color in colors.items()] if len(shown) <= 20 else []
    legend += [("other classes, or unlabeled", _GRAY)] if len(colors) < len({*labels.tolist()}) else []
    title = f"{run.name}: {images.name}, {len(drawn):,} of {len(images):,}"
    return Panel(title, plots.svg(plots.scatter(points[order], of_points, axes)), index, legend)


def attribution(runs: Sequence[Run]) -> Section:
    panels = [
        Panel(f"{run.name}: {run.picture.stem}", _image(run.picture), i) for i, run in enumerate(runs) if run.picture
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


def training(runs: Sequence[Run]) -> Section:
    panels = []
    for name, title in {
        "loss": "Loss",
        "loss_views": "Loss between the two plain views",
        "knn": "kNN accuracy, held-out training images (%)",
    }.items():
        points = [[(e["epoch"], e[name]) for e in run.log if _has_numbers(e, "epoch", name)] for run in runs]
        lines = [plots.Line(i, *zip(*found, strict=True)) for i, found in enumerate(points) if found]
        if lines:
            panels.append(Panel(title, plots.svg(plots.curves(lines, "epoch", shares=name == "knn"))))
    parts: list[Part] = []
    if panels:
        note = (
            "The loss is what was minimized. Where there is a third view it holds that view's term too: compare runs "
            "with and without one by the loss between the two plain views. kNN accuracy is read on training images "
            "that were held out, never on test images."
        )
        parts.append(Figures("Curves over epochs", panels, note, [run.name for run in runs]))
    parts += [_costs(runs)] if any(run.log for run in runs) else []
    parts += _settings(runs)
    parts += [Missing(f"{run.name} has no log of a training.") for run in runs if not run.log]
    return Section("Training", parts)


def _has_numbers(entry: Mapping[str, object], *names: str) -> bool:
    return all(isinstance(entry.get(name), int | float) and abs(entry[name]) < _LARGEST for name in names)


def _costs(runs: Sequence[Run]) -> Table:
    lines = []
    for i, run in enumerate(runs):
        settings = flat(run.config or {})
        speeds = [entry["images_per_second"] for entry in run.log if _has_numbers(entry, "images_per_second")]
        images = settings.get("environment.images")
        seconds = sum(images / speed for speed in speeds if speed > 0) if isinstance(images, int) else None
        said = [
            "–" if images is None else f"{images:,}" if isinstance(images, int) else str(images),
            str(len(run.log)) if run.log else "–",
            "–" if not seconds else f"{seconds / 60:,.1f} min",
            f"{np.median(speeds):,.0f}" if speeds else "–",
            in_words(settings.get("environment.device")),
            _parameters(Path(run.path, "backbone", "model.safetensors")),
            in_words(settings.get("gradmix.layers") or settings.get("environment.layers")),
        ]
        lines.append([Cell(run.name, run=i), *map(Cell, said)])
    head = ("Run", "Images", "Epochs", "Time", "Images/s", "Device", "Parameters", "Attributed layer")
    note = "Time is that of the epochs, without start, checkpoints and readings. Parameters are those of the backbone."
    return Table("Cost", [*map(Cell, head)], lines, note)


def _parameters(path: Path) -> str:
    try:
        with safe_open(path, "numpy") as file:
            keys = file.keys()
            sizes = [np.prod(file.get_slice(key).get_shape(), dtype=int) for key in keys]
    except (OSError, SafetensorError):
        return "–"
    return f"{sum(sizes) / 1e6:,.1f} M"


def _settings(runs: Sequence[Run]) -> list[Part]:
    trained = {i: flat(run.config) for i, run in enumerate(runs) if run.config is not None}
    parts: list[Part] = []
    if trained:
        names = dict.fromkeys(name for settings in trained.values() for name in settings)
        words = {name: [in_words(settings.get(name)) for settings in trained.values()] for name in names}
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
        head = [Cell("Setting"), *(Cell(runs[i].name, run=i) for i in trained)]
        lines = [[Cell(name), *map(Cell, values)] for name, values in differing.items()]
        note = f"Common to all: {', '.join(shared)}." if shared else ""
        parts.append(Table("Settings that differ, and the commit", head, lines, note))
    parts += [
        Missing(f"{run.name} holds results only, not the settings of a training.") for run in runs if run.config is None
    ]
    return parts
