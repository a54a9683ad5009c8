"""Which region of an image is replaced, and by what. Batched tensor operations on any device, torch alone.

How much is replaced is a Python number and the same for a whole batch, so that every shape is known to the host; where
it is replaced stays on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Fill = Literal["donor", "crop", "noise", "mean"]


def draw_lam(alpha: float, lam_range: tuple[float, float], generator: Generator | None = None) -> float:
    """Draws the share of the image that is kept: Beta(alpha, alpha), rescaled to `lam_range`; on the CPU."""
    first, second = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator=generator).tolist()
    low, high = lam_range
    # Both gammas underflow to zero where alpha is tiny; the limit is then one end or the other, and the middle stands
    # for both.
    share = first / (first + second) if first + second > 0 else 0.5
    return low + (high - low) * share


def pixel_range(lam_range: tuple[float, float], area: int) -> range:
    """Numbers of pixels to replace, of so many, that keep a share within `lam_range`; never all of them."""
    slack = 1e-6  # of a pixel: (1 - 0.9) * 100 is 9.999999999999998
    fewest, most = math.ceil((1 - lam_range[1]) * area - slack), math.floor((1 - lam_range[0]) * area + slack)
    return range(max(1, fewest), min(area - 1, most) + 1)


def box_extent(lam: float, size: tuple[int, int], lam_range: tuple[float, float] = (0.0, 1.0)) -> tuple[int, int]:
    """Height and width in whole pixels of a box that takes about `1 - lam` of the image, in its aspect ratio.

    Where rounding leaves `lam_range`, it is the most similar box inside the range. Where the pixel grid has none, it is
    the rounded one, or what is next to the whole image.
    """
    height, width = (side * math.sqrt(1 - lam) for side in size)
    allowed = pixel_range(lam_range, size[0] * size[1])
    rounded = max(1, round(height)), max(1, round(width))
    if rounded[0] * rounded[1] in allowed:
        return rounded
    inside = [
        (h, w)
        for h in range(1, size[0] + 1)
        for w in (math.ceil(allowed.start / h), (allowed.stop - 1) // h, round(width))
        if w <= size[1] and h * w in allowed
    ]
    if inside:
        return min(inside, key=lambda extent: abs(math.log(extent[0] / height)) + abs(math.log(extent[1] / width)))
    if rounded == size:
        return (max(1, size[0] - 1), size[1]) if size[0] >= size[1] else (size[0], size[1] - 1)
    return rounded


def mask_pixels(lam: float, size: tuple[int, int], lam_range: tuple[float, float] = (0.0, 1.0)) -> int:
    """Pixels of a mask that takes `1 - lam` of the image, rounded inside `lam_range` where there is room."""
    area = size[0] * size[1]
    allowed = pixel_range(lam_range, area) or range(1, max(2, area))
    return min(max(round((1 - lam) * area), allowed.start), allowed.stop - 1)


def box_kept(extent: tuple[int, int], size: tuple[int, int]) -> float:
    """The exact share of the image that a box of that extent leaves."""
    return 1 - extent[0] * extent[1] / (size[0] * size[1])


def peak_boxes(attribution: Tensor, extent: tuple[int, int], generator: Generator | None = None) -> Tensor:
    """Boxes of one extent, each centered on its map's maximum and shifted inside the image.

    GradMix's authors clip a box at the border instead, which makes its area differ from `1 - lam`. A flat map says
    nothing: its box lies at a random place.

    Args:
        attribution: (N, H, W).
        extent: (h, w) in pixels.
        generator: Draws the places for flat maps.

    Returns:
        (N, 4) int64: x0, y0, x1, y1, the latter two exclusive.
    """
    height, width = attribution.shape[1:]
    y, x = _highest(attribution, generator)
    y0 = (y - extent[0] // 2).clamp(0, height - extent[0])
    x0 = (x - extent[1] // 2).clamp(0, width - extent[1])
    return torch.stack([x0, y0, x0 + extent[1], y0 + extent[0]], 1)


def max_mean_boxes(attribution: Tensor, extent: tuple[int, int], generator: Generator | None = None) -> Tensor:
    """Boxes of one extent, each where the mean of its map inside the box is highest; otherwise as `peak_boxes`."""
    rows = F.avg_pool2d(attribution[:, None], (extent[0], 1), stride=1)
    y0, x0 = _highest(F.avg_pool2d(rows, (1, extent[1]), stride=1)[:, 0], generator)
    return torch.stack([x0, y0, x0 + extent[1], y0 + extent[0]], 1)


def random_boxes(
    count: int, extent: tuple[int, int], size: tuple[int, int], device: torch.device, generator: Generator | None = None
) -> Tensor:
    """Boxes of one extent anywhere inside the image, all places alike: (N, 4) as `peak_boxes`."""
    x0, y0 = (
        (rand((count,), device, generator) * (size[i] - extent[i] + 1)).long().clamp_max(size[i] - extent[i])
        for i in (1, 0)
    )
    return torch.stack([x0, y0, x0 + extent[1], y0 + extent[0]], 1)


def central_boxes(count: int, extent: tuple[int, int], size: tuple[int, int], device: torch.device) -> Tensor:
    """Boxes of one extent in the middle of the image, up to half a pixel: (N, 4) as `peak_boxes`."""
    y0, x0 = ((size[i] - extent[i]) // 2 for i in (0, 1))
    corners = (x0, y0, x0 + extent[1], y0 + extent[0])  # filled in on the device: a copy would wait for it
    return torch.stack([torch.full((count,), corner, device=device) for corner in corners], 1)


def _highest(maps: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """Row (N,) and column (N,) of each map's maximum; at random where a map is flat."""
    count, height, width = maps.shape
    flat = maps.flatten(1)
    somewhere = (rand((count,), maps.device, generator) * (height * width)).long()
    place = torch.where(flat.amax(1) > flat.amin(1), flat.argmax(1), somewhere)
    return place // width, place % width


