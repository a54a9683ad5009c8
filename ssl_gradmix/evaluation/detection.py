"""Telling images of known classes from unknown ones: what `eval/{osr,ood,predict}.py` share."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.evaluation.intervals import accuracy_interval, bootstrap_intervals
from ssl_gradmix.evaluation.knn import knn_predict, used_k
from ssl_gradmix.evaluation.metrics import all_metrics, threshold_at_tpr
from ssl_gradmix.evaluation.probes import LinearProbe, held_out_parts, linear_probe
from ssl_gradmix.evaluation.results import Number, number
from ssl_gradmix.evaluation.scores import all_scores, parameters_used

Labeled = tuple[Tensor, Tensor]
"""Features (N, D) and labels (N,)."""

ON_LOGITS = ("vim", "msp", "max_logit", "energy")
"""Scores that depend on the linear probe."""

SHOWN = {
    "accuracy": "accuracy",
    "auroc": "AUROC",
    "fpr95_id_pos": "FPR95, known positive",
    "oscr": "OSCR",
}
"""Metrics that the evaluations print, with their titles."""


def closed_set(
    probe: LinearProbe,
    train: Labeled,
    known: Labeled,
    k: int = 20,
    temperature: float = 0.07,
    **training: object,
) -> list[Number]:
    """Accuracy of a linear probe and of weighted kNN on known test images.

    Args:
        probe: Trained on `train`.
        train: Training images of the known classes.
        known: Test images of the known classes.
        k: Number of neighbors that vote.
        temperature: Temperature of their weights.
        **training: Recorded with the numbers that depend on the probe.

    Returns:
        Accuracies with Wilson 95% intervals.
    """
    features, labels = known
    linear = probe.predict(features) == labels
    nearest = knn_predict(features, *train, k, temperature) == labels
    votes = {"k": used_k(k, train[0]), "temperature": temperature}
    return [
        number("linear", "accuracy", accuracy_interval(linear), len(labels), **training),
        number("knn", "accuracy", accuracy_interval(nearest), len(labels), **votes),
    ]


def score_images(
    probe: LinearProbe, train: Labeled, features: Tensor, k: int = 50, top_k: int = 3
) -> dict[str, np.ndarray]:
    """All scores (M,) of features (M, D) by name, given a probe and what it was trained on."""
    logits = probe.logits(train[0]), probe.logits(features)
    return all_scores(*train, features, *logits, k=k, top_k=top_k)


def held_out_scores(
    train: Labeled, k: int, top_k: int, learning_rate: float, epochs: int, seed: int
) -> dict[str, np.ndarray]:
    """Scores of training images that were left out of classifier and bank.

    They are those of `probes.held_out_parts`: a tenth of each class, or, until 500 images have
    scores, further tenths in turn, each scored by what the other nine give. Such scores are what
    new images of the known classes get, so that thresholds can be chosen on them and test images
    stay unseen. The encoder has seen them, however: if it was trained on their labels for long, it
    tells them better from others than new images. Classes should have some images more than
    `top_k`: of fewer, `top_k_cosine` is too small here.

    Args:
        train: Training images of the known classes.
        k: Neighbor of the score `knn_distance`.
        top_k: Neighbors in each class of the score `top_k_cosine`.
        learning_rate: Learning rate of the linear classifiers.
        epochs: Their epochs.
        seed: Seed of the parts and of the training.
    """
    features, labels = train
    parts = []
    for rest, held_out in held_out_parts(labels, seed=seed):
        bank, queries = (features[rest], labels[rest]), features[held_out]
        probe = linear_probe(*bank, [learning_rate], epochs, seed=seed)
        # A smaller bank is sparser: there, as near a neighbor has a smaller number.
        of_part = max(1, round(min(k, len(labels)) * len(rest) / len(labels)))
        parts.append(score_images(probe, bank, queries, of_part, top_k))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def threshold(held_out: np.ndarray, tpr: float = 0.95) -> float:
    """Largest threshold that accepts at least the fraction `tpr` of `held_out_scores`."""
    return threshold_at_tpr(held_out, np.ones(len(held_out), bool), tpr)


def detect(
    probe: LinearProbe,
    train: Labeled,
    held_out: dict[str, np.ndarray],
    known: Labeled,
    unknown: Labeled,
    k: int = 50,
    top_k: int = 3,
    **training: object,
) -> tuple[list[Number], pd.DataFrame]:
    """Scores known and unknown images and measures how well each score tells them apart.

    Args:
        probe: Trained on `train`.
        train: Training images of the known classes.
        held_out: Scores of some of them, see `held_out_scores`.
        known: Test images of the known classes.
        unknown: Images of unknown classes. Their labels are not used.
        k: Neighbor of the score `knn_distance`.
        top_k: Neighbors in each class of the score `top_k_cosine`.
        **training: Recorded with the numbers that depend on the probe.

    Returns:
        The numbers of `metrics.all_metrics` with bootstrap 95% intervals, and `threshold_tpr95`,
        which 95% of the held-out training images reach. And a table with one line per image, the
        known ones first: `label`, `known`, `prediction` (the label that the probe predicts), and
        each score.
    """
    features, labels = (torch.cat(parts) for parts in zip(known, unknown, strict=True))
    scores = score_images(probe, train, features, k, top_k)
    used = parameters_used(*train, k, top_k)
    is_known = (torch.arange(len(labels)) < len(known[1])).numpy()
    prediction = probe.predict(features)
    correct = is_known & (prediction == labels).cpu().numpy()
    numbers = []
    for name, values in scores.items():
        params = {**used.get(name, {}), **(training if name in ON_LOGITS else {})}
        found = bootstrap_intervals(all_metrics, values, is_known, correct, strata=is_known)
        for metric, interval in found.items():
            how = {**params, **training} if metric == "oscr" else params
            numbers.append(number(name, metric, interval, len(values), **how))
        params |= {"on": "held-out training images"}
        chosen, n = threshold(held_out[name]), len(held_out[name])
        numbers.append(number(name, "threshold_tpr95", chosen, n, **params))
    columns = {"label": labels.cpu().numpy(), "known": is_known}
    return numbers, pd.DataFrame({**columns, "prediction": prediction.cpu().numpy(), **scores})


def name_images(samples: pd.DataFrame, known: ImageSet, unknown: ImageSet) -> pd.DataFrame:
    """The table of `detect` for people: paths, and names of classes instead of labels.

    Args:
        samples: The table, with a further column `image`, the position in `known` or `unknown`.
        known: Images among which the known ones are.
        unknown: Images among which the unknown ones are.
    """
    paths: list[str] = []
    labels: list[str] = []
    for images, is_known in ((known, True), (unknown, False)):
        of_all, side = paths_of(images), samples[samples["known"] == is_known]
        paths += [of_all[i] for i in side["image"]]
        labels += [images.classes[label] if label >= 0 else "" for label in side["label"]]
    predicted = [known.classes[label] for label in samples["prediction"]]
    named = samples.drop(columns="image").assign(label=labels, prediction=predicted)
    named.insert(0, "path", paths)
    return named


def paths_of(images: ImageSet) -> list[str]:
    """The absolute path of each image, or `<data set>/<split>/<position>` of one in memory."""
    if isinstance(images.images, np.ndarray):
        return [f"{images.name}/{i}" for i in range(len(images))]
    return [str(path.absolute()) for path in images.images]
