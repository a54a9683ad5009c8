"""Images a second of whole trainings: our loop against its bare step, and against a loop written as lightly's examples.

Rows are measured in turn, so that a machine that slows down slows all; each is printed as soon as it is done. Rows:

    step              the bare step with GradMix on views that stay the same: views, log and loop cost nothing
    step NCHW         the same without channels_last
    step compiled     the same with the backbone's stages compiled one by one
    step fused        the same with torch's fused optimizer
    step benchmark    the same with cuDNN choosing its kernels by trying them; on a GPU only
    loop              the SimCLR recipe's second epoch by its own log, views and GradMix included
    plain loop        the same without GradMix
    lightly           plain SimCLR as lightly's examples write it: its transforms in workers, its loss

    python benchmarks/throughput.py
    python benchmarks/throughput.py --device cuda --backbone resnet18_small --batch 512 --images 50000 --precision bf16
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import timing
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from PIL import Image

from ssl_gradmix import GradMix, backbones
from ssl_gradmix.methods.simclr import SimCLR

ROOT = Path(__file__).parents[1]
GRADMIX = ("step", "step NCHW", "step compiled", "step fused", "step benchmark", "loop")
PLAIN = ("plain loop", "lightly")


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--backbone", default="resnet10_tiny", help="any timm model (default: %(default)s)")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="images a step (default: %(default)s)")
    parser.add_argument("--images", type=int, default=2048, help="images of an epoch (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder of images for the loops (default: noise)")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--workers", type=int, default=2, help="of lightly's loop (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=GRADMIX + PLAIN, help="(default: all that the device has)")
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    chosen = options.rows or [row for row in GRADMIX + PLAIN if on_gpu or row != "step benchmark"]
    if options.threads:
        torch.set_num_threads(options.threads)
    print(
        f"{options.backbone}, {options.size} px, batch {options.batch}, {options.images:,} images, precision "
        f"{options.precision}, {options.workers} workers, {options.rounds} rounds, {timing.origin(options.device)}\n",
        flush=True,
    )
    rates: dict[str, list[float]] = {row: [] for row in chosen}
    memory = dict.fromkeys(chosen, "")
    for _ in range(options.rounds):
        for row in chosen:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            rates[row].append(measure(row, options))
            if on_gpu and not row.endswith("loop"):  # which are processes of their own
                memory[row] = f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
            print(f"{row}: {rates[row][-1]:,.0f} images/s", flush=True)
    lines = []
    for row in chosen:
        base = "step" if row in GRADMIX else "lightly"
        against = f"{timing.ratio(rates[row], rates[base])} of {base}" if base in rates and base != row else ""
        lines.append([row, f"{statistics.median(rates[row]):,.0f}", against, memory[row]])
    print("\n" + timing.table(["row", "images/s", "against", "peak memory"], lines))


def measure(row: str, options: argparse.Namespace) -> float:
    """Images a second of a row."""
    if row == "lightly":
        return lightly_style(options)
    if row.startswith("step"):
        return bare_step(row.removeprefix("step").strip(), options)
    return recipe("none" if row == "plain loop" else "gradmix", options)


def bare_step(variant: str, options: argparse.Namespace) -> float:
    torch.manual_seed(0)
    memory_format = torch.contiguous_format if variant == "NCHW" else torch.channels_last
    backbone = backbones.create(options.backbone)
    if variant == "compiled":
        torch._functorch.config.donated_buffer = False  # attribution goes backwards once before the step does
        torch._dynamo.config.recompile_limit = 64  # stages share their code, and each is compiled for two batch sizes
        for name, stage in backbone.named_children():
            if name.startswith(("layer", "blocks", "stages")):
                stage.compile(dynamic=False)
    method = SimCLR(backbone, backbones.num_features(backbone), gradmix=GradMix())
    method.to(options.device, memory_format=memory_format)
    fused = True if variant == "fused" else None
    optimizer = torch.optim.SGD(method.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, fused=fused)
    shape = (options.batch, 3, options.size, options.size)
    views = [torch.randn(shape, device=options.device).contiguous(memory_format=memory_format) for _ in range(2)]
    kind, half = options.device.split(":")[0], options.precision == "bf16"
    count = options.images // options.batch

    def steps() -> None:
        for _ in range(count):
            with torch.autocast(kind, torch.bfloat16, enabled=half):
                losses = method(views)
            losses.total.backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.backends.cudnn.benchmark = variant == "benchmark"
    steps()
    return count * options.batch / timing.seconds(steps, options.device)[0]


def recipe(extra_view: str, options: argparse.Namespace) -> float:
    """The second epoch of the recipe, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "run": f"{folder}/run",
            "data.name": "folder",
            "data.root": options.data or noise(Path(folder, "noise"), options),
            "data.size": options.size,
            "backbone.name": options.backbone,
            "extra_view": extra_view,
            "training.epochs": 2,
            "training.batch_size": options.batch,
            "training.precision": options.precision,
            "training.knn_every": 0,
            "training.samples_every": 0,
            "training.threads": options.threads or torch.get_num_threads(),
        }
        command = [sys.executable, str(ROOT / "recipes/simclr_gradmix.py")]
        command += [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        if not options.device.startswith("cuda"):
            environment["CUDA_VISIBLE_DEVICES"] = ""
        subprocess.run(command, env=environment, stdout=sys.stderr, check=True)
        return json.loads(Path(folder, "run/log.jsonl").read_text().splitlines()[-1])["images_per_second"]


def pixels(options: argparse.Namespace) -> np.ndarray:
    shape = (options.images, options.size, options.size, 3)
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


def noise(folder: Path, options: argparse.Namespace) -> Path:
    """Images without labels; returns their folder."""
    folder.mkdir()
    for i, image in enumerate(pixels(options)):
        Image.fromarray(image).save(folder / f"{i:06d}.png", compress_level=0)
    return folder


class Views(torch.utils.data.Dataset):
    """Two views of each image by lightly's transforms, as its SimCLR example makes them for CIFAR-10."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.images = pixels(options)
        self.transform = SimCLRTransform(input_size=options.size, gaussian_blur=0.0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return self.transform(Image.fromarray(self.images[index]))


def lightly_style(options: argparse.Namespace) -> float:
    """Plain SimCLR as in lightly's examples, with our backbone; the second epoch."""
    backbone = backbones.create(options.backbone)
    width = backbones.num_features(backbone)
    model = torch.nn.Sequential(backbone, SimCLRProjectionHead(width, width, 128)).to(options.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    criterion = NTXentLoss(temperature=0.2)
    loader = torch.utils.data.DataLoader(
        Views(options),
        options.batch,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
    )
    kind, half = options.device.split(":")[0], options.precision == "bf16"

    def epoch() -> None:
        for x0, x1 in loader:
            with torch.autocast(kind, torch.bfloat16, enabled=half):
                z0, z1 = model(x0.to(options.device)), model(x1.to(options.device))
            loss = criterion(z0.float(), z1.float())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    epoch()
    return options.images // options.batch * options.batch / timing.seconds(epoch, options.device)[0]


if __name__ == "__main__":
    main()
