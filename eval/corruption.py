"""How well frozen features hold up where test images are corrupted: 15 common corruptions at 5 severities.

A linear classifier and kNN are fitted on clean training images, then judge the corrupted test images. These are made on
the fly, image by image reproducibly, or read from a published set (CIFAR-10-C, CIFAR-100-C, ImageNet-C, or what
eval/make_c.py wrote). What is finished is kept: the same command again goes on where an interrupted one stopped.

    python eval/corruption.py runs/x
    python eval/corruption.py runs/x --baseline runs/y --images 1000
    python eval/corruption.py timm:resnet18.a1_in1k --data.name folder --data.root imagenet --published ImageNet-C \\
        --baseline alexnet --out results
    python eval/corruption.py runs/x --osr true --data.open_set random:6:0
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ssl_gradmix.evaluation import cli

if TYPE_CHECKING:
    from ssl_gradmix.evaluation.setup import Evaluation


@dataclass
class Options:
    """What is measured, and how.

    Args:
        corruptions: Which, such as [fog, jpeg_compression]; null is the 15 common ones.
        extra: Add the 4 extra corruptions, which are reported apart.
        preset: Parameters of the severities; null takes those made for images nearest in size.
        published: Folder of a published set to read, in place of corrupting the test images here.
        images: About so many test images, the same share of each class; null takes all. A sweep encodes them 75 times.
        osr: Also tell known from unknown classes, both corrupted: the known ones are those of --data.open_set or
            --data.classes, a run's own by default.
        baseline: What mCE divides by: another run evaluated so, or `alexnet` (ImageNet only).
        epochs: Passes over the training features, of the linear classifier.
        k: Neighbours that vote in weighted kNN.
        temperature: Of their weights exp(cosine / temperature).
        seed: Of the corruptions, the linear classifier's training, and the choice of images.
        workers: Processes that corrupt, for each process that encodes; null shares the cores out.
    """

    corruptions: list[str] | None = None
    extra: bool = False
    preset: Literal["cifar", "imagenet64", "imagenet"] | None = None
    published: str | None = None
    images: int | None = None
    osr: bool = False
    baseline: str | None = None
    epochs: int = 100
    k: int = 20
    temperature: float = 0.07
    seed: int = 0
    workers: int | None = None


def evaluate(evaluation: Evaluation, options: Options) -> None:
    """Measures, and on the main process writes `corruption.json` and `.png` and prints tables."""
    from accelerate.utils import broadcast_object_list
    from joblib import cpu_count
    from tqdm import tqdm

    from ssl_gradmix.data.corruptions import SEVERITIES, default_preset, frost_source
    from ssl_gradmix.data.datasets import ImageSet, known_classes, load
    from ssl_gradmix.evaluation.features import extract, fingerprint
    from ssl_gradmix.evaluation.probes import linear_probe
    from ssl_gradmix.evaluation.results import write_rows
    from ssl_gradmix.evaluation.robustness import (
        Classifiers,
        CorruptedImages,
        Published,
        choose_corruptions,
        choose_images,
        decoded,
    )

    accelerator, encoder = evaluation.accelerator, evaluation.encoder
    names = choose_corruptions(options.corruptions, options.extra, options.seed)
    train, test = evaluation.load_labelled("train"), load(evaluation.data, "test")
    known = known_classes(evaluation.data, test.classes)
    _check(options, evaluation.data.open_set, known)

    def chosen(images: ImageSet) -> np.ndarray:
        return choose_images(images, None if options.osr else known, options.images, options.seed)

    numbers = chosen(test)
    clean = decoded(test.subset(numbers), encoder.size)
    if options.published:
        published = Published(options.published, test)
        origin, files = published.origin, published.fingerprint()

        def corrupted(name: str, severity: int) -> ImageSet:
            images = published.read(name, severity)
            return images.subset(chosen(images))
    else:
        preset = options.preset or default_preset(encoder.size)
        origin = {"source": "generated", "preset": preset, "seed": options.seed, "frost_source": frost_source()}
        files, workers = None, options.workers or max(1, cpu_count() // accelerator.num_processes)

        def corrupted(name: str, severity: int) -> CorruptedImages:
            return CorruptedImages(clean, numbers, name, severity, preset, options.seed, workers)

    for name in names:
        corrupted(name, SEVERITIES[-1])  # what is damaged is better known before hours of work than after

def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(evaluate, Options, __doc__, argv)
