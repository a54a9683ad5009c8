"""Images a second of whole trainings: our loop against its bare step, and against a loop written as lightly's examples.

Every row runs in a process of its own, round after round, so that a machine that slows down slows all rows and each
row's peak memory is its own. Images are synthetic, uint8 in memory. Rows:

    step            the bare step on views that stay the same: views, log and loop cost nothing
    step NCHW       the same without channels_last
    step compiled   the same with the backbone's stages compiled one by one
    step fused      the same with torch's fused optimizer
    loop            `Trainer`, as the recipes run it: views on the device
    loop workers    `Trainer` with views made by lightly's transforms in workers; on a GPU, copied from pinned memory
    loop pageable   the same from pageable memory, where the host waits for each copy; on a GPU only
    plain loop      `Trainer`, plain SimCLR
    lightly         plain SimCLR as lightly's examples write it: its transforms in workers, its loss

    python benchmarks/throughput.py
    python benchmarks/throughput.py --device cuda --backbone resnet18_small --batch 512 --images 50000 --precision bf16
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import timing

GRADMIX = ("step", "step NCHW", "step compiled", "step fused", "loop", "loop workers", "loop pageable")
PLAIN = ("plain loop", "lightly")


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--backbone", default="resnet10_tiny", help="any timm model (default: %(default)s)")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="images a step (default: %(default)s)")
    parser.add_argument("--images", type=int, default=2048, help="images of an epoch (default: %(default)s)")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--workers", type=int, default=2, help="of the rows that have any (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=GRADMIX + PLAIN, help="(default: all that the device has)")
    parser.add_argument("--row", choices=GRADMIX + PLAIN, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(options.row, options)))
        return
    copied = options.device.startswith("cuda")
    chosen = options.rows or [row for row in GRADMIX + PLAIN if copied or row != "loop pageable"]
    if "loop pageable" in chosen and not copied:
        parser.error("--rows: 'loop pageable' is for a GPU, as nothing is copied on a CPU")
    print(
        f"{options.backbone}, {options.size} px, batch {options.batch}, {options.images:,} images, precision "
        f"{options.precision}, {options.workers} workers, {options.rounds} rounds, {timing.origin(options.device)}\n",
        flush=True,
    )
    rounds = [{row: in_a_process(row) for row in chosen} for _ in range(options.rounds)]
    print(timing.table(["row", "images/s", "against", "peak memory"], [line(row, rounds) for row in chosen]))


def in_a_process(row: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--row", row], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def line(row: str, rounds: list[dict[str, dict[str, float]]]) -> list[str]:
    rates = [each[row]["images_per_second"] for each in rounds]
    base = "step" if row in GRADMIX else "lightly"
    against = ""
    if base in rounds[0] and base != row:
        against = timing.ratio(rates, [each[base]["images_per_second"] for each in rounds]) + f" of {base}"
    memory = max(each[row]["memory"] for each in rounds)
    return [row, f"{statistics.median(rates):,.0f}", against, f"{memory / 2**30:.2f} GiB"]


def measure(row: str, options: argparse.Namespace) -> dict[str, float]:
    """Runs a row: its images a second, and its peak memory in bytes (the GPU's where there is one)."""
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    if row == "lightly":
        rate = lightly_style(options)
    elif row.startswith("step"):
        rate = bare_step(row.removeprefix("step").strip(), options)
    else:
        rate = our_loop(row, options)
    memory = (
        torch.cuda.max_memory_allocated()
        if options.device.startswith("cuda")
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    return {"images_per_second": rate, "memory": memory}


def images(options: argparse.Namespace) -> np.ndarray:
    shape = (options.images, options.size, options.size, 3)
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


def bare_step(variant: str, options: argparse.Namespace) -> float:
    import torch

    from ssl_gradmix import GradMix, backbones
    from ssl_gradmix.methods.simclr import SimCLR

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

    def steps() -> None:
        for _ in range(options.images // options.batch):
            with torch.autocast(kind, torch.bfloat16, enabled=half):
                losses = method(views)
            losses.total.backward()
            optimizer.step()
            optimizer.zero_grad()

    steps()
    return options.images // options.batch * options.batch / timing.seconds(steps, options.device)[0]


def our_loop(row: str, options: argparse.Namespace) -> float:
    """Our Trainer's second epoch, as its own log has it."""
    import torch

    from ssl_gradmix import GradMix, backbones
    from ssl_gradmix.data.datasets import ImageSet
    from ssl_gradmix.methods.simclr import SimCLR
    from ssl_gradmix.run_folder import RunFolder
    from ssl_gradmix.settings import Augmentation, Optimizer, Training
    from ssl_gradmix.training.loop import Trainer
    from ssl_gradmix.training.processes import create_accelerator

    training = Training(
        epochs=2,
        batch_size=options.batch,
        precision=options.precision,
        threads=options.threads,
        workers=options.workers,
        knn_every=0,
        samples_every=0,
    )
    accelerator = create_accelerator(training)
    backbone = backbones.create(options.backbone)
    method = SimCLR(backbone, backbones.num_features(backbone), gradmix=None if row == "plain loop" else GradMix())
    labels = np.full(options.images, -1)
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(path)
        trainer = Trainer(
            method.to(torch.device(options.device)),
            ImageSet(images(options), labels, (), "noise"),
            folder,
            accelerator,
            options.size,
            Augmentation(where="workers" if row in ("loop workers", "loop pageable") else "device"),
            Optimizer(),
            training,
        )
        if row == "loop pageable":
            trainer.source.loader.pin_memory = False
        trainer.run()
        return folder.read_log()[-1]["images_per_second"]


def lightly_style(options: argparse.Namespace) -> float:
    """Plain SimCLR as in lightly's examples, with our backbone and settings; the second epoch."""
    import torch
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    from ssl_gradmix import backbones
    from ssl_gradmix.data.augmentation import worker_transform
    from ssl_gradmix.data.datasets import ImageSet
    from ssl_gradmix.settings import Augmentation

    class Views(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.images = ImageSet(images(options), np.zeros(options.images, int), (), "noise")
            self.transform = worker_transform(Augmentation(), options.size, (0.5,) * 3, (0.25,) * 3, n_views=2)

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> list[torch.Tensor]:
            return self.transform(self.images[index][0])

    backbone = backbones.create(options.backbone)
    width = backbones.num_features(backbone)
    model = torch.nn.Sequential(backbone, SimCLRProjectionHead(width, width, 128)).to(options.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    criterion = NTXentLoss(temperature=0.2)
    loader = torch.utils.data.DataLoader(
        Views(),
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
    began = time.perf_counter()
    epoch()
    timing.synchronize(options.device)
    return options.images // options.batch * options.batch / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
