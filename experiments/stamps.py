"""A shortcut planted into images: a small stamp that names the image, and not its class.

After RandBit [0], made local: k x k black and white cells of a sixteenth of the image each (k = 2, 3, 4 for 4, 9, 16
bits; 2 px at 32 px), at a place of the image's own, in the corner, or again and again all over the image. Or the time
of day in digits. Every view of an image bears the same stamp at the same place, so that a contrastive loss can be had
from it alone, as soon as there are more codes than images in a batch.

Stamps are in views alone: those of a training, and those that reliance is read from. All else that is evaluated, a
monitor's kNN too, sees the images without them. A stamp put in before the augmentation is cropped and resampled with
the image, and hardly a shortcut at 32 px.

- [0]: Chen, Luo, Li, Intriguing Properties of Contrastive Losses, 2021, https://arxiv.org/abs/2011.02803
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_gradmix import mixing
from ssl_gradmix.settings import Data

CELLS = 16
"""Cells of a stamp along an image's shorter side, were it covered."""

DIGITS = (31599, 11415, 29671, 29647, 23497, 31183, 31215, 29257, 31727, 31695)
"""0 to 9 in 5 rows of 3 pixels, the first one the highest bit."""


@dataclass(frozen=True)
class Stamps:
    """Which stamps are planted, as in `settings.Data`.

    Args:
        bits: Cells of a stamp, a square number; 0 writes the time of day, hhmmss, in digits of 3x5 px at 64 px.
        place: At a place of the image's own, in the lower right corner, or repeated all over the image, each a stamp's
            side from the next.
        before: Whether it is there before the augmentation.
        strength: Of its black and white over the image, in (0, 1].
    """

    bits: int
    place: Literal["anywhere", "corner", "everywhere"] = "anywhere"
    before: bool = False
    strength: float = 1.0

    def boxes(self, names: Tensor, size: tuple[int, int]) -> Tensor:
        """Where the stamps of images with these names lie: (N, 4) int64 x0, y0, x1, y1, the latter two exclusive."""
        extent = self._drawn(names[:1], size)[0].shape[2:]
        corners = []
        for i, drawn in zip((1, 0), names[:, 1:].unbind(1), strict=True):
            room = size[i] - extent[i]
            corners.append(drawn % (room + 1) if self.place == "anywhere" else torch.full_like(drawn, room))
        return torch.stack([*corners, *(corner + extent[i] for i, corner in zip((1, 0), corners, strict=True))], 1)

    def plant(self, images: Tensor, names: Tensor, black: Tensor | float = 0, white: Tensor | float = 255) -> Tensor:
        """A copy of images (N, 3, H, W) that bears their stamps.

        Args:
            images: uint8, or floating point in any normalization.
            names: (N, 3), from `name`.
            black: What black is in the images, a number or (3, 1, 1).
            white: Likewise.
        """
        size = (images.shape[2], images.shape[3])
        boxes, (drawn, covered) = self.boxes(names, size), self._drawn(names, size)
        under = mixing.crop(images, boxes, (drawn.shape[2], drawn.shape[3])).float()
        stamped = torch.lerp(under, drawn * white + (1 - drawn) * black, self.strength * covered)
        stamped = stamped if images.is_floating_point() else stamped.round()
        return mixing.paste(images, stamped.to(images.dtype), boxes)

    def _drawn(self, names: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Stamps (N, 1, h, w), 0 for black and 1 for white; and where they cover the image likewise, (1, 1, h, w)."""
        drawn = _cells(names[:, 0], self.bits, size) if self.bits else _time(names[:, 0], size)
        covered = torch.ones_like(drawn[:1])
        if self.place != "everywhere":
            return drawn, covered
        height, width = drawn.shape[2:]
        times = [math.ceil(size[i] / (2 * side)) for i, side in enumerate((height, width))]
        return tuple(
            F.pad(each, (0, width, 0, height)).tile(1, 1, *times)[..., : size[0], : size[1]]
            for each in (drawn, covered)
        )


def _cells(codes: Tensor, bits: int, size: tuple[int, int]) -> Tensor:
    side, cell = math.isqrt(bits), max(1, min(size) // CELLS)
    drawn = ((codes[:, None] >> torch.arange(bits, device=codes.device)) & 1).view(-1, 1, side, side).float()
    return drawn.repeat_interleave(cell, 2).repeat_interleave(cell, 3)


def _time(codes: Tensor, size: tuple[int, int]) -> Tensor:
    pixels = torch.arange(14, -1, -1, device=codes.device)
    digits = torch.stack([torch.full_like(pixels, digit) >> pixels & 1 for digit in DIGITS]).view(10, 5, 3).float()
    seconds = codes % 86400
    numbers = torch.stack([seconds // 3600, seconds // 60 % 60, seconds % 60], 1)
    shown = digits[torch.stack([numbers // 10, numbers % 10], 2).flatten(1)]  # (N, 6, 5, 3)
    drawn = F.pad(shown, (1, 0, 1, 1)).permute(0, 2, 1, 3).flatten(2)[:, None]
    scale = max(1, min(size) // 64)
    return F.pad(drawn, (0, 1)).repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def stamps_of(data: Data) -> Stamps | None:
    """The stamps that the settings ask for."""
    if not data.stamp_bits and not data.stamp_time:
        return None
    return Stamps(data.stamp_bits, data.stamp_place, data.stamp_when == "before", data.stamp_strength)


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
    factors = factors.to(images.device, non_blocking=True)
    sums = torch.stack([(pixels * factor).sum(1) for factor in factors], 1)  # modulo 2^64
    return (sums >> 33) & (2**30 - 1)
