"""How much of what makes two views of an image agree an encoder owes to a small part of it. No label is needed.

Two views are encoded, the part of the first that their agreement is attributed to is replaced by another image, and
their cosine similarity is read again. What it falls by is said in shares of what it falls by where the whole first view
is replaced, so that it does not matter how alike an encoder's features of different images are: 0 for a part that is
not seen, 1 where nothing is left, and above where images of the encoder's own world agree more than that. Controls
replace a box of the same size, by the same image, at a random place and in the middle.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_gradmix.attribution import observe
from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.evaluation.intervals import Interval, bootstrap_interval
from ssl_gradmix.gradmix import GradMix

PLACES = ("attributed", "random", "center")

Fill = Literal["crop", "donor"]

HEALTHY = 0.31
"""The largest share that an encoder without a planted shortcut lost with a tenth of the image, where it was measured:
CIFAR-10 and digits, backbone and projector, layers 3 and 4, 512 images and more; the smallest was 0.04."""

RELIES = 0.5
"""From this share on an encoder is said to live off a small part. Those trained plainly on stamps in one place, which
took the place of the image, lost 0.57 to 1.44; those trained on them with GradMix, whose probe was right up to twice as
often, 0.07 to 0.73, and up to 1.34 with larger boxes or another loss of mixed views. One on a stamp repeated over the
image lost 0.04: no single box holds that. A layer may miss: 0.43 at layer3 was 0.97 at layer2 and 0.99 at layer4."""


@dataclass(frozen=True)
class Reliance:
    """Cosine similarities of two views of N images, on the CPU, with the first view whole and in part replaced.

    Attributes:
        layer: That was attributed at.
        whole: (N,) of the views as they are.
        chance: (N,) of the second view and another image's first one: what is left where the whole view is replaced.
        replaced: By place, (N,): of the second view and the first one with its box there replaced.
        donors: (N,) image i is replaced by image `donors[i]`.
        boxes: (N, 4) int64 x0, y0, x1, y1 of the attributed boxes, the latter two exclusive.
        attribution: (N, H, W) in [0, 1].
        flat: (N,) bool, where the map says nothing, so that its box lies at random.
        images: (N, 3, H, W), the first views, normalized.
    """

    layer: str
    whole: Tensor
    chance: Tensor
    replaced: dict[str, Tensor]
    donors: Tensor
    boxes: Tensor
    attribution: Tensor
    flat: Tensor
    images: Tensor

    def by_image(self, place: str) -> Tensor:
        """The share of the agreement that each image loses, (N,); their mean is the reliance."""
        return (self.whole - self.replaced[place]) / (self.whole - self.chance).mean()

    def share(self, place: str, beyond: str | None = None, seed: int = 0) -> Interval:
        """The share of the agreement lost with a place, with its 95% bootstrap interval over images.

        Args:
            place: Of `PLACES`.
            beyond: Another one, whose share is subtracted, image by image.
            seed: Of the bootstrap.
        """
        left = self.whole if beyond is None else self.replaced[beyond]
        lost, above = (each.double().numpy() for each in (left - self.replaced[place], self.whole - self.chance))
        return bootstrap_interval(_ratio, lost, above, strata=np.zeros(len(lost)), seed=seed)


def verdict(share: float, at_random: float, part: float) -> str:
    """What the shares lost with the attributed part, and with one at a random place, say in a sentence."""
    lost = f"loses {f'{max(share, 0):.0%}' if share < 1 else 'all'} of its agreement with {part:.0%} of the image"
    control = f"{max(at_random, 0):.0%} with one at random"
    if share < RELIES:
        return f"this encoder {lost}, the part that matters most ({control})"
    return (
        f"this encoder {lost} ({control}), and those without a planted shortcut lost {HEALTHY:.0%} at most where "
        "measured: the picture shows what it lives off, and training with GradMix may loosen that"
    )


def _ratio(lost: np.ndarray, above: np.ndarray, weights: np.ndarray | int = 1) -> np.ndarray:
    return (weights * lost).sum(-1) / (weights * above).sum(-1)


def two_views(images: ImageSet, views: Views, batch_size: int, seed: int) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Two views of all images, batch by batch, from a random state of their own.

    Yields:
        Two tensors (n, 3, size, size) on the device of `views`; and where in its image each first view lies, (n, 5):
        top, left, height and width as shares of the image's, and 1 where it is flipped, else 0.
    """
    parts = max(1, min(math.ceil(len(images) / batch_size), len(images) // 2))  # nobody is alone: others fill in
    for number, chosen in enumerate(np.array_split(np.arange(len(images)), parts)):
        decoded = [images.decoded(i) for i in chosen]
        with torch.random.fork_rng(devices=[]):
            state = torch.default_generator.manual_seed(hash((seed, number))).get_state()
            draws = views.draw(decoded, second=False)
            torch.set_rng_state(state)  # the first that `views` draws are the same
            pair = views([image.to(views.mean.device) for image in decoded], 2)
        extents = torch.tensor([image.shape[1:] for image in decoded]).repeat(1, 2)
        yield pair, torch.cat([draws.boxes / extents, draws.flip], 1)


def measure(
    model: nn.Module,
    pairs: Iterable[Sequence[Tensor]],
    layers: Sequence[str] | None = None,
    part: float = 0.1,
    fill: Fill = "crop",
    backbone: nn.Module | None = None,
    seed: int = 0,
) -> list[Reliance]:
    """Replaces a part of first views and reads how far they still agree with the second ones.

    Args:
        model: From images to features (N, D), in eval mode; its parameters and their `.grad` are left alone.
        pairs: Batches of two views, (n, 3, H, W) each, n at least 2.
        layers: Each is attributed at for itself; None takes the one that `GradMix` takes.
        part: Share of the image that is replaced, within (0, 1).
        fill: By what of another image of the batch, as in `GradMix`.
        backbone: The part of the model whose layers are meant; None is all of it.
        seed: Of donors and random places.

    Returns:
        What was measured, a layer each.

    Raises:
        KeyError: A layer that the model has not.
        ValueError: Fewer than two images in a batch; features that are no finite (N, D), or that hardly agree more for
            two views of an image than for two images; or a model without a map to attribute at.
    """
    backbone, generator = model if backbone is None else backbone, torch.Generator()
    settings = {"lam_range": (1 - part, 1 - part), "fill": fill, "generator": generator}
    mixers = [GradMix(layers=[name], **settings) for name in layers] if layers else [GradMix(**settings)]
    controls = {place: GradMix(region=place, **settings) for place in PLACES[1:]}
    found = []
    for number, (first, second) in enumerate(pairs):
        if len(first) < 2:
            raise ValueError("images: at least 2 are needed, as what replaces a part of one is another's")
        with torch.enable_grad(), observe(backbone, layers) as observed:
            z = model(torch.cat([first, second]).requires_grad_())  # activations need a graph, parameters none
            _check(z, 2 * len(first))
            similar = F.cosine_similarity(*z.chunk(2))
        mixed = []
        for mixer in (*mixers, *controls.values()):
            generator.manual_seed(hash((seed, number)))  # the same donors everywhere
            mixed.append(mixer(first, -similar.sum(), observed))
        with torch.no_grad():
            z0, z1 = z.detach().chunk(2)
            left = [F.cosine_similarity(model(each.images), z1) for each in mixed]
        donors = mixed[0].donor_index
        whole, chance = similar.detach(), F.cosine_similarity(z0[donors], z1)
        for i, at in enumerate(mixed[: len(mixers)]):
            replaced = (left[i], *left[len(mixers) :])
            found.append((at.layers, whole, chance, *replaced, donors, at.boxes, at.attribution, at.flat, first))
    return [_joined(found[i :: len(mixers)]) for i in range(len(mixers))]


def _joined(batches: Sequence[tuple]) -> Reliance:
    names, *columns = zip(*batches, strict=True)
    whole, chance, *replaced, donors, boxes, attribution, flat, images = (
        torch.cat([each.float() if each.is_floating_point() else each for each in column]).cpu() for column in columns
    )
    starts = np.cumsum([0, *(len(batch[1]) for batch in batches)])
    donors = donors + torch.from_numpy(np.repeat(starts[:-1], np.diff(starts)))
    above = whole - chance
    if not above.mean() > 2 * above.std() / math.sqrt(len(above)):  # or shares of it are noise
        raise ValueError(
            f"encoder: its features hardly agree more for two views of an image (cosine {whole.mean():.3f}) than for "
            f"two images ({chance.mean():.3f}), so there is little to lose; take more images, unless it has collapsed"
        )
    places = dict(zip(PLACES, replaced, strict=True))
    return Reliance(names[0][0], whole, chance, places, donors, boxes, attribution, flat, images)


def in_images(attribution: Tensor, crops: Tensor) -> Tensor:
    """The mean of maps of views (N, H, W), each put back to where in its image the view lies: (H, W).

    Args:
        attribution: Of the views.
        crops: (N, 5), from `two_views`.
    """
    top, left, height, width, flipped = crops.unbind(1)
    sign, zero = 1 - 2 * flipped, torch.zeros_like(top)
    across = torch.stack([sign / width, zero, sign * ((1 - 2 * left) / width - 1)], 1)
    down = torch.stack([zero, 1 / height, (1 - 2 * top) / height - 1], 1)
    maps = torch.stack([attribution, torch.ones_like(attribution)], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), list(maps.shape), align_corners=False)
    total, seen = F.grid_sample(maps, grid, align_corners=False).sum(0)
    return total / seen.clamp_min(1e-6)


def _check(features: Tensor, count: int) -> None:
    if features.ndim != 2 or len(features) != count:
        raise ValueError(f"the encoder must give one feature vector an image, got {tuple(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("the encoder gives NaN or infinite features: its training may have diverged")
