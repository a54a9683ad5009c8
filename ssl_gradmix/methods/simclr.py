"""SimCLR (Chen et al. 2020, arXiv 2002.05709) with an optional third view: GradMix's, or a plain augmentation."""

from __future__ import annotations

import torch
from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor, nn

from ssl_gradmix.gradmix import GradMix, MixedViews
from ssl_gradmix.methods.losses import Losses, embedding_std
from ssl_gradmix.methods.nt_xent import nt_xent


class SimCLR(nn.Module):
    """NT-Xent on two views, negatives gathered from all processes with gradients, all inside one `forward`.

    With `gradmix` the first view is mixed where the loss of the two views looks, and the mixed view is pulled towards
    the second one. Without it the method is plain SimCLR; a third view given to `forward` then is the control: the same
    number of encoder passes and the same loss, without mixing.

    Args:
        backbone: Encoder from images (N, C, H, W) to features (N, D).
        num_features: D.
        hidden_dim: Width of the projector's hidden layer; None takes D.
        output_dim: Width of the embeddings.
        temperature: Of NT-Xent, above 0.
        gradmix: The view generator, or None.
        weight: Factor on the third view's loss, beside `lam`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_features: int,
        hidden_dim: int | None = None,
        output_dim: int = 128,
        temperature: float = 0.5,
        gradmix: GradMix | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = SimCLRProjectionHead(num_features, hidden_dim or num_features, output_dim)
        self.temperature = temperature
        self.gradmix = gradmix
        self.weight = weight

    def forward(self, views: list[Tensor], labels: Tensor | None = None) -> Losses:
        """Losses of a batch.

        Args:
            views: Two, or three with a plain third one (only without `gradmix`), each (N, C, H, W). N must be the same
                on all processes.
            labels: Not used.
        """
        if self.gradmix is None:
            z = self._embed(torch.cat(views)).chunk(len(views))
            loss_views = nt_xent(z[0], z[1], self.temperature)
            zero = torch.zeros_like(loss_views)
            if len(views) == 2:
                return Losses(loss_views, loss_views.detach(), zero, zero, embedding_std(z[0]), zero)
            loss_mixed, lam, flat = nt_xent(z[2], z[1], self.temperature), torch.ones_like(loss_views), zero
        else:
            z, loss_views, mixed = self._mix(views)
            loss_mixed, lam = nt_xent(self._embed(mixed.images), z[1], self.temperature), mixed.lam
            flat = mixed.flat.float().mean()
        total = loss_views + self.weight * lam * loss_mixed
        return Losses(total, loss_views.detach(), loss_mixed.detach(), lam.detach(), embedding_std(z[0]), flat)

    def mixed_views(self, views: list[Tensor], labels: Tensor | None = None) -> MixedViews:
        """The views that GradMix would add to this batch, to be looked at; `gradmix` must be set."""
        return self._mix(views)[2]

    def _mix(self, views: list[Tensor]) -> tuple[tuple[Tensor, ...], Tensor, MixedViews]:
        first, second = views
        with self.gradmix.observe(self.backbone) as observed:
            z = self._embed(torch.cat([first, second])).chunk(2)
        loss = nt_xent(z[0], z[1], self.temperature)
        return z, loss, self.gradmix(first, loss, observed, donors=second)

    def _embed(self, images: Tensor) -> Tensor:
        # The loss is computed in float32: under autocast its normalization and products would stay in half precision.
        return self.projector(self.backbone(images)).float()
