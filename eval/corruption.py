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

from ssl_gradmix import cli
from ssl_gradmix.console import progress, show
from ssl_gradmix.data import corrupted
from ssl_gradmix.data.corruptions import COMMON, GROUP_OF, SEVERITIES
from ssl_gradmix.data.datasets import ImageSet, load
from ssl_gradmix.data.open_set import known_classes
from ssl_gradmix.evaluation import plots, results
from ssl_gradmix.evaluation.detection import closed_set
from ssl_gradmix.evaluation.features import extract
from ssl_gradmix.evaluation.metrics import mean_corruption_error
from ssl_gradmix.evaluation.probes import label_subset, linear_probe

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

    bank, queries = evaluation.features(train), evaluation.features(clean)
    numbers = []
    if is_main:
        copies = evaluation.copies(clean, queries[0], bank[0])
        probe = linear_probe(*bank, epochs=epochs, seed=seed)
        training = {"learning_rate": probe.learning_rate, "epochs": epochs}
        for number in closed_set(probe, bank, queries, k, temperature, **training):
            numbers.append({**number, "metric": "clean_accuracy"})
    passes = [(name, severity) for name in names for severity in SEVERITIES]
    bar = progress(len(passes), "corruptions", "pass", silent=not is_main)
    for name, severity in passes:
        features, labels = extract(
            encoder,
            source.read(name, severity),
            evaluation.batch_size,
            accelerator=accelerator,
            progress=False,
        )
        bar.update()
        if not is_main:
            continue
        queries = features.to(accelerator.device), labels.to(accelerator.device)
        where = {"corruption": name, "severity": severity, "group": GROUP_OF[name]}
        for number in closed_set(probe, bank, queries, k, temperature, **training):
            numbers.append({**number, "params": {**number["params"], **where}})
    bar.close()
    if not is_main:
        return

    params = {**source.origin(), "seed": seed, **evaluation.classes}
    if images is not None:
        params |= {"images": len(clean), "draw_seed": seed}
    rows = evaluation.frame("corruption", clean, numbers, **params)
    means = evaluation.frame("corruption", clean, summarize(rows))
    table, clean_accuracy = by_corruption(rows, "linear"), rows["value"].iloc[0]
    title = (
        f"{encoder.title} on {len(clean):,} images of {clean.name}: accuracy of the linear probe"
    )
    figure = plots.corruptions(table, clean_accuracy, title)
    rows = pd.concat([rows, means], ignore_index=True)
    evaluation.write(rows, figure, [train, test], copies=copies)
    show(f"{title}, {clean_accuracy:.1%} on clean images\n{100 * table.round(3)}\n")
    groups = means.assign(group=results.param(means, "group").fillna("all corruptions"))
    summary = groups.pivot(index="group", columns="score", values="value")
    show(f"mean errors\n{summary.to_string(float_format='{:.4f}'.format)}")


def main(argv: Sequence[str] | None = None) -> None:
    evaluation, options = cli.evaluation(evaluate, __doc__, argv)
    evaluate(evaluation, **options)


if __name__ == "__main__":
    sys.exit(cli.run(main))
