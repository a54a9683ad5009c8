"""Trains on a device that computes nothing and cannot be read: what a GPU would make the host wait for raises here.

Usage: fake_device.py FOLDER. A process of its own, as torch keeps the device for ever. Prints a line a step: what
was trained, and on how many operations of the device.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from training_support import image_set, trainer

from ssl_gradmix import GradMix, backbones, mixing
from ssl_gradmix.data.planted import Stamps
from ssl_gradmix.gradmix import Region
from ssl_gradmix.methods.byol import BYOL
from ssl_gradmix.methods.simclr import SimCLR
from ssl_gradmix.methods.supcon import SupCon
from ssl_gradmix.settings import Augmentation, Optimizer
from ssl_gradmix.training import optimizers
from ssl_gradmix.training.loop import Trainer

torch.set_num_threads(1)
NAME = "fake"
ENCODERS = {
    "resnet10_tiny": {},
    "vit_tiny_patch16_224": {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2},
}


class Backend:
    """What torch asks the module of a device for."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def manual_seed_all(self, seed: int) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False


class FakeDevice(TorchDispatchMode):
    """Operations of the host are computed, those of the device only checked: shapes, devices, and that nobody waits."""

    def __init__(self) -> None:
        super().__init__()
        self.fake, self.operations = FakeTensorMode(), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        wanted = kwargs.get("device")
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors) and torch.device(wanted or "cpu").type != NAME:
            return function(*args, **kwargs)
        copied = function is torch.ops.aten._to_copy.default and kwargs.get("non_blocking")
        for tensor in tensors:
            if not isinstance(tensor, FakeTensor) and tensor.ndim and not copied:
                raise RuntimeError(f"{function} takes a tensor of the host, {tuple(tensor.shape)}, and waits for it")
        args, kwargs = tree_map_only(Tensor, self.taken, (args, kwargs))
        with self.fake:
            results = function(*args, **kwargs)
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.device.type != NAME:
                raise RuntimeError(f"{function} reads a tensor of the device, {tuple(result.shape)}")
        self.operations += function.namespace == "aten"
        return results

    def taken(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def moved(self, tensor: Tensor) -> Tensor:
        """Memory on the device like a tensor's."""
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=NAME)


def move(training: Trainer, device: FakeDevice) -> None:
    """Puts a training on the device, as far as a step is concerned."""
    with device:
        training.method._apply(device.moved)
        training.source.make_views._apply(device.moved)
        training.source.device = torch.device(NAME)
        for name, value in vars(training.source).items():
            if isinstance(value, Tensor):
                setattr(training.source, name, device.moved(value))


def check_that_waiting_raises(device: FakeDevice) -> None:
    with device:
        there = torch.rand(4, device=NAME)
        for wait in (
            there.sum().item,
            there.tolist,
            there.cpu,
            there.nonzero,
            lambda: bool(there[0] > 0),
            lambda: there[torch.tensor([True, False, True, False])],
            lambda: there + torch.rand(4),
            lambda: torch.rand(4).to(NAME),
            lambda: torch.tensor([1.0], device=NAME),
        ):
            try:
                wait()
            except Exception:  # of many kinds
                continue
            raise AssertionError("the host waits unnoticed")


def main(folder: Path) -> None:
    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    check_that_waiting_raises(FakeDevice())
    fills, names = get_args(mixing.Fill), ("sgd", "lars", "adamw")
    augmentation, images = Augmentation(blur=0.5, solarize=0.5), replace(image_set(), stamps=Stamps(4))
    packed = torch.zeros(3 * 16 * 16 + 3 * 20 * 24, dtype=torch.uint8), [(3, 16, 16), (3, 20, 24)]
    # Each method and encoder meets all regions, fills and optimizers, and each region all fills.
    for i, (kind, (name, arguments)) in enumerate(itertools.product((SimCLR, BYOL, SupCon), ENCODERS.items())):
        backbone = backbones.create(name, **arguments)
        training = trainer(folder / str(i), kind, backbone=backbone, augmentation=augmentation, images=images)
        training.settings = Optimizer(clip=1.0)
        gradmix = training.bare.gradmix = GradMix()
        training.method.train()
        training._step(next(training.source.epoch(0, 0)))  # where attribution chooses its layer, on the host
        device = FakeDevice()
        move(training, device)
        with device:
            training.source.views(packed)  # as it comes from loader processes
            for j, gradmix.region in enumerate(get_args(Region), i):
                gradmix.fill, update = fills[j % len(fills)], names[j % len(names)]
                created = optimizers.create(training.bare, Optimizer(update))
                training.optimizer = training.accelerator.prepare_optimizer(created, device_placement=False)
                device.operations = 0
                training._step(next(training.source.epoch(0, 0)))
                print(kind.__name__, name, gradmix.region, gradmix.fill, update, device.operations, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
