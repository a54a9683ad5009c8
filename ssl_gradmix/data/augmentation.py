"""Random views of images, batch by batch where the encoder runs.

The chain is SimCLR's [0] with BYOL's [1] solarization: random resized crop of the whole image at its own resolution,
horizontal flip, color jitter, gray, Gaussian blur, solarization (second view only), normalization.

- [0]: SimCLR, 2020, https://arxiv.org/abs/2002.05709
- [1]: BYOL, 2020, https://arxiv.org/abs/2006.07733
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssl_gradmix.data import planted
from ssl_gradmix.data.planted import Stamps
from ssl_gradmix.settings import Augmentation

BLUR_SIGMA = (0.1, 2.0)
"""Range of the Gaussian blur's sigma, in pixels of a 224 px image."""

SOLARIZE_FROM = 128 / 255
"""Solarization inverts values from here on (Pillow's default)."""

_CROP_TRIES = 10
CROP_NUMBERS = 2 * _CROP_TRIES + 2
"""Random numbers that a crop takes."""

_CPU_PIXELS, _DEVICE_PIXELS = 2**16, 2**26
"""So many pixels of a batch are worked on at a time: on a CPU the intermediate results then stay in its cache, which
saves a third, and elsewhere they stay within a few GiB, whatever the size of the images."""


class Draws(NamedTuple):
    """The random numbers of one view of N images."""

    boxes: Tensor  # (N, 4), top, left, height and width of the crop in whole pixels
    flip: Tensor  # (N, 1), 1 where the image is flipped from left to right, else 0
    jitter: Tensor  # (N, 4), brightness, contrast and saturation factors less 1, and the hue shift; 0 changes nothing
    gray: Tensor  # (N, 1), 1 where the image turns gray, else 0
    blur: Tensor  # likewise
    solarize: Tensor  # likewise
    sigma: Tensor  # (N, 1), of the blur, in pixels
    order: list[int]  # in which the columns of jitter are applied


