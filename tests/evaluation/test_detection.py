"""Known against unknown images, compared with scikit-learn and with the definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from support import only

from ssl_gradmix.evaluation import results
from ssl_gradmix.evaluation.detection import closed_set, detect
from ssl_gradmix.evaluation.probes import linear_probe

SCORES = ("knn_distance", "top_k_cosine", "ncm", "mahalanobis", "rmd")
SCORES += ("vim", "msp", "max_logit", "energy")


def make_images(count: int, classes: tuple[int, ...], seed: int):
    """Features around a center per class, and labels."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(9).normal(size=(10, 6))
    labels = rng.choice(classes, count)
    features = centers[labels] + rng.normal(size=(count, 6))
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


TRAIN, KNOWN = make_images(120, (1, 4, 7), 0), make_images(50, (1, 4, 7), 1)
UNKNOWN = make_images(40, (0, 2), 2)


@pytest.fixture(scope="module")
def measured():
    probe = linear_probe(*TRAIN, epochs=5)
    numbers, samples = detect(probe, TRAIN, KNOWN, UNKNOWN, k=7, epochs=5)
    return probe, results.frame(numbers, "osr", "x/test", "mine"), samples


def test_closed_set_against_scikit_learn(measured):
    probe, _, _ = measured
    numbers = closed_set(probe, TRAIN, KNOWN, k=9, temperature=0.1, epochs=5)
    rows = results.frame(numbers, "osr", "x/test", "mine")
    oracle = KNeighborsClassifier(
        9, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.1)
    )
    expected = oracle.fit(*TRAIN).score(*KNOWN)
    assert only(rows, "knn", "accuracy", k=9, temperature=0.1)["value"] == pytest.approx(expected)
    logits = KNOWN[0] @ probe.weight.T + probe.bias
    hits = int((probe.classes[logits.argmax(1)] == KNOWN[1]).sum())
    row = only(rows, "linear", "accuracy", epochs=5)
    wilson = binomtest(hits, 50).proportion_ci(0.95, method="wilson")
    expected = (hits / 50, wilson.low, wilson.high)
    assert (row["value"], row["ci_low"], row["ci_high"]) == pytest.approx(expected)


@pytest.mark.parametrize("score", SCORES)
def test_metrics_against_independent_ones(measured, score):
    _, rows, samples = measured
    known, values = samples["is_known"].to_numpy(), samples[score].to_numpy()
    accepted, rejected = values[known], values[~known]
    wins = (accepted[:, None] > rejected) + 0.5 * (accepted[:, None] == rejected)
    expected = {
        "auroc": roc_auc_score(known, values),
        "threshold_tpr95": max(t for t in accepted if np.mean(accepted >= t) >= 0.95),
        "oscr": (wins * samples["correct"].to_numpy()[known][:, None]).mean(),
    }
    for metric, value in expected.items():
        row = only(rows, score, metric)
        assert row["value"] == pytest.approx(value, abs=1e-9)
        if metric == "threshold_tpr95":
            assert (row["ci_low"], row["n"]) == (None, 50)
        else:
            assert row["ci_low"] <= row["value"] <= row["ci_high"]
            assert row["n"] == 90


@pytest.mark.parametrize(
    ("score", "params"),
    [
        ("knn_distance", {"k": 7}),
        ("top_k_cosine", {"k": 3}),
        ("vim", {"dim": 3, "epochs": 5}),
        ("msp", {"epochs": 5}),
        ("mahalanobis", {}),
    ],
)
def test_params_are_what_a_number_depends_on(measured, score, params):
    _, rows, _ = measured
    assert only(rows, score, "auroc")["params"] == params
    assert only(rows, score, "oscr")["params"] == {**params, "epochs": 5}  # it asks the probe too
