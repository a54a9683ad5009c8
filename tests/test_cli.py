"""Command lines of recipes: options, defaults, config files, and errors in one line."""

from __future__ import annotations

from argparse import ArgumentError
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import load_script

from ssl_gradmix import cli
from ssl_gradmix.data.augmentation import Augmentation
from ssl_gradmix.methods import SimCLR
from ssl_gradmix.training.pretrain import plain
from ssl_gradmix.training.trainer import Training
from ssl_gradmix.version import __version__


def read(*argv: str, defaults: dict[str, Any] | None = None) -> Any:
    return cli.read(cli.recipe_parser(SimCLR, "simclr", "", defaults), argv)


def test_defaults_are_those_of_the_signatures_and_of_the_recipe() -> None:
    config = read(defaults={"method.temperature": 0.2})
    assert config.training == Training()
    assert config.augmentation == Augmentation(flip=0.0)
    assert config.method.as_dict() == {
        "hidden_dim": None,
        "output_dim": 128,
        "temperature": 0.2,
        "weight": 1.0,
    }
    assert config.gradmix.as_dict().keys() == {"layers", "region", "fill", "target", "lam_range"}
    assert (config.run, config.recipe, config.data.root) == ("runs/simclr", "simclr", None)


@pytest.mark.parametrize(
    ("arguments", "flip", "blur"),
    [
        ([], 0.0, 0.0),
        (["--data.name", "cifar10"], 0.5, 0.0),
        (["--data.name", "cifar10", "--data.size", "96"], 0.5, 0.5),
        (["--data.name", "svhn", "--augmentation.flip", "0.3"], 0.3, 0.0),
    ],
)
def test_flip_and_blur_follow_the_data(arguments: list[str], flip: float, blur: float) -> None:
    augmentation = read(*arguments).augmentation
    assert (augmentation.flip, augmentation.blur) == (flip, blur)


def test_root_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read("--data.name", "folder", "--data.root", "x").data.root == str(tmp_path / "x")
    assert read("--data.name", "svhn").data.root == str(tmp_path / "data")


def test_recorded_config_gives_the_same_settings(tmp_path: Path) -> None:
    arguments = "--training.epochs 3 --gradmix.lam_range [0.6,0.7] --data.classes [a,'01']"
    config = read(*arguments.split(), "--data.name", "folder", "--data.root", str(tmp_path))
    recorded = plain(config)
    assert recorded["gradmix"]["lam_range"] == [0.6, 0.7]
    assert recorded["data"]["classes"] == ["a", "01"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**recorded, "environment": {"torch": "2"}}))
    again = read("--config", str(path), "--run", "other")
    assert plain(again) == {**recorded, "run": "other"}
    assert again.training == config.training


@pytest.mark.parametrize(
    ("recipe", "arguments"),
    [
        ("simclr", "--data.name cifar10 --optimizer.lr 1e-3"),
        ("byol", "--run runs/a --backbone.kwargs {drop_path_rate:0.1} --gradmix.layers [layer3]"),
        ("supcon", "--data.name folder --data.root x --data.classes [yes,01] --init timm:resnet18"),
    ],
)
def test_printed_config_is_read(
    recipe: str, arguments: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It holds the defaults of the data set, too: images of CIFAR-10 are flipped."""
    script, found = load_script(f"recipes/{recipe}_gradmix.py"), []
    script.pretrain = lambda config, *parts: found.append(plain(config))
    script.main(arguments.split())
    with pytest.raises(SystemExit, match="0"):
        script.main([*arguments.split(), "--print_config"])
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    script.main(["--config", str(tmp_path / "c.yaml")])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        *(("batch_size", "training.batch_size"), ("lr", "optimizer.lr")),
        *(("epoch", "training.epochs"), ("trainin.epochs", "training.epochs")),
        *(("backbone.nam", "backbone.name"), ("ini", "init")),
    ],
)
def test_unknown_option_names_the_near_one(given: str, meant: str) -> None:
    with pytest.raises(ArgumentError, match=rf"--{given}.* --{meant}\b"):
        read(f"--{given}", "3")


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        read("--version")
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("init", "recorded"),
    [
        *(("timm:resnet18", "timm:resnet18"), ("a", "{}/a")),
        *(("local-dir:a/b", "local-dir:{}/a/b"), ("/a/w.pth", "/a/w.pth")),
    ],
)
def test_init_is_recorded_by_its_absolute_path(
    init: str, recorded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read("--init", init).init == recorded.format(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--run", ""], "run"),
        (["--init", ""], "init"),
        (["--data.name", "imagenet22k"], "data.name"),
        (["--trainin.epochs", "3"], "--trainin.epochs"),
        (["--training.epoch", "3"], "--training.epoch"),
        (["--training.epochs", "0"], "training.epochs"),
        (["--training.batch_size", "many"], "training.batch_size"),
        (["--optimizer.lr", "-1"], "optimizer.lr"),
        (["--augmentation.gray", "1.5"], "augmentation.gray"),
        (["--gradmix.layers", "layer3"], "gradmix.layers"),
        (["--gradmix.attribution", "os.system"], "--gradmix.attribution"),
        (["--method.momentum", "0.9"], "--method.momentum"),
        (["--extra_view", "both"], "extra_view"),
        (["--recipe", "byol"], "recipe"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_invalid_option_raises(arguments: list[str], named: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        read(*arguments)
    assert named in str(raised.value)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("first\nsecond"), 2),
        (KeyError("first second"), 2),
        (FileNotFoundError("first second"), 2),
        (ArgumentError(None, "first\n  second"), 2),
        (FloatingPointError("first second"), 1),
    ],
)
def test_error_is_one_line_and_a_status(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: object) -> None:
        raise error

    assert cli.run(fail) == status
    assert capsys.readouterr().err == "error: first second\n"
    assert cli.run(lambda argv: None) == 0
