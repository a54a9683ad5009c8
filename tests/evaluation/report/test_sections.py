from __future__ import annotations

import base64
import html
import re

import numpy as np
import pytest
from reports import (
    SCORES,
    Page,
    add_corruption,
    add_linear_probe,
    add_log,
    add_ood,
    add_osr,
    find,
    make_run,
    paths,
    percent,
    report,
    row,
    shown,
    write_rows,
)

from ssl_gradmix.data.corruptions import COMMON

# Numbers


def test_accuracies_stand_in_their_row_and_column(runs):
    of_a, of_b = (add_linear_probe(run, seed) for seed, run in enumerate(runs))
    page, _ = report(*runs)
    top1, top5, few, knn = ([shown(rows[i]) for rows in (of_a, of_b)] for i in range(4))
    assert page.tables["Accuracy"] == [
        ["", "a", "b"],
        ["Linear probe, top‑1 100 epochs", *top1],
        ["Linear probe, top‑5 100 epochs", *top5],
        ["Linear probe, top‑1, 1% of the labels 100 epochs", *few],
        ["Weighted kNN, top‑1 k 20 · temperature 0.07", *knn],
    ]
    assert "On digits test · 359 images. In percent" in page.words
    overview = page.tables["Results"]
    assert [line[1:] for line in overview[1:3]] == [list(line) for line in zip(top1, knn, strict=True)]
    assert overview[1][0] == "a third view gradmix, digits, 3 epochs, seed 0"


def test_classes_are_ordered_by_accuracy_and_at_most_fifty(runs):
    names = tuple(f"class {i}" for i in range(60))
    found = [add_linear_probe(run, seed, names)[4:] for seed, run in enumerate(runs)]
    page, _ = report(*runs)
    lines = page.tables["Linear probe by class"][1:]
    mean = {a.params["class"]: (a.value + b.value) / 2 for a, b in zip(*found, strict=True)}
    order = sorted(mean, key=mean.get)
    assert [line[0] for line in lines] == order[:25] + order[-25:]
    by_name = {a.params["class"]: [shown(a), shown(b)] for a, b in zip(*found, strict=True)}
    assert all(line[1:] == by_name[line[0]] for line in lines)
    assert "25 worst and 25 best of 60." in page.words


def test_open_set_numbers(runs):
    of_a, of_b = (add_osr(run, seed) for seed, run in enumerate(runs))
    page, _ = report(*runs)

    def over_trials(score: str, metric: str) -> list[str]:
        means = [find(rows, score, metric) for rows in (of_a, of_b)]
        return [f"{percent(mean.value)} ± {percent(mean.params['std'])}" for mean in means]

    names = {"knn_distance": "kNN distance", "mahalanobis": "Mahalanobis"}
    assert page.tables["AUROC"][1:] == [[names[score], *over_trials(score, "auroc")] for score in SCORES]
    assert page.tables["OSCR and closed-set accuracy"][1:] == [
        *([f"{names[score]}, OSCR", *over_trials(score, "oscr")] for score in SCORES),
        ["Linear probe, accuracy", *over_trials("linear", "accuracy")],
    ]
    assert (
        "On digits test · 300 images a trial, 2 trials · pretraining all classes, unlabeled · trials 0, 1."
        in page.words
    )

    everything = page.tables["All metrics of b"]
    metrics = ("auroc", "aupr_in", "aupr_out", "fpr95_id_pos", "fpr95_ood_pos", "oscr")
    assert len(everything) == 1 + len(SCORES) * 3
    for score in SCORES:
        line = next(line for line in everything if line[0] == f"{names[score]} digits test, trial 1")
        assert line[1:] == [shown(find(of_b, score, metric, trial=1)) for metric in metrics]


def test_a_single_trial_has_its_interval(runs):
    rows = add_osr(runs[0], trials=1)
    page, _ = report(runs[0])
    assert page.tables["AUROC"][1] == ["kNN distance", shown(find(rows, "knn_distance", "auroc", trial=0))]


def test_paired_differences_keep_their_sign(runs):
    rows = add_osr(runs[0], trials=1)
    fields = {"trial": 0, "n": 300, "compared_with": "b"}
    rows.append(row("osr", "energy", "auroc_difference", -0.0123, 0.02, p_value=0.25, **fields))
    rows.append(row("osr", "energy", "oscr_difference", 0.031, 0.01, p_value=2 / 1001, **fields))
    rows.append(row("osr", "energy", "auroc_difference", 0.01, std=0.02))
    write_rows(runs[0] / "eval" / "osr.json", rows)
    page, _ = report(runs[0])
    assert page.tables["a minus b, image by image"] == [
        ["Score", "AUROC", "OSCR"],
        ["Energy digits test, trial 0", "−1.2 −3.2 to +0.8, p = 0.250", "+3.1 +2.1 to +4.1, p ≤ 0.002"],
        ["Energy digits test, mean over trials", "+1.0 ± 2.0", "–"],
    ]


