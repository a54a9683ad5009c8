"""What reaches the terminal."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable

import pytest

from ssl_gradmix import cli, console

HOSTILE = "a\x1b[2J\x9b\x08\x7f\u202eb\udc80\tc\n\u00e9"
ESCAPED = "a\\x1b[2J\\x9b\\x08\\x7f\\u202eb\\udc80\tc\n\u00e9"


def warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def fail(text: str) -> None:
    raise ValueError(text)


@pytest.mark.parametrize(
    "write",
    [console.show, logging.getLogger("ssl_gradmix").warning, warn, fail],
    ids=["show", "log", "warning", "error"],
)
def test_control_characters_are_escaped(
    write: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        cli.run(lambda argv: write(HOSTILE))
    shown = "".join(capsys.readouterr())
    assert "".join(shown.split()).endswith("".join(ESCAPED.split()))


@pytest.mark.parametrize(("terminal", "silent"), [(True, False), (False, False), (False, True)])
def test_progress_is_a_line_a_minute_without_a_terminal(
    terminal: bool,
    silent: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with console.progress(10, "epoch 1/2", "batch", initial=2, silent=silent) as bar:
        for _ in range(8):
            clock[0] += 25
            bar.update()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    if terminal:
        assert "2/10" in lines[0]
    else:
        reached = [] if silent else ["5/10", "8/10"]
        assert [line.split()[2] for line in lines] == reached
