"""Checkpoints: the newest intact one of two is read, and nothing in it is executed."""

from __future__ import annotations

import hashlib
import pickle
import random
from pathlib import Path

import pytest
import torch
from support import PICKLES, Planted

from ssl_gradmix.training import checkpoint
from ssl_gradmix.training.checkpoint import State


def state(epoch: int, batch: int = 0) -> State:
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tied = {**net.state_dict(), "tied": net.weight.detach()}
    return State(epoch, batch, tied, optimizer.state_dict(), {"scale": 1024.0})


def test_state_comes_back(tmp_path: Path) -> None:
    saved = state(3, 7)
    checkpoint.save(tmp_path, saved)
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    torch.testing.assert_close(vars(loaded), vars(saved), rtol=0, atol=0)


def test_newest_is_read_and_two_are_kept(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path) is None
    for epoch, batch in ((8, 0), (9, 0), (9, 50), (10, 0)):
        checkpoint.save(tmp_path, state(epoch, batch))
        loaded = checkpoint.load(tmp_path)
        assert loaded is not None
        assert (loaded.epoch, loaded.batch) == (epoch, batch)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["empty", "foreign", "truncated", "flipped bit", "lost block"])
def test_damaged_checkpoint_is_reported_and_the_previous_one_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    checkpoint.save(tmp_path, state(1))
    path = checkpoint.save(tmp_path, state(2))
    content, draw = path.read_bytes(), random.Random(0)
    for _ in range(30):
        place = draw.randrange(len(content))
        flipped = bytes([content[place] ^ 1 << draw.randrange(8)])
        damaged = {
            "empty": b"",
            "foreign": b"not a checkpoint at all",
            "truncated": content[:place],
            "flipped bit": content[:place] + flipped + content[place + 1 :],
            "lost block": content[:512] + bytes(512) + content[1024:],
        }
        path.write_bytes(damaged[damage])
        caplog.clear()
        loaded = checkpoint.load(tmp_path)
        assert loaded is not None
        assert loaded.epoch == 1
        assert str(path) in caplog.text


def test_only_damaged_checkpoints_raise(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(1)).write_bytes(b"")
    with pytest.raises(ValueError, match=str(tmp_path)):
        checkpoint.load(tmp_path)


def test_damaged_checkpoints_of_later_epochs_do_not_replace_good_ones(tmp_path: Path) -> None:
    for epoch in (7, 8):
        checkpoint.save(tmp_path, state(epoch)).write_bytes(b"")
    for epoch in (1, 2):
        checkpoint.save(tmp_path, state(epoch))
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    assert loaded.epoch == 2
    assert checkpoint.path_of(tmp_path, 1, 0).exists()


@pytest.mark.parametrize("kind", PICKLES)
def test_pickle_with_a_valid_digest_is_not_executed(
    tmp_path: Path, planted: Planted, kind: str
) -> None:
    forged = tmp_path / "forged"
    PICKLES[kind](planted, forged)
    content = forged.read_bytes()
    path = checkpoint.path_of(tmp_path / "checkpoint", 1, 0)
    path.parent.mkdir()
    path.write_bytes(hashlib.sha256(content).digest() + content)
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load(tmp_path / "checkpoint")
