from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file

from ssl_gradmix import backbones
from ssl_gradmix.evaluation.encoders import Encoder, load_encoder

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    """No weight and no BatchNorm statistic is left at its initial value, so that each must be loaded."""
    generator = torch.Generator().manual_seed(1)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    return model.eval()


@pytest.fixture
def backbone():
    return perturbed(backbones.create("resnet10_tiny"))


@pytest.fixture
def run(tmp_path, backbone) -> Path:
    folder = tmp_path / "runs" / "mine"
    backbones.save(backbone, folder / "backbone", image_size=32)
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"name": "digits"}, "method": "simclr"}))
    return folder


def saved_by_timm(folder: Path, name: str, **kwargs) -> torch.nn.Module:
    from timm.models._hub import save_for_hf

    model = perturbed(timm.create_model(name, **kwargs))
    save_for_hf(model, folder, model_args=kwargs, safe_serialization=True)
    return model


class TestRun:
    def test_is_the_saved_backbone_frozen(self, run, backbone):
        encoder = load_encoder(run)
        assert torch.equal(encoder.model(IMAGES), backbone(IMAGES))
        assert not encoder.model.training
        assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
        assert (encoder.size, encoder.name, encoder.run) == (32, "mine", run)
        assert encoder.mean == pytest.approx(timm.data.IMAGENET_DEFAULT_MEAN)
        assert encoder.std == pytest.approx(timm.data.IMAGENET_DEFAULT_STD)
        assert encoder.config == {"data": {"name": "digits"}, "method": "simclr"}

    def test_equals_what_timm_reads_from_its_backbone(self, run):
        by_timm = timm.create_model(f"local-dir:{run / 'backbone'}", pretrained=True, num_classes=0).eval()
        assert torch.equal(load_encoder(run).model(IMAGES), by_timm(IMAGES))

    def test_its_backbone_alone_has_no_run(self, run):
        encoder = load_encoder(f"local-dir:{run / 'backbone'}")
        assert encoder.run is None
        assert encoder.config is None
        assert encoder.fingerprint == load_encoder(run).fingerprint


class TestLocalDir:
    def test_classification_head_is_left_out(self, tmp_path):
        model = saved_by_timm(tmp_path, "resnet10t", num_classes=7)
        pooled = model.forward_head(model.forward_features(IMAGES), pre_logits=True)
        encoder = load_encoder(f"local-dir:{tmp_path}")
        assert torch.equal(encoder.model(IMAGES), pooled)
        assert encoder.size == model.pretrained_cfg["input_size"][-1]

    def test_position_embeddings_follow_the_size_as_in_timm(self, tmp_path):
        saved_by_timm(tmp_path, "vit_tiny_patch16_224", num_classes=0, depth=1, img_size=64)
        encoder = load_encoder(f"local-dir:{tmp_path}", image_size=96)
        by_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0, img_size=96).eval()
        images = torch.rand(2, 3, 96, 96)
        assert encoder.size == 96
        assert torch.allclose(encoder.model(images), by_timm(images), atol=1e-6)


