from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from reports import paths
from sklearn.metrics import auc, roc_auc_score

from ssl_gradmix.data.corruptions import SEVERITIES
from ssl_gradmix.evaluation import plots
from ssl_gradmix.evaluation.metrics import roc_curve


def test_curves_go_through_their_points_in_the_color_of_their_run():
    svg = plots.svg(
        plots.curves([plots.Line(0, [1, 2, 4], [0.1, 0.5, 0.3]), plots.Line(3, [1, 2], [0.2, 0.2])], "epoch")
    )
    (first,), (second,) = (paths(svg, f"var(--run-{run})") for run in (0, 3))
    assert len(first) == 3
    x, y = first.T
    assert (x[1] - x[0]) / (x[2] - x[0]) == pytest.approx(1 / 3, abs=1e-3)
    assert (y[0] - y[2]) / (y[0] - y[1]) == pytest.approx(0.5, abs=1e-3)  # SVG counts downwards
    assert second[0, 1] == pytest.approx(y[0] - 0.1 / 0.4 * (y[0] - y[1]), abs=0.01)


def test_a_single_epoch_has_whole_numbers_beside_it():
    svg = plots.svg(plots.curves([plots.Line(0, [5], [0.5]), plots.Line(1, [5], [0.25])], "epoch", shares=True))
    assert re.findall(r">([^<>]*)</text>", svg)[:3] == ["4", "5", "6"]


def test_a_mean_curve_keeps_the_mean_area_and_its_band_holds_each_trial():
    random = np.random.default_rng(0)
    trials = []
    for shift in (0.5, 1.0, 2.0):
        known = random.uniform(size=5000) < 0.5
        trials.append({"is_known": known, "s": random.normal(size=5000) + shift * known})
    line = plots.mean_curve(1, trials, "s", roc_curve, "is_known")
    areas = [roc_auc_score(each["is_known"], each["s"]) for each in trials]
    assert auc(line.x, line.y) == pytest.approx(np.mean(areas), abs=2e-3)
    assert auc(line.x, line.band[0]) == pytest.approx(min(areas), abs=2e-3)
    assert auc(line.x, line.band[1]) == pytest.approx(max(areas), abs=2e-3)
    (drawn,) = paths(plots.svg(plots.rates([line], "TPR")), "var(--run-1)")
    px, py = (drawn - drawn[0]).T
    assert auc(px / px[-1], py / py[-1]) == pytest.approx(np.mean(areas), abs=6e-3)


def test_heat_map_without_values_and_histogram_of_constants():
    table = pd.DataFrame([[np.nan, 0.5, 0, 0, 0]], ["fog $x$ <b>"], SEVERITIES)
    texts = re.findall(r">([^<>]*)</text>", plots.svg(plots.heat_map(table, difference=True)))
    assert texts == ["1", "2", "3", "4", "5", "severity", "fog $x$ &lt;b&gt;", "+50.0", "+0.0", "+0.0", "+0.0"]
    arrays = {"is_known": np.arange(8) < 5, "s": np.ones(8)}
    svg = plots.svg(plots.histogram(arrays, "s", 0))
    ((x, y),) = (
        np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path), float).T
        for path in re.findall(r'<path d="([^"]*)"[^>]*style="fill: var\(--run-0\)', svg)
    )
    assert abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2 > 50  # square points: all in one bin
