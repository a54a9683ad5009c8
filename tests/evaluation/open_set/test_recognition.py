from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from ssl_gradmix.evaluation.open_set.recognition import closed_set, compare, detect, fit, over_trials, score_table
from ssl_gradmix.evaluation.open_set.samples import Settings
from ssl_gradmix.evaluation.results import Row

D = 6
SCORES = [
    *("knn_distance", "top_k_cosine", "top_k_cosine_divided", "ncm", "ncm_euclidean"),
    *("mahalanobis", "rmd", "feature_norm", "vim", "msp", "max_logit", "energy"),
]


def row(score, metric, interval, n, trial=0, **params):
    return Row("osr", "toy", "test", trial, "encoder", "backbone", score, metric, *interval, n, params)


def value_of(rows, score, metric):
    (found,) = [row for row in rows if (row.score, row.metric) == (score, metric)]
    return found.value


@pytest.fixture(scope="module")
def cloud():
    """Three known classes, numbered 2, 5 and 7, and one unknown; overlapping."""
    rng = np.random.default_rng(0)
    centers = {2: 0, 5: 1, 7: 2, 4: 3}
    means = 1.5 * rng.normal(size=(4, D))

    def draw(labels):
        features = means[[centers[label] for label in labels]] + rng.normal(size=(len(labels), D))
        return torch.from_numpy(features).float(), torch.tensor(labels)

    train = draw([2] * 40 + [5] * 30 + [7] * 25)
    test = draw([2, 5, 7, 4] * 25)
    return train, test, test[1] != 4


@pytest.fixture(scope="module")
def detected(cloud):
    train, test, is_known = cloud
    settings = Settings(k=4, epochs=5)
    probe = fit(train, settings)
    rows, arrays = detect(probe, train, test, is_known, settings, row)
    return probe, rows, arrays


def test_metrics_equal_independent_ones(cloud, detected):
    _, rows, arrays = detected
    known = arrays["is_known"]
    assert [score for score in arrays if score not in ("is_known", "correct", "labels")] == SCORES
    for score in SCORES:
        s, u = arrays[score][known], arrays[score][~known]
        assert value_of(rows, score, "auroc") == pytest.approx(roc_auc_score(known, arrays[score]), abs=1e-9)
        precision = average_precision_score(known, arrays[score])
        assert value_of(rows, score, "aupr_in") == pytest.approx(precision, abs=1e-9)
        precision = average_precision_score(~known, -arrays[score])
        assert value_of(rows, score, "aupr_out") == pytest.approx(precision, abs=1e-9)
        accepting = [t for t in s if np.mean(s >= t) >= 0.95]
        assert value_of(rows, score, "threshold_tpr95") == max(accepting)
        assert value_of(rows, score, "fpr95_id_pos") == pytest.approx(np.mean(u >= max(accepting)), abs=1e-12)
        rejecting = [t for t in u if np.mean(u <= t) >= 0.95]
        assert value_of(rows, score, "fpr95_ood_pos") == pytest.approx(np.mean(s <= min(rejecting)), abs=1e-12)
        pairs = (s[:, None] > u) + 0.5 * (s[:, None] == u)
        expected = (pairs * arrays["correct"][known][:, None]).mean()
        assert value_of(rows, score, "oscr") == pytest.approx(expected, abs=1e-9)


def test_intervals_counts_and_parameters(cloud, detected):
    probe, rows, _ = detected
    for each in rows:
        if each.metric == "threshold_tpr95":
            assert (each.ci_low, each.ci_high, each.n) == (None, None, 75)
        else:
            assert each.ci_low <= each.value <= each.ci_high
            assert each.n == 100
    params = {each.score: each.params for each in rows if each.metric == "auroc"}
    training = {"learning_rate": probe.learning_rate, "epochs": 5, "seed": 0}
    of_oscr = {each.score: each.params for each in rows if each.metric == "oscr"}
    assert of_oscr["knn_distance"] == {"k": 4, **training}  # it counts what the probe names right
    assert params["knn_distance"] == {"k": 4}
    assert params["top_k_cosine"] == {"k": 3}
    assert params["mahalanobis"] == {}
    assert params["max_logit"] == training
    assert params["vim"] == {"dim": 3, **training}


def test_samples_are_scores_of_the_known_classes_features(cloud, detected):
    (bank, _), (features, labels), is_known = cloud
    probe, _, arrays = detected
    unit = [each / each.norm(dim=1, keepdim=True) for each in (bank.double(), features.double())]
    distance = NearestNeighbors(n_neighbors=4).fit(unit[0]).kneighbors(unit[1])[0][:, 3]
    np.testing.assert_allclose(arrays["knn_distance"], -distance, atol=1e-5)
    logits = features @ probe.weight.T + probe.bias
    np.testing.assert_allclose(arrays["max_logit"], logits.amax(1), atol=1e-5)
    predicted = np.array([2, 5, 7])[logits.argmax(1)]
    assert arrays["correct"].tolist() == (predicted == labels.numpy()).tolist()
    assert not arrays["correct"][~is_known].any()
    assert arrays["labels"].tolist() == labels.tolist()


def test_closed_set_accuracy_of_both_classifiers(cloud, detected):
    train, (features, labels), is_known = cloud
    probe = detected[0]
    test = features[is_known], labels[is_known]
    linear, knn = closed_set(probe, train, test, Settings(epochs=5), row)
    predicted = np.array([2, 5, 7])[(test[0] @ probe.weight.T + probe.bias).argmax(1)]
    assert linear.value == pytest.approx(np.mean(predicted == test[1].numpy()))
    oracle = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07))
    assert knn.value == pytest.approx(oracle.fit(*train).score(*test))
    assert knn.params == {"k": 20, "temperature": 0.07}
    assert linear.params["epochs"] == 5
    assert (linear.n, knn.n) == (75, 75)
    assert 0.6 < linear.ci_low < linear.value < linear.ci_high < 1


