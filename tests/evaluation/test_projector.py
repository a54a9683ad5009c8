from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from lightly.models.modules import MoCoProjectionHead
from safetensors.torch import save_file
from torch import nn

from ssl_gradmix import backbones
from ssl_gradmix.evaluation.encoders import load_encoder
from ssl_gradmix.methods.byol import BYOL
from ssl_gradmix.methods.simclr import SimCLR
from ssl_gradmix.methods.supcon import SupCon

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[SimCLR, BYOL, SupCon])
def method(request) -> nn.Module:
    """Of other widths than the defaults, and with statistics as training leaves them."""
    torch.manual_seed(0)
    method = request.param(backbones.create("resnet10_tiny"), 128, hidden_dim=40, output_dim=24)
    for _ in range(3):
        method([torch.rand(6, 3, 32, 32), torch.rand(6, 3, 32, 32)], torch.arange(6) // 2)
    return method.eval()


@pytest.fixture
def run(tmp_path, method) -> Path:
    folder = tmp_path / "mine"
    described = {"name": type(method).__name__.lower(), "hidden_dim": 40, "output_dim": 24}
    backbones.save(method.backbone, folder / "backbone", image_size=32)
    save_file(method.projector.state_dict(), folder / "projector.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"name": "digits"}, "method": described}))
    return folder


def test_gives_the_embeddings_of_the_method(run, method):
    encoder, backbone = load_encoder(run, feature="projector"), load_encoder(run)
    expected = method.projector(method.backbone(IMAGES))
    assert expected.shape == (4, 24)
    assert torch.equal(encoder.model(IMAGES), expected)
    assert not any(module.training for module in encoder.model.modules())
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    assert (encoder.feature, backbone.feature) == ("projector", "backbone")
    assert (encoder.name, encoder.title, backbone.title) == ("mine", "mine (projector)", "mine")
    assert encoder.fingerprint != backbone.fingerprint


def test_fingerprint_is_of_the_projector_too(run, method):
    before = load_encoder(run, feature="projector").fingerprint
    weights = method.projector.state_dict()
    weights["layers.1.running_mean"] = weights["layers.1.running_mean"] + 1e-3
    save_file(weights, run / "projector.safetensors")
    assert load_encoder(run, feature="projector").fingerprint != before


@pytest.mark.parametrize("spec", ["timm:resnet10_tiny", "local-dir:{run}/backbone"])
def test_what_is_no_run_has_none(run, spec):
    with pytest.raises(ValueError, match=rf"needs a run, .*: {re.escape(spec.format(run=run))} is none"):
        load_encoder(spec.format(run=run), feature="projector")


def of_other_widths() -> dict[str, torch.Tensor]:
    return SimCLR(nn.Identity(), 64, hidden_dim=40, output_dim=24).projector.state_dict()


def cut_off(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights.items() if name != "layers.1.running_var"}


def with_narrow_norm(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return weights | {"layers.1.weight": torch.ones(39)}


def in_half_precision(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.half() for name, tensor in weights.items()}


def as_convolution(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return weights | {"layers.0.weight": torch.zeros(40, 128, 1, 1)}


@pytest.mark.parametrize(
    "change",
    [
        cut_off,
        with_narrow_norm,
        in_half_precision,
        as_convolution,
        lambda weights: weights | {"layers.5.weight": torch.zeros(2, 24)},
        lambda weights: MoCoProjectionHead(128, 40, 24, batch_norm=False).state_dict(),
        lambda weights: {},
        lambda weights: of_other_widths(),
    ],
)
def test_other_weights_are_refused(run, method, change):
    weights = {name: tensor.contiguous() for name, tensor in change(method.projector.state_dict()).items()}
    save_file(weights, run / "projector.safetensors")
    with pytest.raises(
        ValueError, match=r"projector.safetensors does not fit: it is no (simclr|byol|supcon) projector"
    ):
        load_encoder(run, feature="projector")


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"output_dim": 24}, r"does not say what was trained: add a line `name: simclr` \(or byol, supcon\)"),
        ("byol", "does not say what was trained"),
        ({"name": "dino"}, "does not say what was trained.*got 'dino'"),
        ({"name": "byol", "widths": 3}, "config.yaml is damaged: .*widths"),
        ({"name": "simclr", "output_dim": 10**9}, "config.yaml is damaged: method.output_dim must be"),
    ],
)
def test_a_config_that_does_not_say_the_method(run, described, message):
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"name": "digits"}, "method": described}))
    with pytest.raises(ValueError, match=message):
        load_encoder(run, feature="projector")
