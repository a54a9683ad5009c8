from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_ood.metrics import functional as pytorch_ood
from scipy.integrate import trapezoid

from ssl_gradmix.evaluation.metrics import (
    ALEXNET_CLEAN_ERROR,
    ALEXNET_ERRORS,
    all_metrics,
    auroc,
    average_precision,
    fpr_at_tpr,
    mean_corruption_error,
    oscr,
    oscr_curve,
    relative_mce,
    roc_curve,
    threshold_at_tpr,
)

EXACT = {"abs": 1e-9, "rel": 0}


def gaussian(n_known=60, n_unknown=40, seed=0):
    rng = np.random.default_rng(seed)
    is_known = rng.permutation(np.arange(n_known + n_unknown) < n_known)
    return rng.normal(size=len(is_known)) + is_known, is_known, rng.random(len(is_known)) < 0.7


def cases():
    scores, is_known, correct = gaussian()
    yield pytest.param(scores, is_known, correct, id="distinct")
    yield pytest.param(np.round(scores), is_known, correct, id="ties")
    yield pytest.param(np.zeros(100), is_known, correct, id="constant")
    yield pytest.param(is_known.astype(float), is_known, correct, id="perfect")
    yield pytest.param(1.0 - is_known, is_known, correct, id="inverted")
    yield pytest.param(scores, is_known, np.zeros(100, dtype=bool), id="none correct")
    yield pytest.param(scores, is_known, np.ones(100, dtype=bool), id="all correct")
    yield pytest.param(1000 * scores - 5000, is_known, correct, id="far from [0, 1]")
    yield pytest.param(*gaussian(1, 40), id="one known")
    yield pytest.param(*gaussian(40, 1), id="one unknown")
    yield pytest.param(
        np.array([np.inf, np.inf, 0.0, -0.0, -np.inf]), np.arange(5) % 2 == 0, np.arange(5) < 3, id="inf"
    )


every_case = pytest.mark.parametrize(("scores", "is_known", "correct"), list(cases()))


def pair_share(scores, is_known, correct, tie):
    """The share of pairs of a (correct) known and an unknown sample that the score puts in order."""
    wins = 0.0
    for s, c in zip(scores[is_known], correct[is_known], strict=True):
        for u in scores[~is_known]:
            wins += c * (1.0 if s > u else tie if s == u else 0.0)
    return wins / (is_known.sum() * (~is_known).sum())


def best_fpr(scores, positive, tpr):
    """The definition, threshold by threshold, positives scoring high."""
    return min(
        np.mean(scores[~positive] >= t) for t in np.unique(scores[positive]) if np.mean(scores[positive] >= t) >= tpr
    )


def outliers(scores, is_known):
    """In pytorch-ood larger scores mean unknown, and unknown samples have negative labels."""
    return torch.from_numpy(-scores), torch.from_numpy(np.where(is_known, 0, -1))


@every_case
def test_auroc(scores, is_known, correct):
    value = auroc(scores, is_known)
    assert value == pytest.approx(pair_share(scores, is_known, np.ones_like(is_known), 0.5), **EXACT)
    assert value == pytest.approx(pytorch_ood.auroc(*outliers(scores, is_known)).item(), **EXACT)
    if np.isfinite(scores).all():
        assert value == pytest.approx(sklearn.metrics.roc_auc_score(is_known, scores), **EXACT)
    assert value == pytest.approx(1 - auroc(-scores, is_known), **EXACT)


@every_case
def test_average_precision(scores, is_known, correct):
    ranks = np.unique(scores, return_inverse=True)[1]  # scikit-learn refuses infinities
    expected = sklearn.metrics.average_precision_score(is_known, ranks)
    assert average_precision(scores, is_known) == pytest.approx(expected, **EXACT)
    expected = sklearn.metrics.average_precision_score(~is_known, -ranks)
    assert average_precision(scores, is_known, positive="unknown") == pytest.approx(expected, **EXACT)


@every_case
@pytest.mark.parametrize("tpr", [0.05, 0.5, 0.95, 1.0])
def test_fpr_at_tpr(scores, is_known, correct, tpr):
    assert fpr_at_tpr(scores, is_known, tpr) == pytest.approx(best_fpr(scores, is_known, tpr), **EXACT)
    value = fpr_at_tpr(scores, is_known, tpr, positive="unknown")
    assert value == pytest.approx(best_fpr(-scores, ~is_known, tpr), **EXACT)
    assert value == pytest.approx(pytorch_ood.fpr_at_tpr(*outliers(scores, is_known), tpr).item(), **EXACT)


