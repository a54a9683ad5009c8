"""SimCLR, BYOL and SupCon, each with an optional third view: GradMix's, a plain one, or adaptive.

A method is a step (`Method.forward`) with two questions: what is the loss of the pair, and what is
the loss of the third view. The whole step happens in one `forward`, so that DistributedDataParallel
sees one forward and one backward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead, SimCLRProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn

from ssl_gradmix.adaptive import Adaptive, agreement_lost
from ssl_gradmix.gradmix import GradMix, MixedViews
from ssl_gradmix.losses import embedding_std, nt_xent, supcon

Embeddings = tuple[Tensor, ...]
"""Of each view, (N, D)."""


class Method(nn.Module):
    """A training step of two views and an optional third one.

    Args:
        backbone: Encoder from images (N, C, H, W) to features (N, D).
        projector: Head from features to embeddings.
        gradmix: The view generator. None leaves the third view out, or takes a plain one.
        weight: Factor on the third view's loss, beside `lam`.
        adaptive: Decides for each image whether its third view is mixed. None mixes all images.
    """

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        gradmix: GradMix | None = None,
        weight: float = 1.0,
        adaptive: Adaptive | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.gradmix = gradmix
        self.weight = weight
        self.adaptive = adaptive

    def pair_loss(self, z: Embeddings, targets: Embeddings) -> Tensor:
        """Loss of the two views, from their embeddings and those of `targets`."""
        raise NotImplementedError

    def third_loss(
        self, third: Tensor, z: Embeddings, targets: Embeddings, mixed: MixedViews | None
    ) -> Tensor:
        """Loss of the third view's embeddings; `mixed` is None if it is a plain view."""
        raise NotImplementedError

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings (N, D) in float32, because autocast would compute losses in half precision."""
        return self.projector(self.backbone(images)).float()

    def targets(self, views: list[Tensor]) -> Embeddings:
        """Embeddings of the pair that have no gradient; none unless there is a target network."""
        return ()

    def total(
        self, loss: Tensor, z: Embeddings, third: Embeddings, lam: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimize and further metrics; methods with labels add their loss here."""
        return loss, {}

    def forward(
        self, views: list[Tensor], labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and detached scalar metrics.

        Args:
            views: Two views, or three with a plain third one (without `gradmix`, or with
                `adaptive`), each (N, C, H, W). N must be the same on all processes.
            labels: (N,) class labels, -1 for unlabeled images; only SupCon reads them.

        Returns:
            The loss, and metrics: `loss_views` and `embedding_std`; with a third view also
            `loss_mixed` and `lam`, the fraction of each image that it keeps; with GradMix also
            `flat`, the fraction of images with a constant map, and `agreement_lost`, with
            `adaptive` also `mixed` and `mix_probability`, see `Adaptive`.
        """
        targets = self.targets(views[:2])
        reading: dict[str, Tensor] = {}
        if self.gradmix is None:
            z = self.embed(torch.cat(views)).chunk(len(views))
            pair, third, mixed = self.pair_loss(z[:2], targets), z[2:], None
            lam = torch.ones_like(pair)
        else:
            z, pair, mixed = self._mix(self.gradmix, views[:2], targets)
            images, lam = mixed.images, mixed.lam
            if self.adaptive is not None:
                images, lam = self.adaptive.choose(mixed, views[2])
            third = (self.embed(images),)
            reading = self._read(z[0], (targets or z)[1], third[0], mixed)
        loss, metrics = pair, {"loss_views": pair}
        for embeddings in third:
            loss_third = self.third_loss(embeddings, z[:2], targets, mixed)
            loss = loss + self.weight * lam * loss_third
            metrics |= {"loss_mixed": loss_third, "lam": lam}
        loss, more = self.total(loss, z[:2], third, lam, labels)
        spread = {"embedding_std": embedding_std((targets or z)[0])}
        metrics = {**metrics, **more, **spread, **reading}
        return loss, {name: value.detach() for name, value in metrics.items()}

    def mixed_views(self, views: list[Tensor], labels: Tensor | None = None) -> MixedViews:
        """The views that GradMix would add to this batch, to look at; `gradmix` must be set."""
        assert self.gradmix is not None
        return self._mix(self.gradmix, views[:2], self.targets(views[:2]))[2]

    def _mix(
        self, gradmix: GradMix, views: list[Tensor], targets: Embeddings
    ) -> tuple[Embeddings, Tensor, MixedViews]:
        first, second = views
        with gradmix.observe(self.backbone) as activations:
            z = self.embed(torch.cat([first, second])).chunk(2)
        loss = self.pair_loss(z, targets)
        return z, loss, gradmix(first, loss, activations, donors=second)

    def _read(self, z0: Tensor, z1: Tensor, third: Tensor, mixed: MixedViews) -> dict[str, Tensor]:
        """Metrics of mixing."""
        metrics = {"flat": mixed.flat.float().mean()}
        if self.adaptive is not None:
            return {**metrics, **self.adaptive.update(z0, z1, third)}
        reading, *_ = agreement_lost(z0, z1, third, 1 - mixed.lam)
        return {**metrics, "agreement_lost": reading.nan_to_num(0, 0, 0)}


class SimCLR(Method):
    """SimCLR (Chen et al. 2020, arXiv 2002.05709): NT-Xent, negatives gathered from all processes.

    The third view is pulled towards the second one: `NTX(z0, z1) + weight * lam * NTX(z2, z1)`.

    Args:
        backbone: Encoder from images (N, C, H, W) to features (N, D).
        num_features: D.
        hidden_dim: Width of the projector's hidden layer. None takes D.
        output_dim: Width of the embeddings.
        temperature: Temperature of the contrastive loss, above 0.
        gradmix: The view generator, or None.
        weight: Factor on the third view's loss, beside the fraction of the image that it keeps.
        adaptive: Decides for each image whether its third view is mixed. None mixes all images.
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
        adaptive: Adaptive | None = None,
    ) -> None:
        projector = SimCLRProjectionHead(num_features, hidden_dim or num_features, output_dim)
        super().__init__(backbone, projector, gradmix, weight, adaptive)
        self.temperature = temperature

    def pair_loss(self, z: Embeddings, targets: Embeddings) -> Tensor:
        return nt_xent(z[0], z[1], self.temperature)

    def third_loss(
        self, third: Tensor, z: Embeddings, targets: Embeddings, mixed: MixedViews | None
    ) -> Tensor:
        return nt_xent(third, z[1], self.temperature)


