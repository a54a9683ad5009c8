"""A disk that is full stops a run with the last good checkpoint in place; with room again it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from training_support import TRAINING, before_step, file_size_limit, final, trainer

from ssl_gradmix.run_folder import RunFolder
from ssl_gradmix.training import loop

Disk = tuple[Path, Callable[[], None], Callable[[], None]]


@pytest.fixture(params=["a small disk", "a limit on file sizes"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """A folder, and what makes it full and gives room again."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with ExitStack() as stack:
        if request.param == "a limit on file sizes":
            limit = ExitStack()
            stack.callback(limit.close)
            yield folder / "run", lambda: limit.enter_context(file_size_limit(30_000)), limit.close
            return
        mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
        done = subprocess.run(mount, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"may not mount a small disk: {done.stderr.strip()}")
        stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
        filler = folder / "filler"

        def fill() -> None:
            with filler.open("wb", buffering=0) as file:
                while file.write(bytes(4096)) == 4096:
                    pass

        def filled() -> None:
            with pytest.raises(OSError, match="No space left"):
                fill()

        yield folder / "run", filled, filler.unlink


@pytest.mark.parametrize("signalled", [False, True], ids=["at an epoch's end", "mid-epoch"])
def test_a_full_disk_stops_the_run_which_goes_on_with_room(
    disk: Disk, signalled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    folder, fill, free = disk
    trainer(tmp_path / "whole").run()

    broken = trainer(folder)
    before_step(broken, (1, 1), fill)
    if signalled:
        before_step(broken, (1, 1), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(OSError, match="cannot be written to") as stopped:
        broken.run()
    assert str(stopped.value).startswith(f"run: {folder} cannot be written to (")
    assert "No space left" in str(stopped.value) or "File too large" in str(stopped.value)
    checkpoint = folder / "checkpoint/epoch-00001-batch-0000000"
    assert f"; the last good checkpoint is {checkpoint}; with room to write, the same command" in str(stopped.value)
    assert max(checkpoint.parent.iterdir()) == checkpoint
    assert not (checkpoint.parent / ".unfinished").exists()

    free()
    trainer(folder).run()
    whole, parts = final(tmp_path / "whole"), final(folder)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert [entry["epoch"] for entry in RunFolder(folder).read_log()] == list(range(1, TRAINING.epochs + 1))
