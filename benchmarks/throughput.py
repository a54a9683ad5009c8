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
from pathlib import Path

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch.utils.benchmark import Timer
from torchvision.transforms.functional import to_pil_image

from recipes import simclr_gradmix
from ssl_gradmix import GradMix, SimCLR, backbones
from ssl_gradmix.data.datasets import Data, load

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder of images (default: scikit-learn's digits)")
    parser.add_argument("--backbone", default="resnet10_tiny", help="any timm model")
    parser.add_argument("--batch", type=int, default=128, help="batch size")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of lightly's loop")
    options = parser.parse_args()
    rates = {
        "step": step(options),
        "loop": loop("gradmix", options),
        "plain loop": loop("none", options),
        "lightly": lightly_loop(options),
    }
    print(f"\n{options.backbone}, batch {options.batch}, {DEVICE}, torch {torch.__version__}\n")
    print("| row | images/s |\n| --- | --- |")
    print(*(f"| {name} | {rate:,.0f} |" for name, rate in rates.items()), sep="\n")


def step(options: argparse.Namespace) -> float:
    """The bare training step with GradMix."""
    backbone = backbones.create(options.backbone)
    method = SimCLR(backbone, backbones.num_features(backbone), gradmix=GradMix())
    method.to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(method.parameters(), 0.1, momentum=0.9)
    views = torch.randn(2, options.batch, 3, 32, 32, device=DEVICE)
    pair = [view.contiguous(memory_format=torch.channels_last) for view in views]

    def run() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=options.precision == "bf16"):
            loss, _ = method(pair)
        update(loss, optimizer)

    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return options.batch / timer.blocked_autorange(min_run_time=5).median


def loop(extra_view: str, options: argparse.Namespace) -> float:
    """The recipe, as its log has it."""
    data = f"--data.name=folder --data.root={options.data}" if options.data else ""
    with tempfile.TemporaryDirectory() as folder:
        settings = (
            f"--run={folder} {data} --backbone.name={options.backbone} --extra_view={extra_view} "
            f"--training.epochs=2 --training.batch_size={options.batch} "
            f"--training.precision={options.precision} --training.knn_every=0"
        )
        simclr_gradmix.main(settings.split())
        last = Path(folder, "log.jsonl").read_text().splitlines()[-1]
        return json.loads(last)["images_per_second"]


def lightly_loop(options: argparse.Namespace) -> float:
    """Plain SimCLR as in lightly's examples, with our backbone."""
    images = load(Data("folder" if options.data else "digits", options.data), "train")
    transform = SimCLRTransform(input_size=32, gaussian_blur=0.0)

    def collate(indices: list[int]) -> list[torch.Tensor]:
        pairs = [transform(to_pil_image(images.decoded(i))) for i in indices]
        return [torch.stack(views) for views in zip(*pairs, strict=True)]

    workers = {"num_workers": options.workers, "persistent_workers": options.workers > 0}
    how = {"shuffle": True, "drop_last": True, "collate_fn": collate, **workers}
    loader = torch.utils.data.DataLoader(range(len(images)), options.batch, **how)
    backbone = backbones.create(options.backbone)
    features = backbones.num_features(backbone)
    model = torch.nn.Sequential(backbone, SimCLRProjectionHead(features, features, 128)).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    criterion = NTXentLoss(temperature=0.2)

    def epoch() -> None:
        for x0, x1 in loader:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=options.precision == "bf16"):
                z0, z1 = model(x0.to(DEVICE)), model(x1.to(DEVICE))
            update(criterion(z0.float(), z1.float()), optimizer)

    timer = Timer("epoch()", globals={"epoch": epoch}, num_threads=torch.get_num_threads())
    return len(loader) * options.batch / timer.timeit(1).mean


def update(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    main()
