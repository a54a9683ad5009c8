"""Two processes (gloo) train what one would, whole or resumed, and end together where one of them breaks."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import load_script
from training_support import final

from ssl_gradmix.run_folder import RunFolder

SCRIPT = "tests/scripts/shared_training.py"
Script = Callable[..., subprocess.CompletedProcess[str]]


def losses(path: Path) -> list[float]:
    return [entry[name] for entry in RunFolder(path).read_log() for name in ("loss", "pair", "extra")]


@pytest.mark.distributed
def test_two_processes_train_what_one_does_and_die_together(script: Script, tmp_path: Path) -> None:
    """Whole, and resumed by another number of processes."""
    shared = load_script(SCRIPT)
    for name in shared.METHODS:
        shared.train(tmp_path / "one", name)
    shared.train(tmp_path / "one then two", "BYOL", stop=True)
    done = script(SCRIPT, str(tmp_path), "killed", processes=2)
    assert "trained\n" in done.stdout, done.stderr
    shared.train(tmp_path / "two then one", "SimCLR")

    for alone, other, name in (
        ("one", "two", "SimCLR"),
        ("one", "two", "BYOL"),
        ("one", "two then one", "SimCLR"),
        ("one", "one then two", "BYOL"),
    ):
        expected = final(tmp_path / alone / name)
        for key, tensor in final(tmp_path / other / name).items():
            torch.testing.assert_close(tensor, expected[key], atol=1e-5, rtol=0, msg=f"{name} {other} {key}")
        assert losses(tmp_path / other / name) == pytest.approx(losses(tmp_path / alone / name), abs=1.1e-5)
    assert "training.batch_size 7 is not a multiple of 2 processes x 1 micro-batches" in done.stdout

    assert done.returncode != 0  # one was killed in the end, and the other did not wait for it
    assert not (tmp_path / "killed/SimCLR/checkpoint/epoch-00003-batch-0000000").exists()
    shared.train(tmp_path / "killed", "SimCLR")
    assert losses(tmp_path / "killed/SimCLR") == pytest.approx(losses(tmp_path / "one/SimCLR"), abs=1.1e-5)


@pytest.mark.slow
@pytest.mark.distributed
def test_what_only_one_process_met_is_said(script: Script, tmp_path: Path) -> None:
    done = script(SCRIPT, str(tmp_path), "broken", processes=2)
    assert done.returncode != 0
    assert "process 1: images/7.png is damaged" in done.stderr
