"""Open-set and corruption metrics, exact with ties.

In the open-set metrics, `scores` (N,) are larger the more a sample looks known, of any range, and `is_known` (N,) is
True for samples of known classes. A threshold t accepts the samples with score >= t, and samples of equal score are
accepted together, so no result depends on the order of the samples. All sort once, O(N log N), and count in integers.

Arrays and tensors are taken, on any device and in any floating dtype. All open-set metrics raise ValueError where
shapes or dtypes do not fit, where scores are NaN, and where known or unknown samples are missing.

`weights` (N,) or (B, N) count every sample so many times. With B rows the result has shape (B,): this is how
`ssl_gradmix.evaluation.intervals` resamples without sorting again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

Vector = np.ndarray | Tensor
Positive = Literal["known", "unknown"]

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
"""AlexNet's top-1 error on ImageNet-C, averaged over the five severities: the usual baseline of mCE on ImageNet-C."""

ALEXNET_CLEAN_ERROR = 0.435
"""AlexNet's top-1 error on the clean ImageNet validation set."""


def auroc(scores: Vector, is_known: Vector, *, weights: np.ndarray | None = None) -> float:
    """Area under the ROC curve: the probability that a known sample scores above an unknown one, ties counting half.

        AUROC = sum_{i known, j unknown} (1[s_i > s_j] + 1[s_i = s_j] / 2) / (n_known * n_unknown)

    It is the same with the unknown samples as the positive class and scores negated. Equals scikit-learn's
    `roc_auc_score`; ARPL's code differs, it counts ties as 0.
    """
    counts = _count(scores, is_known, weights)
    return _plain(_auroc(counts.known, counts.unknown))


def average_precision(
    scores: Vector, is_known: Vector, positive: Positive = "known", *, weights: np.ndarray | None = None
) -> float:
    """Average precision, the AUPR of Hendrycks et al.: `sum_t (recall_t - recall_{t-1}) precision_t` over thresholds t.

    Equals scikit-learn's `average_precision_score`. OpenOOD and pytorch-ood report the trapezoid under the
    precision-recall curve instead, which agrees without ties, but is too large with them (constant scores of 600 known
    and 400 unknown samples: 0.8 there, the prevalence 0.6 here).

    Args:
        positive: The class to be found: `"known"` (AUPR-IN), or `"unknown"` with scores negated (AUPR-OUT).
    """
    return _plain(_average_precision(*_oriented(_count(scores, is_known, weights), positive)))


def fpr_at_tpr(
    scores: Vector,
    is_known: Vector,
    tpr: float = 0.95,
    positive: Positive = "known",
    *,
    weights: np.ndarray | None = None,
) -> float:
    """Smallest false positive rate of the thresholds whose true positive rate is at least `tpr`.

    With `positive="known"`: the share of unknown samples accepted by the threshold that accepts the share `tpr` of the
    known ones (ODIN, kNN, energy, OpenOOD v1), which is `threshold_at_tpr`. With `positive="unknown"`: the share of
    known samples rejected when the share `tpr` of the unknown ones is rejected (Hendrycks et al., OpenOOD v1.5,
    pytorch-ood). The two differ, so a report has to name its choice. Outlier Exposure and ARPL take the threshold with
    the nearest true positive rate, which may lie below `tpr`.

    Args:
        tpr: In (0, 1].
        positive: Which samples are the positives.
    """
    _check_tpr(tpr)
    return _plain(_fpr_at_tpr(*_oriented(_count(scores, is_known, weights), positive), tpr))


def oscr(
    scores: Vector,
    is_known: Vector,
    correct: Vector,
    ties: Literal["half", "strict"] = "half",
    *,
    weights: np.ndarray | None = None,
) -> float:
    """Open-set classification rate: the area under the correct classification rate over the false positive rate.

        OSCR = sum_{i known, j unknown} correct_i (1[s_i > s_j] + w 1[s_i = s_j]) / (n_known * n_unknown)

    At most AUROC and at most the closed-set accuracy, which a perfect detector reaches; a random one gets half of it.
    From Dhamija et al., "Reducing Network Agnostophobia", 2018. Their curve counts known samples with score > t and
    unknown ones with score >= t, so ties count nothing (`ties="strict"`, w = 0). The default, w = 1/2, treats ties as
    AUROC does, and equals pytorch-ood's `oscr_score` and OpenAUC (Wang et al., 2022): without it, a coarser score looks
    worse for its ties alone. The `compute_oscr` of ARPL, which the GradMix authors use, lies about 1/(2 n_known) below,
    and with ties depends on the order of the samples.

    Args:
        correct: (N,) boolean, whether the predicted class is the true one; not read where `is_known` is False.
        ties: Whether a tie of a known with an unknown sample counts half or not at all.
    """
    if ties not in ("half", "strict"):
        raise ValueError(f"ties must be 'half' or 'strict', got {ties!r}")
    counts = _count(scores, is_known, weights, correct)
    if ties == "half":
        return _plain(_oscr(counts))
    area = (np.diff(counts.unknown) * counts.correct[..., :-1]).sum(-1)
    return _plain(area / counts.known[..., -1] / counts.unknown[..., -1])


