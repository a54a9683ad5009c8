"""Reliance: how strongly the agreement between two views depends on a small part of the image.

Two views of an image are encoded. The box of the first view that their agreement is attributed to
is replaced by another image, and the cosine similarity is measured again. The loss is divided by
the loss if the whole first view is replaced, so that it does not matter how similar features of
different images are. 0 means that the box is not used, 1 that nothing is left; values above 1 occur
if replaced images agree less than different ones. Controls replace a box of the same size, by the
same image, at a random place and in the center. No labels are needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.evaluation.intervals import Interval, bootstrap_interval
from ssl_gradmix.gradmix import CONTROLS, GradMix

PLACES = ("attributed", *CONTROLS)

Fill = Literal["crop", "donor"]

HEALTHY = 0.31
"""The largest fraction that encoders without a planted shortcut lost with a tenth of the image:
CIFAR-10 and digits, backbone and projector, 512 images or more. The smallest was 0.04. The largest
of all stages is no larger than that of layers 3 and 4: it was one of these in all of 16 runs. Of a
ViT on digits, the largest of four blocks was 0.18."""

RELIES = 0.5
"""From this fraction on, an encoder is reported to rely on a small part. Encoders trained without
GradMix on stamps in one place, which replaced the image as a cue, lost 0.57 to 1.44; with GradMix,
whose probes were up to twice as accurate, 0.07 to 0.73, and up to 1.34 with larger boxes or another
loss of mixed views. An encoder trained on a stamp repeated over the image lost 0.04: no single box
covers it. One layer can miss a shortcut: 0.43 at layer3, but 0.97 at layer2 and 0.99 at layer4."""

EDGES: dict[str, tuple[int | slice, int | slice]] = {
    "upper left corner": (0, 0),
    "upper right corner": (0, -1),
    "lower left corner": (-1, 0),
    "lower right corner": (-1, -1),
    "upper margin": (0, slice(None)),
    "lower margin": (-1, slice(None)),
    "left margin": (slice(None), 0),
    "right margin": (slice(None), -1),
}
"""Corners and margins, as cells of a map of 4x4."""

STANDS_OUT = 4.0
"""Ratio of the mean attribution in an edge to the rest from which it is named. It was up to 1.7
without stamps, up to 3.6 with stamps at places of their own, and 4.3 to 55 in the views with stamps
in one corner (1.2 after the oracle), at the layer that finds most."""

FEWEST = 64
"""With fewer images, shortcuts at places of their own may be in one corner by chance."""


@dataclass(frozen=True)
class Reliance:
    """Cosine similarities of two views of N images, with the first view whole or partly replaced.

    Attributes:
        layer: The attributed layer.
        whole: (N,) similarity of the two views.
        chance: (N,) similarity of the second view and another image's first view.
        replaced: (N,) by place, similarity of the views with that box of the first one replaced.
        donors: (N,) int64. Image i is replaced by image `donors[i]`.
        boxes: (N, 4) int64 x0, y0, x1, y1 of the attributed boxes, x1 and y1 exclusive.
        attribution: (N, H, W) in [0, 1].
        flat: (N,) bool, True where the map is constant, so that the box is placed at random.
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
        """Fraction of agreement that each image loses, (N,). Its mean is the reliance."""
        return (self.whole - self.replaced[place]) / (self.whole - self.chance).mean()

    def share(self, place: str, beyond: str | None = None, seed: int = 0) -> Interval:
        """Fraction of agreement lost with a place, with a 95% bootstrap interval over images.

        Args:
            place: One of `PLACES`.
            beyond: Another place, whose fraction is subtracted image by image.
            seed: Seed of the bootstrap.
        """
        left = self.whole if beyond is None else self.replaced[beyond]
        lost = (left - self.replaced[place]).double().numpy()
        possible = (self.whole - self.chance).double().numpy()
        return bootstrap_interval(_ratio, lost, possible, strata=np.zeros(len(lost)), seed=seed)


