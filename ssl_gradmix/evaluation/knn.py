"""Weighted k-nearest-neighbor classification of frozen features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ssl_gradmix.evaluation.checks import finite_matrix

_SIMILARITIES_AT_ONCE = 2**25  # 128 MiB of float32


@torch.no_grad()
def knn_predict(features: Tensor, bank: Tensor, labels: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Classifies each feature by a vote of its nearest neighbors in a bank of labeled features.

    The k neighbors of largest cosine similarity vote for their class with weight `exp(cosine / temperature)`, as in Wu
    et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018; k=20 and temperature 0.07
    are DINO's. Departures from the usual code (DINO, lightly, solo-learn): `k` is clamped to the bank, the largest
    similarity is subtracted before the exponential so that no temperature overflows, half precision is computed in
    float32, labels may be any integers, and any number of features works.

    Args:
        features: (M, D), of any scale: they are L2-normalized here. Arrays are taken as well as tensors.
        bank: (N, D), moved to the device of `features`.
        labels: (N,) integers, the classes of the bank.
        k: Number of neighbors; `used_k(k, bank)` of them vote.
        temperature: Above 0. The smaller, the more the nearest neighbor decides.

    Returns:
        (M,) predicted labels, in the dtype of `labels`, on the device of `features`. Equal votes go to the smallest
        label; which of several equally near neighbors are among the k is left to `torch.topk`.

    Raises:
        ValueError: If shapes do not fit, the bank is empty, a feature is NaN or infinite, or `k` or `temperature` is
            not positive.
    """
    features = finite_matrix("features", features, may_be_empty=True)
    bank = finite_matrix("bank", bank, may_be_empty=True).to(features)
    labels = torch.as_tensor(labels, device=features.device)
    if features.shape[1] != bank.shape[1]:
        raise ValueError(f"features and bank must share D, got {tuple(features.shape)} and {tuple(bank.shape)}")
    if len(bank) == 0 or labels.shape != (len(bank),):
        raise ValueError(
            f"bank must hold features and a label for each, got {tuple(bank.shape)} and {tuple(labels.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    k = used_k(k, bank)

    features, bank = functional.normalize(features, dim=1), functional.normalize(bank, dim=1)
    classes, class_index = labels.unique(return_inverse=True)
    predictions = [torch.empty(0, dtype=labels.dtype, device=features.device)]
    for chunk in features.split(max(1, _SIMILARITIES_AT_ONCE // len(bank))):
        similarity, neighbors = (chunk @ bank.T).topk(k, dim=1)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(chunk), len(classes)).scatter_add_(1, class_index[neighbors], weights)
        predictions.append(classes[votes.argmax(1)])
    return torch.cat(predictions)


def knn_accuracy(
    features: Tensor, targets: Tensor, bank: Tensor, labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Share of features in [0, 1] whose class `knn_predict` finds.

    Args:
        features: (M, D), and the others, as in `knn_predict`.
        targets: (M,) their true classes.

    Raises:
        ValueError: If there is nothing to classify, and as `knn_predict` does.
    """
    if len(targets) != len(features) or len(targets) == 0:
        raise ValueError(f"targets must be one a feature and at least one, got {len(targets)} for {len(features)}")
    predictions = knn_predict(features, bank, labels, k, temperature)
    return (predictions == torch.as_tensor(targets, device=predictions.device)).double().mean().item()


def used_k(k: int, bank: Tensor) -> int:
    """The number of neighbors that vote: `k`, or the whole bank (N, D) where that is smaller."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return min(k, len(bank))