def all_metrics(
    scores: Vector, is_known: Vector, correct: Vector | None = None, *, weights: np.ndarray | None = None
) -> dict[str, float]:
    """The open-set metrics of one score by name, from one sort; without `correct` (N,), see `oscr`, OSCR is left out.

    Returns:
        `auroc`; `aupr_in` and `aupr_out`, the average precision with known and with unknown samples as positives;
        `fpr95_id_pos` and `fpr95_ood_pos`, the false positive rate at 95% true positive rate likewise; `oscr`.
    """
    counts = _count(scores, is_known, weights, correct)
    known_first, unknown_first = _oriented(counts, "known"), _oriented(counts, "unknown")
    metrics = {
        "auroc": _auroc(counts.known, counts.unknown),
        "aupr_in": _average_precision(*known_first),
        "aupr_out": _average_precision(*unknown_first),
        "fpr95_id_pos": _fpr_at_tpr(*known_first, 0.95),
        "fpr95_ood_pos": _fpr_at_tpr(*unknown_first, 0.95),
    }
    if correct is not None:
        metrics["oscr"] = _oscr(counts)
    return {name: _plain(value) for name, value in metrics.items()}


def roc_curve(scores: Vector, is_known: Vector) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """False and true positive rates and their thresholds, known samples positive; the trapezoid below is `auroc`.

    Returns:
        Three arrays of one point for each distinct score and one for accepting nothing: from (0, 0) at threshold
        infinity to (1, 1) at the smallest score.
    """
    counts = _count(scores, is_known)
    return counts.unknown / counts.unknown[-1], counts.known / counts.known[-1], counts.thresholds


def oscr_curve(scores: Vector, is_known: Vector, correct: Vector) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """False positive and correct classification rates and their thresholds; the trapezoid below is `oscr`.

    Returns:
        Three arrays of one point for each distinct score and one for accepting nothing: from (0, 0) at threshold
        infinity to (1, closed-set accuracy) at the smallest score.
    """
    counts = _count(scores, is_known, correct=correct)
    return counts.unknown / counts.unknown[-1], counts.correct / counts.known[-1], counts.thresholds


def threshold_at_tpr(scores: Vector, is_known: Vector, tpr: float = 0.95) -> float:
    """Largest threshold t such that `score >= t` accepts at least the share `tpr` of the known samples.

    To act on a score: choose t on held-out known samples, then accept what scores t or more. Only the known samples
    are read, and there need not be others.

    Args:
        tpr: In (0, 1].
    """
    _check_tpr(tpr)
    scores, is_known = _checked_scores(scores, is_known)
    known = np.sort(scores[is_known])[::-1]
    if len(known) == 0:
        raise ValueError(f"is_known must hold known samples, got 0 known of {len(scores)}")
    accepted = np.arange(1, len(known) + 1) / len(known)
    return float(known[np.argmax(accepted >= tpr)])


def mean_corruption_error(
    errors: Mapping[str, float | Sequence[float]], baseline: Mapping[str, float | Sequence[float]] | None = None
) -> float:
    """Mean corruption error over the corruptions of `errors`, each with equal weight.

    Without a baseline: the mean over corruptions of the mean error over severities, as is usual for CIFAR-C (AugMix).
    With one: mCE of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness", 2019,

        CE_c = sum_s errors[c][s] / sum_s baseline[c][s],    mCE = mean_c CE_c

    as a ratio, 1.0 for the baseline itself; papers print 100 times that. For ImageNet-C it is `ALEXNET_ERRORS`.

    Args:
        errors: Corruption to top-1 errors in [0, 1], one a severity, or their mean as a single number.
        baseline: The same of the model to compare with, for at least the corruptions of `errors`.

    Raises:
        ValueError: If `errors` is no mapping or has no corruption, an error lies outside [0, 1] or is NaN, corruptions
            differ in their number of severities, or the baseline makes no errors on a corruption.
        KeyError: If the baseline lacks a corruption.
    """
    mean = _mean_errors("errors", errors)
    if baseline is None:
        return float(np.mean(list(mean.values())))
    base = _mean_errors("baseline", baseline, needed=errors)
    _refuse_not_positive("baseline errors", base)
    return float(np.mean([mean[name] / base[name] for name in mean]))


