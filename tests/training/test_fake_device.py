"""A step of the loop on a device of torch's that computes nothing and that the host cannot wait for, as it must not."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from torch.utils import backend_registration

from ssl_gradmix.gradmix import Region
from ssl_gradmix.mixing import Fill


def test_no_step_waits_for_the_device_or_takes_a_tensor_of_the_host(
    script: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices written in Python")
    done = script("tests/scripts/fake_device.py", str(tmp_path))
    assert done.returncode == 0, done.stderr
    steps = [line.split() for line in done.stdout.splitlines()]
    assert {(region, fill) for _, _, region, fill, *_ in steps} == {
        (r, f) for r in get_args(Region) for f in get_args(Fill)
    }
    assert {(method, update) for method, *_, update, _ in steps} >= {
        (method, update) for method in ("SimCLR", "BYOL") for update in ("sgd", "lars", "adamw")
    }
    assert all(int(operations) > 1000 for *_, operations in steps)  # forwards and backwards, on the device
