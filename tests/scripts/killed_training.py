"""Trains in processes that are killed by SIGKILL and started again, and compares with ones that are left alone.

Usage: killed_training.py FOLDER SEED KILLS. A process a training, forked, so that imports are paid for once. Prints a
line a kill: what was trained, how it was killed, and whether it ended with the same files.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from training_support import TIMED, TRAINING, trainer

from ssl_gradmix.methods.byol import BYOL
from ssl_gradmix.methods.simclr import SimCLR
from ssl_gradmix.methods.supcon import SupCon
from ssl_gradmix.run_folder import RunFolder
from ssl_gradmix.settings import Optimizer
from ssl_gradmix.training import loop
from ssl_gradmix.training.loop import Trainer

torch.set_num_threads(1)
loop.SAVE_SECONDS = 0.0  # a checkpoint wherever there may be one: at the end of an epoch, and after its first step
STEPS, EPOCHS = 4, 3
KINDS = {"SimCLR": SimCLR, "BYOL": BYOL, "SupCon": SupCon}
Kind = tuple[str, str, int, str]


def kinds(draw: random.Random) -> Iterator[Kind]:
    """Every pair of method and way to decode in turn, with an optimizer."""
    while True:
        pairs = [(name, *at) for name in KINDS for at in (("once", 0), ("workers", 0), ("workers", 2))]
        for pair in draw.sample(pairs, len(pairs)):
            yield (*pair, draw.choice(["sgd", "lars", "adamw"]))


def create(folder: Path, kind: Kind) -> Trainer:
    name, decode, workers, optimizer = kind
    training = replace(TRAINING, epochs=EPOCHS, decode=decode, workers=workers)
    return trainer(folder, KINDS[name], training, optimizer=Optimizer(optimizer))


def file_operations(folder: Path, act: Callable[[int], None]) -> None:
    """Calls `act` with a running number before each operation on a file in the folder that may change it."""
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        writes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree") or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes and str(folder) in str(arguments[0]):
            count += 1
            act(count)

    sys.addaudithook(hook)


def fork(folder: Path, kind: Kind, kill_at: dict[str, int]) -> int:
    """Starts a training that kills itself at a step or a file operation, or that has to be killed."""
    process = os.fork()
    if process:
        return process
    os.dup2(os.open(folder.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    asked = False

    def at_operation(number: int) -> None:
        nonlocal operations
        operations += asked or "stop" not in kill_at
        if operations == kill_at.get("operation"):
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        operations = 0
        file_operations(folder, at_operation)
        training = create(folder, kind)
        step = training._step

        def counted(batch: object) -> object:
            nonlocal asked
            number = training.epoch * STEPS + training.batch
            if number == kill_at.get("step"):
                os.kill(os.getpid(), signal.SIGKILL)
            if number == kill_at.get("stop") and not asked:
                asked = True
                os.kill(os.getpid(), signal.SIGTERM)
            return step(batch)

        training._step = counted
        training.run()
        folder.with_suffix(".operations").write_text(str(operations))
    except SystemExit as stopped:
        os._exit(stopped.code)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def finished(folder: Path) -> dict[str, object]:
    """All that a run leaves, but for times."""
    (*_, newest) = sorted((folder / "checkpoint").glob("epoch-*"))
    state = torch.load(newest / "progress.pt", weights_only=True)["optimizer"]["state"]
    return {
        "method": {name: tensor.numpy().tobytes() for name, tensor in load_file(newest / "method.safetensors").items()},
        "optimizer": {(i, name): value.numpy().tobytes() for i in state for name, value in state[i].items()},
        "backbone": (folder / "backbone" / "model.safetensors").read_bytes(),
        "projector": (folder / "projector.safetensors").read_bytes(),
        "log": [{k: v for k, v in line.items() if k not in TIMED} for line in RunFolder(folder).read_log()],
        "left over": [path.name for path in folder.rglob(".*") if path.name != ".lock"],
    }


def status_of(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(folder: Path, seed: int, kills: int) -> None:
    draw = random.Random(seed)
    manners = ("moment", "operation", "operation of a checkpoint in mid-epoch", "step")
    whole: dict[Kind, tuple[dict[str, object], float, int]] = {}
    done = 0
    for trial, kind in enumerate(kinds(draw)):
        alone = folder / "-".join(map(str, kind))
        if kind not in whole:
            began = time.monotonic()
            assert status_of(fork(alone, kind, {})) == 0
            seconds = time.monotonic() - began
            whole[kind] = finished(alone), seconds, int(alone.with_suffix(".operations").read_text())
        expected, seconds, operations = whole[kind]
        path, manner = folder / f"trial-{trial}", manners[trial % len(manners)]
        stop = draw.randrange(EPOCHS * STEPS - 1)
        place = {
            "moment": {},
            "step": {"step": draw.randrange(EPOCHS * STEPS)},
            "operation": {"operation": draw.randint(1, operations)},
            # A checkpoint makes about twelve of them.
            "operation of a checkpoint in mid-epoch": {"stop": stop, "operation": draw.randint(1, 12)},
        }[manner]
        process = fork(path, kind, place)
        if manner == "moment":
            moment = draw.uniform(0, seconds)
            time.sleep(moment)
            os.kill(process, signal.SIGKILL)
            place = {"seconds": round(moment, 2)}
        if status_of(process) != -signal.SIGKILL:
            continue  # it was done before
        assert status_of(fork(path, kind, {})) == 0
        ended = finished(path)
        different = [part for part in expected if ended[part] != expected[part]]
        print(*kind, "killed at", manner, place, "differs in" if different else "same", *different, flush=True)
        done += 1
        if done == kills:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3]))
