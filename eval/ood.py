"""Out-of-distribution detection: how well scores on frozen features tell other data sets apart.

Classifiers and scores see the training images of one data set, and its test images are known.
The images of each other data set are unknown: its test split, or all images of a folder without
train/ and test/. Each unknown data set has its own files of results. For unknown classes of the
same data set, see eval/osr.py.

    python eval/ood.py runs/x --unknown.name svhn --unknown.root data
    python eval/ood.py runs/x --unknown '[{name: svhn, root: data}, {name: folder, root: textures}]'
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jsonargparse.typing import NonNegativeInt, PositiveInt

from ssl_gradmix import cli
from ssl_gradmix.data import open_set
from ssl_gradmix.data.datasets import Data
from ssl_gradmix.evaluation import plots, results
from ssl_gradmix.evaluation.detection import SHOWN, closed_set, detect
from ssl_gradmix.evaluation.probes import linear_probe


def same_data(one: Data, other: Data) -> bool:
    """Whether settings are of the same data set, whatever classes they select."""
    if one.name != "folder" or other.name != "folder":
        return one.name == other.name
    return Path(one.root or "").resolve() == Path(other.root or "").resolve()


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
    others, params = [], []
    for settings in unknown:
        images = open_set.load_known(settings, "all")
        here = np.unique(images.labels).tolist() if same_data(settings, data) else []
        if set(here) & set(known):
            raise ValueError(f"unknown: {images.name} has images of the known classes")
        seen = open_set.pretraining(encoder.config, data, test.classes, known, here)
        others.append(images)
        params.append({"known": test.name, "n_known": len(known), "pretraining": seen})

    bank, queries = evaluation.features(train), evaluation.features(test)
    features = [evaluation.features(images) for images in others]
    if not evaluation.accelerator.is_main_process:
        return
    probe = linear_probe(*bank, epochs=epochs, seed=seed)
    training = {"learning_rate": probe.learning_rate, "epochs": epochs, "seed": seed}
    accuracies = closed_set(probe, bank, queries, **training)
    for images, encoded, setting in zip(others, features, params, strict=True):
        numbers, samples = detect(probe, bank, queries, encoded, k, top_k, **training)
        setting |= evaluation.classes
        frames = [
            evaluation.frame("ood", test, accuracies, **setting),
            evaluation.frame("ood", images, numbers, **setting),
        ]
        rows = pd.concat(frames, ignore_index=True)
        samples.insert(0, "image", [*range(len(test)), *range(len(images))])
        title = f"{encoder.title} on {test.name} against {images.name}"
        figure = plots.open_set({images.name: samples}, rows, title)
        evaluation.write(rows, figure, [train, test, images], samples)
        print(f"{title}, pretrained on: {setting['pretraining']}")
        print(f"{results.comparison(rows, SHOWN)}\n")


def main(argv: Sequence[str] | None = None) -> None:
    evaluation, options = cli.evaluation(evaluate, __doc__, argv)
    evaluate(evaluation, **options)


if __name__ == "__main__":
    sys.exit(cli.run(main))
