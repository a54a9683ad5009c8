"""Figures of planted shortcuts: accuracy by bits; and stamped views, where an encoder looks, and what that costs.

python -m evidence.picture PLAIN_RUN --out ../docs/shortcuts.png     draws the latter, in the folder benchmarks
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from evidence import rows
from ssl_gradmix import GradMix, MixedViews
from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.data.open_set import load_known
from ssl_gradmix.evaluation import plots
from ssl_gradmix.evaluation.encoders import load_encoder
from ssl_gradmix.settings import Augmentation, Data

TITLES = {
    "plain": "two plain views",
    "third-view": "a third plain view",
    "random-box": "mixed at a random place",
    "gradmix": "GradMix",
    "oracle": "mixed on the stamp",
}
"""Of the variants in the figures."""
SHOWN = 6


def mixed_views(run: Path) -> tuple[np.ndarray, MixedViews, np.ndarray]:
    """Stamped views of training images and what GradMix makes of them with a run's encoder, (N, H, W, 3) in [0, 1]."""
    encoder = load_encoder(run, feature="projector")
    images = load_known(Data(**encoder.config["data"]), "train")
    augmentation = Augmentation(**encoder.config["augmentation"])
    views = Views(augmentation, encoder.size, encoder.mean, encoder.std, stamps=images.stamps)
    torch.manual_seed(1)
    first, second = views(images.originals(2**34)[torch.randperm(len(images))[:64]], 2)
    gradmix = GradMix(layers=["layer3"], lam_range=(0.85, 0.85))
    with gradmix.observe(encoder.model[0]) as observed:
        z = encoder.model(torch.cat([first, second]).requires_grad_())
    mixed = gradmix(first, -torch.cosine_similarity(*z.chunk(2)).sum(), observed, donors=second)
    pixels = ((each * views.std + views.mean).clamp(0, 1) for each in (first, mixed.images))
    before, after = (each.permute(0, 2, 3, 1).numpy() for each in pixels)
    return before, mixed, after


def draw(before: np.ndarray, mixed: MixedViews, after: np.ndarray, measured: pd.DataFrame) -> Figure:
    """Rows of views, of maps and of mixed views, and a bar for each variant."""
    figure = Figure(figsize=(10.5, 3), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.3, 1))
    lines = [
        "views: each image\nhas a stamp of its own",
        "where SimCLR\nhas learned to look",
        "GradMix mixes\nanother image in",
    ]
    grid = left.subplots(len(lines), SHOWN, gridspec_kw={"hspace": 0.05, "wspace": 0.05})
    for axes, text in zip(grid[:, 0], lines, strict=True):
        axes.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)
    for i, column in enumerate(grid.T):
        column[0].imshow(before[i])
        column[1].imshow(mixed.attribution[i], cmap="inferno")
        column[2].imshow(after[i])
        for axes in column:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    values = measured[measured.data == "stamps-9"].groupby("variant")["value"].agg(list)
    clean = 100 * measured[(measured.data == "stamps-0") & (measured.variant == "plain")]["value"].mean()
    axes = right.subplots()
    for y, name in enumerate(TITLES):
        seeds = 100 * np.array(values[name])
        color, ink = (plots.COLORS[0], "white") if name == "gradmix" else ("0.75", "black")
        axes.barh(-y, seeds.mean(), height=0.62, color=color)
        axes.plot(seeds, np.full(len(seeds), -y), "|", color="0.25", markersize=8)
        axes.text(1, -y, f"{seeds.mean():.0f}%", va="center", fontsize=9, color=ink)
    axes.set_yticks([-y for y in range(len(TITLES))], TITLES.values(), fontsize=9)
    for reference in (10, clean):
        axes.axvline(reference, color="0.4", linewidth=0.8, linestyle=":")
    axes.set_title("linear probe of the class, on images without stamps", fontsize=9, loc="left")
    below = f"marks: seeds; dotted: chance, and two plain\nviews trained without stamps ({clean:.0f}%)"
    axes.set_xlabel(below, fontsize=8, loc="left")
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def accuracy_by_bits(found: pd.DataFrame) -> Figure:
    """SimCLR's linear probe on images without stamps against the bits of the stamps, a line for each variant."""
    probe = found[(found.measure == "unstamped_linear") & (found.method == "simclr")]
    probe = probe.assign(bits=probe.data.map({f"stamps-{bits}": bits for bits in (0, 4, 9, 16)})).dropna()
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for i, (variant, title) in enumerate(TITLES.items()):
        seeds = probe[probe.variant == variant].groupby("bits")["value"].agg(["mean", "std"]) * 100
        if len(seeds):
            marks = {"marker": "o", "markersize": 4, "capsize": 2, "color": plots.COLORS[i % len(plots.COLORS)]}
            axes.errorbar(seeds.index, seeds["mean"], seeds["std"].fillna(0), label=title, **marks)
    axes.axhline(10, color="0.5", linewidth=0.8, linestyle=":")
    axes.text(16, 10, "chance", ha="right", va="bottom", fontsize=8, color="0.4")
    axes.set(xlabel="bits of the stamp (0: no stamp)", ylabel="linear probe without stamps, %", xticks=(0, 4, 9, 16))
    if axes.containers:
        figure.legend(loc="outside right center", frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of plain SimCLR on stamps")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results" / "shortcuts.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    given = parser.parse_args()
    usual = "grid == 'cpu' and method == 'simclr' and measure == 'unstamped_linear'"
    plots.write(given.out, draw(*mixed_views(given.run), rows.read(given.results).query(usual)))


if __name__ == "__main__":
    main()
