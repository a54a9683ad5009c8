from __future__ import annotations

import base64
import json
from io import BytesIO

import numpy as np
import yaml
from PIL import Image
from reports import add_linear_probe, assert_inert, report, row, write_rows

from ssl_gradmix.data.datasets import load
from ssl_gradmix.evaluation import plots
from ssl_gradmix.evaluation.encoders import load_encoder
from ssl_gradmix.evaluation.features import extract
from ssl_gradmix.settings import Data


def test_map_is_the_principal_components_of_directions(encoder_run, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "scatter", lambda points, colors, axes: drawn.update(points=points, axes=axes))
    monkeypatch.setattr(plots, "svg", lambda figure: "<svg></svg>")
    add_linear_probe(encoder_run)
    report(encoder_run, map_method="pca")
    features, _ = extract(load_encoder(encoder_run), load(Data(size=16), "test"))
    directions = features.double().numpy()
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    centered = directions - directions.mean(0)
    _, singular, axes = np.linalg.svd(centered, full_matrices=False)
    expected = centered @ axes[:2].T
    signs = np.sign((expected * drawn["points"]).sum(0))
    np.testing.assert_allclose(drawn["points"], expected * signs, atol=1e-9)
    assert drawn["axes"][0] == f"component 1, {singular[0] ** 2 / (singular**2).sum():.0%} of variance"


def test_map_reads_kept_features_and_draws_a_seeded_part(encoder_run, monkeypatch):
    monkeypatch.setattr("ssl_gradmix.evaluation.report.sections.MAP_POINTS", 50)
    add_linear_probe(encoder_run)
    first, _ = report(encoder_run, map_method="tsne")
    monkeypatch.setattr("ssl_gradmix.evaluation.features._encode", None)  # would raise when called
    again, _ = report(encoder_run, map_method="tsne")
    assert "encoded: digits/test, 50 of 359" in first.words
    assert first.text == again.text


def test_map_in_the_page_shows_left_out_classes_in_gray(encoder_run):
    add_linear_probe(encoder_run)
    rows = json.loads((encoder_run / "eval" / "linear_probe.json").read_text())
    rows["data"] = {"name": "digits", "classes": ["3", "7"]}
    (encoder_run / "eval" / "linear_probe.json").write_text(json.dumps(rows))
    page, _ = report(encoder_run, map_method="pca")
    assert "encoded: digits/test, 359 of 359" in page.words
    assert "3 7 other classes, or unlabeled" in page.words
    (picture,) = [a["xlink:href"] for tag, a in page.elements if tag == "image"]
    colors = Image.open(BytesIO(base64.b64decode(picture.split(",")[1]))).convert("RGBA")
    pixels = np.asarray(colors).reshape(-1, 4)
    gray = (pixels[:, :3] == (0x90, 0x99, 0xA5)).all(1) & (pixels[:, 3] > 100)
    blue = (pixels[:, :3] == (0x1F, 0x77, 0xB4)).all(1) & (pixels[:, 3] > 100)
    assert gray.sum() > blue.sum() > 0


def test_map_never_downloads(encoder_run, tmp_path):
    data = {"name": "cifar10", "root": str(tmp_path / "none"), "download": True}
    row_of = row("linear_probe", "linear", "top1", 0.5, 0.1)
    write_rows(encoder_run / "eval" / "linear_probe.json", [row_of], {"data": data})
    page, _ = report(encoder_run, map_method="pca")
    assert "no map, cifar10 is not in" in page.words
    assert not (tmp_path / "none").exists()


def test_hostile_class_folders_in_the_map(encoder_run, tmp_path):
    for name in ("<img src=x onerror=alert(1)>", "$\\frac$"):
        for split in ("train", "test"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (16, 16), (i * 40, 10, 10)).save(tmp_path / "images" / split / name / f"{i}.png")
    (encoder_run / "config.yaml").write_text(
        yaml.safe_dump({"data": {"name": "folder", "root": str(tmp_path / "images")}})
    )
    write_rows(encoder_run / "eval" / "linear_probe.json", [row("linear_probe", "linear", "top1", 0.5, 0.1)])
    page, _ = report(encoder_run, map_method="pca")
    assert_inert(page)
    assert "<img src=x onerror=alert(1)>" in page.words
