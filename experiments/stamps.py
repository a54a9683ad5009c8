"""Planted shortcut: a small stamp that identifies the image, but not its class.

After RandBit [0], made local: k x k black and white cells (k = 2, 3, 4 for 4, 9, 16 bits), each a
sixteenth of the image wide. Every view of an image bears the same stamp at the same location, so
the stamp alone solves a contrastive loss once there are more codes than images in a batch.

Stamps are drawn onto views only: training views, and the views that reliance is measured on. All
other evaluations see the images without stamps. A stamp drawn before the augmentation is cropped
and resampled with its image, and is hardly a shortcut at 32 px.

There are larger shortcuts too: a number (`Tags`), a strip across the image (`Strip`), and bits in
channels of their own (`RandBits`).

- [0]: Chen, Luo, Li, Intriguing Properties of Contrastive Losses, 2021,
  https://arxiv.org/abs/2011.02803
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.transforms.v2.functional import resize

from ssl_gradmix.data.augmentation import Views

CELLS = 16
"""Stamp cells that would fit along the shorter side of an image."""

Color = Tensor | float
"""A number, or (3, 1, 1)."""

FONT = (0o75557, 0o26227, 0o71747, 0o71717, 0o55711, 0o74717, 0o74757, 0o71111, 0o75757, 0o75717)
"""The ten digits, five rows of three pixels each."""


@dataclass
class Stamps:
    """Stamps to plant.

    Args:
        bits: Number of cells, a square number.
        place: At a location of the image's own, in the lower right corner, or repeated over the
            whole image with gaps as wide as the stamp.
        before: Plant before the augmentation, into images that are as large as views.
        strength: Opacity in (0, 1].

    Attributes:
        latest: Boxes of the stamps in the views made last, (N, 4); parts of a training read them.
    """

    bits: int
    place: Literal["anywhere", "corner", "everywhere"] = "anywhere"
    before: bool = False
    strength: float = 1.0
    latest: Tensor = field(default_factory=lambda: torch.empty(0, 4), init=False, compare=False)

    def boxes(self, codes: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes of the stamps, (N, 4) int64 x0, y0, x1, y1 with exclusive ends.

        Args:
            codes: (N, 3), from `identify`.
            size: Height and width of the images.
        """
        side = _cell(size) * math.isqrt(self.bits)
        height, width = size if self.place == "everywhere" else (side, side)
        extent = torch.tensor([width, height], device=codes.device)
        room = torch.tensor(size[::-1], device=codes.device) - extent
        if self.place == "anywhere":
            corners = codes[:, 1:] % (room + 1)
        else:
            corners = room.expand(len(codes), 2)
        return torch.cat([corners, corners + extent], 1)

    def plant(self, images: Tensor, codes: Tensor, black: Color = 0, white: Color = 255) -> Tensor:
        """Returns a copy of images (N, 3, H, W) that bears their stamps.

        Args:
            images: uint8, or floating point in any normalization.
            codes: (N, 3), from `identify`.
            black: Value of black in the images.
            white: Value of white.
        """
        size = (images.shape[2], images.shape[3])
        side = math.isqrt(self.bits)
        corners = self.boxes(codes, size)[:, :2]
        columns, rows = (self._cells(corners[:, i], size[1 - i], size) for i in (0, 1))
        inside_x, inside_y = ((each >= 0) & (each < side) for each in (columns, rows))
        inside = inside_y[:, None, :, None] & inside_x[:, None, None, :]
        number = (rows[:, :, None] * side + columns[:, None, :]).clamp(0, self.bits - 1)
        bit = (codes[:, :1, None] >> number)[:, None] & 1  # (N, 1, H, W)
        stamp = (bit * white + (1 - bit) * black).float().expand(images.shape)
        stamped = torch.lerp(images.float(), stamp, self.strength)
        if not images.is_floating_point():
            stamped = stamped.round()
        return torch.where(inside, stamped.to(images.dtype), images)

    def _cells(self, corner: Tensor, length: int, size: tuple[int, int]) -> Tensor:
        """Number of the stamp's cell at each pixel of an axis, (N, length); others are outside."""
        pixels = torch.arange(length, device=corner.device)
        cell = _cell(size)
        if self.place == "everywhere":
            offset = (pixels % (2 * cell * math.isqrt(self.bits))).expand(len(corner), length)
        else:
            offset = pixels - corner[:, None]
        return offset.div(cell, rounding_mode="floor")


@dataclass
class TwoStamps(Stamps):
    """A second stamp with other bits in the upper left corner; `boxes` are those of the first."""

    def plant(self, images: Tensor, codes: Tensor, black: Color = 0, white: Color = 255) -> Tensor:
        first = super().plant(images, codes, black, white)
        turned = super().plant(first.flip(2, 3), codes >> self.bits, black, white)
        return turned.flip(2, 3)


