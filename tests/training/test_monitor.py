"""Readings of the backbone's features during training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from training_support import image_set

from ssl_gradmix import backbones
from ssl_gradmix.data.augmentation import Augmentation, Views
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.training.monitor import Monitor

MEAN, STD = (0.5,) * 3, (0.25,) * 3
CPU = torch.device("cpu")


def create(images: ImageSet, **sizes: int) -> Monitor:
    views = Views(Augmentation(jitter=0, gray=0), 16, MEAN, STD)
    return Monitor(images, views, MEAN, STD, **sizes)


def colored(count: int) -> ImageSet:
    """Images of one random color each, so that the views of an image agree."""
    images = image_set(count)
    images.images[:] = np.random.default_rng(0).integers(0, 255, (count, 1, 1, 3))
    return images


def test_readings_equal_those_of_other_libraries() -> None:
    monitor = create(colored(200), bank=120, queries=30)
    assert (len(monitor.bank), len(monitor.queries)) == (120, 30)
    bank = {tuple(pixels[:, 0, 0].tolist()) for pixels in monitor.bank}
    assert not any(tuple(pixels[:, 0, 0].tolist()) in bank for pixels in monitor.queries)
    backbone = backbones.create("resnet10_tiny").eval()
    readings = monitor(backbone, CPU)
    with torch.inference_mode():
        queries, bank_features = (
            backbone((pixels / 255 - 0.5) / 0.25).numpy()
            for pixels in (monitor.queries, monitor.bank)
        )
    neighbors = KNeighborsClassifier(
        20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    neighbors.fit(bank_features, monitor.bank_labels)
    assert readings["knn"] == pytest.approx(neighbors.score(queries, monitor.query_labels))
    values = np.linalg.svd(np.concatenate([queries, bank_features]), compute_uv=False)
    p = values / values.sum() + 1e-7
    assert readings["rankme"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)


def test_reading_leaves_no_trace() -> None:
    monitor, backbone = create(colored(300)), backbones.create("resnet10_tiny").train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    state = torch.get_rng_state()
    first, second = (monitor(backbone, CPU) for _ in range(2))
    assert first == second
    assert first.keys() == {"rankme", "knn", "reliance"}
    assert torch.get_rng_state().equal(state)
    assert backbone.training
    torch.testing.assert_close(dict(backbone.state_dict()), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in backbone.parameters())


@pytest.mark.parametrize("labels", ["one class", "unlabeled", "few labeled"])
def test_knn_is_left_out_without_classes(labels: str) -> None:
    images = image_set(60)
    if labels == "one class":
        images = images.only([1])
    else:
        images.labels[5 if labels == "few labeled" else 0 :] = -1
    assert create(images)(backbones.create("resnet10_tiny"), CPU).keys() <= {"rankme", "reliance"}


def test_collapsed_encoder_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    collapsed = backbones.create("resnet10_tiny")
    for parameter in collapsed.parameters():
        nn.init.zeros_(parameter)
    assert "reliance" not in create(colored(60))(collapsed, CPU)
    assert "rankme" in caplog.text
