"""Which images make a batch, and views that do not depend on how images are decoded."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from training_support import image_set

from ssl_gradmix.data.augmentation import Augmentation, Views
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.training import batches
from ssl_gradmix.training.batches import Batches, BatchIndices, seed_step


def create(images: ImageSet, decode: str, workers: int = 2, size: int = 16) -> Batches:
    views = Views(Augmentation(blur=0.5), size, (0.0,) * 3, (1.0,) * 3)
    indices = BatchIndices(len(images), 4, seed=0)
    return Batches(images, views, indices, 2, decode, workers, torch.device("cpu"))


def draw(source: Batches, epoch: int = 0, first: int = 0) -> list[list[Tensor]]:
    """Views and labels of the batches of an epoch."""
    made = []
    for step, (images, labels) in enumerate(source.epoch(epoch, first), first):
        torch.rand(step + 7)  # something else draws from the generator
        seed_step(5, epoch, step)
        made.append([*source.views(images), labels])
    return made


def test_epoch_takes_each_image_once_in_a_new_order() -> None:
    indices = BatchIndices(23, 5, seed=0)
    epochs = [indices.epoch(epoch) for epoch in range(3)]
    assert all(epoch.shape == (4, 5) and len(epoch.unique()) == 20 for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(epochs[2], BatchIndices(23, 5, seed=0).epoch(2))
    assert not torch.equal(epochs[0], BatchIndices(23, 5, seed=1).epoch(0))
    # The images that are left out change: over some epochs every image is seen.
    seen = torch.cat([indices.epoch(epoch).flatten() for epoch in range(20)])
    assert len(seen.unique()) == 23


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batches_of_one(processes: int) -> None:
    alone = BatchIndices(40, 8, seed=3).epoch(1)
    parts = [
        BatchIndices(40, 8, 3, process=rank, processes=processes).epoch(1)
        for rank in range(processes)
    ]
    assert torch.equal(torch.cat(parts, 1), alone)


@pytest.mark.parametrize("decode", ["once", "threads"])
def test_epoch_entered_in_its_middle_gives_the_same_views(decode: str) -> None:
    images = image_set(20)
    whole, rest = draw(create(images, decode), 1), draw(create(images, decode), 1, first=3)
    assert (len(whole), len(rest)) == (5, 2)
    torch.testing.assert_close(rest, whole[3:], rtol=0, atol=0)
    assert not torch.equal(whole[0][0], draw(create(images, decode), 2)[0][0])
    for first, _, labels in whole:  # bright images are of class 1
        assert torch.equal(first.mean((1, 2, 3)) > 0.45, labels == 1)


def write(folder: Path, sizes: list[tuple[int, int]]) -> ImageSet:
    rng, paths = np.random.default_rng(0), []
    for i, (width, height) in enumerate(sizes):
        paths.append(folder / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(paths[-1])
    return ImageSet(paths, np.full(len(paths), -1), (), "noise")


@pytest.mark.parametrize("sizes", [[(42, 32)] * 24, [(42, 32), (40, 36)] * 12], ids=["one", "two"])
@pytest.mark.parametrize("workers", [1, 5])
def test_threads_give_the_views_of_images_decoded_once(
    sizes: list[tuple[int, int]], workers: int, tmp_path: Path
) -> None:
    images = write(tmp_path, sizes)
    once = draw(create(images, "once"))
    threads = draw(create(images, "threads", workers))
    torch.testing.assert_close(threads, once, rtol=0, atol=0)


def test_threads_decode_a_few_batches_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, decoded = write(tmp_path, [(8, 8)] * 80), []
    decode = images.decoded
    monkeypatch.setattr(images, "decoded", lambda i: decoded.append(i) or decode(i))
    epoch = create(images, "threads").epoch(0, 0)
    next(epoch)
    epoch.close()
    assert len(decoded) <= 4 * (batches.AHEAD + 1)


def test_threads_need_neither_processes_nor_shared_memory(tmp_path: Path) -> None:
    """A container's /dev/shm is small, and a loader process that finds it full never ends."""

    def outside() -> set[str]:
        own = Path("/proc/self")
        children = Path(own, "task", str(os.getpid()), "children").read_text().split()
        maps = Path(own, "maps").read_text().splitlines()
        return {*children, *(row for row in maps if "/dev/shm" in row or "torch_" in row)}

    before = outside()
    epoch = create(write(tmp_path, [(50, 40), (60, 30)] * 12), "threads", workers=3).epoch(0, 0)
    next(epoch)
    assert outside() <= before
    epoch.close()


@pytest.mark.parametrize(("limit", "resident"), [(-1, False), (0, True)])
def test_auto_keeps_images_that_fit(
    limit: int, resident: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write(tmp_path, [(40, 30), (20, 50), (64, 8), (10, 10)])
    size = 3 * (40 * 30 + 20 * 50 + 64 * 8 + 10 * 10)
    monkeypatch.setattr(batches, "RESIDENT_BYTES", size + limit)
    assert (create(images, "auto").resident is not None) == resident


def test_images_that_exceed_the_memory_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MEMORY", 20 * 3 * 16 * 16 - 1)
    with pytest.raises(ValueError, match=r"training\.decode"):
        create(image_set(20), "once")


@pytest.mark.parametrize("decode", ["once", "threads"])
def test_unreadable_image_raises_with_its_path(decode: str, tmp_path: Path) -> None:
    images = write(tmp_path, [(10, 10)] * 4)
    images.images[2].write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"2\.png"):
        next(iter(create(images, decode).epoch(0, 0)))
