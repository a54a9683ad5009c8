"""The same trainings by two processes (run by torchrun) and by one (imported by a test): whole, resumed, or broken.

Usage: shared_training.py FOLDER killed|broken
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from ssl_gradmix import GradMix, backbones, mixing
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.methods.byol import BYOL
from ssl_gradmix.methods.simclr import SimCLR
from ssl_gradmix.run_folder import RunFolder
from ssl_gradmix.settings import Augmentation, Optimizer, Training
from ssl_gradmix.training import loop
from ssl_gradmix.training.loop import Trainer
from ssl_gradmix.training.processes import create_accelerator

METHODS = {"SimCLR": SimCLR, "BYOL": BYOL}
STEPS, EPOCHS = 2, 10
STOP = 6
PIXELS = np.random.default_rng(0).integers(0, 256, (STEPS * 8 + 1, 16, 16, 3), np.uint8)
TRAINING = Training(epochs=EPOCHS, batch_size=8, workers=0, threads=1, knn_every=0, samples_every=0)


def make_comparable(module: nn.Module) -> None:
    """GroupNorm in place of BatchNorm, whose statistics would be those of a process's share; SiLU in place of ReLU,
    whose kink makes weights that differ by 1e-4 out of a rounding error of 1e-7."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            norm = nn.GroupNorm(1, child.num_features).requires_grad_(child.weight.requires_grad)  # not the teacher's
            setattr(module, name, nn.Sequential(norm, getattr(child, "act", nn.Identity())))
        elif isinstance(child, nn.ReLU):
            setattr(module, name, nn.SiLU())
        else:
            make_comparable(child)


def create(folder: Path, name: str) -> Trainer:
    """Views are made by image, and in `run` a donor is an image's own other view: neither depends on the process."""
    accelerator = create_accelerator(TRAINING)
    torch.manual_seed(0)
    gradmix = GradMix(layers=["layer2"], fill="crop", lam_range=(0.7, 0.7))
    method = METHODS[name](backbones.create("resnet10_tiny"), 128, hidden_dim=32, output_dim=16, gradmix=gradmix)
    make_comparable(method)
    images = ImageSet(PIXELS, np.zeros(len(PIXELS), np.int64), ("noise",), "noise")
    into = RunFolder(folder / name)
    if accelerator.is_main_process:
        into.start({"training": {}}, images)
    accelerator.wait_for_everyone()
    return Trainer(method, images, into, accelerator, 16, Augmentation(), Optimizer(), TRAINING)


def act_at(trainer: Trainer, step: int, act: object) -> None:
    inner = trainer._step

    def watched(batch: list[Tensor]) -> object:
        if trainer.epoch * STEPS + trainer.batch == step:
            batch = act(batch)
        return inner(batch)

    trainer._step = watched


def run(trainer: Trainer) -> None:
    donors = mock.patch.object(mixing, "derangement", lambda count, device, generator=None: torch.arange(count))
    # Saved after steps that processes have to agree on, whatever their clocks say.
    with donors, mock.patch.multiple(loop, READ_EVERY=1, SAVE_SECONDS=0.1):
        trainer.run()


def train(folder: Path, name: str, *, stop: bool = False) -> None:
    """Trains to the end, or to a SIGTERM, which the last process gets alone."""
    trainer = create(folder, name)
    last = trainer.accelerator.is_last_process

    def signalled(batch: list[Tensor]) -> list[Tensor]:
        if last:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    if stop:
        act_at(trainer, STOP, signalled)
    status = None
    try:
        run(trainer)
    except SystemExit as stopped:
        status = stopped.code
    assert status == (128 + signal.SIGTERM if stop else None)


def break_down(folder: Path, how: str) -> None:
    """The last process dies, or cannot read an image."""
    trainer = create(folder, "SimCLR")

    def broken(batch: list[Tensor]) -> list[Tensor]:
        if trainer.accelerator.is_last_process:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("images/7.png is damaged")
        return batch

    act_at(trainer, 5, broken)
    run(trainer)


def main(folder: Path, how: str) -> None:
    """Whole and resumed trainings, if one process is to be killed afterwards, and the breakdown."""
    assert create_accelerator(TRAINING).num_processes == 2
    if how == "killed":
        for name in METHODS:
            train(folder / "two", name)
        train(folder / "two then one", "SimCLR", stop=True)
        train(folder / "one then two", "BYOL")
        try:
            create_accelerator(Training(batch_size=7))
        except ValueError as error:
            print(error)
        print("trained", flush=True)
    break_down(folder / how, how)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
