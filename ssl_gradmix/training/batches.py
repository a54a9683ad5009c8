"""Which images make a batch, and where they are decoded: once, or in loader processes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.data.datasets import MEMORY, ImageSet
from ssl_gradmix.training import signals

RESIDENT_BYTES = 4 * 2**30
"""`training.decode=auto` keeps a data set in memory up to this size, decoded; on a GPU, up to a quarter of its own."""


def seed_step(*place: int) -> None:
    """Seeds torch's global generators from a place in the training, such as (seed, epoch, step), so that it repeats."""
    torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> np.uint64(1)))


class BatchIndices:
    """Image indices of this process's share of each batch, the same batches however many processes share them.

    The last images of an epoch that do not fill a global batch, of `batch` images over all processes, are left out.
    Each batch is cut into as many micro-batches as it has parts.
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
        order = np.random.default_rng([self.seed, epoch]).permutation(self.count)[: self.length * self.micro]
        shares = torch.from_numpy(order).view(self.length, self.processes, self.micro // self.processes)
        return shares[:, self.process]


class _Rest:
    """The loader's batch sampler; of its own, as a loader in a cycle of references ends its workers by a timeout."""

    def __init__(self, indices: BatchIndices) -> None:
        self.indices, self.epoch, self.first = indices, 0, 0

    def __len__(self) -> int:
        return len(self.indices) - self.first

    def __iter__(self) -> Iterator[list[int]]:
        """Image numbers of an epoch's batches, from batch `first` on."""
        yield from self.indices.epoch(self.epoch)[self.first :].tolist()


class Batches:
    """Batches of images, decoded once or by loader processes when they are needed, and views of them on a device.

    `decode` and `workers` are as in `settings.Training`.

    Raises:
        ValueError: Decoded at once, the images take more memory than the machine has; or a file cannot be read.
    """

    def __init__(
        self,
        images: ImageSet,
        make_views: Views,
        indices: BatchIndices,
        n_views: int,
        decode: str,
        workers: int,
        device: torch.device,
    ) -> None:
        self.make_views, self.indices, self.n_views, self.device = make_views.to(device), indices, n_views, device
        self.labels = torch.from_numpy(images.labels).to(device)
        self.resident: Tensor | list[Tensor] | None = None
        if decode != "workers":
            # It lies in the memory of the machine first, for each process.
            fits = min(_room(device), MEMORY // (2 * indices.processes))
            decoded = images.originals(MEMORY if decode == "once" else fits)
            if decoded is not None:
                alike = isinstance(decoded, Tensor)
                self.resident = decoded.to(device) if alike else [image.to(device) for image in decoded]
            elif decode == "once":
                raise ValueError(
                    f"training.decode once: the images of {images.name} take more than the {MEMORY / 2**30:,.0f} GiB "
                    "that this machine has, decoded; workers decode as they go"
                )
        if self.resident is None:
            self._rest = _Rest(indices)
            self.loader = DataLoader(
                images,
                batch_sampler=self._rest,
                collate_fn=_packed,
                num_workers=workers,
                persistent_workers=workers > 0,
                worker_init_fn=signals.obey_parent_alone,
                pin_memory=device.type == "cuda",
            )

    def epoch(self, epoch: int, first: int) -> Iterator[tuple[Packed | Tensor | list[Tensor], Tensor]]:
        """Batches of an epoch, from batch `first` on: images for `views`, and their labels, on the device.

        Raises:
            ValueError: An image cannot be read; the message names its path.
        """
        rest = self.indices.epoch(epoch)[first:]
        there = rest.to(self.device, non_blocking=True)  # one copy for all batches, for which the host does not wait
        if isinstance(self.resident, Tensor):
            images = (self.resident[chosen] for chosen in there)
        elif self.resident is not None:
            images = ([self.resident[i] for i in chosen] for chosen in rest.tolist())
        else:
            images = self._loaded(epoch, first)
        yield from zip(images, self.labels[there], strict=True)

    def _loaded(self, epoch: int, first: int) -> Iterator[Packed]:
        self._rest.epoch, self._rest.first = epoch, first
        try:
            yield from self.loader
        except ValueError as error:
            if not self.loader.num_workers:
                raise
            # The message is the worker's traceback, whose last line is the error.
            raise ValueError(str(error).rstrip().splitlines()[-1].removeprefix("ValueError: ")) from error

    def views(self, batch: Packed | Tensor | list[Tensor]) -> list[Tensor]:
        """Draws the views of images from torch's global generator, the same ones however the images were decoded."""
        if isinstance(batch, tuple):
            flat, shapes = batch
            parts = flat.to(self.device, non_blocking=True).split([math.prod(shape) for shape in shapes])
            batch = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return self.make_views(batch, self.n_views)


def _room(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else RESIDENT_BYTES


Packed = tuple[Tensor, list[tuple[int, ...]]]
"""Images of different sizes, one behind the other in a single tensor, and the shape of each: as tensors of their own
each would take a file of shared memory on its way from a loader process."""


def _packed(samples: list[tuple[Image.Image, int]]) -> Packed:
    pixels = [np.asarray(image).transpose(2, 0, 1) for image, _ in samples]
    return torch.from_numpy(np.concatenate([each.ravel() for each in pixels])), [each.shape for each in pixels]
