from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from support import add_projector, help_of, load_script, make_run

from ssl_gradmix.data.datasets import load
from ssl_gradmix.data.open_set import split
from ssl_gradmix.evaluation.encoders import load_encoder
from ssl_gradmix.evaluation.features import extract
from ssl_gradmix.evaluation.probes import linear_probe
from ssl_gradmix.evaluation.results import read_rows
from ssl_gradmix.settings import Data

SCRIPT = Path(__file__).parents[1] / "eval" / "osr.py"
QUICK = ["--epochs", "3"]


main = load_script("eval/osr.py").main


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "runs" / "mine")


def value_of(rows, score, metric, trial=None, **params) -> float:
    (row,) = [
        row
        for row in rows
        if (row.score, row.metric, row.trial) == (score, metric, trial) and params.items() <= row.params.items()
    ]
    return row.value


def write_images(folder: Path, classes: list[str], count: int, size: int = 8) -> None:
    """Noise around a color of each class."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        color = rng.integers(0, 200, 3)
        for i in range(count):
            pixels = (color + rng.integers(0, 55, (size, size, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def test_trials_on_digits(run, capsys):
    assert main([str(run), "--trials", "[0, 3]", "--k", "7", *QUICK]) == 0
    rows, extra = read_rows(run / "eval" / "osr.json")
    samples = load_file(run / "eval" / "osr_samples.safetensors")

    # From scratch, the first trial: what the known classes' training images alone say about all test images.
    known = sorted(np.random.default_rng(0).permutation(10)[:6].tolist())
    encoder = load_encoder(run)
    (train, labels), (test, test_labels) = (extract(encoder, load(Data(), part)) for part in ("train", "test"))
    train, labels = train[np.isin(labels, known)], labels[np.isin(labels, known)]
    order = np.argsort(~np.isin(test_labels, known), kind="stable")
    test, test_labels = test[order], test_labels[order]
    is_known = np.isin(test_labels, known)
    assert samples["trial0/labels"].tolist() == test_labels.tolist()
    assert samples["trial0/is_known"].tolist() == is_known.tolist()
    unit = [each.double() / each.double().norm(dim=1, keepdim=True) for each in (train, test)]
    distance = NearestNeighbors(n_neighbors=7).fit(unit[0]).kneighbors(unit[1])[0][:, -1]
    np.testing.assert_allclose(samples["trial0/knn_distance"], -distance, atol=1e-5)
    expected = roc_auc_score(is_known, -distance)
    assert value_of(rows, "knn_distance", "auroc", 0, k=7) == pytest.approx(expected, abs=1e-3)
    probe = linear_probe(train, labels, epochs=3)
    correct = is_known & (probe.predict(test) == test_labels).numpy()
    assert samples["trial0/correct"].tolist() == correct.tolist()
    assert value_of(rows, "linear", "accuracy", 0) == pytest.approx(correct.sum() / is_known.sum())

    of_trials = [row for row in rows if row.trial is not None]
    means = [row for row in rows if row.trial is None]
    assert len(of_trials) == 2 * (2 + 12 * 7)
    assert len(means) == 2 + 12 * 6
    for row in rows:
        assert (row.task, row.dataset, row.split, row.encoder, row.feature) == (
            "osr",
            "digits",
            "test",
            "mine",
            "backbone",
        )
        setting = {"protocol": "random", "pretraining": "all classes, unlabeled", "n_known": 6}
        assert setting.items() <= row.params.items()
    for row in means:
        values = [value_of(of_trials, row.score, row.metric, trial) for trial in (0, 3)]
        assert row.value == pytest.approx(np.mean(values))
        assert row.params["std"] == pytest.approx(abs(values[0] - values[1]) / np.sqrt(2))
        assert row.params["trials"] == [0, 3]

    assert [group["name"] for group in extra["groups"]] == ["trial0", "trial3"]
    assert extra["groups"][0]["known"] == known
    assert extra["encoder"]["fingerprint"] == encoder.fingerprint
    assert extra["settings"] == {"k": 7, "top_k": None, "epochs": 3, "seed": 0}
    with Image.open(run / "eval" / "osr.png") as picture:
        assert min(picture.size) > 600
    printed = capsys.readouterr().out
    assert "mine on digits/test, encoder pretrained on: all classes, unlabeled" in printed
    assert f"trial0: known are {', '.join(map(str, known))}; unknown ones from digits/test" in printed
    mean = next(row for row in means if (row.score, row.metric) == ("vim", "auroc"))
    assert re.search(rf"^vim +{mean.value:.4f} ± {mean.params['std']:.4f} ", printed, re.MULTILINE)
    assert "over trials [0, 3]" in printed


def test_a_run_of_known_classes_is_evaluated_on_its_own_trial(tmp_path, capsys):
    run = make_run(tmp_path / "known", open_set="random:4:2")
    assert main([str(run), *QUICK]) == 0
    rows, extra = read_rows(run / "eval" / "osr.json")
    assert {(row.trial, row.params["pretraining"], row.params["n_known"]) for row in rows} == {
        (2, "known classes only", 4)
    }
    assert set(extra["groups"][0]["known"]) == set(np.random.default_rng(2).permutation(10)[:4].tolist())
    features = sorted(path.name for path in (run / "eval" / "features").iterdir())
    assert len(features) == 2

    written = (run / "eval" / "osr.json").read_bytes()
    assert main([str(run), "--trials", "[2, 1]", *QUICK]) == 2
    assert "was pretrained on the classes" in capsys.readouterr().err
    assert (run / "eval" / "osr.json").read_bytes() == written


def test_classes_of_the_users_own_choice(tmp_path):
    run = make_run(tmp_path / "odd", classes=[1, 3, 5, 7, 9])
    assert main([str(run), *QUICK]) == 0
    rows, extra = read_rows(run / "eval" / "osr.json")
    assert {(row.trial, row.params["protocol"], row.params["pretraining"]) for row in rows} == {
        (0, "data.classes", "known classes only")
    }
    assert extra["groups"][0]["unknown"] == [0, 2, 4, 6, 8]


def test_repeated_trials_are_warned_of_and_not_averaged(run, capsys):
    assert main([str(run), "--protocol", "svhn", "--trials", "[0, 1, 4]", *QUICK]) == 0
    printed = capsys.readouterr()
    assert "Warning: trial1 repeats known classes, so means and figure are of trial0, trial4" in printed.out
    assert "UserWarning" not in printed.err
    rows, _ = read_rows(run / "eval" / "osr.json")
    assert {row.trial for row in rows} == {0, 1, 4, None}
    assert value_of(rows, "vim", "auroc", 0) == value_of(rows, "vim", "auroc", 1)
    values = [value_of(rows, "vim", "auroc", trial) for trial in (0, 4)]
    assert value_of(rows, "vim", "auroc") == pytest.approx(np.mean(values))


def test_cifar_plus_n_takes_unknown_classes_from_another_folder(run, tmp_path):
    ten, hundred = tmp_path / "ten", tmp_path / "hundred"
    for part in ("train", "test"):
        write_images(ten / part, [f"class{i}" for i in range(10)], count=4)
        write_images(hundred / part, [f"class{i:02}" for i in range(100)], count=2)
    data = f"--data.name folder --data.root {ten} --unknown.name folder --unknown.root {hundred}"
    protocol = ["--protocol", "cifar+10", "--trials", "[4]", "--out", str(tmp_path / "out")]
    assert main([str(run), *data.split(), *protocol, *QUICK]) == 0
    samples = load_file(tmp_path / "out" / "osr_samples.safetensors")
    known, unknown = split("cifar+10", 4)
    labels, is_known = samples["trial4/labels"], samples["trial4/is_known"].astype(bool)
    assert sorted(labels[is_known]) == sorted(known * 4)
    assert sorted(labels[~is_known]) == sorted(unknown * 2)
    rows, _ = read_rows(tmp_path / "out" / "osr.json")
    for row in rows:
        assert (row.dataset, row.params["unknown"]) == ("folder:ten", "folder:hundred/test")
        assert row.params["pretraining"] == "other data (digits)"


def test_other_data_sets(run, tmp_path, capsys):
    write_images(tmp_path / "noise", ["one", "two"], count=6)
    write_images(tmp_path, ["plain"], count=5)
    sets = [{"name": "folder", "root": str(tmp_path / name)} for name in ("noise", "plain")]
    assert main([str(run), "--unknown", json.dumps(sets), *QUICK]) == 0
    rows, extra = read_rows(run / "eval" / "ood.json")
    samples = load_file(run / "eval" / "ood_samples.safetensors")
    n_known = len(load(Data(), "test"))
    for name, count in (("folder:noise", 12), ("folder:plain", 5)):
        is_known = samples[f"{name}/is_known"].astype(bool)
        assert (is_known.sum(), (~is_known).sum()) == (n_known, count)
        (row,) = [row for row in rows if (row.dataset, row.score, row.metric) == (name, "mahalanobis", "auroc")]
        assert row.value == pytest.approx(roc_auc_score(is_known, samples[f"{name}/mahalanobis"]), abs=1e-9)
        assert (row.task, row.trial, row.split, row.n) == ("ood", None, "all", n_known + count)
        assert row.params == {"known": "digits/test", "pretraining": "known classes only", "n_known": 10}
    accuracies = [row for row in rows if row.metric == "accuracy"]
    assert [(row.score, row.dataset, row.n) for row in accuracies] == [
        ("linear", "digits", n_known),
        ("knn", "digits", n_known),
    ]
    assert [group["unknown_from"] for group in extra["groups"]] == ["folder:noise/all", "folder:plain/all"]
    assert sorted(path.name for path in (run / "eval").glob("o*")) == ["ood.json", "ood.png", "ood_samples.safetensors"]
    assert "folder:plain, with 95% intervals" in capsys.readouterr().out


def test_two_runs_compare_on_the_same_samples(run, tmp_path, capsys):
    other = make_run(tmp_path / "runs" / "other", seed=1)
    arguments = ["--trials", "[0, 1]", *QUICK]
    assert main([str(other), *arguments]) == 0
    theirs, _ = read_rows(other / "eval" / "osr.json")
    assert main([str(run), "--trials", "[0, 1, 2]", *QUICK, "--compare", str(other)]) == 0
    rows, _ = read_rows(run / "eval" / "osr.json")
    differences = [
        row for row in rows if row.metric in ("auroc_difference", "oscr_difference") and row.trial is not None
    ]
    assert len(differences) == 2 * 12 * 2
    for row in differences:
        metric = row.metric.removesuffix("_difference")
        expected = value_of(rows, row.score, metric, row.trial) - value_of(theirs, row.score, metric, row.trial)
        assert row.value == pytest.approx(expected, abs=1e-9)
        assert row.ci_low <= row.value <= row.ci_high
        assert 0 < row.params["p_value"] <= 1
        assert row.params["compared_with"] == "other"
    mean = next(row for row in rows if row.trial is None and row.metric == "auroc_difference")
    assert mean.params["trials"] == [0, 1]
    assert "p_value" not in mean.params
    assert "this run minus the other, mean ± standard deviation over trials [0, 1]" in capsys.readouterr().out

    assert main([str(run), "--trials", "[1, 2]", *QUICK, "--compare", str(other)]) == 0
    rows, _ = read_rows(run / "eval" / "osr.json")
    assert {row.trial for row in rows if row.metric == "oscr_difference"} == {1}
    assert "this run minus the other, with 95% intervals" in capsys.readouterr().out

    for arguments, message in (
        (["--trials", "[4]"], "other has other samples: it was evaluated on trial0, trial1, not trial4"),
        (["--n_known", "3"], "other has other samples: the images of trial0, trial1 differ"),
        (["--k", "3"], "other was scored with"),
    ):
        assert main([str(run), "--out", str(tmp_path / "out"), *QUICK, *arguments, "--compare", str(other)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_projectors_compare_with_projectors(run, tmp_path, capsys):
    other = add_projector(make_run(tmp_path / "runs" / "other", seed=1))
    arguments = ["--trials", "[0]", *QUICK]
    assert main([str(other), *arguments]) == 0
    of_projector = [str(add_projector(run)), *arguments, "--feature", "projector", "--compare", str(other)]
    assert main(of_projector) == 2
    assert "there is no" in capsys.readouterr().err
    assert not (run / "eval").exists()

    assert main([str(other), *arguments, "--feature", "projector"]) == 0
    assert main(of_projector) == 0
    rows, _ = read_rows(run / "eval" / "projector" / "osr.json")
    theirs, _ = read_rows(other / "eval" / "projector" / "osr.json")
    assert {row.feature for row in rows + theirs} == {"projector"}
    expected = value_of(rows, "vim", "auroc", 0) - value_of(theirs, "vim", "auroc", 0)
    assert value_of(rows, "vim", "auroc_difference", 0) == pytest.approx(expected, abs=1e-9)
    assert "mine (projector) on digits/test" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol", "cifar10"], "the split does not fit: digits does not number its classes as cifar10 does"),
        (["--protocol", "cifar11"], "cifar11"),
        (["--n_known", "1"], "at least 2 and 1 are needed"),
        (["--n_known", "10"], "n_known must be at least 1 and below n_classes=10, got 10"),
        (["--trials", "[0, 0]"], "none twice"),
        (["--data.classes", "[4]"], "trial 0 has 1 known and 9 unknown"),
        (["--data.classes", "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]"], "10 known and 0 unknown"),
        (["--data.classes", "[0, 12]"], "data.classes has 12"),
        (["--data.open_set", "cifar10"], "data.open_set must be like 'cifar10:2'"),
        (["--k", "5000"], r"k must be from 1 to \d+, the training images of all known classes, got 5000"),
        (["--top_k", "150"], r"top_k must be from 1 to \d+, those of the smallest known class, got 150"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--unknown.name", "digits"], "unknown: digits/test has images of the known classes"),
        (["--unknown.name", "mnist", "--unknown.root", "{run}"], "unknown: mnist is not in data.root"),
        (["--unknown.name", "folder", "--unknown.root", "{empty}"], "unknown: no image in the folder '.*empty'"),
        (
            ["--unknown.name", "folder", "--unknown.root", "x", "--protocol", "random"],
            "unknown goes with protocol cifar",
        ),
        (["--compare", "{run}"], "there is no .*/eval/osr_samples.safetensors: evaluate that run in the same"),
        (["--data.name", "folder", "--data.root", "{flat}"], "has no labels"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, arguments, message):
    write_images(tmp_path, ["flat"], count=3)
    (tmp_path / "empty").mkdir()
    filled = [argument.format(run=run, flat=tmp_path / "flat", empty=tmp_path / "empty") for argument in arguments]
    assert main([str(run), *filled]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^error: .*{message}", line)
    assert not [path for path in run.glob("eval/*") if path.name != "features"]


def test_damaged_samples_of_the_other_run_are_refused(run, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "osr_samples.safetensors").write_bytes(b"\x80\x02 no tensors")
    assert main([str(run), *QUICK, "--compare", str(other)]) == 2
    assert "osr_samples.safetensors is no file of open-set samples, or damaged" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_what_one_gives(run, tmp_path):
    arguments = [str(run), "--trials", "[1]", *QUICK]
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    done = subprocess.run(
        [*launch, *arguments, "--out", str(tmp_path / "two")],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("Written:") == 1
    for one, two in zip(*(read_rows(tmp_path / name / "osr.json")[0] for name in ("one", "two")), strict=True):
        assert (two.score, two.metric, two.n) == (one.score, one.metric, one.n)
        assert two.value == pytest.approx(one.value, abs=5e-3)  # sums of other batches round differently


def test_help_teaches_and_comes_before_heavy_imports():
    text = help_of("eval/osr.py")
    assert "python eval/osr.py runs/x" in text
    for option in ("encoder ", "--protocol", "--trials", "--unknown", "--compare", "--out"):
        assert option in text
