"""Which images make a batch, however many processes share it, and where an epoch is entered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop
from training_support import image_set

from ssl_gradmix.data import images as image_files
from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.settings import Augmentation
from ssl_gradmix.training import batches
from ssl_gradmix.training.batches import BatchIndices


def create(
    images: ImageSet, decode: str = "auto", workers: int = 0, batch: int = 4, size: int = 16, n_views: int = 2
) -> batches.Batches:
    views = Views(Augmentation(blur=0.5), size, (0.0,) * 3, (1.0,) * 3)
    indices = BatchIndices(len(images), batch, 0)
    return batches.Batches(images, views, indices, n_views, decode, workers, torch.device("cpu"))


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


@pytest.mark.parametrize(("decode", "workers"), [("once", 0), ("workers", 0), ("workers", 2)])
def test_an_epoch_entered_in_its_middle_gives_the_same_views(decode: str, workers: int) -> None:
    def views_and_labels(epoch: int, first: int) -> list[list[torch.Tensor]]:
        source = create(image_set(20), decode, workers)
        made = []
        for step, (pixels, labels) in enumerate(source.epoch(epoch, first), first):
            torch.rand(step + 7)  # whatever else draws from the generator
            batches.seed_step(5, epoch, step, 0)
            made.append([*source.views(pixels), labels])
        return made

    whole, rest = views_and_labels(1, 0), views_and_labels(1, 3)
    assert len(whole) == 5
    assert len(rest) == 2
    for one, two in zip(whole[3:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(whole[0][0], views_and_labels(2, 0)[0][0])
    for first, _, labels in whole:  # bright images are of class 1
        assert torch.equal(first.mean((1, 2, 3)) > 0.45, labels == 1)


def test_workers_that_outlive_an_epoch_know_the_next_one() -> None:
    images = image_set(20)
    source = create(images, "workers", workers=1)
    for epoch in (0, 1):
        for chosen, ((flat, shapes), _) in zip(source.indices.epoch(epoch), source.epoch(epoch, 0), strict=True):
            assert shapes == [(3, 16, 16)] * 4
            expected = torch.from_numpy(images.images[chosen.numpy()]).permute(0, 3, 1, 2)
            assert torch.equal(flat.view(4, 3, 16, 16), expected)


def test_steps_are_seeded_by_their_place() -> None:
    drawn = set()
    for place in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]:
        batches.seed_step(*place)
        drawn.add(torch.rand(()).item())
    assert len(drawn) == 5


def test_auto_keeps_small_sets_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert create(image_set(20)).resident is not None
    monkeypatch.setattr(batches, "RESIDENT_BYTES", 20 * 3 * 16 * 16 - 1)
    assert create(image_set(20)).resident is None


def on_disk(folder: Path, sizes: list[tuple[int, int]]) -> ImageSet:
    """Photographs (width, height) that show where they are looked at: red grows to the right, green downwards, and blue
    is fine detail."""
    rng, paths = np.random.default_rng(0), []
    for i, (width, height) in enumerate(sizes):
        down, right = np.mgrid[:height, :width]
        detail = rng.integers(0, 256, (height, width))
        pixels = np.stack([right * 255 / (width - 1), down * 255 / (height - 1), detail], axis=-1)
        paths.append(folder / f"{i}.png")
        Image.fromarray(pixels.round().astype(np.uint8)).save(paths[-1], compress_level=1)
    return ImageSet(paths, np.full(len(paths), -1), (), "photographs")


@pytest.mark.parametrize("sizes", [[(420, 320)] * 8, [(420, 320), (400, 336)] * 4], ids=["one size", "two sizes"])
def test_views_are_of_the_whole_photograph_and_the_same_however_it_was_decoded(
    sizes: list[tuple[int, int]], tmp_path: Path
) -> None:
    images = on_disk(tmp_path, sizes)

    def views(decode: str, workers: int) -> torch.Tensor:
        source = create(images, decode, workers, batch=4, size=64)
        made = []
        for step, (pixels, _) in enumerate(source.epoch(0, 0)):
            batches.seed_step(5, 0, step)
            made += source.views(pixels)
        return torch.cat(made)

    once = views("once", 0)
    assert torch.equal(once, views("workers", 0))
    assert torch.equal(once, views("workers", 2))


def test_crops_keep_the_detail_and_see_the_sides_of_a_photograph(tmp_path: Path) -> None:
    """As torchvision's crops of the same photographs do; one of a thumbnail would lose three quarters of the detail."""
    images = on_disk(tmp_path, [(420, 320)] * 8)
    alone = Augmentation(flip=0.0, jitter=0.0, gray=0.0)
    torch.manual_seed(0)
    ours = torch.cat(Views(alone, 64, (0.0,) * 3, (1.0,) * 3)(images.originals(2**30), 25))
    crop = RandomResizedCrop(64, (0.2, 1.0), antialias=True)
    theirs = torch.stack([crop(images.decoded(i)).float() / 255 for i in range(8) for _ in range(25)])

    def detail(views: torch.Tensor) -> float:
        blue = views[:, 2]
        across = blue[:, 1:-1, :-2] + blue[:, 1:-1, 2:] + blue[:, :-2, 1:-1] + blue[:, 2:, 1:-1]
        return (across - 4 * blue[:, 1:-1, 1:-1]).square().mean().item()

    assert detail(ours) == pytest.approx(detail(theirs), rel=0.06)
    for channel in (0, 1):
        centers, expected = (made[:, channel].mean((1, 2)) for made in (ours, theirs))
        assert ks_2samp(centers, expected).pvalue > 1e-2
        assert ours[:, channel].amin() < 0.02
        assert ours[:, channel].amax() > 0.98


@pytest.mark.parametrize(("limit", "resident"), [(-1, False), (0, True)])
def test_files_stay_on_the_device_by_what_they_take_at_their_own_size(
    limit: int, resident: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = on_disk(tmp_path, [(40, 30), (20, 50), (64, 8), (10, 10)])
    monkeypatch.setattr(batches, "RESIDENT_BYTES", 3 * (40 * 30 + 20 * 50 + 64 * 8 + 10 * 10) + limit)
    decoded, decode = [], image_files.decode
    monkeypatch.setattr(image_files, "decode", lambda path: decoded.append(path) or decode(path))
    assert (create(images).resident is not None) == resident
    assert len(decoded) == (4 if resident else 0)


def test_images_that_no_memory_holds_are_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MEMORY", 20 * 3 * 16 * 16 - 1)
    with pytest.raises(ValueError, match=r"^training.decode once: the images of noise take more than .* workers"):
        create(image_set(20), "once")


@pytest.mark.parametrize(("decode", "workers"), [("once", 0), ("workers", 0), ("workers", 1)])
def test_a_broken_image_is_named_in_one_line(decode: str, workers: int, tmp_path: Path) -> None:
    images = on_disk(tmp_path, [(10, 10)] * 4)
    images.images[2].write_bytes(b"broken")

    def first_batch() -> None:
        next(iter(create(images, decode, workers).epoch(0, 0)))

    with pytest.raises(ValueError, match=r"^cannot read the image '.*2\.png': damaged.*broken skip$") as refusal:
        first_batch()
    assert len(str(refusal.value).splitlines()) == 1
