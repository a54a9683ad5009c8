"""The report that compares runs: an HTML page with its figures, and a Markdown file with its tables."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from ssl_gradmix.evaluation.report import sections
from ssl_gradmix.evaluation.report.overview import overview
from ssl_gradmix.evaluation.report.page import render_html, render_markdown
from ssl_gradmix.evaluation.report.runs import read_runs
from ssl_gradmix.files import write_whole

__all__ = ["write_report"]


def write_report(
    paths: Sequence[str], out: str | Path, map_method: Literal["pca", "tsne", "none"] = "none"
) -> tuple[Path, Path]:
    """Compares runs in `report.html`, which holds its figures and needs no network, and `report.md`, tables only.

    What a run lacks is said in its place. Values are compared only where data and protocol are the same.

    Args:
        paths: Run folders, or folders of results that `--out` of an evaluation made. Differences are to the first.
        out: Folder to write to.
        map_method: How test features are laid out in the plane. For a map the images are read that the runs name.

    Returns:
        The two files.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If a folder is neither a run nor holds results, a file is damaged, or no run was evaluated.
    """
    runs = read_runs(paths)
    title = f"{len(runs)} runs compared" if len(runs) > 1 else f"Report on {runs[0].name}"
    chapters = [
        overview(runs),
        sections.accuracy(runs),
        sections.detection(runs, "osr"),
        sections.detection(runs, "ood"),
        sections.corruption(runs),
        sections.reliance(runs),
        *([] if map_method == "none" else [sections.maps(runs, map_method)]),
        sections.attribution(runs),
        sections.training(runs),
    ]
    texts = {
        Path(out, "report.html"): render_html(title, [run.name for run in runs], chapters),
        Path(out, "report.md"): render_markdown(title, chapters),
    }
    for path, text in texts.items():
        write_whole(path, partial(Path.write_text, data=text, encoding="utf-8", errors="backslashreplace"))
    return tuple(texts)
