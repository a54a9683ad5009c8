"""Files that are written whole, and read as plain data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssl_gradmix.files import parse_yaml, read_json, read_yaml, write_whole


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
        (read_yaml, b"[1]: 2"),
    ],
)
def test_damaged_file_raises(read: Callable[[Path], Any], content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=str(tmp_path / "x")):
        read(tmp_path / "x")


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("a: 1\nb: 2\na: 3", "a", 3),
        ("training: {epochs: 1}\n\ntraining:\n  seed: 2", "training", 3),
        ("a:\n  b: {c: 1,\n    c: 2}", "a.b.c", 3),
        ("- {x: 1}\n- {x: 1, 'x': 2}", "1.x", 2),
        ("training.epochs: 1\ntraining:\n  epochs: 2", "training.epochs", 3),
    ],
)
def test_key_given_twice_raises(text: str, key: str, line: int, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"c\.yaml.*'{key}'.*line {line}$"):
        read_yaml(tmp_path / "c.yaml")


def test_yaml_values_are_plain() -> None:
    text = "{a: 1e-3, b: 2024-01-01, c: &x {d: -1.5E2}, e: {<<: *x, f: 1}, classes: [yes, 01, 1e3]}"
    assert parse_yaml(text) == {
        **{"a": 0.001, "b": "2024-01-01", "c": {"d": -150.0}, "e": {"d": -150.0, "f": 1}},
        "classes": ["yes", "01", "1e3"],
    }
