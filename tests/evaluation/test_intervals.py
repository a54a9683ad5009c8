from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch

from ssl_gradmix.evaluation import intervals as module
from ssl_gradmix.evaluation.intervals import (
    accuracy_interval,
    bootstrap_interval,
    bootstrap_intervals,
    paired_difference,
)
from ssl_gradmix.evaluation.metrics import all_metrics, auroc, fpr_at_tpr, oscr


@pytest.fixture
def run():
    rng = np.random.default_rng(0)
    is_known = rng.permutation(np.arange(300) < 180)
    scores = rng.normal(size=300) + is_known
    return np.round(scores, 1), is_known, rng.random(300) < 0.8


def drawn_weights(strata, n, seed=0):
    """The resamples that a statistic is handed."""
    seen = []

    def statistic(_, weights=None):
        seen.append(weights)
        return 0.0 if weights is None else np.zeros(len(weights))

    bootstrap_interval(statistic, strata, strata=strata, n=n, seed=seed)
    return np.concatenate(seen[1:])


def test_equals_scikit_learn_on_every_resample(run):
    scores, is_known, correct = run
    demoted = np.where(is_known & ~correct, scores.min() - 1, scores)  # OSCR is the AUROC of these, as OpenAUC has it
    weights = drawn_weights(is_known, n=100)
    for interval, values in (
        (bootstrap_interval(auroc, scores, is_known, strata=is_known, n=100), scores),
        (bootstrap_interval(oscr, scores, is_known, correct, strata=is_known, n=100), demoted),
    ):
        naive = [sklearn.metrics.roc_auc_score(np.repeat(is_known, w), np.repeat(values, w)) for w in weights]
        assert interval.value == pytest.approx(sklearn.metrics.roc_auc_score(is_known, values), abs=1e-9)
        assert interval[1:] == pytest.approx(np.quantile(naive, [0.025, 0.975]), abs=1e-9)


def test_agrees_with_scipys_bootstrap(run):
    scores, is_known, _ = run

    def pair_share(known, unknown, axis=-1):
        return scipy.stats.mannwhitneyu(known, unknown, axis=axis).statistic / (180 * 120)

    expected = scipy.stats.bootstrap(
        (scores[is_known], scores[~is_known]), pair_share, n_resamples=4000, method="percentile", rng=1
    ).confidence_interval
    interval = bootstrap_interval(auroc, scores, is_known, strata=is_known, n=4000)
    assert interval.low == pytest.approx(expected.low, abs=0.004)
    assert interval.high == pytest.approx(expected.high, abs=0.004)


def test_resamples_are_drawn_with_replacement_within_each_stratum():
    strata = np.repeat([2, 0, 1], [50, 30, 1])
    weights = drawn_weights(strata, n=4000)
    assert weights.shape == (4000, 81)
    for stratum, size in ((2, 50), (0, 30), (1, 1)):
        assert (weights[:, strata == stratum].sum(1) == size).all()
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.08)  # five standard errors
    np.testing.assert_allclose(weights[:, :50].var(0), 1 - 1 / 50, atol=0.15)  # of a multinomial count


def test_intervals_cover_the_truth_as_often_as_they_say():
    truth = scipy.stats.norm.cdf(1 / np.sqrt(2))
    is_known = np.arange(200) < 120
    covered = 0
    for trial in range(300):
        scores = np.random.default_rng(trial).normal(size=200) + is_known
        interval = bootstrap_interval(auroc, scores, is_known, strata=is_known, n=200, level=0.8, seed=trial)
        covered += interval.low <= truth <= interval.high
    assert 0.73 < covered / 300 < 0.87  # three standard errors


def test_seed_level_and_blocks(run, monkeypatch):
    scores, is_known, _ = run
    bootstrap = partial(bootstrap_interval, auroc, scores, is_known, strata=is_known, n=500)
    assert bootstrap() == bootstrap(seed=0) != bootstrap(seed=1)
    assert bootstrap().low < bootstrap(level=0.5).low < bootstrap().value < bootstrap(level=0.5).high < bootstrap().high
    whole = bootstrap()
    monkeypatch.setattr(module, "_WEIGHTS_AT_ONCE", 1)  # resample by resample
    assert bootstrap() == pytest.approx(whole, abs=0.01)
    assert drawn_weights(is_known, n=5).shape == (5, 300)


def test_several_statistics_at_once(run):
    scores, is_known, correct = run
    together = bootstrap_intervals(all_metrics, scores, is_known, correct, strata=is_known, n=50)
    assert together["auroc"] == bootstrap_interval(auroc, scores, is_known, strata=is_known, n=50)
    assert together["oscr"] == bootstrap_interval(oscr, scores, is_known, correct, strata=is_known, n=50)
    rejecting = partial(fpr_at_tpr, positive="unknown")
    assert together["fpr95_ood_pos"] == bootstrap_interval(rejecting, scores, is_known, strata=is_known, n=50)
    assert set(together) == set(all_metrics(scores, is_known, correct))


