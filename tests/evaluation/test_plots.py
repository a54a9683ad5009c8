from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import integrate
from sklearn.metrics import roc_auc_score

from ssl_gradmix.data.corruptions import COMMON, EXTRA, GROUPS
from ssl_gradmix.evaluation import plots, rows
from ssl_gradmix.evaluation.intervals import paired_difference
from ssl_gradmix.evaluation.metrics import auroc

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
    return rows.joined(
        rows.frame([rows.number(score, "auroc", (area, area - 0.1, area + 0.1), 60)], "osr", f"{name}/test")
        for name, arrays in groups.items()
        for score in SCORES
        for area in [roc_auc_score(arrays["is_known"], arrays[score])]
    )


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def test_trials_are_dots_and_curves_their_mean():
    groups = {f"random:6:{seed}": group(seed) for seed in range(3)}
    found = rows_of(groups)
    aurocs, roc, histogram, oscr = plots.open_set(groups, found, "a title").axes
    dots = sorted(x for points in aurocs.collections for x, _ in points.get_offsets())
    assert dots == pytest.approx(sorted(found["value"]))
    assert [tick.get_text() for tick in aurocs.get_yticklabels()] == [score.replace("_", " ") for score in SCORES]
    assert len(roc.lines) == len(oscr.lines) == 1 + len(SCORES)  # and chance
    means = [found[found["score"] == score]["value"].mean() for score in SCORES]
    expected = [f"{score.replace('_', ' ')}  {mean:.3f}" for score, mean in zip(SCORES, means, strict=True)]
    assert texts(roc.get_legend()) == expected
    assert integrate.trapezoid(*reversed(roc.lines[1].get_data())) == pytest.approx(means[0], abs=0.01)
    accuracy = np.mean([arrays["correct"].sum() / 40 for arrays in groups.values()])
    assert oscr.lines[1].get_ydata()[-1] == pytest.approx(accuracy)
    assert "random:6:0" in histogram.get_title(loc="left")
    assert [stairs.get_data().values.sum() for stairs in histogram.patches] == pytest.approx([1, 1])
    known = np.sort(groups["random:6:0"]["max_logit"][:40])
    assert histogram.lines[0].get_xdata()[0] == known[2]  # 38 of 40 reach it


def test_a_single_trial_has_its_intervals():
    groups = {"random:6:0": group(0)}
    found = rows_of(groups)
    aurocs = plots.open_set(groups, found, "a title").axes[0]
    whiskers = sorted(tuple(line.get_xdata()) for line in aurocs.lines[: len(SCORES)])
    assert whiskers == sorted(zip(found["ci_low"], found["ci_high"], strict=True))


def test_data_sets_have_curves_of_their_own():
    groups = {"svhn": group(0), "folder:x": group(1)}
    found = rows_of(groups)
    aurocs, roc, _, oscr = plots.open_set(groups, found, "a title", several_sets=True).axes
    assert texts(aurocs.get_legend()) == ["svhn", "folder:x"]
    of_score = found[found["score"] == "max_logit"]
    expected = [f"{name}  {value:.3f}" for name, value in zip(of_score["dataset"], of_score["value"], strict=True)]
    assert texts(roc.get_legend()) == expected
    assert len(oscr.lines) == 1 + 2


def test_corruptions_are_cells_and_their_means_lines():
    names = [*COMMON[:6], EXTRA[0]]
    table = pd.DataFrame(np.random.default_rng(0).random((7, 5)), names, range(1, 6))
    left, right = plots.corruptions(table, "linear", "accuracy", 0.9, "a title").axes
    cells = [text.get_text() for text in left.texts]
    assert cells == [f"{100 * value:.1f}" for value in table.to_numpy().ravel()]
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert labels == [name.replace("_", " ") for name in names]
    lines = dict(zip(texts(right.get_legend()), right.lines, strict=True))
    assert set(lines) == {"clean images, 90.0%", "noise (3)", "blur (3)", "extra (1)", "all common (6)"}
    for label, members in (("noise (3)", GROUPS["noise"]), ("all common (6)", COMMON[:6]), ("extra (1)", EXTRA[:1])):
        assert lines[label].get_ydata() == pytest.approx(table.loc[list(members)].mean().to_numpy())


def by_class(names, values):
    numbers = [
        rows.number("linear", "class_accuracy", (v, v - 0.1, v + 0.1), 9, **{"class": name})
        for name, v in zip(names, values, strict=True)
    ]
    return rows.frame(numbers)


OVERALL = rows.frame([rows.number("linear", "top1", 0.5, 1000)]).iloc[0]


def test_of_many_classes_the_worst_and_the_best_are_drawn():
    values = np.random.default_rng(0).permutation(np.linspace(0.2, 0.8, 120))
    (axes,) = plots.class_accuracies(by_class(map(str, range(120)), values), OVERALL, "x").axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([*np.sort(values)[:25], *np.sort(values)[-25:]])
    assert axes.get_title(loc="left") == "x: 25 worst and best of 120 classes"
    assert "dashed: all 1,000 images, 50.0%" in axes.get_xlabel()


def test_texts_of_figures_are_no_mathematics(tmp_path):
    names = ["$\\frac$", "$x$", "snake_case"]
    figure = plots.class_accuracies(by_class(names, [0.4, 0.5, 0.6]), OVERALL, "folder:$\\undefined$")
    plots.write(tmp_path / "figure.png", figure)  # as mathematics, \\frac without arguments would raise
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.format == "PNG"
    (axes,) = figure.axes
    labels = axes.get_yticklabels()
    assert [label.get_text() for label in labels] == names
    as_drawn = labels[1].get_window_extent().width
    labels[1].set_parse_math(True)
    assert labels[1].get_window_extent().width < as_drawn  # dollars were drawn


def test_p_values_at_the_floor_are_bounds():
    """Of a difference that no resample contradicts, the bootstrap says only that p is at most so much."""
    known = np.arange(60) < 40
    *_, smallest = paired_difference(auroc, (known + 0.0, known), (-1.0 * known, known), strata=known)
    assert plots.p_value(smallest) == "p ≤ 0.002"
    assert plots.p_value(4 / 1001) == "p = 0.004"
    assert plots.p_value(2 / 101, resamples=100) == "p ≤ 0.020"
    assert plots.p_value(1.0) == "p = 1.000"
