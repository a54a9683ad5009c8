"""Encoders from timm, ResNets for small images, and their weights on disk.

Importing this module registers `resnet10_tiny`, `resnet18_small`, `resnet34_small` and
`resnet50_small` with timm.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from ssl_gradmix.files import open_regular, read_json, write_whole

logger = logging.getLogger("ssl_gradmix")

SMALLEST_MAP = 4
"""Side of the smallest map, in positions, that `stages` returns."""

MOST_STAGES = 4
"""Largest number of layers that `stages` returns."""

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

_ROLES: tuple[set[str], ...] = (
    {"ema"},
    set(),
    {"teacher"},
    {"q", "query", "online", "student"},
    {"k", "key", "target", "momentum"},
)
"""Words in the names of the encoders of a checkpoint. The first found is read, as published
evaluations do: the average of the weights, an encoder of no role, DINO's teacher, MoCo's query."""

_FEW = 3
"""Names that an error lists."""


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
        path = Path(rest, "model.safetensors")
        fit(model, read_weights(path), path)
    return model


def _create(name: str, kwargs: dict[str, Any], pretrained: bool = False) -> nn.Module:
    if not timm.is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.4)
        raise ValueError(f"backbone.name: timm has no model {name!r}; near names: {near or SMALL}")
    if found := _READS_FILES & kwargs.keys():
        raise ValueError(f"backbone.kwargs must not contain {sorted(found)}")
    if pretrained:
        _check_published(name)
    # timm would fall back to a pickled file where a model has no safetensors.
    overlay = {"hf_hub_filename": "model.safetensors"} if pretrained else None
    try:
        model = timm.create_model(
            name, pretrained=pretrained, num_classes=0, pretrained_cfg_overlay=overlay, **kwargs
        )
    except (RuntimeError, TypeError, OSError) as error:
        raise ValueError(f"backbone {name} cannot be created with {kwargs}: {error}") from error
    created = cast(Any, model)
    created.model_args = kwargs  # for `save`
    if kwargs.get("in_chans") == 1 and len(created.pretrained_cfg["mean"]) == 3:
        cfg = created.pretrained_cfg
        gray = {name: (sum(cfg[name]) / 3,) for name in ("mean", "std")}
        created.pretrained_cfg = {**cfg, **gray, "input_size": (1, *cfg["input_size"][1:])}
    return model


def _check_published(name: str) -> None:
    """Asks for published weights once. Without network, their download would retry for a minute.

    Raises:
        ValueError: They are neither in the cache nor available.
    """
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        return  # timm reports what is wrong, or has an address without retries
    file = cfg.hf_hub_id, "model.safetensors"
    if isinstance(try_to_load_from_cache(*file), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(*file), timeout=10)
    except Exception as error:  # of requests or httpx, by the version of huggingface_hub
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the published weights of {name} are not in the cache and cannot be downloaded "
            f"({reason}): connect to the network, or read them from a file"
        ) from error


def num_features(backbone: nn.Module) -> int:
    """Number of features D of a timm model without classifier."""
    model = cast(Any, backbone)
    # Some models have a wider layer after the one that `num_features` describes.
    return getattr(model, "head_hidden_size", None) or model.num_features


def default_layers(backbone: nn.Module, size: int) -> list[str]:
    """The layer at which GradMix attributes by default: the last one of `stages`."""
    return stages(backbone, size)[-1:]


def stages(backbone: nn.Module, size: int) -> list[str]:
    """Up to four layers with maps, from the first to the deepest, from timm's `feature_info`.

    Args:
        backbone: A timm model.
        size: Side of the images in pixels.

    Returns:
        The deepest stages whose maps have at least 4x4 positions. Blocks of a transformer, whose
        maps all have the same size, are evenly spaced. If it is read at its class token, the last
        one is the last block but one: the gradient at the patch tokens of the last block is zero.
        Empty for a model without `feature_info`.
    """
    modules = dict(backbone.named_modules())
    known = [s for s in getattr(backbone, "feature_info", []) if s["module"] in modules]
    roomy = [s for s in known if size // s["reduction"] >= SMALLEST_MAP]
    if getattr(backbone, "global_pool", None) == "token":
        roomy = roomy[:-1]
    alike = len({s["reduction"] for s in roomy}) == 1
    step = math.ceil(len(roomy) / MOST_STAGES) if alike else 1
    chosen = roomy[::-1][::step][:MOST_STAGES] or known[:1]
    return [s["module"] for s in reversed(chosen)]


def preparation(cfg: Mapping[str, Any]) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Image size, mean and standard deviation from timm's `pretrained_cfg`.

    Raises:
        ValueError: The images are not square, or neither color nor gray images.
    """
    channels, height, width = cfg["input_size"]
    if channels not in (1, 3) or height != width:
        raise ValueError(f"input_size must be (1 or 3, size, size), got {cfg['input_size']}")
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
    """Reads a safetensors file, as this package writes them.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, or is a pickled checkpoint.
    """
    try:
        with open_regular(path) as file:
            start = file.read(2)
        return load_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there are no weights {path}") from error
    except SafetensorError as error:
        pickled = start.startswith((b"PK", b"\x80"))  # new and old files of torch.save
        reason = "it is a pickled checkpoint" if pickled else error
        raise ValueError(f"{path} holds no weights in safetensors: {reason}") from error


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors of somebody's checkpoint: safetensors, or a file of `torch.save`.

    Such a file is read with `weights_only=True`, which builds tensors and plain values and runs no
    code. The names of nested dictionaries are joined: `state_dict.module.encoder_q.conv1.weight`.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, holds no tensors, or holds objects of other classes.
    """
    try:
        return read_weights(path)
    except ValueError:
        open_regular(path).close()
    try:
        # DINO and MAE keep their options in this class, which only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        weights = dict(_tensors(content))
    except Exception as error:  # the unpickler raises nearly every type on a broken file
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"contains a {found[1]}" if found else "is damaged or not a checkpoint"
        raise ValueError(
            f"{path} {what}; weights are read from safetensors, or from a file of torch.save with "
            "tensors and plain values alone: save the model's state_dict()"
        ) from error
    if not weights:
        raise ValueError(f"{path} holds no tensors with names")
    return weights


def _tensors(content: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield from _tensors(value, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(content, Tensor) and prefix:
        yield prefix, content


def load_weights(model: nn.Module, path: str | Path, prefix: str | None = None) -> None:
    """Loads somebody's checkpoint into a timm model without classifier, see `fit`.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file cannot be read, or its weights do not fit the model.
    """
    fit(model, read_checkpoint(path), path, prefix)


def fit(
    model: nn.Module, weights: Mapping[str, Tensor], source: object, prefix: str | None = None
) -> None:
    """Loads weights into a timm model without classifier. Each of its weights must be there.

    The encoder can be a part of the weights, such as `module.encoder_q.`. Where several fit, the
    first in the order of `_ROLES` is read. Heads are left out: what belongs to no module of the
    model. Names of other libraries are translated, and embeddings of positions resampled to the
    model's image size, where timm can.

    Args:
        model: The model.
        weights: The weights by name.
        source: Where they are from, for messages.
        prefix: The part to read.

    Raises:
        ValueError: They do not fit, or several parts do.
    """
    wanted = model.state_dict()
    part = _part(weights, wanted, source, prefix)
    start = f"{part}." if part else ""
    kept = {n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)}
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    shapes = {name: tensor.shape for name, tensor in wanted.items()}
    try:
        if convert and any(kept[n].shape != s if n in kept else True for n, s in shapes.items()):
            kept = convert(kept, model)
        heads = cast(Any, model).pretrained_cfg.get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else heads
        modules = {name.partition(".")[0] for name in wanted}
        left_out = {
            name
            for name in kept.keys() - wanted.keys()
            if name.partition(".")[0] not in modules or name.rpartition(".")[0] in heads
        }
        model.load_state_dict({n: w for n, w in kept.items() if n not in left_out})
    except (RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{source} does not fit the model: {error}") from error
    if start or left_out:
        names = sorted({name.partition(".")[0] for name in left_out})
        without = f" without {', '.join(names)}" if names else ""
        logger.info("%s: read %s%s", source, f"the part {part}" if part else "all", without)


def _part(
    weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: object, given: str | None
) -> str:
    """Prefix, without its last dot, of the weights that are called as the wanted ones."""
    fitting: Counter[str] = Counter()
    for name in weights:
        parts = name.split(".")
        for i in range(len(parts)):
            fitting[".".join(parts[:i])] += ".".join(parts[i:]) in wanted
    if given is not None:
        end = given.strip(".")
        fitting = Counter({p: n for p, n in fitting.items() if f".{p}".endswith(f".{end}")})
    most = max(fitting.values(), default=0)
    if most == 0 and given is None:
        raise ValueError(
            f"{source} has no weights of this model under any prefix: its first names are "
            f"{', '.join(list(weights)[:_FEW])}, the model's {', '.join(list(wanted)[:_FEW])}"
        )
    parts = [prefix for prefix, count in fitting.items() if count == most]
    first = min(map(_role, parts), default=0)
    parts = [part for part in parts if _role(part) == first]
    if not parts:
        raise ValueError(f"{source} has no weights under the prefix {given!r}")
    if any(not _same(weights, wanted, parts[0], other) for other in parts[1:]):
        raise ValueError(f"{source} has several encoders, choose one by prefix: {', '.join(parts)}")
    return parts[0]


def _role(prefix: str) -> int:
    words = set(re.split(r"[._]", prefix))
    return max((i for i, role in enumerate(_ROLES) if role & words), default=1)


def _same(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], a: str, b: str) -> bool:
    """Whether two parts hold equal tensors, as when a model is registered under two names."""
    pairs = [(weights.get(f"{a}.{name}"), weights.get(f"{b}.{name}")) for name in wanted]
    return all(x is not None and y is not None and torch.equal(x, y) for x, y in pairs)


def load_folder(folder: str | Path) -> nn.Module:
    """Loads a model from a folder in timm's layout: config.json and model.safetensors.

    timm itself would ignore weights that are missing. Its `pretrained_cfg` is that of config.json.

    Raises:
        FileNotFoundError: The folder does not exist or is incomplete.
        ValueError: A file is damaged, or the weights do not fit.
    """
    architecture, cfg, arguments = _read_description(Path(folder))
    model, path = _create(architecture, arguments), Path(folder, "model.safetensors")
    fit(model, read_weights(path), path)
    cast(Any, model).pretrained_cfg = {**cfg, "architecture": architecture}
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
