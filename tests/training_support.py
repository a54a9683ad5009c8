"""A tiny training on noise, for the tests of several modules; a plain module, imported by its name."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ssl_gradmix import GradMix, backbones
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.methods.simclr import SimCLR
from ssl_gradmix.run_folder import RunFolder
from ssl_gradmix.settings import Augmentation, Optimizer, Training
from ssl_gradmix.training.loop import Trainer
from ssl_gradmix.training.processes import create_accelerator

TIMED = ("images_per_second", "images_per_second_overall", "seconds_left")
"""Readings in the log that differ from run to run."""

TRAINING = Training(epochs=3, batch_size=8, workers=0, threads=1, knn_every=0, samples_every=0)


def image_set(count: int = 36) -> ImageSet:
    """Two classes, dark and bright, in noise."""
    labels = np.arange(count) % 2
    pixels = np.random.default_rng(0).integers(0, 100, (count, 16, 16, 3)) + 150 * labels[:, None, None, None]
    return ImageSet(pixels.astype(np.uint8), labels.astype(np.int64), ("dark", "bright"), "noise")


def trainer(path: Path, kind: type = SimCLR, training: Training = TRAINING, **kwargs) -> Trainer:
    accelerator = create_accelerator(training)
    torch.manual_seed(training.seed)
    backbone = kwargs.pop("backbone", None) or backbones.create("resnet10_tiny")
    method = kind(backbone, backbone.num_features, hidden_dim=32, output_dim=16, gradmix=GradMix(layers=["layer2"]))
    folder = RunFolder(path)
    images = kwargs.pop("images", image_set())
    folder.start({"training": {}}, images)
    return Trainer(
        method,
        images,
        folder,
        accelerator,
        16,
        kwargs.pop("augmentation", Augmentation()),
        kwargs.pop("optimizer", Optimizer()),
        training,
        **kwargs,
    )


def tree(folder: Path) -> list[str]:
    """The files of a folder, by their paths in it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def final(path: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((path / "checkpoint").glob("epoch-*"))[-1] / "method.safetensors")


def before_step(training: Trainer, place: tuple[int, int], act: Callable[[], object]) -> None:
    """Makes something happen before the step of an (epoch, batch), counted from 0."""
    step = training._step

    def watched(batch: object) -> object:
        if (training.epoch, training.batch) == place:
            act()
        return step(batch)

    training._step = watched


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: what a full disk does to those who write, on any machine."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
