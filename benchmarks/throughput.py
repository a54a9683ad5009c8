"""Images per second of whole trainings, on the device that Accelerate chooses.

| row        | what is timed                                                                       |
|------------|-------------------------------------------------------------------------------------|
| step       | SimCLR's step with GradMix on fixed views: data, views and log cost nothing         |
| loop       | second epoch of the SimCLR recipe, by its own log, views and GradMix included       |
| plain loop | the same without GradMix                                                            |
| lightly    | plain SimCLR as in lightly's examples: its transforms in worker processes, its loss |

    python -m benchmarks.throughput
    python -m benchmarks.throughput --data cifar10 --backbone resnet18_small --batch 512 \\
        --precision bf16 --workers 8
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch.utils.benchmark import Timer
from torchvision.transforms.functional import to_pil_image

from recipes import simclr_gradmix
from ssl_gradmix import GradMix, SimCLR, backbones
from ssl_gradmix.data.datasets import Data, ImageSet, load

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class LightlyViews(torch.utils.data.Dataset):
    """Two views of each image by lightly's transforms, as its SimCLR example has for CIFAR-10."""

    def __init__(self, images: ImageSet, size: int) -> None:
        self.images = images
        self.transform = SimCLRTransform(input_size=size, gaussian_blur=0.0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return self.transform(to_pil_image(self.images.decoded(index)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder of images (default: scikit-learn's digits)")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--backbone", default="resnet10_tiny", help="any timm model")
    parser.add_argument("--batch", type=int, default=128, help="batch size")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of lightly's loop")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    data = Data("folder" if options.data else "digits", options.data, options.size)
    rows: dict[str, Callable[[], float]] = {
        "step": lambda: step(options),
        "loop": lambda: loop("gradmix", data, options),
        "plain loop": lambda: loop("none", data, options),
        "lightly": lambda: lightly_loop(load(data, "train"), options),
    }
    rates = {name: measure() for name, measure in rows.items()}
    print(f"{options.backbone}, batch {options.batch}, {DEVICE}, torch {torch.__version__}\n")
    print("| row | images/s |\n| --- | --- |")
    print(*(f"| {name} | {rate:,.0f} |" for name, rate in rates.items()), sep="\n")


def step(options: argparse.Namespace) -> float:
    """The bare training step with GradMix."""
    backbone = backbones.create(options.backbone)
    method = SimCLR(backbone, backbones.num_features(backbone), gradmix=GradMix())
    method.to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(method.parameters(), 0.1, momentum=0.9)
    views = torch.randn(2, options.batch, 3, options.size, options.size, device=DEVICE)
    pair = [view.contiguous(memory_format=torch.channels_last) for view in views]

    def run() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=options.precision == "bf16"):
            loss, _ = method(pair)
        update(loss, optimizer)

    timer = Timer("run()", globals={"run": run}, num_threads=options.threads)
    return options.batch / timer.blocked_autorange(min_run_time=5).median


def loop(extra_view: str, data: Data, options: argparse.Namespace) -> float:
    """The recipe, as its log has it."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "run": folder,
            "data.name": data.name,
            "data.root": data.root or "null",
            "data.size": data.size,
            "backbone.name": options.backbone,
            "extra_view": extra_view,
            "training.epochs": 2,
            "training.batch_size": options.batch,
            "training.precision": options.precision,
            "training.knn_every": 0,
            "training.samples_every": 0,
            "training.threads": options.threads,
        }
        simclr_gradmix.main([f"--{name}={value}" for name, value in settings.items()])
        last = Path(folder, "log.jsonl").read_text().splitlines()[-1]
        return json.loads(last)["images_per_second"]


def lightly_loop(images: ImageSet, options: argparse.Namespace) -> float:
    """Plain SimCLR as in lightly's examples, with our backbone."""
    backbone = backbones.create(options.backbone)
    features = backbones.num_features(backbone)
    head = SimCLRProjectionHead(features, features, 128)
    model = torch.nn.Sequential(backbone, head).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    criterion = NTXentLoss(temperature=0.2)
    loader = torch.utils.data.DataLoader(
        LightlyViews(images, options.size),
        options.batch,
        shuffle=True,
        drop_last=True,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
    )

    def epoch() -> None:
        for x0, x1 in loader:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=options.precision == "bf16"):
                z0, z1 = model(x0.to(DEVICE)), model(x1.to(DEVICE))
            update(criterion(z0.float(), z1.float()), optimizer)

    seconds = Timer("epoch()", globals={"epoch": epoch}, num_threads=options.threads).timeit(1).mean
    return len(loader) * options.batch / seconds


def update(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Backward pass and optimizer step."""
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    main()
