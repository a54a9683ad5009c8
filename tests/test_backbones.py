"""What backbones are made of: of names and arguments, and of a saved one when another training starts from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssl_gradmix import backbones
from ssl_gradmix.evaluation.encoders import load_encoder

ARGUMENTS = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24}


def test_a_model_that_goes_on_from_a_saved_one_is_saved_with_the_same_arguments(tmp_path: Path) -> None:
    first = backbones.create("vit_tiny_patch16_224", **ARGUMENTS, num_heads=3)
    backbones.save(first, tmp_path / "first", image_size=32)
    second = backbones.create(f"local-dir:{tmp_path / 'first'}", pretrained=True, drop_path_rate=0.1)
    assert second.model_args == {**ARGUMENTS, "num_heads": 3, "drop_path_rate": 0.1}
    backbones.save(second, tmp_path / "second", image_size=32)

    read = load_encoder(f"local-dir:{tmp_path / 'second'}").model
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(read(images), first.eval()(images))


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnet1o", {}, "timm knows no model 'resnet1o'; near names are "),
        ("resnet18.nosuch", {}, "timm has no weights 'resnet18.nosuch', but resnet18.a1_in1k, "),
        ("resnet10_tiny.a1_in1k", {}, "timm has no weights 'resnet10_tiny.a1_in1k', but none of that model"),
        ("hf-hub:timm/resnet18.a1_in1k", {}, "must be one of timm's own models, got 'hf-hub:"),
        ("resnet10_tiny", {"depth": 3}, r"backbone.kwargs: resnet10_tiny does not take {'depth': 3} \(.+\)"),
        ("resnet10_tiny", {"output_stride": 3}, "does not take {'output_stride': 3}"),
    ],
)
def test_what_cannot_be_created_is_said_in_one_line(name: str, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        backbones.create(name, **kwargs)
    assert len(str(refused.value).splitlines()) == 1


def test_a_saved_model_of_other_widths_is_refused_in_one_line(tmp_path: Path) -> None:
    backbones.save(backbones.create("resnet10_tiny"), tmp_path, image_size=32)
    description = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(description.replace("resnet10_tiny", "resnet18_small"))
    with pytest.raises(ValueError, match="backbone.pretrained: no weights to be had for .*Missing key") as refused:
        backbones.create(f"local-dir:{tmp_path}", pretrained=True)
    assert len(str(refused.value).splitlines()) == 1
