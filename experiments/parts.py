"""Parts for a recipe's `main(argv, gradmix=..., method=...)`: where boxes lie, and other losses."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, normalize, pad

from experiments.stamps import Stamps
from ssl_gradmix import GradMix, MixedViews, SimCLR
from ssl_gradmix.backbones import resnet10_tiny
from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.gradmix import Activations
from ssl_gradmix.losses import nt_xent, similarities
from ssl_gradmix.methods import Embeddings, Method


class Anywhere(GradMix):
    """Centers boxes on a uniformly random pixel and shifts them inside the image.

    Constant maps have this effect. It makes boxes at the border more likely than `region="random"`.
    """

    def attribute(self, images: Tensor, loss: Tensor | None, activations: Activations) -> Tensor:
        return images.new_zeros(len(images), *images.shape[2:], dtype=torch.float32)


class OnTheStamp(Anywhere):
    """The oracle: centers boxes on the planted stamps."""

    def __init__(self, *args: Any, stamps: Stamps, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stamps = stamps

    def attribute(self, images: Tensor, loss: Tensor | None, activations: Activations) -> Tensor:
        maps = super().attribute(images, loss, activations)
        boxes = self.stamps.latest
        if len(boxes) == len(maps):  # not if the images come from elsewhere than the views
            x, y = ((boxes[:, :2] + boxes[:, 2:]) // 2).unbind(1)
            maps[torch.arange(len(maps)), y, x] = 1
        return maps


class RandomPatches(GradMix):
    """Replaces a random set of patches, an eighth of the image wide, as in masked image modeling.

    Use it with `region="mask"`.
    """

    def attribute(self, images: Tensor, loss: Tensor | None, activations: Activations) -> Tensor:
        drawn = torch.rand(len(images), 1, 8, 8, generator=self.generator).to(images.device)
        return interpolate(drawn, tuple(images.shape[2:]), mode="nearest")[:, 0]


def lafam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Mean activation, without gradients (Karjauv and Albayrak 2024, arXiv 2407.06059)."""
    return activation.mean(1)


class IFM(SimCLR):
    """Implicit feature modification (Robinson et al. 2021, arXiv 2106.11230), eps 0.1.

    The mean of NT-Xent and of NT-Xent whose positive cosine is lowered and whose negative ones are
    raised by eps, which is the worst case of a perturbation of the embeddings.
    """

    eps = 0.1

    def pair_loss(self, z: Embeddings, targets: Embeddings) -> Tensor:
        logits, own = similarities(z[0], z[1], self.temperature)
        half = logits.shape[1] // 2
        partner = (own + half) % (2 * half)
        shift = torch.full_like(logits, self.eps).scatter(1, partner[:, None], -self.eps)
        harder = (logits + shift / self.temperature).scatter(1, own[:, None], -torch.inf)
        plain = nt_xent(z[0], z[1], self.temperature)
        return (plain + cross_entropy(harder, partner)) / 2


