"""Signals ask a training to stop: an echo changes nothing, a later second one insists, loader processes go on."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
import torch
from training_support import image_set

from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.settings import Augmentation
from ssl_gradmix.training import batches, signals


def test_signals_are_collected_and_handlers_restored() -> None:
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with signals.collected() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun passes it on to a process that has got it already
        os.kill(os.getpid(), signal.SIGINT)
    assert received == [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before


def test_a_closed_terminal_is_a_signal_too_unless_nohup_has_it_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup themselves
    try:
        with signals.collected() as received:
            os.kill(os.getpid(), signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with signals.collected() as ignoring:
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (received, ignoring) == ([signal.SIGHUP], [])


def test_a_second_one_after_a_while_does_what_it_always_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "ECHO", -1.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's shell has it ignored
    try:
        with signals.collected() as received:
            os.kill(os.getpid(), signal.SIGINT)
            assert received == [signal.SIGINT]
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_loader_processes_outlive_signals_to_the_whole_group_but_obey_their_parent() -> None:
    views = Views(Augmentation(), 16, (0.5,) * 3, (0.5,) * 3)
    indices = batches.BatchIndices(36, 4, 0)
    source = batches.Batches(image_set(), views, indices, 2, "workers", 2, torch.device("cpu"))
    epoch = source.epoch(0, 0)
    next(epoch), next(epoch)  # one of each worker: both are set up
    workers = source.loader._iterator._workers
    for name in ("-INT", "-TERM", "-HUP"):
        subprocess.run(["kill", name, *(str(worker.pid) for worker in workers)], check=True)
    assert len(list(epoch)) == 7
    assert all(worker.is_alive() for worker in workers)
    workers[0].terminate()
    workers[0].join(20)
    assert workers[0].exitcode == 0
