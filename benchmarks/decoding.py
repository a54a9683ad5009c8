"""Images per second and memory of decoding photographs, 500x375 JPEG to 224 px.

Threads are what `--training.decode threads` uses. Processes are those of a torch DataLoader, which
pass batches on through shared memory (/dev/shm). Each row is a process of its own; the second pass
over the images is timed.

    python -m benchmarks.decoding
    python -m benchmarks.decoding --images PHOTOGRAPHS --workers 1 8 32
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import functional

from ssl_gradmix.data import images as image_files

SIZE, BATCH = 224, 32


def pillow(path: Path) -> torch.Tensor:
    image = image_files.fit(image_files.decode(path), SIZE)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def torchvision(path: Path) -> torch.Tensor:
    image = decode_image(read_file(str(path)), ImageReadMode.RGB)
    return functional.center_crop(functional.resize(image, [SIZE], antialias=True), [SIZE, SIZE])


DECODERS: dict[str, Callable[[Path], torch.Tensor]] = {"Pillow": pillow, "torchvision": torchvision}


class Images(Dataset):
    def __init__(self, paths: list[Path], decoder: str) -> None:
        self.paths, self.decode = paths, DECODERS[decoder]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.decode(self.paths[index])


def batches(images: Images, workers: int) -> Iterator[torch.Tensor]:
    with ThreadPoolExecutor(workers) as pool:
        decoded = pool.map(images.__getitem__, range(len(images)))
        while batch := [image for image, _ in zip(decoded, range(BATCH), strict=False)]:
            yield torch.stack(batch)


def measure(paths: list[Path], decoder: str, how: str, workers: int) -> tuple[float, float]:
    """Images per second, and the peak memory in MiB of this process and its children."""
    torch.set_num_threads(1)
    images, peak, done = Images(paths, decoder), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], memory())

    threading.Thread(target=watch).start()
    loader: Iterable[torch.Tensor] = ()
    if how == "processes":
        loader = DataLoader(images, BATCH, num_workers=workers, persistent_workers=True)
    for _ in range(2):
        began = time.perf_counter()
        seen = sum(len(b) for b in (loader if how == "processes" else batches(images, workers)))
        seconds = time.perf_counter() - began
    done.set()
    return seen / seconds, peak[0]


def memory() -> float:
    """MiB of this process and its children; shared pages are counted once (Pss)."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    total = 0
    for process in ("self", *children):
        try:
            rows = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(row.split()[1]) for row in rows if row.startswith("Pss:"))
    return total / 1024


def photographs(folder: Path, count: int) -> list[Path]:
    """Random images with the spectrum of photographs (amplitude 1/f), about 60 kB each."""
    rng, paths = np.random.default_rng(0), []
    frequency = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500))
    frequency[0, 0] = 1
    for i in range(count):
        noise = np.fft.rfft2(rng.normal(size=(3, 375, 500))) / frequency
        pixels = np.fft.irfft2(noise, (375, 500)).transpose(1, 2, 0)
        pixels = 128 + 50 * (pixels - pixels.mean()) / pixels.std()
        paths.append(folder / f"{i}.jpg")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--images", help="folder of photographs (default: generated)")
    parser.add_argument("--count", type=int, default=512, help="number of generated images")
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, 2, cores}))
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        given = image_files.find(Path(options.images)) if options.images else None
        paths = given or photographs(Path(folder), options.count)
        print(f"{len(paths)} images, {cores} cores, torch {torch.__version__}\n")
        print("| decoder | workers | how | images/s | peak MiB |\n| --- | --- | --- | --- | --- |")
        for decoder in DECODERS:
            for workers in options.workers:
                for how in ("threads", "processes"):
                    with ProcessPoolExecutor(1, spawn) as pool:
                        rate, peak = pool.submit(measure, paths, decoder, how, workers).result()
                    print(f"| {decoder} | {workers} | {how} | {rate:,.0f} | {peak:,.0f} |")


if __name__ == "__main__":
    main()
