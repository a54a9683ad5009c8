"""How fast views are made, and that both ways of making them draw alike.

One thread, 8-bit images in memory, the same settings: lightly's transforms image by image (what a loader worker does),
kornia's modules in their documented order on the batch, and the device path. Then moments of what lightly's transforms
and the device path make of the same images, which should agree within their standard errors.

    python benchmarks/augmentation.py
    python benchmarks/augmentation.py --device cuda --batch 512
"""

from __future__ import annotations

import time

import numpy as np
import timing
import torch
from torch import Tensor, nn

from ssl_gradmix.data.augmentation import DeviceViews, WorkerViews, resized_crop
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.settings import Augmentation

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LIGHTLY_IMAGES = 256
"""At most so many a round for lightly's transforms, which are an order of magnitude slower."""


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="images at once (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or 1)
    pixels = photographs(options.batch, options.size)
    batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(options.device)
    images = ImageSet(pixels, np.full(len(pixels), -1), (), "noise")
    print(
        f"{options.size} px, batch {options.batch}, 2 views, {options.rounds} rounds, {timing.origin(options.device)}\n"
    )

    settings = Augmentation()
    lightly = WorkerViews(images, settings, options.size, MEAN, STD, n_views=2, seed=0)
    device = DeviceViews(settings, options.size, MEAN, STD).to(options.device)
    kornia = kornia_views(settings, options.size).to(options.device)
    few = min(LIGHTLY_IMAGES, len(images))
    runs = {
        "lightly's transforms": lambda: [lightly[0, i] for i in range(few)],
        "kornia's modules": lambda: [kornia(batch.float() / 255) for _ in range(2)],
        "device path": lambda: device(batch, 2),
        "device path, crop and flip alone": lambda: [crops(batch, device) for _ in range(2)],
    }
    taken = timing.take_turns(runs, options.rounds, options.device)
    rows = []
    for name, times in taken.items():
        views = 2 * (few if name.startswith("lightly") else options.batch)
        rates = [f"{views / seconds:,.0f}" for seconds in (min(times.wall), sorted(times.wall)[len(times.wall) // 2])]
        rows.append([name, *rates, f"{views / sorted(times.processor)[len(times.processor) // 2]:,.0f}"])
    print(timing.table(["views by", "views/s, best", "median", "median by processor time"], rows))
    print(f"\n{moments(lightly, device, batch)}")


def photographs(count: int, size: int) -> np.ndarray:
    """Smooth random colors in place of photographs, uint8 (count, size, size, 3)."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    return (255 * smooth).byte().permute(0, 2, 3, 1).contiguous().numpy()


def kornia_views(settings: Augmentation, size: int) -> nn.Module:
    from kornia import augmentation as kornia

    jitter = (settings.brightness, settings.contrast, settings.saturation, settings.hue)
    return kornia.AugmentationSequential(
        kornia.RandomResizedCrop((size, size), scale=(settings.min_scale, 1.0)),
        kornia.RandomHorizontalFlip(p=settings.flip),
        kornia.ColorJitter(*jitter, p=settings.jitter),
        kornia.RandomGrayscale(p=settings.gray),
        kornia.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )


def crops(batch: Tensor, views: DeviceViews) -> Tensor:
    draws = views.draw(batch, second=False)
    return resized_crop(batch, draws.boxes.to(batch.device), draws.flip.to(batch.device), views.size)


def moments(lightly: WorkerViews, device: DeviceViews, batch: Tensor, epochs: int = 20) -> str:
    """Statistics of an image's views, mean over images and draws with its standard error, both ways."""
    began = time.perf_counter()
    count = min(LIGHTLY_IMAGES, len(batch))
    by_lightly = torch.stack([torch.stack(lightly[epoch, i]) for epoch in range(epochs) for i in range(count)])
    by_device = torch.stack([view for _ in range(epochs) for view in device(batch[:count], 2)]).cpu()
    rows = []
    for name, statistic in STATISTICS.items():
        cells = []
        for views in (by_lightly.flatten(0, 1), by_device.flatten(0, 1)):
            values = statistic(views).double()
            cells.append((values.mean().item(), (values.var() / len(values)).sqrt().item()))
        (one, one_error), (two, two_error) = cells
        apart = abs(one - two) / (one_error**2 + two_error**2) ** 0.5
        rows.append([name, f"{one:.4f} ± {one_error:.4f}", f"{two:.4f} ± {two_error:.4f}", f"{apart:.1f}"])
    header = ["of a view", "lightly's transforms", "device path", "standard errors apart"]
    return f"{timing.table(header, rows)}\n\n{2 * epochs * count:,} views each, {time.perf_counter() - began:.0f} s"


STATISTICS = {
    "mean": lambda views: views.mean((1, 2, 3)),
    "standard deviation over pixels": lambda views: views.std((2, 3)).mean(1),
    "saturation, range of the channels": lambda views: (views.amax(1) - views.amin(1)).mean((1, 2)),
    "step between neighboring columns": lambda views: views.diff(dim=3).abs().mean((1, 2, 3)),
    "step between neighboring rows": lambda views: views.diff(dim=2).abs().mean((1, 2, 3)),
    "share of gray views": lambda views: (gray(views) < 0.02).float(),
}


def gray(views: Tensor) -> Tensor:
    """How far the channels lie apart at most, after undoing the normalization: 0 in a gray view."""
    pixels = views * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return (pixels.amax(1) - pixels.amin(1)).amax((1, 2))


if __name__ == "__main__":
    main()