def top_mask(attribution: Tensor, pixels: int, generator: Generator | None = None) -> Tensor:
    """Marks exactly so many pixels with the highest attribution in each image, (N, H, W) to boolean (N, H, W).

    Ties are broken at random, so that a flat map gives a random mask.
    """
    count, height, width = attribution.shape
    shuffled = torch.argsort(rand((count, height * width), attribution.device, generator), 1)
    chosen = attribution.flatten(1).gather(1, shuffled).topk(pixels, 1).indices
    mask = torch.zeros(count, height * width, dtype=torch.bool, device=attribution.device)
    return mask.scatter_(1, shuffled.gather(1, chosen), True).view(count, height, width)


def derangement(count: int, device: torch.device, generator: Generator | None = None) -> Tensor:
    """A random permutation (N,) without fixed points where N > 1: one random cycle through all."""
    cycle = randperm(count, device, generator)
    return torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(1))


def paste(images: Tensor, patches: Tensor, boxes: Tensor) -> Tensor:
    """A copy of the images with patches (N, C, h, w) pasted into their boxes (N, 4), which have the patches' extent."""
    return images.clone().index_put_(_places(patches.shape, boxes), patches)


def crop(images: Tensor, boxes: Tensor, extent: tuple[int, int]) -> Tensor:
    """The images' contents (N, C, h, w) at their boxes (N, 4), all of one extent."""
    return images[_places((*images.shape[:2], *extent), boxes)]


def _places(shape: Sequence[int], boxes: Tensor) -> tuple[Tensor, ...]:
    """Indices of image, channel, row and column for patches (N, C, h, w) of such a shape in their boxes."""
    n, c, y, x = (torch.arange(extent, device=boxes.device) for extent in shape)
    rows, columns = boxes[:, 1, None, None, None] + y[:, None], boxes[:, 0, None, None, None] + x
    return n[:, None, None, None], c[:, None, None], rows, columns


def shrink(images: Tensor, extent: tuple[int, int]) -> Tensor:
    """The whole images resized to (h, w), bilinear with antialiasing, as torchvision does it."""
    # Half precision has no antialiased resize on every device.
    resized = F.interpolate(images.float(), size=extent, mode="bilinear", align_corners=False, antialias=True)
    return resized.to(images.dtype)


def noise_like(images: Tensor, shape: tuple[int, ...], generator: Generator | None = None) -> Tensor:
    """Uniform noise (n, C, h, w) with each channel's mean and standard deviation, in the images' normalization."""
    deviation, mean = torch.std_mean(images.float(), (0, 2, 3), correction=0, keepdim=True)
    uniform = rand(shape, images.device, generator) * 2 - 1
    return (mean + math.sqrt(3) * deviation * uniform).to(images.dtype)


def mean_like(images: Tensor) -> Tensor:
    """The mean of each channel of the batch as one pixel (1, C, 1, 1)."""
    return images.float().mean((0, 2, 3), keepdim=True).to(images.dtype)


def rand(shape: tuple[int, ...], device: torch.device, generator: Generator | None = None) -> Tensor:
    """Uniform in [0, 1) on the device, which is not waited for even where the generator is one of the CPU."""
    drawn = torch.rand(shape, generator=generator, device=generator.device if generator else device)
    return drawn.to(device, non_blocking=True)


def randperm(count: int, device: torch.device, generator: Generator | None = None) -> Tensor:
    """A random permutation on the device, as `rand`."""
    drawn = torch.randperm(count, generator=generator, device=generator.device if generator else device)
    return drawn.to(device, non_blocking=True)
