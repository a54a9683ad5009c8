"""What an encoder recognizes an image by if all views bear stamps.

Two views of each training image are embedded, and the cosine similarity of the second one to the
first is measured with the image's own stamp, with the bits or the location of another image's
stamp, and with its own stamp on another image. Linear probes read the class, and the first bit, off
whole images that bear their stamps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from experiments.stamps import StampedViews, Stamps, identify
from ssl_gradmix.data.augmentation import Augmentation, Views
from ssl_gradmix.data.datasets import MEMORY, ImageSet
from ssl_gradmix.evaluation.encoders import Encoder
from ssl_gradmix.evaluation.probes import linear_probe

WHOLE = Augmentation(min_scale=1, flip=0, jitter=0, gray=0, blur=0, solarize=0)
IMAGES = 1024


def read_out(encoder: Encoder, train: ImageSet, test: ImageSet, stamps: Stamps) -> dict[str, float]:
    """Test accuracies of linear probes on whole images that bear their stamps."""
    features, labels = _stamped_features(encoder, train, stamps)
    test_features, test_labels = _stamped_features(encoder, test, stamps)
    found = {}
    for name in labels:
        probe = linear_probe(features, labels[name])
        found[name] = probe.accuracy(test_features, test_labels[name]).top1.double().mean().item()
    return found


@torch.no_grad()
def _stamped_features(
    encoder: Encoder, images: ImageSet, stamps: Stamps
) -> tuple[Tensor, dict[str, Tensor]]:
    """Features (N, D), and the labels (N,) that each probe predicts."""
    views = StampedViews(WHOLE, encoder.size, encoder.mean, encoder.std, stamps=stamps)
    pixels = images.originals(MEMORY)
    features = torch.cat([encoder.model(views(part, 1)[0]) for part in pixels.split(256)])
    bits = identify(pixels)[:, 0] & 1
    labels = {"stamped_linear": torch.as_tensor(images.labels), "first_bit": bits}
    return features, labels


@torch.no_grad()
def similarities(
    encoder: Encoder, images: ImageSet, augmentation: Augmentation, stamps: Stamps
) -> dict[str, float]:
    """Mean cosine similarities of first views to second views in which something was exchanged."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    pixels = images.originals(MEMORY)[order[:IMAGES]]
    views = Views(augmentation, encoder.size, encoder.mean, encoder.std)
    torch.manual_seed(0)
    first, second = views(pixels, 2)
    black, white = ((value - views.mean) / views.std for value in (0, 1))
    codes = identify(pixels)
    bits, place = codes[:, :1], codes[:, 1:]

    def embed(view: Tensor, bits: Tensor, place: Tensor) -> Tensor:
        stamped = stamps.plant(view, torch.cat([bits, place], 1), black, white)
        return torch.cat([encoder.model(part) for part in stamped.split(256)])

    other = torch.roll(torch.arange(len(pixels)), 1)
    exchanged = {
        "same_stamp": embed(second, bits, place),
        "other_bits": embed(second, bits[other], place),
        "other_place": embed(second, bits, place[other]),
        "other_image": embed(second[other], bits, place),
    }
    anchor = embed(first, bits, place)
    return {name: cosine_similarity(anchor, each).mean().item() for name, each in exchanged.items()}
