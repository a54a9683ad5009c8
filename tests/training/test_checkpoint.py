"""Checkpoints: whole or not at all, and never unpickled."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from ssl_gradmix.training import checkpoint
from ssl_gradmix.training.checkpoint import State


def state(epoch: int, batch: int = 0) -> State:
    net = torch.nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    tied = {**net.state_dict(), "tied": net.weight.detach()}
    return State(epoch, batch, {"loss": 1.5}, tied, optimiser.state_dict(), None)


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    saved = state(3, 7)
    checkpoint.save(tmp_path, saved)
    loaded = checkpoint.load(tmp_path)
    assert (loaded.epoch, loaded.batch, loaded.totals, loaded.scaler) == (3, 7, {"loss": 1.5}, None)
    assert all(torch.equal(loaded.method[name], tensor) for name, tensor in saved.method.items())
    assert loaded.optimiser["param_groups"] == saved.optimiser["param_groups"]
    assert torch.equal(loaded.optimiser["state"][0]["exp_avg"], saved.optimiser["state"][0]["exp_avg"])


def test_the_newest_is_read_and_two_are_kept(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path) is None
    for epoch, batch in ((8, 0), (9, 0), (9, 50), (10, 0)):
        checkpoint.save(tmp_path, state(epoch, batch))
        assert (checkpoint.load(tmp_path).epoch, checkpoint.load(tmp_path).batch) == (epoch, batch)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "epoch-00009-batch-0000050",
        "epoch-00010-batch-0000000",
    ]


@pytest.mark.parametrize("name", ["method.safetensors", "progress.pt"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "foreign"])
def test_a_damaged_one_is_named_and_the_previous_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    path = tmp_path / "epoch-00002-batch-0000000" / name
    content = {"truncated": path.read_bytes()[:-20], "empty": b"", "foreign": b"not a checkpoint at all"}
    path.unlink() if damage == "missing" else path.write_bytes(content[damage])
    assert checkpoint.load(tmp_path).epoch == 1
    assert "epoch-00002-batch-0000000" in caplog.text


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(1))
    (tmp_path / "epoch-00001-batch-0000000" / "method.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"no readable checkpoint in .*: epoch-00001-batch-0000000 are damaged; --overwrite"
    ):
        checkpoint.load(tmp_path)


def test_a_pickle_with_code_in_it_does_not_run(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    checkpoint.save(tmp_path, state(1))
    path = tmp_path / "epoch-00001-batch-0000000" / "progress.pt"
    for write in (lambda: path.write_bytes(pickle.dumps(Attack())), lambda: torch.save(Attack(), path)):
        write()
        with pytest.raises(ValueError, match="no readable checkpoint"):
            checkpoint.load(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_kill_while_writing_leaves_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, state(1))

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    for step in ("save_file", "_flush"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, step, killed)
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save(tmp_path, state(2))
        assert checkpoint.load(tmp_path).epoch == 1
    checkpoint.save(tmp_path, state(2))
    assert checkpoint.load(tmp_path).epoch == 2
    assert not (tmp_path / ".unfinished").exists()
