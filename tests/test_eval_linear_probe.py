from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from sklearn.neighbors import KNeighborsClassifier
from ssl_gradmix.evaluation.results import read_rows
from support import SIZE, add_projector, help_of, load_script, make_run

from ssl_gradmix.data.datasets import load
from ssl_gradmix.evaluation.encoders import load_encoder
from ssl_gradmix.evaluation.features import extract
from ssl_gradmix.settings import Data

SCRIPT = Path(__file__).parents[1] / "eval" / "linear_probe.py"


main = load_script("eval/linear_probe.py").main


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "runs" / "mine")


def value_of(rows, score, metric="top1", **params) -> float:
    (row,) = [
        row for row in rows if (row.score, row.metric) == (score, metric) and params.items() <= row.params.items()
    ]
    return row.value


def test_everything_on_digits(run, capsys):
    arguments = "--epochs 6 --k 7 --label_fractions [0.1] --logistic true --augment true --cache false"
    assert main([str(run), *arguments.split()]) == 0
    rows, extra = read_rows(run / "eval" / "linear_probe.json")

    test = load(Data(), "test")
    assert {(row.task, row.dataset, row.split, row.encoder, row.feature) for row in rows} == {
        ("linear_probe", "digits", "test", "mine", "backbone")
    }
    overall = [row for row in rows if row.metric != "class_accuracy"]
    assert [(row.score, row.metric) for row in overall] == [
        *[("linear", "top1"), ("linear", "top5")] * 2,
        *[("linear_augmented", "top1"), ("linear_augmented", "top5")],
        *[("logistic_regression", "top1"), ("logistic_regression", "top5")],
        ("knn", "top1"),
    ]
    for row in overall:
        interval = binomtest(round(row.value * row.n), row.n).proportion_ci(0.95, method="wilson")
        assert row.n == len(test)
        assert (row.ci_low, row.ci_high) == pytest.approx((interval.low, interval.high), abs=1e-9)
        assert row.ci_low > (0.2 if row.metric == "top1" else 0.6)  # chance is 0.1 and 0.5

    by_class = [row for row in rows if row.metric == "class_accuracy"]
    assert [row.params["class"] for row in by_class] == list("0123456789")
    assert [row.n for row in by_class] == np.bincount(test.labels).tolist()
    linear = overall[0]
    assert sum(row.value * row.n for row in by_class) == pytest.approx(linear.value * linear.n, abs=1e-6)
    assert extra["validation"][f"{linear.params['learning_rate']:g}"] == max(extra["validation"].values())
    assert overall[2].params["labels"] == 143

    assert extra["data"] == asdict(Data(size=SIZE))
    assert extra["encoder"]["fingerprint"] == load_encoder(run).fingerprint
    with Image.open(run / "eval" / "linear_probe.png") as picture:
        assert min(picture.size) > 300
    assert sorted(path.name for path in (run / "eval").iterdir()) == ["linear_probe.json", "linear_probe.png"]
    printed = capsys.readouterr().out
    assert "mine on digits/test, trained on 1438 labeled images" in printed
    assert f"knn                  top1    {value_of(rows, 'knn'):.4f}" in printed


def test_knn_equals_scikit_learn_and_features_are_kept(run):
    assert main([str(run), "--epochs", "1"]) == 0
    rows, _ = read_rows(run / "eval" / "linear_probe.json")
    assert len(list((run / "eval" / "features").iterdir())) == 2
    encoder = load_encoder(run)
    (bank, labels), (features, targets) = (extract(encoder, load(Data(), split)) for split in ("train", "test"))
    oracle = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07))
    expected = oracle.fit(bank.double(), labels).score(features.double(), targets)
    assert value_of(rows, "knn", k=20, temperature=0.07) == pytest.approx(expected, abs=1.5 / len(targets))


def test_projector_features_stand_beside_those_of_the_backbone(run, capsys):
    add_projector(run)
    assert main([str(run), "--epochs", "1"]) == 0
    of_backbone = (run / "eval" / "linear_probe.json").read_bytes()
    assert main([str(run), "--epochs", "1", "--feature", "projector"]) == 0
    assert (run / "eval" / "linear_probe.json").read_bytes() == of_backbone
    rows, extra = read_rows(run / "eval" / "projector" / "linear_probe.json")
    assert {(row.encoder, row.feature) for row in rows} == {("mine", "projector")}
    assert extra["encoder"]["feature"] == "projector"
    assert len(list((run / "eval" / "features").iterdir())) == 4
    assert sorted(path.name for path in (run / "eval" / "projector").iterdir()) == [
        "linear_probe.json",
        "linear_probe.png",
    ]
    assert "mine (projector) on digits/test" in capsys.readouterr().out

    encoder = load_encoder(run, feature="projector")
    (bank, labels), (features, targets) = (extract(encoder, load(Data(), split)) for split in ("train", "test"))
    assert bank.shape[1] == 12
    oracle = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07))
    expected = oracle.fit(bank.double(), labels).score(features.double(), targets)
    assert value_of(rows, "knn") == pytest.approx(expected, abs=1.5 / len(targets))