def fixed_place(maps: Mapping[str, Tensor], images: int) -> str | None:
    """The corner or margin that stands out in all images, if there is one.

    Args:
        maps: Mean attributions (H, W) by what they are a mean over, first `images`, then `views`.
        images: Number of images.

    Returns:
        For instance `lower right corner of all images`, where the mean attribution is highest
        relative to the rest of the map. None if the ratio is below 4.
    """
    ratios = {}
    for frame, attribution in maps.items():
        cells = F.adaptive_avg_pool2d(attribution[None], 4)[0]
        for name, edge in EDGES.items():
            inside = torch.zeros_like(cells, dtype=torch.bool)
            inside[edge] = True
            ratio = cells[inside].mean() / cells[~inside].mean().clamp_min(1e-6)
            ratios[f"{name} of all {frame}"] = round(ratio.item(), 2)  # equal maps: the first
    place = max(ratios, key=ratios.__getitem__)
    return place if images >= FEWEST and ratios[place] >= STANDS_OUT else None


def verdict(
    share: float, at_random: float, part: float, layer: str, place: str | None = None
) -> str:
    """The result in a few sentences, with fractions between none and all of the agreement.

    Args:
        share: Fraction of agreement lost with the attributed box.
        at_random: Fraction lost with a random box.
        part: Fraction of the image in the box.
        layer: The attributed layer.
        place: Where the boxes lie in all images, from `fixed_place`.
    """
    lost, lost_at_random = (min(max(each, 0), 1) for each in (share, at_random))
    removed = f"removes {lost:.0%} of the agreement between views"
    control = f"at {layer}; a random {part:.0%}: {lost_at_random:.0%}"
    found = f"Replacing the most attributed {part:.0%} of each image {removed} ({control})."
    if share <= at_random:
        return f"{found} No part of the images stands out."
    healthy = f"Encoders without a planted shortcut lost at most {HEALTHY:.0%} in our experiments."
    if share < RELIES:
        return f"{found} {healthy}"
    cure = f"The {place} stands out: blanking or cropping it before training is the simplest cure."
    if place is None:
        cure = (
            "See the figure for the region. If the encoder was trained without the adaptive third "
            "view (--extra_view adaptive), train a new one with it; going on with this one hardly "
            "helps."
        )
    return f"{found} {healthy} {cure}"


