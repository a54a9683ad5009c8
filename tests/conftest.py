"""Shared by all tests."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from support import Planted, load_script, make_run

from ssl_gradmix import command_line

torch.set_num_threads(1)  # tensors in tests are small: threads only wait for each other

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its state for the whole process; a test leaves none to the next."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a tiny random encoder."""
    return make_run(tmp_path / "runs" / "mine")


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs one of the repository's scripts in an empty folder, by several processes where asked to, as a user would."""

    def run(name: str, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
        )
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        command = [sys.executable, *launcher, str(ROOT / name), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)

    return run


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Trains SimCLR on the folder `images` for an epoch, in `runs/simclr`, and gives what a user's shell gets."""
    monkeypatch.chdir(tmp_path)
    common = "--data.name folder --data.root images --data.size 16 --training.epochs 1 --training.threads 1"
    common += " --training.batch_size 8 --training.knn_every 0 --training.samples_every 0"

    def train(*options: str) -> int:
        AcceleratorState._reset_state(True)
        return command_line.run(load_script("recipes/simclr_gradmix.py").main, [*common.split(), *options])

    return train


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[Planted]:
    """An attack, of which the test must leave no trace; that it works is shown afterwards."""
    attack = Planted(tmp_path / "ran")
    yield attack
    assert not attack.trace.exists()
    pickle.loads(pickle.dumps(attack))
    assert attack.trace.exists()
