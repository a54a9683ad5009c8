"""A tiny training on noise, for tests of several modules; a plain module, imported by its name."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_gradmix import GradMix, backbones
from ssl_gradmix.data.augmentation import Augmentation, Views
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.methods import Method, SimCLR
from ssl_gradmix.run_folder import RunFolder
from ssl_gradmix.training import checkpoint
from ssl_gradmix.training.optimizers import Optimizer
from ssl_gradmix.training.pretrain import create_accelerator
from ssl_gradmix.training.trainer import Trainer, Training

TIMED = ("images_per_second", "images_per_second_overall", "seconds_left")
"""Values in the log that differ from run to run."""

TRAINING = Training(epochs=3, batch_size=8, threads=1, knn_every=0, samples_every=0)


def image_set(count: int = 36) -> ImageSet:
    """Two classes, dark and bright, in noise."""
    labels = np.arange(count) % 2
    noise = np.random.default_rng(0).integers(0, 100, (count, 16, 16, 3))
    pixels = (noise + 150 * labels[:, None, None, None]).astype(np.uint8)
    return ImageSet(pixels, labels.astype(np.int64), ("dark", "bright"), "noise")


def create_method(kind: type[Method], backbone: torch.nn.Module | None = None) -> Method:
    backbone = backbone or backbones.create("resnet10_tiny")
    features, gradmix = backbones.num_features(backbone), GradMix(layers=["layer2"])
    return kind(backbone, features, hidden_dim=32, output_dim=16, gradmix=gradmix)


def trainer(
    path: Path,
    kind: type[Method] = SimCLR,
    training: Training = TRAINING,
    images: ImageSet | None = None,
    optimizer: Optimizer | None = None,
    augmentation: Augmentation | None = None,
    method: Method | None = None,
    **kwargs: Any,
) -> Trainer:
    images = images or image_set()
    accelerator = create_accelerator(training)
    torch.manual_seed(training.seed)
    method = method or create_method(kind)
    folder = RunFolder(path)
    if accelerator.is_main_process:
        folder.start({"training": {}}, images)
    accelerator.wait_for_everyone()
    process, processes = accelerator.process_index, accelerator.num_processes
    views = Views(augmentation or Augmentation(), 16, (0.5,) * 3, (0.25,) * 3, process, processes)
    optimizer = optimizer or Optimizer()
    return Trainer(method, views, images, folder, accelerator, optimizer, training, **kwargs)


def newest(path: Path) -> dict[str, Any]:
    """The newest checkpoint of a run folder."""
    content = max((path / "checkpoint").iterdir()).read_bytes()
    return torch.load(io.BytesIO(content[checkpoint._DIGEST_BYTES :]), weights_only=True)


def final(path: Path) -> dict[str, torch.Tensor]:
    """The method's weights in the newest checkpoint."""
    return newest(path)["method"]


def log_of(path: Path) -> list[dict[str, Any]]:
    """The log, without times."""
    entries = RunFolder(path).read_log()
    return [{k: v for k, v in entry.items() if k not in TIMED} for entry in entries]


def before_step(training: Trainer, place: tuple[int, int], act: Callable[[], object]) -> None:
    """Calls `act` before the step of an (epoch, batch), counted from 0."""
    step = training._step

    def watched(*batch: Any) -> Any:
        if (training.epoch, training.batch) == place:
            act()
        return step(*batch)

    training._step = watched
