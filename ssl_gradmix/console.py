"""Text for the terminal: control characters are escaped, and long work reports its progress."""

from __future__ import annotations

import logging
import sys
import time
import unicodedata
from typing import TextIO

from tqdm import tqdm

LINE_SECONDS = 60.0
"""Time between two lines of progress where there is no terminal."""

_METER = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}]"


def escape(text: object) -> str:
    """Escapes control characters, which could clear the screen or rewrite lines above.

    Names of files, classes and runs can contain them. Newlines and tabs are kept.
    """
    return "".join(
        c if c in "\n\t" or unicodedata.category(c)[0] != "C" else ascii(c)[1:-1] for c in str(text)
    )


def show(text: object, file: TextIO | None = None) -> None:
    """Prints a line, by default to stdout, with control characters escaped."""
    tqdm.write(escape(text), file=file or sys.stdout)


class Formatter(logging.Formatter):
    """Formats log messages with control characters escaped."""

    def format(self, record: logging.LogRecord) -> str:
        return escape(super().format(record))


class Lines:
    """Progress as a line a minute, for logs of schedulers and other files."""

    def __init__(self, total: int, description: str, unit: str = "it", initial: int = 0) -> None:
        self.total, self.description, self.unit, self.n = total, description, unit, initial
        self.initial, self.began = initial, time.monotonic()
        self.shown = self.began

    def update(self, n: int = 1) -> None:
        self.n += n
        now = time.monotonic()
        if now - self.shown < LINE_SECONDS:
            return
        self.shown = now
        more = {"unit": self.unit, "initial": self.initial, "bar_format": _METER}
        passed = now - self.began
        meter = tqdm.format_meter(self.n, self.total, passed, prefix=self.description, **more)
        show(meter, sys.stderr)

    def close(self) -> None:
        """For the interface of a bar; nothing is open."""

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def progress(
    total: int,
    description: str,
    unit: str = "it",
    initial: int = 0,
    delay: float = 0.0,
    silent: bool = False,
) -> tqdm | Lines:
    """Reports the progress of long work: a bar on a terminal, and elsewhere a line a minute.

    Args:
        total: Number of steps.
        description: What is done.
        unit: Name of a step.
        initial: Steps already done.
        delay: Seconds after which a bar appears.
        silent: Reports nothing.
    """
    if silent or sys.stderr.isatty():
        more = {"unit": unit, "initial": initial, "delay": delay, "disable": silent}
        return tqdm(total=total, desc=escape(description), leave=False, **more)
    return Lines(total, description, unit, initial)
