"""How known a sample looks: open-set and out-of-distribution scores on frozen features and on a classifier's logits.

Every score is larger the more a sample looks known; most papers give the negative. The functions are pure. All return
(M,) float64, of the features `test` (M, D) or the `logits` (M, C) of a classifier of the known classes. Those that
compare with the known classes take their training images too: the features `train` (N, D), and the classes `labels`
(N,), integers from 0. Arrays and tensors are taken; the work is done on the device of `train`.

All is computed in float64, similarities block by block, so that no matrix (M, N) ever exists.

Singular covariances: directions in which the training features vary by less than 1e-6 of their root mean square norm,
which is the rounding of float32, are left out (a pseudo-inverse). So constant features, a collapsed encoder and more
dimensions than samples are no trouble, but what a test sample does in those directions goes unseen. `vim` sees it.

All raise ValueError where shapes do not fit, samples are missing, values are not finite, or a class is negative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ssl_gradmix.evaluation.checks import Matrix, finite_matrix

_SIMILARITIES_AT_ONCE = 2**24  # 64 MiB of float32
_ROWS_AT_ONCE = 2**13  # of features, where they are cast to float64
_NEGLIGIBLE = 1e-6  # of the features' root mean square norm


def all_scores(
    train: Matrix,
    labels: Matrix,
    test: Matrix,
    train_logits: Matrix,
    test_logits: Matrix,
    k: int = 50,
    top_k: int = 3,
) -> dict[str, np.ndarray]:
    """Every score of this module by name; the neighbors come from one pass over the similarities.

    Args:
        train: (N, D), with `labels` (N,) and `test` (M, D) as in all functions here.
        train_logits: (N, C) logits of a classifier of the known classes on `train`, for instance the linear probe.
        test_logits: (M, C) its logits on `test`.
        k: Neighbors of `knn_distance`.
        top_k: Neighbors in each class of `top_k_cosine`.

    Returns:
        (M,) scores under the names of the functions, and `ncm_euclidean`. `parameters_used` says what
        `k`, `top_k` and the dimension of `vim` came to.
    """
    train, classes, test = _checked(train, labels, test)
    used = parameters_used(train, labels, k, top_k)
    kth_distance, similarity = _neighbors(train, classes, test, used["knn_distance"]["k"], used["top_k_cosine"]["k"])
    distance, background = _mahalanobis_distances(train, classes, test)
    return {
        "knn_distance": _as_array(-kth_distance),
        "top_k_cosine": _as_array(similarity.amax(1)),
        "ncm": ncm(train, labels, test),
        "ncm_euclidean": ncm(train, labels, test, metric="euclidean"),
        "mahalanobis": _as_array(-distance),
        "rmd": _as_array(background - distance),
        "feature_norm": feature_norm(test),
        "vim": vim(train, labels, test, train_logits, test_logits),
        "msp": msp(test_logits),
        "max_logit": max_logit(test_logits),
        "energy": energy(test_logits),
    }


def parameters_used(train: Matrix, labels: Matrix, k: int = 50, top_k: int = 3) -> dict[str, dict[str, int]]:
    """What the parameters of `all_scores` come to on these data, by score, for the record of a result.

    Returns:
        `k` of `knn_distance`: at most N. `k` of `top_k_cosine`: at most the size of the smallest class, the same for
        all classes, so that sums compare. `dim` of `vim`: see there.

    Raises:
        ValueError: If `k` or `top_k` is below 1.
    """
    for name, value in (("k", k), ("top_k", top_k)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    smallest_class = torch.as_tensor(labels).unique(return_counts=True)[1].min().item()
    return {
        "knn_distance": {"k": min(k, len(train))},
        "top_k_cosine": {"k": min(top_k, smallest_class)},
        "vim": {"dim": _vim_dim(*train.shape)},
    }


def knn_distance(train: Matrix, labels: Matrix, test: Matrix, k: int = 50) -> np.ndarray:
    """Negative Euclidean distance to the k-th nearest training feature, all features L2-normalized.

    Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022; `k=50` is theirs for CIFAR-10
    (200 for CIFAR-100, 1000 for ImageNet). The classes play no part.

    Args:
        k: Which neighbor, clamped to N.
    """
    train, classes, test = _checked(train, labels, test)
    k = parameters_used(train, labels, k=k)["knn_distance"]["k"]
    return _as_array(-_neighbors(train, classes, test, k, 1)[0])


def top_k_cosine(train: Matrix, labels: Matrix, test: Matrix, k: int = 3, divided: bool = False) -> np.ndarray:
    """GradMix's score: the largest over classes c of S_c, the sum of the k largest cosines to training features of c.

    `divided=True` is what its authors publish, `max_c S_c / sum_c S_c` on the projector's output. It is unstable: where
    features of different classes are opposite, as in a collapsed simplex, the denominator comes near 0 and may be
    negative. Hence the undivided sum is the default. A denominator of 0 gives 0.

    Args:
        k: Neighbors in each class, clamped to the size of the smallest class.
        divided: Whether S_c is divided by its sum over classes.
    """
    train, classes, test = _checked(train, labels, test)
    k = parameters_used(train, labels, top_k=k)["top_k_cosine"]["k"]
    similarity = _neighbors(train, classes, test, 1, k)[1]
    if divided:
        total = similarity.sum(1, keepdim=True)
        similarity = torch.where(total == 0, 0, similarity / total)
    return _as_array(similarity.amax(1))


def ncm(train: Matrix, labels: Matrix, test: Matrix, metric: Literal["cosine", "euclidean"] = "cosine") -> np.ndarray:
    """Similarity to the nearest class mean: the largest cosine, or the smallest Euclidean distance negated.

    For the cosine, a class's mean is that of its L2-normalized features, so that each sample has the same say.

    Args:
        metric: `"cosine"` or `"euclidean"`.
    """
    train, classes, test = _checked(train, labels, test)
    if metric == "cosine":
        means = functional.normalize(_class_means(functional.normalize(train, dim=1), classes), dim=1)
        return _as_array(_by_rows(test, lambda rows: (functional.normalize(rows, dim=1) @ means.T).amax(1)))
    if metric == "euclidean":
        means = _class_means(train, classes)
        return _as_array(_by_rows(test, lambda rows: -torch.cdist(rows, means).amin(1)))
    raise ValueError(f"metric must be 'cosine' or 'euclidean', got {metric!r}")


def mahalanobis(train: Matrix, labels: Matrix, test: Matrix) -> np.ndarray:
    """Negative squared Mahalanobis distance to the nearest class mean, one covariance for all classes.

        -min_c (x - mu_c)^T S^-1 (x - mu_c),    S = 1/N sum_i (x_i - mu_{y_i}) (x_i - mu_{y_i})^T

    Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks", NeurIPS
    2018, on one layer and without their perturbation of the input. No shrinkage; singular S: see the module.
    """
    distance, _ = _mahalanobis_distances(*_checked(train, labels, test))
    return _as_array(-distance)


def rmd(train: Matrix, labels: Matrix, test: Matrix) -> np.ndarray:
    """`mahalanobis` plus the squared Mahalanobis distance to one Gaussian fitted to all training features together.

    Ren et al., "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection", 2021. With a single class the
    two Gaussians are the same, and the score is 0 throughout.
    """
    distance, background = _mahalanobis_distances(*_checked(train, labels, test))
    return _as_array(background - distance)


def feature_norm(test: Matrix) -> np.ndarray:
    """Euclidean norm of the features: encoders tend to answer unknown images weakly (Dhamija et al., NeurIPS 2018).

    Constant, and so of no use, where the features are already L2-normalized.
    """
    return _as_array(_by_rows(finite_matrix("test", test), lambda rows: rows.norm(dim=1)))


def vim(
    train: Matrix,
    labels: Matrix,
    test: Matrix,
    train_logits: Matrix,
    test_logits: Matrix,
    dim: int | None = None,
    origin: Matrix | None = None,
) -> np.ndarray:
    """Virtual-logit matching: energy of the logits minus the scaled norm of what the principal subspace leaves over.

        logsumexp(logits) - alpha |R (x - origin)|,    alpha = mean(max_c train_logits) / mean |R (x_train - origin)|

    where R projects onto the eigenvectors of the training features' second moment about the origin that belong to all
    but the `dim` largest eigenvalues. Wang et al., "ViM: Out-Of-Distribution with Virtual-logit Matching", CVPR 2022.
    Departures: the origin is the mean of the training features, where the paper takes the point `-pinv(W) b` at which
    the logits of a classifier (W, b) on these very features vanish; give it as `origin` for the paper's score. Where
    the training features leave nothing over, alpha is undefined, and the score is the energy.

    Args:
        train: (N, D), with `labels` (N,), which play no part, and `test` (M, D).
        train_logits: (N, C) logits of a classifier on `train`.
        test_logits: (M, C) its logits on `test`.
        dim: Dimension of the principal subspace, below D. None takes the authors' rule, 1000 for D of at least 2048,
            512 for D of at least 768, else half of D, and at most half of what N samples can span.
        origin: (D,) point in feature space.
    """
    train, _, test = _checked(train, labels, test)
    train_logits, test_logits = finite_matrix("train_logits", train_logits), finite_matrix("test_logits", test_logits)
    if len(train_logits) != len(train) or len(test_logits) != len(test):
        raise ValueError(
            "train_logits and test_logits must have a row for each feature, "
            f"got {len(train_logits)} for {len(train)} and {len(test_logits)} for {len(test)}"
        )
    dim = _vim_dim(*train.shape) if dim is None else dim
    if not 0 <= dim < train.shape[1]:
        raise ValueError(f"dim must be at least 0 and below the {train.shape[1]} features, got {dim}")
    zero = train.new_zeros(len(train), dtype=torch.int64)  # all of one class
    if origin is None:
        origin = _class_means(train, zero)[0]
    else:
        origin = torch.as_tensor(origin, device=train.device).double()
        if origin.shape != train.shape[1:] or not origin.isfinite().all():
            raise ValueError(f"origin must be {train.shape[1]} finite values, got {origin.tolist()}")
    moment = _second_moment(train, zero, origin[None])
    _, directions = torch.linalg.eigh(moment)  # eigenvalues rise
    residual = directions[:, : train.shape[1] - dim]

    def left_over(features: Tensor) -> Tensor:
        return _by_rows(features, lambda rows: ((rows - origin) @ residual).norm(dim=1))

    train_left_over = left_over(train).mean()
    rms_norm = (moment.trace() + origin.square().sum()).sqrt()
    alpha = train_logits.double().amax(1).mean().to(train.device) / train_left_over
    if train_left_over <= _NEGLIGIBLE * rms_norm:
        alpha = 0.0
    return energy(test_logits) - _as_array(alpha * left_over(test))


def msp(logits: Matrix) -> np.ndarray:
    """Largest softmax probability (Hendrycks and Gimpel, ICLR 2017), in float64: in float32 confident ones tie at 1."""
    return _as_array(finite_matrix("logits", logits).double().softmax(1).amax(1))


def max_logit(logits: Matrix) -> np.ndarray:
    """Largest logit (Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings", ICML 2022)."""
    return _as_array(finite_matrix("logits", logits).amax(1))


def energy(logits: Matrix, temperature: float = 1.0) -> np.ndarray:
    """Negative free energy, `T logsumexp(logits / T)` (Liu et al., "Energy-based OOD Detection", NeurIPS 2020).

    Args:
        logits: (M, C).
        temperature: T, above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return _as_array(temperature * (finite_matrix("logits", logits).double() / temperature).logsumexp(1))


def _neighbors(train: Tensor, classes: Tensor, test: Tensor, k: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Distance (M,) to the k-th nearest of all, and for each class (M, C) the sum of its `top_k` largest cosines."""
    bank = functional.normalize(train.double(), dim=1)[classes.argsort()]
    lengths = bank.square().sum(1)  # 1, but 0 where a feature is 0
    sizes = classes.bincount().tolist()
    distances, similarities = [], []
    for rows in functional.normalize(test.double(), dim=1).split(max(1, _SIMILARITIES_AT_ONCE // len(bank))):
        cosines = rows @ bank.T
        of_classes = cosines.split(sizes, dim=1)
        similarities.append(torch.stack([block.topk(top_k).values.sum(1) for block in of_classes], dim=1))
        kth = (2 * cosines - lengths).topk(k).indices[:, -1]  # |a - b|^2 = |a|^2 + |b|^2 - 2 a b
        # From the difference: sqrt(2 - 2 cosine) has lost half its digits for a near duplicate.
        distances.append((rows - bank[kth]).norm(dim=1))
    return torch.cat(distances), torch.cat(similarities)


def _mahalanobis_distances(train: Tensor, classes: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances (M,) to the nearest class mean, within classes, and to the mean of all, over all."""
    means = _class_means(train, classes)
    shares = classes.bincount().double() / len(classes)
    mean = shares @ means
    within = _second_moment(train, classes, means)
    total = within + (shares[:, None] * (means - mean)).T @ (means - mean)
    rms_norm = (total.trace() + mean.square().sum()).sqrt()

    def squared_distances(centers: Tensor, covariance: Tensor) -> Tensor:
        variances, directions = torch.linalg.eigh(covariance)
        kept = variances > (_NEGLIGIBLE * rms_norm) ** 2
        whiten = directions[:, kept] / variances[kept].sqrt()
        whitened = (centers - mean) @ whiten
        return _by_rows(test, lambda rows: torch.cdist((rows - mean) @ whiten, whitened).amin(1).square())

    return squared_distances(means, within), squared_distances(mean[None], total)


def _class_means(features: Tensor, classes: Tensor) -> Tensor:
    counts = classes.bincount()
    sums = features.new_zeros(len(counts), features.shape[1], dtype=torch.float64)
    for rows, row_classes in zip(features.split(_ROWS_AT_ONCE), classes.split(_ROWS_AT_ONCE), strict=True):
        sums.index_add_(0, row_classes, rows.double())
    return sums / counts[:, None]


def _second_moment(features: Tensor, classes: Tensor, centers: Tensor) -> Tensor:
    """Mean outer product (D, D) of the features less the center of their class."""
    moment = features.new_zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for rows, row_classes in zip(features.split(_ROWS_AT_ONCE), classes.split(_ROWS_AT_ONCE), strict=True):
        centered = rows.double() - centers[row_classes]
        moment.addmm_(centered.T, centered)
    return moment / len(features)


def _by_rows(features: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of rows, applied to blocks of them in float64."""
    return torch.cat([function(rows.double()) for rows in features.split(_ROWS_AT_ONCE)])


def _vim_dim(n_samples: int, n_features: int) -> int:
    rule = 1000 if n_features >= 2048 else 512 if n_features >= 768 else n_features // 2
    return min(rule, (n_samples - 1) // 2)


def _checked(train: Matrix, labels: Matrix, test: Matrix) -> tuple[Tensor, Tensor, Tensor]:
    """Features as tensors of one device, and classes numbered from 0 in the order of their labels."""
    train = finite_matrix("train", train)
    test = finite_matrix("test", test).to(train)
    labels = torch.as_tensor(labels, device=train.device)
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"train and test must share D, got {tuple(train.shape)} and {tuple(test.shape)}")
    if labels.shape != train.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels must be integers of shape ({len(train)},), got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if labels.min() < 0:
        raise ValueError(f"labels must be known classes, 0 or above, got {int((labels < 0).sum())} negative ones")
    return train, labels.unique(return_inverse=True)[1], test


def _as_array(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()