class SupCon(SimCLR):
    """What GradMix's authors train for open set recognition: SimCLR and supervised contrast.

        supervised * SupCon(z0, z1, labels) + self_supervised * (NTX(z0, z1) + lam * NTX(z2, z1))

    Khosla et al. 2020, arXiv 2004.11362. GradMix attributes the loss of the pair without labels.
    With `mixed_labels`, `lam * SupCon(z2, z1, labels)` is added to the supervised loss, as the
    authors train since 2026.

    Args:
        backbone: Encoder from images (N, C, H, W) to features (N, D).
        num_features: D.
        hidden_dim: Width of the projector's hidden layer. None takes D.
        output_dim: Width of the embeddings.
        temperature: Temperature of both losses, above 0; 0.05 is the authors'.
        gradmix: The view generator, or None.
        supervised: Factor on the loss of the labels.
        self_supervised: Factor on the losses without labels, including the third view's.
        mixed_labels: Whether third views enter the loss of the labels, too.
        adaptive: Decides for each image whether its third view is mixed. None mixes all images.
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
        mixed_labels: bool = False,
        adaptive: Adaptive | None = None,
    ) -> None:
        super().__init__(
            backbone, num_features, hidden_dim, output_dim, temperature, gradmix, adaptive=adaptive
        )
        self.supervised = supervised
        self.self_supervised = self_supervised
        self.mixed_labels = mixed_labels

    def total(
        self, loss: Tensor, z: Embeddings, third: Embeddings, lam: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert labels is not None
        supervised = supcon(z[0], z[1], labels, self.temperature)
        if self.mixed_labels:
            for embeddings in third:
                mixed = supcon(embeddings, z[1], labels, self.temperature)
                supervised = supervised + lam * mixed
        total = self.supervised * supervised + self.self_supervised * loss
        return total, {"loss_supervised": supervised}


class BYOL(Method):
    """BYOL (Grill et al. 2020, arXiv 2006.07733): predicts a target network's embedding.

    The target network is a moving average of the online one. The third view goes through the online
    network alone and is compared with the targets of both views: with `d(p, t) = 2 - 2 cos(p, t)`,
    the losses are `d(p0, t1) + d(p1, t0)` and `d(p2, t0) + d(p2, t1)`.

    Args:
        backbone: Encoder from images (N, C, H, W) to features (N, D).
        num_features: D.
        hidden_dim: Width of the hidden layers of projector and predictor.
        output_dim: Width of the embeddings.
        momentum: Momentum of the target network at the start, in [0, 1]; it rises to 1 on a cosine.
        gradmix: The view generator, or None.
        weight: Factor on the third view's loss, beside the fraction of the image that it keeps.
        adaptive: Decides for each image whether its third view is mixed. None mixes all images.
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
        adaptive: Adaptive | None = None,
    ) -> None:
        projector = BYOLProjectionHead(num_features, hidden_dim, output_dim)
        super().__init__(backbone, projector, gradmix, weight, adaptive)
        self.predictor = BYOLPredictionHead(output_dim, hidden_dim, output_dim)
        self.target_backbone = copy.deepcopy(backbone)
        self.target_projector = copy.deepcopy(self.projector)
        deactivate_requires_grad(self.target_backbone)
        deactivate_requires_grad(self.target_projector)
        self.criterion = NegativeCosineSimilarity()
        self.momentum = momentum

    def embed(self, images: Tensor) -> Tensor:
        """Predictions (N, D) of the online network."""
        return self.predictor(self.projector(self.backbone(images))).float()

    @torch.no_grad()
    def targets(self, views: list[Tensor]) -> Embeddings:
        """Embeddings of both views by the target network."""
        return self.target_projector(self.target_backbone(torch.cat(views))).float().chunk(2)

    def pair_loss(self, z: Embeddings, targets: Embeddings) -> Tensor:
        return self._distance(z[0], targets[1]) + self._distance(z[1], targets[0])

    def third_loss(
        self, third: Tensor, z: Embeddings, targets: Embeddings, mixed: MixedViews | None
    ) -> Tensor:
        return self._distance(third, targets[0]) + self._distance(third, targets[1])

    def update_target(self, step: int, steps: int) -> None:
        """Moves the target network towards the online one, once after each optimizer step.

        Args:
            step: Number of optimizer steps before this one.
            steps: Number of optimizer steps of the whole training; the momentum reaches 1 there.
        """
        momentum = cosine_schedule(step, steps, self.momentum, 1.0)
        update_momentum(self.backbone, self.target_backbone, momentum)
        update_momentum(self.projector, self.target_projector, momentum)

    def _distance(self, predicted: Tensor, target: Tensor) -> Tensor:
        return 2 + 2 * self.criterion(predicted, target)


METHODS: dict[str, Callable[..., Method]] = {"simclr": SimCLR, "byol": BYOL, "supcon": SupCon}
"""The methods by the names of their recipes, which config.yaml records."""
