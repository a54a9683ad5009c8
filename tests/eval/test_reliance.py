from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from support import add_projector, load_script, only

from ssl_gradmix.backbones import stages
from ssl_gradmix.data.augmentation import Views
from ssl_gradmix.data.datasets import Data, load
from ssl_gradmix.evaluation import results

script = load_script("eval/reliance.py")
main = script.main
FEW = ["--images", "40", "--layers", "[layer1, layer2]"]


class Stamped(Views):
    """Views with a white square that names the image by its place."""

    def forward(self, images, n_views):
        views = super().forward(images, n_views)
        for view in views:
            for i, image in enumerate(view):
                image[:, 8:12, 4 * (i % 4) : 4 * (i % 4) + 4] = 20.0
        return views


def test_rows_figure_and_sentence(run, capsys):
    main([str(run), *FEW], views=Stamped)
    rows, about = results.read(run / "eval" / "reliance-digits.json")
    assert set(rows["dataset"] + "/" + rows["split"]) == {"digits/train"}
    assert set(rows["n"]) == {40}
    for layer in ("layer1", "layer2"):
        share = only(rows, "attributed", "reliance", layer=layer, part=0.1, fill="crop")
        assert share["ci_low"] < share["value"] < share["ci_high"]
        for place in ("random", "center"):
            beyond = only(rows, "attributed", f"beyond_{place}", layer=layer)["value"]
            control = only(rows, place, "reliance")["value"]
            assert beyond == pytest.approx(share["value"] - control, abs=1e-6)
    same, different = (only(rows, f"two_{what}", "cosine")["value"] for what in ("views", "images"))
    assert same > different
    assert about["images"] == {"digits/train": load(Data(), "train").fingerprint()}
    with Image.open(run / "eval" / "reliance-digits.png") as picture:
        assert min(picture.size) > 300
    assert_largest_is_reported(rows, capsys.readouterr().out.splitlines()[-1])


def assert_largest_is_reported(rows, sentence):
    shares = rows[(rows["score"] == "attributed") & (rows["metric"] == "reliance")]
    layers = results.param(shares, "layer")
    assert len(layers) == layers.nunique() > 1
    most = shares["value"].idxmax()
    summary = only(rows, "largest", "reliance")
    assert summary["params"]["at"] == layers[most]
    for column in ("value", "ci_low", "ci_high"):
        assert summary[column] == shares[column][most]
    assert f"{min(summary['value'], 1):.0%}" in sentence
    assert layers[most] in sentence


@pytest.mark.parametrize("turned", [False, True])
def test_all_stages_are_read_by_default(run, capsys, monkeypatch, turned):
    """16 px images: layer3 has a map of 2x2. The picture is of the reported layer, too."""
    titles = []
    draw = script.draw
    monkeypatch.setattr(script, "draw", lambda *given: titles.append(given[-1]) or draw(*given))
    if turned:  # the other layer is first
        monkeypatch.setattr(script, "stages", lambda *given: stages(*given)[::-1])
    main([str(run), "--images", "40"], views=Stamped)
    rows, _ = results.read(run / "eval" / "reliance-digits.json")
    assert set(results.param(rows, "layer").dropna()) == {"act1", "layer1"}
    assert_largest_is_reported(rows, capsys.readouterr().out.splitlines()[-1])
    assert only(rows, "largest", "reliance")["params"]["at"] in titles[0]


def test_views_are_those_of_the_run_and_its_projector(run):
    add_projector(run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["augmentation"] = {"min_scale": 0.5, "flip": 0.0, "solarize": 0.0}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    made = []

    class Recorded(Stamped):
        def __init__(self, augmentation, *given):
            made.append(augmentation)
            super().__init__(augmentation, *given)

    main([str(run), *FEW, "--feature", "projector"], views=Recorded)
    assert (made[0].min_scale, made[0].flip) == (0.5, 0.0)
    rows, _ = results.read(run / "eval" / "reliance-digits-projector.json")
    assert set(rows["feature"]) == {"projector"}
    assert set(results.param(rows, "layer").dropna()) == {"layer1", "layer2"}


def test_foreign_encoder_on_images_without_labels(run, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "pets").mkdir()
    for i in range(30):  # of different colors, or views would agree no more than images
        color = np.uint8(rng.integers(0, 255, 3) * np.ones((24, 20, 1)))
        Image.fromarray(color).save(tmp_path / "pets" / f"{i}.png")
    folder = ["--data.name", "folder", "--data.root", str(tmp_path / "pets")]
    given = [*folder, "--out", str(tmp_path / "out"), "--seed", "1", "--layers", "[layer1]"]
    torch.manual_seed(0)
    main([f"local-dir:{run / 'backbone'}", *given])
    rows, _ = results.read(tmp_path / "out" / "reliance-pets.json")
    assert set(rows["n"]) == {30}
