"""Runs cells, one command after the other; a cell that was stopped at any moment goes on where it was."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from evidence import images, rows
from evidence.cells import Cell, Grid, Step, steps

ROOT = Path(__file__).parents[2]


def run(cells: Sequence[Cell], grid: Grid, results: Path, jobs: int) -> list[Cell]:
    """Runs cells that have no rows yet, in their order, several at a time, and appends their rows.

    Returns:
        Those that failed; their output says why.

    Raises:
        SystemExit: SIGTERM came: commands were asked to stop, and the same call goes on from there.
    """
    if any(cell.data != "two-cue" for cell in cells):
        images.subset(grid.data, grid.images, grid.subset)
    if any(cell.data == "two-cue" for cell in cells):
        images.two_cues(grid.pairs, grid.two_cues)
    waiting, running, failed = list(cells), {}, []
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                running[cell] = Running(cell, grid, results)
            for cell, each in list(running.items()):
                status = each.advance()
                if status is not None:
                    running.pop(cell).output.close()
                    failed += [cell] if status else []
            time.sleep(0.05)
    finally:
        processes = [each.process for each in running.values() if each.process is not None]
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(60)  # a training saves what it has done
            except subprocess.TimeoutExpired:
                process.kill()
        signal.signal(signal.SIGTERM, before)
    return failed


class Running:
    """A cell that is being run.

    Args:
        cell: The cell.
        grid: Of the cell.
        results: File of rows.
    """

    def __init__(self, cell: Cell, grid: Grid, results: Path) -> None:
        self.cell, self.grid, self.results = cell, grid, results
        self.process: subprocess.Popen | None = None
        run = cell.run(grid)
        run.parent.mkdir(parents=True, exist_ok=True)
        self.output = run.with_name(f"{run.name}.txt").open("ab")
        self.waiting = self._steps()

    def _steps(self) -> Iterator[Step]:
        """The steps that are still to be done."""
        # Commands inherit the lock with the file that they write to: one that outlives this process keeps others
        # from its run folder.
        try:
            fcntl.flock(self.output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{self.cell}: another process runs it", flush=True)
            return
        if str(self.cell) in rows.finished(rows.read(self.results), self.grid):
            return
        print(f"{self.cell}: output in {self.output.name}", flush=True)
        for step in steps(self.cell, self.grid):
            if step.writes is None or not step.writes.exists():
                yield step
        rows.append(self.results, rows.condense(self.cell, self.grid))
        print(f"{self.cell}: done", flush=True)

    def advance(self) -> int | None:
        """Starts the next command where the last one has ended; the cell's status once it is done or has failed."""
        status = 0 if self.process is None else self.process.poll()
        if status is None:
            return None
        if status:
            print(f"{self.cell}: failed with status {status}, see {self.output.name}", flush=True)
            return status
        try:
            step = next(self.waiting, None)
        except (ValueError, KeyError, OSError) as error:
            print(f"{self.cell}: no rows: {error}", flush=True)
            return 1
        if step is None:
            return 0
        self.process = start(step, self.output, self.grid.threads)
        return None


def start(step: Step, output: BinaryIO, threads: int) -> subprocess.Popen:
    """Starts a command in the folder of the repository, its output added to a file."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    output.write(f"$ {step.shell(threads)}\n".encode())
    output.flush()
    return subprocess.Popen(
        [sys.executable, *step.command[1:]],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
    )
