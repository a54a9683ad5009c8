from __future__ import annotations

import copy
from threading import Event

import numpy as np
import pytest
import torch
from accelerate import debug_launcher
from PIL import Image
from torch import nn

from ssl_gradmix import backbones
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.evaluation.encoders import Encoder
from ssl_gradmix.evaluation.features import extract

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def images_of(count: int, size: int = 16, seed: int = 0) -> ImageSet:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return ImageSet(pixels, rng.integers(-1, 3, count), ("a", "b", "c"), "mine/test")


def encoder_of(model: nn.Module, **changes) -> Encoder:
    return Encoder(**{"model": model, "size": 16, "mean": MEAN, "std": STD, "name": "mine"} | changes)


class Small(nn.Module):
    """A convolution with BatchNorm and dropout, that counts the images it has seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout(), nn.AdaptiveAvgPool2d(1))
        self.counts = {"seen": 0}  # a plain number would be told apart as another encoder's

    @property
    def seen(self):
        return self.counts["seen"]

    def forward(self, images):
        self.counts["seen"] += len(images)
        return self.layers(images).flatten(1)


def test_equals_one_image_at_a_time_by_hand():
    images = images_of(11)
    encoder = encoder_of(backbones.create("resnet10_tiny"))
    model = copy.deepcopy(encoder.model).double().eval()
    expected = [
        model(torch.tensor(((image / 255 - MEAN) / STD).transpose(2, 0, 1)[None]))[0].numpy() for image in images.images
    ]
    features, labels = extract(encoder, images, batch_size=4)
    assert features.dtype == torch.float32
    assert np.abs(features.numpy() - expected).max() < 1e-5
    assert labels.tolist() == images.labels.tolist()
    assert labels.dtype == torch.int64


def test_the_next_batch_is_decoded_while_one_is_encoded():
    decoded = [Event() for _ in range(3)]

    class Batches(ImageSet):
        def pixels(self, size, progress=True):
            decoded[int(self.labels[0])].set()
            return super().pixels(size, progress)

    class Waiting(Small):
        def forward(self, images):
            following = decoded[min(self.seen // 4 + 1, 2)]
            assert following.wait(30), "not before this batch is encoded"
            return super().forward(images)

    images = images_of(10)
    staged = Batches(images.images, np.arange(10) // 4, images.classes, images.name)
    features, _ = extract(encoder_of(Waiting()), staged, batch_size=4)
    assert torch.equal(features, extract(encoder_of(Small()), images, batch_size=4)[0])


def test_batchnorm_and_everything_else_in_the_model_stays_bit_identical():
    model = Small()
    encoder = encoder_of(model)
    model.train()
    before = copy.deepcopy(model.state_dict())
    first, _ = extract(encoder, images_of(9), batch_size=4)
    second, _ = extract(encoder, images_of(9), batch_size=9)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert before.keys() == after.keys()
    assert torch.allclose(first, second, atol=1e-6)  # dropout would make them differ
    assert not model.training


def test_larger_images_are_fitted_to_the_encoder():
    images = images_of(3, size=40)
    resized = [Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR) for image in images.images]
    encoder = encoder_of(Small())
    expected, _ = extract(encoder, np.stack([np.asarray(image) for image in resized]))
    assert torch.equal(extract(encoder, images)[0], expected)


def test_an_array_has_no_labels():
    images = images_of(5)
    features, labels = extract(encoder_of(Small()), images.images)
    assert labels.tolist() == [-1] * 5
    assert torch.equal(features, extract(encoder_of(Small()), images)[0])


class TestCache:
    def test_spares_the_encoder(self, tmp_path):
        images, model = images_of(5), Small()
        first, _ = extract(encoder_of(model), images, cache=tmp_path / "kept")
        again, labels = extract(encoder_of(model, name="renamed"), images, cache=tmp_path / "kept")
        assert model.seen == 5
        assert torch.equal(first, again)
        assert labels.tolist() == images.labels.tolist()
        (file,) = (tmp_path / "kept").iterdir()
        assert file.suffix == ".safetensors"

    def test_keeps_apart_what_features_depend_on(self, tmp_path):
        images, shifted, model = images_of(5), Small(), Small()
        with torch.no_grad():
            shifted.layers[1].running_mean += 0.5
        changed = images.images.copy()
        changed[4, 15, 15, 2] ^= 1
        for encoder, data in [
            (encoder_of(model), images),
            (encoder_of(model), images.subset([1, 0, 2, 3, 4])),
            (encoder_of(model), images.subset([0, 1, 2, 3])),
            (encoder_of(model), changed),
            (encoder_of(model, mean=(0.4, 0.5, 0.5)), images),
            (encoder_of(model, std=(0.2, 0.25, 0.2)), images),
            (encoder_of(model, size=8), images),
            (encoder_of(shifted), images),
        ]:
            cached, _ = extract(encoder, data, cache=tmp_path)
            assert torch.equal(cached, extract(encoder, data)[0])
        assert len(list(tmp_path.iterdir())) == 8

    def test_labels_are_not_in_it(self, tmp_path):
        images, model = images_of(5), Small()
        extract(encoder_of(model), images, cache=tmp_path)
        relabeled = ImageSet(images.images, np.array([2, 2, 2, 2, 2]), images.classes, "other")
        _, labels = extract(encoder_of(model), relabeled, cache=tmp_path)
        assert labels.tolist() == [2] * 5
        assert model.seen == 5

    @pytest.mark.parametrize("damage", [lambda data: data[:20], lambda data: b"", lambda data: data[:-4]])
    def test_damaged_file_is_computed_again(self, tmp_path, damage):
        images, model = images_of(5), Small()
        features, _ = extract(encoder_of(model), images, cache=tmp_path)
        (file,) = tmp_path.iterdir()
        file.write_bytes(damage(file.read_bytes()))
        with pytest.warns(UserWarning, match=r"cached features .*safetensors are damaged .* computed again"):
            again, _ = extract(encoder_of(model), images, cache=tmp_path)
        assert torch.equal(features, again)
        extract(encoder_of(model), images, cache=tmp_path)
        assert model.seen == 10

    def test_files_on_disk_that_change(self, tmp_path):
        paths = [tmp_path / f"{i}.png" for i in range(3)]
        for path, image in zip(paths, images_of(3).images, strict=True):
            Image.fromarray(image).save(path)
        images, model = ImageSet(paths, np.zeros(3, np.int64), ("a",), "folder/test"), Small()
        before, _ = extract(encoder_of(model), images, cache=tmp_path / "kept")
        assert torch.equal(before, extract(encoder_of(model), images_of(3))[0])
        seen = model.seen
        extract(encoder_of(model), images, cache=tmp_path / "kept")
        assert model.seen == seen
        Image.fromarray(images_of(1, seed=5).images[0]).save(paths[1])
        after, _ = extract(encoder_of(model), images, cache=tmp_path / "kept")
        assert (before != after).any(1).tolist() == [False, True, False]


class Returns(nn.Module):
    def __init__(self, result) -> None:
        super().__init__()
        self.result = result

    def forward(self, images):
        return self.result(images)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"mine/test has no images"):
        extract(encoder_of(Small()), images_of(0))
    with pytest.raises(ValueError, match=r"mine must give one feature vector an image, got \(4, 3, 16, 16\)"):
        extract(encoder_of(Returns(lambda images: images)), images_of(4))
    diverged = encoder_of(Returns(lambda images: images.flatten(1) / 0))
    with pytest.raises(ValueError, match="NaN or infinite features: its training may have diverged"):
        extract(diverged, images_of(4), cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def _in_one_of_two(counts, folder):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # a forked process has that of earlier tests
    accelerator = Accelerator()
    results = {"processes": accelerator.num_processes}
    for count in counts:
        model = Small()
        first = extract(encoder_of(model), images_of(count), 2, cache=folder / "kept", accelerator=accelerator)
        results[count] = (*first, model.seen)
        again = extract(encoder_of(model), images_of(count), 2, cache=folder / "kept", accelerator=accelerator)
        assert torch.equal(first[0], again[0])
        assert model.seen == results[count][2]
    torch.save(results, folder / f"{accelerator.process_index}.pt")


@pytest.mark.distributed
def test_two_processes_give_what_one_gives(tmp_path):
    counts = (1, 2, 7, 12)
    debug_launcher(_in_one_of_two, (counts, tmp_path), num_processes=2)
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert results["processes"] == 2
        for count in counts:
            features, labels, seen = results[count]
            expected, expected_labels = extract(encoder_of(Small()), images_of(count))
            assert features.shape == expected.shape
            assert torch.allclose(features, expected, atol=1e-6)
            assert torch.equal(labels, expected_labels)
            assert seen == -(-count // 2)
