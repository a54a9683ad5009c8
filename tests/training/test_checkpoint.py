"""Checkpoints: whole or not at all, and never unpickled."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import PICKLES, Planted
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


def rewritten(path: Path, content: bytes, name: str = "progress.pt") -> None:
    """Puts another file into a checkpoint, with the manifest that goes with it, as only a forger would."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sha256"][name] = hashlib.sha256(content).hexdigest()
    (path / name).write_bytes(content)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["method.safetensors", "progress.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "foreign", "truncated", "a flipped bit", "a lost block"])
def test_a_damaged_one_is_named_and_the_previous_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    save(tmp_path, state(1))
    save(tmp_path, state(2))
    path = tmp_path / PLACE / name
    content, draw = path.read_bytes(), random.Random(0)
    for _ in range(1 if damage in ("missing", "foreign") else 150):
        place, block = draw.randrange(len(content)), 4096 * draw.randrange(-(-len(content) // 4096))
        damaged = {
            "missing": b"",
            "foreign": b"not a checkpoint at all",
            "truncated": content[:place],
            "a flipped bit": content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :],
            "a lost block": content[:block] + bytes(len(content[block : block + 4096])) + content[block + 4096 :],
        }
        path.write_bytes(damaged[damage])
        if damage == "missing":
            path.unlink()
        caplog.clear()
        assert load(tmp_path).epoch == 1
        assert f"checkpoint {path.parent} cannot be read (" in caplog.text


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, state(1))
    (tmp_path / "epoch-00001-batch-0000000" / "method.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError,
        match=r"no readable checkpoint in .*: epoch-00001-batch-0000000 are damaged or of another run; remove them",
    ):
        load(tmp_path)


def test_one_of_another_run_place_or_method_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "ours", state(1))
    theirs, moved, foreign = state(2), state(2), state(4)
    foreign.method = {"foreign": torch.ones(1)}
    checkpoint.save(tmp_path / "theirs", theirs, "another run")
    save(tmp_path / "moved", moved)
    save(tmp_path / "ours", foreign)
    shutil.copytree(tmp_path / "theirs" / PLACE, tmp_path / "ours" / PLACE)
    shutil.copytree(tmp_path / "moved" / PLACE, tmp_path / "ours" / PLACE.replace("2", "3"))
    assert load(tmp_path / "ours").epoch == 1
    reasons = re.findall(r"(epoch-\S+) cannot be read \(ValueError: (.*)\)", caplog.text)
    assert reasons == [
        ("epoch-00004-batch-0000000", "its tensors are not this method's"),
        ("epoch-00003-batch-0000000", f"it was written as {PLACE}"),
        (PLACE, "it is of a run with other settings or images"),
    ]


def weird(name: str, value: object) -> Callable[[dict], object]:
    def change(progress: dict) -> object:
        *names, last = name.split(".")
        inner = progress
        for each in names:
            inner = inner[int(each) if each.isdigit() else each]
        inner[last] = value
        return progress

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(weird(name, value) for name in ("epoch", "batch") for value in (None, "x", 7)),
        *(weird("totals", value) for value in (None, [], {"loss": None})),
        *(weird("optimizer", value) for value in (None, [], {}, {"state": {}, "param_groups": []})),
        weird("optimizer.state.0.exp_avg", torch.zeros(9)),
        weird("optimizer.state.0", None),
        weird("optimizer.param_groups.0.maximize", True),
        weird("more", 1),
        lambda progress: None,
        lambda progress: [],
    ],
)
def test_a_forged_progress_is_passed_over(tmp_path: Path, change: Callable[[dict], object]) -> None:
    save(tmp_path, state(1))
    save(tmp_path, state(2))
    progress, stream = torch.load(tmp_path / PLACE / "progress.pt", weights_only=True), io.BytesIO()
    torch.save(change(progress), stream)
    rewritten(tmp_path / PLACE, stream.getvalue())
    assert load(tmp_path).epoch == 1


@pytest.mark.parametrize("name", ["method.safetensors", "progress.pt"])
def test_a_pickle_with_code_in_it_does_not_run(tmp_path: Path, planted: Planted, name: str) -> None:
    save(tmp_path / "checkpoint", state(2))
    for write in PICKLES.values():
        write(planted, tmp_path / "attack")
        rewritten(tmp_path / "checkpoint" / PLACE, (tmp_path / "attack").read_bytes(), name)
        with pytest.raises(ValueError, match="no readable checkpoint"):
            load(tmp_path / "checkpoint")


@pytest.mark.parametrize("claimed", [0, 1, 0x7FFFFFFF])
def test_an_archive_that_lies_about_its_size_is_passed_over(tmp_path: Path, claimed: int) -> None:
    save(tmp_path, state(1))
    save(tmp_path, state(2))
    content = bytearray((tmp_path / PLACE / "progress.pt").read_bytes())
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        directory = archive.start_dir
    for offset in (20, 24):  # sizes in the first entry of the archive's directory, packed and unpacked
        struct.pack_into("<I", content, directory + offset, claimed)
    rewritten(tmp_path / PLACE, bytes(content))
    assert load(tmp_path).epoch == 1


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
            (folder / PLACE).mkdir()
        if not run_until(operations, folder):
            break
        epochs.append(load(folder).epoch)
        save(folder, state(2))
        assert load(folder).epoch == 2
        assert not (folder / ".unfinished").exists()
    assert operations > 8
    assert epochs == sorted(epochs)
    assert epochs[0] == 1


def test_damaged_ones_of_later_places_do_not_push_good_ones_out(tmp_path: Path) -> None:
    for epoch in (1, 7, 8):
        save(tmp_path, state(epoch))
    for name in ("epoch-00007-batch-0000000", "epoch-00008-batch-0000000"):
        (tmp_path / name / "progress.pt").write_bytes(b"")
    save(tmp_path, state(1))
    save(tmp_path, state(2))
    assert load(tmp_path).epoch == 2
    assert (tmp_path / "epoch-00001-batch-0000000").exists()


@pytest.mark.parametrize("place", [".unfinished", "epoch-00001-batch-0000000"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_lies_where_one_is_to_be_goes_and_no_link_is_followed(tmp_path: Path, place: str, kind: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / place).write_text("half") if kind == "file" else (folder / place).symlink_to(tmp_path / "mine")
    save(folder, state(1))
    assert load(folder).epoch == 1
    assert (tmp_path / "mine/file").read_text() == "mine"


def test_without_room_it_says_so_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    save(tmp_path, state(1))
    with file_size_limit(100), pytest.raises(OSError, match="File too large"):
        save(tmp_path, state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-00001-batch-0000000"]
    assert load(tmp_path).epoch == 1
