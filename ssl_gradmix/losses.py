"""Contrastive losses over all processes, with gradients, and a measure of collapse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightly.utils import dist
from torch import Tensor


def nt_xent(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """Normalized temperature-scaled cross-entropy (Chen et al. 2020, equation 1).

        mean_i −log( exp(cos(z_i, z_j(i)) / T) / sum_{k ≠ i} exp(cos(z_i, z_k) / T) )

    where i runs over the 2N embeddings of this process, j(i) is the other view of the same image,
    and k runs over the embeddings of all processes. The same value as lightly's
    `NTXentLoss(gather_distributed=True)`, which selects by a boolean mask and so makes the host
    wait for the device at every step.

    Args:
        z0: Embeddings (N, D) of the first views, float32. N must be the same on all processes.
        z1: Embeddings (N, D) of the second views.
        temperature: T, above 0.

    Returns:
        Scalar. Its mean over processes, which DistributedDataParallel takes of the gradients, is
        the loss of the global batch.
    """
    with torch.autocast(z0.device.type, enabled=False):
        logits, own = similarities(z0, z1, temperature)
        half = logits.shape[1] // 2
        partner = (own + half) % (2 * half)
        return F.cross_entropy(logits.scatter(1, own[:, None], -torch.inf), partner)


def supcon(z0: Tensor, z1: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020, equation 2, L_out).

        mean_i −1/|P(i)| sum_{p ∈ P(i)} log( e^{s_ip} / sum_{a ≠ i} e^{s_ia} )

    with s_ij = cos(z_i, z_j) / T, over both embeddings of every labeled image of all processes,
    where P(i) are the others of the same class. The sum over i of the paper is a mean here, as in
    its code. Images without a label are left out, as anchors and as a.

    Args:
        z0: Embeddings (N, D) of the first views, float32. N must be the same on all processes.
        z1: Embeddings (N, D) of the second views.
        labels: (N,) class labels, -1 for unlabeled images.
        temperature: T, above 0.

    Returns:
        Scalar, 0 if no image has a label. Its mean over processes is the loss of the global batch,
        of which a process may hold more labels than another.
    """
    with torch.autocast(z0.device.type, enabled=False):
        logits, own = similarities(z0, z1, temperature)
        mine = labels.repeat(2)
        everyone = torch.cat(gathered(labels)).repeat(2)
        labeled = everyone >= 0
        others = labeled.repeat(len(mine), 1).scatter(1, own[:, None], False)
        positive = (mine[:, None] == everyone) & others
        # Not −inf: an unlabeled image may have nothing to sum over, and its gradient would be NaN.
        lowest = torch.finfo(logits.dtype).min
        log_probability = logits.masked_fill(~others, lowest).log_softmax(1)
        positives = positive.sum(1).clamp_min(1)
        losses = -log_probability.where(positive, 0).sum(1) / positives
        return losses.sum() * dist.world_size() / labeled.sum().clamp_min(1)


def similarities(z0: Tensor, z1: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cosine similarities over T of the 2N embeddings of this process with the 2M of all.

    Returns:
        (2N, 2M), rows z0 then z1, columns z0 of all processes then z1 of all; and the column (2N,)
        in which each row meets itself.
    """
    z0, z1 = F.normalize(z0, dim=1), F.normalize(z1, dim=1)
    everyone = torch.cat([*gathered(z0), *gathered(z1)])
    first = torch.arange(len(z0), device=z0.device) + dist.rank() * len(z0)
    own = torch.cat([first, first + len(everyone) // 2])
    return torch.cat([z0, z1]) @ everyone.T / temperature, own


def gathered(values: Tensor) -> tuple[Tensor, ...]:
    """Values of the same shape of all processes in order, with gradients to where they are from."""
    return dist.gather(values) if dist.world_size() > 1 else (values,)


def embedding_std(embeddings: Tensor) -> Tensor:
    """SimSiam's measure of collapse (Chen & He 2021): `sqrt(D) * mean_d std(z_d / |z|)`.

    About 1 for embeddings (N, D) that are spread over the sphere, 0 for a collapsed encoder.
    """
    unit = embeddings.detach().float()
    unit = unit / unit.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return unit.std(0, correction=0).mean() * unit.shape[1] ** 0.5
