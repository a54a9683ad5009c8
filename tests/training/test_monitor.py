"""Readings of features while an encoder trains: what is left out where it would mean nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from training_support import image_set

from ssl_gradmix import backbones
from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.settings import Augmentation
from ssl_gradmix.training import log
from ssl_gradmix.training.monitor import Monitor


def test_images_of_one_class_have_no_knn_accuracy(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="ssl_gradmix")
    monitor = Monitor(image_set().only([1]), 16, (0.5,) * 3, (0.5,) * 3)
    readings = monitor(backbones.create("resnet10_tiny"), torch.device("cpu"))
    assert readings.keys() == {"rankme"}
    assert caplog.messages == ["noise: all images are of one class, which kNN cannot be wrong about: it is left out"]


def test_reliance_is_read_and_leaves_no_trace() -> None:
    """Of images that differ in color, so that views agree; the random state and the backbone stay as they are."""
    images = image_set(300)
    images.images[:] = np.random.default_rng(0).integers(0, 255, (300, 1, 1, 3))
    views = Views(Augmentation(jitter=0, gray=0), 16, (0.5,) * 3, (0.5,) * 3)
    monitor = Monitor(images, 16, (0.5,) * 3, (0.5,) * 3, views=views)
    torch.manual_seed(0)
    backbone = backbones.create("resnet10_tiny").train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    state = torch.get_rng_state()
    first, second = (monitor(backbone, torch.device("cpu")) for _ in range(2))
    assert first == second
    assert first.keys() == {"rankme", "knn", "reliance"}
    assert torch.get_rng_state().equal(state)
    assert backbone.training
    assert all(value.equal(before[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())
    collapsed = backbones.create("resnet10_tiny")
    for parameter in collapsed.parameters():
        torch.nn.init.zeros_(parameter)
    assert "reliance" not in monitor(collapsed, torch.device("cpu"))


def test_an_encoder_that_lives_off_a_small_part_is_warned_of() -> None:
    entry = {"embedding_std": 1.0, "flat": 0.0, "rankme": 40.0}
    assert not log.warnings(entry | {"reliance": 0.3})
    (line,) = log.warnings(entry | {"reliance": 0.97})
    (capped,) = log.warnings(entry | {"reliance": 1.2})
    assert "loses 100% of" in capped
    assert line.startswith("warning: the encoder loses 97% of its agreement with a tenth of the image")
