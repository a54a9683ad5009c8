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
from ssl_gradmix.evaluation.detection import (
    closed_set,
    detect,
    held_out_scores,
    score_images,
    threshold,
)
from ssl_gradmix.evaluation.probes import held_out_parts, linear_probe

SCORES = ("knn_distance", "top_k_cosine", "ncm", "mahalanobis", "rmd")
SCORES += ("vim", "msp", "max_logit", "energy")


def make_images(count: int, classes: tuple[int, ...], seed: int):
    """Features around a center per class, and labels."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(9).normal(size=(10, 6))
    labels = rng.choice(classes, count)
    features = centers[labels] + rng.normal(size=(count, 6))
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


TRAINING = {"learning_rate": 0.1, "epochs": 5, "seed": 0}
TRAIN, KNOWN = make_images(120, (1, 4, 7), 0), make_images(50, (1, 4, 7), 1)
UNKNOWN = make_images(40, (0, 2), 2)


@pytest.fixture(scope="module")
def measured():
    probe = linear_probe(*TRAIN, epochs=5)
    held_out = held_out_scores(TRAIN, 7, 3, **TRAINING)
    numbers, samples = detect(probe, TRAIN, held_out, KNOWN, UNKNOWN, k=7, epochs=5)
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
    known, values = samples["known"].to_numpy(), samples[score].to_numpy()
    correct = (samples["prediction"] == samples["label"]).to_numpy()[known]
    accepted, rejected = values[known], values[~known]
    wins = (accepted[:, None] > rejected) + 0.5 * (accepted[:, None] == rejected)
    expected = {
        "auroc": roc_auc_score(known, values),
        "oscr": (wins * correct[:, None]).mean(),
    }
    for metric, value in expected.items():
        row = only(rows, score, metric)
        assert row["value"] == pytest.approx(value, abs=1e-9)
        assert row["ci_low"] <= row["value"] <= row["ci_high"]
        assert row["n"] == 90
    row = only(rows, score, "threshold_tpr95")
    held_out = held_out_scores(TRAIN, 7, 3, **TRAINING)[score]
    assert row["value"] == max(t for t in held_out if np.mean(held_out >= t) >= 0.95)
    assert (row["ci_low"], row["n"]) == (None, 120)


def test_held_out_scores_come_from_the_other_images():
    """Every image is held out once, as few have scores otherwise."""
    features, labels = TRAIN
    found = held_out_scores(TRAIN, 1, 1, **TRAINING)
    distances, cosines = [], []
    for rest, held_out in held_out_parts(labels):
        assert not set(rest.tolist()) & set(held_out.tolist())
        bank, queries = (
            each / each.norm(dim=1)[:, None] for each in (features[rest], features[held_out])
        )
        distances += (-torch.cdist(queries.double(), bank.double()).amin(1)).tolist()
        cosines += (queries.double() @ bank.double().T).amax(1).tolist()
    np.testing.assert_allclose(found["knn_distance"], distances, atol=1e-6)
    np.testing.assert_allclose(found["top_k_cosine"], cosines, atol=1e-6)
    assert len(found["energy"]) == 120


@pytest.mark.parametrize("score", SCORES)
def test_threshold_accepts_new_images_of_known_classes(score):
    train, new = make_images(900, (1, 4, 7), 5), make_images(3000, (1, 4, 7), 6)
    chosen = threshold(held_out_scores(train, 50, 3, **TRAINING)[score])
    probe = linear_probe(*train, [0.1], 5)
    accepted = np.mean(score_images(probe, train, new[0])[score] >= chosen)
    assert accepted == pytest.approx(0.95, abs=0.03)  # twice the spread of 500 held-out ones


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