def test_out_of_distribution_has_its_own_section(runs):
    rows = add_ood(runs[0], "svhn", "textures")
    page, _ = report(runs[0])
    section = Page(page.text[page.text.index('id="out-of-distribution-detection"') :])
    aurocs = [shown(each) for each in rows if each.metric == "auroc"]
    assert section.tables["AUROC"][1:] == [
        [f"{score} {dataset} test", auroc]
        for (dataset, score), auroc in zip(
            [(d, s) for d in ("svhn", "textures") for s in ("kNN distance", "Mahalanobis")], aurocs, strict=True
        )
    ]
    assert section.tables["All metrics of a"][1][0] == "kNN distance svhn test"
    assert "a: not evaluated. Run python eval/osr.py" in page.words


def test_corruption_means_and_heat_maps(runs):
    of_a, of_b = (add_corruption(run, seed) for seed, run in enumerate(runs))
    page, _ = report(*runs)
    errors = [percent(find(rows, "linear", "mean_corruption_error").value) for rows in (of_a, of_b)]
    assert page.tables["Means over corruptions"][2] == ["Linear probe, mean corruption error 15 corruptions", *errors]

    first, second = re.findall(r"<figure>.*?</figure>", page.text, re.DOTALL)[:2]
    in_cells = r"[-−+]?\d+\.\d"
    accuracies = [
        [
            find(rows, "linear", "accuracy", corruption=name, severity=s).value
            for name in COMMON[:3]
            for s in range(1, 6)
        ]
        for rows in (of_a, of_b)
    ]
    texts = [Page(svg).words for svg in (first, second)]
    assert re.findall(in_cells, texts[0]) == [percent(value) for value in accuracies[0]]
    differences = [f"{100 * (b - a):+.1f}".replace("-", "−") for a, b in zip(*accuracies, strict=True)]
    assert re.findall(in_cells, texts[1]) == differences
    assert "b minus a" in texts[1]
    assert "gaussian noise shot noise impulse noise" in texts[0]


def test_severity_curves_begin_at_clean_images_and_leave_extra_corruptions_out(runs):
    rows = add_corruption(runs[0], names=("fog", "snow", "saturate"))
    page, _ = report(runs[0])
    svg = page.text[page.text.index("Accuracy of the linear probe</figcaption>") :]
    (drawn,) = paths(svg[: svg.index("</svg>")], "var(--run-0)")
    means = [
        np.mean([find(rows, "linear", "accuracy", corruption=name, severity=s).value for name in ("fog", "snow")])
        for s in range(1, 6)
    ]
    slope, intercept = np.polyfit(drawn[:, 1], [0.9, *means], 1)
    assert slope < 0
    np.testing.assert_allclose(slope * drawn[:, 1] + intercept, [0.9, *means], atol=1e-3)


def test_corruptions_of_other_images_are_not_subtracted(runs):
    add_corruption(runs[0])
    add_corruption(runs[1], n=100)
    page, _ = report(*runs)
    assert "b minus a" not in page.words
    assert "measured on different data" in page.words


def test_reliance_by_place_and_layer(runs):
    rows = [
        row("reliance", "two_views", "cosine", 0.9),
        row("reliance", "random", "reliance", 0.19, 0.02, part=0.1),
        row("reliance", "attributed", "reliance", 0.96, 0.03, part=0.1, layer="layer3"),
        row("reliance", "attributed", "beyond_random", 0.77, 0.04, part=0.1, layer="layer3"),
    ]
    write_rows(runs[0] / "eval" / "reliance.json", rows)
    page, _ = report(runs[0])
    assert page.tables["Reliance"][1:] == [
        ["Part at a random place", "19.0 17.0 to 21.0"],
        ["Attributed part layer layer3", "96.0 93.0 to 99.0"],
        ["Attributed part, beyond random layer layer3", "77.0 73.0 to 81.0"],
    ]


# Comparisons


@pytest.mark.parametrize("fields", [{"dataset": "mnist"}, {"n": 100}, {"epochs": 5, "k": 3}, {"split": "train"}])
def test_what_was_measured_otherwise_is_not_compared(runs, fields):
    add_linear_probe(runs[0])
    add_linear_probe(runs[1], 1, **fields)
    page, _ = report(*runs)
    lines = page.tables["Accuracy"][1:]
    assert len(lines) == 8
    assert all("–" in line for line in lines)
    assert not page.best


