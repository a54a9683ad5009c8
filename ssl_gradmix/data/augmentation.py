"""Random views of images, made batch by batch on the device of the encoder.

The chain is SimCLR's [0] with BYOL's [1] solarization: random resized crop of the whole image at
its own resolution, horizontal flip, rotation (off by default), color jitter, grayscale, Gaussian
blur, solarization (second view only), normalization, erasing (off by default).

- [0]: SimCLR, 2020, https://arxiv.org/abs/2002.05709
- [1]: BYOL, 2020, https://arxiv.org/abs/2006.07733
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

BLUR_SIGMA = (0.1, 2.0)
"""Range of the Gaussian blur's sigma, in pixels of a 224 px image."""

SOLARIZE_FROM = 128 / 255
"""Solarization inverts values from here on (Pillow's default)."""

_CROP_TRIES = 10
CROP_NUMBERS = 2 * _CROP_TRIES + 2
"""Random numbers per crop."""

ERASE_NUMBERS = 2 * _CROP_TRIES + 3
"""Random numbers per erased box."""

_CPU_PIXELS, _DEVICE_PIXELS = 2**16, 2**26
"""Pixels of a batch that are processed at a time. On a CPU, intermediate results then stay in its
cache, which saves a third of the time; on a GPU they stay within a few GiB."""


