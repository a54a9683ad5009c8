"""Which images make a batch, and where they are decoded: once at the start, or by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.data.datasets import MEMORY, ImageSet

RESIDENT_BYTES = 4 * 2**30
"""Size of a decoded data set up to which `training.decode=auto` keeps it in memory. On a GPU the
limit is a quarter of its free memory."""

AHEAD = 4
"""Batches that threads decode ahead of the training."""


def seed_step(*place: int) -> None:
    """Seeds torch's global generators from a position such as (seed, epoch, step)."""
    seed = np.random.SeedSequence(place).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(seed >> np.uint64(1)))


class BatchIndices:
    """Image indices of one process's part of each batch.

    The global batches do not depend on the number of processes. The last images of an epoch that
    do not fill a batch are left out.

    Args:
        count: Number of images.
        batch: Images per global batch, over all processes.
        seed: Seed of the order, which differs between epochs.
        parts: Micro-batches per batch.
        process: Index of this process.
        processes: Number of processes.
    """

    def __init__(
        self,
        count: int,
        batch: int,
        seed: int,
        parts: int = 1,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.count, self.seed = count, seed
        self.process, self.processes = process, processes
        self.micro = batch // parts
        self.length = count // batch * parts

    def __len__(self) -> int:
        """Micro-batches per epoch."""
        return self.length

    def epoch(self, epoch: int) -> Tensor:
        """int64 (micro-batches, images): row b holds this process's part of micro-batch b."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        used = torch.from_numpy(order[: self.length * self.micro])
        parts = used.view(self.length, self.processes, self.micro // self.processes)
        return parts[:, self.process]


class Batches:
    """Batches of images and their views. The views do not depend on how images are decoded.

    Args:
        images: The training images.
        make_views: Makes views of a batch; it is moved to the device.
        indices: Which images are in a batch.
        n_views: Views per image.
        decode: `once` keeps all images decoded on the device, `threads` decodes them when they are
            needed, `auto` chooses `once` if they fit (see `RESIDENT_BYTES`).
        workers: Number of threads.
        device: Where the encoder runs.

    Raises:
        ValueError: `decode` is `once` and the images do not fit in memory, or a file is unreadable.
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
        self.images, self.indices, self.n_views = images, indices, n_views
        self.make_views = make_views.to(device)
        self.workers, self.device = workers, device
        self.labels = torch.from_numpy(images.labels).to(device)
        self.resident: Tensor | list[Tensor] | None = None
        if decode != "threads":
            limit = MEMORY if decode == "once" else _room(device, indices.processes)
            self.resident = _moved(images.originals(limit), device)
        if decode == "once" and self.resident is None:
            raise ValueError(
                f"training.decode once: the decoded images of {images.name} take more than this "
                f"machine's {MEMORY / 2**30:,.0f} GiB; use threads"
            )

    def epoch(self, epoch: int, first: int) -> Iterator[tuple[Tensor | list[Tensor], Tensor]]:
        """Images, on the device, and labels of the batches of an epoch, from batch `first` on.

        Raises:
            ValueError: An image cannot be read; the message names its path.
        """
        rest = self.indices.epoch(epoch)[first:]
        on_device = rest.to(self.device, non_blocking=True)  # one copy for all batches
        images: Iterator[Tensor | list[Tensor]]
        if self.resident is None:
            images = self._decoded(rest.tolist())
        elif isinstance(self.resident, Tensor):
            images = (self.resident[chosen] for chosen in on_device)
        else:
            images = ([self.resident[i] for i in chosen] for chosen in rest.tolist())
        yield from zip(images, self.labels[on_device], strict=True)

    def views(self, images: Tensor | list[Tensor]) -> list[Tensor]:
        """Draws the views of a batch from torch's global generator."""
        return self.make_views(images, self.n_views)

    def _decoded(self, batches: list[list[int]]) -> Iterator[list[Tensor]]:
        """Decodes batches by threads, in order, at most `AHEAD` of them ahead."""
        ahead: deque[list[Future[Tensor]]] = deque()
        pool = ThreadPoolExecutor(self.workers)
        try:
            for chosen in batches:
                ahead.append([pool.submit(self._decode, i) for i in chosen])
                if len(ahead) > AHEAD:
                    yield self._collect(ahead.popleft())
            while ahead:
                yield self._collect(ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _decode(self, index: int) -> Tensor:
        image = self.images.decoded(index)
        return image.pin_memory() if self.device.type == "cuda" else image

    def _collect(self, images: list[Future[Tensor]]) -> list[Tensor]:
        return [image.result().to(self.device, non_blocking=True) for image in images]


def _moved(
    images: Tensor | list[Tensor] | None, device: torch.device
) -> Tensor | list[Tensor] | None:
    if isinstance(images, list):
        return [image.to(device) for image in images]
    return images if images is None else images.to(device)


def _room(device: torch.device, processes: int) -> int:
    """Bytes that a decoded data set may take on the device, and before that in main memory."""
    on_gpu = device.type == "cuda"
    room = torch.cuda.mem_get_info(device)[0] // 4 if on_gpu else RESIDENT_BYTES
    return min(room, MEMORY // (2 * processes))
