"""The contrastive loss of SimCLR."""

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
        z0, z1 = F.normalize(z0, dim=1), F.normalize(z1, dim=1)
        everyone = torch.cat([*_gathered(z0), *_gathered(z1)])
        mine = torch.arange(len(z0), device=z0.device) + dist.rank() * len(z0)
        same, partner = torch.cat([mine, mine + len(everyone) // 2]), torch.cat([mine + len(everyone) // 2, mine])
        logits = torch.cat([z0, z1]) @ everyone.T / temperature
        return F.cross_entropy(logits.scatter(1, same[:, None], -torch.inf), partner)


def _gathered(z: Tensor) -> tuple[Tensor, ...]:
    return dist.gather(z) if dist.world_size() > 1 else (z,)
