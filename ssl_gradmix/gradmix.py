"""GradMix, a view generator for self-supervised learning: observe, attribute, place, mix.

The gradient of a loss of two views shows where an encoder looks. That region is replaced by another
image, and the result is one more view. After Xu, Kao, Keuper, "Informed Mixing: Improving Open Set
Recognition via Attribution-based Augmentation", arXiv 2505.12803. Depends on torch alone.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Region = Literal["peak", "mask", "random", "center"]
Fill = Literal["donor", "crop", "noise"]
Target = Literal["agreement", "loss"]
AttributionFunction = Callable[[Tensor, Tensor], Tensor]
Activations = Mapping[str, Sequence[Tensor]]

CONTROLS = ("random", "center")  # regions that depend neither on the loss nor on the encoder
SCALE = 2.0**12  # of gradients, against underflow in half precision; maps are normalized
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
SMALLEST_MAP = 4  # places per side that `layers=None` asks for
ROUNDING = 1e-6  # a map with a smaller relative range counts as constant


def layercam(activation: Tensor, gradient: Tensor) -> Tensor:
    """LayerCAM of smoothed gradients, `sum_c A_c * relu(smooth(G)_c)`: (N, C, h, w) to (N, h, w).

    Jiang et al. 2021, IEEE TIP 30. The outer relu of the paper is left out: it changes nothing
    after a ReLU layer, and tokens of a transformer may be negative.
    """
    return (activation * smooth(gradient).relu()).sum(1)


def gradcam(activation: Tensor, gradient: Tensor) -> Tensor:
    """Grad-CAM, Selvaraju et al. 2017: `relu(sum_c mean_hw(G_c) * A_c)`, shapes as `layercam`."""
    return (activation * gradient.mean((2, 3), keepdim=True)).sum(1).relu()


@dataclass(frozen=True)
class MixedViews:
    """Views whose attributed region has been replaced.

    Attributes:
        images: (N, C, H, W), with the dtype and device of the given images.
        lam: Scalar, the exact fraction of each image's pixels that was kept.
        mask: (N, H, W) bool, True where pixels were replaced.
        boxes: (N, 4) int64 x0, y0, x1, y1 (x1 and y1 exclusive), None for `region="mask"`.
        attribution: (N, H, W) float32 in [0, 1], zero for the control regions.
        donor_index: (N,) int64. Image i took from `donors[donor_index[i]]`; None for noise.
        flat: (N,) bool, True where the map is constant or not finite, so that the region is random.
        layers: Names of the attributed layers, empty for the control regions.
    """

    images: Tensor
    lam: Tensor
    mask: Tensor
    boxes: Tensor | None
    attribution: Tensor
    donor_index: Tensor | None
    flat: Tensor
    layers: tuple[str, ...]


@dataclass
class GradMix:
    """Makes one more view of each image by replacing the region that a loss attends to.

        gradmix = GradMix(layers=["layer3"])
        with gradmix.observe(encoder) as activations:
            z0, z1 = head(encoder(x0)), head(encoder(x1))
            loss = criterion(z0, z1)
        mixed = gradmix(x0, loss, activations, donors=x1)
        loss = loss + mixed.lam * criterion(head(encoder(mixed.images)), z1)
        loss.backward()

    Parameters' `.grad` and the hooks of distributed training are not touched. If the mixed view's
    loss sends no gradient into the pair (BYOL, SimSiam, MoCo, DINO), attribution is free: call
    `loss.backward()`, then `gradmix(x0, None, activations)`. Subclasses may override `attribute`
    (where to look) and `place` (what to replace).

    Args:
        layers: Names of layers as in `encoder.named_modules()`; their maps are summed. None chooses
            one at the first call for an encoder: the last block in forward order whose map is at
            least 4x4 and whose gradient is not zero. `MixedViews.layers` reports it.
        region: `peak` is a box around the maximum of the map, shifted inside the image. `mask` is
            the pixels with the highest attribution. `random` and `center` need no gradient.
        fill: `donor` resizes another image into the box (ResizeMix), `crop` copies the same place
            of another image (CutMix), `noise` is uniform with each channel's mean and deviation.
        target: `agreement` attributes −loss, that is, what makes the views agree. `loss` attributes
            +loss, the sign that the paper's authors use.
        lam_range: Range within (0, 1) of the fraction of each image that is kept. It is drawn
            uniformly once per call; `MixedViews.lam` is exact after rounding to pixels.
        attribution: `layercam`, `gradcam`, or a function from activation and gradient, both
            (N, C, h, w), to maps (N, h, w).
        generator: Source of all random numbers, on the CPU. None uses torch's global generators.

    Raises:
        ValueError: An argument is not one of these values.
    """

    layers: list[str] | None = None
    region: Region = "peak"
    fill: Fill = "donor"
    target: Target = "agreement"
    lam_range: tuple[float, float] = (0.5, 0.9)
    attribution: AttributionFunction = layercam
    generator: Generator | None = None
    _encoder: nn.Module | None = field(default=None, init=False, repr=False, compare=False)
    _settled: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) or self.layers == []:
            raise ValueError(
                f"layers must be a list such as ['layer3'] or None, got {self.layers!r}"
            )
        for name, allowed in (("region", Region), ("fill", Fill), ("target", Target)):
            if (value := getattr(self, name)) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {get_args(allowed)}, got {value!r}")
        if not 0 < self.lam_range[0] <= self.lam_range[1] < 1:
            raise ValueError(f"lam_range must rise within (0, 1), got {self.lam_range!r}")

    @contextmanager
    def observe(self, encoder: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
        """Records the outputs of the layers, every forward pass in order, inside its context.

        The outputs keep their graph alive: drop the dictionary after the step. The encoder may be
        wrapped by DistributedDataParallel or `torch.compile`; then it runs eagerly here, because
        compiled graphs hide activations. Its own outputs are recorded under `""`.

        Raises:
            KeyError: The encoder does not have such a layer; the message lists close names.
        """
        activations: dict[str, list[Tensor]] = {}
        if self.region in CONTROLS:
            yield activations
            return
        inner = unwrap(encoder)
        if self._encoder is not inner:
            self._encoder, self._settled = inner, []
        modules = dict(inner.named_modules())
        names = self._settled or self.layers or blocks(modules)
        for name in names:
            if name not in modules:
                close = difflib.get_close_matches(name, modules, 5, 0.3) or list(modules)[1:6]
                raise KeyError(f"layers: the encoder has no {name!r}; close are {', '.join(close)}")

        def record(name: str, output: object) -> None:
            output = output[0] if isinstance(output, tuple) and output else output
            if isinstance(output, Tensor) and output.ndim > 1:
                activations.setdefault(name, []).append(output)
                if output.requires_grad:
                    output.retain_grad()

        with ExitStack() as stack:
            if inner is not encoder or inner._compiled_call_impl is not None:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for name in ["", *names]:
                module = modules[name]
                hook = module.register_forward_hook(lambda _, __, out, at=name: record(at, out))
                stack.callback(hook.remove)
            yield activations

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor,
        loss: Tensor | None,
        activations: Activations,
        donors: Tensor | None = None,
    ) -> MixedViews:
        """Replaces a region of each image.

        Args:
            images: (N, C, H, W), the first N images that went through the encoder in `observe`.
            loss: Scalar that depends on the encoder's output; its graph is kept. None after
                `loss.backward()`, when the activations have their gradients.
            activations: What `observe` yielded.
            donors: (N, C, H, W) to take from, for instance the other view; image i never takes from
                `donors[i]` if N > 1. None takes from `images`.

        Raises:
            ValueError: At the first call for an encoder, a layer has no map or no gradient.
        """
        if self.region in CONTROLS:
            maps = images.new_zeros(len(images), *images.shape[2:], dtype=torch.float32)
            flat = torch.zeros_like(maps[:, 0, 0], dtype=torch.bool)
        else:
            maps = self.attribute(images, loss, activations)
            flat = maps.amax((1, 2)) == 0
        # The fraction is drawn on the CPU, so that the host knows all shapes.
        uniform = torch.rand((), dtype=torch.float64, generator=self.generator).item()
        low, high = self.lam_range
        share = 1 - (low + (high - low) * uniform)
        index = None
        if self.fill == "noise":
            donors = noise_like(images, self.generator)
        else:
            index = derangement(len(images), images.device, self.generator)
            donors = (images if donors is None else donors)[index]
        boxes = None
        if self.region == "mask":
            mask = top_mask(maps, max(1, round(share * maps[0].numel())), self.generator)
        else:
            boxes, extent = self.place(maps, share)
            mask = box_mask(boxes, maps)
        if boxes is not None and self.fill == "donor":
            mixed = paste(images, resize(donors, extent), boxes)
        else:
            mixed = torch.where(mask[:, None], donors, images)
        lam = 1 - mask.float().mean()
        return MixedViews(mixed, lam, mask, boxes, maps, index, flat, tuple(self._settled))

    def attribute(self, images: Tensor, loss: Tensor | None, activations: Activations) -> Tensor:
        """Maps (N, H, W) in [0, 1] of where the loss looks; arguments as in a call.

        The map of each layer is min-max normalized per image and resized (bilinear); their sum is
        normalized again. GradMix's authors normalize over the batch, which weighs images unequally.
        """
        size = images.shape[2:]
        if not self._settled:  # the first call for an encoder, the only one that reads the device
            self._settled = self._settle(loss, activations, size)
        maps = []
        for name in self._settled:
            passes = activations[name]
            before = [sum(map(len, passes[:i])) for i in range(len(passes))]
            outputs = passes[: sum(start < len(images) for start in before)]
            slopes = torch.cat(gradients(loss, outputs))[: len(images)]
            values = torch.cat(list(outputs))[: len(images)].detach()
            slopes = slopes if self.target == "loss" else -slopes
            found = self.attribution(spatial(values, size).float(), spatial(slopes, size).float())
            maps.append(F.interpolate(normalize(found)[:, None], tuple(size), mode="bilinear"))
        return normalize(torch.cat(maps, 1).sum(1))

    def place(self, maps: Tensor, share: float) -> tuple[Tensor, tuple[int, int]]:
        """Boxes (N, 4) to replace, and the height and width that all of them have.

        Args:
            maps: (N, H, W) from `attribute`, zero for the control regions.
            share: Fraction of the image that a box covers, before rounding to pixels.
        """
        (count, *size), side = maps.shape, math.sqrt(share)
        height, width = (max(1, round(each * side)) for each in size)
        down, across = size[0] - height, size[1] - width
        if self.region == "random":
            x0 = (rand((count,), maps.device, self.generator) * (across + 1)).long()
            y0 = (rand((count,), maps.device, self.generator) * (down + 1)).long()
        elif self.region == "center":
            x0 = torch.full((count,), across // 2, device=maps.device)
            y0 = torch.full((count,), down // 2, device=maps.device)
        else:
            y, x = peaks(maps, self.generator)
            x0, y0 = x - width // 2, y - height // 2
        # GradMix's authors clip boxes at the border instead, which changes their area.
        x0, y0 = x0.clamp(0, across), y0.clamp(0, down)
        return torch.stack([x0, y0, x0 + width, y0 + height], 1), (height, width)

    def _settle(
        self, loss: Tensor | None, activations: Activations, size: Sequence[int]
    ) -> list[str]:
        """The given layers, or one that is chosen, once they are seen to have a gradient."""
        if loss is None and all(each.grad is None for each in chain(*activations.values())):
            raise ValueError("loss: call loss.backward() first, or pass the loss")
        images = sum(map(len, activations.get("", ())))
        grids = {name: spatial(out[0], size).shape[2:] for name, out in activations.items() if out}

        def usable(name: str) -> bool:
            repeated = 0 < images < sum(map(len, activations.get(name, ())))
            if repeated or math.prod(grids.get(name, ())) == 1:
                return False
            first = activations[name][:1]
            reached = first[0].requires_grad
            return reached and bool(spatial(gradients(loss, first)[0], size).any())

        if self.layers is not None:
            if bad := [name for name in self.layers if not usable(name)]:
                raise ValueError(
                    f"layers: cannot attribute {bad}: it did not run, runs twice per image, has no "
                    "map, or the gradient at its places is zero, as in the last block of a "
                    "transformer read at its class token; name an earlier block"
                )
            return self.layers
        for name in reversed(grids):
            around = [each for each in grids if each and f"{name}.".startswith(f"{each}.")]
            smallest = min((min(grids[each]) for each in around), default=0)
            if smallest >= SMALLEST_MAP and usable(name):
                return [name]
        raise ValueError(f"layers: none has a gradient and a {SMALLEST_MAP}x{SMALLEST_MAP} map")


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and `torch.compile`."""
    wrapped = isinstance(module, DistributedDataParallel)
    inner = module.module if wrapped else getattr(module, "_orig_mod", None)
    return unwrap(inner) if isinstance(inner, nn.Module) else module


