from __future__ import annotations

import re

import numpy as np
import pytest
import yaml
from PIL import Image
from support import add_projector, load_script, make_run, only, records, write_images

from ssl_gradmix.data.datasets import load
from ssl_gradmix.evaluation import rows
from ssl_gradmix.settings import Data

main = load_script("eval/reliance.py").main
FEW = ["--images", "40", "--layers", "[layer1, layer2]", "--data.stamp_bits", "16"]


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "runs" / "mine")


def test_rows_a_picture_and_a_sentence(run, capsys):
    assert main([str(run), *FEW]) == 0
    found, about = rows.read(run / "eval" / "reliance.json")
    assert set(found["task"]) == {"reliance"}
    assert set(found["dataset"] + "/" + found["split"]) == {"digits/train"}
    assert set(found["n"]) == {40}
    for layer in ("layer1", "layer2"):
        share = only(found, "attributed", "reliance", layer=layer, part=0.1, fill="crop", stamp_bits=16)
        assert share["ci_low"] < share["value"] < share["ci_high"]
        for place in ("random", "center"):
            beyond = only(found, "attributed", f"beyond_{place}", layer=layer)["value"]
            assert beyond == pytest.approx(share["value"] - only(found, place, "reliance")["value"], abs=1e-6)
    assert only(found, "two_views", "cosine")["value"] > only(found, "two_images", "cosine")["value"]
    assert about["images"] == {"digits/train": load(Data(), "train").fingerprint()}
    with Image.open(run / "eval" / "reliance.png") as picture:
        assert min(picture.size) > 300
    printed = capsys.readouterr().out
    largest = found[found["metric"] == "reliance"].groupby("score")["value"].max()["attributed"]
    assert f"this encoder loses {largest:.0%} of its agreement with 10% of the image" in printed

    assert main([str(run), *FEW, "--part", "0.3"]) == 0
    more, _ = rows.read(run / "eval" / "reliance.json")
    assert all(row in records(more) for row in records(found) if row["score"] != "two_views")
    assert only(more, "random", "reliance", part=0.3)["value"] != only(more, "random", "reliance", part=0.1)["value"]


def test_the_projector_and_old_settings(run):
    """A run of before stamps, whose augmentation says what no setting is called any more."""
    add_projector(run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["augmentation"] = {"where": "auto", "min_scale": 0.5}
    for name in [name for name in config["data"] if name.startswith("stamp")]:
        del config["data"][name]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main([str(run), *FEW, "--feature", "projector"]) == 0
    found, _ = rows.read(run / "eval" / "projector" / "reliance.json")
    assert set(found["feature"]) == {"projector"}
    assert set(rows.param(found, "layer").dropna()) == {"layer1", "layer2"}


def test_an_encoder_from_elsewhere_on_images_without_labels(run, tmp_path, capsys):
    write_images(tmp_path, ["images"], 12, size=24)
    rng = np.random.default_rng(0)
    for path in (tmp_path / "images").iterdir():  # each of another color, or their views agree no more than images
        Image.fromarray(np.uint8(rng.integers(0, 255, 3) * np.ones((24, 20, 1)))).save(path)
    given = [f"local-dir:{run / 'backbone'}", "--data.name", "folder", "--data.root", str(tmp_path / "images")]
    assert main([*given, "--out", str(tmp_path / "out"), "--layers", "[layer1]", "--seed", "1"]) == 0
    assert set(rows.read(tmp_path / "out" / "reliance.json")[0]["n"]) == {12}
    assert "on 12 images of folder:images/train, two views each" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "1"], "images must be at least 2, got 1"),
        (["--part", "1"], "part must be above 0 and below 1, got 1"),
        (["--fill", "noise"], "fill must be one of 'crop', 'donor', got noise"),
        (["--layers", "[]"], r"layers must be a list of names such as \[layer3\], or null"),
        (["--layers", "[layer9]"], "no layer 'layer9'; near names are layer"),
        (["--layers", "[global_pool]"], "'global_pool' has no spatial extent"),
        (["--data.stamp_bits", "5"], "data.stamp_bits must be 0, 4, 9 or 16, got 5"),
    ],
)
def test_bad_input_is_one_line(run, capsys, arguments, message):
    assert main([str(run), *FEW, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"error: .*{message}", line)
    assert not list(run.glob("eval/*"))


@pytest.mark.parametrize("augmentation", [3, {"min_scale": "all"}, {"flip": 2}])
def test_a_config_that_describes_no_augmentation(run, capsys, augmentation):
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"augmentation": augmentation}))
    assert main([str(run), *FEW]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.yaml is damaged: augmentation: " in line
