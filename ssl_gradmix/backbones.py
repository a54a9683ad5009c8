"""Encoders: any timm model that gives features, and ResNets for small images, which importing this module registers."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from ssl_gradmix.files import read_json, write_whole

SMALL = ("resnet10_tiny", "resnet18_small", "resnet34_small", "resnet50_small")

_CONFIG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 32, 32),
    "pool_size": (4, 4),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": timm.data.IMAGENET_DEFAULT_MEAN,
    "std": timm.data.IMAGENET_DEFAULT_STD,
    "first_conv": "conv1",
    "classifier": "fc",
}
_ELSEWHERE = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "checkpoint_path"}
"""Arguments of timm.create_model by which settings could have it read other weights, from any file or address."""

_LARGEST = 4096
"""Side of an image, in pixels, above which a description is not believed."""

_REAL = {torch.float64, torch.float32, torch.float16, torch.bfloat16}

default_cfgs = generate_default_cfgs(dict.fromkeys(SMALL, _CONFIG))


class SmallResNet(ResNet):
    """A ResNet for images of about 32 px, as everybody's CIFAR numbers use it: 3x3 stem with stride 1, no max-pooling.

    At 32 px the stages' maps are 32, 16, 8 and 4 places a side; the ImageNet stem would leave a single place.
    """

    def __init__(self, channels: tuple[int, int, int, int] = (64, 128, 256, 512), **kwargs: Any) -> None:
        width = channels[0]
        # timm's deep stem is asked for because it alone gives the stem another width than 64; its first layers are then
        # replaced.
        super().__init__(channels=channels, stem_type="deep", stem_width=width // 2, **kwargs)
        self.conv1 = nn.Conv2d(kwargs.get("in_chans", 3), width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        for stage in self.feature_info:
            stage["reduction"] //= 4 if stage["module"] != "act1" else 2


def _small_resnet(variant: str, pretrained: bool, **kwargs: Any) -> SmallResNet:
    return build_model_with_cfg(SmallResNet, variant, pretrained, **kwargs)


@register_model
def resnet10_tiny(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """One basic block a stage, widths 16 to 128: 0.3 million weights, trained in minutes on a laptop."""
    return _small_resnet(
        "resnet10_tiny", pretrained, block=BasicBlock, layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), **kwargs
    )


@register_model
def resnet18_small(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """ResNet-18 for small images."""
    return _small_resnet("resnet18_small", pretrained, block=BasicBlock, layers=(2, 2, 2, 2), **kwargs)


@register_model
def resnet34_small(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """ResNet-34 for small images."""
    return _small_resnet("resnet34_small", pretrained, block=BasicBlock, layers=(3, 4, 6, 3), **kwargs)


@register_model
def resnet50_small(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """ResNet-50 for small images."""
    return _small_resnet("resnet50_small", pretrained, block=Bottleneck, layers=(3, 4, 6, 3), **kwargs)


def create(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A timm model without classifier, from images (N, C, H, W) to features (N, D).

    Args:
        name: Any timm model name, `resnet18_small` and its like included, or `local-dir:PATH` of a saved one.
        pretrained: Load timm's published weights, which downloads them, or those of the saved one.
        **kwargs: The model's own arguments, for instance `drop_path_rate=0.1`.

    Raises:
        ValueError: A name that timm does not know (near names are given), arguments that the model does not take, with
            which it gives no such features, or that point to weights, weights that are not to be had, or pickled ones
            in a folder.
    """
    kind, _, rest = name.partition(":")
    folder, saved = Path(rest), {}
    if kind == "local-dir":
        architecture, _, saved = read_description(folder)
        check_name(architecture)
    else:
        check_name(name)
    if found := sorted(_ELSEWHERE & (saved | kwargs).keys()):
        raise ValueError(f"backbone.kwargs must not have {', '.join(found)}: no weights are read from elsewhere")
    weights = folder / "model.safetensors"
    if pretrained and kind == "local-dir" and not weights.is_file():
        raise ValueError(f"backbone.pretrained: {rest!r} has no model.safetensors, and other weights are not read")
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)
        if not hasattr(model, "num_features") or any(parameter.is_meta for parameter in model.parameters()):
            raise TypeError("it would give no features (N, D)")
    except Exception as error:  # models and weights fail in ways of their own
        said = " ".join(str(error).split())[:300] or type(error).__name__
        if pretrained and isinstance(error, RuntimeError | OSError | SafetensorError):
            hint = "is it a backbone of that kind" if kind == "local-dir" else "is there a network, or leave it false"
            raise ValueError(f"backbone.pretrained: no weights to be had for {name} ({said}); {hint}") from error
        if kwargs:
            raise ValueError(f"backbone.kwargs: {name} does not take {kwargs} ({said})") from error
        raise ValueError(f"backbone.name: {name} cannot be created ({said})") from error
    if pretrained and kind == "local-dir" and (odd := of_other_kinds(load_file(weights), model.state_dict())):
        raise ValueError(f"backbone.pretrained: {weights} has numbers of another kind than the model: {odd[0]}")
    model.model_args = saved | kwargs  # for `save`
    return model


