"""How much of what makes two views of an image agree an encoder owes to a small part of it; labels are not needed.

The part of the first view that the agreement is attributed to is replaced by another image's pixels, and the agreement
is read again, beside the same at a random place and in the middle. Views are those of the run's own training, of an
encoder from elsewhere those of the recipes. A picture shows where.

    python eval/reliance.py runs/x
    python eval/reliance.py runs/x --feature projector --layers '[layer2, layer3, layer4]'
    python eval/reliance.py timm:resnet18.a1_in1k --data.name folder --data.root IMAGES --out results
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from ssl_gradmix.command_line import usual_augmentation
from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.data.open_set import load_known
from ssl_gradmix.evaluation import cli, plots, rows
from ssl_gradmix.evaluation.reliance import PLACES, Fill, Reliance, in_images, measure, two_views, verdict
from ssl_gradmix.settings import Augmentation

EXAMPLES = 12
"""Images in the picture."""


@dataclass
class Options:
    """What is measured, and how.

    Args:
        images: At most so many training images, at random.
        part: Share of the image that is replaced.
        fill: By what of another image: `crop`, the same place of it, or `donor`, all of it, resized into the box.
        layers: Layers to attribute at, each for itself, for instance [layer3]; null takes the deepest with room.
        seed: Of images, views, what replaces them, and the random places.
    """

    images: int = 1024
    part: float = 0.1
    fill: Fill = "crop"
    layers: list[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.images < 2:
            raise ValueError(f"images must be at least 2, got {self.images}")
        if not 0 < self.part < 1:
            raise ValueError(f"part must be above 0 and below 1, got {self.part}")
        if self.layers == []:
            raise ValueError("layers must be a list of names such as [layer3], or null")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or larger, got {self.seed}")


def numbers(found: Sequence[Reliance], options: Options) -> list[rows.Number]:
    """What was measured, a layer each; shares of the agreement with bootstrap 95% intervals over images."""
    first, seed, how = found[0], options.seed, {"part": options.part, "fill": options.fill, "seed": options.seed}
    n = len(first.whole)

    def share(place: str, each: Reliance, beyond: str | None = None, **params: object) -> rows.Number:
        metric = "reliance" if beyond is None else f"beyond_{beyond}"
        return rows.number(place, metric, each.share(place, beyond, seed), n, **params, **how)

    made = [rows.number("two_views", "cosine", first.whole.mean().item(), n, seed=seed)]
    made += [rows.number("two_images", "cosine", first.chance.mean().item(), n, **how)]
    made += [share(place, first) for place in PLACES[1:]]
    for each in found:
        made += [share("attributed", each, beyond, layer=each.layer) for beyond in (None, *PLACES[1:])]
        made += [rows.number("attributed", "flat", each.flat.float().mean().item(), n, layer=each.layer, **how)]
    return made


def augmentation(evaluation: cli.Evaluation) -> Augmentation:
    """How views are made: as in the training of a run, and else as the recipes make them of such data.

    Raises:
        ValueError: The run's config.yaml says what cannot be.
    """
    given = (evaluation.encoder.config or {}).get("augmentation", {})
    usual = usual_augmentation(evaluation.data.name, evaluation.data.size)
    try:
        known = {each.name: given[each.name] for each in fields(Augmentation) if each.name in given}
        return Augmentation(**usual | known)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{evaluation.encoder.run}/config.yaml is damaged: augmentation: {error}") from error


def evaluate(evaluation: cli.Evaluation, options: Options) -> None:
    """On the main process measures, writes `reliance.json` and `.png`, and prints a table and a sentence."""
    with evaluation.one_first():
        images = load_known(evaluation.data, "train")
    if not evaluation.accelerator.is_main_process:
        return
    encoder, data, device = evaluation.encoder, evaluation.data, evaluation.accelerator.device
    drawn = images.subset(np.random.default_rng(options.seed).permutation(len(images))[: options.images])
    views = Views(augmentation(evaluation), encoder.size, encoder.mean, encoder.std, stamps=images.stamps).to(device)
    crops: list[Tensor] = []

    def pairs() -> Iterator[list[Tensor]]:
        made = two_views(drawn, views, evaluation.batch_size, options.seed)
        for pair, crop in tqdm(made, desc=f"replacing parts of {drawn.name}", unit="batch", delay=3, disable=None):
            crops.append(crop)
            yield pair

    model = encoder.model.to(device)
    backbone = model[0] if encoder.feature == "projector" else model
    found = measure(model, pairs(), options.layers, options.part, options.fill, backbone, options.seed)
    stamps = {name: value for name, value in asdict(data).items() if name.startswith("stamp_") and images.stamps}
    params = evaluation.of_classes() | stamps
    measured = evaluation.frame("reliance", images.name, numbers(found, options), **params)
    written = evaluation.out / "reliance.json"
    rows.add(written, measured, evaluation.about(images, **evaluation.of_classes()))
    most = max(found, key=lambda each: each.by_image("attributed").mean())
    title = f"{encoder.title} on {images.name}, {most.layer}: what {options.part:.0%} of the image carries"
    plots.write(written.with_suffix(".png"), picture(most, torch.cat(crops), views, title))
    print(f"{encoder.title} on {len(drawn):,} images of {images.name}{', stamped' if stamps else ''}, two views each")
    layers = [{name: value for name, value in each.items() if name == "layer"} for each in measured["params"]]
    print(rows.console(measured.assign(params=layers)))
    share, at_random = (most.by_image(place).mean().item() for place in PLACES[:2])
    print(f"{verdict(share, at_random, options.part)}\nRows: {written}, picture: {written.with_suffix('.png')}")


def picture(found: Reliance, crops: Tensor, views: Views, title: str) -> Figure:
    """Where the encoder looks, in views and put back in images; what it relies on most; and the shares by image."""
    shares = {place: found.by_image(place).numpy() for place in PLACES}
    most = np.argsort(-shares["attributed"], kind="stable")[:EXAMPLES]
    pixels = (found.images[most] * views.std.cpu() + views.mean.cpu()).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    examples = list(zip(pixels, found.boxes[most].tolist(), shares["attributed"][most], strict=True))
    maps = {
        "in the views": found.attribution.mean(0).numpy(),
        "in the whole images": in_images(found.attribution, crops).numpy(),
    }
    return plots.reliance(maps, examples, shares, title)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(evaluate, Options, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
