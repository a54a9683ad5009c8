"""What tests of several modules need; a plain module, imported by its name."""

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

from ssl_gradmix.evaluation.rows import COLUMNS, param
from ssl_gradmix.settings import Data

ROOT = Path(__file__).parents[1]
SIZE = 16
METHOD = {"name": "byol", "hidden_dim": 20, "output_dim": 12}
MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.3, 0.2]
_ENCODER = {"channels": [8, 16, 24, 32], "stem_width": 8, "stem_type": ""}


class Planted:
    """Unpickling it leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


PICKLES: dict[str, Callable[[object, Path], object]] = {
    "pickle": lambda what, path: path.write_bytes(pickle.dumps(what)),
    "old pickle": lambda what, path: path.write_bytes(pickle.dumps(what, protocol=2)),
    "torch.save": torch.save,
    "old torch.save": lambda what, path: torch.save(what, path, _use_new_zipfile_serialization=False),
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
        self.stage = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.stage(x).mean((2, 3))


def tiny_encoder() -> torch.nn.Module:
    """A ResNet that gives 32 features."""
    return timm.create_model("resnet10t", num_classes=0, **_ENCODER)


def make_run(folder: Path, seed: int = 0, **data) -> Path:
    """A run folder with a tiny random encoder for images of 16 px, whose BatchNorm differs by channel, and settings."""
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
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": asdict(Data(size=SIZE, **data)), "method": METHOD}))
    return folder


def add_projector(run: Path, seed: int = 0) -> Path:
    """Gives a run of `make_run` a random projector to 12 values, as BYOL's."""
    torch.manual_seed(seed)
    save_file(BYOLProjectionHead(32, 20, 12).state_dict(), run / "projector.safetensors")
    return run


def write_images(folder: Path, classes: Sequence[str], count: int = 2, size: int = 8) -> Path:
    """Class folders of PNG files, noise around a color of each class."""
    rng = np.random.default_rng(0)
    for name, color in zip(classes, rng.integers(0, 200, (len(classes), 3)), strict=True):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = (color + rng.integers(0, 55, (size, size, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Result rows as dictionaries, None where something is missing."""
    return rows.astype(object).where(rows.notna(), None).to_dict("records")


def only(rows: pd.DataFrame, score: str, metric: str, **wanted: object) -> pd.Series:
    """The one row of a score and metric with these values of columns, None for missing, and of parameters."""
    found = rows[(rows["score"] == score) & (rows["metric"] == metric)]
    for name, value in wanted.items():
        values = found[name] if name in COLUMNS else param(found, name)
        found = found[(values.isna() if value is None else values == value).fillna(False).astype(bool)]
    (index,) = found.index
    return found.loc[index]
