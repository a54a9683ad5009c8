"""Files written whole; what hostile ones do when read is in test_hostile_files.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ssl_gradmix.files import parse_yaml, write_whole


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[3, -3, 0, +1]", [3, -3, 0, 1]),
        ("[1e-3, .5, 5., 1.5e3, -.5E+2]", [0.001, 0.5, 5.0, 1500.0, -50.0]),
        ("[010, 0x10, 1_0, 2020-01-01, 1.2.3, '5', a-b]", ["010", "0x10", "1_0", "2020-01-01", "1.2.3", "5", "a-b"]),
        ("[true, null, ~, abc]", [True, None, None, "abc"]),
        ('{"a": [1e-05, null, "x\\u00e9", "1:30"]}', {"a": [1e-05, None, "xé", "1:30"]}),
    ],
)
def test_what_does_not_look_like_a_number_is_none(text: str, value: object) -> None:
    assert parse_yaml(text) == value
    assert list(map(type, parse_yaml(text))) == list(map(type, value))


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_lies_where_a_file_is_being_written_is_not_followed(tmp_path: Path, kind: str) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    temporary = tmp_path / f".new.{os.getpid()}.tmp"
    temporary.write_text("left by a kill") if kind == "file" else temporary.symlink_to(other)
    write_whole(tmp_path / "new", lambda path: path.write_text("whole"))
    assert ((tmp_path / "new").read_text(), other.read_text()) == ("whole", "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "other"]
