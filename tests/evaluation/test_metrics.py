from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from pytorch_ood.metrics import functional as pytorch_ood
from sklearn.metrics import average_precision_score, roc_auc_score

from ssl_gradmix.evaluation.metrics import (
    ALEXNET_ERRORS,
    all_metrics,
    auroc,
    average_precision,
    fpr_at_tpr,
    mean_corruption_error,
    oscr,
    threshold_at_tpr,
)

EXACT = {"abs": 1e-9, "rel": 0}


def gaussian(n_known: int = 60, n_unknown: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    is_known = rng.permutation(np.arange(n_known + n_unknown) < n_known)
    return rng.normal(size=len(is_known)) + is_known, is_known, rng.random(len(is_known)) < 0.7


def cases() -> Iterator:
    scores, is_known, correct = gaussian()
    none, every = np.zeros(100, dtype=bool), np.ones(100, dtype=bool)
    yield pytest.param(scores, is_known, correct, id="distinct")
    yield pytest.param(np.round(scores), is_known, correct, id="ties")
    yield pytest.param(np.zeros(100), is_known, correct, id="constant")
    yield pytest.param(is_known.astype(float), is_known, correct, id="perfect")
    yield pytest.param(1.0 - is_known, is_known, correct, id="inverted")
    yield pytest.param(scores, is_known, none, id="none correct")
    yield pytest.param(1000 * scores - 5000, is_known, every, id="all correct, far from [0, 1]")
    yield pytest.param(*gaussian(1, 40), id="one known")
    yield pytest.param(*gaussian(40, 1), id="one unknown")
    infinite = np.array([np.inf, np.inf, 0.0, -0.0, -np.inf])
    yield pytest.param(infinite, np.arange(5) % 2 == 0, np.arange(5) < 3, id="infinite")


every_case = pytest.mark.parametrize(("scores", "is_known", "correct"), list(cases()))


def pair_share(scores: np.ndarray, is_known: np.ndarray, correct: np.ndarray) -> float:
    """Fraction of pairs of a (correct) known and an unknown sample that the score orders."""
    known, unknown = scores[is_known][:, None], scores[~is_known]
    wins = (known > unknown) + 0.5 * (known == unknown)
    return (correct[is_known][:, None] * wins).mean()


def best_fpr(scores: np.ndarray, positive: np.ndarray, tpr: float) -> float:
    """The definition, threshold by threshold, for positives that score high."""
    enough = [t for t in scores[positive] if np.mean(scores[positive] >= t) >= tpr]
    return min(np.mean(scores[~positive] >= t) for t in enough)


def outliers(scores: np.ndarray, is_known: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """pytorch-ood has larger scores for unknown samples, whose labels are negative."""
    return torch.from_numpy(-scores), torch.from_numpy(np.where(is_known, 0, -1))


@every_case
def test_auroc_equals_pairs_scikit_learn_and_pytorch_ood(scores, is_known, correct) -> None:
    value = auroc(scores, is_known)
    expected = pair_share(scores, is_known, np.ones_like(is_known))
    assert value == pytest.approx(expected, **EXACT)
    assert value == pytest.approx(pytorch_ood.auroc(*outliers(scores, is_known)).item(), **EXACT)
    if np.isfinite(scores).all():
        assert value == pytest.approx(roc_auc_score(is_known, scores), **EXACT)
    assert value == pytest.approx(1 - auroc(-scores, is_known), **EXACT)


@every_case
def test_average_precision_equals_scikit_learn(scores, is_known, correct) -> None:
    ranks = np.unique(scores, return_inverse=True)[1]  # scikit-learn rejects infinite scores
    expected = average_precision_score(is_known, ranks)
    assert average_precision(scores, is_known) == pytest.approx(expected, **EXACT)
    expected = average_precision_score(~is_known, -ranks)
    found = average_precision(scores, is_known, positive="unknown")
    assert found == pytest.approx(expected, **EXACT)


@every_case
@pytest.mark.parametrize("tpr", [0.05, 0.5, 0.95, 1.0])
def test_fpr_equals_the_definition_and_pytorch_ood(scores, is_known, correct, tpr) -> None:
    expected = best_fpr(scores, is_known, tpr)
    assert fpr_at_tpr(scores, is_known, tpr) == pytest.approx(expected, **EXACT)
    value = fpr_at_tpr(scores, is_known, tpr, positive="unknown")
    assert value == pytest.approx(best_fpr(-scores, ~is_known, tpr), **EXACT)
    oracle = pytorch_ood.fpr_at_tpr(*outliers(scores, is_known), tpr).item()
    assert value == pytest.approx(oracle, **EXACT)


def test_tpr_is_reached_by_exactly_that_many_samples() -> None:
    """55 of 100 known samples score above the unknown one; in floats, 0.55 * 100 > 55."""
    scores, is_known = np.arange(101.0), np.arange(101) != 45
    assert fpr_at_tpr(scores, is_known, 0.55) == 0
    assert fpr_at_tpr(scores, is_known, 0.56) == 1
    assert threshold_at_tpr(scores, is_known, 0.55) == 46
    # scikit-learn's roc_curve drops collinear points by default, where the answer lies here.
    scores, is_known = np.repeat(np.arange(20), 2), np.tile([True, False], 20)
    assert fpr_at_tpr(scores, is_known, 0.95) == pytest.approx(0.95, **EXACT)


@every_case
def test_oscr_equals_pairs_pytorch_ood_and_openauc(scores, is_known, correct) -> None:
    """OpenAUC (Wang et al., 2022) gives wrongly classified samples the lowest score."""
    value = oscr(scores, is_known, correct)
    assert value == pytest.approx(pair_share(scores, is_known, correct), **EXACT)
    predictions = torch.from_numpy(np.where(correct, 0, 1))
    unknownness, labels = outliers(scores, is_known)
    oracle = pytorch_ood.oscr_score(unknownness, predictions, labels)
    assert value == pytest.approx(oracle, **EXACT)
    if np.isfinite(scores).all():
        demoted = np.where(is_known & ~correct, scores.min() - 1, scores)
        assert value == pytest.approx(roc_auc_score(is_known, demoted), **EXACT)
    assert oscr(scores, is_known, correct | ~is_known) == value
    assert 0 <= value <= min(correct[is_known].mean(), auroc(scores, is_known)) + 1e-12


@every_case
@pytest.mark.parametrize("tpr", [0.01, 0.3, 0.95, 1.0])
def test_threshold_is_the_largest_that_accepts_enough(scores, is_known, correct, tpr) -> None:
    threshold = threshold_at_tpr(scores, is_known, tpr)
    known = scores[is_known]
    assert np.mean(known >= threshold) >= tpr > np.mean(known > threshold)
    assert np.mean(scores[~is_known] >= threshold) == fpr_at_tpr(scores, is_known, tpr)
    assert threshold_at_tpr(known, np.ones(len(known), dtype=bool), tpr) == threshold


@every_case
def test_all_metrics_are_the_single_ones(scores, is_known, correct) -> None:
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


@every_case
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float16])
def test_weights_equal_repeated_samples(scores, is_known, correct, dtype) -> None:
    weights = np.random.default_rng(0).integers(0, 4, (3, len(scores)))
    weights[:, [np.argmax(is_known), np.argmin(is_known)]] = 200  # sums that uint8 does not hold
    weighted = all_metrics(scores, is_known, correct, weights=weights.astype(dtype))
    assert np.array_equal(weighted["auroc"], auroc(scores, is_known, weights=weights))
    for row, times in enumerate(weights):
        copies = [np.repeat(column, times) for column in (scores, is_known, correct)]
        for name, value in all_metrics(*copies).items():
            assert weighted[name].shape == (3,)
            assert weighted[name][row] == pytest.approx(value, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int32, torch.uint8])