def relative_mce(
    errors: Mapping[str, float | Sequence[float]],
    clean_error: float,
    baseline: Mapping[str, float | Sequence[float]],
    baseline_clean: float,
) -> float:
    """Relative mCE: how much more corruptions cost than clean images do, against the same of a baseline.

        relative CE_c = sum_s (errors[c][s] - clean_error) / sum_s (baseline[c][s] - baseline_clean),    mean over c

    as a ratio, 1.0 for the baseline itself. From Hendrycks and Dietterich, 2019; for ImageNet-C the baseline is
    `ALEXNET_ERRORS` with `ALEXNET_CLEAN_ERROR`.

    Args:
        errors: As in `mean_corruption_error`.
        clean_error: Top-1 error on clean images, in [0, 1].
        baseline: As in `mean_corruption_error`.
        baseline_clean: The baseline's error on clean images, in [0, 1].

    Raises:
        ValueError: As `mean_corruption_error`, and if a corruption does not raise the baseline's error.
        KeyError: If the baseline lacks a corruption.
    """
    clean = _mean_errors("clean_error", {"clean": clean_error})["clean"]
    base_clean = _mean_errors("baseline_clean", {"clean": baseline_clean})["clean"]
    rise = {name: error - clean for name, error in _mean_errors("errors", errors).items()}
    base_rise = {name: error - base_clean for name, error in _mean_errors("baseline", baseline, errors).items()}
    _refuse_not_positive("baseline errors above baseline_clean", base_rise)
    return float(np.mean([rise[name] / base_rise[name] for name in rise]))


class _Counts(NamedTuple):
    """Weight of the samples accepted at each threshold, falling from infinity: `thresholds` (T,), others (..., T)."""

    thresholds: np.ndarray
    known: np.ndarray
    unknown: np.ndarray
    correct: np.ndarray | None


def _count(
    scores: Vector, is_known: Vector, weights: np.ndarray | None = None, correct: Vector | None = None
) -> _Counts:
    scores, is_known = _checked_scores(scores, is_known)
    n_known = int(is_known.sum())
    if n_known in (0, len(scores)):
        raise ValueError(
            f"is_known must hold known and unknown samples, got {n_known} known and {len(scores) - n_known} unknown"
        )
    if weights is None:
        weights = np.ones(len(scores), dtype=np.int64)
    elif not isinstance(weights, np.ndarray) or weights.dtype.kind not in "iuf":
        kind = getattr(weights, "dtype", type(weights).__name__)
        raise ValueError(f"weights must be a NumPy array of whole or real numbers, got {kind}")
    elif weights.ndim not in (1, 2) or weights.shape[-1] != len(scores):
        raise ValueError(f"weights must have shape ({len(scores)},) or (B, {len(scores)}), got {weights.shape}")
    else:  # of few bits, their sums would overflow
        weights = weights.astype(np.float64 if weights.dtype.kind == "f" else np.int64, copy=False)

    order = np.argsort(-scores)
    scores, is_known, weights = scores[order], is_known[order], np.take(weights, order, axis=-1)
    last_of_ties = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))

    def accepted(mask: np.ndarray) -> np.ndarray:
        running = np.zeros((*weights.shape[:-1], len(scores) + 1), dtype=weights.dtype)
        np.cumsum(weights * mask, axis=-1, out=running[..., 1:])
        return running if len(last_of_ties) == len(scores) else running[..., np.append(0, last_of_ties + 1)]

    known, unknown = accepted(is_known), accepted(~is_known)
    if not (np.all(known[..., -1] > 0) and np.all(unknown[..., -1] > 0)):
        raise ValueError("weights must leave known and unknown samples in every row")
    if correct is not None:
        correct = accepted(is_known & _as_vector("correct", correct, "b", len(scores))[order])
    return _Counts(np.append(np.inf, scores[last_of_ties]), known, unknown, correct)


