"""Trains on a device that computes nothing and cannot be read.

What would make the host wait for a GPU raises here. Usage: fake_device.py FOLDER. It needs a
process of its own, because torch cannot unregister a device. Prints a line per step: what was
trained, and how many operations ran on the device.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from training_support import create_method, trainer

from ssl_gradmix import GradMix, backbones
from ssl_gradmix.adaptive import Adaptive
from ssl_gradmix.data.augmentation import Augmentation
from ssl_gradmix.gradmix import Fill, Region
from ssl_gradmix.methods import BYOL, SimCLR, SupCon
from ssl_gradmix.training import optimizers
from ssl_gradmix.training.optimizers import Optimizer
from ssl_gradmix.training.trainer import Trainer

torch.set_num_threads(1)
NAME = "fake"
ENCODERS: dict[str, dict[str, int]] = {
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
    """Computes the operations of the host, and only checks those of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.fake, self.operations = FakeTensorMode(), 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if not on_device and torch.device(kwargs.get("device") or "cpu").type != NAME:
            return function(*args, **kwargs)
        copied = function is torch.ops.aten._to_copy.default and kwargs.get("non_blocking")
        for tensor in tensors:
            if not isinstance(tensor, FakeTensor) and tensor.ndim and not copied:
                raise RuntimeError(f"{function} waits for a host tensor, {tuple(tensor.shape)}")
        args, kwargs = tree_map_only(Tensor, self.taken, (args, kwargs))
        with self.fake:
            results = function(*args, **kwargs)
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.device.type != NAME:
                raise RuntimeError(
                    f"{function} reads a tensor of the device, {tuple(result.shape)}"
                )
        self.operations += function.namespace == "aten"
        return results

    def taken(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def moved(self, tensor: Tensor) -> Tensor:
        """Memory on the device like a tensor's."""
        kind = {"dtype": tensor.dtype, "device": NAME}
        return torch.empty_strided(tensor.shape, tensor.stride(), **kind)


def move(training: Trainer, device: FakeDevice) -> None:
    """Puts what a step needs on the device."""
    batches = training.batches
    with device:
        training.method._apply(device.moved)
        batches.make_views._apply(device.moved)
        batches.device = torch.device(NAME)
        batches.labels = device.moved(batches.labels)
        batches.resident = device.moved(batches.resident)


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
    fills, updates = get_args(Fill), ("sgd", "lars", "adamw")
    augmentation = Augmentation(blur=0.5, solarize=0.5)
    unequal = [torch.zeros(3, height, 16, dtype=torch.uint8) for height in (16, 20)]
    kinds = itertools.product((SimCLR, BYOL, SupCon), ENCODERS.items())
    # Each method and encoder meets all regions, fills and optimizers, and each region all fills;
    # every second one is adaptive.
    for i, (kind, (name, arguments)) in enumerate(kinds):
        method = create_method(kind, backbones.create(name, **arguments))
        gradmix = method.gradmix = GradMix()
        method.adaptive = Adaptive() if i % 2 else None
        training = trainer(
            folder / str(i),
            method=method,
            augmentation=augmentation,
            optimizer=Optimizer(clip=1.0),
            n_views=3 if i % 2 else 2,
        )
        training.method.train()
        training._step(*next(training.batches.epoch(0, 0)))  # GradMix chooses its layer
        device = FakeDevice()
        move(training, device)
        with device:
            training.batches.views([image.to(NAME, non_blocking=True) for image in unequal])
            for j, region in enumerate(get_args(Region), i):
                gradmix.region, gradmix.fill = region, fills[j % len(fills)]
                update = updates[j % len(updates)]
                created = optimizers.create(training.bare, Optimizer(name=update))
                prepare = training.accelerator.prepare_optimizer
                training.optimizer = prepare(created, device_placement=False)
                device.operations = 0
                training._step(*next(training.batches.epoch(0, 0)))
                shown = kind.__name__, name, region, gradmix.fill, update, device.operations
                print(*shown, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
