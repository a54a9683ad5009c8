"""Every setting of a run, one dataclass a subject: the command line, the YAML files and their help are read off these.

Only what the standard library offers is imported here, so that `--help` is quick. GradMix is its own dataclass, in
`gradmix.py`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal

WIDEST = 65536
"""Of a projector's layers: far above what is in use (8192), and far below what no memory holds."""

MOST_EPOCHS = 10**6


ABOVE_ZERO = math.ulp(0.0)
"""As a lower bound, the least number above 0."""


def _require_between(section: str, settings: object, **bounds: tuple[float, float]) -> None:
    """Refuses numbers out of bounds, and NaN and infinity; null is another matter."""
    for name, (low, high) in bounds.items():
        value = getattr(settings, name)
        wanted = "above 0" if low == ABOVE_ZERO else f"at least {low:g}"
        wanted += f" and at most {high:g}" if high < math.inf else ""
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            raise ValueError(f"{section}.{name} must be {wanted}, got {value!r}")


@dataclass
class Data:
    """Which images, and where they lie.

    Args:
        name: `digits` (in scikit-learn, nothing to download), `cifar10`, `cifar100`, `svhn`, `mnist`, `stl10` (by
            torchvision), or `folder`.
        root: Folder of the images. For `folder`: `root/train/<class>/*` and `root/test/<class>/*` (or `val/`), or
            `root/<class>/*` (split by `test_fraction`), or images without class folders (unlabeled). For torchvision's
            sets: where it keeps its files, null for `data`. `digits` has none.
        size: Side of the square images that the encoder sees, in pixels.
        download: Let torchvision download a set of its own that is not in `root`.
        classes: Use only these classes, by name or by number (a name wins; quote names that are numbers, such as
            `'01'`), for instance the known ones of an open-set split. Null uses all.
        open_set: Use only the known classes of an open-set trial: `cifar10:2` is trial 2 of the literature's five,
            `random:6:0` draws six classes with seed 0. Not together with `classes`.
        test_fraction: Share of each class held out as test images, for folders that have no train/ and test/.
        split_seed: Seed of that split.
        broken: What to do with an image that cannot be read: `stop` with its path, or `skip` it, counted and reported
            (which decodes every file once at the start).
        stamp_bits: Plant a shortcut into all views, a stamp of 4, 9 or 16 black and white cells that names the image,
            see `data/planted.py`; 0 plants none. Evaluations see images without it, but for that of reliance.
        stamp_time: Plant a time of day in digits instead, hhmmss, for images of 64 px or more.
        stamp_place: `anywhere`, at a place of each image's own, in the lower right `corner`, or `everywhere`, repeated.
        stamp_when: `after` the augmentation, or `before` it, where it is cropped and resampled too.
        stamp_strength: Of its black and white over the image, in (0, 1].
    """

    name: Literal["digits", "cifar10", "cifar100", "svhn", "mnist", "stl10", "folder"] = "digits"
    root: str | None = None
    size: int = 32
    download: bool = False
    classes: list[str | int] | None = None  # text first: tried the other way round, '01' becomes 1
    open_set: str | None = None
    test_fraction: float = 0.2
    split_seed: int = 0
    broken: Literal["stop", "skip"] = "stop"
    stamp_bits: int = 0
    stamp_time: bool = False
    stamp_place: Literal["anywhere", "corner", "everywhere"] = "anywhere"
    stamp_when: Literal["after", "before"] = "after"
    stamp_strength: float = 1.0

    def __post_init__(self) -> None:
        if self.stamp_bits not in (0, 4, 9, 16):
            raise ValueError(f"data.stamp_bits must be 0, 4, 9 or 16, got {self.stamp_bits!r}")
        if self.stamp_bits and self.stamp_time:
            raise ValueError(f"data.stamp_bits must be left out where data.stamp_time is, got {self.stamp_bits!r}")
        if self.stamp_time and self.size < 32:
            raise ValueError(f"data.size must be at least 32 where data.stamp_time is, got {self.size!r}")
        _require_between("data", self, size=(8, 4096), test_fraction=(ABOVE_ZERO, 0.9), stamp_strength=(ABOVE_ZERO, 1))
        if self.root is not None and not self.root.strip():
            raise ValueError(
                f"data.root must be a folder (a variable of the shell that is not set gives none), got {self.root!r}"
            )
        if self.name == "digits" and self.root is not None:
            raise ValueError(
                "data.root must be left out where data.name is digits, which has no files: remove it, or add "
                f"--data.name folder to read a folder of images, got {self.root!r}"
            )
        if self.name == "folder" and self.root is None:
            raise ValueError("data.root must be given where data.name is folder, got None")
        if self.download and self.name in ("digits", "folder"):
            raise ValueError(
                f"data.download must be left out where data.name is {self.name}, as there is nothing to download, "
                f"got {self.download!r}"
            )
        if self.classes is not None and self.open_set is not None:
            raise ValueError(f"data.open_set must be left out where data.classes is given, got {self.open_set!r}")


