from __future__ import annotations

import json

import numpy as np
import pytest
from reports import add_linear_probe, add_osr, make_run, report, row, write_rows
from scipy import stats
from sklearn.metrics import roc_auc_score

from ssl_gradmix.evaluation.report.overview import overview
from ssl_gradmix.evaluation.report.runs import read_runs


def numbers(cell: str) -> list[float]:
    return [float(part) for part in cell.replace("−", "-").replace(" to", "").split()]


def runs_of_two_kinds(tmp_path):
    return [make_run(tmp_path / name, i, extra_view=name) for i, name in enumerate(("none", "gradmix"))]


def test_differences_to_the_first_run_are_paired(tmp_path):
    """The interval of a paired difference of hits is that of the mean of d in {-1, 0, 1}."""
    runs = runs_of_two_kinds(tmp_path)
    hits = np.random.default_rng(0).uniform(size=(2, 1000)) < [[0.7], [0.7]]
    hits[1, :60] = True  # so that the second is better
    for run, right in zip(runs, hits, strict=True):
        add_linear_probe(run)
        path = run / "eval" / "linear_probe.json"
        found = json.loads(path.read_text())
        packed = np.packbits(right).tobytes().hex()
        found["hits"] = {"images": "0123", "n": 1000, "linear": packed, "knn": packed}
        path.write_text(json.dumps(found))
    page, _ = report(*runs)
    value, low, high = numbers(page.tables["Difference from none"][1][1])
    d = hits[1].astype(float) - hits[0]
    margin = 1.96 * d.std() / np.sqrt(len(d))
    assert value == pytest.approx(100 * d.mean(), abs=0.05)
    assert [low, high] == pytest.approx([100 * (d.mean() - margin), 100 * (d.mean() + margin)], abs=0.35)
    clear = d.mean() - margin > 0
    assert (("Difference from none", "gradmix", 1) in page.best) == clear, page.best
    assert ("clear of 0: Linear probe" in page.words) == clear


def test_no_difference_where_the_images_are_others(tmp_path):
    runs = runs_of_two_kinds(tmp_path)
    for run, images in zip(runs, ("a", "b"), strict=True):
        add_linear_probe(run)
        path = run / "eval" / "linear_probe.json"
        path.write_text(path.read_text().replace("0123", images))
    page, _ = report(*runs)
    assert page.tables["Difference from none"][1] == ["gradmix", "–", "–", "–"]
    assert not page.best


def test_differences_of_auroc_are_means_over_trials(tmp_path):
    runs = runs_of_two_kinds(tmp_path)
    for seed, run in enumerate(runs):
        add_osr(run, seed, trials=4)
    page, _ = report(*runs)
    found = [run.results["osr", "backbone"].samples for run in read_runs([str(run) for run in runs])]
    aurocs = [[roc_auc_score(each["is_known"], each["knn_distance"]) for each in of_run.values()] for of_run in found]
    difference = np.subtract(*aurocs[::-1])
    low, high = stats.ttest_1samp(difference, 0).confidence_interval()
    shown = numbers(page.tables["Difference from none"][1][3])
    assert shown == pytest.approx([100 * each for each in (difference.mean(), low, high)], abs=0.051)


def test_seeds_are_grouped_and_compared_by_welch(tmp_path):
    values = {"none": [0.60, 0.62, 0.58], "gradmix": [0.70, 0.66, 0.71]}
    runs = []
    for view, of_seeds in values.items():
        for seed, value in enumerate(of_seeds):
            runs.append(make_run(tmp_path / f"{view}{seed}", seed, extra_view=view))
            write_rows(runs[-1] / "eval" / "linear_probe.json", [row("linear_probe", "linear", "top1", value, 0.03)])
    page, _ = report(*runs)
    lines = page.tables["Results"]
    names = [*("none0", "none1", "none2", "Mean"), *("gradmix0", "gradmix1", "gradmix2", "Mean")]
    assert [line[0].split()[0] for line in lines[1:]] == names
    sem = np.std(values["none"], ddof=1) / np.sqrt(3)
    margin = 4.303 * sem  # of t with 2 degrees of freedom
    assert numbers(lines[4][1]) == pytest.approx([60, 100 * (0.6 - margin), 100 * (0.6 + margin)], abs=0.051)
    variances = [np.var(each, ddof=1) / 3 for each in values.values()]
    freedom = sum(variances) ** 2 / sum(v**2 / 2 for v in variances)
    margin = stats.t.ppf(0.975, freedom) * np.sqrt(sum(variances))
    mean = np.mean(values["gradmix"]) - 0.6
    shown = numbers(page.tables["Difference from none0 (3 seeds)"][1][1])
    assert shown == pytest.approx([100 * mean, 100 * (mean - margin), 100 * (mean + margin)], abs=0.051)


def test_seeds_of_other_protocols_are_not_compared(tmp_path):
    runs = []
    for view, n in (("none", 359), ("gradmix", 100)):
        for seed in (0, 1):
            runs.append(make_run(tmp_path / f"{view}{seed}", seed, extra_view=view))
            one = row("linear_probe", "linear", "top1", 0.5 + 0.1 * seed, 0.03, n=n)
            write_rows(runs[-1] / "eval" / "linear_probe.json", [one])
    page, _ = report(*runs)
    assert page.tables["Difference from none0 (2 seeds)"][1][1] == "–"
    assert "different data or protocols" in page.words


def test_a_single_run_has_no_differences(tmp_path):
    run = make_run(tmp_path / "a")
    add_linear_probe(run)
    section = overview(read_runs([str(run)]))
    assert [part.title for part in section.parts] == ["Results"]
    assert section.text == ""


def test_results_of_earlier_weights_are_left_out(encoder_run):
    """Trained on, or started anew, after it was evaluated."""
    add_linear_probe(encoder_run)
    add_osr(encoder_run)
    path = encoder_run / "eval" / "linear_probe.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"encoder": {"name": "x", "feature": "backbone", "fingerprint": "of before"}}))
    page, _ = report(encoder_run)
    assert "Accuracy" not in page.tables
    assert "encoded: its results are of earlier weights and left out. Run python eval/linear_probe.py" in page.words
    assert "AUROC" in page.tables
