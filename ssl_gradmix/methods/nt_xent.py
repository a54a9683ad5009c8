"""The contrastive loss of SimCLR, and the similarities in it, which supervised contrast reads too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightly.utils import dist
from torch import Tensor


def nt_xent(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """Normalized temperature-scaled cross-entropy: each embedding picks its partner out of all others of all processes.

    `mean_i −log( exp(cos(z_i, z_j(i)) / T) / sum_{k ≠ i} exp(cos(z_i, z_k) / T) )` over the 2N embeddings of this
    process; Chen et al. 2020, equation 1. The same value as lightly's `NTXentLoss(gather_distributed=True)`, which
    selects by a boolean mask and so makes the host wait for the device at every step; here shapes are fixed. Gathering,
    with its gradient, is lightly's. It is computed in float32 under autocast too.

    Args:
        z0: Embeddings (N, D) of the first views, float32; N must be the same on all processes.
        z1: Embeddings (N, D) of the second views.
        temperature: T, above 0.

    Returns:
        Scalar. Averaged over processes, as DistributedDataParallel does with gradients, it is the loss of the global
        batch.
    """
    with torch.autocast(z0.device.type, enabled=False):  # which would take the product in half precision
        logits, myself = similarities(z0, z1, temperature)
        half = logits.shape[1] // 2
        return F.cross_entropy(logits.scatter(1, myself[:, None], -torch.inf), (myself + half) % (2 * half))


def similarities(z0: Tensor, z1: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cosines over T of the 2N embeddings of this process with the 2M of all, and where in those it stands itself.

    Returns:
        (2N, 2M): rows are z0, then z1; columns are z0 of all processes, then z1. And int64 (2N,), columns.
    """
    z0, z1 = F.normalize(z0, dim=1), F.normalize(z1, dim=1)
    everyone = torch.cat([*gathered(z0), *gathered(z1)])
    mine = torch.arange(len(z0), device=z0.device) + dist.rank() * len(z0)
    return torch.cat([z0, z1]) @ everyone.T / temperature, torch.cat([mine, mine + len(everyone) // 2])


def gathered(values: Tensor) -> tuple[Tensor, ...]:
    """Values of the same shape of all processes, in their order; gradients go back to where they came from."""
    return dist.gather(values) if dist.world_size() > 1 else (values,)
