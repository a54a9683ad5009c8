"""Which images make a batch, however many processes share it, and where an epoch is entered."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.settings import Augmentation
from ssl_gradmix.training import batches
from ssl_gradmix.training.batches import BatchIndices


def image_set(count: int = 20) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)
    return ImageSet(pixels, np.zeros(count, np.int64), ("one",), "noise")


def test_an_epoch_takes_each_image_at_most_once_in_another_order_each_time() -> None:
    indices = BatchIndices(23, 5, seed=0)
    epochs = [indices.epoch(epoch) for epoch in range(3)]
    assert all(epoch.shape == (4, 5) and len(epoch.unique()) == 20 for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(epochs[2], BatchIndices(23, 5, seed=0).epoch(2))
    assert not torch.equal(epochs[0], BatchIndices(23, 5, seed=1).epoch(0))
    # What is left out changes: over some epochs every image is seen.
    assert len(torch.cat([indices.epoch(epoch).flatten() for epoch in range(20)]).unique()) == 23


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_global_batches(processes: int) -> None:
    alone = BatchIndices(40, 8, seed=3).epoch(1)
    shares = [BatchIndices(40, 8, 3, process=rank, processes=processes).epoch(1) for rank in range(processes)]
    assert torch.equal(torch.cat(shares, 1), alone)


def test_micro_batches_cut_the_same_batches() -> None:
    assert torch.equal(BatchIndices(30, 8, 0, parts=2).epoch(0).view(3, 8), BatchIndices(30, 8, 0).epoch(0))


@pytest.mark.parametrize(("where", "workers"), [("device", 0), ("workers", 0), ("workers", 2)])
def test_an_epoch_entered_in_its_middle_gives_the_same_views(where: str, workers: int) -> None:
    def views(epoch: int, first: int) -> list[list[torch.Tensor]]:
        source = batches.create(
            image_set(),
            Augmentation(where=where),
            BatchIndices(20, 4, 0),
            16,
            (0.5,) * 3,
            (0.5,) * 3,
            2,
            workers,
            torch.device("cpu"),
        )
        made = []
        for step, batch in enumerate(source.epoch(epoch, first), first):
            torch.rand(step + 7)  # whatever else draws from the generator
            batches.seed_step(5, epoch, step, 0)
            made.append(source.views(batch))
        return made

    whole, rest = views(1, 0), views(1, 3)
    assert len(whole) == 5
    assert len(rest) == 2
    for one, two in zip(whole[3:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(whole[0][0], views(2, 0)[0][0])


def test_workers_that_outlive_an_epoch_know_the_next_one() -> None:
    source = batches.create(
        image_set(),
        Augmentation(where="workers"),
        BatchIndices(20, 20, 0),
        16,
        (0.5,) * 3,
        (0.5,) * 3,
        2,
        1,
        torch.device("cpu"),
    )
    first, second = (next(iter(source.epoch(epoch, 0)))[0].sort(0).values for epoch in (0, 1))
    assert not torch.equal(first, second)


def test_steps_are_seeded_by_their_place() -> None:
    drawn = set()
    for place in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]:
        batches.seed_step(*place)
        drawn.add(torch.rand(()).item())
    assert len(drawn) == 5


def test_auto_keeps_small_sets_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def create() -> object:
        return batches.create(
            image_set(), Augmentation(), BatchIndices(20, 4, 0), 16, (0.5,) * 3, (0.5,) * 3, 2, 0, torch.device("cpu")
        )

    assert isinstance(create(), batches.DeviceBatches)
    monkeypatch.setattr(batches, "RESIDENT_BYTES", 20 * 3 * 16 * 16 - 1)
    assert isinstance(create(), batches.WorkerBatches)
