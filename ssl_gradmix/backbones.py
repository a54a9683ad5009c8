"""Encoders from timm, ResNets for small images, and their weights on disk.

Importing this module registers `resnet10_tiny`, `resnet18_small`, `resnet34_small` and
`resnet50_small` with timm.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from ssl_gradmix.files import read_json, write_whole

logger = logging.getLogger("ssl_gradmix")

SMALLEST_MAP = 4
"""Side of the smallest map, in positions, at which `default_layers` attributes."""

SMALL = ("resnet10_tiny", "resnet18_small", "resnet34_small", "resnet50_small")

_CONFIG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 32, 32),
    "pool_size": (4, 4),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "conv1",
    "classifier": "fc",
}

default_cfgs = generate_default_cfgs(dict.fromkeys(SMALL, _CONFIG))

_READS_FILES = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
    "checkpoint_path",
}
"""Arguments with which timm.create_model would load other weights, pickled ones among them."""

_PICKLED = (
    "{} is a pickled checkpoint, which can run code when it is loaded: load it yourself with "
    "torch.load(path, weights_only=True) and save its state dict with safetensors.torch.save_file"
)


@dataclass
class Backbone:
    """The encoder: any timm model that gives features.

    Args:
        name: A timm model, one of this package's ResNets for images of about 32 px
            (`resnet10_tiny`, `resnet18_small`, `resnet34_small`, `resnet50_small`), or
            `local-dir:PATH`, a folder in timm's layout such as a run's `backbone/`.
        kwargs: Keyword arguments of the model, for instance `{"drop_path_rate": 0.1}`.
        pretrained: Start from the published weights, or from those in the folder.
    """

    name: str = "resnet10_tiny"
    kwargs: dict[str, Any] | None = None
    pretrained: bool = False


class SmallResNet(ResNet):
    """A ResNet for images of about 32 px: 3x3 stem with stride 1, no max-pooling.

    At 32 px the maps of the four stages have 32, 16, 8 and 4 positions a side, as in the usual
    CIFAR ResNets. The ImageNet stem would leave a single position.
    """

    def __init__(
        self, channels: tuple[int, int, int, int] = (64, 128, 256, 512), **kwargs: Any
    ) -> None:
        width = channels[0]
        # timm's deep stem is the only one whose width is not fixed at 64. Its layers are replaced.
        super().__init__(channels=channels, stem_type="deep", stem_width=width // 2, **kwargs)
        stem = nn.Conv2d(kwargs.get("in_chans", 3), width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.add_module("conv1", stem)
        self.add_module("maxpool", nn.Identity())
        stages = cast(list[dict[str, Any]], self.feature_info)
        for stage in stages:
            stage["reduction"] //= 4 if stage["module"] != "act1" else 2


def _small_resnet(
    variant: str, block: type, layers: tuple[int, ...], pretrained: bool, kwargs: dict[str, Any]
) -> SmallResNet:
    return build_model_with_cfg(
        SmallResNet, variant, pretrained, block=block, layers=layers, **kwargs
    )


@register_model
def resnet10_tiny(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """One basic block per stage, widths 16 to 128, 0.3 million weights: trains on a laptop."""
    kwargs = {"channels": (16, 32, 64, 128)} | kwargs
    return _small_resnet("resnet10_tiny", BasicBlock, (1, 1, 1, 1), pretrained, kwargs)


@register_model
def resnet18_small(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """ResNet-18 for small images."""
    return _small_resnet("resnet18_small", BasicBlock, (2, 2, 2, 2), pretrained, kwargs)


@register_model
def resnet34_small(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """ResNet-34 for small images."""
    return _small_resnet("resnet34_small", BasicBlock, (3, 4, 6, 3), pretrained, kwargs)


@register_model
def resnet50_small(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """ResNet-50 for small images."""
    return _small_resnet("resnet50_small", Bottleneck, (3, 4, 6, 3), pretrained, kwargs)


def create(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Creates a timm model without classifier, from images (N, C, H, W) to features (N, D).

    Args:
        name: A timm model name, or `local-dir:PATH` for a folder in timm's layout.
        pretrained: Load the published weights (safetensors only), or those in the folder.
        **kwargs: Arguments of the model, for instance `drop_path_rate=0.1`.

    Raises:
        ValueError: The name is unknown, the arguments are invalid, or the weights are unavailable
            or do not fit.
        FileNotFoundError: The folder does not exist or has no weights.
    """
    kind, _, rest = name.partition(":")
    if kind != "local-dir":
        return _create(name, kwargs, pretrained)
    architecture, _, saved = _read_description(Path(rest))
    model = _create(architecture, saved | kwargs)
    if pretrained:
        load_weights(model, Path(rest, "model.safetensors"))
    return model


def _create(name: str, kwargs: dict[str, Any], pretrained: bool = False) -> nn.Module:
    if not timm.is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.4)
        raise ValueError(f"backbone.name: timm has no model {name!r}; near names: {near or SMALL}")
    if found := _READS_FILES & kwargs.keys():
        raise ValueError(f"backbone.kwargs must not contain {sorted(found)}")
    # timm would fall back to a pickled file where a model has no safetensors.
    overlay = {"hf_hub_filename": "model.safetensors"} if pretrained else None
    try:
        model = timm.create_model(
            name, pretrained=pretrained, num_classes=0, pretrained_cfg_overlay=overlay, **kwargs
        )
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"backbone {name} cannot be created with {kwargs}: {error}") from error
    cast(Any, model).model_args = kwargs  # for `save`
    return model


def num_features(backbone: nn.Module) -> int:
    """Number of features D of a timm model without classifier."""
    model = cast(Any, backbone)
    # Some models have a wider layer after the one that `num_features` describes.
    return getattr(model, "head_hidden_size", None) or model.num_features