@dataclass
class Augmentation:
    """The random changes that make views of an image, which are cropped from the whole image at its own resolution.

    Args:
        min_scale: Smallest share of the image's area that a random resized crop keeps, in (0, 1].
        flip: Probability of a horizontal flip. Null is 0.5; on the command line, where it is the default, it is 0 for
            `digits`, `mnist` and `svhn`: mirror images of digits are none.
        jitter: Probability of a color jitter.
        brightness: Brightness factor is drawn from [1 - b, 1 + b].
        contrast: Contrast factor is drawn from [1 - c, 1 + c].
        saturation: Saturation factor is drawn from [1 - s, 1 + s].
        hue: Hue shift as a share of the color circle is drawn from [-h, h].
        gray: Probability of turning the image gray.
        blur: Probability of a Gaussian blur, sigma in [0.1, 2] pixels at 224 px and in proportion at other sizes. Null
            is 0; on the command line, where it is the default, it is 0.5 from 96 px on: on smaller images it hardly
            shows.
        solarize: Probability of solarizing, second view only (BYOL).
    """

    min_scale: float = 0.2
    flip: float | None = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    gray: float = 0.2
    blur: float | None = None
    solarize: float = 0.0

    def __post_init__(self) -> None:
        self.flip = 0.5 if self.flip is None else self.flip
        self.blur = 0.0 if self.blur is None else self.blur
        chances = dict.fromkeys(("flip", "jitter", "gray", "blur", "solarize"), (0, 1))
        strengths = dict.fromkeys(("brightness", "contrast", "saturation"), (0, 1))
        _require_between("augmentation", self, min_scale=(ABOVE_ZERO, 1), hue=(0, 0.5), **chances, **strengths)


@dataclass
class Backbone:
    """The encoder: any timm model that gives features.

    Args:
        name: A timm model, or one of this project's small-image ResNets (3x3 stem, no max-pooling, for 32 px):
            `resnet10_tiny`, `resnet18_small`, `resnet34_small`, `resnet50_small`. Or `local-dir:PATH`, a saved one.
        kwargs: Keyword arguments of that model, for instance `{"drop_path_rate": 0.1}`.
        pretrained: Start from timm's published weights (downloads them), or from those of the saved one.
    """

    name: str = "resnet10_tiny"
    kwargs: dict | None = None
    pretrained: bool = False

    def __post_init__(self) -> None:
        if any(not isinstance(key, str) or key in ("name", "pretrained") for key in self.kwargs or {}):
            raise ValueError(
                "backbone.kwargs must be without pretrained and name, which are settings, and name arguments, "
                f"got {self.kwargs!r}"
            )


@dataclass
class SimCLRSettings:
    """SimCLR's own settings.

    Args:
        name: Of the method, for whoever reads config.yaml.
        temperature: Of the contrastive loss.
        hidden_dim: Width of the projector's hidden layer; null takes the backbone's number of features.
        output_dim: Width of the embeddings.
        weight: Factor on the third view's loss, beside the share of the image it keeps.
        allow_fewer_negatives: Accept gradient accumulation, under which each micro-batch contrasts with itself alone.
    """

    name: Literal["simclr"] = "simclr"
    temperature: float = 0.2
    hidden_dim: int | None = None
    output_dim: int = 128
    weight: float = 1.0
    allow_fewer_negatives: bool = False

    def __post_init__(self) -> None:
        widths = dict.fromkeys(("hidden_dim", "output_dim"), (1, WIDEST))
        _require_between("method", self, temperature=(ABOVE_ZERO, math.inf), **widths, weight=(0, math.inf))


@dataclass
class BYOLSettings:
    """BYOL's own settings.

    Args:
        name: Of the method, for whoever reads config.yaml.
        hidden_dim: Width of the hidden layers of projector and predictor.
        output_dim: Width of the embeddings.
        momentum: Of the target network at the start; it rises to 1 on a cosine.
        weight: Factor on the third view's loss, beside the share of the image it keeps.
    """

    name: Literal["byol"] = "byol"
    hidden_dim: int = 1024
    output_dim: int = 256
    momentum: float = 0.99
    weight: float = 1.0

    def __post_init__(self) -> None:
        widths = dict.fromkeys(("hidden_dim", "output_dim"), (1, WIDEST))
        _require_between("method", self, **widths, momentum=(0, 1), weight=(0, math.inf))


