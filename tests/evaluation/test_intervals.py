from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import roc_auc_score

from ssl_gradmix.evaluation import intervals
from ssl_gradmix.evaluation.intervals import accuracy_interval, bootstrap_interval
from ssl_gradmix.evaluation.metrics import all_metrics, auroc

Samples = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture
def samples() -> Samples:
    """Scores with ties, which samples are known, and which are classified correctly."""
    rng = np.random.default_rng(0)
    is_known = rng.permutation(np.arange(300) < 180)
    scores = rng.normal(size=300) + is_known
    return np.round(scores, 1), is_known, rng.random(300) < 0.8


def drawn_weights(strata: np.ndarray, n: int) -> np.ndarray:
    """The resamples that a statistic is given."""
    seen = []

    def statistic(_: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray | float:
        if weights is None:
            return 0.0
        seen.append(weights)
        return np.zeros(len(weights))

    bootstrap_interval(statistic, strata, strata=strata, n=n)
    return np.concatenate(seen)


def test_intervals_equal_scikit_learn_on_every_resample(samples: Samples) -> None:
    """OSCR is the AUROC if wrongly classified samples score lowest (Wang et al., 2022)."""
    scores, is_known, correct = samples
    demoted = np.where(is_known & ~correct, scores.min() - 1, scores)
    weights = drawn_weights(is_known, n=100)
    found = intervals.bootstrap_intervals(all_metrics, *samples, strata=is_known, n=100)
    for name, values in (("auroc", scores), ("oscr", demoted)):
        naive = [
            roc_auc_score(np.repeat(is_known, times), np.repeat(values, times)) for times in weights
        ]
        assert found[name].value == pytest.approx(roc_auc_score(is_known, values), abs=1e-9)
        assert found[name][1:] == pytest.approx(np.quantile(naive, [0.025, 0.975]), abs=1e-9)
    single = bootstrap_interval(auroc, scores, is_known, strata=is_known, n=100)
    assert single == found["auroc"]
    assert found.keys() == all_metrics(*samples).keys()
    tensors = [torch.from_numpy(array) for array in samples]
    again = intervals.bootstrap_intervals(all_metrics, *tensors, strata=tensors[1], n=100)
    assert again == found


def test_resamples_are_drawn_with_replacement_within_each_stratum() -> None:
    strata = np.repeat([2, 0, 1], [50, 30, 1])
    weights = drawn_weights(strata, n=4000)
    assert weights.shape == (4000, 81)
    for stratum, size in ((2, 50), (0, 30), (1, 1)):
        assert (weights[:, strata == stratum].sum(1) == size).all()
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.08)  # five standard errors
    np.testing.assert_allclose(weights[:, :50].var(0), 1 - 1 / 50, atol=0.15)  # multinomial


def test_seed_level_and_blocks(samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, is_known, _ = samples
    bootstrap = partial(bootstrap_interval, auroc, scores, is_known, strata=is_known, n=500)
    whole, half = bootstrap(), bootstrap(level=0.5)
    assert whole == bootstrap(seed=0) != bootstrap(seed=1)
    assert whole.low < half.low < whole.value < half.high < whole.high
    monkeypatch.setattr(intervals, "_WEIGHTS_AT_ONCE", 1)  # one resample at a time
    assert bootstrap() == pytest.approx(whole, abs=0.01)
    assert drawn_weights(is_known, n=5).shape == (5, 300)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (7, 10), (1, 1), (941, 1000)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_accuracy_interval_is_the_formula_of_wilson(right: int, n: int, level: float) -> None:
    z = scipy.stats.norm.ppf((1 + level) / 2)
    p = right / n
    center = p + z**2 / (2 * n)
    width = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    interval = accuracy_interval(np.arange(n) < right, level)
    expected = p, (center - width) / (1 + z**2 / n), (center + width) / (1 + z**2 / n)
    assert interval == pytest.approx(expected, abs=1e-9)
    assert accuracy_interval(torch.arange(n) < right, level) == interval


@pytest.mark.parametrize("length", [10, 301])
def test_strata_of_another_length_raise(samples: Samples, length: int) -> None:
    with pytest.raises(ValueError, match="strata"):
        bootstrap_interval(auroc, *samples[:2], strata=np.arange(length))
