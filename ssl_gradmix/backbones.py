"""Encoders: any timm model that gives features, and ResNets for small images, which importing this module registers."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import save as to_bytes
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from ssl_gradmix.files import read_json

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
        pretrained: Load timm's published weights, which downloads them.
        **kwargs: The model's own arguments, for instance `drop_path_rate=0.1`.

    Raises:
        ValueError: A name that timm does not know (near names are given), arguments that the model does not take or
            that point to weights, weights that are not to be had, or pickled ones in a folder.
    """
    if found := sorted(_ELSEWHERE & kwargs.keys()):
        raise ValueError(f"backbone.kwargs must not have {', '.join(found)}: no weights are read from elsewhere")
    kind, _, rest = name.partition(":")
    if pretrained and kind == "local-dir" and not Path(rest, "model.safetensors").is_file():
        raise ValueError(f"backbone.pretrained: {rest!r} has no model.safetensors, and other weights are not read")
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.4) or SMALL
        raise ValueError(f"backbone.name: timm knows no model {name!r}; near names are {', '.join(near)}")
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)
        model.model_args = (_model_args(Path(rest)) if kind == "local-dir" else {}) | kwargs  # for `save`
        return model
    except TypeError as error:
        raise ValueError(f"backbone.kwargs: {name} does not take {kwargs} ({error})") from error
    except (RuntimeError, OSError, SafetensorError) as error:
        if not pretrained:
            raise
        raise ValueError(
            f"backbone.pretrained: no weights to be had for {name} ({error}); is there a network, or leave it false"
        ) from error


def _model_args(folder: Path) -> dict[str, Any]:
    """The arguments that a saved model was created with, which timm merges with those given."""
    described = read_json(folder / "config.json").get("model_args") or {}
    return {name: value for name, value in described.items() if name != "num_classes"}


def num_features(backbone: nn.Module) -> int:
    """D of the features that a timm model without classifier gives; some have a wider layer behind `num_features`."""
    return getattr(backbone, "head_hidden_size", None) or backbone.num_features


def save(backbone: nn.Module, folder: Path, image_size: int) -> None:
    """Writes config.json and model.safetensors in timm's own layout, for `timm.create_model("local-dir:FOLDER")`.

    Each file is written under a temporary name and renamed, so that a reader never sees half of one.

    Args:
        backbone: A timm model, from `create` where it was made with arguments of its own.
        folder: Created where it is not there.
        image_size: Side of the images it was trained on, in pixels.
    """
    folder.mkdir(parents=True, exist_ok=True)
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
    weights = {name: tensor.detach().contiguous().cpu().clone() for name, tensor in backbone.state_dict().items()}
    # safetensors' own save_file writes beside it, under a random name that a kill would leave behind for ever.
    (folder / ".model.safetensors.tmp").write_bytes(to_bytes(weights, {"format": "pt"}))
    (folder / ".config.json.tmp").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("model.safetensors", "config.json"):
        os.replace(folder / f".{name}.tmp", folder / name)
