"""Open-set and out-of-distribution scores, of frozen features and of a classifier's logits.

Every score is larger for samples that look more known; most papers give the negative. All functions
are pure and return (M,) float64, for the features `test` (M, D) or the `logits` (M, C) of a
classifier of the known classes. Those that compare with the known classes also take training
features `train` (N, D) and their classes `labels` (N,), integers from 0. Arrays and tensors are
accepted, and the work is done on the device of `train`, in float64, block by block, so that no
matrix (M, N) ever exists. Features must be finite.

Singular covariances: directions in which the training features vary by less than 1e-6 of their root
mean square norm, the rounding of float32, are left out (a pseudo-inverse). Constant features,
collapsed encoders and more dimensions than samples are therefore fine, but what a test sample does
in those directions is not seen, except by `vim`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Matrix = np.ndarray | Tensor

_SIMILARITIES_AT_ONCE = 2**24  # 128 MiB of float64
_FEWEST_ROWS = 64  # for fewer, casting the features would take longer than comparing them
_WHOLE_BANK = 2**25  # numbers in training features that are cast to float64 at once, 256 MiB
_ROWS_AT_ONCE = 2**13  # of more features, rows that are cast to float64 at a time
_NEGLIGIBLE = 1e-6  # of the root mean square norm of the features


def all_scores(
    train: Matrix,
    labels: Matrix,
    test: Matrix,
    train_logits: Matrix,
    test_logits: Matrix,
    k: int = 50,
    top_k: int = 3,
) -> dict[str, np.ndarray]:
    """All scores of this module by name; similarities and distances are computed once.

    Args:
        train: (N, D), with `labels` (N,) and `test` (M, D) as in all functions here.
        train_logits: (N, C) logits of a classifier on `train`, for instance of the linear probe.
        test_logits: (M, C) its logits on `test`.
        k: Neighbors of `knn_distance`.
        top_k: Neighbors in each class of `top_k_cosine`.
    """
    bank, classes, queries = _prepared(train, labels, test)
    kth_distance, similarity = _neighbors(bank, classes, queries, k, top_k)
    distance, background = _mahalanobis_distances(bank, classes, queries)
    return {
        "knn_distance": _array(-kth_distance),
        "top_k_cosine": _array(similarity),
        "ncm": ncm(train, labels, test),
        "mahalanobis": _array(-distance),
        "rmd": _array(background - distance),
        "vim": vim(train, labels, test, train_logits, test_logits),
        "msp": msp(test_logits),
        "max_logit": max_logit(test_logits),
        "energy": energy(test_logits),
    }


def parameters_used(
    train: Matrix, labels: Matrix, k: int = 50, top_k: int = 3
) -> dict[str, dict[str, int]]:
    """Parameters that `all_scores` uses on these data, by score, to be recorded with results.

    Returns:
        `k` of `knn_distance`, at most N. `k` of `top_k_cosine`, at most the size of the smallest
        class and the same for all classes, so that sums compare. `dim` of `vim`.
    """
    _, sizes = torch.as_tensor(labels).unique(return_counts=True)
    return {
        "knn_distance": {"k": min(k, len(train))},
        "top_k_cosine": {"k": min(top_k, int(sizes.min()))},
        "vim": {"dim": _vim_dim(*train.shape)},
    }


def knn_distance(train: Matrix, labels: Matrix, test: Matrix, k: int = 50) -> np.ndarray:
    """Negative Euclidean distance to the k-th nearest training feature, all L2-normalized.

    Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022; k=50 is
    theirs for CIFAR-10 (200 for CIFAR-100, 1000 for ImageNet). Classes are ignored. `k` is clamped
    to N.
    """
    distance, _ = _neighbors(*_prepared(train, labels, test), k, 1)
    return _array(-distance)


def top_k_cosine(train: Matrix, labels: Matrix, test: Matrix, k: int = 3) -> np.ndarray:
    """GradMix's score: the largest over classes of the sum of the k largest cosines to the class.

    `k` is clamped to the size of the smallest class. The authors publish it divided by the total of
    all classes, on the projector's output. That is unstable if features of different classes are
    opposite, because the total comes near 0 and may be negative.
    """
    _, similarity = _neighbors(*_prepared(train, labels, test), 1, k)
    return _array(similarity)


def ncm(train: Matrix, labels: Matrix, test: Matrix) -> np.ndarray:
    """Largest cosine to a class mean, that of the L2-normalized features of the class."""
    bank, classes, queries = _prepared(train, labels, test)
    means = _class_means(functional.normalize(bank, dim=1), classes)
    directions = functional.normalize(means, dim=1)
    blocks = [functional.normalize(rows, dim=1) @ directions.T for rows in _rows(queries)]
    return _array(torch.cat([cosines.amax(1) for cosines in blocks]))


def mahalanobis(train: Matrix, labels: Matrix, test: Matrix) -> np.ndarray:
    """Negative squared Mahalanobis distance to the nearest class mean, with a shared covariance.

        -min_c (x - mu_c)^T S^-1 (x - mu_c),    S = 1/N sum_i (x_i - mu_{y_i}) (x_i - mu_{y_i})^T

    Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and
    Adversarial Attacks", NeurIPS 2018, on one layer and without their perturbation of the input.
    No shrinkage.
    """
    distance, _ = _mahalanobis_distances(*_prepared(train, labels, test))
    return _array(-distance)


def rmd(train: Matrix, labels: Matrix, test: Matrix) -> np.ndarray:
    """`mahalanobis` plus the squared distance to one Gaussian fitted to all training features.

    Ren et al., "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection", 2021. With
    a single class both Gaussians are the same, and the score is 0.
    """
    distance, background = _mahalanobis_distances(*_prepared(train, labels, test))
    return _array(background - distance)


def vim(
    train: Matrix, labels: Matrix, test: Matrix, train_logits: Matrix, test_logits: Matrix
) -> np.ndarray:
    """Virtual-logit matching: energy minus the scaled norm outside the principal subspace.

        logsumexp(logits) - alpha |R (x - mu)|,
        alpha = mean(max_c train_logits) / mean |R (x_train - mu)|

    R projects onto the eigenvectors of the training covariance for all but the `dim` largest
    eigenvalues. Wang et al., "ViM: Out-Of-Distribution with Virtual-logit Matching", CVPR 2022.
    `dim` is the authors' 1000 for D of at least 2048 and 512 for D of at least 768, else D/2, and
    at most half of what N samples can span. Departure: mu is the mean of the training features,
    where the paper takes the point at which the logits of a linear classifier vanish. If the
    training features have no residual, alpha is undefined and the score is the energy. Classes are
    ignored.

    Args:
        train_logits: (N, C) logits of a classifier on `train`.
        test_logits: (M, C) its logits on `test`.
    """
    bank, classes, queries = _prepared(train, labels, test)
    one_class = torch.zeros_like(classes)
    mean = _class_means(bank, one_class)
    moment = _second_moment(bank, one_class, mean)
    _, directions = torch.linalg.eigh(moment)  # ascending eigenvalues
    outside = directions[:, : bank.shape[1] - _vim_dim(*bank.shape)]

    def residual(features: Tensor) -> Tensor:
        return torch.cat([((rows - mean) @ outside).norm(dim=1) for rows in _rows(features)])

    of_train = residual(bank).mean()
    rms_norm = (moment.trace() + mean.square().sum()).sqrt()
    if of_train <= _NEGLIGIBLE * rms_norm:
        return energy(test_logits)
    largest = torch.as_tensor(train_logits).double().amax(1)
    alpha = largest.mean().to(bank.device) / of_train
    return energy(test_logits) - _array(alpha * residual(queries))


def msp(logits: Matrix) -> np.ndarray:
    """Largest softmax probability (Hendrycks and Gimpel, ICLR 2017).

    In float64, because confident predictions tie at 1 in float32.
    """
    return _array(torch.as_tensor(logits).double().softmax(1).amax(1))


def max_logit(logits: Matrix) -> np.ndarray:
    """Largest logit (Hendrycks et al., "Scaling OOD Detection for Real-World Settings", 2022)."""
    return _array(torch.as_tensor(logits).amax(1))


def energy(logits: Matrix) -> np.ndarray:
    """Negative free energy, logsumexp (Liu et al., "Energy-based OOD Detection", NeurIPS 2020)."""
    return _array(torch.as_tensor(logits).double().logsumexp(1))


def _neighbors(
    train: Tensor, classes: Tensor, test: Tensor, k: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """Distances (M,) to the k-th nearest of all, and largest sums (M,) of a class's top cosines."""
    if k < 1 or top_k < 1:
        raise ValueError(f"k and top_k must be at least 1, got {k} and {top_k}")
    order = classes.argsort()
    rows_of_block = len(train) if train.numel() <= _WHOLE_BANK else _ROWS_AT_ONCE

    def unit(features: Tensor) -> Tensor:
        return functional.normalize(features.double(), dim=1)

    def blocks() -> Iterator[Tensor]:  # the whole bank in float64 would be twice the features
        for rows in order.split(rows_of_block):
            yield unit(train[rows])

    lengths = torch.cat([block.square().sum(1) for block in blocks()])  # 1, or 0 for zeros
    sizes = classes.bincount().tolist()
    k, top_k = min(k, len(train)), min(top_k, *sizes)
    distances, similarities = [], []
    rows_at_once = max(_SIMILARITIES_AT_ONCE // len(train), _FEWEST_ROWS)
    for rows in map(unit, test.split(rows_at_once)):
        cosines = torch.cat([rows @ block.T for block in blocks()], dim=1)
        nearest = [of_class.topk(top_k).values for of_class in cosines.split(sizes, dim=1)]
        sums = torch.stack([values.sum(1) for values in nearest], dim=1)
        similarities.append(sums.amax(1))
        closeness = 2 * cosines - lengths  # |a - b|^2 = |a|^2 + |b|^2 - 2 a b
        kth = order[closeness.topk(k).indices[:, -1]]
        # From the difference: sqrt(2 - 2 cosine) loses half its digits for near duplicates.
        distances.append((rows - unit(train[kth])).norm(dim=1))
    return torch.cat(distances), torch.cat(similarities)


def _mahalanobis_distances(train: Tensor, classes: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances (M,) to the nearest class mean, within classes, and to the overall mean."""
    means = _class_means(train, classes)
    fractions = classes.bincount().double() / len(classes)
    mean = fractions @ means
    within = _second_moment(train, classes, means)
    between = (fractions[:, None] * (means - mean)).T @ (means - mean)
    total = within + between
    rms_norm = (total.trace() + mean.square().sum()).sqrt()

    def squared_distances(centers: Tensor, covariance: Tensor) -> Tensor:
        variances, directions = torch.linalg.eigh(covariance)
        kept = variances > (_NEGLIGIBLE * rms_norm) ** 2
        whiten = directions[:, kept] / variances[kept].sqrt()
        whitened = (centers - mean) @ whiten
        blocks = [torch.cdist((rows - mean) @ whiten, whitened) for rows in _rows(test)]
        return torch.cat([distances.amin(1).square() for distances in blocks])

    return squared_distances(means, within), squared_distances(mean[None], total)


def _class_means(features: Tensor, classes: Tensor) -> Tensor:
    counts = classes.bincount()
    sums = features.new_zeros(len(counts), features.shape[1], dtype=torch.float64)
    for rows, of_rows in zip(_rows(features), classes.split(_ROWS_AT_ONCE), strict=True):
        sums.index_add_(0, of_rows, rows)
    return sums / counts[:, None]


def _second_moment(features: Tensor, classes: Tensor, centers: Tensor) -> Tensor:
    """Mean outer product (D, D) of the features minus the center of their class."""
    n_features = features.shape[1]
    moment = features.new_zeros(n_features, n_features, dtype=torch.float64)
    for rows, of_rows in zip(_rows(features), classes.split(_ROWS_AT_ONCE), strict=True):
        centered = rows - centers[of_rows]
        moment.addmm_(centered.T, centered)
    return moment / len(features)


def _rows(features: Tensor) -> Iterator[Tensor]:
    """Yields blocks of rows in float64."""
    for rows in features.split(_ROWS_AT_ONCE):
        yield rows.double()


def _vim_dim(n_samples: int, n_features: int) -> int:
    rule = 1000 if n_features >= 2048 else 512 if n_features >= 768 else n_features // 2
    return min(rule, (n_samples - 1) // 2)


def _prepared(train: Matrix, labels: Matrix, test: Matrix) -> tuple[Tensor, Tensor, Tensor]:
    """Features in float32 or float64 on one device, and classes numbered from 0 in order."""
    bank = torch.as_tensor(train)
    if bank.dtype != torch.float64:
        bank = bank.float()
    queries = torch.as_tensor(test).to(bank)
    classes = torch.as_tensor(labels, device=bank.device)
    if classes.shape != bank.shape[:1] or classes.min() < 0:
        raise ValueError(f"labels must be {len(bank)} known classes from 0, got {classes}")
    return bank, classes.unique(return_inverse=True)[1], queries


def _array(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()