class TestWeights:
    @pytest.mark.parametrize("num_classes", [0, 5])
    def test_file_with_or_without_head(self, tmp_path, num_classes):
        model = perturbed(timm.create_model("resnet10t", num_classes=num_classes))
        save_file(model.state_dict(), tmp_path / "mine.safetensors")
        encoder = load_encoder("timm:resnet10t", weights=tmp_path / "mine.safetensors", image_size=32)
        assert torch.equal(encoder.model(IMAGES), model.forward_head(model.forward_features(IMAGES), pre_logits=True))
        assert encoder.name == "timm:resnet10t@mine.safetensors"
        assert encoder.size == 32

    def test_must_fit(self, tmp_path, backbone):
        weights = backbone.state_dict()
        weights["other.weight"] = weights.pop("bn1.weight")
        weights["conv1.weight"] = weights["conv1.weight"][:3].clone()
        save_file(weights, tmp_path / "w.safetensors")
        message = r"1 \(bn1.weight\) missing; 1 \(other.weight\) un.*; 1 \(conv1.weight\) of"
        with pytest.raises(ValueError, match=message):
            load_encoder("timm:resnet10_tiny", weights=tmp_path / "w.safetensors")
        save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match=r"\d\d \(conv1.weight, bn1.weight, bn1.bias, ...\) missing; 1 \(x\)"):
            load_encoder("timm:resnet10_tiny", weights=tmp_path / "w.safetensors")

    @pytest.mark.parametrize("prefix", ["backbone.", "module.", "student.backbone."])
    def test_of_a_part_of_another_model(self, tmp_path, backbone, prefix, caplog):
        weights = {f"{prefix}{key}": value for key, value in backbone.state_dict().items()}
        save_file(weights | {"head.weight": torch.ones(2)}, tmp_path / "w.safetensors")
        with caplog.at_level("INFO"):
            encoder = load_encoder("timm:resnet10_tiny", weights=tmp_path / "w.safetensors")
        assert torch.equal(encoder.model(IMAGES), backbone(IMAGES))
        assert f"the weights under {prefix} are read" in caplog.text

    def test_of_two_parts_are_not_guessed(self, tmp_path, backbone):
        own = backbone.state_dict()
        weights = {f"{part}.{key}": own[key].clone() for part in ("student", "teacher") for key in own}
        save_file(weights, tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match=r"several such models, under (student\.|teacher\.) and"):
            load_encoder("timm:resnet10_tiny", weights=tmp_path / "w.safetensors")

    @pytest.mark.parametrize("prefix", ["", "backbone."])
    def test_of_numbered_modules_say_how_to_name_them(self, tmp_path, prefix):
        model = perturbed(timm.create_model("resnet10t"))
        numbered = torch.nn.Sequential(*list(model.children())[:-1])
        save_file({f"{prefix}{key}": value for key, value in numbered.state_dict().items()}, tmp_path / "w.safetensors")
        with pytest.raises(ValueError, match=r"nn\.Sequential.* save model\.state_dict\(\)$"):
            load_encoder("timm:resnet10t", weights=tmp_path / "w.safetensors")
        again = timm.create_model("resnet10t")  # what the message says
        torch.nn.Sequential(*list(again.children())[:-1]).load_state_dict(numbered.state_dict())
        save_file(again.state_dict(), tmp_path / "named.safetensors")
        encoder = load_encoder("timm:resnet10t", weights=tmp_path / "named.safetensors")
        assert torch.equal(encoder.model(IMAGES), model.forward_head(model.forward_features(IMAGES), pre_logits=True))

    def test_need_an_architecture(self, run):
        with pytest.raises(ValueError, match="give timm:NAME in place of"):
            load_encoder(run, weights="w.safetensors")
        with pytest.raises(ValueError, match="weights only: give them as weights beside"):
            load_encoder(run / "backbone" / "model.safetensors")
        with pytest.raises(FileNotFoundError, match=r"there are no weights .*w.safetensors"):
            load_encoder("timm:resnet10t", weights=run / "nowhere" / "w.safetensors")


class TestPublished:
    """The hub is stood in for: what it is asked for, and what it has."""

    @pytest.fixture
    def asked(self, monkeypatch):
        asked = []

        def download(repo_id, filename, **kwargs):
            asked.append((repo_id, filename))
            if filename not in self.files:
                raise EntryNotFoundError(f"404: no {filename}")
            return str(self.files[filename])

        monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
        self.files = {}
        return asked

    def test_safetensors_from_the_hub(self, asked, tmp_path):
        model = perturbed(timm.create_model("resnet10t"))
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        self.files = {"model.safetensors": tmp_path / "model.safetensors"}
        encoder = load_encoder("timm:resnet10t.c3_in1k", image_size=32)
        assert torch.equal(encoder.model(IMAGES), model.forward_head(model.forward_features(IMAGES), pre_logits=True))
        assert encoder.name == "timm:resnet10t.c3_in1k"
        assert {filename for _, filename in asked} == {"model.safetensors"}

    def test_a_pickle_on_the_hub_is_never_asked_for(self, asked, tmp_path):
        torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "pytorch_model.bin")
        self.files = {"pytorch_model.bin": tmp_path / "pytorch_model.bin"}
        with pytest.raises(ValueError, match=r"weights of 'resnet10t.c3_in1k' are not in the local cache and hugg"):
            load_encoder("timm:resnet10t.c3_in1k")
        assert {filename for _, filename in asked} == {"model.safetensors"}

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("timm:resnet10_tiny", "no safetensors for 'resnet10_tiny'"),
            ("timm:hf-hub:someone/model", "one of timm's own models, got 'hf-hub:someone/model'"),
            ("timm:local-dir:here", "one of timm's own models, got 'local-dir:here'"),
        ],
    )
    def test_unknown_names(self, spec, message):
        with pytest.raises(ValueError, match=message):
            load_encoder(spec)


