"""Kills trainings by SIGKILL at random moments until they finish, and compares what they leave.

Usage: killed_training.py FOLDER SEED KILLS. Each training is a forked process. Prints one line per
training: what was trained, how often it was killed, and whether it ended with the same files.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from training_support import TRAINING, newest, trainer

from ssl_gradmix.methods import BYOL, SimCLR, SupCon
from ssl_gradmix.run_folder import RunFolder
from ssl_gradmix.training import trainer as trainer_module
from ssl_gradmix.training.optimizers import Optimizer

torch.set_num_threads(1)
trainer_module.SAVE_SECONDS = 0.0  # a checkpoint after every step, so that many kills hit one
trainer_module.READ_EVERY = 1

KINDS = [
    *((SimCLR, "once", "adamw"), (BYOL, "threads", "sgd"), (SupCon, "threads", "lars")),
    *((BYOL, "once", "lars"), (SimCLR, "threads", "sgd")),
]


def fork(folder: Path, kind: type, decode: str, update: str) -> int:
    """Starts a training and returns its process id."""
    process = os.fork()
    if process:
        return process
    output = os.open(folder.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 1
    try:
        with RunFolder(folder).locked():
            training = replace(TRAINING, decode=decode)
            trainer(folder, kind, training, optimizer=Optimizer(name=update)).run()
        status = 0
    finally:
        os._exit(status)


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def left_by(folder: Path) -> dict[str, object]:
    """All that a training leaves, except times."""
    state = newest(folder)
    moments = state["optimizer"]["state"].items()
    return {
        "place": (state["epoch"], state["batch"]),
        "method": {name: tensor.numpy().tobytes() for name, tensor in state["method"].items()},
        "optimizer": {(i, n): v.numpy().tobytes() for i, s in moments for n, v in s.items()},
        "backbone": (folder / "backbone" / "model.safetensors").read_bytes(),
        "projector": (folder / "projector.safetensors").read_bytes(),
        "epochs": [(e["epoch"], e["step"], e["lr"]) for e in RunFolder(folder).read_log()],
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
    }


def main(folder: Path, seed: int, wanted: int) -> None:
    draw, kills = random.Random(seed), 0
    for kind in itertools.cycle(KINDS[seed:] + KINDS[:seed]):
        name = f"{kind[0].__name__} {kind[1]} {kind[2]}"
        whole, parts = folder / f"{name} {kills} whole", folder / f"{name} {kills} parts"
        began = time.monotonic()
        assert wait(fork(whole, *kind)) == 0
        seconds, own = time.monotonic() - began, 0
        for attempt in itertools.count():
            process = fork(parts, *kind)
            if attempt < 4:  # the last attempt is left alone
                time.sleep(draw.uniform(0, seconds))
                os.kill(process, signal.SIGKILL)
            status = wait(process)
            own += status == -signal.SIGKILL
            if status == 0:
                break
            assert status == -signal.SIGKILL, parts.with_suffix(".txt").read_text()
        expected, found = left_by(whole), left_by(parts)
        different = [part for part in expected if found[part] != expected[part]]
        print(name, "killed", own, "differs in" if different else "same", *different, flush=True)
        kills += own
        if kills >= wanted:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3]))
