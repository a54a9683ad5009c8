"""GradMix, the view generator: attribution → region → fill. Depends on torch alone, for any training loop."""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from ssl_gradmix import mixing
from ssl_gradmix.attribution import (
    METHODS,
    AttributionFunction,
    Observed,
    Target,
    attribute,
    gradients,
    normalize,
    observe,
    spatial,
    upscale,
)

logger = logging.getLogger("ssl_gradmix")

CONTROLS = ("random", "center")
"""Places that neither the loss nor the encoder has a say in."""

SMALLEST_MAP = 4
"""`layers=None` wants a map of at least this many places a side: a coarser one cannot place a box."""


@dataclass(frozen=True)
class MixedViews:
    """Views in which the attributed region has been replaced.

    Attributes:
        images: (N, C, H, W), dtype, device and memory format of the images given.
        lam: Scalar tensor, the exact share of each image's pixels that was kept.
        boxes: (N, 4) int64 x0, y0, x1, y1 (the latter two exclusive), or None where the region is a mask.
        attribution: (N, H, W) in [0, 1], float32.
        donor_index: (N,) int64, image i took from `donors[donor_index[i]]`; None where the fill needs no donor.
    """

    images: Tensor
    lam: Tensor
    boxes: Tensor | None
    attribution: Tensor
    donor_index: Tensor | None


