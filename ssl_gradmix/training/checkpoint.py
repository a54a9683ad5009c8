"""Resume state: written whole or not at all, bound to its run by digests, read without unpickling."""

from __future__ import annotations

import hashlib
import io
import json
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

from ssl_gradmix.files import read_json

logger = logging.getLogger("ssl_gradmix")

KEPT = 2


@dataclass
class State:
    """Where a training stands."""

    epoch: int  # epochs completed
    batch: int  # (micro-)batches done of the next one
    totals: dict[str, float]  # sums of this epoch's losses so far
    method: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None  # of the fp16 gradients


def save(folder: Path, state: State, run: str) -> None:
    """Writes a checkpoint beside the previous one, which goes only when the new one is complete and on the disk.

    Only a run of that identity reads it again.

    Raises:
        OSError: The disk is full, or cannot be written to; what had been written of the new checkpoint is removed.
    """
    path = path_of(folder, state.epoch, state.batch)
    unfinished = folder / ".unfinished"
    _remove(unfinished)
    try:
        unfinished.mkdir(parents=True)
        stream = io.BytesIO()  # Python's own files have errors that say what the disk said
        torch.save({name: value for name, value in vars(state).items() if name != "method"}, stream)
        # safetensors refuses tensors that share memory, hence the copies.
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.method.items()}
        contents = {"method.safetensors": safetensors.torch.save(tensors), "progress.pt": stream.getvalue()}
        for name, content in contents.items():
            (unfinished / name).write_bytes(content)
        manifest = {"run": run, "sha256": {name: _sha256(content) for name, content in contents.items()}}
        (unfinished / "manifest.json").write_bytes(json.dumps(manifest, indent=2).encode())
        for written in [*unfinished.iterdir(), unfinished]:
            flush(written)
    except OSError:
        _remove(unfinished)
        raise
    # One of that name can only be damaged: a training that has read it is past its place.
    _remove(path)
    unfinished.rename(path)
    flush(folder)
    # Those of later places were passed over when this training was resumed, and count for nothing.
    for old in [each for each in _oldest_first(folder) if each <= path][:-KEPT]:
        _remove(old)


def load(folder: Path, run: str, method: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> State | None:
    """Reads the newest checkpoint that is whole and of this run; others are named and passed over.

    It must have the names and shapes of the method's tensors, and the optimizer's parameter groups and shapes.

    Returns:
        None where there is no checkpoint at all.

    Raises:
        ValueError: There are checkpoints and none can be used.
    """
    paths = _oldest_first(folder)[::-1]
    for path in paths:
        try:
            return _read(path, run, method, optimizer)
        except Exception as error:  # foreign files make torch, zipfile and pickle raise errors of their own
            said = str(error).split("\n")[0]
            logger.warning("checkpoint %s cannot be read (%s: %s)", path, type(error).__name__, said)
    if paths:
        raise ValueError(
            f"no readable checkpoint in {folder}: {', '.join(path.name for path in paths)} are damaged or of another "
            "run; remove them to start anew"
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


def _read(path: Path, run: str, method: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> State:
    manifest = read_json(path / "manifest.json")
    if manifest["run"] != run:
        raise ValueError("it is of a run with other settings or images")
    weights, progress = ((path / name).read_bytes() for name in ("method.safetensors", "progress.pt"))
    for name, content in (("method.safetensors", weights), ("progress.pt", progress)):
        if manifest["sha256"][name] != _sha256(content):
            raise ValueError(f"{name} is not the file that was written")
    loaded = torch.load(io.BytesIO(progress), map_location="cpu", weights_only=True)
    state = State(method=safetensors.torch.load(weights), **loaded)
    if {name: t.shape for name, t in state.method.items()} != {name: t.shape for name, t in method.items()}:
        raise ValueError("its tensors are not this method's")
    if (place := path_of(path.parent, state.epoch, state.batch)) != path:
        raise ValueError(f"it was written as {place.name}")
    if not all(isinstance(total, int | float) for total in state.totals.values()):
        raise ValueError("its totals are no numbers")
    if _groups(state.optimizer) != _groups(optimizer.state_dict()):
        raise ValueError("its optimizer is not this run's")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state.optimizer["state"].items():
        if any(torch.is_tensor(v) and v.shape not in ((), parameters[index].shape) for v in values.values()):
            raise ValueError("its optimizer's tensors are not of this method's shapes")
    return state


def _groups(optimizer: dict[str, Any]) -> list[dict[str, Any]]:
    """Options of parameter groups, but for the learning rate, which the training sets at every step."""
    return [{name: value for name, value in group.items() if name != "lr"} for group in optimizer["param_groups"]]


def _remove(path: Path) -> None:
    """Whatever it is; a link goes, and what it leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _oldest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*"))
