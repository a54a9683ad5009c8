"""Compares runs in one page: accuracies, open-set recognition, robustness, what was set differently.

Reads what the evaluations left in the run folders, and writes report.html, which opens without network, and report.md.

    python eval/report.py runs/a runs/b
    python eval/report.py runs/a runs/b results/resnet18 --out report --map tsne
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

from ssl_gradmix import command_line
from ssl_gradmix.evaluation.report import write_report


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line.Parser(description=__doc__, usage="%(prog)s RUN [RUN ...] [options]")
    parser.add_argument(
        "runs", type=str, nargs="+", help="Run folders, or folders of results; differences are to the first."
    )
    parser.add_argument("--out", type=str, default="report", help="Folder to write to.")
    parser.add_argument(
        "--map",
        type=Literal["pca", "tsne", "none"],
        default="none",
        help="Add a map of test features; for it the images are read that the runs' settings name.",
    )
    settings = parser.parse_args(argv)
    for path in write_report(settings.runs, settings.out, settings.map):
        print(path)


if __name__ == "__main__":
    sys.exit(command_line.run(main))
