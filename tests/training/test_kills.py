"""A run that is killed at any moment, and started again, ends as one that was left alone, bit for bit."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Script = Callable[..., subprocess.CompletedProcess[str]]


def check(script: Script, folder: Path, seed: int, kills: int) -> None:
    done = script("tests/scripts/killed_training.py", str(folder), str(seed), str(kills))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == kills
    for line in lines:
        assert re.fullmatch(r"(SimCLR|BYOL|SupCon) (once 0|workers [02]) (sgd|lars|adamw) killed at .* same", line), (
            line
        )


def test_three_kills(script: Script, tmp_path: Path) -> None:
    check(script, tmp_path, seed=0, kills=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 7))
def test_many_kills(script: Script, tmp_path: Path, seed: int) -> None:
    """24 in all, in every manner, of every pair of method and augmentation."""
    check(script, tmp_path, seed, kills=4)
