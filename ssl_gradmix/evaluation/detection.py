"""Telling images of known classes from unknown ones: what `eval/osr.py` and `eval/ood.py` share."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from ssl_gradmix.evaluation.intervals import accuracy_interval, bootstrap_intervals
from ssl_gradmix.evaluation.knn import knn_predict, used_k
from ssl_gradmix.evaluation.metrics import all_metrics, threshold_at_tpr
from ssl_gradmix.evaluation.probes import LinearProbe
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


def detect(
    probe: LinearProbe,
    train: Labeled,
    known: Labeled,
    unknown: Labeled,
    k: int = 50,
    top_k: int = 3,
    **training: object,
) -> tuple[list[Number], pd.DataFrame]:
    """Tells known from unknown test images by every score of `scores.all_scores`.

    Args:
        probe: Trained on `train`.
        train: Training images of the known classes.
        known: Test images of the known classes.
        unknown: Test images of other classes; their labels are recorded only.
        k: Neighbor of the score `knn_distance`.
        top_k: Neighbors in each class of the score `top_k_cosine`.
        **training: Recorded with the numbers that depend on the probe.

    Returns:
        The numbers of `metrics.all_metrics` with bootstrap 95% intervals, and `threshold_tpr95`,
        which 95% of the known images reach. And a table with one line per image, the known ones
        first: `is_known`, `correct` (whether the probe classifies a known image correctly),
        `label`, and each score.
    """
    features, labels = (torch.cat(parts) for parts in zip(known, unknown, strict=True))
    logits = probe.logits(train[0]), probe.logits(features)
    scores = all_scores(*train, features, *logits, k=k, top_k=top_k)
    used = parameters_used(*train, k, top_k)
    is_known = (torch.arange(len(labels)) < len(known[1])).numpy()
    correct = is_known & (probe.predict(features) == labels).cpu().numpy()
    numbers = []
    for name, values in scores.items():
        params = {**used.get(name, {}), **(training if name in ON_LOGITS else {})}
        found = bootstrap_intervals(all_metrics, values, is_known, correct, strata=is_known)
        for metric, interval in found.items():
            how = {**params, **training} if metric == "oscr" else params
            numbers.append(number(name, metric, interval, len(values), **how))
        threshold = threshold_at_tpr(values, is_known)
        numbers.append(number(name, "threshold_tpr95", threshold, len(known[1]), **params))
    shown = {"is_known": is_known, "correct": correct, "label": labels.cpu().numpy()}
    return numbers, pd.DataFrame({**shown, **scores})
