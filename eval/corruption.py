"""Robustness of frozen features to 15 common corruptions of test images at 5 severities.

A linear classifier and weighted kNN are fitted to clean training images and tested on corrupted
images. These are made on the fly, or read from a published set (CIFAR-10-C, CIFAR-100-C or
ImageNet-C). Means weigh all severities of a corruption equally, then all corruptions. Errors are
fractions.

    python eval/corruption.py runs/x
    python eval/corruption.py runs/x --images 1000 --corruptions '[fog, jpeg_compression]'
    python eval/corruption.py timm:resnet18.a1_in1k --data.name folder --data.root imagenet \\
        --out results --published ImageNet-C
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd
import torch
from joblib import cpu_count
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from tqdm import tqdm

from ssl_gradmix import cli
from ssl_gradmix.data import corrupted
from ssl_gradmix.data.corruptions import COMMON, GROUP_OF, SEVERITIES
from ssl_gradmix.data.datasets import ImageSet, load
from ssl_gradmix.data.open_set import known_classes
from ssl_gradmix.evaluation import plots, results
from ssl_gradmix.evaluation.features import extract
from ssl_gradmix.evaluation.intervals import accuracy_interval
from ssl_gradmix.evaluation.knn import knn_predict, used_k
from ssl_gradmix.evaluation.metrics import mean_corruption_error
from ssl_gradmix.evaluation.probes import LinearProbe, label_subset, linear_probe

SCORES = ("linear", "knn")

PLACE = ("corruption", "severity", "group")
"""Parameters of accuracies that means do not have."""


def select(
    images: ImageSet, classes: Sequence[int] | None, count: int | None, seed: int
) -> np.ndarray:
    """Draws labeled images, about the same fraction of each class.

    Args:
        images: All images.
        classes: Labels to draw from; None takes all.
        count: About how many; None takes all.
        seed: Seed of the draw.

    Returns:
        Ascending positions of the images.

    Raises:
        ValueError: No image has such a label, or there are fewer than `count`.
    """
    labels = images.labels
    wanted = labels >= 0 if classes is None else np.isin(labels, classes)
    positions = np.flatnonzero(wanted)
    if len(positions) == 0:
        raise ValueError(f"data: {images.name} has no labeled image of the classes")
    if count is None:
        return positions
    if count > len(positions):
        raise ValueError(f"images must be at most {len(positions)} of {images.name}, got {count}")
    drawn = label_subset(torch.from_numpy(labels[positions]), count / len(positions), seed)
    return positions[drawn.numpy()]


def measure(
    probe: LinearProbe,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    metric: str,
    k: int,
    temperature: float,
    **params: object,
) -> list[results.Number]:
    """Accuracy of a linear probe and of weighted kNN, with Wilson 95% intervals.

    Args:
        probe: Trained on `train`.
        train: Features (N, D) and labels (N,) of clean training images.
        test: The same of test images, clean or corrupted.
        metric: Name of the metric, `accuracy` or `clean_accuracy`.
        k: Number of neighbors that vote.
        temperature: Temperature of their weights.
        **params: Recorded with both numbers.
    """
    features, labels = test
    linear = accuracy_interval(probe.predict(features) == labels)
    nearest = accuracy_interval(knn_predict(features, *train, k, temperature) == labels)
    votes = {"k": used_k(k, train[0]), "temperature": temperature}
    of_probe = {"learning_rate": probe.learning_rate}
    return [
        results.number("linear", metric, linear, len(labels), **params, **of_probe),
        results.number("knn", metric, nearest, len(labels), **params, **votes),
    ]


def by_corruption(rows: pd.DataFrame, score: str) -> pd.DataFrame:
    """Accuracies of one score, one line per corruption and one column per severity."""
    found = rows[(rows["score"] == score) & (rows["metric"] == "accuracy")]
    names = ("corruption", "severity")
    found = found.assign(**{name: results.param(found, name) for name in names})
    table = found.pivot(index="corruption", columns="severity", values="value").astype(float)
    return table.reindex([name for name in COMMON if name in table.index])


def summarize(rows: pd.DataFrame) -> list[results.Number]:
    """Mean errors over all corruptions, and over each group of them.

    The parameter `corruptions` is the number of corruptions in a mean. Papers print
    `mean_corruption_error` for CIFAR-10-C in percent. The mCE for ImageNet-C is normalized by
    AlexNet instead, see `metrics.mean_corruption_error`.
    """
    means = []
    for score in SCORES:
        first = rows[(rows["score"] == score) & (rows["metric"] == "accuracy")].iloc[0]
        shared = {name: value for name, value in first["params"].items() if name not in PLACE}
        table = by_corruption(rows, score)
        errors = {name: (1 - values).tolist() for name, values in table.iterrows()}
        for group in (None, *dict.fromkeys(GROUP_OF[name] for name in errors)):
            members = {name: errors[name] for name in errors if group in (None, GROUP_OF[name])}
            metric = "group_corruption_error" if group else "mean_corruption_error"
            params = {"group": group} if group else {}
            params |= {"corruptions": len(members), **shared}
            mean = mean_corruption_error(members)
            means.append(results.number(score, metric, mean, int(first["n"]), **params))
    return means


def report(table: pd.DataFrame, clean: float) -> str:
    """Accuracies in % for the terminal: one line per corruption, one column per severity."""
    first = pd.DataFrame({"mean": clean}, index=["clean images"])
    lines = pd.concat([first, table.assign(mean=table.mean(axis=1))])[[*SEVERITIES, "mean"]]
    lines = (100 * lines).rename_axis(columns="severity")
    return lines.to_string(na_rep="", float_format="{:.1f}".format, col_space=5)


def evaluate(
    evaluation: cli.Evaluation,
    *,
    corruptions: list[str] | None = None,
    preset: Literal["cifar", "imagenet64", "imagenet"] | None = None,
    published: str | None = None,
    images: PositiveInt | None = None,
    epochs: PositiveInt = 100,
    k: PositiveInt = 20,
    temperature: PositiveFloat = 0.07,
    seed: NonNegativeInt = 0,
    workers: PositiveInt | None = None,
) -> None:
    """Evaluates all corruptions, writes results, and prints tables.

    Args:
        evaluation: The encoder, its images, and the folder for results.
        corruptions: Which corruptions, such as [fog, jpeg_compression]. The default is all 15.
        preset: Parameters of the severities. The default are those for images of nearest size.
        published: Folder of a published set to read instead of corrupting the test images here.
        images: About how many test images, the same fraction of each class. The default is all of
            them; they are encoded 75 times.
        epochs: Epochs of the linear classifier.
        k: Number of neighbors that vote in weighted kNN.
        temperature: Temperature of their weights exp(cosine / temperature).
        seed: Seed of the corruptions, the linear classifier and the choice of images.
        workers: Processes that corrupt images, per process that encodes. The default shares the
            cores.
    """
    encoder, accelerator = evaluation.encoder, evaluation.accelerator
    is_main = accelerator.is_main_process
    names = corrupted.choose(corruptions)
    train = evaluation.load("train")
    with accelerator.local_main_process_first():
        test = load(evaluation.data, "test")
    draw = partial(
        select, classes=known_classes(evaluation.data, test.classes), count=images, seed=seed
    )
    positions = draw(test)
    clean = test.subset(positions)
    source: corrupted.Generated | corrupted.Published
    if published is None:
        workers = workers or max(1, cpu_count() // accelerator.num_processes)
        source = corrupted.Generated(test, positions, encoder.size, preset, seed, workers)
    else:
        source = corrupted.Published(published, test, draw)
    for name in names:
        source.read(name, SEVERITIES[-1])  # a missing or damaged file fails before hours of work

    bank, of_clean = evaluation.features(train), evaluation.features(clean)
    numbers: list[results.Number] = []
    if is_main:
        probe = linear_probe(*bank, epochs=epochs, seed=seed)
        numbers += measure(probe, bank, of_clean, "clean_accuracy", k, temperature)
    passes = [(name, severity) for name in names for severity in SEVERITIES]
    for name, severity in tqdm(passes, "corruptions", unit="pass", disable=not is_main or None):
        corrupt = source.read(name, severity)
        found = extract(
            encoder, corrupt, evaluation.batch_size, accelerator=accelerator, progress=False
        )
        if is_main:
            features, labels = (part.to(accelerator.device) for part in found)
            where = {"corruption": name, "severity": severity, "group": GROUP_OF[name]}
            numbers += measure(probe, bank, (features, labels), "accuracy", k, temperature, **where)
    if not is_main:
        return

    params = {**source.origin(), "seed": seed, "epochs": epochs, **evaluation.classes}
    if images is not None:
        params |= {"images": len(clean), "draw_seed": seed}
    of_encoder = ("corruption", clean.name, encoder.name, encoder.feature)
    rows = results.frame(numbers, *of_encoder, None, **params)
    means = results.frame(summarize(rows), *of_encoder)

    path = evaluation.path("corruption", clean)
    rows = pd.concat([rows, means], ignore_index=True)
    results.write(path, rows, evaluation.about(train, test))
    table, clean_accuracy = by_corruption(rows, "linear"), rows["value"].iloc[0]
    title = (
        f"{encoder.title} on {len(clean):,} images of {clean.name}: accuracy of the linear probe"
    )
    plots.write(path.with_suffix(".png"), plots.corruptions(table, clean_accuracy, title))
    print(f"{title}, in %\n{report(table, clean_accuracy)}\n")
    print(results.console(means))
    print(f"Written: {path}")


def main(argv: Sequence[str] | None = None) -> None:
    evaluation, options = cli.evaluation(evaluate, __doc__, argv)
    evaluate(evaluation, **options)


if __name__ == "__main__":
    sys.exit(cli.run(main))
