"""Pretrains an encoder with SimCLR and GradMix views. No labels are needed.

On digits, a few minutes on a laptop:

    python recipes/simclr_gradmix.py

On your images:

    python recipes/simclr_gradmix.py --run runs/mine --data.name folder --data.root IMAGES
        --data.size 32 --backbone.name resnet18_small --training.epochs 200

On several GPUs: `accelerate launch recipes/simclr_gradmix.py` with the same options.

The third view is GradMix's while the encoder relies on small regions, else a plain one. The
controls are --extra_view gradmix (always mixed), augmented (always plain), and none (plain SimCLR).
Everything is written to the run folder. The same command resumes an unfinished run, and
--config runs/simclr/config.yaml --run runs/again repeats a run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from ssl_gradmix import cli
from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.gradmix import GradMix
from ssl_gradmix.methods import Method, SimCLR
from ssl_gradmix.training.pretrain import pretrain

DEFAULTS = {"method.temperature": 0.2}


def main(
    argv: Sequence[str] | None = None,
    gradmix: Callable[..., GradMix] = GradMix,
    views: Callable[..., Views] = Views,
    method: Callable[..., Method] = SimCLR,
) -> None:
    """Trains with the settings of a command line; the parts can be replaced, see `pretrain`."""
    parser = cli.recipe_parser(SimCLR, "simclr", __doc__, DEFAULTS)
    pretrain(cli.read(parser, argv), gradmix, views, method)


if __name__ == "__main__":
    sys.exit(cli.run(main))