@dataclass
class GradMix:
    """Makes one more view of each image: another image is mixed in where the loss says the encoder already looks.

    After Xu, Kao, Keuper, "Informed Mixing: Improving Open Set Recognition via Attribution-based Augmentation", arXiv
    2505.12803. Everything is batched and stays on the device; only the loss's gradient with respect to the observed
    activations is computed, so that parameters' gradients, and the hooks of distributed training, are left alone.

        gradmix = GradMix(layers=["layer3"])
        with gradmix.observe(encoder) as observed:
            z0, z1 = head(encoder(x0)), head(encoder(x1))
            loss = criterion(z0, z1)
        mixed = gradmix(x0, loss, observed, donors=x1)
        loss = loss + mixed.lam * criterion(head(encoder(mixed.images)), z1)
        loss.backward()

    Args:
        layers: Layers whose maps are summed, by their names in `encoder.named_modules()`, for instance `[layer3]`. Null
            takes the deepest stage whose map is at least 4x4 for the images at hand and whose gradient is not all zero.
        attribution: `layercam`, `gradcam`, or a control, the same mixing at another place: `random`, with the box
            anywhere inside the image, all places alike (a mask: where a map of noise is highest), and `center`, where
            objects tend to lie. In Python also a function `(activation, gradient) -> (N, h, w)`.
        target: `agreement` attributes −loss: what already makes the views agree. `loss` attributes +loss (the authors'
            sign).
        fill: `donor` (another image, resized whole into the box), `crop` (the same place of the other image), `noise`
            (uniform, with each channel's mean and deviation), `mean` (each channel's mean). In a mask, `donor` is the
            same as `crop`.
        alpha: The share kept is drawn, once a batch, from Beta(alpha, alpha), rescaled to `lam_range`.
        lam_range: Smallest and largest share of the image that is kept, within (0, 1).
        region: `box` around the map's maximum, shifted inside the image; `densest`, the box in which the map's mean is
            highest; `mask`, the `1 − lam` share of pixels with the highest attribution.
        generator: Source of all randomness, on the CPU; None is torch's global one.
    """

    layers: list[str] | None = None
    attribution: Literal["layercam", "gradcam", "random", "center"] | AttributionFunction = "layercam"
    target: Target = "agreement"
    fill: mixing.Fill = "donor"
    alpha: float = 1.0
    lam_range: tuple[float, float] = (0.5, 0.9)
    region: Literal["box", "densest", "mask"] = "box"
    generator: Generator | None = None
    _chosen: dict[tuple, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) or self.layers == []:
            raise ValueError(
                f"gradmix.layers must be a list of layer names such as ['layer3'], or None; got {self.layers!r}"
            )
        if not callable(self.attribution):
            _require_one_of("attribution", self.attribution, (*METHODS, *CONTROLS))
        _require_one_of("target", self.target, ("agreement", "loss"))
        _require_one_of("fill", self.fill, ("donor", "crop", "noise", "mean"))
        _require_one_of("region", self.region, ("box", "densest", "mask"))
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"gradmix.alpha must be above 0 and finite, got {self.alpha!r}")
        if len(self.lam_range) != 2 or not 0 < self.lam_range[0] <= self.lam_range[1] < 1:
            raise ValueError(f"gradmix.lam_range must be two rising numbers within (0, 1), got {self.lam_range!r}")
        if self.generator is not None and self.generator.device.type != "cpu":
            raise ValueError(
                f"gradmix.generator must be on the CPU, as the host needs lam; got one on {self.generator.device}"
            )

    def observe(self, encoder: nn.Module) -> AbstractContextManager[Observed]:
        """Remembers the activations of `layers`, every forward pass in order, for as long as the context lasts.

        Hooks are gone when it ends, also by an exception. The encoder may be wrapped by DistributedDataParallel or
        `torch.compile`; see `ssl_gradmix.attribution.observe`.

        Raises:
            KeyError: A layer that the encoder has not, with near names.
        """
        return observe(encoder, self.layers)

    @torch.no_grad()
    def __call__(self, images: Tensor, loss: Tensor, observed: Observed, donors: Tensor | None = None) -> MixedViews:
        """Mixes the attributed region out of the images.

        Args:
            images: (N, C, H, W) floating point, the first N of those that went through the encoder inside `observe`.
            loss: Scalar computed from the encoder's output; its graph is kept.
            observed: What `observe` yielded.
            donors: (N, C, H, W) to take from, for instance the other view; image i takes from `donors[donor_index[i]]`,
                never from `donors[i]` where N > 1. None takes from `images`.

        Raises:
            ValueError: Shapes that do not match, a layer without spatial extent, a loss that does not depend on the
                observed layers, NaN in a map on the CPU.
        """
        donors = images if donors is None else donors
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(f"images must be floating point (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
        if donors.shape != images.shape or donors.dtype != images.dtype:
            raise ValueError(
                f"donors must match the images ({images.dtype} {tuple(images.shape)}), "
                f"got {donors.dtype} {tuple(donors.shape)}"
            )
        attribution = self._attribute(loss, observed, images)
        lam = mixing.draw_lam(self.alpha, tuple(self.lam_range), self.generator)
        index = None
        if self.fill in ("donor", "crop"):
            index = mixing.derangement(len(images), images.device, self.generator)
            donors = donors[index]
        mix = self._mix_mask if self.region == "mask" else self._mix_box
        mixed, kept, boxes = mix(images, donors, attribution, lam)
        return MixedViews(mixed, torch.full((), kept, device=images.device), boxes, attribution, index)

    def _attribute(self, loss: Tensor, observed: Observed, images: Tensor) -> Tensor:
        count, size = len(images), (images.shape[2], images.shape[3])
        if self.attribution == "center":
            return normalize(mixing.central_map(size, images.device)).expand(count, *size)
        chosen = observed if self.layers else {name: observed[name] for name in [self._choose(loss, observed, size)]}
        if self.attribution != "random":
            return attribute(loss, chosen, size, count, self.attribution, self.target)
        extents = [spatial(name, passes[0], size).shape[2:] for name, passes in chosen.items()]
        maps = [mixing.rand((count, *extent), images.device, self.generator) for extent in extents]
        return normalize(sum(upscale(each, size) for each in maps))

    def _choose(self, loss: Tensor, observed: Observed, size: tuple[int, int]) -> str:
        """The deepest layer with room that the loss's gradient reaches; looked for once an encoder and image size.

        The gradient counts because a transformer that is read at its class token alone passes none to its last patch
        tokens.
        """
        key = (*observed, size)
        if key not in self._chosen:
            self._chosen[key] = name = _deepest(loss, observed, size)
            logger.info("GradMix attributes at layer %s for images of %dx%d", name, *size)
        return self._chosen[key]

    def _mix_box(self, images: Tensor, donors: Tensor, attribution: Tensor, lam: float) -> tuple[Tensor, float, Tensor]:
        size = (images.shape[2], images.shape[3])
        extent = mixing.box_extent(lam, size)
        if self.attribution == "random":  # the peaks of a map of noise, once resized, lie at the border more often
            boxes = mixing.random_boxes(len(images), extent, size, images.device, self.generator)
        elif self.attribution == "center":
            boxes = mixing.central_boxes(len(images), extent, size, images.device)
        else:
            place = mixing.densest_boxes if self.region == "densest" else mixing.peak_boxes
            boxes = place(attribution, extent, self.generator)
        if self.fill == "donor":
            patches = mixing.shrink(donors, extent)
        elif self.fill == "crop":
            patches = mixing.crop(donors, boxes, extent)
        elif self.fill == "noise":
            patches = mixing.noise_like(images, (*images.shape[:2], *extent), self.generator)
        else:
            patches = mixing.mean_like(images).expand(*images.shape[:2], *extent)
        return mixing.paste(images, patches, boxes), mixing.box_kept(extent, size), boxes

    def _mix_mask(self, images: Tensor, donors: Tensor, attribution: Tensor, lam: float) -> tuple[Tensor, float, None]:
        area = attribution.shape[1] * attribution.shape[2]
        pixels = max(1, round((1 - lam) * area))
        mask = mixing.top_mask(attribution, pixels, self.generator)[:, None]
        if self.fill == "noise":
            donors = mixing.noise_like(images, tuple(images.shape), self.generator)
        elif self.fill == "mean":
            donors = mixing.mean_like(images)
        mixed = torch.where(mask, donors, images, out=torch.empty_like(images))
        return mixed, 1 - pixels / area, None


def _deepest(loss: Tensor, observed: Observed, size: tuple[int, int]) -> str:
    candidates = {name: passes[:1] for name, passes in observed.items() if passes and _fits(name, passes[0], size)}
    found = gradients(loss, candidates) if candidates else {}
    for name, (gradient,) in reversed(found.items()):
        if spatial(name, gradient, size).any():
            return name
    shapes = [f"{name} {tuple(passes[0].shape)}" for name, passes in observed.items() if passes]
    seen = f"the last are {', '.join(shapes[-4:])}" if shapes else "nothing ran inside observe"
    raise ValueError(
        f"layers: no layer has a map of at least {SMALLEST_MAP}x{SMALLEST_MAP} that the loss depends on for images of "
        f"{size[0]}x{size[1]} ({seen}); name layers, or use larger images or a stem with a smaller stride"
    )


def _fits(name: str, output: Tensor, size: tuple[int, int]) -> bool:
    try:
        return output.requires_grad and min(spatial(name, output, size).shape[2:]) >= SMALLEST_MAP
    except ValueError:
        return False


def _require_one_of(name: str, value: Any, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"gradmix.{name} must be one of {', '.join(options)}, got {value!r}")
