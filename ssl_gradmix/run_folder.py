"""The folder of one run: its settings, its log, and a lock against two trainings at once."""

from __future__ import annotations

import difflib
import fcntl
import json
import logging
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ssl_gradmix.files import open_regular, read_bytes, read_yaml, write_whole
from ssl_gradmix.version import __version__

if TYPE_CHECKING:
    from ssl_gradmix.data.datasets import ImageSet

logger = logging.getLogger("ssl_gradmix")

FREE = {
    "run",
    "expect_processes",
    "data.root",
    "data.download",
    "training.decode",
    "training.workers",
    "training.threads",
    "training.knn_every",
    "training.samples_every",
    "training.trackers",
}
"""Settings that may change when a run is resumed, because they do not change the weights."""

WAY_OUT = "choose another --run, or remove the folder"


class RunFolder:
    """Paths of one run. The folder does not need to exist; `~` is the home folder.

    When a run is finished, `checkpoint/`, `samples/` and `trackers/` may be deleted: evaluations
    need config.yaml, `backbone/` and projector.safetensors. Without `checkpoint/` the run cannot be
    trained again in its folder.

    Raises:
        ValueError: The path is empty, which would be the current folder.
    """

    def __init__(self, path: str | Path) -> None:
        if not str(path):
            raise ValueError("run: the path of the run folder is empty")
        self.path = Path(path).expanduser()
        self.config = self.path / "config.yaml"
        self.log = self.path / "log.jsonl"
        self.checkpoint = self.path / "checkpoint"
        self.backbone = self.path / "backbone"
        self.projector = self.path / "projector.safetensors"
        self.samples = self.path / "samples"
        self.trackers = self.path / "trackers"

    def check(self, config: dict[str, Any]) -> None:
        """Checks that a run with these settings may write here. Writes nothing.

        Raises:
            ValueError: The folder holds something else, a run with other settings, or a run without
                its checkpoint, whose weights and log a new training would replace.
        """
        if not self.config.exists():
            if self.path.exists() and any(not p.name.startswith(".") for p in self.path.iterdir()):
                raise ValueError(f"run: {self.path} is not empty and holds no run; {WAY_OUT}")
            return
        before, now = binding(read_yaml(self.config)), binding(config)
        names = sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
        if names:
            changes = "; ".join(f"{n} was {before.get(n)!r}, now {now.get(n)!r}" for n in names)
            raise ValueError(f"run: {self.path} has other settings ({changes}); {WAY_OUT}")
        others = {self.config.name, self.checkpoint.name}
        left = sorted(p.name for p in self.path.iterdir() if p.name not in others)
        left = [name for name in left if not name.startswith(".")]
        if left and not self.has_checkpoint():
            raise ValueError(
                f"run: {self.path} has no checkpoint to go on from, and a new training would "
                f"replace {', '.join(left)} there; {WAY_OUT}"
            )

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint, intact or not. A training writes one before it starts."""
        return any(self.checkpoint.glob("epoch-*"))

    def start(self, config: dict[str, Any], images: ImageSet, **environment: object) -> None:
        """Writes config.yaml for a new run, or checks that an old one can be resumed.

        Args:
            config: The settings.
            images: The training images, whose fingerprint is recorded.
            **environment: Recorded beside library versions and commit, for instance the device.

        Raises:
            ValueError: As `check`, or the run in the folder was trained on other images.
        """
        self.check(config)
        fingerprint = images.fingerprint()
        if self.config.exists():
            recorded = read_yaml(self.config).get("environment") or {}
            if recorded.get("images_fingerprint") != fingerprint:
                count = recorded.get("images")
                raise ValueError(
                    f"run: {self.path} was trained on other images ({count}, now {len(images)} in "
                    f"{images.name}); {WAY_OUT}"
                )
            return
        environment |= {"images": len(images), "images_fingerprint": fingerprint}
        content = {**config, "environment": {**_versions(), **environment}}
        text = yaml.safe_dump(content, sort_keys=False)
        write_whole(self.config, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Creates the folder and locks it. The end of the process releases the lock, too.

        Raises:
            ValueError: Another training holds the lock.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open_regular(self.path / ".lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                message = f"run: another process trains in {self.path}; stop it, or {WAY_OUT}"
                raise ValueError(message) from error
            except OSError as error:  # some network file systems have no locks
                logger.warning("%s cannot be locked (%s)", self.path, error)
            for folder in (self.path, self.backbone, self.checkpoint):
                for left_by_kill in folder.glob(".*.tmp"):
                    left_by_kill.unlink()
            yield

    def append_log(self, entry: dict[str, Any]) -> None:
        """Appends a line to log.jsonl."""
        with open_regular(self.log, "a") as file:
            file.write(json.dumps(entry) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """The entries of log.jsonl. An unfinished last line, left by a kill, is ignored."""
        if not self.log.exists():
            return []
        entries = []
        for line in read_bytes(self.log).decode().splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
        return entries

    def rewind_log(self, epoch: int) -> None:
        """Removes what was logged after the checkpoint from which a run is resumed."""
        kept = [json.dumps(entry) + "\n" for entry in self.read_log() if entry["epoch"] <= epoch]
        write_whole(self.log, lambda temporary: temporary.write_text("".join(kept)))


def near_runs(path: Path) -> list[str]:
    """Runs that somebody who gives this path may mean: those in it, or with a similar name."""
    if found := sorted(str(config.parent) for config in path.glob("*/config.yaml")):
        return found
    beside = [str(config.parent) for config in path.parent.glob("*/config.yaml")]
    return difflib.get_close_matches(str(path), beside)


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings without nesting: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def binding(config: dict[str, Any]) -> dict[str, Any]:
    """The settings, without nesting, that must not change when a run is resumed."""
    settings = {name: value for name, value in config.items() if name != "environment"}
    return {name: value for name, value in flat(settings).items() if name not in FREE}


def _versions() -> dict[str, Any]:
    """Library versions, and the git commit if the package is a checkout."""
    names = ("torch", "torchvision", "lightly", "timm", "accelerate", "numpy")
    found = {"ssl_gradmix": __version__, "python": platform.python_version()}
    found |= {name: version(name) for name in names}
    folder = os.path.dirname(__file__)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found["commit"] = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found["commit"] = "not a git checkout"
    return found
