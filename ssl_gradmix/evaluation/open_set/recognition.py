"""Open set recognition on frozen features: how well scores tell known from unknown test images, over trials and runs.

Out-of-distribution detection is the same with unknown images from another data set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from ssl_gradmix.evaluation.intervals import accuracy_interval, bootstrap_intervals, paired_difference
from ssl_gradmix.evaluation.knn import knn_predict, used_k
from ssl_gradmix.evaluation.metrics import all_metrics, auroc, oscr, threshold_at_tpr
from ssl_gradmix.evaluation.open_set.samples import Settings
from ssl_gradmix.evaluation.open_set.trials import Labeled
from ssl_gradmix.evaluation.probes import LinearProbe, linear_probe
from ssl_gradmix.evaluation.results import Row
from ssl_gradmix.evaluation.scores import all_scores, parameters_used

_VOTERS, _TEMPERATURE = 20, 0.07  # those of `knn_predict`
_ON_LOGITS = ("vim", "msp", "max_logit", "energy")
_NO_SCORES = ("is_known", "correct", "labels")


def fit(train: Labeled, settings: Settings) -> LinearProbe:
    """Fits the linear probe that predicts classes and gives logits, to features (N, D) and labels (N,)."""
    return linear_probe(*train, epochs=settings.epochs, seed=settings.seed)


def closed_set(
    probe: LinearProbe, train: Labeled, test: Labeled, settings: Settings, row: Callable[..., Row]
) -> list[Row]:
    """Accuracy on test images of known classes, of the linear probe and weighted kNN, with Wilson 95% intervals.

    Args:
        probe: From `fit` to `train`.
        train: Features (N, D) of the known classes' training images, and labels (N,).
        test: Features (M, D) of their test images, and labels (M,).
        settings: That `probe` was fitted with.
        row: Makes a row of `(score, metric, interval, n, **params)`, as `Evaluation.row` does.
    """
    features, labels = test
    votes = {"k": used_k(_VOTERS, train[0]), "temperature": _TEMPERATURE}
    linear = accuracy_interval(probe.predict(features) == labels)
    nearest = accuracy_interval(knn_predict(features, *train, _VOTERS, _TEMPERATURE) == labels)
    return [
        row("linear", "accuracy", linear, len(labels), **_training(probe, settings)),
        row("knn", "accuracy", nearest, len(labels), **votes),
    ]


def detect(
    probe: LinearProbe,
    train: Labeled,
    test: Labeled,
    is_known: Tensor,
    settings: Settings,
    row: Callable[..., Row],
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Tells known from unknown test samples by every score of `scores.all_scores`.

    Args:
        probe: From `fit` to `train`.
        train: Features (N, D) of the known classes' training images, and labels (N,).
        test: Features (M, D) of known and unknown test images, and labels (M,), of any numbers where unknown.
        is_known: (M,) boolean.
        settings: That `probe` was fitted with. More neighbors than there are count as all.
        row: As in `closed_set`.

    Returns:
        Rows by score: those of `metrics.all_metrics`, with bootstrap 95% intervals, where OSCR counts what the probe
        names right, whatever the score; and `threshold_tpr95`, which 95% of the known test samples reach.

        Samples (M,) by name: `is_known`, `correct` (False where unknown), `labels`, and each score.
    """
    features, labels = test
    k, top_k = settings.neighbors
    scores = all_scores(*train, features, probe.logits(train[0]), probe.logits(features), k, top_k)
    params = parameters_used(*train, k, top_k)
    known = is_known.cpu().numpy()
    correct = known & (probe.predict(features) == labels).cpu().numpy()
    training = _training(probe, settings)
    rows = []
    for name, values in scores.items():
        used = params.get(name, {}) | (training if name in _ON_LOGITS else {})
        for metric, interval in bootstrap_intervals(all_metrics, values, known, correct, strata=known).items():
            of_probe = training if metric == "oscr" else {}
            rows.append(row(name, metric, interval, len(values), **used | of_probe))
        threshold = (threshold_at_tpr(values, known), None, None)
        rows.append(row(name, "threshold_tpr95", threshold, int(known.sum()), **used))
    return rows, {"is_known": known, "correct": correct, "labels": labels.cpu().numpy(), **scores}


