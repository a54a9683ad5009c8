"""Runs cells, one command after the other; a cell that was stopped at any moment goes on where it was."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from evidence import images, rows
from evidence.cells import Cell, Grid, Step, steps

ROOT = Path(__file__).parents[2]


class Runner:
    """Runs the cells of a grid, several at a time, and appends their rows.

    Args:
        grid: What they have in common.
        results: File of rows.
    """

    def __init__(self, grid: Grid, results: Path) -> None:
        self.grid, self.results = grid, results
        self._running: set[subprocess.Popen] = set()
        self._lock, self._stopped = threading.Lock(), threading.Event()

    def run(self, cells: Sequence[Cell], jobs: int) -> list[Cell]:
        """Runs cells that have no rows yet, in their order.

        Returns:
            Those that failed; their output says why.

        Raises:
            SystemExit: SIGTERM or SIGINT came; commands were asked to stop, and the same call goes on from there.
        """
        if any(cell.data != "two-cue" for cell in cells):
            images.subset(self.grid.data, self.grid.images, self.grid.subset)
        if any(cell.data == "two-cue" for cell in cells):
            images.two_cues(self.grid.pairs, self.grid.two_cues)
        with self._signals() as received, ThreadPoolExecutor(jobs) as pool:
            done = list(pool.map(self._cell, cells))
        if received:
            raise SystemExit(128 + received[0])
        return [cell for cell, fine in zip(cells, done, strict=True) if not fine]

    def _cell(self, cell: Cell) -> bool:
        """Runs one cell; False where it failed."""
        if self._stopped.is_set():
            return True
        run = cell.run(self.grid)
        output = run.with_name(f"{run.name}.txt")
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("ab") as file:
            # Commands inherit the lock with the file that they write to: one that outlives this process keeps others
            # from its run folder.
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{cell}: another process runs it", flush=True)
                return True
            if cell in rows.finished(rows.read(self.results), self.grid):
                return True
            print(f"{cell}: output in {output}", flush=True)
            for step in steps(cell, self.grid):
                if step.writes is not None and step.writes.exists():
                    continue
                status = self._command(step, file)
                if self._stopped.is_set():
                    return True
                if status != 0:
                    print(f"{cell}: failed with status {status}: {step.shell(self.grid.threads)}", flush=True)
                    return False
            try:
                rows.append(self.results, rows.condense(cell, self.grid))
            except (ValueError, KeyError, OSError) as error:
                print(f"{cell}: no rows: {error}", flush=True)
                return False
            print(f"{cell}: done", flush=True)
            return True

    def _command(self, step: Step, output: BinaryIO) -> int:
        """Runs a command to its end, its output added to a file; returns its status."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.grid.threads)}
        paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        output.write(f"$ {step.shell(self.grid.threads)}\n".encode())
        output.flush()
        with self._lock:  # so that a signal finds every command that was started
            if self._stopped.is_set():
                return 0
            process = subprocess.Popen(
                [sys.executable, *step.command[1:]],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            self._running.add(process)
        status = process.wait()
        with self._lock:
            self._running.discard(process)
        return status

    @contextmanager
    def _signals(self) -> Iterator[list[int]]:
        """Passes SIGTERM and SIGINT on to the commands, and starts no more."""
        received: list[int] = []

        def stop() -> None:
            self._stopped.set()
            with self._lock:
                for process in self._running:
                    process.terminate()

        def note(number: int, frame: object) -> None:
            received.append(number)
            threading.Thread(target=stop).start()  # the lock may be held by the very code that was interrupted

        previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield received
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
