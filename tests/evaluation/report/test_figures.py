from __future__ import annotations

import re

import numpy as np
import pytest
from reports import paths
from sklearn.metrics import auc, roc_auc_score

from ssl_gradmix.evaluation.metrics import roc_curve
from ssl_gradmix.evaluation.report import figures


def test_curves_go_through_their_points_in_the_color_of_their_run():
    svg = figures.curves([figures.Line(0, [1, 2, 4], [0.1, 0.5, 0.3]), figures.Line(3, [1, 2], [0.2, 0.2])], "epoch")
    (first,), (second,) = (paths(svg, f"var(--run-{run})") for run in (0, 3))
    assert len(first) == 3
    x, y = first.T
    assert (x[1] - x[0]) / (x[2] - x[0]) == pytest.approx(1 / 3, abs=1e-3)
    assert (y[0] - y[2]) / (y[0] - y[1]) == pytest.approx(0.5, abs=1e-3)  # SVG counts downwards
    assert second[0, 1] == pytest.approx(y[0] - 0.1 / 0.4 * (y[0] - y[1]), abs=0.01)


def test_a_single_epoch_has_whole_numbers_beside_it():
    svg = figures.curves([figures.Line(0, [5], [0.5]), figures.Line(1, [5], [0.25])], "epoch", shares=True)
    assert re.findall(r">([^<>]*)</text>", svg)[:3] == ["4", "5", "6"]


def test_rates_keep_their_area_when_thinned():
    random = np.random.default_rng(0)
    known = random.uniform(size=20_000) < 0.5
    scores = random.normal(size=20_000) + known
    x, y, _ = roc_curve(scores, known)
    (line,) = paths(figures.rates([figures.Line(1, x, y)], ""), "var(--run-1)")
    assert len(line) < 1000
    px, py = (line - line[0]).T
    assert auc(px / px[-1], py / py[-1]) == pytest.approx(roc_auc_score(known, scores), abs=2e-3)


def test_heat_map_without_values_and_histogram_of_constants():
    svg = figures.heat_map(np.array([[np.nan, 0.5]]), ["fog $x$ <b>"], ["1", "2"], difference=True)
    assert re.findall(r">([^<>]*)</text>", svg) == ["1", "2", "severity", "fog $x$ &lt;b&gt;", "+50.0"]
    svg = figures.heat_map(np.array([[np.nan]]), ["fog" * 20], ["1"], difference=True)
    assert re.findall(r">([^<>]*)</text>", svg) == ["1", "severity", f"{'fog' * 7}fo…"]
    svg = figures.histogram(np.ones(5), np.ones(3), 0, threshold=1.0)
    ((x, y),) = (
        np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path), float).T
        for path in re.findall(r'<path d="([^"]*)"[^>]*style="fill: var\(--run-0\)', svg)
    )
    assert abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2 > 50  # square points: all in one bin
