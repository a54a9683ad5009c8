"""What GradMix costs: a training step against the same step with a plain third view, with as many encoder passes.

Steps are timed in turn, on views that stay the same. Making views is left out, in the plain third view's favor: it
would have to be augmented, while the mixed view is not. FLOPs, operations (views of tensors left out) and the peak of
memory, beside parameters, optimizer state and views, are counted in a further step and repeat exactly. On a GPU the
step runs once under `torch.cuda.set_sync_debug_mode("error")`, which raises wherever the host waits for the device.

    python benchmarks/step_cost.py
    python benchmarks/step_cost.py --backbone resnet50_small --batch 16
    python benchmarks/step_cost.py --backbone vit_small_patch16_224 --kwargs '{"img_size": 32, "patch_size": 4}' \\
        --layers blocks.8 blocks.5
    python benchmarks/step_cost.py --profile       where the time of a step goes
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import NamedTuple

import timing
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ssl_gradmix import GradMix, attribution, backbones
from ssl_gradmix import gradmix as gradmix_module
from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.methods.byol import BYOL
from ssl_gradmix.methods.simclr import SimCLR
from ssl_gradmix.methods.supcon import SupCon
from ssl_gradmix.settings import Augmentation

METHODS = {"simclr": SimCLR, "byol": BYOL, "supcon": SupCon}
PARTS = ("views", "forward", "attribution", "mixing", "backward", "optimizer")


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--method", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--backbone", default="resnet18_small", help="any timm model (default: %(default)s)")
    parser.add_argument("--kwargs", type=json.loads, default={}, help="the model's own arguments, as JSON")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[32], help="images a step (default: %(default)s)")
    parser.add_argument(
        "--layers",
        nargs=2,
        default=["layer3", "layer2"],
        help="observed layers: the first alone, then both (default: %(default)s)",
    )
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes, in place of ratios")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(
        f"{options.backbone}, {options.size} px, {options.precision}, {options.rounds} rounds, "
        f"{timing.origin(options.device)}\n"
    )
    report = profile if options.profile else ratios
    for name, batch in itertools.product(options.method, options.batch):
        options.batch = batch
        print(f"{name}, batch {batch}\n\n{report(METHODS[name], options)}\n", flush=True)


def ratios(kind: type[nn.Module], options: argparse.Namespace) -> str:
    """Times of the steps, and their ratios to a plain third view."""
    first, second = options.layers
    third = "plain third view"
    steps = {
        "two views": Step(kind, None, 2, options),
        third: Step(kind, None, 3, options),
        "GradMix, layers=None": Step(kind, GradMix(), 2, options),
        f"GradMix, {first}": Step(kind, GradMix(layers=[first]), 2, options),
        f"GradMix, {first} and {second}": Step(kind, GradMix(layers=[first, second]), 2, options),
    }
    taken = timing.take_turns(steps, options.rounds, options.device)
    counts = {name: step.counts() for name, step in steps.items()}
    if options.device.startswith("cuda"):
        for step in steps.values():
            step.without_waiting()
    rows = [
        [
            name,
            timing.median_ms(times.wall),
            timing.ratio(times.wall, taken[third].wall),
            timing.ratio(times.processor, taken[third].processor),
            f"{counts[name].flops / 1e9:,.1f}",
            f"{counts[name].flops / counts[third].flops:.4f}",
            f"{counts[name].operations:,}",
            f"{counts[name].peak / 2**20:,.0f}",
            f"{counts[name].peak / counts[third].peak:.3f}",
        ]
        for name, times in taken.items()
    ]
    header = ["step", "ms", "ratio, wall", "ratio, processor", "GFLOP", "ratio", "operations", "peak, MiB", "ratio"]
    return timing.table(header, rows)


def profile(kind: type[nn.Module], options: argparse.Namespace) -> str:
    """Share of each part in a step with GradMix; views are made on the device. A GPU is waited for after each part."""
    step = Step(kind, GradMix(layers=options.layers[:1]), 2, options)
    taking = "backward" if kind is BYOL else "attribution"  # BYOL's pair goes backwards once, and early
    parts = Parts(options.device)
    make_views = Views(Augmentation(), options.size, (0.5,) * 3, (0.25,) * 3).to(options.device)
    images = torch.randint(256, (options.batch, 3, options.size, options.size), dtype=torch.uint8).to(options.device)

    def once() -> None:
        with parts.measured("views"):
            step.views = [v.contiguous(memory_format=torch.channels_last) for v in make_views(images, 2)]
        step.optimizer.zero_grad()
        with parts.measured("forward"):
            losses = step.forward()
        with parts.measured("backward"):
            losses.total.backward()
        with parts.measured("optimizer"):
            step.optimizer.step()

    once()
    step.method.gradmix._mix_box = parts.watch("mixing", step.method.gradmix._mix_box)
    gradmix_module.gradients = parts.watch(taking, attribution.gradients)
    gradmix_module.summed_maps = parts.watch("attribution", attribution.summed_maps)
    try:
        parts.spent.clear()
        for _ in range(options.rounds):
            once()
    finally:
        gradmix_module.gradients, gradmix_module.summed_maps = attribution.gradients, attribution.summed_maps
    total = sum(parts.spent.values())
    rows = [[p, f"{parts.spent[p] / options.rounds * 1e3:,.1f}", f"{parts.spent[p] / total:.1%}"] for p in PARTS]
    return timing.table([f"part, GradMix at {options.layers[0]}", "ms", "share"], rows)


class Counts(NamedTuple):
    """Of a step: FLOPs of convolutions and matrix products, operations, and the most bytes that its tensors take."""

    flops: int
    operations: int
    peak: int


class Meter(TorchDispatchMode):
    """Counts operations, and the bytes of tensors that are made until they are freed; some are there before."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.operations = self.peak = self._bytes = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        made = func(*args, **(kwargs or {}))
        self.operations += not func.is_view
        for each in tree_leaves(made):
            self._note(each)
        return made

    def _note(self, tensor: object) -> None:
        if isinstance(tensor, Tensor) and (key := (storage := tensor.untyped_storage())._cdata) not in self._alive:
            self._alive.add(key)
            self._bytes += storage.nbytes()
            self.peak = max(self.peak, self._bytes)
            weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._alive.remove(key)
        self._bytes -= size