def test_a_run_is_evaluated_on_its_own_classes_unless_told(tmp_path):
    run = make_run(tmp_path / "known", classes=["3", "7"])
    assert main([str(run), "--epochs", "1"]) == 0
    rows, extra = read_rows(run / "eval" / "linear_probe.json")
    assert {row.params["class"] for row in rows if row.metric == "class_accuracy"} == {"3", "7"}
    assert not [row for row in rows if row.metric == "top5"]
    assert [str(name) for name in extra["data"]["classes"]] == ["3", "7"]

    assert main([str(run), "--epochs", "1", "--data.open_set", "random:4:0", "--out", str(tmp_path / "out")]) == 0
    rows, extra = read_rows(tmp_path / "out" / "linear_probe.json")
    assert len([row for row in rows if row.metric == "class_accuracy"]) == 4
    assert (extra["data"]["classes"], extra["data"]["open_set"]) == (None, "random:4:0")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Noise of two colors, in class folders."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for channel, name in enumerate(("red", "green")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (20, 24, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i}.png")
    return tmp_path / "images"


def test_another_encoder_on_a_folder(run, folder, tmp_path):
    data = f"--data.name folder --data.root {folder} --out {tmp_path / 'out'} --epochs 20"
    assert main([f"local-dir:{run / 'backbone'}", *data.split()]) == 0
    rows, extra = read_rows(tmp_path / "out" / "linear_probe.json")
    assert value_of(rows, "linear") == 1
    assert value_of(rows, "knn", k=20) == 1
    assert {row.dataset for row in rows} == {"folder:images"}
    assert extra["data"]["size"] == SIZE

    assert main([str(run), *data.split()]) == 0  # the settings of the run's digits do not leak in
    assert read_rows(tmp_path / "out" / "linear_probe.json")[1]["data"]["root"] == str(folder)


def test_options_may_come_from_a_file(run, tmp_path):
    (tmp_path / "options.yaml").write_text("k: 3\nepochs: 1\ndata:\n  classes: [1, 2, 8]\n")
    assert main([str(run), "--config", str(tmp_path / "options.yaml")]) == 0
    rows, _ = read_rows(run / "eval" / "linear_probe.json")
    assert value_of(rows, "knn", k=3) > 0
    assert {row.params["class"] for row in rows if row.metric == "class_accuracy"} == {"1", "2", "8"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}/nowhere"], "no run folder"),
        (["{run}/.."], "is no run: it has no config.yaml"),
        (["local-dir:{run}/backbone"], "has no folder for results: give one with --out"),
        (["{run}", "--feature", "projector"], "the run .*mine has no projector: .*projector.safetensors is missing"),
        (["local-dir:{run}/backbone", "--feature", "projector"], "feature projector needs a run"),
        (["{run}", "--feature", "logits"], "feature must be one of 'backbone', 'projector', got logits"),
        (["timm:resnet1o", "--out", "{run}/eval"], "knows no model 'resnet1o'"),
        (["{run}", "--data.name", "cifar11"], "data.name must be one of .*, got cifar11"),
        (["{run}", "--data.size", "2"], "data.size must be at least 8 and at most 4096, got 2"),
        (["{run}", "--data.classes", "[ten]"], "data.classes has 'ten'"),
        (["{run}", "--data.classes", "[4]"], r"digits/train must have .* at least two classes, got \['4'\]"),
        (["{run}", "--data.name", "mnist", "--data.root", "{run}"], "mnist is not in data.root"),
        (["{run}", "--data.name", "folder", "--data.root", "{run}/x"], "data.root '.*x' is not a folder"),
        (["{run}", "--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["{run}", "--k", "0"], "k must be at least 1, got 0"),
        (["{run}", "--temperature", "-1"], "temperature must be above 0"),
        (["{run}", "--label_fractions", "[0.1, 2]"], r"fraction must be above 0 and at most 1, got 2"),
        (["{run}", "--epochs", "many"], "epochs must be a whole number, got many"),
        (["{run}", "--lables", "3"], "unrecognized arguments: --lables 3"),
        ([], "the following arguments are required: encoder"),
    ],
)
def test_bad_input_is_one_line(run, capsys, arguments, message):
    assert main([argument.format(run=run) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"error: .*{message}", line)
    assert not list(run.glob("eval/linear_probe*"))


@pytest.mark.parametrize("script", ["linear_probe", "osr", "corruption"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "the run .*mine has no backbone yet: .*model.safetensors is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "model.safetensors is damaged: "),
        (lambda path: torch.save({}, path), "model.safetensors is a pickled checkpoint, .* convert it:"),
    ],
)
def test_a_backbone_that_cannot_be_read(run, capsys, script, damage, message):
    damage(run / "backbone" / "model.safetensors")
    before = sorted(run.rglob("*"))
    assert load_script(f"eval/{script}.py").main([str(run)]) == 2
    first, *how_to_convert = capsys.readouterr().err.splitlines()
    assert re.search(f"^error: .*{message}", first)
    assert bool(how_to_convert) == ("pickled" in message)
    assert sorted(run.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_what_one_gives(run, tmp_path):
    assert main([str(run), "--epochs", "2", "--out", str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    done = subprocess.run(
        [*launch, str(run), "--epochs", "2", "--out", str(tmp_path / "two")],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("trained on 1438 labeled images") == 1
    for one, two in zip(*(read_rows(tmp_path / name / "linear_probe.json")[0] for name in ("one", "two")), strict=True):
        assert (two.score, two.metric, two.n) == (one.score, one.metric, one.n)
        assert two.value == pytest.approx(one.value, abs=2 / one.n)  # sums of other batches round differently


def test_help_teaches_and_comes_before_heavy_imports():
    text = help_of("eval/linear_probe.py")
    assert "python eval/linear_probe.py runs/x" in text
    for option in ("encoder ", "--data.name", "--label_fractions", "--augment", "--out"):
        assert option in text
