"""Runs a recipe on planted stamps, logs which share of them GradMix's boxes hit, and puts boxes elsewhere if asked.

    python benchmarks/evidence/boxes.py attributed recipes/simclr_gradmix.py --data.stamp_bits 9

In place of `attributed`, `stamp` centers the boxes on the stamps, which is what GradMix could do at best, and
`anywhere` centers them on a pixel drawn uniformly, shifted inside the image as GradMix's are.
"""

import runpy
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from ssl_gradmix import GradMix, MixedViews
from ssl_gradmix.attribution import Observed
from ssl_gradmix.data import planted
from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.training.loop import Trainer

forward, mix, attribute, look = Views.forward, GradMix._mix, GradMix._attribute, Trainer._look
stamps: list[Tensor] = []
"""Boxes (N, 4) of the stamps in the views that were made last."""
hits: list[Tensor] = []
"""Mean share of the stamps inside of GradMix's boxes, by step of the epoch."""


def views_noted(self: Views, images: Tensor, n_views: int) -> list[Tensor]:
    stamps[:] = [self.stamps.boxes(planted.name(images), (self.size, self.size))] if self.stamps else []
    return forward(self, images, n_views)


def mix_noted(self: GradMix, images: Tensor, *others: object) -> tuple[MixedViews, object]:
    mixed, gradients = mix(self, images, *others)
    if stamps and len(stamps[0]) == len(images) and mixed.boxes is not None:  # not the recipe's trial, nor a picture
        hits.append(covered(stamps[0], mixed.boxes).mean())
    return mixed, gradients


def covered(boxes: Tensor, by: Tensor) -> Tensor:
    """Share (N,) of the area of boxes (N, 4) that lies in others."""
    shared = (torch.minimum(boxes[:, 2:], by[:, 2:]) - torch.maximum(boxes[:, :2], by[:, :2])).clamp_min(0)
    return shared.prod(1) / (boxes[:, 2:] - boxes[:, :2]).prod(1)


def look_noted(self: Trainer, entry: dict) -> None:
    if hits:
        entry["hit"] = torch.stack(hits).mean().item()
    look(self, entry)
    hits.clear()  # the monitor has mixed stamped views too


def anywhere(self: GradMix, loss: Tensor, observed: Observed, images: Tensor, leaves: Sequence[Tensor]) -> tuple:
    layers, maps, gradients = attribute(self, loss, observed, images, leaves)
    return layers, torch.zeros_like(maps), gradients  # a flat map: boxes lie at random


def on_the_stamp(self: GradMix, loss: Tensor, observed: Observed, images: Tensor, leaves: Sequence[Tensor]) -> tuple:
    layers, maps, gradients = anywhere(self, loss, observed, images, leaves)
    for x0, y0, x1, y1 in (each.unbind(1) for each in stamps if len(each) == len(images)):
        maps[torch.arange(len(images)), (y0 + y1) // 2, (x0 + x1) // 2] = 1
    return layers, maps, gradients


PLACES = {"attributed": attribute, "stamp": on_the_stamp, "anywhere": anywhere}


def main() -> None:
    _, place, *sys.argv = sys.argv
    GradMix._attribute = PLACES[place]
    Views.forward, GradMix._mix, Trainer._look = views_noted, mix_noted, look_noted
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