def test_fpr_at_tpr_needs_no_sample_more_than_tpr_says():
    # 55 of 100 known samples score above the only unknown one: just enough, though 0.55 * 100 > 55 in floating point.
    scores, is_known = np.arange(101.0), np.arange(101) != 45
    assert fpr_at_tpr(scores, is_known, 0.55) == 0
    assert fpr_at_tpr(scores, is_known, 0.56) == 1
    assert threshold_at_tpr(scores, is_known, 0.55) == 46


def test_fpr_at_tpr_with_collinear_ties_keeps_every_threshold():
    # What scikit-learn's roc_curve drops as collinear is where the answer lies: the curve is the diagonal.
    scores = np.repeat(np.arange(20), 2)
    is_known = np.tile([True, False], 20)
    assert fpr_at_tpr(scores, is_known, 0.95) == pytest.approx(0.95, **EXACT)


@every_case
def test_oscr(scores, is_known, correct):
    value = oscr(scores, is_known, correct)
    assert value == pytest.approx(pair_share(scores, is_known, correct, 0.5), **EXACT)
    outlier_scores, labels = outliers(scores, is_known)
    predictions = torch.from_numpy(np.where(correct, 0, 1))
    assert value == pytest.approx(pytorch_ood.oscr_score(outlier_scores, predictions, labels), **EXACT)
    assert oscr(scores, is_known, correct | ~is_known) == value, "correct of unknown samples is not read"
    strict = oscr(scores, is_known, correct, ties="strict")
    assert strict == pytest.approx(pair_share(scores, is_known, correct, 0), **EXACT)
    accuracy = correct[is_known].mean()
    assert 0 <= strict <= value <= min(accuracy, auroc(scores, is_known)) + 1e-12


def test_oscr_is_openauc():
    """Wang et al. 2022 give wrongly classified known samples the score of a sure unknown and take the AUROC."""
    scores, is_known, correct = gaussian()
    demoted = np.where(is_known & ~correct, scores[~is_known].min() - 1, scores)
    expected = sklearn.metrics.roc_auc_score(is_known, demoted)
    assert oscr(scores, is_known, correct) == pytest.approx(expected, **EXACT)


@every_case
def test_curves(scores, is_known, correct):
    fpr, tpr, thresholds = roc_curve(scores, is_known)
    assert trapezoid(tpr, fpr) == pytest.approx(auroc(scores, is_known), **EXACT)
    for f, t, threshold in zip(fpr[1:], tpr[1:], thresholds[1:], strict=True):
        assert f == np.mean(scores[~is_known] >= threshold)
        assert t == np.mean(scores[is_known] >= threshold)
    assert (fpr[0], tpr[0], thresholds[0], fpr[-1], tpr[-1]) == (0, 0, np.inf, 1, 1)

    fpr, ccr, thresholds = oscr_curve(scores, is_known, correct)
    assert trapezoid(ccr, fpr) == pytest.approx(oscr(scores, is_known, correct), **EXACT)
    for c, threshold in zip(ccr[1:], thresholds[1:], strict=True):
        assert c == pytest.approx(np.mean(correct[is_known] & (scores[is_known] >= threshold)), **EXACT)
    assert (fpr[0], ccr[0], fpr[-1]) == (0, 0, 1)
    assert ccr[-1] == pytest.approx(correct[is_known].mean(), **EXACT)


@every_case
@pytest.mark.parametrize("tpr", [0.01, 0.3, 0.95, 1.0])
def test_threshold_at_tpr_is_the_largest_that_accepts_enough(scores, is_known, correct, tpr):
    threshold = threshold_at_tpr(scores, is_known, tpr)
    known = scores[is_known]
    assert np.mean(known >= threshold) >= tpr
    assert np.mean(known > threshold) < tpr
    assert np.mean(scores[~is_known] >= threshold) == fpr_at_tpr(scores, is_known, tpr)
    assert threshold_at_tpr(known, np.ones(len(known), dtype=bool), tpr) == threshold


def test_threshold_of_float32_scores_accepts_the_very_sample_it_came_from():
    scores = torch.rand(101, generator=torch.Generator().manual_seed(0))
    threshold = threshold_at_tpr(scores, torch.ones(101, dtype=torch.bool), 1.0)
    assert bool((scores >= threshold).all())


