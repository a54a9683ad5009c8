"""Figures of the experiments.

    python -m experiments.figures RUN docs/shortcuts.png

draws stamped views, where the plain SimCLR of a run looks, mixed views, and the linear probes.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments import rows
from experiments.rows import MEASURES
from experiments.stamps import StampedViews, Stamps
from ssl_gradmix import GradMix
from ssl_gradmix.data.augmentation import Augmentation
from ssl_gradmix.data.datasets import MEMORY, Data
from ssl_gradmix.data.open_set import load_known
from ssl_gradmix.evaluation import plots
from ssl_gradmix.evaluation.encoders import load_encoder

SHORT = (
    *("linear", "knn", "corruption_error", "osr_auroc"),
    *("projector_auroc", "known_ood_auroc", "known_corruption_error"),
)
"""Measures of the summary and of `forest`."""

REFERENCE = "third-view"
"""Variant that they are compared with: as many encoder passes, no mixing."""

TITLES = {
    "plain": "two plain views",
    "third-view": "a third plain view",
    "random-box": "mixed at a random place",
    "gradmix": "GradMix",
    "oracle": "mixed on the stamp",
}
IMAGES = 6


def shown(compared: pd.DataFrame) -> list[str]:
    """The measures of `forest` for which there are differences."""
    return [measure for measure in SHORT if measure in compared.index]


def forest(compared: pd.DataFrame, variants: list[str]) -> Figure:
    """Paired differences to `REFERENCE` with their 95% intervals, one panel per measure in `SHORT`.

    Filled marks are differences whose interval excludes 0. Right is better in every panel: the axis
    is inverted if smaller values are better.
    """
    measures = shown(compared)
    variants = [name for name in variants if name in compared.index.get_level_values("variant")]
    size = (1.5 + 2.1 * len(measures), 1 + 0.2 * len(variants))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        kind = MEASURES[measure]
        scale = 100 if kind.percent else 1
        for variant, found in compared.loc[measure].iterrows():
            y = -variants.index(variant)
            axes.plot([scale * found.low, scale * found.high], [y, y], color="C0", linewidth=1)
            face = "white" if found.verdict == "open" else "C0"
            mark = {"color": "C0", "markerfacecolor": face, "markersize": 4}
            axes.plot(scale * found["mean"], y, "o", **mark)
        axes.axvline(0, color="0.5", linewidth=0.8)
        axes.set_title(textwrap.fill(kind.title, 34), loc="left", fontsize=7)
        axes.margins(y=0.15)
        axes.set_yticks([-i for i in range(len(variants))], variants)
        axes.tick_params(labelsize=7, length=0)
        axes.grid(axis="x", color="0.9")
        axes.spines[["top", "right", "left"]].set_visible(False)
        if kind.better < 0:
            axes.invert_xaxis()
    over = "95% interval over seeds, or open-set trials"
    label = f"difference to {REFERENCE} in points, {over}; right is better"
    figure.supxlabel(label, fontsize=7)
    return figure


def accuracy_by_bits(found: pd.DataFrame) -> Figure:
    """SimCLR's linear probe without stamps over the bits of the stamps, one line per variant."""
    bits = (0, 4, 9, 16)
    probe = found[(found.measure == "unstamped_linear") & (found.method == "simclr")]
    probe = probe.assign(bits=probe.data.map({f"stamps-{n}": n for n in bits})).dropna()
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for (variant, title), color in zip(TITLES.items(), (*plots.COLORS, "0.4"), strict=True):
        seeds = probe[probe.variant == variant].groupby("bits")["value"].agg(["mean", "std"]) * 100
        marks = {"marker": "o", "markersize": 4, "capsize": 2, "color": color}
        axes.errorbar(seeds.index, seeds["mean"], seeds["std"].fillna(0), label=title, **marks)
    axes.axhline(10, color="0.5", linewidth=0.8, linestyle=":")
    axes.text(16, 10, "chance", ha="right", va="bottom", fontsize=8, color="0.4")
    axes.set(xlabel="bits of the stamp (0: no stamp)", ylabel="linear probe without stamps, %")
    axes.set_xticks(bits)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def mixed_views(run: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Stamped views (N, H, W, 3), the maps of a run's encoder (N, H, W), and mixed views."""
    encoder = load_encoder(run, feature="projector")
    images = load_known(Data(**encoder.config["data"]), "train")
    augmentation = Augmentation(**encoder.config["augmentation"])
    how = (augmentation, encoder.size, encoder.mean, encoder.std)
    views = StampedViews(*how, stamps=Stamps(9))
    torch.manual_seed(1)
    first, second = views(images.originals(MEMORY)[torch.randperm(len(images))[:64]], 2)
    gradmix = GradMix(layers=["layer3"], lam_range=(0.85, 0.85))
    with gradmix.observe(encoder.model[0]) as activations:
        z0, z1 = encoder.model(torch.cat([first, second]).requires_grad_()).chunk(2)
    loss = -torch.cosine_similarity(z0, z1).sum()
    mixed = gradmix(first, loss, activations, donors=second)
    pixels = ((each * views.std + views.mean).clamp(0, 1) for each in (first, mixed.images))
    before, after = (each.permute(0, 2, 3, 1) for each in pixels)
    return before, mixed.attribution, after


def shortcuts(pictures: tuple[Tensor, Tensor, Tensor], measured: pd.DataFrame) -> Figure:
    """Views, maps and mixed views on the left, and a bar for each variant on the right."""
    figure = Figure(figsize=(10.5, 3), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.3, 1))
    lines = (
        *("views: each image\nhas a stamp of its own", "where SimCLR\nhas learned to look"),
        "GradMix mixes\nanother image in",
    )
    grid = left.subplots(3, IMAGES, gridspec_kw={"hspace": 0.05, "wspace": 0.05})
    for row, text, pictured in zip(grid, lines, pictures, strict=True):
        row[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)
        for axes, picture in zip(row, pictured, strict=False):
            axes.imshow(picture, cmap="inferno")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    values = measured.groupby(["data", "variant"])["value"].agg(list)
    clean = 100 * np.mean(values["stamps-0", "plain"])
    axes = right.subplots()
    for y, name in enumerate(TITLES):
        seeds = 100 * np.array(values["stamps-9", name])
        color, ink = (plots.COLORS[0], "white") if name == "gradmix" else ("0.75", "black")
        axes.barh(-y, seeds.mean(), height=0.62, color=color)
        axes.plot(seeds, np.full(len(seeds), -y), "|", color="0.25", markersize=8)
        axes.text(1, -y, f"{seeds.mean():.0f}%", va="center", fontsize=9, color=ink)
    axes.set_yticks([-y for y in range(len(TITLES))], TITLES.values(), fontsize=9)
    for reference in (10, clean):
        axes.axvline(reference, color="0.4", linewidth=0.8, linestyle=":")
    axes.set_title("linear probe of the class, on images without stamps", fontsize=9, loc="left")
    below = "marks: seeds; dotted: chance, and two plain\nviews trained without stamps"
    axes.set_xlabel(f"{below} ({clean:.0f}%)", fontsize=8, loc="left")
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


if __name__ == "__main__":
    run, out = map(Path, sys.argv[1:])
    found = rows.read(rows.RESULTS / "shortcuts.jsonl")
    usual = "grid == 'cpu' and method == 'simclr' and measure == 'unstamped_linear'"
    plots.write(out, shortcuts(mixed_views(run), found.query(usual)))
