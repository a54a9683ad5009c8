"""Open-set and corruption metrics, exact with ties.

Open-set metrics take `scores` (N,), larger for samples that look more known, and `is_known` (N,),
boolean. A threshold t accepts all samples with score >= t, so samples of equal score are accepted
together and the order of the samples does not matter. Counts are integers, from one sort.

Arrays and tensors are accepted, on any device and in any floating dtype.
All open-set metrics raise ValueError if lengths differ, scores are NaN, or one side is missing.

With `weights` (B, N), `auroc` and `all_metrics` count each sample that many times and return arrays
(B,). The bootstrap of `ssl_gradmix.evaluation.intervals` resamples this way, without sorting again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, overload

import numpy as np
from torch import Tensor

Vector = np.ndarray | Tensor
Positive = Literal["known", "unknown"]
Errors = Mapping[str, float | Sequence[float]]

ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""AlexNet's top-1 error on ImageNet-C, mean over severities: the usual baseline of mCE there."""


@overload
def auroc(scores: Vector, is_known: Vector) -> float: ...
@overload
def auroc(scores: Vector, is_known: Vector, *, weights: np.ndarray) -> np.ndarray: ...
def auroc(
    scores: Vector, is_known: Vector, *, weights: np.ndarray | None = None
) -> float | np.ndarray:
    """Area under the ROC curve: the probability that a known sample scores above an unknown one.

        AUROC = sum_{i known, j unknown} (1[s_i > s_j] + 1[s_i = s_j] / 2) / (n_known * n_unknown)

    Equals scikit-learn's `roc_auc_score`. ARPL's code differs: it counts ties as 0.
    """
    counts = _count(scores, is_known, weights=weights)
    area = _area(counts, counts.known)
    return float(area) if weights is None else area


def average_precision(scores: Vector, is_known: Vector, positive: Positive = "known") -> float:
    """Average precision: `sum_t (recall_t - recall_{t-1}) precision_t` over thresholds t.

    This is the AUPR of Hendrycks et al. and scikit-learn's `average_precision_score`. OpenOOD and
    pytorch-ood report the trapezoid under the precision-recall curve, which is too large with ties:
    0.8 for constant scores of 600 known and 400 unknown samples, where the prevalence is 0.6.

    Args:
        positive: `"known"` (AUPR-IN), or `"unknown"` with negated scores (AUPR-OUT).
    """
    counts = _count(scores, is_known)
    return float(_average_precision(*_oriented(counts, positive)))


def fpr_at_tpr(
    scores: Vector,
    is_known: Vector,
    tpr: float = 0.95,
    positive: Positive = "known",
) -> float:
    """Smallest false positive rate among the thresholds whose true positive rate is at least `tpr`.

    With `positive="known"`: the fraction of unknown samples accepted at `threshold_at_tpr`, as in
    ODIN, kNN, energy and OpenOOD v1. With `positive="unknown"`: the fraction of known samples
    rejected when the fraction `tpr` of the unknown ones is rejected, as in Hendrycks et al.,
    OpenOOD v1.5 and pytorch-ood. The two differ, so reports must name their choice. Outlier
    Exposure and ARPL take the threshold with the nearest true positive rate, even below `tpr`.

    Args:
        tpr: True positive rate in (0, 1].
        positive: Which samples are the positives.
    """
    _check_tpr(tpr)
    counts = _count(scores, is_known)
    return float(_fpr_at_tpr(*_oriented(counts, positive), tpr))


def oscr(scores: Vector, is_known: Vector, correct: Vector) -> float:
    """Open-set classification rate: area under correct classification over false positive rate.

        OSCR = sum_{i known, j unknown} correct_i (1[s_i > s_j] + 1[s_i = s_j] / 2)
               / (n_known * n_unknown)

    At most the AUROC and at most the closed-set accuracy, which a perfect detector reaches; a
    random detector gets half of it. From Dhamija et al., "Reducing Network Agnostophobia", 2018,
    whose curve counts ties as 0. Here they count half, as in AUROC, in pytorch-ood's `oscr_score`
    and in OpenAUC (Wang et al., 2022): otherwise a coarser score looks worse for its ties alone.
    ARPL's `compute_oscr`, which the GradMix authors use, is about 1/(2 n_known) lower and depends
    on the order of tied samples.

    Args:
        correct: (N,) boolean, whether the predicted class is the true one. Ignored where `is_known`
            is False.
    """
    counts = _count(scores, is_known, correct)
    return float(_area(counts, counts.correct))


