"""The run folder: what it accepts, who may train in it, and its log."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_support import image_set

from ssl_gradmix.run_folder import RunFolder

CONFIG: dict[str, Any] = {
    "run": "x",
    "extra_view": "gradmix",
    "optimizer": {"lr": 0.1, "clip": None},
    "training": {"epochs": 3, "workers": 2},
    "gradmix": {"lam_range": [0.5, 0.9]},
}
IMAGES = image_set()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    started = RunFolder(tmp_path / "run")
    started.start(CONFIG, IMAGES, device="cpu")
    return started


def test_config_holds_settings_and_environment(folder: RunFolder) -> None:
    config = yaml.safe_load(folder.config.read_text())
    environment = config.pop("environment")
    assert config == CONFIG
    assert {"ssl_gradmix", "torch", "lightly", "timm", "python", "commit"} <= environment.keys()
    assert environment["device"] == "cpu"
    assert environment["images"] == 36
    assert environment["images_fingerprint"] == IMAGES.fingerprint()


def test_resuming_with_other_free_settings_is_accepted(folder: RunFolder) -> None:
    before = folder.config.read_bytes()
    moved = {**CONFIG, "run": "elsewhere", "training": {"epochs": 3, "workers": 0}}
    folder.start({**moved, "data": {"root": "/moved"}}, IMAGES)
    assert folder.config.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"extra_view": "none"}, "extra_view was 'gradmix', now 'none'"),
        ({"training": {"epochs": 4, "workers": 2}}, "training.epochs was 3, now 4"),
        ({"optimizer": {"lr": 0.1, "clip": 1.0}}, "optimizer.clip was None, now 1.0"),
        ({"gradmix": {"lam_range": [0.5, 0.8]}}, "gradmix.lam_range"),
        ({"init": "runs/a"}, "init was None, now 'runs/a'"),
    ],
)
def test_other_settings_raise(folder: RunFolder, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match="run: ") as raised:
        folder.check({**CONFIG, **change})
    assert named in str(raised.value)
    assert "--run" in str(raised.value)


def test_other_images_raise(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match=r"36, now 30"):
        folder.start(CONFIG, IMAGES.subset(range(30)))
    changed = image_set()
    changed.images[0, 0, 0, 0] ^= 1
    with pytest.raises(ValueError, match="other images"):
        folder.start(CONFIG, changed)


@pytest.mark.parametrize("left", ["log.jsonl", "backbone", "projector.safetensors", "eval"])
def test_run_without_its_checkpoint_is_not_trained_over(folder: RunFolder, left: str) -> None:
    folder.checkpoint.mkdir()
    folder.check(CONFIG)  # as a kill can leave it
    (folder.path / left).mkdir()
    with pytest.raises(ValueError, match=rf"checkpoint.*{left}.*--run"):
        folder.start(CONFIG, IMAGES)
    (folder.checkpoint / "epoch-00001-batch-0000000").touch()
    folder.start(CONFIG, IMAGES)


def test_folder_of_something_else_raises(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        RunFolder(tmp_path).check(CONFIG)
    with pytest.raises(ValueError, match="run"):
        RunFolder("")
    with pytest.raises(OSError, match=r"thesis\.tex"), RunFolder(tmp_path / "thesis.tex").locked():
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_one_training_at_a_time_and_a_kill_releases_the_lock(tmp_path: Path) -> None:
    code = (
        "import sys; from ssl_gradmix.run_folder import RunFolder\n"
        "with RunFolder(sys.argv[1]).locked(): print('held', flush=True); input()"
    )
    folder = RunFolder(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="run: "), folder.locked():
            pass
        holder.kill()
    with folder.locked():
        folder.start(CONFIG, IMAGES)
    for left in (".log.jsonl.4711.tmp", "checkpoint/.epoch-00001.4711.tmp"):
        (folder.path / left).parent.mkdir(exist_ok=True)
        (folder.path / left).write_text("half")
    with folder.locked():
        folder.start(CONFIG, IMAGES)
    names = {str(path.relative_to(folder.path)) for path in folder.path.rglob("*")}
    assert names == {".lock", "config.yaml", "checkpoint"}


@pytest.mark.parametrize("last", ["", '{"epoch": 4, "lo'])
def test_log_is_rewound_to_the_checkpoint(folder: RunFolder, last: str) -> None:
    for epoch in (1, 2, 3):
        folder.append_log({"epoch": epoch, "loss": 0.5})
    with folder.log.open("a") as file:
        file.write(last)
    assert [entry["epoch"] for entry in folder.read_log()] == [1, 2, 3]
    folder.rewind_log(2)
    assert folder.log.read_text() == '{"epoch": 1, "loss": 0.5}\n{"epoch": 2, "loss": 0.5}\n'
