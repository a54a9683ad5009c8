"""Does attribution find what makes two views agree? A deletion test on a trained encoder and its projector.

Two views of each training image are embedded, a box of one of them is replaced by another image as GradMix does it, and
the embedding's cosine similarity to the other view is read again. A place that carries the agreement costs more of it
than a box of the same size anywhere inside the image, all places alike: differences are paired, image by image, with
95% t intervals over images. Places are GradMix's, where its region is the box around the map's maximum or the densest
one, with either target; the center is the control that needs no gradient, as objects tend to lie there.

    python benchmarks/deletion.py runs/simclr
    python benchmarks/deletion.py runs/a runs/b --layer layer2 --images 5000
    python benchmarks/deletion.py runs/plain-{0,1,2} runs/mixed-{0,1,2}

The last compares two kinds of training over their seeds, by the names of the run folders: what encoders lose where a
box anywhere or at the attributed place is replaced, which each encoder's own map marks.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import numpy as np
import timing
import torch
from evidence.differences import Difference, paired
from scipy.stats import ttest_1samp
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torchvision.ops import box_iou
from tqdm import tqdm

from ssl_gradmix import GradMix, mixing
from ssl_gradmix.attribution import METHODS
from ssl_gradmix.data.augmentation import DeviceViews
from ssl_gradmix.data.open_set import load_known
from ssl_gradmix.evaluation.encoders import Encoder, load_encoder
from ssl_gradmix.gradmix import MixedViews
from ssl_gradmix.methods.nt_xent import nt_xent
from ssl_gradmix.settings import Augmentation, Data

PLACES = ("agreement", "agreement, densest", "loss", "center", "random")
KEPT = (0.9, 0.7, 0.5)
BATCH = 256

COSTS = {
    "anywhere": ("random", "whole"),
    "attributed": ("agreement", "whole"),
    "attributed, beyond anywhere": ("agreement", "random"),
    "center, beyond anywhere": ("center", "random"),
}
"""What is compared over seeds: the similarity where the first is replaced, less that of the second."""

Similar = dict[str, np.ndarray]
"""Cosine similarities (images,) to the other view, of whole images and with a box replaced at each place."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders of SimCLR")
    parser.add_argument("--layer", default="layer3", help="observed (default: %(default)s)")
    parser.add_argument("--attribution", choices=METHODS, default="layercam", help="(default: %(default)s)")
    parser.add_argument("--images", type=int, default=2000, help="training images, at random (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of views, donors and random places (default: %(default)s)")
    options = parser.parse_args()
    print(f"{options.attribution} at {options.layer}, seed {options.seed}, {timing.origin()}\n")
    header = ["run", "images", "kept", "whole", *(f"{place}, against random" for place in PLACES[:-1]), "random", "IoU"]
    encoders = (load_encoder(run, feature="projector") for run in options.runs)
    found = [(encoder.run, measure(encoder, options)) for encoder in encoders]  # of two grids, names may be the same
    rows = [line(run.name, kept, similar) for run, by_share in found for kept, similar in by_share.items()]
    print(timing.table(header, rows))
    print("\nwhole: similarity before anything is replaced; IoU: of the boxes of agreement and loss")
    kinds: dict[str, dict[int, dict[float, Similar]]] = {}
    for run, by_share in found:
        kind, _, seed = str(run).rpartition("-")
        if seed.isdecimal():
            kinds.setdefault(kind, {})[int(seed)] = by_share
    if len(kinds) > 1:
        print(f"\nMeans over seeds, and differences paired by seed, with 95% t intervals\n\n{over_seeds(kinds)}")


