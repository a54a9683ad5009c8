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
    if any(cell.data == "overlaid-digits" for cell in cells):
        images.overlaid_digits(grid.subset, grid.overlaid)
    waiting, running, failed = list(cells), {}, []
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                running[cell] = commands(cell, grid, results), None
            for cell, (started, process) in list(running.items()):
                if process is not None and process.poll() is None:
                    continue
                try:
                    running[cell] = started, next(started)
                except StopIteration:
                    del running[cell]
                except (ValueError, KeyError, OSError) as error:
                    print(f"{cell}: failed: {error}", flush=True)
                    failed.append(cell)
                    del running[cell]
            time.sleep(0.05)
    finally:
        processes = [process for _, process in running.values() if process is not None]
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(60)  # a training saves what it has done
            except subprocess.TimeoutExpired:
                process.kill()
        signal.signal(signal.SIGTERM, before)
    return failed


def commands(cell: Cell, grid: Grid, results: Path) -> Iterator[subprocess.Popen]:
    """Starts what a cell still lacks, one command whenever it is asked for the next, and appends the cell's rows.

    Raises:
        ValueError: A command has failed, or its results are not what is wanted.
    """
    run = cell.run(grid)
    run.parent.mkdir(parents=True, exist_ok=True)
    with run.with_name(f"{run.name}.txt").open("ab") as output:
        # Commands inherit the lock with the file that they write to: one that outlives this process keeps others
        # from its run folder.
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{cell}: another process runs it", flush=True)
            return
        if cell in rows.finished(rows.read(results), grid):
            return
        print(f"{cell}: output in {output.name}", flush=True)
        for step in steps(cell, grid):
            if step.writes is None or not step.writes.exists():
                process = start(step, output, grid.threads)
                yield process
                if process.returncode != 0:
                    raise ValueError(f"status {process.returncode}, see {output.name}")
        rows.append(results, rows.condense(cell, grid))
        print(f"{cell}: done", flush=True)


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
