"""Resume state: written whole or not at all, read without unpickling."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
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
        optimizer: Its `state_dict()`.
        scaler: State of the fp16 gradient scaler, or None.
    """

    epoch: int
    batch: int
    totals: dict[str, float]
    method: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None


def save(folder: Path, state: State) -> None:
    """Writes a checkpoint beside the previous one, which goes only when the new one is complete and on the disk.

    Raises:
        OSError: The disk is full, or cannot be written to; what had been written of the new checkpoint is removed.
    """
    path = path_of(folder, state.epoch, state.batch)
    unfinished = folder / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        # safetensors refuses tensors that share memory, hence the copies.
        weights = safetensors.torch.save(
            {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.method.items()}
        )
        progress = {
            "epoch": state.epoch,
            "batch": state.batch,
            "totals": state.totals,
            "optimizer": state.optimizer,
            "scaler": state.scaler,
            "sha256": hashlib.sha256(weights).hexdigest(),
        }
        # Through Python's own files, whose errors say what the disk said.
        stream = io.BytesIO()
        torch.save(progress, stream)
        (unfinished / "method.safetensors").write_bytes(weights)
        (unfinished / "progress.pt").write_bytes(stream.getbuffer())
        for written in [*unfinished.iterdir(), unfinished]:
            flush(written)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    # One of that name can only be damaged: a training that has read it is past its place.
    shutil.rmtree(path, ignore_errors=True)
    unfinished.rename(path)
    flush(folder)
    # Those of later places were passed over when this training was resumed, and count for nothing.
    for old in [each for each in _oldest_first(folder) if each <= path][:-KEPT]:
        shutil.rmtree(old)


def load(folder: Path, like: Mapping[str, Tensor]) -> State | None:
    """Reads the newest checkpoint that is whole; one that is damaged, or not of this method, is named and passed over.

    Args:
        folder: Of the checkpoints.
        like: The method's tensors, whose names and shapes a checkpoint must have.

    Returns:
        None where there is no checkpoint at all.

    Raises:
        ValueError: There are checkpoints and none can be used.
    """
    paths = _oldest_first(folder)[::-1]
    for path in paths:
        try:
            return _read(path, like)
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


def path_of(folder: Path, epoch: int, batch: int) -> Path:
    """Where the checkpoint of a place in the training lies."""
    return folder / f"epoch-{epoch:05d}-batch-{batch:07d}"


def flush(path: Path) -> None:
    """Returns when a file's contents, or a folder's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path, like: Mapping[str, Tensor]) -> State:
    progress = torch.load(path / "progress.pt", map_location="cpu", weights_only=True)
    weights = (path / "method.safetensors").read_bytes()
    if progress.pop("sha256") != hashlib.sha256(weights).hexdigest():
        raise ValueError("method.safetensors is not the file that was written")
    state = State(method=safetensors.torch.load(weights), **progress)
    if {name: t.shape for name, t in state.method.items()} != {name: t.shape for name, t in like.items()}:
        raise ValueError("its tensors are not this method's")
    return state


def _oldest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*"))