def check_name(name: str) -> None:
    """Raises ValueError for what is no model of timm's, with or without a tag of published weights, with near names."""
    if ":" in name:
        raise ValueError(f"backbone.name must be one of timm's own models, got {name!r}")
    model, _, _ = name.partition(".")
    if not timm.is_model(model):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.4) or SMALL
        raise ValueError(f"backbone.name: timm knows no model {name!r}; near names are {', '.join(near)}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:
        tags = ", ".join(sorted(timm.list_models(f"{model}.*", pretrained=True))) or "none of that model"
        raise ValueError(f"backbone.name: timm has no weights {name!r}, but {tags}") from None


def read_description(folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """What config.json says of a saved model: architecture, timm's pretrained_cfg, and arguments it was created with.

    Raises:
        FileNotFoundError: There is no config.json.
        ValueError: It is damaged.
    """
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} is no folder in timm's layout: it has no config.json")
    described = read_json(path)
    try:
        architecture, cfg = str(described["architecture"]), described["pretrained_cfg"]
        arguments = {key: value for key, value in (described.get("model_args") or {}).items() if key != "num_classes"}
        preparation(cfg)
    except KeyError as error:
        raise ValueError(f"{path} is damaged: it has no {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return architecture, cfg, arguments


def preparation(cfg: dict[str, Any]) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Image size, mean and standard deviation from timm's pretrained_cfg.

    Raises:
        ValueError: They are not those of square color images. What is of another type, or missing, raises TypeError or
            KeyError.
    """
    channels, height, width = cfg["input_size"]
    if channels != 3 or height != width:
        raise ValueError(f"input_size must be 3 channels of a square image, got {cfg['input_size']}")
    if not isinstance(height, int) or not 1 <= height <= _LARGEST:
        raise ValueError(f"input_size must be whole pixels up to {_LARGEST}, got {cfg['input_size']}")
    mean, std = tuple(map(float, cfg["mean"])), tuple(map(float, cfg["std"]))
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise ValueError(f"mean and std must be 3 numbers each, std above 0, got {mean} and {std}")
    return height, mean, std


def of_other_kinds(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Names of weights that torch would convert without a word: complex or 8-bit ones, whole ones for real ones."""

    def kind(tensor: Tensor) -> str:
        if tensor.dtype in _REAL:
            return "real"
        return "other" if tensor.is_complex() or tensor.is_floating_point() else "whole"

    return [name for name in wanted if name in weights and kind(weights[name]) != kind(wanted[name])]


def num_features(backbone: nn.Module) -> int:
    """D of the features that a timm model without classifier gives; some have a wider layer behind `num_features`."""
    return getattr(backbone, "head_hidden_size", None) or backbone.num_features


def save(backbone: nn.Module, folder: Path, image_size: int) -> None:
    """Writes config.json and model.safetensors in timm's own layout, for `timm.create_model("local-dir:FOLDER")`.

    Each file is written whole or not at all, so that a reader never sees half of one.

    A model with arguments of its own must be from `create`; it was trained on images of `image_size` pixels a side.
    """
    known = backbone.pretrained_cfg
    config = {
        "architecture": known["architecture"],
        "num_classes": 0,
        "num_features": num_features(backbone),
        "pretrained_cfg": {
            **{key: known[key] for key in ("mean", "std", "first_conv", "classifier") if key in known},
            "interpolation": "bilinear",
            "input_size": [known["input_size"][0], image_size, image_size],
            "fixed_input_size": False,
            "crop_pct": 1.0,
            "num_classes": 0,
        },
        "model_args": getattr(backbone, "model_args", {}),
    }
    described = json.dumps(config, indent=2) + "\n"
    write_whole(folder / "config.json", lambda temporary: temporary.write_text(described))
    write_weights(backbone, folder / "model.safetensors")  # last: a folder that has them is whole


def write_weights(module: nn.Module, path: Path) -> None:
    """Writes a module's weights as safetensors, whole or not at all.

    safetensors' own save_file writes under a random name beside it, which a kill would leave behind for ever.
    """
    weights = {name: tensor.detach().contiguous().cpu().clone() for name, tensor in module.state_dict().items()}
    write_whole(path, lambda temporary: temporary.write_bytes(to_bytes(weights, {"format": "pt"})))
