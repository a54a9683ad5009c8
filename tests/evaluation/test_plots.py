"""Figures are drawn without error, and their curves hold the numbers they should."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from ssl_gradmix.data.corruptions import COMMON, GROUPS
from ssl_gradmix.evaluation import plots, results
from ssl_gradmix.evaluation.intervals import Interval
from ssl_gradmix.evaluation.metrics import oscr


def make_samples(seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    known = np.arange(60) < 40
    scores = {score: (known + rng.normal(size=60)).round(1) for score in plots.CURVES}
    columns = {"label": ["a", "b"] * 30, "known": known, "prediction": rng.choice(["a", "b"], 60)}
    return pd.DataFrame({**columns, **scores})


def make_rows(samples: dict[str, pd.DataFrame]) -> pd.DataFrame:
    numbers = []
    for found in samples.values():
        for score in plots.CURVES:
            area = roc_auc_score(found["known"], found[score])
            interval = Interval(area, area - 0.1, area + 0.1)
            numbers.append(results.number(score, "auroc", interval, len(found)))
    return results.frame(numbers, "osr", "x/test", "mine")


def labels_of(legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def areas_of(axes) -> dict[str, float]:
    return {name: float(area) for name, area in map(str.split, labels_of(axes.get_legend()))}


@pytest.mark.parametrize("trials", [1, 3])
def test_open_set_curves_are_means_over_trials(tmp_path, trials):
    samples = {f"random:6:{seed}": make_samples(seed) for seed in range(trials)}
    figure = plots.open_set(samples, make_rows(samples), "a title")
    _, roc, oscr_axes = figure.axes
    for score in plots.CURVES:
        areas, rates = [], []
        for each in samples.values():
            correct = (each["prediction"] == each["label"]).to_numpy()
            areas.append(roc_auc_score(each["known"], each[score]))
            rates.append(oscr(each[score].to_numpy(), each["known"].to_numpy(), correct))
        assert areas_of(roc)[score] == pytest.approx(np.mean(areas), abs=6e-4)
        assert areas_of(oscr_axes)[score] == pytest.approx(np.mean(rates), abs=6e-4)
    hits = [(each["prediction"] == each["label"])[:40].mean() for each in samples.values()]
    accuracy = np.mean(hits)
    assert oscr_axes.lines[1].get_ydata()[-1] == pytest.approx(accuracy)
    plots.write(tmp_path / "figure.png", figure)


def test_corruption_curves_are_means_over_groups(tmp_path):
    names = COMMON[:6]
    table = pd.DataFrame(np.random.default_rng(0).random((6, 5)), names, range(1, 6))
    figure = plots.corruptions(table, 0.9, "a title")
    cells, curves = figure.axes
    assert [text.get_text() for text in cells.texts] == [
        f"{100 * value:.1f}" for value in table.to_numpy().ravel()
    ]
    lines = dict(zip(labels_of(figure.legends[0]), curves.lines, strict=True))
    for label, members in (("noise (3)", GROUPS["noise"]), ("all (6)", names)):
        expected = table.loc[list(members)].mean().to_numpy()
        np.testing.assert_allclose(lines[label].get_ydata(), expected)
    plots.write(tmp_path / "figure.png", figure)


def test_fractions_in_the_reliance_figure_are_between_none_and_all(tmp_path):
    rng = np.random.default_rng(0)
    examples = [(rng.random((8, 8, 3)), (1, 1, 4, 4), lost) for lost in (7.07, 0.25, -0.5)]
    fractions = {place: rng.normal(3, 2, 99) for place in ("attributed", "random", "center")}
    maps = {name: rng.random((8, 8)) for name in ("in the views", "in the images")}
    figure = plots.reliance(maps, examples, fractions, "a title")
    titles = [axes.get_title(loc="center") for axes in figure.axes]
    assert [title for title in titles if title.endswith("%")] == ["100%", "25%", "0%"]
    _, low, high = figure.axes[-1].get_xlim()[0], *figure.axes[-1].dataLim.intervalx
    assert -0.5 <= low < high <= 1
    plots.write(tmp_path / "figure.png", figure)


@pytest.mark.parametrize("names", [["a", "$x$", "$\\frac$"], [str(i) for i in range(120)]])
def test_class_accuracies_draw_worst_and_best_with_plain_names(tmp_path, names):
    values = np.random.default_rng(0).random(len(names))
    numbers = [
        results.number("linear", "top1", Interval(v, v - 0.1, v + 0.1), 9, **{"class": name})
        for name, v in zip(names, values, strict=True)
    ]
    rows = results.frame(numbers, "linear_probe", "x/test", "mine")
    figure = plots.class_accuracies(rows, rows.iloc[0], "folder:$\\undefined$")
    (axes,) = figure.axes
    expected = np.sort(values)
    if len(values) > plots.MOST_CLASSES:
        expected = np.concatenate([expected[:25], expected[-25:]])
    np.testing.assert_allclose(axes.lines[0].get_xdata().astype(float), expected)
    plots.write(tmp_path / "figure.png", figure)  # \frac without arguments would raise
    with Image.open(tmp_path / "figure.png") as image:
        assert min(image.size) > 100
