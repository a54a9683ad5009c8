"""Shared fixtures."""

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
from support import Planted, make_run

torch.set_num_threads(1)  # tensors in tests are small: threads would only wait for each other

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps global state, which is reset after each test."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a tiny random encoder."""
    return make_run(tmp_path / "runs" / "mine")


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script of the repository as a user would, by one or several processes."""

    def run(name: str, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / name)]
        environment = {
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        return subprocess.run(
            [*command, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )

    return run


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[Planted]:
    """An attack that must leave no trace in the test; afterwards it is shown to work."""
    attack = Planted(tmp_path / "ran")
    yield attack
    assert not attack.trace.exists()
    pickle.loads(pickle.dumps(attack))
    assert attack.trace.exists()
