"""A frozen encoder, its data and a folder for results: what every command line of `eval/` works on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ssl_gradmix.data.datasets import ImageSet, load_known
from ssl_gradmix.evaluation.encoders import Encoder
from ssl_gradmix.evaluation.features import extract
from ssl_gradmix.evaluation.results import Row
from ssl_gradmix.settings import Data
from ssl_gradmix.version import __version__

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(eq=False)
class Evaluation:
    """What is evaluated, loaded, and where the results go.

    Args:
        encoder: The frozen encoder.
        data: Settings of its data.
        out: Folder for results.
        batch_size: Images that the encoder sees at once, on each process.
        cache: Folder in which features are kept, or None.
        accelerator: Says on which device and on how many processes.
    """

    encoder: Encoder
    data: Data
    out: Path
    batch_size: int
    cache: Path | None
    accelerator: Accelerator

    def load(self, split: str, data: Data | None = None) -> ImageSet:
        """Loads the train or test images of the classes that the data settings ask for."""
        with self.one_first():
            return load_known(data or self.data, split)

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Lets one process a machine go before the others, as loading a data set may download it."""
        with self.accelerator.main_process_first(), self.accelerator.local_main_process_first():
            yield

    def load_labeled(self, split: str, data: Data | None = None) -> ImageSet:
        """As `load`, without unlabeled images.

        Raises:
            ValueError: If no image is labeled, or all training images are of the same class.
        """
        images = self.load(split, data)
        labeled = images.subset(images.labels >= 0)
        if len(labeled) == 0:
            raise ValueError(
                f"{images.name} has no labels, this evaluation needs them: a folder has one a class folder"
            )
        classes = [images.classes[label] for label in np.unique(labeled.labels)]
        if split == "train" and len(classes) < 2:
            raise ValueError(f"{images.name} must have images of at least two classes, got {classes}")
        return labeled

    def features(self, images: ImageSet | np.ndarray) -> tuple[Tensor, Tensor]:
        """Frozen features (N, D) and labels (N,) of all images, on the accelerator's device."""
        features, labels = extract(
            self.encoder, images, self.batch_size, cache=self.cache, accelerator=self.accelerator
        )
        return features.to(self.accelerator.device), labels.to(self.accelerator.device)

    def row(
        self,
        task: str,
        images: ImageSet,
        score: str,
        metric: str,
        interval: tuple[float, float | None, float | None],
        n: int,
        *,
        trial: int | None = None,
        **params: object,
    ) -> Row:
        """A result of frozen features on these images, with value and ends of its interval."""
        dataset, _, split = images.name.rpartition("/")
        encoder, feature = self.encoder.name, self.encoder.feature
        return Row(task, dataset, split, trial, encoder, feature, score, metric, *interval, n, params)

    def describe(self) -> dict:
        """What a results file says of its origin beside the rows."""
        import timm

        return {
            "encoder": {
                "name": self.encoder.name,
                "feature": self.encoder.feature,
                "fingerprint": self.encoder.fingerprint,
            },
            "data": asdict(self.data),
            "versions": {"ssl_gradmix": __version__, "torch": torch.__version__, "timm": timm.__version__},
        }