@every_case
def test_all_metrics_are_the_single_ones(scores, is_known, correct):
    expected = {
        "auroc": auroc(scores, is_known),
        "aupr_in": average_precision(scores, is_known, positive="known"),
        "aupr_out": average_precision(scores, is_known, positive="unknown"),
        "fpr95_id_pos": fpr_at_tpr(scores, is_known, 0.95, positive="known"),
        "fpr95_ood_pos": fpr_at_tpr(scores, is_known, 0.95, positive="unknown"),
        "oscr": oscr(scores, is_known, correct),
    }
    assert all_metrics(scores, is_known, correct) == expected
    del expected["oscr"]
    assert all_metrics(scores, is_known) == expected


samples = st.lists(st.tuples(st.integers(-5, 5), st.booleans(), st.booleans()), min_size=2, max_size=30).filter(
    lambda rows: len({known for _, known, _ in rows}) == 2
)


@settings(max_examples=100, deadline=None)
@given(samples, st.randoms(use_true_random=False))
def test_neither_order_nor_a_rising_transform_changes_anything(rows, random):
    scores, is_known, correct = (np.array(column) for column in zip(*rows, strict=True))
    expected = all_metrics(scores, is_known, correct)
    order = np.array(random.sample(range(len(rows)), len(rows)))
    assert all_metrics(scores[order], is_known[order], correct[order]) == expected
    assert all_metrics(np.exp(scores / 3.0), is_known, correct) == expected
    assert all_metrics(scores**3 - 7, is_known, correct) == expected


@settings(max_examples=100, deadline=None)
@given(samples, st.data())
def test_weights_count_samples_so_many_times(rows, data):
    scores, is_known, correct = (np.array(column) for column in zip(*rows, strict=True))
    counts = st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)).filter(
        lambda counts: all(np.dot(counts, group) > 0 for group in (is_known, ~is_known))
    )
    weights = np.array(data.draw(st.lists(counts, min_size=1, max_size=3)))
    weighted = all_metrics(scores, is_known, correct, weights=weights)
    strict = oscr(scores, is_known, correct, ties="strict", weights=weights)
    for row, times in enumerate(weights):
        copies = [np.repeat(column, times) for column in (scores, is_known, correct)]
        for name, value in all_metrics(*copies).items():
            assert weighted[name][row] == pytest.approx(value, **EXACT)
            assert all_metrics(scores, is_known, correct, weights=times)[name] == pytest.approx(value, **EXACT)
        assert strict[row] == pytest.approx(oscr(*copies, ties="strict"), **EXACT)


def test_weights_of_few_bits_do_not_overflow():
    scores, is_known, correct = gaussian()
    before = scores.copy(), is_known.copy(), correct.copy()
    expected = all_metrics(scores, is_known, correct)
    assert all(map(np.array_equal, (scores, is_known, correct), before))  # arguments are left as they are
    for dtype in (np.uint8, np.int16, np.float16):
        assert all_metrics(scores, is_known, correct, weights=np.full(100, 200, dtype)) == pytest.approx(expected)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.uint8]
)
def test_tensors_of_any_dtype(dtype):
    scores, is_known, correct = gaussian()
    scores = torch.from_numpy(np.round(10 * scores) + 100).to(dtype)  # integers that all these dtypes hold
    expected = all_metrics(scores.double().numpy(), is_known, correct)
    if dtype.is_floating_point:
        scores.requires_grad_()
    assert all_metrics(scores, torch.from_numpy(is_known), torch.from_numpy(correct)) == expected


SCORES, KNOWN = np.array([0.3, np.nan, 0.1, np.nan]), np.array([True, True, False, False])


@pytest.mark.parametrize("metric", [auroc, average_precision, fpr_at_tpr, roc_curve, all_metrics])
@pytest.mark.parametrize(
    ("scores", "is_known", "message"),
    [
        (SCORES, KNOWN, "2 NaN of 4"),
        (np.zeros(4), np.ones(4, dtype=bool), "4 known and 0 unknown"),
        (np.zeros(5), KNOWN, r"is_known must have shape \(5,\), got \(4,\)"),
        (np.zeros((4, 1)), KNOWN, r"scores must have shape \(N,\), got \(4, 1\)"),
        (np.zeros(4), KNOWN.astype(int), "is_known must be boolean, got int64"),
        (KNOWN, KNOWN, "scores must be real numbers, got bool"),
    ],
)
def test_bad_samples_are_named_and_counted(metric, scores, is_known, message):
    with pytest.raises(ValueError, match=message):
        metric(scores, is_known)


