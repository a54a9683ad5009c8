"""The recipes as a user meets them: what they write, and what they answer to input that will not do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from support import load_script, write_images

import ssl_gradmix
from ssl_gradmix import command_line
from ssl_gradmix.settings import Augmentation, SimCLRSettings

QUICK = "--training.epochs 1 --training.threads 1 --training.knn_every 0 --training.samples_every 0"


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe(name: str) -> ModuleType:
    return load_script(f"recipes/{name}_gradmix.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few real files: two classes, with train/ and test/."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 12), ("test", 4)):
        write_images(root / split, ["dark", "bright"], count, size=20)
    return root


def small(folder: Path) -> list[str]:
    return f"{QUICK} --data.name folder --data.root {folder} --data.size 16 --training.batch_size 8".split()


BAD = {
    "unknown data set": (["--data.name", "imagenet22k"], "data.name must be one of 'digits', .*, got imagenet22k"),
    "unknown option": (["--trainin.epochs", "3"], r"(?i)unrecognized arguments: --trainin.epochs"),
    "cut short": (["--training.epoch", "3"], r"unrecognized arguments: --training.epoch"),
    "no list": (["--gradmix.layers", "layer3"], r"gradmix.layers must be a list such as \[a, b\] or null, got layer3$"),
    "unknown backbone": (["--backbone.name", "resnet1812"], "timm knows no model 'resnet1812'; near names are resnet"),
    "backbone for another size": (["--backbone.name", "vit_tiny_patch16_224"], "does not run on images of 32x32"),
    "unknown layer": (["--gradmix.layers", "[layr3]"], "no layer 'layr3'; near names are .*layer3"),
    "no such folder": (["--data.name", "folder", "--data.root", "nowhere"], "data.root 'nowhere' is not a folder"),
    "batch above the data": (
        ["--training.batch_size", "5000"],
        "batch_size 5000 exceeds the 1438 images of digits/train",
    ),
    "one image a micro-batch": (
        ["--training.batch_size", "2", "--training.accumulate", "2", "--method.allow_fewer_negatives", "true"],
        "batch_size 2 leaves 1 processes x 2 micro-batches less than two images each",
    ),
    "NaN": (["--method.temperature", ".nan"], "(method.temperature must be above 0|Got value: .nan|nan)"),
    "unwritable": (["--run", "/proc/run"], "/proc/run cannot be written to"),
    "fewer negatives": (["--training.accumulate", "2"], "another loss than that of the whole batch"),
    "processes": (["--expect_processes", "4"], "4 expected, 1 running"),
    "epochs": (["--training.epochs", "9" * 20], r"training.epochs must be at least 1 and at most 1e\+06, got 9"),
    "threads": (["--training.threads", "100000"], "training.threads must be at least 1 and at most [0-9]+, got 100000"),
    "another method's": (["--method.name", "byol"], "method.name must be one of 'simclr', got byol"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_status_2_and_nothing_written(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.run(recipe("simclr").main, [*QUICK.split(), *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["empty", "one image"])
def test_a_folder_with_too_little_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    if content == "one image":
        Image.new("RGB", (20, 20)).save(tmp_path / "images" / "a.png")
    assert command_line.run(recipe("byol").main, f"{QUICK} --data.name folder --data.root images".split()) == 2
    assert re.search("error: (no image in the folder 'images'|.* has 1 image, at least 2)", capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["simclr", "byol", "supcon"])
@pytest.mark.parametrize("extra_view", ["gradmix", "augmented", "none"])
def test_trains_on_a_folder_and_answers_the_same_command_again(
    name: str,
    extra_view: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    main, arguments = recipe(name).main, [*small(folder), "--extra_view", extra_view]
    assert command_line.run(main, arguments) == 0
    run = tmp_path / "runs" / name
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock", "backbone", "checkpoint", "config.yaml", "log.jsonl", "projector.safetensors",
    ]  # fmt: skip
    (entry,) = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert entry["epoch"] == 1
    assert (entry["loss_mixed"] > 0) == (extra_view != "none")
    assert ("loss_supervised" in entry) == (name == "supcon")
    assert 0.5 <= entry["lam"] <= 0.95 if extra_view == "gradmix" else entry["lam"] == (extra_view == "augmented")
    rate = {"simclr": 0.2, "byol": 1.2, "supcon": 0.2}[name]
    assert f"learning rate {rate * 8 / 256:.4g} (scaled by batch / 256)" in capsys.readouterr().out
    assert caplog.text.count("GradMix attributes at layer") == (extra_view == "gradmix")

    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert command_line.run(main, arguments) == 0
    assert "is finished: epoch 1/1" in capsys.readouterr().out
    assert command_line.run(main, [*arguments, "--optimizer.lr", "0.5"]) == 2
    assert f"was started with other settings (optimizer.lr was {rate}, now 0.5)" in capsys.readouterr().err
    (checkpoint,) = (run / "checkpoint").iterdir()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    (checkpoint / "method.safetensors").write_bytes(b"truncated")
    assert command_line.run(main, arguments) == 2
    assert "no readable checkpoint" in capsys.readouterr().err
    assert command_line.run(main, [*arguments, "--overwrite", "true"]) == 0
    assert "overwrite" not in yaml.safe_load((run / "config.yaml").read_text())  # whoever runs it again may lose a run


def test_a_runs_config_runs_it_again(folder: Path, tmp_path: Path) -> None:
    main = recipe("byol").main
    assert command_line.run(main, [*small(folder), "--gradmix.layers", "[layer3]", "--data.classes", "[bright]"]) == 0
    config = tmp_path / "runs/byol/config.yaml"
    recorded = yaml.safe_load(config.read_text())
    assert recorded["environment"]["torch"] == version("torch")
    assert (recorded["environment"]["device"], recorded["environment"]["layers"]) == ("cpu", ["layer3"])
    assert (recorded["method"]["name"], recorded["training"]["precision"]) == ("byol", "no")
    assert command_line.run(recipe("simclr").main, ["--config", str(config), "--run", "other"]) == 2
    assert not (tmp_path / "other").exists()
    assert command_line.run(main, ["--config", str(config), "--run", "again"]) == 0
    first, second = (
        load_file(next((tmp_path / run / "checkpoint").glob("epoch-*")) / "method.safetensors")
        for run in ("runs/byol", "again")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_labels_of_digits_are_those_of_known_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.run(recipe("supcon").main, [*QUICK.split(), "--method.label_fraction", "0.1"]) == 0
    told = "digits/train: 867 images of 6 classes (2, 3, 4, ...), 781 of them without labels"
    assert told in capsys.readouterr().out
    assert yaml.safe_load(Path("runs/supcon/config.yaml").read_text())["data"]["open_set"] == "random:6:0"


LABELS = {
    "none": (["train"], [], "folder:images/train has no labels, and this training needs them"),
    "of one class": (["train/a"], [], "has images of the class 'a' alone, two are needed"),
    "of a class in test alone": (
        ["train/a", "train/b", "test/a", "test/b", "test/c"],
        ["--data.classes", "[a, b, c]"],
        r"differ: only in train/ are \[\], only in test/ are \['c'\]",
    ),
}


@pytest.mark.parametrize(("folders", "arguments", "message"), LABELS.values(), ids=LABELS)
def test_labels_that_will_not_do_are_one_line(
    folders: list[str], arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images", folders, 12, size=20)
    assert command_line.run(recipe("supcon").main, [*small(Path("images")), *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line)
    assert not (tmp_path / "runs").exists()


def test_a_known_class_whose_images_are_all_broken_is_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in write_images(tmp_path / "images", ["a", "b", "c"], 12, size=20).glob("b/*"):
        path.write_bytes(b"broken")
    arguments = [*small(Path("images")), "--data.broken", "skip"]
    with pytest.warns(UserWarning, match="images cannot be read, left out"):
        assert command_line.run(recipe("supcon").main, arguments) == 2
    assert "has no image of the classes ['b']" in capsys.readouterr().err


def test_a_run_starts_from_another_ones_weights(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate next to 0 shows what it starts from."""
    assert command_line.run(recipe("simclr").main, small(folder)) == 0
    main, arguments = recipe("supcon").main, [*small(folder), "--optimizer.lr", "1e-30", "--init", "runs/simclr"]
    assert command_line.run(main, arguments) == 0
    for part in ("backbone/model.safetensors", "projector.safetensors"):
        before, after = (load_file(tmp_path / "runs" / run / part) for run in ("simclr", "supcon"))
        weights = [name for name in before if "running" not in name and "num_batches" not in name]
        assert len(weights) > 4
        assert all(torch.equal(before[name], after[name]) for name in weights)
    assert yaml.safe_load((tmp_path / "runs/supcon/config.yaml").read_text())["init"] == "runs/simclr"
    capsys.readouterr()

    for others, message in (
        (["--init", "runs/none"], r"was started with other settings \(init was 'runs/simclr', now 'runs/none'\)"),
        (["--init", "runs/none", "--run", "b"], "no run folder 'runs/none'"),
        (["--backbone.name", "resnet18_small", "--run", "b"], "model.safetensors does not fit the model: "),
    ):
        assert command_line.run(main, [*arguments, *others]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "b").exists()
    assert command_line.run(main, [*arguments, "--method.output_dim", "24", "--run", "c"]) == 0


