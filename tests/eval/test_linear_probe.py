from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.neighbors import KNeighborsClassifier
from support import load_script, only, records

from ssl_gradmix.data.datasets import Data, load
from ssl_gradmix.evaluation import results
from ssl_gradmix.evaluation.encoders import load_encoder
from ssl_gradmix.evaluation.features import extract
from ssl_gradmix.evaluation.probes import linear_probe

main = load_script("eval/linear_probe.py").main


def test_numbers_on_digits_equal_independent_ones(run, capsys):
    main([str(run), "--epochs", "6", "--k", "7", "--label_fractions", "[0.1]"])
    rows, about = results.read(run / "eval" / "linear_probe-digits.json")
    encoder = load_encoder(run)
    (bank, labels), (features, targets) = (
        extract(encoder, load(Data(), split)) for split in ("train", "test")
    )
    probe = linear_probe(bank, labels, epochs=6)
    ranked = (features @ probe.weight.T + probe.bias).argsort(1, descending=True)
    overall = records(rows[rows["metric"] != "class_accuracy"])
    assert [(row["score"], row["metric"]) for row in overall] == [
        *[("linear", "top1"), ("linear", "top5")] * 2,
        ("knn", "top1"),
    ]
    training = {"learning_rate": probe.learning_rate, "epochs": 6, "seed": 0}
    for row, k in zip(overall[:2], (1, 5), strict=True):
        hits = int((ranked[:, :k] == targets[:, None]).any(1).sum())
        wilson = binomtest(hits, len(targets)).proportion_ci(0.95, method="wilson")
        assert row["value"] == pytest.approx(hits / len(targets))
        assert (row["ci_low"], row["ci_high"]) == pytest.approx((wilson.low, wilson.high))
        assert (row["n"], row["params"]) == (len(targets), training)
    assert overall[2]["params"]["labels"] == 143
    assert overall[2]["value"] < overall[0]["value"]

    oracle = KNeighborsClassifier(
        7, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07)
    )
    expected = oracle.fit(bank.double(), labels).score(features.double(), targets)
    value = only(rows, "knn", "top1", k=7, temperature=0.07)["value"]
    assert value == pytest.approx(expected, abs=1.5 / len(targets))

    by_class = rows[rows["metric"] == "class_accuracy"]
    assert results.param(by_class, "class").tolist() == list("0123456789")
    assert by_class["n"].tolist() == np.bincount(targets).tolist()
    hits = (by_class["value"] * by_class["n"]).sum()
    assert hits == pytest.approx(overall[0]["value"] * len(targets))
    chosen = about["validation"][str(probe.learning_rate)]
    assert chosen == min(about["validation"].values())
    assert f"{overall[0]['value']:.4f}" in capsys.readouterr().out


def test_classes_of_the_data_settings_are_recorded(run):
    main([str(run), "--epochs", "1", "--data.classes", "[1, 2, 8]"])
    rows, _ = results.read(run / "eval" / "linear_probe-digits-1_2_8.json")
    assert set(results.param(rows, "classes")) == {"1, 2, 8"}
    assert set(rows["metric"]) == {"top1", "class_accuracy"}
    test = load(Data(), "test")
    assert only(rows, "linear", "top1")["n"] == np.isin(test.labels, [1, 2, 8]).sum()
