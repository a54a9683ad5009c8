"""Scikit-learn's 1,797 digits for the examples. Put your own data set in its place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset


class Digits(Dataset[list[Tensor]]):
    """Views of handwritten digits, RGB, enlarged from 8x8 to 32x32 pixels.

    Args:
        transform: Makes the list of views of a PIL image, as lightly's transforms do.
    """

    def __init__(self, transform: Callable[[Image.Image], list[Tensor]]) -> None:
        gray = (load_digits().images * (255 / 16)).astype(np.uint8)
        self.images = [Image.fromarray(each).resize((32, 32)).convert("RGB") for each in gray]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(self.images[index])
