"""What a saved backbone is made of when another training starts from it."""

from __future__ import annotations

from pathlib import Path

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
