"""What a self-supervised method returns for a batch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Losses(NamedTuple):
    """Scalar tensors of one step, on the device.

    Attributes:
        total: What is differentiated: `loss_views + weight * lam * loss_mixed`, in SupCon with the supervised loss.
        loss_views: Loss of the two views.
        loss_mixed: Loss of the third view, mixed or plain, not weighted; zero where there is none.
        lam: Share of the image that the third view keeps: 1 for a plain one, 0 where there is none.
        embedding_std: Standard deviation of the L2-normalized embeddings of the first view, mean over dimensions, times
            the root of their number: about 1 for embeddings spread over the sphere, 0 for a collapsed encoder.
        flat: Share of images whose map was flat or not finite, so that the mixed region lies at random; zero without
            maps.
        loss_supervised: Loss of the labels, not weighted; None where the method takes none.
    """

    total: Tensor
    loss_views: Tensor
    loss_mixed: Tensor
    lam: Tensor
    embedding_std: Tensor
    flat: Tensor
    loss_supervised: Tensor | None = None


def embedding_std(embeddings: Tensor) -> Tensor:
    """`sqrt(D) * mean_d std(z_d / |z|)` of embeddings (N, D): SimSiam's measure of collapse (Chen & He 2021)."""
    unit = embeddings.detach().float()
    unit = unit / unit.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return unit.std(0, correction=0).mean() * unit.shape[1] ** 0.5
