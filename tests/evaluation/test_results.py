from __future__ import annotations

import json
import math

import pandas as pd
import pytest
from support import records

from ssl_gradmix.evaluation import results
from ssl_gradmix.evaluation.intervals import Interval

NUMBERS = [
    results.number("knn", "auroc", Interval(0.75, 0.7, 0.8), 1000, k=20),
    results.number("msp", "oscr", 0.5, 10),
]
ROWS = results.frame(NUMBERS, "osr", "folder:pets/test", "mine", "projector", 2, n_known=6)


def test_frame_has_one_row_per_number():
    first, second = records(ROWS)
    assert list(first) == list(results.COLUMNS)
    shared = {"task": "osr", "dataset": "folder:pets", "split": "test", "trial": 2}
    shared |= {"encoder": "mine", "feature": "projector"}
    assert shared.items() <= first.items()
    assert shared.items() <= second.items()
    assert [first[name] for name in ("value", "ci_low", "ci_high", "n")] == [0.75, 0.7, 0.8, 1000]
    assert first["params"] == {"k": 20, "n_known": 6}
    assert (second["ci_low"], second["params"]) == (None, {"n_known": 6})
    assert results.param(ROWS, "k").tolist() == [20, None]


@pytest.mark.parametrize("value", [math.nan, math.inf, Interval(0.5, -math.inf, 0.6)])
def test_number_must_be_finite(value):
    with pytest.raises(ValueError, match="value"):
        results.number("knn", "auroc", value, 10)


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "folder" / "osr-pets.json"
    without_trial = results.frame(NUMBERS, "osr", "pets/test", "mine")
    rows = pd.concat([ROWS, without_trial], ignore_index=True)
    results.write(path, ROWS, {"seed": 1})
    results.write(path, rows, {"encoder": {"name": "mine"}, "seed": 3})
    found, about = results.read(path)
    assert about == {"encoder": {"name": "mine"}, "seed": 3}
    pd.testing.assert_frame_equal(found, rows)
    stored = json.loads(path.read_text())["rows"]
    assert list(stored[0]) == list(results.COLUMNS)
    assert [row["trial"] for row in stored] == [2, 2, None, None]
    assert [path] == list(path.parent.iterdir())


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"rows": 3}', '{"rows": [3]}', '{"rows": [{"task": "osr"}]}']
)
def test_other_files_raise(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=path.name):
        results.read(path)


def test_comparison_has_a_line_per_score_and_a_column_per_metric():
    numbers = [
        results.number("vim", "auroc", Interval(0.75, 0.65, 0.85), 9),
        results.number("energy", "auroc", 0.25, 9, std=0.125),
        results.number("vim", "aupr_in", Interval(0.9, 0.8, 1.0), 9),
    ]
    rows = results.frame(numbers, "osr", "pets/test", "mine")
    *_, vim, energy = results.comparison(rows, {"auroc": "AUROC"}).splitlines()
    assert vim.split() == ["vim", "0.7500", "(0.6500", "to", "0.8500)"]
    assert energy.split() == ["energy", "0.2500", "±", "0.1250"]
