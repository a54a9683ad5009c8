"""Frozen features of images, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.evaluation.encoders import Encoder
from ssl_gradmix.files import write_whole

if TYPE_CHECKING:
    from accelerate import Accelerator


def extract(
    encoder: Encoder,
    images: ImageSet | np.ndarray,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    cache: str | Path | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Features of all images under a frozen encoder: eval mode and inference mode, so that no buffer changes.

    Images are resized and cropped to the encoder's square as `ImageSet.pixels` does, scaled to [0, 1] and normalized by
    the encoder's mean and standard deviation. (timm's own evaluation resizes larger and crops more where a model asks
    for it; here the whole center square is seen.) Everything runs in float32
    (which torch lets a GPU's convolutions round to TF32, unless `torch.backends.cudnn.allow_tf32` is false).

    Args:
        encoder: Moved to the device, its kernels to channels_last, and put in eval mode.
        images: A set, or uint8 (N, H, W, 3), which has no labels.
        batch_size: Images at once, on each process.
        device: Where the encoder runs; None takes the accelerator's, else a GPU where there is one.
        cache: Folder in which features are kept, under a fingerprint of the encoder's weights, its image size and
            normalization, and the images. Files on disk count as unchanged while path, size and time of change are.
        accelerator: Under `accelerate launch`, each process takes a slice, and all get the whole, in order.
        progress: Show a bar where it takes some seconds.

    Returns:
        Features float32 (N, D), and labels int64 (N,), -1 where unlabeled, both on the CPU.

    Raises:
        ValueError: If there are no images, an image cannot be read, or the encoder gives no finite (N, D) features.
    """
    if isinstance(images, np.ndarray):
        images = ImageSet(images, np.full(len(images), -1, np.int64), (), "array")
    if len(images) == 0:
        raise ValueError(f"{images.name} has no images to encode")
    labels = torch.from_numpy(np.asarray(images.labels, np.int64))
    kept = Path(cache, f"{fingerprint(encoder, images)}.safetensors") if cache is not None else None

    features = _read(kept) if kept is not None else None
    if not _all_processes(features is not None, accelerator):
        main = accelerator is None or accelerator.is_main_process
        if device is None:
            device = ("cuda" if torch.cuda.is_available() else "cpu") if accelerator is None else accelerator.device
        features = _gather(encoder, images, batch_size, torch.device(device), accelerator, progress and main)
        if kept is not None and main:
            write_whole(kept, lambda temporary: temporary.write_bytes(save({"features": features})))
        if accelerator is not None:
            accelerator.wait_for_everyone()  # a process that went on at once might not find the file yet
    return features, labels


def fingerprint(encoder: Encoder, images: ImageSet) -> str:
    """What features depend on, in 32 hexadecimal digits: weights, preparation, and the images with their order."""
    digest = hashlib.sha256(f"{encoder.fingerprint} {encoder.size} {encoder.mean} {encoder.std}".encode())
    if isinstance(images.images, np.ndarray):
        digest.update(str(images.images.shape).encode())
        digest.update(np.ascontiguousarray(images.images))
    else:
        for path in images.images:
            status = os.stat(path)
            digest.update(os.fsencode(f"{Path(path).resolve()} {status.st_size} {status.st_mtime_ns}\n"))
    return digest.hexdigest()[:32]


def _gather(
    encoder: Encoder,
    images: ImageSet,
    batch_size: int,
    device: torch.device,
    accelerator: Accelerator | None,
    progress: bool,
) -> Tensor:
    """Encodes this process's slice, and where there are several processes puts their slices together in order."""
    if accelerator is None or accelerator.num_processes == 1:
        return _encode(encoder, images, batch_size, device, progress).cpu()
    share = math.ceil(len(images) / accelerator.num_processes)
    start = accelerator.process_index * share
    # The last slices may be short or empty, and gathering wants equal ones: fill up with the first images.
    own = np.arange(start, start + share) % len(images)
    features = _encode(encoder, images.subset(own), batch_size, device, progress)
    return accelerator.gather(features.to(accelerator.device)).cpu()[: len(images)]


@torch.inference_mode()
def _encode(encoder: Encoder, images: ImageSet, batch_size: int, device: torch.device, progress: bool) -> Tensor:
    model = encoder.model.to(device, memory_format=torch.channels_last).eval()
    mean = torch.tensor(encoder.mean, device=device).view(3, 1, 1)
    std = torch.tensor(encoder.std, device=device).view(3, 1, 1)
    features = []
    with tqdm(
        total=len(images), desc=f"encoding {images.name}", unit="image", delay=3, disable=None if progress else True
    ) as bar:
        for pixels in _ahead(images, encoder.size, batch_size, pinned=device.type == "cuda"):
            encoded = model((pixels.to(device, non_blocking=True).float() / 255 - mean) / std)
            if encoded.ndim != 2 or len(encoded) != len(pixels):
                shape = tuple(encoded.shape)
                raise ValueError(f"the encoder {encoder.name} must give one feature vector an image, got {shape}")
            features.append(encoded.float())
            bar.update(len(pixels))
    together = torch.cat(features)
    if not together.isfinite().all():  # once, as a GPU is waited for
        raise ValueError(f"the encoder {encoder.name} gives NaN or infinite features: its training may have diverged")
    return together


def _ahead(images: ImageSet, size: int, batch_size: int, pinned: bool) -> Iterator[Tensor]:
    """Pixels batch by batch, each decoded, or corrupted, while the one before is encoded; pinned, a GPU copies them."""

    def read(start: int) -> Tensor:
        batch = images.subset(np.arange(start, min(start + batch_size, len(images))))
        pixels = batch.pixels(size, progress=False)
        return pixels.pin_memory() if pinned else pixels

    with ThreadPoolExecutor(1) as thread:
        coming = None
        for start in range(0, len(images), batch_size):
            before, coming = coming, thread.submit(read, start)
            if before is not None:
                yield before.result()
        if coming is not None:
            yield coming.result()


def _all_processes(holds: bool, accelerator: Accelerator | None) -> bool:
    """Whether it holds on every process: they must agree on what to compute, even where another job writes the file."""
    if accelerator is None or accelerator.num_processes == 1:
        return holds
    return bool(accelerator.gather(torch.tensor([holds], device=accelerator.device)).all())


def _read(path: Path) -> Tensor | None:
    if not path.exists():
        return None
    try:
        return load_file(path)["features"]
    except (SafetensorError, KeyError) as error:
        warnings.warn(f"the cached features {path} are damaged ({error}), they are computed again", stacklevel=3)
        return None
