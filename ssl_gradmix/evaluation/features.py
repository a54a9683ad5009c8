"""Frozen features of images, computed once and kept on disk, and their effective rank."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import save_file
from torch import Tensor

from ssl_gradmix import console
from ssl_gradmix.backbones import read_weights
from ssl_gradmix.data.augmentation import eval_transform
from ssl_gradmix.data.corrupted import CorruptedImages
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.evaluation.encoders import Encoder
from ssl_gradmix.files import write_whole

Images = ImageSet | CorruptedImages


def extract(
    encoder: Encoder,
    images: Images | np.ndarray,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    cache: str | Path | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Features of all images under a frozen encoder, in eval and inference mode.

    Images are resized and cropped to the encoder's square as by `ImageSet.pixels`, scaled to [0, 1]
    and normalized. (timm's evaluation crops more for some models; here the whole center square is
    seen.) Everything runs in float32, in which PyTorch lets a GPU's convolutions use TF32 unless
    `torch.backends.cudnn.allow_tf32` is false.

    Args:
        encoder: Its model is moved to the device.
        images: A set of images, or uint8 (N, H, W, 3) without labels.
        batch_size: Images per forward pass, on each process.
        device: Device of the encoder; by default the accelerator's, or a GPU if there is one.
        cache: Folder in which features of an `ImageSet` are kept, under a fingerprint of encoder
            and images. Files count as unchanged if names, sizes and modification times are.
        accelerator: With several processes, each encodes a part of the images.
        progress: Show a progress bar if it takes some seconds.

    Returns:
        Features float32 (N, D) and labels int64 (N,), -1 if unlabeled, on the CPU and in order, on
        every process.

    Raises:
        ValueError: There are no images, an image cannot be read, or the encoder does not return one
            finite vector an image.
    """
    if isinstance(images, np.ndarray):
        images = ImageSet(images, np.full(len(images), -1), (), "array")
    if len(images) == 0:
        raise ValueError(f"{images.name} has no images to encode")
    labels = torch.from_numpy(np.asarray(images.labels, np.int64))
    path = kept = None
    if cache is not None and isinstance(images, ImageSet):
        path = Path(cache, f"{_fingerprint(encoder, images)}.safetensors")
        kept = read_weights(path)["features"] if path.is_file() else None
    if accelerator is not None:  # other processes may have looked earlier or later
        (kept,) = broadcast_object_list([kept])
    if kept is not None:
        return kept, labels

    own, main = images, True
    if accelerator is not None:
        device, main = device or accelerator.device, accelerator.is_main_process
        parts = np.array_split(np.arange(len(images)), accelerator.num_processes)
        own = images.subset(parts[accelerator.process_index])
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    batches = _encode(encoder, own, batch_size, device, progress and main)
    features = torch.cat(batches if accelerator is None else gather_object(batches))
    if features.shape[:-1] != labels.shape or not features.isfinite().all():
        raise ValueError(
            f"{encoder.name} does not return a finite vector an image: did it diverge?"
        )
    if path is not None and main:
        write_whole(path, lambda temporary: save_file({"features": features}, temporary))
    return features, labels


def count_copies(features: Tensor, bank: Tensor) -> int:
    """Number of features (M, D) that equal one of a bank (N, D) up to rounding.

    Copies of an image do. So do images that an encoder cannot tell apart, such as all images if it
    has collapsed. Features are compared with those whose projections to a line are next to theirs.
    """
    line = torch.randn(bank.shape[1], generator=torch.Generator().manual_seed(0)).to(bank.device)

    def projected(vectors: Tensor) -> Tensor:
        return torch.cat([rows.double() @ line.double() for rows in vectors.split(2**13)])

    places, order = projected(bank).sort()
    nearest = torch.searchsorted(places, projected(features))
    largest = 1e-5 * features.norm(dim=1)  # images in batches of other sizes differ by less
    copied = torch.zeros_like(largest, dtype=torch.bool)
    for offset in range(-4, 4):
        others = bank[order[(nearest + offset).clamp(0, len(bank) - 1)]]
        copied |= (features - others).norm(dim=1) <= largest
    return int(copied.sum())


@torch.no_grad()
def rankme(features: Tensor) -> float:
    """RankMe: exponential of the entropy of the singular values, normalized to sum 1.

    `exp(-sum_k p_k log p_k)` with `p_k = s_k / sum_j s_j + 1e-7`; Garrido et al. 2023,
    arXiv 2210.02885. Features are not centered, so identical features have rank 1. The singular
    values are the roots of the eigenvalues of the smaller Gram matrix, in float64.

    Args:
        features: (N, D), finite. For N < D the rank is at most N, hence comparable for one N only.

    Returns:
        Between 1 (all features on a line) and min(N, D); 0 if all features are zero.
    """
    matrix = features.double()
    n_samples, n_features = matrix.shape
    products = matrix.T @ matrix if n_features <= n_samples else matrix @ matrix.T
    values = torch.linalg.eigvalsh(products).clamp_min(0).sqrt()
    if values.sum() == 0:
        return 0.0
    fractions = values / values.sum() + 1e-7
    return float((-fractions * fractions.log()).sum().exp())


@torch.inference_mode()
def _encode(
    encoder: Encoder,
    images: Images,
    batch_size: int,
    device: str | torch.device,
    progress: bool,
) -> list[Tensor]:
    """Features of each batch, on the CPU."""
    model = encoder.model.eval().to(device).to(memory_format=torch.channels_last)
    normalize = eval_transform(encoder.size, encoder.mean, encoder.std)
    batches = []
    description = f"encoding {images.name}"
    silent = not progress
    with console.progress(len(images), description, "image", delay=3, silent=silent) as bar:
        for pixels in _decoded_ahead(images, encoder.size, batch_size):
            encoded = model(normalize(pixels.to(device)))
            batches.append(encoded.float().cpu())
            bar.update(len(pixels))
    return batches


def _decoded_ahead(images: Images, size: int, batch_size: int) -> Iterator[Tensor]:
    """Yields pixels batch by batch, and decodes the next batch meanwhile."""
    pending: list[Future[Tensor]] = []
    with ThreadPoolExecutor(1) as thread:
        for start in range(0, len(images), batch_size):
            stop = min(start + batch_size, len(images))
            batch = images.subset(np.arange(start, stop))
            pending.append(thread.submit(batch.pixels, size, progress=False))
            if len(pending) > 1:
                yield pending.pop(0).result()
        while pending:
            yield pending.pop(0).result()


def _fingerprint(encoder: Encoder, images: ImageSet) -> str:
    """Hash of all that features depend on: weights, preparation, images and their order."""
    parts = [encoder.fingerprint, encoder.size, encoder.mean, encoder.std, images.fingerprint()]
    if not isinstance(images.images, np.ndarray):
        parts += [path.stat().st_mtime_ns for path in images.images]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