class Views(nn.Module):
    """Makes views of a whole batch where the images lie.

    The distributions are those of torchvision's `RandomResizedCrop` (ratio 3/4 to 4/3, antialiased bilinear),
    `ColorJitter`, `RandomGrayscale` and `GaussianBlur` (kernel a tenth of the image, odd), with two departures: the
    order of the four color changes is drawn once for a view of the batch, not for each image, and nothing is rounded
    to 8 bits in between. At 32 px the blur's sigma is 0.01 to 0.29 pixels in a 3x3 kernel, which is hardly visible: as
    in SimCLR, which leaves it out on CIFAR-10, it is meant for larger images.

    Every random number comes from torch's global CPU generator, so the same seed gives the same views on every device.
    Each process draws the numbers of the global batch and takes its own: the views do not depend on how many share it.
    Every operation is applied to all images and takes effect where it was drawn: nothing waits for the device.

    Args:
        augmentation: The settings.
        size: Side of the views in pixels.
        mean: Of the red, green and blue channel, of images in [0, 1].
        std: Likewise.
        process: This process's number.
        processes: How many share a batch.
        stamps: What is planted into the views, if anything is.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        process: int = 0,
        processes: int = 1,
        stamps: Stamps | None = None,
    ) -> None:
        super().__init__()
        self.augmentation, self.size, self.stamps = augmentation, size, stamps
        self.process, self.processes = process, processes
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor | Sequence[Tensor], n_views: int) -> list[Tensor]:
        """Draws `n_views` views of every image.

        Args:
            images: uint8 (N, 3, H, W), or N of (3, H, W) each of its own size, on this module's device.
            n_views: How many; only the second (index 1) is ever solarized.

        Returns:
            `n_views` float32 tensors (N, 3, size, size), normalized.

        Raises:
            ValueError: A tensor is not uint8 (N, 3, H, W).
        """
        if not isinstance(images, Tensor) and len({image.shape for image in images}) == 1:
            images = torch.stack(tuple(images))
        if isinstance(images, Tensor) and (images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3):
            raise ValueError(f"images must be uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        with torch.autocast(images[0].device.type, enabled=False):
            names = planted.name(images) if self.stamps else None
            if self.stamps and self.stamps.before:
                images = self._stamped(images, names)
            views = [self.apply_draws(images, self.draw(images, second=view == 1)) for view in range(n_views)]
            if self.stamps and not self.stamps.before:
                black, white = (0 - self.mean) / self.std, (1 - self.mean) / self.std
                views = [self.stamps.plant(view, names, black, white) for view in views]
            return views

    def _stamped(self, images: Tensor | Sequence[Tensor], names: Tensor) -> Tensor | list[Tensor]:
        if isinstance(images, Tensor):
            return self.stamps.plant(images, names)
        return [self.stamps.plant(each[None], name[None])[0] for each, name in zip(images, names, strict=True)]

    def draw(self, images: Tensor | Sequence[Tensor], second: bool) -> Draws:
        """Draws the random numbers of one view, on the CPU."""
        settings, n = self.augmentation, len(images)
        everyone, own = n * self.processes, slice(self.process * n, (self.process + 1) * n)
        strengths = torch.tensor([settings.brightness, settings.contrast, settings.saturation, settings.hue])
        chances = [settings.flip, settings.jitter, settings.gray, settings.blur, settings.solarize if second else 0.0]
        happens = (torch.rand(everyone, 5)[own] < torch.tensor(chances)).float()
        flip, jittered, gray, blur, solarize = happens.split(1, dim=1)
        extents = [images.shape[-2:]] * n if isinstance(images, Tensor) else [image.shape[-2:] for image in images]
        return Draws(
            boxes=crop_boxes(torch.tensor(extents), settings.min_scale, torch.rand(everyone, CROP_NUMBERS)[own]),
            flip=flip,
            jitter=torch.empty(everyone, 4).uniform_(-1, 1)[own] * strengths * jittered,
            gray=gray,
            blur=blur,
            solarize=solarize,
            sigma=torch.empty(everyone, 1).uniform_(*BLUR_SIGMA)[own] * self.size / 224,
            order=torch.randperm(4).tolist(),
        )

    def apply_draws(self, images: Tensor | Sequence[Tensor], draws: Draws) -> Tensor:
        """Makes the view that `draws` describe, float32 (N, 3, size, size)."""
        *tensors, order = draws
        # Images of different sizes are cropped one by one: what is worked on together are their views.
        of_image = images.shape[-2] * images.shape[-1] if isinstance(images, Tensor) else 0
        limit = _CPU_PIXELS if images[0].device.type == "cpu" else _DEVICE_PIXELS
        chunk = max(1, limit // max(of_image, self.size**2))
        parts = (slice(start, start + chunk) for start in range(0, len(images), chunk))
        return torch.cat(
            [self._augment(images[part], Draws(*(numbers[part] for numbers in tensors), order)) for part in parts]
        )

    def _augment(self, images: Tensor | Sequence[Tensor], draws: Draws) -> Tensor:
        settings = self.augmentation
        packed = torch.cat(draws[:7], dim=1).to(images[0].device, non_blocking=True)  # one copy in place of seven
        boxes, flip, jitter, *masks, sigma = packed.split([4, 1, 4, 1, 1, 1, 1], dim=1)
        gray, blur, solarize = (mask.view(-1, 1, 1, 1) for mask in masks)
        # Images of different sizes are cut by boxes that lie on the CPU: nothing waits for the device.
        where = (boxes, flip) if isinstance(images, Tensor) else (draws.boxes, draws.flip)
        views = resized_crop(images, *where, self.size).div_(255)
        views = color_jitter(views, jitter, draws.order)
        # lerp with a weight of 0 or 1 chooses as torch.where does, in a fraction of its time on the CPU.
        if settings.gray > 0:
            views = torch.lerp(views, luma(views), gray)
        if settings.blur > 0:
            views = torch.lerp(views, gaussian_blur(views, sigma), blur)
        if settings.solarize > 0:
            views = torch.where(solarize * views >= SOLARIZE_FROM, 1 - views, views)
        return views.sub_(self.mean).div_(self.std)


def crop_boxes(extents: Tensor, min_scale: float, drawn: Tensor) -> Tensor:
    """Makes boxes as in `Draws` of numbers drawn, (N, CROP_NUMBERS) in [0, 1), as torchvision's `RandomResizedCrop`.

    The area is uniform in [min_scale, 1] of the image's, whose height and width `extents` (N, 2) holds; the logarithm
    of the aspect ratio is uniform in [log 3/4, log 4/3]. The first of ten draws that fits in the image is taken, placed
    anywhere; where none does, the largest centered crop with such a ratio.
    """
    height, width = extents.float().split(1, dim=1)
    scale, aspect, down, across = drawn.split([_CROP_TRIES, _CROP_TRIES, 1, 1], dim=1)
    area = height * width * (min_scale + (1 - min_scale) * scale)
    ratio = (math.log(3 / 4) + math.log(16 / 9) * aspect).exp()
    heights, widths = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    found, first = fits.any(1, keepdim=True), fits.int().argmax(1, keepdim=True)
    box_height = torch.where(found, heights.gather(1, first), torch.minimum(height, (width * 4 / 3).round()))
    box_width = torch.where(found, widths.gather(1, first), torch.minimum(width, (height * 4 / 3).round()))
    top = torch.where(found, down * (height - box_height + 1), (height - box_height) / 2).floor()
    left = torch.where(found, across * (width - box_width + 1), (width - box_width) / 2).floor()
    return torch.cat([top, left, box_height, box_width], dim=1)


def resized_crop(images: Tensor | Sequence[Tensor], boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    """Crops each image to its own box, resizes and flips it: bilinear, antialiased where it shrinks, as torchvision.

    Bilinear resampling is linear and separable, so each image of a batch is multiplied by one matrix for its rows and
    one for its columns. `grid_sample` would alias where a crop shrinks.

    Args:
        images: (N, 3, H, W), or N of (3, H, W) each of its own size.
        boxes: As in `Draws`; on the CPU for images of different sizes, else where the images are.
        flip: Likewise.
        size: Side of the result in pixels.

    Returns:
        float32 (N, 3, size, size), in the range of `images`.
    """
    if not isinstance(images, Tensor):
        crops = []
        for image, box, flipped in zip(images, boxes.int().tolist(), flip.view(-1).tolist(), strict=True):
            top, left, height, width = box
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
    """Weights (N, size, extent) of `extent` pixels in each target pixel, for a crop of `length` pixels from `start` on.

    A triangle around the target's center, as wide as the larger of both kinds of pixel, cut off at the crop's edges.
    """
    scale = length / target.shape[1]
    pixel = torch.arange(extent, device=start.device)
    center = start + (target + 0.5) * scale - 0.5
    inside = ((pixel >= start) & (pixel < start + length)).float()
    weights = (1 - (pixel - center).abs() / scale.clamp(min=1)).clamp(min=0) * inside
    return weights / weights.sum(-1, keepdim=True)


def color_jitter(images: Tensor, jitter: Tensor, order: Sequence[int]) -> Tensor:
    """Changes brightness, contrast, saturation and hue of images (N, 3, H, W) in [0, 1], as torchvision's `adjust_*`.

    Args:
        images: They stay in [0, 1].
        jitter: As in `Draws`; the hue shift is a share of the color circle.
        order: As in `Draws`.
    """
    brightness, contrast, saturation, hue = jitter.view(-1, 4, 1, 1, 1).unbind(1)
    for column in order:
        if column == 0:
            images = (images * (1 + brightness)).clamp_(0, 1)
        elif column == 1:
            images = torch.lerp(luma(images).mean((-2, -1), keepdim=True), images, 1 + contrast).clamp_(0, 1)
        elif column == 2:
            images = torch.lerp(luma(images), images, 1 + saturation).clamp_(0, 1)
        else:
            images = torch.lerp(images, shift_hue(images, hue), (hue != 0).float())
    return images


def luma(images: Tensor) -> Tensor:
    """Brightness of RGB images (N, 3, H, W) as seen, (N, 1, H, W), with torchvision's weights (ITU-R BT.601)."""
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue of images (N, 3, H, W) in [0, 1] by a share (N, 1, 1, 1) of the color circle in [-0.5, 0.5].

    The same function as torchvision's and kornia's `adjust_hue`. Written without masks, in differences, minima and
    maxima, it takes a fraction of their time on the CPU. The hue comes from sorting the channels [0].

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
    share = torch.cat([(hue - 3).abs_() - 1, 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()], dim=1).clamp_(0, 1)
    return least + chroma * share


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blurs images (N, 3, size, size), each by its sigma (N, 1) in pixels: a kernel of a tenth of their width, odd.

    Edges are reflected, as in torchvision's `gaussian_blur`, which has one sigma for all images.
    """
    n, channels, _, width = images.shape
    radius = width // 20
    offset = torch.arange(-radius, radius + 1, device=images.device)
    weights = (-0.5 * (offset / sigma) ** 2).exp()
    weights = (weights / weights.sum(1, keepdim=True)).expand(channels, -1, -1).transpose(0, 1).flatten(0, 1)
    padded = nn.functional.pad(images, [radius] * 4, mode="reflect").flatten(0, 1)[None]
    rows = nn.functional.conv2d(padded, weights[:, None, :, None], groups=n * channels)
    return nn.functional.conv2d(rows, weights[:, None, None, :], groups=n * channels).view_as(images)


def eval_transform(size: int, mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """Builds a function from images, uint8 (N, 3, size, size), to the same normalized, float32 on their device.

    The mean and standard deviation of each channel are those of images in [0, 1]. The function raises ValueError for
    any other dtype or size.
    """
    mean_of_channel, std_of_channel = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def normalize(images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images must be uint8 (N, 3, {size}, {size}), got {images.dtype} {tuple(images.shape)}")
        device = images.device
        return images.float().div_(255).sub_(mean_of_channel.to(device)).div_(std_of_channel.to(device))

    return normalize
