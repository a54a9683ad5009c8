"""Small helpers to read and write files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def read_json(path: str | Path) -> Any:
    """Reads a JSON file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not valid JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # Unicode and JSON errors are ValueErrors
        raise ValueError(f"{path} is damaged: {error}") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file of settings with the safe loader, which builds plain values only.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not valid YAML, or does not hold a mapping.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged: it does not hold settings")
    return settings


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Writes a file so that a reader, or a crash, never sees half of it.

    Args:
        path: Where the file goes; missing parent folders are created.
        write: Called with a temporary path in the same folder. What it writes there is flushed to
            the disk and renamed to `path`. If it raises, an existing file at `path` is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two evaluations apart that write the same file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # in a downloaded folder it could be a link to another file
    try:
        write(temporary)
        _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Waits until the contents of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
