"""Frozen encoders: from a run folder, from timm, or from a safetensors file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from ssl_gradmix import backbones
from ssl_gradmix.files import read_yaml
from ssl_gradmix.methods import METHODS, Method
from ssl_gradmix.run_folder import RunFolder

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
        fingerprint: SHA-256 of the model's structure, weights and buffers, computed here.
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
) -> Encoder:
    """Loads a frozen encoder without classification head, on the CPU. Nothing is unpickled.

    Args:
        spec: A run folder, `timm:NAME` (published weights, from the cache or downloaded), or
            `local-dir:PATH` (a folder in timm's layout, config.json and model.safetensors).
        weights: A safetensors file for `timm:NAME`, in place of the published weights. All weights
            must fit, except those of a classification head and a common prefix such as `backbone.`.
        image_size: Side of the images in pixels, if it differs from that of the training. Position
            embeddings of vision transformers are resampled.
        feature: Return features of the `backbone`, or embeddings of a run's `projector`.

    Raises:
        FileNotFoundError: The path does not exist, is not a run, or has no weights yet.
        ValueError: A file is damaged or pickled, weights do not fit, or the name is unknown.
    """
    kind, _, rest = str(spec).partition(":")
    if kind not in ("timm", "local-dir"):
        if weights is not None:
            raise ValueError(f"weights go with timm:NAME, their architecture, not with {spec}")
        return _from_run(RunFolder(spec), image_size, feature)
    if feature == "projector":
        raise ValueError(f"feature projector needs a run folder, {spec} has no projector")
    if kind == "local-dir":
        return _encoder(backbones.load_folder(rest), str(spec), image_size)
    model, name = backbones.create(rest, pretrained=weights is None), str(spec)
    if weights is not None:
        backbones.load_weights(model, weights)
        name += f"@{Path(weights).name}"
    return _encoder(model, name, image_size)


def _from_run(run: RunFolder, image_size: int | None, feature: Feature) -> Encoder:
    if not run.config.is_file():
        raise FileNotFoundError(
            f"{run.path} is not a run folder: give one, timm:NAME or local-dir:PATH"
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
