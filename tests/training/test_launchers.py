"""Trainings of real launchers: one that is left behind saves and stops, and a killed one hinders no other."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support import ROOT

from ssl_gradmix.run_folder import RunFolder

pytestmark = pytest.mark.slow

RECIPE = [
    *(str(ROOT / "recipes/simclr_gradmix.py"), "--run", "run", "--training.epochs", "1000", "--training.threads", "1"),
    *("--training.knn_every", "0", "--training.samples_every", "0"),
]
LAUNCHERS = {
    "accelerate": ["-m", "accelerate.commands.launch", "--cpu"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"],
}
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def wait_for(true: Callable[[], object], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.1)


def holder(folder: Path) -> int:
    """Process that trains."""
    return int(re.match(r"process (\d+) on", (folder / "run/.lock").read_text())[1])


def again(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *RECIPE, *arguments]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


@pytest.fixture
def launcher(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen]:
    """A launcher whose training has ended its first epoch."""
    command = [sys.executable, *LAUNCHERS[request.param], *RECIPE]
    with (tmp_path / "out.txt").open("w") as out:
        process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: RunFolder(tmp_path / "run").read_log())
        yield process
    finally:
        process.terminate()
        process.wait(60)
        with suppress(ProcessLookupError):
            os.kill(holder(tmp_path), signal.SIGTERM)


@pytest.mark.parametrize(
    ("launcher", "number"),
    [("accelerate", signal.SIGTERM), ("accelerate", signal.SIGKILL), ("torchrun", signal.SIGKILL)],
    indirect=["launcher"],
)
def test_a_training_whose_launcher_was_killed_saves_and_stops(
    launcher: subprocess.Popen, number: signal.Signals, tmp_path: Path
) -> None:
    trains = holder(tmp_path)
    refused = again(tmp_path)
    assert (refused.returncode, refused.stderr.count("error: ")) == (2, 1)
    assert f"error: run: run is being trained by process {trains} on " in refused.stderr

    launcher.send_signal(number)
    wait_for(lambda: "stopped by SIGTERM and saved" in (tmp_path / "out.txt").read_text())
    wait_for(lambda: not Path(f"/proc/{trains}").exists())
    log = RunFolder(tmp_path / "run").read_log()
    assert [entry["epoch"] for entry in log] == list(range(1, len(log) + 1))
    assert sorted((tmp_path / "run/checkpoint").iterdir())[-1].name >= f"epoch-{len(log):05d}"


@pytest.mark.parametrize("launcher", ["accelerate"], indirect=True)
def test_a_killed_training_hinders_none(launcher: subprocess.Popen, tmp_path: Path) -> None:
    os.kill(holder(tmp_path), signal.SIGKILL)
    launcher.wait(60)
    done = again(tmp_path, "--overwrite", "--training.epochs", "1")
    assert (done.returncode, done.stdout.count("; the results are in run. Next:")) == (0, 1), done.stderr
