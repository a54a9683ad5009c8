"""Where a loss looks: activations of a few layers and the loss's gradient there, made into one map an image.

Depends on torch alone, so that any training loop can take it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

Observed = dict[str, list[Tensor]]
"""What `observe` collects: for each layer its outputs, one a forward pass, in order."""

AttributionFunction = Callable[[Tensor, Tensor], Tensor]
"""`(activation (N, C, h, w), gradient (N, C, h, w)) -> map (N, h, w)`; gradients are known up to a constant factor."""

Target = Literal["agreement", "loss"]

SCALE = 2.0**12
"""Of gradients: those of a mean over a batch underflow where they pass through half precision on their way; maps are
normalized, so that a constant factor is free."""


@contextmanager
def observe(encoder: nn.Module, layers: Sequence[str] | None = None) -> Iterator[Observed]:
    """Remembers the outputs of some layers, every forward pass in order, for as long as the context lasts.

    A compiled graph hides its inner activations from autograd, so that an encoder compiled as a whole runs eagerly
    here. To keep the speed of `torch.compile`, compile its stages instead (`encoder.layer3 =
    torch.compile(encoder.layer3)`): their outputs can be observed. Stages behind an observed layer are then run
    backwards twice, which torch's compiled graphs allow only with `torch._functorch.config.donated_buffer = False`, set
    before the first forward pass.

    Args:
        encoder: The module whose layers are observed; may be wrapped by DistributedDataParallel or `torch.compile`.
        layers: Names as in `encoder.named_modules()` of the module inside the wrapper. None observes every module that
            has children (stages and blocks), or every module where none has.

    Yields:
        A dictionary from layer name to the list of its outputs, in the order in which layers finish where `layers` is
        None. It holds on to the outputs, hence to their graph: let go of it after the step.

    Raises:
        KeyError: A layer that the encoder has not; the message lists near names.
    """
    modules = dict(unwrap(encoder).named_modules())
    modules.pop("")
    observed: Observed = {name: [] for name in layers or []}
    if layers is None:
        stages = [name for name, module in modules.items() if next(module.children(), None) is not None]
        layers = stages or list(modules)
    for name in layers:
        if name not in modules:
            near = difflib.get_close_matches(name, modules, n=5, cutoff=0.3) or list(modules)[:5]
            raise KeyError(f"layers: the encoder has no layer {name!r}; near names are {', '.join(near)}")
    with ExitStack() as stack:
        if is_compiled(encoder):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name in layers:
            stack.callback(modules[name].register_forward_hook(_recorder(observed, name)).remove)
        yield observed


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and `torch.compile`."""
    while True:
        if isinstance(module, DistributedDataParallel | DataParallel):
            module = module.module
        elif hasattr(module, "_orig_mod"):
            module = module._orig_mod
        else:
            return module


def is_compiled(module: nn.Module) -> bool:
    """Whether the module is compiled as a whole, by `torch.compile(module)` or `module.compile()`."""
    if isinstance(module, DistributedDataParallel | DataParallel):
        module = module.module
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _recorder(observed: Observed, name: str) -> Callable[[nn.Module, tuple, object], None]:
    def record(module: nn.Module, args: tuple, output: object) -> None:
        if isinstance(output, Tensor):
            observed.setdefault(name, []).append(output)

    return record


def layercam(activation: Tensor, gradient: Tensor) -> Tensor:
    """`sum_c A_c * relu(smooth(G)_c)` at every place: LayerCAM, Jiang et al. 2021, IEEE TIP 30, of smoothed gradients.

    Without smoothing, the maximum of a map ahead of a strided stage tells the stride's grid rather than the image, see
    `smooth`; where gradients are the same at every place, as ahead of global pooling, it changes nothing. And without
    LayerCAM's outer relu: after a ReLU layer it changes nothing, and tokens of a transformer may be negative, where
    normalization still ranks the places.

    Args:
        activation: (N, C, h, w).
        gradient: (N, C, h, w), of the target with respect to the activation.

    Returns:
        Map (N, h, w), not normalized.
    """
    return (activation * smooth(gradient).relu()).sum(1)


