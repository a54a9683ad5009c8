"""BYOL (Grill et al. 2020, arXiv 2006.07733) with an optional third view: GradMix's, or a plain augmentation."""

from __future__ import annotations

import copy

import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn

from ssl_gradmix.gradmix import GradMix, MixedViews
from ssl_gradmix.methods.losses import Losses, embedding_std


class BYOL(nn.Module):
    """The online network predicts the target network's embedding of the other view, all inside one `forward`.

    The target network is a moving average of the online one. The third view goes through the online network only, and
    its prediction is compared with the targets of both views, so that both losses are symmetrical:
    `loss_views = d(p0, t1) + d(p1, t0)` and `loss_mixed = d(p2, t0) + d(p2, t1)` with `d(p, t) = 2 - 2 cos(p, t)`.

    Args:
        backbone: Encoder from images (N, C, H, W) to features (N, D).
        num_features: D.
        hidden_dim: Width of the hidden layers of projector and predictor.
        output_dim: Width of the embeddings.
        momentum: Of the target network at the first step, in [0, 1]; it rises to 1 on a cosine.
        gradmix: The view generator, or None.
        weight: Factor on the third view's loss, beside `lam`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_features: int,
        hidden_dim: int = 1024,
        output_dim: int = 256,
        momentum: float = 0.99,
        gradmix: GradMix | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = BYOLProjectionHead(num_features, hidden_dim, output_dim)
        self.predictor = BYOLPredictionHead(output_dim, hidden_dim, output_dim)
        self.target_backbone = copy.deepcopy(backbone)
        self.target_projector = copy.deepcopy(self.projector)
        deactivate_requires_grad(self.target_backbone)
        deactivate_requires_grad(self.target_projector)
        self.criterion = NegativeCosineSimilarity()
        self.momentum = momentum
        self.gradmix = gradmix
        self.weight = weight

    def forward(self, views: list[Tensor], labels: Tensor | None = None) -> Losses:
        """Losses of a batch.

        Args:
            views: Two, or three with a plain third one (only without `gradmix`), each (N, C, H, W).
            labels: Not used.
        """
        targets = self._target(views[:2])
        if self.gradmix is None:
            predicted = self._predict(torch.cat(views)).chunk(len(views))
            loss_views = self._distance(predicted[0], targets[1]) + self._distance(predicted[1], targets[0])
            zero = torch.zeros_like(loss_views)
            if len(views) == 2:
                return Losses(loss_views, loss_views.detach(), zero, zero, embedding_std(targets[0]), zero)
            third, lam, flat = predicted[2], torch.ones_like(loss_views), zero
        else:
            loss_views, mixed = self._mix(views, targets)
            third, lam, flat = self._predict(mixed.images), mixed.lam, mixed.flat.float().mean()
        loss_mixed = self._distance(third, targets[0]) + self._distance(third, targets[1])
        total = loss_views + self.weight * lam * loss_mixed
        return Losses(total, loss_views.detach(), loss_mixed.detach(), lam.detach(), embedding_std(targets[0]), flat)

    def mixed_views(self, views: list[Tensor], labels: Tensor | None = None) -> MixedViews:
        """The views that GradMix would add to this batch, to be looked at; `gradmix` must be set."""
        return self._mix(views, self._target(views))[1]

    def update_target(self, step: int, steps: int) -> None:
        """Moves the target network towards the online one; to be called once after each optimizer step.

        Args:
            step: Optimizer steps done before this one; the momentum follows a cosine from `momentum` to 1 with it.
            steps: Optimizer steps of the whole training.
        """
        momentum = cosine_schedule(step, steps, self.momentum, 1.0)
        update_momentum(self.backbone, self.target_backbone, momentum)
        update_momentum(self.projector, self.target_projector, momentum)

    def _mix(self, views: list[Tensor], targets: tuple[Tensor, ...]) -> tuple[Tensor, MixedViews]:
        first, second = views
        with self.gradmix.observe(self.backbone) as observed:
            predicted = self._predict(torch.cat([first, second])).chunk(2)
        loss = self._distance(predicted[0], targets[1]) + self._distance(predicted[1], targets[0])
        return self.gradmix.early(first, loss, observed, donors=second)

    def _predict(self, images: Tensor) -> Tensor:
        return self.predictor(self.projector(self.backbone(images))).float()

    @torch.no_grad()
    def _target(self, views: list[Tensor]) -> tuple[Tensor, ...]:
        return self.target_projector(self.target_backbone(torch.cat(views))).float().chunk(2)

    def _distance(self, predicted: Tensor, target: Tensor) -> Tensor:
        return 2 + 2 * self.criterion(predicted, target)
