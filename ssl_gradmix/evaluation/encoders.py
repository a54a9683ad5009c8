"""Frozen encoders: from a run folder, from timm, or from a safetensors file."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ssl_gradmix import backbones, methods
from ssl_gradmix.files import read_yaml
from ssl_gradmix.settings import METHODS

logger = logging.getLogger("ssl_gradmix")

_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar")
_NUMBERED = (
    "; names that begin with numbers are those of nn.Sequential(*list(model.children())[:-1]): load them into that, "
    "and save model.state_dict()"
)

_OF_ANY_MODULE = frozenset(vars(nn.Module()))
"""Attributes that say nothing of what a module does: whether it is training, and its hooks."""

_CONVERT = """\
{path} is a pickled checkpoint, which can run code when it is read, so it is refused. Where you trust it, convert it:
    import torch, safetensors.torch
    weights = torch.load({path!r}, map_location="cpu", weights_only=True)  # perhaps weights["state_dict"]
    safetensors.torch.save_file({{name: value.contiguous() for name, value in weights.items()}}, "weights.safetensors")
and give weights.safetensors together with timm:NAME."""


@dataclass(eq=False)
class Encoder:
    """A frozen model from images to features, and how its images are prepared. Any module makes one.

    Args:
        model: (N, 3, size, size), normalized by `mean` and `std`, to (N, D). Put in eval mode and frozen here.
        size: Side of its square images in pixels.
        mean: Of each color channel of images in [0, 1].
        std: Of each color channel of images in [0, 1].
        name: What results call it.
        run: The run folder it comes from, if it does.
        config: What is in the run's config.yaml, if there is one.
        feature: What of the encoder `model` gives: `backbone`, or `projector` where the projection head is part of it.
        fingerprint: SHA-256 of the weights, buffers included, and of the modules that hold them with their plain
            attributes; computed here. Features are kept under it, so what a forward pass does must follow from these.
    """

    model: nn.Module
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    name: str
    run: Path | None = None
    config: dict | None = None
    feature: str = "backbone"
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)
        self.fingerprint = _fingerprint(self.model)

    @property
    def title(self) -> str:
        """Its name, and what of it is read where that is not the backbone."""
        return self.name if self.feature == "backbone" else f"{self.name} ({self.feature})"


def load_encoder(
    spec: str | Path,
    weights: str | Path | None = None,
    image_size: int | None = None,
    feature: Literal["backbone", "projector"] = "backbone",
) -> Encoder:
    """Loads a frozen encoder. Nothing is ever unpickled.

    Args:
        spec: A run folder (its `backbone/`), `local-dir:PATH` (a folder in timm's layout, config.json and
            model.safetensors), or `timm:NAME` (timm's published weights, in its cache or downloaded).
        weights: A safetensors file for the architecture `timm:NAME`, in place of the published weights. It must
            fit exactly, but for a classification head, which is left out. Images are normalized as for the published
            ones.
        image_size: Side of the images in pixels, where it is not to be the one the encoder was made for. Vision
            transformers have their position embeddings resampled.
        feature: What it gives: `backbone` features, or the embeddings of a run's `projector`.

    Returns:
        The encoder, without classification head, on the CPU.

    Raises:
        FileNotFoundError: If the path does not exist, is no run, or is a run without a backbone or projector yet.
        ValueError: If a file is damaged or pickled, weights do not fit, the name is unknown, or the published weights
            cannot be had.
    """
    spec = str(spec)
    kind, _, rest = spec.partition(":")
    if weights is not None and kind != "timm":
        raise ValueError(f"weights need the architecture they are for: give timm:NAME in place of {spec!r}")
    if feature == "projector" and kind in ("timm", "local-dir"):
        raise ValueError(f"feature projector needs a run, which keeps its projector: {spec} is none")
    if kind == "timm":
        if weights is None:
            model, name = _published(rest), spec
        else:
            model, name = _create(rest), f"{spec}@{Path(weights).name}"
            _load(model, Path(weights))
        return _encoder(model, model.pretrained_cfg, image_size, name)
    if kind == "local-dir":
        return _from_folder(Path(rest), image_size, spec)

    run = Path(spec)
    _check_is_run(run)
    config = read_yaml(run / "config.yaml")
    if not isinstance(config.get("data", {}), dict):
        raise ValueError(f"{run / 'config.yaml'} is damaged: data holds no settings")
    encoder = _from_folder(run / "backbone", image_size, run.resolve().name)
    encoder.run, encoder.config = run, config
    return _with_projector(encoder) if feature == "projector" else encoder


def start_from(method: nn.Module, run: str | Path) -> None:
    """Gives a method the weights of another run's backbone and, where it is of the same shape, of its projector.

    Raises:
        FileNotFoundError: There is no such run, or it has no weights yet.
        ValueError: Its backbone is another one, or a file is damaged.
    """
    run = Path(run).expanduser()
    _check_is_run(run)
    _load(method.backbone, run / "backbone" / "model.safetensors")
    weights, wanted = _read_safetensors(run / "projector.safetensors"), method.projector.state_dict()
    fits = _kinds(weights) == _kinds(wanted)
    if fits:
        method.projector.load_state_dict(weights)
    logger.info("starts from the backbone%s of %s", " and the projector" if fits else ", not the projector,", run)


def _kinds(weights: Mapping[str, Tensor]) -> dict[str, tuple]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}


def _with_projector(encoder: Encoder) -> Encoder:
    """The encoder followed by the projection head of its run, built as for the training."""
    path, config = encoder.run / "projector.safetensors", encoder.run / "config.yaml"
    if not path.exists():
        raise FileNotFoundError(f"the run {encoder.run} has no projector: {path} is missing")
    described = encoder.config.get("method")
    name = described.get("name") if isinstance(described, dict) else None
    if name not in METHODS:
        raise ValueError(
            f"{config} does not say what was trained: add a line `name: simclr` (or byol, supcon) to its section "
            f"method, as runs of now have; got {name!r}"
        )
    try:
        settings = METHODS[name](**described)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config} is damaged: {error}") from error
    with torch.device("meta"):  # takes no memory, whatever the settings ask for
        projector = methods.create(settings, encoder.model).projector
    wanted, weights = projector.state_dict(), _read_safetensors(path)
    if _kinds(wanted) != _kinds(weights):
        raise ValueError(f"{path} does not fit: it is no {name} projector of the widths in {config} for this backbone")
    projector.load_state_dict(weights, assign=True)
    return replace(encoder, model=nn.Sequential(encoder.model, projector), feature="projector")


def _check_is_run(path: Path) -> None:
    if path.suffix in _PICKLED and path.is_file():
        raise ValueError(_CONVERT.format(path=str(path)))
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} holds weights only: give them as weights beside the architecture, timm:NAME")
    if not path.is_dir():
        raise FileNotFoundError(f"no run folder {str(path)!r}; encoders are a run folder, timm:NAME or local-dir:PATH")
    if (path / "model.safetensors").exists():
        raise FileNotFoundError(f"{path} is no run but a folder in timm's layout: give it as local-dir:{path}")
    if not (path / "config.yaml").exists():
        raise FileNotFoundError(f"{path} is no run: it has no config.yaml")
    if not (path / "backbone" / "model.safetensors").exists():
        raise FileNotFoundError(f"the run {path} has no backbone yet: {path}/backbone/model.safetensors is missing")


def _from_folder(folder: Path, image_size: int | None, name: str) -> Encoder:
    """Builds what timm's config.json describes and loads model.safetensors, strictly, which timm itself does not."""
    architecture, cfg, kwargs = backbones.read_description(folder)
    try:
        model = _create(architecture, **kwargs)
    except (TypeError, ValueError) as error:  # TypeErrors are of arguments called name or pretrained
        raise ValueError(f"{folder / 'config.json'} describes no model: {error}") from error
    _load(model, folder / "model.safetensors")
    return _encoder(model, cfg, image_size, name)


def _create(architecture: str, **kwargs: object) -> nn.Module:
    backbones.check_name(architecture)
    return backbones.create(architecture, False, **kwargs)  # which arguments called pretrained would make a download


def _published(name: str) -> nn.Module:
    """Lets timm load its own weights, but in safetensors only: its fallback is a pickle."""
    backbones.check_name(name)
    published = timm.get_pretrained_cfg(name)
    if published is None or not published.hf_hub_id:
        raise ValueError(f"timm publishes no safetensors for {name!r}: give a safetensors file as weights")
    try:
        return timm.create_model(
            name, pretrained=True, num_classes=0, pretrained_cfg_overlay={"hf_hub_filename": "model.safetensors"}
        )
    except Exception as error:  # huggingface_hub, requests, httpx and the socket have nothing nearer in common
        raise ValueError(
            f"the weights of {name!r} are not in the local cache and huggingface.co/{published.hf_hub_id} gave none "
            f"({_one_line(error)}): connect to the network once, or give a safetensors file as weights"
        ) from error


def _load(model: nn.Module, path: Path) -> None:
    """Loads a safetensors file into a model without classification head; every weight must fit."""
    wanted = model.state_dict()
    weights = _without_prefix(_read_safetensors(path), wanted, path)
    heads = model.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    weights = {key: value for key, value in weights.items() if key.rpartition(".")[0] not in heads}
    kinds = {
        "missing": [key for key in wanted if key not in weights],
        "unexpected": [key for key in weights if key not in wanted],
        "of another shape": [key for key in wanted if key in weights and weights[key].shape != wanted[key].shape],
        "of another kind of number": backbones.of_other_kinds(weights, wanted),
    }
    if any(kinds.values()):
        misfits = "; ".join(f"{_some(keys)} {kind}" for kind, keys in kinds.items() if keys)
        numbered = not wanted.keys() & weights.keys() and any(re.match(r"(.+\.)?0\.", key) for key in weights)
        raise ValueError(f"{path} does not fit the model: {misfits}{_NUMBERED if numbered else ''}")
    model.load_state_dict(weights)


def _without_prefix(weights: dict[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights of a model that others hold as a part of theirs, under `backbone.` or the like."""
    if wanted.keys() & weights.keys():
        return weights
    first = next(iter(wanted))
    prefixes = [key.removesuffix(first) for key in weights if key.endswith(f".{first}")]
    prefixes = [prefix for prefix in prefixes if all(prefix + key in weights for key in wanted)]
    if len(prefixes) > 1:
        raise ValueError(f"{path} holds several such models, under {' and '.join(prefixes)}: keep the weights of one")
    if not prefixes:
        return weights
    logger.info("%s: the weights under %s are read", path, prefixes[0])
    return {key.removeprefix(prefixes[0]): value for key, value in weights.items() if key.startswith(prefixes[0])}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if path.suffix in _PICKLED:
        raise ValueError(_CONVERT.format(path=str(path)))
    if not path.is_file():
        pickled = [other for other in path.parent.glob("*") if path.parent.is_dir() and other.suffix in _PICKLED]
        if pickled:
            raise ValueError(_CONVERT.format(path=str(pickled[0])))
        raise FileNotFoundError(f"there are no weights {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        with open(path, "rb") as file:
            if file.read(2) in (b"PK", b"\x80\x02"):  # how torch.save's archives, new and old, begin
                raise ValueError(_CONVERT.format(path=str(path))) from error
        raise ValueError(f"{path} is damaged: {_one_line(error)}") from error


def _encoder(model: nn.Module, cfg: dict, image_size: int | None, name: str) -> Encoder:
    size, mean, std = backbones.preparation(cfg)
    if image_size is not None and image_size != size:
        size = image_size
        if hasattr(model, "set_input_size"):
            model.set_input_size(img_size=size)
    return Encoder(model, size, mean, std, name)


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256(re.sub(r" at 0x\w+", "", repr(model)).encode())
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if key not in _OF_ANY_MODULE and _is_plain(value)}
        digest.update(f"{name} {sorted(plain.items())}".encode())
    for key, value in sorted((model.state_dict() | dict(model.named_buffers())).items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def _some(keys: list[str], shown: int = 3) -> str:
    return f"{len(keys)} ({', '.join(keys[:shown])}{', ...' if len(keys) > shown else ''})"


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
