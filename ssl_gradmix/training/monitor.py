"""Readings of the backbone's features during training: RankMe, kNN accuracy, and reliance."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from ssl_gradmix.backbones import default_layers
from ssl_gradmix.data.augmentation import Views, eval_transform
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.evaluation.features import rankme
from ssl_gradmix.evaluation.knn import knn_accuracy
from ssl_gradmix.evaluation.reliance import RELIES, measure, two_views

logger = logging.getLogger("ssl_gradmix")

SMALLEST = 10
"""With fewer images nothing is read. Fewer labeled images are treated as unlabeled."""

WATCHED = 128
"""Images in which reliance is measured."""

COLLAPSED_RANK = 2.0
"""Below this effective rank the encoder counts as collapsed. Healthy ones have more than 10."""


class Monitor:
    """Reads the backbone on training images, so that nobody tunes a run on test images.

    Part of the training images are held out and classified by their neighbors among the others.
    The effective rank is that of the features of all of them.

    Args:
        images: Training images, at least `SMALLEST`.
        views: Makes the two views in which reliance is measured.
        mean: Mean of the normalization.
        std: Standard deviation of the normalization.
        bank: Largest number of images that vote.
        queries: Largest number of images that are classified, and at most a fifth of all.
    """

    def __init__(
        self,
        images: ImageSet,
        views: Views,
        mean: Sequence[float],
        std: Sequence[float],
        bank: int = 5000,
        queries: int = 1000,
    ) -> None:
        labeled = images.subset(images.labels >= 0)
        if len(labeled) >= SMALLEST:
            images = labeled
        order = np.random.default_rng(0).permutation(len(images))
        self.views, self.watched = views, images.subset(order[:WATCHED])
        order = order[: bank + queries]
        queries = min(queries, len(order) // 5)
        classes, counts = np.unique(images.labels[order], return_counts=True)
        self.labeled = images.labeled and len(classes) > 1
        # A class of one image cannot be divided, nor can classes that outnumber the queries.
        divisible = counts.min() > 1 and queries >= len(classes)
        strata = images.labels[order] if divisible else None
        voting, asked = train_test_split(order, test_size=queries, random_state=0, stratify=strata)
        self.bank, self.bank_labels = _pixels(images.subset(voting), views.size)
        self.queries, self.query_labels = _pixels(images.subset(asked), views.size)
        self.normalize = eval_transform(views.size, mean, std)

    def __call__(self, backbone: nn.Module, device: torch.device) -> dict[str, float]:
        """Reads the backbone, which is left as it was, BatchNorm statistics included.

        Returns:
            `rankme`; `knn`, an accuracy in [0, 1], if there are at least two classes; and
            `reliance`, the fraction of the agreement of two views that a tenth of the image
            carries, if it can be measured.
        """
        training = backbone.training
        backbone.eval()
        try:
            queries = self._features(backbone, self.queries, device)
            bank = self._features(backbone, self.bank, device)
            readings = {"rankme": rankme(torch.cat([queries, bank]))}
            if self.labeled:
                readings["knn"] = knn_accuracy(queries, self.query_labels, bank, self.bank_labels)
            readings |= self._reliance(backbone)
        finally:
            backbone.train(training)
        if readings["rankme"] < COLLAPSED_RANK:
            logger.warning("warning: the encoder collapses, rankme is %.2f", readings["rankme"])
        return readings

    def _reliance(self, backbone: nn.Module) -> dict[str, float]:
        pairs = (pair for pair, _ in two_views(self.watched, self.views, WATCHED, 0))
        try:
            (found,) = measure(backbone, pairs, default_layers(backbone, self.views.size) or None)
        except ValueError as error:  # for instance of an untrained encoder
            logger.info("reliance is not read: %s", error)
            return {}
        share = found.by_image("attributed").mean().item()
        if share >= RELIES:
            logger.warning(
                "warning: a tenth of the image carries %.0f%% of the encoder's agreement; it may "
                "rely on a shortcut, see eval/reliance.py",
                100 * min(share, 1),
            )
        return {"reliance": share}

    @torch.inference_mode()
    def _features(self, backbone: nn.Module, pixels: Tensor, device: torch.device) -> Tensor:
        batches = (self.normalize(batch.to(device)) for batch in pixels.split(256))
        return torch.cat([backbone(batch).float().cpu() for batch in batches])


def _pixels(images: ImageSet, size: int) -> tuple[Tensor, Tensor]:
    return images.pixels(size), torch.from_numpy(images.labels)