@dataclass
class Augmentation:
    """The random changes that make views of an image.

    Args:
        min_scale: Smallest fraction of the image's area that a random resized crop keeps.
        flip: Probability of a horizontal flip. Defaults to 0.5; recipes default to 0 for digit
            data sets, because mirrored digits are not digits.
        jitter: Probability of a color jitter.
        brightness: Brightness factor is drawn from [1 - b, 1 + b].
        contrast: Contrast factor is drawn from [1 - c, 1 + c].
        saturation: Saturation factor is drawn from [1 - s, 1 + s].
        hue: Hue shift, as a fraction of the color circle, is drawn from [-h, h].
        gray: Probability of a conversion to grayscale.
        blur: Probability of a Gaussian blur, with sigma in [0.1, 2] pixels at 224 px and in
            proportion at other sizes. Defaults to 0; recipes default to 0.5 from 96 px on.
        solarize: Probability of solarization, second view only (BYOL).
        rotation: Angle of a rotation is drawn from [-r, r], in degrees. Corners become black.
        erase: Probability of erasing a random box, which becomes 0 after the normalization.
        erase_scale: Smallest and largest area of the box, as fractions of the view.
        erase_ratio: Smallest and largest ratio of its height to its width.
    """

    min_scale: ClosedUnitInterval = 0.2
    flip: ClosedUnitInterval | None = 0.5
    jitter: ClosedUnitInterval = 0.8
    brightness: ClosedUnitInterval = 0.4
    contrast: ClosedUnitInterval = 0.4
    saturation: ClosedUnitInterval = 0.4
    hue: ClosedUnitInterval = 0.1
    gray: ClosedUnitInterval = 0.2
    blur: ClosedUnitInterval | None = None
    solarize: ClosedUnitInterval = 0.0
    rotation: NonNegativeFloat = 0.0
    erase: ClosedUnitInterval = 0.0
    erase_scale: tuple[PositiveFloat, PositiveFloat] = (0.02, 0.33)
    erase_ratio: tuple[PositiveFloat, PositiveFloat] = (0.3, 3.3)

    def __post_init__(self) -> None:
        for name in ("erase_scale", "erase_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"augmentation.{name} must be (low, high), got ({low}, {high})")
        self.flip = 0.5 if self.flip is None else self.flip
        self.blur = 0.0 if self.blur is None else self.blur


def usual_augmentation(data_name: str, size: int) -> dict[str, float]:
    """Default flip and blur probabilities for a data set and an image size."""
    flip = 0.0 if data_name in ("digits", "mnist", "svhn") else 0.5
    blur = 0.5 if size >= 96 else 0.0
    return {"flip": flip, "blur": blur}


class Draws(NamedTuple):
    """The random numbers of one view of N images."""

    boxes: Tensor  # (N, 4), top, left, height and width of the crop in whole pixels
    flip: Tensor  # (N, 1), 1 to flip from left to right, else 0
    jitter: Tensor  # (N, 4), brightness, contrast and saturation factors minus 1, and hue shift
    gray: Tensor  # (N, 1), 1 to convert to grayscale, else 0
    blur: Tensor  # (N, 1), 1 to blur, else 0
    solarize: Tensor  # (N, 1), 1 to solarize, else 0
    sigma: Tensor  # (N, 1), of the blur, in pixels
    angle: Tensor  # (N, 1), of the rotation, in degrees, counterclockwise
    erased: Tensor  # (N, 4), top, left, height and width of the erased box, all 0 for none
    order: list[int]  # order in which the columns of jitter are applied


class Views(nn.Module):
    """Makes views of a batch of images.

    The distributions are those of torchvision's `RandomResizedCrop` (ratio 3/4 to 4/3, antialiased
    bilinear), `RandomRotation` (bilinear), `ColorJitter`, `RandomGrayscale`, `GaussianBlur` (kernel
    of a tenth of the image, odd) and `RandomErasing`, with two differences: the order of the four
    color changes is drawn once per view of the batch, not per image, and nothing is rounded to 8
    bits in between. At 32 px the blur's sigma is 0.01 to 0.29 pixels in a 3x3 kernel, which is
    hardly visible: SimCLR does not use it on CIFAR-10.

    All random numbers come from torch's global CPU generator, so the same seed gives the same
    views on every device. Each process draws the numbers of the global batch and takes its own, so
    views do not depend on the number of processes. Nothing synchronizes with the device.

    To change views, for instance to plant a shortcut, override `forward` and call it with changed
    images, or change the views it returns.

    Args:
        augmentation: The settings.
        size: Side of the views in pixels.
        mean: Mean of the red, green and blue channels, for images in [0, 1]; a single one for gray
            images, which have no saturation or hue to change.
        std: Standard deviation of the channels.
        process: Index of this process.
        processes: Number of processes that share a batch.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        augmentation: Augmentation,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        process: int = 0,
        processes: int = 1,
    ) -> None:
        super().__init__()
        self.augmentation, self.size = augmentation, size
        self.process, self.processes = process, processes
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor | Sequence[Tensor], n_views: int) -> list[Tensor]:
        """Draws `n_views` views of each image.

        Args:
            images: uint8 (N, C, H, W), or int32 with 16 bits, or N tensors (C, H, W) of different
                sizes, on this module's device.
            n_views: Number of views; only the second (index 1) is ever solarized.

        Returns:
            `n_views` float32 tensors (N, C, size, size), normalized.

        Raises:
            ValueError: `images` does not have such a type or shape.
        """
        if not isinstance(images, Tensor) and len({image.shape for image in images}) == 1:
            images = torch.stack(tuple(images))
        for each in (images,) if isinstance(images, Tensor) else images:
            _require(each if isinstance(images, Tensor) else each[None], len(self.mean))
        with torch.autocast(images[0].device.type, enabled=False):
            draws = (self.draw(images, second=view == 1) for view in range(n_views))
            return [self.apply_draws(images, drawn) for drawn in draws]

    def draw(self, images: Tensor | Sequence[Tensor], second: bool) -> Draws:
        """Draws the random numbers of one view, on the CPU."""
        settings, n = self.augmentation, len(images)
        everyone, own = n * self.processes, slice(self.process * n, (self.process + 1) * n)
        solarize = settings.solarize if second else 0.0
        chances = [settings.flip, settings.jitter, settings.gray, settings.blur, solarize]
        happens = (torch.rand(everyone, 5)[own] < torch.tensor(chances)).float()
        flip, jittered, gray, blur, solarized = happens.split(1, dim=1)
        if isinstance(images, Tensor):
            extents = torch.tensor(images.shape[-2:]).expand(n, 2)
        else:
            extents = torch.tensor([image.shape[-2:] for image in images])
        boxes = crop_boxes(extents, settings.min_scale, torch.rand(everyone, CROP_NUMBERS)[own])
        color = [settings.brightness, settings.contrast, settings.saturation, settings.hue]
        jitter = torch.empty(everyone, 4).uniform_(-1, 1)[own] * torch.tensor(color) * jittered
        sigma = torch.empty(everyone, 1).uniform_(*BLUR_SIGMA)[own] * self.size / 224
        order = torch.randperm(4).tolist()
        angle, erased = torch.zeros(n, 1), torch.zeros(n, 4)
        if settings.rotation:
            angle = torch.empty(everyone, 1).uniform_(-1, 1)[own] * settings.rotation
        if settings.erase:
            drawn = torch.rand(everyone, ERASE_NUMBERS)[own]
            erased = erase_boxes(self.size, settings, drawn)
        return Draws(boxes, flip, jitter, gray, blur, solarized, sigma, angle, erased, order)

    def apply_draws(self, images: Tensor | Sequence[Tensor], draws: Draws) -> Tensor:
        """Makes the view that `draws` describe, float32 (N, C, size, size)."""
        numbers = torch.cat(draws[:-1], dim=1)
        # Images of different sizes are cropped one by one; only their views are processed together.
        in_pixels = images.shape[-2] * images.shape[-1] if isinstance(images, Tensor) else 0
        limit = _CPU_PIXELS if images[0].device.type == "cpu" else _DEVICE_PIXELS
        chunk = max(1, limit // max(in_pixels, self.size**2))
        parts = [slice(start, start + chunk) for start in range(0, len(images), chunk)]
        return torch.cat(
            [self._augment(images[part], numbers[part], draws.order) for part in parts]
        )

    def _augment(
        self, images: Tensor | Sequence[Tensor], numbers: Tensor, order: Sequence[int]
    ) -> Tensor:
        settings = self.augmentation
        there = numbers.to(images[0].device, non_blocking=True)
        boxes, flip, jitter, masks, sigma, angle, erased = there.split([4, 1, 4, 3, 1, 1, 4], dim=1)
        gray, blur, solarize = masks.view(-1, 3, 1, 1, 1).unbind(1)
        if not isinstance(images, Tensor):  # their boxes are read on the CPU, without waiting
            boxes, flip = numbers[:, :4], numbers[:, 4]
        views = resized_crop(images, boxes, flip, self.size).div_(_white(images[0]))
        if settings.rotation:
            views = rotate(views, angle)
        views = color_jitter(views, jitter, order)
        # lerp with a weight of 0 or 1 selects like torch.where, and is much faster on the CPU.
        if settings.gray:
            views = torch.lerp(views, luma(views), gray)
        if settings.blur:
            views = torch.lerp(views, gaussian_blur(views, sigma), blur)
        if settings.solarize:
            views = torch.where(solarize * views >= SOLARIZE_FROM, 1 - views, views)
        views = views.sub_(self.mean).div_(self.std)
        return erase(views, erased) if settings.erase else views


def crop_boxes(extents: Tensor, min_scale: float, drawn: Tensor) -> Tensor:
    """Turns random numbers into crops, distributed as in torchvision's `RandomResizedCrop`.

    The area is uniform in [min_scale, 1] of the image's, the logarithm of the aspect ratio uniform
    in [log 3/4, log 4/3]. The first of ten draws that fits in the image is placed at random; if
    none fits, the largest centered crop with such a ratio is taken.

    Args:
        extents: Height and width of each image, (N, 2).
        min_scale: Smallest fraction of the area.
        drawn: Random numbers in [0, 1), (N, CROP_NUMBERS).

    Returns:
        Boxes as in `Draws`.
    """
    height, width = extents.float().split(1, dim=1)
    scale, aspect, down, across = drawn.split([_CROP_TRIES, _CROP_TRIES, 1, 1], dim=1)
    area = height * width * (min_scale + (1 - min_scale) * scale)
    ratio = (math.log(3 / 4) + math.log(16 / 9) * aspect).exp()
    heights, widths = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    found, first = fits.any(1, keepdim=True), fits.int().argmax(1, keepdim=True)
    tallest = torch.minimum(height, (width * 4 / 3).round())
    widest = torch.minimum(width, (height * 4 / 3).round())
    box_height = torch.where(found, heights.gather(1, first), tallest)
    box_width = torch.where(found, widths.gather(1, first), widest)
    top = torch.where(found, down * (height - box_height + 1), (height - box_height) / 2).floor()
    left = torch.where(found, across * (width - box_width + 1), (width - box_width) / 2).floor()
    return torch.cat([top, left, box_height, box_width], dim=1)


def erase_boxes(size: int, settings: Augmentation, drawn: Tensor) -> Tensor:
    """Turns random numbers into boxes to erase, distributed as in torchvision's `RandomErasing`.

    The first of ten draws that is smaller than the view is placed at random. If there is none, or
    with probability 1 - `settings.erase`, the box is empty.

    Args:
        size: Side of the views in pixels.
        settings: The probability, and the ranges of area and ratio.
        drawn: Random numbers in [0, 1), (N, ERASE_NUMBERS).

    Returns:
        Boxes as in `Draws`.
    """
    scale, aspect, down, across, happens = drawn.split([_CROP_TRIES, _CROP_TRIES, 1, 1, 1], dim=1)
    smallest, largest = settings.erase_scale
    area = size * size * (smallest + (largest - smallest) * scale)
    flattest, tallest = map(math.log, settings.erase_ratio)
    ratio = (flattest + (tallest - flattest) * aspect).exp()
    heights, widths = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (heights < size) & (widths < size)
    first = fits.int().argmax(1, keepdim=True)
    height, width = heights.gather(1, first), widths.gather(1, first)
    top, left = (down * (size - height + 1)).floor(), (across * (size - width + 1)).floor()
    erased = fits.any(1, keepdim=True) & (happens < settings.erase)
    return torch.cat([top, left, height, width], dim=1) * erased


def erase(views: Tensor, boxes: Tensor) -> Tensor:
    """Sets a box of each view (N, C, size, size) to 0; `boxes` as in `Draws`."""
    top, left, height, width = boxes.view(-1, 4, 1, 1, 1).unbind(1)
    pixel = torch.arange(views.shape[-1], device=views.device)
    down, across = pixel.view(-1, 1), pixel.view(1, -1)
    inside = (down >= top) & (down < top + height) & (across >= left) & (across < left + width)
    return views.masked_fill(inside, 0)


def rotate(images: Tensor, angle: Tensor) -> Tensor:
    """Rotates each image (N, C, size, size) about its center, as torchvision's `rotate`: bilinear.

    Outside the image is black. There, torchvision weighs pixels at the edge by the part of them
    that is inside once more, and so does this.

    Args:
        images: The images.
        angle: (N, 1), in degrees, counterclockwise.
    """
    radians = torch.deg2rad(angle)
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    turn = torch.cat([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    inside = torch.ones_like(images[:, :1])
    grid = nn.functional.affine_grid(turn, list(images.shape), align_corners=False)
    turned = nn.functional.grid_sample(torch.cat([images, inside], 1), grid, align_corners=False)
    return turned[:, :-1] * turned[:, -1:]


def resized_crop(
    images: Tensor | Sequence[Tensor], boxes: Tensor, flip: Tensor, size: int
) -> Tensor:
    """Crops each image to its own box, resizes and flips it, as torchvision: bilinear, antialiased.

    Bilinear resampling is linear and separable, so each image of a batch is multiplied by one
    matrix for its rows and one for its columns. `grid_sample` would alias where a crop shrinks.

    Args:
        images: (N, C, H, W), or N tensors (C, H, W) of different sizes.
        boxes: As in `Draws`; on the CPU for images of different sizes, else on their device.
        flip: As in `Draws`; on the same device as `boxes`.
        size: Side of the result in pixels.

    Returns:
        float32 (N, C, size, size), in the range of `images`.
    """
    if not isinstance(images, Tensor):
        crops = []
        corners, flips = boxes.int().tolist(), flip.view(-1).tolist()
        for image, (top, left, height, width), flipped in zip(images, corners, flips, strict=True):
            crop = image[None, :, top : top + height, left : left + width].float()
            crop = nn.functional.interpolate(crop, (size, size), mode="bilinear", antialias=True)
            crops.append(crop.flip(-1) if flipped else crop)
        return torch.cat(crops)
    n, channels, height, width = images.shape
    top, left, box_height, box_width = boxes.view(n, 4, 1, 1).unbind(1)
    target = torch.arange(size, device=images.device).view(1, size, 1)
    flipped_target = target + flip.view(n, 1, 1) * (size - 1 - 2 * target)
    rows = _resampling_matrix(top, box_height, height, target)
    columns = _resampling_matrix(left, box_width, width, flipped_target)
    views = torch.bmm(rows, images.transpose(1, 2).float().reshape(n, height, channels * width))
    views = torch.bmm(views.view(n, size * channels, width), columns.transpose(1, 2))
    return views.view(n, size, channels, size).transpose(1, 2).contiguous()


def _resampling_matrix(start: Tensor, length: Tensor, extent: int, target: Tensor) -> Tensor:
    """Weights (N, size, extent) of the image's pixels in each target pixel, along one axis.

    The crop covers `length` pixels from `start` on. The weights are a triangle around the center
    of the target pixel, as wide as the larger of both kinds of pixel, cut off at the crop's edges.
    """
    scale = length / target.shape[1]
    pixel = torch.arange(extent, device=start.device)
    center = start + (target + 0.5) * scale - 0.5
    inside = ((pixel >= start) & (pixel < start + length)).float()
    weights = (1 - (pixel - center).abs() / scale.clamp(min=1)).clamp(min=0) * inside
    return weights / weights.sum(-1, keepdim=True)


def color_jitter(images: Tensor, jitter: Tensor, order: Sequence[int]) -> Tensor:
    """Changes brightness, contrast, saturation and hue, as torchvision's `adjust_*` functions.

    Args:
        images: (N, C, H, W) in [0, 1], which the result is too; gray ones have no hue to change.
        jitter: As in `Draws`.
        order: As in `Draws`.
    """
    brightness, contrast, saturation, hue = jitter.view(-1, 4, 1, 1, 1).unbind(1)
    for column in order:
        if column == 0:
            images = (images * (1 + brightness)).clamp_(0, 1)
        elif column == 1:
            mean = luma(images).mean((-2, -1), keepdim=True)
            images = torch.lerp(mean, images, 1 + contrast).clamp_(0, 1)
        elif column == 2:
            images = torch.lerp(luma(images), images, 1 + saturation).clamp_(0, 1)
        elif images.shape[1] == 3:
            images = torch.lerp(images, shift_hue(images, hue), (hue != 0).float())
    return images


def luma(images: Tensor) -> Tensor:
    """Perceived brightness of images, (N, 1, H, W), with torchvision's (ITU-R 601) weights."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shifts the hue of images (N, 3, H, W) in [0, 1], as torchvision's and kornia's `adjust_hue`.

    Without masks, in differences, minima and maxima, this takes a fraction of their time on the
    CPU. The hue comes from sorting the channels [0].

    Args:
        images: RGB images.
        shift: (N, 1, 1, 1) fraction of the color circle, in [-0.5, 0.5].

    - [0]: Fast branchless RGB to HSV conversion, 2013, http://lolengine.net/blog/2013/01/13/fast-rgb-to-hsv
    """
    red, green, blue = images.split(1, dim=1)
    higher, lower = torch.maximum(green, blue), torch.minimum(green, blue)
    most, middle = torch.maximum(red, higher), torch.minimum(red, higher)
    least = torch.minimum(red, lower)
    chroma = most - least
    blue_leads = (blue - green).sign_().clamp_(min=0)  # 1 where blue > green, else 0
    red_trails = (higher - red).sign_().clamp_(min=0)
    sextant = red_trails * (12 * blue_leads - 2) - 6 * blue_leads
    hue = (sextant + (middle - lower) / chroma.clamp(min=1e-12)).abs_()  # [0, 6)
    hue = hue + 6 * shift
    hue = hue - 6 * (hue / 6).floor_()
    new_red, new_green, new_blue = (hue - 3).abs_() - 1, 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()
    return least + chroma * torch.cat([new_red, new_green, new_blue], dim=1).clamp_(0, 1)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blurs each image (N, C, size, size) by its own sigma (N, 1), in pixels.

    The kernel is a tenth of the image's width, odd. Edges are reflected, as in torchvision's
    `gaussian_blur`, which has one sigma for all images.
    """
    n, channels, _, width = images.shape
    radius = width // 20
    offset = torch.arange(-radius, radius + 1, device=images.device)
    weights = (-0.5 * (offset / sigma) ** 2).exp()
    weights = weights / weights.sum(1, keepdim=True)
    weights = weights.repeat_interleave(channels, dim=0)  # one kernel per image and channel
    padded = nn.functional.pad(images, [radius] * 4, mode="reflect").flatten(0, 1)[None]
    rows = nn.functional.conv2d(padded, weights[:, None, :, None], groups=n * channels)
    return nn.functional.conv2d(rows, weights[:, None, None, :], groups=n * channels).view_as(
        images
    )


def eval_transform(
    size: int, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Tensor], Tensor]:
    """Builds a function that normalizes images by the mean and standard deviation of a channel.

    It maps uint8 (N, C, size, size), or int32 with 16 bits, to float32 on the same device, and
    raises ValueError for another type or shape.
    """
    channel_mean = torch.tensor(mean).view(-1, 1, 1)
    channel_std = torch.tensor(std).view(-1, 1, 1)

    def normalize(images: Tensor) -> Tensor:
        _require(images, len(mean))
        if images.shape[2:] != (size, size):
            raise ValueError(f"images must be {size}x{size}, got {tuple(images.shape)}")
        scaled = images.float().div_(_white(images))
        return scaled.sub_(channel_mean.to(images.device)).div_(channel_std.to(images.device))

    return normalize


def _white(images: Tensor) -> int:
    """The value of white."""
    return 255 if images.dtype == torch.uint8 else 65535


def _require(images: Tensor, channels: int) -> None:
    is_known = images.dtype in (torch.uint8, torch.int32)
    if not is_known or images.ndim != 4 or images.shape[1] != channels:
        got = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"images must be uint8 or int32 (N, {channels}, H, W), got {got}")
