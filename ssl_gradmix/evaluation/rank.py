"""How many dimensions features really use."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

EPSILON = 1e-7


@torch.no_grad()
def rankme(features: Tensor | np.ndarray) -> float:
    """RankMe: the exponential of the entropy of the singular values, scaled to sum 1.

    `exp(−sum_k p_k log p_k)` with `p_k = σ_k / sum_j σ_j + 1e-7`; Garrido et al. 2023, arXiv 2210.02885. Features are
    not centered, as there: all the same, they have rank 1. The singular values are the roots of the eigenvalues of the
    (D, D) or (N, N) matrix of products, whichever is smaller, in float64.

    Args:
        features: (N, D), finite. With fewer features than dimensions it is at most N, hence comparable for one N only.

    Returns:
        From 1 (all on a line) to min(N, D) (all directions alike); 0 where all features are zero.

    Raises:
        ValueError: Not a matrix, empty, or not finite.
    """
    matrix = torch.as_tensor(features).double()
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise ValueError(f"features must be (N, D) and not empty, got {tuple(matrix.shape)}")
    if not matrix.isfinite().all():
        raise ValueError("features must be finite, got NaN or infinite values")
    products = matrix.T @ matrix if matrix.shape[1] <= matrix.shape[0] else matrix @ matrix.T
    values = torch.linalg.eigvalsh(products).clamp_min(0).sqrt()
    if values.sum() == 0:
        return 0.0
    shares = values / values.sum() + EPSILON
    return float((-shares * shares.log()).sum().exp())
