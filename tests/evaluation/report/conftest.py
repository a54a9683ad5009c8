from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from reports import make_run
from safetensors.torch import save_file as save_weights


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    """Two runs that were not evaluated."""
    return make_run(tmp_path / "a", 0), make_run(tmp_path / "b", 1)


@pytest.fixture
def encoder_run(tmp_path) -> Path:
    torch.manual_seed(0)
    kwargs = {"channels": [8, 16, 24, 32], "stem_width": 8, "stem_type": ""}
    described = {
        "architecture": "resnet10t",
        "num_classes": 0,
        "pretrained_cfg": {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.25] * 3},
        "model_args": kwargs,
    }
    run = make_run(tmp_path / "encoded", data={"name": "digits", "size": 16})
    (run / "backbone").mkdir()
    (run / "backbone" / "config.json").write_text(json.dumps(described))
    model = timm.create_model("resnet10t", num_classes=0, **kwargs)
    save_weights(model.state_dict(), run / "backbone" / "model.safetensors")
    return run
