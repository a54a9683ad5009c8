"""What a GPU is to be asked, in parts that each call runs for at most so many minutes; finished parts are skipped.

    python benchmarks/gpu.py --data cifar10 --out .gpu --parts step profile throughput    # about 6 minutes
    python benchmarks/gpu.py --data cifar10 --out .gpu --parts simclr                     # about 6
    python benchmarks/gpu.py --data cifar10 --out .gpu --parts plain byol                 # the controls
    python benchmarks/gpu.py --data cifar10 --out .gpu                                    # what is left
    python benchmarks/gpu.py --tiny --out .gpu/tiny                                       # a rehearsal on a CPU

The data is CIFAR-10 as class folders in train/ and test/. A part is a list of command lines that need no installed
package; what it prints is kept in OUT/<part>.md. A part that runs out of time leaves what it printed until then, and a
training goes on where it stopped when the same call is repeated. OUT/summary.md has all of it.
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

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as a folder; not needed with --tiny")
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and runs")
    parser.add_argument("--parts", nargs="+", help="only these (default: all)")
    parser.add_argument("--minutes", type=float, default=9.5, help="of this call (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="rehearse on a CPU: tiny sizes, digits, a minute")
    options = parser.parse_args()
    if not options.tiny and not (torch.cuda.is_available() and options.data):
        parser.error("a GPU and --data are needed; --tiny rehearses without")
    commands = parts(options)
    unknown = set(options.parts or ()) - set(commands)
    if unknown:
        parser.error(f"--parts: {', '.join(sorted(unknown))}; there are {', '.join(commands)}")
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    for name in options.parts or commands:
        done = options.out / f"{name}.md"
        if done.exists():
            state = "done before"
        elif time.monotonic() >= deadline:
            state = "no time left, repeat the call"
        else:
            began = time.monotonic()
            state = "done" if run(commands[name], done, deadline) else "out of time or failed, repeat the call"
            state += f", {time.monotonic() - began:.0f} s"
        print(f"{name}: {state}", flush=True)
        summarize(list(commands), options.out)


def parts(options: argparse.Namespace) -> dict[str, list[list[str]]]:
    """Command lines by the part's name, the most wanted first."""
    out = options.out.absolute()
    data = ["--data.name", "folder", "--data.root", str(options.data and options.data.absolute())]
    small, vit = "resnet18_small", ["vit_small_patch16_224", "--kwargs", '{"img_size": 32, "patch_size": 4}']
    if options.tiny:
        data, small = ["--data.name", "digits", "--data.classes", "[0, 1]", "--data.size", "16"], "resnet10_tiny"
        vit = ["vit_tiny_patch16_224", "--kwargs", '{"img_size": 32, "patch_size": 4, "embed_dim": 24}']

    def step(*backbone: str, batch: str = "512") -> list[str]:
        tiny = ["--device", "cpu", "--rounds", "1", "--batch", "2"]
        usual = ["--device", "cuda", "--precision", "bfloat16", "--rounds", "30", "--batch", *batch.split()]
        return ["benchmarks/step_cost.py", *(tiny if options.tiny else usual), "--backbone", *backbone]

    def throughput(*rows: str) -> list[str]:
        tiny = ["--device", "cpu", "--batch", "8", "--images", "16", "--workers", "1"]
        usual = ["--device", "cuda", "--batch", "512", "--images", "50000", "--data", data[-1], "--precision", "bf16"]
        usual += ["--workers", str(len(os.sched_getaffinity(0)))]
        sizes = ["--backbone", small, "--rounds", "1", *(tiny if options.tiny else usual)]
        return ["benchmarks/throughput.py", *sizes, "--rows", *rows]

    def train(recipe: str, name: str, *given: str) -> list[list[str]]:
        epochs, batch, precision = ("1", "64", "no") if options.tiny else ("100", "512", "bf16")
        settings = ["--backbone.name", small, "--training.epochs", epochs, "--training.batch_size", batch]
        settings += ["--training.precision", precision, "--training.knn_every", "20", "--run", str(out / name)]
        settings += ["--optimizer.lr", "0.12", "--optimizer.warmup_epochs", "0.5" if options.tiny else "10"]
        probe = [["eval/linear_probe.py", str(out / name)]] if not options.tiny or name == "simclr" else []
        return [[f"recipes/{recipe}_gradmix.py", *data, *settings, *given], *probe]

    loops = ("loop", "plain loop", "step", "step NCHW", "step fused")
    chosen = {
        "step": [step(small)],
        "profile": [step(small, "--profile")],
        "throughput": [throughput(*loops, *([] if options.tiny else ["step benchmark"]), "lightly")],
        "simclr": train("simclr", "simclr"),
        "plain": train("simclr", "plain", "--extra_view", "none"),
        "byol": train("byol", "byol", "--augmentation.min_scale", "0.2"),
        "vit": [step(*vit, "--layers", "blocks.8", "blocks.5", "--method", "simclr", batch="256")],
    }
    if not options.tiny:  # as sizes differ alone, or a compiler is needed
        chosen["batches"] = [step(small, "--method", "simclr", batch="64 256 1024")]
        chosen["compiled"] = [throughput("step", "step compiled")]
    return chosen


def run(commands: list[list[str]], done: Path, deadline: float) -> bool:
    """Runs a part until the deadline; SIGTERM then lets a training save its state."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if not torch.cuda.is_available():
        environment["OMP_NUM_THREADS"] = "1"  # tiny batches, and other work beside them
    partial = done.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with partial.open("w") as output:
        for command in commands:
            output.write(f"`python {shlex.join(command)}`\n\n")
            output.flush()
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                stop(process)
                return False
            if status != 0:
                return False
    partial.rename(done)
    return True


def stop(process: subprocess.Popen) -> None:
    """Ends a part with all that it started, which would disturb the next one."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def summarize(names: list[str], out: Path) -> None:
    """Writes what all parts have printed so far, the last lines of long ones."""
    text = [timing.origin("cuda" if torch.cuda.is_available() else "cpu"), ""]
    for name in names:
        for path in (out / f"{name}.md", out / f"{name}.partial"):
            if path.exists():
                lines = path.read_text(errors="replace").splitlines()
                unfinished = " (unfinished)" if path.suffix == ".partial" else ""
                text += [f"## {name}{unfinished}", "", *lines[-80:], ""]
    (out / "summary.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
