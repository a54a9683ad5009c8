"""Evaluation: feature extraction against the encoder's bare inference, and how long scripts take until they answer.

Corruptions and open-set scores have benchmarks of their own: corruption_speed.py and osr_scores.py.

    python benchmarks/evaluation_speed.py
    python benchmarks/evaluation_speed.py --device cuda --backbones resnet50_small --images 50000
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import timing
import torch

from ssl_gradmix import backbones
from ssl_gradmix.evaluation.encoders import Encoder
from ssl_gradmix.evaluation.features import extract

ROOT = Path(__file__).parents[1]
IMPORTS = ("import torch", "from ssl_gradmix import GradMix")
SCRIPTS = (
    *("recipes/simclr_gradmix.py", "recipes/byol_gradmix.py", "eval/linear_probe.py", "eval/osr.py"),
    *("eval/corruption.py", "eval/make_c.py", "eval/report.py"),
)


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--backbones", nargs="+", default=["resnet10_tiny", "resnet18_small"])
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="images at once (default: %(default)s)")
    parser.add_argument("--images", type=int, default=2048, help="(default: %(default)s)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(
        f"{options.images:,} images, {options.size} px, batch {options.batch}, {options.rounds} rounds, "
        f"{timing.origin(options.device)}\n"
    )
    header = ["encoder", "extract, images/s", "bare inference", "share, wall", "share, processor"]
    print(timing.table(header, [features(name, options) for name in options.backbones]), flush=True)
    print(f"\n{start_up(options.rounds)}")


def features(name: str, options) -> list[str]:
    """`extract` from images in memory, against the bare encoder on images that lie ready, normalized."""
    encoder = Encoder(backbones.create(name).to(options.device), options.size, (0.5,) * 3, (0.25,) * 3, name)
    shape = (options.images, options.size, options.size, 3)
    images = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    ready = torch.randn(options.batch, 3, options.size, options.size, device=options.device)

    @torch.inference_mode()
    def bare() -> None:
        for start in range(0, options.images, options.batch):
            encoder.model(ready[: options.images - start]).cpu()

    runs = {
        "extract": lambda: extract(encoder, images, options.batch, options.device, progress=False),
        "bare": bare,
    }
    taken = timing.take_turns(runs, options.rounds, options.device)
    rates = [f"{options.images / statistics.median(taken[run].wall):,.0f}" for run in runs]
    shares = [
        timing.ratio(getattr(taken["bare"], clock), getattr(taken["extract"], clock)) for clock in ("wall", "processor")
    ]
    return [name, *rates, *shares]


def start_up(rounds: int) -> str:
    """Seconds of whole processes: imports, and `--help` of every script."""

    def process(*arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True, cwd=ROOT)

    runs = {f"python -c '{statement}'": lambda statement=statement: process("-c", statement) for statement in IMPORTS}
    runs |= {f"{script} --help": lambda script=script: process(script, "--help") for script in SCRIPTS}
    taken = timing.take_turns(runs, rounds)
    rows = []
    for name, times in taken.items():
        median = statistics.median(times.wall)
        rows.append([f"`{name}`", f"{median:.2f}", timing.ratio(times.wall, taken["python -c 'import torch'"].wall)])
    return timing.table(["process", "s", "of `import torch`"], rows)


if __name__ == "__main__":
    main()
