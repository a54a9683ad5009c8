"""Pictures of what GradMix does to images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # not pyplot, which keeps figures and needs a display
from torch import Tensor

from ssl_gradmix.files import write_whole
from ssl_gradmix.gradmix import MixedViews

ORANGE = (0.96, 0.5, 0.14)


def draw(images: Tensor, mixed: MixedViews, mean: Tensor, std: Tensor, path: Path) -> None:
    """Draws one column per image: image, attribution, replaced region, and mixed view.

    Args:
        images: (N, C, H, W), the normalized images that were mixed, of 3 channels or 1.
        mixed: What GradMix made of them.
        mean: (C, 1, 1), mean of the normalization.
        std: (C, 1, 1), standard deviation of the normalization.
        path: Where the PNG goes.
    """
    before = _pixels(images, mean, std)
    after = _pixels(mixed.images, mean, std)
    attribution, mask = mixed.attribution.cpu().numpy(), mixed.mask.cpu().numpy()
    count = len(before)
    figure = Figure(figsize=(1.25 * count + 1.1, 5.4), dpi=110, layout="constrained")
    grid = figure.subplots(4, count, squeeze=False)
    for i in range(count):
        image, attributed, region, view = grid[:, i]
        image.imshow(before[i])
        attributed.imshow(before[i])
        attributed.imshow(attribution[i], cmap="inferno", alpha=0.6, vmin=0, vmax=1)
        region.imshow(np.where(mask[i, :, :, None], ORANGE, before[i]))
        view.imshow(after[i])
    for axis in grid.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    layers = "\n".join(["attribution", *mixed.layers])
    rows = ["image", layers, "region", f"mixed view\nkept {mixed.lam.item():.0%}"]
    for axis, label in zip(grid[:, 0], rows, strict=True):
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png"))


def _pixels(images: Tensor, mean: Tensor, std: Tensor) -> np.ndarray:
    """(N, H, W, 3) in [0, 1]."""
    pixels = (images.detach().float() * std + mean).expand(-1, 3, -1, -1)
    return pixels.clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
