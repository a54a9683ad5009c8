from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import yaml
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from support import load_script, write_images
from torch import nn

from ssl_gradmix import backbones
from ssl_gradmix.evaluation.encoders import Encoder, load_encoder, start_from
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


VIT = {"depth": 1, "patch_size": 8, "embed_dim": 24, "num_heads": 3}


def resnet(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return torchvision.models.resnet18(num_classes=4).eval()


def parts(**modules: nn.Module) -> dict[str, torch.Tensor]:
    """State dicts side by side. `__` is a dot in a name, and the classifier is an MLP."""
    named = {}
    for start, module in modules.items():
        for name, tensor in module.state_dict().items():
            name = name.replace("fc.", "fc.0.")
            named[f"{start.replace('__', '.')}.{name}"] = tensor
        named[f"{start.replace('__', '.')}.fc.2.weight"] = torch.zeros(2, 4)
    return named


def moco(kept: nn.Module) -> dict[str, Any]:
    """As published for MoCo v2."""
    state = parts(module__encoder_q=kept, module__encoder_k=resnet(1))
    state |= {"module.queue": torch.zeros(4, 8), "module.queue_ptr": torch.zeros(1)}
    moments = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.03}]}
    return {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": moments}


def moco_v3(kept: nn.Module) -> dict[str, Any]:
    state = parts(module__momentum_encoder=resnet(1), module__base_encoder=kept)
    return {"state_dict": state, "scaler": {"scale": 1.0}}


def lightly(kept: nn.Module) -> dict[str, Any]:
    """As lightly's benchmarks save MoCo, one backbone under two names."""
    state = parts(backbone=kept, teacher_backbone=resnet(1), model__0=kept)
    state["projection_head.layers.0.weight"] = torch.zeros(8, 512)
    return {"state_dict": state, "hyper_parameters": {"batch_size_per_device": 256}}


def dino(kept: nn.Module) -> dict[str, Any]:
    """As published by DINO with its whole state, heads and options included."""
    torch.manual_seed(1)
    other = timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=0, **VIT)
    states = {"teacher": (kept, "backbone"), "student": (other, "module.backbone")}
    content: dict[str, Any] = {"args": argparse.Namespace(arch="vit_tiny"), "epoch": 100}
    for role, (model, start) in states.items():
        content[role] = {f"{start}.{n}": w for n, w in model.state_dict().items()}
        content[role][f"{start.replace('backbone', 'head')}.mlp.0.weight"] = torch.zeros(8, 24)
    return content | {"dino_loss": {"center": torch.zeros(1, 8)}}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (moco, []),
        (moco_v3, []),
        (lightly, []),
        (lambda kept: moco(resnet(2)) | parts(mine=kept), ["--prefix", "mine"]),
        (dino, ["--backbone.kwargs", str(VIT)]),
    ],
    ids=["moco v2", "moco v3", "lightly", "prefix", "dino"],
)
def test_published_checkpoint_is_probed_in_one_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[nn.Module], dict[str, Any]],
    options: list[str],
) -> None:
    """Features equal those of the model that was saved, resampled by timm for a transformer."""
    monkeypatch.chdir(tmp_path)
    if make is dino:
        name, size = "vit_tiny_patch16_224", 64
        kept = perturbed(timm.create_model(name, img_size=96, num_classes=0, **VIT))
        expected = copy.deepcopy(kept)
        expected.set_input_size(img_size=size)
    else:
        name, size = "resnet18", 32
        kept = resnet(0)
        expected = nn.Sequential(*list(kept.children())[:-1], nn.Flatten())
    torch.save(make(kept), "w.pth")
    seen = []
    probe = load_script("eval/linear_probe.py")
    extract = probe.cli.extract
    monkeypatch.setattr(
        probe.cli,
        "extract",
        lambda encoder, *rest, **more: seen.append(encoder) or extract(encoder, *rest, **more),
    )
    for split in ("train", "test"):
        write_images(Path("images", split), ["a", "b"], 6, size=20)
    data = ["--data.name", "folder", "--data.root", "images", "--data.size", str(size)]
    command = [f"timm:{name}", "--weights", "w.pth", "--out", "out", "--epochs", "1"]
    probe.main([*command, *data, *options])
    assert list(Path("out").glob("linear_probe-*.json"))
    images = torch.rand(2, 3, size, size)
    torch.testing.assert_close(seen[0].model(images), expected(images))


