"""Forest plots: what each variant changes, measure by measure."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from evidence.cells import VARIANTS
from evidence.differences import Values, compare
from evidence.rows import MEASURES
from ssl_gradmix.evaluation.plots import ACCENT, GRID, INK, MUTED
from ssl_gradmix.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 4


def forest(found: Values, reference: str) -> Figure | None:
    """Draws each variant's paired difference to a reference with its 95% interval, a panel a measure.

    Filled marks are differences whose interval leaves 0 out. To the right is better in every panel: where less is
    better, the axis runs the other way.

    Args:
        found: Of one grid and method.
        reference: The variant that is subtracted.

    Returns:
        None where there is nothing to compare.
    """
    from matplotlib.figure import Figure

    compared = {name: compare(found, name, reference) for name in VARIANTS if name != reference}
    compared = {name: differences for name, differences in compared.items() if differences}
    shown = [measure for measure in MEASURES if any(measure in differences for differences in compared.values())]
    if not shown:
        return None
    lines = math.ceil(len(shown) / COLUMNS)
    figure = Figure(figsize=(2.4 * COLUMNS, lines * (0.9 + 0.2 * len(compared))), layout="constrained")
    panels = figure.subplots(lines, COLUMNS, squeeze=False).flatten()
    places = {name: -i for i, name in enumerate(compared)}
    for axes, measure in zip(panels, shown, strict=False):
        scale = 100 if measure.share else 1
        for name, differences in compared.items():
            if measure not in differences:
                continue
            difference = differences[measure]
            clear = difference.verdict(measure) != "open"
            axes.plot([scale * difference.low, scale * difference.high], [places[name]] * 2, color=ACCENT, linewidth=1)
            face = ACCENT if clear else "white"
            axes.plot(scale * difference.mean, places[name], "o", color=ACCENT, markerfacecolor=face, markersize=4)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_title(measure.title, loc="left", fontsize=7, color=INK)
        axes.set_yticks(list(places.values()), list(places))
        axes.set_ylim(-len(compared) + 0.5, 0.5)
        axes.grid(axis="x", color=GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0, labelsize=7, colors=INK)
        if not measure.larger_is_better:
            axes.invert_xaxis()
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel(
        f"difference to {reference} (shares in percentage points), 95% interval over seeds; right is better",
        fontsize=8,
        color=INK,
    )
    return figure


def write(path: Path, figure: Figure) -> None:
    """Writes a figure as PNG of 32 colors, which is small enough for a repository."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    picture = Image.open(drawn).convert("RGB").quantize(32)
    write_whole(path, lambda temporary: picture.save(temporary, format="PNG", optimize=True))