def over_trials(rows: Sequence[Row], numbers: Sequence[int]) -> list[Row]:
    """Mean and standard deviation (n - 1) over trials, a row for each score and metric.

    Args:
        rows: Of all trials.
        numbers: The trials to count, as from `distinct`.

    Returns:
        Rows without trial, with `params["std"]`, the `params["trials"]` they are means of, the other parameters as far
        as these agree on them, and the sum of the sample counts. Thresholds have no mean, p-values neither, and what
        fewer than two trials have.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.trial in numbers and row.metric != "threshold_tpr95":
            groups.setdefault((row.score, row.metric), []).append(row)
    means = []
    for group in groups.values():
        if len(group) < 2:
            continue  # such as the difference to a run that was evaluated on one of the trials
        values = [row.value for row in group]
        shared = {
            name: value
            for name, value in group[0].params.items()
            if name != "p_value" and all(name in row.params and row.params[name] == value for row in group)
        }
        trials = [row.trial for row in group]
        params = {**shared, "over": "trials", "std": float(np.std(values, ddof=1)), "trials": trials}
        mean, n = float(np.mean(values)), sum(row.n for row in group)
        means.append(replace(group[0], trial=None, value=mean, ci_low=None, ci_high=None, n=n, params=params))
    return means


def compare(
    samples: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], name: str, row: Callable[..., Row]
) -> list[Row]:
    """Tests by paired bootstrap whether two runs differ in AUROC and OSCR on the same samples.

    Args:
        samples: Of one run, as `detect` gives them.
        other: Of the other, sample for sample the same images.
        name: What results call the other.
        row: As in `closed_set`.

    Returns:
        For each score, `auroc_difference` and `oscr_difference`, this run minus the other, with 95% interval, and the
        two-sided `p_value` among the parameters, see `intervals.paired_difference`. It is not corrected for the number
        of tests.
    """
    known, rows = samples["is_known"], []
    for score in samples:
        if score in _NO_SCORES or score not in other:
            continue
        ours, theirs = (samples[score], known), (other[score], known)
        differences = {
            "auroc_difference": paired_difference(auroc, ours, theirs, strata=known),
            "oscr_difference": paired_difference(
                oscr, (*ours, samples["correct"]), (*theirs, other["correct"]), strata=known
            ),
        }
        for metric, (*interval, p_value) in differences.items():
            rows.append(row(score, metric, interval, len(known), compared_with=name, p_value=p_value))
    return rows


def score_table(rows: Sequence[Row], metrics: Mapping[str, str]) -> str:
    """Lays out a line a score and a column a metric for a terminal.

    Args:
        rows: Of one group, or means over trials.
        metrics: Those to show, and their headings.
    """
    lines: dict[str, list[str]] = {}
    for row in rows:
        if row.metric in metrics:
            lines.setdefault(row.score, [row.score]).append(with_spread(row))
    cells = [("score", *metrics.values()), *lines.values()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def with_spread(row: Row) -> str:
    """A value with its 95% interval, or with its standard deviation over trials."""
    if "std" in row.params:
        return f"{row.value:.4f} ± {row.params['std']:.4f}"
    tested = f" p={row.params['p_value']:.3f}" if "p_value" in row.params else ""
    return f"{row.value:.4f} ({row.ci_low:.4f} to {row.ci_high:.4f}){tested}"


def _training(probe: LinearProbe, settings: Settings) -> dict[str, object]:
    return {"learning_rate": probe.learning_rate, "epochs": settings.epochs, "seed": settings.seed}
