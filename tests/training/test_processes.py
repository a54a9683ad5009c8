"""Two processes (gloo) train what one trains, from the start or resumed."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import load_script
from training_support import TRAINING, final, log_of

from ssl_gradmix.training.pretrain import create_accelerator
from ssl_gradmix.training.trainer import Training

SCRIPT = "tests/scripts/shared_training.py"


@pytest.mark.distributed
def test_two_processes_train_what_one_does(
    script: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    shared = load_script(SCRIPT)
    for name in shared.KINDS:
        shared.train(tmp_path / "one", name)
    shared.train(tmp_path / "one then two", "BYOL", stop=True)
    done = script(SCRIPT, str(tmp_path), processes=2)
    assert "trained" in done.stdout, done.stderr
    shared.train(tmp_path / "two then one", "SimCLR")

    for other, name in (
        *(("two", name) for name in shared.KINDS),
        ("two then one", "SimCLR"),
        ("one then two", "BYOL"),
    ):
        one, two = tmp_path / "one" / name, tmp_path / other / name
        torch.testing.assert_close(final(two), final(one), atol=1e-5, rtol=0)
        for mine, yours in zip(log_of(one), log_of(two), strict=True):
            for entry in (mine, yours):  # of the images of a process
                del entry["embedding_std"]
            if other == "two" or mine["epoch"] != shared.STOP[0] + 1:
                # On noise, `agreement_lost` divides by a small agreement.
                assert yours == pytest.approx(mine, rel=1e-4, abs=1.1e-5)
    changed = [entry["mixed"] for entry in log_of(tmp_path / "one" / "adaptive")]
    assert 0 < min(changed) < max(changed)


@pytest.mark.parametrize(
    ("training", "expected", "named"),
    [
        (replace(TRAINING, batch_size=9, accumulate=2), None, "training.batch_size"),
        (replace(TRAINING, batch_size=2, accumulate=2), None, "training.batch_size"),
        (TRAINING, 2, "expect_processes"),
        (replace(TRAINING, trackers=["nosuch"]), None, "nosuch"),
    ],
)
def test_invalid_setting_raises(training: Training, expected: int | None, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        create_accelerator(training, expected)


@pytest.mark.parametrize(
    ("setting", "launched", "used"),
    [(None, None, "no"), (None, "bf16", "bf16"), ("bf16", "no", "bf16"), ("no", "bf16", "no")],
)
def test_precision_is_the_launchers_by_default(
    setting: str | None, launched: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert create_accelerator(replace(TRAINING, precision=setting)).mixed_precision == used
