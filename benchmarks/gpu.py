"""What a GPU is to be asked, in parts that each call runs for at most so many minutes; finished parts are skipped.

    mkdir -p .gpu && tar xJf ARCHIVE -C .gpu
    python benchmarks/gpu.py --data .gpu/cifar10 --out .gpu/parts --minutes 8    # the same call again goes on
    python benchmarks/gpu.py --tiny --out .gpu/tiny                              # a rehearsal on a CPU, a minute

The data is CIFAR-10 as class folders in train/ and test/, the archive one of such a folder. Parts come in this order,
the most wanted first; minutes on an H200 are estimates, and encoders ResNet-18 where none is named:

    tests        GradMix and methods on the GPU, three steps of the loop that must not wait for it             1
    step         cost of GradMix against a plain third view, where a step must not wait either                 1
    throughput   images a second of the loop, of the bare step, and of a loop as lightly's examples have it    2
    plain        SimCLR without a third view for 100 epochs, kNN and linear probe                              4
    simclr       the same with GradMix                                                                         6
    profile      where the time of a step goes                                                                 1
    vit          cost of GradMix, ViT-small                                                                    1
    byol         BYOL with GradMix for 100 epochs                                                              7
    batches      cost of GradMix in batches of 64, 256 and 1,024                                               1
    compiled     the bare step with compiled stages                                                            2

Nothing has to be installed but what ssl_gradmix needs, with pytest; git is not needed. A part is a list of command
lines, and what it prints is kept in OUT/<part>.md. A part that runs out of time leaves what it printed until then, and
a training goes on where it stopped when the call is repeated. OUT/summary.md has all of it, also while later parts run;
--summary writes a copy into another folder, from which files are to be fetched for instance. The status is 0 once all
parts are done.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import timing
import torch

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as a folder; not needed with --tiny")
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and runs")
    parser.add_argument("--summary", type=Path, help="folder for a copy of the summary")
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
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # a part ends with this process
    unfinished = 0
    for name in options.parts or commands:
        done = options.out / f"{name}.md"
        if done.exists():
            state = "done before"
        elif time.monotonic() >= deadline:
            state = "no time left, repeat the call"
        else:
            began = time.monotonic()
            state = f"{run(commands[name], done, deadline)}, {time.monotonic() - began:.0f} s"
        unfinished += not done.exists()
        print(f"{name}: {state}", flush=True)
        for folder in (options.out, options.summary or options.out):
            summarize(list(commands), options.out, folder)
    sys.exit(unfinished > 0)


def parts(options: argparse.Namespace) -> dict[str, list[list[str]]]:
    """Command lines by the part's name, in the order in which they are wanted."""
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
        probe = [["eval/linear_probe.py", str(out / name)]] if not options.tiny or name == "plain" else []
        return [[f"recipes/{recipe}_gradmix.py", *data, *settings, *given], *probe]

    loops = ["loop", "lightly"] if options.tiny else ["loop", "plain loop", "lightly"]
    variants = ["step"] if options.tiny else ["step", "step NCHW", "step fused", "step benchmark"]
    tests = ["tests/training/test_on_the_device.py"]
    tests += ["-k", "mask"] if options.tiny else ["tests/test_gradmix.py", "tests/methods"]
    chosen = {
        "tests": [["-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]],
        "step": [step(small)],
        "throughput": [throughput(*variants, *loops)],
        "plain": train("simclr", "plain", "--extra_view", "none"),
        "simclr": train("simclr", "simclr"),
        "profile": [step(small, "--profile")],
        "vit": [step(*vit, "--layers", "blocks.8", "blocks.5", "--method", "simclr", batch="256")],
        "byol": train("byol", "byol", "--augmentation.min_scale", "0.2"),
    }
    if options.tiny:  # what differs from another part in a setting is left out
        del chosen["simclr"], chosen["profile"], chosen["byol"]
    else:
        chosen["batches"] = [step(small, "--method", "simclr", batch="64 256 1024")]
        chosen["compiled"] = [throughput("step", "step compiled")]
    return chosen


def run(commands: list[list[str]], done: Path, deadline: float) -> str:
    """Runs a part until the deadline; SIGTERM then lets a training save its state. Returns how it ended."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    if not torch.cuda.is_available():
        environment["OMP_NUM_THREADS"] = "1"  # tiny batches, and other work beside them
    partial = done.with_suffix(".partial")
    with partial.open("a") as output:
        for command in commands:
            output.write(f"`python {shlex.join(command)}`\n\n")
            output.flush()
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,
            )
            try:
                if status := process.wait(max(0.0, deadline - time.monotonic())):
                    return f"failed with status {status}"
            except subprocess.TimeoutExpired:
                return "out of time, repeat the call"
            finally:
                stop(process)
    partial.rename(done)
    return "done"


def stop(process: subprocess.Popen) -> None:
    """Ends a part with all that it started, which would disturb the next one."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):  # when nothing is left of it
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)


def summarize(names: list[str], out: Path, into: Path) -> None:
    """Writes what all parts have printed so far, the last lines of long ones, whole or not at all."""
    text = [timing.origin("cuda" if torch.cuda.is_available() else "cpu"), ""]
    for name in names:
        for path in (out / f"{name}.md", out / f"{name}.partial"):
            if path.exists():
                lines = path.read_text(errors="replace").splitlines()
                unfinished = " (unfinished)" if path.suffix == ".partial" else ""
                text += [f"## {name}{unfinished}", "", *lines[-80:], ""]
    into.mkdir(parents=True, exist_ok=True)
    unfinished = into / ".summary.md"
    unfinished.write_text("\n".join(text))
    unfinished.replace(into / "summary.md")


if __name__ == "__main__":
    main()
