"""Reliance: how strongly the agreement between two views depends on a small part of the image.

The most attributed box of the first view is replaced by another image, and the agreement is
measured again, next to boxes at random places and in the center. Several layers are attributed,
and the one that finds most is reported. Labels are not needed. Views are those of the run's
training; of other encoders, those that recipes make by default. A figure shows the boxes.

    python eval/reliance.py runs/x
    python eval/reliance.py runs/x --feature projector --layers '[layer3]'
    python eval/reliance.py timm:resnet18.a1_in1k --data.name cifar10 --out results
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveInt
from matplotlib.figure import Figure
from torch import Tensor

from ssl_gradmix import cli
from ssl_gradmix.backbones import stages
from ssl_gradmix.console import progress, show
from ssl_gradmix.data.augmentation import Augmentation, Views, usual_augmentation
from ssl_gradmix.evaluation import plots, results
from ssl_gradmix.evaluation.reliance import (
    PLACES,
    Fill,
    Reliance,
    fixed_place,
    in_images,
    measure,
    two_views,
    verdict,
)

EXAMPLES = 12
"""Images in the figure."""


def numbers(found: Sequence[Reliance], part: float, fill: Fill, seed: int) -> list[results.Number]:
    """All measurements; fractions of the agreement have bootstrap 95% intervals over images."""
    first, how = found[0], {"part": part, "fill": fill, "seed": seed}
    n = len(first.whole)
    made = [
        results.number("two_views", "cosine", first.whole.mean().item(), n, seed=seed),
        results.number("two_images", "cosine", first.chance.mean().item(), n, **how),
    ]
    for place in PLACES[1:]:
        made.append(results.number(place, "reliance", first.share(place, seed=seed), n, **how))
    for each in found:
        of_layer = {"layer": each.layer, **how}
        for beyond in (None, *PLACES[1:]):
            metric = f"beyond_{beyond}" if beyond else "reliance"
            share = each.share("attributed", beyond, seed)
            made.append(results.number("attributed", metric, share, n, **of_layer))
        flat = each.flat.float().mean().item()
        made.append(results.number("attributed", "flat", flat, n, **of_layer))
    most = largest(found)
    share = most.share("attributed", seed=seed)
    made.append(results.number("largest", "reliance", share, n, at=most.layer, **how))
    return made


def largest(found: Sequence[Reliance]) -> Reliance:
    """The layer that finds the box with most of the agreement."""
    return max(found, key=lambda each: each.by_image("attributed").mean())


def draw(found: Reliance, maps: Mapping[str, Tensor], views: Views, title: str) -> Figure:
    """Where the encoder looks, in views and in images, and what each image loses."""
    fractions = {place: found.by_image(place).numpy() for place in PLACES}
    most = np.argsort(-fractions["attributed"], kind="stable")[:EXAMPLES]
    pixels = (found.images[most] * views.std.cpu() + views.mean.cpu()).clamp(0, 1)
    images = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    boxes, lost = found.boxes[most].tolist(), fractions["attributed"][most]
    means = {f"in the {frame}": attribution.numpy() for frame, attribution in maps.items()}
    return plots.reliance(means, list(zip(images, boxes, lost, strict=True)), fractions, title)


def evaluate(
    evaluation: cli.Evaluation,
    views: Callable[..., Views],
    *,
    images: PositiveInt = 1024,
    part: OpenUnitInterval = 0.1,
    fill: Fill = "crop",
    layers: list[str] | None = None,
    seed: NonNegativeInt = 0,
) -> None:
    """Measures reliance, writes the results and a figure, and prints a table and a sentence.

    Args:
        evaluation: The encoder, its images, and the folder for results.
        views: `Views` or a class with the same signature.
        images: At most this many training images, drawn at random.
        part: Fraction of the image that is replaced.
        fill: Content of the box: `crop`, the same place of another image, or `donor`, all of it,
            resized.
        layers: Layers to attribute, each separately, for instance [layer3]. The default is up to
            four stages with maps of at least 4x4, or blocks of a transformer.
        seed: Seed of images, views, replacing images, and random places.
    """
    encoder, data, accelerator = evaluation.encoder, evaluation.data, evaluation.accelerator
    every = evaluation.load("train", labeled=False)
    if not accelerator.is_main_process:
        return
    order = np.random.default_rng(seed).permutation(len(every))
    drawn = every.subset(order[:images])
    of_run = (encoder.config or {}).get("augmentation", {})
    augmentation = Augmentation(**{**usual_augmentation(data.name, data.size), **of_run})
    made = views(augmentation, encoder.size, encoder.mean, encoder.std).to(accelerator.device)
    crops: list[Tensor] = []

    def pairs() -> Iterator[list[Tensor]]:
        with progress(len(drawn), "reliance", "image", delay=3) as bar:
            for pair, crop in two_views(drawn, made, evaluation.batch_size, seed):
                crops.append(crop)
                yield pair
                bar.update(len(crop))

    model = encoder.model.to(accelerator.device)
    backbone = model[0] if encoder.feature == "projector" else model
    layers = layers or stages(backbone, encoder.size)
    found = measure(model, pairs(), layers, part, fill, backbone, seed)
    rows = evaluation.frame(
        "reliance", every, numbers(found, part, fill, seed), **evaluation.classes
    )
    most = largest(found)
    maps = {
        "images": in_images(most.attribution, torch.cat(crops)),
        "views": most.attribution.mean(0),
    }
    share, at_random = (most.by_image(place).mean().item() for place in PLACES[:2])
    lost = f"replacing {part:.0%} of the image removes {min(max(share, 0), 1):.0%}"
    title = f"{encoder.title} on {every.name}: {lost} of the agreement ({most.layer})"
    evaluation.write(rows, draw(most, maps, made, title), [every])
    show(f"{encoder.title} on {len(drawn):,} images of {every.name}, two views each")
    show(results.console(rows[rows["metric"] == "reliance"]))
    show(verdict(share, at_random, part, most.layer, fixed_place(maps, len(drawn))))


def main(argv: Sequence[str] | None = None, views: Callable[..., Views] = Views) -> None:
    evaluation, options = cli.evaluation(evaluate, __doc__, argv)
    evaluate(evaluation, views, **options)


if __name__ == "__main__":
    sys.exit(cli.run(main))