def two_views(
    images: ImageSet, views: Views, batch_size: int, seed: int
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Two views of all images, batch by batch. The global random state is not changed.

    Yields:
        Two tensors (n, 3, size, size) on the device of `views`, n at least 2; and the crops (n, 5)
        of the first views: top, left, height and width as fractions of the image, and 1 if flipped.
    """
    batches = math.ceil(len(images) / batch_size)
    batches = max(1, min(batches, len(images) // 2))  # a replaced part needs another image
    for number, chosen in enumerate(np.array_split(np.arange(len(images)), batches)):
        decoded = [images.decoded(i) for i in chosen]
        with torch.random.fork_rng(devices=[]):
            state = torch.default_generator.manual_seed(_seed(seed, number)).get_state()
            draws = views.draw(decoded, second=False)
            torch.set_rng_state(state)  # `views` draws the same numbers first
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
    """Replaces a part of first views and measures how much agreement with the second ones is left.

    Args:
        model: From images to features (N, D), in eval mode. Parameters and their `.grad` are not
            changed.
        pairs: Batches of two views, (n, 3, H, W) each, n at least 2.
        layers: Layers to attribute, each separately; one can miss a shortcut, so name several. None
            takes the one that `GradMix` chooses.
        part: Fraction of the image that is replaced, in (0, 1).
        fill: Content of the box: `crop`, the same place of another image of the batch, or `donor`,
            all of it, resized.
        backbone: Part of the model that has the layers. None is all of it.
        seed: Seed of the replacing images and random places.

    Returns:
        One measurement per layer.

    Raises:
        KeyError: A layer does not exist.
        ValueError: A batch has fewer than two images, features are not finite (N, D), two views of
            an image hardly agree more than two images, or a layer cannot be attributed.
    """
    backbone = model if backbone is None else backbone
    generator = torch.Generator()
    make = partial(GradMix, fill=fill, lam_range=(1 - part, 1 - part), generator=generator)
    observer = GradMix(list(layers) if layers else None)
    mixers = [make([name]) for name in layers] if layers else [make()]
    controls = [make(region="random"), make(region="center")]
    batches, seen = [], 0
    for number, (first, second) in enumerate(pairs):
        if len(first) < 2:
            raise ValueError("images must be at least 2, because one replaces a part of another")
        with torch.enable_grad(), observer.observe(backbone) as activations:
            # Activations need gradients; parameters may be frozen.
            z = model(torch.cat([first, second]).requires_grad_())
            _check(z, 2 * len(first))
            whole = F.cosine_similarity(*z.chunk(2))
        z0, z1 = z.detach().chunk(2)
        measured = []
        replaced: dict[str, Tensor] = {}
        for mixer in (*controls, *mixers):
            generator.manual_seed(_seed(seed, number))  # the same donors for all
            mixed = mixer(first, -whole.sum(), activations)
            assert mixed.donor_index is not None  # it is for fill="noise" only
            assert mixed.boxes is not None  # it is for region="mask" only
            with torch.no_grad():
                left = F.cosine_similarity(model(mixed.images), z1)
            if mixer.region in CONTROLS:
                replaced[mixer.region] = left
                continue
            measured.append(
                Reliance(
                    layer=", ".join(mixed.layers),
                    whole=whole.detach(),
                    chance=F.cosine_similarity(z0[mixed.donor_index], z1),
                    replaced={"attributed": left, **replaced},
                    donors=mixed.donor_index + seen,
                    boxes=mixed.boxes,
                    attribution=mixed.attribution,
                    flat=mixed.flat,
                    images=first,
                )
            )
        batches.append(measured)
        seen += len(first)
    return [_join(parts) for parts in zip(*batches, strict=True)]


def in_images(attribution: Tensor, crops: Tensor) -> Tensor:
    """The mean of maps of views, each put back to where the view lies in its image.

    Args:
        attribution: (N, H, W), of the views.
        crops: (N, 5), from `two_views`.

    Returns:
        (H, W), over whole images.
    """
    top, left, height, width, flipped = crops.unbind(1)
    sign, zero = 1 - 2 * flipped, torch.zeros_like(top)
    across = torch.stack([sign / width, zero, sign * ((1 - 2 * left) / width - 1)], 1)
    down = torch.stack([zero, 1 / height, (1 - 2 * top) / height - 1], 1)
    maps = torch.stack([attribution, torch.ones_like(attribution)], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), list(maps.shape), align_corners=False)
    total, seen = F.grid_sample(maps, grid, align_corners=False).sum(0)
    return total / seen.clamp_min(1e-6)


def _join(batches: Sequence[Reliance]) -> Reliance:
    """All batches as one, on the CPU."""

    def join(parts: Iterable[Tensor]) -> Tensor:
        joined = torch.cat(list(parts)).cpu()
        return joined.float() if joined.is_floating_point() else joined

    names = {field.name for field in fields(Reliance)} - {"layer", "replaced"}
    tensors = {name: join(getattr(batch, name) for batch in batches) for name in names}
    replaced = {place: join(batch.replaced[place] for batch in batches) for place in PLACES}
    joined = Reliance(layer=batches[0].layer, replaced=replaced, **tensors)
    above = joined.whole - joined.chance
    if not above.mean() > 4 * above.std() / math.sqrt(len(above)):  # fractions of it are noise
        raise ValueError(
            f"encoder: two views of an image (cosine {joined.whole.mean():.3f}) hardly agree more "
            f"than two images ({joined.chance.mean():.3f}): it collapsed, or relies on what these "
            "views do not show, or more images are needed"
        )
    return joined


def _ratio(lost: np.ndarray, possible: np.ndarray, weights: np.ndarray | int = 1) -> np.ndarray:
    return (weights * lost).sum(-1) / (weights * possible).sum(-1)


def _seed(seed: int, batch: int) -> int:
    """A seed for each batch. The hash of a tuple of integers is the same in every process."""
    return hash((seed, batch))


def _check(features: Tensor, count: int) -> None:
    if features.ndim != 2 or len(features) != count:
        raise ValueError(f"model must give features (N, D), got {tuple(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("model gives NaN or infinite features: its training may have diverged")
