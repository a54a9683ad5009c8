from __future__ import annotations

import copy
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from PIL import Image
from torch import nn

from ssl_gradmix import backbones
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.evaluation.encoders import Encoder
from ssl_gradmix.evaluation.features import count_copies, extract, rankme

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def images_of(count: int, size: int = 16, seed: int = 0) -> ImageSet:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return ImageSet(pixels, rng.integers(-1, 3, count), ("a", "b", "c"), "mine/test")


def encoder_of(model: nn.Module, **changes: object) -> Encoder:
    arguments = {"model": model, "size": 16, "mean": MEAN, "std": STD, "name": "mine"}
    return Encoder(**arguments | changes)


class Small(nn.Module):
    """A convolution with BatchNorm and dropout, which counts the images it has seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        convolution, norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        self.layers = nn.Sequential(convolution, norm, nn.Dropout(), nn.AdaptiveAvgPool2d(1))
        self.seen = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return self.layers(images).flatten(1)


def test_features_equal_one_image_at_a_time_in_float64() -> None:
    images = images_of(11)
    encoder = encoder_of(backbones.create("resnet10_tiny"))
    model = copy.deepcopy(encoder.model).double().eval()
    normalized = ((images.images / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
    expected = torch.cat([model(torch.from_numpy(image[None])) for image in normalized])
    for batch_size in (1, 4, 256):
        features, labels = extract(encoder, images, batch_size)
        assert (features.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert torch.allclose(features.double(), expected, atol=1e-5)
        assert labels.tolist() == images.labels.tolist()
    of_array = extract(encoder, images.images)
    assert torch.equal(of_array[0], features)
    assert of_array[1].tolist() == [-1] * 11


def test_model_in_training_mode_is_left_unchanged() -> None:
    model = Small()
    encoder = encoder_of(model)
    model.train()
    before = copy.deepcopy(model.state_dict())
    first, _ = extract(encoder, images_of(9), batch_size=4)
    second, _ = extract(encoder, images_of(9), batch_size=9)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.allclose(first, second, atol=1e-6)  # dropout would make them differ
    assert not model.training


def test_cache_distinguishes_all_that_features_depend_on(tmp_path: Path) -> None:
    images, shifted, model = images_of(5), Small(), Small()
    shifted.layers[1].running_mean += 0.5
    changed = images.images.copy()
    changed[4, 15, 15, 2] ^= 1
    cases = [
        (encoder_of(model), images),
        (encoder_of(model), images.subset([1, 0, 2, 3, 4])),
        (encoder_of(model), images.subset([0, 1, 2, 3])),
        (encoder_of(model), changed),
        (encoder_of(model, mean=(0.4, 0.5, 0.5)), images),
        (encoder_of(model, std=(0.2, 0.25, 0.2)), images),
        (encoder_of(model, size=8), images),
        (encoder_of(shifted), images),
    ]
    for encoder, data in cases:
        cached, _ = extract(encoder, data, cache=tmp_path)
        assert torch.equal(cached, extract(encoder, data)[0])
    assert len(list(tmp_path.iterdir())) == len(cases)
    seen = model.seen
    again, labels = extract(encoder_of(model, name="renamed"), images, cache=tmp_path)
    assert model.seen == seen
    assert torch.equal(again, extract(encoder_of(model), images)[0])
    assert labels.tolist() == images.labels.tolist()


def test_changed_files_are_encoded_again(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.bmp" for i in range(3)]  # all of the same size in bytes
    for path, image in zip(paths, images_of(3).images, strict=True):
        Image.fromarray(image).save(path)
    images, model = ImageSet(paths, np.zeros(3, np.int64), ("a",), "folder/test"), Small()
    before, _ = extract(encoder_of(model), images, cache=tmp_path / "kept")
    assert torch.equal(before, extract(encoder_of(Small()), images_of(3))[0])
    extract(encoder_of(model), images, cache=tmp_path / "kept")
    assert model.seen == 3
    Image.fromarray(images_of(1, seed=5).images[0]).save(paths[1])
    os.utime(paths[1], ns=(0, 1))
    after, _ = extract(encoder_of(model), images, cache=tmp_path / "kept")
    assert (before != after).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("model", "count", "named"),
    [
        (Small(), 0, "mine/test"),
        (nn.Identity(), 4, "mine"),
        (nn.Flatten(0), 4, "mine"),
        (nn.Sequential(nn.Flatten(), nn.Threshold(10, torch.nan)), 4, "mine"),
        (nn.Sequential(nn.Flatten(), nn.Threshold(10, torch.inf)), 4, "mine"),
    ],
)
def test_invalid_inputs_raise_and_nothing_is_cached(tmp_path, model, count, named) -> None:
    with pytest.raises(ValueError, match=named):
        extract(encoder_of(model), images_of(count), cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def extract_in_one_of_two_processes(counts: tuple[int, ...], folder: Path) -> None:
    AcceleratorState._reset_state(True)  # forked processes inherit that of earlier tests
    accelerator = Accelerator(cpu=True)
    options = {"batch_size": 2, "cache": folder / "kept", "accelerator": accelerator}
    results = []
    for count in counts:
        model = Small()
        found = extract(encoder_of(model), images_of(count), **options)
        seen = model.seen
        cached = extract(encoder_of(model), images_of(count), **options)
        assert torch.equal(cached[0], found[0])
        assert model.seen == seen
        results.append((*found, seen))
    torch.save(results, folder / f"{accelerator.process_index}.pt")


@pytest.mark.distributed
def test_two_processes_share_the_images(tmp_path: Path) -> None:
    counts = (1, 2, 7)
    debug_launcher(extract_in_one_of_two_processes, (counts, tmp_path), num_processes=2)
    results = [torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2)]
    for count, *of_processes in zip(counts, *results, strict=True):
        expected, expected_labels = extract(encoder_of(Small()), images_of(count))
        for features, labels, _ in of_processes:
            assert torch.allclose(features, expected, atol=1e-6)
            assert torch.equal(labels, expected_labels)
        assert [seen for *_, seen in of_processes] == [count - count // 2, count // 2]


def rank_by_formula(features: np.ndarray) -> float:
    values = np.linalg.svd(features, compute_uv=False)
    fractions = [value / values.sum() + 1e-7 for value in values]
    return math.exp(-sum(p * math.log(p) for p in fractions))


@pytest.mark.parametrize("shape", [(50, 8), (8, 50), (30, 30), (1, 5)])
def test_rankme_equals_the_formula(shape: tuple[int, int]) -> None:
    features = np.random.default_rng(0).normal(size=shape) * np.linspace(0.1, 3, shape[1])
    expected = pytest.approx(rank_by_formula(features), rel=1e-4)
    assert rankme(torch.from_numpy(features)) == expected
    assert rankme(torch.from_numpy(7 * features).float()) == expected
    assert rankme(torch.eye(16)) == pytest.approx(16, rel=1e-3)
    assert rankme(torch.ones(100, 32)) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.zeros(5, 3)) == 0


def test_copies_are_counted_up_to_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    bank = 5 + torch.randn(4000, 48, generator=generator)
    features = 5 + torch.randn(300, 48, generator=generator)
    features[::3] = bank[torch.randperm(4000, generator=generator)[:100]]
    features[::3] *= 1 + 1e-7 * torch.randn(100, 48, generator=generator)
    features[1] = bank[0] + 1e-3
    assert count_copies(features, bank) == 100
    assert count_copies(torch.zeros(3, 48), bank) == 0
    assert count_copies(torch.zeros(3, 48), torch.zeros(2, 48)) == 3
