"""SIGTERM, SIGINT, SIGHUP and the end of a launcher: requests that the training loop answers when a step is done."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

ECHO = 2.0
"""Seconds in which a second signal is taken for the first one's echo: Ctrl-C and cluster schedulers reach all
processes, and torchrun then passes on to its workers what they have already got."""

LAUNCHER = os.getppid() if {"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND"} & os.environ.keys() else None
"""Process of torchrun or `accelerate launch`, which set these variables; None where there is none."""


@contextmanager
def collected() -> Iterator[list[int]]:
    """Collects the numbers of signals instead of dying of them; a second one that is no echo ends the process.

    SIGHUP stays ignored where it is, as by nohup.
    """
    received: list[int] = []
    first = 0.0

    def note(number: int, frame: object) -> None:
        nonlocal first
        if not received:
            first = time.monotonic()
        elif time.monotonic() - first > ECHO:
            signal.signal(number, previous[number])
            signal.raise_signal(number)
            return
        received.append(number)

    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    previous = {number: signal.signal(number, note) for number in SIGNALS if not (ignored and number == signal.SIGHUP)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def orphaned() -> bool:
    """Whether the launcher is gone: a kill of it alone leaves its processes, which nobody could stop or see end."""
    return LAUNCHER is not None and os.getppid() != LAUNCHER


def obey_parent_alone(worker: int) -> None:
    """A loader process's `worker_init_fn`: it ignores SIGINT, SIGHUP, and SIGTERM but from its parent while that lives.

    Ctrl-C and schedulers signal all processes. A worker that died of it would take the training down in mid-step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_await_end, args=(os.getppid(),), daemon=True).start()


def _await_end(parent: int) -> None:
    sender = None
    while sender != parent and os.getppid() == parent:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
    os._exit(0)
