"""Devices, processes and trackers of a training, set up with Accelerate."""

from __future__ import annotations

import logging

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from joblib import cpu_count

from ssl_gradmix.settings import Training

logger = logging.getLogger("ssl_gradmix")


def create_accelerator(
    training: Training, expect_processes: int | None = None, project: str | None = None
) -> Accelerator:
    """Sets up devices, processes and trackers, and says how many processes there are.

    Args:
        training: Precision, accumulation, batch and trackers.
        expect_processes: How many there should be.
        project: Folder for what trackers write.

    Raises:
        ValueError: Another number of processes than expected, a batch that they cannot share evenly, or a tracker that
            is not installed.
    """
    trackers = training.trackers or []
    missing = [name for name in trackers if name not in map(str, get_available_trackers())]
    if missing:
        raise ValueError(
            f"training.trackers: {', '.join(missing)} not known to Accelerate or not installed; pip install it"
        )
    accelerator = Accelerator(
        mixed_precision=training.precision,
        gradient_accumulation_steps=training.accumulate,
        log_with=trackers or None,
        project_dir=project,
    )
    found = accelerator.num_processes
    logger.info(
        "%d process%s on %s, precision %s", found, "" if found == 1 else "es", accelerator.device, training.precision
    )
    if accelerator.device.type == "cpu":
        # `accelerate launch` and torchrun leave one thread a process, however many cores there are.
        torch.set_num_threads(training.threads or max(1, cpu_count() // found))
    if expect_processes not in (None, found):
        raise ValueError(
            f"expect_processes: {expect_processes} expected, {found} running; several processes on a CPU need "
            "`ACCELERATE_USE_CPU=true torchrun --nproc_per_node N`, as `accelerate launch --cpu` starts one only"
        )
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
    return accelerator
