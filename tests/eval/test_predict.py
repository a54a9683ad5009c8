from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from support import load_script, make_run, only, write_images

from ssl_gradmix.data.datasets import Data, load
from ssl_gradmix.evaluation import results
from ssl_gradmix.evaluation.detection import threshold
from ssl_gradmix.evaluation.encoders import load_encoder
from ssl_gradmix.evaluation.features import extract
from ssl_gradmix.evaluation.probes import held_out_parts, linear_probe

main = load_script("eval/predict.py").main


@pytest.fixture
def new(tmp_path):
    """A folder without classes: 60 test images of digits, and 5 of noise."""
    (tmp_path / "new").mkdir()
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)
    for i, image in enumerate([*load(Data(), "test").images[:60], *noise]):
        Image.fromarray(image).save(tmp_path / "new" / f"{i:02}.png")
    return tmp_path / "new"


def test_predictions_equal_independent_ones(run, new):
    main([str(run), "--data.root", str(new), "--epochs", "5", "--score", "max_logit"])
    lines = pd.read_csv(run / "eval" / "predict-new.csv")
    assert list(lines) == ["path", "prediction", "score", "decision"]
    assert lines["path"].tolist() == sorted(map(str, new.iterdir()))
    bank, labels = extract(load_encoder(run), load(Data(), "train"))
    features, _ = extract(load_encoder(run), load(Data("folder", str(new)), "all"))
    probe = linear_probe(bank, labels, epochs=5)
    logits = probe.logits(features)
    assert lines["prediction"].tolist() == logits.argmax(1).tolist()
    np.testing.assert_allclose(lines["score"], logits.amax(1), rtol=1e-5)

    rest, held_out = next(held_out_parts(labels))
    part = linear_probe(bank[rest], labels[rest], [probe.learning_rate], epochs=5)
    reached = part.logits(bank[held_out]).amax(1).numpy()
    rows, about = results.read(run / "eval" / "predict-new.json")
    row = only(rows, "max_logit", "threshold_tpr95")
    assert row["n"] > len(held_out)  # fewer than 500, so further parts follow
    assert abs(row["value"] - threshold(reached)) < reached.std()
    is_known = lines["score"] >= row["value"]
    assert (lines["decision"] == "known").tolist() == is_known.tolist()
    assert only(rows, "max_logit", "accepted")["value"] == pytest.approx(is_known.mean())
    assert set(about["images"]) == {"digits/train", "folder:new/all"}
    with Image.open(run / "eval" / "predict-new.png") as picture:
        assert min(picture.size) > 300


def test_noise_is_less_known_than_digits(run, new):
    main([str(run), "--data.root", str(new), "--epochs", "5", "--tpr", "0.5"])
    scores = pd.read_csv(run / "eval" / "predict-new.csv")["score"]
    assert scores[60:].max() < scores[:60].median()
    rows, _ = results.read(run / "eval" / "predict-new.json")
    assert only(rows, "top_k_cosine", "threshold_tpr50")["n"] >= 500


@pytest.mark.parametrize("foreign", [False, True])
def test_known_classes_of_a_folder(tmp_path, new, foreign):
    """Of a run that was trained on other images, or of an encoder that is not a run."""
    run = make_run(tmp_path / "run")
    write_images(tmp_path / "pets" / "train", ["cat", "dog"], count=9)
    encoder = f"local-dir:{run / 'backbone'}" if foreign else str(run)
    known = ["--known.name", "folder", "--known.root", str(tmp_path / "pets")]
    out = tmp_path / "out"
    main([encoder, "--data.root", str(new), "--epochs", "5", *known, "--out", str(out)])
    lines = pd.read_csv(out / "predict-new.csv")
    assert set(lines["prediction"]) <= {"cat", "dog"}
    assert len(lines) == 65
