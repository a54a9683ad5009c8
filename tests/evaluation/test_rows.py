from __future__ import annotations

import json
import logging
import math

import pytest
from support import records

from ssl_gradmix.evaluation import rows


def measured(metric: str = "auroc", value: float = 0.75, images: str = "cifar10/test", trial: int | None = 2, **params):
    """A row about images, with an interval."""
    numbers = [rows.number("knn", metric, (value, value - 0.05, value + 0.05), 1000, **params)]
    return rows.frame(numbers, "osr", images, "mine", "backbone", trial)


ROW = measured(k=20, t=0.07)
BARE = rows.frame([rows.number("msp", "oscr", 0.5, 10)], "osr", "cifar10/test", "mine")


def about(*images: str, fingerprint: str = "weights", digest: str = "a", **more) -> dict:
    return {"encoder": {"fingerprint": fingerprint}, "images": dict.fromkeys(images, digest), **more}


def added(path, *evaluations) -> list[dict]:
    for found, said in evaluations:
        rows.add(path, found, said)
    return records(rows.read(path)[0])


# The file


def test_rows_and_the_rest_come_back(tmp_path):
    path = tmp_path / "new" / "folder" / "osr.json"
    both = rows.joined([ROW, BARE])
    rows.write(path, both, {"curves": {"roc": [[0.0, 1.0], [0.0, 1.0]]}, "seed": 3})
    found, rest = rows.read(path)
    assert rest == {"curves": {"roc": [[0.0, 1.0], [0.0, 1.0]]}, "seed": 3}
    assert records(found) == records(both)
    assert found.dtypes.equals(both.dtypes)

    first, second = json.loads(path.read_text())["rows"]
    columns = "task, dataset, split, trial, encoder, feature, score, metric, value, ci_low, ci_high, n, params"
    assert list(first) == columns.split(", ")
    assert (first["value"], first["trial"], first["params"]) == (0.75, 2, {"k": 20, "t": 0.07})
    assert (second["trial"], second["ci_low"], second["ci_high"]) == (None, None, None)


def test_no_rows_are_rows_too(tmp_path):
    rows.write(tmp_path / "r.json", rows.typed([]), {})
    assert rows.read(tmp_path / "r.json")[0].empty
    assert rows.joined([]).columns.tolist() == list(rows.COLUMNS)


@pytest.mark.parametrize("value", [math.nan, math.inf, (0.5, -math.inf, 0.6), (0.5, 0.4, math.nan)])
def test_a_number_is_finite(value):
    with pytest.raises(ValueError, match="auroc of knn must be finite, got (nan|inf|-inf)"):
        rows.number("knn", "auroc", value, 10)


@pytest.mark.parametrize(("found", "said"), [(measured(t=math.nan), {}), (ROW, {"curve": [math.inf]})])
def test_nan_leaves_the_old_file(tmp_path, found, said):
    path = tmp_path / "r.json"
    rows.write(path, BARE, {})
    with pytest.raises(ValueError, match=r"results for .*r.json must be finite"):
        rows.write(path, found, said)
    assert records(rows.read(path)[0]) == records(BARE)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"rows": [{"task": "osr"}]}', '{"rows": 3}', '{"rows": [3]}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=r"r.json is no file of result rows \(task, dataset, .*params\)"):
        rows.read(tmp_path / "r.json")


# Later evaluations


@pytest.mark.parametrize(
    "second",
    [
        measured(value=0.5, k=20, t=0.07, trial=3),
        measured(value=0.5, k=20, t=0.07, trial=None),
        measured(value=0.5, k=21, t=0.07),
        measured(value=0.5, k=20, t=0.07, images="svhn/test"),
        measured("oscr", value=0.5, k=20, t=0.07),
        measured(value=0.5, k=20),
    ],
    ids=["trial", "no trial", "k", "images", "metric", "one parameter fewer"],
)
def test_what_was_not_measured_before_is_added(tmp_path, second):
    said = about("cifar10/test", "svhn/test")
    assert added(tmp_path / "r.json", (ROW, said), (second, said)) == records(rows.joined([ROW, second]))


@pytest.mark.parametrize("found_again", [{"learning_rate": 3.0}, {"p_value": 0.5}, {"std": 0.1}, {"corruptions": 3}])
def test_the_same_measured_again_is_replaced(tmp_path, found_again):
    (name,) = found_again
    again = measured(value=0.5, k=20, t=0.07, **found_again)
    first = rows.joined([measured(k=20, t=0.07, **{name: 1}), BARE])
    said = about("cifar10/test")
    assert added(tmp_path / "r.json", (first, said), (again, said)) == records(rows.joined([BARE, again]))


def test_rows_of_other_weights_are_dropped(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first, second = about("cifar10/test"), about("svhn/test", fingerprint="others")
    elsewhere = measured(images="svhn/test")
    assert added(tmp_path / "r.json", (ROW, first), (elsewhere, second)) == records(elsewhere)
    assert rows.read(tmp_path / "r.json")[1] == second
    assert "results of earlier weights are replaced" in caplog.text


def test_rows_of_changed_images_are_dropped_whichever_side_they_were_on(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    stays, again = measured(images="mnist/test"), measured(k=3)
    stale = [ROW, *(measured(images="svhn/test", **{side: "cifar10/test"}) for side in ("known", "unknown"))]
    sides = {"known_from": "mnist/test", "unknown_from": "svhn/test"}
    groups = {"a": sides, "b": sides | {"known_from": "cifar10/test"}, "c": sides | {"unknown_from": "cifar10/test"}}
    before = about("cifar10/train", "cifar10/test", "svhn/test", "mnist/test", groups=groups)
    later = about("cifar10/test", groups={"d": sides}) | {"images": {"cifar10/train": "b", "cifar10/test": "a"}}
    found = added(tmp_path / "r.json", (rows.joined([*stale, stays]), before), (again, later))
    assert found == records(rows.joined([stays, again]))
    assert "as the images of cifar10 are others now" in caplog.text
    _, said = rows.read(tmp_path / "r.json")
    assert said["groups"] == {"a": sides, "d": sides}
    assert said["images"] == {"cifar10/train": "b", "cifar10/test": "a", "svhn/test": "a", "mnist/test": "a"}


def test_what_is_said_of_earlier_rows_stays_with_them(tmp_path):
    added(tmp_path / "r.json", (ROW, about("cifar10/test", groups={"cifar10:2": {"known": [1]}}, seed=0)))
    added(tmp_path / "r.json", (measured(trial=3), about("cifar10/train", groups={"cifar10:3": {}}, seed=1)))
    both = {"cifar10:2": {"known": [1]}, "cifar10:3": {}}
    assert rows.read(tmp_path / "r.json")[1] == about("cifar10/test", "cifar10/train", groups=both, seed=1)


@pytest.mark.parametrize(
    "content", ['{"rows": [', '{"rows": []}', '{"rows": [], "encoder": 3}', '{"rows": [], "encoder": {}, "images": 1}']
)
def test_a_damaged_file_is_written_anew(tmp_path, caplog, content):
    (tmp_path / "r.json").write_text(content)
    assert added(tmp_path / "r.json", (ROW, about("cifar10/test"))) == records(ROW)
    assert "r.json is written anew: " in caplog.text


# For a terminal


def test_the_table_is_aligned():
    many = rows.frame([rows.number("msp", "oscr", 0.5, 100000)])
    assert rows.console(rows.joined([ROW, many])).splitlines() == [
        "score  metric  value   95% interval      n",
        "knn    auroc   0.7500  0.7000 to 0.8000  1000    k 20, t 0.07",
        "msp    oscr    0.5000                    100000",
    ]
