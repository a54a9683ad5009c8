"""Pictures of what GradMix does to images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssl_gradmix.files import write_whole
from ssl_gradmix.gradmix import MixedViews


def draw(images: Tensor, mixed: MixedViews, mean: Sequence[float], std: Sequence[float], path: Path) -> None:
    """Writes a picture: a column an image, with rows of image, attribution over the image, region, and mixed view.

    Args:
        images: (N, C, H, W), normalized, that were mixed.
        mixed: What GradMix made of them.
        mean: Of the normalization, to be undone.
        std: Of the normalization.
        path: Of the PNG, written whole or not at all.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and wants a display

    scale, shift = (torch.tensor(values).view(-1, 1, 1) for values in (std, mean))
    before, after = (
        (batch.detach().cpu().float() * scale + shift).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        for batch in (images, mixed.images)
    )
    attribution, boxes = mixed.attribution.cpu().numpy(), None if mixed.boxes is None else mixed.boxes.tolist()
    count = len(before)
    figure = Figure(figsize=(1.25 * count + 1.1, 5.4), dpi=110, layout="constrained")
    grid = figure.subplots(4, count, squeeze=False)
    for column in range(count):
        image, attributed, region, view = grid[:, column]
        image.imshow(before[column])
        attributed.imshow(before[column])
        attributed.imshow(attribution[column], cmap="inferno", alpha=0.6, vmin=0, vmax=1)
        region.imshow(_region(before[column], after[column], boxes[column] if boxes else None))
        view.imshow(after[column])
    for axis in grid.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    layers = "\n".join(("attribution", *mixed.layers))
    for row, label in enumerate(("image", layers, "region", f"mixed view\nkept {mixed.lam.item():.0%}")):
        grid[row, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png"))


def _region(before: np.ndarray, after: np.ndarray, box: list[int] | None) -> np.ndarray:
    """The image, flat orange where it is replaced."""
    if box is None:
        replaced = (before != after).any(-1)
    else:
        replaced = np.zeros(before.shape[:2], bool)
        replaced[box[1] : box[3], box[0] : box[2]] = True
    return np.where(replaced[..., None], (0.96, 0.5, 0.14), before)
