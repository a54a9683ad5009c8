from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from ssl_gradmix.evaluation.results import Row, console_table, read_rows, write_figure, write_rows

from ssl_gradmix.evaluation.plots import class_accuracies

ROW = Row("osr", "cifar10", "test", 2, "mine", "backbone", "knn", "auroc", 0.75, 0.7, 0.8, 1000, {"k": 20, "t": 0.07})
BARE = Row("osr", "cifar10", "test", None, "mine", "backbone", "msp", "oscr", 0.5, None, None, 10)


def test_rows_and_extra_come_back(tmp_path):
    path = tmp_path / "new" / "folder" / "osr.json"
    write_rows(path, [ROW, BARE], {"curves": {"roc": [[0.0, 1.0], [0.0, 1.0]]}, "seed": 3})
    assert read_rows(path) == ([ROW, BARE], {"curves": {"roc": [[0.0, 1.0], [0.0, 1.0]]}, "seed": 3})


def test_the_file_is_plain_json_with_the_documented_columns(tmp_path):
    write_rows(tmp_path / "r.json", [ROW])
    (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
    columns = "task, dataset, split, trial, encoder, feature, score, metric, value, ci_low, ci_high, n, params"
    assert list(row) == columns.split(", ")
    assert row["value"] == 0.75
    assert row["params"] == {"k": 20, "t": 0.07}


@pytest.mark.parametrize("field", ["value", "ci_low", "ci_high"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_row_is_finite(field, number):
    with pytest.raises(ValueError, match=rf"{field} of knn auroc must be finite, got {number}"):
        replace(ROW, **{field: number})


@pytest.mark.parametrize("what", [{"rows": [replace(ROW, params={"t": math.nan})]}, {"extra": {"curve": [math.inf]}}])
def test_nan_leaves_the_old_file(tmp_path, what):
    path = tmp_path / "r.json"
    write_rows(path, [BARE])
    with pytest.raises(ValueError, match=r"results for .*r.json must be finite"):
        write_rows(path, **({"rows": [ROW]} | what))
    assert read_rows(path) == ([BARE], {})
    assert list(tmp_path.iterdir()) == [path]


def test_extra_cannot_replace_the_rows(tmp_path):
    with pytest.raises(ValueError, match="extra must not have an entry 'rows'"):
        write_rows(tmp_path / "r.json", [ROW], {"rows": []})


def test_texts_of_figures_are_no_mathematics(tmp_path):
    names = ["$\\frac$", "$x$", "snake_case"]
    rows = [replace(ROW, params={"class": name}) for name in names]
    figure = class_accuracies(rows, ROW, "folder:$\\undefined$")
    write_figure(tmp_path / "figure.png", figure)  # as mathematics, \\frac without arguments would raise
    (axes,) = figure.axes
    labels = axes.get_yticklabels()
    assert [label.get_text() for label in labels] == names
    as_drawn = labels[1].get_window_extent().width
    labels[1].set_parse_math(True)
    assert labels[1].get_window_extent().width < as_drawn  # dollars were drawn


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"rows": [{"task": "osr"}]}', '{"rows": 3}', '{"rows": [3]}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=r"r.json is no file of result rows \(task, dataset, .*params\)"):
        read_rows(tmp_path / "r.json")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"r.json"):
        read_rows(tmp_path / "r.json")


def test_console_table_is_aligned():
    lines = console_table([ROW, replace(BARE, n=100000)]).splitlines()
    assert lines == [
        "score  metric  value   95% interval      n",
        "knn    auroc   0.7500  0.7000 to 0.8000  1000    k 20, t 0.07",
        "msp    oscr    0.5000                    100000",
    ]
