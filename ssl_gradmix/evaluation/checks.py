"""What features and logits must be, checked where they come in."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Matrix = np.ndarray | Tensor


def finite_matrix(name: str, values: Matrix, may_be_empty: bool = False) -> Tensor:
    """Values (N, D) as a tensor, in float32 unless they are float64.

    Raises:
        ValueError: They are no matrix, NaN or infinite, or, unless they may be, empty. Names them by `name`.
    """
    values = torch.as_tensor(values).detach()
    if values.ndim != 2 or (0 in values.shape and not may_be_empty):
        raise ValueError(f"{name} must have shape (samples, values), neither 0, got {tuple(values.shape)}")
    values = values if values.dtype == torch.float64 else values.float()
    broken = int((~values.isfinite()).any(1).sum())
    if broken:
        raise ValueError(f"{name} must be finite, got {broken} of {len(values)} rows with NaN or infinite values")
    return values
