"""Where a loss looks: activations of a few layers and the loss's gradient there, made into one map an image.

Depends on torch alone, so that any training loop can take it.
"""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

AttributionFunction = Callable[[Tensor, Tensor], Tensor]
"""`(activation (N, C, h, w), gradient (N, C, h, w)) -> map (N, h, w)`; gradients are known up to a constant factor."""

Target = Literal["agreement", "loss"]

SCALE = 2.0**12
"""Of gradients: those of a mean over a batch underflow where they pass through half precision on their way; maps are
normalized, so that a constant factor is free."""

ROUNDING = 1e-6
"""A map is flat where its range is no more than this share of its largest absolute value: float32 rounds by 1e-7."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Modules that, unless they are subclasses, only hold others."""

NOTHING_RAN = "observed: nothing ran inside `observe`; run the encoder that it was given inside its `with` block"


class Observed(dict[str, list[Tensor]]):
    """What `observe` collects: for each layer its outputs, one a forward pass, in order.

    It holds on to the outputs, hence to their graph: let go of it after the step.

    Attributes:
        encoder: Weak reference to the observed module, without its wrappers; None where outputs were given by hand.
        inputs: The images (N, C, H, W) of each of the encoder's passes, None for a pass without any. Empty where its
            parts were called on their own, as by timm's `forward_features`.
        notes: For each output the encoder's passes so far, and its version, by which torch counts in-place operations.
        fails_outside: Whether `observe` is over and a further pass, compiled, cannot go backwards together with these.
    """

    def __init__(self, outputs: Mapping[str, list[Tensor]] = (), encoder: nn.Module | None = None) -> None:
        super().__init__(outputs)
        self.encoder = None if encoder is None else weakref.ref(encoder)
        self.inputs: list[Tensor | None] = []
        self.notes: dict[str, list[tuple[int, int]]] = {}
        self.fails_outside = False

    def recorder(self, name: str) -> Callable[[nn.Module, tuple, object], None]:
        """A forward hook that remembers a layer's outputs; of a tuple, the first, as transformers' blocks return it."""

        def record(module: nn.Module, args: tuple, output: object) -> None:
            output = output[0] if isinstance(output, tuple) and output else output
            if isinstance(output, Tensor) and output.ndim:
                self.setdefault(name, []).append(output)
                if not torch.compiler.is_compiling():  # a compiled stage has its hooks compiled too
                    self.notes.setdefault(name, []).append((len(self.inputs), _version(output)))

        return record

    def note_input(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook of the encoder."""
        images = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim == 4)
        self.inputs.append(next(images, None))

    def modules(self) -> dict[str, nn.Module]:
        """The observed encoder's modules by name; none where it is not known."""
        encoder = self.encoder and self.encoder()
        return {} if encoder is None else dict(encoder.named_modules())

    def problem(self, name: str) -> str | None:
        """Why a layer cannot be attributed at, with the way out: it did not run, ran twice, or was changed in place."""
        passes, notes = self.get(name), self.notes.get(name, [])
        parent = name.rpartition(".")[0]
        if not passes:
            if not self.inputs and not any(self.values()):
                return NOTHING_RAN
            blocks = [block for block, _ in self.modules().get(name, nn.Module()).named_children()]
            way = f"a checkpointed encoder calls its blocks: try {name}.{blocks[-1]}" if blocks else "name another"
            return f"layers: {name!r} did not run inside `observe`, or gave no tensor; {way}"
        noted = list(zip(passes, notes, strict=True)) if len(passes) == len(notes) else []
        if any(_version(output) != version for output, (_, version) in noted):
            modules = self.modules()
            later = list(modules)[[*modules, name].index(name) :]
            beside = (each for each in later if each.rpartition(".")[0] == parent)
            changing = (each for each in beside if getattr(modules[each], "inplace", False))
            way = next(changing, parent or "another layer")
            return f"layers: an in-place operation behind {name!r} has changed what it gave; name {way!r} instead"
        for number, images in enumerate(self.inputs, 1):
            outputs = sum(len(output) for output, (pass_, _) in noted if pass_ == number)
            if images is not None and outputs > len(images):
                return (
                    f"layers: {name!r} gave {outputs} outputs for {len(images)} images, as it runs more than once an "
                    f"image or cuts images up; name {parent or 'another layer'!r}, or what else runs once"
                )
        return None

    def check_images(self, images: Tensor, values: bool) -> None:
        """Raises ValueError for images (N, C, H, W) that are not the first through the encoder, as far as is known.

        Values are compared, if asked for, where the memory is not the same; on an accelerator the host waits.
        """
        for given in self.inputs:
            if given is None or not len(images):
                return
            part, images = images[: len(given)], images[len(given) :]
            first = given[: len(part)].detach()
            alike = first.shape == part.shape and first.device == part.device
            if not alike or (values and not _same_values(first, part)):
                raise ValueError(
                    f"images: these of {tuple(part.shape)} on {part.device} are not those of {tuple(first.shape)} on "
                    f"{first.device} that went through the encoder first inside `observe`; pass those, as the "
                    "attribution is theirs, or observe the module that gets these"
                )


@contextmanager
def observe(encoder: nn.Module, layers: Sequence[str] | None = None) -> Iterator[Observed]:
    """Remembers the outputs of some layers, every forward pass in order, for as long as the context lasts.

    An encoder that `torch.compile` compiled as a whole runs eagerly here, as its graph hides inner activations from
    autograd. With BatchNorm in training mode its pass of the mixed views then belongs inside the context too. Compiled
    stages can be observed as they are (`encoder.layer3 = torch.compile(encoder.layer3)`); those behind an observed
    layer go backwards twice, but by `GradMix.early`, for which `torch._functorch.config.donated_buffer = False` is set
    before the first pass.

    Args:
        encoder: The module whose layers are observed; may be wrapped by DistributedDataParallel or `torch.compile`.
        layers: Names as in `encoder.named_modules()` of the module inside the wrapper. None observes every stage and
            block, modules that have children or stand in a Sequential or ModuleList, or every module where none does.

    Yields:
        The outputs by layer, in the order in which layers finish where `layers` is None.

    Raises:
        KeyError: A layer that the encoder has not; the message lists near names.
    """
    inner = unwrap(encoder)
    modules = dict(inner.named_modules())
    held = [name for name in modules if name and type(modules[name.rpartition(".")[0]]) in CONTAINERS]
    del modules[""]
    observed = Observed({name: [] for name in layers or []}, inner)
    if layers is None:
        stages = {name: None for name, module in modules.items() if next(module.children(), None) is not None}
        layers = list(stages | dict.fromkeys(held)) or list(modules)
    for name in layers:
        if name not in modules:
            near = difflib.get_close_matches(name, modules, n=5, cutoff=0.3) or list(modules)[:5]
            raise KeyError(f"layers: the encoder has no layer {name!r}; near names are {', '.join(near)}")
    with ExitStack() as stack:
        if is_compiled(encoder):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            fails = any(isinstance(each, _BatchNorm) and each.training for each in modules.values())
            stack.callback(setattr, observed, "fails_outside", fails)  # when the context ends
        stack.callback(inner.register_forward_pre_hook(observed.note_input, with_kwargs=True).remove)
        for name in layers:
            stack.callback(modules[name].register_forward_hook(observed.recorder(name)).remove)
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
    module = module.module if isinstance(module, DistributedDataParallel | DataParallel) else module
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _version(output: Tensor) -> int:
    return 0 if output.is_inference() else output._version


def _same_values(first: Tensor, second: Tensor) -> bool:
    if first.data_ptr() == second.data_ptr() and first.stride() == second.stride() and first.dtype == second.dtype:
        return True
    coarse = max(first.dtype, second.dtype, key=lambda dtype: torch.finfo(dtype).eps)  # one was rounded on its way
    return torch.allclose(first.to(coarse), second.to(coarse), rtol=0, atol=0, equal_nan=True)


def layercam(activation: Tensor, gradient: Tensor) -> Tensor:
    """`sum_c A_c * relu(smooth(G)_c)` at every place: LayerCAM, Jiang et al. 2021, IEEE TIP 30, of smoothed gradients.

    From activation (N, C, h, w) and gradient (N, C, h, w) to maps (N, h, w), not normalized. Smoothing keeps a stride's
    grid out of the map, see `smooth`; ahead of global pooling it changes nothing. LayerCAM's outer relu is left out:
    after a ReLU layer it changes nothing, and tokens of a transformer may be negative, where the ranks still count.
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
        Maps (N, H, W) in [0, 1], float32. A flat map is all zero, and so is one that has a NaN or an infinity.

    Raises:
        ValueError: A loss that is no scalar or went backwards already, a layer that its gradient does not reach, that
            has no spatial extent, did not run or was changed in place, fewer images than `count`.
    """
    if target not in ("agreement", "loss"):
        raise ValueError(f"target must be 'agreement' or 'loss', got {target!r}")
    if not callable(attribution) and attribution not in METHODS:
        raise ValueError(f"attribution must be one of {', '.join(METHODS)} or a function, got {attribution!r}")
    for name in activations if isinstance(activations, Observed) else ():
        if problem := activations.problem(name):
            raise ValueError(problem)
    outputs = {name: first_images(name, passes, count) for name, passes in activations.items()}
    return summed_maps(outputs, gradients(loss, outputs)[0], size, count, attribution, target)


def summed_maps(
    outputs: Mapping[str, Sequence[Tensor]],
    taken: Mapping[str, Sequence[Tensor | None]],
    size: tuple[int, int],
    count: int | None,
    attribution: str | AttributionFunction,
    target: Target,
) -> Tensor:
    """The maps of `attribute` (N, H, W) from the layers' outputs and the loss's gradients there."""
    function = attribution if callable(attribution) else METHODS[attribution]
    total = 0
    for name, passes in outputs.items():
        if all(part is None for part in taken[name]):
            raise ValueError(
                f"layers: no gradient reaches {name!r}: it is frozen, or the loss does not depend on it; leave it out"
            )
        parts = [
            torch.zeros_like(output) if part is None else part for output, part in zip(passes, taken[name], strict=True)
        ]
        activation, gradient = (
            spatial(name, torch.cat(tensors)[:count].detach(), size).float() for tensors in (passes, parts)
        )
        maps = function(activation, gradient if target == "loss" else -gradient)
        if maps.shape != (expected := (activation.shape[0], *activation.shape[2:])):
            raise ValueError(
                f"attribution: {attribution!r} must return maps of shape {expected}, got {tuple(maps.shape)}"
            )
        total = total + upscale(maps, size)
    return normalize(total)


def gradients(
    loss: Tensor, outputs: Mapping[str, Sequence[Tensor]], leaves: Sequence[Tensor] = ()
) -> tuple[dict[str, list[Tensor | None]], tuple[Tensor | None, ...]]:
    """The gradients of the loss, times `SCALE`, at each output and at each leaf; None where it does not depend on it.

    The graph is kept, unless there are leaves.

    Raises:
        ValueError: A loss that is no scalar, whose gradient reaches none of the outputs, or that went backwards
            already; a compiled stage that allows no second backward pass, see `observe`.
    """
    if loss.numel() != 1:
        raise ValueError(f"loss must be a scalar, got shape {tuple(loss.shape)}; reduce it over the batch first")
    flat = [output for passes in outputs.values() for output in passes]
    reached = [output for output in flat if output.requires_grad]
    if not flat:
        raise ValueError(NOTHING_RAN)
    if not loss.requires_grad or not reached:
        raise ValueError(
            f"loss: gradients are off between it and the observed layers {_last(outputs)}; run both outside "
            "torch.no_grad(), with parameters that require grad, and detach nothing"
        )
    try:
        with torch.autocast(loss.device.type, enabled=False):  # backward passes do not belong under it
            taken = torch.autograd.grad(
                loss, [*reached, *leaves], torch.full_like(loss, SCALE), retain_graph=not leaves, allow_unused=True
            )
    except RuntimeError as error:
        for part, message in GRAPH_ERRORS.items():
            if part in str(error):
                raise ValueError(message) from error
        raise
    at_outputs, at_leaves = taken[: len(reached)], taken[len(reached) :]
    if all(gradient is None for gradient in at_outputs):
        raise ValueError(
            f"loss does not depend on the observed layers {_last(outputs)}; compute it from what this encoder gave "
            "inside `observe`, and do not compile the whole step, which hides them"
        )
    found = dict(zip(map(id, reached), at_outputs, strict=True))
    return {name: [found.get(id(output)) for output in passes] for name, passes in outputs.items()}, at_leaves


def leaves_of(loss: Tensor) -> list[Tensor]:
    """The parameters, and other leaves, that a backward pass from the loss reaches."""
    seen, ahead = dict.fromkeys([None]), [loss.grad_fn]  # in place of a set, whose order varies
    while ahead:
        if (node := ahead.pop()) not in seen:
            seen[node] = None
            ahead += [following for following, _ in node.next_functions]
    return [node.variable for node in seen if isinstance(node, torch._C._functions.AccumulateGrad)]


class EarlyLoss(torch.autograd.Function):
    """A detached loss whose backward hands out gradients at leaves that were taken before, times `SCALE`.

    `nodes` are some of the graph that is gone: a mixed loss may not go backwards through it.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, nodes: Sequence[Node], scaled: Sequence[Tensor], *leaves: Tensor) -> Tensor:
        ctx.nodes = nodes
        ctx.save_for_backward(*scaled)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        if any(torch._C._will_engine_execute_node(node) for node in ctx.nodes):
            raise ValueError(
                "loss: the mixed views' loss sends a gradient into the graph that gradmix.early(...) has freed; detach "
                "what it takes from there, or use gradmix(...)"
            )
        return None, None, None, *torch._foreach_mul(ctx.saved_tensors, incoming / SCALE)


GRAPH_ERRORS = {
    "a second time": "loss: it went backwards already, which frees its graph; call gradmix(...) before loss.backward()",
    "donated buffer": "encoder: a stage behind an observed layer was compiled in a way that allows a single backward "
    "pass; set torch._functorch.config.donated_buffer = False before its first forward pass, or use gradmix.early(...)",
}
"""What to do about torch's errors of a graph, by a part of their text."""


def _last(outputs: Mapping[str, object]) -> str:
    names = list(outputs)
    return ("..., " if len(names) > 4 else "") + ", ".join(names[-4:])


def normalize(maps: Tensor) -> Tensor:
    """Min-max per image to [0, 1]; a map that is flat up to rounding, or not finite, becomes zero."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    smallest = (ROUNDING * torch.maximum(low.abs(), high.abs())).clamp_min(torch.finfo(maps.dtype).tiny)
    return torch.where(high - low > smallest, (maps - low) / (high - low), 0)  # false where one is NaN or infinite


def upscale(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Normalized maps (N, h, w) resized to (N, H, W), bilinear."""
    return F.interpolate(normalize(maps)[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def first_images(name: str, passes: Sequence[Tensor], count: int | None) -> list[Tensor]:
    """The forward passes that hold the first `count` images."""
    if count is None:
        return list(passes)
    images = 0
    for end, output in enumerate(passes, 1):
        images += len(output)
        if images >= count:
            return list(passes[:end])
    raise ValueError(
        f"images: {count} given, but layer {name!r} was observed for {images} only; pass those that went through the "
        "encoder"
    )


def spatial(name: str, tensor: Tensor, size: tuple[int, int]) -> Tensor:
    """A layer's output as (N, C, h, w): of convolutional maps, channels-last maps (Swin) or tokens.

    Class and register tokens, which come first, are dropped. The others are taken to lie row by row, as in timm's
    ViTs; the early blocks of its Hiera order them otherwise. A vector, or a single place an image, raises ValueError.
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