def test_bad_options():
    scores, is_known, correct = gaussian()
    for call, message in (
        (lambda: average_precision(scores, is_known, positive="ood"), "positive must be 'known' or 'unknown', got"),
        (lambda: oscr(scores, is_known, correct, ties=0), "ties must be 'half' or 'strict', got 0"),
        (lambda: fpr_at_tpr(scores, is_known, 95), "tpr must be above 0 and at most 1"),
        (lambda: threshold_at_tpr(scores, is_known, float("nan")), "tpr must be above 0 and at most 1"),
        (lambda: oscr(scores, is_known, correct[is_known]), r"correct must have shape \(100,\), got \(60,\)"),
        (lambda: oscr_curve(scores, is_known, correct.astype(int)), "correct must be boolean, got int64"),
        (lambda: threshold_at_tpr(scores, np.zeros(100, dtype=bool)), "0 known of 100"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for weights, message in (
        (np.ones((100, 2)), r"must have shape \(100,\) or \(B, 100\), got \(100, 2\)"),
        ([1] * 100, "must be a NumPy array of whole or real numbers, got list"),
        (is_known, "must be a NumPy array of whole or real numbers, got bool"),
        (np.stack([np.ones(100), is_known]), "must leave known and unknown samples in every row"),
    ):
        with pytest.raises(ValueError, match=f"weights {message}"):
            auroc(scores, is_known, weights=weights)


ERRORS = {"fog": [0.2, 0.4], "snow": [0.1, 0.7]}
BASELINE = {"fog": [0.5, 0.7], "snow": [0.8, 0.8], "frost": [0.9, 0.9]}


def test_corruption_errors_by_hand():
    assert mean_corruption_error(ERRORS) == pytest.approx((0.3 + 0.4) / 2, **EXACT)
    assert mean_corruption_error(ERRORS, BASELINE) == pytest.approx((0.6 / 1.2 + 0.8 / 1.6) / 2, **EXACT)
    relative = relative_mce(ERRORS, 0.05, BASELINE, 0.3)
    assert relative == pytest.approx(((0.6 - 0.1) / (1.2 - 0.6) + (0.8 - 0.1) / (1.6 - 0.6)) / 2, **EXACT)
    assert relative_mce({"fog": [0.2]}, 0.3, {"fog": [0.6]}, 0.4) == pytest.approx(-0.5, **EXACT)
    assert mean_corruption_error({"fog": 0.3, "snow": 0.4}, BASELINE) == mean_corruption_error(ERRORS, BASELINE)


def test_alexnet():
    assert len(ALEXNET_ERRORS) == 15
    assert mean_corruption_error(ALEXNET_ERRORS, ALEXNET_ERRORS) == pytest.approx(1, **EXACT)
    assert relative_mce(ALEXNET_ERRORS, 0.435, ALEXNET_ERRORS, ALEXNET_CLEAN_ERROR) == pytest.approx(1, **EXACT)
    # A constant error of 50% by hand: 0.5 times the mean of the reciprocals.
    halves = dict.fromkeys(ALEXNET_ERRORS, [0.5] * 5)
    assert mean_corruption_error(halves, ALEXNET_ERRORS) == pytest.approx(0.646726, abs=1e-6)


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        ({}, "errors must hold at least one corruption"),
        (None, "errors must be a mapping of corruptions to errors, got NoneType"),
        ({"fog": [20.0, 40.0]}, "divide percent by 100.*fog has shape .* and 2 values outside"),
        ({"fog": [0.2, np.nan]}, "fog has shape .* and 1 values outside"),
        ({"fog": [[0.1, 0.2]]}, r"fog has shape \(1, 2\)"),
        ({"fog": [0.1, 0.2], "snow": [0.1]}, "as many severities for every corruption.*'fog': 2, 'snow': 1"),
    ],
)
def test_bad_errors(errors, message):
    with pytest.raises(ValueError, match=message):
        mean_corruption_error(errors)
    with pytest.raises(ValueError, match=message):
        relative_mce(errors, 0.1, BASELINE, 0.2)


def test_bad_baselines():
    with pytest.raises(KeyError, match=r"baseline lacks \['pixelate'\]"):
        mean_corruption_error({"fog": [0.1], "pixelate": [0.1]}, BASELINE)
    with pytest.raises(ValueError, match="baseline errors must be above 0 to divide by, got 0 for fog"):
        mean_corruption_error({"fog": [0.1]}, {"fog": [0.0]})
    with pytest.raises(ValueError, match=r"above baseline_clean must be above 0 to divide by, got -0.1 for fog"):
        relative_mce({"fog": [0.1]}, 0.1, {"fog": [0.3]}, 0.4)
    with pytest.raises(ValueError, match="clean_error must be fractions"):
        relative_mce(ERRORS, 5.0, BASELINE, 0.3)
