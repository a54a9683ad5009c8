"""Training steps on a GPU; without one, the tests themselves are tested on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_support import TRAINING, create_method, final, trainer

from ssl_gradmix import GradMix, backbones
from ssl_gradmix.data.augmentation import Augmentation
from ssl_gradmix.methods import BYOL, Method, SimCLR
from ssl_gradmix.training.optimizers import Optimizer
from ssl_gradmix.training.trainer import all_finite

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VIT: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2}


@contextmanager
def waiting_raises() -> Iterator[None]:
    if DEVICE == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("update", ["sgd", "lars", "adamw"])
@pytest.mark.parametrize("encoder", ["resnet10_tiny", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("kind", [SimCLR, BYOL])
@pytest.mark.parametrize("decode", ["once", "threads"])
def test_steps_do_not_wait_for_the_device(
    kind: type[Method], encoder: str, update: str, decode: str, tmp_path: Path
) -> None:
    method = create_method(kind, backbones.create(encoder, **(VIT if "vit" in encoder else {})))
    method.gradmix = GradMix()
    training = trainer(
        tmp_path,
        method=method,
        training=replace(TRAINING, decode=decode),
        optimizer=Optimizer(name=update, clip=1.0),
        augmentation=Augmentation(blur=0.5, solarize=0.5),
    )
    training.method.train()
    batches = training.batches.epoch(0, 0)
    training._step(*next(batches))  # GradMix chooses its layer, the optimizer creates its state
    with waiting_raises():
        for batch in itertools.islice(batches, 3):
            training._step(*batch)
    assert all_finite(training.bare.state_dict().values())


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_precisions_train(precision: str, tmp_path: Path) -> None:
    if DEVICE == "cpu" and precision == "fp16":
        pytest.skip("fp16 needs a GPU")
    trainer(tmp_path, BYOL, training=replace(TRAINING, precision=precision, accumulate=2)).run()
    assert all_finite(final(tmp_path).values())
