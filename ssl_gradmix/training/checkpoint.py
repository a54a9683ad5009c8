"""Resume state: written whole or not at all, read without unpickling."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger("ssl_gradmix")

KEPT = 2


@dataclass
class State:
    """Where a training stands.

    Attributes:
        epoch: Epochs completed.
        batch: (Micro-)batches done of the next one.
        totals: Sums of this epoch's losses so far.
        method: The method's tensors.
        optimiser: Its `state_dict()`.
        scaler: State of the fp16 gradient scaler, or None.
    """

    epoch: int
    batch: int
    totals: dict[str, float]
    method: dict[str, Tensor]
    optimiser: dict[str, Any]
    scaler: dict[str, Any] | None


def save(folder: Path, state: State) -> None:
    """Writes a checkpoint beside the previous one, which goes only when the new one is complete and on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    # safetensors refuses tensors that share memory, hence the copies.
    method = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.method.items()}
    save_file(method, unfinished / "method.safetensors")
    progress = {
        "epoch": state.epoch,
        "batch": state.batch,
        "totals": state.totals,
        "optimiser": state.optimiser,
        "scaler": state.scaler,
    }
    torch.save(progress, unfinished / "progress.pt")
    for path in [*unfinished.iterdir(), unfinished]:
        _flush(path)
    name = folder / f"epoch-{state.epoch:05d}-batch-{state.batch:07d}"
    shutil.rmtree(name, ignore_errors=True)
    unfinished.rename(name)
    _flush(folder)
    for old in sorted(folder.glob("epoch-*"))[:-KEPT]:
        shutil.rmtree(old)


def load(folder: Path) -> State | None:
    """Reads the newest checkpoint that is whole; one that is damaged is named and passed over.

    Returns:
        None where there is no checkpoint at all.

    Raises:
        ValueError: There are checkpoints and all are damaged.
    """
    paths = sorted(folder.glob("epoch-*"), reverse=True)
    for path in paths:
        try:
            return _read(path)
        except Exception as error:  # foreign files make torch, zipfile and pickle raise errors of their own
            logger.warning(
                "checkpoint %s cannot be read (%s: %s)", path, type(error).__name__, str(error).split("\n")[0]
            )
    if paths:
        raise ValueError(
            f"no readable checkpoint in {folder}: {', '.join(path.name for path in paths)} are damaged; "
            "--overwrite true starts anew"
        )
    return None


def _read(path: Path) -> State:
    progress = torch.load(path / "progress.pt", map_location="cpu", weights_only=True)
    return State(method=load_file(path / "method.safetensors"), **progress)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
