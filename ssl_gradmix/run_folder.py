"""The folder of one run: its settings, its log, and whether it is new, unfinished or finished."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ssl_gradmix.files import read_yaml, write_whole
from ssl_gradmix.version import __version__

PARTS = ("config.yaml", "log.jsonl", "checkpoint", "backbone", "projector.safetensors", "samples", "eval", "trackers")
"""All that a run writes; nothing else is ever removed."""

FREE = (
    *("run", "expect_processes", "environment", "data.root", "data.download"),
    *("training.workers", "training.threads", "training.knn_every", "training.samples_every"),
    *("training.checkpoint_every", "training.trackers", "training.nonfinite"),
)
"""Settings that may differ when a run is resumed: they change no weight (but for rounding, threads; and `nonfinite`,
only where the run would have stopped)."""


class RunFolder:
    """Paths of one run.

    Args:
        path: The folder; need not be there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.log = self.path / "log.jsonl"
        self.checkpoint = self.path / "checkpoint"
        self.backbone = self.path / "backbone"
        self.projector = self.path / "projector.safetensors"
        self.samples = self.path / "samples"

    def check(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Makes sure that a run with these settings may write here. Writes nothing.

        Raises:
            ValueError: The folder belongs to something else, holds a run with other settings, or cannot be written to.
        """
        nearest = next(parent for parent in (self.path, *self.path.absolute().parents) if parent.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise ValueError(f"run: {self.path} cannot be written to; choose another folder with --run")
        if not self.path.exists() or set(self.path.iterdir()) <= set(self._left_by_kills()):
            return
        if not self.config.exists():
            raise ValueError(
                f"run: {self.path} is not empty and holds no run (no config.yaml); choose another folder with --run"
            )
        if overwrite:
            return
        differences = _differences(read_yaml(self.config), settings)
        if differences:
            raise ValueError(
                f"run: {self.path} was started with other settings ({'; '.join(differences)}); "
                "use them, choose another folder with --run, or start anew with --overwrite"
            )

    def start(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Creates the folder and writes the settings, with what they ran on; clears away an old run where asked to.

        Raises:
            ValueError: The folder cannot be created.
        """
        if overwrite:
            # The old config stays until the new one replaces it: a folder without one would not be taken for a run.
            for part in PARTS:
                target = self.path / part
                if target != self.config:
                    shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        for left in self._left_by_kills():
            left.unlink(missing_ok=True)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"run: {self.path} cannot be written to ({error.strerror}); choose another with --run"
            ) from error
        if overwrite or not self.config.exists():
            _write_text(self.config, yaml.safe_dump({**settings, "environment": environment()}, sort_keys=False))

    def _left_by_kills(self) -> list[Path]:
        """Files that a training began to write, and did not live to rename."""
        patterns = (".config.yaml.*tmp", ".log.jsonl.*tmp", ".projector.safetensors.*tmp", "samples/.*.png.*tmp")
        patterns += ("backbone/.*.tmp",)
        return [left for pattern in patterns for left in self.path.glob(pattern)]

    def append_log(self, entry: dict[str, Any]) -> None:
        """Adds a line to log.jsonl."""
        with self.log.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """The lines of log.jsonl, up to the first that is no entry: a kill may leave the last one unfinished."""
        entries = []
        for line in self.log.read_text().splitlines() if self.log.exists() else []:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(entry, dict) or not isinstance(entry.get("epoch"), int):
                break
            entries.append(entry)
        return entries

    def rewind_log(self, epoch: int) -> None:
        """Drops what was logged after the checkpoint that a resumed run goes on from, after `epoch` epochs."""
        kept = [entry for entry in self.read_log() if entry["epoch"] <= epoch]
        _write_text(self.log, "".join(json.dumps(entry) + "\n" for entry in kept))


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings without nesting: `{"data": {"name": "digits"}}` becomes `{"data.name": "digits"}`."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def environment() -> dict[str, str]:
    """Versions of what a run depends on, and the git commit of this package where it is a checkout."""
    names = ("torch", "torchvision", "lightly", "timm", "accelerate", "kornia", "numpy")
    found = {"ssl_gradmix": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found["commit"] = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found["commit"] = "not a git checkout"
    return found


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    old, new = flat(before), flat(now)
    names = sorted(name for name in old.keys() | new.keys() if name not in FREE and name.split(".")[0] not in FREE)
    return [f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in names if old.get(name) != new.get(name)]


def _write_text(path: Path, text: str) -> None:
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
