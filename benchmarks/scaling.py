"""How the cost of GradMix grows with image size, batch and observed layers, what observing holds on to, and processes.

SimCLR, GradMix against a plain third view as in step_cost.py. "Held" are the bytes of activations that observing alone
keeps: those that the backward pass needs anyway do not count. Processes share a global batch, by gloo on a CPU and nccl
on GPUs; that they train to the same weights is shown by the tests.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --device cuda --backbone resnet18_small --batches 64 256 1024
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

import timing
import torch
from step_cost import Step
from torch import Tensor

from ssl_gradmix import GradMix
from ssl_gradmix.methods.simclr import SimCLR


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--backbone", default="resnet10_tiny", help="any timm model (default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 224])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--layers", nargs="+", default=["layer4", "layer3", "layer2"], help="taken one more at a time")
    parser.add_argument("--batch", type=int, default=16, help="images a step where that is not varied")
    parser.add_argument("--global-batch", type=int, default=128, help="images a step of all processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.kwargs, options.size = {}, 32
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.child:
        return one_of_several(options)
    print(f"{options.backbone}, {options.precision}, {options.rounds} rounds, {timing.origin(options.device)}\n")
    header = ["size", "batch", "layers", "third view, ms", "GradMix, ms", "ratio, wall", "ratio, processor", "held"]
    rows = [cost(options, size=size) for size in options.sizes]
    rows += [cost(options, batch=batch) for batch in options.batches]
    rows += [cost(options, layers=options.layers[: i + 1]) for i in range(len(options.layers))]
    print(timing.table(header, rows), flush=True)
    print(f"\nGlobal batch of {options.global_batch}\n\n{processes(options)}")


def cost(options: argparse.Namespace, size: int = 32, batch: int | None = None, layers: list[str] | None = None):
    """A row of the table: one setting changed."""
    layers = layers or ["layer3"]
    varied = argparse.Namespace(**vars(options) | {"size": size, "batch": batch or options.batch})
    plain = Step(SimCLR, None, 3, varied)
    mixed = Step(SimCLR, GradMix(layers=layers), 2, varied)
    taken = timing.take_turns({"plain": plain, "mixed": mixed}, options.rounds, options.device)
    return [
        str(size),
        str(varied.batch),
        ", ".join(layers),
        *(timing.median_ms(taken[name].wall) for name in ("plain", "mixed")),
        timing.ratio(taken["mixed"].wall, taken["plain"].wall),
        timing.ratio(taken["mixed"].processor, taken["plain"].processor),
        held(mixed, layers),
    ]


def held(step: Step, layers: list[str]) -> str:
    """Bytes that the observed outputs add to what autograd saves for the backward pass, and the latter."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        step.method.gradmix.observe(step.method.backbone) as observed,
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        kept = step.method.projector(step.method.backbone(torch.cat(step.views)))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for name in layers for t in observed[name]}
    added = sum(size for pointer, size in storages.items() if pointer not in saved)
    del kept
    return f"{added / 2**20:.1f} MiB beside {sum(saved.values()) / 2**20:.0f}"


def processes(options: argparse.Namespace) -> str:
    """Time of a step of the global batch, by number of processes, each with one thread on a CPU."""
    rows = []
    for count in options.processes:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if not options.device.startswith("cuda"):
            environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, *launcher, __file__, *sys.argv[1:], "--child"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        milliseconds = json.loads(done.stdout.splitlines()[-1])
        rows.append([str(count), f"{milliseconds:,.1f}", f"{options.global_batch / milliseconds * 1e3:,.0f}"])
    return timing.table(["processes", "ms a step", "images/s"], rows)


def one_of_several(options: argparse.Namespace) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator()
    options.device, options.batch = str(accelerator.device), options.global_batch // accelerator.num_processes
    if accelerator.device.type == "cpu":
        torch.set_num_threads(1)
    step = Step(SimCLR, GradMix(layers=["layer3"]), 2, options)
    step.method = accelerator.prepare(step.method)
    for _ in range(2):
        step()
    taken = [timing.seconds(step, options.device)[0] for _ in range(options.rounds)]
    if accelerator.is_main_process:
        print(json.dumps(1e3 * statistics.median(taken)))
    accelerator.end_training()


if __name__ == "__main__":
    main()
