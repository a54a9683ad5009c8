"""Compares runs on one page: settings that differ, results, training curves and figures.

Reads the run folders and what the evaluations wrote there. Writes report.html, which opens without
network, and report.md, its tables.

    python eval/report.py runs/a runs/b
    python eval/report.py runs/a runs/b results/resnet18 --out report
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ssl_gradmix import cli
from ssl_gradmix.console import show
from ssl_gradmix.evaluation.report import write_report


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__, usage="%(prog)s RUN [RUN ...] [options]")
    parser.add_argument(
        "runs",
        type=str,
        nargs="+",
        help="Run folders, or folders of results. Differences are the first one minus another one.",
    )
    parser.add_argument("--out", type=str, default="report", help="Folder to write to.")
    options = parser.parse_args(argv)
    for path in write_report(options.runs, options.out):
        show(path)


if __name__ == "__main__":
    sys.exit(cli.run(main))
