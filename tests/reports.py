"""Run folders made by hand for reports, and pages read as a browser reads them; imported by its name."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace as Row

import numpy as np
import yaml
from PIL import Image
from safetensors.numpy import save_file

from ssl_gradmix.data.corruptions import COMMON
from ssl_gradmix.evaluation import rows as result_rows
from ssl_gradmix.evaluation.report import write_report

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
    log = [
        {"epoch": e, "loss": 9.0 - e, "loss_views": 5.0 - e, "images_per_second": 100.0, "knn": 0.5 + 0.1 * e}
        for e in (1, 2, 3)
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log) + '{"epoch": 4, "lo')


def write_rows(path: Path, rows: list[Row], about: dict | None = None) -> None:
    result_rows.write(path, result_rows.typed([vars(each) for each in rows]), about or {})


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
    hits = {
        score: np.packbits(np.random.default_rng(seed).uniform(size=359) < 0.8).tobytes().hex()
        for score in ("linear", "knn")
    }
    about = {"data": {"name": "digits", "size": 32}, "hits": {"images": "0123", "n": 359, **hits}}
    write_rows(run / "eval" / "linear_probe.json", rows, about)
    return rows


def add_osr(run: Path, seed: int = 0, trials: int = 2) -> list[Row]:
    groups = {f"random:6:{trial}": {"trial": trial} for trial in range(trials)}
    return add_detection(run, "osr", groups, seed)


def add_ood(run: Path, *datasets: str) -> list[Row]:
    return add_detection(run, "ood", {dataset: {"dataset": dataset} for dataset in datasets})


def add_detection(run: Path, task: str, groups: dict[str, dict], seed: int = 0, n: int = 300) -> list[Row]:
    random, of_images = np.random.default_rng(seed), np.random.default_rng(7)
    rows, arrays = [], {}
    for group, said in groups.items():
        known = of_images.permutation(n) < n * 0.6
        fields = {"n": n, "pretraining": "all classes, unlabeled", **said}
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
            fields = {"n": n, "pretraining": "all classes, unlabeled", "trials": list(range(len(groups)))}
            rows.append(row(task, score, metric, np.mean(values).item(), **fields, std=np.std(values, ddof=1).item()))
    write_rows(run / "eval" / f"{task}.json", rows)
    images = json.dumps({group: f"{n:016x}" for group in groups})
    save_file(arrays, run / "eval" / f"{task}_samples.safetensors", {"images": images})
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


def paths(svg: str, color: str) -> list[np.ndarray]:
    """Points of the lines of this color."""
    drawn = re.findall(rf'<path d="([^"]*)"[^>]*stroke: {re.escape(color)}', svg)
    return [np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", each), float) for each in drawn]


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def shown(each: Row) -> str:
    return f"{percent(each.value)} {percent(each.ci_low)} to {percent(each.ci_high)}"


def find(rows: list[Row], score: str, metric: str, trial: int | None = None, **params) -> Row:
    (found,) = [
        each
        for each in rows
        if (each.score, each.metric, each.trial) == (score, metric, trial) and params.items() <= each.params.items()
    ]
    return found


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
