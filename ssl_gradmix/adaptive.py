"""Decides for each image whether its third view is GradMix's or a plain one. Needs torch alone."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_gradmix.gradmix import MixedViews

ENOUGH = 32
"""Mixed images in a batch at which a reading has its full weight."""


class Adaptive(nn.Module):
    """Mixes images while that costs agreement: while the encoder relies on small regions.

        adaptive = Adaptive()
        third, lam = adaptive.choose(mixed, plain)
        z2 = head(encoder(third))
        loss = loss + lam * criterion(z2, z1)
        adaptive.update(z0, z1, z2)  # before or after backward()

    A mixed view tells what its image lost: with embeddings z0, z1 of the pair, z2 of the mixed view
    and z' of all other images, the reading of a batch is

        mean(cos(z0, z1) − cos(z2, z1)) / mean(cos(z0, z1) − cos(z0, z')) / (1 − lam)

    the lost fraction of the agreement relative to the replaced fraction of the image. It is about 1
    for an encoder that looks everywhere, and two to five times as large for one that relies on what
    was replaced, which may be all there is: a digit on an empty background.

    The probability of mixing follows a moving average of the reading. It starts at 1, so that a
    shortcut is mixed out before the encoder rests on it, and keeps a floor, so that shortcuts that
    are found late are noticed. The paper always mixes. Nothing waits for the device, and all state
    is in a buffer, which is saved with the module and equal on all processes.

    Args:
        low: Reading up to which images are mixed with probability `floor`.
        high: Reading from which all images are mixed.
        floor: Smallest probability of mixing, in (0, 1].
        momentum: Weight of the past in the moving average, in [0, 1).

    Attributes:
        reading: The moving average, a scalar buffer.
    """

    reading: Tensor

    def __init__(
        self, low: float = 1.6, high: float = 2.0, floor: float = 0.05, momentum: float = 0.9
    ) -> None:
        super().__init__()
        if not (low < high and 0 < floor <= 1 and 0 <= momentum < 1):
            raise ValueError("low < high, floor in (0, 1] and momentum in [0, 1) are needed")
        self.low, self.high, self.floor, self.momentum = low, high, floor, momentum
        self.register_buffer("reading", torch.tensor(float(high)))
        self._chosen: Tensor | None = None
        self._replaced: Tensor | None = None

    @property
    def probability(self) -> Tensor:
        """Probability of mixing an image, a scalar tensor."""
        rising = (self.reading - self.low) / (self.high - self.low)
        return rising.clamp(self.floor, 1)

    def choose(self, mixed: MixedViews, plain: Tensor) -> tuple[Tensor, Tensor]:
        """Draws which images are mixed.

        Args:
            mixed: Mixed views of N images.
            plain: Plain third views (N, C, H, W) of the same images.

        Returns:
            Third views (N, C, H, W), and the mean fraction of an image that they keep, a scalar by
            which their loss is multiplied.
        """
        drawn = torch.rand(len(plain)).to(plain.device, non_blocking=True)
        self._chosen = drawn < self.probability
        self._replaced = 1 - mixed.lam
        third = torch.where(self._chosen[:, None, None, None], mixed.images, plain)
        return third, 1 - self._chosen.float().mean() * self._replaced

    @torch.no_grad()
    def update(self, z0: Tensor, z1: Tensor, third: Tensor) -> dict[str, Tensor]:
        """Reads what the mixed views lost; only in training mode it changes the probability.

        Args:
            z0: Embeddings (N, D) of the views that were mixed.
            z1: Embeddings, or targets, of the other views.
            third: Embeddings of the third views.

        Returns:
            Metrics: `agreement_lost`, the reading of this batch; `mixed`, the fraction of images
            that were mixed; and `mix_probability` of the next batch.
        """
        if self._chosen is None or self._replaced is None:
            raise ValueError("update: call choose(...) first")
        reading, number, count = agreement_lost(z0, z1, third, self._replaced, self._chosen)
        # Without mixed images, or without agreement, there is nothing to read.
        reading = torch.where(reading.isfinite(), reading, self.reading).clamp(0, 2 * self.high)
        if self.training:
            enough = (number / ENOUGH).clamp(max=1)
            self.reading.lerp_(reading, (1 - self.momentum) * enough)
        metrics = {"agreement_lost": reading, "mixed": number / count}
        return {**metrics, "mix_probability": self.probability}


@torch.no_grad()
def agreement_lost(
    z0: Tensor, z1: Tensor, third: Tensor, replaced: Tensor, chosen: Tensor | None = None
) -> tuple[Tensor, Tensor, int]:
    """The reading of a batch, see `Adaptive`, over all processes.

    Args:
        z0: Embeddings (N, D) of the views that were mixed. N must be the same on all processes.
        z1: Embeddings, or targets, of the other views.
        third: Embeddings of the third views.
        replaced: Fraction of an image that was replaced, a scalar.
        chosen: (N,) bool, which third views are mixed. None means all.

    Returns:
        The reading, not finite without mixed images; and how many images are mixed, and are there.
    """
    z0, z1, third = (F.normalize(each.float(), dim=1) for each in (z0, z1, third))
    mixed = torch.ones_like(z0[:, 0]) if chosen is None else chosen.float()
    whole = (z0 * z1).sum(1)
    lost = mixed * (whole - (third * z1).sum(1))
    scalars = torch.stack([each.sum() for each in (lost, mixed * replaced, whole, mixed)])
    sums, count = torch.cat([z0.sum(0), z1.sum(0), scalars]), len(z0)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
        count *= dist.get_world_size()
    every0, every1, scalars = sums.split([z0.shape[1], z0.shape[1], 4])
    loss, area, agreement, number = scalars.unbind()
    # Between different images, n (n - 1) pairs. Autocast would round a matrix product.
    chance = ((every0 * every1).sum() - agreement) / max(count - 1, 1)
    return loss / area / (agreement - chance) * count, number, count