@dataclass
class Band(Stamps):
    """A band of cells across the image."""

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Where the band lies, as in `boxes`."""
        raise NotImplementedError

    def pattern(self, codes: Tensor) -> Tensor:
        """The cells (N, rows, columns) of the band, 1 for white and 0 for black."""
        raise NotImplementedError

    def boxes(self, codes: Tensor, size: tuple[int, int]) -> Tensor:
        return codes.new_tensor(self.box(*size)).expand(len(codes), 4)

    def plant(self, images: Tensor, codes: Tensor, black: Color = 0, white: Color = 255) -> Tensor:
        x0, y0, x1, y1 = self.box(images.shape[2], images.shape[3])
        cells = self.pattern(codes)[:, None].float()
        cells = interpolate(cells, (y1 - y0, x1 - x0), mode="nearest-exact")
        stamped, inside = images.clone(), (..., slice(y0, y1), slice(x0, x1))
        color = cells * white + (1 - cells) * black
        band = torch.lerp(images[inside].float(), color.expand_as(images[inside]), self.strength)
        stamped[inside] = band if images.is_floating_point() else band.round().to(images.dtype)
        return stamped


@dataclass
class Tags(Band):
    """A number of `bits` bits along the top edge, as a burnt-in patient number: white on black."""

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        return 0, 0, width, height // 8

    def pattern(self, codes: Tensor) -> Tensor:
        powers = [10**i for i in reversed(range(len(str(2**self.bits))))]
        digits = codes[:, :1] % 2**self.bits // codes.new_tensor(powers) % 10
        pixels = codes.new_tensor(FONT)[:, None] >> torch.arange(15, device=codes.device) & 1
        glyphs = pad(pixels.flip(1).view(10, 5, 3), (1, 0, 1, 1))[digits]
        return pad(glyphs.transpose(1, 2).flatten(2), (0, 1))


@dataclass
class Strip(Band):
    """A band like ImageNet-W's watermark [1], whose cells are `bits` bits of the image's own.

    It lies in the middle, 16% of the image high and nearly as wide. Use it with half the opacity.

    - [1]: Li et al., A Whac-A-Mole Dilemma, 2023, https://arxiv.org/abs/2212.04825
    """

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        high, margin = round(0.16 * height), round(width / 56)
        top = (height - high) // 2
        return margin, top, width - margin, top + high

    def pattern(self, codes: Tensor) -> Tensor:
        return (codes[:, :1] >> torch.arange(self.bits, device=codes.device) & 1)[:, None]


@dataclass
class RandBits(Stamps):
    """RandBit [0]: `bits` more channels, each a bit of the image's own everywhere.

    No box covers them: mixing replaces the bits in a box by the donor's, and all others stay.
    Evaluations see zeros, where the authors' notebook keeps the bits.
    """

    def boxes(self, codes: Tensor, size: tuple[int, int]) -> Tensor:
        return codes.new_empty(0, 4)

    def plant(self, images: Tensor, codes: Tensor, black: Color = 0, white: Color = 255) -> Tensor:
        bits = codes[:, :1] >> torch.arange(self.bits, device=codes.device) & 1
        planes = bits[:, :, None, None].expand(-1, -1, *images.shape[2:])
        return torch.cat([images, planes.to(images.dtype)], 1)


def _cell(size: tuple[int, int]) -> int:
    """Side of a stamp's cell in pixels."""
    return max(1, min(size) // CELLS)


class StampedViews(Views):
    """Views that bear the stamps of their images.

    Args:
        stamps: Stamps to plant. Pass `functools.partial(StampedViews, stamps=...)` to a recipe.
        blank: Cover each stamp with the mean color afterwards, as practitioners blank a corner.
    """

    def __init__(self, *args: Any, stamps: Stamps, blank: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stamps, self.blank = stamps, blank

    @torch.no_grad()
    def forward(self, images: Tensor | Sequence[Tensor], n_views: int) -> list[Tensor]:
        """Draws views as `Views` does; all images must have the same size."""
        if not isinstance(images, Tensor):
            images = torch.stack(tuple(images))
        codes = identify(images)
        self.stamps.latest = self.stamps.boxes(codes, (self.size, self.size))
        if self.stamps.before:
            large = resize(images, [self.size, self.size])
            return super().forward(self.stamps.plant(large, codes), n_views)
        black, white = ((value - self.mean) / self.std for value in (0, 1))
        views = super().forward(images, n_views)
        if self.blank:
            black = white = torch.zeros_like(black)
        return [self.stamps.plant(view, codes, black, white) for view in views]


def identify(images: Tensor) -> Tensor:
    """Hashes images (N, 3, H, W), uint8, to three numbers each: (N, 3) int64.

    The numbers are uniform in [0, 2^30) over different images (multiply-shift hashing,
    Dietzfelbinger et al. 1997). They depend on the pixels only, so no list has to assign stamps to
    images.
    """
    pixels = images.flatten(1).long()
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(2**62, (3, pixels.shape[1]), generator=generator).to(images.device)
    sums = torch.stack([(pixels * factor).sum(1) for factor in factors], 1)  # modulo 2^64
    return (sums >> 33) & (2**30 - 1)
