"""What tests of several scripts need; a plain module, imported by its name."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import timm
import torch
import yaml
from lightly.models.modules import BYOLProjectionHead
from safetensors.torch import save_file

from ssl_gradmix.settings import Data

ROOT = Path(__file__).parents[1]
SIZE = 16
HEAVY = {"torch", "numpy", "timm", "torchvision", "sklearn", "scipy", "matplotlib", "accelerate", "kornia", "lightly"}


def load_script(path: str) -> ModuleType:
    """Imports a script such as `eval/osr.py`."""
    spec = importlib.util.spec_from_file_location(f"{Path(path).stem}_script", ROOT / path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    return script


def make_run(folder: Path, seed: int = 0, **data) -> Path:
    """A run folder with a tiny random encoder for images of 16 px, and data settings."""
    torch.manual_seed(seed)
    model = timm.create_model("resnet10t", num_classes=0, channels=(8, 16, 24, 32), stem_width=8, stem_type="")
    described = {
        "architecture": "resnet10t",
        "num_classes": 0,
        "pretrained_cfg": {"input_size": [3, SIZE, SIZE], "mean": [0.5] * 3, "std": [0.25] * 3},
        "model_args": {"channels": [8, 16, 24, 32], "stem_width": 8, "stem_type": ""},
    }
    (folder / "backbone").mkdir(parents=True)
    (folder / "backbone" / "config.json").write_text(json.dumps(described))
    save_file(model.state_dict(), folder / "backbone" / "model.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": asdict(Data(size=SIZE, **data)), "method": "byol"}))
    return folder


def add_projector(run: Path, seed: int = 0) -> Path:
    """Gives a run of `make_run` a random projector to 12 values, as BYOL's."""
    torch.manual_seed(seed)
    save_file(BYOLProjectionHead(32, 20, 12).state_dict(), run / "projector.safetensors")
    return run


def help_of(path: str) -> str:
    """A script's `--help`; fails where a heavy package was imported for it."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{Path(path).name!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / path)!r}, run_name='__main__')\n"
        "finally:\n"
        f"    print('HEAVY', sorted({HEAVY!r} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    return done.stdout
