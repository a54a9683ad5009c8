"""How the benchmarks take time: what is compared is run in turn, so that a machine that slows down slows all."""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch


class Times(NamedTuple):
    """Seconds of each round: that passed, and of the processor, which other programs on the machine disturb less."""

    wall: list[float]
    processor: list[float]


def take_turns(runs: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, Times]:
    """Calls every run once a round, after two rounds to warm up; the order turns from round to round."""
    names = list(runs)
    taken = {name: Times([], []) for name in names}
    for turn in range(-2, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wall, processor = seconds(runs[name], device)
            if turn >= 0:
                taken[name].wall.append(wall)
                taken[name].processor.append(processor)
    return taken


def seconds(run: Callable[[], object], device: str = "cpu") -> tuple[float, float]:
    """Wall and processor time of one call; a GPU is waited for."""
    synchronize(device)
    wall, processor = time.perf_counter(), time.process_time()
    run()
    synchronize(device)
    return time.perf_counter() - wall, time.process_time() - processor


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Median of the rounds' ratios, with their range."""
    ratios = sorted(one / two for one, two in zip(ours, theirs, strict=True))
    return f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"


def median_ms(times: list[float]) -> str:
    return f"{statistics.median(times) * 1e3:,.1f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def origin(device: str = "cpu") -> str:
    """Where, when and of which commit something was measured."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # a machine without git, or no checkout
        commit = "unknown"
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{where}, {versions}, {time.strftime('%F')}, commit {commit}"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    return parser
