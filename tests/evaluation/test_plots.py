from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from ssl_gradmix.evaluation.open_set.plots import overview
from ssl_gradmix.evaluation.results import Row

SCORES = ("max_logit", "knn_distance", "top_k_cosine", "mahalanobis")


def group(seed):
    rng = np.random.default_rng(seed)
    known = np.arange(60) < 40
    return {
        "is_known": known,
        "correct": known & (rng.random(60) < 0.8),
        **{score: known * (i + 1) / 2 + rng.normal(size=60) for i, score in enumerate(SCORES)},
    }


def rows_of(groups):
    return [
        Row("osr", name, "test", i, "x", "backbone", score, "auroc", area, area - 0.1, area + 0.1, 60)
        for i, (name, arrays) in enumerate(groups.items())
        for score in SCORES
        for area in [roc_auc_score(arrays["is_known"], arrays[score])]
    ]


def dots(axes):
    return sorted(x for points in axes.collections for x, _ in points.get_offsets())


def test_trials_are_dots_and_curves_their_mean():
    groups = {f"trial{seed}": group(seed) for seed in range(3)}
    rows = rows_of(groups)
    aurocs, roc, histogram, oscr = overview(groups, rows, "a title").axes
    assert dots(aurocs) == pytest.approx(sorted(row.value for row in rows))
    assert [tick.get_text() for tick in aurocs.get_yticklabels()] == [score.replace("_", " ") for score in SCORES]
    for axes in (roc, oscr):
        assert len(axes.lines) == len(SCORES)
    means = [np.mean([row.value for row in rows if row.score == score]) for score in SCORES]
    legend = [text.get_text() for text in roc.get_legend().get_texts()]
    expected = [f"{score.replace('_', ' ')}  {mean:.3f}" for score, mean in zip(SCORES, means, strict=True)]
    assert legend == expected
    first = roc.lines[0]
    area = np.sum(np.diff(first.get_xdata()) * (first.get_ydata()[1:] + first.get_ydata()[:-1]) / 2)
    assert area == pytest.approx(means[0], abs=0.01)
    accuracy = np.mean([arrays["correct"].sum() / 40 for arrays in groups.values()])
    assert oscr.lines[0].get_ydata()[-1] == pytest.approx(accuracy)
    assert "trial0" in histogram.get_title(loc="left")
    shares = [sum(bar.get_height() for bar in container) for container in histogram.containers]
    assert shares == pytest.approx([1, 1])
    known = np.sort(groups["trial0"]["max_logit"][:40])
    assert histogram.lines[0].get_xdata()[0] == known[2]  # 38 of 40 reach it


def test_a_single_trial_has_its_intervals():
    groups = {"trial0": group(0)}
    rows = rows_of(groups)
    aurocs = overview(groups, rows, "a title").axes[0]
    whiskers = sorted(tuple(line.get_xdata()) for line in aurocs.lines[: len(SCORES)])
    assert whiskers == sorted((row.ci_low, row.ci_high) for row in rows)


def test_data_sets_have_curves_of_their_own():
    groups = {"svhn": group(0), "folder:x": group(1)}
    rows = rows_of(groups)
    aurocs, roc, _, oscr = overview(groups, rows, "a title", several_sets=True).axes
    assert [text.get_text() for text in aurocs.get_legend().get_texts()] == ["svhn", "folder:x"]
    expected = [f"{row.dataset}  {row.value:.3f}" for row in rows if row.score == "max_logit"]
    assert [text.get_text() for text in roc.get_legend().get_texts()] == expected
    assert len(oscr.lines) == 2