class HardViews(SimCLR):
    """Hard view pretraining (Ferreira et al. 2025, arXiv 2310.03940).

    Of all pairs of an image's views, the one with the largest loss is trained on. The loss of each
    pair comes from a pass without gradients, in training mode as in the authors' code.
    """

    def forward(
        self, views: list[Tensor], labels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            z = self.embed(torch.cat(views)).chunk(len(views))
            pairs = list(combinations(range(len(views)), 2))
            losses = torch.stack([self._by_image(z[i], z[j]) for i, j in pairs])
        hardest = losses.argmax(0)
        number = torch.arange(len(hardest), device=hardest.device)
        chosen = []
        for side in zip(*pairs, strict=True):
            of_pairs = torch.stack([views[i] for i in side])
            chosen.append(of_pairs[hardest, number])
        return super().forward(chosen, labels)

    def _by_image(self, z0: Tensor, z1: Tensor) -> Tensor:
        """NT-Xent of each image, (N,)."""
        logits, own = similarities(z0, z1, self.temperature)
        half = logits.shape[1] // 2
        logits = logits.scatter(1, own[:, None], -torch.inf)
        losses = cross_entropy(logits, (own + half) % (2 * half), reduction="none")
        return losses.view(2, -1).mean(0)


def with_fourth(views: type[Views]) -> type[Views]:
    """A subclass of views that draws a fourth view beside the three of a training step."""

    class WithFourth(views):  # type: ignore[misc, valid-type]  # mypy knows no dynamic bases
        def forward(self, images: Tensor | Sequence[Tensor], n_views: int) -> list[Tensor]:
            return super().forward(images, 4 if n_views == 3 else n_views)

    return WithFourth


class PaddedConv(nn.Conv2d):
    """A convolution that takes missing channels as zeros."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(pad(images, (0, 0, 0, 0, 0, self.in_channels - images.shape[1])))


@register_model
def resnet10_tiny_randbits(pretrained: bool = False, bits: int = 0, **kwargs: Any) -> nn.Module:
    """`resnet10_tiny` with as many more channels. Where images do not have them, they are zero."""
    model: Any = resnet10_tiny(pretrained, **kwargs)
    model.pretrained_cfg = {**model.pretrained_cfg, "architecture": "resnet10_tiny_randbits"}
    stem = PaddedConv(3 + bits, model.conv1.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.add_module("conv1", stem)
    return model


class DonorPositive(SimCLR):
    """Counts the donor as a positive in proportion to its area, as i-Mix and ResizeMix do.

    The loss of mixed views u is `lam NTX(u, z1) + (1 - lam) NTX(u, z1[donor])`, here divided by
    lam, with which `Method` multiplies.
    """

    def third_loss(
        self, third: Tensor, z: Embeddings, targets: Embeddings, mixed: MixedViews | None
    ) -> Tensor:
        assert mixed is not None  # the variant runs with GradMix
        own = nt_xent(third, z[1], self.temperature)
        donor = nt_xent(third, z[1][mixed.donor_index], self.temperature)
        return own + (1 - mixed.lam) / mixed.lam * donor


class Attract(SimCLR):
    """The loss of GradMix's authors: mixed views attract, anchors and negatives are original views.

    The loss of mixed views u is `lam mean_i(-z1_i u_i / T + log sum_k exp(z1_i z_k / T))` with k
    over the other embeddings of both original views.
    """

    def third_loss(
        self, third: Tensor, z: Embeddings, targets: Embeddings, mixed: MixedViews | None
    ) -> Tensor:
        u, z0, z1 = (normalize(each, dim=1) for each in (third, z[0], z[1]))
        similarity = z1 @ torch.cat([z1, z0]).T / self.temperature
        itself = torch.eye(*similarity.shape, dtype=torch.bool, device=u.device)
        negatives = similarity.masked_fill(itself, -torch.inf).logsumexp(1)
        return (negatives - (z1 * u).sum(1) / self.temperature).mean()


def logging_hits(method: type[Method], stamps: Stamps) -> type[Method]:
    """A subclass of a method that logs `hit`, the fraction of the stamps inside GradMix's boxes."""

    class LoggingHits(method):  # type: ignore[misc, valid-type]  # mypy knows no dynamic bases
        def third_loss(
            self, third: Tensor, z: Embeddings, targets: Embeddings, mixed: MixedViews | None
        ) -> Tensor:
            self.boxes = None if mixed is None else mixed.boxes
            return super().third_loss(third, z, targets, mixed)

        def forward(
            self, views: list[Tensor], labels: Tensor | None = None
        ) -> tuple[Tensor, dict[str, Tensor]]:
            self.boxes = None
            loss, metrics = super().forward(views, labels)
            if self.boxes is not None and len(self.boxes) == len(stamps.latest):
                metrics["hit"] = covered(stamps.latest, self.boxes).mean()
            return loss, metrics

    return LoggingHits


def covered(boxes: Tensor, by: Tensor) -> Tensor:
    """Fraction (N,) of the area of boxes (N, 4) that lies inside other boxes (N, 4)."""
    low, high = torch.maximum(boxes[:, :2], by[:, :2]), torch.minimum(boxes[:, 2:], by[:, 2:])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return (high - low).clamp_min(0).prod(1) / area
