"""Checkpoints: whole or not at all, and never unpickled."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from training_support import file_size_limit

from ssl_gradmix.training import checkpoint
from ssl_gradmix.training.checkpoint import State

RUN = "0123456789abcdef"
NET = torch.nn.Linear(3, 2)
LIKE = {"weight": torch.empty(2, 3), "bias": torch.empty(2), "tied": torch.empty(2, 3)}
PLACE = "epoch-00002-batch-0000000"


def save(folder: Path, saved: State) -> None:
    checkpoint.save(folder, saved, RUN)


def load(folder: Path, run: str = RUN) -> State | None:
    return checkpoint.load(folder, run, LIKE, torch.optim.AdamW(NET.parameters()))


def state(epoch: int, batch: int = 0) -> State:
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tied = {**net.state_dict(), "tied": net.weight.detach()}
    return State(epoch, batch, {"loss": 1.5}, tied, optimizer.state_dict(), None)


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    saved = state(3, 7)
    save(tmp_path, saved)
    loaded = load(tmp_path)
    assert (loaded.epoch, loaded.batch, loaded.totals, loaded.scaler) == (3, 7, {"loss": 1.5}, None)
    assert all(torch.equal(loaded.method[name], tensor) for name, tensor in saved.method.items())
    assert loaded.optimizer["param_groups"] == saved.optimizer["param_groups"]
    assert torch.equal(loaded.optimizer["state"][0]["exp_avg"], saved.optimizer["state"][0]["exp_avg"])


def test_the_newest_is_read_and_two_are_kept(tmp_path: Path) -> None:
    assert load(tmp_path) is None
    for epoch, batch in ((8, 0), (9, 0), (9, 50), (10, 0)):
        save(tmp_path, state(epoch, batch))
        assert (load(tmp_path).epoch, load(tmp_path).batch) == (epoch, batch)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "epoch-00009-batch-0000050",
        "epoch-00010-batch-0000000",
    ]


@pytest.mark.parametrize("name", ["method.safetensors", "progress.pt"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "foreign"])
def test_a_damaged_one_is_named_and_the_previous_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    save(tmp_path, state(1))
    save(tmp_path, state(2))
    path = tmp_path / "epoch-00002-batch-0000000" / name
    content = {"truncated": path.read_bytes()[:-20], "empty": b"", "foreign": b"not a checkpoint at all"}
    path.unlink() if damage == "missing" else path.write_bytes(content[damage])
    assert load(tmp_path).epoch == 1
    assert "epoch-00002-batch-0000000" in caplog.text


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, state(1))
    (tmp_path / "epoch-00001-batch-0000000" / "method.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"no readable checkpoint in .*: epoch-00001-batch-0000000 are damaged; --overwrite"
    ):
        load(tmp_path)


def test_a_pickle_with_code_in_it_does_not_run(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    save(tmp_path, state(1))
    path = tmp_path / "epoch-00001-batch-0000000" / "progress.pt"
    for write in (lambda: path.write_bytes(pickle.dumps(Attack())), lambda: torch.save(Attack(), path)):
        write()
        with pytest.raises(ValueError, match="no readable checkpoint"):
            load(tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("again", [False, True], ids=["new", "in a damaged one's place"])
def test_a_kill_at_any_file_operation_leaves_one_that_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    class Killed(BaseException):
        pass

    def run_until(operation: int, folder: Path) -> bool:
        """Saves epoch 2, killed at that operation; whether it was reached."""
        left = iter(range(operation))

        def counted(function):
            def call(*args, **kwargs):
                if next(left, None) is None:
                    raise Killed
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in ((Path, "mkdir"), (Path, "write_bytes"), (Path, "rename"), (checkpoint, "flush")):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            patch.setattr(checkpoint.shutil, "rmtree", counted(checkpoint.shutil.rmtree))
            try:
                save(folder, state(2))
            except Killed:
                return True
        return False

    operations, epochs = 0, []
    for operations in range(100):
        folder = tmp_path / str(operations)
        save(folder, state(1))
        if again:
            (folder / "epoch-00002-batch-0000000").mkdir()
        if not run_until(operations, folder):
            break
        epochs.append(load(folder).epoch)
        save(folder, state(2))
        assert load(folder).epoch == 2
        assert not (folder / ".unfinished").exists()
    assert operations > 8
    assert epochs == sorted(epochs)
    assert epochs[0] == 1


@pytest.mark.parametrize("full", [False, True], ids=["of another run", "of another method"])
def test_a_whole_file_that_is_not_this_runs_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, full: bool
) -> None:
    save(tmp_path / "ours", state(1))
    save(tmp_path / "ours", state(2))
    other = state(2)
    other.method = {"foreign": torch.ones(1)} if full else {name: t + 1 for name, t in other.method.items()}
    save(tmp_path / "theirs", other)
    ours, theirs = (tmp_path / name / "epoch-00002-batch-0000000" for name in ("ours", "theirs"))
    for name in ("method.safetensors", "progress.pt") if full else ("method.safetensors",):
        (ours / name).write_bytes((theirs / name).read_bytes())
    assert load(tmp_path / "ours").epoch == 1
    reason = "its tensors are not this method's" if full else "method.safetensors is not the file that was written"
    assert f"{ours} cannot be read (ValueError: {reason})" in caplog.text


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, state(1))
    path = tmp_path / "epoch-00001-batch-0000000" / "method.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no readable checkpoint"):
        load(tmp_path)


def test_damaged_ones_of_later_places_do_not_push_good_ones_out(tmp_path: Path) -> None:
    for epoch in (1, 7, 8):
        save(tmp_path, state(epoch))
    for name in ("epoch-00007-batch-0000000", "epoch-00008-batch-0000000"):
        (tmp_path / name / "progress.pt").write_bytes(b"")
    save(tmp_path, state(1))
    save(tmp_path, state(2))
    assert load(tmp_path).epoch == 2
    assert (tmp_path / "epoch-00001-batch-0000000").exists()


def test_without_room_it_says_so_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    save(tmp_path, state(1))
    with file_size_limit(100), pytest.raises(OSError, match="File too large"):
        save(tmp_path, state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-00001-batch-0000000"]
    assert load(tmp_path).epoch == 1