@pytest.mark.parametrize(
    ("content", "prefix", "named"),
    [
        ({"a": nn.Linear(2, 2)}, None, "Linear"),
        ({"epoch": 3}, None, "no tensors"),
        ({"conv1.weights": torch.zeros(2)}, None, "conv1.weights"),
        (parts(a=resnet(0)), "nowhere", "nowhere"),
        (parts(module=resnet(0)) | {"module.conv1.weight": torch.zeros(2)}, None, "conv1.weight"),
        (parts(module=resnet(0)) | {"module.bn1.extra": torch.zeros(2)}, None, "bn1.extra"),
        (parts(a=resnet(0), b=resnet(1)), None, "a, b"),
    ],
    ids=["module", "nothing", "other names", "prefix", "shape", "unknown", "two encoders"],
)
def test_checkpoint_that_does_not_fit_raises(
    tmp_path: Path, content: dict[str, Any], prefix: str | None, named: str
) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth") as raised:
        load_encoder("timm:resnet18", weights=tmp_path / "w.pth", prefix=prefix)
    assert named in str(raised.value)


@pytest.mark.parametrize("spec", ["{run}", "local-dir:{run}/backbone", "{run}/w.pth"])
@pytest.mark.parametrize("output_dim", [24, 16])
@pytest.mark.parametrize("method", [SimCLR], indirect=True)
def test_method_starts_from_weights_and_projector_of_a_run(
    run: Path, method: Method, spec: str, output_dim: int
) -> None:
    torch.save({"model": method.backbone.state_dict()}, run / "w.pth")
    second = SimCLR(backbones.create("resnet10_tiny"), 128, hidden_dim=40, output_dim=output_dim)
    before = second.projector.state_dict()["layers.0.weight"].clone()
    start_from(second, spec.format(run=run))
    assert torch.equal(second.backbone.eval()(IMAGES), method.backbone(IMAGES))
    expected = method.projector.state_dict()["layers.0.weight"]
    taken = output_dim == 24 and spec == "{run}"
    after = second.projector.state_dict()["layers.0.weight"]
    assert after.equal(expected if taken else before)
    other = SimCLR(backbones.create("resnet10t"), 512)
    with pytest.raises(ValueError, match="resnet10_tiny" if "w.pth" not in spec else "w.pth"):
        start_from(other, spec.format(run=run))


def test_published_weights_are_read_from_safetensors_alone(tmp_path, monkeypatch) -> None:
    requested = []

    def download(repo_id: str, filename: str, **kwargs: object) -> str:
        requested.append(filename)
        if not (tmp_path / filename).exists():
            raise EntryNotFoundError(f"404: {filename}")
        return str(tmp_path / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    monkeypatch.setattr(backbones, "get_hf_file_metadata", lambda url, timeout: None)
    model = perturbed(timm.create_model("resnet10t"))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises((OSError, ValueError, EntryNotFoundError)):
        load_encoder("timm:resnet10t.c3_in1k")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    encoder = load_encoder("timm:resnet10t.c3_in1k", image_size=32)
    assert torch.equal(encoder.model(IMAGES), pooled(model))
    assert encoder.name == "timm:resnet10t.c3_in1k"
    assert set(requested) == {"model.safetensors"}


def test_published_weights_without_network_raise_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(url: str, timeout: float) -> None:
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(backbones, "get_hf_file_metadata", fail)
    with pytest.raises(ValueError, match=r"resnet10t.*\(no network\)"):
        load_encoder("timm:resnet10t")


@pytest.mark.parametrize("method", [SimCLR], indirect=True)
@pytest.mark.parametrize(
    ("spec", "arguments", "error", "named"),
    [
        ("", {}, ValueError, "run"),
        ("resnet18", {}, FileNotFoundError, "timm:resnet18"),
        ("{run}/../mein", {}, FileNotFoundError, "mine"),
        ("{run}/..", {}, FileNotFoundError, "mine"),
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
