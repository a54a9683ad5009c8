"""Trains an encoder with the labels of known classes: supervised contrast, SimCLR, GradMix views.

On six of the ten digits, a few minutes on a laptop; the evaluation then detects the other four:

    python recipes/supcon_gradmix.py
    python eval/osr.py runs/supcon --feature projector

On your images, in one folder per class:

    python recipes/supcon_gradmix.py --run runs/mine --data.name folder --data.root IMAGES
        --data.size 32 --backbone.name resnet18_small --training.epochs 200

--data.open_set or --data.classes select the known classes. --init runs/simclr starts from the
weights of another run, as the two stages of GradMix's authors.
On several GPUs: `accelerate launch recipes/supcon_gradmix.py` with the same options.

The third view is GradMix's while the encoder relies on small regions, else a plain one. The
controls are --extra_view gradmix (always mixed), augmented (always plain), and none.
Everything is written to the run folder. The same command resumes an unfinished run, and
--config runs/supcon/config.yaml --run runs/again repeats a run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from jsonargparse.typing import ClosedUnitInterval

from ssl_gradmix import cli
from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.gradmix import GradMix
from ssl_gradmix.methods import Method, SupCon
from ssl_gradmix.training.pretrain import pretrain

SPLIT_OF_DIGITS = "random:6:0"
"""Known classes of the digits by default: without unknown ones there is nothing to recognize."""


def main(
    argv: Sequence[str] | None = None,
    gradmix: Callable[..., GradMix] = GradMix,
    views: Callable[..., Views] = Views,
    method: Callable[..., Method] = SupCon,
) -> None:
    """Trains with the settings of a command line; the parts can be replaced, see `pretrain`."""
    parser = cli.recipe_parser(SupCon, "supcon", __doc__)
    parser.add_argument(
        "--label_fraction",
        type=ClosedUnitInterval,
        default=1.0,
        help="Fraction of each class that keeps its labels, at least one image, drawn by "
        "training.seed. The other images contribute to the losses without labels.",
    )
    config = cli.read(parser, argv)
    data = config.data
    if data.name == "digits" and data.classes is None and data.open_set is None:
        data.open_set = SPLIT_OF_DIGITS
    pretrain(config, gradmix, views, method)


if __name__ == "__main__":
    sys.exit(cli.run(main))
