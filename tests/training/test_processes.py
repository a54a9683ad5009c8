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
from ssl_gradmix.settings import Training
from ssl_gradmix.training import processes, signals
from ssl_gradmix.training.processes import create_accelerator, precision

SCRIPT = "tests/scripts/shared_training.py"
Script = Callable[..., subprocess.CompletedProcess[str]]


def losses(path: Path) -> list[float]:
    return [entry[name] for entry in RunFolder(path).read_log() for name in ("loss", "loss_views", "loss_mixed")]


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


@pytest.mark.parametrize(
    ("setting", "launched", "expected"),
    [(None, None, "no"), (None, "bf16", "bf16"), ("bf16", "no", "bf16"), ("fp16", "fp16", "fp16"), ("no", None, "no")],
)
def test_precision_is_the_launchers_where_none_is_set(
    setting: str | None, launched: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert precision(Training(precision=setting)) == expected


@pytest.mark.parametrize(
    ("variable", "value", "training", "message"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", Training(precision="no"), "precision is no, and the launcher says bf16"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", Training(), "the launcher asks for fp8, must be one of no, bf16, fp16"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2", Training(), "accumulate is 1, and the launcher says 2"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", Training(), "the launcher's dynamo_backend INDUCTOR"),
        (
            "WORLD_SIZE",
            "2",
            Training(),
            "2 processes were started .* Accelerate knows of 1; .* ACCELERATE_USE_CPU=true",
        ),
        ("IRRELEVANT", "1", Training(precision="fp16"), "training.precision fp16 needs an accelerator"),
    ],
)
def test_what_the_launcher_says_is_followed_or_refused(
    variable: str, value: str, training: Training, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        create_accelerator(training)


@pytest.mark.parametrize(
    ("threads", "omp", "launcher", "expected"),
    [
        (3, "2", None, 3),
        (None, "2", None, 2),
        (None, "1", None, 2),  # torch has read the variable before
        (None, "2", 1, 2),
        (None, None, None, 7),
        (None, "1", 10**9, 7),  # set by a launcher, whose own variables are not to be had
    ],
)
def test_threads_are_the_settings_or_the_users_or_all(
    threads: int | None, omp: str | None, launcher: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    monkeypatch.setattr(signals, "LAUNCHER", launcher)
    monkeypatch.setattr(processes, "cpu_count", lambda: 7)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        create_accelerator(Training(threads=threads))
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
