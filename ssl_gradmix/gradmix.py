"""GradMix, the view generator: attribution → region → fill. Depends on torch alone, for any training loop."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Generator, Tensor, nn

from ssl_gradmix import mixing
from ssl_gradmix.attribution import (
    CONTAINERS,
    METHODS,
    NOTHING_RAN,
    AttributionFunction,
    EarlyLoss,
    Observed,
    Target,
    first_images,
    gradients,
    leaves_of,
    observe,
    spatial,
    summed_maps,
)

Region = Literal["peak", "max_mean", "mask", "random", "center"]

CONTROLS = ("random", "center")
"""Regions that neither the loss nor the encoder has a say in."""

SMALLEST_MAP = 4
"""`layers=None` wants a map of at least this many places a side: a coarser one cannot place a box."""


@dataclass(frozen=True)
class MixedViews:
    """Views in which the attributed region has been replaced.

    Attributes:
        images: (N, C, H, W), dtype, device and memory format of the images given.
        lam: Scalar tensor, the exact share of each image's pixels that was kept.
        boxes: (N, 4) int64 x0, y0, x1, y1 (the latter two exclusive), or None where the region is a mask.
        attribution: (N, H, W) in [0, 1], float32; zero where the region is a control.
        donor_index: (N,) int64, image i took from `donors[donor_index[i]]`; None where the fill needs no donor.
        flat: (N,) bool, the map of this image was flat or not finite, so that its region lies at random. False where
            the region is a control.
        layers: Names of the layers attributed at; empty where the region is a control.
    """

    images: Tensor
    lam: Tensor
    boxes: Tensor | None
    attribution: Tensor
    donor_index: Tensor | None
    flat: Tensor
    layers: tuple[str, ...]


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
            takes the deepest stage or whole block whose map is at least 4x4 for the images at hand and whose gradient
            is not all zero; `MixedViews.layers` says which.
        attribution: `layercam` or `gradcam`. In Python also a function `(activation, gradient) -> (N, h, w)`.
        target: `agreement` attributes −loss: what already makes the views agree. `loss` attributes +loss (the authors'
            sign).
        fill: `donor` (another image, resized whole into the box, as in ResizeMix), `crop` (the same place of the other
            image, as in CutMix), `noise` (uniform, with each channel's mean and deviation), `mean` (each channel's
            mean). In a mask, `donor` is the same as `crop`.
        alpha: The share kept is drawn, once a batch and process, from Beta(alpha, alpha), rescaled to `lam_range`.
        lam_range: Smallest and largest share of the image that is kept, within (0, 1).
        region: `peak`, a box around the map's maximum, shifted inside the image; `max_mean`, the box in which the map's
            mean is highest; `mask`, the `1 − lam` share of pixels with the highest attribution. And two controls that
            need no gradient: `random`, a box anywhere inside the image, all places alike, and `center`, a box where
            objects tend to lie.
        generator: Source of all randomness, on the CPU; None is torch's global one.
    """

    layers: list[str] | None = None
    attribution: Literal["layercam", "gradcam"] | AttributionFunction = "layercam"
    target: Target = "agreement"
    fill: mixing.Fill = "donor"
    alpha: float = 1.0
    lam_range: tuple[float, float] = (0.5, 0.9)
    region: Region = "peak"
    generator: Generator | None = None
    _settled: WeakKeyDictionary = field(default_factory=WeakKeyDictionary, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) or self.layers == []:
            raise ValueError(
                f"gradmix.layers must be a list of layer names such as ['layer3'], or None; got {self.layers!r}"
            )
        options = {"target": get_args(Target), "fill": get_args(mixing.Fill), "region": get_args(Region)}
        if not callable(self.attribution):
            options["attribution"] = tuple(METHODS)
        for name, allowed in options.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"gradmix.{name} must be one of {', '.join(allowed)}, got {value!r}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"gradmix.alpha must be above 0 and finite, got {self.alpha!r}")
        if len(self.lam_range) != 2 or not 0 < self.lam_range[0] <= self.lam_range[1] < 1:
            raise ValueError(f"gradmix.lam_range must be two rising numbers within (0, 1), got {self.lam_range!r}")
        if self.generator is not None and self.generator.device.type != "cpu":
            raise ValueError(
                f"gradmix.generator must be on the CPU, as the host needs lam; got one on {self.generator.device}"
            )

    def __getstate__(self) -> dict[str, Any]:
        """All but what was settled for encoders: it hangs on weak references, which cannot be pickled."""
        return {name: value for name, value in vars(self).items() if name != "_settled"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _settled=WeakKeyDictionary())

    def observe(self, encoder: nn.Module) -> AbstractContextManager[Observed]:
        """Remembers the activations of `layers`, every forward pass in order, for as long as the context lasts.

        Hooks are gone when it ends, also by an exception. The encoder may be wrapped by DistributedDataParallel or
        `torch.compile`; see `ssl_gradmix.attribution.observe`. A control observes nothing.

        Raises:
            KeyError: A layer that the encoder has not, with near names.
        """
        return nullcontext(Observed()) if self.region in CONTROLS else observe(encoder, self.layers)

    def __call__(self, images: Tensor, loss: Tensor, observed: Observed, donors: Tensor | None = None) -> MixedViews:
        """Mixes the attributed region out of the images.

        Args:
            images: (N, C, H, W) floating point, the first N of those that went through the encoder inside `observe`.
            loss: Scalar computed from the encoder's output; its graph is kept.
            observed: What `observe` yielded.
            donors: (N, C, H, W) to take from, for instance the other view; image i takes from `donors[donor_index[i]]`,
                never from `donors[i]` where N > 1. None takes from `images`.

        Raises:
            ValueError: Shapes that do not match, or other images than those observed. A layer that did not run, was
                changed in place, has no spatial extent, or that the loss's gradient does not reach. Whether it is zero
                for all images is looked at in the first call for an encoder and image size, the only one in which the
                host waits for the device.
        """
        if observed.fails_outside:
            warnings.warn(
                "encoder: compiled as a whole, it ran eagerly inside `observe`; with BatchNorm in training mode, "
                "loss.backward() fails unless its pass of the mixed views is inside too, see docs/torch-compile.md",
                stacklevel=2,
            )
        return self._mix(images, loss, observed, donors)[0]

    def early(
        self, images: Tensor, loss: Tensor, observed: Observed, donors: Tensor | None = None
    ) -> tuple[Tensor, MixedViews]:
        """Mixes as a call does and runs the loss's own backward pass at once, whose part the attribution is.

        That frees the graph, and empties `observed`, before the mixed views' forward pass, for one copy of the
        parameters' gradients. Only for mixed losses that send no gradient into that graph, as those of BYOL, SimSiam,
        MoCo and DINO, whose targets have none.

            loss, mixed = gradmix.early(x0, loss, observed, donors=x1)
            loss = loss + mixed.lam * criterion(head(encoder(mixed.images)), targets)
            loss.backward()

        Returns:
            The loss, whose backward pass hands out the gradients that were taken, and the mixed views. A control needs
            no gradient and returns the loss as it is.

        Raises:
            ValueError: As a call does, and in the backward pass where the mixed loss does send a gradient there.
        """
        if self.region in CONTROLS:
            return loss, self(images, loss, observed, donors)
        leaves, nodes = leaves_of(loss), [output.grad_fn for output in chain(*observed.values()) if output.grad_fn]
        mixed, at_leaves = self._mix(images, loss, observed, donors, leaves)
        observed.clear()  # activations that nobody needs any more
        known = {leaf: gradient for leaf, gradient in zip(leaves, at_leaves, strict=True) if gradient is not None}
        loss = EarlyLoss.apply(loss.detach(), nodes, list(known.values()), *known)
        # First of all in the backward pass, or parameters would wait for it, and DistributedDataParallel for them.
        loss.grad_fn._set_sequence_nr(2**63 - 1)
        return loss, mixed

    @torch.no_grad()
    def _mix(
        self, images: Tensor, loss: Tensor, observed: Observed, donors: Tensor | None, leaves: Sequence[Tensor] = ()
    ) -> tuple[MixedViews, tuple[Tensor | None, ...]]:
        """The mixed views, and the loss's scaled gradients at the leaves."""
        donors = images if donors is None else donors
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(f"images must be floating point (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
        if donors.shape != images.shape or donors.dtype != images.dtype:
            raise ValueError(
                f"donors must match the images ({images.dtype} {tuple(images.shape)}), "
                f"got {donors.dtype} {tuple(donors.shape)}"
            )
        at_leaves = ()
        if self.region in CONTROLS:
            names, attribution = (), images.new_zeros((len(images), *images.shape[2:]), dtype=torch.float32)
            flat = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        else:
            names, attribution, at_leaves = self._attribute(loss, observed, images, leaves)
            flat = attribution.amax((1, 2)) == 0
        lam = mixing.draw_lam(self.alpha, tuple(self.lam_range), self.generator)
        index = None
        if self.fill in ("donor", "crop"):
            index = mixing.derangement(len(images), images.device, self.generator)
            donors = donors[index]
        mix = self._mix_mask if self.region == "mask" else self._mix_box
        mixed, kept, boxes = mix(images, donors, attribution, lam)
        lam = torch.full((), kept, device=images.device)
        return MixedViews(mixed, lam, boxes, attribution, index, flat, names), at_leaves

    def _attribute(
        self, loss: Tensor, observed: Observed, images: Tensor, leaves: Sequence[Tensor]
    ) -> tuple[tuple[str, ...], Tensor, tuple[Tensor | None, ...]]:
        count, size = len(images), (images.shape[2], images.shape[3])
        encoder = observed.encoder and observed.encoder()
        settled = {} if encoder is None else self._settled.setdefault(encoder, {})
        first = size not in settled
        observed.check_images(images, values=first or images.device.type == "cpu")
        if self.layers:
            names = tuple(self.layers)
            for name in names:
                if problem := observed.problem(name):
                    raise ValueError(problem)
        elif not first and _fits(observed, *settled[size], size):
            names = settled[size]
        else:
            names = (_deepest(loss, observed, size),)
        outputs = {name: first_images(name, observed[name], count) for name in names}
        taken, at_leaves = gradients(loss, outputs, leaves)
        if self.layers and first:
            _refuse_dead(taken, observed.modules(), size)
        settled[size] = names
        return names, summed_maps(outputs, taken, size, count, self.attribution, self.target), at_leaves

    def _mix_box(self, images: Tensor, donors: Tensor, attribution: Tensor, lam: float) -> tuple[Tensor, float, Tensor]:
        size = (images.shape[2], images.shape[3])
        extent = mixing.box_extent(lam, size, self.lam_range)
        if self.region == "random":
            boxes = mixing.random_boxes(len(images), extent, size, images.device, self.generator)
        elif self.region == "center":
            boxes = mixing.central_boxes(len(images), extent, size, images.device)
        else:
            place = mixing.max_mean_boxes if self.region == "max_mean" else mixing.peak_boxes
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
        size = (images.shape[2], images.shape[3])
        pixels = mixing.mask_pixels(lam, size, self.lam_range)
        mask = mixing.top_mask(attribution, pixels, self.generator)[:, None]
        if self.fill == "noise":
            donors = mixing.noise_like(images, tuple(images.shape), self.generator)
        elif self.fill == "mean":
            donors = mixing.mean_like(images)
        mixed = torch.where(mask, donors, images, out=torch.empty_like(images))
        return mixed, 1 - pixels / (size[0] * size[1]), None


def _deepest(loss: Tensor, observed: Observed, size: tuple[int, int]) -> str:
    """The deepest whole stage or block with room whose gradient is not all zero.

    A transformer that is read at its class token alone passes none to its last patch tokens. Parts of a module with a
    coarser map, as of a strided block, come after what is not, and layers without parts after all stages.
    """
    first = {name: passes[:1] for name, passes in observed.items() if passes}
    if not first:
        raise ValueError(NOTHING_RAN)
    extents = {name: _extent(name, output, size) for name, (output,) in first.items()}
    maps = {name: passes for name, passes in first.items() if extents[name]} or first
    reached = {name: passes for name, passes in maps.items() if passes[0].requires_grad}
    roomy = {name: passes for name, passes in reached.items() if extents[name] >= SMALLEST_MAP}
    if reached and not roomy:
        shapes = [f"{name} {tuple(output.shape)}" for name, (output,) in first.items()]
        raise ValueError(
            f"layers: no layer has a map of at least {SMALLEST_MAP}x{SMALLEST_MAP} for images of {size[0]}x{size[1]} "
            f"(the last are {', '.join(shapes[-4:])}); name layers, or use larger images or a smaller stride"
        )
    modules = observed.modules()
    blocks = [name for name in maps if extents[name] and type(modules.get(name)) not in CONTAINERS]

    def rank(name: str) -> tuple[int, bool]:
        coarser = sum(name.startswith(f"{each}.") and extents[each] < extents[name] for each in blocks)
        return coarser, next(modules.get(name, nn.Module()).children(), None) is None

    found, _ = gradients(loss, roomy or maps)
    for name in sorted((name for name in reversed(roomy) if not observed.problem(name)), key=rank):
        (gradient,) = found[name]
        if gradient is not None and spatial(name, gradient, size).any():
            return name
    raise ValueError(
        f"loss: its gradient is zero in all layers (the last are {', '.join([*roomy][-4:])}); does a head start at "
        "zeros? initialize it otherwise, or train a few steps without GradMix"
    )


def _fits(observed: Observed, name: str, size: tuple[int, int]) -> bool:
    """Whether a layer can be attributed at, and has room."""
    if observed.problem(name):
        return False
    output = observed[name][0]
    return output.requires_grad and _extent(name, output, size) >= SMALLEST_MAP


def _extent(name: str, output: Tensor, size: tuple[int, int]) -> int:
    """The smaller side of a layer's map; 0 where its output is none."""
    try:
        return min(spatial(name, output, size).shape[2:])
    except ValueError:
        return 1 if output.ndim == 4 else 0


def _refuse_dead(
    taken: Mapping[str, Sequence[Tensor | None]], modules: dict[str, nn.Module], size: tuple[int, int]
) -> None:
    """Looks, on the host, whether the gradient at a layer is zero for all images."""
    for name, found in taken.items():
        parts = [part for part in found if part is not None]
        if not parts or any(spatial(name, part, size).any() for part in parts):
            continue
        if not any(part.any() for part in parts):
            raise ValueError(
                f"layers: the loss's gradient at {name!r} is zero for all images; does a head start at zeros, or is "
                "this branch multiplied by zero? initialize it otherwise, or name another layer"
            )
        earlier = _before(name, modules)
        raise ValueError(
            f"layers: the loss's gradient is zero at all places of {name!r}, as in the last block of a transformer "
            f"read at its class token; name {repr(earlier) if earlier else 'an earlier block'}, or leave layers out"
        )


def _before(name: str, modules: dict[str, nn.Module]) -> str | None:
    """The last but one of the blocks, members of containers, up to a layer."""
    end = max((i for i, each in enumerate(modules) if f"{each}.".startswith(f"{name}.")), default=-1)
    blocks = [each for each in list(modules)[: end + 1] if type(modules[each.rpartition(".")[0]]) in CONTAINERS]
    depth = min((each.count(".") for each in blocks), default=0)
    outer = [each for each in blocks if each.count(".") == depth]
    return outer[-2] if len(outer) > 1 else None
