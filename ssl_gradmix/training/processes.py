"""Devices, processes and threads of a training, set up with Accelerate."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from joblib import cpu_count

from ssl_gradmix.settings import Training
from ssl_gradmix.training import signals

logger = logging.getLogger("ssl_gradmix")


def create_accelerator(
    training: Training, expect_processes: int | None = None, trackers: str | Path | None = None
) -> Accelerator:
    """Sets up devices, processes, threads, and trackers that write to the folder given, and says what there is.

    Raises:
        ValueError: Another number of processes than expected or than the launcher started, a batch that they cannot
            share evenly, a tracker that is not installed, or settings that the launcher contradicts.
    """
    missing = ", ".join(sorted(set(training.trackers or []) - set(map(str, get_available_trackers()))))
    if missing:
        raise ValueError(f"training.trackers: {missing} not known to Accelerate or not installed; pip install it")
    _check_launcher(training)
    accelerator = Accelerator(
        mixed_precision=precision(training),
        gradient_accumulation_steps=training.accumulate,
        log_with=training.trackers or None,
        project_dir=trackers,
    )
    _check_processes(accelerator, training, expect_processes)
    found, threads = accelerator.num_processes, ""
    if accelerator.device.type == "cpu":
        if training.precision == "fp16":
            raise ValueError("training.precision fp16 needs an accelerator, and this is a CPU; use bf16 or no")
        if training.threads or not _threads_are_the_users():
            torch.set_num_threads(training.threads or max(1, cpu_count() // found))
        threads = f", CPU threads: {torch.get_num_threads()}"
    torch.backends.cudnn.benchmark = True  # every step has the same few shapes
    where = f"{found} process{'es' * (found > 1)} on {accelerator.device}{threads}"
    logger.info("%s, precision %s", where, accelerator.mixed_precision)
    return accelerator


def precision(training: Training) -> str:
    """The precision to train in: the setting's, or where it is null what the launcher says, or `no`.

    Raises:
        ValueError: Both are given and differ, or the launcher asks for one that is not offered.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # `accelerate launch` always sets it
    if launched not in ("no", "bf16", "fp16"):
        raise ValueError(f"training.precision: the launcher asks for {launched}, must be one of no, bf16, fp16")
    if launched != "no" and training.precision not in (None, launched):
        raise ValueError(
            f"training.precision is {training.precision}, and the launcher says {launched} "
            "(ACCELERATE_MIXED_PRECISION); leave one of them out"
        )
    return training.precision or launched


def _check_launcher(training: Training) -> None:
    accumulated = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(training.accumulate))
    if accumulated != str(training.accumulate):  # Accelerate would go by the variable
        raise ValueError(
            f"training.accumulate is {training.accumulate}, and the launcher says {accumulated} "
            "(ACCELERATE_GRADIENT_ACCUMULATION_STEPS); leave that to --training.accumulate"
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise ValueError(
            f"the launcher's dynamo_backend {backend}: a method cannot be compiled as a whole, leave it out"
        )


def _check_processes(accelerator: Accelerator, training: Training, expected: int | None) -> None:
    found = accelerator.num_processes
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    started = torch.distributed.get_world_size() if distributed else int(os.environ.get("WORLD_SIZE", 1))
    if started != found:
        raise ValueError(
            f"{started} processes were started (WORLD_SIZE), and each would train alone, as Accelerate knows of "
            f"{found}; on a CPU, set ACCELERATE_USE_CPU=true"
        )
    if expected not in (None, found):
        raise ValueError(
            f"expect_processes: {expected} expected, {found} running; several processes on a CPU need "
            "`ACCELERATE_USE_CPU=true torchrun --nproc_per_node N`, as `accelerate launch --cpu` starts one only"
        )
    shares = found * training.accumulate
    if training.batch_size < 2 * shares:
        raise ValueError(
            f"training.batch_size {training.batch_size} leaves {found} processes x {training.accumulate} micro-batches "
            "less than two images each: BatchNorm has no statistics of one, and an image no other to mix with"
        )
    if training.batch_size % shares:
        raise ValueError(
            f"training.batch_size {training.batch_size} is not a multiple of {found} processes x "
            f"{training.accumulate} micro-batches"
        )


def _threads_are_the_users() -> bool:
    """Whether the user set OMP_NUM_THREADS, which torch goes by; launchers set it to 1 where the user did not."""
    if os.environ.get("OMP_NUM_THREADS", "1") != "1" or signals.LAUNCHER is None:
        return "OMP_NUM_THREADS" in os.environ
    try:
        return b"\0OMP_NUM_THREADS=" in b"\0" + Path(f"/proc/{signals.LAUNCHER}/environ").read_bytes()
    except OSError:
        return False
