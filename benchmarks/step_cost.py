"""What GradMix costs: a training step against the same step with a plain third view.

Both have the same number of encoder passes. The steps take turns, on views that stay the same, so
that a machine that slows down slows all of them. FLOPs repeat exactly. On a GPU one more step runs
under `torch.cuda.set_sync_debug_mode("error")`, which raises where the host waits for the device.

    python benchmarks/step_cost.py
    python benchmarks/step_cost.py --backbone resnet50_small --batch 16
    python benchmarks/step_cost.py --backbone vit_small_patch16_224 --layers blocks.8 \\
        --kwargs '{"img_size": 32, "patch_size": 4}'
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from ssl_gradmix import GradMix, backbones
from ssl_gradmix.adaptive import Adaptive
from ssl_gradmix.methods import METHODS

PLAIN = "plain third view"


class Step:
    """One optimizer step of a method on random views."""

    def __init__(
        self, name: str, gradmix: GradMix | None, n_views: int, options: argparse.Namespace
    ) -> None:
        torch.manual_seed(0)
        backbone = backbones.create(options.backbone, **options.kwargs)
        features = backbones.num_features(backbone)
        adaptive = Adaptive() if gradmix is not None and n_views == 3 else None
        self.method = METHODS[name](backbone, features, gradmix=gradmix, adaptive=adaptive)
        self.method.to(options.device, memory_format=torch.channels_last)
        weights = [each for each in self.method.parameters() if each.requires_grad]
        self.optimizer = torch.optim.SGD(weights, 0.01, momentum=0.9)
        shape = (n_views, options.batch, 3, options.size, options.size)
        images = torch.randn(shape, device=options.device)
        self.views = [view.contiguous(memory_format=torch.channels_last) for view in images]
        self.labels = torch.arange(options.batch, device=options.device) % 10
        self.device = options.device
        self.bf16 = options.precision == "bf16"

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.bf16):
            loss, _ = self.method(self.views, self.labels)
        loss.backward()
        self.optimizer.step()

    def seconds(self) -> tuple[float, float]:
        """Wall and processor time of a step; other programs disturb the latter less."""
        began = time.perf_counter(), time.process_time()
        self()
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - began[0], time.process_time() - began[1]

    def flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            self()
        return counter.get_total_flops()

    def check_synchronization(self) -> None:
        """Raises RuntimeError where the host waits for the GPU."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            self()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def take_turns(steps: dict[str, Step], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Times every step once a round, in an order that rotates, after two rounds to warm up."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(-2, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds = steps[name].seconds()
            if turn >= 0:
                taken[name].append(seconds)
    return taken


def ratio(ours: list[tuple[float, float]], theirs: list[tuple[float, float]], clock: int) -> str:
    """The median of the rounds' ratios, with their range."""
    ratios = sorted(a[clock] / b[clock] for a, b in zip(ours, theirs, strict=True))
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"


def table(name: str, options: argparse.Namespace) -> str:
    """Times and FLOPs of the steps of a method as Markdown."""
    steps = {
        "two views": Step(name, None, 2, options),
        PLAIN: Step(name, None, 3, options),
        "random box": Step(name, GradMix(region="random"), 2, options),
        f"GradMix, {', '.join(options.layers)}": Step(name, GradMix(options.layers), 2, options),
        "adaptive": Step(name, GradMix(options.layers), 3, options),
    }
    taken = take_turns(steps, options.rounds)
    flops = {key: step.flops() for key, step in steps.items()}
    if options.device.startswith("cuda"):
        for step in steps.values():
            step.check_synchronization()
    lines = [
        f"| {name}, batch {options.batch} | ms | ratio, wall | ratio, processor | FLOPs, ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    for key, times in taken.items():
        milliseconds = 1000 * statistics.median(wall for wall, _ in times)
        wall, processor = (ratio(times, taken[PLAIN], clock) for clock in (0, 1))
        share = flops[key] / flops[PLAIN]
        lines.append(f"| {key} | {milliseconds:,.1f} | {wall} | {processor} | {share:.4f} |")
    return "\n".join(lines)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--method", choices=METHODS, nargs="+", default=list(METHODS))
    add("--backbone", default="resnet18_small", help="any timm model (default: %(default)s)")
    add("--kwargs", type=json.loads, default={}, help="the model's own arguments, as JSON")
    add("--size", type=int, default=32, help="side of the images in pixels (default: %(default)s)")
    add("--batch", type=int, default=32, help="images per step (default: %(default)s)")
    add("--layers", nargs="+", default=["layer3"], help="observed layers (default: %(default)s)")
    add("--precision", choices=["float32", "bf16"], default="float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    add("--rounds", type=int, default=9, help="timed rounds (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = f"{options.threads} threads"
    if options.device.startswith("cuda"):
        where = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{options.backbone}, {options.size} px, {options.precision}, {where}, {versions}")
    print(f"{options.rounds} rounds, {time.strftime('%F')}")
    for name in options.method:
        print(f"\n{table(name, options)}", flush=True)


if __name__ == "__main__":
    main()