@dataclass
class SupConSettings:
    """Settings of supervised contrast beside SimCLR.

    Args:
        name: Of the method, for whoever reads config.yaml.
        temperature: Of both contrastive losses.
        hidden_dim: Width of the projector's hidden layer; null takes the backbone's number of features.
        output_dim: Width of the embeddings.
        supervised: Factor on the loss of the labels.
        self_supervised: Factor on the losses without labels, the third view's among them.
        attributed_loss: Which loss GradMix attributes: the `self_supervised` one of the two views, or the `whole` one
            of the two views, with that of the labels.
        label_fraction: Share of each class that keeps its labels, at least one image and drawn by training.seed; the
            other images serve the losses without labels.
        allow_fewer_negatives: Accept gradient accumulation, under which each micro-batch contrasts with itself alone.
    """

    name: Literal["supcon"] = "supcon"
    temperature: float = 0.05
    hidden_dim: int | None = None
    output_dim: int = 128
    supervised: float = 1.0
    self_supervised: float = 1.2
    attributed_loss: Literal["self_supervised", "whole"] = "self_supervised"
    label_fraction: float = 1.0
    allow_fewer_negatives: bool = False

    def __post_init__(self) -> None:
        bounds = dict.fromkeys(("hidden_dim", "output_dim"), (1, WIDEST))
        bounds |= dict.fromkeys(("supervised", "self_supervised"), (0, math.inf))
        _require_between("method", self, temperature=(ABOVE_ZERO, math.inf), label_fraction=(ABOVE_ZERO, 1), **bounds)


METHODS = {"simclr": SimCLRSettings, "byol": BYOLSettings, "supcon": SupConSettings}
"""The settings of each method, by `method.name`."""


@dataclass
class Optimizer:
    """How weights are updated.

    Args:
        name: `sgd` (momentum 0.9), `lars` (momentum 0.9) or `adamw`.
        lr: Learning rate for a global batch of 256; it is scaled by batch / 256.
        weight_decay: Decay of weight matrices and kernels; norms and biases are not decayed.
        warmup_epochs: Linear warm-up from 0, then a cosine down to 0, both by step.
        clip: Largest gradient norm; null does not clip.
    """

    name: Literal["sgd", "lars", "adamw"] = "sgd"
    lr: float = 0.2
    weight_decay: float = 5e-4
    warmup_epochs: float = 3.0
    clip: float | None = None

    def __post_init__(self) -> None:
        above_zero = dict.fromkeys(("lr", "clip"), (ABOVE_ZERO, math.inf))
        _require_between("optimizer", self, **above_zero, weight_decay=(0, math.inf), warmup_epochs=(0, math.inf))


@dataclass
class Training:
    """How long, how much at once, and what is noted on the way.

    Args:
        epochs: Passes over the training images.
        batch_size: Images in a global batch, over all processes together.
        accumulate: Micro-batches to an optimizer step; the batch is split into so many.
        seed: Seeds initialization, shuffling, augmentation and mixing.
        precision: `no` is float32, in which a GPU rounds convolutions to TF32 but not matrix products, so that
            transformers want `bf16`. That and `fp16` (on accelerators) are mixed precision. Null does as `accelerate
            launch --mixed_precision` says, or `accelerate config`, and else as `no`.
        decode: `once` decodes all training images at the start and keeps them where the encoder runs, `workers` decodes
            them when they are needed, in loader processes; `auto` decodes once what fits in 4 GiB, or in a
            quarter of a GPU's free memory. The views are the same.
        workers: Loader processes, where images are decoded when they are needed.
        threads: CPU threads of each process, where it trains on the CPU. Null does as OMP_NUM_THREADS says, or else
            shares the cores out.
        knn_every: Epochs between two readings of features of training images: their effective rank, the share of the
            agreement of two views that hangs on a tenth of the image and, where images are labeled, kNN accuracy on
            held-out ones; 0 for never.
        samples_every: Epochs between two pictures of mixed views in `samples/`; 0 for never.
        trackers: Accelerate trackers to log to as well, for instance `[tensorboard]`.
    """

    epochs: int = 20
    batch_size: int = 128
    accumulate: int = 1
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] | None = None
    decode: Literal["auto", "once", "workers"] = "auto"
    workers: int = 2
    threads: int | None = None
    knn_every: int = 10
    samples_every: int = 10
    trackers: list[str] | None = None

    def __post_init__(self) -> None:
        crowd = 16 * (os.cpu_count() or 1)  # more only wait for each other, and thousands bring a machine down
        counts = dict.fromkeys(("epochs", "accumulate"), (1, MOST_EPOCHS))
        every = dict.fromkeys(("knn_every", "samples_every"), (0, MOST_EPOCHS))
        _require_between("training", self, **counts, batch_size=(2, math.inf), threads=(1, crowd), workers=(0, crowd))
        _require_between("training", self, seed=(0, 2**63 - 1), **every)
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"training.batch_size must be a multiple of training.accumulate={self.accumulate}, "
                f"got {self.batch_size!r}"
            )
