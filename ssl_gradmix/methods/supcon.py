"""Supervised contrast (Khosla et al. 2020, arXiv 2004.11362) beside SimCLR's loss and its optional third view."""

from __future__ import annotations

from typing import Literal

import torch
from lightly.models.modules import SimCLRProjectionHead
from lightly.utils import dist
from torch import Tensor, nn

from ssl_gradmix.gradmix import GradMix, MixedViews
from ssl_gradmix.methods.losses import Losses, embedding_std
from ssl_gradmix.methods.nt_xent import gathered, nt_xent, similarities


class SupCon(nn.Module):
    """What GradMix's authors train for open set recognition: images of a class are pulled together, and views too.

    `supervised * SupCon(z0, z1, labels) + self_supervised * (NT-Xent(z0, z1) + lam * NT-Xent(z2, z1))`, where the third
    view is GradMix's, a plain one (lam 1), or left out. All inside one `forward`, as in `SimCLR`.

    Args:
        backbone: Encoder from images (N, C, H, W) to features (N, D).
        num_features: D.
        hidden_dim: Width of the projector's hidden layer; None takes D.
        output_dim: Width of the embeddings.
        temperature: Of both losses, above 0; 0.05 is the authors'.
        gradmix: The view generator, or None.
        supervised: Factor on the supervised loss.
        self_supervised: Factor on the losses without labels.
        attributed_loss: Which loss GradMix attributes: that of the two views without labels, or the `whole` one, with
            the supervised loss.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_features: int,
        hidden_dim: int | None = None,
        output_dim: int = 128,
        temperature: float = 0.05,
        gradmix: GradMix | None = None,
        supervised: float = 1.0,
        self_supervised: float = 1.2,
        attributed_loss: Literal["self_supervised", "whole"] = "self_supervised",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = SimCLRProjectionHead(num_features, hidden_dim or num_features, output_dim)
        self.temperature = temperature
        self.gradmix = gradmix
        self.supervised = supervised
        self.self_supervised = self_supervised
        self.attributed_loss = attributed_loss

    def forward(self, views: list[Tensor], labels: Tensor) -> Losses:
        """Losses of a batch.

        Args:
            views: Two, or three with a plain third one (only without `gradmix`), each (N, C, H, W). N must be the same
                on all processes.
            labels: int64 (N,), below 0 for images without: they have a part in the losses without labels alone.
        """
        if self.gradmix is None:
            z = self._embed(torch.cat(views)).chunk(len(views))
            supervised, loss_views = self._losses(z, labels)
            third, flat = z[2:], torch.zeros_like(loss_views)
            lam = torch.full_like(loss_views, len(third))
        else:
            z, supervised, loss_views, mixed = self._mix(views, labels)
            third, lam, flat = [self._embed(mixed.images)], mixed.lam, mixed.flat.float().mean()
        loss_mixed = nt_xent(third[0], z[1], self.temperature) if third else torch.zeros_like(loss_views)
        total = self.supervised * supervised + self.self_supervised * (loss_views + lam * loss_mixed)
        parts = (each.detach() for each in (loss_views, loss_mixed, lam))
        return Losses(total, *parts, embedding_std(z[0]), flat, supervised.detach())

    def mixed_views(self, views: list[Tensor], labels: Tensor) -> MixedViews:
        """The views that GradMix would add to this batch, to be looked at; `gradmix` must be set."""
        return self._mix(views, labels)[3]

    def _mix(self, views: list[Tensor], labels: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor, MixedViews]:
        first, second = views
        with self.gradmix.observe(self.backbone) as observed:
            z = self._embed(torch.cat([first, second])).chunk(2)
        supervised, loss = self._losses(z, labels)
        attributed = loss
        if self.attributed_loss == "whole":
            attributed = self.supervised * supervised + self.self_supervised * loss
        return z, supervised, loss, self.gradmix(first, attributed, observed, donors=second)

    def _losses(self, z: tuple[Tensor, ...], labels: Tensor) -> tuple[Tensor, Tensor]:
        return supcon(z[0], z[1], labels, self.temperature), nt_xent(z[0], z[1], self.temperature)

    def _embed(self, images: Tensor) -> Tensor:
        # The losses are computed in float32: under autocast their normalization and products would be half precision.
        return self.projector(self.backbone(images)).float()


def supcon(z0: Tensor, z1: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrast: each embedding picks all others of its class, of all processes, out of all others.

    `mean_i −1/|P(i)| sum_{p ∈ P(i)} log( exp(cos(z_i, z_p) / T) / sum_{a ≠ i} exp(cos(z_i, z_a) / T) )` over the two
    embeddings of every labeled image, where P(i) are the others of its class; Khosla et al. 2020, equation 2 (L_out),
    whose sum over i is a mean here, as in their code. Images without label are left out, as anchors and among a.
    lightly has no such loss. Shapes are fixed, so that the host waits for nothing.

    Args:
        z0: Embeddings (N, D) of the first views, float32; N must be the same on all processes.
        z1: Embeddings (N, D) of the second views.
        labels: int64 (N,), below 0 for images without.
        temperature: T, above 0.

    Returns:
        Scalar, 0 where no image has a label. Averaged over processes, as DistributedDataParallel does with gradients,
        it is the loss of the global batch, of which a process may hold more labels than another.
    """
    with torch.autocast(z0.device.type, enabled=False):
        logits, myself = similarities(z0, z1, temperature)
        mine, everyone = labels.repeat(2), torch.cat(gathered(labels)).repeat(2)
        among = (everyone >= 0).repeat(len(mine), 1).scatter(1, myself[:, None], False)
        positive = (mine[:, None] == everyone) & among
        # Not −inf: the row of an image without label may have nothing to sum, and its gradient would be NaN.
        log_share = logits.masked_fill(~among, torch.finfo(logits.dtype).min).log_softmax(1)
        losses = -log_share.where(positive, 0).sum(1) / positive.sum(1).clamp_min(1)
        return losses.sum() * dist.world_size() / (everyone >= 0).sum().clamp_min(1)
