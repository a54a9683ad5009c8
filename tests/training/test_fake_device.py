"""A training step on a device that the host cannot read, see scripts/fake_device.py."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from torch.utils import backend_registration

from ssl_gradmix.gradmix import Fill, Region


def test_step_does_not_wait_for_the_device(
    script: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices written in Python")
    done = script("tests/scripts/fake_device.py", str(tmp_path))
    assert done.returncode == 0, done.stderr
    steps = [line.split() for line in done.stdout.splitlines()]
    made = {(region, fill) for _, _, region, fill, *_ in steps}
    assert made == set(itertools.product(get_args(Region), get_args(Fill)))
    updated = {(method, update) for method, *_, update, _ in steps}
    assert len(updated) == 9
    assert all(int(operations) > 1000 for *_, operations in steps)  # forward and backward passes
