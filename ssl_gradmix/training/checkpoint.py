"""Checkpoints to resume a training: the last two are kept, each with a SHA-256 of the whole."""

from __future__ import annotations

import hashlib
import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_gradmix.files import read_bytes, write_whole

logger = logging.getLogger("ssl_gradmix")

KEPT = 2
_DIGEST_BYTES = 32


@dataclass
class State:
    """The state of a training between two steps.

    Attributes:
        epoch: Epochs completed.
        batch: (Micro-)batches completed of the next epoch.
        method: `state_dict` of the method.
        optimizer: `state_dict` of the optimizer.
        scaler: `state_dict` of the gradient scaler, for fp16.
    """

    epoch: int
    batch: int
    method: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None = None


def path_of(folder: Path, epoch: int, batch: int) -> Path:
    """Path of a checkpoint; names sort by age."""
    return folder / f"epoch-{epoch:05d}-batch-{batch:07d}"


def save(folder: Path, state: State) -> Path:
    """Writes a checkpoint and removes older ones, except the one before it."""
    stream = io.BytesIO()
    # Not asdict, which would copy all tensors.
    torch.save({name: getattr(state, name) for name in State.__dataclass_fields__}, stream)
    content = stream.getvalue()
    path = path_of(folder, state.epoch, state.batch)
    digest = hashlib.sha256(content).digest()
    write_whole(path, lambda temporary: temporary.write_bytes(digest + content))
    # Damaged ones of later epochs do not count.
    older = [each for each in sorted(folder.glob("epoch-*")) if each <= path]
    for each in older[:-KEPT]:
        each.unlink()
    return path


def load(folder: Path) -> State | None:
    """Reads the newest intact checkpoint. A damaged one is reported and the one before it is used.

    Returns:
        None if there is no checkpoint.

    Raises:
        ValueError: There are checkpoints, and all are damaged.
    """
    paths = sorted(folder.glob("epoch-*"), reverse=True)
    for path in paths:
        content = read_bytes(path)
        digest, content = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            logger.warning("checkpoint %s is damaged and not used", path)
            continue
        # Restricted to tensors and plain values, so that nothing in the file can run code.
        return State(**torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    if paths:
        raise ValueError(
            f"all checkpoints in {folder} are damaged; remove the folder to start anew"
        )
    return None
