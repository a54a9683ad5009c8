"""Writes a corrupted copy of a test set in the layout of CIFAR-10-C, for `eval/corruption.py --published` and others.

One array a corruption, its five severities one after the other, `labels.npy`, and `meta.json`, which says how it was
made. The same command again goes on where an interrupted one stopped.

    python eval/make_c.py --out digits-c
    python eval/make_c.py --data.name folder --data.root images --data.size 64 --out images-c --extra true
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from ssl_gradmix import command_line
from ssl_gradmix.settings import Data


@dataclass
class Options:
    """What is made, and how.

    Args:
        out: Folder to write to: new, empty, or of an earlier call with the same settings.
        split: Which images.
        corruptions: Which, such as [fog, jpeg_compression]; null is the 15 common ones.
        extra: Add the 4 extra corruptions.
        preset: Parameters of the severities; null takes those made for images nearest to data.size.
        seed: Of the whole set.
        workers: Processes that share the work; null takes all cores.
    """

    out: str
    split: Literal["train", "test"] = "test"
    corruptions: list[str] | None = None
    extra: bool = False
    preset: Literal["cifar", "imagenet64", "imagenet"] | None = None
    seed: int = 0
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1 or null, got {self.workers}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line.Parser(description=__doc__)
    parser.add_argument("--config", action=command_line.ConfigFile, help="YAML file of these options.")
    parser.add_class_arguments(Options)
    parser.add_class_arguments(Data, "data", skip={"classes", "open_set"})  # images keep their numbers, hence noise
    given = parser.instantiate(parser.parse_args(argv))
    options = Options(**{field.name: given[field.name] for field in fields(Options)})

    # These take seconds to import: after parsing, so that --help is quick.
    from joblib import cpu_count

    from ssl_gradmix.data.corruption_sets import check_can_make, choose, make_c
    from ssl_gradmix.data.corruptions import default_preset
    from ssl_gradmix.data.datasets import load

    names = choose(options.corruptions, options.extra)
    check_can_make(names)
    images = load(given.data, options.split)
    if not images.labeled:
        raise ValueError(f"{images.name} has images without label: the layout has a label for each")
    make_c(
        images.pixels(given.data.size).permute(0, 2, 3, 1).contiguous().numpy(),
        images.labels,
        options.out,
        options.preset or default_preset(given.data.size),
        options.seed,
        names,
        source=images.name,
        workers=options.workers or cpu_count(),
    )
    print(f"{len(images)} images of {images.name}, {len(names)} corruptions at 5 severities: {options.out}")


if __name__ == "__main__":
    sys.exit(command_line.run(main))