class TestPickles:
    @pytest.mark.parametrize("save", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what))])
    def test_refused_with_how_to_convert(self, tmp_path, save):
        for path in (tmp_path / "model.pt", tmp_path / "model.bin"):
            save({}, path)
            refused = rf"(?s){path.name} is a pickled .*torch.load\(.*weights_only=True.*save_file"
            with pytest.raises(ValueError, match=refused):
                load_encoder(path)
            with pytest.raises(ValueError, match=refused):
                load_encoder("timm:resnet10_tiny", weights=path)

    def test_the_way_out_works(self, tmp_path, backbone, monkeypatch):
        monkeypatch.chdir(tmp_path)
        torch.save(backbone.state_dict(), "old.pt")
        with pytest.raises(ValueError, match="pickled") as refusal:
            load_encoder("old.pt")
        exec("\n".join(line.strip() for line in str(refusal.value).splitlines()[1:4]), {})
        encoder = load_encoder("timm:resnet10_tiny", weights="weights.safetensors")
        assert torch.equal(encoder.model(IMAGES), backbone(IMAGES))


class TestNoRun:
    def test_other_folder(self, tmp_path, run):
        with pytest.raises(FileNotFoundError, match=r"is no run: it has no config.yaml"):
            load_encoder(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"is no run .*: give it as local-dir:.*backbone"):
            load_encoder(run / "backbone")
        with pytest.raises(FileNotFoundError, match=r"is no folder in timm's layout: it has no config.json"):
            load_encoder(f"local-dir:{run}")


class TestDamaged:
    @pytest.mark.parametrize("text", ["", "[]", "3"])
    def test_description_of_another_kind(self, run, text):
        (run / "backbone" / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config.json is damaged: [^\n]+$"):
            load_encoder(run)

    def test_description_of_another_model(self, run):
        path = run / "backbone" / "config.json"
        described = json.loads(path.read_text())
        path.write_text(json.dumps(described | {"architecture": "resnet18_small"}))
        with pytest.raises(ValueError, match=r"model.safetensors does not fit the model: .* missing; .* of another sh"):
            load_encoder(run)


class TestFingerprint:
    def test_is_of_the_weights_and_buffers(self, run, tmp_path, backbone):
        same = load_encoder(run).fingerprint
        backbones.save(backbone, tmp_path / "copy", image_size=32)
        assert load_encoder(f"local-dir:{tmp_path / 'copy'}", image_size=64).fingerprint == same
        found = {same}
        for key in ("conv1.weight", "layer4.0.bn1.running_var"):
            weights = load_file(run / "backbone" / "model.safetensors")
            weights[key].view(-1)[-1] += 1e-6
            save_file(weights, tmp_path / "w.safetensors")
            found.add(load_encoder("timm:resnet10_tiny", weights=tmp_path / "w.safetensors").fingerprint)
        assert len(found) == 3

    def test_tells_modules_with_the_same_weights_apart(self):
        def fingerprint(*modules):
            return Encoder(torch.nn.Sequential(*modules), 8, (0, 0, 0), (1, 1, 1), "mine").fingerprint

        plain, relu, gelu = torch.nn.Flatten(), torch.nn.ReLU(), torch.nn.GELU()
        assert len({fingerprint(plain), fingerprint(plain, relu), fingerprint(plain, gelu)}) == 3

    def test_tells_modules_with_other_attributes_apart(self):
        def fingerprint(**arguments):
            model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1, embed_dim=24, **arguments)
            return Encoder(model, 224, (0, 0, 0), (1, 1, 1), "mine").fingerprint

        torch.manual_seed(0)
        state = torch.get_rng_state()
        found = []
        for arguments in ({"num_heads": 3}, {"num_heads": 3}, {"num_heads": 6}, {"num_heads": 3, "global_pool": "max"}):
            torch.set_rng_state(state)
            found.append(fingerprint(**arguments))
        assert found[0] == found[1]
        assert len(set(found)) == 3