@pytest.mark.distributed
def test_two_processes_train_one_run(script, folder: Path, tmp_path: Path) -> None:
    options = "--expect_processes 2 --training.samples_every 1 --training.knn_every 1"
    arguments = [*small(folder), *options.split()]
    done = script("recipes/simclr_gradmix.py", *arguments, processes=2)
    assert done.returncode == 0, done.stderr
    assert "2 processes on cpu:0, CPU threads: 1, precision no" in done.stderr
    assert done.stdout.count("epoch 1/1") == 1
    (entry,) = [json.loads(line) for line in (tmp_path / "runs/simclr/log.jsonl").read_text().splitlines()]
    assert entry["step"] == 3
    assert 0 <= entry["knn"] <= 1


@pytest.mark.parametrize(
    ("statement", "loaded"),
    [
        ("import ssl_gradmix", []),
        ("from ssl_gradmix import *; import ssl_gradmix as s; s.attribution.attribute, s.mixing.paste", ["torch"]),
    ],
)
def test_the_public_names_need_torch_alone(statement: str, loaded: list[str]) -> None:
    heavy = "'torch', 'torchvision', 'timm', 'lightly', 'sklearn', 'PIL'"
    code = f"{statement}; import sys; print([name for name in ({heavy}) if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == str(loaded)


def test_what_the_package_has_not_is_said_by_its_name() -> None:
    with pytest.raises(AttributeError, match="module 'ssl_gradmix' has no attribute 'GradeMix'"):
        ssl_gradmix.GradeMix  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "flip"),
    [([], 0.0), (["--data.name", "cifar10"], 0.5), (["--data.name", "svhn", "--augmentation.flip", "0.3"], 0.3)],
)
def test_digits_are_mirrored_only_where_asked_for(arguments: list[str], flip: float) -> None:
    parser = command_line.recipe_parser(SimCLRSettings, "", recipe="simclr")
    settings, plain = command_line.read(parser, arguments)
    assert settings.augmentation.flip == plain["augmentation"]["flip"] == flip


def test_no_flip_given_in_python_is_one_in_two() -> None:
    assert Augmentation(flip=None).flip == 0.5