def test_tensors_of_any_dtype_equal_arrays(dtype) -> None:
    scores, is_known, correct = gaussian()
    tensor = torch.from_numpy(np.round(10 * scores) + 100).to(dtype)
    expected = all_metrics(tensor.double().numpy(), is_known, correct)
    assert all_metrics(tensor, *map(torch.from_numpy, (is_known, correct))) == expected


ERRORS = {"fog": [0.2, 0.4], "snow": [0.1, 0.7]}
BASELINE = {"fog": [0.5, 0.7], "snow": [0.8, 0.8], "frost": [0.9, 0.9]}


NONE = np.zeros(100, dtype=bool)


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (auroc, {"scores": np.full(100, np.nan)}, "scores"),
        (auroc, {"scores": np.zeros((100, 1))}, "scores"),
        (all_metrics, {"is_known": NONE}, "is_known"),
        (average_precision, {"is_known": ~NONE}, "is_known"),
        (fpr_at_tpr, {"is_known": np.arange(100) % 2}, "is_known"),
        (auroc, {"is_known": np.arange(99) < 2}, "is_known"),
        (auroc, {"scores": np.zeros(0), "is_known": NONE[:0]}, "is_known"),
        (average_precision, {"positive": "ood"}, "positive"),
        (fpr_at_tpr, {"tpr": 95}, "tpr"),
        (threshold_at_tpr, {"tpr": float("nan")}, "tpr"),
        (threshold_at_tpr, {"is_known": NONE}, "is_known"),
        (oscr, {"correct": NONE[:60]}, "correct"),
        (all_metrics, {"correct": np.ones(100, dtype=int)}, "correct"),
    ],
)
def test_invalid_samples_raise(function, arguments, named) -> None:
    scores, is_known, _ = gaussian()
    with pytest.raises(ValueError, match=named):
        function(**{"scores": scores, "is_known": is_known} | arguments)


@pytest.mark.parametrize("errors", [{}, {"fog": [20.0, 40.0]}, {"fog": [0.2, np.nan]}])
def test_invalid_errors_raise(errors) -> None:
    with pytest.raises(ValueError, match="errors"):
        mean_corruption_error(errors)


def test_corruption_errors_by_hand() -> None:
    assert mean_corruption_error(ERRORS) == pytest.approx((0.3 + 0.4) / 2, **EXACT)
    expected = pytest.approx((0.6 / 1.2 + 0.8 / 1.6) / 2, **EXACT)
    assert mean_corruption_error(ERRORS, BASELINE) == expected
    assert mean_corruption_error({"fog": 0.3, "snow": 0.4}, BASELINE) == expected
    with pytest.raises(KeyError, match="snow"):
        mean_corruption_error(ERRORS, {"fog": 0.1})
    assert mean_corruption_error(ALEXNET_ERRORS, ALEXNET_ERRORS) == pytest.approx(1, **EXACT)
    halves = dict.fromkeys(ALEXNET_ERRORS, [0.5] * 5)
    expected = np.mean([0.5 / error for error in ALEXNET_ERRORS.values()])
    assert mean_corruption_error(halves, ALEXNET_ERRORS) == pytest.approx(expected, **EXACT)