def test_projector_features_have_tables_and_figures_of_their_own(runs, tmp_path):
    of_backbone = add_linear_probe(runs[0]), add_osr(runs[0]), add_corruption(runs[0])
    for index, run in enumerate(runs):
        made = tmp_path / f"made{index}"
        rows = [
            add_linear_probe(made, 5 + index, feature="projector"),
            add_osr(made, 5 + index),
            add_corruption(made, 5 + index, feature="projector"),
        ]
        (run / "eval").mkdir(exist_ok=True)
        (made / "eval").rename(run / "eval" / "projector")
    page, _ = report(*runs)
    assert page.tables["Accuracy"][0] == ["", "a", "b"]
    assert [line[1:] for line in page.tables["Accuracy"][1:]] == [[shown(row), "–"] for row in of_backbone[0][:4]]
    lines = page.tables["Accuracy, projector features"][1:]
    assert [line[2] for line in lines] == [shown(row) for row in rows[0][:4]]
    assert "–" not in [line[1] for line in lines]
    assert len(page.tables["All metrics of a, projector features"]) == len(page.tables["All metrics of a"])
    assert "All metrics of b" not in page.tables
    for title in ("ROC and OSCR curves", "Distribution of scores", "Mean by severity"):
        assert page.words.count(f"{title}, projector features") == 1
    curves = page.text[page.text.index("ROC and OSCR curves<") : page.text.index("Distribution of scores<")]
    assert len(paths(curves, "var(--run-0)")) == 2 * 2  # ROC and OSCR of two scores, not of projectors
    assert page.tables["Results"][2][1:] == ["–", "–", "–", "–"]
    assert "b: not evaluated. Run python eval/linear_probe.py" in page.words


def test_a_run_evaluated_on_its_projector_alone(runs, tmp_path):
    add_linear_probe(tmp_path / "made", feature="projector")
    (runs[0] / "eval" / "projector").mkdir(parents=True)
    (tmp_path / "made" / "eval" / "linear_probe.json").rename(runs[0] / "eval" / "projector" / "linear_probe.json")
    page, _ = report(runs[0])
    assert "Accuracy" not in page.tables
    assert len(page.tables["Accuracy, projector features"]) == 5


def test_only_settings_that_differ_and_the_commit(tmp_path):
    a = make_run(tmp_path / "a", 3, optimizer={"lr": 0.1, "clip": None})
    b = make_run(tmp_path / "b", 3, optimizer={"lr": 0.1000001})
    add_linear_probe(a)
    page, _ = report(a, b)
    assert page.tables["Settings that differ, and the commit"] == [
        ["Setting", "a", "b"],
        ["environment.commit", "000000000003", "000000000003"],
        ["optimizer.lr", "0.1", "0.1000001"],
    ]
    assert "Common to all: torch 2.9.0." in page.words


def test_markdown_has_the_tables_of_the_page(runs):
    for seed, run in enumerate(runs):
        add_linear_probe(run, seed), add_osr(run, seed), add_corruption(run, seed)
    page, markdown = report(*runs)
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    cells = [
        [
            re.sub(r"\\(.)", r"\1", html.unescape(cell)).replace("**", "")
            for cell in re.split(r" ?(?<!\\)\| ?", line)[1:-1]
        ]
        for line in lines
        if "---" not in line
    ]
    plain = [[re.sub(r" \((.*)\)$", r" \1", cell) for cell in line] for line in cells]
    assert plain == [line for table in page.tables.values() for line in table]


# What is missing


def test_missing_parts_are_named_with_their_command(tmp_path):
    bare = tmp_path / "a run"
    bare.mkdir()
    (bare / "config.yaml").write_text("extra_view: none\n")
    full = make_run(tmp_path / "full")
    add_log(full)
    add_linear_probe(full)
    page, markdown = report(full, bare)
    for text in (page.words, markdown):
        for script in ("linear_probe.py", "osr.py", "corruption.py"):
            assert f"eval/{script} '{bare}'" in text
        assert f"eval/linear_probe.py {full}" not in text
        assert f"eval/osr.py {full}" in text
        assert "a run has no log of a training." in text
        assert "full has no log" not in text
        assert "a run has no pictures of mixed views." in text


def test_scores_without_samples_are_said(runs):
    add_osr(runs[0])
    (runs[0] / "eval" / "osr_samples.safetensors").unlink()
    page, _ = report(runs[0])
    assert "a: no curves and histograms" in page.words
    assert "kNN distance: ROC" not in page.words


def test_a_folder_of_results_stands_beside_runs(runs, tmp_path):
    add_linear_probe(runs[0])
    results = tmp_path / "resnet18"
    (results / "eval").mkdir(parents=True)
    rows = add_linear_probe(results, 1)
    (results / "eval" / "linear_probe.json").rename(results / "linear_probe.json")
    page, _ = report(runs[0], results, map_method="pca")
    assert page.tables["Accuracy"][1][2] == shown(rows[0])
    assert page.tables["Results"][2][0] == "resnet18 results only"
    assert "resnet18 holds results only" in page.words
    assert "resnet18: no map" in page.words
    assert "a: no map" in page.words


def test_runs_of_the_same_name_go_by_their_paths(tmp_path):
    a, b = make_run(tmp_path / "x" / "mine"), make_run(tmp_path / "y" / "mine")
    add_linear_probe(a), add_linear_probe(b)
    page, _ = report(a, b)
    assert page.tables["Accuracy"][0] == ["", str(a), str(b)]


def test_the_last_picture_of_each_run_is_embedded(runs):
    for run in runs:
        add_linear_probe(run)
    page, _ = report(*runs)
    pictures = [a["src"].split(",")[1] for tag, a in page.elements if tag == "img"]
    assert [base64.b64decode(each) for each in pictures] == [
        (run / "samples" / "epoch-00003.png").read_bytes() for run in runs
    ]