def smooth(gradient: Tensor) -> Tensor:
    """Averages every place with its neighbors, by weights 1, 2, 1 in both directions; (N, C, h, w) stays so.

    Places of a layer reach a stage of stride 2 through unequal numbers of weights, so that their gradients alternate
    whatever the image shows (Odena, Olah, Shlens 2016, "Deconvolution and checkerboard artifacts"). This filter lets
    nothing through that alternates from place to place, up to the border, which is reflected.
    """
    if min(gradient.shape[2:]) < 2:
        return gradient
    padded = F.pad(gradient, (1, 1, 1, 1), mode="reflect")
    return F.avg_pool2d(F.avg_pool2d(padded, 2, stride=1), 2, stride=1)


def gradcam(activation: Tensor, gradient: Tensor) -> Tensor:
    """`relu(sum_c mean_hw(G_c) * A_c)`: Grad-CAM, Selvaraju et al. 2017, ICCV. Shapes as in `layercam`."""
    return (activation * gradient.mean((2, 3), keepdim=True)).sum(1).relu()


METHODS: dict[str, AttributionFunction] = {"layercam": layercam, "gradcam": gradcam}


def attribute(
    loss: Tensor,
    activations: Mapping[str, Sequence[Tensor]],
    size: tuple[int, int],
    count: int | None = None,
    attribution: str | AttributionFunction = "layercam",
    target: Target = "agreement",
) -> Tensor:
    """Attributes a loss to the places of the images that led to it.

    One backward pass from the loss to the observed layers and no further: no parameter's `.grad` is touched and the
    graph is kept. Each layer's map is min-max normalized per image, resized to the image (bilinear), and the layers are
    summed and normalized again. GradMix's authors normalize over the whole batch, which with several layers weighs
    images unequally.

    Args:
        loss: Scalar that depends on the activations.
        activations: For each layer the outputs of its forward passes, as `observe` yields them: (n, C, h, w), (n, h, w,
            C) or tokens (n, T, C), whose class and register tokens come first and are dropped.
        size: (H, W) of the images.
        count: Maps are made for the first `count` images, in order of observation; None takes all.
        attribution: `layercam`, `gradcam`, or a function from (activation, gradient), both (N, C, h, w) in float32, to
            (N, h, w).
        target: `agreement` attributes −loss, that is what makes views agree; `loss` attributes +loss.

    Returns:
        Maps (N, H, W) in [0, 1], float32. A flat map is all zero. On an accelerator a NaN map counts as flat, as
        looking for it would make the host wait.

    Raises:
        ValueError: A loss that is no scalar or depends on no activation, fewer images than `count`, a layer without
            spatial extent, NaN in a map on the CPU.
    """
    if target not in ("agreement", "loss"):
        raise ValueError(f"target must be 'agreement' or 'loss', got {target!r}")
    function = _resolve(attribution)
    outputs = {name: first_images(name, list(passes), count) for name, passes in activations.items()}
    gradients_of = gradients(loss, outputs, sign=1 if target == "loss" else -1)
    total = 0
    for name, tensors in outputs.items():
        activation, gradient = (
            spatial(name, torch.cat(list(parts))[:count].detach(), size).float()
            for parts in (tensors, gradients_of[name])
        )
        total = total + upscale(_checked(function(activation, gradient), activation, attribution), size)
    return normalize(total)


def gradients(loss: Tensor, outputs: Mapping[str, Sequence[Tensor]], sign: float = 1.0) -> dict[str, list[Tensor]]:
    """The gradient of `sign * loss`, times `SCALE`, with respect to each output; zero where the loss depends not on it.

    Raises:
        ValueError: A loss that is no scalar, or that depends on none of the outputs; a compiled stage that allows no
            second backward pass, see `observe`.
    """
    if loss.numel() != 1:
        raise ValueError(f"loss must be a scalar, got shape {tuple(loss.shape)}; reduce it over the batch first")
    flat = [output for passes in outputs.values() for output in passes]
    if not flat or not loss.requires_grad or not any(output.requires_grad for output in flat):
        raise ValueError(
            f"loss does not depend on the observed layers {list(outputs)}; compute it inside `observe`, "
            "with gradients enabled"
        )
    reached = [output for output in flat if output.requires_grad]  # those behind frozen layers alone are not
    try:
        with torch.autocast(loss.device.type, enabled=False):  # backward passes do not belong under it
            taken = torch.autograd.grad(
                loss, reached, torch.full_like(loss, sign * SCALE), retain_graph=True, allow_unused=True
            )
    except RuntimeError as error:
        if "donated buffer" not in str(error):
            raise
        raise ValueError(
            "encoder: a stage behind an observed layer was compiled in a way that allows a single backward pass; set "
            "torch._functorch.config.donated_buffer = False before its first forward pass"
        ) from error
    found = {id(output): gradient for output, gradient in zip(reached, taken, strict=True) if gradient is not None}
    if not found:
        raise ValueError(
            f"loss does not depend on the observed layers {list(outputs)}; is it computed from this encoder's output?"
        )

    def of(output: Tensor) -> Tensor:
        return found[id(output)] if id(output) in found else torch.zeros_like(output)

    return {name: [of(output) for output in passes] for name, passes in outputs.items()}


