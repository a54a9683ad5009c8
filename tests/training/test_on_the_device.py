"""What may be otherwise on a GPU than on a CPU; where there is no GPU, the tests themselves are tested on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import pytest
import torch
from support import Stage
from training_support import trainer

from ssl_gradmix import GradMix, backbones
from ssl_gradmix.gradmix import MixedViews, Region
from ssl_gradmix.methods.byol import BYOL
from ssl_gradmix.methods.simclr import SimCLR
from ssl_gradmix.mixing import Fill
from ssl_gradmix.settings import Augmentation, Optimizer
from ssl_gradmix.training.loop import all_finite

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2}


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
def test_three_steps_of_the_loop_never_wait(kind: type, encoder: str, update: str, tmp_path: Path) -> None:
    backbone = backbones.create(encoder, **(VIT if "vit" in encoder else {}))
    optimizer, augmentation = Optimizer(update, clip=1.0), Augmentation(blur=0.5, solarize=0.5)
    training = trainer(tmp_path, kind, backbone=backbone, optimizer=optimizer, augmentation=augmentation)
    training.bare.gradmix = GradMix()
    training.method.train()
    batches = training.source.epoch(0, 0)
    training._step(next(batches))  # where attribution chooses its layer, and the optimizer makes its state
    with waiting_raises():
        for batch in itertools.islice(batches, 3):
            training._step(batch)
    assert all_finite(training.bare.state_dict().values())


@pytest.mark.parametrize(("region", "fill"), [*itertools.product(get_args(Region), get_args(Fill))])
def test_gradmix_makes_what_it_makes_on_the_cpu(region: Region, fill: Fill) -> None:
    torch.manual_seed(0)
    encoder, views = Stage().double(), torch.randn(2, 8, 3, 32, 32, dtype=torch.float64)

    def mixed(device: str) -> MixedViews:
        generator = torch.Generator().manual_seed(0)
        gradmix = GradMix(["stage"], region=region, fill=fill, generator=generator)
        first, second = views.to(device)
        encoder.to(device)
        with gradmix.observe(encoder) as observed:
            loss = (encoder(first) - encoder(second)).square().mean()
        return gradmix(first, loss, observed, donors=second)

    here, there = mixed("cpu"), mixed(DEVICE)
    assert there.images.device.type == DEVICE
    assert there.lam.item() == here.lam.item()
    torch.testing.assert_close(there.attribution.cpu(), here.attribution, atol=1e-5, rtol=0)
    # Two places may be nearly as high.
    assert torch.isclose(there.images.cpu(), here.images, atol=1e-6).double().mean() > 0.98