def _oriented(counts: _Counts, positive: Positive) -> tuple[np.ndarray, np.ndarray]:
    """Weights of accepted positives and negatives. What a threshold rejects is what the negated scores accept."""
    if positive == "known":
        return counts.known, counts.unknown
    if positive == "unknown":
        return tuple((accepted[..., -1:] - accepted)[..., ::-1] for accepted in (counts.unknown, counts.known))
    raise ValueError(f"positive must be 'known' or 'unknown', got {positive!r}")


def _area(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Trapezoids; of integers, so exact up to the division."""
    return (np.diff(x) * (y[..., 1:] + y[..., :-1])).sum(-1) / 2


def _auroc(known: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    return _area(unknown, known) / known[..., -1] / unknown[..., -1]


def _oscr(counts: _Counts) -> np.ndarray:
    return _area(counts.unknown, counts.correct) / counts.known[..., -1] / counts.unknown[..., -1]


def _average_precision(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    gained, accepted = np.diff(positive), (positive + negative)[..., 1:]
    # A resample may draw none of the samples accepted first: nothing accepted gains nothing.
    precision = np.divide(positive[..., 1:], accepted, out=np.zeros(accepted.shape), where=accepted > 0)
    return (gained * precision).sum(-1) / positive[..., -1]


def _fpr_at_tpr(positive: np.ndarray, negative: np.ndarray, tpr: float) -> np.ndarray:
    # Divided before it is compared: in floating point 55 / 100 >= 0.55 holds, but 55 >= 0.55 * 100 does not.
    first = np.argmax(positive / positive[..., -1:] >= tpr, axis=-1)
    return np.take_along_axis(negative, first[..., None], axis=-1)[..., 0] / negative[..., -1]


def _plain(value: np.ndarray) -> float | np.ndarray:
    return value if value.ndim else float(value)


def _check_tpr(tpr: float) -> None:
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must be above 0 and at most 1, got {tpr!r}")


def _checked_scores(scores: Vector, is_known: Vector) -> tuple[np.ndarray, np.ndarray]:
    scores = _as_vector("scores", scores, "fiu").astype(np.float64)
    broken = int(np.isnan(scores).sum())
    if broken:
        raise ValueError(f"scores must be numbers, got {broken} NaN of {len(scores)}")
    return scores, _as_vector("is_known", is_known, "b", len(scores))


def _as_vector(name: str, values: Vector, kinds: str, length: int | None = None) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values  # NumPy has no bfloat16
    values = np.asarray(values)
    wanted = "boolean" if kinds == "b" else "real numbers"
    if values.dtype.kind not in kinds:
        raise ValueError(f"{name} must be {wanted}, got {values.dtype}")
    if values.ndim != 1 or (length is not None and len(values) != length):
        raise ValueError(f"{name} must have shape ({'N' if length is None else length},), got {values.shape}")
    return values


def _mean_errors(
    name: str, errors: Mapping[str, float | Sequence[float]], needed: Mapping | None = None
) -> dict[str, float]:
    """Mean over severities of each corruption, of the `needed` ones alone where given."""
    if not isinstance(errors, Mapping):
        raise ValueError(f"{name} must be a mapping of corruptions to errors, got {type(errors).__name__}")
    needed = errors if needed is None else needed
    missing = [corruption for corruption in needed if corruption not in errors]
    if missing:
        raise KeyError(f"{name} lacks {missing}: give its errors, or leave these corruptions out of errors")
    if not needed:
        raise ValueError(f"{name} must hold at least one corruption, got none")
    table = {corruption: np.atleast_1d(np.asarray(errors[corruption], np.float64)) for corruption in needed}
    for corruption, values in table.items():
        bad = int((~((values >= 0) & (values <= 1))).sum())
        if bad or values.ndim != 1 or values.size == 0:
            raise ValueError(
                f"{name} must be fractions in [0, 1], one a severity (divide percent by 100): "
                f"{corruption} has shape {values.shape} and {bad} values outside"
            )
    sizes = {corruption: values.size for corruption, values in table.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{name} must have as many severities for every corruption, got {sizes}")
    return {corruption: float(values.mean()) for corruption, values in table.items()}


def _refuse_not_positive(name: str, values: Mapping[str, float]) -> None:
    bad = [corruption for corruption, value in values.items() if not value > 0]
    if bad:
        raise ValueError(f"{name} must be above 0 to divide by, got {values[bad[0]]:g} for {bad[0]}")
