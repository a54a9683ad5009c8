from __future__ import annotations

import base64
import html
import json
import pickle
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_weights
from sklearn.metrics import auc, roc_auc_score

from ssl_gradmix.data.corruptions import COMMON
from ssl_gradmix.data.datasets import load
from ssl_gradmix.evaluation import report_figures as figures
from ssl_gradmix.evaluation.encoders import load_encoder
from ssl_gradmix.evaluation.features import extract
from ssl_gradmix.evaluation.metrics import roc_curve
from ssl_gradmix.evaluation.report import write_report
from ssl_gradmix.evaluation.report_map import POINTS, feature_map
from ssl_gradmix.evaluation.report_runs import flat
from ssl_gradmix.evaluation.results import Row, write_rows
from ssl_gradmix.settings import Data

SCORES = ("knn_distance", "mahalanobis")
ATTACK = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>`|*$\\frac$"


# Run folders made by hand


def make_run(folder: Path, seed: int = 0, **settings) -> Path:
    """A run folder as training leaves it, but for log, backbone and checkpoint."""
    folder.mkdir(parents=True)
    config = {
        "run": str(folder),
        "extra_view": "gradmix",
        "data": {"name": "digits", "size": 32},
        "training": {"epochs": 3, "seed": seed},
        "environment": {"torch": "2.9.0", "commit": f"{seed:012x}"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config | settings))
    (folder / "samples").mkdir()
    for epoch in (1, 3):
        Image.new("RGB", (40, 20), (epoch, 0, 0)).save(folder / "samples" / f"epoch-{epoch:05d}.png")
    return folder


def add_log(run: Path) -> None:
    log = [{"epoch": e, "loss": 9.0 - e, "pair": 5.0 - e, "knn": 0.5 + 0.1 * e} for e in (1, 2, 3)]
    (run / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log) + '{"epoch": 4, "lo')


def row(task: str, score: str, metric: str, value: float, half: float | None = None, **fields) -> Row:
    """A row of digits, with an interval of that half width; fields that a row has not are parameters."""
    said = {"dataset": "digits", "split": "test", "trial": None, "encoder": "x", "feature": "backbone", "n": 359}
    said |= {name: fields.pop(name) for name in said if name in fields}
    low, high = (None, None) if half is None else (value - half, value + half)
    said |= {"score": score, "metric": metric, "value": value, "ci_low": low, "ci_high": high}
    return Row(task=task, **said, params=fields)


def add_linear_probe(run: Path, seed: int = 0, classes: tuple[str, ...] = tuple("0123456789"), **fields) -> list[Row]:
    draw = np.random.default_rng(seed).uniform

    def linear(metric: str, low: float, high: float, half: float, **params) -> Row:
        return row("linear_probe", "linear", metric, draw(low, high), half, **fields | params)

    rows = [
        linear("top1", 0.6, 0.9, 0.03, epochs=100, learning_rate=draw()),
        linear("top5", 0.9, 0.95, 0.02, epochs=100, learning_rate=draw()),
        linear("top1", 0.3, 0.5, 0.05, epochs=100, learning_rate=draw(), label_fraction=0.01, labels=14),
        row("linear_probe", "knn", "top1", draw(0.6, 0.9), 0.03, **{"k": 20, "temperature": 0.07} | fields),
    ]
    rows += [linear("class_accuracy", 0.2, 0.9, 0.1, n=36, **{"class": name}) for name in classes]
    write_rows(run / "eval" / "linear_probe.json", rows, {"data": {"name": "digits", "size": 32}})
    return rows


def add_osr(run: Path, seed: int = 0, trials: int = 2) -> list[Row]:
    groups = {f"trial{trial}": {"split": f"random:6:{trial}", "trial": trial} for trial in range(trials)}
    return add_detection(run, "osr", groups, seed)


def add_ood(run: Path, *datasets: str) -> list[Row]:
    return add_detection(run, "ood", {dataset: {"dataset": dataset} for dataset in datasets})


def add_detection(run: Path, task: str, groups: dict[str, dict], seed: int = 0, n: int = 300) -> list[Row]:
    random = np.random.default_rng(seed)
    rows, arrays = [], {}
    for group, said in groups.items():
        known = random.permutation(n) < n * 0.6
        fields = {"n": n, "pretraining": "all classes, unlabelled", **said}
        samples = {
            "is_known": known.astype(np.uint8),
            "correct": (known & (random.uniform(size=n) < 0.9)).astype(np.uint8),
            "labels": random.integers(10, size=n),
        }
        for score in SCORES:
            samples[score] = random.normal(size=n) + known
            for metric in ("auroc", "aupr_in", "aupr_out", "fpr95_id_pos", "fpr95_ood_pos", "oscr"):
                rows.append(row(task, score, metric, random.uniform(0.5, 0.9), 0.04, **fields))
            rows.append(row(task, score, "threshold_tpr95", float(np.quantile(samples[score][known], 0.05)), **fields))
        rows.append(row(task, "linear", "accuracy", random.uniform(0.8, 0.9), 0.02, **fields))
        arrays |= {f"{group}/{name}": array for name, array in samples.items()}
    if task == "osr" and len(groups) > 1:
        for score, metric in dict.fromkeys((each.score, each.metric) for each in rows):
            values = [each.value for each in rows if (each.score, each.metric) == (score, metric)]
            fields = {"split": "random:6", "n": n * len(groups), "pretraining": "all classes, unlabelled"}
            rows.append(row(task, score, metric, np.mean(values).item(), **fields, std=np.std(values, ddof=1).item()))
    write_rows(run / "eval" / f"{task}.json", rows)
    save_file(arrays, run / "eval" / f"{task}_samples.safetensors")
    return rows


def add_corruption(run: Path, seed: int = 0, names: tuple[str, ...] = COMMON[:3], **fields) -> list[Row]:
    random = np.random.default_rng(seed)
    rows = []
    for score in ("linear", "knn"):
        rows.append(row("corruption", score, "clean_accuracy", 0.9, 0.02, preset="cifar", **fields))
        for name in names:
            for severity in range(1, 6):
                params = {"corruption": name, "severity": severity, "group": "noise", "preset": "cifar", **fields}
                rows.append(row("corruption", score, "accuracy", random.uniform(0.2, 0.9), 0.02, **params))
        error = row("corruption", score, "mean_corruption_error", random.uniform(0.2, 0.5), corruptions=15, **fields)
        rows.append(error)
    write_rows(run / "eval" / "corruption.json", rows)
    return rows


# Reading what was written


@dataclass
class Page(HTMLParser):
    """A page as a browser would see it: elements with their attributes, and tables cell by cell."""

    text: str
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    best: set[tuple[str, str, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.seen: list[str] = []
        self.heading, self.section, self.listening = "", "", ""
        self.rows: list[list[str]] = []
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs) -> None:
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        if tag in ("h2", "h3", "summary"):
            self.heading, self.listening = "", tag
        elif tag == "table":
            self.rows = []
            self.tables[self.heading] = self.rows
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.listening = "cell"
            if attrs.get("class") == "best":
                self.best.add((self.heading, self.rows[-1][0], len(self.rows[-1]) - 1))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h2", "h3", "summary", "td", "th"):
            self.listening = ""

    def handle_data(self, data: str) -> None:
        self.seen.append(data)
        if self.listening == "cell":
            self.rows[-1][-1] = " ".join((self.rows[-1][-1] + " " + data).split())
        elif self.listening:
            self.heading += data.strip()

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.seen).split())


def report(*runs: Path, map_method: str = "none") -> tuple[Page, str]:
    out = runs[0].parent / "report"
    page, tables = write_report([str(run) for run in runs], out, map_method)
    return Page(page.read_text()), tables.read_text()


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def shown(each: Row) -> str:
    return f"{percent(each.value)} {percent(each.ci_low)} to {percent(each.ci_high)}"


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    return make_run(tmp_path / "a", 0), make_run(tmp_path / "b", 1)


def find(rows: list[Row], score: str, metric: str, trial: int | None = None, **params) -> Row:
    (found,) = [
        each
        for each in rows
        if (each.score, each.metric, each.trial) == (score, metric, trial) and params.items() <= each.params.items()
    ]
    return found


# Numbers


def test_accuracies_stand_in_their_row_and_column(runs):
    of_a, of_b = (add_linear_probe(run, seed) for seed, run in enumerate(runs))
    page, _ = report(*runs)
    top1, top5, few, knn = ([shown(rows[i]) for rows in (of_a, of_b)] for i in range(4))
    assert page.tables["Accuracy"] == [
        ["", "a", "b"],
        ["Linear probe, top-1 100 epochs", *top1],
        ["Linear probe, top-5 100 epochs", *top5],
        ["Linear probe, top-1, 1% of the labels 100 epochs", *few],
        ["Weighted kNN, top-1 k 20 · temperature 0.07", *knn],
    ]
    assert "On digits test · 359 images. In percent" in page.words
    overview = page.tables["Overview"]
    assert [line[1:] for line in overview[1:]] == [list(line) for line in zip(top1, knn, strict=True)]
    assert overview[1][0] == "a third view gradmix, digits, 3 epochs"


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
    assert "25 worst and 25 best of 60 classes" in page.words


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
    assert "On digits random:6 · 600 images · pretraining all classes, unlabelled." in page.words

    everything = page.tables["All metrics of b"]
    metrics = ("auroc", "aupr_in", "aupr_out", "fpr95_id_pos", "fpr95_ood_pos", "oscr")
    assert len(everything) == 1 + len(SCORES) * 3
    for score in SCORES:
        line = next(line for line in everything if line[0] == f"{names[score]} digits random:6:1, trial 1")
        assert line[1:] == [shown(find(of_b, score, metric, trial=1)) for metric in metrics]


def test_a_single_trial_has_its_interval(runs):
    rows = add_osr(runs[0], trials=1)
    page, _ = report(runs[0])
    assert page.tables["AUROC"][1] == ["kNN distance", shown(find(rows, "knn_distance", "auroc", trial=0))]


def test_paired_differences_keep_their_sign(runs):
    rows = add_osr(runs[0], trials=1)
    fields = {"split": "random:6:0", "trial": 0, "n": 300, "compared_with": "b"}
    rows.append(row("osr", "energy", "auroc_difference", -0.0123, 0.02, p_value=0.25, **fields))
    rows.append(row("osr", "energy", "oscr_difference", 0.031, 0.01, p_value=0.002, **fields))
    rows.append(row("osr", "energy", "auroc_difference", 0.01, std=0.02, p_value=0.002))  # of no test of its own
    write_rows(runs[0] / "eval" / "osr.json", rows)
    page, _ = report(runs[0])
    assert page.tables["a minus b, image by image"] == [
        ["Score", "Difference of AUROC", "Difference of OSCR"],
        [
            "Energy digits random:6:0, trial 0",
            "−1.2 −3.2 to +0.8, p = 0.250",
            "+3.1 +2.1 to +4.1, p = 0.002",
        ],
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


# Comparisons


def test_the_largest_value_is_marked_and_of_errors_the_smallest(runs):
    found = [add_linear_probe(run, seed) for seed, run in enumerate(runs)]
    errors = [find(add_corruption(run, seed), "linear", "mean_corruption_error") for seed, run in enumerate(runs)]
    page, markdown = report(*runs)
    top1, top5 = (np.argmax([rows[i].value for rows in found]) + 1 for i in range(2))
    assert ("Accuracy", "Linear probe, top-1 100 epochs", top1) in page.best
    assert ("Accuracy", "Linear probe, top-5 100 epochs", top5) in page.best
    assert sum(heading == "Accuracy" for heading, *_ in page.best) == 4
    smaller = np.argmin([error.value for error in errors]) + 1
    assert ("Means over corruptions", "Linear probe, mean corruption error 15 corruptions", smaller) in page.best
    assert f"**{percent(max(rows[0].value for rows in found))}**" in markdown


@pytest.mark.parametrize("fields", [{"dataset": "mnist"}, {"n": 100}, {"epochs": 5, "k": 3}, {"split": "train"}])
def test_what_was_measured_otherwise_is_not_compared(runs, fields):
    add_linear_probe(runs[0])
    add_linear_probe(runs[1], 1, **fields)
    page, _ = report(*runs)
    lines = page.tables["Accuracy"][1:]
    assert len(lines) == 8
    assert all("–" in line for line in lines)
    assert not page.best


def test_classes_of_the_data_set_apart(runs):
    add_linear_probe(runs[0])
    rows = add_linear_probe(runs[1], 1)
    write_rows(runs[1] / "eval" / "linear_probe.json", rows, {"data": {"name": "digits", "open_set": "random:6:0"}})
    page, _ = report(*runs)
    assert not page.best
    assert "classes random:6:0" in page.words


def test_nothing_is_marked_where_runs_are_equal_or_one(runs):
    for run in runs:
        add_linear_probe(run, 0)
    assert not report(*runs)[0].best
    assert not report(runs[0])[0].best


def test_only_settings_that_differ_and_the_commit(tmp_path):
    a = make_run(tmp_path / "a", 3, optimiser={"lr": 0.1, "clip": None})
    b = make_run(tmp_path / "b", 3, optimiser={"lr": 0.1000001})
    add_linear_probe(a)
    page, _ = report(a, b)
    assert page.tables["Settings that differ, and the commit"] == [
        ["Setting", "a", "b"],
        ["environment.commit", "000000000003", "000000000003"],
        ["optimiser.lr", "0.1", "0.1000001"],
    ]
    assert "Versions common to all: torch 2.9.0." in page.words


def test_flat_settings():
    assert flat({"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None}) == {"a.b.c": 1, "a.d": [1, 2], "e": None}


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
    assert page.tables["Overview"][2][0] == "resnet18 results only"
    assert "resnet18 holds results only" in page.words
    assert "resnet18: no map" in page.words
    assert "a: no map" in page.words


def test_runs_of_the_same_name_go_by_their_paths(tmp_path):
    a, b = make_run(tmp_path / "x" / "mine"), make_run(tmp_path / "y" / "mine")
    add_linear_probe(a), add_linear_probe(b)
    page, _ = report(a, b)
    assert page.tables["Accuracy"][0] == ["", str(a), str(b)]


def test_nothing_evaluated(runs):
    with pytest.raises(ValueError, match=r"nothing to report: no evaluation in .*a, .*b; run eval/linear_probe.py .*a"):
        report(*runs)


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder '.*nowhere'"):
        report(tmp_path / "nowhere")


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(ValueError, match="is no run"):
        report(tmp_path)


def test_a_run_given_twice(runs):
    add_linear_probe(runs[0])
    with pytest.raises(ValueError, match="given twice"):
        report(runs[0], runs[0].parent / "b" / ".." / "a")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("eval/linear_probe.json", b'{"rows": [{"task": 1}]}', "is no file of result rows"),
        ("eval/linear_probe.json", b"\xff\xfe", "is no file of result rows"),
        ("eval/osr_samples.safetensors", b"\x10\x00", "osr_samples.safetensors is damaged"),
        ("config.yaml", b"a: [", "config.yaml is damaged"),
        ("config.yaml", b"just text", "config.yaml is damaged: it holds no settings"),
        ("samples/epoch-00009.png", b"GIF89a", "epoch-00009.png is damaged"),
    ],
)
def test_damaged_files_are_named_and_nothing_is_written(runs, name, content, message):
    add_osr(runs[0])
    (runs[0] / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message):
        report(*runs)
    assert not (runs[0].parent / "report").exists()


def test_a_truncated_picture_is_named(runs):
    add_linear_probe(runs[0])
    picture = runs[0] / "samples" / "epoch-00003.png"
    picture.write_bytes(picture.read_bytes()[:-20])
    with pytest.raises(ValueError, match="epoch-00003.png is damaged"):
        report(*runs)


def test_samples_without_is_known(runs):
    add_osr(runs[0])
    save_file({"trial0/energy": np.zeros(3)}, runs[0] / "eval" / "osr_samples.safetensors")
    with pytest.raises(ValueError, match="no trial0/is_known"):
        report(*runs)


# Hostile files, and a page that stands alone


class Planted:
    """Unpickling it leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (self.trace.touch, ())


@pytest.mark.parametrize("name", ["eval/osr_samples.safetensors", "eval/linear_probe.json", "samples/epoch-9.png"])
def test_pickles_are_refused_and_not_run(runs, tmp_path, name):
    add_osr(runs[0])
    trace = tmp_path / "ran"
    (runs[0] / name).write_bytes(pickle.dumps(Planted(trace)))
    with pytest.raises((ValueError, OSError), match=Path(name).name):
        report(*runs)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Planted(trace)))
    assert trace.exists()  # the attack itself works


def test_yaml_tags_are_refused_and_not_run(runs, tmp_path):
    add_linear_probe(runs[0])
    trace = tmp_path / "ran"
    attack = f"a: !!python/object/apply:os.mkdir ['{trace}']\n"
    (runs[0] / "config.yaml").write_text(attack)
    with pytest.raises(ValueError, match="config.yaml is damaged"):
        report(*runs)
    assert not trace.exists()
    yaml.unsafe_load(attack)
    assert trace.exists()  # the attack itself works


def assert_inert(page: Page) -> None:
    """No script, nothing from elsewhere, no handler of events, and only the elements that the report writes itself."""
    inside_figures = {*("svg", "g", "path", "defs", "use", "clippath", "rect", "text", "tspan", "image", "line")}
    expected = {
        *("html", "head", "meta", "title", "style", "body", "header", "main", "footer", "nav", "section", "details"),
        *("summary", "h1", "h2", "h3", "p", "span", "i", "small", "code", "a", "div", "figure", "figcaption", "img"),
        *("table", "thead", "tbody", "tr", "th", "td"),
    }
    for tag, attributes in page.elements:
        assert tag in inside_figures | expected
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert "javascript:" not in (value or "").lower()
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("#", "data:image/png;base64,"))
    assert "url(http" not in page.text
    assert "@import" not in page.text
    (policy,) = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_names_from_files_are_escaped(tmp_path):
    run = make_run(tmp_path / ATTACK.replace("/", "\u2215"), 0, extra_view=ATTACK, data={"name": ATTACK}, **{ATTACK: 1})
    other = make_run(tmp_path / "b", 1)
    names = {"dataset": ATTACK, "split": ATTACK, ATTACK: ATTACK}
    for each in (run, other):
        add_linear_probe(each, classes=(ATTACK, "cat"), **names)
        add_osr(each)
        rows = add_corruption(each, names=("fog", ATTACK), **names)
        write_rows(each / "eval" / "corruption.json", rows)
        score = row("osr", ATTACK, "auroc", 0.5, split="random:6", pretraining=ATTACK)
        write_rows(each / "eval" / "osr.json", [score])
        samples = {f"trial0/{name}": np.arange(4) % 2 for name in ("is_known", ATTACK.replace("/", "|"))}
        save_file(samples, each / "eval" / "osr_samples.safetensors")
    page, markdown = report(run, other)
    assert_inert(page)
    assert page.tables["Linear probe by class"][1][0] in (ATTACK, "cat")
    assert {line[0] for line in page.tables["Linear probe by class"][1:]} == {ATTACK, "cat"}
    assert page.tables["Overview"][1][0].startswith(run.name)
    assert page.words.count("<script>alert(1)") > 10  # as text
    outside_code = re.sub(r"(`+) .*? \1(?!`)|`[^`\n]*`", "", re.sub(r"\\.", "", markdown))
    assert "<" not in outside_code
    assert "`" not in outside_code


def test_the_page_stands_alone(runs):
    for run in runs:
        add_log(run), add_linear_probe(run), add_osr(run), add_ood(run, "svhn"), add_corruption(run)
    page, _ = report(*runs)
    assert_inert(page)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    wanted = re.findall(r"url\(#([^)]*)\)", page.text)
    wanted += [a[name][1:] for _, a in page.elements for name in ("href", "xlink:href") if a.get(name, "")[:1] == "#"]
    assert len(ids) == len(set(ids))
    assert len(wanted) > 100
    assert page.text.count("<svg viewBox") > 20
    assert {*wanted} <= {*ids}
    assert len(page.text) < 2_000_000


def test_the_last_picture_of_each_run_is_embedded(runs):
    for run in runs:
        add_linear_probe(run)
    page, _ = report(*runs)
    pictures = [a["src"].split(",")[1] for tag, a in page.elements if tag == "img"]
    assert [base64.b64decode(each) for each in pictures] == [
        (run / "samples" / "epoch-00003.png").read_bytes() for run in runs
    ]


def test_the_same_runs_give_the_same_page(runs):
    for seed, run in enumerate(runs):
        add_linear_probe(run, seed), add_osr(run, seed), add_corruption(run, seed)
    assert report(*runs)[0].text == report(*runs)[0].text


# Figures


def paths(svg: str, colour: str) -> list[np.ndarray]:
    """Points of the lines of this colour."""
    drawn = re.findall(rf'<path d="([^"]*)"[^>]*stroke: {re.escape(colour)}', svg)
    return [np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", each), float) for each in drawn]


def test_curves_go_through_their_points_in_the_colour_of_their_run():
    svg = figures.curves([figures.Line(0, [1, 2, 4], [0.1, 0.5, 0.3]), figures.Line(3, [1, 2], [0.2, 0.2])], "epoch")
    (first,), (second,) = (paths(svg, f"var(--run-{run})") for run in (0, 3))
    assert len(first) == 3
    x, y = first.T
    assert (x[1] - x[0]) / (x[2] - x[0]) == pytest.approx(1 / 3, abs=1e-3)
    assert (y[0] - y[2]) / (y[0] - y[1]) == pytest.approx(0.5, abs=1e-3)  # SVG counts downwards
    assert second[0, 1] == pytest.approx(y[0] - 0.1 / 0.4 * (y[0] - y[1]), abs=0.01)


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


# The map of features


@pytest.fixture
def encoder_run(tmp_path) -> Path:
    torch.manual_seed(0)
    kwargs = {"channels": [8, 16, 24, 32], "stem_width": 8, "stem_type": ""}
    described = {
        "architecture": "resnet10t",
        "num_classes": 0,
        "pretrained_cfg": {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.25] * 3},
        "model_args": kwargs,
    }
    run = make_run(tmp_path / "encoded", data={"name": "digits", "size": 16})
    (run / "backbone").mkdir()
    (run / "backbone" / "config.json").write_text(json.dumps(described))
    model = timm.create_model("resnet10t", num_classes=0, **kwargs)
    save_weights(model.state_dict(), run / "backbone" / "model.safetensors")
    return run


def test_map_is_the_principal_components_of_directions(encoder_run):
    from accelerate import Accelerator

    drawn = feature_map(str(encoder_run), {"name": "digits"}, "pca", Accelerator())
    features, labels = extract(load_encoder(encoder_run), load(Data(size=16), "test"))
    directions = features.double().numpy()
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    centred = directions - directions.mean(0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ axes[:2].T
    signs = np.sign((expected * drawn.points).sum(0))
    np.testing.assert_allclose(drawn.points, expected * signs, atol=1e-9)
    np.testing.assert_array_equal(drawn.labels, labels)
    assert drawn.axes[0] == f"component 1, {singular[0] ** 2 / (singular**2).sum():.0%} of variance"
    assert len(list((encoder_run / "eval" / "features").iterdir())) == 1  # kept for the next time


def test_map_reads_kept_features_and_draws_a_seeded_part(encoder_run, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr("ssl_gradmix.evaluation.report_map.POINTS", 50)
    first = feature_map(str(encoder_run), {"name": "digits"}, "tsne", Accelerator())
    monkeypatch.setattr("ssl_gradmix.evaluation.features._encode", None)  # would raise when called
    again = feature_map(str(encoder_run), {"name": "digits"}, "tsne", Accelerator())
    assert first.points.shape == (50, 2)
    assert first.total == 359
    np.testing.assert_array_equal(first.points, again.points)
    assert POINTS == 2000


def test_map_in_the_page_shows_left_out_classes_in_grey(encoder_run):
    add_linear_probe(encoder_run)
    rows = json.loads((encoder_run / "eval" / "linear_probe.json").read_text())
    rows["data"] = {"name": "digits", "classes": ["3", "7"]}
    (encoder_run / "eval" / "linear_probe.json").write_text(json.dumps(rows))
    page, _ = report(encoder_run, map_method="pca")
    assert "encoded: digits/test, 359 of 359" in page.words
    assert "3 7 other classes, or unlabelled" in page.words
    (picture,) = [a["xlink:href"] for tag, a in page.elements if tag == "image"]
    colours = Image.open(BytesIO(base64.b64decode(picture.split(",")[1]))).convert("RGBA")
    pixels = np.asarray(colours).reshape(-1, 4)
    grey = (pixels[:, :3] == (0x90, 0x99, 0xA5)).all(1) & (pixels[:, 3] > 100)
    blue = (pixels[:, :3] == (0x1F, 0x77, 0xB4)).all(1) & (pixels[:, 3] > 100)
    assert grey.sum() > blue.sum() > 0


def test_map_never_downloads(encoder_run, tmp_path):
    from accelerate import Accelerator

    data = {"name": "cifar10", "root": str(tmp_path / "none"), "download": True}
    with pytest.raises(FileNotFoundError, match="cifar10 is not in"):
        feature_map(str(encoder_run), data, "pca", Accelerator())


def test_hostile_class_folders_in_the_map(encoder_run, tmp_path):
    for name in ("<img src=x onerror=alert(1)>", "$\\frac$"):
        for split in ("train", "test"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (16, 16), (i * 40, 10, 10)).save(tmp_path / "images" / split / name / f"{i}.png")
    (encoder_run / "config.yaml").write_text(
        yaml.safe_dump({"data": {"name": "folder", "root": str(tmp_path / "images")}})
    )
    write_rows(encoder_run / "eval" / "linear_probe.json", [row("linear_probe", "linear", "top1", 0.5, 0.1)])
    page, _ = report(encoder_run, map_method="pca")
    assert_inert(page)
    assert "<img src=x onerror=alert(1)>" in page.words
