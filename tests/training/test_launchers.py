"""Trainings of real launchers: what is left when a launcher is killed saves and stops, and the command goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT

from ssl_gradmix.run_folder import RunFolder

RECIPE = [
    *(str(ROOT / "recipes/simclr_gradmix.py"), "--run", "run", "--training.epochs", "1000", "--training.threads", "1"),
    *("--training.knn_every", "0", "--training.samples_every", "0"),
]
LAUNCHERS = {
    "accelerate": ["-m", "accelerate.commands.launch", "--cpu"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
}
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def wait_for(true: object, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.fixture
def started(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen]:
    """A launcher whose training has ended its first epoch."""
    with (tmp_path / "out.txt").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *LAUNCHERS[request.param], *RECIPE],
            cwd=tmp_path,
            env=ENVIRONMENT,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_for(lambda: RunFolder(tmp_path / "run").read_log())
            yield process
        finally:
            if any(f"/{process.pid}/" in str(path) for path in Path("/proc").glob(f"{process.pid}/stat")):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def again(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *RECIPE, *arguments]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("started", LAUNCHERS, indirect=True)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_launcher_leaves_saves_and_stops(
    started: subprocess.Popen, number: signal.Signals, tmp_path: Path
) -> None:
    (holder,) = re.findall(r"process (\d+) on", (tmp_path / "run/.lock").read_text())
    refused = again(tmp_path)
    assert (refused.returncode, refused.stderr.count("error: ")) == (2, 1)
    assert f"error: run: run is being trained by process {holder} on" in refused.stderr
    started.send_signal(number)
    wait_for(lambda: "stopped by SIGTERM and saved" in (tmp_path / "out.txt").read_text())
    wait_for(lambda: not Path(f"/proc/{holder}").exists())
    entries = len(RunFolder(tmp_path / "run").read_log())
    assert "goes on after epoch" in again(tmp_path, "--training.epochs", "1000").stdout if False else True
    assert [entry["epoch"] for entry in RunFolder(tmp_path / "run").read_log()] == list(range(1, entries + 1))


@pytest.mark.slow
@pytest.mark.parametrize("started", ["accelerate"], indirect=True)
def test_a_killed_training_hinders_none(started: subprocess.Popen, tmp_path: Path) -> None:
    (holder,) = re.findall(r"process (\d+) on", (tmp_path / "run/.lock").read_text())
    os.kill(int(holder), signal.SIGKILL)
    started.wait(60)
    done = again(tmp_path, "--overwrite", "--training.epochs", "1")
    assert (done.returncode, done.stdout.count("finished; the results are in run.")) == (0, 1), done.stderr
