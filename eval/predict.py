"""Open-set recognition of new images: the class of each, and whether it is of a known class at all.

A linear classifier and a score of frozen features are fitted to the training images of the known
classes. An image is `known` if its score reaches a threshold that the fraction --tpr of held-out
training images reaches. Writes a CSV with a line per image, and a picture of the least and the most
known ones. New images are those of a folder, with or without class folders.

    python eval/predict.py runs/x --data.root NEW
    python eval/predict.py runs/x --data.root NEW --known.name folder --known.root MY_CLASSES
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveInt

from ssl_gradmix import cli
from ssl_gradmix.console import show
from ssl_gradmix.data.datasets import Data, ImageSet, load
from ssl_gradmix.evaluation import plots, results
from ssl_gradmix.evaluation.detection import held_out_scores, paths_of, score_images, threshold
from ssl_gradmix.evaluation.intervals import accuracy_interval
from ssl_gradmix.evaluation.probes import linear_probe

EXAMPLES = 10
"""Images in each row of the picture, at most half of all."""

Distance = Literal["knn_distance", "top_k_cosine", "ncm", "mahalanobis", "rmd"]
Score = Literal[Distance, "vim", "msp", "max_logit", "energy"]


def draw(images: ImageSet, lines: pd.DataFrame, title: str) -> plots.Figure:
    """The least and the most known images, with prediction and score."""
    order, few = np.argsort(lines["score"], kind="stable"), min(EXAMPLES, len(lines) // 2)
    rows = {}
    for name, chosen in (("least known", order[:few]), ("most known", order[::-1][:few])):
        pixels = images.subset(chosen.to_numpy()).pixels(128, progress=False)
        largest = 255 if pixels.dtype == torch.uint8 else 65535
        shown = (pixels / largest).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
        found = lines.iloc[chosen]
        captions = [f"{line.prediction:.14}\n{line.score:.4g}" for line in found.itertuples()]
        rows[name] = (shown, captions, found["decision"] == "unknown")
    return plots.image_rows(rows, title)


def evaluate(
    evaluation: cli.Evaluation,
    *,
    known: Data | None = None,
    score: Score = "top_k_cosine",
    tpr: OpenUnitInterval = 0.95,
    k: PositiveInt = 50,
    top_k: PositiveInt = 3,
    epochs: PositiveInt = 100,
    seed: NonNegativeInt = 0,
) -> None:
    """Predicts all images, writes the predictions, and prints how many are known.

    Args:
        evaluation: The encoder, the new images, and the folder for results.
        known: Images of the known classes, with settings as of --data. The default is the training
            images of the run.
        score: What is compared with the threshold; eval/osr.py compares all scores.
        tpr: Fraction of held-out training images that the threshold accepts.
        k: Neighbor whose distance is the score `knn_distance`, at most the number of images.
        top_k: Neighbors in each class of the score `top_k_cosine`, at most the smallest class.
        epochs: Epochs of the linear classifier.
        seed: Seed of its training.
    """
    encoder, settings = evaluation.encoder, known or evaluation.training_data
    if settings is None:
        raise ValueError(f"known: {encoder.name} is not a run, so --known.name FOLDER is needed")
    train = evaluation.load("train", replace(settings, channels=evaluation.data.channels))
    new = load(evaluation.data, "all")
    bank, queries = evaluation.features(train), evaluation.features(new)
    if not evaluation.accelerator.is_main_process:
        return
    probe = linear_probe(*bank, epochs=epochs, seed=seed)
    training: dict[str, Any] = {"learning_rate": probe.learning_rate, "epochs": epochs}
    training["seed"] = seed
    held_out = held_out_scores(bank, k, top_k, **training)[score]
    chosen = threshold(held_out, tpr)
    values = score_images(probe, bank, queries[0], k, top_k)[score]
    predicted = [train.classes[label] for label in probe.predict(queries[0]).tolist()]
    is_known = torch.from_numpy(values >= chosen)
    decisions = np.where(is_known, "known", "unknown")
    columns = {"path": paths_of(new), "prediction": predicted, "score": values}
    lines = pd.DataFrame({**columns, "decision": decisions})

    numbers = [
        results.number(score, f"threshold_tpr{100 * tpr:g}", chosen, len(held_out)),
        results.number(score, "accepted", accuracy_interval(is_known), len(new)),
    ]
    rows = evaluation.frame("predict", new, numbers, known=train.name, **training)
    title = f"{encoder.title} on {new.name}: {int(is_known.sum()):,} of {len(new):,} images known"
    copies = evaluation.copies(new, queries[0], bank[0])
    figure = draw(new, lines, f"{title}; prediction and {score}, orange: below {chosen:.4g}")
    evaluation.write(rows, figure, [train, new], lines, copies=copies)
    show(f"{title}\n{lines.groupby(['decision', 'prediction']).size().to_string()}")


def main(argv: Sequence[str] | None = None) -> None:
    images = {"name": "folder", "root": None, "classes": None, "open_set": None}
    evaluation, options = cli.evaluation(evaluate, __doc__, argv, images)
    evaluate(evaluation, **options)


if __name__ == "__main__":
    sys.exit(cli.run(main))