@overload
def all_metrics(
    scores: Vector, is_known: Vector, correct: Vector | None = None
) -> dict[str, float]: ...
@overload
def all_metrics(
    scores: Vector, is_known: Vector, correct: Vector | None = None, *, weights: np.ndarray
) -> dict[str, np.ndarray]: ...
def all_metrics(
    scores: Vector,
    is_known: Vector,
    correct: Vector | None = None,
    *,
    weights: np.ndarray | None = None,
) -> dict[str, float] | dict[str, np.ndarray]:
    """All open-set metrics of one score, from one sort.

    Args:
        correct: As in `oscr`, which is left out without it.

    Returns:
        `auroc`; `aupr_in` and `aupr_out`, average precision with known and with unknown samples as
        positives; `fpr95_id_pos` and `fpr95_ood_pos`, false positive rate at 95% true positive
        rate, likewise; `oscr`.
    """
    counts = _count(scores, is_known, correct, weights)
    known_first, unknown_first = _oriented(counts, "known"), _oriented(counts, "unknown")
    metrics = {
        "auroc": _area(counts, counts.known),
        "aupr_in": _average_precision(*known_first),
        "aupr_out": _average_precision(*unknown_first),
        "fpr95_id_pos": _fpr_at_tpr(*known_first, 0.95),
        "fpr95_ood_pos": _fpr_at_tpr(*unknown_first, 0.95),
    }
    if correct is not None:
        metrics["oscr"] = _area(counts, counts.correct)
    if weights is not None:
        return metrics
    return {name: float(value) for name, value in metrics.items()}


def threshold_at_tpr(scores: Vector, is_known: Vector, tpr: float = 0.95) -> float:
    """Largest threshold that accepts at least the fraction `tpr` of the known samples.

    To deploy a score, choose the threshold on held-out known samples and accept samples that score
    at least as much. Only the known samples are read; there need not be others.

    Args:
        tpr: In (0, 1].
    """
    _check_tpr(tpr)
    values, known = _checked(scores, is_known)
    if not known.any():
        raise ValueError("is_known must hold known samples")
    descending = np.sort(values[known])[::-1]
    accepted = np.arange(1, len(descending) + 1) / len(descending)
    return float(descending[np.argmax(accepted >= tpr)])


def mean_corruption_error(errors: Errors, baseline: Errors | None = None) -> float:
    """Mean corruption error, each corruption with equal weight.

    Without a baseline: the mean over corruptions of the mean error over severities, as usual for
    CIFAR-C (AugMix). With a baseline: the mCE of Hendrycks and Dietterich, "Benchmarking Neural
    Network Robustness", 2019,

        CE_c = sum_s errors[c][s] / sum_s baseline[c][s],    mCE = mean_c CE_c

    as a ratio, 1.0 for the baseline itself; papers print 100 times that.

    Args:
        errors: Top-1 errors in [0, 1] by corruption, one for each severity, or their mean.
        baseline: The same for the reference model, with as many severities; on ImageNet-C
            `ALEXNET_ERRORS`. Corruptions that `errors` lacks are ignored.

    Raises:
        ValueError: `errors` is empty, or an error is not a fraction in [0, 1].
        KeyError: The baseline lacks a corruption.
    """
    if not errors:
        raise ValueError("errors must hold at least one corruption")
    means = [_mean_error(errors[name]) for name in errors]
    if baseline is not None:
        references = [_mean_error(baseline[name]) for name in errors]
        means = [mean / reference for mean, reference in zip(means, references, strict=True)]
    return float(np.mean(means))


