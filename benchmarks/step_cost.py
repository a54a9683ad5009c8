"""What GradMix costs: a training step against the same step with a plain third view, with as many encoder passes.

Steps of both are timed in turn, so that a machine that slows down slows both; ratios are taken pair by pair, of the
time that passes and of the processor's time, which other programs on the machine disturb less. Making the views is left
out, in the plain third view's favour: it would have to be augmented, while the mixed view is not.

python benchmarks/step_cost.py --backbone resnet18_small --batch 32 --pairs 15
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ssl_gradmix import GradMix, backbones
from ssl_gradmix.methods.byol import BYOL
from ssl_gradmix.methods.simclr import SimCLR

METHODS = {"simclr": SimCLR, "byol": BYOL}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--backbone", default="resnet18_small", help="any timm model (default: %(default)s)")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="images a step (default: %(default)s)")
    parser.add_argument("--layers", nargs="+", default=["layer3"], help="observed layers (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=15, help="timed pairs (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    print(
        f"{options.backbone}, {options.size} px, batch {options.batch}, {options.precision}, {options.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {options.pairs} pairs"
    )
    for name in options.method:
        plain = step(METHODS[name], None, options)
        mixed = step(METHODS[name], GradMix(layers=options.layers), options)
        compare(f"{name}, layers {' '.join(options.layers)}", mixed, plain, options)


def step(kind: type, gradmix: GradMix | None, options: argparse.Namespace) -> Callable[[], None]:
    """One optimiser step of a method, on views that stay the same."""
    torch.manual_seed(0)
    backbone = backbones.create(options.backbone)
    method = kind(backbone, backbones.num_features(backbone), gradmix=gradmix)
    method.to(options.device, memory_format=torch.channels_last)
    optimiser = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.01, momentum=0.9)
    images = torch.randn(2 if gradmix else 3, options.batch, 3, options.size, options.size, device=options.device)
    views: list[Tensor] = [view.contiguous(memory_format=torch.channels_last) for view in images]

    def run() -> None:
        optimiser.zero_grad()
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bfloat16"):
            losses = method(views)
        losses.total.backward()
        optimiser.step()

    return run


def compare(name: str, mixed: Callable[[], None], plain: Callable[[], None], options: argparse.Namespace) -> None:
    """Prints medians and the median ratio of the pairs, with its range."""
    for warm_up in (mixed, plain, mixed, plain):
        warm_up()
    pairs = []
    for pair in range(options.pairs):
        order = (mixed, plain) if pair % 2 else (plain, mixed)
        taken = {run: seconds(run, options.device) for run in order}
        pairs.append((taken[mixed], taken[plain]))
    print(name)
    for clock, label in enumerate(("wall", "processor")):
        ratios = sorted(one[clock] / two[clock] for one, two in pairs)
        ours, theirs = (statistics.median(pair[which][clock] for pair in pairs) for which in (0, 1))
        print(
            f"  {label:<10} GradMix {ours * 1e3:8.1f} ms   plain third view {theirs * 1e3:8.1f} ms   "
            f"ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )


def seconds(run: Callable[[], None], device: str) -> tuple[float, float]:
    """Wall and processor time of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


if __name__ == "__main__":
    main()