class Step:
    """One optimizer step of a method, on random views that stay the same."""

    def __init__(self, kind: type[nn.Module], gradmix: GradMix | None, n_views: int, options: argparse.Namespace):
        torch.manual_seed(0)
        backbone = backbones.create(options.backbone, **options.kwargs)
        self.method = kind(backbone, backbones.num_features(backbone), gradmix=gradmix)
        self.method.to(options.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD([p for p in self.method.parameters() if p.requires_grad], 0.01, momentum=0.9)
        images = torch.randn(n_views, options.batch, 3, options.size, options.size, device=options.device)
        self.views = [view.contiguous(memory_format=torch.channels_last) for view in images]
        self.labels = torch.arange(options.batch, device=options.device) % 10  # for methods that take labels
        self.autocast = {
            "device_type": options.device.split(":")[0],
            "dtype": torch.bfloat16,
            "enabled": options.precision == "bfloat16",
        }

    def forward(self):
        with torch.autocast(**self.autocast):
            return self.method(self.views, self.labels)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.forward().total.backward()
        self.optimizer.step()

    def counts(self) -> Counts:
        """What a step takes, once its optimizer has a state."""
        self.optimizer.zero_grad()
        state = tree_leaves(list(self.optimizer.state.values()))
        before = (*self.method.parameters(), *self.method.buffers(), *self.views, *state)
        with FlopCounterMode(display=False) as counter, Meter(before) as meter:
            self()
        return Counts(counter.get_total_flops(), meter.operations, meter.peak)

    def without_waiting(self) -> None:
        """Raises where the host waits for the GPU."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            self()
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Parts:
    """Time spent in named parts; what is spent in a part inside another counts for the inner one alone."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.spent: dict[str, float] = defaultdict(float)
        self._inside: list[str] = []

    @contextmanager
    def measured(self, part: str) -> Iterator[None]:
        timing.synchronize(self.device)
        began = time.perf_counter()
        self._inside.append(part)
        yield
        timing.synchronize(self.device)
        self._inside.pop()
        seconds = time.perf_counter() - began
        self.spent[part] += seconds
        if self._inside:
            self.spent[self._inside[-1]] -= seconds

    def watch(self, part: str, function: Callable) -> Callable:
        @wraps(function)
        def watched(*args: object, **kwargs: object) -> object:
            with self.measured(part):
                return function(*args, **kwargs)

        return watched


if __name__ == "__main__":
    main()
