"""Out-of-distribution detection: how well scores on frozen features tell other data sets apart.

Classifiers and scores see the training images of one data set, and its test images are known.
The images of each other data set are unknown: its test split, or all images of a folder without
train/ and test/. Each unknown data set has its own files of results. The CSV has a line per image
with all scores. `threshold_tpr95` in the JSON is the threshold for a score that 95% of held-out
training images reach. For unknown classes of the same data set, see eval/osr.py.

    python eval/ood.py runs/x --unknown.name svhn --unknown.root data
    python eval/ood.py runs/x --unknown '[{name: svhn, root: data}, {name: folder, root: textures}]'
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt

from ssl_gradmix import cli
from ssl_gradmix.console import show
from ssl_gradmix.data import open_set
from ssl_gradmix.data.datasets import Data, ImageSet
from ssl_gradmix.evaluation import plots, results
from ssl_gradmix.evaluation.detection import (
    SHOWN,
    closed_set,
    detect,
    held_out_scores,
    name_images,
)
from ssl_gradmix.evaluation.probes import linear_probe

logger = logging.getLogger("ssl_gradmix")


def same_data(one: Data, other: Data) -> bool:
    """Whether settings are of the same data set, whatever classes they select."""
    if one.name != "folder" or other.name != "folder":
        return one.name == other.name
    return Path(one.root or "").resolve() == Path(other.root or "").resolve()


def shared_classes(images: ImageSet, known: ImageSet) -> list[str]:
    """Names of classes that both sets have images of; logs a warning if there are any."""
    one, other = (
        {each.classes[label] for label in set(each.labels) if label >= 0}
        for each in (images, known)
    )
    if one & other:
        names = ", ".join(sorted(one & other))
        logger.warning("unknown: %s has classes named as known ones: %s", images.name, names)
    return sorted(one & other)


def evaluate(
    evaluation: cli.Evaluation,
    *,
    unknown: list[Data],
    k: PositiveInt = 50,
    top_k: PositiveInt = 3,
    epochs: PositiveInt = 100,
    seed: NonNegativeInt = 0,
) -> None:
    """Evaluates all unknown data sets, and for each writes its results and prints a table.

    Args:
        evaluation: The encoder, the known images, and the folder for results.
        unknown: Data sets with settings as of --data. A single one can be given as --unknown.name,
            --unknown.root and so on.
        k: Neighbor whose distance is the score `knn_distance`, at most the number of images.
        top_k: Neighbors in each class of the score `top_k_cosine`, at most the smallest class.
        epochs: Epochs of the linear classifier.
        seed: Seed of its training.
    """
    encoder, data = evaluation.encoder, evaluation.data
    train, test = evaluation.load("train"), evaluation.load("test")
    known = open_set.known_classes(data, test.classes) or list(range(len(test.classes)))
    others, about = [], []
    for settings in unknown:
        images = open_set.load_known(replace(settings, channels=data.channels), "all")
        here = np.unique(images.labels).tolist() if same_data(settings, data) else []
        if set(here) & set(known):
            raise ValueError(f"unknown: {images.name} has images of the known classes")
        seen = open_set.pretraining(encoder.config, data, test.classes, known, here)
        params = {"known": test.name, "n_known": len(known), "pretraining": seen}
        shared = [] if here else shared_classes(images, test)
        others.append(images)
        about.append((cli.selection(settings), params | evaluation.classes, shared))
    asked = [(images.name, chosen) for images, (chosen, _, _) in zip(others, about, strict=True)]
    if len(set(asked)) < len(asked):
        raise ValueError(f"unknown: data sets must have different names, got {asked}")

    bank, queries = evaluation.features(train), evaluation.features(test)
    features = [evaluation.features(images) for images in others]
    if not evaluation.accelerator.is_main_process:
        return
    probe = linear_probe(*bank, epochs=epochs, seed=seed)
    training: dict[str, Any] = {"learning_rate": probe.learning_rate, "epochs": epochs}
    training["seed"] = seed
    accuracies = closed_set(probe, bank, queries, **training)
    held_out = held_out_scores(bank, k, top_k, **training)
    of_test = evaluation.copies(test, queries[0], bank[0])
    seen_before = torch.cat([bank[0], queries[0]])
    for images, encoded, of_set in zip(others, features, about, strict=True):
        chosen, setting, shared = of_set
        numbers, samples = detect(probe, bank, held_out, queries, encoded, k, top_k, **training)
        frames = [
            evaluation.frame("ood", test, accuracies, **setting),
            evaluation.frame("ood", images, numbers, **setting),
        ]
        rows = pd.concat(frames, ignore_index=True)
        samples["image"] = [*range(len(test)), *range(len(images))]
        lines = name_images(samples, test, images)
        title = f"{encoder.title} on {test.name} against {images.name}"
        figure = plots.open_set({images.name: lines}, rows, title)
        copies = of_test | evaluation.copies(images, encoded[0], seen_before)
        found = {"copies": copies, "shared_classes": shared}
        evaluation.write(rows, figure, [train, test, images], lines, chosen, **found)
        show(f"{title}, pretrained on: {setting['pretraining']}")
        show(f"{results.comparison(rows, SHOWN)}\n")


def main(argv: Sequence[str] | None = None) -> None:
    evaluation, options = cli.evaluation(evaluate, __doc__, argv)
    evaluate(evaluation, **options)


if __name__ == "__main__":
    sys.exit(cli.run(main))
