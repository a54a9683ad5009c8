"""Frozen encoders: from a run folder, from timm, or from somebody's checkpoint."""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from torch import nn

from ssl_gradmix import backbones
from ssl_gradmix.files import read_yaml
from ssl_gradmix.methods import METHODS, Method
from ssl_gradmix.run_folder import RunFolder, near_runs

logger = logging.getLogger("ssl_gradmix")

Feature = Literal["backbone", "projector"]


@dataclass(eq=False)
class Encoder:
    """A frozen model from images to features, and how images are prepared for it.

    Args:
        model: Any module from images (N, 3, size, size) to features (N, D). It is put in eval mode
            and frozen here.
        size: Side of the square images in pixels.
        mean: Mean of each channel of images in [0, 1], for normalization.
        std: Standard deviation of each channel.
        name: Name in results.
        run: Run folder of the encoder, if it has one.
        config: Contents of the run's config.yaml.
        feature: What `model` returns: `backbone` features, or embeddings of the `projector`.

    Attributes:
        fingerprint: SHA-256 of the model's structure, weights and buffers.
    """

    model: nn.Module
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    run: Path | None = None
    config: dict[str, Any] | None = None
    feature: Feature = "backbone"
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)
        self.fingerprint = _fingerprint(self.model)

    @property
    def title(self) -> str:
        """Name for titles of figures, including the feature unless it is the backbone."""
        return self.name if self.feature == "backbone" else f"{self.name} ({self.feature})"


def load_encoder(
    spec: str | Path,
    weights: str | Path | None = None,
    image_size: int | None = None,
    feature: Feature = "backbone",
    prefix: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Encoder:
    """Loads a frozen encoder without classification head, on the CPU. Files cannot run code.

    Args:
        spec: A run folder, `timm:NAME` (published weights, from the cache or downloaded), or
            `local-dir:PATH` (a folder in timm's layout, config.json and model.safetensors).
        weights: A checkpoint for `timm:NAME`, in place of the published weights: safetensors, or a
            file of `torch.save`. It can hold more than the encoder, see `backbones.fit`.
        image_size: Side of the images in pixels, if it differs from that of the training. Position
            embeddings of vision transformers are resampled.
        feature: Return features of the `backbone`, or embeddings of a run's `projector`.
        prefix: Part of the checkpoint to read, for instance `module.encoder_k`.
        kwargs: Keyword arguments of the model `timm:NAME`, for instance `{"img_size": 32}`.

    Raises:
        FileNotFoundError: The path does not exist, is not a run, or has no weights yet.
        ValueError: A file is damaged, weights do not fit, or the name is unknown.
    """
    kind, _, rest = str(spec).partition(":")
    given = {"weights": weights, "prefix": prefix, "backbone.kwargs": kwargs}
    for name, value in given.items():
        if value is not None and (kind != "timm" or (name == "prefix" and weights is None)):
            raise ValueError(f"{name} goes with timm:NAME and a file of weights, not with {spec}")
    if kind not in ("timm", "local-dir"):
        return _from_run(RunFolder(spec), image_size, feature)
    if feature == "projector":
        raise ValueError(f"feature projector needs a run folder, {spec} has no projector")
    if kind == "local-dir":
        return _encoder(backbones.load_folder(rest), str(spec), image_size)
    model = backbones.create(rest, pretrained=weights is None, **(kwargs or {}))
    if weights is None:
        return _encoder(model, str(spec), image_size)
    # Before the weights, whose position embeddings would otherwise be resampled twice.
    encoder = _encoder(model, f"{spec}@{Path(weights).name}", image_size)
    backbones.load_weights(model, Path(weights).expanduser(), prefix)
    return replace(encoder)  # with the fingerprint of these weights


def start_from(method: nn.Module, init: str) -> None:
    """Loads the weights with which a training starts into a method's backbone.

    Args:
        method: The method. Its projector is loaded from a run if it has the same shape.
        init: As `load_encoder`, or the path of a checkpoint, see `backbones.fit`.

    Raises:
        FileNotFoundError: The path does not exist, is not a run, or has no weights yet.
        ValueError: A file is damaged, or the weights are of another backbone.
    """
    backbone = cast(Any, method.get_submodule("backbone"))
    if Path(init).is_file():
        return backbones.load_weights(backbone, init)
    cfg = backbone.pretrained_cfg
    gray = {"in_chans": 1} if cfg["input_size"][0] == 1 and init.startswith("timm:") else None
    encoder = load_encoder(init, kwargs=gray)
    architecture = cast(Any, encoder.model).pretrained_cfg["architecture"]
    if architecture != cfg["architecture"]:
        raise ValueError(f"init: {init} is a {architecture}: add --backbone.name {architecture}")
    backbones.fit(backbone, encoder.model.state_dict(), init)
    backbone.pretrained_cfg = {**cfg, "mean": encoder.mean, "std": encoder.std}
    if encoder.run is None:
        return None
    projector = method.get_submodule("projector")
    weights = backbones.read_weights(RunFolder(encoder.run).projector)
    shapes = [{n: w.shape for n, w in each.items()} for each in (weights, projector.state_dict())]
    if shapes[0] == shapes[1]:
        projector.load_state_dict(weights)
    else:
        logger.info("the projector of %s has another shape and is not used", init)
    return None


def _from_run(run: RunFolder, image_size: int | None, feature: Feature) -> Encoder:
    if not run.config.is_file():
        near = f"; did you mean {' or '.join(found)}?" if (found := _near(run.path)) else ""
        raise FileNotFoundError(
            f"{run.path} is not a run folder: give one, timm:NAME or local-dir:PATH{near}"
        )
    model = backbones.load_folder(run.backbone)
    encoder = _encoder(model, run.path.resolve().name, image_size)
    config = encoder.config = read_yaml(run.config)
    encoder.run = run.path
    if feature == "backbone":
        return encoder
    build: Callable[..., Method] = METHODS[config["recipe"]]
    projector = build(model, backbones.num_features(model), **config["method"]).projector
    projector.load_state_dict(backbones.read_weights(run.projector))
    return replace(encoder, model=nn.Sequential(model, projector), feature=feature)


def _near(path: Path) -> list[str]:
    """Encoders that somebody who gives this path may mean."""
    if len(path.parts) == 1 and timm.is_model(path.name.partition(".")[0]):
        return [f"timm:{path}"]
    if path.is_file():
        return [f"timm:NAME --weights {path}"]
    models = difflib.get_close_matches(str(path), timm.list_models())
    return near_runs(path) or [f"timm:{model}" for model in models]


def _encoder(model: nn.Module, name: str, image_size: int | None) -> Encoder:
    timm_model = cast(Any, model)
    size, mean, std = backbones.preparation(timm_model.pretrained_cfg)
    if image_size not in (None, size) and hasattr(model, "set_input_size"):
        timm_model.set_input_size(img_size=image_size)
    return Encoder(model, image_size or size, mean, std, name)


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256(repr(model).encode())
    tensors = model.state_dict() | dict(model.named_buffers())  # some buffers are not in the state
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(content.numpy())
    return digest.hexdigest()