def normalize(maps: Tensor) -> Tensor:
    """Min-max per image to [0, 1]; a flat or NaN map becomes zero."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return ((maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)).nan_to_num(0, 0, 0)


def upscale(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Normalized maps (N, h, w) resized to (N, H, W), bilinear."""
    return F.interpolate(normalize(maps)[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def first_images(name: str, passes: list[Tensor], count: int | None) -> list[Tensor]:
    """The forward passes that hold the first `count` images."""
    if count is None:
        return passes
    kept, images = [], 0
    for output in passes:
        kept.append(output)
        images += len(output)
        if images >= count:
            return kept
    raise ValueError(
        f"images: {count} given, but layer {name!r} was observed for {images} only; "
        "pass those that went through the encoder"
    )


def spatial(name: str, tensor: Tensor, size: tuple[int, int]) -> Tensor:
    """A layer's output as (N, C, h, w): of convolutional maps, channels-last maps (Swin) or tokens.

    Class and register tokens, which come first, are dropped. The others are taken to lie row by row, as in timm's
    ViTs; the early blocks of its Hiera order them otherwise.

    Raises:
        ValueError: No spatial extent: a vector or a single place an image.
    """
    if tensor.ndim == 3:
        height, width = _token_grid(tensor.shape[1], size)
        tensor = tensor[:, tensor.shape[1] - height * width :].transpose(1, 2).unflatten(2, (height, width))
    elif tensor.ndim == 4 and _distortion(tensor.shape[1:3], size) < _distortion(tensor.shape[2:], size):
        tensor = tensor.permute(0, 3, 1, 2)
    if tensor.ndim != 4 or tensor.shape[2] * tensor.shape[3] <= 1:
        raise ValueError(
            f"layers: {name!r} has no spatial extent (output {tuple(tensor.shape)} for images of {size[0]}x{size[1]}); "
            "choose an earlier layer"
        )
    return tensor


def _distortion(extent: Sequence[int], size: tuple[int, int]) -> float:
    """How far a map's aspect ratio is from the image's; strides that do not divide the image leave a little."""
    return abs(extent[0] * size[1] - extent[1] * size[0]) / (extent[0] * extent[1])


def _token_grid(tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """The largest grid of the image's aspect ratio that so many tokens can fill; the rest are class and registers."""
    for height in range(int((tokens * size[0] / size[1]) ** 0.5) + 1, 0, -1):
        width = round(height * size[1] / size[0])
        if height * width <= tokens:
            return height, width
    return 1, 1


def _resolve(attribution: str | AttributionFunction) -> AttributionFunction:
    if callable(attribution):
        return attribution
    if attribution not in METHODS:
        raise ValueError(f"attribution must be one of {', '.join(METHODS)} or a function, got {attribution!r}")
    return METHODS[attribution]


def _checked(maps: Tensor, activation: Tensor, attribution: str | AttributionFunction) -> Tensor:
    expected = (activation.shape[0], *activation.shape[2:])
    if maps.shape != expected:
        raise ValueError(f"attribution: {attribution!r} must return maps of shape {expected}, got {tuple(maps.shape)}")
    if maps.device.type == "cpu" and maps.isnan().any():
        raise ValueError(
            f"attribution: NaN in the map of {int(maps.isnan().any((1, 2)).sum())} of {len(maps)} images; "
            "is the loss finite?"
        )
    return maps
