"""Backbones: their maps, the layers to attribute at, and their weights on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ssl_gradmix import backbones

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 3}


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", backbones.SMALL)
def test_small_resnets_keep_the_resolution_of_small_images(name: str) -> None:
    model, sides = backbones.create(name).eval(), []
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        model.get_submodule(stage).register_forward_hook(
            lambda _, __, output: sides.append(output.shape[-1])
        )
    features = model(images())
    assert sides == [32, 16, 8, 4]
    assert features.shape == (2, backbones.num_features(model))
    assert not any(isinstance(module, nn.MaxPool2d) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "kwargs", "size"),
    [
        ("resnet10_tiny", {}, 32),
        ("resnet10_tiny", {}, 16),
        ("resnet18", {}, 32),
        ("convnext_atto", {}, 128),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 64, "window_size": 2, "depths": (1,) * 4},
            64,
        ),
        ("vit_tiny_patch16_224", VIT, 32),
        ("vit_tiny_patch16_224", {**VIT, "global_pool": "avg", "class_token": False}, 32),
        ("mobilenetv3_small_050", {}, 64),
    ],
)
def test_default_layer_is_the_deepest_with_a_map_and_a_gradient(
    name: str, kwargs: dict[str, Any], size: int
) -> None:
    """Against the gradients and shapes of all stages that timm lists."""
    model = backbones.create(name, **kwargs).eval()
    stages = [stage["module"] for stage in model.feature_info]
    outputs: dict[str, Tensor] = {}
    for stage in stages:
        model.get_submodule(stage).register_forward_hook(
            lambda _, __, output, stage=stage: outputs.update({stage: output})
        )
    features = model(images(size))
    loss = (features * torch.randn_like(features)).sum()  # a plain sum is constant after a norm
    usable = []
    for stage, output in outputs.items():
        (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)
        if output.ndim == 3:
            tokens = gradient[:, model.num_prefix_tokens :]
            side, reached = int(tokens.shape[1] ** 0.5), bool(tokens.any())
        else:
            side, reached = (
                min(output.shape[1:3] if output.shape[1] < 30 else output.shape[2:]),
                True,
            )
        if side >= 4 and reached:
            usable.append(stage)
    assert backbones.default_layers(model, size) == usable[-1:]


@pytest.mark.parametrize(
    ("name", "kwargs", "size", "expected"),
    [
        ("resnet10_tiny", {}, 32, ["layer1", "layer2", "layer3", "layer4"]),
        ("resnet18", {}, 32, ["act1", "layer1", "layer2"]),
        ("resnet18", {}, 3, ["act1"]),  # no map has 4x4 positions
        ("vit_tiny_patch16_224", {}, 224, ["blocks.1", "blocks.4", "blocks.7", "blocks.10"]),
        (
            "vit_tiny_patch16_224",
            {"global_pool": "avg", "class_token": False, "depth": 8},
            224,
            ["blocks.1", "blocks.3", "blocks.5", "blocks.7"],
        ),
        ("vit_tiny_patch16_224", {"depth": 3}, 224, ["blocks.0", "blocks.1"]),
        ("vit_tiny_patch16_224", {"depth": 1}, 224, ["blocks.0"]),
        ("swin_tiny_patch4_window7_224", {}, 224, [f"layers.{i}" for i in range(4)]),
        ("swin_tiny_patch4_window7_224", {}, 96, ["layers.0", "layers.1", "layers.2"]),
    ],
)
def test_stages_are_at_most_four_with_a_map_of_at_least_4x4(
    name: str, kwargs: dict[str, Any], size: int, expected: list[str]
) -> None:
    model = backbones.create(name, **kwargs)
    assert backbones.stages(model, size) == expected
    assert backbones.default_layers(model, size) == expected[-1:]


def test_saved_model_is_loaded_with_its_arguments(tmp_path: Path) -> None:
    first = backbones.create("vit_tiny_patch16_224", **VIT).eval()
    backbones.save(first, tmp_path / "first", image_size=32)
    name = f"local-dir:{tmp_path / 'first'}"
    second = backbones.create(name, pretrained=True, drop_path_rate=0.1).eval()
    assert second.model_args == {**VIT, "drop_path_rate": 0.1}
    backbones.save(second, tmp_path / "second", image_size=32)
    third = backbones.load_folder(tmp_path / "second").eval()
    assert torch.equal(third(images()), first(images()))
    assert backbones.preparation(third.pretrained_cfg)[0] == 32
    assert not torch.equal(backbones.create(name).eval()(images()), first(images()))


@pytest.mark.parametrize(
    ("name", "kwargs", "named"),
    [
        ("resnet1o", {}, "resnet18"),
        ("hf-hub:timm/resnet18.a1_in1k", {}, "backbone.name"),
        ("resnet18.nosuch", {}, "nosuch"),
        ("resnet10_tiny", {"depth": 3}, "depth"),
        ("resnet10_tiny", {"checkpoint_path": "w.pt"}, "backbone.kwargs"),
        ("resnet10_tiny", {"pretrained_cfg": {"file": "w.pt"}}, "backbone.kwargs"),
    ],
)
def test_invalid_model_raises(name: str, kwargs: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match="backbone") as raised:
        backbones.create(name, **kwargs)
    assert named in str(raised.value)


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.encoder."])
def test_foreign_weights_are_loaded_without_prefix_and_head(tmp_path: Path, prefix: str) -> None:
    model, other = backbones.create("resnet10_tiny"), backbones.create("resnet10_tiny")
    weights = {f"{prefix}{name}": value for name, value in other.state_dict().items()}
    weights |= {f"{prefix}fc.weight": torch.zeros(5, 128), f"{prefix}fc.bias": torch.zeros(5)}
    if prefix:
        weights["projector.weight"] = torch.zeros(2)
    save_file(weights, tmp_path / "w.safetensors")
    backbones.load_weights(model, tmp_path / "w.safetensors")
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_raise(tmp_path: Path, change: str) -> None:
    weights = backbones.create("resnet10_tiny").state_dict()
    if change == "missing":
        del weights["bn1.weight"]
    else:
        weights["bn1.weight" if change == "shape" else "bn1.extra"] = torch.zeros(3)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"bn1\.(weight|extra)"):
        backbones.load_weights(backbones.create("resnet10_tiny"), tmp_path / "w.safetensors")
