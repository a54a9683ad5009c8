"""The floor of a training step: its operations over the machine's measured matrix rate, its bytes over the bandwidth.

Operations of the convolutions and matrix products of a SimCLR step with GradMix, counted by torch; bytes of the
activations that the backward pass reads again, each written once and read once. Neither overlaps perfectly, and small
channels do not fill matrix units, so a step at a third of the floor's speed is no defect by itself.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --device cpu --batch 32
"""

from __future__ import annotations

import argparse

import timing
import torch
from step_cost import Step
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ssl_gradmix import GradMix
from ssl_gradmix.methods.simclr import SimCLR


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--backbone", default="resnet18_small", help="any timm model (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=512, help="images a step (default: %(default)s)")
    parser.add_argument("--layers", nargs="+", default=["layer3"])
    options = parser.parse_args()
    options.kwargs, options.size = {}, 32
    on_gpu = options.device.startswith("cuda")
    options.precision = "bfloat16" if on_gpu else "float32"
    if options.threads:
        torch.set_num_threads(options.threads)
    step = Step(SimCLR, GradMix(layers=options.layers), 2, options)
    rate, bandwidth = matrix_rate(options), memory_bandwidth(options)
    operations, moved = counted(step)
    taken = sorted(timing.take_turns({"step": step}, options.rounds, options.device)["step"].wall)[options.rounds // 2]
    floor = max(operations / rate, moved / bandwidth)
    print(f"{options.backbone}, 32 px, batch {options.batch}, {options.precision}, {timing.origin(options.device)}\n")
    rows = [
        ["measured matrix rate", f"{rate / 1e12:.2f} TFLOP/s"],
        ["measured memory bandwidth", f"{bandwidth / 1e9:,.0f} GB/s"],
        ["operations of a step", f"{operations / 1e12:.3f} TFLOP: at least {operations / rate * 1e3:,.1f} ms"],
        [
            "activations of a step, written and read",
            f"{moved / 1e9:.2f} GB: at least {moved / bandwidth * 1e3:,.1f} ms",
        ],
        ["measured step", f"{taken * 1e3:,.1f} ms, {options.batch / taken:,.0f} images/s"],
        ["measured over floor", f"{taken / floor:.2f}"],
    ]
    print(timing.table(["", ""], rows))


def matrix_rate(options: argparse.Namespace) -> float:
    """Operations a second of the fastest of some large matrix products."""
    side = 8192 if options.device.startswith("cuda") else 2048
    a, b = torch.randn(2, side, side, device=options.device, dtype=getattr(torch, options.precision))
    taken = timing.take_turns({"product": lambda: a @ b}, options.rounds, options.device)["product"].wall
    return 2 * side**3 / min(taken)


def memory_bandwidth(options: argparse.Namespace) -> float:
    """Bytes a second of a copy, read and written."""
    source = torch.empty(
        2**30 if options.device.startswith("cuda") else 2**28, dtype=torch.uint8, device=options.device
    )
    target = torch.empty_like(source)
    taken = timing.take_turns({"copy": lambda: target.copy_(source)}, options.rounds, options.device)["copy"].wall
    return 2 * source.numel() / min(taken)


def counted(step: Step) -> tuple[int, int]:
    """Operations of one step, and bytes of what autograd saves in it, written and read."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        step()
    return counter.get_total_flops(), 2 * sum(saved.values())


if __name__ == "__main__":
    main()
