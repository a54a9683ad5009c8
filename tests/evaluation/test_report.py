"""The report: values looked up in the tables of the page, escaping, and input that is rejected."""

from __future__ import annotations

import base64
import io
import json
import statistics
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from support import load_script

from ssl_gradmix.evaluation import results
from ssl_gradmix.evaluation.intervals import Interval
from ssl_gradmix.evaluation.report import write_report

IMAGES = "digits/test"
TOP1 = "linear top1 epochs 100"


class Page(HTMLParser):
    """The tables, elements and addresses of a page."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.lines: list[list[list[str]]] = []  # cells by table and row
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.text = ""
        self.in_cell = False
        self.feed((folder / "report.html").read_text("utf-8"))
        self.tables = [
            {row[0]: dict(zip(lines[0][1:], row[1:], strict=True)) for row in lines[1:]}
            for lines in self.lines
        ]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag == "table":
            self.lines.append([])
        elif tag == "tr":
            self.lines[-1].append([])
        elif tag in ("td", "th"):
            self.lines[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            row = self.lines[-1][-1]
            row[-1] = " ".join(f"{row[-1]} {data}".split())


def write_results(out: Path, numbers: list[results.Number], name: str) -> None:
    """Results with a figure beside them."""
    rows = results.frame(numbers, name.partition("-")[0], IMAGES, "encoder")
    results.write(out / f"{name}.json", rows, {"images": {IMAGES: "0123456789abcdef"}})
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(out / f"{name}.png")


def write_run(folder: Path, top1: float = 0.9, seed=0, view="gradmix", k=20) -> str:
    """A run folder with a log and results of a linear probe and kNN."""
    training = {"seed": seed, "epochs": 2}
    config = {"run": str(folder), "extra_view": view, "training": training}
    (folder / "eval").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    log = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.5, "knn": 0.5}]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    accuracy = Interval(top1, top1 - 0.05, top1 + 0.05)
    numbers = [
        results.number("linear", "top1", accuracy, 99, learning_rate=top1, epochs=100),
        results.number("knn", "top1", top1 - 0.125, 99, k=k),
        results.number("linear", "class_accuracy", 0.25, 9, **{"class": "cat"}),
    ]
    write_results(folder / "eval", numbers, "linear_probe-digits")
    return str(folder)


@pytest.fixture
def report(tmp_path):
    """Writes the report of runs and reads its page."""

    def write(*runs: str) -> Page:
        out = tmp_path / "out"
        assert write_report(runs, out) == [out / "report.html", out / "report.md"]
        return Page(out)

    return write


def test_two_runs_are_compared(tmp_path, report):
    page = report(write_run(tmp_path / "a"), write_run(tmp_path / "b", 0.75, view="none"))
    settings, _, details = page.tables
    assert settings == {"extra_view": {"a": "gradmix", "b": "none"}}
    assert page.lines[1] == [
        ["on digits/test 01234567, n 99", "a", "b", "a − b (+: a larger)"],
        [TOP1, "0.900 [0.850, 0.950]", "0.750 [0.700, 0.800]", "+0.150"],
        ["knn top1 k 20", "0.775", "0.625", "+0.150"],
    ]
    (per_class,) = details.values()
    assert per_class["a"] == "0.250"
    markdown = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert "| knn top1, k 20 | 0.775 | 0.625 | +0.150 |" in markdown


def test_page_contains_its_figures_and_loads_nothing(tmp_path, report):
    """A figure from the evaluation of each run, and the curves of loss and kNN accuracy."""
    page = report(write_run(tmp_path / "a"), write_run(tmp_path / "b"))
    encoded = [each.partition("data:image/png;base64,")[2] for each in page.addresses]
    figures = [Image.open(io.BytesIO(base64.b64decode(each))) for each in encoded if each]
    assert [figure.size == (6, 4) for figure in figures] == [True, True, False, False]
    assert all(each.startswith(("#", "data:image/png;base64,")) for each in page.addresses)
    assert not page.tags & {"script", "link", "iframe", "object"}


def test_runs_that_differ_in_seed_alone_share_a_column(tmp_path, report):
    values = [0.8, 0.85, 0.95]
    seeds = [write_run(tmp_path / f"a{i}", value, seed=i) for i, value in enumerate(values)]
    page = report(*seeds, write_run(tmp_path / "b", 0.75, view="none"))
    mean, spread = statistics.mean(values), statistics.stdev(values)
    assert page.tables[1][TOP1] == {
        "a0": f"{mean:.3f} ± {spread:.3f} (3 seeds)",
        "b": "0.750 [0.700, 0.800]",
        "a0 − b (+: a0 larger)": f"{mean - 0.75:+.3f}",
    }


def test_values_of_other_protocols_are_in_other_rows(tmp_path, report):
    page = report(write_run(tmp_path / "a"), write_run(tmp_path / "b", k=5, view="none"))
    assert list(page.tables[1]["knn top1 k 20"].values()) == ["0.775", "–", "–"]
    assert list(page.tables[1]["knn top1 k 5"].values()) == ["–", "0.775", "–"]


def test_trials_are_folded_below_their_mean(tmp_path, report):
    mean = results.number("msp", "auroc", 0.7, 99, std=0.1, trials=[0, 1])
    frames = [results.frame([mean], "osr", IMAGES, "x")]
    for trial, value in enumerate([0.6, 0.8]):
        one = results.number("msp", "auroc", value, 99)
        frames.append(results.frame([one], "osr", IMAGES, "x", trial=trial))
    results.write(tmp_path / "x" / "osr-digits.json", pd.concat(frames, ignore_index=True), {})
    main, details = report(str(tmp_path / "x")).tables
    assert main == {"msp AUROC": {"x": "0.700 ± 0.100 (2 trials)"}}
    assert [cells["x"] for cells in details.values()] == ["0.600", "0.800"]


def test_names_and_settings_are_escaped(tmp_path, report):
    name = "<b>$x_{|`*"
    run = write_run(tmp_path / name, view="<script>alert(1)</script>")
    number = results.number("<i>", "top1", 0.5, 9, **{"<u>": "<img src=x>"})
    write_results(tmp_path / name / "eval", [number], "osr-<em>")
    page = report(run, write_run(tmp_path / "b"))
    assert not page.tags & {"b", "i", "u", "em", "script"}
    assert page.tables[0]["extra_view"][name] == "<script>alert(1)</script>"
    assert "x" not in page.addresses
    markdown = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert "<" not in markdown
    assert "$x_{\\|\\`\\*" in markdown


def test_run_without_results_is_named(tmp_path, report):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.yaml").write_text("extra_view: none\n")
    page = report(write_run(tmp_path / "a"), str(tmp_path / "b"))
    assert list(page.tables[1][TOP1]) == ["a"]
    assert "Not evaluated: b." in page.text


INVALID = [
    ("linear_probe-digits.json", "{"),
    ("linear_probe-digits.json", '{"rows": [{"value": 1}]}'),
    ("config.yaml", "data: !!python/object/apply:os.getcwd []"),
    ("runs", None),
]


@pytest.mark.parametrize(("named", "content"), INVALID)
def test_unreadable_or_absent_files_are_named_in_one_line(tmp_path, capsys, named, content):
    run = write_run(tmp_path / "a") if content else str(tmp_path / "nowhere")
    for path in Path(run).rglob(named):
        path.write_text(content)
    script = load_script("eval/report.py")
    assert script.cli.run(script.main, [run, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert not (tmp_path / "out").exists()


def test_folder_given_twice_raises(tmp_path):
    with pytest.raises(ValueError, match="runs"):
        write_report([write_run(tmp_path / "a")] * 2, tmp_path)


def test_folder_of_runs_names_its_members(tmp_path):
    for name in ("b", "a"):
        write_run(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"mean \S+/a \S+/b\?"):
        write_report([tmp_path], tmp_path / "out")
