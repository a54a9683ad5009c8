"""Does attribution find what makes two views agree? A deletion test on a trained encoder and its projector.

Two views of each training image are embedded, a box of one of them is replaced by another image as GradMix does it, and
the embedding's cosine similarity to the other view is read again. A place that carries the agreement costs more of it
than a box of the same size anywhere inside the image: differences are paired, image by image, with 95% t intervals over
images. Places are GradMix's regions, with either target; the center is the control that needs no gradient, as objects
tend to lie there.

    python benchmarks/deletion.py runs/simclr
    python benchmarks/deletion.py runs/a runs/b --layer layer2 --images 5000
    python benchmarks/deletion.py runs/plain-{0,1,2} runs/mixed-{0,1,2}

The last compares two kinds of training over their seeds, by the names of the run folders: what encoders lose where a
box anywhere or at the attributed place is replaced, which each encoder's own map marks.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import pandas as pd
import timing
import torch
from evidence.rows import paired_interval
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torchvision.ops import box_iou
from tqdm import tqdm

from ssl_gradmix import GradMix
from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.data.open_set import load_known
from ssl_gradmix.evaluation.encoders import Encoder, load_encoder
from ssl_gradmix.methods.nt_xent import nt_xent
from ssl_gradmix.settings import Augmentation, Data

PLACES = {
    "agreement": {},
    "agreement, max_mean": {"region": "max_mean"},
    "loss": {"target": "loss"},
    "center": {"region": "center"},
    "random": {"region": "random"},
}
"""GradMix's settings by the place of the box."""

KEPT = (0.9, 0.7, 0.5)
BATCH = 256

COSTS = {
    "anywhere": ("random", "whole"),
    "attributed": ("agreement", "whole"),
    "attributed, beyond anywhere": ("agreement", "random"),
    "center, beyond anywhere": ("center", "random"),
}
"""What is compared over seeds: the similarity where the first is replaced, less that of the second."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders of SimCLR")
    parser.add_argument("--layer", default="layer3", help="observed (default: %(default)s)")
    parser.add_argument("--images", type=int, default=2000, help="training images, at random (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of views, donors and random places (default: %(default)s)")
    options = parser.parse_args()
    print(f"{options.layer}, seed {options.seed}, {timing.origin()}\n")
    encoders = [load_encoder(run, feature="projector") for run in options.runs]
    found = [measure(encoder, options) for encoder in encoders]  # images by (kept, place), a frame a run
    header = ["run", "kept", "whole", *(f"{place}, beyond random" for place in PLACES if place != "random"), "IoU"]
    lines = [
        [encoder.run.name, f"{kept:.0%}", *line(similar[kept])]
        for encoder, similar in zip(encoders, found, strict=True)
        for kept in KEPT
    ]
    print(timing.table(header, lines))
    print("\nwhole: similarity before anything is replaced; IoU: of the boxes of agreement and loss")
    means = {str(e.run).rpartition("-")[::2]: similar.mean() for e, similar in zip(encoders, found, strict=True)}
    kinds = pd.concat(means, names=["kind", "seed"])
    if kinds.index.unique(0).size > 1 and all(seed.isdecimal() for seed in kinds.index.unique(1)):
        print(f"\nMeans over seeds, and differences paired by seed, with 95% t intervals\n\n{over_seeds(kinds)}")


def measure(encoder: Encoder, options: argparse.Namespace) -> pd.DataFrame:
    """Cosine similarities of one run's images to the other view: a line an image, columns (kept, place)."""
    images = load_known(Data(**encoder.config["data"]), "train")
    drawn = np.random.default_rng(options.seed).permutation(len(images))[: options.images]
    pixels = images.subset(drawn).pixels(encoder.size)
    views = Views(Augmentation(**encoder.config["augmentation"]), encoder.size, encoder.mean, encoder.std)
    temperature = encoder.config["method"]["temperature"]
    encoder.model.requires_grad_(True)  # attribution needs a graph
    torch.manual_seed(options.seed)
    batches = tqdm(pixels.split(BATCH), desc=encoder.run.name, disable=None)
    found = [delete(encoder.model, views(batch, 2), f"0.{options.layer}", temperature) for batch in batches]
    return pd.concat(found, ignore_index=True)


def delete(model: nn.Module, views: list[Tensor], layer: str, temperature: float) -> pd.DataFrame:
    """Similarities of the first views to the second, whole and with a box replaced at each place."""
    first, second = views
    with GradMix(layers=[layer]).observe(model) as observed:
        z0, z1 = model(torch.cat(views)).chunk(2)
    loss = nt_xent(z0, z1, temperature)
    state = torch.get_rng_state()
    found = {}
    for kept in KEPT:
        mixed = {}
        for place, settings in PLACES.items():
            torch.set_rng_state(state)  # the same donors at every place
            mixed[place] = GradMix(layers=[layer], lam_range=(kept, kept), **settings)(first, loss, observed, second)
        with torch.no_grad():
            found[kept, "whole"] = cosine_similarity(z0, z1)
            found |= {(kept, place): cosine_similarity(model(each.images), z1) for place, each in mixed.items()}
        found[kept, "iou"] = box_iou(mixed["agreement"].boxes, mixed["loss"].boxes).diagonal()
    return pd.DataFrame({key: values.detach().numpy() for key, values in found.items()})


def line(similar: pd.DataFrame) -> list[str]:
    """The table's cells of one run and share kept: each place against random ones, with half its interval."""
    cells = []
    for place in PLACES:
        if place != "random":
            mean, low, high = paired_interval((similar[place] - similar["random"]).tolist())
            cells.append(f"{mean:+.3f} ± {(high - low) / 2:.3f}")
    return [f"{similar['whole'].mean():.3f}", *cells, f"{similar['iou'].mean():.2f}"]


def over_seeds(similar: pd.Series) -> str:
    """A table of what each kind of training loses at each place, and of the differences of the others to the first.

    Args:
        similar: Mean similarities by kind, seed, share kept and place.
    """
    first, *others = similar.index.unique(0)
    lines = []
    for place, (replaced, otherwise) in COSTS.items():
        for kept in KEPT:
            costs = similar[:, :, kept, replaced] - similar[:, :, kept, otherwise]
            paired = [(costs[kind] - costs[first]).dropna().tolist() for kind in others]
            means = [f"{costs[kind].mean():+.3f}" for kind in (first, *others)]
            lines.append([place, f"{kept:.0%}", *means, *map(interval, paired)])
    names = [kind.rpartition("/")[2] for kind in (first, *others)]
    return timing.table(["place", "kept", *names, *(f"{name} - {names[0]}" for name in names[1:])], lines)


def interval(differences: list[float]) -> str:
    if not differences:
        return ""
    mean, low, high = paired_interval(differences)
    if math.isnan(low):  # of one seed
        return f"{mean:+.3f}"
    text = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


if __name__ == "__main__":
    main()
