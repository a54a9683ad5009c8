"""A shortcut planted into images: a small stamp whose black and white cells name the image, and not its class.

After RandBit [0], made local: k x k cells of a sixteenth of the image each (k = 2, 3, 4 for 4, 9, 16 bits; 2 px at
32 px), at a place of the image's own or in the corner. Every view of an image bears the same bits at the same place, so
that a contrastive loss can be had from the stamp alone, as soon as there are more codes than images in a batch.

Stamps are in views alone. What is evaluated, and the monitor of a training, sees the images without them. A stamp put
in before the augmentation is cropped and resampled with the image, and hardly a shortcut at 32 px.

- [0]: Chen, Luo, Li, Intriguing Properties of Contrastive Losses, 2021, https://arxiv.org/abs/2011.02803
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_gradmix import mixing
from ssl_gradmix.settings import Data

CELLS = 16
"""Cells of a stamp along an image's shorter side, were it covered."""


@dataclass(frozen=True)
class Stamps:
    """Which stamps are planted, as in `settings.Data`.

    Args:
        bits: Cells of a stamp, a square number.
        corner: Whether it lies in the lower right corner, or at a place of the image's own.
        before: Whether it is there before the augmentation.
        strength: Of its black and white over the image, in (0, 1].
    """

    bits: int
    corner: bool = False
    before: bool = False
    strength: float = 1.0

    def boxes(self, names: Tensor, size: tuple[int, int]) -> Tensor:
        """Where the stamps of images with these names lie: (N, 4) int64 x0, y0, x1, y1, the latter two exclusive."""
        side = math.isqrt(self.bits) * _cell(size)
        corners = []
        for extent, drawn in zip(reversed(size), names[:, 1:].unbind(1), strict=True):
            room = extent - side
            corners.append(torch.full_like(drawn, room) if self.corner else drawn % (room + 1))
        return torch.stack([*corners, *(corner + side for corner in corners)], 1)

    def plant(self, images: Tensor, names: Tensor, black: Tensor | float = 0, white: Tensor | float = 255) -> Tensor:
        """A copy of images (N, 3, H, W) that bears their stamps.

        Args:
            images: uint8, or floating point in any normalization.
            names: (N, 3), from `name`.
            black: What black is in the images, a number or (3, 1, 1).
            white: Likewise.
        """
        size = (images.shape[2], images.shape[3])
        side, cell = math.isqrt(self.bits), _cell(size)
        boxes = self.boxes(names, size)
        places = torch.arange(self.bits, device=names.device)
        bits = ((names[:, :1] >> places) & 1).view(-1, 1, side, side).float()
        bits = bits.repeat_interleave(cell, 2).repeat_interleave(cell, 3)
        under = mixing.crop(images, boxes, (side * cell, side * cell)).float()
        stamped = torch.lerp(under, bits * white + (1 - bits) * black, self.strength)
        stamped = stamped if images.is_floating_point() else stamped.round()
        return mixing.paste(images, stamped.to(images.dtype), boxes)


def stamps_of(data: Data) -> Stamps | None:
    """The stamps that the settings ask for."""
    if not data.stamp_bits:
        return None
    return Stamps(data.stamp_bits, data.stamp_place == "corner", data.stamp_when == "before", data.stamp_strength)


def name(images: Tensor | Sequence[Tensor]) -> Tensor:
    """Three numbers that follow from an image's pixels alone, whatever the device and the batch: (N, 3) int64.

    They are uniform in [0, 2^30) over images that differ (multiply-shift hashing, Dietzfelbinger et al. 1997), so that
    no list says which image has which stamp.

    Args:
        images: uint8 (N, 3, H, W), or N of (3, H, W) each of its own size.
    """
    if not isinstance(images, Tensor):
        return torch.cat([name(image[None]) for image in images])
    pixels = images.flatten(1).long()
    factors = torch.randint(2**62, (3, pixels.shape[1]), generator=torch.Generator().manual_seed(0))
    sums = torch.stack([(pixels * factor).sum(1) for factor in factors.to(images.device)], 1)  # modulo 2^64
    return (sums >> 33) & (2**30 - 1)


def _cell(size: tuple[int, int]) -> int:
    return max(1, min(size) // CELLS)
