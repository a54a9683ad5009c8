"""The recipes from the command line: what they write, resume, and reject."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
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
from support import ROOT, load_script, write_images
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
@pytest.mark.parametrize("extra_view", ["adaptive", "gradmix", "augmented", "none"])
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
    mixing = extra_view in ("adaptive", "gradmix")
    metrics |= {"flat", "agreement_lost"} if mixing else set()
    metrics |= {"mixed", "mix_probability"} if extra_view == "adaptive" else set()
    metrics |= {"loss_supervised"} if name == "supcon" else set()
    times = {"images_per_second", "images_per_second_overall", "seconds_left"}
    assert entry.keys() == {"epoch", "step", "lr", *metrics, *times}
    config = yaml.safe_load((run / "config.yaml").read_text())
    layers = config["environment"]["layers"]
    assert layers == (["layer3"] if mixing else [])  # 4x4 at 16 px
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


def test_run_without_its_checkpoint_is_not_trained_over() -> None:
    train("simclr")
    shutil.rmtree("runs/simclr/checkpoint")
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="checkpoint"):
        train("simclr")
    assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["simclr", "byol", "supcon"])
def test_recipe_starts_from_the_weights_of_a_run_or_a_file(name: str) -> None:
    """A learning rate close to 0 shows what it started from."""
    train("simclr")
    before = weights("runs/simclr")
    torch.save({"model": load_file("runs/simclr/backbone/model.safetensors")}, "w.pth")
    for init in ("runs/simclr", "local-dir:runs/simclr/backbone", "w.pth"):
        options = ["--optimizer.lr", "1e-30", "--init", init, "--run", f"runs/{init}"]
        train(name, *options)
        after = weights(f"runs/{init}")
        names = (
            before
            if init == "runs/simclr" and name != "byol"
            else load_file("runs/simclr/backbone/model.safetensors")
        )
        learned = [each for each in names if "running" not in each and "num_batches" not in each]
        assert len(learned) > 4
        assert all(torch.equal(before[each], after[each]) for each in learned)
        config = yaml.safe_load(Path("runs", init, "config.yaml").read_text())
        assert config["init"].endswith(str(Path(init.partition(":")[2] or init).absolute()))
        Path(f"runs/{init}", "log.jsonl").unlink()
    shutil.rmtree("runs/simclr")
    train(name, *options)  # a run with a checkpoint needs it no more


@pytest.mark.parametrize(
    ("layout", "following"),
    [
        ("labeled", "linear_probe"),
        ("unlabeled", "reliance"),
        ("one class", "reliance"),
    ],
)
def test_next_command_suits_the_images(
    layout: str, following: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = []
    if layout == "unlabeled":
        options = ["--data.root", "images/train/dark"]
    elif layout == "one class":
        options = ["--data.classes", "[dark]"]
    train("simclr", *options, "--run", "runs/a run")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"Next: python eval/{following}.py 'runs/a run'"


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
@pytest.mark.parametrize(
    "difference",
    [
        *("count", "unreadable", "locked"),
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("images", "settings")),
    ],
)
def test_processes_that_differ_end_with_an_error_each(difference: str, tmp_path: Path) -> None:
    """One line in every process, at once, and no run."""
    shutil.copytree("images", "other")
    settings: list[list[str]] = [[], []]
    lock = Path("runs/simclr/.lock" if difference == "locked" else "lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    if difference == "count":
        write_images(Path("other/train"), ["dark"], 20, size=20)
    elif difference == "images":
        shutil.copy("other/train/bright/0.png", "other/train/dark/0.png")
    elif difference == "settings":
        settings[1] = ["--data.size", "32"]
    elif difference == "unreadable":
        shutil.rmtree("other")
    with lock.open("w") as held, socket.socket() as free:
        fcntl.flock(held, fcntl.LOCK_EX)
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        free.close()
        processes = []
        for rank, root in enumerate(["images", "images" if difference == "locked" else "other"]):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", **address}
            cpu = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
            environment = {**os.environ, **place, **cpu, "PYTHONPATH": os.pathsep.join(sys.path)}
            options = [*QUICK.split(), *SMALL.split(), "--data.root", root, *settings[rank]]
            command = [sys.executable, str(ROOT / "recipes/simclr_gradmix.py"), *options]
            more = {"env": environment, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command, **more))
        for process in processes:
            _, errors = process.communicate(timeout=60)
            lines = [line for line in errors.splitlines() if line.startswith("error: ")]
            assert (len(lines), process.returncode) == (1, 2), errors
            assert "Traceback" not in errors
    assert not Path("runs/simclr/config.yaml").exists()


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
@pytest.mark.parametrize("extra_view", ["adaptive", "gradmix", "none"])
def test_training_learns(extra_view: str) -> None:
    """Digits, by kNN on held-out training images."""
    options = "--training.epochs 8 --training.threads 1 --training.samples_every 0"
    recipe("simclr").main([*options.split(), "--extra_view", extra_view])
    entries = Path("runs", "simclr", "log.jsonl").read_text().splitlines()
    assert json.loads(entries[-1])["knn"] > 0.9
