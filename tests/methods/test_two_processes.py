"""Two processes (gloo) train as one would."""

from __future__ import annotations

import pytest


@pytest.mark.distributed
def test_invariants_of_mixing_inside_one_forward(script) -> None:
    done = script("tests/scripts/two_processes.py", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{method} {holds}"
        for method in ("SimCLR", "BYOL", "SupCon")
        for holds in (
            "gradient of two processes equals that of the global batch",
            "gradients accumulate",
            "parameters stay equal on all processes",
        )
    ]
