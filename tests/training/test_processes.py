"""Two processes (gloo) train what one would, whole or resumed, and end together where one of them breaks."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import load_script
from training_support import final

from ssl_gradmix.training.run_folder import RunFolder

SCRIPT = "tests/scripts/shared_training.py"
Script = Callable[..., subprocess.CompletedProcess[str]]


def losses(path: Path) -> list[float]:
    return [entry[name] for entry in RunFolder(path).read_log() for name in ("loss", "pair", "extra")]


@pytest.mark.distributed
def test_two_processes_train_what_one_does_and_runs_change_hands(script: Script, tmp_path: Path) -> None:
    shared = load_script(SCRIPT)
    for name in shared.METHODS:
        shared.train(tmp_path / "one", name)
    shared.train(tmp_path / "one skip", "BYOL", poison=True)
    shared.train(tmp_path / "one then two", "BYOL", stop=True)
    done = script(SCRIPT, str(tmp_path), "all", processes=2)
    assert done.returncode == 0, done.stderr
    shared.train(tmp_path / "two then one", "SimCLR")

    for alone, other, name in (
        ("one", "two", "SimCLR"),
        ("one", "two", "BYOL"),
        ("one", "two then one", "SimCLR"),
        ("one", "one then two", "BYOL"),
        ("one skip", "two skip", "BYOL"),
    ):
        expected = final(tmp_path / alone / name)
        for key, tensor in final(tmp_path / other / name).items():
            torch.testing.assert_close(tensor, expected[key], atol=1e-5, rtol=0, msg=f"{name} {other} {key}")
        assert losses(tmp_path / other / name) == pytest.approx(losses(tmp_path / alone / name), abs=1.1e-5)
    skipped = [entry["skipped"] for entry in RunFolder(tmp_path / "two skip/BYOL").read_log()]
    assert skipped == [0] * 4 + [1] + [0] * 5
    assert "training.batch_size 7 is not a multiple of 2 processes x 1 micro-batches" in done.stdout


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["killed", pytest.param("broken", marks=pytest.mark.slow)])
def test_one_process_that_dies_ends_all_and_the_run_goes_on(how: str, script: Script, tmp_path: Path) -> None:
    began = time.monotonic()
    done = script(SCRIPT, str(tmp_path), how, processes=2)
    assert done.returncode != 0
    assert time.monotonic() - began < 120
    if how == "broken":
        assert "process 1: images/7.png is damaged" in done.stderr
    load_script(SCRIPT).train(tmp_path, "SimCLR")
    assert [entry["epoch"] for entry in RunFolder(tmp_path / "SimCLR").read_log()] == list(range(1, 11))
