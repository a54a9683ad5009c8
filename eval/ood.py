"""Out-of-distribution detection: how well scores on frozen features tell other data sets apart.

Classifiers and scores see the training images of one data set. Its test images are known, those of
each other data set are unknown: its test split, or all images of a folder without train/ and test/.
Each unknown data set has its own files of results. Unknown classes of the same data set: eval/osr.py.

    python eval/ood.py runs/x --unknown.name svhn --unknown.root data
    python eval/ood.py runs/x --unknown '[{name: svhn, root: data}, {name: folder, root: textures}]'
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from jsonargparse.typing import NonNegativeInt, PositiveInt

from ssl_gradmix import cli
from ssl_gradmix.data import open_set
from ssl_gradmix.data.datasets import Data, ImageSet
from ssl_gradmix.evaluation import plots, results
from ssl_gradmix.evaluation.detection import SHOWN, closed_set, detect
from ssl_gradmix.evaluation.probes import linear_probe
from ssl_gradmix.files import write_whole


def shared_classes(unknown: Data, images: ImageSet, data: Data) -> list[int]:
    """Labels of the unknown images, if they are of the same data set as the known ones, else none."""
    folders = [Path(each.root or "").expanduser().resolve() for each in (unknown, data)]
    same_folder = unknown.name != "folder" or folders[0] == folders[1]
    same = unknown.name == data.name and same_folder
    return np.unique(images.labels).tolist() if same else []


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
        here = shared_classes(settings, images, data)
        if set(here) & set(known):
            raise ValueError(f"unknown: {images.name} has images of the known classes")
        seen = open_set.pretraining(encoder.config, data, test.classes, known, here)
        others.append(images)
        params.append({"known": test.name, "n_known": len(known), "pretraining": seen})

    bank, of_test = evaluation.features(train), evaluation.features(test)
    of_others = [evaluation.features(images) for images in others]
    if not evaluation.accelerator.is_main_process:
        return

    probe = linear_probe(*bank, epochs=epochs, seed=seed)
    training = {"learning_rate": probe.learning_rate, "epochs": epochs, "seed": seed}
    accuracies = closed_set(probe, bank, of_test, **training)
    for images, features, setting in zip(others, of_others, params, strict=True):
        numbers, samples = detect(probe, bank, of_test, features, k, top_k, **training)
        setting |= evaluation.classes
        of_encoder = (encoder.name, encoder.feature, None)
        known_rows = results.frame(accuracies, "ood", test.name, *of_encoder, **setting)
        rows = results.frame(numbers, "ood", images.name, *of_encoder, **setting)

        path = evaluation.path("ood", images)
        both = pd.concat([known_rows, rows], ignore_index=True)
        results.write(path, both, evaluation.about(train, test, images))
        samples.insert(0, "image", [*range(len(test)), *range(len(images))])
        write_whole(path.with_suffix(".csv"), partial(samples.to_csv, index=False))
        title = f"{encoder.title} on {test.name} against {images.name}"
        title = f"{title}, pretrained on: {setting['pretraining']}"
        plots.write(path.with_suffix(".png"), plots.open_set({images.name: samples}, rows, title))

        print(title)
        print(f"\n{results.comparison(known_rows, {'accuracy': 'closed-set accuracy'})}")
        print(f"\n{results.comparison(rows[rows['metric'].isin(SHOWN)], SHOWN)}")
        print(f"Written, with scores of each image in {path.with_suffix('.csv').name}: {path}\n")


def main(argv: Sequence[str] | None = None) -> None:
    evaluation, options = cli.evaluation(evaluate, __doc__, argv)
    evaluate(evaluation, **options)


if __name__ == "__main__":
    sys.exit(cli.run(main))