def blocks(modules: Mapping[str, nn.Module]) -> list[str]:
    """Names of modules, containers apart, that have parts or stand in a container; or all names."""
    names = [name for name, module in modules.items() if name and type(module) not in CONTAINERS]
    parents = {name: modules[name.rpartition(".")[0]] for name in names}
    return [
        name for name in names if type(parents[name]) in CONTAINERS or any(modules[name].children())
    ] or names


def gradients(loss: Tensor | None, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the loss at outputs up to a common factor, zero where it does not reach."""
    if loss is None:
        found = tuple(output.grad for output in outputs)
    else:
        scale = torch.full_like(loss, SCALE)
        with torch.autocast(loss.device.type, enabled=False):
            found = torch.autograd.grad(
                loss, list(outputs), scale, retain_graph=True, allow_unused=True
            )
    pairs = zip(outputs, found, strict=True)
    return [torch.zeros_like(output) if each is None else each for output, each in pairs]


def spatial(tensor: Tensor, size: Sequence[int]) -> Tensor:
    """A layer's output as (N, C, h, w), with a single place if it has no spatial extent.

    Channels-last maps are those whose aspect ratio then fits the image's (H, W) better. Of tokens
    (N, T, C), class and register tokens come first and are dropped; the others must lie row by row,
    as in timm's ViTs (early blocks of its Hiera order them otherwise).
    """

    def distortion(height: int, width: int) -> float:
        return abs(height * size[1] - width * size[0]) / (height * width)

    if tensor.ndim == 3:
        tokens, ratio = tensor.shape[1], size[1] / size[0]
        height = max(each for each in range(1, tokens + 1) if each * round(each * ratio) <= tokens)
        width = round(height * ratio)
        tensor = tensor[:, tokens - height * width :].transpose(1, 2).unflatten(2, (height, width))
    elif tensor.ndim == 4 and distortion(*tensor.shape[1:3]) < distortion(*tensor.shape[2:]):
        tensor = tensor.permute(0, 3, 1, 2)
    return tensor if tensor.ndim == 4 else tensor.flatten(1)[:, :, None, None]


def smooth(gradient: Tensor) -> Tensor:
    """Averages each place of (N, C, h, w) with its neighbors, weights 1, 2, 1; borders reflected.

    It removes the grid that strided layers leave in gradients (Odena et al. 2016, "Deconvolution
    and checkerboard artifacts").
    """
    if min(gradient.shape[2:]) < 2:
        return gradient
    padded = F.pad(gradient, (1, 1, 1, 1), mode="reflect")
    return F.avg_pool2d(F.avg_pool2d(padded, 2, stride=1), 2, stride=1)


def normalize(maps: Tensor) -> Tensor:
    """Min-max per image to [0, 1]; constant maps (up to rounding) and non-finite maps become 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    smallest = ROUNDING * torch.maximum(low.abs(), high.abs())
    smallest = smallest.clamp_min(torch.finfo(maps.dtype).tiny)
    return torch.where(high - low > smallest, (maps - low) / (high - low), 0)


def peaks(maps: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
    """Row (N,) and column (N,) of the maximum of each map; a random place if it is constant."""
    count, height, width = maps.shape
    flat = maps.flatten(1)
    anywhere = (rand((count,), maps.device, generator) * (height * width)).long()
    place = torch.where(flat.amax(1) > flat.amin(1), flat.argmax(1), anywhere)
    return place // width, place % width


def box_mask(boxes: Tensor, maps: Tensor) -> Tensor:
    """The pixels of maps (N, H, W) inside boxes (N, 4), as bool."""
    x0, y0, x1, y1 = boxes[:, :, None, None].unbind(1)
    y, x = (torch.arange(side, device=maps.device) for side in maps.shape[1:])
    return (x >= x0) & (x < x1) & (y[:, None] >= y0) & (y[:, None] < y1)


def top_mask(maps: Tensor, pixels: int, generator: Generator | None = None) -> Tensor:
    """The pixels (N, H, W) with the highest values in each map, as bool; ties at random."""
    flat = maps.flatten(1)
    order = torch.argsort(rand(tuple(flat.shape), maps.device, generator), 1)
    chosen = order.gather(1, flat.gather(1, order).topk(pixels, 1).indices)
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, chosen, True).view_as(maps)


def paste(images: Tensor, patches: Tensor, boxes: Tensor) -> Tensor:
    """A copy of the images with patches (N, C, h, w) pasted into boxes (N, 4) of that extent."""
    n, c, y, x = (torch.arange(side, device=boxes.device) for side in patches.shape)
    rows = boxes[:, 1, None, None, None] + y[:, None]
    columns = boxes[:, 0, None, None, None] + x
    places = (n[:, None, None, None], c[:, None, None], rows, columns)
    return images.clone().index_put_(places, patches)


def resize(images: Tensor, extent: tuple[int, int]) -> Tensor:
    """Whole images resized to (h, w), bilinear with antialiasing; in float32 on any device."""
    resized = F.interpolate(images.float(), size=extent, mode="bilinear", antialias=True)
    return resized.to(images.dtype)


def noise_like(images: Tensor, generator: Generator | None = None) -> Tensor:
    """Uniform noise with the mean and standard deviation of each channel of the batch."""
    deviation, mean = torch.std_mean(images.float(), (0, 2, 3), correction=0, keepdim=True)
    uniform = rand(tuple(images.shape), images.device, generator) * 2 - 1
    return torch.empty_like(images).copy_(mean + math.sqrt(3) * deviation * uniform)


def derangement(count: int, device: torch.device, generator: Generator | None = None) -> Tensor:
    """A random permutation (N,) without fixed points if N > 1: one random cycle through all."""
    source = generator.device if generator else device
    cycle = torch.randperm(count, generator=generator, device=source).to(device, non_blocking=True)
    return torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(1))


def rand(shape: tuple[int, ...], device: torch.device, generator: Generator | None) -> Tensor:
    """Uniform in [0, 1), drawn where the generator is."""
    source = generator.device if generator else device
    drawn = torch.rand(shape, generator=generator, device=source)
    return drawn.to(device, non_blocking=True)
