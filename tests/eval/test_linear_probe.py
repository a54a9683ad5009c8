from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest
from sklearn.neighbors import KNeighborsClassifier
from support import SIZE, add_projector, load_script, make_run, only, records, write_images

from ssl_gradmix.data.datasets import load
from ssl_gradmix.evaluation import rows
from ssl_gradmix.evaluation.encoders import load_encoder
from ssl_gradmix.evaluation.features import extract
from ssl_gradmix.settings import Data

main = load_script("eval/linear_probe.py").main


def evaluate(run: Path, arguments: str = "", folder: Path | None = None):
    """Rows, and what else the file says."""
    given = [str(run), "--epochs", "1", *arguments.split()]
    assert main([*given, "--out", str(folder)] if folder else given) == 0
    return rows.read((folder or run / "eval") / "linear_probe.json")


def classes_of(found) -> set[str]:
    return set(rows.param(found[found["metric"] == "class_accuracy"], "class"))


def test_everything_on_digits(run, capsys):
    found, about = evaluate(run, "--epochs 6 --k 7 --label_fractions [0.1] --cache false")
    test = load(Data(), "test")
    for name, value in (("task", "linear_probe"), ("dataset", "digits"), ("split", "test"), ("encoder", "mine")):
        assert set(found[name]) == {value}
    overall = records(found[found["metric"] != "class_accuracy"])
    assert [(row["score"], row["metric"]) for row in overall] == [
        *[("linear", "top1"), ("linear", "top5")] * 2,
        ("knn", "top1"),
    ]
    for row in overall:
        interval = binomtest(round(row["value"] * row["n"]), row["n"]).proportion_ci(0.95, method="wilson")
        assert row["n"] == len(test)
        assert (row["ci_low"], row["ci_high"]) == pytest.approx((interval.low, interval.high), abs=1e-9)
        assert row["ci_low"] > (0.2 if row["metric"] == "top1" else 0.6)  # chance is 0.1 and 0.5
    assert overall[2]["params"]["labels"] == 143

    by_class = found[found["metric"] == "class_accuracy"]
    assert rows.param(by_class, "class").tolist() == list("0123456789")
    assert by_class["n"].tolist() == np.bincount(test.labels).tolist()
    linear = overall[0]
    assert (by_class["value"] * by_class["n"]).sum() == pytest.approx(linear["value"] * linear["n"], abs=1e-6)
    rate = linear["params"]["learning_rate"]
    assert about["validation"][f"{rate:g}"] == min(about["validation"].values())
    assert about["data"] == asdict(Data(size=SIZE))
    assert about["encoder"]["fingerprint"] == load_encoder(run).fingerprint

    with Image.open(run / "eval" / "linear_probe.png") as picture:
        assert min(picture.size) > 300
    assert sorted(path.name for path in (run / "eval").iterdir()) == ["linear_probe.json", "linear_probe.png"]
    printed = capsys.readouterr().out
    assert "mine on digits/test, trained on 1438 labeled images" in printed
    assert re.search(rf"^knn +top1 +{overall[-1]['value']:.4f} ", printed, re.MULTILINE)
    assert ("at an end of the grid" in printed) == (rate in (0.01, 30))


@pytest.mark.parametrize("feature", ["backbone", "projector"])
def test_knn_equals_scikit_learn_on_either_feature(run, capsys, feature):
    evaluate(add_projector(run))
    of_backbone = (run / "eval" / "linear_probe.json").read_bytes()
    folder = run / "eval" if feature == "backbone" else run / "eval" / "projector"
    assert main([str(run), "--epochs", "1", "--feature", feature]) == 0
    assert (run / "eval" / "linear_probe.json").read_bytes() == of_backbone
    assert len(list((run / "eval" / "features").iterdir())) == (2 if feature == "backbone" else 4)
    found, about = rows.read(folder / "linear_probe.json")
    assert set(found["feature"]) == {about["encoder"]["feature"]} == {feature}
    assert f"mine{'' if feature == 'backbone' else ' (projector)'} on digits/test" in capsys.readouterr().out

    encoder = load_encoder(run, feature=feature)
    (bank, labels), (features, targets) = (extract(encoder, load(Data(), split)) for split in ("train", "test"))
    assert bank.shape[1] == (32 if feature == "backbone" else 12)
    oracle = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07))
    expected = oracle.fit(bank.double(), labels).score(features.double(), targets)
    value = only(found, "knn", "top1", k=20, temperature=0.07)["value"]
    assert value == pytest.approx(expected, abs=1.5 / len(targets))


def test_a_run_is_evaluated_on_its_own_classes_unless_told(tmp_path):
    run = make_run(tmp_path / "known", classes=["3", "7"])
    found, about = evaluate(run)
    assert classes_of(found) == {"3", "7"}
    assert "top5" not in set(found["metric"])
    assert about["data"]["classes"] == ["3", "7"]

    found, about = evaluate(run, "--data.open_set random:4:0", tmp_path / "out")
    assert len(classes_of(found)) == 4
    assert (about["data"]["classes"], about["data"]["open_set"]) == (None, "random:4:0")


def test_what_was_measured_before_stays(run):
    first = records(evaluate(run)[0])
    evaluate(run, "--k 3")
    found, about = evaluate(run, "--data.classes [1,2,8] --label_fractions [0.5]")
    assert all(row in records(found) for row in first)
    assert only(found, "knn", "top1", k=3, classes=None)["n"] == 359
    assert only(found, "knn", "top1", classes="1, 2, 8")["n"] == np.isin(load(Data(), "test").labels, [1, 2, 8]).sum()
    assert about["images"].keys() == {
        *("digits/train", "digits/test", "digits/train of 1, 2, 8", "digits/test of 1, 2, 8")
    }


def test_another_encoder_on_a_folder(run, tmp_path):
    for part, count in (("train", 12), ("test", 6)):
        write_images(tmp_path / "images" / part, ["red", "green"], count, size=20)
    data = f"--data.name folder --data.root {tmp_path / 'images'} --epochs 20"
    found, about = evaluate(f"local-dir:{run / 'backbone'}", data, tmp_path / "out")
    assert only(found, "linear", "top1")["value"] == only(found, "knn", "top1", k=20)["value"] == 1
    assert set(found["dataset"]) == {"folder:images"}
    assert about["data"]["size"] == SIZE
    _, about = evaluate(run, data, tmp_path / "out")  # the settings of the run's digits do not leak in
    assert about["data"]["root"] == str(tmp_path / "images")


def test_options_may_come_from_a_file(run, tmp_path):
    (tmp_path / "options.yaml").write_text("k: 3\ndata:\n  classes: [1, 2, 8]\n")
    found, _ = evaluate(run, f"--config {tmp_path / 'options.yaml'}")
    assert only(found, "knn", "top1")["params"]["k"] == 3
    assert classes_of(found) == {"1", "2", "8"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.classes", "[ten]"], "data.classes has 'ten'"),
        (["--data.classes", "[4]"], r"digits/train must have .* at least two classes, got \['4'\]"),
        (["--data.name", "mnist", "--data.root", "{run}"], "mnist is not in data.root"),
        (["--k", "0"], "k must be at least 1, got 0"),
        (["--lables", "3"], "unrecognized arguments: --lables 3"),
    ],
)
def test_bad_input_is_one_line(run, capsys, arguments, message):
    assert main([str(run), *(argument.format(run=run) for argument in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"error: .*{message}", line)
    assert not list(run.glob("eval/linear_probe*"))