def test_what_lies_far_from_all_clusters_is_unknown():
    rng = torch.Generator().manual_seed(0)
    centers = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9]])
    labels = torch.arange(3).repeat(30)
    train = centers[labels] + 0.1 * torch.randn(90, 3, generator=rng), labels
    test = torch.cat([train[0][:30] + 0.1, -train[0][:30]]), torch.arange(3).repeat(20)
    is_known = torch.arange(60) < 30
    settings = Settings(k=5)
    rows, _ = detect(fit(train, settings), train, test, is_known, settings, row)
    for score in ("knn_distance", "top_k_cosine", "ncm", "mahalanobis"):
        assert [value_of(rows, score, metric) for metric in ("auroc", "oscr", "fpr95_id_pos")] == [1, 1, 0], score


def test_neighbors_are_clamped_and_recorded():
    labels = np.array([3, 3, 8, 8, 8])
    train = torch.eye(5, 4) + torch.arange(5)[:, None], torch.from_numpy(labels)
    test = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 8, 3, 1, 1, 2])
    settings = Settings(epochs=1)
    rows, _ = detect(fit(train, settings), train, test, test[1] > 2, settings, row)
    params = {each.score: each.params for each in rows}
    assert (params["knn_distance"], params["top_k_cosine"]) == ({"k": 5}, {"k": 2})
    _, knn = closed_set(fit(train, settings), train, (test[0][:3], test[1][:3]), settings, row)
    assert knn.params["k"] == 5


def interval(value):
    return value, value - 0.1, value + 0.1


def test_mean_and_spread_over_the_trials_counted():
    shared = {"protocol": "cifar10", "k": 50}
    rows = [row("vim", "auroc", interval(v), 10 + t, t, rate=t, **shared) for t, v in enumerate((0.5, 0.5, 0.6, 0.9))]
    rows += [row("vim", "oscr", interval(v), 10, t, **shared) for t, v in enumerate((0.3, 0.3, 0.1, 0.2))]
    rows += [row("vim", "threshold_tpr95", (1.0, None, None), 10, t, **shared) for t in range(4)]
    first, second = over_trials(rows, [0, 2, 3])
    assert (first.trial, first.metric, first.n, first.ci_low, first.ci_high) == (
        None,
        "auroc",
        10 + 12 + 13,
        None,
        None,
    )
    assert first.value == pytest.approx(np.mean([0.5, 0.6, 0.9]))
    std = np.sqrt(sum((v - 2 / 3) ** 2 for v in (0.5, 0.6, 0.9)) / 2)
    assert first.params == {**shared, "over": "trials", "std": pytest.approx(std), "trials": [0, 2, 3]}
    assert (second.metric, second.value) == ("oscr", pytest.approx(0.2))


def test_p_values_are_not_averaged_nor_what_one_trial_has():
    def difference(value, trial, p_value):
        return row("vim", "auroc_difference", interval(value), 10, trial, compared_with="other", p_value=p_value)

    rows = [difference(0.1, 0, 0.002), difference(0.3, 2, 0.002)]
    (mean,) = over_trials(rows, [0, 1, 2])
    assert mean.value == pytest.approx(0.2)
    assert mean.params == {
        "compared_with": "other",
        "over": "trials",
        "std": pytest.approx(np.sqrt(0.02)),
        "trials": [0, 2],
    }
    assert over_trials(rows, [0, 1]) == []


def test_comparison_with_itself_and_with_a_worse_run(detected):
    _, _, arrays = detected
    for same in compare(arrays, arrays, "twin", row):
        assert (same.value, same.ci_low, same.ci_high, same.params["p_value"]) == (0, 0, 0, 1)

    known, rng = arrays["is_known"], np.random.default_rng(0)
    better = {**arrays, "vim": known + 0.5 * rng.normal(size=100)}
    worse = {**arrays, "vim": rng.normal(size=100), "correct": arrays["correct"] & (rng.random(100) < 0.5)}
    del worse["energy"]
    found = compare(better, worse, "worse", partial(row, protocol="random"))
    assert {each.score for each in found} == {*SCORES} - {"energy"}
    auroc, oscr = (
        next(each for each in found if (each.score, each.metric) == ("vim", f"{metric}_difference"))
        for metric in ("auroc", "oscr")
    )
    expected = roc_auc_score(known, better["vim"]) - roc_auc_score(known, worse["vim"])
    assert auroc.value == pytest.approx(expected, abs=1e-9)
    ours, theirs = (
        ((arrays["vim"][known][:, None] > arrays["vim"][~known]) * arrays["correct"][known][:, None]).mean()
        for arrays in (better, worse)
    )
    assert oscr.value == pytest.approx(ours - theirs, abs=1e-9)
    assert auroc.ci_low > 0.1
    assert auroc.params == {"protocol": "random", "compared_with": "worse", "p_value": pytest.approx(2 / 1001)}


def test_table_has_a_line_a_score(detected):
    rows = [
        row("vim", "auroc", interval(0.75), 9),
        row("vim", "oscr", interval(0.5), 9),
        row("energy", "auroc", interval(0.25), 9, p_value=0.0421),
        row("energy", "oscr", (0.5, None, None), 9, std=0.25),
    ]
    assert score_table(rows, {"auroc": "AUROC", "oscr": "OSCR"}).splitlines() == [
        "score   AUROC                              OSCR",
        "vim     0.7500 (0.6500 to 0.8500)          0.5000 (0.4000 to 0.6000)",
        "energy  0.2500 (0.1500 to 0.3500) p=0.042  0.5000 ± 0.2500",
    ]
