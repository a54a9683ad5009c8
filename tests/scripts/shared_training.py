"""The same trainings by two processes (run by torchrun) and by one (imported by a test).

Usage: shared_training.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from training_support import TRAINING, before_step, trainer

from ssl_gradmix import GradMix, backbones, gradmix
from ssl_gradmix.adaptive import Adaptive
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.methods import BYOL, Method, SimCLR, SupCon
from ssl_gradmix.training import trainer as trainer_module
from ssl_gradmix.training.pretrain import create_accelerator
from ssl_gradmix.training.trainer import Trainer

KINDS: dict[str, type[Method]] = {
    "SimCLR": SimCLR,
    "BYOL": BYOL,
    "SupCon": SupCon,
    "adaptive": SimCLR,
}
COUNT = 17
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3), np.uint8)
LABELS = np.arange(COUNT) % 3 - 1  # a third is unlabeled, so that processes have different numbers
STOP = (2, 1)


class StoppedError(Exception):
    """Ends a training in all processes."""


def make_comparable(module: nn.Module) -> None:
    """Replaces BatchNorm, whose statistics are those of a process, and the kinks of ReLU.

    At a kink, a rounding error of 1e-7 grows to a difference of 1e-4 between weights.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            norm = nn.GroupNorm(1, child.num_features).requires_grad_(child.weight.requires_grad)
            setattr(module, name, nn.Sequential(norm, getattr(child, "act", nn.Identity())))
        elif isinstance(child, nn.ReLU):
            setattr(module, name, nn.SiLU())
        else:
            make_comparable(child)


def create(folder: Path, name: str) -> Trainer:
    torch.manual_seed(0)
    mixer = GradMix(layers=["layer2"], fill="crop", lam_range=(0.7, 0.7))
    backbone = backbones.create("resnet10_tiny")
    # At SupCon's own temperature, 0.05, rounding of the similarities would be ten times larger.
    own = {"temperature": 0.5} if name == "SupCon" else {}
    method = KINDS[name](backbone, 128, hidden_dim=32, output_dim=16, gradmix=mixer, **own)
    make_comparable(method)
    n_views = 2
    if name == "adaptive":
        method.adaptive, n_views = Adaptive(low=0, high=30, momentum=0), 3
    images = ImageSet(PIXELS, LABELS, ("a", "b"), "noise")
    return trainer(folder / name, images=images, method=method, n_views=n_views)


def train(folder: Path, name: str, stop: bool = False) -> None:
    """Trains to the end, or until it is stopped in the middle of an epoch.

    The donor of an image is its own second view, and every fourth image draws the same number, so
    that neither depends on the process.
    """
    draw = torch.rand

    def rand(*size: Any, **kwargs: Any) -> Tensor:
        if len(size) == 1 and isinstance(size[0], int):
            return (torch.arange(size[0]) % 4 + 0.5) / 4
        return draw(*size, **kwargs)

    def end() -> None:
        raise StoppedError

    created = create(folder, name)
    if stop:
        before_step(created, STOP, end)
    own = mock.patch.object(gradmix, "derangement", lambda count, *rest: torch.arange(count))
    eager = mock.patch.multiple(trainer_module, READ_EVERY=1, SAVE_SECONDS=0.0)
    with own, eager, mock.patch.object(torch, "rand", rand):
        try:
            created.run()
        except StoppedError:
            assert stop


def main(folder: Path) -> None:
    assert create_accelerator(TRAINING).num_processes == 2
    for name in KINDS:
        train(folder / "two", name)
    train(folder / "two then one", "SimCLR", stop=True)
    train(folder / "one then two", "BYOL")
    print("trained")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
