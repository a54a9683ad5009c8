"""A run that is killed at random moments, and started again, ends like one that was left alone."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Script = Callable[..., subprocess.CompletedProcess[str]]


def check(script: Script, folder: Path, seed: int, kills: int) -> None:
    done = script("tests/scripts/killed_training.py", str(folder), str(seed), str(kills))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines
    assert all(line.endswith("same") for line in lines), done.stdout


def test_killed_training_ends_bit_for_bit_the_same(script: Script, tmp_path: Path) -> None:
    check(script, tmp_path, seed=0, kills=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_kills(script: Script, tmp_path: Path, seed: int) -> None:
    check(script, tmp_path, seed, kills=8)
