"""The recipes from the command line: what they write, resume, and reject."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import load_script, write_images
from torch import Tensor

from ssl_gradmix import GradMix, cli
from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.methods import SimCLR

Script = Callable[..., subprocess.CompletedProcess[str]]
QUICK = "--training.epochs 1 --training.threads 1 --training.knn_every 0 --training.samples_every 0"
SMALL = "--data.name folder --data.root images --data.size 16 --training.batch_size 8"


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 12), ("test", 4)):
        write_images(Path("images") / split, ["dark", "bright"], count, size=20)


def recipe(name: str) -> ModuleType:
    return load_script(f"recipes/{name}_gradmix.py")


def train(name: str, *options: str, **parts: Any) -> None:
    recipe(name).main([*QUICK.split(), *SMALL.split(), *options], **parts)


def weights(run: str) -> dict[str, Tensor]:
    projector = load_file(Path(run, "projector.safetensors"))
    return load_file(Path(run, "backbone", "model.safetensors")) | projector


@pytest.mark.parametrize("name", ["simclr", "byol", "supcon"])
@pytest.mark.parametrize("extra_view", ["gradmix", "augmented", "none"])
def test_recipe_trains_and_resumes(name: str, extra_view: str) -> None:
    train(name, "--extra_view", extra_view)
    run = Path("runs", name)
    assert {path.name for path in run.iterdir()} == {
        *(".lock", "backbone", "checkpoint", "config.yaml", "log.jsonl"),
        "projector.safetensors",
    }
    (entry,) = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    metrics = {"loss", "loss_views", "embedding_std"}
    metrics |= {"loss_mixed", "lam"} if extra_view != "none" else set()
    metrics |= {"flat"} if extra_view == "gradmix" else set()
    metrics |= {"loss_supervised"} if name == "supcon" else set()
    times = {"images_per_second", "images_per_second_overall", "seconds_left"}
    assert entry.keys() == {"epoch", "step", "lr", *metrics, *times}
    config = yaml.safe_load((run / "config.yaml").read_text())
    layers = config["environment"]["layers"]
    assert layers == (["layer3"] if extra_view == "gradmix" else [])  # 4x4 at 16 px
    assert config["recipe"] == name

    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    train(name, "--extra_view", extra_view)
    with pytest.raises(ValueError, match=r"optimizer\.lr"):
        train(name, "--extra_view", extra_view, "--optimizer.lr", "0.5")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_config_repeats_a_run() -> None:
    train("byol", "--gradmix.layers", "[layer2]", "--data.classes", "[bright]")
    recipe("byol").main(["--config", "runs/byol/config.yaml", "--run", "again"])
    torch.testing.assert_close(weights("again"), weights("runs/byol"), rtol=0, atol=0)
    recorded = yaml.safe_load(Path("again/config.yaml").read_text())
    assert recorded["environment"]["layers"] == ["layer2"]
    assert recorded["data"]["root"] == str(Path("images").absolute())


def test_parts_can_be_replaced() -> None:
    class Corner(GradMix):
        def place(self, maps: Tensor, share: float) -> tuple[Tensor, tuple[int, int]]:
            boxes = torch.tensor([[0, 0, 8, 8]]).repeat(len(maps), 1)
            return boxes, (8, 8)

    class Dark(Views):
        def forward(self, images: Any, n_views: int) -> list[Tensor]:
            return [view * 0 + 0.1 for view in super().forward(images, n_views)]

    class Counted(SimCLR):
        calls = 0

        def forward(self, views: list[Tensor], labels: Any = None) -> Any:
            Counted.calls += 1
            loss, metrics = super().forward(views, labels)
            return loss, {**metrics, "brightness": torch.stack(views).mean()}

    train("simclr", gradmix=Corner, views=Dark, method=Counted)
    entry = json.loads(Path("runs/simclr/log.jsonl").read_text())
    assert entry["lam"] == 0.75
    assert entry["brightness"] == pytest.approx(0.1)
    assert Counted.calls == 1 + 3  # the trial, and the steps


def test_digits_have_known_classes_and_few_labels() -> None:
    options = [*QUICK.split(), "--label_fraction", "0.1", "--training.batch_size", "64"]
    recipe("supcon").main(options)
    config = yaml.safe_load(Path("runs/supcon/config.yaml").read_text())
    assert config["data"]["open_set"] == "random:6:0"
    assert config["label_fraction"] == 0.1
    assert config["environment"]["images"] == 867


def test_run_starts_from_the_weights_of_another() -> None:
    """A learning rate close to 0 shows what it started from."""
    train("simclr")
    train("supcon", "--optimizer.lr", "1e-30", "--init", "runs/simclr")
    before, after = weights("runs/simclr"), weights("runs/supcon")
    learned = [name for name in before if "running" not in name and "num_batches" not in name]
    assert len(learned) > 4
    assert all(torch.equal(before[name], after[name]) for name in learned)


INVALID = {
    "unknown backbone": (["--backbone.name", "resnet1812"], "backbone.name"),
    "backbone of another size": (["--backbone.name", "vit_tiny_patch16_224"], "data.size"),
    "unknown layer": (["--gradmix.layers", "[layr3]"], "layr3"),
    "no folder": (["--data.root", "nowhere"], "data.root"),
    "batch above the data": (["--training.batch_size", "5000"], "training.batch_size"),
    "one image per batch": (["--training.batch_size", "1"], "training.batch_size"),
    "micro-batches": (["--training.accumulate", "2"], "training.accumulate"),
    "processes": (["--expect_processes", "4"], "expect_processes"),
    "no classes": (["--data.root", "images/train/dark"], "label"),
    "no run to start from": (["--init", "runs/none"], "runs/none"),
}


@pytest.mark.parametrize(("arguments", "named"), INVALID.values(), ids=INVALID)
def test_invalid_input_is_one_line_and_writes_nothing(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: Any) -> None:
        train("supcon", *arguments)

    assert cli.run(main) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert named in errors[0]
    assert not Path("runs").exists()


def test_uneven_micro_batches_raise() -> None:
    with pytest.raises(ValueError, match=r"training\.batch_size"):
        train("byol", "--training.accumulate", "3")


@pytest.mark.distributed
def test_two_processes_train_one_run(script: Script) -> None:
    options = "--expect_processes 2 --training.samples_every 1 --training.knn_every 1"
    arguments = [*QUICK.split(), *SMALL.split(), *options.split()]
    done = script("recipes/simclr_gradmix.py", *arguments, processes=2)
    assert done.returncode == 0, done.stderr
    (entry,) = [json.loads(x) for x in Path("runs/simclr/log.jsonl").read_text().splitlines()]
    assert entry["step"] == 3
    assert 0 <= entry["knn"] <= 1
    assert Path("runs/simclr/samples/epoch-00001.png").exists()


@pytest.mark.parametrize("statement", ["import ssl_gradmix", "from ssl_gradmix import GradMix"])
def test_gradmix_needs_torch_alone(statement: str) -> None:
    heavy = "['torchvision', 'timm', 'lightly', 'sklearn', 'PIL', 'jsonargparse', 'yaml']"
    code = f"{statement}; import sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("extra_view", ["gradmix", "none"])
def test_training_learns(extra_view: str) -> None:
    """Digits, by kNN on held-out training images."""
    options = "--training.epochs 8 --training.threads 1 --training.samples_every 0"
    recipe("simclr").main([*options.split(), "--extra_view", extra_view])
    entries = Path("runs", "simclr", "log.jsonl").read_text().splitlines()
    assert json.loads(entries[-1])["knn"] > 0.9
