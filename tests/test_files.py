"""Files that are written whole, and read as plain data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssl_gradmix.files import read_json, read_yaml, write_whole


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_link_in_place_of_the_temporary_file_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / f".new.{os.getpid()}.tmp").symlink_to(other)
    write_whole(tmp_path / "new", lambda path: path.write_text("whole"))
    assert ((tmp_path / "new").read_text(), other.read_text()) == ("whole", "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "other"]


@pytest.mark.parametrize(
    ("read", "content"),
    [
        (read_json, b"{"),
        (read_json, b"\xff"),
        (read_json, b"[" * 1_000_000),
        (read_yaml, b"{"),
        (read_yaml, b"[1, 2]"),
        (read_yaml, b"\xff"),
        (read_yaml, b"!!python/name:os.system x"),
    ],
)
def test_damaged_file_raises(read: Callable[[Path], Any], content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=str(tmp_path / "x")):
        read(tmp_path / "x")
