"""Weighted k-nearest-neighbor classification of frozen features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_SIMILARITIES_AT_ONCE = 2**25  # 128 MiB of float32


@torch.no_grad()
def knn_predict(
    features: Tensor, bank: Tensor, labels: Tensor, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Classifies each feature by a vote of its nearest neighbors in a bank of labeled features.

    The k neighbors of largest cosine similarity vote for their class with weight
    `exp(cosine / temperature)`, as in Wu et al., "Unsupervised Feature Learning via Non-Parametric
    Instance Discrimination", 2018; k=20 and temperature 0.07 are DINO's. Departures from the usual
    code (DINO, lightly, solo-learn): k is clamped to the bank, the largest similarity is subtracted
    before the exponential so that no temperature overflows, half precision is computed in float32,
    and labels may be any integers.

    Args:
        features: (M, D), of any scale: they are L2-normalized here.
        bank: (N, D), moved to the device of `features`.
        labels: (N,) integers, the classes of the bank.
        k: Number of neighbors; `used_k(k, bank)` of them vote.
        temperature: Above 0. The smaller, the more the nearest neighbor decides.

    Returns:
        (M,) predicted labels on the device of `features`. Ties go to the smallest label.

    Raises:
        ValueError: `labels` is not as long as `bank`, or `k` or `temperature` is not positive.
    """
    if k < 1 or temperature <= 0:
        raise ValueError(f"k and temperature must be above 0, got {k} and {temperature}")
    if len(labels) != len(bank):
        raise ValueError(f"labels must be one a bank feature, got {len(labels)} for {len(bank)}")
    if features.dtype != torch.float64:
        features = features.float()
    queries = functional.normalize(features, dim=1)
    keys = functional.normalize(bank.to(features), dim=1)
    classes, class_index = labels.to(features.device).unique(return_inverse=True)
    k = used_k(k, bank)
    predictions = [classes[:0]]
    for chunk in queries.split(max(1, _SIMILARITIES_AT_ONCE // len(bank))):
        similarity, neighbors = (chunk @ keys.T).topk(k, dim=1)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(chunk), len(classes))
        votes.scatter_add_(1, class_index[neighbors], weights)
        predictions.append(classes[votes.argmax(1)])
    return torch.cat(predictions)


def knn_accuracy(
    features: Tensor,
    targets: Tensor,
    bank: Tensor,
    labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Fraction of features (M, D) whose class in `targets` (M,) is predicted by `knn_predict`."""
    predictions = knn_predict(features, bank, labels, k, temperature)
    return (predictions == targets.to(predictions.device)).double().mean().item()


def used_k(k: int, bank: Tensor) -> int:
    """Number of neighbors that vote: `k`, or all of the bank (N, D) if it is smaller."""
    return min(k, len(bank))