def default_layers(backbone: nn.Module, size: int) -> list[str]:
    """Layers at which GradMix attributes by default, from timm's `feature_info`.

    Args:
        backbone: A timm model.
        size: Side of the images in pixels.

    Returns:
        The deepest stage whose map has at least 4x4 positions. For a transformer that is read at
        its class token, the last block but one: the gradient at the patch tokens of its last block
        is zero. Empty for a model without `feature_info`.
    """
    modules = dict(backbone.named_modules())
    stages = [s for s in getattr(backbone, "feature_info", []) if s["module"] in modules]
    roomy = [s["module"] for s in stages if size // s["reduction"] >= SMALLEST_MAP]
    if getattr(backbone, "global_pool", None) == "token":
        roomy = roomy[:-1]
    return roomy[-1:] or [stage["module"] for stage in stages[:1]]


def preparation(cfg: Mapping[str, Any]) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Image size, mean and standard deviation from timm's `pretrained_cfg`.

    Raises:
        ValueError: The images are not square color images.
    """
    channels, height, width = cfg["input_size"]
    if channels != 3 or height != width:
        raise ValueError(f"input_size must be (3, size, size), got {cfg['input_size']}")
    return height, tuple(cfg["mean"]), tuple(cfg["std"])


def save(backbone: nn.Module, folder: str | Path, image_size: int) -> None:
    """Writes config.json and model.safetensors, for `timm.create_model("local-dir:FOLDER")`.

    Args:
        backbone: A model from `create`.
        folder: Where the files go.
        image_size: Side of the images it was trained on, in pixels.
    """
    cfg = cast(Any, backbone).pretrained_cfg
    config = {
        "architecture": cfg["architecture"],
        "num_classes": 0,
        "num_features": num_features(backbone),
        "pretrained_cfg": {
            **{key: cfg[key] for key in ("mean", "std", "first_conv", "classifier") if key in cfg},
            "interpolation": "bilinear",
            "input_size": [cfg["input_size"][0], image_size, image_size],
            "fixed_input_size": False,
            "crop_pct": 1.0,
            "num_classes": 0,
        },
        "model_args": getattr(backbone, "model_args", {}),
    }
    text = json.dumps(config, indent=2) + "\n"
    write_whole(Path(folder, "config.json"), lambda temporary: temporary.write_text(text))
    write_weights(backbone, Path(folder, "model.safetensors"))


def write_weights(module: nn.Module, path: str | Path) -> None:
    """Writes the weights and buffers of a module as safetensors."""
    state = module.state_dict()
    # safetensors rejects tensors that share memory, hence the copies.
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    content = to_bytes(weights, {"format": "pt"})
    write_whole(path, lambda temporary: temporary.write_bytes(content))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, or is a pickled checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        with path.open("rb") as file:
            pickled = file.read(2).startswith((b"PK", b"\x80"))  # new and old files of torch.save
        raise ValueError(_PICKLED.format(path) if pickled else f"{path}: {error}") from error


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a safetensors file into a timm model without classifier.

    Every weight must fit, except that a classification head in the file is left out. If all names
    start with a common prefix such as `backbone.`, it is removed.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged or pickled, or its weights do not fit the model.
    """
    wanted = model.state_dict()
    weights = _without_prefix(read_weights(path), wanted)
    heads = cast(Any, model).pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    kept = {name: w for name, w in weights.items() if name.rpartition(".")[0] not in heads}
    try:
        model.load_state_dict(kept)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model: {error}") from error


def _without_prefix(weights: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Selects the weights of a model that is part of a larger one, for instance `backbone.`."""
    first = next(iter(wanted))
    prefixes = [name.removesuffix(first) for name in weights if name.endswith(f".{first}")]
    prefixes = [prefix for prefix in prefixes if all(prefix + name in weights for name in wanted)]
    if first in weights or len(prefixes) != 1:
        return weights
    prefix = prefixes[0]
    logger.info("the weights under %s are read", prefix)
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def load_folder(folder: str | Path) -> nn.Module:
    """Loads a model from a folder in timm's layout: config.json and model.safetensors.

    timm itself would ignore weights that are missing. Its `pretrained_cfg` is that of config.json.

    Raises:
        FileNotFoundError: The folder does not exist or is incomplete.
        ValueError: A file is damaged, or the weights do not fit.
    """
    architecture, cfg, arguments = _read_description(Path(folder))
    model = _create(architecture, arguments)
    load_weights(model, Path(folder, "model.safetensors"))
    cast(Any, model).pretrained_cfg = cfg
    return model


def _read_description(folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Architecture, `pretrained_cfg`, and arguments of the model from config.json."""
    path = folder / "config.json"
    described = read_json(path)
    try:
        arguments = dict(described.get("model_args") or {})
        arguments.pop("num_classes", None)
        preparation(described["pretrained_cfg"])
        return str(described["architecture"]), described["pretrained_cfg"], arguments
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not describe a model in timm's layout: {error!r}") from error


def start_from(method: nn.Module, run: str | Path) -> None:
    """Loads the weights of another run's backbone and, if it has the same shape, its projector.

    Raises:
        FileNotFoundError: The run does not exist, or has no weights yet.
        ValueError: Its backbone is a different one, or a file is damaged.
    """
    run = Path(run).expanduser()
    load_weights(method.get_submodule("backbone"), run / "backbone" / "model.safetensors")
    projector = method.get_submodule("projector")
    weights, wanted = read_weights(run / "projector.safetensors"), projector.state_dict()
    shapes = [{name: w.shape for name, w in each.items()} for each in (weights, wanted)]
    if shapes[0] == shapes[1]:
        projector.load_state_dict(weights)
    else:
        logger.info("the projector of %s has another shape and is not used", run)
