"""Readings of features while an encoder trains: what is left out where it would mean nothing."""

from __future__ import annotations

import pytest
import torch
from training_support import image_set

from ssl_gradmix import backbones
from ssl_gradmix.training.monitor import Monitor


def test_images_of_one_class_have_no_knn_accuracy(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="ssl_gradmix")
    monitor = Monitor(image_set().only([1]), 16, (0.5,) * 3, (0.5,) * 3)
    readings = monitor(backbones.create("resnet10_tiny"), torch.device("cpu"))
    assert readings.keys() == {"rankme"}
    assert caplog.messages == ["noise: all images are of one class, which kNN cannot be wrong about: it is left out"]
