"""Puts the parts of a pretraining together: images, backbone, method, monitor and trainer."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jsonargparse import Namespace

from ssl_gradmix import backbones, model_card
from ssl_gradmix.adaptive import Adaptive
from ssl_gradmix.console import show
from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.data.datasets import ImageSet
from ssl_gradmix.data.open_set import load_known, load_labeled
from ssl_gradmix.evaluation.encoders import start_from
from ssl_gradmix.gradmix import GradMix
from ssl_gradmix.methods import Method, SimCLR
from ssl_gradmix.run_folder import RunFolder, binding
from ssl_gradmix.training.monitor import SMALLEST, Monitor
from ssl_gradmix.training.trainer import Trainer, Training, together

logger = logging.getLogger("ssl_gradmix")


def pretrain(
    config: Namespace,
    gradmix: Callable[..., GradMix] = GradMix,
    views: Callable[..., Views] = Views,
    method: Callable[..., Method] = SimCLR,
) -> None:
    """Trains a run, or resumes it.

    Args:
        config: Settings from `cli.read`.
        gradmix: Creates the view generator; called with the arguments in `config.gradmix`.
        views: Creates what makes views; called as the class `Views`.
        method: Creates the method; called with backbone, number of features, `gradmix`, `adaptive`,
            and the arguments in `config.method`.
    """
    training: Training = config.training
    if training.accumulate > 1 and "temperature" in config.method:
        raise ValueError(
            "training.accumulate: a contrastive loss needs the whole batch, because a micro-batch "
            "would contrast with itself alone; use more processes or a smaller training.batch_size"
        )
    folder = RunFolder(config.run)
    accelerator = create_accelerator(training, config.expect_processes, folder)
    training.precision = cast(Any, accelerator.mixed_precision)
    settings = plain(config)
    with together(accelerator):
        folder.check(settings)
    images = _load(config, accelerator)
    if accelerator.num_processes > 1:
        _compare(settings, images)

    size, channels = config.data.size, config.data.channels
    torch.manual_seed(training.seed)
    with together(accelerator):
        built = _build(config, gradmix, method)
        # A run that is resumed no longer needs the weights that it began from.
        if config.init is not None and not folder.has_checkpoint():
            start_from(built, config.init)
    layers = trial(built, size, accelerator.device, channels)

    preparation = cast(Any, built.backbone).pretrained_cfg
    mean, std = preparation["mean"], preparation["std"]
    process, processes = accelerator.process_index, accelerator.num_processes
    make_views = views(config.augmentation, size, mean, std, process, processes)
    monitor = None
    with together(accelerator):
        if accelerator.is_main_process and training.knn_every and len(images) >= SMALLEST:
            monitor = Monitor(images, make_views, mean, std)
    trainer = Trainer(
        built,
        make_views,
        images,
        folder,
        accelerator,
        config.optimizer,
        training,
        n_views=3 if config.extra_view in ("adaptive", "augmented") else 2,
        monitor=monitor,
    )
    with ExitStack() as stack:
        with together(accelerator):
            if accelerator.is_main_process:
                stack.enter_context(folder.locked())
                folder.start(settings, images, device=str(accelerator.device), layers=layers)
        trainer.run()
    if accelerator.is_main_process:
        model_card.write(folder)
        show(f"Next: python eval/{_next(images)}.py {shlex.quote(str(folder.path))}")


def _build(
    config: Namespace, gradmix: Callable[..., GradMix], method: Callable[..., Method]
) -> Method:
    """The method with its backbone and its view generator."""
    kwargs = dict(config.backbone.kwargs or {})
    if config.data.channels == 1:
        kwargs["in_chans"] = 1
    backbone = backbones.create(config.backbone.name, config.backbone.pretrained, **kwargs)
    mixer = None
    if config.extra_view in ("adaptive", "gradmix"):
        arguments = config.gradmix.as_dict()
        layers = arguments.pop("layers") or backbones.default_layers(backbone, config.data.size)
        mixer = gradmix(layers=layers or None, **arguments)
    features = backbones.num_features(backbone)
    adaptive = Adaptive() if config.extra_view == "adaptive" else None
    parts = {"gradmix": mixer, "adaptive": adaptive}
    return method(backbone, features, **parts, **config.method.as_dict())


def create_accelerator(
    training: Training, expect_processes: int | None = None, folder: RunFolder | None = None
) -> Accelerator:
    """Sets up device, processes and threads.

    Raises:
        ValueError: Another number of processes runs than expected, or they cannot share a batch
            evenly.
    """
    accelerator = Accelerator(
        mixed_precision=training.precision,
        gradient_accumulation_steps=training.accumulate,
        log_with=training.trackers or None,
        project_dir=folder and folder.trackers,
    )
    processes = accelerator.num_processes
    if expect_processes not in (None, processes):
        raise ValueError(
            f"expect_processes: {expect_processes} expected, {processes} running; on a CPU, start "
            "several with `ACCELERATE_USE_CPU=true torchrun --nproc_per_node N`"
        )
    parts = processes * training.accumulate
    if training.batch_size % parts or training.batch_size < 2 * parts:
        raise ValueError(
            f"training.batch_size {training.batch_size} must be a multiple of {processes} "
            f"processes x {training.accumulate} micro-batches, with at least two images in each"
        )
    if training.threads and accelerator.device.type == "cpu":
        torch.set_num_threads(training.threads)
    torch.backends.cudnn.benchmark = True  # all steps have the same few shapes
    precision = accelerator.mixed_precision
    logger.info("processes: %d on %s, precision %s", processes, accelerator.device, precision)
    return accelerator


def trial(method: Method, size: int, device: torch.device, channels: int = 3) -> list[str]:
    """Runs a method once on noise, so that what does not fit is reported before training.

    Returns:
        The layers at which GradMix attributes, none without it.

    Raises:
        ValueError: The backbone does not accept images of this size.
    """
    method.to(device).eval()
    count = 2 if method.adaptive is None else 3
    views = [torch.randn(4, channels, size, size, device=device) for _ in range(count)]
    labels = torch.arange(4, device=device) % 2
    layers: list[str] = []
    try:
        method(views, labels)
        if method.gradmix is not None:
            layers = list(method.mixed_views(views, labels).layers)
            logger.info("GradMix attributes at %s", ", ".join(layers))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"the backbone does not accept images of data.size {size} ({error}); a vision "
            f"transformer needs --backbone.kwargs '{{img_size: {size}}}'"
        ) from error
    method.zero_grad()
    method.train()
    return layers


def plain(config: Namespace) -> dict[str, Any]:
    """The settings as nested dictionaries, for config.yaml."""
    sections = config.as_dict()
    sections.pop("environment", None)
    # jsonargparse's PositiveInt and the like become plain numbers, and tuples become lists.
    return json.loads(json.dumps(sections, default=asdict))


def _load(config: Namespace, accelerator: Accelerator) -> ImageSet:
    """The training images of the known classes. One process per machine downloads them."""
    first = accelerator.is_main_process, accelerator.is_local_main_process
    for turn in ((True, True), (False, True), (False, False)):
        with together(accelerator):
            if first == turn:
                images = _read(config)
    return images


def _read(config: Namespace) -> ImageSet:
    if "label_fraction" in config:  # a recipe with labels
        return load_labeled(config.data, config.label_fraction, config.training.seed)
    return load_known(config.data, "train")


def _compare(settings: dict[str, Any], images: ImageSet) -> None:
    """Checks that all processes have the same settings and the same images.

    Raises:
        ValueError: They differ: the processes would wait for each other for ever, or train on a
            mixture.
    """
    mine = {"images": len(images), "fingerprint": images.fingerprint(), **binding(settings)}
    found = gather_object([mine])
    for name in mine:
        values = [each.get(name) for each in found]
        if any(value != values[0] for value in values):
            named = "data.root: the" if name in ("images", "fingerprint") else "the"
            raise ValueError(f"{named} processes differ in {name}: {values}")


def _next(images: ImageSet) -> str:
    """The evaluation to run next: a linear probe if there are classes to tell apart."""
    return "linear_probe" if len(np.unique(images.labels[images.labels >= 0])) > 1 else "reliance"
