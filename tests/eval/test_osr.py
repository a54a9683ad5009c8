from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from support import load_script, make_run, only, records

from ssl_gradmix import cli
from ssl_gradmix.data.datasets import Data, ImageSet, load
from ssl_gradmix.data.open_set import ALL_CLASSES, KNOWN_ONLY, trials
from ssl_gradmix.evaluation import results
from ssl_gradmix.evaluation.encoders import load_encoder
from ssl_gradmix.evaluation.features import extract
from ssl_gradmix.evaluation.intervals import Interval
from ssl_gradmix.evaluation.probes import linear_probe

osr = load_script("eval/osr.py")
TEN = tuple("0123456789")


def evaluate(run, *options):
    osr.main([str(run), "--epochs", "3", *options])
    (path,) = (run / "eval").glob("osr-digits*.json")
    rows, about = results.read(path)
    return rows, about, pd.read_csv(path.with_suffix(".csv"))


def test_two_trials_on_digits(run, capsys):
    rows, about, samples = evaluate(run, "--trials", "[random:6:0, random:6:3]", "--k", "7")
    assert "random:6:3" in capsys.readouterr().out
    encoder = load_encoder(run)
    test = load(Data(), "test")
    (bank, labels), (features, targets) = (
        extract(encoder, load(Data(), split)) for split in ("train", "test")
    )
    for seed in (0, 3):
        known = sorted(np.random.default_rng(seed).permutation(10)[:6].tolist())
        assert about["trials"][f"random:6:{seed}"]["known"] == known
        found = samples[samples["trial"] == f"random:6:{seed}"]
        is_known = found["known"].to_numpy()
        order = np.argsort(~np.isin(test.labels, known), kind="stable")
        assert found["path"].tolist() == [f"digits/test/{i}" for i in order]
        assert found["label"].tolist() == test.labels[order].tolist()
        assert is_known.tolist() == np.isin(test.labels[order], known).tolist()
        chosen = np.isin(labels, known)
        probe = linear_probe(bank[chosen], labels[chosen], epochs=3)
        logits = features[order] @ probe.weight.T + probe.bias
        np.testing.assert_allclose(found["max_logit"], logits.amax(1), atol=1e-5)
        assert found["prediction"].tolist() == probe.classes[logits.argmax(1)].tolist()
        hits = (probe.classes[logits.argmax(1)] == targets[order]).numpy() & is_known
        row = only(rows, "linear", "accuracy", trial=seed, epochs=3)
        assert row["value"] == pytest.approx(hits.sum() / is_known.sum())
        row = only(rows, "knn_distance", "auroc", trial=seed, k=7)
        assert (row["params"]["pretraining"], row["params"]["n_known"]) == (ALL_CLASSES, 6)
        assert row["n"] == len(test)
    for mean in records(rows[rows["trial"].isna()]):
        values = [only(rows, mean["score"], mean["metric"], trial=t)["value"] for t in (0, 3)]
        assert mean["value"] == pytest.approx(np.mean(values))
        assert mean["params"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert list((run / "eval").glob("osr-digits-*.png"))


def test_run_of_known_classes_is_evaluated_on_its_own_trial(tmp_path, capsys):
    run = make_run(tmp_path / "known", open_set="random:4:2")
    rows, about, _ = evaluate(run)
    assert set(rows["trial"]) == {2}
    assert set(results.param(rows, "pretraining")) == {KNOWN_ONLY}
    (trial,) = about["trials"].values()
    assert set(trial["known"]) | set(trial["unknown"]) == set(range(10))
    assert cli.run(osr.main, [str(run), "--trials", "random:4"]) == 2
    assert "pretrained" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluations_at_once_keep_their_results(run, script):
    """Of other trials, each in a process of its own."""
    trials = {"": [0, 1, 2, 3, 4], "-random_4_1": [1], "-random_6_2": [2]}
    options = [[], ["--trials", "random:4:1"], ["--trials", "random:6:2"]]
    with ThreadPoolExecutor() as threads:
        done = list(threads.map(lambda each: script("eval/osr.py", str(run), *each), options))
    assert [each.returncode for each in done] == [0, 0, 0]
    for name, numbers in trials.items():
        path = run / "eval" / f"osr-digits{name}.json"
        rows, about = results.read(path)
        assert sorted(set(rows["trial"].dropna())) == numbers
        assert set(pd.read_csv(path.with_suffix(".csv"))["trial"]) == set(about["trials"])
        assert path.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("names", "data", "expected"),
    [
        (None, Data(), [f"random:6:{seed}" for seed in range(5)]),
        (None, Data(open_set="random:4:2"), ["random:4:2"]),
        (None, Data(classes=[1, 2]), ["data.classes"]),
        ("random:3:1", Data(), ["random:3:1"]),
        (["svhn:0", "svhn:1", "svhn:4"], Data(), ["svhn:0", "svhn:4"]),  # 0 and 1 coincide
        ("cifar10", Data("cifar10"), ["cifar10:0", "cifar10:2", "cifar10:3", "cifar10:4"]),
    ],
)
def test_trials_are_chosen_once_per_set_of_known_classes(names, data, expected):
    assert [trial.name for trial in osr.choose_trials(names, data, TEN)] == expected


@pytest.mark.parametrize("names", [["random:6:0", "random:4:1"], [], "cifar10", "randm"])
def test_trials_that_do_not_fit_raise(names):
    with pytest.raises(ValueError, match=r"trials|open_set"):
        osr.choose_trials(names, Data(), TEN)


def test_cifar_plus_n_takes_unknown_classes_from_cifar100(run, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)

    def fake(data, split):
        n_classes = {"cifar10": 10, "cifar100": 100}[data.name]
        labels = np.arange(n_classes).repeat(4)
        pixels = rng.integers(0, 255, (len(labels), 16, 16, 3), dtype=np.uint8)
        return ImageSet(pixels, labels, tuple(map(str, range(n_classes))), f"{data.name}/{split}")

    monkeypatch.setattr("ssl_gradmix.data.open_set.load", fake)
    given = ["--data.name", "cifar10", "--trials", "cifar+10:4", "--out", str(tmp_path / "out")]
    osr.main([str(run), "--epochs", "1", *given])
    samples = pd.read_csv(tmp_path / "out" / "osr-cifar10-cifar+10_4.csv")
    (trial,) = trials("cifar+10:4", "cifar10", 10)
    known = samples["known"]
    assert sorted(samples["label"][known]) == sorted(trial.known * 4)
    assert sorted(samples["label"][~known]) == sorted(trial.unknown * 4)
    _, about = results.read(tmp_path / "out" / "osr-cifar10-cifar+10_4.json")
    assert set(about["images"]) == {"cifar10/train", "cifar10/test", "cifar100/test"}


def test_mean_and_spread_over_trials():
    frames = []
    for trial, value in ((0, 0.5), (2, 0.6), (3, 0.9)):
        interval = Interval(value, value, value)
        numbers = [
            results.number("vim", metric, interval, 10 + trial, k=50, learning_rate=trial)
            for metric in ("auroc", "threshold_tpr95")
        ]
        frames.append(results.frame(numbers, "osr", "x/test", "mine", "backbone", trial))
    (mean,) = records(osr.over_trials(pd.concat(frames)))
    assert (mean["trial"], mean["metric"], mean["ci_low"], mean["n"]) == (None, "auroc", None, 12)
    assert mean["value"] == pytest.approx(np.mean([0.5, 0.6, 0.9]))
    std = pytest.approx(np.std([0.5, 0.6, 0.9], ddof=1))
    assert mean["params"] == {"k": 50, "over": "trials", "std": std, "trials": [0, 2, 3]}
