from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from torch import nn

from ssl_gradmix import backbones
from ssl_gradmix.evaluation.encoders import Encoder, load_encoder
from ssl_gradmix.methods import BYOL, METHODS, Method, SimCLR, SupCon

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def perturbed(model: nn.Module) -> nn.Module:
    """No weight and no BatchNorm statistic keeps its initial value, so that each must be loaded."""
    generator = torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    return model.eval()


def pooled(model: nn.Module) -> torch.Tensor:
    """Features of a timm model that has a classifier."""
    return model.forward_head(model.forward_features(IMAGES), pre_logits=True)


@pytest.fixture(params=[SimCLR, BYOL, SupCon])
def method(request: pytest.FixtureRequest) -> Method:
    """A method with widths other than the defaults, and all weights perturbed."""
    backbone = backbones.create("resnet10_tiny")
    return perturbed(request.param(backbone, 128, hidden_dim=40, output_dim=24))


@pytest.fixture
def run(tmp_path: Path, method: Method) -> Path:
    folder = tmp_path / "runs" / "mine"
    (recipe,) = (name for name, kind in METHODS.items() if type(method) is kind)
    config = {"recipe": recipe, "method": {"hidden_dim": 40, "output_dim": 24}}
    backbones.save(method.backbone, folder / "backbone", image_size=32)
    backbones.write_weights(method.projector, folder / "projector.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_run_gives_its_frozen_backbone(run: Path, method: Method) -> None:
    encoder = load_encoder(run)
    assert torch.equal(encoder.model(IMAGES), method.backbone(IMAGES))
    assert not any(module.training for module in encoder.model.modules())
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    assert (encoder.size, encoder.name, encoder.title, encoder.run) == (32, "mine", "mine", run)
    assert encoder.mean == pytest.approx(timm.data.IMAGENET_DEFAULT_MEAN)
    assert encoder.std == pytest.approx(timm.data.IMAGENET_DEFAULT_STD)
    assert encoder.config == yaml.safe_load((run / "config.yaml").read_text())


def test_run_gives_the_embeddings_of_its_projector(run: Path, method: Method) -> None:
    encoder = load_encoder(str(run), feature="projector")
    expected = method.projector(method.backbone(IMAGES))
    assert expected.shape == (4, 24)
    assert torch.equal(encoder.model(IMAGES), expected)
    assert not any(module.training for module in encoder.model.modules())
    assert (encoder.feature, encoder.title) == ("projector", "mine (projector)")
    assert (encoder.size, encoder.run) == (32, run)
    assert encoder.fingerprint != load_encoder(run).fingerprint


def test_local_dir_equals_timm(run: Path) -> None:
    spec = f"local-dir:{run / 'backbone'}"
    encoder = load_encoder(spec)
    by_timm = timm.create_model(spec, pretrained=True, num_classes=0).eval()
    assert torch.equal(encoder.model(IMAGES), by_timm(IMAGES))
    assert (encoder.name, encoder.run, encoder.config) == (spec, None, None)
    assert encoder.fingerprint == load_encoder(run).fingerprint


def test_position_embeddings_are_resampled_as_in_timm(tmp_path: Path) -> None:
    arguments = {"depth": 1, "img_size": 64, "num_classes": 0}
    model = perturbed(timm.create_model("vit_tiny_patch16_224", **arguments))
    timm.models.save_for_hf(model, tmp_path, model_args=arguments, safe_serialization=True)
    encoder = load_encoder(f"local-dir:{tmp_path}", image_size=96)
    resampled = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=96).eval()
    images = torch.rand(2, 3, 96, 96)
    assert encoder.size == 96
    assert torch.allclose(encoder.model(images), resampled(images), atol=1e-6)


@pytest.mark.parametrize(("prefix", "num_classes"), [("", 0), ("", 5), ("module.student.", 5)])
def test_weights_file_with_or_without_prefix_and_head(tmp_path, prefix, num_classes) -> None:
    model = perturbed(timm.create_model("resnet10t", num_classes=num_classes))
    weights = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(weights, tmp_path / "mine.safetensors")
    path = tmp_path / "mine.safetensors"
    encoder = load_encoder("timm:resnet10t", weights=path, image_size=32)
    assert torch.equal(encoder.model(IMAGES), pooled(model))
    assert (encoder.name, encoder.size) == ("timm:resnet10t@mine.safetensors", 32)


def test_published_weights_are_read_from_safetensors_alone(tmp_path, monkeypatch) -> None:
    requested = []

    def download(repo_id: str, filename: str, **kwargs: object) -> str:
        requested.append(filename)
        if not (tmp_path / filename).exists():
            raise EntryNotFoundError(f"404: {filename}")
        return str(tmp_path / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    model = perturbed(timm.create_model("resnet10t"))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises((OSError, ValueError, EntryNotFoundError)):
        load_encoder("timm:resnet10t.c3_in1k")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    encoder = load_encoder("timm:resnet10t.c3_in1k", image_size=32)
    assert torch.equal(encoder.model(IMAGES), pooled(model))
    assert encoder.name == "timm:resnet10t.c3_in1k"
    assert set(requested) == {"model.safetensors"}


@pytest.mark.parametrize("method", [SimCLR], indirect=True)
@pytest.mark.parametrize(
    ("spec", "arguments", "error", "named"),
    [
        ("{run}/nowhere", {}, FileNotFoundError, "nowhere"),
        ("{run}/backbone", {}, FileNotFoundError, "backbone"),
        ("local-dir:{run}", {}, FileNotFoundError, "config.json"),
        ("timm:resnet10_tinny", {}, ValueError, "resnet10_tinny"),
        ("{run}", {"weights": "w.safetensors"}, ValueError, "weights"),
        ("timm:resnet10t", {"weights": "w.safetensors"}, FileNotFoundError, "w.safetensors"),
        ("timm:resnet10_tiny", {"feature": "projector"}, ValueError, "projector"),
    ],
)
def test_invalid_inputs_raise(run: Path, spec, arguments, error, named) -> None:
    with pytest.raises(error, match=named):
        load_encoder(spec.format(run=run), **arguments)


def fingerprint(*modules: nn.Module) -> str:
    return Encoder(nn.Sequential(*modules), 8, (0, 0, 0), (1, 1, 1), "mine").fingerprint


def test_fingerprint_depends_on_modules_weights_and_buffers() -> None:
    model = backbones.create("resnet10_tiny")
    found = [fingerprint(copy.deepcopy(model)), fingerprint(model, nn.ReLU()), fingerprint(model)]
    assert found[0] == found[2] != found[1]
    for changed in (model.conv1.weight, model.layer4[0].bn1.running_var):
        changed.data.view(-1)[-1] += 1e-6
        found.append(fingerprint(model))
    assert len(set(found)) == 4