def measure(encoder: Encoder, options: argparse.Namespace) -> dict[float, Similar]:
    """Similarities of one run, by the share that is kept."""
    images = load_known(Data(**encoder.config["data"]), "train")
    drawn = np.random.default_rng(options.seed).permutation(len(images))[: options.images]
    pixels = images.subset(drawn).pixels(encoder.size)
    views = DeviceViews(Augmentation(**encoder.config["augmentation"]), encoder.size, encoder.mean, encoder.std)
    temperature = encoder.config["method"]["temperature"]
    encoder.model.requires_grad_(True)  # attribution needs a graph
    found: dict[float, list[Similar]] = {kept: [] for kept in KEPT}
    torch.manual_seed(options.seed)
    for i, batch in enumerate(tqdm(pixels.split(BATCH), desc=encoder.run.name, disable=None)):
        by_share = {kept: mixers(options, kept) for kept in KEPT}
        anywhere = torch.Generator().manual_seed(options.seed + i)  # donors and views keep the global one
        for kept, similar in delete(encoder.model, views(batch, 2), by_share, temperature, anywhere).items():
            found[kept].append(similar)
    return {
        kept: {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        for kept, batches in found.items()
    }


def line(run: str, kept: float, columns: Similar) -> list[str]:
    """The table's line of one run and share."""
    return [
        run,
        f"{len(columns['whole']):,}",
        f"{kept:.0%}",
        f"{columns['whole'].mean():.3f}",
        *(difference(columns[place], columns["random"]) for place in PLACES[:-1]),
        f"{columns['random'].mean():.3f}",
        f"{columns['iou'].mean():.2f}",
    ]


def mixers(options: argparse.Namespace, kept: float) -> dict[str, GradMix]:
    """GradMix at each place, with boxes of one size."""
    settings = {"layers": [f"0.{options.layer}"], "lam_range": (kept, kept)}
    return {
        "agreement": GradMix(**settings, attribution=options.attribution, target="agreement"),
        "agreement, densest": GradMix(**settings, attribution=options.attribution, region="densest"),
        "loss": GradMix(**settings, attribution=options.attribution, target="loss"),
        "center": GradMix(**settings, attribution="center"),
    }


def delete(
    model: nn.Module,
    views: list[Tensor],
    by_share: dict[float, dict[str, GradMix]],
    temperature: float,
    anywhere: torch.Generator,
) -> dict[float, Similar]:
    """By share kept, similarities (N,) of the first view to the second, whole and mixed, and the IoU of two boxes."""
    first, second = views
    with by_share[KEPT[0]]["agreement"].observe(model) as observed:
        z0, z1 = model(torch.cat(views)).chunk(2)
    loss = nt_xent(z0, z1, temperature)
    state = torch.get_rng_state()
    found = {}
    for kept, places in by_share.items():
        mixed = {}
        for place, mixer in places.items():
            torch.set_rng_state(state)  # the same donors at every place
            mixed[place] = mixer(first, loss, observed, donors=second)
        images = {place: each.images for place, each in mixed.items()}
        images["random"] = elsewhere(first, second, mixed["agreement"], anywhere)
        with torch.no_grad():
            similar = {"whole": cosine_similarity(z0, z1)}
            similar |= {place: cosine_similarity(model(each), z1) for place, each in images.items()}
        similar["iou"] = box_iou(mixed["agreement"].boxes, mixed["loss"].boxes).diagonal()
        found[kept] = {name: values.detach().numpy() for name, values in similar.items()}
    return found


def elsewhere(first: Tensor, second: Tensor, mixed: MixedViews, generator: torch.Generator) -> Tensor:
    """The first views with the same donors in boxes of the same size, anywhere inside the image."""
    x0, y0, x1, y1 = mixed.boxes[0].tolist()
    extent, size = (y1 - y0, x1 - x0), (first.shape[2], first.shape[3])
    boxes = mixing.random_boxes(len(first), extent, size, first.device, generator)
    return mixing.paste(first, mixing.shrink(second[mixed.donor_index], extent), boxes)


def over_seeds(kinds: Mapping[str, Mapping[int, Mapping[float, Similar]]]) -> str:
    """A table of what each kind of training loses at each place, and of the differences of the others to the first."""
    first, *others = kinds
    rows = []
    for place, (replaced, otherwise) in COSTS.items():
        for kept in KEPT:
            costs = {
                kind: {
                    seed: float((by_share[kept][replaced] - by_share[kept][otherwise]).mean())
                    for seed, by_share in seeds.items()
                }
                for kind, seeds in kinds.items()
            }
            means = [f"{fmean(by_seed.values()):+.3f}" for by_seed in costs.values()]
            rows.append(
                [place, f"{kept:.0%}", *means, *(interval(paired(costs[kind], costs[first])) for kind in others)]
            )
    names = [Path(kind).name for kind in kinds]
    return timing.table(["place", "kept", *names, *(f"{name} - {names[0]}" for name in names[1:])], rows)


def interval(difference: Difference | None) -> str:
    if difference is None:
        return ""
    if math.isnan(difference.low):  # of one seed
        return f"{difference.mean:+.3f}"
    text = f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
    return f"**{text}**" if difference.low > 0 or difference.high < 0 else text


def difference(values: np.ndarray, reference: np.ndarray) -> str:
    """The mean of a paired difference, with half the width of its 95% t interval."""
    low, high = ttest_1samp(values - reference, 0).confidence_interval(0.95)
    return f"{(values - reference).mean():+.3f} ± {(high - low) / 2:.3f}" if math.isfinite(low) else "0"


if __name__ == "__main__":
    main()