def as_numpy(values: Vector) -> np.ndarray:
    """The values of an array, or of a tensor on any device. Floating tensors become float64."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        # NumPy has no bfloat16.
        values = values.double() if values.is_floating_point() else values
    return np.asarray(values)


class _Counts(NamedTuple):
    """How many samples each threshold accepts, from infinity down: (T,), or (B, T) with weights."""

    known: np.ndarray
    unknown: np.ndarray
    correct: np.ndarray


def _count(
    scores: Vector,
    is_known: Vector,
    correct: Vector | None = None,
    weights: np.ndarray | None = None,
) -> _Counts:
    """Sorts once. Without `correct`, all known samples are taken as correct."""
    values, known = _checked(scores, is_known)
    if known.all() or not known.any():
        raise ValueError(f"is_known must hold both sides, got {known.sum()} known of {len(known)}")
    if weights is None:
        weights = np.ones(len(values), np.int64)
    # Sums of uint8 would overflow.
    weights = weights.astype(np.result_type(weights, np.int64), copy=False)

    order = np.argsort(-values)
    values, times = values[order], np.take(weights, order, axis=-1)
    is_last_of_ties = np.append(values[1:] != values[:-1], True)
    ends = np.append(0, np.flatnonzero(is_last_of_ties) + 1)

    def accepted(mask: np.ndarray) -> np.ndarray:
        running = np.zeros((*times.shape[:-1], len(values) + 1), times.dtype)
        np.cumsum(times * mask[order], axis=-1, out=running[..., 1:])
        return running if len(ends) > len(values) else running[..., ends]

    of_known = accepted(known)
    if correct is None:
        return _Counts(of_known, accepted(~known), of_known)
    right = known & _flags("correct", correct, len(values))
    return _Counts(of_known, accepted(~known), accepted(right))


def _oriented(counts: _Counts, positive: Positive) -> tuple[np.ndarray, np.ndarray]:
    """Accepted positives and negatives. Negated scores accept what a threshold rejects."""
    if positive == "known":
        return counts.known, counts.unknown
    if positive != "unknown":
        raise ValueError(f"positive must be 'known' or 'unknown', got {positive!r}")
    return _rejected(counts.unknown), _rejected(counts.known)


def _rejected(accepted: np.ndarray) -> np.ndarray:
    return (accepted[..., -1:] - accepted)[..., ::-1]


def _area(counts: _Counts, accepted: np.ndarray) -> np.ndarray:
    """Trapezoids below accepted fractions of the known samples, over false positive rates."""
    twice_heights = accepted[..., 1:] + accepted[..., :-1]
    area = (np.diff(counts.unknown) * twice_heights).sum(-1) / 2  # exact: halves of integers
    return area / counts.known[..., -1] / counts.unknown[..., -1]


def _average_precision(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    gained = np.diff(positive)
    accepted = (positive + negative)[..., 1:]
    # A resample may lack all samples accepted first. Accepting nothing gains nothing.
    nothing = np.zeros(accepted.shape)
    precision = np.divide(positive[..., 1:], accepted, out=nothing, where=accepted > 0)
    return (gained * precision).sum(-1) / positive[..., -1]


def _fpr_at_tpr(positive: np.ndarray, negative: np.ndarray, tpr: float) -> np.ndarray:
    # Divide, then compare: 55 / 100 >= 0.55 holds in floating point, 55 >= 0.55 * 100 does not.
    rates = positive / positive[..., -1:]
    first = np.argmax(rates >= tpr, axis=-1)
    accepted = np.take_along_axis(negative, first[..., None], axis=-1)
    return accepted[..., 0] / negative[..., -1]


def _check_tpr(tpr: float) -> None:
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must be above 0 and at most 1, got {tpr!r}")


def _checked(scores: Vector, is_known: Vector) -> tuple[np.ndarray, np.ndarray]:
    values = as_numpy(scores).astype(np.float64)
    if values.ndim != 1 or np.isnan(values).any():
        raise ValueError(f"scores must be (N,) without NaN, got shape {values.shape}")
    return values, _flags("is_known", is_known, len(values))


def _flags(name: str, values: Vector, length: int) -> np.ndarray:
    flags = as_numpy(values)
    if flags.dtype != bool or flags.shape != (length,):
        raise ValueError(f"{name} must be boolean ({length},), got {flags.dtype} {flags.shape}")
    return flags


def _mean_error(errors: float | Sequence[float]) -> float:
    fractions = np.asarray(errors, np.float64)
    if not np.all((fractions >= 0) & (fractions <= 1)):
        raise ValueError(f"errors must be fractions in [0, 1], got {errors}: divide percent by 100")
    return float(fractions.mean())
