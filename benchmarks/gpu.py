"""Everything that is to be measured on a GPU, in parts of at most ten minutes each; done parts are skipped.

Each part is a command line that this script prints and runs; what it prints is kept in OUT/<part>.md, and a training
that runs out of time goes on where it stopped when the part is run again.

    python benchmarks/gpu.py --data data --out results/gpu            # all parts, CIFAR-10 as torchvision keeps it
    python benchmarks/gpu.py --data cifar10 --folder --out results/gpu --part simclr-200 --minutes 9.5
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import timing
import torch

HERE = Path(__file__).parent
STEP = [str(HERE / "step_cost.py"), "--precision", "bfloat16", "--rounds", "30"]
CIFAR = [
    *("--backbone.name", "resnet18_small", "--training.batch_size", "512", "--training.precision", "bf16"),
    *("--training.epochs", "200", "--training.knn_every", "20", "--optimizer.warmup_epochs", "10"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="where CIFAR-10 lies (default: %(default)s)")
    parser.add_argument("--folder", action="store_true", help="it lies there as class folders in train/ and test/")
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and runs")
    parser.add_argument("--part", nargs="+", help="only these; all by default")
    parser.add_argument("--minutes", type=float, default=9.5, help="of all parts together (default: %(default)s)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    print(timing.origin("cuda"))
    commands = parts(options)
    for name in options.part or commands:
        done = options.out / f"{name}.md"
        if done.exists():
            print(f"{name}: done, see {done}")
        elif time.monotonic() >= deadline:
            print(f"{name}: no time left, run it again")
        elif run(name, commands[name], done, deadline):
            print(f"{name}: written to {done}", flush=True)
        else:
            print(f"{name}: out of time or failed, run it again", flush=True)


def parts(options: argparse.Namespace) -> dict[str, list[str]]:
    """Command lines by name, the most wanted first."""
    data = ["--data.name", "folder" if options.folder else "cifar10", "--data.root", options.data]
    recipes = HERE.parent / "recipes"

    def train(recipe: str, name: str, *settings: str) -> list[str]:
        run = ["--run", str(options.out / name)]
        return [str(recipes / f"{recipe}_gradmix.py"), *data, *CIFAR, *settings, *run]

    small_vit = ["--backbone", "vit_small_patch16_224", "--kwargs", '{"img_size": 32, "patch_size": 4}']
    return {
        "roofline": [str(HERE / "roofline.py")],
        "step-resnet18": [*STEP, "--batch", "512"],
        "profile-resnet18": [*STEP, "--batch", "512", "--profile"],
        "throughput": [
            *(str(HERE / "throughput.py"), "--backbone", "resnet18_small", "--batch", "512", "--images", "50000"),
            *("--precision", "bf16", "--rounds", "3", "--rows", "step", "step NCHW", "step compiled", "step fused"),
            *("loop", "plain loop"),
        ],
        "simclr-200": train("simclr", "simclr-200", "--optimizer.lr", "0.12"),
        "augmentation": [str(HERE / "augmentation.py"), "--batch", "512"],
        "throughput-workers": [
            *(str(HERE / "throughput.py"), "--backbone", "resnet18_small", "--batch", "512", "--images", "25600"),
            *("--precision", "bf16", "--workers", str(len(os.sched_getaffinity(0))), "--rounds", "3"),
            *("--rows", "step", "loop workers", "loop pageable", "plain loop", "lightly"),
        ],
        "step-resnet50": [*STEP, "--batch", "256", "--backbone", "resnet50_small"],
        "step-vit": [*STEP, "--batch", "256", *small_vit, "--layers", "blocks.8", "blocks.5"],
        "step-float32": [*STEP, "--batch", "512", "--precision", "float32"],
        "scaling": [
            *(str(HERE / "scaling.py"), "--backbone", "resnet18_small", "--batches", "64", "256", "1024"),
            *("--batch", "128", "--processes", "1", "--global-batch", "512", "--precision", "bfloat16"),
        ],
        "evaluation": [str(HERE / "evaluation_speed.py"), "--images", "50000", "--rounds", "3"],
        "simclr-200-plain": train("simclr", "simclr-200-plain", "--optimizer.lr", "0.12", "--extra_view", "none"),
        "byol-200": train("byol", "byol-200", "--optimizer.lr", "0.12", "--augmentation.min_scale", "0.2"),
    }


def run(name: str, command: list[str], done: Path, deadline: float) -> bool:
    """Runs a part until the deadline; SIGTERM then lets a training save its state."""
    print(f"$ python {shlex.join(command)}", flush=True)
    partial = done.with_suffix(".partial")
    with partial.open("a") as output:
        output.write(f"`python {shlex.join(command)}`, {timing.origin('cuda')}\n\n")
        output.flush()
        process = subprocess.Popen(
            [sys.executable, *command], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(deadline - time.monotonic())
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # what a part started would go on and disturb the next
            process.wait()
            return False
    if process.returncode == 0:
        partial.rename(done)
    return process.returncode == 0


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("no GPU here: this script measures nothing on a CPU")
    main()
