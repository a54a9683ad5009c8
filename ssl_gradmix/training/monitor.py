"""What an encoder's features are worth while it trains: kNN accuracy, effective rank, and reliance on a small part."""

from __future__ import annotations

import logging

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from ssl_gradmix.data.augmentation import Views, eval_transform
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.evaluation.knn import knn_accuracy
from ssl_gradmix.evaluation.rank import rankme
from ssl_gradmix.evaluation.reliance import measure, two_views

logger = logging.getLogger("ssl_gradmix")

WATCHED = 128
"""Images in which reliance is read: two passes of them and three of parts, no more than a step or two of training."""

WIDEST = 0.5
"""Of the interval of a reliance that is read: untrained encoders may tell images apart so little that it is noise."""


class Monitor:
    """Reads the effective rank of features, and how well neighbors classify them where images have labels that differ.

    Held-out training images are classified by their neighbors among other training images, so that whoever watches, or
    chooses settings by it, has not looked at test images. The rank is that of all of their features together: of the
    backbone, as used after the training, and of more images than a batch, whose embeddings would cap it.

    Args:
        images: Training images, all labeled or else none used as such.
        size: Side of what the encoder sees, in pixels.
        mean: Of the normalization, a number a channel.
        std: Of the normalization.
        bank: At most so many images vote.
        queries: At most so many are classified, and at most a fifth of all.
        views: Makes the two views in which reliance is read; None reads none.
    """

    def __init__(
        self,
        images: ImageSet,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        bank: int = 5000,
        queries: int = 1000,
        views: Views | None = None,
    ) -> None:
        self.views, self.watched = views, images.subset(np.random.default_rng(0).permutation(len(images))[:WATCHED])
        order = np.random.default_rng(0).permutation(len(images))[: bank + queries]
        labels = images.labels[order]
        queries = min(queries, len(order) // 5)
        # The draw is a plain one where a class of a single image cannot be divided, or classes outnumber queries.
        divisible = np.unique(labels, return_counts=True)[1].min() > 1 and queries >= len(np.unique(labels))
        strata = labels if divisible else None
        voting, asked = train_test_split(order, test_size=queries, random_state=0, stratify=strata)
        self.labeled = images.labeled and len(np.unique(labels)) > 1
        if images.labeled and not self.labeled:
            logger.info("%s: all images are of one class, which kNN cannot be wrong about: it is left out", images.name)
        self.bank, self.bank_labels = images.subset(voting).pixels(size), torch.from_numpy(images.labels[voting])
        self.queries, self.query_labels = images.subset(asked).pixels(size), torch.from_numpy(images.labels[asked])
        self.normalize = eval_transform(size, mean, std)

    def __call__(self, backbone: nn.Module, device: torch.device) -> dict[str, float]:
        """The readings for the log; the backbone is left as it was found, BatchNorm statistics included.

        Returns:
            `rankme` from 1 to the number of dimensions; `knn`, an accuracy in [0, 1], where labels differ; and
            `reliance`, where views clearly agree more than images, and the backbone has maps to attribute at.
        """
        training = backbone.training
        backbone.eval()
        try:
            queries, bank = (self._features(backbone, pixels, device) for pixels in (self.queries, self.bank))
            readings = {"rankme": rankme(torch.cat([queries, bank]))}
            if self.labeled:
                readings["knn"] = knn_accuracy(queries, self.query_labels, bank, self.bank_labels)
            if self.views is not None:
                readings |= self._reliance(backbone)
        finally:
            backbone.train(training)
        return readings

    def _reliance(self, backbone: nn.Module) -> dict[str, float]:
        try:
            pairs = (pair for pair, _ in two_views(self.watched, self.views, WATCHED, 0))
            (found,) = measure(backbone, pairs)
        except ValueError as error:  # what the encoder does not allow to be read is no reason to stop its training
            logger.info("reliance is not read: %s", error)
            return {}
        share = found.share("attributed")
        return {"reliance": float(share.value)} if share.high - share.low < WIDEST else {}

    @torch.inference_mode()
    def _features(self, backbone: nn.Module, pixels: Tensor, device: torch.device) -> Tensor:
        return torch.cat([backbone(self.normalize(batch.to(device))).float().cpu() for batch in pixels.split(256)])