def test_tensors(run):
    expected = bootstrap_interval(oscr, *run, strata=run[1], n=20)
    tensors = [torch.from_numpy(array) for array in run]
    assert bootstrap_interval(oscr, *tensors, strata=tensors[1], n=20) == expected


def delong(a, b, is_known):
    """DeLong et al. 1988, pair by pair: the difference of two AUROCs on the same samples and its standard error."""

    def placements(scores):
        above = scores[is_known][:, None] - scores[~is_known][None]
        wins = (above > 0) + 0.5 * (above == 0)
        return wins.mean(1), wins.mean(0)

    (known_a, unknown_a), (known_b, unknown_b) = placements(a), placements(b)
    difference = known_a.mean() - known_b.mean()
    variance = sum(np.var(x - y, ddof=1) / len(x) for x, y in ((known_a, known_b), (unknown_a, unknown_b)))
    return difference, np.sqrt(variance)


@pytest.mark.parametrize("gain", [0.0, 0.1, 0.25])
def test_paired_difference_agrees_with_delong(gain):
    rng = np.random.default_rng(2)
    is_known = np.arange(1000) < 600
    shared = rng.normal(size=1000)
    a, b = (shared + 0.5 * rng.normal(size=1000) + shift * is_known for shift in (1 + gain, 1))
    expected, error = delong(a, b, is_known)
    result = paired_difference(auroc, (a, is_known), (b, is_known), strata=is_known, n=4000)
    assert result.value == pytest.approx(expected, abs=1e-9)
    assert result.low == pytest.approx(expected - 1.96 * error, abs=0.12 * error)
    assert result.high == pytest.approx(expected + 1.96 * error, abs=0.12 * error)
    assert result.p_value == pytest.approx(2 * scipy.stats.norm.sf(abs(expected / error)), abs=0.03)


def test_pairing_sees_what_two_intervals_do_not(run):
    scores, is_known, _ = run
    better = scores + 0.1 * is_known
    a, b = (bootstrap_interval(auroc, s, is_known, strata=is_known) for s in (better, scores))
    assert a.low < b.high  # the two intervals overlap
    assert paired_difference(auroc, (better, is_known), (scores, is_known), strata=is_known).p_value < 0.01
    worse = paired_difference(oscr, (scores, *run[1:]), (better, *run[1:]), strata=is_known)
    assert worse.value < 0
    assert worse.high < 0
    assert worse.p_value < 0.01


def test_p_value_bounds(run):
    scores, is_known, _ = run
    same = paired_difference(auroc, (scores, is_known), (scores, is_known), strata=is_known, n=99)
    assert same == (0, 0, 0, 1)
    apart = paired_difference(auroc, (is_known * 1.0, is_known), (-scores, is_known), strata=is_known, n=99)
    assert apart.p_value == pytest.approx(0.02)


def test_p_values_are_even_where_runs_do_not_differ():
    is_known = np.arange(200) < 100
    p_values = []
    for trial in range(200):
        rng = np.random.default_rng(trial)
        a, b = (rng.normal(size=200) + is_known for _ in range(2))
        p_values.append(paired_difference(auroc, (a, is_known), (b, is_known), strata=is_known, n=200).p_value)
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 0.01


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (7, 10), (941, 1000)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_accuracy_interval_is_wilsons(right, n, level):
    z = scipy.stats.norm.ppf((1 + level) / 2)
    p = right / n
    center, width = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    interval = accuracy_interval(np.arange(n) < right, level)
    assert interval.value == p
    assert interval.low == pytest.approx((center - width) / (1 + z**2 / n), abs=1e-9)
    assert interval.high == pytest.approx((center + width) / (1 + z**2 / n), abs=1e-9)
    assert accuracy_interval(torch.arange(n) < right, level) == interval


def test_bad_input(run):
    scores, is_known, _ = run
    for message, change in (
        ("n must be at least 1 resample, got 0", {"n": 0}),
        ("level must be between 0 and 1, got 95", {"level": 95}),
        (r"got lengths \[300, 300\] and strata \(10,\)", {"strata": is_known[:10]}),
    ):
        with pytest.raises(ValueError, match=message):
            bootstrap_interval(auroc, scores, is_known, **{"strata": is_known, "n": 5} | change)
    with pytest.raises(ValueError, match="NaN of 300"):
        bootstrap_interval(auroc, scores * np.nan, is_known, strata=is_known)
    for correct in (np.zeros(0, dtype=bool), np.ones(3), np.ones((3, 1), dtype=bool)):
        with pytest.raises(ValueError, match="correct must be boolean of shape"):
            accuracy_interval(correct)
    with pytest.raises(ValueError, match="level must be between 0 and 1, got 1"):
        accuracy_interval(np.ones(3, dtype=bool), level=1)
