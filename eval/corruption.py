"""How well frozen features hold up where test images are corrupted: 15 common corruptions at 5 severities.

A linear classifier and kNN are fitted on clean training images, then judge the corrupted test images. These are made on
the fly, each reproducibly, or read from a published set: CIFAR-10-C, CIFAR-100-C, ImageNet-C, or what eval/make_c.py
wrote. Means give every severity of a corruption equal weight, then every corruption; errors are fractions. The 4 extra
corruptions are in no mean with the common ones. Each corruption is kept when it is done: the same command again goes on
where an interrupted one stopped, and further corruptions are added.

    python eval/corruption.py runs/x
    python eval/corruption.py runs/x --images 1000 --baseline runs/y
    python eval/corruption.py runs/x --osr true --data.open_set random:6:0
    python eval/corruption.py timm:resnet18.a1_in1k --data.name folder --data.root imagenet --out results
        --published ImageNet-C --baseline alexnet
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from accelerate.utils import broadcast_object_list
from joblib import cpu_count
from tqdm import tqdm

from ssl_gradmix.data import corruption_sets, open_set
from ssl_gradmix.data.corruptions import COMMON, GROUP_OF, SEVERITIES
from ssl_gradmix.data.datasets import ImageSet, load
from ssl_gradmix.evaluation import cli, plots, rows, scores
from ssl_gradmix.evaluation.features import extract
from ssl_gradmix.evaluation.intervals import accuracy_interval, bootstrap_interval
from ssl_gradmix.evaluation.knn import knn_predict, used_k
from ssl_gradmix.evaluation.metrics import (
    ALEXNET_CLEAN_ERROR,
    ALEXNET_ERRORS,
    auroc,
    mean_corruption_error,
    relative_mce,
)
from ssl_gradmix.evaluation.probes import LinearProbe, label_subset, linear_probe
from ssl_gradmix.evaluation.rows import by_corruption

CLASSIFIERS = ("linear", "knn")
"""Scores of the metrics `accuracy` and `clean_accuracy`."""

OPEN_SET_SCORES = ("knn_distance", "max_logit")
"""Scores of the metrics `auroc` and `clean_auroc`."""

_MUST_AGREE = ("images", "draw_seed", "classes", "protocol", "preset", "frost_source")
"""Parameters that the rows of a baseline must share."""


@dataclass
class Options:
    """What is measured, and how.

    Args:
        corruptions: Which, such as [fog, jpeg_compression]; null is the 15 common ones.
        extra: Add the 4 extra corruptions, which are reported apart.
        preset: Parameters of the severities; null takes those made for images nearest in size.
        published: Folder of a published set to read, in place of corrupting the test images here.
        images: About so many test images, the same share of each class; null takes all. They are encoded 75 times.
        osr: Also tell known from unknown classes, both corrupted. The known ones are those of --data.open_set or
            --data.classes, a run's own by default.
        baseline: What mCE divides by: another run evaluated so, or `alexnet` (ImageNet only).
        epochs: Passes over the training features, of the linear classifier.
        k: Neighbors that vote in weighted kNN.
        temperature: Of their weights exp(cosine / temperature).
        seed: Of the corruptions, the linear classifier's training, and the choice of images.
        workers: Processes that corrupt, for each one that encodes; null shares the cores out.
    """

    corruptions: list[str] | None = None
    extra: bool = False
    preset: Literal["cifar", "imagenet64", "imagenet"] | None = None
    published: str | None = None
    images: int | None = None
    osr: bool = False
    baseline: str | None = None
    epochs: int = 100
    k: int = 20
    temperature: float = 0.07
    seed: int = 0
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.published is not None and self.preset is not None:
            raise ValueError("preset is how corruptions are made here, so it cannot be given with published")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or larger, got {self.seed}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1 or null, got {self.workers}")


def evaluate(evaluation: cli.Evaluation, options: Options) -> None:
    """Measures, and on the main process writes `corruption.json` and `.png` and prints tables."""
    accelerator, encoder = evaluation.accelerator, evaluation.encoder
    names = corruption_sets.choose(options.corruptions, options.extra)
    train = evaluation.load("train")
    with evaluation.one_first():
        test = load(evaluation.data, "test")
    known = open_set.known_classes(evaluation.data, test.classes)
    trial, of_trial = known_of_trial(evaluation, test) if options.osr else (None, evaluation.of_classes())
    select = partial(selected, classes=None if options.osr else known, count=options.images, seed=options.seed)
    drawn = select(test)
    clean = test.subset(drawn)
    if options.published is not None:
        corrupted = corruption_sets.Published(options.published, test, select)
    else:
        corruption_sets.check_can_make(names)
        workers = options.workers or max(1, cpu_count() // accelerator.num_processes)
        corrupted = corruption_sets.Generated(test, drawn, encoder.size, options.preset, options.seed, workers)
    for name in names:
        corrupted.read(name, SEVERITIES[-1])  # damage is better known before hours of work than after

    shared = {**said_of(corrupted), "seed": options.seed, **of_trial}
    if options.images is not None:
        shared |= {"images": len(clean), "draw_seed": options.seed}
    about = evaluation.about(train, test, **evaluation.of_classes())
    path = evaluation.out / "corruption.json"
    baseline = None
    if options.baseline is not None:
        n_classes = None if known is not None else len(test.classes)
        baseline = read_baseline(options.baseline, names, shared, about, n_classes, encoder.feature)

    def frame(numbers: Sequence[rows.Number], **where: object) -> pd.DataFrame:
        return evaluation.frame("corruption", clean.name, numbers, trial, **shared, **where)

    bank, seen = evaluation.features(train), evaluation.features(clean)
    missing = names
    if accelerator.is_main_process:
        probe = linear_probe(*bank, epochs=options.epochs, seed=options.seed)
        numbers = measure(probe, bank, seen, options)
        of_clean = frame([{**number, "metric": f"clean_{number['metric']}"} for number in numbers])
        finished = done(like(rows.kept(path, about)[0], of_clean), of_clean["score"].unique())
        missing = [name for name in names if name not in finished]
    (missing,) = broadcast_object_list([missing])  # one process reads for all: others might find what it writes below
    silent = None if accelerator.is_main_process else True
    with tqdm(total=len(missing) * len(SEVERITIES), unit="pass", disable=silent) as bar:
        for name in missing:
            found = []
            for severity in SEVERITIES:
                bar.set_description(f"{name} {severity}")
                images = corrupted.read(name, severity)
                seen = extract(encoder, images, evaluation.batch_size, accelerator=accelerator, progress=False)
                if accelerator.is_main_process:
                    numbers = measure(probe, bank, tuple(part.to(accelerator.device) for part in seen), options)
                    found.append(frame(numbers, corruption=name, severity=severity, group=GROUP_OF[name]))
                bar.update()
            if accelerator.is_main_process:
                rows.add(path, rows.joined(found), about)

    if accelerator.is_main_process:
        rows.add(path, of_clean, about)
        found = like(rows.read(path)[0], of_clean)
        means, remarks = summarize(found, baseline)
        rows.add(path, means, about)
        report(evaluation, found, means, [*remarks, *filter(None, [probe.remark])])


def selected(
    images: ImageSet, classes: Sequence[int] | None = None, count: int | None = None, seed: int = 0
) -> np.ndarray:
    """Numbers of the labeled images of these classes, ascending; about `count`, the same share of each class."""
    chosen = images.labels >= 0
    if not chosen.any():
        raise ValueError(f"{images.name} has no labels, this evaluation needs them: a folder has one a class folder")
    if classes is not None:
        chosen &= np.isin(images.labels, classes)
    numbers = np.flatnonzero(chosen)
    if len(numbers) == 0:
        raise ValueError(f"{images.name} has no image of the classes {list(classes)}")
    if count is None:
        return numbers
    if not 1 <= count <= len(numbers):
        raise ValueError(f"images must be 1 to the {len(numbers)} of {images.name}, got {count}")
    return numbers[label_subset(torch.from_numpy(images.labels[numbers]), count / len(numbers), seed).numpy()]


def known_of_trial(evaluation: cli.Evaluation, test: ImageSet) -> tuple[int, dict[str, Any]]:
    """Number of the trial whose known classes the data settings name, and what rows say of it."""
    data = evaluation.data
    if data.classes is None and data.open_set is None:
        raise ValueError("osr needs known classes: give --data.open_set, such as random:6:0, or --data.classes")
    (trial,) = open_set.own_trials(data, test.classes)
    if trial.elsewhere:
        raise ValueError(f"data.open_set {data.open_set!r} has unknown classes of another data set: osr cannot take it")
    seen = open_set.pretraining(evaluation.encoder.config, data, test.classes, trial.known, trial.unknown)
    return trial.number, {"protocol": trial.protocol, "pretraining": seen, "n_known": len(trial.known)}


def said_of(corrupted: corruption_sets.Generated | corruption_sets.Published) -> dict[str, Any]:
    """What rows say of where the corruptions are from."""
    origin = dict(corrupted.origin())
    if origin["source"] == "published":
        origin |= {"files": corrupted.fingerprint(), "made_with_seed": origin.pop("seed", None)}
    return {name: value for name, value in origin.items() if name != "seed" and value is not None}


def measure(probe: LinearProbe, bank: cli.Labeled, images: cli.Labeled, options: Options) -> list[rows.Number]:
    """How the linear probe of `bank`, and kNN in it, do on features and labels of images.

    `accuracy` of each of `CLASSIFIERS` on images of the training classes, with Wilson 95% interval; with `options.osr`
    also `auroc` of each of `OPEN_SET_SCORES`, with bootstrap 95% interval.
    """
    features, labels = images
    training = {"learning_rate": probe.learning_rate, "epochs": options.epochs}
    votes = {"k": used_k(options.k, bank[0]), "temperature": options.temperature}
    known = torch.isin(labels, probe.classes) if options.osr else torch.ones_like(labels, dtype=torch.bool)
    asked, wanted = features[known], labels[known]
    linear = probe.accuracy(asked, wanted).top1
    nearest = knn_predict(asked, *bank, options.k, options.temperature) == wanted
    numbers = [
        rows.number("linear", "accuracy", accuracy_interval(linear), len(wanted), **training),
        rows.number("knn", "accuracy", accuracy_interval(nearest), len(wanted), **votes),
    ]
    if options.osr:
        distance = scores.knn_distance(*bank, features)
        neighbor = scores.parameters_used(*bank)["knn_distance"]
        logit = scores.max_logit(probe.logits(features))
        for score, values, params in (("knn_distance", distance, neighbor), ("max_logit", logit, training)):
            interval = bootstrap_interval(auroc, values, known, strata=known)
            numbers.append(rows.number(score, "auroc", interval, len(labels), **params))
    return numbers


def like(found: pd.DataFrame, of_clean: pd.DataFrame) -> pd.DataFrame:
    """Rows of clean and corrupted images, without means, of the same images and protocol as these of clean images."""

    def protocol(row: Mapping[str, Any]) -> tuple:
        left_out = ("corruption", "severity", "group", "learning_rate")
        params = {name: value for name, value in row["params"].items() if name not in left_out}
        return row["dataset"], row["split"], str(row["trial"]), row["feature"], row["score"], params

    wanted = [protocol(row) for row in of_clean.to_dict("records")]
    return found[np.array([protocol(row) in wanted for row in found.to_dict("records")], bool)]


def errors_of(found: pd.DataFrame, score: str) -> dict[str, list[float]]:
    """Errors in [0, 1] of one classifier by corruption, mildest first."""
    return {name: (1 - values).tolist() for name, values in by_corruption(found, score, "accuracy").iterrows()}


def done(found: pd.DataFrame, scores: Sequence[str]) -> set[str]:
    """Corruptions of which all these scores are measured."""
    metrics = dict.fromkeys(CLASSIFIERS, "accuracy") | dict.fromkeys(OPEN_SET_SCORES, "auroc")
    return set.intersection(*(set(by_corruption(found, score, metrics[score]).dropna().index) for score in scores))


def clean_value(found: pd.DataFrame, score: str, metric: str) -> float:
    """Value of one score and metric on clean images."""
    return found[(found["score"] == score) & (found["metric"] == f"clean_{metric}")]["value"].item()


@dataclass(frozen=True)
class Baseline:
    """Errors to compare with."""

    name: str  # what results call it
    errors: Mapping[str, Mapping[str, float | Sequence[float]]]  # by score and corruption: by severity, or the mean
    clean_error: Mapping[str, float]  # by score


ALEXNET = Baseline(
    "alexnet", dict.fromkeys(CLASSIFIERS, ALEXNET_ERRORS), dict.fromkeys(CLASSIFIERS, ALEXNET_CLEAN_ERROR)
)
"""AlexNet's errors on ImageNet-C, by which the benchmark's authors normalize."""


def read_baseline(
    where: str,
    names: Sequence[str],
    shared: Mapping[str, Any],
    about: Mapping[str, Any],
    n_classes: int | None,
    feature: str = "backbone",
) -> Baseline:
    """Errors of another run, from its folder or `corruption.json`; or those of `alexnet`, for ImageNet's 1000 classes.

    They must be of the corruptions `names` (extra ones are passed over), and agree with this run in what `_MUST_AGREE`
    of its parameters `shared`, in the images that its results are `about`, and in the feature. `n_classes` is None
    where some of the data set's classes are evaluated.
    """
    if where == "alexnet":
        if n_classes != 1000 or shared.get("preset", "imagenet") != "imagenet":
            raise ValueError(
                "baseline alexnet is for ImageNet's 1000 classes and the preset imagenet, got "
                f"{n_classes or 'some of the'} classes and {shared.get('preset')}: give another run as baseline"
            )
        return ALEXNET
    folder = Path(where).expanduser()
    in_folders = [rows.results_folder(place, feature) / "corruption.json" for place in (folder / "eval", folder)]
    path = next((place for place in (*in_folders, folder) if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"the baseline has no {str(in_folders[0])!r}: run eval/corruption.py on it first")
    found, theirs = rows.read(path)
    if set(found["feature"]) != {feature}:
        raise ValueError(f"the baseline {path} is of {found['feature'].iloc[0]} features, not of {feature} features")
    ours, theirs = about["images"], theirs.get("images", {})
    if any(theirs.get(name) != ours[name] for name in ours):
        raise ValueError(f"the baseline {path} is of other images: it has {', '.join(theirs)}, this {', '.join(ours)}")
    agreeing = [all(params.get(name) == shared.get(name) for name in _MUST_AGREE) for params in found["params"]]
    if not any(agreeing):
        other = found["params"].iloc[0]
        differing = [name for name in _MUST_AGREE if other.get(name) != shared.get(name)]
        said = "; ".join(f"{name} {other.get(name)!r}, not {shared.get(name)!r}" for name in differing)
        raise ValueError(f"the baseline {path} is of other images: {said}")
    found = found[agreeing]
    where_from = found.assign(**{name: rows.param(found, name) for name in ("corruption", "severity", "group")})
    if where_from.duplicated(["score", "metric", "corruption", "severity", "group"]).any():
        raise ValueError(
            f"the baseline {path} has several evaluations of the same images, with other parameters: evaluate that run "
            "once more with --out FOLDER, and give that folder"
        )
    errors = {score: errors_of(found, score) for score in CLASSIFIERS}
    missing = [name for name in names if name in COMMON and any(name not in errors[score] for score in CLASSIFIERS)]
    if (found["metric"] == "clean_accuracy").sum() < len(CLASSIFIERS):
        missing.append("clean images")
    if missing:
        raise ValueError(f"the baseline {path} lacks {', '.join(missing)}: evaluate them there too, or not here")
    clean_error = {score: 1 - clean_value(found, score, "accuracy") for score in CLASSIFIERS}
    return Baseline(found["encoder"].iloc[0], errors, clean_error)


def summarize(found: pd.DataFrame, baseline: Baseline | None = None) -> tuple[pd.DataFrame, list[str]]:
    """Means over corruptions, and remarks why a ratio cannot be had. `params["corruptions"]` counts those in a mean.

    - `mean_corruption_error`: of the common corruptions, not normalized; what is usual for CIFAR.
    - `group_corruption_error`: of those of `params["group"]`, which may be `extra`.
    - `mce`, `relative_mce`: of the common corruptions, as ratios to the baseline; papers print 100 times that.
    - `mean_corruption_auroc`: of the common corruptions.
    """
    means: list[dict[str, Any]] = []
    remarks: list[str] = []

    def add(score: str, metric: str, value: float, corruptions: int, **params: object) -> None:
        like = found[(found["score"] == score) & found["metric"].isin(["accuracy", "auroc"])].iloc[0]
        shared = {name: one for name, one in like["params"].items() if name not in ("corruption", "severity", "group")}
        params = {**params, "corruptions": corruptions, **shared}
        means.append({**like, "metric": metric, "value": value, "ci_low": None, "ci_high": None, "params": params})

    for score in CLASSIFIERS:
        errors = errors_of(found, score)
        common = {name: errors[name] for name in errors if name in COMMON}
        if common:
            add(score, "mean_corruption_error", mean_corruption_error(common), len(common))
        for group in dict.fromkeys(GROUP_OF[name] for name in errors):
            members = {name: errors[name] for name in errors if GROUP_OF[name] == group}
            add(score, "group_corruption_error", mean_corruption_error(members), len(members), group=group)
        if baseline is None or not common:
            continue
        theirs, clean_error = baseline.errors[score], 1 - clean_value(found, score, "accuracy")
        ratios = {
            "mce": partial(mean_corruption_error, common, theirs),
            "relative_mce": partial(relative_mce, common, clean_error, theirs, baseline.clean_error[score]),
        }
        for metric, ratio in ratios.items():
            try:
                add(score, metric, ratio(), len(common), baseline=baseline.name)
            except (KeyError, ValueError) as error:
                remarks.append(f"no {metric} of {score} against {baseline.name}: {error.args[0]}")

    for score in OPEN_SET_SCORES:
        table = by_corruption(found, score, "auroc")
        common = table[table.index.isin(COMMON)]
        if len(common):
            add(score, "mean_corruption_auroc", float(common.to_numpy().mean()), len(common))
    return rows.typed(means), remarks


def report(evaluation: cli.Evaluation, found: pd.DataFrame, means: pd.DataFrame, remarks: Sequence[str]) -> None:
    """Writes the pictures and prints tables."""
    encoder, files = evaluation.encoder.title, [evaluation.out / "corruption.json"]
    first = found.iloc[0]
    images, params = f"{first['dataset']}/{first['split']}", first["params"]
    print(f"{encoder} on {found['n'].max()} images of {images}")
    origin = [f"{name} {params[name]}" for name in ("preset", "seed", "frost_source") if name in params]
    print(", ".join([f"corruptions {params['source']}", *origin]))
    tables = [("linear", "accuracy", "accuracy of the linear classifier", "corruption.png")]
    if "max_logit" in set(found["score"]):
        tables.append(("max_logit", "auroc", "AUROC of known against unknown, maximum logit", "corruption_osr.png"))
    for score, metric, what, name in tables:
        table, clean = by_corruption(found, score, metric), clean_value(found, score, metric)
        title = f"{encoder} on {images}, corruptions {params['source']}: {what}"
        files.append(evaluation.out / name)
        plots.write(files[-1], plots.corruptions(table, score, metric, clean, title))
        print(f"\n{what}, in %\n{severity_table(table, clean)}")
    print(f"\nmeans (of how many corruptions)\n{summary_table(means)}\n")
    if params.get("frost_source") == "synthetic" and "frost" in set(rows.param(found, "corruption")):
        remarks = [
            *remarks,
            "frost has synthetic textures, so it and its means do not compare with published results: "
            "pip install torch-uncertainty-assets brings the authors' photographs",
        ]
    print(*remarks, f"Written: {', '.join(map(str, files))}", sep="\n")


def severity_table(table: pd.DataFrame, clean: float) -> str:
    """Lays out values for a terminal, in %: a line a corruption, a column a severity, and the mean."""
    first = pd.DataFrame({"mean": clean}, index=["clean images"])
    lines = pd.concat([first, table.assign(mean=table.mean(axis=1))])[[*SEVERITIES, "mean"]]
    return (100 * lines).rename_axis(columns="severity").to_string(na_rep="", float_format="{:.1f}".format, col_space=5)


def summary_table(means: pd.DataFrame) -> str:
    """Lays out what `summarize` gives for a terminal: a line a mean, a column a score."""
    said = []
    for row in means.itertuples():
        against = f" against {row.params['baseline']}" if "baseline" in row.params else ""
        what = f"  {row.params['group']}" if "group" in row.params else row.metric.replace("_", " ") + against
        said.append(f"{what} ({row.params['corruptions']})")
    table = means.assign(what=said).pivot(index="what", columns="score", values="value")
    table = table.reindex(index=list(dict.fromkeys(said)), columns=means["score"].unique())
    return table.rename_axis(index=None, columns=None).to_string(na_rep="", float_format="{:.4f}".format, col_space=13)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(evaluate, Options, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
