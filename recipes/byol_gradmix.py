"""Pretrains an encoder with BYOL and GradMix views. No labels are needed.

On digits, a few minutes on a laptop:

    python recipes/byol_gradmix.py

On your images (the defaults are for digits):

    python recipes/byol_gradmix.py --run runs/mine --data.name folder --data.root IMAGES
        --data.size 32 --backbone.name resnet18_small --training.batch_size 256
        --training.epochs 200 --optimizer.lr 0.12

On several GPUs: `accelerate launch recipes/byol_gradmix.py` with the same options.

The third view is GradMix's while the encoder relies on small regions, else a plain one. The
controls are --extra_view gradmix (always mixed), augmented (always plain), and none (plain BYOL).
Everything is written to the run folder. The same command resumes an unfinished run, and
--config runs/byol/config.yaml --run runs/again repeats a run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from ssl_gradmix import cli
from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.gradmix import GradMix
from ssl_gradmix.methods import BYOL, Method
from ssl_gradmix.training.pretrain import pretrain

# For digits on a laptop: BYOL needs more steps than SimCLR, hence smaller batches.
DEFAULTS = {
    "optimizer.lr": 1.2,
    "optimizer.warmup_epochs": 1.0,
    "augmentation.min_scale": 0.5,
    "training.batch_size": 16,
    "training.epochs": 18,
}


def main(
    argv: Sequence[str] | None = None,
    gradmix: Callable[..., GradMix] = GradMix,
    views: Callable[..., Views] = Views,
    method: Callable[..., Method] = BYOL,
) -> None:
    """Trains with the settings of a command line; the parts can be replaced, see `pretrain`."""
    parser = cli.recipe_parser(BYOL, "byol", __doc__, DEFAULTS)
    pretrain(cli.read(parser, argv), gradmix, views, method)


if __name__ == "__main__":
    sys.exit(cli.run(main))
