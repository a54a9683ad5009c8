"""Helpers for tests of several modules; a plain module, imported by its name."""

from __future__ import annotations

import importlib.util
import json
import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
import yaml
from lightly.models.modules import BYOLProjectionHead
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_gradmix.data.datasets import Data

ROOT = Path(__file__).parents[1]
SIZE = 16
METHOD = {"hidden_dim": 20, "output_dim": 12}
MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.3, 0.2]
_ENCODER = {"channels": [8, 16, 24, 32], "stem_width": 8, "stem_type": ""}


class Planted:
    """Unpickling it creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


PICKLES: dict[str, Callable[[object, Path], object]] = {
    "pickle": lambda what, path: path.write_bytes(pickle.dumps(what)),
    "torch.save": torch.save,
}


def load_script(path: str) -> ModuleType:
    """Imports a script such as `eval/osr.py`."""
    spec = importlib.util.spec_from_file_location(f"{Path(path).stem}_script", ROOT / path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    return script


class Stage(nn.Module):
    """One convolution with BatchNorm: an encoder of 8 features."""

    def __init__(self) -> None:
        super().__init__()
        convolution = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.stage = nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.stage(x).mean((2, 3))


def tiny_encoder() -> torch.nn.Module:
    """A ResNet with 32 features."""
    return timm.create_model("resnet10t", num_classes=0, **_ENCODER)


def make_run(folder: Path, seed: int = 0, recipe: str = "byol", **data: Any) -> Path:
    """A run folder with a config and a tiny random encoder of 16 px images.

    The statistics of its BatchNorm layers differ between channels.
    """
    torch.manual_seed(seed)
    weights = tiny_encoder().state_dict()
    for name, value in weights.items():
        if "running_var" in name:
            value.uniform_(0.5, 1.5)
    described = {
        "architecture": "resnet10t",
        "num_classes": 0,
        "pretrained_cfg": {"input_size": [3, SIZE, SIZE], "mean": MEAN, "std": STD},
        "model_args": _ENCODER,
    }
    (folder / "backbone").mkdir(parents=True)
    (folder / "backbone" / "config.json").write_text(json.dumps(described))
    save_file(weights, folder / "backbone" / "model.safetensors")
    config = {"recipe": recipe, "data": asdict(Data(size=SIZE, **data)), "method": METHOD}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def add_projector(run: Path, seed: int = 0) -> Path:
    """Adds a random BYOL projector to 12 dimensions to a run of `make_run`."""
    torch.manual_seed(seed)
    save_file(BYOLProjectionHead(32, 20, 12).state_dict(), run / "projector.safetensors")
    return run


def write_images(
    folder: Path, classes: Sequence[str], count: int = 2, size: int = 8, seed: int = 0
) -> Path:
    """Class folders of PNG files, noise around a color of each class."""
    rng = np.random.default_rng(seed)
    for name, color in zip(classes, rng.integers(0, 200, (len(classes), 3)), strict=True):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = (color + rng.integers(0, 55, (size, size, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Result rows as dictionaries, with None for missing values."""
    return rows.astype(object).where(rows.notna(), None).to_dict("records")


def only(rows: pd.DataFrame, score: str, metric: str, **wanted: object) -> dict[str, Any]:
    """The one row with this score, metric, and values of columns or of `params`."""
    wanted |= {"score": score, "metric": metric}
    found = []
    for row in records(rows):
        values = {**(row["params"] or {}), **row}
        if all(values.get(name) == value for name, value in wanted.items()):
            found.append(row)
    (row,) = found
    return row
