"""The folder of one run: its settings, its log, who trains in it, and whether it is new, unfinished or finished."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import yaml

from ssl_gradmix.files import read_yaml, write_whole
from ssl_gradmix.version import __version__

if TYPE_CHECKING:
    from ssl_gradmix.data.datasets import ImageSet

logger = logging.getLogger("ssl_gradmix")

TRAINED = (
    *("config.yaml", "log.jsonl", "projector.safetensors", "samples/epoch-*.png"),
    *("backbone/config.json", "backbone/model.safetensors"),
)
"""What a training writes, each file whole or not at all, beside its checkpoints and what trackers write."""

CHECKPOINT = ("method.safetensors", "progress.pt", "manifest.json")
"""Files of a checkpoint."""

WRITTEN = (
    *TRAINED,
    *(f"checkpoint/{place}/{name}" for place in ("epoch-*", ".unfinished") for name in CHECKPOINT),
    *(f"eval/{inner}*.{end}" for inner in ("", "projector/", "features/") for end in ("json", "png", "safetensors")),
    "trackers/**/*",
)
"""All that a run and its evaluations write: `--overwrite` removes nothing else."""

FREE = (
    *("run", "expect_processes", "environment", "data.root", "data.download"),
    *("training.decode", "training.workers", "training.threads", "training.knn_every", "training.samples_every"),
    "training.trackers",
)
"""Settings that may differ when a run is resumed: they change no weight (but for rounding, threads)."""


class RunFolder:
    """Paths of one run, in a folder that need not be there; `~` is the user's home.

    Attributes:
        settings: Of the training that `start` was called for.
        fingerprint: Of its images.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.config = self.path / "config.yaml"
        self.log = self.path / "log.jsonl"
        self.checkpoint = self.path / "checkpoint"
        self.backbone = self.path / "backbone"
        self.projector = self.path / "projector.safetensors"
        self.samples = self.path / "samples"
        self.trackers = self.path / "trackers"
        self.settings: dict[str, Any] = {}
        self.fingerprint = ""
        self._lock: int | None = None

    @property
    def identity(self) -> str:
        """What makes this run, as 16 hex digits: its images, and all settings that change a weight."""
        content = json.dumps([_binding(self.settings), self.fingerprint], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def check(self, settings: dict[str, Any], overwrite: bool = False) -> None:
        """Makes sure that a run with these settings may write here. Writes nothing.

        Raises:
            ValueError: The folder belongs to something else, holds a run with other settings, or cannot be written to.
        """
        nearest = next(parent for parent in (self.path, *self.path.absolute().parents) if parent.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise ValueError(f"run: {self.path} cannot be written to; choose another folder with --run")
        if not self.path.exists() or set(self.path.iterdir()) <= {self.path / ".lock", *self._left_by_kills()}:
            return
        recorded = self._recorded()
        if "training" not in recorded or "ssl_gradmix" not in _environment_of(recorded):
            raise ValueError(
                f"run: {self.path} is not empty and holds no run (no config.yaml of one); "
                "choose another folder with --run"
            )
        if overwrite:
            self._written()
        elif differences := _differences(recorded, settings):
            raise ValueError(
                f"run: {self.path} was started with other settings ({'; '.join(differences)}); "
                "use them, choose another folder with --run, or start anew with --overwrite"
            )

    def start(self, settings: dict[str, Any], images: ImageSet, overwrite: bool = False, **more: object) -> None:
        """Takes the folder for a training, until `release`: writes its settings, and clears away an old run if asked.

        Its config.yaml says `more` of the environment too, such as the device.

        The same command starts and resumes, with overwriting or without: a run that was itself started with it, and is
        not finished, is resumed.

        Raises:
            ValueError: As `check`; also where another training holds the folder, or the run was started on other
                images.
        """
        self.settings, self.fingerprint = settings, images.fingerprint()
        self.check(settings, overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            raise ValueError(
                f"run: {self.path} cannot be written to ({error.strerror}); choose another with --run"
            ) from error
        try:
            self.check(settings, overwrite)  # again: another training may have come and gone
            self._start(images, overwrite, more)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Lets others train here; the end of the process does so too, however it ends."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def append_log(self, entry: dict[str, Any]) -> None:
        """Adds a line to log.jsonl."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """The lines of log.jsonl, up to the first that is no entry: a kill may leave the last one unfinished."""
        entries = []
        for line in self.log.read_text("utf-8", errors="replace").splitlines() if self.log.exists() else []:
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

    def _start(self, images: ImageSet, overwrite: bool, more: dict[str, object]) -> None:
        for left in self._left_by_kills():
            left.unlink(missing_ok=True)
        recorded = self._recorded()
        before = _environment_of(recorded)
        same = before.get("images_fingerprint") == self.fingerprint
        if recorded and overwrite:
            finished = any(self.checkpoint.glob(f"epoch-{self.settings['training'].get('epochs', 0):05d}-*"))
            if before.get("overwrote") and same and not finished and not _differences(recorded, self.settings):
                logger.info("%s was itself begun with --overwrite, and goes on; remove it to start anew", self.path)
                return
            self._clear()
        elif recorded and same:
            return
        elif recorded:
            count = before.get("images")
            changed = f"{count}, now {len(images)}" if count != len(images) else "as many, but others or other labels"
            raise ValueError(
                f"run: {self.path} was started on other images ({changed}, in {images.name}); "
                "use them, choose another folder with --run, or start anew with --overwrite"
            )
        described = {"images": len(images), "images_fingerprint": self.fingerprint, "overwrote": overwrite}
        content = self.settings | {"environment": environment() | more | described}
        _write_text(self.config, yaml.safe_dump(content, sort_keys=False))

    def _take(self) -> None:
        # By POSIX, not flock: a loader process, forked, would hold on to that when the training is killed.
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(lock, 200).decode(errors="replace").strip()
            os.close(lock)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"run: {self.path} is being trained by {holder or 'another process'}; stop that one, or choose "
                    "another folder with --run"
                ) from error
            logger.warning("%s cannot be locked (%s): let no other training use it", self.path, error.strerror)
            return
        os.truncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {platform.node()}\n".encode())
        self._lock = lock

    def _clear(self) -> None:
        """Removes what an old run wrote, and folders that are empty then.

        config.yaml stays until a new one replaces it: a folder without one would not be taken for a run.
        """
        written = self._written()
        for path in written:
            if path != self.config and (path.is_symlink() or not path.is_dir()):
                path.unlink()
        for folder in sorted(self._around(written) | set(filter(Path.is_dir, written)), reverse=True):
            if not any(folder.iterdir()):
                folder.rmdir()

    def _written(self) -> list[Path]:
        """What there is of `WRITTEN`; ValueError where it lies behind a link, which may lead anywhere."""
        found = [path for pattern in WRITTEN for path in self.path.glob(pattern)]
        outer = {self.path / PurePath(pattern).parts[0] for pattern in WRITTEN if "/" in pattern}
        for link in filter(Path.is_symlink, sorted(outer | self._around(found))):
            raise ValueError(f"run: {link} is a link, behind which --overwrite removes nothing; remove it yourself")
        return found

    def _around(self, paths: list[Path]) -> set[Path]:
        """The folders between this one and those paths."""
        return {self.path / part for path in paths for part in path.relative_to(self.path).parents} - {self.path}

    def _left_by_kills(self) -> list[Path]:
        """Files that a training began to write, and did not live to rename."""
        patterns = (PurePath(pattern) for pattern in TRAINED)
        return [left for each in patterns for left in self.path.glob(str(each.with_name(f".{each.name}.*tmp")))]

    def _recorded(self) -> dict[str, Any]:
        return read_yaml(self.config) if self.config.exists() else {}


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings without nesting: `{"data": {"name": "digits"}}` becomes `{"data.name": "digits"}`."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def environment() -> dict[str, Any]:
    """Versions of what a run depends on, and the git commit of this package where it is a checkout."""
    names = ("torch", "torchvision", "lightly", "timm", "accelerate", "numpy")
    found = {"ssl_gradmix": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found["commit"] = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found["commit"] = "not a git checkout"
    return found


def _binding(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, without nesting, that may not differ when a run is resumed."""
    return {name: v for name, v in flat(settings).items() if name not in FREE and name.split(".")[0] not in FREE}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    old, new = _binding(before), _binding(now)
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return [f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in names]


def _environment_of(recorded: dict[str, Any]) -> dict[str, Any]:
    found = recorded.get("environment")
    return found if isinstance(found, dict) else {}


def _write_text(path: Path, text: str) -> None:
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
