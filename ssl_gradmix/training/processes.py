"""Devices, processes and trackers of a training, set up with Accelerate."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from joblib import cpu_count
from PIL import Image

from ssl_gradmix.run_folder import RunFolder, flat
from ssl_gradmix.settings import Training
from ssl_gradmix.training import signals

logger = logging.getLogger("ssl_gradmix")


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


def create_accelerator(
    training: Training, expect_processes: int | None = None, folder: RunFolder | None = None
) -> Accelerator:
    """Sets up devices, processes and trackers, and says how many processes there are.

    Args:
        training: Precision, accumulation, batch and trackers.
        expect_processes: How many there should be.
        folder: Where trackers write.

    Raises:
        ValueError: Another number of processes than expected or than the launcher started, a batch that they cannot
            share evenly, a tracker that is not installed, or settings that the launcher contradicts.
    """
    trackers = training.trackers or []
    missing = [name for name in trackers if name not in map(str, get_available_trackers())]
    if missing:
        raise ValueError(
            f"training.trackers: {', '.join(missing)} not known to Accelerate or not installed; pip install it"
        )
    accumulated = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(training.accumulate))
    if accumulated != str(training.accumulate):
        raise ValueError(
            f"training.accumulate is {training.accumulate}, and the launcher says {accumulated} "
            "(ACCELERATE_GRADIENT_ACCUMULATION_STEPS); leave that to --training.accumulate"
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise ValueError(
            f"the launcher's dynamo_backend {backend}: a method cannot be compiled as a whole, leave it out"
        )
    accelerator = Accelerator(
        mixed_precision=precision(training),
        gradient_accumulation_steps=training.accumulate,
        log_with=trackers or None,
        project_dir=folder and str(folder.trackers),
    )
    found, on_cpu = accelerator.num_processes, accelerator.device.type == "cpu"
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    launched = torch.distributed.get_world_size() if distributed else int(os.environ.get("WORLD_SIZE", 1))
    if launched != found:
        raise ValueError(
            f"{launched} processes were started (WORLD_SIZE), and each would train alone, as Accelerate knows of "
            f"{found}; on a CPU, set ACCELERATE_USE_CPU=true"
        )
    if expect_processes not in (None, found):
        raise ValueError(
            f"expect_processes: {expect_processes} expected, {found} running; several processes on a CPU need "
            "`ACCELERATE_USE_CPU=true torchrun --nproc_per_node N`, as `accelerate launch --cpu` starts one only"
        )
    if on_cpu and accelerator.mixed_precision == "fp16":
        raise ValueError("training.precision fp16 needs an accelerator, and this is a CPU; use bf16 or no")
    if training.batch_size < 2 * found * training.accumulate:
        raise ValueError(
            f"training.batch_size {training.batch_size} leaves {found} processes x {training.accumulate} micro-batches "
            "less than two images each: BatchNorm has no statistics of one, and an image no other to mix with"
        )
    if training.batch_size % (found * training.accumulate):
        raise ValueError(
            f"training.batch_size {training.batch_size} is not a multiple of {found} processes x "
            f"{training.accumulate} micro-batches"
        )
    if on_cpu and (training.threads or not _threads_are_the_users()):
        torch.set_num_threads(training.threads or max(1, cpu_count() // found))
    threads = f", {_count(torch.get_num_threads(), 'thread')}" + " each" * (found > 1) if on_cpu else ""
    where, in_precision = accelerator.device, accelerator.mixed_precision
    logger.info("%s on %s%s, precision %s", _count(found, "process"), where, threads, in_precision)
    return accelerator


def start_trackers(accelerator: Accelerator, folder: RunFolder) -> None:
    """Opens the trackers of a training, with its name and settings; what they write lies in the run folder."""
    folder.trackers.mkdir(parents=True, exist_ok=True)
    # TensorBoard takes neither lists nor null.
    settings = {n: v if isinstance(v, bool | int | float | str) else str(v) for n, v in flat(folder.settings).items()}
    wandb = {"name": folder.path.resolve().name, "dir": str(folder.trackers)}
    accelerator.init_trackers("ssl_gradmix", settings, {"wandb": wandb})


def show(accelerator: Accelerator, picture: Path, epoch: int) -> None:
    """Hands a picture of mixed views to the trackers that take pictures."""
    for tracker in accelerator.trackers:
        if tracker.name in ("tensorboard", "wandb"):
            with Image.open(picture) as opened:
                pixels = np.asarray(opened.convert("RGB"))[None]
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"mixed views": pixels}, step=epoch, **layout)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "es" if what.endswith("s") else "s")


def _threads_are_the_users() -> bool:
    """Whether the user set OMP_NUM_THREADS, which torch goes by; launchers set it to 1 where the user did not."""
    if os.environ.get("OMP_NUM_THREADS", "1") != "1" or signals.LAUNCHER is None:
        return "OMP_NUM_THREADS" in os.environ
    try:
        return b"\0OMP_NUM_THREADS=" in b"\0" + Path(f"/proc/{signals.LAUNCHER}/environ").read_bytes()
    except OSError:
        return False
