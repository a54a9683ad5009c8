"""Which images make a batch, and where their views are made: on the device that holds the images, or in workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ssl_gradmix.data.augmentation import DeviceViews, WorkerViews
from ssl_gradmix.data.datasets import MEMORY, ImageSet
from ssl_gradmix.settings import Augmentation
from ssl_gradmix.training import signals

RESIDENT_BYTES = 4 * 2**30
"""`augmentation.where=auto` keeps a data set on the device up to this size, decoded."""


def seed_step(seed: int, epoch: int, step: int, process: int) -> None:
    """Seeds torch's global generators for a step from its place in the training, so that a resumed run repeats it."""
    torch.manual_seed(
        int(np.random.SeedSequence([seed, epoch, step, process]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    )


def shuffled(count: int, seed: int, epoch: int) -> Tensor:
    """The order of `count` images in an epoch, int64 (count,), the same on every process."""
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(count))


class BatchIndices:
    """Image indices of this process's share of each batch, the same batches however many processes share them.

    The last images of an epoch that do not fill a global batch are left out.

    Args:
        count: Images in the data set.
        batch: Images in a batch over all processes.
        seed: Of the shuffling.
        parts: Micro-batches that a batch is cut into.
        process: This process's number.
        processes: How many there are.
    """

    def __init__(self, count: int, batch: int, seed: int, parts: int = 1, process: int = 0, processes: int = 1) -> None:
        self.count, self.seed = count, seed
        self.process, self.processes = process, processes
        self.micro = batch // parts
        self.length = count // batch * parts

    def __len__(self) -> int:
        """Micro-batches in an epoch."""
        return self.length

    def epoch(self, epoch: int) -> Tensor:
        """int64 (micro-batches, share): row b holds this process's part of micro-batch b."""
        order = shuffled(self.count, self.seed, epoch)[: self.length * self.micro]
        return order.view(self.length, self.processes, self.micro // self.processes)[:, self.process]


class DeviceBatches:
    """Views made in batches on the device, of images that stay there at their own sizes.

    Args:
        images: uint8 (N, 3, H, W), or N of (3, H, W) each of its own size.
        make_views: Makes the views.
        indices: Which images make a batch.
        n_views: Of each image.
        device: Where they lie.
    """

    def __init__(
        self,
        images: Tensor | Sequence[Tensor],
        make_views: DeviceViews,
        indices: BatchIndices,
        n_views: int,
        device: torch.device,
    ) -> None:
        self.make_views, self.indices, self.n_views = make_views.to(device), indices, n_views
        alike = isinstance(images, Tensor)
        self.images = images.to(device) if alike else [image.to(device) for image in images]

    def epoch(self, epoch: int, first: int) -> Iterator[Tensor | list[Tensor]]:
        """uint8 batches of an epoch, from batch `first` on."""
        for chosen in self.indices.epoch(epoch)[first:]:
            if isinstance(self.images, Tensor):
                yield self.images[chosen.to(self.images.device)]
            else:
                yield [self.images[i] for i in chosen.tolist()]

    def views(self, batch: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Draws the views of a batch from torch's global generator."""
        return self.make_views(batch, self.n_views)


class WorkerBatches:
    """Views made image by image in loader processes, each seeded by its own (seed, epoch, image)."""

    def __init__(self, dataset: WorkerViews, indices: BatchIndices, workers: int, device: torch.device) -> None:
        self.indices, self.device = indices, device
        self._epoch, self._first = 0, 0
        self.loader = DataLoader(
            dataset,
            batch_sampler=self,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=signals.obey_parent_alone,
            pin_memory=device.type == "cuda",
        )

    def __len__(self) -> int:
        return len(self.indices) - self._first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """The loader's batch sampler: pairs (epoch, image) tell a worker, which outlives the epoch, where it is."""
        for chosen in self.indices.epoch(self._epoch)[self._first :].tolist():
            yield [(self._epoch, image) for image in chosen]

    def epoch(self, epoch: int, first: int) -> Iterator[list[Tensor]]:
        """Batches of views of an epoch, from batch `first` on.

        Raises:
            ValueError: An image cannot be read; the message names its path.
        """
        self._epoch, self._first = epoch, first
        try:
            yield from self.loader
        except ValueError as error:
            if not self.loader.num_workers:
                raise
            # The message is the worker's traceback, whose last line is the error.
            raise ValueError(str(error).rstrip().splitlines()[-1].removeprefix("ValueError: ")) from error

    def views(self, batch: list[Tensor]) -> list[Tensor]:
        """Moves the views to the device."""
        return [view.to(self.device, non_blocking=True) for view in batch]


def create(
    images: ImageSet,
    augmentation: Augmentation,
    indices: BatchIndices,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    n_views: int,
    workers: int,
    device: torch.device,
) -> DeviceBatches | WorkerBatches:
    """Makes views where `augmentation.where` says; `auto` is on the device where the decoded images fit.

    Raises:
        ValueError: The device is asked for, and the images take more memory than the machine has; or a file cannot be
            read.
    """
    if augmentation.where != "workers":
        resident = images.originals(MEMORY if augmentation.where == "device" else min(RESIDENT_BYTES, MEMORY))
        if resident is not None:
            return DeviceBatches(resident, DeviceViews(augmentation, size, mean, std), indices, n_views, device)
        if augmentation.where == "device":
            raise ValueError(
                f"augmentation.where device: the images of {images.name} take more than the {MEMORY / 2**30:,.0f} GiB "
                "that this machine has, decoded; workers decode as they go"
            )
    return WorkerBatches(
        WorkerViews(images, augmentation, size, mean, std, n_views, indices.seed), indices, workers, device
    )
